//! Walks through the page tables in an image of physical memory: a dump, a file, another simulator's memory.
//!
//! The rules are those of the guest's walk (modes, reserved bits, rights), but nothing is changed, nothing is counted,
//! and there is no VM. [`Viewer::translate`] does many addresses at a time, [`Viewer::walk`] tells each step of one.

mod batch;
mod source;
mod walk;

pub use batch::{Block, Blocks};
pub use source::{Image, Segment, Source};
pub use walk::{Fault, Found, Step};

use crate::bits::{CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NX};
use crate::config::{CpuFeatures, Vendor, ZEN};
use crate::cpu::{CpuRole, Registers, permission_fault};
use crate::error::{ConfigError, refuse};
use crate::types::{Access, AccessKind, ErrorCode};

/// Whether the access is meant, and by whom.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// What the access does.
    pub kind: AccessKind,
    /// It is made at CPL 3.
    pub user: bool,
    /// CR0.WP: a supervisor's stores obey W.
    pub wp: bool,
    /// EFER.NX: bit 63 forbids execution; else it is reserved.
    pub nx: bool,
    /// CR4.SMEP: the supervisor does not execute from user pages.
    pub smep: bool,
    /// CR4.SMAP: the supervisor does not touch user pages.
    pub smap: bool,
    /// Physical address bits; those above are reserved in an entry.
    pub maxphyaddr: u32,
}

impl Default for Rules {
    /// A supervisor's load on a CPU that forbids nothing that a table does not.
    fn default() -> Self {
        let kind = AccessKind::Read;
        Self { kind, user: false, wp: true, nx: true, smep: false, smap: false, maxphyaddr: 52 }
    }
}

/// The paging modes by the names that the package uses, and the registers that select each.
const NAMES: &[(&str, u64, u64)] = &[
    ("4-level", CR4_PAE, EFER_LME | EFER_LMA),
    ("5-level", CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA),
    ("pae", CR4_PAE, 0),
    ("32-bit", CR4_PSE, 0),
];

/// Who looks at an image: the paging mode and the rules.
#[derive(Clone, Copy, Debug)]
pub struct Viewer {
    role: CpuRole,
    cpu: CpuFeatures,
    /// A bit for each set of rights that does not allow the access.
    forbidden: u8,
}

impl Viewer {
    /// A viewer in the mode of that name: 4-level, 5-level, pae or 32-bit (with 4 MiB pages).
    ///
    /// Reserved bits are Intel's, which ignores what AMD reserves: a dump may come from either.
    ///
    /// # Errors
    /// A mode that does not exist; more or fewer physical address bits than a CPU can have.
    pub fn new(mode: &str, rules: &Rules) -> Result<Self, ConfigError> {
        let Some((_, cr4, efer)) = NAMES.iter().find(|row| row.0 == mode) else {
            let names: Vec<_> = NAMES.iter().map(|row| row.0).collect();
            return refuse!("paging mode {mode:?} is not known; choose one of {}", names.join(", "));
        };
        if !(32..=52).contains(&rules.maxphyaddr) {
            return refuse!("maxphyaddr {} is not from 32 to 52", rules.maxphyaddr);
        }
        let when = |yes: bool, bit: u64| if yes { bit } else { 0 };
        let regs = Registers {
            cr0: CR0_PG | 1 | when(rules.wp, CR0_WP),
            cr3: 0,
            cr4: cr4 | when(rules.smep, CR4_SMEP) | when(rules.smap, CR4_SMAP),
            efer: efer | when(rules.nx, EFER_NX),
            cs_l: false,
        };
        let cpu = CpuFeatures { vendor: Vendor::Intel, gbpages: true, maxphyaddr: rules.maxphyaddr, ..ZEN };
        let access = rules.kind.code().with(ErrorCode::U.when(rules.user));
        let role = CpuRole::of(&regs, &cpu);
        let forbidden = (0..8).filter(|rights| permission_fault(&role, Access(*rights), access, false));
        Ok(Self { role, cpu, forbidden: forbidden.fold(0, |all, rights| all | 1 << rights) })
    }
}

#[cfg(test)]
mod tests;

//! One virtual CPU: registers, what they mean for paging, roots, requests and the small caches that KVM keeps with it.

use crate::bits::{
    CR0_CD, CR0_NW, CR0_PE, CR0_PG, CR0_WP, CR4_PAE, CR4_PCIDE, CR4_PKE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME,
    EFER_NX, PT_NX,
};
use crate::config::{CpuFeatures, PREV_ROOTS};
use crate::counters::VcpuCounters;
use crate::error::{ConfigError, refuse};
use crate::mode::{LEVEL4, Mode};
use crate::role::Role;
use crate::types::{Access, Gfn, Gva, PageId};

/// The control registers that decide paging.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registers {
    /// CR0.
    pub cr0: u64,
    /// CR3, without bit 63.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

impl Default for Registers {
    /// A 64-bit guest with NX and write protection, and a page table at 0.
    fn default() -> Self {
        Self { cr0: CR0_PG | CR0_WP | 0x33, cr3: 0, cr4: CR4_PAE, efer: EFER_LME | EFER_LMA | EFER_NX }
    }
}

impl Registers {
    /// Refuses what no CPU of these features can hold, and the paging modes that the engine does not have yet.
    ///
    /// # Errors
    /// An impossible or unsupported combination; the message names it.
    pub fn check(&self, cpu: &CpuFeatures) -> Result<(), ConfigError> {
        let (pg, pae) = (self.cr0 & CR0_PG != 0, self.cr4 & CR4_PAE != 0);
        let (lme, lma) = (self.efer & EFER_LME != 0, self.efer & EFER_LMA != 0);
        if self.cr0 & CR0_PG != 0 && self.cr0 & CR0_PE == 0 {
            return refuse!("cr0 {:#x}: PG needs PE", self.cr0);
        }
        if self.cr0 & CR0_NW != 0 && self.cr0 & CR0_CD == 0 || self.cr0 >> 32 != 0 {
            return refuse!("cr0 {:#x}: NW needs CD, and bits 63:32 must be 0", self.cr0);
        }
        if lma != (lme && pg) {
            return refuse!("efer {:#x}: LMA must be set exactly if LME and CR0.PG are", self.efer);
        }
        if lma && !pae {
            return refuse!("cr4 {:#x}: long mode needs PAE", self.cr4);
        }
        Mode::of(self.cr0, self.cr4, self.efer)?;
        if self.cr4 & CR4_PKE != 0 {
            return refuse!("cr4 {:#x}: protection keys (PKE) are not supported yet", self.cr4);
        }
        if self.cr4 & CR4_PCIDE != 0 && !cpu.pcid {
            return refuse!("cr4 {:#x}: profile {:?} has no PCID", self.cr4, cpu.name);
        }
        if self.cr3 >> cpu.maxphyaddr != 0 {
            return refuse!("cr3 {:#x} is beyond the guest's {} physical address bits", self.cr3, cpu.maxphyaddr);
        }
        Ok(())
    }
}

/// What the guest walker obeys (`kvm_calc_cpu_role`, 6.1), computed when a context is reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuRole {
    /// How the guest's tables are built.
    pub mode: &'static Mode,
    /// EFER.NX: bit 63 of an entry forbids execution, else it is reserved.
    pub nx: bool,
    /// CR0.WP: supervisor writes obey W.
    pub wp: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// Bits that are reserved in an entry of any level.
    pub reserved: u64,
    /// Whether an entry of level 3 may be a leaf.
    pub gbpages: bool,
}

impl CpuRole {
    /// The role that the registers give.
    #[must_use]
    pub fn of(regs: &Registers, cpu: &CpuFeatures) -> Self {
        let nx = regs.efer & EFER_NX != 0;
        let beyond = ((1u64 << 52) - 1) & !((1 << cpu.maxphyaddr) - 1);
        Self {
            mode: &LEVEL4,
            nx,
            wp: regs.cr0 & CR0_WP != 0,
            smep: regs.cr4 & CR4_SMEP != 0,
            smap: regs.cr4 & CR4_SMAP != 0,
            reserved: beyond | if nx { 0 } else { PT_NX },
            gbpages: cpu.gbpages,
        }
    }

    /// The role that shadow pages are made with (`kvm_init_shadow_mmu`, 6.1).
    #[must_use]
    pub const fn root_role(&self) -> Role {
        Role::root(self.mode.root, self.wp, self.smep, self.smap)
    }
}

/// One root of the shadow tables: the page, and the CR3 value it was loaded for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Root {
    /// The root page, `None` while no root is loaded.
    pub page: Option<PageId>,
    /// The CR3 value (with PCID and cache bits, without bit 63).
    pub pgd: u64,
}

/// The last MMIO access of a vCPU (`vcpu->arch.mmio_gva` and its neighbours, 6.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MmioCache {
    /// The page's address, 0 = none.
    pub gva: u64,
    /// The frame.
    pub gfn: Gfn,
    /// W and U of the translation.
    pub access: Access,
    /// The memslot generation it belongs to.
    pub generation: u64,
}

macro_rules! requests {
    ($($name:ident $bit:literal $doc:literal;)*) => {
        impl Requests { $(#[doc = $doc] pub const $name: Self = Self($bit);)* }
    };
}

/// Requests that are served when the vCPU enters the guest (`KVM_REQ_*`, 6.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Requests(pub u8);

requests! {
    FREE_OBSOLETE_ROOTS 1 "Free roots that were zapped.";
    MMU_SYNC 2 "Sync the current root.";
    LOAD_MMU_PGD 4 "Load the hardware CR3.";
    TLB_FLUSH 8 "Flush all TLB entries; takes the place of `TLB_FLUSH_CURRENT`.";
    TLB_FLUSH_CURRENT 16 "Flush the TLB entries of the current root.";
    TLB_FLUSH_GUEST 32 "As the guest asked: sync, forget unsync previous roots, flush.";
    TRIPLE_FAULT 64 "Shut down.";
}

impl Requests {
    /// Adds requests.
    pub fn raise(&mut self, what: Self) {
        self.0 |= what.0;
    }

    /// Takes a request if it is there.
    pub fn check(&mut self, what: Self) -> bool {
        let there = self.0 & what.0 != 0;
        self.0 &= !what.0;
        there
    }
}

/// One virtual CPU.
#[derive(Clone, Debug)]
pub struct Vcpu {
    /// Its number.
    pub id: u8,
    /// Control registers.
    pub regs: Registers,
    /// What they mean for guest walks.
    pub role: CpuRole,
    /// The current root.
    pub root: Root,
    /// Roots used before, the newest first.
    pub prev_roots: [Root; PREV_ROOTS],
    /// The MMIO cache.
    pub mmio: MmioCache,
    /// RIP and fault address of the last instruction that was resumed by the retry rule.
    pub last_retry: (u64, u64),
    /// Requests to serve at entry.
    pub requests: Requests,
    /// Statistics.
    pub counters: VcpuCounters,
    /// The exception being delivered: vector and error code, for `[reinjected]`.
    pub injected: Option<(u8, u32)>,
}

impl Vcpu {
    /// A vCPU with the default registers and no root.
    #[must_use]
    pub fn new(id: u8, cpu: &CpuFeatures) -> Self {
        let regs = Registers::default();
        Self {
            id,
            role: CpuRole::of(&regs, cpu),
            regs,
            root: Root::default(),
            prev_roots: [Root::default(); PREV_ROOTS],
            mmio: MmioCache::default(),
            last_retry: (0, 0),
            requests: Requests::default(),
            counters: VcpuCounters::default(),
            injected: None,
        }
    }

    /// Whether the MMIO cache answers for that address (`vcpu_match_mmio_gva` and `vcpu_match_mmio_gen`, 6.1).
    #[must_use]
    pub const fn mmio_matches(&self, gva: Gva, generation: u64) -> bool {
        self.mmio.gva != 0 && self.mmio.gva == gva.page().0 && self.mmio.generation == generation
    }

    /// Forgets the MMIO cache (`vcpu_clear_mmio_info` with `MMIO_GVA_ANY`, 6.1).
    pub fn clear_mmio(&mut self) {
        self.mmio.gva = 0;
    }

    /// Forgets the MMIO cache if it holds that page.
    pub fn clear_mmio_page(&mut self, gva: Gva) {
        if self.mmio.gva == gva.page().0 {
            self.mmio.gva = 0;
        }
    }

    /// The active process-context identifier, 0 without CR4.PCIDE.
    #[must_use]
    pub const fn pcid(&self) -> u64 {
        if self.regs.cr4 & CR4_PCIDE != 0 { self.regs.cr3 & 0xfff } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bits::CR4_LA57;
    use crate::config::{QEMU_TCG, ZEN};

    #[test]
    fn modes_that_are_not_there_yet_are_refused_by_name() {
        let ok = Registers::default();
        assert_eq!(ok.check(&ZEN), Ok(()));
        let text = |r: Registers| r.check(&ZEN).unwrap_err().0;
        assert!(text(Registers { efer: 0, ..ok }).contains("PAE paging"));
        assert!(text(Registers { efer: 0, cr4: 0, ..ok }).contains("32-bit"));
        assert!(text(Registers { efer: 0, cr0: 0x33, ..ok }).contains("paging off"));
        assert!(text(Registers { cr4: CR4_PAE | CR4_LA57, ..ok }).contains("LA57"));
        assert!(Registers { cr4: CR4_PAE | CR4_PCIDE, ..ok }.check(&QEMU_TCG).is_err());
        assert!(Registers { cr3: 1 << 48, ..ok }.check(&ZEN).is_err());
    }

    #[test]
    fn a_request_is_taken_once() {
        let mut requests = Requests::default();
        requests.raise(Requests::MMU_SYNC);
        assert!(requests.check(Requests::MMU_SYNC));
        assert!(!requests.check(Requests::MMU_SYNC));
    }
}

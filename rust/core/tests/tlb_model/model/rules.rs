//! What an entry means in each paging mode, and whom a page lets in (SDM vol. 3 chapter 4, APM vol. 2 chapter 5).

use crate::world::Paging;
use shadowkvm_core::config::{CpuFeatures, Vendor};
use shadowkvm_core::cpu::Registers;

pub(crate) const P: u64 = 1;
pub(crate) const W: u64 = 1 << 1;
pub(crate) const U: u64 = 1 << 2;
pub(crate) const PS: u64 = 1 << 7;
pub(crate) const G: u64 = 1 << 8;
pub(crate) const NX: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits `low` to `high`.
pub(crate) const fn bits(low: u32, high: u32) -> u64 {
    if low > high { 0 } else { (!0 << low) & (!0 >> (63 - high)) }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Fetch,
}

/// An access to one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) gva: u64,
    pub(crate) kind: Kind,
    pub(crate) user: bool,
    /// EFLAGS.AC lets the supervisor touch the user's pages.
    pub(crate) ac: bool,
}

/// Ways to read an entry that some vCPU has had. KVM's shadow pages know nothing of these bits (`kvm_mmu_page_role`, 6.1),
/// so what was read in one way stays in the shadow after the way has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// EFER.NX was on: bit 63 was not reserved.
    pub(crate) nx: bool,
    /// Entries of 8 bytes were read in long mode, where bits 52 to 62 are not reserved.
    pub(crate) long: bool,
    /// CR4.PSE was off, and on, in 32-bit paging.
    pub(crate) pse: [bool; 2],
}

/// How a vCPU reads entries and checks rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) paging: Paging,
    pub(crate) nx: bool,
    pub(crate) wp: bool,
    pub(crate) smep: bool,
    pub(crate) smap: bool,
    pub(crate) pse: bool,
    /// PKRU, with CR4.PKE in long mode.
    pub(crate) pkru: Option<u32>,
    pub(crate) cpu: CpuFeatures,
    /// Bits 52 to 62 of an 8-byte entry are ignored.
    ignores_high: bool,
}

/// What one entry says in a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Absent,
    Reserved,
    Table(u64),
    Leaf(u64),
}

impl Mode {
    pub(crate) fn new(regs: &Registers, pkru: u32, cpu: CpuFeatures) -> Self {
        use shadowkvm_core::bits::{CR0_WP, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_NX};
        let paging = Paging::of(regs);
        let long = matches!(paging, Paging::Four | Paging::Five);
        Self {
            paging,
            nx: regs.efer & EFER_NX != 0,
            wp: regs.cr0 & CR0_WP != 0,
            smep: regs.cr4 & CR4_SMEP != 0,
            smap: regs.cr4 & CR4_SMAP != 0,
            pse: regs.cr4 & CR4_PSE != 0,
            pkru: (long && regs.cr4 & CR4_PKE != 0).then_some(pkru),
            cpu,
            ignores_high: long,
        }
    }

    /// Levels with entries in memory that are read by a walk.
    pub(crate) const fn levels(self) -> u32 {
        match self.paging {
            Paging::Off => 0,
            Paging::Two | Paging::Pae => 2,
            Paging::Four => 4,
            Paging::Five => 5,
        }
    }

    pub(crate) fn four_bytes(self) -> bool {
        self.paging == Paging::Two
    }

    const fn index_bits(self) -> u32 {
        if matches!(self.paging, Paging::Two) { 10 } else { 9 }
    }

    /// The lowest address bit that an entry of a level translates.
    const fn shift(self, level: u32) -> u32 {
        12 + self.index_bits() * (level - 1)
    }

    pub(crate) const fn index(self, gva: u64, level: u32) -> usize {
        (gva >> self.shift(level)) as usize & ((1 << self.index_bits()) - 1)
    }

    /// Whether the address exists: canonical, or of 32 bits.
    pub(crate) const fn takes(self, gva: u64) -> bool {
        match self.paging {
            Paging::Off | Paging::Two | Paging::Pae => gva >> 32 == 0,
            Paging::Four => matches!(gva >> 47, 0 | 0x1_ffff),
            Paging::Five => matches!(gva >> 56, 0 | 0xff),
        }
    }

    /// Whether bit 7 says that the entry maps a page.
    const fn large(self, value: u64, level: u32) -> bool {
        let may = match (self.paging, level) {
            (Paging::Two, 2) => self.pse,
            (Paging::Pae | Paging::Four | Paging::Five, 2) => true,
            (Paging::Four | Paging::Five, 3) => self.cpu.gbpages,
            _ => false,
        };
        may && value & PS != 0
    }

    /// The bits that must be 0 in a present entry of the level.
    fn reserved(self, level: u32, large: bool) -> u64 {
        if self.four_bytes() {
            // PSE-36 as KVM offers it: 36 bits, of which 13 to 16 hold the upper four (the SDM's M is 36).
            return if large { bits(17, 21) } else { 0 };
        }
        let beyond = bits(self.cpu.maxphyaddr, if self.ignores_high { 51 } else { 62 });
        let by_level = match level {
            // APM, 5.3.3: of the two upper levels bit 8 must be 0, too.
            4 | 5 if self.cpu.vendor == Vendor::Amd => PS | G,
            4 | 5 => PS,
            3 if !self.cpu.gbpages => PS,
            2 | 3 if large => bits(13, self.shift(level) - 1),
            _ => 0,
        };
        beyond | by_level | if self.nx { 0 } else { NX }
    }

    /// Reads an entry of `level`.
    pub(crate) fn step(self, value: u64, level: u32, gva: u64) -> Step {
        if value & P == 0 {
            return Step::Absent;
        }
        let large = self.large(value, level);
        if value & self.reserved(level, large) != 0 {
            return Step::Reserved;
        }
        let address = value & ADDRESS;
        if level > 1 && !large {
            return Step::Table(address >> 12);
        }
        let span = 1u64 << self.shift(level);
        let above = if large && self.four_bytes() { (value >> 13 & 0xf) << 32 } else { 0 };
        Step::Leaf((above | address & !(span - 1) | gva & (span - 1)) >> 12)
    }

    /// As it, or another vCPU, may have read entries before; itself if there is no other way.
    pub(crate) fn before(self, seen: Seen) -> Self {
        Self {
            nx: self.nx || seen.nx,
            ignores_high: self.ignores_high || seen.long,
            pse: self.pse != (seen.pse == [true; 2]),
            ..self
        }
    }

    pub(crate) fn note(self, seen: &mut Seen) {
        seen.nx |= self.nx;
        match self.paging {
            Paging::Four | Paging::Five => seen.long = true,
            Paging::Two => seen.pse[usize::from(self.pse)] = true,
            Paging::Off | Paging::Pae => {}
        }
    }

    /// The bits of the error code of a fault that come from the access.
    pub(crate) fn code(self, access: &Access) -> u32 {
        let kind = match access.kind {
            Kind::Read => 0,
            Kind::Write => 2,
            // The SDM wants CR4.PAE beside EFER.NX; KVM asks for EFER.NX alone (`FNAME(walk_addr_generic)`, 6.1).
            Kind::Fetch if self.nx || self.smep => 16,
            Kind::Fetch => 0,
        };
        kind | if access.user { 4 } else { 0 }
    }
}

/// What the entries on the way together say of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) gfn: u64,
    pub(crate) w: bool,
    pub(crate) u: bool,
    pub(crate) x: bool,
    /// Every entry has A.
    pub(crate) a: bool,
    /// The leaf has D.
    pub(crate) d: bool,
    /// The leaf's protection key.
    key: u32,
}

impl Page {
    pub(crate) const ALL: Self = Self { gfn: 0, w: true, u: true, x: true, a: true, d: true, key: 0 };

    pub(crate) const fn at(self, gfn: u64) -> Self {
        Self { gfn, ..self }
    }

    pub(crate) fn through(self, value: u64) -> Self {
        use super::memory::{A, D};
        Self {
            gfn: 0,
            w: self.w && value & W != 0,
            u: self.u && value & U != 0,
            x: self.x && value & NX == 0,
            a: self.a && value & A != 0,
            d: value & D != 0,
            key: (value >> 59) as u32 & 0xf,
        }
    }

    /// The rights of W, U and NX: no A, no D, no key.
    pub(crate) fn permits(self, access: &Access, mode: Mode) -> bool {
        if mode.paging == Paging::Off {
            return true;
        }
        let by_kind = match access.kind {
            Kind::Read => true,
            Kind::Write => self.w || !access.user && !mode.wp,
            Kind::Fetch => self.x || !mode.nx,
        };
        let guarded = if access.kind == Kind::Fetch { mode.smep } else { mode.smap && !access.ac };
        by_kind && if access.user { self.u } else { !(self.u && guarded) }
    }

    /// Whether the page's key shuts the access out (SDM vol. 3, 4.6.2).
    pub(crate) fn locked(self, access: &Access, mode: Mode) -> bool {
        let Some(pkru) = mode.pkru.filter(|_| self.u && access.kind != Kind::Fetch) else { return false };
        let (no_access, no_write) = (pkru >> (2 * self.key) & 1 != 0, pkru >> (2 * self.key + 1) & 1 != 0);
        no_access || no_write && access.kind == Kind::Write && (access.user || mode.wp)
    }
}

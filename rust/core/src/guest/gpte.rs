//! Entries of the guest's tables.

use crate::bits::{PT_A, PT_ADDR, PT_D, PT_NX, PT_P, PT_PS, PT_U, PT_W, bit_range};
use crate::cpu::CpuRole;
use crate::mode::Mode;
use crate::types::{Access, Gfn, Level};

/// One entry of a guest table; one of 4 bytes has its upper half clear.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Gpte(pub u64);

impl Gpte {
    /// Whether P is set.
    #[must_use]
    pub const fn present(self) -> bool {
        self.0 & PT_P != 0
    }

    /// Whether A is set.
    #[must_use]
    pub const fn accessed(self) -> bool {
        self.0 & PT_A != 0
    }

    /// Whether D is set.
    #[must_use]
    pub const fn dirty(self) -> bool {
        self.0 & PT_D != 0
    }

    /// Whether the entry maps memory: at level 1, and where PS means "large" (`FNAME(is_last_gpte)`, 6.1).
    #[inline]
    #[must_use]
    pub const fn is_leaf(self, role: &CpuRole, level: Level) -> bool {
        level.0 == 1 || level.0 <= role.largest.0 && self.0 & PT_PS != 0
    }

    /// Whether a walk goes on to a table by the entry, and changes nothing in it.
    #[inline(always)]
    #[must_use]
    pub const fn leads_on(self, role: &CpuRole, level: Level) -> bool {
        self.present() && self.accessed() && !self.has_reserved(role, level) && !self.is_leaf(role, level)
    }

    /// Whether a reserved bit is set (`is_rsvd_bits_set`, 6.1).
    #[inline]
    #[must_use]
    pub const fn has_reserved(self, role: &CpuRole, level: Level) -> bool {
        self.0 & role.reserved[level.0 as usize][(self.0 & PT_PS != 0) as usize] != 0
    }

    /// The rights of this entry alone (`gpte_access`, 6.1).
    #[must_use]
    pub const fn access(self) -> Access {
        let mut access = 0;
        if self.0 & PT_NX == 0 {
            access |= Access::X.0;
        }
        if self.0 & PT_W != 0 {
            access |= Access::W.0;
        }
        if self.0 & PT_U != 0 {
            access |= Access::U.0;
        }
        Access(access)
    }

    /// The frame that the entry names: a table's, or a 4 KiB page's.
    #[inline]
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn((self.0 & PT_ADDR) >> 12)
    }

    /// The first frame of the page that a leaf of `level` maps (`gpte_to_gfn_lvl`, 6.1). A large page of 4-byte entries
    /// has its address bits 32 to 35 in bits 13 to 16 (`pse36_gfn_delta`, 6.1).
    #[inline]
    #[must_use]
    pub const fn leaf_gfn(self, mode: &Mode, level: Level) -> Gfn {
        let first = self.gfn().0 & !(mode.pages(level) - 1);
        if mode.entry_bytes == 4 && level.0 == 2 { Gfn(first | (self.0 & bit_range(13, 16)) << 7) } else { Gfn(first) }
    }

    /// The protection key of a leaf (`gpte_pkeys`, 6.1).
    #[must_use]
    pub const fn key(self) -> u32 {
        (self.0 >> 59) as u32 & 0xf
    }

    /// The rights of a leaf after the D bit is taken into account: a clean page is not writable, so that the first
    /// write faults and D can be set (`protect_clean_gpte`, 6.1).
    #[must_use]
    pub const fn protect_clean(self, access: Access) -> Access {
        if self.dirty() { access } else { access.without(Access::W) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bits::CR4_PSE;
    use crate::config::QEMU_TCG;
    use crate::cpu::Registers;

    #[test]
    fn reserved_bits_depend_on_level_and_size() {
        let role = CpuRole::of(&Registers::default(), &QEMU_TCG);
        assert!(Gpte(1 << 45 | 0x63).has_reserved(&role, Level(1)));
        assert!(!Gpte(1 << 55 | 0x63).has_reserved(&role, Level(1)));
        assert!(Gpte(0x0100_20e3).has_reserved(&role, Level(2)));
        assert!(!Gpte(0x0100_2063).has_reserved(&role, Level(2)));
        assert!(Gpte(0x20e7).has_reserved(&role, Level(4)));
        assert!(Gpte(0x4000_2000 | 0xe3).has_reserved(&role, Level(3)));
        assert!(!Gpte(0x4000_1000 | 0xe3).has_reserved(&role, Level(3)), "PAT bit of a large page is legal");
        let old = CpuRole::of(&Registers { efer: 0x500, ..Registers::default() }, &QEMU_TCG);
        assert!(Gpte(PT_NX | 0x63).has_reserved(&old, Level(1)));
    }

    #[test]
    fn large_pages_of_4_byte_entries_reach_beyond_4_gib() {
        let regs = Registers { efer: 0, cs_l: false, cr4: CR4_PSE, ..Registers::default() };
        let role = CpuRole::of(&regs, &QEMU_TCG);
        let entry = Gpte(0x0041_e0e3);
        assert!(entry.is_leaf(&role, Level::PD) && !entry.has_reserved(&role, Level::PD));
        assert_eq!(entry.leaf_gfn(role.mode, Level::PD), Gfn(0xf0_0400));
        assert!(Gpte(0x0042_00e3).has_reserved(&role, Level::PD));
        let none = CpuRole::of(&Registers { cr4: 0, ..regs }, &QEMU_TCG);
        assert!(!Gpte(0x0042_00e3).is_leaf(&none, Level::PD) && !Gpte(0x0042_00e3).has_reserved(&none, Level::PD));
    }
}

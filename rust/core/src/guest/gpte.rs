//! Entries of the guest's tables.

use crate::bits::{PT_A, PT_ADDR, PT_D, PT_NX, PT_P, PT_PS, PT_U, PT_W};
use crate::cpu::CpuRole;
use crate::types::{Access, Gfn, Level};

/// Bits that are reserved at a level beside those reserved everywhere: `[level][is a leaf by PS]`.
/// AMD: bit 8 of a level-4 entry is reserved too (`reset_guest_rsvds_bits_mask`, 6.1).
const RESERVED: [[u64; 2]; 6] = [
    [0, 0],
    [0, 0],
    [0, bits(13, 20)],
    [0, bits(13, 29)],
    [PT_PS | 1 << 8, PT_PS | 1 << 8],
    [PT_PS | 1 << 8, PT_PS | 1 << 8],
];

const fn bits(low: u32, high: u32) -> u64 {
    ((1 << (high + 1)) - 1) & !((1 << low) - 1)
}

/// One 8-byte entry of a guest table.
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

    /// Whether the entry maps memory: at level 1, and where PS means "large".
    #[must_use]
    pub const fn is_leaf(self, level: Level) -> bool {
        level.0 == 1 || level.0 <= 3 && self.0 & PT_PS != 0
    }

    /// Whether a reserved bit is set (`is_rsvd_bits_set`, 6.1).
    #[must_use]
    pub const fn has_reserved(self, role: &CpuRole, level: Level) -> bool {
        let large = self.0 & PT_PS != 0;
        let mut mask = role.reserved | RESERVED[level.0 as usize][large as usize];
        if level.0 == 3 && large && !role.gbpages {
            mask |= PT_PS;
        }
        self.0 & mask != 0
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

    /// The frame that the entry points to, rounded to the page size of a leaf of `level`.
    #[must_use]
    pub const fn gfn(self, level: Level) -> Gfn {
        Gfn((self.0 & PT_ADDR) >> 12).round(level)
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
        let old = CpuRole { nx: false, reserved: role.reserved | PT_NX, ..role };
        assert!(Gpte(PT_NX | 0x63).has_reserved(&old, Level(1)));
    }
}

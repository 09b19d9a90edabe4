//! Shadow entries, bit for bit as KVM 6.1 makes them on an AMD host with A/D bits (`spte.h`).

use crate::bits::{PT_A, PT_ADDR, PT_D, PT_NX, PT_P, PT_PS, PT_U, PT_W};
use crate::config::MMIO_GEN_BITS;
use crate::types::{Access, Gfn, PageId, Pfn};

/// The host may write the page.
pub const HOST_WRITABLE: u64 = 1 << 9;
/// The shadow MMU itself has no reason to keep the page read-only.
pub const MMU_WRITABLE: u64 = 1 << 10;
/// The entry is a shadow-present one (a leaf or a table pointer), not an MMIO entry.
pub const SHADOW_PRESENT: u64 = 1 << 11;
/// Reserved for the CPU; marks an MMIO entry.
const MMIO: u64 = 1 << 51;
const MMIO_GEN_LOW: u64 = 0xff;
/// Host frame of shadow page 0; above every guest page's frame.
const TABLE_PFN: u64 = 1 << 37;

/// One shadow entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Spte(pub u64);

impl Spte {
    /// An entry that holds nothing.
    pub const EMPTY: Self = Self(0);

    /// A pointer to the table `child` (`make_nonleaf_spte`, 6.1): `...827`.
    #[must_use]
    pub const fn table(child: PageId) -> Self {
        Self((TABLE_PFN + child.0 as u64) << 12 | SHADOW_PRESENT | PT_P | PT_W | PT_U | PT_A)
    }

    /// An MMIO entry (`make_mmio_spte`, 6.1).
    #[must_use]
    pub const fn mmio(gfn: Gfn, access: Access, generation: u64) -> Self {
        let generation = generation & ((1 << MMIO_GEN_BITS) - 1);
        let gen_bits = (generation & MMIO_GEN_LOW) << 3 | (generation >> 8) << 52;
        Self(MMIO | PT_P | (access.0 & (Access::W.0 | Access::U.0)) as u64 | gfn.0 << 12 | gen_bits)
    }

    /// Whether the entry maps a page or points to a table.
    #[inline]
    #[must_use]
    pub const fn present(self) -> bool {
        self.0 & SHADOW_PRESENT != 0
    }

    /// Whether the entry is an MMIO one.
    #[inline]
    #[must_use]
    pub const fn is_mmio(self) -> bool {
        self.0 & (MMIO | SHADOW_PRESENT) == MMIO
    }

    /// Whether a present entry of an upper level maps a large page.
    #[inline]
    #[must_use]
    pub const fn large(self) -> bool {
        self.0 & PT_PS != 0
    }

    /// Whether W is set.
    #[inline]
    #[must_use]
    pub const fn writable(self) -> bool {
        self.0 & PT_W != 0
    }

    /// Whether it is present without W: a leaf where each store faults.
    #[inline]
    #[must_use]
    pub const fn lacks_w(self) -> bool {
        self.0 & (SHADOW_PRESENT | PT_W) == SHADOW_PRESENT
    }

    /// Whether a present entry points to a table; `level` is the level of the page that holds it.
    #[inline]
    #[must_use]
    pub const fn is_table(self, level: u8) -> bool {
        level > 1 && self.present() && !self.large()
    }

    /// The table that the entry points to.
    #[inline]
    #[must_use]
    pub const fn child(self) -> PageId {
        PageId(((self.0 & PT_ADDR & !MMIO) >> 12).wrapping_sub(TABLE_PFN) as u32)
    }

    /// The host frame of a leaf.
    #[inline]
    #[must_use]
    pub const fn pfn(self) -> Pfn {
        Pfn((self.0 & PT_ADDR) >> 12)
    }

    /// The frame of an MMIO entry.
    #[must_use]
    pub const fn mmio_gfn(self) -> Gfn {
        Gfn((self.0 & PT_ADDR & !MMIO) >> 12)
    }

    /// W and U of an MMIO entry.
    #[must_use]
    pub const fn mmio_access(self) -> Access {
        Access(self.0 as u8 & (Access::W.0 | Access::U.0))
    }

    /// The memslot generation of an MMIO entry, 19 bits.
    #[must_use]
    pub const fn mmio_generation(self) -> u64 {
        (self.0 >> 3 & MMIO_GEN_LOW) | (self.0 >> 52 & 0x7ff) << 8
    }

    /// A leaf's rights as the CPU sees them.
    #[must_use]
    pub const fn access(self) -> Access {
        let x = if self.0 & PT_NX == 0 { Access::X.0 } else { 0 };
        let w = if self.0 & PT_W != 0 { Access::W.0 } else { 0 };
        let u = if self.0 & PT_U != 0 { Access::U.0 } else { 0 };
        Access(x | w | u)
    }

    /// Whether replacing this present entry by `new` needs a remote flush (`mmu_spte_update`, 6.1): a write right that
    /// a CPU may hold goes away, or A or D does.
    #[must_use]
    pub const fn update_needs_flush(self, new: Self) -> bool {
        (self.0 & MMU_WRITABLE != 0 && !new.writable()) || loses(self, new, PT_A) || loses(self, new, PT_D)
    }
}

const fn loses(old: Spte, new: Spte, bit: u64) -> bool {
    old.0 & bit != 0 && new.0 & bit == 0
}

/// The physical address that events print for the entry at a position.
#[must_use]
pub const fn sptep(page: PageId, index: usize) -> u64 {
    (TABLE_PFN + page.0 as u64) << 12 | (index as u64) << 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_look_like_kvms() {
        assert_eq!(Spte::mmio(Gfn(0xfe000), Access::ALL, 2).0, 0x8_0000_fe00_0017);
        assert_eq!(Spte::mmio(Gfn(0xfe000), Access::W.with(Access::X), 2).0, 0x8_0000_fe00_0013);
        let mmio = Spte::mmio(Gfn(0xfe001), Access::U, 0x5_4321);
        assert_eq!((mmio.mmio_gfn(), mmio.mmio_generation(), mmio.mmio_access()), (Gfn(0xfe001), 0x5_4321, Access::U));
        assert!(mmio.is_mmio() && !mmio.present());
        let table = Spte::table(PageId(7));
        assert_eq!((table.0 & 0xfff, table.child()), (0x827, PageId(7)));
        assert!(table.is_table(2) && !table.is_table(1));
    }

    #[test]
    fn only_lost_rights_and_lost_marks_flush() {
        let flush = |old, new| Spte(old).update_needs_flush(Spte(new));
        assert!(flush(0xe63, 0xe23), "D lost");
        assert!(flush(0xe63, 0xa61), "W lost");
        assert!(flush(0xa21, 0xa01), "A lost");
        assert!(!flush(0xa21, 0xe63), "W gained");
        assert!(!flush(0xa25, 0xa21), "U lost");
    }
}

//! Paging modes of the guest as const records: a mode is data, and one walker serves them all.

use crate::bits::{CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA};
use crate::types::{ENTRIES, Gva, Level, PAGE_SHIFT};

/// How a guest's tables are built.
#[derive(PartialEq, Eq, Debug)]
pub struct Mode {
    /// The name that messages use.
    pub name: &'static str,
    /// The level of the tables that CR3 names, or in PAE mode the PDPTE registers; 0 when there are none.
    pub top: Level,
    /// Bits of an address that index one table.
    pub index_bits: u32,
    /// Bytes of an entry.
    pub entry_bytes: u8,
    /// The greatest level at which PS can make an entry a leaf.
    pub largest: Level,
    /// The top tables are named by four registers that a CR3 load fills (`vcpu->arch.mmu->pdptrs`).
    pub pdptes: bool,
    /// The level of the shadow's root. 3: the CPU runs PAE paging, and the root is four entries of the vCPU's own
    /// (`pae_root`, `kvm_init_shadow_mmu`, 6.1).
    pub shadow_root: Level,
    /// Bits of a linear address.
    pub address_bits: u32,
    /// What is added to an address before the bits above are tested: half the range where the top bit is extended.
    address_bias: u64,
}

/// CR0.PG = 0: addresses are physical.
pub const OFF: Mode = Mode {
    name: "paging off",
    top: Level(0),
    index_bits: 9,
    entry_bytes: 8,
    largest: Level::PT,
    pdptes: false,
    shadow_root: Level::PDPT,
    address_bits: 32,
    address_bias: 0,
};

/// 32-bit paging: two levels of 4-byte entries (SDM vol. 3 section 4.3, APM vol. 2 section 5.2.2).
pub const BIT32: Mode =
    Mode { name: "32-bit paging", top: Level::PD, index_bits: 10, entry_bytes: 4, largest: Level::PD, ..OFF };

/// PAE paging: 8-byte entries below four PDPTE registers (SDM vol. 3 section 4.4, APM vol. 2 section 5.2.3).
pub const PAE: Mode = Mode { name: "PAE paging", top: Level::PD, largest: Level::PD, pdptes: true, ..OFF };

/// 64-bit guest, 4-level paging (SDM vol. 3 section 4.5, APM vol. 2 section 5.3).
pub const LEVEL4: Mode = Mode {
    name: "4-level paging",
    top: Level(4),
    largest: Level::PDPT,
    shadow_root: Level(4),
    address_bits: 48,
    address_bias: 1 << 47,
    ..OFF
};

/// 64-bit guest, 5-level paging (SDM vol. 3 section 4.5, APM vol. 2 section 5.3.3).
pub const LEVEL5: Mode = Mode {
    name: "5-level paging",
    top: Level(5),
    shadow_root: Level(5),
    address_bits: 57,
    address_bias: 1 << 56,
    ..LEVEL4
};

/// Every mode.
pub const MODES: [&Mode; 5] = [&OFF, &BIT32, &PAE, &LEVEL4, &LEVEL5];

impl Mode {
    /// The mode that control registers select (`kvm_calc_cpu_role`, 6.1).
    #[must_use]
    pub const fn of(cr0: u64, cr4: u64, efer: u64) -> &'static Self {
        if cr0 & CR0_PG == 0 {
            &OFF
        } else if efer & EFER_LMA != 0 {
            if cr4 & CR4_LA57 != 0 { &LEVEL5 } else { &LEVEL4 }
        } else if cr4 & CR4_PAE != 0 {
            &PAE
        } else {
            &BIT32
        }
    }

    /// Whether there are tables to walk.
    #[inline]
    #[must_use]
    pub const fn has_tables(&self) -> bool {
        self.top.0 > 0
    }

    /// Whether the shadow's root is four entries of the vCPU's own instead of a page.
    #[must_use]
    pub const fn has_pae_roots(&self) -> bool {
        self.shadow_root.0 == 3
    }

    /// How far an address is shifted to get the index for a table of `level`.
    const fn shift(&self, level: Level) -> u32 {
        PAGE_SHIFT + self.index_bits * (level.0 as u32 - 1)
    }

    /// The index of the entry that translates an address in a table of `level`.
    #[inline]
    #[must_use]
    pub const fn index(&self, gva: Gva, level: Level) -> usize {
        (gva.0 >> self.shift(level)) as usize & ((1 << self.index_bits) - 1)
    }

    /// How many 4 KiB frames one entry of `level` maps.
    #[inline]
    #[must_use]
    pub const fn pages(&self, level: Level) -> u64 {
        1 << (self.shift(level) - PAGE_SHIFT)
    }

    /// Whether the CPU takes an address: canonical in 64-bit mode (APM vol. 2 section 5.3.1), inside the flat 4 GiB
    /// segments in the others.
    #[inline]
    #[must_use]
    pub const fn takes(&self, gva: Gva) -> bool {
        gva.0.wrapping_add(self.address_bias) >> self.address_bits == 0
    }

    /// The guest entry from which entry `index` of a shadow page of level 1 is made: a table of 1,024 entries has two
    /// shadow pages, its quadrants (`FNAME(get_level1_sp_gpa)`, 6.1).
    #[inline]
    #[must_use]
    pub const fn gpte_index(quadrant: usize, index: usize) -> usize {
        quadrant * ENTRIES + index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_cover_the_address_without_gaps() {
        for mode in MODES.into_iter().filter(|mode| mode.has_tables()) {
            let gva = Gva(0x0000_7f12_3456_7abc & ((1 << mode.shift(Level(mode.top.0 + 1))) - 1));
            let joined = (1..=mode.top.0)
                .rev()
                .fold(0, |sum, level| sum << mode.index_bits | mode.index(gva, Level(level)) as u64);
            assert_eq!(joined << PAGE_SHIFT | gva.offset(), gva.0, "{}", mode.name);
        }
    }

    #[test]
    fn registers_select_the_mode() {
        let name = |cr0, cr4, efer| Mode::of(cr0, cr4, efer).name;
        assert_eq!(name(0x33, CR4_PAE, 0), "paging off");
        assert_eq!(name(CR0_PG, 0, 0), "32-bit paging");
        assert_eq!(name(CR0_PG, CR4_PAE | CR4_LA57, 0), "PAE paging");
        assert_eq!(name(CR0_PG, CR4_PAE, EFER_LMA), "4-level paging");
        assert_eq!(name(CR0_PG, CR4_PAE | CR4_LA57, EFER_LMA), "5-level paging");
    }

    #[test]
    fn addresses_are_canonical_or_inside_4_gib() {
        assert!(LEVEL4.takes(Gva(0x7fff_ffff_ffff)) && LEVEL4.takes(Gva(0xffff_8000_0000_0000)));
        assert!(!LEVEL4.takes(Gva(0x8000_0000_0000)) && !LEVEL4.takes(Gva(1 << 63)));
        assert!(LEVEL5.takes(Gva(0x8000_0000_0000)) && !LEVEL5.takes(Gva(1 << 56)));
        assert!(PAE.takes(Gva(0xffff_ffff)) && !BIT32.takes(Gva(1 << 32)) && !OFF.takes(Gva(!0)));
    }
}

//! Paging modes of the guest as const records: a mode is data, and one walker serves them all.

use crate::bits::{CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA};
use crate::error::{ConfigError, refuse};
use crate::types::{Gva, Level, PAGE_SHIFT};

/// How a guest's tables are built.
#[derive(PartialEq, Eq, Debug)]
pub struct Mode {
    /// The name that messages use.
    pub name: &'static str,
    /// The level of the table that CR3 names.
    pub root: Level,
    /// Bits of an address that index one table.
    pub index_bits: u32,
    /// The greatest level at which PS makes an entry a leaf.
    pub largest: Level,
}

/// 64-bit guest, 4-level paging (SDM vol. 3 section 4.5, APM vol. 2 section 5.3).
pub const LEVEL4: Mode = Mode { name: "4-level paging", root: Level(4), index_bits: 9, largest: Level::PDPT };

/// Every mode that the engine has.
pub const MODES: [&Mode; 1] = [&LEVEL4];

impl Mode {
    /// The mode that control registers select (`kvm_calc_cpu_role`, 6.1).
    ///
    /// # Errors
    /// A mode that the engine does not have yet, by its name.
    pub fn of(cr0: u64, cr4: u64, efer: u64) -> Result<&'static Self, ConfigError> {
        let (pg, pae, lma) = (cr0 & CR0_PG != 0, cr4 & CR4_PAE != 0, efer & EFER_LMA != 0);
        let missing = match (pg, lma, pae) {
            (false, ..) => "paging off (cr0.PG = 0)",
            (true, false, false) => "32-bit paging (efer.LMA = 0, cr4.PAE = 0)",
            (true, false, true) => "PAE paging (efer.LMA = 0)",
            (true, true, _) if cr4 & CR4_LA57 != 0 => "5-level paging (cr4.LA57 = 1)",
            (true, true, _) => return Ok(&LEVEL4),
        };
        refuse!("{missing} is not supported yet: only 64-bit guests with {} are", LEVEL4.name)
    }

    /// The index of the entry that translates an address in a table of `level`.
    #[inline]
    #[must_use]
    pub const fn index(&self, gva: Gva, level: Level) -> usize {
        (gva.0 >> (PAGE_SHIFT + self.index_bits * (level.0 as u32 - 1))) as usize & ((1 << self.index_bits) - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_cover_the_address_without_gaps() {
        for mode in MODES {
            let gva = Gva(0x0000_7f12_3456_7abc);
            let joined = (1..=mode.root.0)
                .rev()
                .fold(0, |sum, level| sum << mode.index_bits | mode.index(gva, Level(level)) as u64);
            assert_eq!(joined << PAGE_SHIFT | gva.offset(), gva.0, "{}", mode.name);
        }
    }
}

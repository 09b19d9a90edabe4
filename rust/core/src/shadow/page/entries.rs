//! The entries of shadow pages, and what each was made from.

use crate::shadow::page::Arena;
use crate::shadow::spte::Spte;
use crate::types::{Access, ENTRIES, Gfn, PageId, SptePos};

/// 64 of a page's entries, to change many; who does keeps `used` right.
pub(in crate::shadow) struct Block<'a> {
    pub sptes: &'a mut [u64; 64],
    /// What each was made from, in a page with gptes: frame << 3 | rights.
    pub shadowed: &'a mut [u64; 64],
    /// Which are not empty.
    pub used: &'a mut u64,
}

impl Arena {
    /// The entry at a position.
    #[inline]
    #[must_use]
    pub fn spte(&self, pos: SptePos) -> Spte {
        Spte(self.sptes[pos.0 as usize])
    }

    /// Writes an entry.
    #[inline]
    pub fn set_spte(&mut self, pos: SptePos, spte: Spte) {
        self.sptes[pos.0 as usize] = spte.0;
        let bit = 1 << (pos.index() % 64);
        let word = &mut self.pages[pos.page().0 as usize].used[pos.index() / 64];
        *word = if spte == Spte::EMPTY { *word & !bit } else { *word | bit };
    }

    /// All entries of a page.
    ///
    /// # Panics
    /// If the page does not exist.
    #[inline]
    #[must_use]
    pub fn sptes(&self, id: PageId) -> &[u64; ENTRIES] {
        self.sptes[id.0 as usize * ENTRIES..].first_chunk().expect("every page has its entries")
    }

    /// All entries of a page with gptes, and what each was made from, to change many that are not empty and stay so.
    ///
    /// # Panics
    /// If the page does not exist.
    #[inline]
    pub(in crate::shadow) fn page_mut(&mut self, id: PageId) -> (&mut [u64; ENTRIES], &mut [u64; ENTRIES]) {
        let at = id.0 as usize;
        (&mut self.sptes.as_chunks_mut().0[at], &mut self.shadowed.as_chunks_mut().0[at])
    }

    /// The 64 entries around one, to change many.
    #[inline(always)]
    pub(in crate::shadow) fn block_mut(&mut self, pos: SptePos) -> Block<'_> {
        let at = pos.0 as usize / 64;
        Block {
            sptes: &mut self.sptes.as_chunks_mut().0[at],
            shadowed: &mut self.shadowed.as_chunks_mut().0[at],
            used: &mut self.pages[pos.page().0 as usize].used[pos.index() / 64],
        }
    }

    /// Writes a leaf of a page with gptes, with the frame and the rights that it is made from.
    #[inline(always)]
    pub fn set_leaf(&mut self, pos: SptePos, spte: Spte, gfn: Gfn, access: Access) {
        debug_assert!(self[pos.page()].has_gptes() && spte != Spte::EMPTY);
        self.sptes[pos.0 as usize] = spte.0;
        self.pages[pos.page().0 as usize].used[pos.index() / 64] |= 1 << (pos.index() % 64);
        self.shadowed[pos.0 as usize] = gfn.0 << 3 | u64::from(access.0);
    }

    /// Writes an entry that was not empty and stays so (A and D bits, rights).
    #[inline]
    pub fn update_spte(&mut self, pos: SptePos, spte: Spte) {
        debug_assert!(spte != Spte::EMPTY && self.spte(pos) != Spte::EMPTY);
        self.sptes[pos.0 as usize] = spte.0;
    }

    /// The same for a leaf of a page with gptes, with the frame and the rights that it is made from.
    #[inline(always)]
    pub fn update_leaf(&mut self, pos: SptePos, spte: Spte, gfn: Gfn, access: Access) {
        debug_assert!(self[pos.page()].has_gptes());
        self.update_spte(pos, spte);
        self.shadowed[pos.0 as usize] = gfn.0 << 3 | u64::from(access.0);
    }

    /// The frame that an entry maps (`kvm_mmu_page_get_gfn`, 6.1).
    #[inline]
    #[must_use]
    pub fn mapped_gfn(&self, pos: SptePos) -> Gfn {
        let page = &self[pos.page()];
        if page.role.direct() {
            Gfn(page.gfn.0 + ((pos.index() as u64) << (9 * (u32::from(page.level().0) - 1))))
        } else {
            Gfn(self.shadowed[pos.0 as usize] >> 3)
        }
    }

    /// The rights that an entry was made from (`kvm_mmu_page_get_access`, 6.1).
    #[must_use]
    pub fn mapped_access(&self, pos: SptePos) -> Access {
        let page = &self[pos.page()];
        if page.role.direct() { page.role.access() } else { Access(self.shadowed[pos.0 as usize] as u8 & 7) }
    }

    /// Whether an entry of a page with gptes was made from just that frame and those rights.
    #[inline]
    #[must_use]
    pub fn maps(&self, pos: SptePos, gfn: Gfn, access: Access) -> bool {
        self.shadowed[pos.0 as usize] == (gfn.0 << 3 | u64::from(access.0))
    }

    /// Notes frame and rights of an entry; a direct page derives them.
    #[inline]
    pub fn set_mapped(&mut self, pos: SptePos, gfn: Gfn, access: Access) {
        if self[pos.page()].has_gptes() {
            self.shadowed[pos.0 as usize] = gfn.0 << 3 | u64::from(access.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::Role;
    use crate::shadow::page::bits;
    use crate::types::Level;

    #[test]
    fn the_set_of_used_entries_follows_the_entries() {
        let mut arena = Arena::default();
        let id = arena.alloc(Gfn(5), Role::root(Level(1), true, false, false), 0);
        for i in [0, 63, 64, 511] {
            arena.set_spte(id.entry(i), Spte(1));
        }
        arena.set_spte(id.entry(64), Spte::EMPTY);
        assert_eq!(bits(&arena[id].used).collect::<Vec<_>>(), [0, 63, 511]);
    }
}

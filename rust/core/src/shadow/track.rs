//! Rmaps and write protection: which entries map a frame, and what is taken away from them.

use crate::bits::{PT_A, PT_W};
use crate::config::RMAP_RECYCLE;
use crate::shadow::spte::{MMU_WRITABLE, Spte};
use crate::shadow::{Flush, Shadow};
use crate::types::{Access, Gfn, Level, PageId, RmapHead, SptePos};

impl Shadow {
    /// How many shadow pages of an upper level shadow the frame (`kvm_slot_page_track_is_active`, 6.1).
    #[inline]
    #[must_use]
    pub fn write_tracked(&self, gfn: Gfn) -> bool {
        self.memory.books(gfn).track != 0
    }

    fn pages_counter(&mut self, level: Level) -> &mut u64 {
        match level.0 {
            1 => &mut self.counters.pages_4k,
            2 => &mut self.counters.pages_2m,
            _ => &mut self.counters.pages_1g,
        }
    }

    /// Notes a new leaf in the frame's rmap (`__rmap_add`, 6.1). A list of more than 1,000 entries is emptied: the
    /// access that filled it faults again.
    pub(crate) fn rmap_add(&mut self, pos: SptePos, gfn: Gfn, access: Access) -> Flush {
        let level = self.arena[pos.page()].level();
        self.arena.set_mapped(pos, gfn, access);
        *self.pages_counter(level) += 1;
        let Some(head) = self.memory.rmap_mut(gfn, level) else { return Flush::NONE };
        let before = self.lists.add(head, pos);
        self.rmap_grew(gfn, level, before)
    }

    /// A list that had `before` entries got one more.
    #[inline(always)]
    pub(crate) fn rmap_grew(&mut self, gfn: Gfn, level: Level, before: u32) -> Flush {
        if before == 0 { Flush::NONE } else { self.rmap_grew_longer(gfn, level, before) }
    }

    #[inline(never)]
    fn rmap_grew_longer(&mut self, gfn: Gfn, level: Level, before: u32) -> Flush {
        self.counters.max_mmu_rmap_size = self.counters.max_mmu_rmap_size.max(u64::from(before));
        if before <= RMAP_RECYCLE {
            return Flush::NONE;
        }
        self.zap_rmap(gfn, level);
        Flush::when(true)
    }

    /// Takes a leaf away: entry, rmap and statistic (`drop_spte`, 6.1).
    pub(crate) fn drop_leaf(&mut self, pos: SptePos) {
        let (gfn, level) = (self.arena.mapped_gfn(pos), self.arena[pos.page()].level());
        self.arena.set_spte(pos, Spte::EMPTY);
        *self.pages_counter(level) -= 1;
        if let Some(head) = self.memory.rmap_mut(gfn, level) {
            self.lists.remove(head, pos);
        }
    }

    /// Takes every leaf of one rmap list away; whether there was any (`kvm_zap_all_rmap_sptes`, 6.1).
    pub(crate) fn zap_rmap(&mut self, gfn: Gfn, level: Level) -> bool {
        let Some(head) = self.memory.rmap_mut(gfn, level).filter(|head| **head != RmapHead::default()) else {
            return false;
        };
        let all = self.lists.take(head);
        for pos in &all {
            self.arena.set_spte(*pos, Spte::EMPTY);
        }
        *self.pages_counter(level) -= all.len() as u64;
        true
    }

    /// The host is about to change the pages of a range: every leaf that maps one goes (`kvm_unmap_gfn_range`, 6.1).
    pub(crate) fn unmap_range(&mut self, first: Gfn, pages: u64) -> Flush {
        self.invalidate_seq += 1;
        let mut any = false;
        for (gfn, level) in self.mapped_lists(first, pages) {
            any |= self.zap_rmap(gfn, level);
        }
        Flush::when(any)
    }

    /// The rmap lists with leaves that map a part of the range: first frame in it, level.
    fn mapped_lists(&self, first: Gfn, pages: u64) -> Vec<(Gfn, Level)> {
        let (mut out, end) = (Vec::new(), first.0 + pages);
        for slot in self.memory.slots() {
            let (from, to) = (first.0.max(slot.base.0), end.min(slot.base.0 + slot.pages));
            if from < to {
                out.extend(self.memory.rmaps_between(Gfn(from), Gfn(to)));
            }
        }
        out
    }

    /// Takes A from every leaf that maps a part of the range (`kvm_age_rmap`, 6.1); whether any had it.
    pub(crate) fn age_range(&mut self, first: Gfn, pages: u64) -> bool {
        let young = self.leaves_of(first, pages).filter(|(_, spte)| spte.0 & PT_A != 0).collect::<Vec<_>>();
        for (pos, spte) in &young {
            self.arena.update_spte(*pos, Spte(spte.0 & !PT_A));
        }
        !young.is_empty()
    }

    /// Whether a leaf that maps a part of the range has A (`kvm_test_age_rmap`, 6.1).
    pub(crate) fn is_young(&self, first: Gfn, pages: u64) -> bool {
        self.leaves_of(first, pages).any(|(_, spte)| spte.0 & PT_A != 0)
    }

    fn leaves_of(&self, first: Gfn, pages: u64) -> impl Iterator<Item = (SptePos, Spte)> + '_ {
        let lists = self.mapped_lists(first, pages).into_iter();
        let heads = lists.map(|(gfn, level)| self.memory.rmap(gfn, level));
        heads.flat_map(|head| self.lists.iter(head)).map(|pos| (pos, self.arena.spte(pos)))
    }

    /// Takes W from every leaf that maps the frame (`rmap_write_protect`, 6.1). `for_shadowing` also takes the mark
    /// that allows the MMU to give W back without a walk. Returns whether a flush is wanted.
    #[inline]
    pub(crate) fn write_protect(&mut self, gfn: Gfn, for_shadowing: bool) -> bool {
        let [small, large] = [Level::PT, Level::PD].map(|level| self.memory.rmap(gfn, level));
        self.write_protect_lists(gfn, [small, large], for_shadowing)
    }

    /// The same where the lists of small leaves and of those of 2 MiB are known.
    #[inline(always)]
    fn write_protect_lists(&mut self, gfn: Gfn, [small, large]: [RmapHead; 2], for_shadowing: bool) -> bool {
        let giant = if self.counters.pages_1g == 0 { RmapHead::default() } else { self.memory.rmap(gfn, Level::PDPT) };
        let mut flush = false;
        for head in [small, large, giant] {
            if head != RmapHead::default() {
                flush |= self.write_protect_list(head, for_shadowing);
            }
        }
        flush
    }

    /// The same for one list (`spte_write_protect`, 6.1).
    #[inline(never)]
    pub(crate) fn write_protect_list(&mut self, head: RmapHead, for_shadowing: bool) -> bool {
        let mut flush = false;
        for pos in self.lists.iter(head) {
            let old = self.arena.spte(pos);
            let acts = old.writable() || for_shadowing && old.0 & MMU_WRITABLE != 0;
            if acts {
                let taken = if for_shadowing { PT_W | MMU_WRITABLE } else { PT_W };
                let new = Spte(old.0 & !taken);
                self.arena.update_spte(pos, new);
                flush |= old.update_needs_flush(new);
            }
        }
        flush
    }

    /// A new page with gptes begins to shadow its frame (`account_shadowed`, 6.1): large leaves over it are forbidden,
    /// an upper-level table is tracked, and whoever maps the frame loses W.
    #[inline(always)]
    pub(crate) fn account_shadowed(&mut self, gfn: Gfn, level: Level) -> Flush {
        self.indirect_pages += 1;
        let heads = self.memory.count_table(gfn, level > Level::PT, true);
        Flush::when(self.write_protect_lists(gfn, heads, true))
    }

    /// The page is zapped (`unaccount_shadowed`, 6.1). Entries that map the frame stay read-only until a write faults.
    pub(crate) fn unaccount_shadowed(&mut self, id: PageId) {
        let (gfn, level) = (self.arena[id].gfn, self.arena[id].level());
        self.indirect_pages -= 1;
        let _ = self.memory.count_table(gfn, level > Level::PT, false);
    }
}

//! Taking entries and pages out of the shadow.

use crate::config::{ADDRESS_SPACES, MIN_FREE_PAGES, MMIO_GEN_BITS, REFILL_PAGES};
use crate::events::EventKind;
use crate::policy::Victim;
use crate::shadow::page::{Bitmap, bits};
use crate::shadow::spte::Spte;
use crate::shadow::{Flush, Shadow};
use crate::types::{Gfn, Level, PageId, SptePos};

/// Pages that were zapped and wait to be freed behind one flush (KVM's `invalid_list`): the first and the last, and each
/// names the next.
#[derive(Debug, Default)]
#[must_use = "zapped pages must be committed"]
pub(crate) struct ZapList {
    ends: Option<(PageId, PageId)>,
    obsolete_roots: bool,
}

impl Shadow {
    /// Takes the table pointer at `pos` out; the child stays in the hash.
    #[inline(always)]
    pub(crate) fn unlink_child(&mut self, pos: SptePos) {
        let child = self.spte(pos).child();
        let page = &mut self.arena[child];
        let level = page.level();
        self.lists.remove(&mut page.parents, pos);
        self.arena.set_spte(pos, Spte::EMPTY);
        self.end_ways(pos, child, level);
    }

    /// The link at `pos` to `child` is gone, and so are the ways over it.
    #[inline(always)]
    fn end_ways(&mut self, pos: SptePos, child: PageId, level: Level) {
        match level {
            Level::PT => self.arena.note_unlink(pos.page()),
            Level::PD => self.arena.note_unlink(child),
            _ => self.memory.ways_epoch += 1,
        }
    }

    /// Empties one entry (`mmu_page_zap_pte`, 6.1); whether it was present.
    #[inline(always)]
    pub(crate) fn zap_entry(&mut self, pos: SptePos) -> bool {
        let spte = self.spte(pos);
        spte != Spte::EMPTY && self.zap_some_entry(pos, spte)
    }

    #[inline(never)]
    fn zap_some_entry(&mut self, pos: SptePos, spte: Spte) -> bool {
        if !spte.present() {
            self.arena.set_spte(pos, Spte::EMPTY);
            return false;
        }
        if spte.is_table(self.arena[pos.page()].level().0) {
            self.unlink_child(pos);
        } else {
            self.drop_leaf(pos);
        }
        true
    }

    /// Takes a page out of use (`kvm_mmu_prepare_zap_page`, 6.1): unsync pages below it first, then its entries, its
    /// parents' entries, its bookkeeping. A page that is a root stays until its last user lets go of it.
    /// Returns how many unsync pages went with it.
    pub(crate) fn prepare_zap(&mut self, id: PageId, list: &mut ZapList) -> u64 {
        self.page_event(EventKind::PrepareZapPage, id, false);
        self.counters.mmu_shadow_zapped += 1;
        let children = self.zap_unsync_children(id, list);
        for index in bits(&self.arena[id].used) {
            self.zap_entry(id.entry(index));
        }
        debug_assert!(self.arena[id].used == Bitmap::default());
        let mut parents = std::mem::take(&mut self.arena[id].parents);
        let level = self.arena[id].level();
        while let Some(pos) = self.lists.pop(&mut parents) {
            self.arena.set_spte(pos, Spte::EMPTY);
            self.end_ways(pos, id, level);
        }
        if self.arena[id].root_count > 0 {
            self.end_ways(id.entry(0), id, level);
        }
        let was_valid = !self.arena[id].role.invalid();
        if was_valid && self.arena[id].has_gptes() {
            self.unaccount_shadowed(id);
        }
        if self.arena[id].unsync {
            self.end_unsync(id);
        }
        self.arena.list_remove(id);
        if self.arena[id].root_count == 0 {
            list.ends = match list.ends {
                None => Some((id, id)),
                Some((first, last)) => {
                    self.arena[last].next_zapped = Some(id);
                    Some((first, id))
                }
            };
            self.used_pages -= 1;
        } else if self.is_valid(id) {
            list.obsolete_roots = true;
        }
        if self.arena[id].nx_split {
            self.arena[id].nx_split = false;
            self.counters.nx_lpage_splits -= 1;
        }
        let page = &mut self.arena[id];
        page.role = page.role.invalidated();
        children
    }

    fn zap_unsync_children(&mut self, parent: PageId, list: &mut ZapList) -> u64 {
        if self.arena[parent].level() == Level::PT {
            return 0;
        }
        let mut zapped = 0;
        while let Some(batch) = self.unsync_walk(parent) {
            for (leaf, path) in self.batch_leaves(&batch) {
                let _ = self.prepare_zap(leaf, list);
                self.clear_marks(&path);
                zapped += 1;
            }
        }
        zapped
    }

    /// Frees zapped pages behind one flush (`kvm_mmu_commit_zap_page`, 6.1). Nothing happens for an empty list.
    #[allow(clippy::needless_pass_by_value, reason = "a list that was committed is gone")]
    #[inline(always)]
    pub(crate) fn commit_zap(&mut self, list: ZapList) -> Flush {
        let mut at = list.ends.map(|(first, _)| first);
        while let Some(id) = at {
            at = self.arena[id].next_zapped;
            self.arena.release(id);
        }
        Flush { calls: u32::from(list.ends.is_some()), obsolete_roots: list.obsolete_roots }
    }

    /// Commits, or flushes once if `flush` (`kvm_mmu_remote_flush_or_zap`, 6.1).
    #[inline(always)]
    pub(crate) fn commit_or_flush(&mut self, list: ZapList, flush: bool) -> Flush {
        let mut owed = self.commit_zap(list);
        if owed.calls == 0 {
            owed += Flush::when(flush);
        }
        owed
    }

    /// Zaps every page that shadows the frame (`kvm_mmu_unprotect_page`, 6.1).
    pub(crate) fn unprotect(&mut self, gfn: Gfn) -> Flush {
        let mut list = ZapList::default();
        let mut at = self.next_gptes_page(gfn, None);
        while let Some(id) = at {
            let _ = self.prepare_zap(id, &mut list);
            at = self.next_gptes_page(gfn, Some(id));
        }
        self.commit_zap(list)
    }

    /// Zaps at least `count` pages, those created first first; roots are passed over
    /// (`kvm_mmu_zap_oldest_mmu_pages`, 6.1).
    pub(crate) fn zap_oldest(&mut self, count: u64) -> Flush {
        let mut list = ZapList::default();
        let mut total = 0;
        'restart: while total < count {
            if self.policy.rules.victim != Victim::Oldest {
                let Some(id) = self.victim() else { break };
                total += self.prepare_zap(id, &mut list) + 1;
                continue;
            }
            let mut at = self.arena.oldest_first().next();
            while let Some(id) = at {
                // The next one is looked up first: a zapped page is off the list.
                let next = self.arena.newer(id);
                if self.arena[id].root_count == 0 {
                    let children = self.prepare_zap(id, &mut list);
                    total += children + 1;
                    if total >= count {
                        break 'restart;
                    }
                    if children > 0 {
                        continue 'restart;
                    }
                }
                at = next;
            }
            break;
        }
        self.counters.mmu_recycled += total;
        self.commit_zap(list)
    }

    /// The page that a policy recycles first; roots are passed over.
    fn victim(&self) -> Option<PageId> {
        let pages = self.arena.oldest_first().filter(|id| self.arena[*id].root_count == 0);
        if self.policy.rules.victim == Victim::Newest {
            return pages.last();
        }
        pages.min_by_key(|id| self.arena[*id].used.iter().map(|word| word.count_ones()).sum::<u32>())
    }

    /// Zaps pages that stand for a huge page split for execution, those split first first.
    pub(crate) fn zap_nx_splits(&mut self, count: u64) -> Flush {
        let mut list = ZapList::default();
        for _ in 0..count {
            let Some(id) = self.arena.oldest_first().find(|id| self.arena[*id].nx_split) else { break };
            let _ = self.prepare_zap(id, &mut list);
        }
        self.commit_zap(list)
    }

    /// Sees to it that a fault finds free pages (`make_mmu_pages_available`, 6.1). `false` if none can be had.
    pub(crate) fn make_pages_available(&mut self) -> (bool, Flush) {
        let available = |s: &Self| s.max_pages.saturating_sub(s.used_pages);
        if available(self) >= MIN_FREE_PAGES {
            return (true, Flush::NONE);
        }
        let flush = self.zap_oldest(REFILL_PAGES - available(self));
        (available(self) > 0, flush)
    }

    /// Makes every page obsolete and zaps them, oldest first (`kvm_mmu_zap_all_fast`, 6.1).
    pub(crate) fn zap_all_fast(&mut self) -> Flush {
        self.events.zap_all_fast(self.generation, self.used_pages);
        self.generation ^= 1;
        let mut list = ZapList { ends: None, obsolete_roots: true };
        let old = self.generation ^ 1;
        'restart: loop {
            let mut at = self.arena.oldest_first().next();
            while let Some(id) = at {
                if self.arena[id].generation != old {
                    break 'restart;
                }
                let next = self.arena.newer(id);
                let children = self.prepare_zap(id, &mut list);
                if children > 0 {
                    continue 'restart;
                }
                at = next;
            }
            break;
        }
        self.commit_zap(list)
    }

    /// The memslot generation moved: when its bits in MMIO entries wrap, all must go
    /// (`kvm_mmu_invalidate_mmio_sptes`, 6.1).
    pub(crate) fn memslots_changed(&mut self) -> Flush {
        let mask = ((1 << MMIO_GEN_BITS) - 1) & !(ADDRESS_SPACES - 1);
        if self.memory.generation & mask == 0 { self.zap_all_fast() } else { Flush::NONE }
    }
}

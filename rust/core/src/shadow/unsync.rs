//! Last-level tables that the guest may write while their shadow lags behind.

use crate::config::UNSYNC_BATCH;
use crate::events::EventKind;
use crate::shadow::page::bits;
use crate::shadow::{Shadow, page_view};
use crate::types::{Gfn, Level, PageId, RmapHead};

/// What one unsync walk collected: pages with the index of the entry that led to each. The first is the parent.
#[derive(Clone, Debug, Default)]
pub(crate) struct UnsyncBatch {
    slots: Vec<(PageId, usize)>,
}

/// The walk filled its batch before it was through.
struct Full;

impl UnsyncBatch {
    /// Adds a page; `Err` when the batch is full now. An unsync page that is there already is not added twice.
    fn add(&mut self, page: PageId, index: usize, unsync: bool) -> Result<(), Full> {
        if unsync && self.slots.iter().any(|(p, _)| *p == page) {
            return Ok(());
        }
        self.slots.push((page, index));
        if self.slots.len() == UNSYNC_BATCH { Err(Full) } else { Ok(()) }
    }
}

impl Shadow {
    /// Asks whether the frame may be mapped writable although tables may lie in it (`mmu_try_to_unsync_pages`, 6.1).
    /// Last-level tables go out of sync for it if `can_unsync` and not `prefetch`.
    pub(crate) fn try_to_unsync(&mut self, gfn: Gfn, can_unsync: bool, prefetch: bool) -> bool {
        !self.write_tracked(gfn) && self.unsync_tables(gfn, can_unsync, prefetch)
    }

    /// The same for a frame that is not write-tracked.
    #[inline(never)]
    pub(crate) fn unsync_tables(&mut self, gfn: Gfn, can_unsync: bool, prefetch: bool) -> bool {
        let mut at = self.arena.chain_first(gfn);
        while let Some(id) = at {
            at = self.arena.chain_next(id);
            if !self.is_gptes_page(id, gfn) {
                continue;
            }
            if !can_unsync {
                return false;
            }
            if !self.arena[id].unsync {
                if prefetch || !self.policy_allows_unsync(id) {
                    return false;
                }
                self.unsync_page(id);
            }
        }
        true
    }

    /// The same for all `tables` in a frame that is not write-tracked, where the policy lets every page go out of sync and no
    /// events are recorded. Nearly always there is one, the newest page of its bucket, below one entry.
    #[inline(never)]
    pub(crate) fn unsync_all_tables(&mut self, gfn: Gfn, tables: u16) {
        debug_assert!(self.policy.unsyncs_like_kvm() && !self.events.wants_any());
        let Self { arena, lists, counters, .. } = self;
        if let Some(id) = arena.chain_first(gfn)
            && tables == 1
            && let page = &mut arena[id]
            && page.gfn == gfn
            && page.has_gptes()
            // A root that was zapped while it is in use stays in its bucket.
            && !page.role.invalid()
            && !page.unsync
            && let Some(parent) = lists.only(page.parents)
        {
            page.unsync = true;
            counters.mmu_unsync += 1;
            return self.mark_entry_unsync(parent.page(), parent.index());
        }
        let allowed = self.unsync_tables(gfn, true, false);
        debug_assert!(allowed, "nothing else forbids it");
    }

    #[inline(always)]
    fn policy_allows_unsync(&mut self, id: PageId) -> bool {
        let Self { policy, arena, .. } = self;
        policy.may_unsync(|| page_view(arena, id))
    }

    #[inline(always)]
    fn unsync_page(&mut self, id: PageId) {
        self.page_event(EventKind::UnsyncPage, id, false);
        self.counters.mmu_unsync += 1;
        let page = &mut self.arena[id];
        debug_assert_eq!(page.level(), Level::PT, "upper levels are write-tracked");
        page.unsync = true;
        let parents = page.parents;
        self.mark_positions_unsync(parents);
        if self.policy.rules.unsync_limit.is_some() {
            self.unsync_queue.push_back(id);
        }
    }

    /// Marks every way up from a page (`kvm_mmu_mark_parents_unsync`, 6.1).
    #[inline(never)]
    fn mark_parents_unsync(&mut self, id: PageId) {
        self.mark_positions_unsync(self.arena[id].parents);
    }

    #[inline(always)]
    fn mark_positions_unsync(&mut self, parents: RmapHead) {
        if let Some(only) = self.lists.only(parents) {
            return self.mark_entry_unsync(only.page(), only.index());
        }
        self.mark_entries_unsync(parents);
    }

    #[inline(never)]
    fn mark_entries_unsync(&mut self, parents: RmapHead) {
        let parents: Vec<_> = self.lists.iter(parents).collect();
        for pos in parents {
            self.mark_entry_unsync(pos.page(), pos.index());
        }
    }

    /// Marks one entry of a page, and its ways up if it is the page's first (`mark_unsync`, 6.1).
    #[inline(always)]
    pub(crate) fn mark_entry_unsync(&mut self, id: PageId, index: usize) {
        let page = &mut self.arena[id];
        let (word, bit) = (&mut page.unsync_bitmap[index / 64], 1 << (index % 64));
        if *word & bit != 0 {
            return;
        }
        *word |= bit;
        page.unsync_children += 1;
        if page.unsync_children == 1 {
            self.mark_parents_unsync(id);
        }
    }

    fn clear_unsync_bit(&mut self, id: PageId, index: usize) {
        let page = &mut self.arena[id];
        let (word, bit) = (&mut page.unsync_bitmap[index / 64], 1 << (index % 64));
        if *word & bit != 0 {
            *word &= !bit;
            page.unsync_children -= 1;
        }
    }

    /// The page is in step again (`kvm_unlink_unsync_page`, 6.1).
    pub(crate) fn end_unsync(&mut self, id: PageId) {
        self.page_event(EventKind::SyncPage, id, false);
        self.arena[id].unsync = false;
        self.counters.mmu_unsync -= 1;
    }

    /// Collects unsync pages below `parent` (`mmu_unsync_walk`, 6.1): depth first, entries ascending, at most 15
    /// beside the parent. Marks that lead to none are cleared on the way. `None` when there is none.
    pub(crate) fn unsync_walk(&mut self, parent: PageId) -> Option<UnsyncBatch> {
        if self.arena[parent].unsync_children == 0 {
            return None;
        }
        let mut batch = UnsyncBatch { slots: Vec::with_capacity(UNSYNC_BATCH) };
        batch.slots.push((parent, usize::MAX));
        match self.unsync_walk_below(parent, &mut batch) {
            Ok(0) => None,
            Ok(_) | Err(Full) => Some(batch),
        }
    }

    fn unsync_walk_below(&mut self, id: PageId, batch: &mut UnsyncBatch) -> Result<u32, Full> {
        let level = self.arena[id].level().0;
        let mut leaves = 0;
        for index in bits(&self.arena[id].unsync_bitmap.clone()) {
            let spte = self.spte(id.entry(index));
            if !spte.is_table(level) {
                self.clear_unsync_bit(id, index);
                continue;
            }
            let child = spte.child();
            if self.arena[child].unsync_children > 0 {
                batch.add(child, index, self.arena[child].unsync)?;
                match self.unsync_walk_below(child, batch)? {
                    0 => self.clear_unsync_bit(id, index),
                    n => leaves += n,
                }
            } else if self.arena[child].unsync {
                leaves += 1;
                batch.add(child, index, true)?;
            } else {
                self.clear_unsync_bit(id, index);
            }
        }
        Ok(leaves)
    }

    /// The last-level pages of a batch in order, each with the way that led to it: (page, index of its entry), the
    /// nearest parent first (`for_each_sp`, 6.1).
    pub(crate) fn batch_leaves(&self, batch: &UnsyncBatch) -> Vec<(PageId, Vec<(PageId, usize)>)> {
        let mut path: [Option<PageId>; 6] = [None; 6];
        let mut index = [0; 6];
        let mut out = Vec::new();
        for (id, at) in &batch.slots {
            let level = usize::from(self.arena[*id].level().0);
            index[level] = *at;
            if level == 1 {
                let up = (2..6).map_while(|l| Some((path[l]?, index[l - 1]))).collect();
                out.push((*id, up));
            } else {
                path[level] = Some(*id);
            }
        }
        out
    }

    /// Clears the marks on the way to a page that was dealt with (`mmu_pages_clear_parents`, 6.1).
    pub(crate) fn clear_marks(&mut self, path: &[(PageId, usize)]) {
        for (id, index) in path {
            self.clear_unsync_bit(*id, *index);
            if self.arena[*id].unsync_children > 0 {
                break;
            }
        }
    }
}

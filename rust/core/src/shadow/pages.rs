//! Finding, making and linking shadow pages.

use crate::cpu::CpuRole;
use crate::events::EventKind;
use crate::role::Role;
use crate::shadow::page::bits;
use crate::shadow::spte::Spte;
use crate::shadow::zap::ZapList;
use crate::shadow::{Flush, Shadow};
use crate::types::{Gfn, Gva, Level, PageId, SptePos};

impl Shadow {
    /// The shadow page of that frame and role, made if there is none (`kvm_mmu_get_page`, 6.1).
    pub(crate) fn get_page(&mut self, gfn: Gfn, wanted: Role, role: &CpuRole) -> (PageId, Flush) {
        let (mut collisions, mut owed) = (0, Flush::NONE);
        let mut list = ZapList::default();
        let mut found = None;
        let mut at = self.arena.chain_first(gfn);
        while let Some(id) = at {
            at = self.arena.chain_next(id);
            if !self.is_valid(id) {
                continue;
            }
            if self.arena[id].gfn != gfn {
                collisions += 1;
                continue;
            }
            if self.arena[id].role != wanted {
                // A table that is used on an upper level now can no longer be unsync on level 1.
                if wanted.level() > Level::PT && self.arena[id].unsync {
                    let _ = self.prepare_zap(id, &mut list);
                }
                continue;
            }
            if self.arena[id].has_gptes() && self.arena[id].unsync {
                // Brought into step once, so that it can be linked; it stays unsync and writable.
                match self.sync_or_zap(id, role, &mut list) {
                    None => break,
                    Some(flush) => owed += Flush::when(flush),
                }
            }
            self.arena[id].flood = 0;
            found = Some(id);
            break;
        }
        self.counters.max_mmu_page_hash_collisions = self.counters.max_mmu_page_hash_collisions.max(collisions);
        owed += self.commit_zap(list);
        let created = found.is_none();
        let id = found.unwrap_or_else(|| self.new_page(gfn, wanted, &mut owed));
        self.page_event(EventKind::GetPage, id, created);
        (id, owed)
    }

    fn new_page(&mut self, gfn: Gfn, role: Role, owed: &mut Flush) -> PageId {
        self.counters.mmu_cache_miss += 1;
        self.used_pages += 1;
        let id = self.arena.alloc(gfn, role, self.generation);
        if self.arena[id].has_gptes() {
            *owed += self.account_shadowed(gfn, role.level());
        }
        id
    }

    /// Makes the page of a guest table, whose frame is the first of its bucket, and links it to an empty entry: what `get_page`
    /// and `link` do where there is next to nothing to look at, and no events are recorded. `None`, and nothing done, if there
    /// is more.
    #[inline(always)]
    pub(crate) fn new_table(&mut self, pos: SptePos, gfn: Gfn, role: Role) -> Option<(PageId, Flush)> {
        debug_assert!(!role.direct() && self.spte(pos) == Spte::EMPTY && !self.events.wants_any());
        let id = self.arena.alloc_alone(gfn, role, self.generation, pos)?;
        self.counters.mmu_cache_miss += 1;
        self.used_pages += 1;
        let flush = self.account_shadowed(gfn, role.level());
        self.arena.set_spte(pos, Spte::table(id));
        Some((id, flush))
    }

    /// Whether the entry points to the page of that frame and role already.
    pub(crate) fn is_linked(&self, pos: SptePos, gfn: Gfn, role: Role) -> bool {
        let spte = self.spte(pos);
        spte.is_table(self.arena[pos.page()].level().0) && {
            let child = &self.arena[spte.child()];
            child.gfn == gfn && child.role == role
        }
    }

    /// Points an entry to a page (`__link_shadow_page`, 6.1). An entry that was present goes, with a flush.
    pub(crate) fn link(&mut self, pos: SptePos, child: PageId) -> Flush {
        let owed = Flush::when(self.spte(pos).present());
        if owed != Flush::NONE {
            self.zap_entry(pos);
        }
        self.arena.set_spte(pos, Spte::table(child));
        let page = &mut self.arena[child];
        self.lists.add(&mut page.parents, pos);
        if page.unsync || page.unsync_children > 0 {
            self.mark_entry_unsync(pos.page(), pos.index());
        }
        owed
    }

    /// The position of the deepest entry that the CPU's walk reaches: the first that is not a table pointer
    /// (`shadow_walk_*`, 6.1).
    #[inline]
    #[must_use]
    pub fn walk_down(&self, root: PageId, gva: Gva) -> (SptePos, Level) {
        // Each step goes down one level, so only entries are read on the way, never the pages' own records.
        let (mut id, mut level) = (root, self.arena[root].level());
        loop {
            let pos = id.entry(gva.index(level));
            let spte = self.spte(pos);
            if !spte.is_table(level.0) {
                return (pos, level);
            }
            (id, level) = (spte.child(), level.down());
        }
    }

    /// The directory (level 2) of an address.
    ///
    /// # Errors
    /// The walk ends before; where it does.
    pub(crate) fn directory(&self, root: PageId, gva: Gva) -> Result<PageId, (SptePos, Level)> {
        let (mut id, mut level) = (root, self.arena[root].level());
        while level != Level::PD {
            let pos = id.entry(gva.index(level));
            let spte = self.spte(pos);
            if !spte.is_table(level.0) {
                return Err((pos, level));
            }
            (id, level) = (spte.child(), level.down());
        }
        Ok(id)
    }

    /// `walk_down` from the directory of an address.
    #[inline(always)]
    pub(crate) fn walk_directory(&self, directory: PageId, gva: Gva) -> (SptePos, Level) {
        let pos = directory.entry(gva.index(Level::PD));
        let spte = self.spte(pos);
        if spte.is_table(Level::PD.0) {
            (spte.child().entry(gva.index(Level::PT)), Level::PT)
        } else {
            (pos, Level::PD)
        }
    }

    /// Forgets the writes counted against pages.
    #[inline(never)]
    pub(crate) fn forget_floods(&mut self, pages: [PageId; 4]) {
        for id in pages {
            self.arena[id].flood = 0;
        }
    }

    /// Forgets the writes counted against the pages on the CPU's way to an address (`shadow_page_table_clear_flood`,
    /// 6.1).
    pub(crate) fn clear_flood_path(&mut self, root: PageId, gva: Gva) {
        let mut id = root;
        loop {
            self.arena[id].flood = 0;
            let level = self.arena[id].level();
            let spte = self.spte(id.entry(gva.index(level)));
            if !spte.is_table(level.0) {
                return;
            }
            id = spte.child();
        }
    }

    /// Drops the 4 KiB leaves of direct pages that a larger leaf could replace
    /// (`kvm_rmap_zap_collapsible_sptes`, 6.1).
    pub(crate) fn zap_collapsible(&mut self, slot_id: u16) -> Flush {
        let Some(slot) = self.memory.slots().iter().find(|slot| slot.id == slot_id) else { return Flush::NONE };
        let heads: Vec<_> = self.memory.rmaps(slot).filter(|(_, level, _)| *level < Level::PDPT).collect();
        let mut any = false;
        for (gfn, level, head) in heads {
            let entries: Vec<_> = self.lists.iter(head).collect();
            for pos in entries {
                let up = Level(level.0 + 1);
                let host = self.memory.host.state(gfn).level();
                let allowed = self.memory.allows_large(gfn, up);
                if self.arena[pos.page()].role.direct() && host >= up && allowed {
                    self.drop_leaf(pos);
                    any = true;
                }
            }
        }
        Flush::when(any)
    }

    /// Every present leaf of a page: index and entry.
    #[must_use]
    pub fn leaves(&self, id: PageId) -> Vec<(usize, Spte)> {
        let level = self.arena[id].level().0;
        let entries = bits(&self.arena[id].used).map(|i| (i, self.spte(id.entry(i))));
        entries.filter(|(_, spte)| spte.present() && !spte.is_table(level)).collect()
    }
}

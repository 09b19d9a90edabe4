//! Building the shadow path to a faulting address (`FNAME(fetch)`, 6.1).

use crate::fault::Ctx;
use crate::fault::page_fault::Fault;
use crate::guest::walk::GuestWalk;
use crate::memory::Host;
use crate::outcome::RetPf;
use crate::role::Role;
use crate::shadow::make::Leaf;
use crate::shadow::{Flush, Guest};
use crate::types::{Access, Gfn, Level, PageId, Pfn, SptePos};

/// How large the leaf becomes (`kvm_mmu_hugepage_adjust`, 6.1).
#[derive(Clone, Copy, Debug)]
struct Goal {
    /// The level that the leaf gets.
    level: Level,
    /// The level that it could get if execution were no concern.
    requested: Level,
    /// It was to be split because the guest executes from it.
    disallowed: bool,
}

impl Ctx<'_> {
    /// Links tables down to the leaf of the guest's walk, then direct ones below a large guest page, and makes the
    /// leaf. `Retry` if a guest entry changed in the meantime.
    pub(crate) fn fetch(&mut self, fault: &mut Fault, walk: &GuestWalk, root: PageId) -> RetPf {
        if walk.level == Level::PT
            && let Some(way) = self.ways.find(root, fault.gva, self.shadow)
        {
            // All links are there.
            let table = way.table;
            self.forget_floods(fault.gva);
            return self.map((table, Level::PT), fault, walk.pte_access, walk.steps[0].table);
        }
        let top = self.vcpu.role.mode.top;
        if self.gpte_changed(fault, walk, top) {
            return RetPf::Retry;
        }
        let (mut id, mut path) = (root, [root; 5]);
        let memorable = walk.level == Level::PT && !self.vcpu.role.mode.pdptes && walk.tables_are_accessed(top);
        for level in (walk.level.0 + 1..=top.0).rev() {
            match self.descend_indirect(id, Level(level), fault, walk) {
                Some(child) => id = child,
                None => return RetPf::Retry,
            }
            path[usize::from(level) - 2] = id;
        }
        if memorable {
            self.ways.remember_directory((root, fault.gva), self.shadow, &path, walk);
            let (pde, last) = (walk.steps[1].pte, walk.steps[0]);
            let contents = self.shadow.memory.host.contents(last.table);
            self.ways.remember(fault.gva, id, (pde, contents, last.access));
        }
        self.map((id, walk.level), fault, walk.pte_access, walk.steps[0].table)
    }

    /// Makes the leaf of a fault below a table: direct pages down to the size that it gets, then the entry, then its
    /// neighbours. With paging off it is all there is to do (`direct_map`, 6.1).
    pub(crate) fn map(
        &mut self,
        (mut id, mut level): (PageId, Level),
        fault: &Fault,
        access: Access,
        table: Gfn,
    ) -> RetPf {
        let mut goal = self.hugepage_adjust(fault);
        let pfn = fault.pfn.map(|pfn| pfn.0);
        self.shadow.events.spte_requested(fault.gfn.0, pfn, goal.level.0);
        let (pos, base) = loop {
            self.shadow.arena[id].flood = 0;
            let pos = id.entry(fault.gva.index(level));
            if self.shadow.config.nx_huge_pages && level == goal.level && level > Level::PT {
                self.disallowed_hugepage_adjust(pos, &mut goal);
            }
            let base = fault.gfn.round(level);
            if level == goal.level {
                break (pos, base);
            }
            id = self.descend_direct(pos, base, access, goal);
            level = level.down();
        };
        let leaf = Leaf {
            gfn: base,
            access,
            pfn: fault.pfn.map(|pfn| Pfn(pfn.0 & !(level.pages() - 1))),
            host_writable: fault.map_writable,
            prefetch: false,
            write: fault.write,
        };
        let (result, flush) = self.shadow.set_leaf(pos, &leaf);
        self.pay(flush);
        self.vcpu.counters.pf_mmio_spte_created += u64::from(leaf.pfn.is_none());
        if result != RetPf::Spurious {
            self.prefetch_around(pos, table);
        }
        result
    }

    /// Whether the guest's entry of a level is another than the walk read (`FNAME(gpte_changed)`, 6.1). Only the walk's
    /// own A and D bits can do that here, since nothing else writes guest memory between the walk and this.
    #[inline]
    fn gpte_changed(&self, fault: &Fault, walk: &GuestWalk, level: Level) -> bool {
        walk.wrote && {
            let step = &walk.steps[usize::from(level.0) - 1];
            let mode = self.vcpu.role.mode;
            let now = self.shadow.read_gpte_atomic(step.table, mode.index(fault.gva, level), mode.entry_bytes);
            now != Some(step.pte)
        }
    }

    /// One step down a guest table: finds or makes the page below and links it. `None`: the guest's entry changed.
    fn descend_indirect(&mut self, id: PageId, level: Level, fault: &Fault, walk: &GuestWalk) -> Option<PageId> {
        self.shadow.arena[id].flood = 0;
        let pos = id.entry(fault.gva.index(level));
        let below = &walk.steps[usize::from(level.0) - 2];
        let role = self.shadow.arena[id].role.child(pos.index(), false, below.access);
        let gfn = below.table;
        let new = (!self.shadow.is_linked(pos, gfn, role)).then(|| self.find_child(gfn, role));
        if self.gpte_changed(fault, walk, level.down()) {
            return None;
        }
        Some(self.link_if_new(pos, new))
    }

    #[inline(always)]
    pub(crate) fn find_child(&mut self, gfn: Gfn, role: Role) -> PageId {
        let (child, flush) = self.shadow.get_page(gfn, role, &self.vcpu.role);
        self.pay(flush);
        if self.shadow.arena[child].unsync_children > 0 {
            let flush = self.shadow.sync_children(child, &self.vcpu.role);
            self.pay(flush);
        }
        child
    }

    #[inline(always)]
    pub(crate) fn link_if_new(&mut self, pos: SptePos, new: Option<PageId>) -> PageId {
        let Some(child) = new else { return self.shadow.spte(pos).child() };
        let flush = self.shadow.link(pos, child);
        self.pay(flush);
        child
    }

    fn hugepage_adjust(&mut self, fault: &Fault) -> Goal {
        let disallowed = fault.fetch && self.shadow.config.nx_huge_pages;
        let small = Goal { level: Level::PT, requested: Level::PT, disallowed };
        if fault.max_level == Level::PT || fault.pfn.is_none() || !self.shadow.policy.rules.large_pages {
            return small;
        }
        let Some(slot) = self.shadow.memory.slot(fault.gfn) else { return small };
        if slot.logs_dirty() {
            return small;
        }
        let top = fault.max_level.min(if self.shadow.config.cpu.gbpages { Level::PDPT } else { Level::PD });
        // Where a table forbids a level it forbids those above, so the order of the two limits is all the same.
        let mut requested = top.min(self.shadow.memory.host.state(fault.gfn).level());
        while requested > Level::PT && !self.shadow.memory.allows_large(fault.gfn, requested) {
            requested = requested.down();
        }
        Goal { level: if disallowed { Level::PT } else { requested }, requested, disallowed }
    }

    /// A huge page that was split for execution stays split where a table is linked already
    /// (`disallowed_hugepage_adjust`, 6.1).
    fn disallowed_hugepage_adjust(&self, pos: SptePos, goal: &mut Goal) {
        let spte = self.shadow.spte(pos);
        let any = self.shadow.config.kernel.nx_keeps_any_table;
        if spte.is_table(goal.level.0) && (any || self.shadow.arena[spte.child()].nx_disallowed) {
            goal.level = goal.level.down();
        }
    }

    /// One step down below a large guest page: a direct page with the rights of the walk.
    fn descend_direct(&mut self, pos: SptePos, base: Gfn, access: Access, goal: Goal) -> PageId {
        let level = self.shadow.arena[pos.page()].level();
        let role = self.shadow.arena[pos.page()].role.child(pos.index(), true, access);
        let spte = self.shadow.spte(pos);
        if spte.is_table(level.0) && self.shadow.arena[spte.child()].role.access() != access {
            // The rights of the large page changed (validate_direct_spte, 6.1).
            self.shadow.unlink_child(pos);
            self.pay(Flush::when(true));
        }
        if self.shadow.is_linked(pos, base, role) {
            return self.shadow.spte(pos).child();
        }
        let (child, flush) = self.shadow.get_page(base, role, &self.vcpu.role);
        self.pay(flush);
        let child = self.link_if_new(pos, Some(child));
        self.shadow.arena[child].nx_disallowed |= goal.disallowed;
        // With paging off 6.1 does not count the split (direct_map asks for is_tdp).
        let in_mode = self.vcpu.role.mode.has_tables() || self.shadow.config.kernel.nx_counts_unpaged;
        let counts = in_mode && goal.disallowed && goal.requested >= level;
        if counts && !self.shadow.arena[child].nx_split {
            self.shadow.arena[child].nx_split = true;
            self.shadow.counters.nx_lpage_splits += 1;
        }
        child
    }

    /// Fills the neighbours of a faulting entry (`FNAME(pte_prefetch)`, 6.1).
    fn prefetch_around(&mut self, pos: SptePos, table: Gfn) {
        let id = pos.page();
        if self.shadow.arena[id].level() > Level::PT {
            return;
        }
        if self.shadow.arena[id].role.direct() {
            let width = self.shadow.prefetch_width(id);
            self.prefetch_direct(id, pos.index() & !(width - 1), width, pos.index());
        } else {
            let granted = self.shadow.arena[id].role.access();
            let contents = self.shadow.memory.host.contents(table);
            let flush = self.shadow.prefetch(pos, Guest { contents, granted, role: &self.vcpu.role });
            self.pay(flush.unwrap_or(Flush::NONE));
        }
    }

    /// The same in a direct page (`__direct_pte_prefetch`, 6.1): runs of empty entries, each up to the first page that
    /// the host does not have ready. A run that cannot even begin ends it all.
    fn prefetch_direct(&mut self, id: PageId, first: usize, width: usize, faulting: usize) {
        let mut start = None;
        for index in first..=first + width {
            let pos = id.entry(index.min(first + width - 1));
            let ends = index == first + width || index == faulting || self.shadow.spte(pos).present();
            match (ends, start) {
                (false, None) => start = Some(index),
                (true, Some(from)) => {
                    start = None;
                    if !self.prefetch_run(id, from, index) {
                        return;
                    }
                }
                (false, Some(_)) | (true, None) => {}
            }
        }
    }

    fn prefetch_run(&mut self, id: PageId, from: usize, to: usize) -> bool {
        let access = self.shadow.arena[id].role.access();
        let (first, last) =
            (self.shadow.arena.mapped_gfn(id.entry(from)), self.shadow.arena.mapped_gfn(id.entry(to - 1)));
        // gfn_to_page_many_atomic (6.1) gives nothing at all for a run that leaves its slot.
        if !self.shadow.memory.slot(first).is_some_and(|slot| slot.holds(last)) {
            return false;
        }
        for index in from..to {
            let pos = id.entry(index);
            let gfn = self.shadow.arena.mapped_gfn(pos);
            if !self.shadow.prefetchable(gfn, access, true) {
                return index > from;
            }
            let leaf =
                Leaf { gfn, access, pfn: Some(Host::pfn(gfn)), host_writable: true, prefetch: true, write: false };
            let (_, flush) = self.shadow.set_leaf(pos, &leaf);
            self.shadow.counters.x_prefetched += 1;
            self.pay(flush);
        }
        true
    }
}

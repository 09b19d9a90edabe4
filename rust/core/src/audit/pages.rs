//! Shadow pages among themselves: hash, active list, parents, roots, unsync marks.

use super::{Audit, may_grant};
use crate::bits::PT_ADDR;
use crate::cpu::{CpuRole, Root, Top, Vcpu};
use crate::shadow::page::{Bitmap, bits};
use crate::shadow::spte::Spte;
use crate::types::{ENTRIES, Gfn, Level, PageId, SptePos};
use rustc_hash::{FxHashMap, FxHashSet};

impl Audit<'_> {
    /// The hash chains and the active list hold the right pages, once, and agree on who is older.
    pub(super) fn check_page_lists(&mut self) {
        let arena = &self.shadow.arena;
        // A cycle must end the audit with a finding, not with a hang.
        let limit = arena.capacity() + 1;
        let active: Vec<_> = arena.oldest_first().take(limit).collect();
        let mut age = FxHashMap::default();
        for (place, id) in active.iter().enumerate() {
            let twice = age.insert(*id, place).is_some();
            self.expect(!twice, |a| format!("{} is on the active list more than once", a.name(*id)));
            self.expect(self.is_valid(*id), |a| format!("{} is on the active list but was zapped", a.name(*id)));
        }
        for id in self.live.clone() {
            let listed = age.contains_key(&id);
            self.expect(listed || !self.is_valid(id), |a| format!("{} is not on the active list", a.name(id)));
        }
        for number in 0..arena.capacity() {
            self.check_chain(PageId(number as u32), limit, &age);
        }
    }

    fn check_chain(&mut self, id: PageId, limit: usize, age: &FxHashMap<PageId, usize>) {
        let arena = &self.shadow.arena;
        let chain: Vec<_> = arena.chain(arena[id].gfn).take(limit).collect();
        let times = chain.iter().filter(|other| **other == id).count();
        let wanted = usize::from(self.is_live(id));
        self.expect(times == wanted, |a| format!("{} is in its hash chain {times} times, not {wanted}", a.name(id)));
        if times != 1 || chain.first() != Some(&id) {
            return; // the rest is checked once a chain, by the page at its head
        }
        let mut younger: Option<PageId> = None;
        for other in chain.iter().filter(|other| age.contains_key(other)) {
            if let Some(before) = younger {
                let in_order = age[&before] > age[other];
                self.expect(in_order, |a| {
                    format!("{} stands before {} in the hash but is older on the list", a.name(before), a.name(*other))
                });
            }
            younger = Some(*other);
        }
        for other in chain {
            let same = arena.chain_first(arena[other].gfn) == Some(id);
            self.expect(same, |a| format!("{} is in the hash chain of {}", a.name(other), a.name(id)));
        }
    }

    /// Valid pages belong to the current generation and to a memslot; a zapped page is an empty shell that some vCPU
    /// still has for a root (`kvm_mmu_prepare_zap_page`, 6.1).
    pub(super) fn check_pages(&mut self) {
        for id in self.live.clone() {
            let page = &self.shadow.arena[id];
            if page.role.invalid() {
                self.expect(page.root_count > 0, |a| {
                    format!("{} was zapped and is no root, but not freed", a.name(id))
                });
                self.expect(page.used == Bitmap::default(), |a| format!("{} was zapped but has entries", a.name(id)));
                self.expect(!page.unsync, |a| format!("{} was zapped but is unsync", a.name(id)));
                let linked = self.shadow.lists.first(page.parents).is_some();
                self.expect(!linked, |a| format!("{} was zapped but has parents", a.name(id)));
                continue;
            }
            let current = page.generation == self.shadow.generation;
            self.expect(current, |a| format!("{} is of generation {} but not zapped", a.name(id), page.generation));
            let homeless = page.has_gptes() && self.shadow.memory.slot(page.gfn).is_none();
            self.expect(!homeless, |a| format!("{} shadows a table outside the memslots", a.name(id)));
        }
    }

    /// Root counts are the vCPUs' roots; a current root fits its vCPU's mode.
    pub(super) fn check_roots(&mut self) {
        let mut count: FxHashMap<PageId, u32> = FxHashMap::default();
        for vcpu in self.vcpus {
            let role = CpuRole::of(&vcpu.regs, &self.shadow.config.cpu);
            self.expect(vcpu.role == role, |_| format!("vCPU {} walks by rules of other registers", vcpu.id));
            let wanted = if role.mode.has_tables() { vcpu.regs.cr3 } else { 0 };
            let named = !vcpu.root.is_loaded() || vcpu.root.pgd == wanted;
            self.expect(named, |_| {
                format!("vCPU {} has cr3 {:#x} but a root for {:#x}", vcpu.id, vcpu.regs.cr3, vcpu.root.pgd)
            });
            for (place, root) in std::iter::once(&vcpu.root).chain(&vcpu.prev_roots).enumerate() {
                let who = format!("vCPU {} root {place}", vcpu.id);
                let cached = place > 0 && root.is_loaded();
                self.expect(!cached || root.page().is_some(), |_| format!("{who} is a PAE root, which is never kept"));
                for (quadrant, id) in root_pages(root) {
                    *count.entry(id).or_default() += 1;
                    self.check_root_page(vcpu, root, quadrant, id, &who);
                }
            }
        }
        for id in self.live.clone() {
            let (noted, real) = (self.shadow.arena[id].root_count, count.get(&id).copied().unwrap_or(0));
            self.expect(noted == real, |a| format!("{} is {real} roots of vCPUs, not {noted}", a.name(id)));
        }
    }

    fn check_root_page(&mut self, vcpu: &Vcpu, root: &Root, quadrant: usize, id: PageId, who: &str) {
        self.expect(self.is_live(id), |_| format!("{who} is page {}, which is freed", id.0));
        if !self.is_live(id) {
            return;
        }
        let (page, mode) = (&self.shadow.arena[id], vcpu.role.mode);
        let gfn = match mode {
            mode if !mode.has_tables() => (quadrant as u64) << 18,
            mode if mode.pdptes => (vcpu.pdptes[quadrant] & PT_ADDR) >> 12,
            _ => (root.pgd & PT_ADDR) >> 12,
        };
        self.expect(page.gfn.0 == gfn, |a| format!("{who} with pgd {:#x} is {}", root.pgd, a.name(id)));
        let role = vcpu.role.root_role();
        let role = if mode.has_pae_roots() { role.pae_root(quadrant as u32) } else { role };
        let fits = if page.role.invalid() { page.role == role.invalidated() } else { page.role == role };
        self.expect(fits, |a| format!("{who} has the role of another paging mode: {}", a.name(id)));
    }

    /// The sets of used entries, and that each entry is one of the four kinds.
    pub(super) fn check_entries(&mut self) {
        for id in self.live.clone() {
            let mut used = Bitmap::default();
            for index in 0..ENTRIES {
                let spte = self.shadow.spte(id.entry(index));
                if spte == Spte::EMPTY {
                    continue;
                }
                used[index / 64] |= 1 << (index % 64);
                let known = spte.present() || spte.is_mmio() && self.shadow.arena[id].level().0 == 1;
                let pos = id.entry(index);
                self.expect(known, |a| format!("{}: neither empty, leaf, table nor MMIO", a.entry_name(pos)));
            }
            let noted = self.shadow.arena[id].used;
            for index in bits(&std::array::from_fn(|word| noted[word] ^ used[word])) {
                let said = if noted[index / 64] >> (index % 64) & 1 == 0 { "empty" } else { "used" };
                self.report(format!("{} is noted as {said}", self.entry_name(id.entry(index))));
            }
        }
    }

    /// Table pointers and parent lists match both ways, and what hangs on an entry fits the page it is in.
    pub(super) fn check_parents(&mut self) {
        let mut listed: FxHashMap<SptePos, (u32, PageId)> = FxHashMap::default();
        for id in self.live.clone() {
            let parents: Vec<_> = self.shadow.lists.iter(self.shadow.arena[id].parents).take(self.entries()).collect();
            for pos in parents {
                let slot = listed.entry(pos).or_insert((0, id));
                slot.0 += 1;
                slot.1 = id;
                let points = self.is_live(pos.page()) && {
                    let spte = self.shadow.spte(pos);
                    spte.is_table(self.shadow.arena[pos.page()].level().0) && spte.child() == id
                };
                self.expect(points, |a| {
                    format!("{} has a parent that points elsewhere: {}", a.name(id), a.entry_name(pos))
                });
            }
        }
        for (pos, child) in std::mem::take(&mut self.tables) {
            let times = listed.get(&pos).map_or(0, |(times, _)| *times);
            self.expect(times == 1, |a| {
                format!("{} is {times} times among the parents of its child", a.entry_name(pos))
            });
            self.check_child(pos, child);
        }
    }

    fn check_child(&mut self, pos: SptePos, child: PageId) {
        if !self.is_valid(child) {
            self.report(format!("{} points to {}, which is freed or zapped", self.entry_name(pos), self.name(child)));
            return;
        }
        let arena = &self.shadow.arena;
        let (parent, below) = (&arena[pos.page()], &arena[child]);
        let wanted = parent.role.child(pos.index(), below.role.direct(), below.role.access());
        self.expect(below.role == wanted, |a| {
            format!("{} points to a page of another level or mode: {}", a.entry_name(pos), a.name(child))
        });
        let fits = match (parent.role.direct(), below.role.direct()) {
            (true, _) => below.role.access() == parent.role.access(),
            (false, true) => may_grant(parent.role.access(), below.role.access(), below.role),
            (false, false) => parent.role.access().has(below.role.access()),
        };
        self.expect(fits, |a| format!("{} points to a page with more rights: {}", a.entry_name(pos), a.name(child)));
        let indirect = parent.role.direct() && !below.role.direct();
        self.expect(!indirect, |a| format!("{} of a direct page points to a guest table", a.entry_name(pos)));
        if parent.role.direct() {
            let gfn = arena.mapped_gfn(pos);
            self.expect(below.gfn == gfn, |a| {
                format!("{} should lead to gfn {gfn:#x}: {}", a.entry_name(pos), a.name(child))
            });
        }
    }

    /// Unsync pages are marked on all ways up to the roots (`mmu_mark_parents_unsync`, 6.1), and are of frames that are
    /// tables of level 1 only: making an upper-level page of the frame zaps them (`kvm_mmu_get_page`, 6.1).
    pub(super) fn check_unsync(&mut self) {
        let arena = &self.shadow.arena;
        let upper = |id: &&PageId| self.is_valid(**id) && arena[**id].has_gptes() && arena[**id].level() > Level::PT;
        let tracked: FxHashSet<Gfn> = self.live.iter().filter(upper).map(|id| arena[*id].gfn).collect();
        for id in self.live.clone() {
            let page = &self.shadow.arena[id];
            let marks: u32 = page.unsync_bitmap.iter().map(|word| word.count_ones()).sum();
            let noted = page.unsync_children;
            self.expect(noted == marks, |a| format!("{} counts {noted} unsync entries but marks {marks}", a.name(id)));
            let can_lag = page.level().0 == 1 && page.has_gptes();
            self.expect(!page.unsync || can_lag, |a| format!("{} is unsync, which its kind never is", a.name(id)));
            let free = !page.unsync || !tracked.contains(&page.gfn);
            self.expect(free, |a| format!("{} is unsync, but its frame is a table of an upper level too", a.name(id)));
            if !page.unsync && page.unsync_children == 0 {
                continue;
            }
            let parents: Vec<_> = self.shadow.lists.iter(page.parents).take(self.entries()).collect();
            for pos in parents {
                let marked =
                    self.shadow.arena[pos.page()].unsync_bitmap[pos.index() / 64] >> (pos.index() % 64) & 1 != 0;
                let what = if page.unsync { "is unsync" } else { "has unsync pages below" };
                self.expect(marked, |a| format!("{} {what}, but {} is not marked", a.name(id), a.entry_name(pos)));
            }
        }
    }

    /// More than any list can hold.
    pub(super) fn entries(&self) -> usize {
        self.shadow.arena.capacity() * ENTRIES + 1
    }
}

/// The pages of a root, each with its place among the four of a PAE root.
fn root_pages(root: &Root) -> Vec<(usize, PageId)> {
    match root.top {
        Top::None | Top::Dummy => Vec::new(),
        Top::Page(id) => vec![(0, id)],
        Top::Pae(pages) => pages.into_iter().enumerate().filter_map(|(i, id)| Some((i, id?))).collect(),
    }
}

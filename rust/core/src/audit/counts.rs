//! Counts: what the shadow keeps beside the entries, and the statistics that say how much there is now.

use super::Audit;
use crate::memory::Slot;
use crate::shadow::page::Page;
use crate::types::{Gfn, Level, SptePos};
use rustc_hash::FxHashMap;

/// Frames of one 2 MiB region, as a shift.
const REGION: u32 = 9;

/// What valid pages with gptes add up to, by frame and region.
#[derive(Default)]
struct Shadowed {
    /// Pages above level 1, and of any level, of a frame.
    frames: FxHashMap<Gfn, (u32, u32)>,
    /// Pages of any level in a region, by its number.
    regions: FxHashMap<u64, u32>,
}

impl Audit<'_> {
    /// Every count, anew.
    pub(super) fn check_counts(&mut self) {
        self.check_shadow_counts();
        self.check_statistics();
    }

    /// What `account_shadowed` and `unaccount_shadowed` (6.1) keep per frame: write tracking and forbidden large pages.
    fn check_shadow_counts(&mut self) {
        let mut real = Shadowed::default();
        let shadow = self.shadow;
        for id in self.live.clone() {
            let page = &shadow.arena[id];
            if !self.is_valid(id) || !page.has_gptes() || !shadow.memory.has_slot(page.gfn) {
                continue;
            }
            let (upper, any) = real.frames.entry(page.gfn).or_default();
            *upper += u32::from(page.level() > Level::PT);
            *any += 1;
            *real.regions.entry(page.gfn.0 >> REGION).or_default() += 1;
        }
        self.expect(shadow.memory.books_are_slots(), |_| {
            "bookkeeping that does not add up, or of frames in no memslot".into()
        });
        for slot in shadow.memory.slots() {
            let end = slot.base.0 + slot.pages;
            let mut first = slot.base.0;
            while first < end {
                let next = ((first >> REGION) + 1) << REGION;
                self.check_region(slot, Gfn(first)..Gfn(next.min(end)), &real);
                first = next;
            }
        }
    }

    fn check_region(&mut self, slot: &Slot, frames: std::ops::Range<Gfn>, real: &Shadowed) {
        let (first, memory) = (frames.start, &self.shadow.memory);
        let tables = real.regions.get(&(first.0 >> REGION)).copied().unwrap_or(0);
        let noted = memory.disallow_2m(first);
        self.expect(noted == tables, |_| {
            format!("gfn {first:#x}: {tables} pages forbid a leaf of 2 MiB around it, noted are {noted}")
        });
        let open = slot.covers(first, Level::PD) && !slot.readonly && !slot.logs_dirty();
        self.expect(open || !memory.is_open(first), |_| {
            format!("the region of gfn {first:#x} is taken for one that its slot lets the guest write as it likes")
        });
        for gfn in (frames.start.0..frames.end.0).map(Gfn) {
            let (upper, any) = real.frames.get(&gfn).copied().unwrap_or_default();
            let books = memory.books(gfn);
            let (noted, all) = (u32::from(books.track), u32::from(books.tables));
            self.expect(noted == upper, |_| {
                format!("gfn {gfn:#x} is shadowed by {upper} pages above level 1, but its write-track count is {noted}")
            });
            self.expect(all == any, |_| format!("gfn {gfn:#x} is shadowed by {any} pages, noted are {all}"));
        }
    }

    /// The statistics of kind "instant", and the counts behind the quota.
    fn check_statistics(&mut self) {
        let shadow = self.shadow;
        let leaves = |level: u8| {
            let at = |pos: SptePos| shadow.arena[pos.page()].level().0;
            self.leaves.iter().filter(|(pos, _)| at(*pos) == level).count() as u64
        };
        let pages =
            |which: &dyn Fn(&Page) -> bool| self.live.iter().filter(|id| which(&shadow.arena[**id])).count() as u64;
        let counters = &shadow.counters;
        let rows = [
            ("pages_4k", counters.pages_4k, leaves(1)),
            ("pages_2m", counters.pages_2m, leaves(2)),
            ("pages_1g", counters.pages_1g, leaves(3)),
            ("mmu_unsync", counters.mmu_unsync, pages(&|page| page.unsync)),
            ("nx_lpage_splits", counters.nx_lpage_splits, pages(&|page| page.nx_split)),
            ("used pages", shadow.used_pages, pages(&|_| true)),
            ("pages with gptes", shadow.indirect_pages, pages(&|page| !page.role.invalid() && page.has_gptes())),
        ];
        for (name, noted, real) in rows {
            self.expect(noted == real, |_| format!("{name}: {real} are there, {noted} are counted"));
        }
    }
}

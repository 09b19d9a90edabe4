//! Counts: what the shadow keeps beside the entries, and the statistics that say how much there is now.

use super::Audit;
use crate::memory::Slot;
use crate::shadow::page::Page;
use crate::types::{Gfn, Level, SptePos};
use rustc_hash::FxHashMap;

/// Frames of one 2 MiB region, and regions of one 1 GiB region, as a shift.
const REGION: u32 = 9;

/// What valid pages with gptes add up to, by frame and region.
#[derive(Default)]
struct Shadowed {
    /// Pages above level 1 of a frame.
    upper: FxHashMap<Gfn, u32>,
    /// Pages of any level in a region of one slot: slot number, first frame of the region.
    two: FxHashMap<(u16, u64), u32>,
    one: FxHashMap<(u16, u64), u32>,
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
            let Some(slot) = shadow.memory.slot(page.gfn).filter(|_| self.is_valid(id) && page.has_gptes()) else {
                continue;
            };
            if page.level() > Level::PT {
                *real.upper.entry(page.gfn).or_default() += 1;
            }
            *real.two.entry((slot.id, page.gfn.0 >> REGION)).or_default() += 1;
            *real.one.entry((slot.id, page.gfn.0 >> (2 * REGION))).or_default() += 1;
        }
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
        let first = frames.start;
        let key = |shift: u32| (slot.id, first.0 >> shift);
        let two = real.two.get(&key(REGION)).copied().unwrap_or(0);
        let one = real.one.get(&key(2 * REGION)).copied().unwrap_or(0);
        let noted = slot.disallow(first);
        self.expect(noted == (two, one), |_| {
            format!(
                "slot {}, gfn {first:#x}: {two} and {one} pages forbid a leaf of 2 MiB and 1 GiB, noted are {} and {}",
                slot.id, noted.0, noted.1
            )
        });
        if slot.region(first).is_none() && two == 0 {
            return; // no bookkeeping was ever made here, and none is due
        }
        for gfn in (frames.start.0..frames.end.0).map(Gfn) {
            let upper = real.upper.get(&gfn).copied().unwrap_or(0);
            let noted = u32::from(slot.track(gfn));
            self.expect(noted == upper, |_| {
                format!("gfn {gfn:#x} is shadowed by {upper} pages above level 1, but its write-track count is {noted}")
            });
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

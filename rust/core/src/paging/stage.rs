//! The second stage of nested paging: which units of guest memory it maps, and which frames its dirty log lets be written.

use crate::engine::Vm;
use crate::memory::Slot;
use crate::paging::saved::set_in_order;
use crate::types::{Gfn, Gpa, Level};
use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the host did to a VM, as far as a second stage must know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostAct<'a> {
    /// Pages went, or others came in their place: bytes from an address on.
    Dropped(Gpa, u64),
    /// A memslot went or went elsewhere, or huge pages must be split from now on: all that is mapped goes.
    AllGone,
    /// Dirty logging was turned on or off.
    LogSet,
    /// A dirty log was read.
    LogRead,
    /// Frames were taken out of a dirty log by hand.
    LogCleared(&'a [u64]),
}

/// What an access costs at the second stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum StageExit {
    /// Nothing.
    None,
    /// An exit: the unit was not mapped.
    Fault,
    /// An exit: the frame was write-protected for the dirty log.
    Dirty,
}

/// Ranges of units that do not overlap, by their beginning: (first, behind the last).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn holds(&self, unit: u64) -> bool {
        self.0.range(..=unit).next_back().is_some_and(|(_, end)| unit < *end)
    }

    fn add(&mut self, first: u64, end: u64) {
        let touches = |(start, stop): (&u64, &u64)| (*stop >= first).then_some(*start);
        let (mut first, mut end) = (first, end);
        while let Some(start) = self.0.range(..=end).next_back().and_then(touches) {
            end = end.max(self.0.remove(&start).unwrap_or(end));
            first = first.min(start);
        }
        self.0.insert(first, end);
    }
}

/// The second stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Stage {
    level: Level,
    /// Everything was mapped at the start.
    warm: bool,
    /// ... but for units that went since.
    gone: Ranges,
    /// Units that a fault mapped.
    #[serde(serialize_with = "set_in_order")]
    mapped: FxHashSet<u64>,
    /// Whether the dirty log lets frames be written that are not in `marked`.
    open: bool,
    /// Frames that are otherwise.
    #[serde(serialize_with = "set_in_order")]
    marked: FxHashSet<u64>,
}

impl Stage {
    pub(super) fn new(level: Level, warm: bool) -> Self {
        let (mapped, marked) = (FxHashSet::default(), FxHashSet::default());
        Self { level, warm, gone: Ranges::default(), mapped, open: false, marked }
    }

    /// The level at which it maps.
    pub(super) const fn level(&self) -> Level {
        self.level
    }

    const fn shift(&self) -> u32 {
        9 * (self.level.0 as u32 - 1)
    }

    /// The unit that a frame lies in.
    pub(super) const fn unit(&self, gfn: Gfn) -> u64 {
        gfn.0 >> self.shift()
    }

    /// Maps a frame's unit without an exit of its own. Returns whether it was not.
    pub(super) fn bring(&mut self, gfn: Gfn) -> bool {
        let unit = self.unit(gfn);
        (!self.warm || self.gone.holds(unit)) && self.mapped.insert(unit)
    }

    /// An access comes to a frame.
    pub(super) fn touch(&mut self, vm: &mut Vm, gfn: Gfn, write: bool) -> StageExit {
        let fresh = self.bring(gfn);
        let logged = vm.shadow.memory.slot(gfn).is_some_and(Slot::logs_dirty);
        // A page comes with W whatever the access, and then counts as written (`make_spte`, 6.1).
        let wanted = write || logged && fresh;
        let protected = wanted && logged && self.let_write(gfn);
        if wanted {
            vm.shadow.memory.mark_dirty(gfn);
        }
        match (fresh, protected) {
            (true, _) => StageExit::Fault,
            (false, true) => StageExit::Dirty,
            (false, false) => StageExit::None,
        }
    }

    /// Lets a frame be written from now on; whether that was not so.
    fn let_write(&mut self, gfn: Gfn) -> bool {
        if self.open { self.marked.remove(&gfn.0) } else { self.marked.insert(gfn.0) }
    }

    /// The host did something. Returns whether TLBs must be flushed.
    pub(super) fn host_did(&mut self, vm: &Vm, act: HostAct<'_>) -> bool {
        match act {
            HostAct::Dropped(gpa, size) => self.forget(gpa, size),
            // Every root of the TDP MMU goes (`kvm_mmu_zap_all_fast`, 6.1), so a warm one is cold now.
            HostAct::AllGone => *self = Self::new(self.level, false),
            HostAct::LogRead if vm.shadow.manual_dirty.enabled => return false,
            HostAct::LogRead => self.protect(false),
            // With KVM_DIRTY_LOG_INITIALLY_SET nothing is write-protected before it is cleared by hand.
            HostAct::LogSet => self.protect(vm.shadow.manual_dirty.enabled && vm.shadow.manual_dirty.initially_set),
            HostAct::LogCleared(frames) => {
                for gfn in frames {
                    if self.open {
                        self.marked.insert(*gfn);
                    } else {
                        self.marked.remove(gfn);
                    }
                }
            }
        }
        true
    }

    fn protect(&mut self, open: bool) {
        (self.open, self.marked) = (open, FxHashSet::default());
    }

    /// What is mapped of a range goes. The cost is that of what is there: a range may be of any size.
    fn forget(&mut self, gpa: Gpa, size: u64) {
        let (first, end, shift) = (gpa.gfn().0, gpa.gfn().0 + (size >> 12), self.shift());
        if first == end {
            return;
        }
        let (unit, behind) = (first >> shift, ((end - 1) >> shift) + 1);
        self.mapped.retain(|mapped| !(unit..behind).contains(mapped));
        if self.warm {
            self.gone.add(unit, behind);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_together() {
        let mut ranges = Ranges::default();
        for (first, end) in [(10, 12), (20, 30), (14, 16), (12, 14), (25, 27), (0, 5)] {
            ranges.add(first, end);
        }
        assert_eq!(ranges.0.into_iter().collect::<Vec<_>>(), [(0, 5), (10, 16), (20, 30)]);
        let mut ranges = Ranges::default();
        ranges.add(5, 6);
        ranges.add(0, 9);
        let held: Vec<_> = (0..12).filter(|unit| ranges.holds(*unit)).collect();
        assert_eq!(held, (0..9).collect::<Vec<_>>());
    }
}

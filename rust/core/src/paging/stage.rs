//! The second stage of nested paging: which units of guest memory it maps, and which frames its dirty log lets be written.

use crate::engine::Vm;
use crate::memory::Slot;
use crate::paging::saved::set_in_order;
use crate::types::{Gfn, Gpa, Level};
use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};

/// What the host did to a VM, as far as a second stage must know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostAct<'a> {
    /// Pages went, or others came in their place: bytes from an address on.
    Dropped(Gpa, u64),
    /// A memslot was added.
    SlotAdded(Gpa, u64),
    /// A memslot went, or went elsewhere.
    SlotGone,
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

/// The second stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Stage {
    level: Level,
    warm: bool,
    /// Units whose state is not that of the start: mapped in a cold one, gone in a warm one.
    #[serde(serialize_with = "set_in_order")]
    changed: FxHashSet<u64>,
    /// Frames that the dirty log lets be written.
    #[serde(serialize_with = "set_in_order")]
    writable: FxHashSet<u64>,
}

impl Stage {
    pub(super) fn new(level: Level, warm: bool) -> Self {
        Self { level, warm, changed: FxHashSet::default(), writable: FxHashSet::default() }
    }

    /// The level at which it maps.
    pub(super) const fn level(&self) -> Level {
        self.level
    }

    /// Entries that a walk through it reads.
    pub(super) const fn depth(&self) -> u64 {
        5 - self.level.0 as u64
    }

    const fn shift(&self) -> u32 {
        9 * (self.level.0 as u32 - 1)
    }

    /// The unit that a frame lies in.
    pub(super) const fn unit(&self, gfn: Gfn) -> u64 {
        gfn.0 >> self.shift()
    }

    /// An access comes to a frame.
    pub(super) fn touch(&mut self, vm: &mut Vm, gfn: Gfn, write: bool) -> StageExit {
        let unit = self.unit(gfn);
        let fresh = self.changed.contains(&unit) == self.warm;
        if fresh && self.warm {
            self.changed.remove(&unit);
        } else if fresh {
            self.changed.insert(unit);
        }
        let logged = write && vm.shadow.memory.slot(gfn).is_some_and(Slot::logs_dirty);
        let protected = logged && self.writable.insert(gfn.0);
        if write {
            vm.shadow.memory.mark_dirty(gfn);
        }
        match (fresh, protected) {
            (true, _) => StageExit::Fault,
            (false, true) => StageExit::Dirty,
            (false, false) => StageExit::None,
        }
    }

    /// The host did something. Returns whether TLBs must be flushed.
    pub(super) fn host_did(&mut self, vm: &Vm, act: HostAct<'_>) -> bool {
        match act {
            HostAct::Dropped(gpa, size) => self.forget(gpa, size, true),
            HostAct::SlotAdded(gpa, size) => self.forget(gpa, size, false),
            HostAct::SlotGone => {
                // Every root of the TDP MMU goes with any slot (`kvm_mmu_zap_all_fast`, 6.1), so a warm one is cold now.
                (self.warm, self.changed, self.writable) = (false, FxHashSet::default(), FxHashSet::default());
            }
            HostAct::LogRead if vm.shadow.manual_dirty.enabled => return false,
            HostAct::LogRead | HostAct::LogSet => self.writable.clear(),
            HostAct::LogCleared(frames) => {
                for gfn in frames {
                    self.writable.remove(gfn);
                }
            }
        }
        true
    }

    /// What is mapped of a range goes (`gone`; a cold stage maps nothing of a new range anyway), and what its log let be
    /// written. It looks at what is there, since a range may be of any size.
    fn forget(&mut self, gpa: Gpa, size: u64, gone: bool) {
        let (first, end, shift) = (gpa.gfn().0, gpa.gfn().0 + (size >> 12), self.shift());
        if !self.warm {
            self.changed.retain(|unit| (unit + 1) << shift <= first || unit << shift >= end);
        } else if gone {
            self.changed.extend(first >> shift..=(end - 1) >> shift);
        }
        self.writable.retain(|gfn| !(first..end).contains(gfn));
    }
}

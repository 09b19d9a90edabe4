//! Remembered ways: the part of a fault's way that the last fault nearby has gone already.
//!
//! While nothing moves [`Memory::ways_epoch`](crate::memory::Memory), the upper tables of an address stay what they were:
//! the guest's are write-tracked as long as the shadow links them, so that no store reaches them unseen, and every
//! change of a link, of a slot, or of memory by the host moves the epoch (a store that is emulated takes the links of the
//! entry that it hits away). So a fault can begin its walks at
//! the last-level table. It is no part of KVM and changes nothing but the time that a fault takes.

use crate::guest::walk::GuestWalk;
use crate::shadow::Shadow;
use crate::types::{Gva, PageId};

/// How many ways a vCPU remembers: one for each 2 MiB region, by its number.
const WAYS: usize = 64;
/// The same for walks through the shadow alone.
const NEAR: usize = 256;
/// Address bits of a last-level shadow table.
const REGION_SHIFT: u32 = 21;

/// The way to one last-level table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    region: u64,
    /// The root that it begins at.
    pub root: PageId,
    epoch: u64,
    /// The shadow table.
    pub table: PageId,
    /// The count of writes against pages when those against the pages on this way were last forgotten.
    floods: u64,
    /// The guest's walk down to its last-level table; every entry on it has A.
    pub walk: GuestWalk,
}

impl Way {
    /// The first address of its region.
    pub(crate) const fn first_address(&self) -> Gva {
        Gva(self.region << REGION_SHIFT)
    }
}

/// The shadow's part of a way alone, which accesses without a fault go, too.
#[derive(Clone, Copy, Debug)]
struct Near {
    region: u64,
    epoch: u64,
    root: PageId,
    table: PageId,
}

/// The ways that one vCPU remembers.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    ways: Box<[Way; WAYS]>,
    near: Box<[Near; NEAR]>,
}

impl Default for Ways {
    fn default() -> Self {
        // The epoch of memory is never 0.
        let none = Way { region: 0, root: PageId(0), epoch: 0, table: PageId(0), floods: 0, walk: GuestWalk::start() };
        let nothing = Near { region: 0, epoch: 0, root: PageId(0), table: PageId(0) };
        Self { ways: Box::new([none; WAYS]), near: Box::new([nothing; NEAR]) }
    }
}

impl Ways {
    /// The way to the last-level table of an address below `root`, if it is remembered and still true.
    #[inline]
    pub(crate) fn find(&self, root: PageId, gva: Gva, epoch: u64) -> Option<&Way> {
        let region = gva.0 >> REGION_SHIFT;
        let way = &self.ways[region as usize % WAYS];
        (way.region == region && way.root == root && way.epoch == epoch).then_some(way)
    }

    /// The last-level shadow table of an address below `root`, if it is remembered and still true.
    #[inline]
    pub(crate) fn near(&self, root: PageId, gva: Gva, epoch: u64) -> Option<PageId> {
        let region = gva.0 >> REGION_SHIFT;
        let near = &self.near[region as usize % NEAR];
        (near.region == region && near.root == root && near.epoch == epoch).then_some(near.table)
    }

    /// Remembers the end of a walk through the shadow.
    #[inline]
    pub(crate) fn remember_near(&mut self, root: PageId, gva: Gva, epoch: u64, table: PageId) {
        let region = gva.0 >> REGION_SHIFT;
        self.near[region as usize % NEAR] = Near { region, epoch, root, table };
    }

    /// All that are still true.
    pub(crate) fn all(&self, epoch: u64) -> impl Iterator<Item = &Way> {
        self.ways.iter().filter(move |way| way.epoch == epoch)
    }

    /// Remembers a way that a fault has gone to its end: `walk` is the guest's, `table` the shadow table that holds the
    /// leaf.
    pub(crate) fn remember(&mut self, root: PageId, gva: Gva, shadow: &Shadow, table: PageId, walk: &GuestWalk) {
        let region = gva.0 >> REGION_SHIFT;
        let (epoch, floods) = (shadow.memory.ways_epoch, shadow.floods);
        self.ways[region as usize % WAYS] = Way { region, root, epoch, table, floods, walk: *walk };
    }

    /// Whether a write was counted against a page since a fault last went the way of an address. It goes it now.
    #[inline]
    pub(crate) fn floods_moved(&mut self, gva: Gva, floods: u64) -> bool {
        let way = &mut self.ways[(gva.0 >> REGION_SHIFT) as usize % WAYS];
        std::mem::replace(&mut way.floods, floods) != floods
    }

    /// Forgets everything: walks obey other rules now.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

//! Remembered ways: the part of a fault's way that the last fault nearby has gone already.
//!
//! While nothing moves [`Memory::ways_epoch`](crate::memory::Memory), the upper tables of an address stay what they were:
//! the guest's are write-tracked as long as the shadow links them, so that no store reaches them unseen. Whatever takes a
//! link away moves the epoch (a store that is emulated takes those of the entry that it hits), and so does every change
//! of a slot, or of memory by the host. So a fault can begin its walks at the last-level table, or at its directory. It is
//! no part of KVM and changes nothing but the time that a fault takes.

use crate::guest::walk::GuestWalk;
use crate::shadow::Shadow;
use crate::types::{Gva, Level, PageId};

/// How many ways to last-level tables a vCPU remembers: one for each 2 MiB region, by its number.
const LAST: usize = 64;
/// How many to directories: one for each GiB.
const DIRECTORIES: usize = 16;
/// How many of the shadow's walks alone, for each 2 MiB region.
const NEAR: usize = 256;

/// Address bits of what a table of level 1 or 2 maps.
const fn shift(level: Level) -> u32 {
    12 + 9 * level.0 as u32
}

/// The way to one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    region: u64,
    /// The root that it begins at.
    pub root: PageId,
    epoch: u64,
    /// The shadow table, of level 1 or 2.
    pub table: PageId,
    /// Its level.
    pub level: Level,
    /// The count of writes against pages when those against the pages on this way were last forgotten.
    floods: u64,
    /// The guest's walk down to that table; every entry on it has A.
    pub walk: GuestWalk,
}

impl Way {
    const fn none(level: Level) -> Self {
        // The epoch of memory is never 0.
        let (root, table) = (PageId(0), PageId(0));
        Self { region: 0, root, epoch: 0, table, level, floods: 0, walk: GuestWalk::start() }
    }

    /// The first address of its region.
    pub(crate) const fn first_address(&self) -> Gva {
        Gva(self.region << shift(self.level))
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
    last: Box<[Way; LAST]>,
    directories: Box<[Way; DIRECTORIES]>,
    near: Box<[Near; NEAR]>,
}

impl Default for Ways {
    fn default() -> Self {
        let near = Near { region: 0, epoch: 0, root: PageId(0), table: PageId(0) };
        Self {
            last: Box::new([Way::none(Level::PT); LAST]),
            directories: Box::new([Way::none(Level::PD); DIRECTORIES]),
            near: Box::new([near; NEAR]),
        }
    }
}

impl Ways {
    /// The way to the last-level table of an address below `root`, if it is remembered and still true.
    #[inline]
    pub(crate) fn find(&self, root: PageId, gva: Gva, epoch: u64) -> Option<&Way> {
        let region = gva.0 >> shift(Level::PT);
        let way = &self.last[region as usize % LAST];
        (way.region == region && way.root == root && way.epoch == epoch).then_some(way)
    }

    /// The way to its directory.
    #[inline]
    pub(crate) fn find_directory(&self, root: PageId, gva: Gva, epoch: u64) -> Option<&Way> {
        let region = gva.0 >> shift(Level::PD);
        let way = &self.directories[region as usize % DIRECTORIES];
        (way.region == region && way.root == root && way.epoch == epoch).then_some(way)
    }

    /// The last-level shadow table of an address below `root`, if it is remembered and still true.
    #[inline]
    pub(crate) fn near(&self, root: PageId, gva: Gva, epoch: u64) -> Option<PageId> {
        let region = gva.0 >> shift(Level::PT);
        let near = &self.near[region as usize % NEAR];
        (near.region == region && near.root == root && near.epoch == epoch).then_some(near.table)
    }

    /// Remembers the end of a walk through the shadow.
    #[inline]
    pub(crate) fn remember_near(&mut self, root: PageId, gva: Gva, epoch: u64, table: PageId) {
        let region = gva.0 >> shift(Level::PT);
        self.near[region as usize % NEAR] = Near { region, epoch, root, table };
    }

    /// All that are still true.
    pub(crate) fn all(&self, epoch: u64) -> impl Iterator<Item = &Way> {
        self.last.iter().chain(&*self.directories).filter(move |way| way.epoch == epoch)
    }

    /// Remembers a way that a fault has gone: `walk` is the guest's, `table` the shadow table of `level` that it came to.
    #[inline]
    pub(crate) fn remember(
        &mut self,
        (root, gva): (PageId, Gva),
        shadow: &Shadow,
        (table, level): (PageId, Level),
        walk: &GuestWalk,
    ) {
        let region = gva.0 >> shift(level);
        let way = if level == Level::PT {
            &mut self.last[region as usize % LAST]
        } else {
            &mut self.directories[region as usize % DIRECTORIES]
        };
        let (epoch, floods) = (shadow.memory.ways_epoch, shadow.floods);
        *way = Way { region, root, epoch, table, level, floods, walk: *walk };
    }

    /// Whether a write was counted against a page since a fault last went the way of an address. It goes it now.
    #[inline]
    pub(crate) fn floods_moved(&mut self, gva: Gva, floods: u64) -> bool {
        let way = &mut self.last[(gva.0 >> shift(Level::PT)) as usize % LAST];
        std::mem::replace(&mut way.floods, floods) != floods
    }

    /// Forgets everything: walks obey other rules now.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

//! Remembered ways: the part of a fault's way that the last fault nearby has gone already.
//!
//! While nothing moves [`Memory::ways_epoch`](crate::memory::Memory), the upper tables of an address stay what they were:
//! the guest's are write-tracked as long as the shadow links them, so that no store reaches them unseen. Whatever takes a
//! link away says so: at a directory by its count of them, above by the epoch (a store that is emulated takes those of the
//! entry that it hits). Every change of a slot, or of memory by the host, moves the epoch, too. So a fault can begin its
//! walks at the last-level table, or at its directory. It is no part of KVM and changes nothing but the time that a fault
//! takes. In one case KVM leaves a tracked table writable (an MMIO entry that became memory, see `make_spte`): from then
//! on no way is remembered.

use crate::guest::gpte::Gpte;
use crate::guest::walk::{GuestWalk, Step};
use crate::memory::{Contents, Host};
use crate::shadow::Shadow;
use crate::types::{Gva, Level, PageId};

/// How many ways to last-level tables a vCPU remembers: one for each 2 MiB region, by its number.
const LAST: usize = 64;
/// How many to directories: one for each GiB.
const DIRECTORIES: usize = 16;
/// How many to directories of the shadow alone, which accesses without a fault go, too.
const NEAR: usize = 64;

/// The shadow pages of a way, by level - 1; those that it does not come to are its root.
pub(crate) type Path = [PageId; 5];

/// Address bits of what a table of level 1 or 2 maps.
const fn shift(level: Level) -> u32 {
    12 + 9 * level.0 as u32
}

/// Where a remembered way begins, and what must not have moved since.
#[derive(Clone, Copy, Debug)]
struct Track {
    /// The number of the region that it is for.
    region: u64,
    epoch: u64,
    /// The shadow page that it begins at.
    root: PageId,
    /// The directory (level 2) that it leads to, or over.
    directory: PageId,
    /// The directory's count of links that were taken away.
    unlinks: u32,
}

impl Track {
    /// Nobody's: the epoch of memory is never 0.
    const NONE: Self = Self { region: 0, epoch: 0, root: PageId(0), directory: PageId(0), unlinks: 0 };

    #[inline]
    fn new(region: u64, root: PageId, directory: PageId, shadow: &Shadow) -> Self {
        let epoch = if shadow.memory.leaks { 0 } else { shadow.memory.ways_epoch };
        Self { region, epoch, root, directory, unlinks: shadow.arena.unlinks(directory) }
    }

    #[inline(always)]
    fn leads(&self, region: u64, root: PageId, shadow: &Shadow) -> bool {
        self.region == region && self.root == root && self.holds(shadow)
    }

    #[inline(always)]
    fn holds(&self, shadow: &Shadow) -> bool {
        self.epoch == shadow.memory.ways_epoch && self.unlinks == shadow.arena.unlinks(self.directory)
    }
}

/// The way to one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    track: Track,
    /// The shadow pages on it.
    pub path: Path,
    /// The level of the last one.
    pub level: Level,
    /// The count of writes against pages when those against the pages on this way were last forgotten.
    floods: u64,
    /// Where the contents of the guest's table are, of a way to a last-level one.
    contents: Contents,
    /// The guest's walk down to that table; every entry on it has A.
    pub walk: GuestWalk,
}

impl Way {
    const fn none(level: Level) -> Self {
        let (track, path, walk) = (Track::NONE, [PageId(0); 5], GuestWalk::start());
        Self { track, path, level, floods: 0, contents: Contents::NOTHING, walk }
    }

    /// The shadow table that a way to a last-level one leads to.
    #[inline(always)]
    pub(crate) const fn last_table(&self) -> PageId {
        self.path[0]
    }

    /// The shadow table that it leads to.
    #[inline(always)]
    pub(crate) const fn table(&self) -> PageId {
        self.path[self.level.0 as usize - 1]
    }

    /// Where the contents of the guest's table are. Only the first store to a table that held nothing moves them without
    /// ending the way.
    #[inline(always)]
    pub(crate) fn contents(&self, host: &Host) -> Contents {
        if self.contents == Contents::NOTHING { host.contents(self.walk.steps[0].table) } else { self.contents }
    }

    /// The root that it begins at.
    pub(crate) const fn root(&self) -> PageId {
        self.track.root
    }

    /// The first address of its region.
    pub(crate) const fn first_address(&self) -> Gva {
        Gva(self.track.region << shift(self.level))
    }
}

/// The ways that one vCPU remembers.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    last: Box<[Way; LAST]>,
    directories: Box<[Way; DIRECTORIES]>,
    near: Box<[Track; NEAR]>,
}

impl Default for Ways {
    fn default() -> Self {
        Self {
            last: Box::new([Way::none(Level::PT); LAST]),
            directories: Box::new([Way::none(Level::PD); DIRECTORIES]),
            near: Box::new([Track::NONE; NEAR]),
        }
    }
}

impl Ways {
    /// Bytes that one takes.
    pub(crate) const BYTES: usize = (LAST + DIRECTORIES) * size_of::<Way>() + NEAR * size_of::<Track>();

    /// The way to the last-level table of an address below `root`, if it is remembered and still true.
    #[inline]
    pub(crate) fn find(&self, root: PageId, gva: Gva, shadow: &Shadow) -> Option<&Way> {
        let region = gva.0 >> shift(Level::PT);
        let way = &self.last[region as usize % LAST];
        way.track.leads(region, root, shadow).then_some(way)
    }

    /// The way to its directory.
    #[inline]
    pub(crate) fn find_directory(&self, root: PageId, gva: Gva, shadow: &Shadow) -> Option<&Way> {
        let region = gva.0 >> shift(Level::PD);
        let way = &self.directories[region as usize % DIRECTORIES];
        way.track.leads(region, root, shadow).then_some(way)
    }

    /// The shadow's directory of an address below `root`, if it is remembered and still true.
    #[inline(always)]
    pub(crate) fn near(&self, root: PageId, gva: Gva, shadow: &Shadow) -> Option<PageId> {
        let region = gva.0 >> shift(Level::PD);
        let near = &self.near[region as usize % NEAR];
        near.leads(region, root, shadow).then_some(near.directory)
    }

    /// Remembers the directory that a walk through the shadow came to.
    #[inline]
    pub(crate) fn remember_near(&mut self, root: PageId, gva: Gva, shadow: &Shadow, directory: PageId) {
        let region = gva.0 >> shift(Level::PD);
        self.near[region as usize % NEAR] = Track::new(region, root, directory, shadow);
    }

    /// All that are still true.
    pub(crate) fn all(&self, shadow: &Shadow) -> impl Iterator<Item = &Way> {
        self.last.iter().chain(&*self.directories).filter(|way| way.track.holds(shadow))
    }

    /// Remembers a way that a fault has gone: `walk` is the guest's, `path` the shadow's.
    #[inline]
    pub(crate) fn remember(&mut self, (root, gva): (PageId, Gva), shadow: &Shadow, path: &Path, walk: &GuestWalk) {
        let region = gva.0 >> shift(Level::PT);
        let (track, floods) = (Track::new(region, root, path[1], shadow), shadow.floods);
        let contents = shadow.memory.host.contents(walk.steps[0].table);
        self.last[region as usize % LAST] = Way { track, path: *path, level: Level::PT, floods, contents, walk: *walk };
    }

    /// The same for the way to a table below a directory to which one is remembered: `pde` links the guest's, whose contents
    /// are given. No fault has gone it yet.
    #[inline(always)]
    pub(crate) fn remember_below(&mut self, gva: Gva, (pde, contents): (Gpte, Contents), table: PageId) {
        let region = gva.0 >> shift(Level::PT);
        let directory = &self.directories[(gva.0 >> shift(Level::PD)) as usize % DIRECTORIES];
        let way = &mut self.last[region as usize % LAST];
        *way = *directory;
        (way.track.region, way.level, way.floods, way.contents) = (region, Level::PT, !0, contents);
        way.path[0] = table;
        way.walk.steps[1].pte = pde;
        let access = way.walk.steps[1].access.and(pde.access());
        way.walk.steps[0] = Step { table: pde.gfn(), pte: Gpte(0), access };
    }

    /// The same for one that has come to its directory.
    #[inline]
    pub(crate) fn remember_directory(
        &mut self,
        (root, gva): (PageId, Gva),
        shadow: &Shadow,
        path: &Path,
        walk: &GuestWalk,
    ) {
        let region = gva.0 >> shift(Level::PD);
        let (track, floods) = (Track::new(region, root, path[1], shadow), shadow.floods);
        let contents = Contents::NOTHING;
        let way = Way { track, path: *path, level: Level::PD, floods, contents, walk: *walk };
        self.directories[region as usize % DIRECTORIES] = way;
    }

    /// A fault goes the way of an address, which is remembered. Gives the pages on it if a write was counted against any page
    /// since the last one went it.
    #[inline(always)]
    pub(crate) fn flood_path(&mut self, gva: Gva, floods: u64) -> Option<&Path> {
        let way = &mut self.last[(gva.0 >> shift(Level::PT)) as usize % LAST];
        debug_assert_eq!(way.track.region, gva.0 >> shift(Level::PT));
        (std::mem::replace(&mut way.floods, floods) != floods).then_some(&way.path)
    }

    /// The way to the last-level table of an address was only looked for: no fault has gone it.
    pub(crate) fn count_floods_anew(&mut self, gva: Gva) {
        self.last[(gva.0 >> shift(Level::PT)) as usize % LAST].floods = !0;
    }

    /// Forgets everything: walks obey other rules now.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

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
use crate::role::Role;
use crate::shadow::Shadow;
use crate::types::{Access, Gfn, Gva, Level, PageId, SptePos};

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

/// The way to a last-level table: what it has beside the way to its directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    track: Track,
    /// The count of writes against pages when those against the pages on this way were last forgotten.
    floods: u64,
    /// The guest's entry in the directory.
    pub pde: Gpte,
    /// The shadow's table.
    pub table: PageId,
    /// Its pages of levels 3 to 5, as in a path.
    upper: [PageId; 3],
    /// Where the contents of the guest's table are.
    contents: Contents,
    /// The rights that the guest grants above it.
    pub granted: Access,
}

/// The way to a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DirectoryWay {
    track: Track,
    floods: u64,
    contents: Contents,
    /// The role of a table below the directory, but for the rights.
    below: Role,
    /// The shadow pages on it, by level - 1; those that it does not come to are its root.
    pub path: Path,
    /// The guest's walk down to the directory; every entry on it has A.
    pub walk: GuestWalk,
}

impl Way {
    const NONE: Self = Self {
        track: Track::NONE,
        floods: 0,
        pde: Gpte(0),
        table: PageId(0),
        upper: [PageId(0); 3],
        contents: Contents::NOTHING,
        granted: Access::NONE,
    };

    /// Where the contents of the guest's table are.
    #[inline(always)]
    pub(crate) fn contents(&self, host: &Host) -> Contents {
        contents(self.contents, self.pde.gfn(), host)
    }

    /// The root that it begins at, and the directory that it leads over.
    pub(crate) const fn pages(&self) -> (PageId, PageId) {
        (self.track.root, self.track.directory)
    }

    /// The first address of its region.
    pub(crate) const fn first_address(&self) -> Gva {
        Gva(self.track.region << shift(Level::PT))
    }
}

impl DirectoryWay {
    const fn none() -> Self {
        let (track, path, walk) = (Track::NONE, [PageId(0); 5], GuestWalk::start());
        Self { track, floods: 0, contents: Contents::NOTHING, below: Role(0), path, walk }
    }

    /// The shadow's directory.
    #[inline(always)]
    pub(crate) const fn directory(&self) -> PageId {
        self.track.directory
    }

    /// Where the contents of the guest's directory are.
    #[inline(always)]
    pub(crate) fn contents(&self, host: &Host) -> Contents {
        contents(self.contents, self.walk.steps[1].table, host)
    }

    /// The role of the table below an entry that the guest grants rights above it.
    #[inline(always)]
    pub(crate) const fn role_below(&self, pos: SptePos, granted: Access) -> Role {
        self.below.with_place(pos.index(), granted)
    }

    /// The rights above it.
    #[inline(always)]
    pub(crate) const fn granted(&self) -> Access {
        self.walk.steps[1].access
    }

    /// The root that it begins at.
    pub(crate) const fn root(&self) -> PageId {
        self.track.root
    }

    /// The first address of its region.
    pub(crate) const fn first_address(&self) -> Gva {
        Gva(self.track.region << shift(Level::PD))
    }
}

/// Where the contents of a table are that were `known` before. Only the first store to a table that held nothing moves them
/// without ending the way.
#[inline(always)]
fn contents(known: Contents, table: Gfn, host: &Host) -> Contents {
    if known == Contents::NOTHING { host.contents(table) } else { known }
}

/// The ways that one vCPU remembers.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    last: Box<[Way; LAST]>,
    directories: Box<[DirectoryWay; DIRECTORIES]>,
    near: Box<[Track; NEAR]>,
}

impl Default for Ways {
    fn default() -> Self {
        Self {
            last: Box::new([Way::NONE; LAST]),
            directories: Box::new([DirectoryWay::none(); DIRECTORIES]),
            near: Box::new([Track::NONE; NEAR]),
        }
    }
}

impl Ways {
    /// Bytes that one takes.
    pub(crate) const BYTES: usize =
        LAST * size_of::<Way>() + DIRECTORIES * size_of::<DirectoryWay>() + NEAR * size_of::<Track>();

    /// The way to the last-level table of an address below `root`, if it is remembered and still true.
    #[inline]
    pub(crate) fn find(&self, root: PageId, gva: Gva, shadow: &Shadow) -> Option<&Way> {
        let region = gva.0 >> shift(Level::PT);
        let way = &self.last[region as usize % LAST];
        way.track.leads(region, root, shadow).then_some(way)
    }

    /// The way to its directory.
    #[inline]
    pub(crate) fn find_directory(&self, root: PageId, gva: Gva, shadow: &Shadow) -> Option<&DirectoryWay> {
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

    /// The guest's walk to the last-level table of an address, if the ways to it and to its directory are remembered and
    /// still true.
    pub(crate) fn walk(&self, root: PageId, gva: Gva, shadow: &Shadow) -> Option<GuestWalk> {
        let (way, above) = (self.find(root, gva, shadow)?, self.find_directory(root, gva, shadow)?);
        let mut walk = GuestWalk { level: Level::PT, wrote: false, ..above.walk };
        walk.steps[1].pte = way.pde;
        walk.steps[0] = Step { table: way.pde.gfn(), pte: Gpte(0), access: way.granted };
        Some(walk)
    }

    /// All that are still true.
    pub(crate) fn all(&self, shadow: &Shadow) -> (Vec<&Way>, Vec<&DirectoryWay>) {
        let last = self.last.iter().filter(|way| way.track.holds(shadow));
        let directories = self.directories.iter().filter(|way| way.track.holds(shadow));
        (last.collect(), directories.collect())
    }

    /// Remembers the way to the last-level `table` of an address, whose directory is remembered. The guest's `pde` names its
    /// table, with the rights `granted` above it.
    #[inline(always)]
    pub(crate) fn remember(&mut self, gva: Gva, table: PageId, (pde, contents, granted): (Gpte, Contents, Access)) {
        let region = gva.0 >> shift(Level::PT);
        let above = &self.directories[(gva.0 >> shift(Level::PD)) as usize % DIRECTORIES];
        let (track, floods) = (Track { region, ..above.track }, above.floods);
        let [_, _, upper @ ..] = above.path;
        self.last[region as usize % LAST] = Way { track, floods, pde, table, upper, contents, granted };
    }

    /// Remembers the way to the directory of an address, where the guest's `walk` and the shadow's `path` have come to. No
    /// fault has gone it yet.
    pub(crate) fn remember_directory(
        &mut self,
        (root, gva): (PageId, Gva),
        shadow: &Shadow,
        path: &Path,
        walk: &GuestWalk,
    ) {
        let region = gva.0 >> shift(Level::PD);
        let (track, contents) =
            (Track::new(region, root, path[1], shadow), shadow.memory.host.contents(walk.steps[1].table));
        let below = shadow.arena[path[1]].role.child(0, false, Access::NONE);
        let way = DirectoryWay { track, floods: !0, contents, below, path: *path, walk: *walk };
        self.directories[region as usize % DIRECTORIES] = way;
    }

    /// A fault goes the way of an address, which is remembered. Whether a write was counted against any page since the last
    /// one went it.
    #[inline(always)]
    pub(crate) fn goes(&mut self, gva: Gva, floods: u64) -> bool {
        let way = &mut self.last[(gva.0 >> shift(Level::PT)) as usize % LAST];
        debug_assert_eq!(way.track.region, gva.0 >> shift(Level::PT));
        std::mem::replace(&mut way.floods, floods) != floods
    }

    /// The pages on that way above the last level, against which alone writes are counted.
    #[inline(always)]
    pub(crate) fn upper_pages(&self, gva: Gva) -> [PageId; 4] {
        let way = &self.last[(gva.0 >> shift(Level::PT)) as usize % LAST];
        let [a, b, c] = way.upper;
        [way.track.directory, a, b, c]
    }

    /// The same for the way to its directory.
    #[inline(always)]
    pub(crate) fn goes_to_directory(&mut self, gva: Gva, floods: u64) -> Option<[PageId; 4]> {
        let way = &mut self.directories[(gva.0 >> shift(Level::PD)) as usize % DIRECTORIES];
        debug_assert_eq!(way.track.region, gva.0 >> shift(Level::PD));
        let moved = std::mem::replace(&mut way.floods, floods) != floods;
        moved.then(|| [way.path[1], way.path[2], way.path[3], way.path[4]])
    }

    /// Forgets everything: walks obey other rules now.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

//! One CPU's TLB and page-walk caches: what is kept, what a flush takes, and how much a walk must read.
//!
//! This is a model of hardware, not of KVM: it decides how often tables are walked, never what an access does.

use crate::error::{ConfigError, refuse};
use crate::paging::cache::Cache;
use crate::paging::saved::in_order;
use crate::types::{Gfn, Gva, Level};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

/// Sizes of the caches. A size of 0 is a cache that is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TlbSizes {
    /// Translations of pages.
    pub entries: usize,
    /// Ways of each set.
    pub ways: usize,
    /// Page-walk cache: entries for tables of level 1, 2 and 3 (their addresses, so that a walk begins there).
    pub walk: [usize; 3],
}

/// Skylake's second-level TLB (Intel 64 optimization manual, table of the caches); page-walk caches of 32, 4 and 2
/// entries (Barr, Cox and Rixner, ISCA 2010).
pub const USUAL: TlbSizes = TlbSizes { entries: 1536, ways: 12, walk: [32, 4, 2] };

/// The top of a second stage.
const STAGE_TOP: Level = Level(4);

/// Lines of one cache; more is a mistake.
const MAX_ENTRIES: usize = 1 << 20;

impl TlbSizes {
    /// Refuses sizes that make no cache.
    ///
    /// # Errors
    /// Ways that do not divide the entries, or far too many of them.
    pub fn check(self) -> Result<(), ConfigError> {
        let TlbSizes { entries, ways, walk } = self;
        if entries > MAX_ENTRIES || walk.iter().any(|size| *size > MAX_ENTRIES) {
            return refuse!("TLB: {entries} entries, page-walk caches of {walk:?}: the limit is {MAX_ENTRIES}");
        }
        if entries > 0 && (ways == 0 || !entries.is_multiple_of(ways)) {
            return refuse!("TLB: {ways} ways do not divide {entries} entries");
        }
        Ok(())
    }

    /// The same without caches that shorten a walk.
    #[must_use]
    pub const fn without_walk_caches(self) -> Self {
        Self { walk: [0; 3], ..self }
    }
}

/// The page was written through this entry, so that D is known to be set.
const WRITTEN: u32 = 1 << 8;

/// Numbers for address spaces: a flush gives a space a new number, so that its entries are found no more.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Spaces {
    #[serde(serialize_with = "in_order")]
    by_pcid: FxHashMap<u64, u32>,
    global: u32,
    next: u32,
}

impl Spaces {
    fn new() -> Self {
        Self { by_pcid: FxHashMap::default(), global: 0, next: 1 }
    }

    fn of(&mut self, pcid: u64) -> u32 {
        let Self { by_pcid, next, .. } = self;
        *by_pcid.entry(pcid).or_insert_with(|| {
            *next += 1;
            *next
        })
    }

    fn flush(&mut self, pcid: u64) {
        self.by_pcid.remove(&pcid);
    }

    fn flush_all(&mut self) {
        self.by_pcid.clear();
        self.next += 1;
        self.global = self.next;
    }
}

/// The caches of one CPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tlb {
    pages: Cache,
    walk: [Cache; 3],
    nested: Cache,
    /// Tables of the second stage, by level.
    stage: [Cache; 3],
    spaces: Spaces,
}

impl Tlb {
    /// Empty caches.
    #[must_use]
    pub fn new(sizes: TlbSizes) -> Self {
        Self::nested(sizes, 0)
    }

    /// The same with a nested TLB: second-stage translations of frames that hold guest tables.
    #[must_use]
    pub fn nested(sizes: TlbSizes, nested: usize) -> Self {
        let small = |entries: usize| Cache::new(entries, entries);
        Self {
            pages: Cache::new(sizes.entries, sizes.ways),
            walk: sizes.walk.map(small),
            nested: small(nested),
            stage: sizes.walk.map(|entries| small(if nested > 0 { entries } else { 0 })),
            spaces: Spaces::new(),
        }
    }

    pub(super) fn caches(&self) -> impl Iterator<Item = &Cache> {
        self.walk.iter().chain(&self.stage).chain([&self.pages, &self.nested])
    }

    /// A page's tag: its number at its size, with the size.
    const fn tag(gva: Gva, level: Level) -> u64 {
        (gva.0 >> (12 + 9 * (level.0 as u32 - 1))) << 2 | (level.0 as u64 - 1)
    }

    /// Whether an access needs no walk. A store through an entry that has not been written yet needs one, for D.
    pub fn hit(&mut self, gva: Gva, pcid: u64, write: bool) -> bool {
        let own = self.spaces.of(pcid);
        for space in [own, self.spaces.global] {
            for level in 1..=3 {
                if let Some(value) = self.pages.get(Self::tag(gva, Level(level)), space) {
                    return !write || value & WRITTEN != 0;
                }
            }
        }
        false
    }

    /// Keeps what a walk found.
    pub fn fill(&mut self, gva: Gva, pcid: u64, level: Level, (global, write): (bool, bool)) {
        let space = if global { self.spaces.global } else { self.spaces.of(pcid) };
        self.pages.put(Self::tag(gva, level.min(Level(3))), space, if write { WRITTEN } else { 0 });
    }

    /// The level of the table where a walk down to a leaf of `leaf` begins; the tables above it are kept from earlier
    /// walks. What the walk goes through is kept. The tables have their top level and so many index bits each.
    pub fn begin_walk(&mut self, gva: Gva, pcid: u64, (top, index_bits): (Level, u32), leaf: Level) -> Level {
        let space = self.spaces.of(pcid);
        first_table(&mut self.walk, |level| gva.0 >> (12 + index_bits * u32::from(level)), space, top, leaf)
    }

    /// Entries of second-stage tables that a walk for a frame reads, down to a leaf of `leaf`; the tables above are kept.
    pub fn stage_walk(&mut self, gfn: Gfn, leaf: Level) -> u64 {
        let start = first_table(&mut self.stage, |level| gfn.0 >> (9 * u32::from(level)), 0, STAGE_TOP, leaf);
        u64::from(start.0 - leaf.0 + 1)
    }

    /// Whether the second-stage translation of a unit of guest memory is kept; it is from now on.
    pub fn nested_hit(&mut self, unit: u64) -> bool {
        let hit = self.nested.get(unit, 0).is_some();
        if !hit {
            self.nested.put(unit, 0, 0);
        }
        hit
    }

    /// INVLPG: the page's entries go, and all that shortens walks (SDM vol. 3 section 4.10.4.1).
    pub fn flush_page(&mut self, gva: Gva, pcid: u64) {
        let own = self.spaces.of(pcid);
        for space in [own, self.spaces.global] {
            for level in 1..=3 {
                self.pages.drop_line(Self::tag(gva, Level(level)), space);
            }
        }
        self.walk.iter_mut().for_each(Cache::clear);
    }

    /// A CR3 load: everything of one PCID but global pages.
    pub fn flush_pcid(&mut self, pcid: u64) {
        self.spaces.flush(pcid);
    }

    /// Everything of the guest's own translations, global pages too.
    pub fn flush_all(&mut self) {
        self.spaces.flush_all();
    }

    /// Everything, second-stage translations too.
    pub fn flush_nested(&mut self) {
        self.flush_all();
        self.nested.clear();
        self.stage.iter_mut().for_each(Cache::clear);
    }
}

/// The level of the table where a walk begins that goes from `top` down to a leaf of `leaf`, by the page-walk caches for
/// tables of level 1, 2 and 3; what it goes through is kept.
fn first_table(caches: &mut [Cache; 3], tag: impl Fn(u8) -> u64, space: u32, top: Level, leaf: Level) -> Level {
    let highest = top.0.min(4);
    let start = (leaf.0..highest).find(|level| caches[usize::from(*level) - 1].get(tag(*level), space).is_some());
    for level in leaf.0..start.unwrap_or(highest) {
        caches[usize::from(level) - 1].put(tag(level), space, 0);
    }
    Level(start.unwrap_or(top.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: Gva = Gva(0x7fff_1234_5000);
    const LEVELS: (Level, u32) = (Level(4), 9);

    #[test]
    fn a_store_walks_until_the_page_was_written() {
        let mut tlb = Tlb::new(USUAL);
        tlb.fill(PAGE, 1, Level::PT, (false, false));
        assert!(tlb.hit(PAGE, 1, false) && !tlb.hit(PAGE, 1, true) && !tlb.hit(PAGE, 2, false));
        tlb.fill(PAGE, 1, Level::PT, (false, true));
        assert!(tlb.hit(PAGE, 1, true));
        tlb.flush_page(PAGE, 1);
        assert!(!tlb.hit(PAGE, 1, false));
    }

    #[test]
    fn global_pages_outlive_a_cr3_load_only() {
        let mut tlb = Tlb::new(USUAL);
        tlb.fill(PAGE, 1, Level::PD, (true, false));
        tlb.flush_pcid(1);
        assert!(tlb.hit(Gva(PAGE.0 + 0x1000), 1, false));
        tlb.flush_all();
        assert!(!tlb.hit(PAGE, 1, false));
    }

    #[test]
    fn walks_of_the_second_stage_are_kept_too() {
        let mut tlb = Tlb::nested(USUAL, 16);
        let reads: Vec<_> = [0, 1, 512, 1 << 18].map(|gfn| tlb.stage_walk(Gfn(gfn), Level::PT)).into();
        assert_eq!(reads, [4, 1, 2, 3]);
        tlb.flush_all();
        assert_eq!(tlb.stage_walk(Gfn(0), Level::PT), 1, "they are not the guest's");
        tlb.flush_nested();
        assert_eq!((tlb.stage_walk(Gfn(0), Level::PT), Tlb::nested(USUAL, 0).stage_walk(Gfn(0), Level::PD)), (4, 3));
    }

    #[test]
    fn a_second_walk_nearby_begins_at_the_last_table() {
        let mut tlb = Tlb::new(USUAL);
        assert_eq!(tlb.begin_walk(PAGE, 1, LEVELS, Level::PT), Level(4));
        assert_eq!(tlb.begin_walk(Gva(PAGE.0 + 0x1000), 1, LEVELS, Level::PT), Level(1));
        assert_eq!(tlb.begin_walk(Gva(PAGE.0 + (1 << 21)), 1, LEVELS, Level::PT), Level(2));
        assert_eq!(tlb.begin_walk(Gva(PAGE.0 + (1 << 21)), 1, LEVELS, Level::PD), Level(2), "a large page there");
        let (mut wide, two) = (Tlb::new(USUAL), (Level(2), 10));
        assert_eq!(wide.begin_walk(PAGE, 1, two, Level::PT), Level(2));
        assert_eq!(
            wide.begin_walk(Gva(PAGE.0 ^ 1 << 21), 1, two, Level::PT),
            Level(1),
            "a table of 32-bit paging: 4 MiB"
        );
        let mut none = Tlb::new(USUAL.without_walk_caches());
        none.begin_walk(PAGE, 1, LEVELS, Level::PT);
        assert_eq!(none.begin_walk(PAGE, 1, LEVELS, Level::PT), Level(4));
    }
}

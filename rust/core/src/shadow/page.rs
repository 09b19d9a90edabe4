//! Shadow pages and the arena that holds them: hash chains and the active list.

mod bounds;
mod entries;

use crate::role::Role;
use crate::types::{ENTRIES, Gfn, Level, PageId, RmapHead, SptePos};
use serde::{Deserialize, Serialize};

/// Buckets of the hash of shadow pages (`KVM_NUM_MMU_PAGES`).
const BUCKETS: usize = 1 << 12;
/// The kernel's `GOLDEN_RATIO_64`.
const HASH_FACTOR: u64 = 0x61c8_8646_80b5_83eb;
const NONE: u32 = u32::MAX;

/// A set of entry indexes of one page.
pub type Bitmap = [u64; ENTRIES / 64];

/// One shadow page (KVM's `struct kvm_mmu_page`), without its entries: those are in the arena.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Page {
    /// The guest frame whose table it shadows; for a direct page the first frame that it maps.
    pub gfn: Gfn,
    /// What it was made for.
    pub role: Role,
    /// Parent entries that point to it.
    pub parents: RmapHead,
    /// How many current and previous roots it is.
    pub root_count: u32,
    /// Entries with unsync pages below.
    pub unsync_children: u32,
    /// Emulated writes since a fault went through it.
    pub flood: u32,
    /// The guest's table may have changed without the shadow.
    pub unsync: bool,
    /// The generation it was made in.
    pub generation: u8,
    /// It stands for a huge page that was split to keep it from being executed.
    pub nx_split: bool,
    /// It was linked by a fault of an execution while huge pages must not be executed, counted as a split or not.
    pub nx_disallowed: bool,
    /// Which entries have unsync pages below; bits are cleared lazily.
    pub unsync_bitmap: Bitmap,
    /// Which entries are not empty.
    pub used: Bitmap,
    hash: [u32; 2],
    list: [u32; 2],
    /// The page that was zapped next, while both wait to be freed.
    #[serde(skip)]
    pub(super) next_zapped: Option<PageId>,
}

impl Page {
    /// The level of the page.
    #[inline]
    #[must_use]
    pub const fn level(&self) -> Level {
        self.role.level()
    }

    /// The next older page of its bucket.
    #[inline(always)]
    #[must_use]
    pub const fn older(&self) -> Option<PageId> {
        let at = self.hash[1];
        if at == NONE { None } else { Some(PageId(at)) }
    }

    /// Whether a guest table stands behind it (`sp_has_gptes`, 6.1).
    #[inline]
    #[must_use]
    pub const fn has_gptes(&self) -> bool {
        !self.role.direct()
    }
}

/// All shadow pages of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Arena {
    pages: Vec<Page>,
    /// The entries of all pages, one page after the other.
    #[serde(with = "crate::words::list")]
    sptes: Vec<u64>,
    /// The frame and rights that an entry of a page with gptes was made from.
    #[serde(with = "crate::words::list")]
    shadowed: Vec<u64>,
    /// How often links at each page, as a directory, were taken away: those to its tables, and that to itself. Apart from
    /// the rest, so that many fit into a cache.
    #[serde(with = "crate::words::list")]
    unlinks: Vec<u32>,
    free: Vec<PageId>,
    #[serde(with = "crate::words::list")]
    buckets: Vec<u32>,
    /// Newest and oldest page of the active list.
    newest: u32,
    oldest: u32,
}

impl Default for Arena {
    fn default() -> Self {
        Self {
            pages: Vec::new(),
            sptes: Vec::new(),
            shadowed: Vec::new(),
            unlinks: Vec::new(),
            free: Vec::new(),
            buckets: vec![NONE; BUCKETS],
            newest: NONE,
            oldest: NONE,
        }
    }
}

impl Arena {
    /// A new page, empty and sync, at the head of its hash bucket and of the active list.
    pub fn alloc(&mut self, gfn: Gfn, role: Role, generation: u8) -> PageId {
        self.alloc_below(gfn, role, generation, RmapHead::default())
    }

    /// The same if it will be alone in its bucket, for the entry of a parent.
    #[inline(always)]
    pub fn alloc_alone(&mut self, gfn: Gfn, role: Role, generation: u8, parent: SptePos) -> Option<PageId> {
        let alone = self.buckets[bucket(gfn)] == NONE;
        alone.then(|| self.alloc_below(gfn, role, generation, RmapHead::one(parent)))
    }

    #[inline(always)]
    fn alloc_below(&mut self, gfn: Gfn, role: Role, generation: u8, parents: RmapHead) -> PageId {
        let (head, newest) = (bucket(gfn), self.newest);
        let next = self.buckets[head];
        // Not made before it is known where: it is longer than registers hold.
        let page = || Page {
            gfn,
            role,
            parents,
            root_count: 0,
            unsync_children: 0,
            flood: 0,
            unsync: false,
            generation,
            nx_split: false,
            nx_disallowed: false,
            unsync_bitmap: Bitmap::default(),
            used: Bitmap::default(),
            hash: [NONE, next],
            list: [NONE, newest],
            next_zapped: None,
        };
        let id = if let Some(id) = self.free.pop() {
            self[id] = page();
            id
        } else {
            self.push(page())
        };
        self.buckets[head] = id.0;
        if next != NONE {
            self[PageId(next)].hash[0] = id.0;
        }
        self.newest = id.0;
        if newest == NONE {
            self.oldest = id.0;
        } else {
            self[PageId(newest)].list[0] = id.0;
        }
        id
    }

    /// A page behind the last one.
    #[inline(never)]
    fn push(&mut self, page: Page) -> PageId {
        let id = PageId(self.pages.len() as u32);
        self.pages.push(page);
        self.unlinks.push(0);
        // By a page at a time: the allocator moves a long list without touching it, and most entries are used soon.
        for entries in [&mut self.sptes, &mut self.shadowed] {
            entries.resize(entries.len() + ENTRIES, 0);
        }
        id
    }

    /// Gives a page back that holds no entry any more and is off the active list.
    pub fn release(&mut self, id: PageId) {
        debug_assert!(self[id].used == Bitmap::default());
        self.hash_remove(id);
        // A freed page must not look valid to anybody who still holds its number.
        self[id].role = self[id].role.invalidated();
        self.free.push(id);
    }

    /// A number that is another whenever a link at a page, as a directory, was taken away.
    #[inline]
    #[must_use]
    pub fn unlinks(&self, directory: PageId) -> u32 {
        self.unlinks[directory.0 as usize]
    }

    /// A link at a page, as a directory, is taken away.
    #[inline]
    pub fn note_unlink(&mut self, directory: PageId) {
        let count = &mut self.unlinks[directory.0 as usize];
        *count = count.wrapping_add(1);
    }

    /// The pages of a bucket, newest first, valid or not.
    pub fn chain(&self, gfn: Gfn) -> impl Iterator<Item = PageId> + '_ {
        let mut at = self.buckets[bucket(gfn)];
        std::iter::from_fn(move || {
            let id = (at != NONE).then_some(PageId(at))?;
            at = self[id].hash[1];
            Some(id)
        })
    }

    /// The newest page of a frame's bucket, to walk it while pages are zapped (none is freed meanwhile).
    #[inline]
    #[must_use]
    pub fn chain_first(&self, gfn: Gfn) -> Option<PageId> {
        let at = self.buckets[bucket(gfn)];
        (at != NONE).then_some(PageId(at))
    }

    /// The next older page of the same bucket.
    #[inline]
    #[must_use]
    pub fn chain_next(&self, id: PageId) -> Option<PageId> {
        self[id].older()
    }

    /// The active pages, oldest first.
    pub fn oldest_first(&self) -> impl Iterator<Item = PageId> + '_ {
        let mut at = self.oldest;
        std::iter::from_fn(move || {
            let id = (at != NONE).then_some(PageId(at))?;
            at = self[id].list[0];
            Some(id)
        })
    }

    /// The page created after this one, on the active list.
    #[must_use]
    pub fn newer(&self, id: PageId) -> Option<PageId> {
        let at = self[id].list[0];
        (at != NONE).then_some(PageId(at))
    }

    /// How many pages the arena has room for, freed ones included.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.pages.len()
    }

    /// Bytes that the pages take, freed ones included: their entries, and what each was made from, are 8,192 of each.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let page = size_of::<Page>() + size_of::<u32>() + 2 * ENTRIES * size_of::<u64>();
        self.pages.len() * page + self.buckets.len() * size_of::<u32>()
    }

    /// The numbers of all pages that are not freed.
    #[must_use]
    pub fn live(&self) -> Vec<PageId> {
        let mut live = vec![true; self.pages.len()];
        for id in &self.free {
            live[id.0 as usize] = false;
        }
        (0..self.pages.len()).filter(|i| live[*i]).map(|i| PageId(i as u32)).collect()
    }

    fn hash_remove(&mut self, id: PageId) {
        let [prev, next] = self[id].hash;
        if prev == NONE {
            let head = bucket(self[id].gfn);
            self.buckets[head] = next;
        } else {
            self[PageId(prev)].hash[1] = next;
        }
        if next != NONE {
            self[PageId(next)].hash[0] = prev;
        }
    }

    /// Takes a page off the active list; harmless if it is off already.
    pub fn list_remove(&mut self, id: PageId) {
        let [prev, next] = std::mem::replace(&mut self[id].list, [NONE; 2]);
        if prev == NONE {
            if self.newest != id.0 {
                return;
            }
            self.newest = next;
        } else {
            self[PageId(prev)].list[1] = next;
        }
        if next == NONE {
            self.oldest = prev;
        } else {
            self[PageId(next)].list[0] = prev;
        }
    }
}

impl std::ops::Index<PageId> for Arena {
    type Output = Page;
    #[inline]
    fn index(&self, id: PageId) -> &Page {
        &self.pages[id.0 as usize]
    }
}

impl std::ops::IndexMut<PageId> for Arena {
    #[inline]
    fn index_mut(&mut self, id: PageId) -> &mut Page {
        &mut self.pages[id.0 as usize]
    }
}

/// The bucket of a frame (`kvm_page_table_hashfn`, 6.1: the kernel's `hash_64`).
#[inline]
const fn bucket(gfn: Gfn) -> usize {
    (gfn.0.wrapping_mul(HASH_FACTOR) >> 52) as usize
}

/// The members of a set, ascending.
pub fn bits(set: &Bitmap) -> impl Iterator<Item = usize> + use<> {
    let set = *set;
    let (mut word, mut rest) = (0, set[0]);
    std::iter::from_fn(move || {
        while rest == 0 {
            word += 1;
            rest = *set.get(word)?;
        }
        let bit = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        Some(word * 64 + bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Access;

    fn role() -> Role {
        Role::root(Level(4), true, false, false).child(0, false, Access::ALL)
    }

    #[test]
    fn chains_are_newest_first_and_the_list_is_creation_order() {
        let mut arena = Arena::default();
        let ids: Vec<_> = (0..3).map(|_| arena.alloc(Gfn(5), role(), 0)).collect();
        assert_eq!(arena.chain(Gfn(5)).collect::<Vec<_>>(), [ids[2], ids[1], ids[0]]);
        assert_eq!(arena.oldest_first().collect::<Vec<_>>(), ids);
        arena.list_remove(ids[1]);
        arena.list_remove(ids[1]);
        arena.release(ids[1]);
        assert_eq!(arena.chain(Gfn(5)).collect::<Vec<_>>(), [ids[2], ids[0]]);
        assert_eq!(arena.oldest_first().collect::<Vec<_>>(), [ids[0], ids[2]]);
        assert_eq!(arena.alloc(Gfn(9), role(), 0), ids[1], "freed pages are used again");
        assert_eq!(arena.live().len(), 3);
    }
}

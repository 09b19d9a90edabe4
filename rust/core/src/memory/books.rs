//! KVM's bookkeeping of frames: which leaves map one, and what shadows it. KVM keeps it with a slot; here it stands beside
//! the state of the host's page, and whoever removes a slot has zapped all that it counted.

use crate::memory::frames::{Region, frame_index};
use crate::memory::host::Page;
use crate::memory::{Contents, Memory, Slot};
use crate::types::{Access, ENTRIES, Gfn, Level, RmapHead};
use crate::words::Word;

/// The bookkeeping of one frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SlotFrame {
    /// Leaf entries of level 1 that map it.
    pub rmap: RmapHead,
    /// How many shadow pages of an upper level shadow it.
    pub track: u16,
    /// How many shadow pages of any level do.
    pub tables: u16,
}

impl SlotFrame {
    /// Whether no leaf of level 1 maps it and, if it is to be `writable`, no table is in it.
    #[inline(always)]
    fn is_free(self, writable: bool) -> bool {
        // All in one look.
        self.word() & if writable { !0 } else { u64::from(u32::MAX) } == 0
    }
}

impl Word for SlotFrame {
    #[inline(always)]
    fn word(self) -> u64 {
        u64::from(self.rmap.0) | u64::from(self.track) << 32 | u64::from(self.tables) << 48
    }

    fn of(word: u64) -> Self {
        Self { rmap: RmapHead(word as u32), track: (word >> 32) as u16, tables: (word >> 48) as u16 }
    }
}

/// What is known of the frames of an open region (2 MiB): all are in one slot, which takes writes and logs none.
#[derive(Debug)]
pub struct Near<'a> {
    pages: &'a [Page],
    region: &'a mut Region,
}

impl<'a> Near<'a> {
    /// All entries of 8 bytes of a table page found before.
    #[inline(always)]
    #[must_use]
    pub fn words_in(&self, contents: Contents) -> &'a [u64; ENTRIES] {
        &self.pages[contents.0 as usize]
    }

    /// Whether the host has a frame's page and may write it.
    #[inline(always)]
    #[must_use]
    pub fn is_plain(&self, gfn: Gfn) -> bool {
        self.region.frames[frame_index(gfn)].writable()
    }

    /// Where the contents of a frame of the region are.
    #[inline(always)]
    #[must_use]
    pub fn contents(&self, gfn: Gfn) -> Contents {
        Contents::of(self.region.frames[frame_index(gfn)])
    }

    /// The bookkeeping of a frame that may be mapped with these rights without further ado: the host has its page and may
    /// write it, and no table is in it if it is to be writable. The frame is of this region.
    #[inline(always)]
    pub fn plain_frame_here(&mut self, gfn: Gfn, access: Access) -> Option<&mut SlotFrame> {
        self.writable_frame(gfn).filter(|frame| !access.has(Access::W) || frame.tables == 0)
    }

    /// The same, of a frame that no small leaf maps yet.
    #[inline(always)]
    pub fn free_frame_here(&mut self, gfn: Gfn, access: Access) -> Option<&mut SlotFrame> {
        self.writable_frame(gfn).filter(|frame| frame.is_free(access.has(Access::W)))
    }

    /// The bookkeeping of a frame of this region whose page the host has and may write.
    #[inline(always)]
    pub fn writable_frame(&mut self, gfn: Gfn) -> Option<&mut SlotFrame> {
        self.is_plain(gfn).then(|| &mut self.region.books[frame_index(gfn)])
    }
}

impl Memory {
    /// What is known of a frame and those around it, found in one look. `None` where the region is not open.
    #[inline(always)]
    pub fn near(&mut self, gfn: Gfn) -> Option<Near<'_>> {
        let region = self.host.frames.open_region(gfn)?;
        Some(Near { pages: &self.host.pages, region })
    }

    /// Whether the region around a frame turns out to be open: all of it is in one slot, which takes writes and logs none.
    #[inline(never)]
    pub fn opens(&mut self, gfn: Gfn) -> bool {
        self.begin(gfn).is_some() && self.is_open(gfn)
    }

    /// Gives the region around a frame that has a slot room of its own; it is open if it can be. Its number.
    #[inline(never)]
    fn begin(&mut self, gfn: Gfn) -> Option<u32> {
        let slot = self.slot_mut(gfn)?;
        let open = !slot.readonly && !slot.logs_dirty() && slot.covers(gfn, Level::PD);
        self.host.frames.region_mut(gfn).open = open;
        Some(self.host.frames.number(gfn))
    }

    /// Whether the region around a frame is known to be open.
    #[inline(always)]
    #[must_use]
    pub fn is_open(&self, gfn: Gfn) -> bool {
        self.host.frames.region(gfn).open
    }

    /// The bookkeeping of a frame.
    #[inline(always)]
    #[must_use]
    pub fn books(&self, gfn: Gfn) -> SlotFrame {
        self.host.frames.region(gfn).books[frame_index(gfn)]
    }

    /// The same of a frame in a slot, to change it.
    #[inline(always)]
    pub fn books_mut(&mut self, gfn: Gfn) -> Option<&mut SlotFrame> {
        Some(&mut self.region_in_slot(gfn)?.books[frame_index(gfn)])
    }

    /// The region around a frame in a slot.
    #[inline(always)]
    fn region_in_slot(&mut self, gfn: Gfn) -> Option<&mut Region> {
        let number = self.host.frames.number(gfn);
        let number = if self.host.frames.at(number).open { number } else { self.begin(gfn)? };
        Some(self.host.frames.at(number))
    }

    /// The list of leaf entries of `level` that map a frame.
    #[must_use]
    pub fn rmap(&self, gfn: Gfn, level: Level) -> RmapHead {
        match level {
            Level::PT => self.books(gfn).rmap,
            Level::PD => self.host.frames.region(gfn).rmap_2m,
            _ => self.slot(gfn).map(|slot| slot.giant(gfn)).unwrap_or_default(),
        }
    }

    /// The same list of a frame in a slot, to change it.
    #[inline]
    pub fn rmap_mut(&mut self, gfn: Gfn, level: Level) -> Option<&mut RmapHead> {
        match level {
            Level::PT => Some(&mut self.books_mut(gfn)?.rmap),
            Level::PD => Some(&mut self.region_in_slot(gfn)?.rmap_2m),
            _ => Some(self.slot_mut(gfn)?.giant_mut(gfn)),
        }
    }

    /// A page with gptes begins or ends to shadow a frame; `upper` if it is of a level above the last. Gives the lists of
    /// small leaves and of those of 2 MiB that map the frame.
    #[inline(always)]
    pub fn count_table(&mut self, gfn: Gfn, upper: bool, begins: bool) -> [RmapHead; 2] {
        let Some(region) = self.region_in_slot(gfn) else { return Default::default() };
        let (books, upper) = (&mut region.books[frame_index(gfn)], u16::from(upper));
        if begins {
            region.disallow_2m += 1;
            books.tables += 1;
            books.track += upper;
        } else {
            region.disallow_2m -= 1;
            books.tables -= 1;
            books.track -= upper;
        }
        [books.rmap, region.rmap_2m]
    }

    /// How many shadow pages forbid a leaf of 2 MiB around a frame.
    #[must_use]
    pub fn disallow_2m(&self, gfn: Gfn) -> u32 {
        self.host.frames.region(gfn).disallow_2m
    }

    /// Whether a leaf of `level` may map a frame: no shadowed table lies in its range, and the slot covers the range
    /// (`lpage_info`, 6.1). What KVM counts for 1 GiB is what its parts add up to.
    #[must_use]
    pub fn allows_large(&self, gfn: Gfn, level: Level) -> bool {
        let parts = level.pages() / ENTRIES as u64;
        let first = gfn.round(level).0;
        self.slot(gfn).is_some_and(|slot| slot.covers(gfn, level))
            && (0..parts).all(|part| self.disallow_2m(Gfn(first + part * ENTRIES as u64)) == 0)
    }

    /// Whether nothing is kept of frames without a slot (whoever removes one has zapped all that it counted), and what is kept
    /// of a region is the sum of its frames'.
    pub(crate) fn books_are_slots(&self) -> bool {
        self.host.frames.own().all(|(first, region)| {
            let kept = region.books.iter().zip(first.0..).filter(|(books, _)| **books != SlotFrame::default());
            let large =
                region.rmap_2m == RmapHead::default() || self.slot(first).is_some_and(|s| s.covers(first, Level::PD));
            let tables: u32 = region.books.iter().map(|books| u32::from(books.tables)).sum();
            large && region.disallow_2m == tables && kept.into_iter().all(|(_, gfn)| self.has_slot(Gfn(gfn)))
        })
    }

    /// Every list of leaf entries of a slot that is not empty: first frame, level, head. Those of 1 GiB come last.
    pub fn rmaps<'a>(&'a self, slot: &'a Slot) -> impl Iterator<Item = (Gfn, Level, RmapHead)> + 'a {
        let (first, last) = (slot.base.0 >> 9, (slot.base.0 + slot.pages - 1) >> 9);
        let own = (first..=last).map(|region| Gfn(region << 9)).filter(|gfn| self.host.frames.is_own(*gfn));
        let small = own.flat_map(|gfn| {
            let region = self.host.frames.region(gfn);
            let books = region.books.iter().enumerate();
            let pages = books.map(move |(k, books)| (Gfn(gfn.0 + k as u64), Level::PT, books.rmap));
            pages.chain(std::iter::once((gfn, Level::PD, region.rmap_2m)))
        });
        // At its ends a slot shares regions with its neighbours.
        let small = small.filter(|(gfn, _, _)| slot.holds(*gfn));
        let giant = slot.giants().map(|(gfn, head)| (gfn, Level::PDPT, head));
        small.chain(giant).filter(|(_, _, head)| *head != RmapHead::default())
    }

    /// The lists with leaf entries that map a part of `from` to `to` (exclusive), both in one slot: first frame in it,
    /// level. Small leaves come first, as in KVM's walk over the levels.
    #[must_use]
    pub fn rmaps_between(&self, from: Gfn, to: Gfn) -> Vec<(Gfn, Level)> {
        let (mut small, mut large) = (Vec::new(), Vec::new());
        for level in [Level::PD, Level::PDPT] {
            let mut gfn = from;
            while gfn < to {
                let next = Gfn(gfn.round(level).0 + level.pages());
                if level == Level::PD && self.host.frames.is_own(gfn) {
                    let used = |gfn: &Gfn| self.books(*gfn).rmap != RmapHead::default();
                    small.extend((gfn.0..next.0.min(to.0)).map(Gfn).filter(used).map(|gfn| (gfn, Level::PT)));
                }
                if self.rmap(gfn, level) != RmapHead::default() {
                    large.push((gfn, level));
                }
                gfn = next;
            }
        }
        small.append(&mut large);
        small
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Gpa;

    #[test]
    fn partial_regions_never_take_a_large_leaf() {
        let mut memory = Memory::new(2048);
        memory.add_slot(1, Gfn(256).gpa(), 1024 << 12, false, 48).unwrap();
        assert!(!memory.allows_large(Gfn(300), Level::PD));
        assert!(memory.allows_large(Gfn(512), Level::PD));
        assert!(!memory.allows_large(Gfn(1100), Level::PD));
        assert!(!memory.allows_large(Gfn(512), Level::PDPT));
        let _ = memory.count_table(Gfn(600), false, true);
        assert!(!memory.allows_large(Gfn(512), Level::PD));
    }

    #[test]
    fn a_table_anywhere_in_it_forbids_a_leaf_of_1_gib() {
        let mut memory = Memory::new(1 << 19);
        memory.add_slot(0, Gpa(0), 2 << 30, false, 48).unwrap();
        let _ = memory.count_table(Gfn((1 << 19) - 1), true, true);
        assert!(memory.allows_large(Gfn(5), Level::PDPT) && !memory.allows_large(Gfn(1 << 18), Level::PDPT));
        let _ = memory.count_table(Gfn((1 << 19) - 1), true, false);
        assert!(memory.allows_large(Gfn(1 << 18), Level::PDPT));
    }

    #[test]
    fn a_look_knows_of_each_change_of_a_slot() {
        let mut memory = Memory::new(4096);
        let open = |memory: &mut Memory, gfn| {
            let known = memory.near(Gfn(gfn)).is_some();
            assert!(!known || memory.opens(Gfn(gfn)));
            memory.opens(Gfn(gfn))
        };
        assert!(!open(&mut memory, 600));
        memory.add_slot(0, Gfn(256).gpa(), 1024 << 12, false, 48).unwrap();
        assert_eq!([600, 300, 100].map(|gfn| open(&mut memory, gfn)), [true, false, false]);
        assert!(memory.near(Gfn(600)).is_some());
        memory.set_dirty_log(0, true, false).unwrap();
        assert!(!open(&mut memory, 600));
        memory.set_dirty_log(0, false, false).unwrap();
        assert!(open(&mut memory, 600));
        memory.move_slot(0, Gfn(2048));
        assert_eq!([600, 2100].map(|gfn| open(&mut memory, gfn)), [false, true]);
        memory.remove_slot(0);
        assert!(!open(&mut memory, 2100));
        memory.add_slot(0, Gfn(2048).gpa(), 1024 << 12, true, 48).unwrap();
        assert!(!open(&mut memory, 2100), "it takes no writes");
    }
}

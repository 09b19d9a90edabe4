//! One memslot: its range, its dirty bitmap, and the per-frame bookkeeping that KVM keeps with it.

use crate::types::{ENTRIES, Gfn, Level, RmapHead};

/// The bookkeeping of 512 frames, made when the first of them needs it.
#[derive(Clone, Debug)]
pub struct SlotRegion {
    /// Leaf entries of level 1 that map each frame.
    pub rmap: [RmapHead; ENTRIES],
    /// How many shadow pages of an upper level shadow each frame.
    pub track: [u16; ENTRIES],
    /// Leaf entries of level 2 that map the region.
    pub rmap_2m: RmapHead,
    /// How many shadow pages forbid a 2 MiB leaf here.
    pub disallow_2m: u32,
}

/// One memslot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The slot's number.
    pub id: u16,
    /// Its first frame.
    pub base: Gfn,
    /// How many frames it has.
    pub pages: u64,
    /// Guest writes exit as MMIO.
    pub readonly: bool,
    /// One bit a frame while dirty logging is on.
    dirty: Option<Vec<u64>>,
    regions: Vec<Option<Box<SlotRegion>>>,
    /// Per 1 GiB: leaf entries of level 3, and how many shadow pages forbid one.
    giant: Vec<(RmapHead, u32)>,
}

impl Slot {
    /// A slot without bookkeeping yet.
    #[must_use]
    pub fn new(id: u16, base: Gfn, pages: u64, readonly: bool) -> Self {
        let last = base.0 + pages - 1;
        let count = |shift: u32| ((last >> shift) - (base.0 >> shift) + 1) as usize;
        Self {
            id,
            base,
            pages,
            readonly,
            dirty: None,
            regions: vec![None; count(9)],
            giant: vec![(RmapHead::default(), 0); count(18)],
        }
    }

    /// Whether the frame lies in the slot.
    #[inline]
    #[must_use]
    pub const fn holds(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.base.0) < self.pages
    }

    /// Whether the two share a frame.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.base.0 < other.base.0 + other.pages && other.base.0 < self.base.0 + self.pages
    }

    const fn region_index(&self, gfn: Gfn) -> usize {
        ((gfn.0 >> 9) - (self.base.0 >> 9)) as usize
    }

    const fn giant_index(&self, gfn: Gfn) -> usize {
        ((gfn.0 >> 18) - (self.base.0 >> 18)) as usize
    }

    /// The bookkeeping around a frame of the slot, if there is any.
    #[inline]
    #[must_use]
    pub fn region(&self, gfn: Gfn) -> Option<&SlotRegion> {
        self.regions[self.region_index(gfn)].as_deref()
    }

    fn region_mut(&mut self, gfn: Gfn) -> &mut SlotRegion {
        let at = self.region_index(gfn);
        self.regions[at].get_or_insert_with(|| {
            Box::new(SlotRegion {
                rmap: [RmapHead::default(); ENTRIES],
                track: [0; ENTRIES],
                rmap_2m: RmapHead::default(),
                disallow_2m: 0,
            })
        })
    }

    /// The list of leaf entries of `level` that map the frame.
    #[inline]
    #[must_use]
    pub fn rmap(&self, gfn: Gfn, level: Level) -> RmapHead {
        match level.0 {
            1 => self.region(gfn).map_or_else(RmapHead::default, |r| r.rmap[gfn.0 as usize & (ENTRIES - 1)]),
            2 => self.region(gfn).map_or_else(RmapHead::default, |r| r.rmap_2m),
            _ => self.giant[self.giant_index(gfn)].0,
        }
    }

    /// The same list, to change it.
    #[inline]
    pub fn rmap_mut(&mut self, gfn: Gfn, level: Level) -> &mut RmapHead {
        match level.0 {
            1 => &mut self.region_mut(gfn).rmap[gfn.0 as usize & (ENTRIES - 1)],
            2 => &mut self.region_mut(gfn).rmap_2m,
            _ => {
                let at = self.giant_index(gfn);
                &mut self.giant[at].0
            }
        }
    }

    /// How many shadow pages of an upper level shadow the frame.
    #[inline]
    #[must_use]
    pub fn track(&self, gfn: Gfn) -> u16 {
        self.region(gfn).map_or(0, |r| r.track[gfn.0 as usize & (ENTRIES - 1)])
    }

    /// The write-track count, to change it.
    pub fn track_mut(&mut self, gfn: Gfn) -> &mut u16 {
        &mut self.region_mut(gfn).track[gfn.0 as usize & (ENTRIES - 1)]
    }

    /// How many shadow pages forbid a leaf of 2 MiB and of 1 GiB around the frame, to change both.
    pub fn disallow_mut(&mut self, gfn: Gfn) -> (&mut u32, &mut u32) {
        let (region, giant) = (self.region_index(gfn), self.giant_index(gfn));
        let _ = self.region_mut(gfn);
        let region = self.regions[region].as_deref_mut().map(|r| &mut r.disallow_2m);
        match region {
            Some(count) => (count, &mut self.giant[giant].1),
            None => unreachable!("the region was made just now"),
        }
    }

    /// How many shadow pages forbid a leaf of 2 MiB and of 1 GiB around the frame.
    #[must_use]
    pub fn disallow(&self, gfn: Gfn) -> (u32, u32) {
        (self.region(gfn).map_or(0, |r| r.disallow_2m), self.giant[self.giant_index(gfn)].1)
    }

    /// Whether a leaf of `level` may map the frame: no shadowed table lies in its range, and the slot covers the range
    /// (`lpage_info`, 6.1, with its permanent counts for partial regions).
    #[must_use]
    pub fn allows_large(&self, gfn: Gfn, level: Level) -> bool {
        let (first, pages) = (gfn.round(level).0, level.pages());
        if first < self.base.0 || first + pages > self.base.0 + self.pages {
            return false;
        }
        match level.0 {
            1 => true,
            2 => self.region(gfn).is_none_or(|r| r.disallow_2m == 0),
            _ => self.giant[self.giant_index(gfn)].1 == 0,
        }
    }

    /// Whether writes are logged.
    #[inline]
    #[must_use]
    pub const fn logs_dirty(&self) -> bool {
        self.dirty.is_some()
    }

    /// Turns the log on (empty) or off.
    pub fn set_dirty_log(&mut self, on: bool) {
        self.dirty = on.then(|| vec![0; self.pages.div_ceil(64) as usize]);
    }

    /// Notes a write to a frame.
    #[inline]
    pub fn mark_dirty(&mut self, gfn: Gfn) {
        if let Some(bits) = &mut self.dirty {
            let at = gfn.0 - self.base.0;
            bits[(at / 64) as usize] |= 1 << (at % 64);
        }
    }

    /// The frames that were written, in ascending order; the log is empty afterwards. `None` without a log.
    pub fn take_dirty(&mut self) -> Option<Vec<Gfn>> {
        let base = self.base.0;
        let bits = self.dirty.as_mut()?;
        let mut out = Vec::new();
        for (word, bits) in bits.iter_mut().enumerate() {
            let mut rest = std::mem::take(bits);
            while rest != 0 {
                out.push(Gfn(base + word as u64 * 64 + u64::from(rest.trailing_zeros())));
                rest &= rest - 1;
            }
        }
        Some(out)
    }

    /// Every list of leaf entries that is not empty: first frame, level, head.
    pub fn rmaps(&self) -> impl Iterator<Item = (Gfn, Level, RmapHead)> + '_ {
        let first = self.base.0 >> 9;
        let small = self.regions.iter().enumerate().filter_map(|(i, r)| Some((i as u64, r.as_deref()?)));
        let small = small.flat_map(move |(i, region)| {
            let gfn = (first + i) << 9;
            let pages = region.rmap.iter().enumerate().map(move |(k, head)| (Gfn(gfn + k as u64), Level::PT, *head));
            pages.chain(std::iter::once((Gfn(gfn), Level::PD, region.rmap_2m)))
        });
        let giant_first = self.base.0 >> 18;
        let giant = self
            .giant
            .iter()
            .enumerate()
            .map(move |(i, (head, _))| (Gfn((giant_first + i as u64) << 18), Level::PDPT, *head));
        small.chain(giant).filter(|(_, _, head)| head.0 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_regions_never_take_a_large_leaf() {
        let slot = Slot::new(1, Gfn(256), 1024, false);
        assert!(!slot.allows_large(Gfn(300), Level::PD));
        assert!(slot.allows_large(Gfn(512), Level::PD));
        assert!(!slot.allows_large(Gfn(1100), Level::PD));
        assert!(!slot.allows_large(Gfn(512), Level::PDPT));
    }

    #[test]
    fn the_dirty_log_tells_each_frame_once() {
        let mut slot = Slot::new(1, Gfn(100), 200, false);
        slot.mark_dirty(Gfn(100));
        assert_eq!(slot.take_dirty(), None);
        slot.set_dirty_log(true);
        slot.mark_dirty(Gfn(299));
        slot.mark_dirty(Gfn(163));
        slot.mark_dirty(Gfn(299));
        assert_eq!(slot.take_dirty(), Some(vec![Gfn(163), Gfn(299)]));
        assert_eq!(slot.take_dirty(), Some(vec![]));
    }
}

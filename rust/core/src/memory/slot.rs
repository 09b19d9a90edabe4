//! One memslot: its range, its dirty bitmap, and the per-frame bookkeeping that KVM keeps with it.

mod bounds;

use crate::types::{ENTRIES, Gfn, Level, RmapHead};
use crate::words::Word;
use serde::{Deserialize, Serialize};

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
    pub(super) fn is_free(self, writable: bool) -> bool {
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

/// The bookkeeping of 512 frames, made when the first of them needs it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SlotRegion {
    /// Of each frame.
    #[serde(with = "crate::words::table")]
    pub frames: [SlotFrame; ENTRIES],
    /// Leaf entries of level 2 that map the region.
    pub rmap_2m: RmapHead,
    /// How many shadow pages forbid a 2 MiB leaf here.
    pub disallow_2m: u32,
}

impl SlotRegion {
    #[cold]
    fn empty() -> Box<Self> {
        Box::new(Self { frames: [SlotFrame::default(); ENTRIES], rmap_2m: RmapHead::default(), disallow_2m: 0 })
    }
}

/// One memslot.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
    #[serde(with = "crate::words::maybe_list")]
    dirty: Option<Vec<u64>>,
    #[serde(with = "crate::words::sparse")]
    regions: Vec<Option<Box<SlotRegion>>>,
    /// Per 1 GiB: leaf entries of level 3, and how many shadow pages forbid one.
    giant: Vec<(RmapHead, u32)>,
}

impl Slot {
    /// A slot without bookkeeping yet.
    #[must_use]
    pub fn new(id: u16, base: Gfn, pages: u64, readonly: bool) -> Self {
        Self {
            id,
            base,
            pages,
            readonly,
            dirty: None,
            regions: vec![None; parts(base, pages, 9)],
            giant: vec![(RmapHead::default(), 0); parts(base, pages, 18)],
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

    /// Bytes that the bookkeeping of the frames takes.
    pub(super) fn bytes(&self) -> usize {
        let regions = self.regions.iter().flatten().count() * size_of::<SlotRegion>();
        regions + self.regions.len() * size_of::<Option<Box<SlotRegion>>>()
    }

    #[inline(always)]
    pub(super) fn region_mut(&mut self, gfn: Gfn) -> &mut SlotRegion {
        let at = self.region_index(gfn);
        Self::begun(&mut self.regions[at])
    }

    #[inline(always)]
    fn begun(region: &mut Option<Box<SlotRegion>>) -> &mut SlotRegion {
        if region.is_none() {
            Self::begin(region);
        }
        region.as_mut().expect("it was begun")
    }

    #[cold]
    fn begin(region: &mut Option<Box<SlotRegion>>) {
        *region = Some(SlotRegion::empty());
    }

    /// The list of leaf entries of `level` that map the frame.
    #[inline]
    #[must_use]
    pub fn rmap(&self, gfn: Gfn, level: Level) -> RmapHead {
        match level.0 {
            1 => self.region(gfn).map_or_else(RmapHead::default, |r| r.frames[frame_index(gfn)].rmap),
            2 => self.region(gfn).map_or_else(RmapHead::default, |r| r.rmap_2m),
            _ => self.giant[self.giant_index(gfn)].0,
        }
    }

    /// The lists of all levels.
    #[inline]
    #[must_use]
    pub fn rmaps_of(&self, gfn: Gfn) -> [RmapHead; 3] {
        let region = self.region(gfn);
        let small = region.map_or_else(Default::default, |r| (r.frames[frame_index(gfn)].rmap, r.rmap_2m));
        [small.0, small.1, self.giant[self.giant_index(gfn)].0]
    }

    /// The same list, to change it.
    #[inline]
    pub fn rmap_mut(&mut self, gfn: Gfn, level: Level) -> &mut RmapHead {
        match level.0 {
            1 => &mut self.frame_mut(gfn).rmap,
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
        self.region(gfn).map_or(0, |r| r.frames[frame_index(gfn)].track)
    }

    /// The bookkeeping of a frame of the slot, to change it.
    #[inline]
    pub fn frame_mut(&mut self, gfn: Gfn) -> &mut SlotFrame {
        &mut self.region_mut(gfn).frames[frame_index(gfn)]
    }

    /// What shadow pages count: the frame's bookkeeping, and how many forbid a leaf of 2 MiB and of 1 GiB around it; with the
    /// lists of such leaves.
    #[inline(always)]
    pub fn shadow_counts_mut(&mut self, gfn: Gfn) -> (&mut SlotFrame, (RmapHead, &mut u32), (RmapHead, &mut u32)) {
        let (region, giant) = (self.region_index(gfn), self.giant_index(gfn));
        let (region, giant) = (Self::begun(&mut self.regions[region]), &mut self.giant[giant]);
        let two = (region.rmap_2m, &mut region.disallow_2m);
        (&mut region.frames[frame_index(gfn)], two, (giant.0, &mut giant.1))
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

    /// Turns the log on (empty, or `full`) or off.
    pub fn set_dirty_log(&mut self, on: bool, full: bool) {
        self.dirty = on.then(|| vec![if full { !0 } else { 0 }; self.pages.div_ceil(64) as usize]);
    }

    /// The same slot at another place, without any bookkeeping but its log.
    #[must_use]
    pub fn moved(self, base: Gfn) -> Self {
        Self { dirty: self.dirty, ..Self::new(self.id, base, self.pages, self.readonly) }
    }

    /// Notes a write to a frame.
    #[inline]
    pub fn mark_dirty(&mut self, gfn: Gfn) {
        if let Some(bits) = &mut self.dirty {
            let at = gfn.0 - self.base.0;
            bits[(at / 64) as usize] |= 1 << (at % 64);
        }
    }

    /// The frames in the log, in ascending order. `None` without a log.
    #[must_use]
    pub fn dirty_frames(&self) -> Option<Vec<Gfn>> {
        let mut out = Vec::new();
        for (word, bits) in self.dirty.as_ref()?.iter().enumerate() {
            let mut rest = *bits;
            while rest != 0 {
                out.push(Gfn(self.base.0 + word as u64 * 64 + u64::from(rest.trailing_zeros())));
                rest &= rest - 1;
            }
        }
        // A log that began full has bits beyond the slot's end.
        out.retain(|gfn| self.holds(*gfn));
        Some(out)
    }

    /// Takes frames out of the log.
    pub fn clear_dirty(&mut self, frames: &[Gfn]) {
        for at in frames.iter().map(|gfn| gfn.0 - self.base.0) {
            if let Some(bits) = &mut self.dirty {
                bits[(at / 64) as usize] &= !(1 << (at % 64));
            }
        }
    }

    /// The lists with leaf entries that map a part of `from` to `to` (exclusive): first frame in it, level. Both lie in the
    /// slot. Small leaves come first, as in KVM's walk over the levels.
    #[must_use]
    pub fn rmaps_between(&self, from: Gfn, to: Gfn) -> Vec<(Gfn, Level)> {
        let (mut small, mut large) = (Vec::new(), Vec::new());
        let mut gfn = from.0;
        while gfn < to.0 {
            let end = ((gfn | (ENTRIES as u64 - 1)) + 1).min(to.0);
            if let Some(region) = self.region(Gfn(gfn)) {
                let used = |gfn: &u64| region.frames[frame_index(Gfn(*gfn))].rmap != RmapHead::default();
                small.extend((gfn..end).filter(used).map(|gfn| (Gfn(gfn), Level::PT)));
                if region.rmap_2m != RmapHead::default() {
                    large.push((Gfn(gfn), Level::PD));
                }
            }
            gfn = end;
        }
        let mut giant = from.0;
        while giant < to.0 {
            if self.rmap(Gfn(giant), Level::PDPT) != RmapHead::default() {
                large.push((Gfn(giant), Level::PDPT));
            }
            giant = (giant | (Level::PDPT.pages() - 1)) + 1;
        }
        small.append(&mut large);
        small
    }

    /// Every list of leaf entries that is not empty: first frame, level, head.
    pub fn rmaps(&self) -> impl Iterator<Item = (Gfn, Level, RmapHead)> + '_ {
        let first = self.base.0 >> 9;
        let small = self.regions.iter().enumerate().filter_map(|(i, r)| Some((i as u64, r.as_deref()?)));
        let small = small.flat_map(move |(i, region)| {
            let gfn = (first + i) << 9;
            let frames = region.frames.iter().enumerate();
            let pages = frames.map(move |(k, frame)| (Gfn(gfn + k as u64), Level::PT, frame.rmap));
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

/// How many aligned parts of 2^`shift` frames a range touches.
const fn parts(base: Gfn, pages: u64, shift: u32) -> usize {
    let last = base.0 + pages - 1;
    ((last >> shift) - (base.0 >> shift) + 1) as usize
}

#[inline]
const fn frame_index(gfn: Gfn) -> usize {
    gfn.0 as usize & (ENTRIES - 1)
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
        assert_eq!(slot.dirty_frames(), None);
        slot.set_dirty_log(true, false);
        slot.mark_dirty(Gfn(299));
        slot.mark_dirty(Gfn(163));
        slot.mark_dirty(Gfn(299));
        assert_eq!(slot.dirty_frames(), Some(vec![Gfn(163), Gfn(299)]));
        slot.clear_dirty(&[Gfn(299)]);
        assert_eq!(slot.dirty_frames(), Some(vec![Gfn(163)]));
        slot.set_dirty_log(true, true);
        assert_eq!(slot.dirty_frames().map(|all| all.len()), Some(200), "no frame beyond the end");
    }
}

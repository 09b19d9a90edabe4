//! One memslot: its range, its dirty bitmap, and its leaves of 1 GiB. What KVM keeps with a slot of each frame is in
//! `memory::books`.

mod bounds;

use crate::types::{Gfn, Level, RmapHead};
use serde::{Deserialize, Serialize};

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
    /// Leaf entries of level 3, per 1 GiB.
    giant: Vec<RmapHead>,
}

impl Slot {
    /// A slot without bookkeeping yet.
    #[must_use]
    pub fn new(id: u16, base: Gfn, pages: u64, readonly: bool) -> Self {
        Self { id, base, pages, readonly, dirty: None, giant: vec![RmapHead::default(); parts(base, pages, 18)] }
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

    const fn giant_index(&self, gfn: Gfn) -> usize {
        ((gfn.0 >> 18) - (self.base.0 >> 18)) as usize
    }

    /// The list of leaf entries of 1 GiB that map a frame of the slot.
    pub(super) fn giant(&self, gfn: Gfn) -> RmapHead {
        self.giant[self.giant_index(gfn)]
    }

    /// The same list, to change it.
    pub(super) fn giant_mut(&mut self, gfn: Gfn) -> &mut RmapHead {
        let at = self.giant_index(gfn);
        &mut self.giant[at]
    }

    /// All of them, by their first frame.
    pub(super) fn giants(&self) -> impl Iterator<Item = (Gfn, RmapHead)> + '_ {
        let first = self.base.0 >> 18;
        self.giant.iter().enumerate().map(move |(i, head)| (Gfn((first + i as u64) << 18), *head))
    }

    /// Whether it covers the whole range of a leaf of `level` around a frame (`lpage_info`, 6.1, has permanent counts for
    /// others).
    #[must_use]
    pub fn covers(&self, gfn: Gfn, level: Level) -> bool {
        let (first, pages) = (gfn.round(level).0, level.pages());
        first >= self.base.0 && first + pages <= self.base.0 + self.pages
    }

    /// Whether writes are logged.
    #[inline]
    #[must_use]
    pub const fn logs_dirty(&self) -> bool {
        self.dirty.is_some()
    }

    /// Turns the log on (empty, or `full`) or off.
    pub(super) fn set_dirty_log(&mut self, on: bool, full: bool) {
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
}

/// How many aligned parts of 2^`shift` frames a range touches.
const fn parts(base: Gfn, pages: u64, shift: u32) -> usize {
    let last = base.0 + pages - 1;
    ((last >> shift) - (base.0 >> shift) + 1) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

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

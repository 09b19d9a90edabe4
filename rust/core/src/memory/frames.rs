//! Where a guest frame's state and contents are kept: a sparse map of two levels over a pool of pages.

use crate::memory::HostState;
use crate::types::{ENTRIES, Gfn};
use crate::words::Word;
use serde::{Deserialize, Serialize};

/// Frames of one region: 2 MiB.
const REGION_SHIFT: u32 = 9;
/// Regions of which every frame is as at the start; they are shared and never written. Absent is 0, so that the map
/// of a large space is zeroed memory, which costs nothing until it is touched.
const ABSENT: u32 = 0;
const WRITABLE: u32 = 1;

/// One guest frame: the state of its page, and the number of its contents in the pool; 0 is the page of zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Frame(u32);

impl Word for Frame {
    fn word(self) -> u64 {
        self.0.into()
    }

    fn of(word: u64) -> Self {
        Self(word as u32)
    }
}

impl Frame {
    const fn new(state: HostState, page: u32) -> Self {
        Self(page << 3 | state as u32)
    }

    #[inline]
    pub(super) const fn state(self) -> HostState {
        match self.0 & 7 {
            0 => HostState::Absent,
            1 => HostState::Zero,
            2 => HostState::Shared,
            3 => HostState::Writable,
            4 => HostState::Huge2m,
            _ => HostState::Huge1g,
        }
    }

    /// Whether the page is there, whatever may be done with it.
    #[inline]
    pub(super) const fn present(self) -> bool {
        self.0 & 7 != HostState::Absent as u32
    }

    /// Whether the host may write the page.
    #[inline]
    pub(super) const fn writable(self) -> bool {
        self.0 & 7 >= HostState::Writable as u32
    }

    #[inline]
    pub(super) const fn page(self) -> u32 {
        self.0 >> 3
    }

    #[inline]
    pub(super) const fn with_state(self, state: HostState) -> Self {
        Self::new(state, self.page())
    }

    #[inline]
    pub(super) const fn with_page(self, page: u32) -> Self {
        Self::new(self.state(), page)
    }
}

/// 512 frames.
pub(super) type Region = [Frame; ENTRIES];

/// All frames. Numbers instead of pointers: an untouched part is the number of a region that many share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Frames {
    /// The number of each region.
    #[serde(with = "crate::words::list")]
    map: Vec<u32>,
    #[serde(with = "crate::words::tables")]
    regions: Vec<Region>,
}

impl Frames {
    /// The first `populated` frames are writable, all others absent.
    pub(super) fn new(populated: u64) -> Self {
        let whole = |state| [Frame::new(state, 0); ENTRIES];
        let mut frames = Self {
            map: vec![WRITABLE; (populated >> REGION_SHIFT) as usize],
            regions: vec![whole(HostState::Absent), whole(HostState::Writable)],
        };
        let rest = frame_index(Gfn(populated));
        if rest != 0 {
            frames.region_mut(Gfn(populated))[..rest].fill(Frame::new(HostState::Writable, 0));
        }
        frames
    }

    #[inline(always)]
    pub(super) fn get(&self, gfn: Gfn) -> Frame {
        self.regions[self.region(gfn) as usize][frame_index(gfn)]
    }

    /// The frames of the region around one.
    #[inline]
    pub(super) fn near(&self, gfn: Gfn) -> &Region {
        &self.regions[self.region(gfn) as usize]
    }

    #[inline]
    fn region(&self, gfn: Gfn) -> u32 {
        self.map.get((gfn.0 >> REGION_SHIFT) as usize).copied().unwrap_or(ABSENT)
    }

    pub(super) fn set(&mut self, gfn: Gfn, frame: Frame) {
        self.region_mut(gfn)[frame_index(gfn)] = frame;
    }

    /// Whether every frame of the region around `gfn` is in `state`, as it was at the start.
    pub(super) fn is_untouched(&self, gfn: Gfn, state: HostState) -> bool {
        match state {
            HostState::Absent => self.region(gfn) == ABSENT,
            HostState::Writable => self.region(gfn) == WRITABLE,
            _ => false,
        }
    }

    /// The region around a frame, to change it.
    fn region_mut(&mut self, gfn: Gfn) -> &mut Region {
        let at = (gfn.0 >> REGION_SHIFT) as usize;
        if at >= self.map.len() {
            let mut larger = vec![ABSENT; (at + 1).next_power_of_two()];
            larger[..self.map.len()].copy_from_slice(&self.map);
            self.map = larger;
        }
        let number = &mut self.map[at];
        if *number <= WRITABLE {
            self.regions.push(self.regions[*number as usize]);
            *number = self.regions.len() as u32 - 1;
        }
        &mut self.regions[*number as usize]
    }

    /// Whether every frame has contents below `pages`, and the map leads to regions that are there.
    pub(super) fn leads_below(&self, pages: usize) -> bool {
        let begun = self.regions.first_chunk().is_some_and(|[absent, writable]| {
            let all = |region: &Region, state| region.iter().all(|frame| *frame == Frame::new(state, 0));
            all(absent, HostState::Absent) && all(writable, HostState::Writable)
        });
        let mapped = self.map.iter().all(|number| (*number as usize) < self.regions.len());
        begun && mapped && self.regions.iter().flatten().all(|frame| (frame.page() as usize) < pages)
    }

    /// The frames of the regions that have something of their own.
    pub(super) fn touched(&self) -> impl Iterator<Item = Gfn> + '_ {
        let regions = self.map.iter().enumerate().filter(|(_, number)| **number > WRITABLE);
        regions.flat_map(|(at, _)| (0..ENTRIES as u64).map(move |frame| Gfn((at as u64) << REGION_SHIFT | frame)))
    }

    /// Bytes in use, but for the untouched part of the map.
    pub(super) fn bytes(&self) -> usize {
        self.map.len() * size_of::<u32>() + self.regions.len() * size_of::<[Frame; ENTRIES]>()
    }
}

#[inline]
const fn frame_index(gfn: Gfn) -> usize {
    gfn.0 as usize & (ENTRIES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_writable_and_the_rest_absent() {
        for populated in [1, 5, 511, 512, 513, 1 << 18, (1 << 18) + 7, (3 << 18) + 1024] {
            let frames = Frames::new(populated);
            let state = |gfn| frames.get(Gfn(gfn)).state();
            for gfn in [0, populated / 2, populated - 1] {
                assert_eq!(state(gfn), HostState::Writable, "{gfn} of {populated}");
            }
            for gfn in [populated, populated + 1, populated + 512, populated + (1 << 18), 1 << 40, u64::MAX >> 12] {
                assert_eq!(state(gfn), HostState::Absent, "{gfn} of {populated}");
            }
        }
    }

    #[test]
    fn a_change_touches_one_frame() {
        let mut frames = Frames::new(1 << 20);
        let states = [
            HostState::Absent,
            HostState::Zero,
            HostState::Shared,
            HostState::Writable,
            HostState::Huge2m,
            HostState::Huge1g,
        ];
        for (i, state) in states.into_iter().enumerate() {
            let gfn = Gfn(700 * (i as u64 + 1));
            frames.set(gfn, frames.get(gfn).with_state(state).with_page(i as u32));
            assert_eq!((frames.get(gfn).state(), frames.get(gfn).page()), (state, i as u32));
            assert_eq!(frames.get(Gfn(gfn.0 + 1)).state(), HostState::Writable);
            assert!(!frames.is_untouched(gfn, HostState::Writable));
        }
        assert!(frames.is_untouched(Gfn(1 << 19), HostState::Writable));
    }
}

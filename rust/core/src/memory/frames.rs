//! What is kept of each guest frame: a sparse map of two levels, whose regions hold the state of the host's pages and KVM's
//! bookkeeping side by side, so that one look finds both.

use crate::memory::{HostState, SlotFrame};
use crate::types::{ENTRIES, Gfn, RmapHead};
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

/// 512 frames: 2 MiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Region {
    /// The host's page of each.
    #[serde(with = "crate::words::table")]
    pub frames: [Frame; ENTRIES],
    /// KVM's bookkeeping of each.
    #[serde(with = "crate::words::table")]
    pub books: [SlotFrame; ENTRIES],
    /// Leaf entries of level 2 that map the region.
    pub rmap_2m: RmapHead,
    /// How many shadow pages forbid a 2 MiB leaf here.
    pub disallow_2m: u32,
    /// All of it lies in one slot, which takes writes and logs none, and no slot changed since that was found out.
    #[serde(skip)]
    pub open: bool,
}

impl Region {
    fn new(state: HostState) -> Box<Self> {
        let (frames, books) = ([Frame::new(state, 0); ENTRIES], [SlotFrame::default(); ENTRIES]);
        Box::new(Self { frames, books, rmap_2m: RmapHead::default(), disallow_2m: 0, open: false })
    }
}

/// All frames. Numbers instead of pointers: an untouched part is the number of a region that many share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Frames {
    /// The number of each region.
    #[serde(with = "crate::words::list")]
    map: Vec<u32>,
    regions: Vec<Box<Region>>,
}

impl Frames {
    /// The first `populated` frames are writable, all others absent.
    pub(super) fn new(populated: u64) -> Self {
        let mut frames = Self {
            map: vec![WRITABLE; (populated >> REGION_SHIFT) as usize],
            regions: vec![Region::new(HostState::Absent), Region::new(HostState::Writable)],
        };
        let rest = frame_index(Gfn(populated));
        if rest != 0 {
            frames.region_mut(Gfn(populated)).frames[..rest].fill(Frame::new(HostState::Writable, 0));
        }
        frames
    }

    #[inline(always)]
    pub(super) fn get(&self, gfn: Gfn) -> Frame {
        self.region(gfn).frames[frame_index(gfn)]
    }

    /// The region around a frame; one that many share if nobody touched it.
    #[inline(always)]
    pub(super) fn region(&self, gfn: Gfn) -> &Region {
        &self.regions[self.number(gfn) as usize]
    }

    /// Its number.
    #[inline(always)]
    pub(super) fn number(&self, gfn: Gfn) -> u32 {
        self.map.get((gfn.0 >> REGION_SHIFT) as usize).copied().unwrap_or(ABSENT)
    }

    /// The region of a number, to change it.
    #[inline(always)]
    pub(super) fn at(&mut self, number: u32) -> &mut Region {
        &mut self.regions[number as usize]
    }

    /// The region around a frame, to change it, if it is open.
    #[inline(always)]
    pub(super) fn open_region(&mut self, gfn: Gfn) -> Option<&mut Region> {
        let number = self.number(gfn);
        // The shared ones never are.
        Some(self.at(number)).filter(|region| region.open)
    }

    /// Whether a region has something of its own.
    pub(super) fn is_own(&self, gfn: Gfn) -> bool {
        self.number(gfn) > WRITABLE
    }

    /// A slot changed: it must be found out again which regions are open.
    pub(super) fn close(&mut self) {
        for region in &mut self.regions {
            region.open = false;
        }
    }

    pub(super) fn set(&mut self, gfn: Gfn, frame: Frame) {
        self.region_mut(gfn).frames[frame_index(gfn)] = frame;
    }

    /// Whether every frame of the region around `gfn` is in `state`, as it was at the start.
    pub(super) fn is_untouched(&self, gfn: Gfn, state: HostState) -> bool {
        match state {
            HostState::Absent => self.number(gfn) == ABSENT,
            HostState::Writable => self.number(gfn) == WRITABLE,
            _ => false,
        }
    }

    /// The region around a frame, to change it.
    #[inline(always)]
    pub(super) fn region_mut(&mut self, gfn: Gfn) -> &mut Region {
        let mut number = self.number(gfn);
        if number <= WRITABLE {
            number = self.make_own(gfn);
        }
        &mut self.regions[number as usize]
    }

    /// Gives the region around a frame room of its own; its number.
    #[cold]
    fn make_own(&mut self, gfn: Gfn) -> u32 {
        let at = (gfn.0 >> REGION_SHIFT) as usize;
        if at >= self.map.len() {
            let mut larger = vec![ABSENT; (at + 1).next_power_of_two()];
            larger[..self.map.len()].copy_from_slice(&self.map);
            self.map = larger;
        }
        let number = &mut self.map[at];
        self.regions.push(self.regions[*number as usize].clone());
        *number = self.regions.len() as u32 - 1;
        *number
    }

    /// Whether every frame has contents below `pages`, and the map leads to regions that are there, to each of its own once.
    pub(super) fn leads_below(&self, pages: usize) -> bool {
        let begun = self.regions.first_chunk().is_some_and(|[absent, writable]| {
            let all = |region: &Region, state| region.frames.iter().all(|frame| *frame == Frame::new(state, 0));
            let free = |region: &Region| {
                let none = region.books.iter().all(|books| *books == SlotFrame::default());
                none && region.rmap_2m == RmapHead::default() && region.disallow_2m == 0
            };
            all(absent, HostState::Absent) && all(writable, HostState::Writable) && free(absent) && free(writable)
        });
        let mapped = self.map.iter().all(|number| (*number as usize) < self.regions.len());
        let mut own: Vec<_> = self.map.iter().filter(|number| **number > WRITABLE).collect();
        own.sort_unstable();
        let once = own.windows(2).all(|pair| pair[0] < pair[1]);
        let mut frames = self.regions.iter().flat_map(|region| &region.frames);
        begun && mapped && once && frames.all(|frame| (frame.page() as usize) < pages)
    }

    /// The regions that have something of their own, with their first frame.
    pub(super) fn own(&self) -> impl Iterator<Item = (Gfn, &Region)> + '_ {
        let own = self.map.iter().enumerate().filter(|(_, number)| **number > WRITABLE);
        own.map(|(at, number)| (Gfn((at as u64) << REGION_SHIFT), &*self.regions[*number as usize]))
    }

    /// The frames of these regions.
    pub(super) fn touched(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.own().flat_map(|(first, _)| (first.0..first.0 + ENTRIES as u64).map(Gfn))
    }

    /// Bytes that the host's side of the frames takes, but for the untouched part of the map, and those that KVM's takes.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let host = size_of::<[Frame; ENTRIES]>();
        let books = self.regions.len() * (size_of::<Region>() - host);
        (self.map.len() * size_of::<u32>() + self.regions.len() * host, books)
    }
}

/// The place of a frame in its region.
#[inline(always)]
pub(super) const fn frame_index(gfn: Gfn) -> usize {
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

    #[test]
    fn two_places_of_one_region_are_none() {
        let mut frames = Frames::new(1 << 12);
        frames.set(Gfn(700), Frame::new(HostState::Zero, 0));
        assert!(frames.leads_below(1), "many places share what nobody touched");
        frames.map[5] = frames.map[1];
        assert!(!frames.leads_below(1));
    }
}

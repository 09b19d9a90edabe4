//! The host's side of guest memory: contents and state of each page. Only pages that were written take room.

mod bounds;

use crate::memory::frames::{Frame, Frames};
use crate::types::{ENTRIES, Gfn, Gpa, Level, Pfn};
use serde::{Deserialize, Serialize};

/// What the host has behind a guest frame. It decides prefetch, writability and whether a write raises a notifier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum HostState {
    /// Never touched, or dropped (`MADV_DONTNEED`).
    Absent,
    /// The shared zero page: read, never written.
    Zero,
    /// A page that others share, too (KSM, a fork of the VM's process): read, replaced by one of its own when written.
    Shared,
    /// Present and writable, mapped by 4 KiB.
    Writable,
    /// Present and writable, part of a 2 MiB mapping.
    Huge2m,
    /// Present and writable, part of a 1 GiB mapping.
    Huge1g,
}

impl HostState {
    /// Whether the host may write the page without a fault.
    #[must_use]
    pub const fn writable(self) -> bool {
        matches!(self, Self::Writable | Self::Huge2m | Self::Huge1g)
    }

    /// The level of the host's mapping.
    #[must_use]
    pub const fn level(self) -> Level {
        match self {
            Self::Huge2m => Level::PD,
            Self::Huge1g => Level::PDPT,
            Self::Absent | Self::Zero | Self::Shared | Self::Writable => Level::PT,
        }
    }
}

/// Host frame of guest frame 0: a multiple of 1 GiB, so that huge pages stay aligned, and above the zero page.
const PFN_BASE: u64 = 1 << 18;

/// Marks the frame of a shared page, which is another than the one that the page gets when it is written.
const SHARED: u64 = 1 << 38;

/// The contents of a page.
pub(super) type Page = [u64; ENTRIES];

/// The place of a frame's contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Contents(pub(super) u32);

impl Contents {
    /// The page of zeros.
    pub const NOTHING: Self = Self(0);

    #[inline(always)]
    pub(super) const fn of(frame: Frame) -> Self {
        Self(frame.page())
    }
}

/// All of the host's pages, by guest frame.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    pub(super) frames: Frames,
    /// Contents; the first is the page of zeros, which stands for all that hold nothing.
    #[serde(with = "crate::words::tables")]
    pub(super) pages: Vec<Page>,
    free: Vec<u32>,
    /// Frames below this one begin writable, all others absent.
    populated: u64,
}

impl Host {
    /// The frame number of the shared zero page.
    pub const ZERO_PFN: Pfn = Pfn(1);

    /// Memory of which the first `populated` frames are present and writable.
    #[must_use]
    pub fn new(populated: u64) -> Self {
        Self { frames: Frames::new(populated), pages: vec![[0; ENTRIES]], free: Vec::new(), populated }
    }

    /// Whether the frame is part of the memory that was there from the start.
    #[must_use]
    pub const fn populated(&self, gfn: Gfn) -> bool {
        gfn.0 < self.populated
    }

    /// The host frame of a guest frame that has a page of its own.
    #[inline]
    #[must_use]
    pub const fn pfn(gfn: Gfn) -> Pfn {
        Pfn(gfn.0 + PFN_BASE)
    }

    /// The guest frame whose own page `pfn` is, or `None` for the zero page.
    #[inline]
    #[must_use]
    pub const fn gfn(pfn: Pfn) -> Option<Gfn> {
        if pfn.0 >= PFN_BASE { Some(Gfn((pfn.0 & !SHARED) - PFN_BASE)) } else { None }
    }

    /// The host frame that a guest frame has now.
    #[inline]
    #[must_use]
    pub fn frame(&self, gfn: Gfn) -> Pfn {
        match self.state(gfn) {
            HostState::Zero => Self::ZERO_PFN,
            HostState::Shared => Pfn(Self::pfn(gfn).0 | SHARED),
            _ => Self::pfn(gfn),
        }
    }

    /// The state of a frame's page.
    #[inline]
    #[must_use]
    pub fn state(&self, gfn: Gfn) -> HostState {
        self.frames.get(gfn).state()
    }

    /// Whether a frame has a page, whatever may be done with it.
    #[inline]
    #[must_use]
    pub fn present(&self, gfn: Gfn) -> bool {
        self.frames.get(gfn).present()
    }

    /// Sets the state of one frame's page; an absent or zero page loses its contents. A huge mapping of which a part
    /// changes is split.
    pub fn set_state(&mut self, gfn: Gfn, state: HostState) {
        let old = self.frames.get(gfn);
        if old.state() == state {
            return;
        }
        if old.state().level() > state.level() {
            self.split(gfn, old.state().level());
        }
        let mut new = old.with_state(state);
        if matches!(state, HostState::Absent | HostState::Zero) && old.page() != 0 {
            self.pages[old.page() as usize] = [0; ENTRIES];
            self.free.push(old.page());
            new = new.with_page(0);
        }
        self.frames.set(gfn, new);
    }

    /// Sets the state of a range of frames. Regions that are in it by nature are passed over.
    pub fn set_states(&mut self, first: Gfn, pages: u64, state: HostState) {
        let (mut gfn, end) = (first.0, first.0 + pages);
        while gfn < end {
            let next = (gfn | (ENTRIES as u64 - 1)) + 1;
            let natural = self.frames.is_untouched(Gfn(gfn), state);
            if !natural {
                for gfn in gfn..next.min(end) {
                    self.set_state(Gfn(gfn), state);
                }
            }
            gfn = next;
        }
    }

    /// Takes pages, contents and states, from one place to another; the old place is absent then.
    pub fn move_pages(&mut self, from: Gfn, to: Gfn, pages: u64) {
        let taken: Vec<_> = (0..pages)
            .map(|i| {
                let gfn = Gfn(from.0 + i);
                let frame = self.frames.get(gfn);
                (frame.state(), (frame.page() != 0).then(|| self.pages[frame.page() as usize]))
            })
            .collect();
        self.set_states(from, pages, HostState::Absent);
        for (i, (state, page)) in taken.into_iter().enumerate() {
            let gfn = Gfn(to.0 + i as u64);
            let small = if state.level() > Level::PT { HostState::Writable } else { state };
            self.set_state(gfn, HostState::Absent);
            self.set_state(gfn, small);
            if let Some(page) = page {
                *self.page_mut(gfn) = page;
            }
        }
    }

    fn split(&mut self, gfn: Gfn, level: Level) {
        let first = gfn.round(level);
        for i in 0..level.pages() {
            let gfn = Gfn(first.0 + i);
            self.frames.set(gfn, self.frames.get(gfn).with_state(HostState::Writable));
        }
    }

    #[inline]
    fn page(&self, gfn: Gfn) -> &Page {
        &self.pages[self.frames.get(gfn).page() as usize]
    }

    /// A frame's contents, to change them.
    #[inline]
    fn page_mut(&mut self, gfn: Gfn) -> &mut Page {
        let mut at = self.frames.get(gfn).page();
        if at == 0 {
            at = self.new_page(gfn);
        }
        &mut self.pages[at as usize]
    }

    #[cold]
    fn new_page(&mut self, gfn: Gfn) -> u32 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.pages.push([0; ENTRIES]);
            self.pages.len() as u32 - 1
        });
        self.frames.set(gfn, self.frames.get(gfn).with_page(at));
        at
    }

    /// The entry `index` of a table page with entries of 4 or 8 bytes.
    #[inline]
    #[must_use]
    pub fn entry(&self, gfn: Gfn, at: usize, bytes: u8) -> u64 {
        entry(self.page(gfn), at, bytes)
    }

    /// Where a frame's contents are, to read many of its entries; good until memory changes.
    #[inline]
    #[must_use]
    pub fn contents(&self, gfn: Gfn) -> Contents {
        Contents::of(self.frames.get(gfn))
    }

    /// The entry `at` of a table page found before.
    #[inline]
    #[must_use]
    pub fn entry_in(&self, contents: Contents, at: usize, bytes: u8) -> u64 {
        entry(&self.pages[contents.0 as usize], at, bytes)
    }

    /// All entries of 8 bytes of a table page found before.
    #[inline]
    #[must_use]
    pub fn words_in(&self, contents: Contents) -> &[u64; ENTRIES] {
        &self.pages[contents.0 as usize]
    }

    /// 64 entries of 8 bytes of a table page found before, from entry `first` on, a multiple of 64.
    #[inline]
    #[must_use]
    pub fn block_in(&self, contents: Contents, first: usize) -> [u64; 64] {
        self.pages[contents.0 as usize].as_chunks().0[first / 64]
    }

    /// Whether a table's page is there, and its entry `at`, found in one look.
    #[inline]
    #[must_use]
    pub fn present_and_entry(&self, gfn: Gfn, at: usize, bytes: u8) -> (bool, u64) {
        let frame = self.frames.get(gfn);
        (frame.present(), entry(&self.pages[frame.page() as usize], at, bytes))
    }

    /// Sets the entry `at` of a table page.
    #[inline]
    pub fn set_entry(&mut self, gfn: Gfn, at: usize, bytes: u8, value: u64) {
        self.write(Gpa(gfn.gpa().0 + u64::from(bytes) * at as u64), bytes, value);
    }

    /// The little-endian value of `size` (1 to 8) bytes that lie inside one page.
    #[inline]
    #[must_use]
    pub fn read(&self, gpa: Gpa, size: u8) -> u64 {
        let page = self.page(gpa.gfn());
        let (word, shift) = (gpa.offset() as usize / 8, (gpa.0 & 7) * 8);
        let mut value = page[word] >> shift;
        if shift + u64::from(size) * 8 > 64 {
            value |= page[word + 1] << (64 - shift);
        }
        value & mask(size)
    }

    /// Stores `size` (1 to 8) bytes that lie inside one page.
    #[inline(always)]
    pub fn write(&mut self, gpa: Gpa, size: u8, value: u64) {
        self.write_in(self.contents(gpa.gfn()), gpa, size, value);
    }

    /// The same where the contents of the page are known.
    #[inline(always)]
    pub fn write_in(&mut self, contents: Contents, gpa: Gpa, size: u8, value: u64) {
        if size == 8 && gpa.0.is_multiple_of(8) && contents != Contents::NOTHING {
            // Most stores.
            self.pages[contents.0 as usize][gpa.offset() as usize / 8] = value;
        } else {
            self.write_part(gpa, size, value);
        }
    }

    #[inline(never)]
    fn write_part(&mut self, gpa: Gpa, size: u8, value: u64) {
        let value = value & mask(size);
        // Zeros that go where nothing is change nothing, and take no room.
        let mut at = self.frames.get(gpa.gfn()).page();
        if at == 0 {
            if value == 0 {
                return;
            }
            at = self.new_page(gpa.gfn());
        }
        let page = &mut self.pages[at as usize];
        let (word, shift) = (gpa.offset() as usize / 8, (gpa.0 & 7) * 8);
        page[word] = page[word] & !(mask(size) << shift) | value << shift;
        if shift + u64::from(size) * 8 > 64 {
            let rest = 64 - shift;
            page[word + 1] = page[word + 1] & !(mask(size) >> rest) | value >> rest;
        }
    }

    /// Stores `size` (1 to 16) bytes that lie inside one page.
    #[inline]
    pub fn write_wide(&mut self, gpa: Gpa, size: u8, value: u128) {
        self.write(gpa, size.min(8), value as u64);
        if size > 8 {
            self.write(Gpa(gpa.0 + 8), size - 8, (value >> 64) as u64);
        }
    }

    /// Copies `data` to `gpa`, over as many pages as it takes.
    pub fn write_bytes(&mut self, gpa: Gpa, data: &[u8]) {
        let mut at = gpa.0;
        let mut rest = data;
        while !rest.is_empty() {
            let step = if at.is_multiple_of(8) && rest.len() >= 8 { 8 } else { 1 };
            let value = rest[..step].iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
            self.write(Gpa(at), step as u8, value);
            at += step as u64;
            rest = &rest[step..];
        }
    }

    /// Copies `size` bytes from `gpa` on.
    #[must_use]
    pub fn read_bytes(&self, gpa: Gpa, size: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(size);
        let mut at = gpa.0;
        while out.len() < size {
            let step = if at.is_multiple_of(8) && size - out.len() >= 8 { 8 } else { 1 };
            let value = self.read(Gpa(at), step as u8);
            out.extend_from_slice(&value.to_le_bytes()[..step]);
            at += step as u64;
        }
        out
    }

    /// Shows each frame that is otherwise than at the start: with contents that are not all zeros, or in another state.
    pub fn each_changed(&self, mut show: impl FnMut(Gfn, HostState, &[u64; ENTRIES])) {
        for gfn in self.frames.touched() {
            let frame = self.frames.get(gfn);
            let (page, begun) = (&self.pages[frame.page() as usize], gfn.0 < self.populated);
            let first = if begun { HostState::Writable } else { HostState::Absent };
            if frame.state() != first || page.iter().any(|word| *word != 0) {
                show(gfn, frame.state(), page);
            }
        }
    }

    /// How many pages hold contents.
    #[must_use]
    pub fn resident_pages(&self) -> usize {
        self.pages.len() - 1 - self.free.len()
    }

    /// Bytes that the contents and the map of the frames take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.pages.len() * size_of::<Page>() + self.frames.bytes().0
    }
}

/// Entry `at` of a table with entries of 4 or 8 bytes.
#[inline]
const fn entry(page: &Page, at: usize, bytes: u8) -> u64 {
    if bytes == 8 { page[at] } else { page[at / 2] >> (32 * (at & 1)) & 0xffff_ffff }
}

#[inline]
const fn mask(size: u8) -> u64 {
    if size >= 8 { !0 } else { (1 << (size * 8)) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_survive_any_offset_and_size() {
        let mut host = Host::new(4);
        for offset in 0..24 {
            for size in 1..=8 {
                host.write(Gpa(0x1000 + offset), size, 0x1122_3344_5566_7788);
                assert_eq!(host.read(Gpa(0x1000 + offset), size), 0x1122_3344_5566_7788 & mask(size));
            }
        }
        host.write_bytes(Gpa(0x1ffd), &[1, 2, 3, 4, 5]);
        assert_eq!(host.read_bytes(Gpa(0x1ffc), 7), [0, 1, 2, 3, 4, 5, 0]);
    }

    #[test]
    fn entries_of_4_bytes_are_halves_of_words() {
        let mut host = Host::new(4);
        host.write(Gpa(0x1000), 8, 0x1111_2222_3333_4444);
        host.set_entry(Gfn(1), 3, 4, 0x5555_6666);
        assert_eq!(host.entry(Gfn(1), 0, 8), 0x1111_2222_3333_4444);
        let group = [0, 1, 2, 3].map(|at| host.entry_in(host.contents(Gfn(1)), at, 4));
        assert_eq!(group, [0x3333_4444, 0x1111_2222, 0, 0x5555_6666]);
        assert_eq!(host.entry(Gfn(1), 1, 8), 0x5555_6666_0000_0000);
    }

    #[test]
    fn only_written_pages_take_room_and_dropped_ones_read_zero() {
        let mut host = Host::new(1 << 20);
        host.write(Gpa(0x5000), 8, 0);
        assert_eq!(host.resident_pages(), 0);
        host.write(Gpa(0x5000), 8, 7);
        assert_eq!(host.resident_pages(), 1);
        host.set_state(Gfn(5), HostState::Absent);
        assert_eq!((host.read(Gpa(0x5000), 8), host.resident_pages()), (0, 0));
        assert_eq!(host.state(Gfn(6)), HostState::Writable);
        assert_eq!(host.state(Gfn(1 << 30)), HostState::Absent);
    }

    #[test]
    fn dropping_a_part_splits_a_huge_mapping() {
        let mut host = Host::new(1024);
        for gfn in 512..1024 {
            host.set_state(Gfn(gfn), HostState::Huge2m);
        }
        host.set_state(Gfn(600), HostState::Absent);
        assert_eq!(host.state(Gfn(601)), HostState::Writable);
        assert_eq!(host.state(Gfn(600)), HostState::Absent);
        host.set_state(Gfn(700), HostState::Huge2m);
        host.set_state(Gfn(701), HostState::Huge2m);
        host.set_state(Gfn(700), HostState::Writable);
        assert_eq!(host.state(Gfn(701)), HostState::Writable, "a 4 KiB page in its middle ends it, too");
    }
}

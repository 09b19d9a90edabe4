//! The host's side of guest memory: contents and state of each page. Only pages that were written take room.

use crate::types::{ENTRIES, Gfn, Gpa, Level, Pfn};

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

type Page = [u64; ENTRIES];
/// 512 regions: 1 GiB of guest frames.
type Table = Box<[Option<Box<Region>>; ENTRIES]>;

/// 512 frames: contents and states.
#[derive(Clone, Debug)]
struct Region {
    pages: Box<[Option<Box<Page>>; ENTRIES]>,
    state: [HostState; ENTRIES],
}

/// All of the host's pages, by guest frame: a directory of 1 GiB, tables of 2 MiB regions.
#[derive(Clone, Debug, Default)]
pub struct Host {
    directory: Vec<Option<Table>>,
    /// Frames below this one begin writable, all others absent.
    populated: u64,
}

impl Host {
    /// The frame number of the shared zero page.
    pub const ZERO_PFN: Pfn = Pfn(1);

    /// Memory of which the first `populated` frames are present and writable.
    #[must_use]
    pub fn new(populated: u64) -> Self {
        Self { directory: Vec::new(), populated }
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

    #[inline]
    fn region(&self, gfn: Gfn) -> Option<&Region> {
        self.directory.get((gfn.0 >> 18) as usize)?.as_ref()?[(gfn.0 >> 9) as usize & (ENTRIES - 1)].as_deref()
    }

    fn region_mut(&mut self, gfn: Gfn) -> &mut Region {
        let top = (gfn.0 >> 18) as usize;
        if top >= self.directory.len() {
            self.directory.resize(top + 1, None);
        }
        let table = self.directory[top].get_or_insert_with(|| Box::new([const { None }; ENTRIES]));
        let populated = self.populated;
        table[(gfn.0 >> 9) as usize & (ENTRIES - 1)].get_or_insert_with(|| {
            let first = gfn.round(Level::PD).0;
            let state = std::array::from_fn(|i| initial_state(first + i as u64, populated));
            Box::new(Region { pages: Box::new([const { None }; ENTRIES]), state })
        })
    }

    /// The state of a frame's page.
    #[inline]
    #[must_use]
    pub fn state(&self, gfn: Gfn) -> HostState {
        self.region(gfn).map_or_else(|| initial_state(gfn.0, self.populated), |r| r.state[index(gfn)])
    }

    /// Sets the state of one frame's page; an absent or zero page loses its contents. A huge mapping of which a part
    /// changes is split.
    pub fn set_state(&mut self, gfn: Gfn, state: HostState) {
        let old = self.state(gfn);
        if old == state {
            return;
        }
        if old.level() > state.level() {
            self.split(gfn, old.level());
        }
        let region = self.region_mut(gfn);
        region.state[index(gfn)] = state;
        if matches!(state, HostState::Absent | HostState::Zero) {
            region.pages[index(gfn)] = None;
        }
    }

    /// Sets the state of a range of frames. Regions that are in it by nature are passed over.
    pub fn set_states(&mut self, first: Gfn, pages: u64, state: HostState) {
        let (mut gfn, end) = (first.0, first.0 + pages);
        while gfn < end {
            let next = (gfn | (ENTRIES as u64 - 1)) + 1;
            let natural = self.region(Gfn(gfn)).is_none()
                && initial_state(gfn, self.populated) == state
                && initial_state(next - 1, self.populated) == state;
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
                let page = self.page(gfn).copied();
                let state = self.state(gfn);
                (state, page)
            })
            .collect();
        self.set_states(from, pages, HostState::Absent);
        for (i, (state, page)) in taken.into_iter().enumerate() {
            let gfn = Gfn(to.0 + i as u64);
            let small = if state.level() > Level::PT { HostState::Writable } else { state };
            self.set_state(gfn, HostState::Absent);
            self.set_state(gfn, small);
            if let Some(page) = page {
                self.region_mut(gfn).pages[index(gfn)] = Some(Box::new(page));
            }
        }
    }

    fn split(&mut self, gfn: Gfn, level: Level) {
        let first = gfn.round(level);
        for i in 0..level.pages() {
            let gfn = Gfn(first.0 + i);
            self.region_mut(gfn).state[index(gfn)] = HostState::Writable;
        }
    }

    #[inline]
    fn page(&self, gfn: Gfn) -> Option<&Page> {
        self.region(gfn)?.pages[index(gfn)].as_deref()
    }

    /// The entry `index` of a table page with entries of 4 or 8 bytes.
    #[inline]
    #[must_use]
    pub fn entry(&self, gfn: Gfn, at: usize, bytes: u8) -> u64 {
        self.page(gfn).map_or(0, |page| entry(page, at, bytes))
    }

    /// The 8 entries of the aligned group that holds entry `at`.
    #[inline]
    #[must_use]
    pub fn entry_group(&self, gfn: Gfn, at: usize, bytes: u8) -> [u64; 8] {
        let first = at & !7;
        self.page(gfn).map_or([0; 8], |page| std::array::from_fn(|i| entry(page, first + i, bytes)))
    }

    /// The state of a table's page and its entry `at`, found in one look.
    #[inline]
    #[must_use]
    pub fn state_and_entry(&self, gfn: Gfn, at: usize, bytes: u8) -> (HostState, u64) {
        match self.region(gfn) {
            Some(region) => {
                (region.state[index(gfn)], region.pages[index(gfn)].as_ref().map_or(0, |page| entry(page, at, bytes)))
            }
            None => (initial_state(gfn.0, self.populated), 0),
        }
    }

    /// 64 entries of a table page, from entry `first` on.
    #[inline]
    #[must_use]
    pub fn entries(&self, gfn: Gfn, first: usize, bytes: u8) -> [u64; 64] {
        self.page(gfn).map_or([0; 64], |page| std::array::from_fn(|i| entry(page, first + i, bytes)))
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
        let Some(page) = self.page(gpa.gfn()) else { return 0 };
        let (word, shift) = (gpa.offset() as usize / 8, (gpa.0 & 7) * 8);
        let mut value = page[word] >> shift;
        if shift + u64::from(size) * 8 > 64 {
            value |= page[word + 1] << (64 - shift);
        }
        value & mask(size)
    }

    /// Stores `size` (1 to 8) bytes that lie inside one page.
    pub fn write(&mut self, gpa: Gpa, size: u8, value: u64) {
        let gfn = gpa.gfn();
        let slot = &mut self.region_mut(gfn).pages[index(gfn)];
        let value = value & mask(size);
        let page = match slot {
            Some(page) => page,
            None if value == 0 => return,
            None => slot.insert(Box::new([0; ENTRIES])),
        };
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

    /// How many pages hold contents.
    #[must_use]
    pub fn resident_pages(&self) -> usize {
        let regions = self.directory.iter().flatten().flat_map(|table| table.iter().flatten());
        regions.map(|region| region.pages.iter().flatten().count()).sum()
    }
}

/// Entry `at` of a table with entries of 4 or 8 bytes.
#[inline]
const fn entry(page: &Page, at: usize, bytes: u8) -> u64 {
    if bytes == 8 { page[at] } else { page[at / 2] >> (32 * (at & 1)) & 0xffff_ffff }
}

#[inline]
const fn index(gfn: Gfn) -> usize {
    gfn.0 as usize & (ENTRIES - 1)
}

const fn initial_state(gfn: u64, populated: u64) -> HostState {
    if gfn < populated { HostState::Writable } else { HostState::Absent }
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
        assert_eq!(host.entry_group(Gfn(1), 2, 4)[..4], [0x3333_4444, 0x1111_2222, 0, 0x5555_6666]);
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

use super::*;
use crate::types::Gva;

const P: u64 = 0x67;

fn image(entries: &[(u64, u64)], size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (gpa, entry) in entries {
        bytes[*gpa as usize..][..8].copy_from_slice(&entry.to_le_bytes());
    }
    bytes
}

fn found(bytes: &[u8], mode: &str, rules: &Rules, gva: u64) -> (Found, Vec<Step>) {
    let viewer = Viewer::new(mode, rules).unwrap();
    let mut steps = Vec::new();
    let found = viewer.walk(&Segment { base: 0, bytes }, 0x1000, Gva(gva), |step| steps.push(step));
    (found, steps)
}

fn four_levels() -> Vec<u8> {
    image(
        &[
            (0x1000, 0x2000 | P),
            (0x2000, 0x3000 | P),
            (0x3000, 0x4000 | P),
            (0x3008, 0x20_0000 | 0xe7 | 1 << 8),
            (0x4000, 0x9000 | P),
            (0x4008, 1 << 63 | 0x8000 | 0x21),
            (0x4018, 1 << 52 | 0x8000 | P),
            (0x1008, 0x7_0000_0000 | P),
        ],
        0x6000,
    )
}

#[test]
fn a_walk_tells_its_steps_and_its_end() {
    let (at, steps) = found(&four_levels(), "4-level", &Rules::default(), 0x123);
    assert_eq!(at, Found { gpa: 0x9123, level: 1, flags: 7 | 8 | 16, fault: Fault::None });
    assert_eq!(
        steps.iter().map(|s| (s.level, s.table)).collect::<Vec<_>>(),
        [(4, 0x1000), (3, 0x2000), (2, 0x3000), (1, 0x4000)]
    );
    let (large, _) = found(&four_levels(), "4-level", &Rules::default(), 0x20_1234);
    assert_eq!(large, Found { gpa: 0x20_1234, level: 2, flags: 7 | 8 | 16 | 32, fault: Fault::None });
}

#[test]
fn each_end_has_its_fault_and_its_level() {
    let fault = |rules: &Rules, gva| {
        let found = found(&four_levels(), "4-level", rules, gva).0;
        (found.fault, found.level)
    };
    let plain = Rules::default();
    assert_eq!(fault(&plain, 0x2000), (Fault::NotPresent, 1));
    assert_eq!(fault(&plain, 1 << 39), (Fault::NotInImage, 3));
    assert_eq!(fault(&plain, 1 << 47), (Fault::NotCanonical, 0));
    assert_eq!(fault(&Rules { maxphyaddr: 40, ..plain }, 0x3000), (Fault::None, 1), "bit 52 is ignored");
    let write = Rules { kind: AccessKind::Write, ..plain };
    assert_eq!(fault(&write, 0x1000), (Fault::Forbidden, 1));
    assert_eq!(fault(&Rules { wp: false, ..write }, 0x1000), (Fault::None, 1));
    assert_eq!(fault(&Rules { user: true, ..plain }, 0x1000), (Fault::Forbidden, 1));
    assert_eq!(fault(&Rules { kind: AccessKind::Fetch, ..plain }, 0x1000), (Fault::Forbidden, 1));
    assert_eq!(fault(&Rules { nx: false, ..plain }, 0x1000), (Fault::Reserved, 1));
}

#[test]
fn tables_that_map_themselves_end() {
    let bytes = image(&[(0x1000, 0x1000 | P)], 0x2000);
    assert_eq!(found(&bytes, "4-level", &Rules::default(), 0x10).0.gpa, 0x1010);
    assert_eq!(found(&bytes, "5-level", &Rules::default(), 0x10).1.len(), 5);
}

#[test]
fn an_image_may_have_gaps_but_no_overlaps() {
    let (low, high) = (four_levels(), image(&[(0, 0x6000 | P)], 0x1000));
    let segment = |base, bytes| Segment { base, bytes };
    let parts = vec![segment(0x7_0000_0000, &high[..]), segment(0, &low[..])];
    let image = Image::new(parts).unwrap();
    let viewer = Viewer::new("4-level", &Rules::default()).unwrap();
    let walk = |gva| viewer.walk(&image, 0x1000, Gva(gva), |_| {});
    assert_eq!(walk(0x123).gpa, 0x9123);
    assert_eq!((walk(1 << 39).fault, walk(1 << 39).level), (Fault::NotInImage, 2));
    let text = |parts: Vec<Segment<'_>>| Image::new(parts).unwrap_err().0;
    assert!(
        text(vec![segment(0, &low), segment(0x5fff, &high)]).contains("0x5fff overlaps the one that ends at 0x6000")
    );
    assert!(text(vec![segment(u64::MAX - 8, &low)]).contains("beyond 2**64"));
}

/// Translates, and compares with single walks.
fn check(image: &Image<'_>, viewer: &Viewer, gvas: &[u64]) {
    let len = gvas.len();
    let (mut gpa, mut level, mut flags, mut fault) = (vec![1; len], vec![9; len], vec![9; len], vec![9; len]);
    let block = Block { gvas, gpa: &mut gpa, level: &mut level, flags: &mut flags, fault: &mut fault };
    viewer.translate(image, 0x1000, block);
    for (i, gva) in gvas.iter().enumerate() {
        let one = viewer.walk(image, 0x1000, Gva(*gva), |_| {});
        let batch = (gpa[i], level[i], flags[i], fault[i]);
        assert_eq!(batch, (one.gpa, one.level, one.flags, one.fault as u8), "address {i}, {gva:#x}, {image:x?}");
    }
}

#[test]
fn a_batch_finds_what_walks_find() {
    let bytes = four_levels();
    let image = Image::new(vec![Segment { base: 0, bytes: &bytes }]).unwrap();
    let gvas: Vec<u64> = (0..200).map(|i| [i << 10, i << 21, i << 39, i << 57][i as usize % 4]).collect();
    check(&image, &Viewer::new("4-level", &Rules::default()).unwrap(), &gvas);
}

/// Numbers that are the same each time (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.next().is_multiple_of(count)
    }

    /// Mostly a way on: to one of 16 tables; now and then to none, by a large page, with reserved bits.
    fn entry(&mut self) -> u64 {
        let table = (self.next() % if self.one_in(16) { 32 } else { 16 }) << 12;
        let rights = if self.one_in(4) { self.next() & 7 } else { 7 } | (self.next() & 0x160);
        let odd = [(1 << 7, 8), (1 << 63, 8), (1 << 45, 32), (1 << 14, 32), (1, 16)];
        odd.iter().fold(table | rights, |entry, (bits, rare)| entry ^ if self.one_in(*rare) { *bits } else { 0 })
    }

    /// Low ones of so many bits, some high ones, some that come again.
    fn addresses(&mut self, count: usize, bits: [u32; 2]) -> Vec<u64> {
        let high = [0xffff_8000_0000_0000, 0xff00_0000_0000_0000, 1 << 60, 1 << 47];
        let mut gvas: Vec<u64> = Vec::new();
        for _ in 0..count {
            let low = self.next() & ((1 << bits[self.next() as usize % 2]) - 1);
            let fresh = if self.one_in(8) { low | high[self.next() as usize % 4] } else { low };
            let known = gvas.get(self.next() as usize % (8 * count)).copied();
            gvas.push(known.unwrap_or(fresh));
        }
        gvas
    }
}

/// The same memory in one piece, in several, with gaps, and with pieces that begin where no entry does.
fn layouts(bytes: &[u8]) -> Vec<Image<'_>> {
    let cuts: [&[(usize, usize)]; 6] = [
        &[(0, 0x1_0000)],
        &[(0x1000, 0xe003)],
        &[(0, 0x8000), (0x8000, 0x1_0000)],
        &[(0, 0x3000), (0x4000, 0x9004), (0x9004, 0xf00c)],
        &[(0x804, 0x1_0000)],
        &[],
    ];
    let segment = |(from, to): &(usize, usize)| Segment { base: *from as u64, bytes: &bytes[*from..*to] };
    // The last addresses, where no table can be.
    let top = Segment { base: !0 << 12, bytes: &bytes[..0xfff] };
    let both = cuts.iter().flat_map(|cuts| {
        let low: Vec<_> = cuts.iter().map(segment).collect();
        [low.clone(), low.into_iter().chain([top]).collect()]
    });
    both.map(|parts| Image::new(parts).unwrap()).collect()
}

#[test]
fn batches_longer_than_a_stage_find_what_walks_find() {
    for (seed, mode) in ["4-level", "5-level", "pae", "32-bit"].into_iter().cycle().take(24).enumerate() {
        let mut numbers = Numbers(seed as u64);
        let (size, bits) = if seed % 4 < 2 { (8, [36, 56]) } else { (if mode == "pae" { 8 } else { 4 }, [30, 32]) };
        let entries = (0..0x1_0000 / size).map(|_| numbers.entry().to_le_bytes());
        let mut bytes: Vec<u8> = entries.flat_map(|entry| entry.into_iter().take(size)).collect();
        if mode == "pae" {
            bytes[0x1000..][..32].fill(0);
            for table in 0..3 {
                bytes[0x1000 + 8 * table..][..2].copy_from_slice(&[1, 0x20 + 0x10 * table as u8]);
            }
        }
        let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][seed % 3];
        let (user, nx) = (numbers.one_in(2), numbers.one_in(2));
        let rules = Rules { kind, user, nx, maxphyaddr: [40, 52][seed / 4 % 2], ..Rules::default() };
        let (viewer, gvas) = (Viewer::new(mode, &rules).unwrap(), numbers.addresses(2_500, bits));
        for image in layouts(&bytes) {
            check(&image, &viewer, &gvas);
        }
    }
}

#[test]
fn unknown_modes_and_widths_are_refused() {
    assert!(Viewer::new("6-level", &Rules::default()).unwrap_err().0.contains("choose one of 4-level"));
    assert!(Viewer::new("pae", &Rules { maxphyaddr: 53, ..Rules::default() }).unwrap_err().0.contains("53"));
}

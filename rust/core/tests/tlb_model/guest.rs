//! Random guests: edits of all tables with and without flushes, accesses of all kinds, changes of roots and modes.

use crate::decode::{Act, RECORD, act};
use crate::world::DATA;
use proptest::prelude::*;
use proptest::sample::select;
use shadowkvm_core::ops::{FLAG_AC, FLAG_USER, OpCode, Row};
use std::fmt;

/// What may happen beside the guest's own plain life.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    /// Host requests and instructions of every kind.
    pub(crate) host: bool,
    /// Entries with reserved bits, devices, tables as data.
    pub(crate) faulty: bool,
}

const NX: u64 = 1 << 63;

fn row(op: OpCode, addr: u64, value: u64) -> Row {
    Row { op, size: 8, flags: 0, vcpu: 0, site: 0, addr, value }
}

/// An index that is used often. Entry 15 is a device.
fn index() -> BoxedStrategy<u64> {
    prop_oneof![12 => 0u64..6, 3 => 6u64..15].boxed()
}

/// A page in the address spaces beside the identity map.
fn page() -> BoxedStrategy<u64> {
    (1u64..3, 0u64..3, prop_oneof![8 => 0u64..4, 2 => 4u64..16], index())
        .prop_map(|(l4, l3, l2, l1)| l4 << 39 | l3 << 30 | l2 << 21 | l1 << 12)
        .boxed()
}

fn data() -> BoxedStrategy<u64> {
    (DATA..DATA + 16).boxed()
}

fn flags() -> BoxedStrategy<u64> {
    let odd = select(vec![0x65, 0x61, 0x27, 0x23, 0x47, 0x07, 0x03, 0x25, NX | 0x67, NX | 0x65, 0x66, 0x167]);
    prop_oneof![4 => Just(0x67u64), 2 => Just(0x63u64), 4 => odd].boxed()
}

/// An entry that fits a table of `level`, or one that fits nowhere.
fn entry(level: u64, style: Style) -> BoxedStrategy<u64> {
    let at = |frame: BoxedStrategy<u64>| (frame, flags()).prop_map(|(gfn, flags)| gfn << 12 | flags).boxed();
    let large = select(vec![512u64 << 12 | 0xe7, 512 << 12 | 0xe3, 512 << 12 | 0xa5, NX | 512 << 12 | 0xe7]);
    let usual = match level {
        1 => prop_oneof![6 => at(data()), 1 => at((13u64..45).boxed()), 1 => at((1u64..13).boxed())].boxed(),
        2 => prop_oneof![5 => at((13u64..20).boxed()), 1 => large].boxed(),
        3 => at((11u64..13).boxed()),
        _ => at((9u64..11).boxed()),
    };
    if style.faulty {
        let odd = prop_oneof![
            2 => at((1u64..45).boxed()),
            1 => select(vec![1 << 51 | 0x67, 0xfe00_0067, 0x1000_0067, 513 << 12 | 0xe7, 0xe7, !0]),
        ];
        prop_oneof![12 => usual, 2 => Just(0), 2 => odd].boxed()
    } else {
        prop_oneof![12 => usual, 2 => Just(0)].boxed()
    }
}

/// The place of an entry in a table of `level`, by the identity map.
fn place(level: u64) -> BoxedStrategy<u64> {
    let table = match level {
        1 => 13u64..20,
        2 => 11..13,
        3 => 9..11,
        _ => 6..9,
    };
    let index = if level > 2 { (0u64..3).boxed() } else { index() };
    // A root keeps its way to the identity map.
    (table, index).prop_map(move |(table, i)| table << 12 | (if level == 4 { i.max(1) } else { i }) << 3).boxed()
}

fn level() -> BoxedStrategy<u64> {
    prop_oneof![10 => Just(1u64), 4 => Just(2u64), 1 => Just(3u64), 1 => Just(4u64)].boxed()
}

fn edit(style: Style) -> BoxedStrategy<Row> {
    let store = level().prop_flat_map(move |level| (place(level), entry(level, style)));
    let store = store.prop_map(|(place, entry)| row(OpCode::Write, place, entry));
    let bit = select(vec![2u64, 4, 0x20, 0x40, 1, NX, 0x1000]);
    let one_bit = (level().prop_flat_map(place), bit, any::<bool>()).prop_map(|(place, bit, set)| {
        row(if set { OpCode::Or } else { OpCode::And }, place, if set { bit } else { !bit })
    });
    prop_oneof![3 => store, 2 => one_bit].boxed()
}

/// An access by somebody, from somewhere.
fn touch() -> BoxedStrategy<Row> {
    use OpCode::{Fetch, Or, Read, Store, Write};
    let op = select(vec![Read, Read, Read, Write, Write, Write, Fetch, Store, Or]);
    let offset = prop_oneof![6 => (0u64..16).prop_map(|i| i << 3), 1 => select(vec![0xff8u64, 0xffd, 0x7fd])];
    let flags = prop_oneof![4 => Just(0u8), 3 => Just(FLAG_USER), 1 => Just(FLAG_AC)];
    let site = prop_oneof![8 => Just(0u32), 1 => Just(1u32), 1 => Just(3u32)];
    (op, page(), offset, flags, site, any::<u32>())
        .prop_map(|(op, page, offset, flags, site, value)| Row {
            flags,
            site,
            ..row(op, page | offset, u64::from(value) << 12 | 0x0dd)
        })
        .boxed()
}

fn control() -> BoxedStrategy<Row> {
    let low = prop_oneof![8 => Just(0u64), 1 => select(vec![1u64, 2, 1 << 63, 1 << 63 | 1])];
    let cr3 = (select(vec![1u64, 6, 7, 8]), low).prop_map(|(root, low)| row(OpCode::Cr3, 0, root << 12 | low));
    let cr0 = select(vec![0x8001_0033u64, 0x8000_0033]).prop_map(|value| row(OpCode::Cr0, 0, value));
    let cr4 = select(vec![0x20u64, 0x20, 0xa0, 0x10_0020, 0x20_0020, 0x30_0020, 0x2_0020, 0x2_00a0]);
    let cr4 = cr4.prop_map(|value| row(OpCode::Cr4, 0, value));
    let efer = select(vec![0xd00u64, 0xd00, 0x500]).prop_map(|value| row(OpCode::Efer, 0, value));
    let invlpg = page().prop_map(|addr| row(OpCode::Invlpg, addr, 0));
    prop_oneof![6 => cr3, 2 => cr0, 2 => cr4, 1 => efer, 6 => invlpg].boxed()
}

/// A page is used, its entry changes, it is used again; the guest may or may not flush between. The addresses of
/// table, entry and page belong together, so that the change matters.
fn remap(style: Style) -> BoxedStrategy<Vec<Row>> {
    let flush = prop_oneof![2 => Just(0u8), 2 => Just(1u8), 1 => Just(2u8)];
    (1u64..3, 0u64..14, index(), entry(1, style), flush, touch(), touch())
        .prop_map(|(l4, l2, l1, entry, flush, first, last)| {
            // world::build gives directory 11 the table 13 + (5 i + 16) mod 32, directory 12 the one without 16.
            let table = 13 + (l2 * 5 + if l4 == 1 { 16 } else { 0 }) % 32;
            let page = l4 << 39 | l2 << 21 | l1 << 12;
            let at = |row: Row| Row { addr: page | row.addr & 0xff8, ..row };
            let flush = match flush {
                0 => None,
                1 => Some(row(OpCode::Invlpg, page, 0)),
                _ => Some(row(OpCode::Cr3, 0, 0x6000)),
            };
            let edit = row(OpCode::Write, table << 12 | l1 << 3, entry);
            [Some(at(first)), Some(edit), Some(at(last)), flush, Some(at(first)), Some(at(last))]
                .into_iter()
                .flatten()
                .collect()
        })
        .boxed()
}

fn acts(style: Style) -> BoxedStrategy<Vec<Act>> {
    let single = prop_oneof![10 => touch(), 6 => edit(style), 4 => control()].prop_map(|row| vec![row]);
    let guest = prop_oneof![8 => single, 3 => remap(style)];
    let guest = (guest, prop_oneof![4 => Just(0u8), 1 => Just(1u8), 1 => Just(2u8)])
        .prop_map(|(rows, vcpu)| rows.into_iter().map(|row| (row, vcpu)).collect::<Vec<_>>());
    let guest = guest.prop_map(|rows| rows.into_iter().map(|(row, vcpu)| Act::Row(Row { vcpu, ..row })).collect());
    if !style.host {
        return guest.boxed();
    }
    let anything = any::<[u8; RECORD]>().prop_map(|record| vec![act(record, 1)]);
    prop_oneof![6 => guest, 1 => anything].boxed()
}

/// The two bytes of the machine, and what happens.
#[derive(Clone)]
pub(crate) struct Story {
    pub(crate) kind: u8,
    pub(crate) host: u8,
    pub(crate) acts: Vec<Act>,
}

impl fmt::Debug for Story {
    /// A line for each act.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kind {:#x} host {:#x}", self.kind, self.host)?;
        self.acts.iter().try_for_each(|act| match act {
            Act::Row(r) => {
                let who = (r.flags, r.vcpu, r.site);
                write!(f, "\n  {:?} {:x} = {:x} / {}, flags vcpu site {who:x?}", r.op, r.addr, r.value, r.size)
            }
            other => write!(f, "\n  {other:x?}"),
        })
    }
}

/// A story of that style.
pub(crate) fn story(style: Style) -> impl Strategy<Value = Story> {
    let acts =
        prop::collection::vec(acts(style), 1..120).prop_map(|acts| acts.into_iter().flatten().collect::<Vec<_>>());
    let host = if style.host { any::<u8>().boxed() } else { (0u8..16).boxed() };
    (any::<u8>(), host, acts).prop_map(|(kind, host, acts)| {
        let vcpus = 1 + (kind >> 1 & 3) % 3;
        let fit = |act| match act {
            Act::Row(row) => Act::Row(Row { vcpu: row.vcpu % vcpus, ..row }),
            other => other,
        };
        Story { kind, host, acts: acts.into_iter().map(fit).collect() }
    })
}

//! Random guests: edits of all tables with and without flushes, accesses of all kinds, changes of roots and modes.
//!
//! Addresses are those of 4-level paging; fuzz/src/adapt.rs turns them into what the vCPU's mode takes.

use crate::decode::{Act, Aim, RECORD, act};
use crate::world::{DATA, DESCRIPTORS, Machine, Paging, SLOT1};
use proptest::prelude::*;
use proptest::sample::select;
use shadowkvm_core::bits::{
    CR0_CD, CR0_NW, CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PKE, CR4_PSE, CR4_SMAP,
    CR4_SMEP, EFER_LME, EFER_NX,
};
use shadowkvm_core::ops::{FLAG_AC, FLAG_IMPLICIT, FLAG_USER, OpCode, Row};
use std::fmt;

/// What may happen beside the guest's own plain life.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    /// The mode in which all vCPUs begin; none: any, and any CPU.
    pub(crate) mode: Option<Paging>,
    /// The guest leaves its mode for another, in order or not.
    pub(crate) switches: bool,
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

fn flags() -> BoxedStrategy<u64> {
    let odd = select(vec![0x65, 0x61, 0x27, 0x23, 0x47, 0x07, 0x03, 0x25, NX | 0x67, NX | 0x65, 0x66, 0x167]);
    prop_oneof![4 => Just(0x67u64), 2 => Just(0x63u64), 4 => odd].boxed()
}

/// Bits that only some modes, or CPUs, allow: beyond the address width, ignored ones, protection keys.
fn odd_bits() -> BoxedStrategy<u64> {
    select(vec![1 << 36, 1 << 45, 1 << 51, 1 << 52, 1 << 58, 1 << 62, 1 << 59, 3 << 60, 1 << 7, 1 << 8]).boxed()
}

/// An entry that fits a table of `level`, or one that fits nowhere.
fn entry(level: u32, style: Style) -> BoxedStrategy<u64> {
    let at = |frame: BoxedStrategy<u64>| (frame, flags()).prop_map(|(gfn, flags)| gfn << 12 | flags).boxed();
    let large = select(vec![512u64 << 12 | 0xe7, 512 << 12 | 0xe3, 512 << 12 | 0xa5, NX | 512 << 12 | 0x1e7, 0xe7]);
    let usual = match level {
        1 => {
            let data = (DATA..DATA + 16).boxed();
            prop_oneof![6 => at(data), 1 => at((13u64..45).boxed()), 1 => at((1u64..13).boxed())].boxed()
        }
        2 => prop_oneof![5 => at((13u64..20).boxed()), 1 => large].boxed(),
        3 => prop_oneof![6 => at((11u64..13).boxed()), 1 => select(vec![0xe7, 0xa5, NX | 0xe7])].boxed(),
        4 => at((9u64..11).boxed()),
        _ => at(select(vec![1u64, 6, 7, 8]).boxed()),
    };
    if style.faulty {
        let odd = prop_oneof![
            2 => at((1u64..78).boxed()),
            1 => select(vec![1 << 51 | 0x67, 0xfe00_0067, 0x1000_0067, 513 << 12 | 0xe7, 0xe7, !0, SLOT1.0 | 0x67]),
            2 => (at((13u64..64).boxed()), odd_bits()).prop_map(|(entry, bits)| entry | bits),
        ];
        prop_oneof![12 => usual, 2 => Just(0), 2 => odd].boxed()
    } else {
        prop_oneof![12 => usual, 2 => Just(0)].boxed()
    }
}

/// The place of an entry in a table of `level`, by the identity map.
fn place(level: u32) -> BoxedStrategy<u64> {
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

fn level() -> BoxedStrategy<u32> {
    prop_oneof![10 => Just(1u32), 4 => Just(2u32), 2 => Just(3u32), 1 => Just(4u32)].boxed()
}

/// Stores to tables wherever they are, with no address in mind.
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
    let flags =
        prop_oneof![8 => Just(0u8), 6 => Just(FLAG_USER), 2 => Just(FLAG_AC), 1 => Just(FLAG_IMPLICIT | FLAG_AC)];
    let site = prop_oneof![8 => Just(0u32), 1 => Just(1u32), 1 => Just(3u32)];
    let somewhere = prop_oneof![
        60 => page(),
        // The upper half, the addresses about 4 GiB, what no mode has.
        1 => select(vec![511 << 39 | 0xffff << 48, 1 << 30, 0xffff_f000, 1 << 32, 0xffff_f000 << 32, 1 << 47, 1 << 56]),
    ];
    (op, somewhere, offset, flags, site, any::<u32>())
        .prop_map(|(op, page, offset, flags, site, value)| Row {
            flags,
            site,
            ..row(op, page | offset, u64::from(value) << 12 | 0x0dd)
        })
        .boxed()
}

fn control() -> BoxedStrategy<Act> {
    let low = prop_oneof![8 => Just(0u64), 2 => 1u64..4, 2 => (0u64..4).prop_map(|pcid| pcid | 1 << 63)];
    let cr3 = (select(vec![1u64, 6, 7, 8]), low).prop_map(|(root, low)| row(OpCode::Cr3, 0, root << 12 | low));
    let cr0 = select(vec![0x8001_0033u64, 0x8000_0033]).prop_map(|value| row(OpCode::Cr0, 0, value));
    let invlpg = page().prop_map(|addr| row(OpCode::Invlpg, addr, 0));
    let harmless = [
        (OpCode::Cr0, CR0_WP),
        (OpCode::Cr4, CR4_PGE),
        (OpCode::Cr4, CR4_SMEP),
        (OpCode::Cr4, CR4_SMAP),
        (OpCode::Cr4, CR4_SMAP | CR4_SMEP),
        (OpCode::Cr4, CR4_PCIDE),
        (OpCode::Cr4, CR4_PKE),
        (OpCode::Cr4, CR4_PSE),
        (OpCode::Efer, EFER_NX),
    ];
    let toggle = select(harmless.to_vec()).prop_map(|(op, bits)| Act::Toggle(0, op, bits));
    let invpcid = (0u64..5, 0u64..64).prop_map(|(kind, i)| Act::Invpcid(0, kind, DESCRIPTORS << 12 | i << 4));
    let pkru = any::<u8>().prop_map(|keys| Act::Pkru(0, u32::from(keys) << 2));
    let rows = prop_oneof![6 => cr3, 1 => cr0, 6 => invlpg].prop_map(Act::Row);
    prop_oneof![13 => rows, 4 => toggle, 2 => invpcid, 1 => pkru].boxed()
}

/// Another paging mode, by the book or by a bit that may or may not be changed as things are.
fn switch() -> BoxedStrategy<Act> {
    let mode = (0u8..8).prop_map(Paging::from_bits);
    let cr4 = select(vec![0, CR4_PSE, CR4_PGE, CR4_PSE | CR4_SMEP, CR4_SMAP, CR4_PCIDE, CR4_LA57, CR4_PSE | CR4_PGE]);
    let orderly = (mode.clone(), cr4.clone(), 0u64..4).prop_map(|(mode, cr4, i)| Act::Switch(0, mode, cr4, i));
    let bits = [
        (OpCode::Cr0, CR0_PG),
        (OpCode::Cr0, CR0_PE),
        (OpCode::Cr0, CR0_CD),
        (OpCode::Cr0, CR0_NW),
        (OpCode::Cr0, CR0_CD | CR0_NW),
        (OpCode::Cr0, 1 << 40),
        (OpCode::Cr4, CR4_PAE),
        (OpCode::Cr4, CR4_PSE),
        (OpCode::Cr4, CR4_LA57),
        (OpCode::Cr4, CR4_PCIDE),
        (OpCode::Cr4, 1 << 25),
        (OpCode::Efer, EFER_LME),
        (OpCode::Efer, 1 << 10),
        (OpCode::Efer, 1 << 12),
    ];
    let toggle = select(bits.to_vec()).prop_map(|(op, bits)| Act::Toggle(0, op, bits));
    let sregs =
        (mode, cr4, 0u64..4, prop_oneof![3 => Just((OpCode::Mark, 0)), 1 => select(bits.to_vec())], any::<bool>());
    let sregs = sregs.prop_map(|(mode, cr4, i, (op, bit), cs_l)| {
        let mut regs = mode.registers(i, cr4);
        regs.cs_l &= cs_l;
        match op {
            OpCode::Cr0 => regs.cr0 ^= bit,
            OpCode::Cr4 => regs.cr4 ^= bit,
            OpCode::Efer => regs.efer ^= bit,
            _ => {}
        }
        Act::Sregs(0, regs)
    });
    let cr3 = (0u8..8, 0u64..4, select(vec![0u64, 0, 0x18, 1, 1 << 63, 1 << 45]));
    let cr3 = cr3.prop_map(|(mode, i, low)| Act::Row(row(OpCode::Cr3, 0, Paging::from_bits(mode).root(i) | low)));
    prop_oneof![4 => orderly, 4 => toggle, 2 => sregs, 1 => cr3].boxed()
}

/// A page is used, an entry on the way to it changes, it is used again; the guest may or may not flush between.
fn remap(style: Style) -> BoxedStrategy<Vec<Act>> {
    let flush = prop_oneof![2 => Just(None), 2 => Just(Some(OpCode::Invlpg)), 1 => Just(Some(OpCode::Cr3))];
    let level = prop_oneof![10 => Just(1u32), 4 => Just(2u32), 2 => Just(3u32), 1 => Just(4u32), 1 => Just(5u32)];
    let bit = select(vec![1, 2, 4, 0x20, 0x40, 0x80, 0x100, NX, 0x1000, 0x2000]);
    let bit = if style.faulty { prop_oneof![4 => bit, 1 => odd_bits()].boxed() } else { bit.boxed() };
    let change = prop_oneof![
        3 => level.clone().prop_flat_map(move |level| (Just(level), Just(OpCode::Write), entry(level, style))),
        1 => (level, Just(OpCode::Xor), bit),
    ];
    (page(), change, flush, touch(), touch(), prop::bool::weighted(0.2))
        .prop_map(|(page, (level, op, value), flush, first, last, other)| {
            let at = |row: Row| Act::Row(Row { addr: page | row.addr & 0xff8, ..row });
            let aim = Aim { vcpu: 0, editor: u8::from(other), gva: page, level, op, value, used: false, flush: None };
            let flush = flush.map(|op| match op {
                OpCode::Invlpg => Act::Row(row(op, page, 0)),
                _ => Act::Row(row(op, 0, 0x6000)),
            });
            let acts = [Some(at(first)), Some(Act::Aim(aim)), Some(at(last)), flush, Some(at(first)), Some(at(last))];
            acts.into_iter().flatten().collect()
        })
        .boxed()
}

/// The same act by another vCPU.
fn by(act: Act, vcpu: u8, vcpus: u8) -> Act {
    let id = usize::from(vcpu);
    match act {
        Act::Row(row) => Act::Row(Row { vcpu, ..row }),
        Act::Aim(aim) => Act::Aim(Aim { vcpu, editor: (vcpu + aim.editor) % vcpus, ..aim }),
        Act::Toggle(_, op, bits) => Act::Toggle(id, op, bits),
        Act::Switch(_, mode, cr4, i) => Act::Switch(id, mode, cr4, i),
        Act::Sregs(_, regs) => Act::Sregs(id, regs),
        Act::Invpcid(_, kind, gva) => Act::Invpcid(id, kind, gva),
        Act::Pkru(_, value) => Act::Pkru(id, value),
        other => other,
    }
}

/// Acts of one vCPU: 0 to 2, of which a machine may have fewer.
fn acts(style: Style) -> BoxedStrategy<(u8, Vec<Act>)> {
    let rows = prop_oneof![10 => touch(), 6 => edit(style)].prop_map(Act::Row);
    let single = prop_oneof![16 => rows, 4 => control()].prop_map(|act| vec![act]);
    let guest = prop_oneof![8 => single, 3 => remap(style)].boxed();
    let guest =
        if style.switches { prop_oneof![10 => guest, 1 => switch().prop_map(|act| vec![act])].boxed() } else { guest };
    let guest = (prop_oneof![4 => Just(0u8), 1 => Just(1u8), 1 => Just(2u8)], guest);
    if !style.host {
        return guest.boxed();
    }
    let anything = any::<[u8; RECORD]>().prop_map(|record| (0, vec![act(record, 1)]));
    prop_oneof![6 => guest, 1 => anything].boxed()
}

fn machine(style: Style) -> BoxedStrategy<Machine> {
    let modes = match style.mode {
        None => any::<u8>().boxed(),
        // In both fields; the upper bits are code segments.
        Some(Paging::Four) => Just(0u8).boxed(),
        Some(Paging::Five) => Just(0o11u8).boxed(),
        Some(Paging::Pae) => Just(0o33u8).boxed(),
        Some(Paging::Two) => Just(0o55u8).boxed(),
        Some(Paging::Off) => Just(0o77u8).boxed(),
    };
    let host = if style.host { any::<u8>().boxed() } else { (0u8..16).boxed() };
    // The CPU as it is in the profile, or any; 5-level paging needs one that has it.
    let features = prop_oneof![1 => Just(0u8), 1 => any::<u8>()];
    let five = style.mode == Some(Paging::Five);
    (any::<u8>(), host, modes, features, any::<u8>(), any::<u8>())
        .prop_map(move |(kind, host, modes, features, bits, pkru)| {
            let (kind, features) = if five { (kind & !1, features & 0x7f) } else { (kind, features) };
            Machine { kind, host: host | 0x80, more: [modes, features, bits, pkru] }
        })
        .boxed()
}

/// The machine, and what happens.
#[derive(Clone)]
pub(crate) struct Story {
    pub(crate) machine: Machine,
    pub(crate) acts: Vec<Act>,
}

impl fmt::Debug for Story {
    /// A line for each act.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x?}", self.machine)?;
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
    (machine(style), prop::collection::vec(acts(style), 1..120)).prop_map(|(machine, acts)| {
        let vcpus = machine.vcpus() as u8;
        let acts =
            acts.into_iter().flat_map(|(vcpu, acts)| acts.into_iter().map(move |act| by(act, vcpu % vcpus, vcpus)));
        Story { machine, acts: acts.collect() }
    })
}

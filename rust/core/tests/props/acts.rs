//! Random things that guest and host do: single operations, and bursts that take a few in a row to get anywhere.

use crate::world::{HUGE, Op, POOL, Rules, SLOT1, TABLE_IN_SLOT1, entry, index, pool_frame};
use proptest::prelude::*;
use proptest::sample::select;
use shadowkvm_core::memory::HostState;
use shadowkvm_core::ops::{OpCode, Row};

fn row(op: OpCode, addr: u64, value: u64, size: u8) -> Row {
    Row { op, size, flags: 0, vcpu: 0, site: 0, addr, value }
}

/// A place in some table, by the identity map, mostly on an entry.
fn table_address() -> BoxedStrategy<u64> {
    let frame = prop_oneof![12 => pool_frame(), 1 => 1u64..8];
    let skew = prop_oneof![16 => Just(0u64), 1 => 1u64..8, 1 => Just(4u64)];
    (frame, index(), skew).prop_map(|(frame, index, skew)| (frame << 12 | index << 3) + skew).boxed()
}

/// An address under the tables of the pool.
fn mapped_address() -> BoxedStrategy<u64> {
    let top = prop_oneof![20 => 1u64..4, 1 => 4u64..8, 1 => Just(511u64)];
    let offset =
        prop_oneof![8 => Just(0u64), 3 => index().prop_map(|i| i << 3), 1 => select(vec![0xffc, 0xfff, 0xff8, 0x7fd])];
    (top, prop_oneof![12 => 0u64..4, 1 => Just(4)], 0u64..9, index(), offset)
        .prop_map(|(l4, l3, l2, l1, offset)| {
            let low = l4 << 39 | l3 << 30 | l2 << 21 | l1 << 12 | offset;
            if l4 > 255 { low | 0xffff << 48 } else { low }
        })
        .boxed()
}

fn address() -> BoxedStrategy<u64> {
    prop_oneof![
        12 => mapped_address(),
        4 => table_address(),
        3 => (0x100u64..0x110).prop_map(|gfn| gfn << 12),
        1 => select(vec![1 << 47, 1 << 63, !0, 0x7fff_ffff_ffff, 0x7fff_ffff_fffd, 0xf000_0000]),
    ]
    .boxed()
}

/// Accesses of every kind, everywhere.
fn touch() -> BoxedStrategy<Row> {
    use OpCode::{Cmpxchg, Fetch, Or, Read, Store, Write, Xchg};
    let op = select(vec![Read, Read, Read, Write, Write, Write, Fetch, Fetch, Store, Or, Xchg, Cmpxchg]);
    let size = prop_oneof![10 => Just(8u8), 2 => Just(4u8), 1 => 1u8..8];
    (op, address(), size, 0u64..1 << 20).prop_map(|(op, addr, size, value)| row(op, addr, value, size)).boxed()
}

/// A change of a table entry that fits the table's level.
fn edit(rules: Rules) -> BoxedStrategy<Row> {
    use OpCode::{Add, And, Or, Store, Write, Xchg, Xor};
    let op = || prop_oneof![8 => Just(Write), 2 => select(vec![Xchg, Store, Or, And, Xor, Add])];
    let one = |level: usize| {
        (op(), POOL[level - 1].clone(), index(), entry(level, rules))
            .prop_map(|(op, frame, index, value)| row(op, frame << 12 | index << 3, value, 8))
    };
    let odd = (op(), table_address(), prop_oneof![1u8..8, Just(8)], any::<u64>());
    let odd = odd.prop_map(|(op, addr, size, value)| row(op, addr, value, size));
    let wide = table_address().prop_map(|addr| row(Store, addr, 0, 16));
    prop_oneof![12 => one(1), 5 => one(2), 3 => one(3), 2 => one(4), 2 => odd, 1 => wide].boxed()
}

/// Who makes an access: FLAG_USER, FLAG_AC, FLAG_IMPLICIT, FLAG_DELIVERY, FLAG_KEEP; and from where.
fn by_somebody(row: BoxedStrategy<Row>) -> BoxedStrategy<Row> {
    let flags = prop_oneof![12 => Just(0u8), 3 => Just(1u8), 1 => select(vec![4, 5, 16, 32, 33, 64, 65])];
    let site = prop_oneof![12 => Just(0u32), 6 => Just(1u32), 2 => Just(2u32), 1 => 3u32..6];
    (row, flags, site).prop_map(|(row, flags, site)| Row { flags, site, ..row }).boxed()
}

fn control() -> BoxedStrategy<Row> {
    let root = prop_oneof![6 => Just(1u64), 30 => POOL[3].clone(), 1 => select(vec![0xfe000, 0x1c, 4])];
    let low = prop_oneof![10 => Just(0u64), 1 => select(vec![0x18, 1, 2, 1 << 63, 1 << 63 | 1])];
    let cr3 = (root, low).prop_map(|(root, low)| row(OpCode::Cr3, 0, root << 12 | low, 8));
    let cr0 = select(vec![0x8001_0033, 0x8001_0033, 0x8000_0033, 0x8001_003b, 0xc001_0033, 0x33]);
    let cr4 =
        select(vec![0x20, 0x20, 0x20, 0x20, 0x20, 0xa0, 0x10_0020, 0x20_0020, 0x30_00a0, 0x2_0020, 0x30, 0x1020, 0]);
    let efer = select(vec![0xd00, 0xd00, 0xd00, 0x500, 0xd01, 0]);
    let invlpg = address().prop_map(|addr| row(OpCode::Invlpg, addr, 0, 8));
    let exit = select(vec![OpCode::Hlt, OpCode::Io, OpCode::Clts, OpCode::Mark]).prop_map(|op| row(op, 0, 0, 8));
    prop_oneof![
        12 => cr3,
        2 => cr0.prop_map(|value| row(OpCode::Cr0, 0, value, 8)),
        2 => cr4.prop_map(|value| row(OpCode::Cr4, 0, value, 8)),
        1 => efer.prop_map(|value| row(OpCode::Efer, 0, value, 8)),
        8 => invlpg,
        1 => exit,
    ]
    .boxed()
}

/// What the host does that changes no byte of guest memory.
fn quiet_host() -> BoxedStrategy<Row> {
    let slot = || select(vec![0u64, 0, 1]);
    prop_oneof![
        2 => (slot(), 0u64..2).prop_map(|(slot, on)| row(OpCode::SetDirtyLog, slot, on, 0)),
        3 => slot().prop_map(|slot| row(OpCode::GetDirtyLog, 0, slot, 0)),
        1 => select(vec![64u64, 64, 70, 200]).prop_map(|pages| row(OpCode::Quota, 0, pages, 0)),
    ]
    .boxed()
}

fn loud_host(rules: Rules) -> BoxedStrategy<Op> {
    let gpa = || {
        prop_oneof![3 => pool_frame(), 1 => 1u64..8, 4 => 0x100u64..0x110, 2 => 0x400u64..0x408]
            .prop_map(|gfn| gfn << 12)
    };
    let unmap = (gpa(), 1u64..4).prop_map(|(gpa, pages)| row(OpCode::Unmap, gpa, pages << 12, 0));
    let write = (POOL[0].clone(), index(), entry(1, rules))
        .prop_map(|(frame, index, value)| row(OpCode::HostWrite, frame << 12 | index << 3, value, 8));
    let add = (0u8..3).prop_map(|flags| Row { flags, ..row(OpCode::SlotAdd, SLOT1.0, SLOT1.1, 1) });
    let delete = Just(row(OpCode::SlotDel, 0, 0, 1));
    let state = select(vec![HostState::Absent, HostState::Zero, HostState::Writable]);
    let small = (gpa(), state).prop_map(|(gpa, state)| Op::HostPages(gpa, 0x1000, state));
    let huge = select(HUGE.to_vec()).prop_map(|gpa| Op::HostPages(gpa, 0x20_0000, HostState::Huge2m));
    let rows = prop_oneof![3 => unmap, 3 => write, 3 => add, 2 => delete].prop_map(Op::Row);
    prop_oneof![6 => rows, 2 => small, 1 => huge].boxed()
}

/// Several reads or writes side by side: fills tables, uses up the quota.
fn sweep() -> BoxedStrategy<Vec<Row>> {
    let stride = select(vec![1u64 << 12, 1 << 12, 1 << 15, 1 << 21, 1 << 21]);
    let op = select(vec![OpCode::Read, OpCode::Read, OpCode::Write]);
    (op, mapped_address(), stride, 2u64..24)
        .prop_map(|(op, start, stride, times)| (0..times).map(|i| row(op, (start + i * stride) & !7, i, 8)).collect())
        .boxed()
}

/// Edits of one table in a row, then what makes the guest see them: the way of fork and munmap.
fn remap(rules: Rules) -> BoxedStrategy<Vec<Row>> {
    let level = || prop_oneof![4 => Just(1usize), 2 => Just(2), 1 => Just(3)];
    let edits = level().prop_flat_map(move |level| {
        let entries = prop::collection::vec((index(), entry(level, rules)), 2..8);
        (POOL[level - 1].clone(), entries)
    });
    let seen = prop_oneof![3 => control().prop_map(Some), 1 => Just(None)];
    (edits, seen, prop::collection::vec(mapped_address(), 0..4))
        .prop_map(|((frame, entries), seen, after)| {
            let edits = entries.into_iter().map(|(i, value)| row(OpCode::Write, frame << 12 | i << 3, value, 8));
            let after = after.into_iter().map(|addr| row(OpCode::Read, addr & !7, 0, 8));
            edits.chain(seen).chain(after).collect()
        })
        .boxed()
}

/// A page goes through another of its lives: a device, then RAM, its table unsync or in a read-only slot.
fn slot_tale() -> BoxedStrategy<Vec<Row>> {
    (POOL[0].clone(), POOL[1].clone(), index(), 0u8..3, any::<bool>())
        .prop_map(|(table, directory, i, flags, table_in_slot)| {
            let entry = if table_in_slot { (directory, TABLE_IN_SLOT1) } else { (table, TABLE_IN_SLOT1 + 1) };
            vec![
                row(OpCode::Write, entry.0 << 12 | i << 3, entry.1 << 12 | 0x67, 8),
                Row { flags, ..row(OpCode::SlotAdd, SLOT1.0, SLOT1.1, 1) },
            ]
        })
        .boxed()
}

/// One or more ops.
pub(crate) fn acts(rules: Rules) -> BoxedStrategy<Vec<Op>> {
    let single = prop_oneof![
        16 => by_somebody(touch()),
        10 => by_somebody(edit(rules)),
        8 => control(),
        1 => quiet_host(),
    ];
    let burst = prop_oneof![3 => sweep(), 4 => remap(rules)];
    let again = (by_somebody(touch()), 2usize..4).prop_map(|(row, times)| vec![row; times]);
    let rows = prop_oneof![16 => single.prop_map(|row| vec![row]), 4 => burst, 2 => again];
    let guest = (rows, prop::bool::weighted(0.25)).prop_map(|(rows, second)| {
        let vcpu = u8::from(second);
        rows.into_iter().map(|row| Op::Row(Row { vcpu, ..row })).collect()
    });
    if !rules.host {
        return guest.boxed();
    }
    let loud = loud_host(rules).prop_map(|op| vec![op]);
    let tale = slot_tale().prop_map(|rows| rows.into_iter().map(Op::Row).collect());
    prop_oneof![30 => guest, 2 => loud, 1 => tale].boxed()
}

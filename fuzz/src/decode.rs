//! What the bytes of an input mean: two for the machine, then six for each thing that happens.
//!
//! Every input means something, and each record stands for itself, so that the fuzzer can cut and splice them.

use crate::world::{DATA, DESCRIPTORS, MEMORY, PML5, Paging, SITES, SLOT1, TABLES};
use shadowkvm_core::bits::{
    CR0_CD, CR0_NW, CR0_PE, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PKE, CR4_PSE, CR4_SMAP,
    CR4_SMEP, EFER_LME, EFER_NX,
};
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::fault::insn::{Action, Insn, RmwKind};
use shadowkvm_core::memory::HostState;
use shadowkvm_core::ops::{FLAG_AC, FLAG_DELIVERY, FLAG_IMPLICIT, FLAG_KEEP, FLAG_USER, OpCode, Row};

/// Bytes of one record.
pub const RECORD: usize = 6;
/// Records after which the rest is ignored: what takes more is found in pieces.
pub const MAX_RECORDS: usize = 400;

/// One thing that happens.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// A row of a trace.
    Row(Row),
    /// An instruction that no row can say: REP STOS, CMPXCHG that compares, an instruction over a page end.
    Insn(usize, Insn),
    /// The host's pages change: gpa, bytes, state.
    HostPages(u64, u64, HostState),
    /// KVM_SET_SREGS.
    Sregs(usize, Registers),
    /// The host writes a whole table.
    Table(u64, u64),
    /// Loads from one page in each of the 2 MiB from there on.
    Sweep(Row, u64),
    /// The guest leaves its paging mode for another one, with these bits of CR4, into address space `.3`.
    Switch(usize, Paging, u64, u64),
    /// Some bits of CR0, CR4 or EFER change.
    Toggle(usize, OpCode, u64),
    /// INVPCID of that type with its descriptor there.
    Invpcid(usize, u64, u64),
    /// WRPKRU.
    Pkru(usize, u32),
    /// A change of the entry that leads to an address.
    Aim(Aim),
}

/// A change of the entry that leads to an address, perhaps with a use before it and a flush after.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// Whose tables.
    pub vcpu: u8,
    /// Who stores to them.
    pub editor: u8,
    /// The address.
    pub gva: u64,
    /// The level of the entry, or above it the top one.
    pub level: u32,
    /// Write, or XOR of some bits.
    pub op: OpCode,
    /// What is written.
    pub value: u64,
    /// The page is read before.
    pub used: bool,
    /// What follows: nothing, INVLPG, the same CR3 again.
    pub flush: Option<OpCode>,
}

const OPS: [OpCode; 32] = {
    use OpCode::{
        Add, And, Cmpxchg, Cr0, Cr3, Cr4, Efer, Fetch, Hlt, HostWrite, Invlpg, Io, Or, Quota, Read, SlotAdd, Store,
        Unmap, Write, Xchg, Xor,
    };
    [
        Read, Read, Read, Read, Write, Write, Write, Write, Write, Write, Fetch, Store, Store, Or, And, Xor, Add, Xchg,
        Cmpxchg, Invlpg, Invlpg, Cr3, Cr3, Cr0, Cr4, Efer, Hlt, Io, HostWrite, Unmap, Quota, SlotAdd,
    ]
};
const FLAGS: [u64; 16] =
    [0x67, 0x67, 0x63, 0x65, 0x61, 0x27, 0x07, 0x03, 0xe7, 0xe3, 0xa5, 0x23, 0x00, 0x66, 0x1067, 0x167];
// Bit 38 is beyond 36 physical address bits, bit 59 is the lowest of a protection key, bit 55 is ignored in long mode.
const TOPS: [u64; 8] = [0, 0, 1 << 38, 1 << 59, 1 << 55, 1 << 63, 1 << 45, 1 << 51];
/// Bits of an entry that may flip.
const FLIPS: [u64; 16] = {
    let bits = [0, 1, 2, 5, 6, 7, 8, 63, 12, 13, 17, 21, 38, 51, 55, 60];
    let mut flips = [0; 16];
    let mut i = 0;
    while i < 16 {
        flips[i] = 1 << bits[i];
        i += 1;
    }
    flips
};
const TOGGLES: [(OpCode, u64); 16] = [
    (OpCode::Cr0, CR0_PG),
    (OpCode::Cr0, CR0_WP),
    (OpCode::Cr0, CR0_CD),
    (OpCode::Cr0, CR0_NW | CR0_CD),
    (OpCode::Cr0, CR0_PE),
    (OpCode::Cr4, CR4_PSE),
    (OpCode::Cr4, CR4_PAE),
    (OpCode::Cr4, CR4_PGE),
    (OpCode::Cr4, CR4_LA57),
    (OpCode::Cr4, CR4_PCIDE),
    (OpCode::Cr4, CR4_SMEP),
    (OpCode::Cr4, CR4_SMAP),
    (OpCode::Cr4, CR4_PKE),
    (OpCode::Cr4, CR4_PSE | CR4_PGE),
    (OpCode::Efer, EFER_LME),
    (OpCode::Efer, EFER_NX),
];
const OFFSETS: [u64; 8] = [0, 0, 8, 0x10, 0x68, 0x44, 0xff8, 0xffd];
const SPECIAL: [u64; 8] = [
    0x7fff_ffff_f000,
    0x7fff_ffff_fffc,
    1 << 47,
    0xffff_8000_0000_0000,
    0xffff_ffff_ffff_fffc,
    1 << 30,
    1 << 21 | 0x1ff000,
    0xfee0_0000,
];
const CR0S: [u64; 16] = [
    0x8001_0033,
    0x8001_0033,
    0x8000_0033,
    0x8000_0033,
    0x8001_003b,
    0xc001_0033,
    0xe001_0033,
    0x33,
    0x1_0033,
    0x11,
    0x8001_0032,
    0xa001_0033,
    1 << 32 | 0x8001_0033,
    0x8005_0033,
    0x8001_1033,
    0xc000_0013,
];
const CR4S: [u64; 32] = [
    0x20,
    0x20,
    0xa0,
    0x10_0020,
    0x20_0020,
    0x30_0020,
    0x30_00a0,
    0x2_0020,
    0x2_00a0,
    0x22_0020,
    0x30,
    0x1020,
    0,
    0x40_0020,
    1 << 33 | 0x20,
    0x7ff,
    0x10,
    0x90,
    0x10_0010,
    0x20_0000,
    0x30_0030,
    0x1020,
    0x10a0,
    0x30_1020,
    0x2_1020,
    0x22_10a0,
    0x2_0000,
    0x40_1020,
    0x80,
    0x1000,
    0xb0,
    0x30_0010,
];
const EFERS: [u64; 16] =
    [0xd00, 0xd00, 0x500, 0x500, 0xd01, 0, 0xc00, 0x1d00, 0x800, 0x900, 0x100, 0x400, 0x4d01, 0xd02, 0x1, 0x801];
const STATES: [HostState; 4] = [HostState::Writable, HostState::Huge2m, HostState::Absent, HostState::Zero];

/// A gva from two bytes.
fn address(a: u8, b: u8) -> u64 {
    let (low, b64) = (u64::from(a & 0x3f), u64::from(b));
    match a >> 6 {
        // An entry of a table, through the identity map.
        0 | 1 if a & 0x20 == 0 => {
            let place = match b >> 5 {
                0..=3 => (b64 & 0xf) << 3,
                4 => (b64 & 0x1f) << 3,
                5 => (511 - (b64 & 0x1f)) << 3,
                6 => (b64 & 3) << 3 | b64 >> 2 & 7,
                _ => 0xff8 | b64 & 7,
            };
            let table = u64::from(a & 0x1f) | u64::from(a & 0x40) >> 1;
            let frame = if table < TABLES { 1 + table } else { PML5 + (table - TABLES) % (DESCRIPTORS - PML5) };
            frame << 12 | place
        }
        // In one of the other address spaces.
        0..=2 => {
            // Mostly where a PDPT has an entry.
            let l3 = [0, 1, 0, 2][usize::from(a >> 3 & 3)];
            let (l4, l2) = (1 + u64::from(a >> 6 & 1), u64::from(a & 7) | b64 >> 1 & 8);
            l4 << 39 | l3 << 30 | l2 << 21 | (b64 & 0xf) << 12 | OFFSETS[usize::from(b >> 5)]
        }
        // Data, through the identity map.
        _ if a & 0x20 == 0 => (DATA + (low & 0xf)) << 12 | b64 << 3,
        _ if a & 0x10 == 0 => MEMORY / 2 + ((low & 7) << 12) + (b64 << 3),
        _ => SPECIAL[usize::from(a & 7)].wrapping_add(b64 << 3 & 0x38),
    }
}

/// A frame from one byte: tables, data, the large page, the second slot, devices.
fn frame(a: u8) -> u64 {
    let low = u64::from(a & 0x1f);
    match a >> 5 {
        2 if u64::from(a) >= PML5 && u64::from(a) < DESCRIPTORS => u64::from(a),
        0..=2 => u64::from(a) % (TABLES + 1),
        3 | 4 => DATA + (low & 0xf),
        5 => 512 + if low < 8 { 0 } else { low },
        6 => (SLOT1.0 >> 12) + (low & 0xf),
        _ => 0xfe000 + (low & 3),
    }
}

/// An entry of a guest table from two bytes.
fn entry(a: u8, b: u8) -> u64 {
    frame(a) << 12 | FLAGS[usize::from(b & 15)] | TOPS[usize::from(b >> 4 & 7)]
}

fn row(op: OpCode, who: u8, vcpus: usize) -> Row {
    let flags = [0, 0, 0, 0, FLAG_USER, FLAG_USER, FLAG_AC, FLAG_IMPLICIT];
    let mut flags = flags[usize::from(who >> 2 & 7)];
    // Bits 5 to 7: mostly no address of the instruction; else what would be rare or strange.
    let site = match who >> 5 {
        0..=3 => 0,
        4 => 1,
        5 => 3,
        6 => u32::from(who >> 2 & 7),
        _ => {
            flags |= if who & 4 == 0 { FLAG_KEEP } else { FLAG_DELIVERY };
            0
        }
    };
    Row { op, size: 8, flags, vcpu: (usize::from(who & 3) % vcpus) as u8, site, addr: 0, value: 0 }
}

const fn size(b: u8) -> u8 {
    // Bit 7 of an entry's flag byte is free.
    if b < 128 { 8 } else { [4, 4, 1, 2, 3, 5, 7, 16][(b & 7) as usize] }
}

/// What a record stands for.
#[must_use]
pub fn act(record: [u8; RECORD], vcpus: usize) -> Act {
    let [kind, who, a, b, c, d] = record;
    let op = OPS[usize::from(kind & 31)];
    let base = row(op, who, vcpus);
    let vcpu = usize::from(base.vcpu);
    if kind & 0xe0 == 0xe0 {
        return if kind & 8 == 0 { rare(record, base) } else { modes(record, base, vcpus) };
    }
    Act::Row(match op {
        OpCode::Cr0 => Row { value: CR0S[usize::from(c & 15)], ..base },
        OpCode::Cr4 => Row { value: CR4S[usize::from(c & 31)], ..base },
        OpCode::Efer => Row { value: EFERS[usize::from(c & 15)], ..base },
        OpCode::Cr3 => {
            let low = [0, 0, 0, 0, 0x18, 1, 1 << 63, 1 << 63 | 1][usize::from(d & 7)];
            let root = if c < 248 { [1, 6, 7, 8][usize::from(c & 3)] } else { frame(c << 4) };
            Row { value: root << 12 | low, ..base }
        }
        OpCode::Quota => Row { value: 64 + u64::from(c & 15), ..base },
        OpCode::SlotAdd => slot(base, c),
        OpCode::Unmap => Row { addr: frame(a) << 12, value: u64::from(1 + (b & 3)) << 12, ..base },
        OpCode::HostWrite => {
            Row { addr: frame(a) << 12 | u64::from(b & 0xf) << 3, value: entry(c, d), vcpu: vcpu as u8, ..base }
        }
        OpCode::Store => Row { addr: address(a, b), value: entry(c, d), size: size(d), ..base },
        OpCode::Or | OpCode::And | OpCode::Xor => {
            let bit = 1u64 << [0, 1, 2, 5, 6, 7, 63, 12][usize::from(c & 7)];
            Row { addr: address(a, b), value: if op == OpCode::And { !bit } else { bit }, size: size(d) & 15, ..base }
        }
        _ => Row { addr: address(a, b), value: entry(c, d), size: size(d).min(8), ..base },
    })
}

fn slot(base: Row, c: u8) -> Row {
    let log = Row { addr: u64::from(c >> 3 & 1), value: u64::from(c >> 4 & 1), ..base };
    match c & 7 {
        0 | 1 => Row { addr: SLOT1.0, value: SLOT1.1, size: 1, flags: c >> 3 & 3, ..base },
        2 => Row { op: OpCode::SlotDel, size: 1, ..base },
        3 if c > 192 => Row { op: OpCode::SlotDel, size: 0, ..base },
        4 if c > 128 => Row { addr: 0, value: MEMORY, size: 0, flags: 0, ..base },
        3..=5 => Row { op: OpCode::SetDirtyLog, ..log },
        _ => Row { op: OpCode::GetDirtyLog, value: u64::from(c >> 3 & 1), ..base },
    }
}

/// Things that are not a row.
fn rare(record: [u8; RECORD], base: Row) -> Act {
    let [kind, _, a, b, c, d] = record;
    let vcpu = usize::from(base.vcpu);
    let rip = SITES[base.site as usize];
    let user = base.flags & FLAG_USER != 0;
    let insn = |action: Action, length: u8| Insn {
        value: entry(c, d),
        user,
        rip: (rip != 0).then_some(rip),
        length,
        ..Insn::new(action, address(a, b), size(d).min(8))
    };
    match kind & 7 {
        0 | 1 => Act::Insn(
            vcpu,
            Insn { rep: true, writes_tables: false, repeat: 1 + u32::from(c & 31), value: 0, ..insn(Action::Store, 3) },
        ),
        2 => Act::Insn(vcpu, Insn { expected: Some(u64::from(c & 1)), ..insn(Action::Rmw(RmwKind::Cmpxchg), 5) }),
        3 => Act::Insn(vcpu, insn(Action::Store, 1 + (c & 7))),
        4 => Act::Insn(
            vcpu,
            Insn { locked: false, ..insn(Action::Rmw([RmwKind::Or, RmwKind::Add][usize::from(c & 1)]), 4) },
        ),
        5 => {
            let state = STATES[usize::from(c & 3)];
            // Huge pages and small ones come for a whole 2 MiB.
            let (gpa, bytes) = if state.writable() {
                (u64::from(a & 1) << 21, 2 << 20)
            } else {
                (frame(a) << 12, u64::from(1 + (b & 7)) << 12)
            };
            Act::HostPages(gpa, bytes, state)
        }
        6 => {
            let cr3 = [1u64, 6, 7, 8][usize::from(a & 3)] << 12;
            let regs = Registers {
                cr0: CR0S[usize::from(c & 7)],
                cr3,
                cr4: CR4S[usize::from(d & 15)],
                efer: EFERS[usize::from(b & 7)],
                cs_l: true,
            };
            Act::Sregs(vcpu, regs)
        }
        _ if c & 3 != 0 => Act::Sweep(Row { op: OpCode::Read, addr: address(a & 0x7f | 0x20, b) & !7, ..base }, 16),
        _ => Act::Table(1 + u64::from(a) % TABLES, entry(c, d)),
    }
}

/// Changes of the paging mode and of what belongs to one mode only.
fn modes(record: [u8; RECORD], base: Row, vcpus: usize) -> Act {
    let [kind, who, a, b, c, d] = record;
    let vcpu = usize::from(base.vcpu);
    let space = address(a & 0x7f | 0x20, b);
    match kind & 7 {
        0 => Act::Switch(vcpu, Paging::from_bits(a), CR4S[usize::from(c & 31)], u64::from(d)),
        1 => {
            let regs = Paging::from_bits(a).registers(u64::from(d), CR4S[usize::from(c & 31)]);
            let (op, bit) = TOGGLES[usize::from(b & 15)];
            let flip = |wanted| if op == wanted && b & 0x80 != 0 { bit } else { 0 };
            Act::Sregs(
                vcpu,
                Registers {
                    cr0: regs.cr0 ^ flip(OpCode::Cr0),
                    cr4: regs.cr4 ^ flip(OpCode::Cr4),
                    efer: regs.efer ^ flip(OpCode::Efer),
                    cs_l: regs.cs_l != (d & 0x80 != 0),
                    ..regs
                },
            )
        }
        2 | 3 => {
            let ((op, bit), (second, other)) = (TOGGLES[usize::from(a & 15)], TOGGLES[usize::from(b & 15)]);
            Act::Toggle(vcpu, op, if op == second && c & 1 != 0 { bit | other } else { bit })
        }
        4 if d & 0x80 == 0 => Act::Invpcid(vcpu, u64::from(c & 7) % 5, DESCRIPTORS << 12 | u64::from(b & 63) << 4),
        4 => Act::Invpcid(vcpu, u64::from(c & 3), address(a, b)),
        5 if d & 0x80 == 0 => {
            let low = u64::from(c & 3) | u64::from(c & 4) << 61 | if c & 0xf0 == 0xf0 { 1 << 45 } else { 0 };
            Act::Row(Row { op: OpCode::Cr3, value: Paging::from_bits(a).root(u64::from(b)) | low, ..base })
        }
        5 => Act::Pkru(vcpu, u32::from(c) << 2),
        6 => Act::Aim(Aim {
            level: 1 + u32::from(a >> 7) + 2 * u32::from(d >> 7),
            ..aim(base, space, OpCode::Write, entry(c, d))
        }),
        _ => Act::Aim(Aim {
            editor: ((usize::from(who & 3) + usize::from(d >> 6 & 1)) % vcpus) as u8,
            level: 1 + u32::from(d & 3) + u32::from(d & 0x13 == 0x13),
            used: true,
            flush: [None, Some(OpCode::Invlpg), Some(OpCode::Cr3), None][usize::from(d >> 2 & 3)],
            ..aim(base, space, OpCode::Xor, FLIPS[usize::from(c & 15)])
        }),
    }
}

const fn aim(base: Row, gva: u64, op: OpCode, value: u64) -> Aim {
    Aim { vcpu: base.vcpu, editor: base.vcpu, gva, level: 1, op, value, used: false, flush: None }
}

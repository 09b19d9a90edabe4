//! How an act suits the paging mode of its vCPU, and how it is carried out.
//!
//! Records speak of 4-level address spaces. In another mode the same page has another address, an entry another size,
//! and a table lies elsewhere, so that the same input gets somewhere in each mode.

use crate::decode::{Act, Aim, MAX_RECORDS, RECORD, act};
use crate::world::{DATA, DESCRIPTORS, DIRECTORY32, MEMORY, Machine, PDPT, PML5, Paging, SLOT1, TABLE32, TABLES};
use shadowkvm_core::bits::{CR0_PG, EFER_LME, PT_P, PT_PS};
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{Control, RunOptions, Vm};
use shadowkvm_core::ops::{OpCode, Row};
use shadowkvm_core::outcome::Outcome;
use shadowkvm_core::types::{Gpa, Gva};

const PAGE: u64 = 4096;

/// An act as acts that are one operation each, as they suit the state before the first of them.
#[must_use]
pub fn parts(vm: &Vm, act: Act) -> Vec<Act> {
    match act {
        Act::Sweep(row, count) => {
            (0..count).map(|i| fit(vm, Act::Row(Row { addr: row.addr.wrapping_add(i << 21), ..row }))).collect()
        }
        Act::Switch(vcpu, mode, cr4, space) => switch(regs(vm, vcpu), vcpu, mode.registers(space, cr4)),
        Act::Toggle(vcpu, op, bits) => {
            let regs = regs(vm, vcpu);
            let old = match op {
                OpCode::Cr0 => regs.cr0,
                OpCode::Cr4 => regs.cr4,
                _ => regs.efer,
            };
            vec![Act::Row(plain(op, vcpu, 0, old ^ bits))]
        }
        Act::Aim(aim) => edit(vm, &aim),
        other => vec![fit(vm, other)],
    }
}

fn regs(vm: &Vm, vcpu: usize) -> Registers {
    vm.vcpus()[vcpu].regs
}

const fn plain(op: OpCode, vcpu: usize, addr: u64, value: u64) -> Row {
    Row { op, size: 8, flags: 0, vcpu: vcpu as u8, site: 0, addr, value }
}

/// The way from one mode to another: a jump to a 32-bit code segment, paging off, EFER and CR4, CR3, paging on.
fn switch(from: Registers, vcpu: usize, to: Registers) -> Vec<Act> {
    let row = |op, value| Act::Row(plain(op, vcpu, 0, value));
    let mut way = Vec::new();
    if from.cs_l {
        way.push(Act::Sregs(vcpu, Registers { cs_l: false, ..from }));
    }
    if from.cr4 & !to.cr4 & 0x2_0000 != 0 {
        way.push(row(OpCode::Cr4, from.cr4 & !0x2_0000));
    }
    way.push(row(OpCode::Cr0, from.cr0 & !CR0_PG));
    way.push(row(OpCode::Efer, from.efer & !EFER_LME | to.efer & EFER_LME));
    way.push(row(OpCode::Cr4, to.cr4 & !0x2_0000));
    way.push(row(OpCode::Cr3, to.cr3));
    way.push(row(OpCode::Cr0, to.cr0));
    if to.cr4 & 0x2_0000 != 0 {
        way.push(row(OpCode::Cr4, to.cr4));
    }
    way
}

fn edit(vm: &Vm, aim: &Aim) -> Vec<Act> {
    let vcpu = usize::from(aim.vcpu);
    let mode = Paging::of(&regs(vm, vcpu));
    let gva = fold(mode, aim.gva);
    let Some((place, bytes)) = place_of(vm, vcpu, gva, aim.level) else { return Vec::new() };
    let value = if aim.op == OpCode::Write { value_for(mode, place, aim.value) } else { aim.value };
    let value = if bytes == 4 { value & 0xffff_ffff } else { value };
    // The editor's own tables may be of another mode, but the identity map is in each.
    let store = Row { size: bytes, ..plain(aim.op, usize::from(aim.editor), place, value) };
    let read = aim.used.then(|| plain(OpCode::Read, vcpu, gva, 0));
    let flush = aim.flush.map(|op| plain(op, vcpu, gva, regs(vm, vcpu).cr3));
    [read, Some(store), flush].into_iter().flatten().map(Act::Row).collect()
}

/// Where the entry of a level that leads to an address lies, and its bytes; the last one on the way if it ends before.
fn place_of(vm: &Vm, vcpu: usize, gva: u64, level: u32) -> Option<(u64, u8)> {
    let regs = regs(vm, vcpu);
    let (top, bits, bytes) = match Paging::of(&regs) {
        Paging::Off => return None,
        Paging::Two => (2, 10, 4),
        Paging::Pae => (3, 9, 8),
        Paging::Four => (4, 9, 8),
        Paging::Five => (5, 9, 8),
    };
    let mut table = regs.cr3 & if top == 3 { 0xffff_ffe0 } else { 0x000f_ffff_ffff_f000 };
    for at in (1..=top).rev() {
        let index = gva >> (12 + bits * (at - 1)) & if top == 3 && at == 3 { 3 } else { (1 << bits) - 1 };
        let place = table + index * bytes;
        let entry = vm.read_memory(Gpa(place), bytes as usize).ok()?;
        let entry = entry.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let ends = entry & PT_P == 0 || entry & PT_PS != 0 && at < 4;
        if at == level.min(top) || ends {
            // Only in reach of the identity map.
            return (place < MEMORY).then_some((place, bytes as u8));
        }
        table = entry & 0x000f_ffff_ffff_f000;
    }
    None
}

/// The part of an act that depends on the mode of its vCPU.
fn fit(vm: &Vm, act: Act) -> Act {
    let mode_of = |vcpu: usize| Paging::of(&regs(vm, vcpu));
    match act {
        Act::Row(row) if row.op as u8 <= OpCode::Cr4 as u8 => {
            Act::Row(fit_row(mode_of(usize::from(row.vcpu) % vm.vcpus().len()), row))
        }
        Act::Insn(vcpu, mut insn) => {
            let mode = mode_of(vcpu);
            let gva = fold(mode, insn.gva.0);
            if mode == Paging::Two && insn.size == 8 {
                insn.size = 4;
            }
            insn.value = value_for(mode, gva, insn.value);
            insn.gva = Gva(gva);
            Act::Insn(vcpu, insn)
        }
        Act::Invpcid(vcpu, kind, gva) => Act::Invpcid(vcpu, kind, fold(mode_of(vcpu), gva)),
        other => other,
    }
}

fn fit_row(mode: Paging, row: Row) -> Row {
    match row.op {
        OpCode::Cr0 | OpCode::Cr4 => row,
        OpCode::Cr3 => {
            let space = [1, 6, 7, 8].iter().position(|frame| row.value >> 12 & 0xffff_ffff == *frame);
            let root = |space: usize| mode.root(space as u64) | row.value & 0xfff0_0000_0000_0fff;
            Row { value: space.map_or(row.value, root), ..row }
        }
        op => {
            let addr = fold(mode, row.addr);
            // Bits that are set, cleared or flipped stay those that the record names.
            let value = if matches!(op, OpCode::Or | OpCode::And | OpCode::Xor) {
                row.value
            } else {
                value_for(mode, addr, row.value)
            };
            let size = if mode == Paging::Two && row.size == 8 { 4 } else { row.size };
            Row { addr, value, size, ..row }
        }
    }
}

/// The address that stands for a 4-level one.
fn fold(mode: Paging, gva: u64) -> u64 {
    let (l4, l3, l2, l1) = (gva >> 39, gva >> 30 & 511, gva >> 21 & 511, gva >> 12 & 511);
    let offset = gva & 0xfff;
    if !(1..=2).contains(&l4) {
        return if gva < (DESCRIPTORS << 12) { fold_table(mode, gva) } else { gva };
    }
    match mode {
        Paging::Four => gva,
        Paging::Five => [0, 1, 2, 511][l3 as usize & 3] << 48 | gva | if l3 & 3 == 3 { 0xfe << 56 } else { 0 },
        Paging::Pae => (if l3 == 0 { l4 } else { 3 }) << 30 | l2 << 21 | l1 << 12 | offset,
        Paging::Two => {
            let quarter = [l4, 3, 0][l3 as usize % 3];
            let (directory, table) = (quarter << 8 | l2 >> 1, (l2 & 1) << 9 | l1);
            directory << 22 | table << 12 | offset
        }
        Paging::Off => {
            let frame = match l2 << 4 & 0xf0 | l1 & 0xf {
                low @ ..0x80 => low,
                high @ 0x80..0xe0 => 512 + high - 0x80,
                rest => (SLOT1.0 >> 12) + (rest & 0xf),
            };
            frame << 12 | offset
        }
    }
}

/// An entry of a table, through the identity map.
fn fold_table(mode: Paging, gva: u64) -> u64 {
    let (frame, place) = (gva >> 12, gva & (PAGE - 1));
    let (frame, place) = match mode {
        Paging::Five if frame == 2 || frame == 3 => (PML5 + frame - 2, place),
        Paging::Pae if (6..=10).contains(&frame) => (PDPT, place & 0x7f),
        Paging::Two if (6..=TABLES).contains(&frame) || (DIRECTORY32..DESCRIPTORS).contains(&frame) => {
            let frame = if frame <= TABLES { DIRECTORY32 + frame % 11 } else { frame };
            (frame, fold_place(frame < TABLE32, place))
        }
        _ => (frame, place),
    };
    frame << 12 | place
}

/// Entry 0, 1, 2, ... in each quarter of a directory, or half of a table, in turn.
const fn fold_place(directory: bool, place: u64) -> u64 {
    let (index, rest) = (place >> 3, place & 3);
    let index = match (index < 32, directory) {
        (true, true) => (index & 3) << 8 | index >> 2,
        (true, false) => (index & 1) << 9 | index >> 1,
        _ => index << 1 | 1,
    };
    index << 2 | rest
}

/// A value that makes sense in the table at that place in the mode.
fn value_for(mode: Paging, place: u64, value: u64) -> u64 {
    let (table, gfn, flags) = (place >> 12, value >> 12 & 0x000f_ffff, value & 0xfff);
    match mode {
        // PDPTEs have no W, U, A, D; with PS in the flags they stay wrong.
        Paging::Pae if table == PDPT && value & PT_PS == 0 => value & !0x66,
        Paging::Two if !(DIRECTORY32..DESCRIPTORS).contains(&table) => value,
        Paging::Two if table >= TABLE32 || value & PT_PS == 0 => {
            let gfn = if table < TABLE32 && gfn <= TABLES { TABLE32 + 1 + gfn % 8 } else { gfn };
            gfn << 12 | flags
        }
        Paging::Two => {
            let (pat, above, reserved) = (gfn & 1, gfn & 6 == 6, gfn & 0x38 == 0x38);
            let base = if gfn == SLOT1.0 >> 12 { SLOT1.0 } else { 0 };
            base | u64::from(reserved) << 17 | u64::from(above) << 13 | pat << 12 | flags
        }
        _ => value,
    }
}

/// Carries one of the [`parts`] out. A request that the engine refuses is no finding; what an instruction came to is told.
pub fn perform(vm: &mut Vm, act: &Act) -> Option<Outcome> {
    match act {
        Act::Row(row) => return vm.step(row, &RunOptions::default(), 0).ok(),
        Act::Insn(vcpu, insn) => return Some(vm.execute(*vcpu, insn)),
        Act::Invpcid(vcpu, kind, gva) => return Some(vm.control(*vcpu, Control::Invpcid(*kind, *gva), None)),
        Act::HostPages(gpa, bytes, state) => drop(vm.set_host_pages(Gpa(*gpa), *bytes, *state)),
        Act::Sregs(vcpu, regs) => drop(vm.set_sregs(*vcpu, *regs)),
        Act::Pkru(vcpu, value) => drop(vm.set_pkru(*vcpu, *value)),
        Act::Table(frame, entry) => {
            let table: Vec<u8> = (0..512u64).flat_map(|i| (entry ^ (i & 7) << 12).to_le_bytes()).collect();
            drop(vm.write_table_page(Gpa(frame << 12), &table));
        }
        Act::Sweep(..) | Act::Switch(..) | Act::Toggle(..) | Act::Aim(_) => unreachable!("several operations"),
    }
    None
}

/// Runs an input; audits after every `audit_every` acts and at the end.
///
/// # Errors
/// What the audit found, and after which act.
pub fn run(data: &[u8], audit_every: usize) -> Result<usize, String> {
    let Some((machine, rest)) = Machine::read(data) else { return Ok(0) };
    let mut vm = machine.build();
    let vcpus = vm.vcpus().len();
    let (records, _) = rest.as_chunks::<RECORD>();
    let count = records.len().min(MAX_RECORDS);
    for (i, record) in records[..count].iter().enumerate() {
        let act = act(*record, vcpus);
        for part in parts(&vm, act) {
            perform(&mut vm, &part);
        }
        if (i + 1) % audit_every == 0 || i + 1 == count {
            vm.audit().map_err(|error| format!("after act {i}, {act:?}:\n{error}"))?;
        }
    }
    Ok(count)
}

/// The data pages begin after the tables of 4-level paging and end before those of the other modes.
const _: () = assert!(DATA > TABLES && DATA + 16 <= PML5);

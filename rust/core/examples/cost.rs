//! One kind of event N times, as rows of a trace, for callgrind: the instructions of one event are those of
//! `cost EVENT N run`, less those of `cost EVENT N not`, over N. The words are of one length, so that the allocator does the
//! same in both.
//!
//!     cargo build --release --example cost
//!     valgrind --tool=callgrind target/release/examples/cost fault 2000 run

use shadowkvm_core::config::Config;
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{RunOptions, Vm};
use shadowkvm_core::ops::{OpCode, Row};
use shadowkvm_core::policy::Kvm;
use shadowkvm_core::types::Gpa;

/// Present, writable, accessed, dirty.
const FLAGS: u64 = 0x63;
const MEMORY: u64 = 1 << 30;
const ROOT: u64 = 0x1000;
const PD: u64 = 0x10000;
const TABLES: u64 = 0x100000;
const DIRECTORIES: u64 = 0x30_0000;
const CHILDREN: u64 = 0x40_0000;
/// Where the events take place: clear of the tables.
const BASE: u64 = 64 << 20;
const LARGE: u64 = 2 << 20;

/// Makes a guest ready for N events.
type Prepare = fn(&mut Vm, u64);
/// Their rows.
type Rows = fn(u64) -> Vec<Row>;

/// A guest whose memory is mapped one to one by 4 KiB pages. Some shadow pages were used before and are free: those that no
/// page was in yet are zeroed first, 8 KiB each, which is no part of an event.
fn guest() -> Vm {
    let mut vm = Vm::new(MEMORY, 1, Config::default(), Box::new(Kvm), 0).expect("a valid size");
    set(&mut vm, ROOT, 0x2000 | FLAGS);
    set(&mut vm, 0x2000, PD | FLAGS);
    for table in 0..MEMORY / LARGE {
        set(&mut vm, PD + 8 * table, (TABLES + 4096 * table) | FLAGS);
    }
    for page in 0..MEMORY / 4096 {
        set(&mut vm, pte(page * 4096), (page * 4096) | FLAGS);
    }
    vm.set_sregs(0, Registers { cr3: ROOT, ..Registers::default() }).expect("valid registers");
    run(&mut vm, tables(8));
    zap_all(&mut vm);
    vm
}

fn zap_all(vm: &mut Vm) {
    vm.set_nx_huge_pages(true);
    vm.set_nx_huge_pages(false);
}

fn set(vm: &mut Vm, gpa: u64, value: u64) {
    vm.write_memory(Gpa(gpa), &value.to_le_bytes()).expect("inside the memory");
}

/// Where the last-level entry of an address stands.
const fn pte(gva: u64) -> u64 {
    TABLES + gva / 4096 * 8
}

fn row(op: OpCode, addr: u64, value: u64) -> Row {
    Row { op, size: 8, flags: 0, vcpu: 0, site: 0, addr, value }
}

fn load(gva: u64) -> Row {
    row(OpCode::Read, gva, 0)
}

fn store(gva: u64, value: u64) -> Row {
    row(OpCode::Write, gva, value)
}

fn cr3() -> Row {
    row(OpCode::Cr3, 0, ROOT)
}

fn run(vm: &mut Vm, rows: impl IntoIterator<Item = Row>) {
    let bytes: Vec<u8> = rows.into_iter().flat_map(|row| row.encode()).collect();
    run_bytes(vm, &bytes);
}

fn run_bytes(vm: &mut Vm, bytes: &[u8]) {
    let options = RunOptions { no_values: true, ..RunOptions::default() };
    vm.run(bytes, &options, |_| {}).expect("valid rows");
}

/// Shadow tables are there, and each page's neighbours are not present.
fn lone_pages(vm: &mut Vm, n: u64) {
    for page in 0..n * 8 {
        let gva = BASE + page * 4096;
        set(vm, pte(gva), if page % 8 == 0 { gva | FLAGS } else { 0 });
    }
    first_of_each_table(vm, n);
}

fn first_of_each_table(vm: &mut Vm, n: u64) {
    run(vm, (0..n.div_ceil(64)).map(|table| load(BASE + table * LARGE)));
}

/// Shadow tables are to be made, each with one page and no neighbours.
fn lone_tables(vm: &mut Vm, n: u64) {
    for table in 0..n {
        for page in 1..8 {
            set(vm, pte(BASE + table * LARGE + page * 4096), 0);
        }
    }
    bookkeeping(vm, n);
}

/// KVM has the bookkeeping of a slot's frames from the first root on; here it comes with the first use of each 2 MiB.
fn bookkeeping(vm: &mut Vm, n: u64) {
    run(vm, tables(n + 2)); // and shadow pages enough
    zap_all(vm);
    run(vm, [load(0)]);
}

/// One table with 512 present shadow entries.
fn full_table(vm: &mut Vm, _: u64) {
    run(vm, groups(64));
}

/// One table with a present entry, and so a present shadow entry, in each `STEP`: 64 or 1 of them.
fn sparse_table<const STEP: u64>(vm: &mut Vm, _: u64) {
    for page in 0..512 {
        let gva = BASE + page * 4096;
        set(vm, pte(gva), if page % STEP == 0 { gva | FLAGS } else { 0 });
    }
    run(vm, (0..512 / STEP).map(|group| load(BASE + group * STEP * 4096)));
}

/// An entry of an unsync table, with its group of 8 in the shadow.
fn out_of_step(vm: &mut Vm, _: u64) {
    run(vm, [load(BASE), store(pte(BASE + 4096), (BASE + 4096) | FLAGS)]);
}

/// Tables that are shadowed and mapped, all in step.
fn synced(vm: &mut Vm, n: u64) {
    run(vm, (0..n).flat_map(|table| [load(BASE + table * LARGE), load(pte(BASE + table * LARGE))]));
    run(vm, [cr3()]);
}

/// Directories with four tables each, in use, and written twice; a third store in a row is a flood.
fn twice_written(vm: &mut Vm, n: u64) {
    assert!(n <= 200, "flood: N is {n}, the guest has room for 200 directories");
    for directory in 0..n {
        set(vm, 0x2000 + 8 * (directory + 1), (DIRECTORIES + 4096 * directory) | FLAGS);
        for table in 0..4 {
            let gpa = CHILDREN + 4096 * (4 * directory + table);
            set(vm, DIRECTORIES + 4096 * directory + 8 * table, gpa | FLAGS);
            set(vm, gpa, BASE | FLAGS);
            run(vm, [load(((directory + 1) << 30) | (table << 21))]);
        }
    }
    (0..2).for_each(|_| run(vm, to_directories(n)));
}

fn not_present(vm: &mut Vm, _: u64) {
    set(vm, pte(BASE + 4096), 0);
    run(vm, [load(BASE)]);
}

fn groups(n: u64) -> Vec<Row> {
    (0..n).map(|group| load(BASE + group * 8 * 4096)).collect()
}

fn tables(n: u64) -> Vec<Row> {
    (0..n).map(|table| load(BASE + table * LARGE)).collect()
}

fn to_tables(n: u64) -> Vec<Row> {
    (0..n).map(|table| BASE + table * LARGE).map(|gva| store(pte(gva), gva | FLAGS)).collect()
}

fn to_directories(n: u64) -> Vec<Row> {
    (0..n).map(|directory| store(DIRECTORIES + 4096 * directory + 8 * 200, BASE | FLAGS)).collect()
}

fn times(n: u64, rows: &[Row]) -> Vec<Row> {
    rows.repeat(n as usize)
}

const EVENTS: &[(&str, Prepare, Rows)] = &[
    ("hit", full_table, |n| times(n, &[load(BASE)])),
    ("fault", lone_pages, groups),
    ("prefetch", first_of_each_table, groups),
    ("lone_table", lone_tables, tables),
    ("table", bookkeeping, tables),
    ("unsync", synced, to_tables),
    ("directory", full_table, |n| times(n, &[store(PD + 8 * 200, TABLES | FLAGS)])),
    ("flood", twice_written, to_directories),
    ("invlpg", full_table, |n| times(n, &[row(OpCode::Invlpg, BASE, 0)])),
    ("invlpg_unsync", out_of_step, |n| times(n, &[row(OpCode::Invlpg, BASE, 0)])),
    ("cr3", full_table, |n| times(n, &[cr3()])),
    ("resync_512", full_table, |n| times(n, &[store(pte(BASE), BASE | FLAGS), cr3()])),
    ("resync_64", sparse_table::<8>, |n| times(n, &[store(pte(BASE), BASE | FLAGS), cr3()])),
    ("resync_1", sparse_table::<512>, |n| times(n, &[store(pte(BASE), BASE | FLAGS), cr3()])),
    ("reflected", not_present, |n| times(n, &[load(BASE + 4096)])),
];

fn main() {
    let mut words = std::env::args().skip(1);
    let event = words.next().and_then(|name| EVENTS.iter().find(|row| row.0 == name));
    let n = words.next().and_then(|n| n.parse().ok());
    let runs = words.next().and_then(|word| ["not", "run"].iter().position(|known| *known == word));
    let (Some((_, prepare, rows)), Some(n), Some(runs)) = (event, n, runs) else {
        let names: Vec<_> = EVENTS.iter().map(|row| row.0).collect();
        panic!("usage: cost EVENT N run|not, with EVENT one of {}", names.join(", "));
    };
    let mut vm = guest();
    prepare(&mut vm, n);
    let bytes: Vec<u8> = rows(n).iter().flat_map(Row::encode).collect();
    if runs == 1 {
        run_bytes(&mut vm, &bytes);
    }
    std::hint::black_box(&vm);
}

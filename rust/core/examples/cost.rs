//! One kind of event N times, for callgrind: the instructions of one event are those of `cost EVENT N run`, less those
//! of `cost EVENT N`, over N.
//!
//!     cargo build --release --example cost
//!     valgrind --tool=callgrind target/release/examples/cost fault 2000 run

use shadowkvm_core::config::Config;
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{Control, Vm};
use shadowkvm_core::fault::insn::{Action, Insn};
use shadowkvm_core::policy::Kvm;
use shadowkvm_core::types::Gpa;

/// Present, writable, accessed, dirty.
const FLAGS: u64 = 0x63;
const MEMORY: u64 = 256 << 20;
const ROOT: u64 = 0x1000;
const PD: u64 = 0x10000;
const TABLES: u64 = 0x100000;
const DIRECTORIES: u64 = 0x20_0000;
const CHILDREN: u64 = 0x40_0000;
/// Where the events take place: clear of the tables.
const BASE: u64 = 64 << 20;
const LARGE: u64 = 2 << 20;

type Event = fn(&mut Vm, u64);

/// A guest whose memory is mapped one to one by 4 KiB pages.
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
    vm
}

fn set(vm: &mut Vm, gpa: u64, value: u64) {
    vm.write_memory(Gpa(gpa), &value.to_le_bytes()).expect("inside the memory");
}

/// Where the last-level entry of an address stands.
const fn pte(gva: u64) -> u64 {
    TABLES + gva / 4096 * 8
}

fn read(vm: &mut Vm, gva: u64) {
    vm.execute(0, &Insn::new(Action::Load, gva, 8));
}

fn write(vm: &mut Vm, gva: u64, value: u64) {
    vm.execute(0, &Insn { value, ..Insn::new(Action::Store, gva, 8) });
}

fn cr3(vm: &mut Vm) {
    vm.control(0, Control::Cr3(ROOT), None);
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
    for table in 0..n.div_ceil(64) {
        read(vm, BASE + table * LARGE);
    }
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
    for table in 0..n {
        read(vm, BASE + table * LARGE);
    }
    vm.set_nx_huge_pages(true); // zaps all shadow pages
    vm.set_nx_huge_pages(false);
    read(vm, 0);
}

fn hits(vm: &mut Vm, n: u64) {
    (0..n).for_each(|_| read(vm, BASE));
}

/// An entry of an unsync table, with its group of 8 in the shadow.
fn out_of_step(vm: &mut Vm, _: u64) {
    read(vm, BASE);
    write(vm, pte(BASE + 4096), (BASE + 4096) | FLAGS);
}

/// One table with a present entry, and so a present shadow entry, in each `STEP`: 64 or 1 of them.
fn sparse_table<const STEP: u64>(vm: &mut Vm, _: u64) {
    for page in 0..512 {
        let gva = BASE + page * 4096;
        set(vm, pte(gva), if page % STEP == 0 { gva | FLAGS } else { 0 });
    }
    (0..512 / STEP).for_each(|group| read(vm, BASE + group * STEP * 4096));
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
            read(vm, ((directory + 1) << 30) | (table << 21));
        }
    }
    (0..2).for_each(|_| third_store(vm, n));
}

fn third_store(vm: &mut Vm, n: u64) {
    (0..n).for_each(|directory| write(vm, DIRECTORIES + 4096 * directory + 8 * 200, BASE | FLAGS));
}

fn groups(vm: &mut Vm, n: u64) {
    for group in 0..n {
        read(vm, BASE + group * 8 * 4096);
    }
}

fn tables(vm: &mut Vm, n: u64) {
    for table in 0..n {
        read(vm, BASE + table * LARGE);
    }
}

/// Tables that are shadowed and mapped, all in step.
fn synced(vm: &mut Vm, n: u64) {
    for table in 0..n {
        read(vm, BASE + table * LARGE);
        read(vm, pte(BASE + table * LARGE));
    }
    cr3(vm);
}

fn unsync(vm: &mut Vm, n: u64) {
    for table in 0..n {
        let gva = BASE + table * LARGE;
        write(vm, pte(gva), gva | FLAGS);
    }
}

/// One table with 512 present shadow entries, out of step before each CR3 load.
fn full_table(vm: &mut Vm, _: u64) {
    groups(vm, 64);
}

fn resync(vm: &mut Vm, n: u64) {
    for _ in 0..n {
        write(vm, pte(BASE), BASE | FLAGS);
        cr3(vm);
    }
}

fn loads(vm: &mut Vm, n: u64) {
    (0..n).for_each(|_| cr3(vm));
}

fn invlpg(vm: &mut Vm, n: u64) {
    for _ in 0..n {
        vm.control(0, Control::Invlpg(BASE), None);
    }
}

fn not_present(vm: &mut Vm, _: u64) {
    set(vm, pte(BASE + 4096), 0);
    read(vm, BASE);
}

fn reflected(vm: &mut Vm, n: u64) {
    (0..n).for_each(|_| read(vm, BASE + 4096));
}

fn directory(vm: &mut Vm, n: u64) {
    (0..n).for_each(|_| write(vm, PD + 8 * 200, TABLES | FLAGS));
}

const EVENTS: &[(&str, Event, Event)] = &[
    ("fault", lone_pages, groups),
    ("prefetch", first_of_each_table, groups),
    ("table", bookkeeping, tables),
    ("lone_table", lone_tables, tables),
    ("hit", full_table, hits),
    ("invlpg_unsync", out_of_step, invlpg),
    ("unsync", synced, unsync),
    ("resync_512", full_table, resync),
    ("resync_64", sparse_table::<8>, resync),
    ("resync_1", sparse_table::<512>, resync),
    ("cr3", full_table, loads),
    ("invlpg", full_table, invlpg),
    ("reflected", not_present, reflected),
    ("directory", full_table, directory),
    ("flood", twice_written, third_store),
];

fn main() {
    let mut words = std::env::args().skip(1);
    let event = words.next().and_then(|name| EVENTS.iter().find(|row| row.0 == name));
    let n = words.next().and_then(|n| n.parse().ok());
    let (Some((_, prepare, run)), Some(n)) = (event, n) else {
        let names: Vec<_> = EVENTS.iter().map(|row| row.0).collect();
        panic!("usage: cost EVENT N [run], with EVENT one of {}", names.join(", "));
    };
    let mut vm = guest();
    prepare(&mut vm, n);
    if words.next().is_some() {
        run(&mut vm, n);
    }
    std::hint::black_box(&vm);
}

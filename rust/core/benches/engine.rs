//! Operations a second, on guests of one kind each. Throughput counts guest operations (rows of a trace).
//!
//! * `fault_storm`: every load is the first of its group of 8 pages, so each takes a fault that maps 8.
//! * `unsync_storm`: 32 page tables are edited in 8 places each and a CR3 load brings them into step, again and again: the
//!   cycle that fork, exec and munmap put a shadow MMU through.
//! * `no_exit`: loads of mapped pages in random order; what the engine costs where KVM costs nothing. The sizes are those
//!   of caches of the machine that runs it: 1 Ki pages fit everywhere, 128 Ki pages need a walk out of memory.
//! * `flooding`: the third store to a page directory zaps it, the next use makes it again.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use shadowkvm_core::config::Config;
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{RunOptions, RunTotals, Vm};
use shadowkvm_core::ops::{OpCode, Row};
use shadowkvm_core::policy::Kvm;
use shadowkvm_core::types::Gpa;
use std::time::Duration;

/// Where a guest's own page tables lie, seen from the guest: 512 GiB up, one to one.
const ALIAS: u64 = 1 << 39;

/// A guest of `pages` data pages, mapped from address 0 on in 4 KiB pages. Behind them lie its page tables, which the
/// guest reaches at [`ALIAS`]: root, PDPTs, directories, page tables.
struct Guest {
    vm: Vm,
    /// Address of the first page table, in guest-physical memory.
    tables: u64,
}

impl Guest {
    fn new(pages: u64) -> Self {
        let count = pages.div_ceil(512);
        assert!(count <= 512, "one directory holds 512 page tables");
        let root = pages << 12;
        let (pdpt, directory, tables) = (root + 0x1000, root + 0x2000, root + 0x6000);
        let (alias_pdpt, alias_directory, alias_table) = (root + 0x3000, root + 0x4000, root + 0x5000);
        let memory = tables + (count << 12);
        let mut vm =
            Vm::new(memory.next_multiple_of(2 << 20), 1, Config::default(), Box::new(Kvm), 0).expect("a good VM");
        let mut put = |gpa: u64, entry: u64| vm.write_memory(Gpa(gpa), &entry.to_le_bytes()).expect("inside slot 0");
        put(root, pdpt | 0x67);
        put(pdpt, directory | 0x67);
        put(root + 8, alias_pdpt | 0x67);
        put(alias_pdpt, alias_directory | 0x67);
        put(alias_directory, alias_table | 0x67);
        for table in 0..count {
            put(directory + 8 * table, (tables + (table << 12)) | 0x67);
            if table < 500 {
                put(alias_table + 8 * (table + 6), (tables + (table << 12)) | 0x67);
            }
        }
        put(alias_table + 8, directory | 0x67);
        for page in 0..pages {
            put(tables + 8 * page, page << 12 | 0x67);
        }
        vm.set_sregs(0, Registers { cr3: root, ..Registers::default() }).expect("long mode");
        Self { vm, tables }
    }

    fn run(&mut self, rows: &[u8]) -> RunTotals {
        self.vm.run(rows, &RunOptions::default(), |_| {}).expect("good rows")
    }
}

fn row(op: OpCode, addr: u64, value: u64) -> [u8; 24] {
    Row { op, size: 8, flags: 0, vcpu: 0, site: 0, addr, value }.encode()
}

/// Loads of `count` pages in an order that no cache foresees.
fn scattered_loads(pages: u64, count: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % pages
    };
    (0..count).flat_map(|_| row(OpCode::Read, next() << 12, 0)).collect()
}

fn fault_storm(c: &mut Criterion) {
    const PAGES: u64 = 1 << 15;
    let rows: Vec<u8> = (0..PAGES / 8).flat_map(|group| row(OpCode::Read, group << 15, 0)).collect();
    let mut group = c.benchmark_group("fault_storm");
    group.throughput(Throughput::Elements(PAGES / 8));
    group.bench_function("4k", |b| {
        b.iter_batched_ref(|| Guest::new(PAGES), |guest| guest.run(&rows), BatchSize::LargeInput);
    });
    group.finish();
}

fn unsync_storm(c: &mut Criterion) {
    const TABLES: u64 = 32;
    let mut guest = Guest::new(TABLES * 512);
    let root = guest.vm.vcpus()[0].regs.cr3;
    let load = |table: u64, i: u64| row(OpCode::Read, table << 21 | i << 12, 0);
    // The same entries are written with the frames of two neighbours by turns, and used afterwards.
    let edit = |table: u64, i: u64, turn: u64| {
        let frame = table << 9 | (i + turn);
        row(OpCode::Write, ALIAS | (6 + table) << 12 | i << 3, frame << 12 | 0x67)
    };
    let mut rows = Vec::new();
    for turn in 0..2 {
        for (table, i) in (0..TABLES).flat_map(|table| (0..8).map(move |i| (table, 64 * i))) {
            rows.extend(edit(table, i, turn));
        }
        rows.extend(row(OpCode::Cr3, 0, root));
        rows.extend((0..TABLES).flat_map(|table| load(table, 0)));
    }
    guest.run(&rows);
    let before = guest.vm.vcpu_counters();
    guest.run(&rows);
    let faults = guest.vm.vcpu_counters().pf_fixed - before.pf_fixed;
    assert_eq!(faults, 2 * 2 * TABLES, "each turn a table faults for its first store and for its first use");
    let mut group = c.benchmark_group("unsync_storm");
    group.throughput(Throughput::Elements(rows.len() as u64 / 24));
    group.bench_function("32_tables", |b| b.iter(|| guest.run(&rows)));
    group.finish();
}

fn no_exit(c: &mut Criterion) {
    const LOADS: u64 = 1 << 16;
    let mut group = c.benchmark_group("no_exit");
    group.throughput(Throughput::Elements(LOADS));
    for pages in [1 << 10, 1 << 14, 1 << 17] {
        let mut guest = Guest::new(pages);
        let all: Vec<u8> = (0..pages).flat_map(|page| row(OpCode::Read, page << 12, 0)).collect();
        guest.run(&all);
        let rows = scattered_loads(pages, LOADS);
        let before = guest.vm.vcpu_counters().exits;
        group.bench_function(BenchmarkId::from_parameter(pages), |b| b.iter(|| guest.run(&rows)));
        assert_eq!(guest.vm.vcpu_counters().exits, before, "a load left the guest");
    }
    group.finish();
}

fn flooding(c: &mut Criterion) {
    let mut guest = Guest::new(1 << 12);
    let directory = ALIAS | 0x1000;
    let entry = guest.tables | 0x67;
    // Three stores zap the directory, the fourth finds it no table any more, the load makes it one again.
    let mut rows: Vec<u8> = (0..4).flat_map(|_| row(OpCode::Write, directory, entry)).collect();
    rows.extend(row(OpCode::Read, 0, 0));
    let rows = rows.repeat(64);
    guest.run(&rows);
    let before = guest.vm.counters().mmu_flooded;
    guest.run(&rows);
    assert_eq!(guest.vm.counters().mmu_flooded - before, 64, "each round floods once");
    let mut group = c.benchmark_group("flooding");
    group.throughput(Throughput::Elements(rows.len() as u64 / 24));
    group.bench_function("directory", |b| b.iter(|| guest.run(&rows)));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3));
    targets = fault_storm, unsync_storm, no_exit, flooding
}
criterion_main!(benches);

//! The guest that every input begins with: small, and with all of its tables in reach of its own stores.

use shadowkvm_core::config::{Config, QEMU_TCG, ZEN};
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::Vm;
use shadowkvm_core::memory::HostState;
use shadowkvm_core::policy::builtin;
use shadowkvm_core::types::Gpa;

/// Bytes of slot 0: the lower half holds tables and data, the upper half is one page of 2 MiB.
pub const MEMORY: u64 = 4 << 20;
/// The second slot: gpa and bytes. Its first frame holds a page table.
pub const SLOT1: (u64, u64) = (0x1000_0000, 0x1_0000);
/// Frames 1 to 44 hold tables: 1 to 5 the identity map, 6 to 8 roots, 9 and 10 PDPTs, 11 and 12 directories, then page
/// tables.
pub const TABLES: u64 = 44;
/// The first frame with data.
pub const DATA: u64 = 0x30;
/// Addresses of instructions: none, in the identity map (supervisor, at a page end, user), in another address space,
/// nowhere, in a device, not canonical.
pub const SITES: [u64; 8] =
    [0, DATA << 12, ((DATA + 1) << 12) - 1, (DATA + 2) << 12, 1 << 39, 0x7f00_0000_0000, 1 << 39 | 15 << 12, 1 << 60];

const POLICIES: [&str; 8] = ["kvm", "kvm", "kvm", "kvm", "kvm", "no_unsync", "no_prefetch", "zap_on_write"];

/// The VM of an input: two bytes choose what cannot change later.
pub fn build(kind: u8, host: u8) -> Vm {
    let cpu = if kind & 1 == 0 { ZEN } else { QEMU_TCG };
    let vcpus = 1 + usize::from(kind >> 1 & 3) % 3;
    let policy = builtin(POLICIES[usize::from(kind >> 3 & 7)]).expect("a policy that exists");
    let config = Config { cpu, nx_huge_pages: kind & 0x40 != 0, ..Config::default() };
    let mut vm = Vm::new(MEMORY, vcpus, config, policy, 0).expect("a good configuration");
    let states = [HostState::Writable, HostState::Huge2m, HostState::Absent, HostState::Zero];
    vm.set_host_pages(Gpa(0), MEMORY / 2, states[usize::from(host & 3)]).expect("slot 0");
    vm.set_host_pages(Gpa(MEMORY / 2), MEMORY / 2, states[usize::from(host >> 2 & 3)]).expect("slot 0");
    if host & 0x10 != 0 {
        vm.add_slot(1, Gpa(SLOT1.0), SLOT1.1, host & 0x20 != 0, host & 0x40 != 0).expect("beside slot 0");
    }
    fill(&mut vm, host & 0x10 != 0);
    for vcpu in 0..vcpus {
        vm.set_sregs(vcpu, Registers { cr3: 0x1000, ..Registers::default() }).expect("long mode");
    }
    if kind & 0x80 != 0 {
        vm.set_page_quota(64).expect("a legal quota");
    }
    vm.set_sites(SITES.to_vec());
    vm
}

fn fill(vm: &mut Vm, slot1: bool) {
    let mut set = |frame: u64, first: usize, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        vm.write_memory(Gpa(frame << 12 | (first as u64) << 3), &bytes).expect("inside a slot");
    };
    // The identity map; every third page is the user's.
    set(1, 0, &[0x2067, 9 << 12 | 0x67, 10 << 12 | 0x67]);
    set(2, 0, &[0x3067]);
    set(3, 0, &[0x4067, 0x5067]);
    let page = |gfn: u64| gfn << 12 | if gfn % 3 == 2 { 0x67 } else { 0x63 };
    set(4, 0, &(0..512).map(page).collect::<Vec<_>>());
    set(5, 0, &(512..1024).map(page).collect::<Vec<_>>());
    // Roots that share the identity map and, in different places, the rest.
    for root in 6..9 {
        set(root, 0, &[0x2067, (9 + root % 2) << 12 | 0x67, (9 + (root + 1) % 2) << 12 | 0x67]);
    }
    set(9, 0, &[11 << 12 | 0x67, 12 << 12 | 0x63, 0x8000_0000_0000_0067 | 11 << 12]);
    set(10, 0, &[12 << 12 | 0x67, 11 << 12 | 0x65]);
    for directory in 11..13 {
        let tables = (0..14).map(|i| (13 + (i * 5 + directory % 2 * 16) % 32) << 12 | 0x67);
        let rest = [512 << 12 | 0xe7, if slot1 { SLOT1.0 | 0x67 } else { 512 << 12 | 0xa5 }];
        set(directory, 0, &tables.chain(rest).collect::<Vec<_>>());
    }
    for table in 13..=TABLES {
        let flags = [0x67, 0x67, 0x63, 0x67, 0x65, 0x27, 0x07, 0x8000_0000_0000_0067];
        let data = (0..14).map(|i| (DATA + (table * 3 + i) % 16) << 12 | flags[i as usize % 8]);
        set(table, 0, &data.chain([table << 12 | 0x67, 0xfe00_0067]).collect::<Vec<_>>());
    }
    if slot1 {
        set(SLOT1.0 >> 12, 0, &(0..8).map(|i| (DATA + i) << 12 | 0x07).collect::<Vec<_>>());
    }
}

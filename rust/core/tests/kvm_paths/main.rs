//! One small run for each path of KVM's shadow MMU, against what real KVM was measured doing.
//!
//! The ops and their counters are those of the 91 recorded runs of Linux 6.1 (kvm-amd npt=0 under QEMU, profile
//! "qemu-tcg"); tests/conformance replays all of them with every event. Here are the ones that show a path by itself, so
//! that a broken path has a name. `T` is the page table at 6000, which maps 400000; `D` the page directory at 3000; `D2`
//! the one at 20000, hung at 1 GiB.

mod deliver;
mod faults;
mod golden;
mod guest;
mod host;
mod modes;
mod pcid;
mod switches;
mod sync;
mod writes;

use guest::Guest;
use shadowkvm_core::memory::HostState;

/// Short names of the counters in the table of measured runs.
const NAMES: &[(&str, &str)] = &[
    ("tk", "pf_taken"),
    ("fx", "pf_fixed"),
    ("em", "pf_emulate"),
    ("sp", "pf_spurious"),
    ("fa", "pf_fast"),
    ("gu", "pf_guest"),
    ("mm", "pf_mmio_spte_created"),
    ("zap", "mmu_shadow_zapped"),
    ("pw", "mmu_pte_write"),
    ("pd", "mmu_pde_zapped"),
    ("fl", "mmu_flooded"),
    ("rec", "mmu_recycled"),
    ("cm", "mmu_cache_miss"),
    ("un", "mmu_unsync"),
    ("4k", "pages_4k"),
    ("2m", "pages_2m"),
    ("nx", "nx_lpage_splits"),
    ("rf", "remote_tlb_flush_requests"),
    ("tf", "tlb_flush"),
    ("iv", "invlpg"),
    ("ie", "insn_emulation"),
    ("rm", "max_mmu_rmap_size"),
];

/// The counters as the table writes them: those that are not 0, shortened.
fn counters(guest: &Guest, vm_only: bool) -> String {
    use shadowkvm_core::counters::{VcpuCounters, VmCounters};
    let (vm, sum) = (guest.vm.counters().values(), guest.vm.vcpu_counters().values());
    let value = |name: &str| {
        let of_vm = VmCounters::INFO.iter().position(|info| info.name == name).map(|at| vm[at]);
        let of_vcpus = || VcpuCounters::INFO.iter().position(|info| info.name == name).map(|at| sum[at]);
        of_vm.or_else(|| if vm_only { Some(0) } else { of_vcpus() }).expect("a counter of that name")
    };
    let shown = NAMES.iter().map(|(short, name)| (short, value(name))).filter(|(_, value)| *value != 0);
    // The peak of the rmaps stands in the table only where it matters.
    shown.map(|(short, value)| format!("{short}{value}")).collect::<Vec<_>>().join(" ")
}

fn start(memory: &str) -> Guest {
    Guest::new(memory, HostState::Writable, |_| {})
}

/// Runs the ops and compares counters; the state must be whole at the end.
fn check(guest: &mut Guest, ops: &str, expected: &str) {
    guest.run(0, ops);
    compare(guest, expected, false);
}

fn compare(guest: &Guest, expected: &str, vm_only: bool) {
    let all = counters(guest, vm_only);
    let rm_shown = expected.contains(" rm");
    let got: Vec<_> = all.split(' ').filter(|word| rm_shown || !word.starts_with("rm")).collect();
    assert_eq!(got.join(" "), expected, "counters; trace:\n{}", golden::lines(&guest.vm).join("\n"));
    guest.vm.audit().expect("the state is whole");
}

/// Compares the trace with golden lines, from the line `from` (counted from 1) on.
fn trace(guest: &Guest, from: usize, expected: &[&str]) {
    let lines = golden::lines(&guest.vm);
    let got = lines.get(from - 1..from - 1 + expected.len()).unwrap_or(&[]);
    assert_eq!(got, expected, "all lines:\n{}", lines.join("\n"));
}

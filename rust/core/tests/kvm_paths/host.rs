//! What the host does: slots, dirty log, notifiers, the page quota.

use crate::{check, golden, start, trace};
use shadowkvm_core::config::QEMU_TCG;
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::Vm;
use shadowkvm_core::fault::insn::{Action, Insn};
use shadowkvm_core::memory::{HostState, ManualDirty};
use shadowkvm_core::outcome::Status;
use shadowkvm_core::types::Gpa;

#[test]
fn the_dirty_log_protects_pages_and_notes_them_again() {
    let ops = "W 400000=1; W 408000=1; HOST 1; W 400000=2; R 401000; W 401000=2; W 6048=409063; HOST 2; W 400000=3; \
               R 414000; W 414000=3; HOST 2; HOST 3; W 400000=3";
    check(&mut start(""), ops, "tk10 fx10 cm6 un1 4k34 rf3 tf3 ie1");
}

#[test]
fn a_new_slot_makes_mmio_entries_stale_and_a_deleted_one_zaps_everything() {
    let mut guest = start("6080=10000063");
    check(
        &mut guest,
        "R 410000; R 410000; HOST 4; R 410000; HOST 5; R 410000",
        "tk7 fx5 em2 mm2 zap6 cm10 4k23 rf2 tf1 ie4",
    );
    trace(
        &guest,
        4,
        &[
            "PF 410000 err 8 · check 8000010000013 g4/2 0 · walk 410000/0 · req 10000 L1 · set 10000:821",
            "io · host · zap_all_fast kvm-mmu-valid-gen 0 used_pages 5 · ZAP 1/l4 wux root1 · ZAP 2/l3 wux · ZAP 3/l2 wux · \
             ZAP 5/l1 wux · ZAP 6/l1 wux · ZAP 1/l4 wux inv · get 1/l4 wux new",
        ],
    );
}

#[test]
fn sync_keeps_a_stale_mmio_entry_although_a_slot_is_there() {
    let mut guest = start("6080=10000063");
    let ops = "R 410000; HOST 4; W 60c0=500063; CR3 1000; R 410000; INV 410000; R 410000";
    check(&mut guest, ops, "tk4 fx3 em1 mm1 cm6 4k31 rf2 tf1 iv1 ie6");
}

#[test]
fn a_store_to_a_read_only_slot_goes_to_user_space() {
    let mut guest = start("6080=10000063; 6088=10001063");
    guest.add_readonly_slot();
    check(&mut guest, "R 410000; W 410000=5; W 410000=5; R 411000", "tk6 fx4 em2 cm5 4k24 ie3");
    assert_eq!(guest.vm.execute(0, &Insn::new(Action::Store, 0x410000, 8)).status, Status::Mmio);
}

#[test]
fn the_quota_takes_the_oldest_pages_first() {
    let mut guest = start("3320=100063 x70 +8 +1000; 100000=300063 x70 +1000");
    guest.vm.set_page_quota(64).expect("a legal quota");
    let ops = "R c800000 x66 +200000; R 400000; R c800000";
    check(&mut guest, ops, "tk72 fx72 zap21 rec21 cm75 4k73 rf1 tf1 ie1 rm55");
    let zaps = golden::lines(&guest.vm).into_iter().find(|line| line.contains("ZAP")).expect("pages were recycled");
    let order: Vec<_> = zaps.split(" · ").filter_map(|word| word.strip_prefix("ZAP ")).collect();
    assert_eq!(&order[..5], ["2/l3 wux", "3/l2 wux", "5/l1 wux", "100/l1 w-x", "101/l1 w-x"], "all but the root");
}

#[test]
fn a_dropped_page_loses_its_entries_and_a_dropped_table_keeps_its_page() {
    let ops = "R 400000; W 401000=0; HOST 6; R 400000; W 6048=409063; HOST 7; R 400000; W 6048=409063";
    check(&mut start(""), ops, "tk6 fx6 cm6 un1 4k31 rf2 tf2 ie1");
}

#[test]
fn sync_marks_kept_pages_dirty_again() {
    let ops = "R 400000; W 6048=500063; HOST 1; W 6048=501063; HOST 2; CR3 1000; W 400000=1; HOST 2; W 6048=501063; \
               HOST 2";
    check(&mut start(""), ops, "tk6 fx6 cm6 un1 4k32 rf6 tf5 ie2");
}

/// A guest without paging: what the host does shows at once.
fn flat(huge: bool) -> Vm {
    let regs = Registers { cr0: 0x33, cr3: 0, cr4: 0, efer: 0, cs_l: false };
    let mut vm = crate::switches::guest(QEMU_TCG, regs);
    if huge {
        vm.set_host_pages(Gpa(4 << 20), 4 << 20, HostState::Huge2m).expect("aligned");
    }
    vm
}

fn touch(vm: &mut Vm, gva: u64) {
    assert_eq!(vm.execute(0, &Insn { value: 1, ..Insn::new(Action::Store, gva, 8) }).status, Status::Done);
}

#[test]
fn a_moved_slot_shows_the_same_bytes_elsewhere() {
    let mut vm = flat(false);
    vm.add_slot(3, Gpa(1 << 30), 0x3000, false, true).expect("room there");
    touch(&mut vm, (1 << 30) + 0x1000);
    let (zapped, generation) = (vm.counters().mmu_shadow_zapped, vm.shadow().memory.generation);
    vm.move_slot(3, Gpa(2 << 30)).expect("room there");
    assert_eq!(vm.read_memory(Gpa((2 << 30) + 0x1000), 1).expect("moved"), [1]);
    assert!(vm.counters().mmu_shadow_zapped > zapped, "everything became obsolete");
    assert_eq!(vm.shadow().memory.generation, generation + 4);
    assert_eq!(vm.get_dirty_log(3).expect("it has one"), [(2 << 18) + 1], "its log went with it");
    for bad in [0, 0x800, 1 << 38] {
        let before = vm.shadow().memory.generation;
        assert_eq!(vm.move_slot(3, Gpa(bad)).is_err(), bad != 1 << 38);
        assert!(bad == 1 << 38 || vm.shadow().memory.generation == before);
    }
    vm.audit().expect("the state is whole");
}

#[test]
fn a_log_that_is_cleared_by_hand() {
    let mut vm = flat(true);
    vm.set_manual_dirty(ManualDirty { enabled: true, initially_set: false }).expect("possible");
    vm.set_dirty_log(0, true).expect("slot 0");
    touch(&mut vm, 0x5000);
    let flushes = vm.counters().remote_tlb_flush_requests;
    for _ in 0..2 {
        assert_eq!(vm.get_dirty_log(0).expect("it has one"), [5], "reading changes nothing");
    }
    assert_eq!(vm.counters().remote_tlb_flush_requests, flushes);
    let fast = vm.vcpu_counters().pf_fast;
    touch(&mut vm, 0x5000);
    assert_eq!(vm.vcpu_counters().pf_fast, fast, "still writable");
    vm.clear_dirty_log(0, &[4, 5]).expect("its frames");
    assert_eq!(vm.counters().remote_tlb_flush_requests, flushes + 1);
    touch(&mut vm, 0x5000);
    assert_eq!(vm.vcpu_counters().pf_fast, fast + 1);
    assert!(vm.clear_dirty_log(0, &[1 << 20]).is_err() && vm.clear_dirty_log(9, &[]).is_err());
}

#[test]
fn a_full_log_protects_huge_leaves_only_when_it_is_cleared() {
    let mut vm = flat(true);
    vm.set_manual_dirty(ManualDirty { enabled: true, initially_set: true }).expect("possible");
    touch(&mut vm, 4 << 20);
    assert_eq!(vm.counters().pages_2m, 1);
    let flushes = vm.counters().remote_tlb_flush_requests;
    vm.set_dirty_log(0, true).expect("slot 0");
    assert_eq!(vm.counters().remote_tlb_flush_requests, flushes, "nothing was protected");
    let faults = vm.vcpu_counters().pf_taken;
    touch(&mut vm, 4 << 20);
    assert_eq!(vm.vcpu_counters().pf_taken, faults);
    vm.clear_dirty_log(0, &[1024]).expect("its frame");
    touch(&mut vm, 4 << 20);
    assert_eq!((vm.vcpu_counters().pf_taken, vm.counters().pages_2m), (faults + 1, 0), "the leaf was split");
    vm.audit().expect("the state is whole");
}

#[test]
fn aging_takes_a_and_only_the_flushing_kind_flushes() {
    let mut vm = flat(false);
    touch(&mut vm, 0x5000);
    let flushes = vm.counters().remote_tlb_flush_requests;
    let range = (Gpa(0x5000), 0x1000);
    assert!(vm.notifier_test_young(range.0, range.1).expect("memory"));
    assert!(vm.notifier_age(range.0, range.1, false).expect("memory"));
    assert_eq!(vm.counters().remote_tlb_flush_requests, flushes);
    assert!(!vm.notifier_test_young(range.0, range.1).expect("memory"));
    touch(&mut vm, 0x5000);
    assert!(vm.notifier_age(Gpa(0), 16 << 20, true).expect("memory"));
    assert_eq!(vm.counters().remote_tlb_flush_requests, flushes + 1);
    assert!(!vm.notifier_age(range.0, range.1, true).expect("memory"));
    vm.audit().expect("the state is whole");
}

#[test]
fn a_shared_page_is_read_in_place_and_copied_when_written() {
    let mut vm = flat(false);
    touch(&mut vm, 0x5000);
    vm.notifier_change(Gpa(0x5000), 0x1000).expect("memory");
    let read = vm.execute(0, &Insn::new(Action::Load, 0x5000, 8));
    assert_eq!((read.status, read.value), (Status::Done, 1), "the contents are the same");
    let faults = vm.vcpu_counters().pf_taken;
    touch(&mut vm, 0x5000);
    assert_eq!(vm.vcpu_counters().pf_taken, faults + 2, "the copy raises the notifier, and the fault is retried");
    assert_eq!(vm.shadow().memory.host.state(Gpa(0x5000).gfn()), HostState::Writable);
    vm.audit().expect("the state is whole");
}

#[test]
fn huge_pages_that_must_not_be_executed_change_at_run_time() {
    let mut vm = crate::switches::guest(QEMU_TCG, Registers { cr3: 0x3000, ..Registers::default() });
    vm.write_memory(Gpa(0x6008), &0x40_00e7u64.to_le_bytes()).expect("inside");
    vm.set_host_pages(Gpa(4 << 20), 2 << 20, HostState::Huge2m).expect("aligned");
    let fetch = Insn::new(Action::Fetch, 0x20_0000, 1);
    assert_eq!(vm.execute(0, &fetch).status, Status::Done);
    assert_eq!((vm.counters().pages_2m, vm.counters().nx_lpage_splits), (1, 0));
    vm.set_nx_huge_pages(true);
    assert_eq!(vm.execute(0, &fetch).status, Status::Done);
    assert_eq!((vm.counters().pages_2m, vm.counters().nx_lpage_splits), (0, 1));
    assert_eq!(vm.recover_nx_huge_pages(), 1);
    assert_eq!(vm.counters().nx_lpage_splits, 0);
    let zapped = vm.counters().mmu_shadow_zapped;
    vm.set_nx_huge_pages(true);
    assert_eq!(vm.counters().mmu_shadow_zapped, zapped, "no change, no zap");
    vm.audit().expect("the state is whole");
}

//! Every kind of damage is found. The state is made by the engine, then harmed by hand.

use crate::bits::{PT_NX, PT_U, PT_W};
use crate::config::Config;
use crate::cpu::Registers;
use crate::engine::Vm;
use crate::fault::insn::{Action, Insn};
use crate::memory::HostState;
use crate::policy::Kvm;
use crate::shadow::spte::{HOST_WRITABLE, MMU_WRITABLE, Spte};
use crate::types::{Gfn, Gpa, Level, PageId, SptePos};

/// Pages in the order in which the guest's first access makes them.
const ROOT: PageId = PageId(0);
const DIRECTORY: PageId = PageId(2);
const TABLE: PageId = PageId(3);

/// A guest whose table at 4000 maps 2 MiB one to one; entry 5 of the table is mapped, 6 of its neighbours with it, and
/// the table that maps 200000 is unsync.
fn guest() -> Vm {
    let mut vm = Vm::new(16 << 20, 2, Config::default(), Box::new(Kvm), 0).unwrap();
    let mut put = |gpa: u64, value: u64| vm.write_memory(Gpa(gpa), &value.to_le_bytes()).unwrap();
    put(0x1000, 0x2067);
    put(0x2000, 0x3067);
    put(0x3000, 0x4067);
    put(0x3008, 0x5067);
    for i in 0..512 {
        put(0x4000 + 8 * i, i << 12 | 0x67);
        put(0x5000 + 8 * i, (512 + i) << 12 | 0x67);
    }
    vm.set_sregs(0, Registers { cr3: 0x1000, ..Registers::default() }).unwrap();
    for (action, gva) in [(Action::Load, 0x10_0000), (Action::Load, 0x20_0000), (Action::Store, 0x5ff8)] {
        let insn = Insn { value: 0x3f_f067, ..Insn::new(action, gva, 8) };
        vm.execute(0, &insn);
    }
    assert_eq!((vm.counters().mmu_unsync, vm.audit(), vm.audit_translations()), (1, Ok(()), Ok(())));
    vm
}

fn leaf(vm: &Vm, gfn: u64) -> SptePos {
    vm.shadow.lists.first(vm.shadow.memory.rmap(Gfn(gfn), Level::PT)).unwrap()
}

/// Changes the entry that maps a frame, and nothing else.
fn change(vm: &mut Vm, gfn: u64, set: u64, clear: u64) {
    let pos = leaf(vm, gfn);
    let spte = Spte(vm.shadow.spte(pos).0 & !clear | set);
    vm.shadow.arena.update_spte(pos, spte);
}

fn finds(harm: impl FnOnce(&mut Vm), expected: &str) {
    let mut vm = guest();
    harm(&mut vm);
    let text = vm.audit().expect_err(expected).to_string();
    assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
}

#[test]
fn broken_lists_are_found() {
    let unlist = |vm: &mut Vm, times: usize| {
        let pos = leaf(vm, 0x100);
        let head = vm.shadow.memory.rmap_mut(Gfn(0x100), Level::PT).unwrap();
        if times == 0 { vm.shadow.lists.remove(head, pos) } else { _ = vm.shadow.lists.add(head, pos) }
    };
    finds(|vm| unlist(vm, 0), "maps gfn 0x100 and is in rmaps 0 times");
    finds(|vm| unlist(vm, 2), "maps gfn 0x100 and is in rmaps 2 times");
    finds(|vm| vm.shadow.arena.set_spte(TABLE.entry(0x100), Spte::EMPTY), "holds what does not map it");
    finds(|vm| vm.shadow.arena.set_spte(DIRECTORY.entry(0), Spte::EMPTY), "has a parent that points elsewhere");
    finds(|vm| _ = vm.shadow.lists.take(&mut vm.shadow.arena[TABLE].parents), "0 times among the parents");
    finds(|vm| vm.shadow.arena.list_remove(TABLE), "is not on the active list");
    finds(|vm| vm.shadow.arena[TABLE].used[0] |= 1 << 40, "is noted as used");
    finds(|vm| vm.shadow.arena[TABLE].used[4] = 0, "is noted as empty");
}

#[test]
fn broken_pages_are_found() {
    let role = |vm: &Vm, id: PageId| vm.shadow.arena[id].role;
    finds(|vm| vm.shadow.arena[TABLE].generation ^= 1, "is of generation 1 but not zapped");
    finds(|vm| vm.shadow.arena[TABLE].role = role(vm, TABLE).invalidated(), "was zapped and is no root, but not freed");
    finds(|vm| vm.shadow.arena[TABLE].role = role(vm, DIRECTORY), "of another level or mode");
    finds(|vm| vm.shadow.arena[TABLE].gfn = Gfn(0x9000), "outside the memslots");
    finds(|vm| vm.shadow.arena[ROOT].root_count += 1, "is 1 roots of vCPUs, not 2");
    finds(|vm| vm.vcpus[1].prev_roots[2] = vm.vcpus[0].root, "is 2 roots of vCPUs, not 1");
    finds(|vm| vm.vcpus[0].root.pgd = 0x1018, "but a root for 0x1018");
    finds(|vm| vm.vcpus[0].regs.efer = 0x500, "walks by rules of other registers");
    finds(|vm| vm.shadow.arena.set_spte(DIRECTORY.entry(7), Spte(0x1000)), "neither empty, leaf, table nor MMIO");
}

#[test]
fn broken_marks_are_found() {
    finds(|vm| vm.shadow.arena[TABLE].unsync = true, "is unsync, but entry");
    finds(|vm| vm.shadow.arena[ROOT].unsync_children += 1, "counts 2 unsync entries but marks 1");
    finds(|vm| vm.shadow.arena[ROOT].unsync = true, "is unsync, which its kind never is");
    finds(|vm| vm.shadow.arena[DIRECTORY].gfn = Gfn(5), "its frame is a table of an upper level too");
    let forget = |vm: &mut Vm| {
        vm.shadow.arena[ROOT].unsync_bitmap[0] = 0;
        vm.shadow.arena[ROOT].unsync_children = 0;
    };
    finds(forget, "has unsync pages below, but entry 0");
    // A mark that leads nowhere is what KVM's lazy clearing leaves behind.
    let mut vm = guest();
    vm.shadow.arena[DIRECTORY].unsync_bitmap[3] |= 1;
    vm.shadow.arena[DIRECTORY].unsync_children += 1;
    assert_eq!(vm.audit(), Ok(()));
}

#[test]
fn broken_counts_are_found() {
    finds(|vm| vm.shadow.counters.pages_4k += 1, "pages_4k: 24 are there, 25 are counted");
    finds(|vm| vm.shadow.counters.mmu_unsync = 0, "mmu_unsync: 1 are there");
    finds(|vm| vm.shadow.counters.nx_lpage_splits += 1, "nx_lpage_splits: 0 are there");
    finds(|vm| vm.shadow.used_pages -= 1, "used pages: 5 are there, 4 are counted");
    finds(|vm| vm.shadow.indirect_pages += 1, "pages with gptes: 5 are there");
    finds(|vm| vm.shadow.memory.books_mut(Gfn(3)).unwrap().track = 0, "write-track count is 0");
    finds(|vm| vm.shadow.memory.books_mut(Gfn(9)).unwrap().track = 1, "write-track count is 1");
    let counted = |vm: &mut Vm, begins| vm.shadow.memory.count_table(Gfn(5), false, begins);
    finds(|vm| assert_eq!(counted(vm, true)[1].0, 0), "noted are 6");
    finds(|vm| assert_eq!(counted(vm, false)[1].0, 0), "is shadowed by 1 pages, noted are 0");
    finds(|vm| vm.shadow.memory.books_mut(Gfn(9)).unwrap().tables = 1, "bookkeeping that does not add up");
    let readonly = |vm: &mut Vm| vm.shadow.memory.slot_mut(Gfn(0)).unwrap().readonly = true;
    finds(readonly, "lets the guest write as it likes");
}

#[test]
fn broken_leaves_are_found() {
    let writable = PT_W | MMU_WRITABLE;
    finds(|vm| change(vm, 0x100, 0, HOST_WRITABLE), "has W without host- and MMU-writable");
    finds(|vm| change(vm, 0x100, 1 << 12, 0), "maps pfn 0x40101 for gfn 0x100");
    finds(|vm| change(vm, 0x100, 0, PT_U), "has the rights w-x but was made from wux");
    finds(|vm| vm.shadow.memory.host.set_state(Gfn(0x100), HostState::Absent), "which is Absent");
    finds(|vm| vm.shadow.memory.slot_mut(Gfn(0)).unwrap().readonly = true, "in read-only slot 0");
    finds(|vm| vm.shadow.memory.set_dirty_log(0, true, false).unwrap(), "is not in the dirty log");
    finds(|vm| vm.shadow.memory.remove_slot(0), "outside the memslots");
    // 3000 is a directory, 4000 a table in step: both are mapped read-only beside 5000, which is out of step.
    finds(|vm| change(vm, 3, writable, 0), "maps gfn 0x3, shadowed by page 2");
    finds(|vm| change(vm, 4, writable, 0), "maps gfn 0x4, shadowed by page 3");
    finds(|vm| change(vm, 4, MMU_WRITABLE, 0), "maps gfn 0x4, shadowed by page 3");
    let mut vm = guest();
    change(&mut vm, 0x100, PT_NX, 0);
    assert_eq!(vm.audit(), Ok(()), "less than was granted is fine");
}

#[test]
fn as_many_leaves_may_inherit_w_as_mmio_entries_were_made() {
    let mut vm = guest();
    change(&mut vm, 3, PT_W | MMU_WRITABLE, 0);
    vm.vcpus[1].counters.pf_mmio_spte_created = 1;
    assert_eq!(vm.audit(), Ok(()));
    change(&mut vm, 4, PT_W | MMU_WRITABLE, 0);
    assert_eq!(vm.audit().unwrap_err().0.len(), 2);
}

#[test]
fn a_remembered_way_that_is_no_more_is_found() {
    finds(|vm| vm.shadow.memory.host.write(Gpa(0x3000), 8, 0x5067), "remembers a way to 0x0 that is no more");
    finds(|vm| vm.shadow.arena[TABLE].gfn = Gfn(9), "remembers a way to 0x0 that is no more");
}

#[test]
fn translations_that_the_guest_took_back_are_found() {
    let stale = |gpa: u64, value: u64| {
        let mut vm = guest();
        vm.write_memory(Gpa(gpa), &value.to_le_bytes()).unwrap();
        assert_eq!(vm.audit(), Ok(()), "the shadow by itself is whole");
        vm.audit_translations().map_err(|error| error.0.join("\n"))
    };
    let text = |gpa, value| stale(gpa, value).unwrap_err();
    assert!(text(0x4800, 0).contains("maps nothing"));
    assert!(text(0x4800, 0x20_0067).contains("grants wux to gfn 0x200"));
    assert!(text(0x4800, 0x10_0065).contains("it has wux"));
    assert!(text(0x4800, 0x10_0027).contains("grants -ux"), "a clean page is not writable");
    assert!(text(0x3000, 0x6067).contains("but points to page 3"));
    assert!(text(0x3000, 0x4063).contains("but points to page 3"));
    assert_eq!(stale(0x5000, 0), Ok(()), "an unsync table lags behind by right");
    assert_eq!(stale(0x4800, 0x10_0f7f), Ok(()), "bits that the shadow ignores");
}

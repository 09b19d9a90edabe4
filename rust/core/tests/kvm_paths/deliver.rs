//! Event delivery through the guest's own tables: double and triple faults.

use crate::switches::guest;
use shadowkvm_core::config::QEMU_TCG;
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{Delivery, Vm};
use shadowkvm_core::outcome::Status;
use shadowkvm_core::types::Gpa;

const IDT: u64 = 0xa000;
const GDT: u64 = 0xb000;
const TSS: u64 = 0xc000;
const STACK: u64 = 0xe000;
/// Mapped by nothing.
const NOWHERE: u64 = 0x4000_0000;

fn event(vector: u8, error_code: Option<u32>) -> Delivery {
    Delivery { vector, error_code, rip: 0x1234, user: false, soft: false, idt: IDT, gdt: GDT, tss: TSS, rsp: STACK }
}

fn long_guest() -> Vm {
    let mut vm = guest(QEMU_TCG, Registers { cr3: 0x3000, ..Registers::default() });
    for vector in [3u64, 8, 14] {
        let gate = (0x100 * vector) | 8 << 16 | 0x8e << 40 | 5 << 48; // the handler at 5_0000 + 100 * vector
        vm.write_memory(Gpa(IDT + 16 * vector), &gate.to_le_bytes()).expect("inside");
    }
    vm.write_memory(Gpa(TSS + 4), &STACK.to_le_bytes()).expect("inside");
    vm
}

#[test]
fn a_frame_is_pushed_and_the_handler_runs() {
    let mut vm = long_guest();
    let outcome = vm.deliver(0, &event(14, Some(6)));
    assert_eq!((outcome.status, outcome.error_code, outcome.value), (Status::Done, 14, STACK - 48));
    assert_eq!(outcome.address, 0x5_0e00);
    let frame = vm.read_memory(Gpa(STACK - 48), 16).expect("inside");
    assert_eq!(frame, [6u64.to_le_bytes(), 0x1234u64.to_le_bytes()].concat());
    vm.audit().expect("the state is whole");
}

#[test]
fn from_cpl_3_the_stack_comes_from_the_tss() {
    let mut vm = long_guest();
    let outcome = vm.deliver(0, &Delivery { user: true, rsp: 0xd000, ..event(3, None) });
    assert_eq!((outcome.status, outcome.error_code, outcome.value), (Status::Done, 3, STACK - 40));
    let old_rsp = vm.read_memory(Gpa(STACK - 16), 8).expect("inside");
    assert_eq!(old_rsp, 0xd000u64.to_le_bytes());
}

#[test]
fn a_page_fault_takes_the_place_of_a_benign_event_and_becomes_a_double_fault_after_another() {
    let mut vm = long_guest();
    let bad_stack = Delivery { rsp: NOWHERE, ..event(3, None) };
    let outcome = vm.deliver(0, &bad_stack);
    assert_eq!(outcome.status, Status::Shutdown, "#BP, #PF, #DF: the stack is gone for all of them");
    assert_eq!(vm.vcpu_counters().pf_guest, 3);
    let lines = vm.events().records().iter().map(ToString::to_string);
    let injected: Vec<_> = lines.filter(|line| line.starts_with("kvm_inj_exception")).collect();
    let expected = ["#BP [reinjected]", "#PF (0x2)", "#DF (0x0)"].map(|what| format!("kvm_inj_exception: {what}"));
    assert_eq!(injected, expected, "the first fault was one of the shadow only: the IDT's page was not mapped yet");
}

#[test]
fn a_double_fault_on_a_stack_of_its_own_is_delivered() {
    let mut vm = long_guest();
    // Gate 8 names stack 1 of the TSS.
    let gate = vm.read_memory(Gpa(IDT + 16 * 8 + 4), 1).expect("inside")[0] | 1;
    vm.write_memory(Gpa(IDT + 16 * 8 + 4), &[gate]).expect("inside");
    vm.write_memory(Gpa(TSS + 0x24), &0xf000u64.to_le_bytes()).expect("inside");
    let outcome = vm.deliver(0, &Delivery { rsp: NOWHERE, ..event(14, Some(0)) });
    assert_eq!((outcome.status, outcome.error_code, outcome.value), (Status::Done, 8, 0xf000 - 48));
    assert_eq!(vm.vcpu_counters().pf_guest, 1);
    vm.audit().expect("the state is whole");
}

#[test]
fn a_stack_on_the_guests_own_table_needs_no_emulation() {
    let mut vm = long_guest();
    // The stack's page becomes a page directory that is shadowed: PML4 -> PDPT -> e000.
    vm.write_memory(Gpa(0x8008), &0xd067u64.to_le_bytes()).expect("inside");
    vm.write_memory(Gpa(0xd000), &0x7067u64.to_le_bytes()).expect("inside");
    let mapped = shadowkvm_core::fault::insn::Insn::new(shadowkvm_core::fault::insn::Action::Load, 0x4000_0000, 8);
    assert_eq!(vm.execute(0, &mapped).status, Status::Done);
    let before = vm.vcpu_counters().insn_emulation;
    let outcome = vm.deliver(0, &Delivery { rsp: STACK, ..event(14, Some(0)) });
    assert_eq!(outcome.status, Status::Done);
    assert_eq!(vm.vcpu_counters().insn_emulation, before, "the table was unprotected first");
    vm.audit().expect("the state is whole");
}

#[test]
fn short_frames_are_of_4_bytes() {
    let regs = Registers { cr0: 0x8000_0033, cr3: 0x1000, cr4: 0x10, efer: 0, cs_l: false };
    let mut vm = guest(QEMU_TCG, regs);
    let gate = 0x0e00u64 | 8 << 16 | 0x8e << 40 | 5 << 48;
    vm.write_memory(Gpa(IDT + 8 * 14), &gate.to_le_bytes()).expect("inside");
    let outcome = vm.deliver(0, &event(14, Some(2)));
    assert_eq!((outcome.status, outcome.address, outcome.value), (Status::Done, 0x5_0e00, STACK - 16));
    vm.write_memory(Gpa(TSS + 4), &[0, 0xd0, 0, 0, 0x10, 0, 0, 0]).expect("inside");
    let outcome = vm.deliver(0, &Delivery { user: true, ..event(14, Some(2)) });
    assert_eq!((outcome.status, outcome.value), (Status::Done, 0xd000 - 24));
}

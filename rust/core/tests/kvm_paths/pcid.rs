//! Process-context identifiers: roots kept and let go by PCID, and INVPCID. Real KVM could not be asked (no PCID under
//! TCG): the rules are those of sections 8.7 to 8.9 of the specification.

use crate::switches::guest;
use shadowkvm_core::config::{CpuFeatures, QEMU_TCG, ZEN};
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{Control, Vm};
use shadowkvm_core::fault::insn::{Action, Insn};
use shadowkvm_core::outcome::Status;
use shadowkvm_core::types::Gpa;

const PCIDE: u64 = 1 << 17;
const NOFLUSH: u64 = 1 << 63;
const DESCRIPTOR: u64 = 0x9000;
/// The table at 7000 maps itself there, and the last page that is used here.
const TABLE: u64 = 0x7000;
const PAGE: u64 = 0x10_0000;

fn start() -> Vm {
    let regs = Registers { cr3: 0x3000, cr4: 0x20 | PCIDE, ..Registers::default() };
    let mut vm = guest(ZEN, regs);
    assert_eq!(read(&mut vm, PAGE), 0);
    vm
}

fn read(vm: &mut Vm, gva: u64) -> u64 {
    let outcome = vm.execute(0, &Insn::new(Action::Load, gva, 8));
    assert_eq!(outcome.status, Status::Done);
    vm.audit().expect("the state is whole");
    outcome.value
}

fn write(vm: &mut Vm, gva: u64, value: u64) {
    assert_eq!(vm.execute(0, &Insn { value, ..Insn::new(Action::Store, gva, 8) }).status, Status::Done);
}

fn load(vm: &mut Vm, cr3: u64) {
    assert_eq!(vm.control(0, Control::Cr3(cr3), None).status, Status::Done);
    vm.audit().expect("the state is whole");
}

fn invpcid(vm: &mut Vm, kind: u64, pcid: u64, gva: u64) -> Status {
    let bytes: Vec<u8> = pcid.to_le_bytes().into_iter().chain(gva.to_le_bytes()).collect();
    vm.write_memory(Gpa(DESCRIPTOR), &bytes).expect("inside");
    let status = vm.control(0, Control::Invpcid(kind, DESCRIPTOR), None).status;
    vm.audit().expect("the state is whole");
    status
}

fn flushes(vm: &Vm) -> (u64, u64) {
    let counters = vm.vcpu_counters();
    (counters.tlb_flush, counters.invlpg)
}

#[test]
fn a_load_with_bit_63_keeps_what_the_guest_may_still_use() {
    let mut vm = start();
    load(&mut vm, 0x3001); // so that both roots are cached: loading one anew brings it into step
    load(&mut vm, 0x3000);
    write(&mut vm, TABLE + 8 * (PAGE >> 12), 0x20_0067); // out of step: the page is elsewhere now
    let (before, _) = flushes(&vm);
    load(&mut vm, 0x3001 | NOFLUSH);
    load(&mut vm, 0x3000 | NOFLUSH);
    assert_eq!(flushes(&vm).0, before, "nothing was flushed");
    assert_eq!(vm.counters().mmu_unsync, 1, "nor brought into step");
    load(&mut vm, 0x3000);
    assert_eq!(vm.counters().mmu_unsync, 0);
    assert_eq!(flushes(&vm).0, before + 1);
}

#[test]
fn a_flush_of_a_pcid_lets_its_previous_roots_go() {
    let mut vm = start();
    for cr3 in [0x3001, 0x3002] {
        load(&mut vm, cr3 | NOFLUSH);
        read(&mut vm, PAGE);
    }
    let cached = |vm: &Vm| {
        vm.vcpus()[0].prev_roots.iter().filter(|root| root.is_loaded()).map(|root| root.pgd).collect::<Vec<_>>()
    };
    assert_eq!(cached(&vm), [0x3001, 0x3000]);
    assert_eq!(invpcid(&mut vm, 1, 1, 0), Status::Done);
    assert_eq!(cached(&vm), [0x3000], "PCID 1 went");
    let before = flushes(&vm);
    assert_eq!(invpcid(&mut vm, 1, 7, 0), Status::Done);
    assert_eq!((flushes(&vm), cached(&vm).len()), (before, 1), "a PCID that nobody has");
    load(&mut vm, 0x3002);
    assert_eq!(flushes(&vm).0, before.0 + 1, "the active one is flushed");
}

#[test]
fn invpcid_of_an_address_takes_the_roots_of_its_pcid() {
    let mut vm = start();
    write(&mut vm, TABLE + 8 * (PAGE >> 12), 0x20_0067);
    vm.write_memory(Gpa(0x20_0000), &7u64.to_le_bytes()).expect("inside");
    assert_eq!(read(&mut vm, PAGE), 0, "the old translation may be used");
    assert_eq!(invpcid(&mut vm, 0, 5, PAGE), Status::Done);
    assert_eq!(read(&mut vm, PAGE), 0, "another PCID's");
    assert_eq!(invpcid(&mut vm, 0, 0, PAGE), Status::Done);
    assert_eq!((read(&mut vm, PAGE), flushes(&vm).1), (7, 2));
    assert_eq!(invpcid(&mut vm, 2, 0, 0), Status::Done);
    assert_eq!(vm.counters().mmu_unsync, 0, "all PCIDs: everything is in step");
    assert_eq!(invpcid(&mut vm, 3, 0, 0), Status::Done);
}

#[test]
fn bad_descriptors_and_cpus_without_it() {
    let mut vm = start();
    for (kind, pcid, gva) in [(0, 1 << 12, 0), (0, 0, 1 << 60), (1, 1 << 40, 0), (4, 0, 0)] {
        assert_eq!(invpcid(&mut vm, kind, pcid, gva), Status::GeneralProtection, "{kind} {pcid:#x} {gva:#x}");
    }
    assert_eq!(vm.control(0, Control::Invpcid(0, 0x4000_0000), None).status, Status::PageFault, "no descriptor there");
    assert_eq!(vm.control(0, Control::Invpcid(2, DESCRIPTOR + 0xff8), None).status, Status::Done, "over a page's end");
    let mut without = guest(ZEN, Registers { cr3: 0x3000, ..Registers::default() });
    assert_eq!(invpcid(&mut without, 1, 1, 0), Status::GeneralProtection, "PCIDE is off");
    assert_eq!(invpcid(&mut without, 1, 0, 0), Status::Done);
    let old = CpuFeatures { invpcid: false, ..QEMU_TCG };
    let mut none = guest(old, Registers { cr3: 0x3000, ..Registers::default() });
    assert_eq!(invpcid(&mut none, 2, 0, 0), Status::InvalidOpcode);
}

#[test]
fn leaving_pcids_flushes_and_entering_them_lets_all_roots_go() {
    let mut vm = start();
    let (before, _) = flushes(&vm);
    assert_eq!(vm.control(0, Control::Cr4(0x20), None).status, Status::Done);
    assert_eq!(flushes(&vm).0, before + 1);
    read(&mut vm, PAGE);
    load(&mut vm, 0x3018);
    assert_eq!(vm.control(0, Control::Cr4(0x20 | PCIDE), None).status, Status::GeneralProtection, "CR3[11:0] is not 0");
    load(&mut vm, 0x3000);
    assert_eq!(vm.control(0, Control::Cr4(0x20 | PCIDE), None).status, Status::Done);
    assert!(vm.vcpus()[0].prev_roots.iter().all(|root| !root.is_loaded()));
}

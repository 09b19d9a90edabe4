//! Paging modes that change at run time: what is legal, what is #GP and changes nothing, and what becomes of the roots.

use shadowkvm_core::config::{Config, CpuFeatures, QEMU_TCG, ZEN};
use shadowkvm_core::cpu::{Registers, Top};
use shadowkvm_core::engine::{Control, Vm};
use shadowkvm_core::events::EventLog;
use shadowkvm_core::fault::insn::{Action, Insn};
use shadowkvm_core::outcome::Status;
use shadowkvm_core::policy::Kvm;
use shadowkvm_core::types::Gpa;

const PG: u64 = 1 << 31;
const PE_ET_NE: u64 = 0x33;
const PSE: u64 = 0x10;
const PAE: u64 = 0x20;
const LME: u64 = 0x100;
const LMA: u64 = 0x400;

/// A guest with tables for every mode that map the first 2 MiB one to one: 32-bit at 1000, PAE at 2000, 4-level at 3000,
/// 5-level at 4000.
pub(crate) fn guest(cpu: CpuFeatures, regs: Registers) -> Vm {
    let config = Config { cpu, ..Config::default() };
    let mut vm = Vm::new(16 << 20, 1, config, Box::new(Kvm), EventLog::EVERYTHING).expect("a good configuration");
    let mut put = |gpa: u64, value: u64, size: usize| {
        vm.write_memory(Gpa(gpa), &value.to_le_bytes()[..size]).expect("inside the memory");
    };
    put(0x1000, 0x5067, 4);
    (0..1024).for_each(|i| put(0x5000 + 4 * i, i << 12 | 0x67, 4));
    put(0x2000, 0x6001, 8);
    put(0x6000, 0x7067, 8);
    (0..512).for_each(|i| put(0x7000 + 8 * i, i << 12 | 0x67, 8));
    put(0x3000, 0x8067, 8);
    put(0x8000, 0x6067, 8);
    put(0x4000, 0x3067, 8);
    vm.set_sregs(0, regs).expect("good registers");
    vm
}

fn off() -> Registers {
    Registers { cr0: PE_ET_NE, cr3: 0x1000, cr4: 0, efer: 0, cs_l: false }
}

fn works(vm: &mut Vm) -> bool {
    let outcome = vm.execute(0, &Insn::new(Action::Load, 0x10_0000, 4));
    vm.audit().expect("the state is whole");
    outcome.status == Status::Done
}

fn does(vm: &mut Vm, what: Control) -> Status {
    let before = vm.vcpus()[0].regs;
    let status = vm.control(0, what, None).status;
    if status == Status::GeneralProtection {
        assert_eq!(vm.vcpus()[0].regs, before, "{what:?} is refused and changes nothing");
    }
    vm.audit().expect("the state is whole");
    status
}

#[test]
fn a_guest_climbs_through_all_modes_and_back() {
    let mut vm = guest(ZEN, off());
    let mode = |vm: &Vm| vm.vcpus()[0].regs.mode().name;
    assert!(works(&mut vm));
    let climb: [(&[Control], &str); 5] = [
        (&[Control::Cr4(PSE), Control::Cr0(PG | PE_ET_NE)], "32-bit paging"),
        (&[Control::Cr0(PE_ET_NE), Control::Cr3(0x2000), Control::Cr4(PAE), Control::Cr0(PG | PE_ET_NE)], "PAE paging"),
        (
            &[Control::Cr0(PE_ET_NE), Control::Cr3(0x3000), Control::Efer(LME), Control::Cr0(PG | PE_ET_NE)],
            "4-level paging",
        ),
        (
            &[Control::Cr0(PE_ET_NE), Control::Cr3(0x4000), Control::Cr4(PAE | 1 << 12), Control::Cr0(PG | PE_ET_NE)],
            "5-level paging",
        ),
        (&[Control::Cr0(PE_ET_NE)], "paging off"),
    ];
    for (steps, name) in climb {
        for step in steps {
            assert_eq!(does(&mut vm, *step), Status::Done, "{step:?} on the way to {name}");
        }
        assert_eq!(mode(&vm), name);
        assert!(works(&mut vm), "{name}");
        let lma = vm.vcpus()[0].regs.lma();
        assert_eq!(lma, name.contains("level"), "LMA follows LME and PG");
        assert_eq!(matches!(vm.vcpus()[0].root.top, Top::Page(_)), lma);
    }
}

#[test]
fn what_no_cpu_allows_is_a_general_protection_fault() {
    let mut vm = guest(ZEN, Registers { cr3: 0x3000, ..Registers::default() });
    for what in [
        Control::Cr0(PE_ET_NE),                // paging off in 64-bit code
        Control::Cr0(PG),                      // PG without PE
        Control::Cr0(PG | PE_ET_NE | 1 << 29), // NW without CD
        Control::Cr4(0),                       // long mode without PAE
        Control::Cr4(PAE | 1 << 12),           // LA57 while long mode is on
        Control::Cr4(PAE | 1 << 22),           // no protection keys here
        Control::Efer(0),                      // LME while paging is on
        Control::Efer(LME | LMA | 1 << 1),     // a reserved bit
        Control::Cr3(1 << 50),                 // beyond MAXPHYADDR
    ] {
        assert_eq!(does(&mut vm, what), Status::GeneralProtection, "{what:?}");
    }
    let mut vm = guest(ZEN, Registers { efer: LME, ..off() });
    assert_eq!(does(&mut vm, Control::Cr0(PG | PE_ET_NE)), Status::GeneralProtection, "long mode needs PAE");
    let mut vm = guest(ZEN, Registers { cr0: PG | PE_ET_NE, cr3: 0x2000, cr4: PAE, ..off() });
    assert_eq!(does(&mut vm, Control::Cr4(PAE | 1 << 17)), Status::GeneralProtection, "PCIDE needs long mode");
    let mut vm = guest(QEMU_TCG, Registers { cr3: 0x3000, ..Registers::default() });
    assert_eq!(does(&mut vm, Control::Cr4(PAE | 1 << 17)), Status::GeneralProtection, "a CPU without PCID");
}

#[test]
fn pdptes_are_read_at_loads_only_and_checked_there() {
    let mut vm = guest(QEMU_TCG, Registers { cr0: PG | PE_ET_NE, cr3: 0x2000, cr4: PAE, ..off() });
    assert!(works(&mut vm));
    let second = |vm: &mut Vm| vm.execute(0, &Insn::new(Action::Load, 0x4010_0000, 4)).status;
    vm.write_memory(Gpa(0x2008), &0x6001u64.to_le_bytes()).expect("inside");
    assert_eq!(second(&mut vm), Status::PageFault, "the register has the old value");
    let root = vm.vcpus()[0].root;
    assert_eq!(does(&mut vm, Control::Cr3(0x2000)), Status::Done);
    assert_eq!(second(&mut vm), Status::Done);
    assert_ne!(vm.vcpus()[0].root, root, "a changed PDPTE lets the root go");
    for bad in [0x6001u64 | 2, 0x6001 | 1 << 5, 0x6001 | 1 << 63, 0x6001 | 1 << 45] {
        vm.write_memory(Gpa(0x2010), &bad.to_le_bytes()).expect("inside");
        assert_eq!(does(&mut vm, Control::Cr3(0x2000)), Status::GeneralProtection, "{bad:#x}");
        assert_eq!(does(&mut vm, Control::Cr4(PAE | 0x80)), Status::GeneralProtection, "PGE reads them, too");
    }
    vm.write_memory(Gpa(0x2010), &0x6006u64.to_le_bytes()).expect("inside");
    assert_eq!(does(&mut vm, Control::Cr3(0x2000)), Status::Done, "reserved bits of one that is not present");
    assert!(works(&mut vm));
}

#[test]
fn addresses_beyond_4_gib_are_a_matter_of_long_mode() {
    for regs in [off(), Registers { cr0: PG | PE_ET_NE, cr4: PSE, ..off() }] {
        let mut vm = guest(ZEN, regs);
        let status = vm.execute(0, &Insn::new(Action::Load, 1 << 32, 4)).status;
        assert_eq!(status, Status::GeneralProtection);
    }
}

#[test]
fn user_space_changes_modes_as_it_likes() {
    let mut vm = guest(ZEN, Registers { cr3: 0x3000, ..Registers::default() });
    assert!(works(&mut vm));
    let pae = Registers { cr0: PG | PE_ET_NE, cr3: 0x2000, cr4: PAE, ..off() };
    for regs in [pae, off(), Registers { cr3: 0x3000, ..Registers::default() }] {
        vm.set_sregs(0, regs).expect("possible");
        assert!(works(&mut vm), "{regs:x?}");
    }
    let before = vm.vcpus()[0].clone();
    assert!(vm.set_sregs(0, Registers { cr4: 0, ..Registers::default() }).is_err());
    assert!(vm.set_sregs(1, off()).is_err(), "no such vCPU");
    assert_eq!(vm.vcpus()[0].regs, before.regs);
    assert_eq!(vm.vcpus()[0].root, before.root);
}

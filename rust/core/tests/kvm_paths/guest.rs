//! The guest of the recorded runs: it reads ops from a list and carries them out, one after the other.
//!
//! Its own accesses are part of what KVM counted, so they are made too: code at 200000, ops at 210000, the user's code at
//! 220000, and what the CPU touches to deliver an exception (IDT 201000, GDT 202000, TSS 203000, stack below 206000).
//! The start state: 64 MiB; PML4 at 1000, PDPT at 2000, PD at 3000, page tables 4000 to b000 that map 16 MiB one to one.

use shadowkvm_core::config::{Config, QEMU_TCG};
use shadowkvm_core::cpu::Registers;
use shadowkvm_core::engine::{Control, Vm};
use shadowkvm_core::events::EventLog;
use shadowkvm_core::fault::insn::{Action, Insn, RmwKind};
use shadowkvm_core::memory::HostState;
use shadowkvm_core::outcome::{Outcome, Status};
use shadowkvm_core::policy::Kvm;
use shadowkvm_core::types::{Gpa, Gva};

const RAM: u64 = 64 << 20;
const OPS: u64 = 0x210000;
const GDT: u64 = 0x202000;
const TSS_RSP0: u64 = 0x203004;
const STACK: u64 = 0x206000;
const SLOT1: u64 = 0x1000_0000;

/// A guest with one vCPU or two, and the place in the op list that each has reached.
pub(crate) struct Guest {
    pub(crate) vm: Vm,
    cpu: usize,
    turn: u64,
    rsp: u64,
    pub(crate) idt: u64,
    /// How often KVM decoded an INT3 again whose delivery faulted (it has no NRIPS there), by occurrence.
    pub(crate) int3_decodes: Vec<u32>,
    /// Error codes of the #PFs that the guest took.
    pub(crate) faults: Vec<u32>,
}

/// One op of the list: letters, operand, and `=value,extra`.
#[derive(Clone, Copy)]
struct Op<'a> {
    letters: &'a str,
    address: u64,
    value: u64,
    extra: u64,
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("{text:?} is no hex number"))
}

/// The ops of a text, `R 400000; W 6008=500063`. `x66 +200000` repeats an op with a step of its address, a second step
/// is the value's. Without letters (`6008=500063`) it is a quadword of the guest's memory.
fn parse(text: &str) -> impl Iterator<Item = Op<'_>> {
    text.split(';').map(str::trim).filter(|op| !op.is_empty()).flat_map(|op| {
        let mut words = op.split_whitespace().peekable();
        let letters = words.next_if(|word| !word.contains('=')).unwrap_or("");
        let (address, rest) =
            words.next().map_or(("0", ""), |operand| operand.split_once('=').unwrap_or((operand, "")));
        let (value, extra) = rest.split_once(',').unwrap_or((rest, "0"));
        let value = if value.is_empty() { "0" } else { value };
        let times = words.next().map_or(1, |times| times[1..].parse().expect("xN"));
        let mut step = || words.next().map_or(0, |step| hex(&step[1..]));
        let (address, value, extra, by, value_by) = (hex(address), hex(value), hex(extra), step(), step());
        (0..times).map(move |i| Op { letters, address: address + i * by, value: value + i * value_by, extra })
    })
}

impl Guest {
    /// The guest with some quadwords of its memory changed (`3010=6007; 6140=428003 x8 +8 +1000`), host pages as given,
    /// and registers that differ.
    pub(crate) fn new(memory: &str, host: HostState, change: impl FnOnce(&mut Registers)) -> Self {
        let config = Config { cpu: QEMU_TCG, ..Config::default() };
        let mut vm = Vm::new(RAM, 2, config, Box::new(Kvm), EventLog::EVERYTHING).expect("a good configuration");
        vm.set_host_pages(Gpa(0), RAM, host).expect("slot 0");
        let mut used = std::collections::BTreeSet::new();
        let mut put = |gpa: u64, value: u64| {
            used.insert(gpa & !0xfff);
            vm.write_memory(Gpa(gpa), &value.to_le_bytes()).expect("inside slot 0");
        };
        put(0x1000, 0x2067);
        put(0x2000, 0x3067);
        for table in 0..8 {
            let at = 0x4000 + 0x1000 * table;
            put(0x3000 + 8 * table, at | 0x67);
            (0..512).for_each(|i| put(at + 8 * i, (table * 512 + i) << 12 | 0x63));
        }
        put(0x5100, 0x22_0067);
        for word in parse(memory) {
            put(word.address, word.value);
        }
        // The pages of code, IDT, GDT, TSS and ops hold something too; what it is does not matter.
        for gpa in [0x200000, 0x201000, GDT, 0x203000, OPS, 0x220000] {
            put(gpa, 0x90);
        }
        if host == HostState::Zero {
            for page in used {
                vm.set_host_pages(Gpa(page), 0x1000, HostState::Writable).expect("slot 0");
            }
        }
        let mut regs = Registers { cr0: 0x8001_0033, cr3: 0x1000, cr4: 0x20, efer: 0xd00, cs_l: true };
        change(&mut regs);
        (0..2).for_each(|cpu| vm.set_sregs(cpu, regs).expect("long mode"));
        Self { vm, cpu: 0, turn: 0, rsp: STACK, idt: 0x201000, int3_decodes: Vec::new(), faults: Vec::new() }
    }

    /// Runs a list of ops on a vCPU that has just begun.
    pub(crate) fn run(&mut self, cpu: usize, ops: &str) {
        self.enter(cpu);
        self.go_on(cpu, ops);
        self.leave(cpu);
    }

    /// The first instruction: a root is loaded, the code is mapped.
    pub(crate) fn enter(&mut self, cpu: usize) {
        self.cpu = cpu;
        self.code(0x200000);
    }

    /// More ops.
    pub(crate) fn go_on(&mut self, cpu: usize, ops: &str) {
        self.cpu = cpu;
        for op in parse(ops) {
            self.next_op();
            if self.op(op) == Status::Shutdown {
                return;
            }
            self.code(0x200108);
        }
    }

    /// The HLT that ends the list.
    pub(crate) fn leave(&mut self, cpu: usize) {
        self.cpu = cpu;
        self.next_op();
        self.control(Control::Hlt, 0x2001d4);
    }

    fn next_op(&mut self) {
        let entry = OPS + 32 * self.turn;
        self.turn += 1;
        for word in 0..4 {
            self.run_insn(Insn { rip: Some(0x200007), ..Insn::new(Action::Load, entry + 8 * word, 8) });
        }
    }

    fn code(&mut self, rip: u64) {
        self.run_insn(Insn::new(Action::Fetch, rip, 1));
    }

    fn run_insn(&mut self, insn: Insn) -> Outcome {
        self.vm.execute(self.cpu, &insn)
    }

    fn control(&mut self, what: Control, rip: u64) -> Status {
        self.vm.control(self.cpu, what, Some(rip)).status
    }

    /// One op at the address of its instruction, and the jump that follows.
    fn op(&mut self, op: Op<'_>) -> Status {
        let Op { letters, address, value, .. } = op;
        let (status, next) = match letters {
            "INV" => (self.control(Control::Invlpg(address), 0x200128), 0x20012b),
            "CR0" => (self.control(Control::Cr0(address), 0x200136), 0x200139),
            "CR3" => (self.control(Control::Cr3(address), 0x20012d), 0x200130),
            "CR4" => (self.control(Control::Cr4(address), 0x20013b), 0x20013e),
            "EFER" => (self.control(Control::Efer(address), 0x20019d), 0x20019f),
            "HOST" => {
                self.control(Control::Io, 0x200142);
                self.host(address);
                (Status::Done, 0x200144)
            }
            "CALL" => return self.call(address),
            "INT3" => return self.int3(),
            "UR" => return self.as_user(0x220000, Insn::new(Action::Load, address, 8)),
            "UW" => return self.as_user(0x220010, Insn { value, ..Insn::new(Action::Store, address, 8) }),
            _ => {
                let (insn, length) = insn_of(op);
                let outcome = self.run_insn(insn);
                let rip = insn.rip_or_zero();
                if outcome.status == Status::PageFault {
                    self.guest_fault(outcome, false);
                    return outcome.status;
                }
                (outcome.status, rip + length)
            }
        };
        if status != Status::Shutdown {
            self.code(next);
        }
        status
    }

    fn guest_fault(&mut self, outcome: Outcome, user: bool) {
        self.faults.push(outcome.error_code);
        self.deliver(14, user, true);
        self.code(0x200800);
        self.rsp = STACK;
    }

    /// CALL: pushes the return address, then fetches the target; what stands there returns at once.
    fn call(&mut self, target: u64) -> Status {
        self.push(0x200134, 0x200132);
        let outcome = self.run_insn(Insn::new(Action::Fetch, target, 1));
        if outcome.status == Status::PageFault {
            self.guest_fault(outcome, false);
        }
        self.rsp = STACK;
        outcome.status
    }

    fn push(&mut self, value: u64, rip: u64) {
        self.rsp -= 8;
        self.run_insn(Insn { value, writes_tables: false, rip: Some(rip), ..Insn::new(Action::Store, self.rsp, 8) });
    }

    /// IRET to CPL 3, the user's one instruction, and INT 81 back.
    fn as_user(&mut self, rip: u64, insn: Insn) -> Status {
        (0..5).for_each(|_| self.push(0, 0x2001f1));
        for word in 0..5 {
            self.run_insn(Insn { rip: Some(0x2001fb), ..Insn::new(Action::Load, self.rsp + 8 * word, 8) });
        }
        for selector in [0x20, 0x18] {
            self.run_insn(Insn { system: true, ..Insn::new(Action::Load, GDT + selector, 8) });
        }
        self.rsp = STACK;
        let outcome = self.run_insn(Insn { user: true, rip: Some(rip), ..insn });
        if outcome.status == Status::PageFault {
            self.guest_fault(outcome, true);
        } else {
            self.run_insn(Insn { user: true, ..Insn::new(Action::Fetch, rip + 3, 1) });
            self.deliver(0x81, true, false);
            self.code(0x200840);
            self.rsp = STACK;
        }
        outcome.status
    }

    /// What the CPU touches to deliver an exception: gate, code segment, RSP0 from CPL 3, frame.
    fn deliver(&mut self, vector: u64, user: bool, with_code: bool) {
        let access = |action, gva| Insn { user, delivery: true, writes_tables: false, ..Insn::new(action, gva, 8) };
        let gate = self.idt + 16 * vector;
        for gva in [gate, gate + 8, GDT + 8] {
            self.run_insn(access(Action::Load, gva));
        }
        if user {
            self.run_insn(access(Action::Load, TSS_RSP0));
        }
        for _ in 0..5 + u32::from(with_code) {
            self.rsp -= 8;
            self.run_insn(access(Action::Store, self.rsp));
        }
    }

    /// INT3. Without NRIPS KVM decodes it again after a fault in its delivery; skipping a HLT is the same decoding.
    fn int3(&mut self) -> Status {
        self.code(0x2001c8);
        let before = self.vm.vcpu_counters().pf_taken;
        self.deliver(3, false, false);
        if self.vm.vcpu_counters().pf_taken != before {
            (0..self.int3_decodes.remove(0)).for_each(|_| _ = self.control(Control::Hlt, 0x2001c8));
        }
        self.code(0x200840);
        self.rsp = STACK;
        Status::Done
    }

    /// What user space does, by the numbers of the recordings.
    fn host(&mut self, action: u64) {
        let vm = &mut self.vm;
        let done = match action {
            1 => vm.set_dirty_log(0, true),
            2 => vm.get_dirty_log(0).map(|_| ()),
            3 => vm.set_dirty_log(0, false),
            4 => vm.add_slot(1, Gpa(SLOT1), 0x10_0000, false, false),
            5 => vm.delete_slot(1),
            6 => vm.notifier_unmap(Gpa(0x400000), 0x2000),
            7 => {
                let table = vm.read_memory(Gpa(0x6000), 4096).expect("slot 0");
                let done = vm.notifier_unmap(Gpa(0x6000), 0x1000);
                vm.write_memory(Gpa(0x6000), &table).expect("slot 0");
                done
            }
            _ => panic!("HOST {action} is not known"),
        };
        done.expect("the host may do that");
    }

    /// Adds the read-only slot of some runs.
    pub(crate) fn add_readonly_slot(&mut self) {
        self.vm.add_slot(1, Gpa(SLOT1), 0x10_0000, true, false).expect("beside slot 0");
    }
}

/// The instruction behind a letter, and its length.
fn insn_of(op: Op<'_>) -> (Insn, u64) {
    let Op { letters, address, value, extra } = op;
    let store = |size, rip| Insn { value, rip: Some(rip), ..Insn::new(Action::Store, address, size) };
    let rmw = |kind, rip| Insn { value, rip: Some(rip), ..Insn::new(Action::Rmw(kind), address, 8) };
    match letters {
        "R" => (Insn { rip: Some(0x200111), ..Insn::new(Action::Load, address, 8) }, 3),
        "RAC" => (Insn { rip: Some(0x2001b7), ac: true, ..Insn::new(Action::Load, address, 8) }, 3),
        "W" => (store(8, 0x200116), 3),
        "W32" => (store(4, 0x20011b), 2),
        "W16" => (store(2, 0x200123), 3),
        "W8" => (store(1, 0x20011f), 2),
        "PUSH" => {
            let push = store(8, 0x20017c);
            (Insn { gva: Gva(address - 8), writes_tables: false, ..push }, 1)
        }
        "MOVAPS" => (Insn { writes_tables: false, ..store(16, 0x20018c) }, 3),
        "REPSTOS" => (Insn { writes_tables: false, rep: true, repeat: extra as u32, ..store(8, 0x200171) }, 3),
        "XCHG" => (rmw(RmwKind::Xchg, 0x200149), 3),
        "LCMPXCHG" => (Insn { expected: Some(extra), ..rmw(RmwKind::Cmpxchg, 0x200151) }, 5),
        "LOR" => (rmw(RmwKind::Or, 0x200160), 4),
        "ADDM" => (Insn { locked: false, writes_tables: false, ..rmw(RmwKind::Add, 0x200166) }, 3),
        _ => panic!("op {letters} is not known"),
    }
}

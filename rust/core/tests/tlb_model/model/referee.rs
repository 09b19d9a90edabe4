//! Holds the engine to the model, operation by operation: what changes in memory, in the registers, in the TLBs.

use super::control::{State, Verdict};
use super::memory::{A, At, D, Memory};
use super::rules::{Kind, Mode, Seen};
use super::shadow;
use super::tlb::Tlb;
use super::touch::{Control, Plan};
use super::walk::{fault_now, walk_now};
use crate::decode::Act;
use crate::world::{MEMORY, Machine, Paging, SLOT1};
use shadowkvm_core::config::CpuFeatures;
use shadowkvm_core::engine::Vm;
use shadowkvm_core::outcome::{Outcome, Status};
use shadowkvm_core::types::{Gfn, Gpa};
use std::collections::BTreeSet;

/// The model beside the engine.
pub(crate) struct Referee {
    pub(crate) memory: Memory,
    pub(crate) tlbs: Vec<Tlb>,
    pub(crate) cpu: CpuFeatures,
    /// How entries were read up to now, by any vCPU.
    pub(crate) seen: Seen,
    /// Frames that are compared after each operation: those with anything in them.
    hot: BTreeSet<u64>,
    /// The number of the operation.
    now: u64,
}

/// What an operation may do, found out before it is done.
pub(crate) struct Before {
    pub(crate) plan: Plan,
    /// How the vCPU reads entries and checks rights.
    pub(crate) mode: Mode,
    /// For each touch, where it may go.
    pub(crate) targets: Vec<Vec<u64>>,
    /// For each touch, the fault that the tables give.
    pub(crate) faults: Vec<Option<u32>>,
    /// For each touch, the entries on its way.
    pub(crate) paths: Vec<Vec<At>>,
    /// The only touch is an access for which KVM must walk the tables, and the protection keys shut it out.
    pub(crate) locked: bool,
    /// What a control instruction comes to, where that can be told.
    pub(crate) verdict: Option<Verdict>,
    /// INVPCID's descriptor.
    descriptor: Option<[u64; 2]>,
    /// The words that changed: frame, index, value before.
    pub(crate) changed: Vec<(u64, usize, u64)>,
}

impl Referee {
    /// Knows the VM that this machine just built.
    pub(crate) fn new(vm: &Vm, machine: Machine) -> Self {
        let cpu = machine.cpu();
        let mut memory = Memory::default();
        memory.unmarked = SLOT1.0 >> 12;
        memory.gone = vm.read_memory(Gpa(SLOT1.0), 1).is_err();
        let mut hot = BTreeSet::new();
        for gfn in (0..MEMORY >> 12).chain(SLOT1.0 >> 12..(SLOT1.0 + SLOT1.1) >> 12) {
            let written = machine.writes(gfn);
            if written {
                hot.insert(gfn);
            }
            memory.load(gfn, written.then(|| read_frame(vm, gfn)));
        }
        let state = |vcpu: &shadowkvm_core::cpu::Vcpu| {
            let state = State { regs: vcpu.regs, pdptes: [0; 4], pkru: vcpu.pkru };
            if state.paging() == Paging::Pae { state.load_pdptes(&memory, &cpu).expect("a legal PDPT") } else { state }
        };
        let tlbs: Vec<_> = vm.vcpus().iter().map(|vcpu| Tlb::new(state(vcpu), cpu)).collect();
        let mut referee = Self { memory, tlbs, cpu, seen: Seen::default(), hot, now: 0 };
        referee.note_modes();
        referee
    }

    fn note_modes(&mut self) {
        for tlb in &self.tlbs {
            tlb.mode().note(&mut self.seen);
        }
    }

    /// To be called before each operation.
    pub(crate) fn before(&mut self, vm: &Vm, act: &Act) -> Before {
        let plan = Plan::of(vm, act);
        let tlb = &self.tlbs[plan.vcpu];
        let mode = tlb.mode();
        let (mut targets, mut faults, mut paths) = (Vec::new(), Vec::new(), Vec::new());
        for touch in &plan.touches {
            targets.push(tlb.targets(&self.memory, self.seen, &touch.access, false));
            faults.push(fault_now(&self.memory, tlb.base(), &touch.access, mode));
            let mut path = Vec::new();
            let _ = walk_now(&self.memory, tlb.base(), touch.access.gva, mode, |at| path.push(at));
            paths.push(path);
        }
        let locked = match plan.touches.as_slice() {
            [touch] if mode.pkru.is_some() && mode.takes(touch.access.gva) => {
                shadow::has_nothing(vm, plan.vcpu, touch.access.gva)
                    && tlb.targets(&self.memory, self.seen, &touch.access, true).is_empty()
            }
            _ => false,
        };
        self.hot.extend(targets.iter().flatten());
        self.hot.extend(paths.iter().flatten().map(|at| at.gfn));
        if let Some((gpa, bytes)) = plan.host_range {
            self.hot.extend(gpa >> 12..(gpa + bytes).div_ceil(4096));
        }
        self.hot.retain(|gfn| self.memory.frame(*gfn).is_some());
        let descriptor = self.descriptor(&plan, &targets);
        let verdict = plan.control.and_then(|control| self.verdict(plan.vcpu, control, descriptor));
        Before { plan, mode, targets, faults, paths, locked, verdict, descriptor, changed: Vec::new() }
    }

    /// The 16 bytes that INVPCID reads, if there is no doubt where.
    fn descriptor(&self, plan: &Plan, targets: &[Vec<u64>]) -> Option<[u64; 2]> {
        let Some(Control::Invpcid(_)) = plan.control else { return None };
        let mut words = [0; 2];
        for (touch, targets) in plan.touches.iter().zip(targets) {
            let [gfn] = targets.as_slice() else { return None };
            let frame = self.memory.frame(*gfn).filter(|_| !(self.memory.gone && *gfn >= self.memory.unmarked))?;
            for byte in 0..touch.bytes {
                let (at, to) = ((touch.access.gva & 0xfff) + byte, touch.from + byte);
                words[to as usize / 8] |= (frame[at as usize / 8] >> (at % 8 * 8) & 0xff) << (to % 8 * 8);
            }
        }
        Some(words)
    }

    fn verdict(&self, vcpu: usize, control: Control, descriptor: Option<[u64; 2]>) -> Option<Verdict> {
        let (state, memory, cpu) = (self.tlbs[vcpu].state, &self.memory, &self.cpu);
        Some(match control {
            Control::Cr0(value) => state.mov_cr0(value, memory, cpu),
            Control::Cr3(value) => state.mov_cr3(value, memory, cpu),
            Control::Cr4(value) => state.mov_cr4(value, memory, cpu),
            Control::Efer(value) => state.wrmsr_efer(value),
            Control::Invpcid(kind) if !cpu.invpcid || kind > 3 => state.invpcid(kind, [0; 2], cpu),
            Control::Invpcid(kind) => state.invpcid(kind, descriptor?, cpu),
            Control::Invlpg(_) | Control::Plain => Verdict::Fine(state),
        })
    }

    /// To be called after it.
    pub(crate) fn after(
        &mut self,
        vm: &Vm,
        act: &Act,
        mut before: Before,
        outcome: Option<Outcome>,
    ) -> Result<(), String> {
        self.now += 1;
        before.changed = self.note_changes(vm, &before);
        match (outcome, act) {
            (Some(outcome), _) => {
                self.check_changes(&before)?;
                self.check_outcome(vm, &before, &outcome)?;
                self.update(vm, &before, &outcome);
            }
            (None, Act::Sregs(vcpu, regs)) => {
                let tlb = &mut self.tlbs[*vcpu];
                if let Some(state) = tlb.state.set_sregs(*regs, &self.memory, &self.cpu) {
                    tlb.reset(state, self.now);
                }
            }
            (None, Act::Pkru(vcpu, value)) if self.cpu.pku => self.tlbs[*vcpu].state.pkru = *value,
            _ => {}
        }
        self.note_modes();
        self.compare_registers(vm)
    }

    /// What the operation did to the vCPU's registers and its TLB.
    fn update(&mut self, vm: &Vm, before: &Before, outcome: &Outcome) {
        let (now, vcpu) = (self.now, before.plan.vcpu);
        let tlb = &mut self.tlbs[vcpu];
        // A root without memory shuts the vCPU down, but the register was loaded.
        let pdptes = |new: &State| new.paging() != Paging::Pae || vm.vcpus()[vcpu].pdptes == new.pdptes;
        let loaded =
            |new: &State| outcome.status == Status::Shutdown && vm.vcpus()[vcpu].regs == new.regs && pdptes(new);
        match (before.plan.control, before.verdict) {
            (Some(control), Some(Verdict::Fine(new))) if outcome.status == Status::Done || loaded(&new) => {
                match control {
                    Control::Cr3(value) => tlb.load_cr3(value, new, now),
                    Control::Cr0(_) | Control::Cr4(_) | Control::Efer(_) => tlb.set_state(new, now),
                    Control::Invlpg(gva) => tlb.invlpg(gva, now),
                    Control::Invpcid(kind) => tlb.invpcid(kind, before.descriptor.unwrap_or_default(), now),
                    Control::Plain => {}
                }
            }
            (Some(_), Some(Verdict::GeneralProtection(new))) if self_refused(before, outcome) => {
                tlb.set_state(new, now);
            }
            _ if outcome.status == Status::PageFault && outcome.error_code & 9 == 1 => {
                tlb.page_fault(outcome.address, now);
            }
            _ => {}
        }
    }

    fn compare_registers(&self, vm: &Vm) -> Result<(), String> {
        for (vcpu, tlb) in vm.vcpus().iter().zip(&self.tlbs) {
            let wanted = &tlb.state;
            expect(vcpu.regs == wanted.regs, || format!("the registers are {:x?}, not {:x?}", vcpu.regs, wanted.regs))?;
            expect(wanted.paging() != Paging::Pae || vcpu.pdptes == wanted.pdptes, || {
                format!("the PDPTEs are {:x?}, not {:x?}", vcpu.pdptes, wanted.pdptes)
            })?;
        }
        Ok(())
    }

    fn note_changes(&mut self, vm: &Vm, before: &Before) -> Vec<(u64, usize, u64)> {
        let mut changed = Vec::new();
        self.memory.gone = vm.read_memory(Gpa(self.memory.unmarked << 12), 1).is_err();
        for gfn in &self.hot {
            if self.memory.gone && *gfn >= self.memory.unmarked {
                continue;
            }
            for first in (0..512).step_by(64) {
                let new: [u64; 64] = std::array::from_fn(|i| vm.shadow().memory.host.entry(Gfn(*gfn), first + i, 8));
                let Some(words) = self.memory.frame(*gfn) else { continue };
                if new[..] == words[first..first + 64] {
                    continue;
                }
                let differs = |(i, new): (usize, u64)| (words[i] != new).then_some((i, words[i], new));
                for (i, old, new) in (first..).zip(new).filter_map(differs).collect::<Vec<_>>() {
                    self.memory.change(*gfn, i, new, self.now);
                    changed.push((*gfn, i, old));
                }
            }
        }
        // An entry that the operation used and then overwrote had A, or A and D, for a moment.
        for (touch, path) in before.plan.touches.iter().zip(&before.paths) {
            for (depth, at) in path.iter().enumerate() {
                let Some(old) = changed.iter().find(|c| (c.0, c.1) == (at.gfn, at.word)).map(|c| c.2) else { continue };
                let leaf = depth + 1 == path.len() && touch.access.kind == Kind::Write;
                let marked = old | at.in_word(A | if leaf { D } else { 0 });
                self.memory.passed_through(*at, marked, self.now);
            }
        }
        changed
    }

    /// Every word that changed was stored to, or got A or D as an entry on the way of a walk.
    fn check_changes(&self, before: &Before) -> Result<(), String> {
        if before.plan.host_range.is_some() {
            return Ok(());
        }
        let tlb = &self.tlbs[before.plan.vcpu];
        let mut marks: Vec<At> = before.paths.iter().flatten().copied().collect();
        for touch in &before.plan.touches {
            let _ = walk_now(&self.memory, tlb.base(), touch.access.gva, before.mode, |at| marks.push(at));
        }
        for (gfn, index, old) in &before.changed {
            let new = self.memory.entry(At::entry(*gfn, *index, false)).unwrap_or(0);
            let stored = before.plan.touches.iter().zip(&before.targets).any(|(touch, targets)| {
                touch.access.kind == Kind::Write && targets.contains(gfn) && touch.covers_word(*index)
            });
            let here = marks.iter().filter(|at| (at.gfn, at.word) == (*gfn, *index));
            let may_gain = here.fold(0, |bits, at| bits | at.in_word(A | D));
            if !stored && (new & !old & !may_gain != 0 || old & !new != 0) {
                return Err(format!(
                    "word {index} of frame {gfn:#x} became {new:#x}, was {old:#x}: nobody may store there"
                ));
            }
        }
        Ok(())
    }
}

fn read_frame(vm: &Vm, gfn: u64) -> Box<[u64; 512]> {
    let mut words = Box::new([0; 512]);
    if let Ok(bytes) = vm.read_memory(Gpa(gfn << 12), 4096) {
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
    }
    words
}

pub(crate) fn expect(holds: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text()) }
}

/// #GP by the instruction itself, not by its address.
fn self_refused(before: &Before, outcome: &Outcome) -> bool {
    let exists = before.plan.touches.iter().all(|touch| before.mode.takes(touch.access.gva));
    outcome.status == Status::GeneralProtection && exists
}

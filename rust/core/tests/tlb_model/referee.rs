//! Holds the engine to the model, operation by operation: outcomes, values, memory, and every entry of the shadow.

use crate::decode::Act;
use crate::tlb::Tlb;
use crate::touch::{Plan, Touch};
use crate::walk::{A, Access, D, Kind, Memory, Version, fault_now, walk_now};
use shadowkvm_core::engine::Vm;
use shadowkvm_core::ops::OpCode;
use shadowkvm_core::outcome::{Outcome, Status};
use shadowkvm_core::types::{Gfn, Gpa};
use std::collections::BTreeSet;

/// The model beside the engine.
pub(crate) struct Referee {
    pub(crate) memory: Memory,
    pub(crate) tlbs: Vec<Tlb>,
    /// Frames that are compared after each operation: those with anything in them.
    hot: BTreeSet<u64>,
    /// The number of the operation.
    pub(crate) now: u64,
}

/// What an operation may do, found out before it is done.
pub(crate) struct Before {
    plan: Plan,
    /// For each touch, where it may go.
    targets: Vec<Vec<u64>>,
    /// For each touch, the fault that the tables give.
    faults: Vec<Option<u32>>,
    /// For each touch, the entries on its way.
    paths: Vec<Vec<(u64, usize)>>,
    /// The words that changed: frame, index, value before.
    changed: Vec<(u64, usize, u64)>,
}

impl Referee {
    /// Knows the memory of a VM of which nothing has run.
    pub(crate) fn new(vm: &Vm, maxphyaddr: u32, slot1: u64, frames: impl IntoIterator<Item = u64>) -> Self {
        let tlbs = vm.vcpus().iter().map(|vcpu| Tlb::new(vcpu.regs, maxphyaddr)).collect();
        let mut referee = Self { memory: Memory::default(), tlbs, hot: BTreeSet::new(), now: 0 };
        referee.memory.unmarked = slot1 >> 12;
        referee.memory.gone = vm.read_memory(Gpa(slot1), 1).is_err();
        for gfn in frames {
            let words = read_frame(vm, gfn);
            if words.iter().any(|word| *word != 0) {
                referee.hot.insert(gfn);
            }
            referee.memory.load(gfn, words);
        }
        referee
    }

    /// To be called before each operation.
    pub(crate) fn before(&mut self, vm: &Vm, act: &Act) -> Before {
        let plan = Plan::of(vm, act);
        let tlb = &self.tlbs[plan.vcpu];
        let (mut targets, mut faults, mut paths) = (Vec::new(), Vec::new(), Vec::new());
        for touch in &plan.touches {
            targets.push(tlb.targets(&self.memory, &touch.access));
            faults.push(fault_now(&self.memory, tlb.root(), &touch.access, tlb.mode()));
            let mut path = Vec::new();
            let _ = walk_now(&self.memory, tlb.root(), touch.access.gva, tlb.mode(), |at| path.push(at));
            paths.push(path);
        }
        self.hot.extend(targets.iter().flatten());
        self.hot.extend(paths.iter().flatten().map(|at| at.0));
        if let Some((gpa, bytes)) = plan.host_range {
            self.hot.extend(gpa >> 12..(gpa + bytes).div_ceil(4096));
        }
        self.hot.retain(|gfn| self.memory.frame(*gfn).is_some());
        Before { plan, targets, faults, paths, changed: Vec::new() }
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
        if let Some(outcome) = outcome {
            self.check_changes(&before)?;
            self.check_outcome(vm, &before, &outcome)?;
            self.flush(vm, act, &before, &outcome);
        } else if let Act::Sregs(vcpu, _) = act {
            self.tlbs[*vcpu].reset(vm.vcpus()[*vcpu].regs, self.now);
        }
        Ok(())
    }

    fn note_changes(&mut self, vm: &Vm, before: &Before) -> Vec<(u64, usize, u64)> {
        let mut changed = Vec::new();
        self.memory.gone = vm.read_memory(Gpa(self.memory.unmarked << 12), 1).is_err();
        for gfn in self.hot.clone() {
            if self.memory.gone && gfn >= self.memory.unmarked {
                continue;
            }
            for first in (0..512).step_by(64) {
                let new = vm.shadow().memory.host.entries(Gfn(gfn), first, 8);
                let Some(words) = self.memory.frame(gfn) else { continue };
                let old: [u64; 64] = words[first..first + 64].try_into().expect("64 words");
                if new == old {
                    continue;
                }
                for i in (0..64).filter(|i| new[*i] != old[*i]) {
                    self.memory.change(gfn, first + i, new[i], self.now);
                    changed.push((gfn, first + i, old[i]));
                }
            }
        }
        // An entry that the operation used and then overwrote had A, or A and D, for a moment.
        for (touch, path) in before.plan.touches.iter().zip(&before.paths) {
            for (depth, at) in path.iter().enumerate() {
                let Some(old) = changed.iter().find(|c| (c.0, c.1) == *at).map(|c| c.2) else { continue };
                let leaf = depth + 1 == path.len() && touch.access.kind == Kind::Write;
                let marked = old | A | if leaf { D } else { 0 };
                self.memory.passed_through(at.0, at.1, marked, self.now);
            }
        }
        changed
    }

    /// Every word that changed was stored to, or got A or D.
    fn check_changes(&self, before: &Before) -> Result<(), String> {
        if before.plan.host_range.is_some() {
            return Ok(());
        }
        for (gfn, index, old) in &before.changed {
            let new = self.memory.word(*gfn, *index).unwrap_or(0);
            let stored = before.plan.touches.iter().zip(&before.targets).any(|(touch, targets)| {
                touch.access.kind == Kind::Write && targets.contains(gfn) && touch.covers_word(*index)
            });
            if !stored && (new & !old & !(A | D) != 0 || old & !new != 0) {
                return Err(format!(
                    "word {index} of frame {gfn:#x} became {new:#x}, was {old:#x}: nobody may store there"
                ));
            }
        }
        Ok(())
    }

    fn check_outcome(&self, vm: &Vm, before: &Before, outcome: &Outcome) -> Result<(), String> {
        match outcome.status {
            Status::Done => self.check_done(vm, before, outcome),
            Status::PageFault | Status::DoubleFault => self.check_fault(before, outcome),
            Status::Mmio => {
                let gfn = outcome.address >> 12;
                let allowed = before.targets.iter().flatten().any(|target| *target == gfn);
                expect(allowed, || format!("an access to the device at {:#x}, where no table led", outcome.address))
            }
            Status::GeneralProtection => {
                let canonical = |touch: &Touch| matches!(touch.access.gva >> 47, 0 | 0x1_ffff);
                let refused = before.plan.control || !before.plan.touches.iter().all(canonical);
                expect(refused, || "#GP for an access to canonical addresses".to_owned())
            }
            // Instructions that cannot be fetched, roots without memory, repetition for ever.
            Status::Shutdown | Status::InvalidOpcode | Status::InternalError | Status::Livelock => Ok(()),
        }
    }

    fn check_done(&self, vm: &Vm, before: &Before, outcome: &Outcome) -> Result<(), String> {
        let tlb = &self.tlbs[before.plan.vcpu];
        for (i, touch) in before.plan.touches.iter().enumerate() {
            let now = tlb.targets(&self.memory, &touch.access);
            let all = before.targets[i].iter().chain(&now);
            let in_slot = |gfn: &&u64| vm.read_memory(Gpa(**gfn << 12), 1).is_ok();
            expect(all.clone().any(|gfn| in_slot(&gfn)), || {
                format!("{touch:x?} was done, but no walk since the last flush allows it; now {:x?}", before.faults[i])
            })?;
            let right = all.clone().any(|gfn| touch.matches(&self.memory, &before.changed, *gfn, outcome.value));
            expect(right, || {
                format!("{touch:x?} gave {:#x}, which is in none of the frames {:x?}", outcome.value, before.targets[i])
            })?;
            self.check_marks(before, i)?;
        }
        Ok(())
    }

    /// An access by tables that have not changed since the last flush leaves A in each, and D in the leaf of a store.
    fn check_marks(&self, before: &Before, i: usize) -> Result<(), String> {
        let (touch, path) = (&before.plan.touches[i], &before.paths[i]);
        if before.faults[i].is_some() || touch.keep {
            return Ok(());
        }
        for (depth, at) in path.iter().enumerate() {
            let versions = self.memory.versions(at.0, at.1, 0);
            let gains = |pair: &[Version]| pair[1].value & pair[0].value == pair[0].value;
            let marks = |pair: &[Version]| (pair[0].value ^ pair[1].value) & !(A | D) == 0;
            if at.0 >= self.memory.unmarked || !versions.windows(2).all(|pair| gains(pair) && marks(pair)) {
                return Ok(());
            }
            let leaf = depth + 1 == path.len() && touch.access.kind == Kind::Write;
            let wanted = A | if leaf { D } else { 0 };
            let value = self.memory.word(at.0, at.1).unwrap_or(0);
            expect(value & wanted == wanted, || {
                format!("{touch:x?} was done, but entry {} of frame {:#x} is {value:#x}", at.1, at.0)
            })?;
        }
        Ok(())
    }

    /// A fault is what the tables of now give: KVM walks them before it hands a fault to the guest.
    fn check_fault(&self, before: &Before, outcome: &Outcome) -> Result<(), String> {
        let tlb = &self.tlbs[before.plan.vcpu];
        let here = |touch: &Touch| touch.access.gva >> 12 == outcome.address >> 12;
        let mut seen = Vec::new();
        for (i, touch) in before.plan.touches.iter().enumerate().filter(|(_, touch)| here(touch)) {
            let after = fault_now(&self.memory, tlb.root(), &touch.access, tlb.mode());
            for code in [before.faults[i], after].into_iter().flatten() {
                // A read-modify-write may fault as a read, whose code KVM's emulator completes.
                if code == outcome.error_code || touch.rmw && code & !2 == outcome.error_code & !2 {
                    return Ok(());
                }
                seen.push(code);
            }
        }
        Err(format!("#PF {:#x} at {:#x}; the tables give {seen:x?}", outcome.error_code, outcome.address))
    }

    fn flush(&mut self, vm: &Vm, act: &Act, before: &Before, outcome: &Outcome) {
        let (now, regs) = (self.now, vm.vcpus()[before.plan.vcpu].regs);
        let tlb = &mut self.tlbs[before.plan.vcpu];
        let Act::Row(row) = act else {
            if outcome.status == Status::PageFault && outcome.error_code & 9 == 1 {
                tlb.flush_page(outcome.address, now, false);
            }
            return;
        };
        // A root without memory shuts the vCPU down, but CR3 was loaded.
        let done = outcome.status == Status::Done || outcome.status == Status::Shutdown && tlb.has_other_regs(&regs);
        match (row.op, outcome.status) {
            (OpCode::Cr3, _) if done => tlb.load_cr3(row.value, regs, now),
            (OpCode::Invlpg, _) if done => tlb.flush_page(row.addr, now, true),
            (OpCode::Cr0 | OpCode::Cr4 | OpCode::Efer, _) if done => tlb.set_regs(regs, now),
            (_, Status::PageFault) if outcome.error_code & 9 == 1 => tlb.flush_page(outcome.address, now, false),
            _ => {}
        }
    }

    /// The first of these accesses for which the vCPU cannot hold a translation of `gva` to `gfn`.
    pub(crate) fn first_refused(&self, vcpu: usize, gva: u64, gfn: u64, wanted: &[Access]) -> Option<Access> {
        let tlb = &self.tlbs[vcpu];
        let mut left = wanted.to_vec();
        // Mostly the tables of now allow all.
        if let Ok(page) = walk_now(&self.memory, tlb.root(), gva, tlb.mode(), |_| ()) {
            left.retain(|access| !tlb.serves(page, access, gfn));
        }
        if !left.is_empty() {
            tlb.may_hold(&self.memory, gva, |page| {
                left.retain(|access| !tlb.serves(page, access, gfn));
                left.is_empty()
            });
        }
        left.first().copied()
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

fn expect(holds: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text()) }
}

/// The referee of a VM that `world::build` just made.
pub(crate) fn of(vm: &Vm, kind: u8) -> Referee {
    let cpu = if kind & 1 == 0 { shadowkvm_core::config::ZEN } else { shadowkvm_core::config::QEMU_TCG };
    let slot1 = crate::world::SLOT1;
    let frames = (0..crate::world::MEMORY >> 12).chain(slot1.0 >> 12..(slot1.0 + slot1.1) >> 12);
    Referee::new(vm, cpu.maxphyaddr, slot1.0, frames)
}

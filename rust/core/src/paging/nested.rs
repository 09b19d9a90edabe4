//! The same guest under nested paging (AMD NPT, Intel EPT): the CPU walks the guest's tables itself, each of their
//! addresses through a second stage, and only the second stage faults to the hypervisor.
//!
//! What is exact: which pages and tables are touched, hence the second stage's faults (one for each unit that is mapped,
//! `kvm_tdp_mmu_map`, 6.1, which prefetches nothing) and the guest's own. What is a model: TLB and page-walk caches.

use crate::bits::{CR0_PG, CR3_NOFLUSH, CR4_PCIDE, CR4_PGE, EFER_LMA, EFER_LME, PT_G};
use crate::cpu::{CpuRole, Registers};
use crate::engine::{RunOptions, RunTotals, Vm, action_of, insn_of, touch_operand};
use crate::error::{ConfigError, TraceError, refuse};
use crate::fault::insn::Insn;
use crate::guest::walk::{GuestWalk, Walker, walk_addr};
use crate::memory::Slot;
use crate::ops::{OpCode, Row};
use crate::outcome::{Outcome, Status};
use crate::paging::run_each;
use crate::paging::saved::set_in_order;
use crate::paging::tlb::{Tlb, TlbSizes};
use crate::types::{AccessKind, ErrorCode, Gfn, Gpa, Gva, Level};
use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};

/// Entries of the nested TLB: 16 (Bhargava, Serebrin, Spadini and Manne, ASPLOS 2008).
pub const USUAL_NESTED_TLB: usize = 16;

/// How nested paging is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NestedSetup {
    /// The CPU's caches.
    pub sizes: TlbSizes,
    /// The nested TLB: second-stage translations of frames that hold guest tables.
    pub nested_tlb: usize,
    /// Everything is mapped in the second stage at the start.
    pub warm: bool,
    /// The level at which the second stage maps: 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB.
    pub level: Level,
}

/// What nested paging came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct NestedCounts {
    /// Pages accessed by loads, stores and fetches that were carried out.
    pub accesses: u64,
    /// ... that the TLB answered.
    pub hits: u64,
    /// ... for which both stages were walked.
    pub misses: u64,
    /// Entries of guest tables that those walks read.
    pub guest_references: u64,
    /// Entries of second-stage tables that those walks read.
    pub host_references: u64,
    /// Exits because the second stage did not map a page.
    pub stage_faults: u64,
    /// Exits because a page was write-protected for the dirty log.
    pub dirty_faults: u64,
    /// Exits to devices.
    pub mmio_exits: u64,
    /// Exits for HLT, IN and OUT.
    pub other_exits: u64,
    /// #PF that the guest took, without an exit.
    pub guest_faults: u64,
}

/// The second stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stage {
    level: Level,
    warm: bool,
    /// Units whose state is not that of the start: mapped in a cold one, gone in a warm one.
    #[serde(serialize_with = "set_in_order")]
    changed: FxHashSet<u64>,
    /// Frames that the dirty log lets be written.
    #[serde(serialize_with = "set_in_order")]
    writable: FxHashSet<u64>,
}

impl Stage {
    const fn unit(&self, gfn: Gfn) -> u64 {
        gfn.0 >> (9 * (self.level.0 - 1))
    }

    /// An access comes to a frame. Counts the exits that it takes.
    fn touch(&mut self, vm: &mut Vm, gfn: Gfn, write: bool, counts: &mut NestedCounts) {
        let unit = self.unit(gfn);
        let fresh = self.changed.contains(&unit) == self.warm;
        if fresh {
            counts.stage_faults += 1;
            if self.warm {
                self.changed.remove(&unit);
            } else {
                self.changed.insert(unit);
            }
        }
        if !write {
            return;
        }
        let logged = vm.shadow.memory.slot(gfn).is_some_and(Slot::logs_dirty);
        if logged && self.writable.insert(gfn.0) && !fresh {
            counts.dirty_faults += 1;
        }
        vm.shadow.memory.mark_dirty(gfn);
    }
}

/// Nested paging for all vCPUs of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Nested {
    cpus: Vec<Tlb>,
    stage: Stage,
    counts: NestedCounts,
}

impl Nested {
    /// Nested paging with empty caches.
    ///
    /// # Errors
    /// Sizes that make no cache, or a level that is none.
    pub fn new(vcpus: usize, setup: NestedSetup) -> Result<Self, ConfigError> {
        let NestedSetup { sizes, nested_tlb, warm, level } = setup;
        sizes.check()?;
        if !(1..=3).contains(&level.0) {
            return refuse!("second stage: level {} must be 1, 2 or 3", level.0);
        }
        let stage = Stage { level, warm, changed: FxHashSet::default(), writable: FxHashSet::default() };
        Ok(Self { cpus: vec![Tlb::nested(sizes, nested_tlb); vcpus], stage, counts: NestedCounts::default() })
    }

    pub(super) fn cpus(&self) -> &[Tlb] {
        &self.cpus
    }

    pub(super) const fn level(&self) -> Level {
        self.stage.level
    }

    /// What was counted so far.
    #[must_use]
    pub const fn counts(&self) -> NestedCounts {
        self.counts
    }

    /// The host dropped pages.
    pub fn unmapped(&mut self, gpa: Gpa, size: u64) {
        let (first, end) = (gpa.gfn().0, gpa.gfn().0 + (size >> 12));
        if self.stage.warm {
            let units = self.stage.unit(Gfn(first))..=self.stage.unit(Gfn(end - 1));
            self.stage.changed.extend(units);
        }
        self.forget(first, end);
    }

    /// A slot was added: a cold second stage does not map it, a warm one maps whatever there is.
    pub fn added(&mut self, gpa: Gpa, size: u64) {
        self.forget(gpa.gfn().0, gpa.gfn().0 + (size >> 12));
    }

    /// What a cold second stage maps of frames goes, and what their log let be written. It looks at what is there, since
    /// a range may be of any size.
    fn forget(&mut self, first: u64, end: u64) {
        let Stage { level, warm, changed, writable } = &mut self.stage;
        let shift = 9 * (level.0 - 1);
        if !*warm {
            changed.retain(|unit| (unit + 1) << shift <= first || unit << shift >= end);
        }
        writable.retain(|gfn| !(first..end).contains(gfn));
        self.flush();
    }

    /// A dirty log begins anew: what is written from now on faults once a frame.
    pub fn protected(&mut self) {
        self.stage.writable.clear();
        self.flush();
    }

    /// A dirty log was read.
    pub fn log_was_read(&mut self, vm: &Vm) {
        if !vm.shadow.manual_dirty.enabled {
            self.protected();
        }
    }

    /// Frames were taken out of a dirty log by hand.
    pub fn protected_frames(&mut self, frames: &[u64]) {
        for gfn in frames {
            self.stage.writable.remove(gfn);
        }
        self.flush();
    }

    fn flush(&mut self) {
        self.cpus.iter_mut().for_each(Tlb::flush_nested);
    }

    /// Runs rows as the hardware and a hypervisor with nested paging would; no shadow table is made.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn run(
        &mut self,
        vm: &mut Vm,
        rows: &[u8],
        options: &RunOptions<'_>,
        each: impl FnMut(&Outcome),
    ) -> Result<RunTotals, TraceError> {
        run_each(vm, rows, options, each, |vm, row, index| self.step(vm, row, options, index))
    }

    fn step(&mut self, vm: &mut Vm, row: &Row, options: &RunOptions<'_>, index: u64) -> Result<Outcome, TraceError> {
        let number = usize::from(row.vcpu);
        vm.check_vcpu(number).map_err(|e| TraceError { index, reason: e.0 })?;
        if let Some(action) = action_of(row.op) {
            let insn = insn_of(row, action, None).map_err(|reason| TraceError { index, reason })?;
            return Ok(self.instruction(vm, number, &insn).unwrap_or_else(|outcome| outcome));
        }
        let regs = vm.vcpus[number].regs;
        let pcid = vm.vcpus[number].pcid();
        match row.op {
            OpCode::Invlpg => self.cpus[number].flush_page(Gva(row.addr), pcid),
            OpCode::Cr0 => return Ok(self.load(vm, number, Registers { cr0: row.value, ..regs })),
            OpCode::Cr4 => return Ok(self.load(vm, number, Registers { cr4: row.value, ..regs })),
            OpCode::Efer => {
                let efer = row.value | regs.efer & EFER_LMA;
                return Ok(self.load(vm, number, Registers { efer, ..regs }));
            }
            OpCode::Cr3 => return Ok(self.load_cr3(vm, number, row.value)),
            OpCode::Hlt | OpCode::Io => self.counts.other_exits += 1,
            _ => {
                let outcome = vm.step(row, options, index)?;
                match row.op {
                    OpCode::Unmap => self.unmapped(Gpa(row.addr), row.value),
                    OpCode::GetDirtyLog => self.log_was_read(vm),
                    OpCode::SetDirtyLog => self.protected(),
                    OpCode::SlotAdd => self.added(Gpa(row.addr), row.value),
                    _ => {}
                }
                return Ok(outcome);
            }
        }
        Ok(Outcome::done(0))
    }

    /// CR0, CR4 or EFER: the guest loads it without an exit that paging would be the reason of.
    fn load(&mut self, vm: &mut Vm, number: usize, regs: Registers) -> Outcome {
        let pg = regs.cr0 & CR0_PG != 0 && regs.efer & EFER_LME != 0;
        let efer = if pg { regs.efer | EFER_LMA } else { regs.efer & !EFER_LMA };
        let regs = Registers { efer, cs_l: regs.cs_l && pg, ..regs };
        if regs.check(&vm.shadow.config.cpu).is_err() {
            return Outcome::of(Status::GeneralProtection);
        }
        let vcpu = &mut vm.vcpus[number];
        vcpu.regs = regs;
        vcpu.role = CpuRole::of(&regs, &vm.shadow.config.cpu);
        self.cpus[number].flush_all();
        if regs.pae_paging() { self.load_cr3(vm, number, regs.cr3) } else { Outcome::done(0) }
    }

    fn load_cr3(&mut self, vm: &mut Vm, number: usize, value: u64) -> Outcome {
        let pcide = vm.vcpus[number].regs.cr4 & CR4_PCIDE != 0;
        let keep = pcide && value & CR3_NOFLUSH != 0;
        let value = if pcide { value & !CR3_NOFLUSH } else { value };
        if value >> vm.shadow.config.cpu.maxphyaddr != 0 {
            return Outcome::of(Status::GeneralProtection);
        }
        vm.vcpus[number].regs.cr3 = value;
        if vm.vcpus[number].regs.pae_paging() {
            let at = value & 0xffff_ffe0;
            vm.vcpus[number].pdptes = std::array::from_fn(|i| vm.shadow.memory.host.read(Gpa(at + 8 * i as u64), 8));
        }
        if !keep {
            let pcid = vm.vcpus[number].pcid();
            self.cpus[number].flush_pcid(pcid);
        }
        Outcome::done(0)
    }

    /// An instruction with a memory operand. The error is how else it ended.
    fn instruction(&mut self, vm: &mut Vm, number: usize, insn: &Insn) -> Result<Outcome, Outcome> {
        let kind = insn.kinds(false)[0];
        let mut frames = [None; 2];
        for (frame, (gva, size)) in frames.iter_mut().zip(insn.pieces()) {
            if size > 0 {
                *frame = Some(self.translate(vm, number, gva, insn, kind)?);
            }
        }
        Ok(Outcome::done(touch_operand(&mut vm.shadow.memory.host, insn, frames)))
    }

    /// One page is accessed: the guest's walk, and what the second stage and the caches make of it.
    fn translate(
        &mut self,
        vm: &mut Vm,
        number: usize,
        gva: Gva,
        insn: &Insn,
        kind: AccessKind,
    ) -> Result<Gfn, Outcome> {
        let (user, write) = (insn.user && !insn.implicit(), kind == AccessKind::Write);
        let code = kind.code().with(ErrorCode::U.when(user));
        let vcpu = &mut vm.vcpus[number];
        if !vcpu.role.mode.takes(gva) {
            return Err(Outcome::of(Status::GeneralProtection));
        }
        let mut walk = GuestWalk::flat(gva);
        if vcpu.role.mode.has_tables() {
            walk = GuestWalk::start();
            let walker = Walker::of(vcpu, insn.ac && !insn.implicit());
            let (memory, events) = (&mut vm.shadow.memory, &mut vm.shadow.events);
            if let Err(fault) = walk_addr(memory, events, &walker, (gva, code), &mut walk) {
                self.counts.guest_faults += 1;
                vcpu.cr2 = fault.address.0;
                return Err(Outcome::page_fault(fault.address.0, fault.code));
            }
        }
        let slot = vm.shadow.memory.slot(walk.gfn);
        if slot.is_none_or(|slot| slot.readonly && write) {
            self.counts.mmio_exits += 1;
            return Err(Outcome { address: walk.gfn.gpa().0 | gva.offset(), ..Outcome::of(Status::Mmio) });
        }
        self.count(vm, number, gva, &walk, write);
        Ok(walk.gfn)
    }

    /// What the hardware did for an access that goes through.
    fn count(&mut self, vm: &mut Vm, number: usize, gva: Gva, walk: &GuestWalk, write: bool) {
        let Self { cpus, stage, counts } = self;
        let (tlb, vcpu) = (&mut cpus[number], &vm.vcpus[number]);
        let (pcid, top) = (vcpu.pcid(), vcpu.role.mode.top);
        let pge = vcpu.regs.cr4 & CR4_PGE != 0;
        counts.accesses += 1;
        if tlb.hit(gva, pcid, write) {
            counts.hits += 1;
            return;
        }
        counts.misses += 1;
        let depth = u64::from(5 - stage.level.0);
        let mut global = false;
        if top.0 > 0 {
            let leaf = walk.steps[usize::from(walk.level.0) - 1];
            global = pge && leaf.pte.0 & PT_G != 0;
            let start = tlb.begin_walk(gva, pcid, top, walk.level);
            for level in (walk.level.0..=start.0).rev() {
                let table = walk.steps[usize::from(level) - 1].table;
                // The CPU may set A there: to the second stage a walk's read is a write (APM vol. 2 section 15.25.5).
                stage.touch(vm, table, true, counts);
                counts.host_references += if tlb.nested_hit(stage.unit(table)) { 0 } else { depth };
                counts.guest_references += 1;
            }
        }
        stage.touch(vm, walk.gfn, write, counts);
        counts.host_references += depth;
        // A page is kept at the smaller of its two sizes.
        tlb.fill(gva, pcid, walk.level.min(stage.level).max(Level::PT), (global, write));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::testing::{guest, row};
    use crate::paging::tlb::USUAL;

    const BARE: NestedSetup =
        NestedSetup { sizes: USUAL.without_walk_caches(), nested_tlb: 0, warm: false, level: Level::PT };

    fn run(vm: &mut Vm, setup: NestedSetup, rows: &[Row]) -> (NestedCounts, Vec<Outcome>) {
        let (mut nested, mut outcomes) = (Nested::new(1, setup).unwrap(), Vec::new());
        let bytes: Vec<_> = rows.iter().flat_map(Row::encode).collect();
        nested.run(vm, &bytes, &RunOptions::default(), |outcome| outcomes.push(*outcome)).unwrap();
        (nested.counts(), outcomes)
    }

    #[test]
    fn a_walk_through_both_stages_reads_24_entries() {
        let rows = [row(OpCode::Read, 0, 0), row(OpCode::Read, 8, 0), row(OpCode::Read, 0x1000, 0)];
        let (counts, _) = run(&mut guest(), BARE, &rows[..2]);
        assert_eq!((counts.hits, counts.misses, counts.guest_references, counts.host_references), (1, 1, 4, 20));
        assert_eq!(counts.stage_faults, 5, "four tables and the page");
        let (large, _) = run(&mut guest(), NestedSetup { level: Level::PD, ..BARE }, &rows);
        assert_eq!((large.misses, large.host_references, large.stage_faults), (2, 30, 1));
        let usual = NestedSetup { sizes: USUAL, nested_tlb: USUAL_NESTED_TLB, ..BARE };
        let (cached, _) = run(&mut guest(), usual, &rows);
        assert_eq!((cached.guest_references, cached.host_references), (4 + 1, 20 + 4), "the last table is kept");
        let (warm, _) = run(&mut guest(), NestedSetup { warm: true, ..BARE }, &rows);
        assert_eq!(warm.stage_faults, 0);
    }

    #[test]
    fn the_guest_sees_what_it_sees_under_the_shadow() {
        let rows: Vec<_> = (0..200_u64)
            .map(|n| match n % 7 {
                0 => row(OpCode::Write, (n % 11) << 12 | 0x40, n),
                1 => row(OpCode::Xchg, (n % 5) << 12 | 0xffc, n * 7),
                2 => row(OpCode::Invlpg, (n % 8) << 12, 0),
                3 => row(OpCode::Cr3, 0, 0x1000),
                4 => row(OpCode::Fetch, (n % 9) << 12, 0),
                5 => row(OpCode::Add, (n % 8) << 12 | 0x40, 3),
                _ => row(OpCode::Read, (n % 8) << 12 | 0x40, 0),
            })
            .collect();
        let (mut shadow, mut outcomes) = (guest(), Vec::new());
        let bytes: Vec<_> = rows.iter().flat_map(Row::encode).collect();
        shadow.run(&bytes, &RunOptions::default(), |outcome| outcomes.push(*outcome)).unwrap();
        let mut nested = guest();
        let (counts, same) = run(&mut nested, BARE, &rows);
        assert_eq!(outcomes, same);
        assert_eq!(counts.guest_faults, outcomes.iter().filter(|o| o.status == Status::PageFault).count() as u64);
        let all = |vm: &Vm| vm.read_memory(Gpa(0), 16 << 20).unwrap();
        assert_eq!(all(&shadow), all(&nested));
        assert!(nested.shadow().arena().live().is_empty());
    }

    #[test]
    fn a_dirty_log_faults_once_a_frame() {
        let rows = [
            row(OpCode::Write, 0, 1),
            row(OpCode::SetDirtyLog, 0, 1),
            row(OpCode::Write, 0, 2),
            row(OpCode::Write, 8, 3),
            row(OpCode::GetDirtyLog, 0, 0),
            row(OpCode::Write, 0, 4),
            row(OpCode::Unmap, 0x10000, 0x1000),
            row(OpCode::Read, 0, 0),
        ];
        let (counts, outcomes) = run(&mut guest(), BARE, &rows);
        // The tables are written, too: the walk may set A in them.
        assert_eq!((counts.dirty_faults, outcomes[4].value), (10, 5));
        assert_eq!(counts.stage_faults, 6, "the page that was dropped comes again");
    }
}

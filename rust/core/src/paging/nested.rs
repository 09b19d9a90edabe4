//! The same guest under nested paging (AMD NPT, Intel EPT): the CPU walks the guest's tables itself, each of their
//! addresses through a second stage, and only the second stage faults to the hypervisor.
//!
//! What is exact: which pages and tables are touched, hence the second stage's faults (one for each unit that is mapped,
//! `kvm_tdp_mmu_map`, 6.1, which prefetches nothing) and the guest's own. What is a model: TLB and page-walk caches.

use crate::bits::{CR0_PG, CR3_NOFLUSH, CR4_PCIDE, EFER_LMA, EFER_LME, PT_ADDR};
use crate::cpu::{CpuRole, Registers};
use crate::engine::{RunOptions, RunTotals, Vm, action_of, insn_of, touch_operand};
use crate::error::{ConfigError, TraceError, refuse};
use crate::fault::insn::Insn;
use crate::guest::walk::{GuestWalk, Walker, walk_addr};
use crate::ops::{OpCode, Row};
use crate::outcome::{Outcome, Status};
use crate::paging::agile::{Agile, AgileCounts, AgileSetup};
use crate::paging::run_each;
use crate::paging::stage::{HostAct, Stage};
use crate::paging::tlb::{Tlb, TlbSizes};
use crate::types::{AccessKind, ErrorCode, Gfn, Gpa, Gva, Level};
use serde::{Deserialize, Serialize};

mod walk;
use walk::How;

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
    /// Agile paging on top of it.
    pub agile: Option<AgileSetup>,
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
    /// #PF that the guest took. Under nested paging none exits.
    pub guest_faults: u64,
}

/// Nested paging for all vCPUs of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Nested {
    cpus: Vec<Tlb>,
    stage: Stage,
    agile: Option<Agile>,
    counts: NestedCounts,
}

impl Nested {
    /// Nested paging with empty caches.
    ///
    /// # Errors
    /// Sizes that make no cache, or a level that is none.
    pub fn new(vcpus: usize, setup: NestedSetup) -> Result<Self, ConfigError> {
        let NestedSetup { sizes, nested_tlb, warm, level, agile } = setup;
        sizes.check()?;
        if !(1..=3).contains(&level.0) {
            return refuse!("second stage: level {} must be 1, 2 or 3", level.0);
        }
        if agile.is_some_and(|agile| agile.interval == 0) {
            return refuse!("agile paging: an interval has at least 1 row");
        }
        Ok(Self {
            cpus: vec![Tlb::nested(sizes, nested_tlb); vcpus],
            stage: Stage::new(level, warm),
            agile: agile.map(|agile| Agile::new(vcpus, agile)),
            counts: NestedCounts::default(),
        })
    }

    pub(super) fn cpus(&self) -> &[Tlb] {
        &self.cpus
    }

    pub(super) const fn level(&self) -> Level {
        self.stage.level()
    }

    pub(super) fn agile_is_whole(&self, vcpus: usize) -> bool {
        self.agile.as_ref().is_none_or(|agile| agile.is_whole(vcpus))
    }

    /// What was counted so far.
    #[must_use]
    pub const fn counts(&self) -> NestedCounts {
        self.counts
    }

    /// What agile paging adds; `None` without it.
    #[must_use]
    pub fn agile_counts(&self) -> Option<AgileCounts> {
        self.agile.as_ref().map(Agile::counts)
    }

    /// The host did something to the VM.
    pub fn host_did(&mut self, vm: &Vm, act: HostAct<'_>) {
        if self.stage.host_did(vm, act) {
            self.cpus.iter_mut().for_each(Tlb::flush_nested);
        }
        if let Some(agile) = &mut self.agile {
            agile.host_did(act);
        }
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
        if self.agile.as_mut().is_some_and(Agile::tick) {
            self.flush();
        }
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
                let logged = vm.logs_dirty(row.addr as u16);
                let outcome = vm.step(row, options, index)?;
                if let Some(act) =
                    host_act(row).filter(|act| *act != HostAct::LogSet || vm.logs_dirty(row.addr as u16) != logged)
                {
                    self.host_did(vm, act);
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
        if let Some(agile) = &mut self.agile {
            agile.load_root(number, Gpa(value & PT_ADDR));
        }
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
        if let Some(agile) = &mut self.agile {
            agile.begin();
        }
        let mut frames = [None; 2];
        for (frame, (gva, size)) in frames.iter_mut().zip(insn.pieces()) {
            if size > 0 {
                *frame = Some(self.translate(vm, number, (gva, size), insn, kind)?);
            }
        }
        Ok(Outcome::done(touch_operand(&mut vm.shadow.memory.host, insn, frames)))
    }

    /// One page is accessed: the guest's walk, and what the second stage and the caches make of it.
    fn translate(
        &mut self,
        vm: &mut Vm,
        number: usize,
        (gva, size): (Gva, u8),
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
                if let Some(agile) = &mut self.agile {
                    agile.fault(&walk, &vcpu.role);
                }
                vcpu.cr2 = fault.address.0;
                return Err(Outcome::page_fault(fault.address.0, fault.code));
            }
        }
        let slot = vm.shadow.memory.slot(walk.gfn);
        if slot.is_none_or(|slot| slot.readonly && write) {
            self.counts.mmio_exits += 1;
            return Err(Outcome { address: walk.gfn.gpa().0 | gva.offset(), ..Outcome::of(Status::Mmio) });
        }
        let emulated = write && self.emulates(vm, number, &walk, (gva.offset(), size));
        self.count(vm, number, gva, &walk, How { write: write && !emulated, emulated });
        if emulated {
            vm.shadow.memory.mark_dirty(walk.gfn);
        }
        Ok(walk.gfn)
    }

    /// Whether a store must be emulated, for it goes to a table that agile paging shadows.
    fn emulates(&mut self, vm: &Vm, number: usize, walk: &GuestWalk, bytes: (u64, u8)) -> bool {
        let Some(agile) = &mut self.agile else { return false };
        let Some(dropped) = agile.store(walk.gfn, bytes, vm.vcpus[number].role.mode.entry_bytes) else { return false };
        if dropped {
            self.flush();
        }
        true
    }

    /// The guest's translations go; those of the second stage stay.
    fn flush(&mut self) {
        self.cpus.iter_mut().for_each(Tlb::flush_all);
    }
}

/// What a row of the host's does to the second stage.
const fn host_act(row: &Row) -> Option<HostAct<'static>> {
    match row.op {
        OpCode::Unmap => Some(HostAct::Dropped(Gpa(row.addr), row.value)),
        OpCode::GetDirtyLog => Some(HostAct::LogRead),
        OpCode::SetDirtyLog => Some(HostAct::LogSet),
        OpCode::SlotDel => Some(HostAct::AllGone),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::testing::{guest, row};
    use crate::paging::tlb::USUAL;

    const BARE: NestedSetup =
        NestedSetup { sizes: USUAL.without_walk_caches(), nested_tlb: 0, warm: false, level: Level::PT, agile: None };

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
        assert_eq!(
            (cached.guest_references, cached.host_references),
            (4 + 1, 4 + 3 + 1 + 1),
            "the last tables of both stages are kept"
        );
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
        let all = |vm: &Vm| vm.read_memory(Gpa(0), 16 << 20).unwrap();
        for agile in [None, Some(AgileSetup { interval: 50, roots: 8 })] {
            let mut nested = guest();
            let (counts, same) = run(&mut nested, NestedSetup { agile, ..BARE }, &rows);
            assert_eq!(outcomes, same);
            assert_eq!(counts.guest_faults, outcomes.iter().filter(|o| o.status == Status::PageFault).count() as u64);
            assert_eq!(all(&shadow), all(&nested));
            assert!(nested.shadow().arena().live().is_empty());
        }
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

//! The TLB of CPUs that run under shadow paging: they walk the shadow's tables, and KVM flushes them.

use crate::engine::{RunOptions, RunTotals, Vm};
use crate::error::{ConfigError, TraceError};
use crate::ops::{OpCode, Row};
use crate::outcome::{Outcome, Status};
use crate::paging::run_each;
use crate::paging::tlb::{Tlb, TlbSizes};
use crate::types::Gva;
use serde::{Deserialize, Serialize};

/// What the CPUs' walks came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TlbCounts {
    /// Pages accessed by loads, stores and fetches that were carried out.
    pub accesses: u64,
    /// ... that the TLB answered.
    pub hits: u64,
    /// ... for which the shadow was walked.
    pub misses: u64,
    /// Entries of shadow tables that those walks read.
    pub references: u64,
    /// Times that a whole TLB was flushed.
    pub flushes: u64,
}

/// The TLBs of all vCPUs, and what they count.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShadowTlb {
    cpus: Vec<Tlb>,
    counts: TlbCounts,
}

impl ShadowTlb {
    /// Empty TLBs for that many vCPUs.
    ///
    /// # Errors
    /// Sizes that make no cache: ways that do not divide the entries, or far too many of them.
    pub fn new(vcpus: usize, sizes: TlbSizes) -> Result<Self, ConfigError> {
        sizes.check()?;
        Ok(Self { cpus: vec![Tlb::new(sizes); vcpus], counts: TlbCounts::default() })
    }

    pub(super) fn cpus(&self) -> &[Tlb] {
        &self.cpus
    }

    /// What was counted so far.
    #[must_use]
    pub const fn counts(&self) -> TlbCounts {
        self.counts
    }

    /// Runs rows as [`Vm::run`] does, one at a time, and follows the TLBs.
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
        run_each(vm, rows, options, each, |vm, row, index| {
            let before = vm.vcpus().get(usize::from(row.vcpu)).map_or(0, |vcpu| vcpu.counters.tlb_flush);
            let outcome = vm.step(row, options, index)?;
            self.follow(vm, row, outcome.status, before);
            Ok(outcome)
        })
    }

    /// What a row did to the TLB of its vCPU. KVM flushes at entry, that is, before the access.
    fn follow(&mut self, vm: &Vm, row: &Row, status: Status, flushes_before: u64) {
        let number = usize::from(row.vcpu);
        let (vcpu, tlb) = (&vm.vcpus()[number], &mut self.cpus[number]);
        if vcpu.counters.tlb_flush != flushes_before {
            // A new ASID (`svm_flush_tlb_current`, 6.1): entries of all PCIDs are gone, and shadow entries are never global.
            tlb.flush_all();
            self.counts.flushes += 1;
        }
        let write = match row.op {
            OpCode::Invlpg => return tlb.flush_page(Gva(row.addr), vcpu.pcid()),
            OpCode::Read | OpCode::Fetch => false,
            op if (op as u8) <= OpCode::Store as u8 => true,
            _ => return,
        };
        if status != Status::Done {
            return;
        }
        let last = Gva(row.addr.wrapping_add(u64::from(row.size) - 1));
        self.access(vm, number, Gva(row.addr), write);
        if last.page() != Gva(row.addr).page() {
            self.access(vm, number, last, write);
        }
    }

    /// One page was accessed.
    fn access(&mut self, vm: &Vm, number: usize, gva: Gva, write: bool) {
        let (vcpu, tlb) = (&vm.vcpus()[number], &mut self.cpus[number]);
        let Some(table) = vcpu.root.table(gva) else { return };
        let pcid = vcpu.pcid();
        self.counts.accesses += 1;
        if tlb.hit(gva, pcid, write) {
            self.counts.hits += 1;
            return;
        }
        let (_, leaf) = vm.shadow().walk_down(table, gva);
        let start = tlb.begin_walk(gva, pcid, (vm.shadow().arena()[table].level(), 9), leaf);
        self.counts.misses += 1;
        self.counts.references += u64::from(start.0 - leaf.0 + 1);
        tlb.fill(gva, pcid, leaf, (false, write));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::testing::{guest, row};
    use crate::paging::tlb::USUAL;

    fn rows(ops: &[(OpCode, u64, u64)]) -> Vec<u8> {
        ops.iter().flat_map(|(op, addr, value)| row(*op, *addr, *value).encode()).collect()
    }

    fn counts(sizes: TlbSizes, ops: &[(OpCode, u64, u64)]) -> TlbCounts {
        let (mut vm, mut tlb) = (guest(), ShadowTlb::new(1, sizes).unwrap());
        tlb.run(&mut vm, &rows(ops), &RunOptions::default(), |_| {}).unwrap();
        tlb.counts()
    }

    #[test]
    fn walks_read_what_the_caches_do_not_hold() {
        use OpCode::{Cr3, Invlpg, Read, Write};
        let read = |page: u64| (Read, page << 12, 0);
        let usual = counts(USUAL, &[read(0), read(0), read(1)]);
        assert_eq!((usual.accesses, usual.hits, usual.misses, usual.references), (3, 1, 2, 5));
        let bare = counts(USUAL.without_walk_caches(), &[read(0), read(0), read(1)]);
        assert_eq!((bare.misses, bare.references), (2, 8));
        let none = counts(TlbSizes { entries: 0, ..USUAL }, &[read(0), read(0), read(1)]);
        assert_eq!((none.hits, none.misses, none.references), (0, 3, 6));
        let flushed = counts(USUAL, &[read(0), (Cr3, 0, 0x1000), read(0), (Invlpg, 0, 0), read(0)]);
        assert_eq!((flushed.hits, flushed.misses), (0, 3));
        assert!(flushed.flushes >= 1);
        let stored = counts(USUAL, &[read(0), (Write, 0, 1), (Write, 8, 1)]);
        assert_eq!((stored.misses, stored.hits), (2, 1), "D is set by a walk");
        let across = counts(USUAL, &[(Read, 0xffc, 0)]);
        assert_eq!(across.accesses, 2);
    }

    #[test]
    fn a_run_with_a_tlb_comes_to_the_same() {
        let ops: Vec<_> = (0..64).map(|n| (OpCode::Write, (n % 9) << 12, n)).collect();
        let (mut plain, mut seen, mut tlb) = (guest(), guest(), ShadowTlb::new(1, USUAL).unwrap());
        let (mut outcomes, mut same) = (Vec::new(), Vec::new());
        let totals = plain.run(&rows(&ops), &RunOptions::default(), |o| outcomes.push(*o)).unwrap();
        let followed = tlb.run(&mut seen, &rows(&ops), &RunOptions::default(), |o| same.push(*o)).unwrap();
        assert_eq!((totals, outcomes, plain.state_hash()), (followed, same, seen.state_hash()));
        let damaged = &rows(&ops)[..30];
        assert_eq!(tlb.run(&mut seen, damaged, &RunOptions::default(), |_| {}).unwrap_err().index, 1);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let text = |sizes| ShadowTlb::new(1, sizes).unwrap_err().0;
        assert!(text(TlbSizes { ways: 7, ..USUAL }).contains("7 ways do not divide 1536"));
        assert!(text(TlbSizes { entries: 1 << 21, ..USUAL }).contains("limit"));
    }
}

//! From a #PF exit to its end: MMIO, the guest's walk, repair of the shadow, emulation.

mod below;
pub mod direct;
pub mod emulate;
pub mod fetch;
pub mod insn;
pub mod mmio;
pub mod page_fault;
pub mod pte_write;
pub(crate) mod quick;
pub mod retry;
mod seek;
pub(crate) mod store;
pub(crate) mod ways;

use crate::bits::CR4_LA57;
use crate::cpu::{CpuView, Requests, Vcpu};
pub(crate) use crate::guest::walk::GuestFault;
use crate::guest::walk::{GuestWalk, Walker, walk_addr};
use crate::memory::HostState;
use crate::mode::{LEVEL4, LEVEL5};
use crate::outcome::{Outcome, Status};
use crate::shadow::{Flush, Shadow};
use crate::types::{ErrorCode, Gfn, Gpa, Gva};
use insn::Insn;
use ways::Ways;

/// The vectors of #DF and #PF.
pub(crate) const DOUBLE_FAULT: u8 = 8;
pub(crate) const PAGE_FAULT: u8 = 14;

/// How an exit was handled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// The guest runs the instruction again.
    Resume,
    /// So many elements of a REP were carried out; the guest runs it again for the rest. The address of a device
    /// that the last one went to.
    Stored(u32, Option<u64>),
    /// The instruction is over.
    Finished(Outcome),
}

/// Why an operation of the emulator stopped short.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The guest gets a page fault.
    Fault(GuestFault),
    /// The instruction's bytes are not in memory.
    NoBytes,
    /// The emulator does not know the instruction.
    Unhandled,
}

impl From<GuestFault> for Stop {
    fn from(fault: GuestFault) -> Self {
        Self::Fault(fault)
    }
}

/// One vCPU at work on the VM's shadow.
#[derive(Debug)]
pub struct Ctx<'a> {
    /// The VM's half.
    pub shadow: &'a mut Shadow,
    /// The vCPU's half.
    pub vcpu: &'a mut Vcpu,
    /// The ways that the vCPU remembers.
    pub(crate) ways: &'a mut Ways,
    /// Requests that go to all other vCPUs.
    pub others: Requests,
}

impl Ctx<'_> {
    /// Pays what a change of the tables owes: `kvm_flush_remote_tlbs` posts `KVM_REQ_TLB_FLUSH` to every vCPU.
    #[inline(always)]
    pub fn pay(&mut self, flush: Flush) {
        if flush != Flush::NONE {
            self.pay_some(flush);
        }
    }

    #[inline(never)]
    fn pay_some(&mut self, flush: Flush) {
        self.shadow.counters.remote_tlb_flush_requests += u64::from(flush.calls);
        let mut requests = Requests::default();
        if flush.calls > 0 {
            requests.raise(Requests::TLB_FLUSH);
        }
        if flush.obsolete_roots {
            requests.raise(Requests::FREE_OBSOLETE_ROOTS);
        }
        self.vcpu.requests.raise(requests);
        self.others.raise(requests);
    }

    /// A guest walk as the vCPU would make it.
    pub(crate) fn walk(&mut self, gva: Gva, access: ErrorCode, ac: bool) -> Result<GuestWalk, GuestFault> {
        if !self.vcpu.role.mode.has_tables() {
            return Ok(GuestWalk::flat(gva));
        }
        let mut walk = self.walk_begun(gva);
        self.walk_tables(gva, access, ac, &mut walk).map(|()| walk)
    }

    /// A walk for an address: at its beginning, or where the last fault nearby has come to.
    #[inline]
    pub(crate) fn walk_begun(&self, gva: Gva) -> GuestWalk {
        let root = self.vcpu.root.page();
        root.and_then(|root| self.ways.walk(root, gva, self.shadow)).unwrap_or(GuestWalk::start())
    }

    /// A fault goes the way of an address, which is remembered: what was counted against the pages on it is forgotten
    /// (`__clear_sp_write_flooding_count` in `FNAME(fetch)`, 6.1).
    #[inline(always)]
    pub(crate) fn forget_floods(&mut self, gva: Gva) {
        if self.ways.goes(gva, self.shadow.floods) {
            self.shadow.forget_floods(self.ways.upper_pages(gva));
        }
    }

    /// The same where paging is on, from where `walk` stands; what it finds goes there, too.
    #[inline]
    pub(crate) fn walk_tables(
        &mut self,
        gva: Gva,
        access: ErrorCode,
        ac: bool,
        walk: &mut GuestWalk,
    ) -> Result<(), GuestFault> {
        let walker = Walker::of(self.vcpu, ac);
        walk_addr(&mut self.shadow.memory, &mut self.shadow.events, &walker, (gva, access), walk)
    }

    /// What the CPU's own walk obeys for this instruction.
    pub(crate) fn cpu_view(&self, insn: &Insn) -> CpuView {
        let user = insn.user && !insn.implicit();
        CpuView {
            user,
            smap_holds: insn.implicit() || !insn.ac,
            key0: if self.vcpu.role.pke { self.vcpu.pkru & 3 } else { 0 },
            rsvd_sets_p: self.shadow.config.cpu.rsvd_sets_p,
        }
    }

    /// Gives a page fault to the guest (`kvm_inject_emulated_page_fault`, 6.1). If the translation was present the
    /// CPU may hold it, so its address is invalidated in the current root first.
    #[inline]
    pub(crate) fn inject(&mut self, fault: GuestFault) -> Outcome {
        if fault.code.has(ErrorCode::P) && !fault.code.has(ErrorCode::RSVD) {
            self.invalidate_faulting(fault.address);
        }
        self.vcpu.counters.pf_guest += 1;
        self.vcpu.cr2 = fault.address.0;
        if let Some(outcome) = self.vcpu.delivering.and_then(|vector| self.inject_into(vector, fault)) {
            return outcome;
        }
        self.queue_exception(PAGE_FAULT, fault.code.0 as u32);
        Outcome::page_fault(fault.address.0, fault.code)
    }

    /// The fault comes while an event is delivered.
    #[inline(never)]
    fn inject_into(&mut self, delivered: u8, fault: GuestFault) -> Option<Outcome> {
        // kvm_multiple_exception (6.1): a #PF while another is delivered becomes #DF, while #DF is delivered a shutdown.
        // After any other event it is itself; contributory exceptions only combine among each other.
        match delivered {
            DOUBLE_FAULT => {
                self.vcpu.requests.raise(Requests::TRIPLE_FAULT);
                Some(Outcome::page_fault(fault.address.0, fault.code))
            }
            PAGE_FAULT => {
                self.queue_exception(DOUBLE_FAULT, 0);
                Some(Outcome { address: fault.address.0, ..Outcome::of(Status::DoubleFault) })
            }
            _ => None,
        }
    }

    #[inline(never)]
    fn invalidate_faulting(&mut self, gva: Gva) {
        if !self.is_noncanonical(gva) {
            let flush = self.shadow.invlpg(self.vcpu, gva, false);
            self.pay(flush);
        }
    }

    fn queue_exception(&mut self, vector: u8, code: u32) {
        self.shadow.events.inj_exception(vector, code, false);
        self.vcpu.injected = Some((vector, code));
    }

    /// Whether KVM takes an address for impossible (`is_noncanonical_address`, 6.1), which does not ask for the mode.
    pub(crate) fn is_noncanonical(&self, gva: Gva) -> bool {
        let mode = if self.vcpu.regs.cr4 & CR4_LA57 != 0 { &LEVEL5 } else { &LEVEL4 };
        !mode.takes(gva)
    }

    /// Makes sure that the host may write a frame's page. A write to the shared zero page gives the frame a page of
    /// its own, which the MMU notifier announces: every entry that maps the frame goes.
    pub(crate) fn host_makes_writable(&mut self, gfn: Gfn) {
        let flush = self.shadow.host_makes_writable(gfn);
        self.pay(flush);
    }

    /// Reads RAM as KVM does for the guest: an absent page becomes the zero page.
    pub(crate) fn read_ram(&mut self, gpa: Gpa, size: u8) -> u64 {
        if self.shadow.memory.host.state(gpa.gfn()) == HostState::Absent {
            self.shadow.memory.host.set_state(gpa.gfn(), HostState::Zero);
        }
        self.shadow.memory.host.read(gpa, size)
    }
}

impl Shadow {
    /// See [`Ctx::host_makes_writable`]; also used for writes of user space.
    pub(crate) fn host_makes_writable(&mut self, gfn: Gfn) -> Flush {
        match self.memory.host.state(gfn) {
            HostState::Writable | HostState::Huge2m | HostState::Huge1g => Flush::NONE,
            HostState::Absent => {
                self.memory.host.set_state(gfn, HostState::Writable);
                Flush::NONE
            }
            HostState::Zero | HostState::Shared => {
                self.events.unmap_hva_range(gfn.gpa(), Gpa(gfn.gpa().0 + 4096));
                let flush = self.unmap_range(gfn, 1);
                self.page_replaced(gfn.gpa());
                self.memory.host.set_state(gfn, HostState::Writable);
                flush
            }
        }
    }

    /// Another page is behind a frame, whose entries are gone already.
    pub(crate) fn page_replaced(&mut self, gpa: Gpa) {
        if self.config.kernel.notifier_changes_pte {
            self.events.set_spte_hva(gpa);
        }
    }
}

//! The #PF exit (`kvm_mmu_page_fault` and `FNAME(page_fault)`, 6.1).

use crate::cpu::Requests;
use crate::fault::emulate::Emulation;
use crate::fault::insn::Insn;
use crate::fault::{After, Ctx};
use crate::guest::walk::{GuestFault, GuestWalk};
use crate::memory::HostState;
use crate::outcome::{Outcome, RetPf, Status};
use crate::types::{Access, ErrorCode, Gfn, Gva, Level, Pfn};

/// The fault as the handler sees it, once the guest's walk is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub gva: Gva,
    pub write: bool,
    pub user: bool,
    pub fetch: bool,
    /// The frame of the address.
    pub gfn: Gfn,
    /// Its host page, `None` without a slot.
    pub pfn: Option<Pfn>,
    /// The host may write the page.
    pub map_writable: bool,
    /// The greatest level that the leaf may have.
    pub max_level: Level,
    /// The notifier sequence when the host page was looked up.
    pub seq: u64,
}

/// How the mode's handler ended.
pub(crate) enum Handled {
    Result(RetPf),
    Guest(GuestFault),
    OutOfPages,
}

impl Ctx<'_> {
    /// Handles a #PF exit of the instruction at `gva`.
    pub(crate) fn handle_page_fault(&mut self, insn: &Insn, gva: Gva, code: ErrorCode) -> After {
        self.count_exit(insn, gva, code);
        if insn.delivery && self.shadow.config.kernel.delivery_unprotects_first {
            self.unprotect_for_delivery(insn, gva);
        }
        if code.has(ErrorCode::RSVD)
            && let Some(after) = self.mmio_fault(insn, gva)
        {
            return after;
        }
        self.vcpu.counters.pf_taken += 1;
        let mut write_to_table = false;
        let handled = if self.vcpu.role.mode.has_tables() {
            self.page_fault(insn, gva, code.without(ErrorCode::RSVD), &mut write_to_table)
        } else {
            self.direct_page_fault(gva, code)
        };
        let result = match handled {
            Handled::Guest(fault) => return After::Finished(self.inject(fault)),
            Handled::OutOfPages => return After::Finished(Outcome::of(Status::InternalError)),
            Handled::Result(result) => result,
        };
        self.keep_unsync_limit();
        if matches!(result, RetPf::Emulate | RetPf::WriteProtected) {
            return self.not_mapped(insn, gva, result, write_to_table);
        }
        self.vcpu.counters.pf_fixed += u64::from(result == RetPf::Fixed);
        self.vcpu.counters.pf_spurious += u64::from(result == RetPf::Spurious);
        if insn.delivery {
            self.reinject(insn);
        }
        After::Resume
    }

    /// A fault may have let one table more go out of sync than a policy allows.
    #[inline(always)]
    pub(crate) fn keep_unsync_limit(&mut self) {
        if let Some(limit) = self.shadow.policy.rules.unsync_limit
            && self.shadow.counters.mmu_unsync > u64::from(limit)
        {
            let flush = self.shadow.keep_unsync_limit(limit, &self.vcpu.role);
            self.pay(flush);
        }
    }

    /// A fault on an entry with reserved bits: MMIO. `None` if the entry is stale and the ordinary way must repair it.
    fn mmio_fault(&mut self, insn: &Insn, gva: Gva) -> Option<After> {
        match self.handle_mmio_page_fault(gva) {
            RetPf::Emulate => {
                self.vcpu.counters.x_mmio_faults += 1;
                Some(self.emulate(insn, gva, Emulation { allow_retry: false, write_to_table: false }))
            }
            RetPf::Invalid => None,
            _ => Some(After::Resume),
        }
    }

    /// The access cannot be let through: it is emulated, or (6.12) what protects the page goes.
    #[inline(never)]
    pub(crate) fn not_mapped(&mut self, insn: &Insn, gva: Gva, result: RetPf, write_to_table: bool) -> After {
        let emulation = if result == RetPf::WriteProtected && self.shadow.config.kernel.retry_needs_zap {
            self.write_protect_fault(insn, gva, write_to_table)
        } else {
            let allow_retry = !self.shadow.config.kernel.retry_needs_zap && !self.mmio_in_cache(gva);
            Some(Emulation { allow_retry, write_to_table })
        };
        let Some(how) = emulation else {
            if insn.delivery {
                self.reinject(insn);
            }
            return After::Resume;
        };
        self.vcpu.counters.pf_emulate += 1;
        self.emulate(insn, gva, how)
    }

    /// The event whose delivery faulted goes in again. A soft one (INT3, INT n) pushes the RIP behind its instruction,
    /// which hardware without next RIP leaves to KVM's decoder, at the next entry (`svm_update_soft_interrupt_rip`, 6.1).
    fn reinject(&mut self, insn: &Insn) {
        if insn.soft {
            if !self.shadow.config.cpu.nrips {
                self.vcpu.soft_event = (Gva(insn.rip_or_zero()), insn.user);
                self.vcpu.requests.raise(Requests::EVENT);
            }
        } else if let Some((vector, code)) = self.vcpu.injected {
            self.shadow.events.inj_exception(vector, code, true);
        }
    }

    fn count_exit(&mut self, insn: &Insn, gva: Gva, code: ErrorCode) {
        let rip = insn.rip_or_zero();
        self.shadow.events.exit(0, rip, code.0);
        self.shadow.events.page_fault(rip, gva, code);
        self.count_fault(code);
    }

    #[inline(always)]
    pub(crate) fn count_fault(&mut self, code: ErrorCode) {
        let counters = &mut self.vcpu.counters;
        counters.exits += 1;
        counters.x_faults_user += u64::from(code.has(ErrorCode::U));
        if code.has(ErrorCode::F) {
            counters.x_faults_fetch += 1;
        } else if code.has(ErrorCode::W) {
            counters.x_faults_write += 1;
        } else {
            counters.x_faults_read += 1;
        }
    }

    fn page_fault(&mut self, insn: &Insn, gva: Gva, code: ErrorCode, write_to_table: &mut bool) -> Handled {
        let root = self.vcpu.root.table(gva);
        let mut walk = self.walk_begun(gva);
        if let Err(fault) = self.walk_tables(gva, code, insn.ac, &mut walk) {
            return Handled::Guest(fault);
        }
        let Some(root) = root else { return Handled::Result(RetPf::Retry) };
        let (write, user) = (code.has(ErrorCode::W), code.has(ErrorCode::U));
        if write && code.has(ErrorCode::P) && self.shadow.write_tracked(walk.gfn) {
            self.shadow.clear_flood_path(root, gva);
            return Handled::Result(RetPf::WriteProtected);
        }
        let self_changing = if self.shadow.config.kernel.self_mapping_is_small {
            self.is_self_change_mapping(&walk, user, write_to_table)
        } else {
            *write_to_table = write && self.writes_own_table(&walk);
            false
        };
        let mut fault = Fault {
            gva,
            write,
            user,
            fetch: code.has(ErrorCode::F),
            gfn: walk.gfn,
            pfn: None,
            map_writable: false,
            max_level: if self_changing { Level::PT } else { walk.level },
            seq: self.shadow.invalidate_seq,
        };
        if !self.faultin(&mut fault) {
            return Handled::Result(RetPf::Emulate);
        }
        if fault.pfn.is_none() {
            self.cache_mmio(gva, fault.gfn, walk.pte_access.and(Access::W.with(Access::U)));
        }
        self.emulate_cr0_wp(&fault, &mut walk);
        match self.ready_to_map(&fault) {
            Some(other) => other,
            None => Handled::Result(self.fetch(&mut fault, &walk, root)),
        }
    }

    /// What has to hold before entries are made, in the modes' common order: free pages, and nothing that became stale
    /// since the host's page was looked up (`is_page_fault_stale`, 6.1).
    pub(crate) fn ready_to_map(&mut self, fault: &Fault) -> Option<Handled> {
        let (available, flush) = self.shadow.make_pages_available();
        self.pay(flush);
        if !available {
            return Some(Handled::OutOfPages);
        }
        let root_is_stale = match self.vcpu.root.page() {
            Some(root) => !self.shadow.is_valid(root),
            // The four pages of a PAE root are not looked at: the request that came with a zap says it.
            None => self.vcpu.requests.pending(Requests::FREE_OBSOLETE_ROOTS),
        };
        let stale = root_is_stale || fault.seq != self.shadow.invalidate_seq;
        stale.then_some(Handled::Result(RetPf::Retry))
    }

    /// Whether one of the tables of the walk lies in the very page that the leaf maps; then the page is mapped small.
    /// Also notes whether the target is such a table itself (`is_self_change_mapping`, 6.1).
    fn is_self_change_mapping(&self, walk: &GuestWalk, user: bool, write_to_table: &mut bool) -> bool {
        if !walk.pte_access.has(Access::W) && (self.vcpu.role.wp || user) {
            return false;
        }
        *write_to_table = self.writes_own_table(walk);
        let tables = &walk.steps[usize::from(walk.level.0) - 1..usize::from(self.vcpu.role.mode.top.0)];
        tables.iter().any(|step| walk.gfn.round(walk.level) == step.table.round(walk.level))
    }

    /// Whether the target is one of the tables of its own walk (`is_self_change_mapping`, 6.1); 6.12 does not look at the
    /// root's (`FNAME(fetch)`).
    pub(crate) fn writes_own_table(&self, walk: &GuestWalk) -> bool {
        let root_counts = self.shadow.config.kernel.self_mapping_is_small;
        let top = usize::from(self.vcpu.role.mode.top.0) - usize::from(!root_counts);
        let tables = walk.steps.get(usize::from(walk.level.0) - 1..top).unwrap_or_default();
        tables.iter().any(|step| step.table == walk.gfn)
    }

    /// Finds the host page (`kvm_faultin_pfn`, 6.1). `false`: a write to a read-only slot, to be emulated.
    pub(crate) fn faultin(&mut self, fault: &mut Fault) -> bool {
        let Some(slot) = self.shadow.memory.slot(fault.gfn) else { return true };
        let readonly = slot.readonly;
        if readonly && fault.write {
            return false;
        }
        if fault.write {
            self.host_makes_writable(fault.gfn);
        } else if self.shadow.memory.host.state(fault.gfn) == HostState::Absent {
            self.shadow.memory.host.set_state(fault.gfn, HostState::Zero);
        }
        let state = self.shadow.memory.host.state(fault.gfn);
        fault.pfn = Some(self.shadow.memory.host.frame(fault.gfn));
        fault.map_writable = state.writable() && !readonly;
        true
    }

    /// The CPU runs the guest with CR0.WP set; a guest without it may write read-only pages in supervisor mode, so
    /// such a page becomes a writable page of the supervisor's own.
    fn emulate_cr0_wp(&self, fault: &Fault, walk: &mut GuestWalk) {
        let role = &self.vcpu.role;
        if fault.write && !walk.pte_access.has(Access::W) && !role.wp && !fault.user && fault.pfn.is_some() {
            walk.pte_access = walk.pte_access.with(Access::W).without(Access::U);
            if role.smep {
                walk.pte_access = walk.pte_access.without(Access::X);
            }
        }
    }
}

//! Resuming an instruction instead of emulating it: the page that it hit stops being shadowed, and the guest tries again.

use crate::fault::Ctx;
use crate::fault::emulate::Emulation;
use crate::fault::insn::{Action, Insn};
use crate::guest::walk::{GuestFault, GuestWalk};
use crate::types::{ErrorCode, Gva};

impl Ctx<'_> {
    /// A fault while an event was being delivered: whatever lies at the address must not need emulation, so it stops
    /// being a shadowed table (`kvm_mmu_unprotect_page_virt`, 6.1). The walk has the CPL from before the delivery.
    pub(crate) fn unprotect_for_delivery(&mut self, insn: &Insn, gva: Gva) {
        if !self.vcpu.role.mode.has_tables() {
            return;
        }
        let access = ErrorCode::U.when(insn.user);
        if let Ok(walk) = self.walk(gva, access, insn.ac) {
            let flush = self.shadow.unprotect(walk.gfn);
            self.pay(flush);
        }
    }

    /// What becomes of a write to a write-protected page (`kvm_mmu_write_protect_fault`, 6.12). The same instruction at
    /// the same address as when a page was unprotected last is emulated, come what may, and the place stays noted; any
    /// other write forgets it. A fault of an event's delivery must not need emulation, so it tries to unprotect at
    /// once. `None`: resume.
    pub(crate) fn write_protect_fault(&mut self, insn: &Insn, gva: Gva, write_to_table: bool) -> Option<Emulation> {
        let allow_retry = self.vcpu.last_retry != (insn.rip_or_zero(), gva.0);
        if allow_retry {
            self.vcpu.last_retry = (0, 0);
            if insn.delivery && self.unprotect_and_retry(insn, gva, false) {
                return None;
            }
        }
        Some(Emulation { allow_retry, write_to_table })
    }

    /// Unprotects the page of an address and notes the place (`__kvm_mmu_unprotect_gfn_and_retry`, 6.12). `false`, and
    /// nothing noted, if no shadow page could go; a root in use does not count. With `always` that does not matter.
    fn unprotect_and_retry(&mut self, insn: &Insn, gva: Gva, always: bool) -> bool {
        let Ok(walk) = self.walk_for_write(gva, insn) else { return false };
        let flush = self.shadow.unprotect(walk.gfn);
        let zapped = flush.calls > 0;
        self.pay(flush);
        if zapped || always {
            self.vcpu.last_retry = (insn.rip_or_zero(), gva.0);
            self.vcpu.counters.x_retries += 1;
        }
        zapped || always
    }

    /// Whether an instruction that was decoded is resumed instead of executed: one that does not write page tables is,
    /// once at a place, with the page that it hit no longer shadowed (`retry_instruction`, 6.1;
    /// `x86_emulate_instruction`, 6.12, where it must have hit a write-protected page and a shadow page must go).
    pub(crate) fn retry_instruction(&mut self, insn: &Insn, gva: Gva, how: Emulation) -> bool {
        let writes_tables = match insn.action {
            Action::Store | Action::Copy | Action::Rmw(_) => insn.writes_tables,
            Action::Load | Action::Fetch => false,
        };
        if self.shadow.config.kernel.retry_needs_zap {
            return how.allow_retry && !writes_tables && self.unprotect_and_retry(insn, gva, false);
        }
        let here = (insn.rip_or_zero(), gva.0);
        let last = std::mem::take(&mut self.vcpu.last_retry);
        if !how.allow_retry || writes_tables || last == here {
            return false;
        }
        self.vcpu.last_retry = here;
        if let Ok(walk) = self.walk_for_write(gva, insn) {
            let flush = self.shadow.unprotect(walk.gfn);
            self.pay(flush);
        }
        self.vcpu.counters.x_retries += 1;
        true
    }

    /// Whether an instruction that could not be emulated is resumed, its page no longer shadowed. That cannot help if
    /// the page is a table of the access's own walk.
    pub(crate) fn retry_after_failure(&mut self, insn: &Insn, gva: Gva, how: Emulation) -> bool {
        if !how.allow_retry {
            return false;
        }
        if self.shadow.config.kernel.retry_needs_zap {
            // kvm_unprotect_and_retry_on_failure (6.12)
            return !how.write_to_table && self.unprotect_and_retry(insn, gva, true);
        }
        if !self.reexecute(gva, insn) || how.write_to_table {
            return false;
        }
        self.vcpu.counters.x_retries += 1;
        true
    }

    /// Unprotects the page of an address (`reexecute_instruction`, 6.1). It looks the host's page up for writing, which a
    /// read-only slot refuses.
    fn reexecute(&mut self, gva: Gva, insn: &Insn) -> bool {
        // The guest will take the fault itself.
        let Ok(walk) = self.walk_for_write(gva, insn) else { return true };
        if self.shadow.memory.slot(walk.gfn).is_none_or(|slot| slot.readonly) {
            return false;
        }
        self.host_makes_writable(walk.gfn);
        let flush = self.shadow.unprotect(walk.gfn);
        self.pay(flush);
        true
    }

    fn walk_for_write(&mut self, gva: Gva, insn: &Insn) -> Result<GuestWalk, GuestFault> {
        self.walk(gva, ErrorCode::W.with(ErrorCode::U.when(insn.user)), insn.ac)
    }
}

//! Page faults with paging off (`nonpaging_page_fault`, `direct_page_fault`, 6.1): the guest's addresses are physical, the
//! shadow consists of direct pages, and a write to a page that only the dirty log protects needs no lock.

use crate::bits::{PT_NX, PT_W};
use crate::fault::Ctx;
use crate::fault::page_fault::{Fault, Handled};
use crate::memory::Slot;
use crate::outcome::RetPf;
use crate::shadow::spte::{MMU_WRITABLE, Spte, sptep};
use crate::types::{Access, ErrorCode, Gfn, Gva, Level, PageId};

impl Ctx<'_> {
    /// Handles a fault; the order of the steps is that of a mode with tables, without the guest's walk.
    pub(crate) fn direct_page_fault(&mut self, gva: Gva, code: ErrorCode) -> Handled {
        let Some(table) = self.vcpu.root.table(gva) else { return Handled::Result(RetPf::Retry) };
        let (write, gfn) = (code.has(ErrorCode::W), Gfn(gva.0 >> 12));
        let mapped = code.has(ErrorCode::P) && !code.has(ErrorCode::RSVD);
        if mapped && write && self.shadow.write_tracked(gfn) {
            return Handled::Result(RetPf::WriteProtected);
        }
        let mut fault = Fault {
            gva,
            write,
            user: code.has(ErrorCode::U),
            fetch: code.has(ErrorCode::F),
            gfn,
            pfn: None,
            map_writable: false,
            max_level: Level::PD,
            seq: self.shadow.invalidate_seq,
        };
        if mapped && write {
            let result = self.fast_page_fault(&fault, code, table);
            if result != RetPf::Invalid {
                self.vcpu.counters.pf_fast += 1;
                return Handled::Result(result);
            }
        }
        if !self.faultin(&mut fault) {
            return Handled::Result(RetPf::Emulate);
        }
        if fault.pfn.is_none() {
            // Without an address: the cache answers by the frame (a run shows it; section 3.8.3 of the specification has
            // the address).
            self.cache_mmio(Gva(0), gfn, Access::ALL);
        }
        match self.ready_to_map(&fault) {
            Some(other) => other,
            None => Handled::Result(self.map((table, Level::PD), &fault, Access::ALL, Gfn(0))),
        }
    }

    /// Gives back a write right that was taken away for the dirty log only (`fast_page_fault`, 6.1). `Invalid`: this way
    /// does not help.
    fn fast_page_fault(&mut self, fault: &Fault, code: ErrorCode, table: PageId) -> RetPf {
        let (pos, level) = self.shadow.walk_down(table, fault.gva);
        let old = self.shadow.spte(pos);
        let result = self.try_fast(fault, old, level);
        if result == RetPf::Fixed {
            self.shadow.arena.update_spte(pos, Spte(old.0 | PT_W));
            self.shadow.memory.mark_dirty(fault.gfn);
        }
        let at = sptep(pos.page(), pos.index());
        self.shadow.events.fast_page_fault(fault.gva, code, old.0, at, result);
        result
    }

    fn try_fast(&self, fault: &Fault, old: Spte, level: Level) -> RetPf {
        if !old.present() {
            return RetPf::Invalid;
        }
        let allowed = if fault.fetch { old.0 & PT_NX == 0 } else { old.writable() };
        if allowed {
            return RetPf::Spurious;
        }
        // A large page must be split while writes are logged.
        let logs = self.shadow.memory.slot(fault.gfn).is_some_and(Slot::logs_dirty);
        if old.0 & MMU_WRITABLE == 0 || level > Level::PT && logs {
            return RetPf::Invalid;
        }
        RetPf::Fixed
    }
}

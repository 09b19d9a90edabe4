//! Entering the guest: requests in KVM's order, and the root (`vcpu_enter_guest`, 6.1).

use crate::cpu::{CpuRole, Requests};
use crate::fault::Ctx;

/// What a CR3 load asks for.
const USUAL: u8 = Requests::MMU_SYNC.0 | Requests::LOAD_MMU_PGD.0 | Requests::TLB_FLUSH_CURRENT.0;

impl Ctx<'_> {
    /// Serves what is pending until nothing is, so that the guest can run. `false`: the vCPU shuts down.
    #[inline]
    pub(crate) fn enter(&mut self) -> bool {
        if self.vcpu.requests == Requests::default() && self.vcpu.root.is_loaded() {
            return true;
        }
        self.enter_slowly()
    }

    /// A flush that is requested while requests are served cancels the entry, which is then made again.
    #[inline(never)]
    fn enter_slowly(&mut self) -> bool {
        let soft_event = self.vcpu.requests.pending(Requests::EVENT);
        loop {
            if !self.serve_requests() {
                return false;
            }
            if !self.vcpu.root.is_loaded() {
                let (loaded, flush) = self.shadow.load_root(self.vcpu);
                self.pay(flush);
                if !loaded {
                    continue;
                }
                // Loading flushes the hardware's entries by itself, which KVM does not count.
            }
            if self.vcpu.requests == Requests::default() {
                return true;
            }
            if soft_event {
                self.vcpu.requests.raise(Requests::EVENT); // what had been injected is taken back
            }
        }
    }

    /// Serves what a CR3 load or an INVLPG asks for, if that is all and the guest can run then.
    #[inline(always)]
    pub(super) fn serve_flush(&mut self) -> bool {
        let all = self.vcpu.requests.0 & !(USUAL | Requests::TLB_FLUSH.0) == 0 && self.vcpu.root.is_loaded();
        if all {
            self.serve_usual_requests();
        }
        all
    }

    /// What a CR3 load asks for is served without a look at the rest.
    fn serve_requests(&mut self) -> bool {
        if self.vcpu.requests.0 & !USUAL != 0 {
            return self.serve_any_requests();
        }
        self.serve_usual_requests();
        true
    }

    #[inline(always)]
    fn serve_usual_requests(&mut self) {
        if self.vcpu.requests.check(Requests::MMU_SYNC) && !self.nothing_to_sync() {
            self.sync_roots();
        }
        // Syncing may have asked for the greater flush, which is one with this.
        if self.vcpu.requests.0 & (Requests::TLB_FLUSH.0 | Requests::TLB_FLUSH_CURRENT.0) != 0 {
            self.vcpu.counters.tlb_flush += 1;
        }
        self.vcpu.requests.0 &= !(USUAL | Requests::TLB_FLUSH.0);
    }

    /// A sync with nothing below the root that could be out of step, done.
    #[inline]
    fn nothing_to_sync(&mut self) -> bool {
        let below = |id| self.shadow.arena[id].unsync_children == 0;
        let synced = self.vcpu.root.page().is_some_and(below) && !self.shadow.policy.rules.sync_all;
        if synced {
            self.vcpu.clear_mmio();
        }
        synced
    }

    fn serve_any_requests(&mut self) -> bool {
        if self.vcpu.requests.check(Requests::FREE_OBSOLETE_ROOTS) {
            let flush = self.shadow.free_obsolete_roots(self.vcpu);
            self.pay(flush);
        }
        if self.vcpu.requests.check(Requests::MMU_SYNC) {
            self.sync_roots();
        }
        self.vcpu.requests.check(Requests::LOAD_MMU_PGD);
        if self.vcpu.requests.check(Requests::TLB_FLUSH) {
            self.vcpu.counters.tlb_flush += 1;
            self.vcpu.requests.check(Requests::TLB_FLUSH_CURRENT);
        }
        if self.vcpu.requests.check(Requests::TLB_FLUSH_CURRENT) {
            self.vcpu.counters.tlb_flush += 1;
        }
        if self.vcpu.requests.check(Requests::TLB_FLUSH_GUEST) {
            self.vcpu.counters.tlb_flush += 1;
            self.sync_roots();
            let flush = self.shadow.free_unsync_prev_roots(self.vcpu);
            self.pay(flush);
        }
        if self.vcpu.requests.check(Requests::TRIPLE_FAULT) {
            return false;
        }
        if self.vcpu.requests.check(Requests::EVENT) {
            self.decode_soft_event();
        }
        true
    }

    /// A failure only costs the event its place: KVM tries again at the next entry.
    fn decode_soft_event(&mut self) {
        let (rip, user) = self.vcpu.soft_event;
        self.walk_for_bytes(rip, user).ok();
        self.vcpu.counters.insn_emulation += 1;
        self.shadow.events.emulate_insn(rip.0, false);
    }

    #[inline(never)]
    fn sync_roots(&mut self) {
        let flush = self.shadow.sync_roots(self.vcpu);
        self.pay(flush);
    }

    /// The paging mode changed: no root fits any more, and walks obey new rules (`kvm_mmu_reset_context`, 6.1).
    pub(crate) fn reset_context(&mut self) {
        let flush = self.shadow.free_all_roots(self.vcpu);
        self.pay(flush);
        self.ways.clear();
        self.vcpu.role = CpuRole::of(&self.vcpu.regs, &self.shadow.config.cpu);
    }
}

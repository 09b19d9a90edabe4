//! Roots: loading one, the cache of previous ones, letting go of them, and syncing below them.

use crate::config::PREV_ROOTS;
use crate::cpu::{CpuRole, Requests, Root, Top, Vcpu};
use crate::guest::gpte::Gpte;
use crate::shadow::zap::ZapList;
use crate::shadow::{Flush, Shadow};
use crate::types::{Gfn, Gva};

/// What the next entry finds after a change of CR3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NewPgd {
    /// A root that was cached is current now.
    Hit,
    /// No root is current; the next entry loads one.
    Miss,
}

impl Shadow {
    /// Loads a root for the current CR3 (`kvm_mmu_load`, 6.1). `false`: CR3 or a PDPTE points outside the slots, and the
    /// kernel shuts the vCPU down for it.
    pub(crate) fn load_root(&mut self, vcpu: &mut Vcpu) -> (bool, Flush) {
        let mode = vcpu.role.mode;
        let cr3 = Gpte(vcpu.regs.cr3).gfn();
        let mut frames: [Option<Gfn>; 4] = std::array::from_fn(|i| match mode {
            mode if !mode.has_tables() => Some(Gfn((i as u64) << 18)),
            mode if mode.pdptes => Some(Gpte(vcpu.pdptes[i])).filter(|pdpte| pdpte.present()).map(Gpte::gfn),
            _ => Some(cr3),
        });
        let is_lost = |gfn: &Gfn| self.memory.slot(*gfn).is_none();
        let cr3_is_lost = mode.has_tables() && is_lost(&cr3) && !self.config.kernel.lost_root_shuts_down;
        if mode.has_tables() && frames.iter().flatten().any(is_lost) {
            if self.config.kernel.lost_root_shuts_down {
                vcpu.requests.raise(Requests::TRIPLE_FAULT);
                return (false, Flush::NONE);
            }
            frames = frames.map(|frame| frame.filter(|gfn| !is_lost(gfn)));
        }
        let (_, mut owed) = self.make_pages_available();
        let role = vcpu.role.root_role();
        let mut load = |gfn, role| {
            let (id, flush) = self.get_page(gfn, role, &vcpu.role);
            owed += flush;
            self.arena[id].root_count += 1;
            id
        };
        let top = if cr3_is_lost {
            Top::Dummy
        } else if mode.has_pae_roots() {
            Top::Pae(std::array::from_fn(|i| frames[i].map(|gfn| load(gfn, role.pae_root(i as u32)))))
        } else {
            Top::Page(load(cr3, role))
        };
        vcpu.root = Root { top, pgd: if mode.has_tables() { vcpu.regs.cr3 } else { 0 } };
        owed += self.sync_roots(vcpu);
        (true, owed)
    }

    /// Syncs what is unsync below the current root (`kvm_mmu_sync_roots`, 6.1). With paging off nothing ever is, and
    /// not even the MMIO cache is touched.
    pub(crate) fn sync_roots(&mut self, vcpu: &mut Vcpu) -> Flush {
        let mut owed = Flush::NONE;
        if !vcpu.role.mode.has_tables() || !vcpu.root.is_loaded() {
            return owed;
        }
        vcpu.clear_mmio();
        for id in vcpu.root.pages() {
            owed += self.sync_children(id, &vcpu.role);
        }
        if self.policy.rules.sync_all {
            owed += self.sync_all(&vcpu.role);
        }
        owed
    }

    fn is_unsync(&self, root: &Root) -> bool {
        root.pages().any(|id| self.arena[id].unsync || self.arena[id].unsync_children > 0)
    }

    /// Lets go of one root (`mmu_free_root_page`, 6.1): a zapped page goes with its last user.
    fn put_root(&mut self, root: &mut Root, list: &mut ZapList) {
        for id in std::mem::take(root).pages() {
            self.arena[id].root_count -= 1;
            if self.arena[id].root_count == 0 && self.arena[id].role.invalid() {
                let _ = self.prepare_zap(id, list);
            }
        }
    }

    /// Lets go of the roots for which `which` holds (`kvm_mmu_free_roots`, 6.1): previous ones first.
    fn free_roots_if(&mut self, vcpu: &mut Vcpu, which: impl Fn(&Self, &Root, bool) -> bool) -> Flush {
        let mut list = ZapList::default();
        for i in 0..PREV_ROOTS {
            if which(self, &vcpu.prev_roots[i], false) {
                self.put_root(&mut vcpu.prev_roots[i], &mut list);
            }
        }
        if which(self, &vcpu.root, true) {
            self.put_root(&mut vcpu.root, &mut list);
        }
        self.commit_zap(list)
    }

    /// Lets go of the current root (`load_pdptrs` when a register changes, 6.1).
    pub(crate) fn free_current_root(&mut self, vcpu: &mut Vcpu) -> Flush {
        self.free_roots_if(vcpu, |_, _, current| current)
    }

    /// Lets go of all roots (`kvm_mmu_unload`, 6.1).
    pub(crate) fn free_all_roots(&mut self, vcpu: &mut Vcpu) -> Flush {
        vcpu.clear_mmio();
        self.free_roots_if(vcpu, |_, _, _| true)
    }

    /// Lets go of roots that were zapped, and of those that are no page of their own in any case
    /// (`kvm_mmu_free_obsolete_roots`, 6.1).
    pub(crate) fn free_obsolete_roots(&mut self, vcpu: &mut Vcpu) -> Flush {
        self.free_roots_if(vcpu, |s, root, _| match root.top {
            Top::None => false,
            Top::Page(id) => !s.is_valid(id),
            Top::Pae(_) | Top::Dummy => true,
        })
    }

    /// Lets go of previous roots with unsync pages, stale marks included (`kvm_mmu_sync_prev_roots`, 6.1).
    pub(crate) fn free_unsync_prev_roots(&mut self, vcpu: &mut Vcpu) -> Flush {
        self.free_roots_if(vcpu, |s, root, current| !current && s.is_unsync(root))
    }

    /// Lets go of previous roots of a PCID (`kvm_invalidate_pcid`, 6.1).
    pub(crate) fn free_prev_roots_of_pcid(&mut self, vcpu: &mut Vcpu, pcid: u64) -> Flush {
        self.free_roots_if(vcpu, |_, root, current| !current && root.is_loaded() && root.pgd & 0xfff == pcid)
    }

    fn is_usable(&self, root: &Root, pgd: u64, vcpu: &Vcpu) -> bool {
        root.pgd == pgd && root.page().is_some_and(|id| self.arena[id].role == vcpu.role.root_role())
    }

    /// Looks for a root of the new CR3 among the current and the previous ones (`fast_pgd_switch`, 6.1). Each look
    /// moves the roots on by one place; the one that falls out is let go.
    pub(crate) fn new_pgd(&mut self, vcpu: &mut Vcpu, pgd: u64) -> (NewPgd, Flush) {
        let mut owed = Flush::NONE;
        if matches!(vcpu.root.top, Top::Pae(_) | Top::Dummy) {
            // PAE roots are not kept, so that nobody has to care for their PDPTEs; a dummy has nothing to keep.
            owed += self.free_current_root(vcpu);
        }
        if !vcpu.root.is_loaded() {
            return (self.new_pgd_without_current(vcpu, pgd), owed);
        }
        let mut hit = self.is_usable(&vcpu.root, pgd, vcpu);
        for i in 0..PREV_ROOTS {
            if hit {
                break;
            }
            std::mem::swap(&mut vcpu.root, &mut vcpu.prev_roots[i]);
            hit = self.is_usable(&vcpu.root, pgd, vcpu);
        }
        if hit {
            return (NewPgd::Hit, Flush::NONE);
        }
        (NewPgd::Miss, self.free_current_root(vcpu))
    }

    fn new_pgd_without_current(&self, vcpu: &mut Vcpu, pgd: u64) -> NewPgd {
        let at = (0..PREV_ROOTS).find(|i| self.is_usable(&vcpu.prev_roots[*i], pgd, vcpu));
        let Some(at) = at else { return NewPgd::Miss };
        vcpu.root = vcpu.prev_roots[at];
        vcpu.prev_roots.copy_within(at + 1.., at);
        vcpu.prev_roots[PREV_ROOTS - 1] = Root::default();
        NewPgd::Hit
    }

    /// Forgets the writes counted against a root (`__clear_sp_write_flooding_count` on a root-cache hit, 6.1).
    pub(crate) fn clear_root_flood(&mut self, vcpu: &Vcpu) {
        if let Some(id) = vcpu.root.page() {
            self.arena[id].flood = 0;
        }
    }

    /// INVLPG for the current root and, if `all`, the previous ones too (`kvm_mmu_invalidate_gva`, 6.1).
    pub(crate) fn invlpg(&mut self, vcpu: &mut Vcpu, gva: Gva, all: bool) -> Flush {
        vcpu.clear_mmio_page(gva);
        let mut owed = Flush::NONE;
        // Only an entry of an unsync page may differ from the guest's.
        if !vcpu.role.mode.has_tables() || self.counters.mmu_unsync == 0 {
            return owed;
        }
        owed += self.invlpg_below(&vcpu.root, gva, &vcpu.role);
        for root in vcpu.prev_roots.iter().filter(|root| all && root.is_loaded()) {
            owed += self.invlpg_below(root, gva, &vcpu.role);
        }
        owed
    }

    /// INVLPG below one root.
    #[inline]
    fn invlpg_below(&mut self, root: &Root, gva: Gva, role: &CpuRole) -> Flush {
        match root.table(gva) {
            Some(id) if self.arena[id].unsync_children > 0 => self.invlpg_root(id, gva, role),
            _ => Flush::NONE,
        }
    }

    /// INVPCID of one address: the roots of that PCID (`kvm_mmu_invpcid_gva`, 6.1).
    pub(crate) fn invpcid_gva(&mut self, vcpu: &Vcpu, gva: Gva, pcid: u64) -> Flush {
        let mut owed = Flush::NONE;
        let current = (vcpu.pcid() == pcid).then_some(&vcpu.root);
        let previous = vcpu.prev_roots.iter().filter(|root| vcpu.pcid_of(root.pgd) == pcid);
        for root in current.into_iter().chain(previous) {
            owed += self.invlpg_below(root, gva, &vcpu.role);
        }
        owed
    }
}

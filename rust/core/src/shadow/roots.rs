//! Roots: loading one, the cache of previous ones, letting go of them, and syncing below them.

use crate::config::PREV_ROOTS;
use crate::cpu::{Requests, Root, Vcpu};
use crate::guest::gpte::Gpte;
use crate::shadow::zap::ZapList;
use crate::shadow::{Flush, Shadow};
use crate::types::{Gva, Level, PageId};

/// What the next entry finds after a change of CR3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NewPgd {
    /// A root that was cached is current now.
    Hit,
    /// No root is current; the next entry loads one.
    Miss,
}

impl Shadow {
    /// Loads a root for the current CR3 (`kvm_mmu_load`, 6.1). `false`: CR3 points outside the slots, so the vCPU
    /// shuts down.
    pub(crate) fn load_root(&mut self, vcpu: &mut Vcpu) -> (bool, Flush) {
        let gfn = Gpte(vcpu.regs.cr3).gfn(Level::PT);
        if self.memory.slot(gfn).is_none() {
            vcpu.requests.raise(Requests::TRIPLE_FAULT);
            return (false, Flush::NONE);
        }
        let (_, mut owed) = self.make_pages_available();
        let (id, flush) = self.get_page(gfn, vcpu.role.root_role(), &vcpu.role);
        owed += flush;
        self.arena[id].root_count += 1;
        vcpu.root = Root { page: Some(id), pgd: vcpu.regs.cr3 };
        owed += self.sync_roots(vcpu);
        (true, owed)
    }

    /// Syncs what is unsync below the current root (`kvm_mmu_sync_roots`, 6.1).
    pub(crate) fn sync_roots(&mut self, vcpu: &mut Vcpu) -> Flush {
        let Some(root) = vcpu.root.page else { return Flush::NONE };
        vcpu.clear_mmio();
        if self.root_is_unsync(root) { self.sync_children(root, &vcpu.role) } else { Flush::NONE }
    }

    fn root_is_unsync(&self, root: PageId) -> bool {
        self.arena[root].unsync || self.arena[root].unsync_children > 0
    }

    /// Lets go of one root (`mmu_free_root_page`, 6.1): a zapped page goes with its last user.
    fn put_root(&mut self, root: &mut Root, list: &mut ZapList) {
        let Some(id) = std::mem::take(root).page else { return };
        self.arena[id].root_count -= 1;
        if self.arena[id].root_count == 0 && self.arena[id].role.invalid() {
            let _ = self.prepare_zap(id, list);
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

    /// Lets go of all roots (`kvm_mmu_unload`, 6.1).
    pub(crate) fn free_all_roots(&mut self, vcpu: &mut Vcpu) -> Flush {
        vcpu.clear_mmio();
        self.free_roots_if(vcpu, |_, _, _| true)
    }

    /// Lets go of roots that were zapped (`kvm_mmu_free_obsolete_roots`, 6.1).
    pub(crate) fn free_obsolete_roots(&mut self, vcpu: &mut Vcpu) -> Flush {
        self.free_roots_if(vcpu, |s, root, _| root.page.is_some_and(|id| !s.is_valid(id)))
    }

    /// Lets go of previous roots with unsync pages, stale marks included (`kvm_mmu_sync_prev_roots`, 6.1).
    pub(crate) fn free_unsync_prev_roots(&mut self, vcpu: &mut Vcpu) -> Flush {
        self.free_roots_if(vcpu, |s, root, current| !current && root.page.is_some_and(|id| s.root_is_unsync(id)))
    }

    /// Lets go of previous roots of a PCID (`kvm_invalidate_pcid`, 6.1).
    pub(crate) fn free_prev_roots_of_pcid(&mut self, vcpu: &mut Vcpu, pcid: u64) -> Flush {
        self.free_roots_if(vcpu, |_, root, current| !current && root.page.is_some() && root.pgd & 0xfff == pcid)
    }

    fn is_usable(&self, root: &Root, pgd: u64, vcpu: &Vcpu) -> bool {
        root.pgd == pgd && root.page.is_some_and(|id| self.arena[id].role == vcpu.role.root_role())
    }

    /// Looks for a root of the new CR3 among the current and the previous ones (`fast_pgd_switch`, 6.1). Each look
    /// moves the roots on by one place; the one that falls out is let go.
    pub(crate) fn new_pgd(&mut self, vcpu: &mut Vcpu, pgd: u64) -> (NewPgd, Flush) {
        if vcpu.root.page.is_none() {
            return (self.new_pgd_without_current(vcpu, pgd), Flush::NONE);
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
        let mut list = ZapList::default();
        self.put_root(&mut vcpu.root, &mut list);
        (NewPgd::Miss, self.commit_zap(list))
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
        if let Some(id) = vcpu.root.page {
            self.arena[id].flood = 0;
        }
    }

    /// INVLPG for the current root and, if `all`, the previous ones too (`kvm_mmu_invalidate_gva`, 6.1).
    pub(crate) fn invlpg(&mut self, vcpu: &mut Vcpu, gva: Gva, all: bool) -> Flush {
        vcpu.clear_mmio_page(gva);
        let mut owed = Flush::NONE;
        for root in std::iter::once(vcpu.root).chain(vcpu.prev_roots.into_iter().filter(|_| all)) {
            if let Some(id) = root.page {
                owed += self.invlpg_root(id, gva, &vcpu.role);
            }
        }
        owed
    }
}

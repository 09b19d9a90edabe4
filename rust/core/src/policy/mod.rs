//! The decisions of a shadow MMU that researchers swap. KVM's rule (Linux 6.1) is the default of each.
//!
//! Most are data: [`Rules`], which cost nothing to look at. A policy that wants to decide page by page says so in
//! [`Policy::asks`], and is then asked about just that.

mod builtin;

pub use builtin::{Builtin, POLICIES, builtin};

use crate::config::{FLOOD_THRESHOLD, PREFETCH};
use crate::types::{Access, ENTRIES, Gfn, Level};
use std::fmt::Debug;

/// What a policy may see of a shadow page: a copy, so that it cannot change anything.
#[derive(Clone, Copy, Debug)]
pub struct PageView {
    /// The guest frame that the page shadows.
    pub gfn: Gfn,
    /// Its level.
    pub level: Level,
    /// The rights in its role.
    pub access: Access,
}

/// Which shadow page goes when the quota is used up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Victim {
    /// The one that was made first (`kvm_mmu_zap_oldest_mmu_pages`, 6.1).
    #[default]
    Oldest,
    /// The one that was made last.
    Newest,
    /// The one with the fewest entries, of those the one that was made first.
    Emptiest,
}

/// Decisions that hold for all pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// A last-level guest table that the guest wants to write may go out of sync (`mmu_try_to_unsync_pages`, 6.1). If not,
    /// the write is emulated.
    pub may_unsync: bool,
    /// Writes to an upper-level table, with no fault through it in between, that zap its shadow page
    /// (`detect_write_flooding`, 6.1: 3). `u32::MAX`: none do.
    pub flood_threshold: u32,
    /// Entries of the group around a faulting one that are filled in with it, a power of two (`pte_prefetch`, 6.1: 8).
    /// 1: only the faulting one.
    pub prefetch: usize,
    /// Guest and host pages of 2 MiB and more are shadowed by large entries (`kvm_mmu_hugepage_adjust`, 6.1).
    pub large_pages: bool,
    /// A CR3 load syncs every unsync page of the VM, not only those below the new root (`kvm_mmu_sync_roots`, 6.1).
    pub sync_all: bool,
    /// How many pages may be unsync for each vCPU; beyond that the one that went first is synced. `None`: any number.
    pub unsync_limit: Option<u32>,
    /// INVLPG in an unsync table brings the whole table into step, and write-protects it again.
    pub invlpg_protects: bool,
    /// An emulated store to a last-level table fills its entry anew, where KVM leaves it empty (`kvm_mmu_pte_write`, 6.1).
    pub update_on_write: bool,
    /// Which page is recycled.
    pub victim: Victim,
}

impl Rules {
    /// KVM's, Linux 6.1.
    pub const KVM: Self = Self {
        may_unsync: true,
        flood_threshold: FLOOD_THRESHOLD,
        prefetch: PREFETCH,
        large_pages: true,
        sync_all: false,
        unsync_limit: None,
        invlpg_protects: false,
        update_on_write: false,
        victim: Victim::Oldest,
    };
}

/// Decisions that a policy wants to make page by page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Asks {
    /// [`Policy::may_unsync`].
    pub may_unsync: bool,
    /// [`Policy::flood_threshold`].
    pub flood_threshold: bool,
    /// [`Policy::prefetch`].
    pub prefetch: bool,
}

/// A policy. It is asked for its rules once; the methods that take a page are called only if it asks for that.
pub trait Policy: Debug + Send + Sync {
    /// The decisions that hold for all pages.
    fn rules(&self) -> Rules {
        Rules::KVM
    }

    /// Those that it wants to make page by page.
    fn asks(&self) -> Asks {
        Asks::default()
    }

    /// See [`Rules::may_unsync`].
    fn may_unsync(&mut self, _page: &PageView) -> bool {
        self.rules().may_unsync
    }

    /// See [`Rules::flood_threshold`].
    fn flood_threshold(&mut self, _page: &PageView) -> u32 {
        self.rules().flood_threshold
    }

    /// See [`Rules::prefetch`]; what is no power of two is rounded down to one.
    fn prefetch(&mut self, _page: &PageView) -> usize {
        self.rules().prefetch
    }

    /// Another one that decides the same, for a copy of the VM. What it has seen so far may be shared.
    fn copy(&self) -> Box<dyn Policy>;

    /// It could not decide; nothing that follows is to be trusted, and a run ends.
    fn failed(&self) -> bool {
        false
    }
}

/// KVM's rules, Linux 6.1.
#[derive(Debug)]
pub struct Kvm;
impl Policy for Kvm {
    fn copy(&self) -> Box<dyn Policy> {
        Box::new(Self)
    }
}

/// A policy with its rules at hand.
#[derive(Debug)]
pub struct Decisions {
    /// What holds for all pages.
    pub rules: Rules,
    asks: Asks,
    /// It asks for anything.
    asks_any: bool,
    /// The groups are KVM's, whatever the page.
    prefetches_like_kvm: bool,
    /// Every page may go out of sync, and as many as like.
    unsyncs_like_kvm: bool,
    policy: Box<dyn Policy>,
}

impl Clone for Decisions {
    fn clone(&self) -> Self {
        Self { policy: self.policy.copy(), ..*self }
    }
}

impl Default for Decisions {
    /// KVM's, for one vCPU.
    fn default() -> Self {
        Self::new(Box::new(Kvm), 1)
    }
}

impl Decisions {
    /// The decisions of a policy for a VM with that many vCPUs.
    #[must_use]
    pub fn new(policy: Box<dyn Policy>, vcpus: usize) -> Self {
        let mut rules = policy.rules();
        rules.prefetch = group(rules.prefetch);
        rules.unsync_limit = rules.unsync_limit.map(|limit| limit.max(1).saturating_mul(vcpus as u32));
        let asks = policy.asks();
        let asks_any = asks.may_unsync || asks.flood_threshold || asks.prefetch;
        let prefetches_like_kvm = rules.prefetch == PREFETCH && !asks.prefetch;
        let unsyncs_like_kvm = rules.may_unsync && !asks.may_unsync && rules.unsync_limit.is_none();
        Self { rules, asks, asks_any, prefetches_like_kvm, unsyncs_like_kvm, policy }
    }

    /// Whether a page may go out of sync.
    #[inline]
    pub fn may_unsync(&mut self, page: impl FnOnce() -> PageView) -> bool {
        if self.asks.may_unsync { self.policy.may_unsync(&page()) } else { self.rules.may_unsync }
    }

    /// How many writes zap a page.
    #[inline]
    pub fn flood_threshold(&mut self, page: impl FnOnce() -> PageView) -> u32 {
        if self.asks.flood_threshold { self.policy.flood_threshold(&page()) } else { self.rules.flood_threshold }
    }

    /// How many entries of a page are filled in together, a power of two.
    #[inline]
    pub fn prefetch(&mut self, page: impl FnOnce() -> PageView) -> usize {
        if self.asks.prefetch { group(self.policy.prefetch(&page())) } else { self.rules.prefetch }
    }

    /// Whether the groups are KVM's, whatever the page.
    #[inline]
    #[must_use]
    pub const fn prefetches_like_kvm(&self) -> bool {
        self.prefetches_like_kvm
    }

    /// Whether every page may go out of sync, and as many as like.
    #[inline]
    #[must_use]
    pub const fn unsyncs_like_kvm(&self) -> bool {
        self.unsyncs_like_kvm
    }

    /// Whether the policy could not decide at some time.
    #[inline]
    #[must_use]
    pub fn failed(&self) -> bool {
        self.asks_any && self.policy.failed()
    }
}

/// A size of groups that is a power of two and no more than a table.
const fn group(width: usize) -> usize {
    if width < 2 {
        1
    } else if width >= ENTRIES {
        ENTRIES
    } else {
        1 << width.ilog2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Picky;
    impl Policy for Picky {
        fn asks(&self) -> Asks {
            Asks { prefetch: true, ..Asks::default() }
        }

        fn prefetch(&mut self, page: &PageView) -> usize {
            page.gfn.0 as usize
        }

        fn may_unsync(&mut self, _: &PageView) -> bool {
            panic!("it does not ask for that")
        }

        fn copy(&self) -> Box<dyn Policy> {
            Box::new(Self)
        }
    }

    #[test]
    fn a_policy_is_asked_only_for_what_it_asks_for() {
        let mut decisions = Decisions::new(Box::new(Picky), 2);
        let page = |gfn| move || PageView { gfn: Gfn(gfn), level: Level(1), access: Access::ALL };
        assert!(decisions.may_unsync(page(1)));
        assert_eq!(decisions.flood_threshold(page(1)), 3);
        let widths = [0, 1, 2, 7, 64, 600].map(|width| decisions.prefetch(page(width)));
        assert_eq!(widths, [1, 1, 2, 4, 64, 512]);
        assert!(!decisions.prefetches_like_kvm() && !decisions.failed());
    }
}

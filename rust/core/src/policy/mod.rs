//! The decisions of a shadow MMU that researchers swap. Each default method is KVM's rule (Linux 6.1).

use crate::config::FLOOD_THRESHOLD;
use crate::types::{Access, Gfn, Level};
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

/// The decisions.
pub trait Policy: Debug + Send + Sync {
    /// Whether a last-level guest table that the guest wants to write may go out of sync.
    /// KVM (`mmu_try_to_unsync_pages`): always. If not, the write is emulated.
    fn may_unsync(&mut self, _page: &PageView) -> bool {
        true
    }

    /// How many writes to an upper-level table, with no fault through it in between, zap its shadow page.
    /// KVM (`detect_write_flooding`): 3.
    fn flood_threshold(&mut self, _page: &PageView) -> u32 {
        FLOOD_THRESHOLD
    }

    /// Whether the neighbours of a faulting entry are filled in with it. KVM (`pte_prefetch`): yes.
    fn prefetch(&mut self, _page: &PageView) -> bool {
        true
    }
}

/// KVM's rules, Linux 6.1.
#[derive(Debug)]
pub struct Kvm;
impl Policy for Kvm {}

/// No table ever goes out of sync: every write to a shadowed table is emulated (KVM before 2.6.28).
#[derive(Debug)]
pub struct NoUnsync;
impl Policy for NoUnsync {
    fn may_unsync(&mut self, _page: &PageView) -> bool {
        false
    }
}

/// A fault fills in its own entry only.
#[derive(Debug)]
pub struct NoPrefetch;
impl Policy for NoPrefetch {
    fn prefetch(&mut self, _page: &PageView) -> bool {
        false
    }
}

/// Every emulated write to a table zaps its shadow page, and no table goes out of sync (KVM's first shadow MMU).
#[derive(Debug)]
pub struct ZapOnWrite;
impl Policy for ZapOnWrite {
    fn may_unsync(&mut self, _page: &PageView) -> bool {
        false
    }

    fn flood_threshold(&mut self, _page: &PageView) -> u32 {
        1
    }
}

macro_rules! policies {
    ($($name:literal $make:expr, $doc:literal;)*) => {
        /// Name and meaning of every built-in policy.
        pub const POLICIES: &[(&str, &str)] = &[$(($name, $doc),)*];

        /// A new instance of the built-in policy of that name.
        #[must_use]
        pub fn builtin(name: &str) -> Option<Box<dyn Policy>> {
            match name {
                $($name => Some(Box::new($make)),)*
                _ => None,
            }
        }
    };
}

policies! {
    "kvm" Kvm, "KVM's rules (Linux 6.1)";
    "no_unsync" NoUnsync, "last-level tables never go out of sync; each write to one is emulated";
    "no_prefetch" NoPrefetch, "a fault fills in its own entry only, not the 7 neighbours";
    "zap_on_write" ZapOnWrite, "no unsync, and each emulated write to an upper-level table zaps its shadow page";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_makes_a_policy() {
        for (name, _) in POLICIES {
            assert!(builtin(name).is_some(), "{name}");
        }
        assert!(builtin("nonsense").is_none());
    }
}

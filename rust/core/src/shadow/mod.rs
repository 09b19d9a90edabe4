//! The shadow tables of a VM: pages, entries, write protection, and how they are kept in step with the guest's.
//!
//! Nothing here knows the guest's walk or the CPU's TLB. Whoever takes a right away returns a [`Flush`]; the callers in
//! `fault` and `engine` spend it.

pub mod make;
pub mod page;
pub mod pages;
mod plain;
pub mod rmap;
pub mod roots;
pub mod spte;
pub mod sync;
pub mod track;
pub mod unsync;
pub mod zap;

use crate::config::{Config, MIN_QUOTA};
use crate::counters::VmCounters;
use crate::events::{EventKind, EventLog, PageText};
use crate::memory::{ManualDirty, Memory};
use crate::policy::{Decisions, PageView};
use crate::types::{Gfn, PageId, SptePos};
use page::Arena;
pub(crate) use plain::Guest;
use rmap::ListPool;
use serde::{Deserialize, Serialize};
use spte::Spte;
use std::collections::VecDeque;

/// What a change of the tables owes to the vCPUs: how many remote flushes, and whether roots became obsolete.
#[must_use = "a change of the shadow tables owes this to the vCPUs"]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flush {
    /// Calls of `kvm_flush_remote_tlbs`.
    pub calls: u32,
    /// `KVM_REQ_MMU_FREE_OBSOLETE_ROOTS` goes to every vCPU.
    pub obsolete_roots: bool,
}

impl Flush {
    /// Nothing is owed.
    pub const NONE: Self = Self { calls: 0, obsolete_roots: false };

    /// One flush if `wanted`.
    pub const fn when(wanted: bool) -> Self {
        Self { calls: wanted as u32, obsolete_roots: false }
    }
}

impl std::ops::AddAssign for Flush {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.obsolete_roots |= other.obsolete_roots;
    }
}

impl std::ops::Add for Flush {
    type Output = Self;
    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

/// The VM-wide half of the shadow MMU (what KVM keeps in `struct kvm`); the other half is [`crate::cpu::Vcpu`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shadow {
    /// Guest memory and memslots.
    pub memory: Memory,
    /// The VM's statistics.
    pub counters: VmCounters,
    /// Tracepoints.
    pub events: EventLog,
    /// Settings.
    pub config: Config,
    /// Decisions.
    #[serde(skip)]
    pub policy: Decisions,
    pub(crate) arena: Arena,
    pub(crate) lists: ListPool,
    /// The generation of valid pages, 0 or 1.
    pub(crate) generation: u8,
    /// Pages in use, those that are only obsolete roots included.
    pub(crate) used_pages: u64,
    /// The quota.
    pub(crate) max_pages: u64,
    /// The quota was set by the user, so that slots do not change it.
    pub(crate) quota_is_set: bool,
    /// Valid pages with gptes; while there are none, emulated writes are not looked at.
    pub(crate) indirect_pages: u64,
    /// How dirty logs are read.
    pub(crate) manual_dirty: ManualDirty,
    /// Moves with each write that is counted against a page.
    pub(crate) floods: u64,
    /// Moves with each MMU notifier; a fault during which it moved is retried.
    pub(crate) invalidate_seq: u64,
    /// An MMIO entry was made at some time.
    pub(crate) has_mmio: bool,
    /// Pages in the order in which they went out of sync, where that counts; some are back in step.
    pub(crate) unsync_queue: VecDeque<PageId>,
}

/// What a policy sees of a page.
pub(crate) fn page_view(arena: &Arena, id: PageId) -> PageView {
    let page = &arena[id];
    PageView { gfn: page.gfn, level: page.level(), access: page.role.access() }
}

impl Shadow {
    /// An empty shadow over `memory`.
    #[must_use]
    pub fn new(memory: Memory, config: Config, policy: Decisions, events: EventLog) -> Self {
        Self {
            memory,
            counters: VmCounters::default(),
            events,
            config,
            policy,
            arena: Arena::default(),
            lists: ListPool::default(),
            generation: 0,
            used_pages: 0,
            max_pages: MIN_QUOTA,
            quota_is_set: false,
            indirect_pages: 0,
            manual_dirty: ManualDirty::default(),
            floods: 0,
            invalidate_seq: 0,
            has_mmio: false,
            unsync_queue: VecDeque::new(),
        }
    }

    /// The shadow pages.
    #[must_use]
    pub const fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Shadow pages in use (`n_used_mmu_pages`).
    #[must_use]
    pub const fn used_pages(&self) -> u64 {
        self.used_pages
    }

    /// The quota (`n_max_mmu_pages`).
    #[must_use]
    pub const fn max_pages(&self) -> u64 {
        self.max_pages
    }

    /// The entry at a position.
    #[inline]
    #[must_use]
    pub fn spte(&self, pos: SptePos) -> Spte {
        self.arena.spte(pos)
    }

    #[inline(always)]
    pub(crate) fn page_event(&mut self, kind: EventKind, id: PageId, created: bool) {
        let page = &self.arena[id];
        let text = || PageText {
            generation: page.generation,
            gfn: page.gfn.0,
            role: page.role.0,
            root_count: page.root_count,
            unsync: page.unsync,
        };
        self.events.page(kind, text, created);
    }

    /// How many entries of a page a fault fills in together, its own among them.
    #[inline]
    pub(crate) fn prefetch_width(&mut self, id: PageId) -> usize {
        let Self { policy, arena, .. } = self;
        policy.prefetch(|| page_view(arena, id))
    }

    /// Whether a page may still be used: neither zapped nor of an old generation (`is_obsolete_sp`, 6.1).
    pub(crate) fn is_valid(&self, id: PageId) -> bool {
        let page = &self.arena[id];
        !page.role.invalid() && page.generation == self.generation
    }

    /// The next valid page with gptes of a frame, newest first; `None` begins.
    ///
    /// Written as a step, not as an iterator, because callers zap the page they are at.
    pub(crate) fn next_gptes_page(&self, gfn: Gfn, after: Option<PageId>) -> Option<PageId> {
        let mut at = match after {
            None => self.arena.chain_first(gfn),
            Some(id) => self.arena.chain_next(id),
        };
        while let Some(id) = at {
            if self.is_gptes_page(id, gfn) {
                return Some(id);
            }
            at = self.arena.chain_next(id);
        }
        None
    }

    /// Whether it is a valid page with gptes of that frame.
    #[inline(always)]
    pub(crate) fn is_gptes_page(&self, id: PageId, gfn: Gfn) -> bool {
        let page = &self.arena[id];
        page.gfn == gfn && page.has_gptes() && self.is_valid(id)
    }
}

//! An independent check of the whole state: every invariant of ARCHITECTURE.md, computed from the entries themselves.
//!
//! Nothing here believes a count, a list or a mark: each is computed anew from the 512 entries of every page and compared.
//! The checks cost time in proportion to the shadow pages and memslots, so they belong in tests, not between operations of
//! a long run.

mod counts;
mod leaves;
mod pages;
#[cfg(test)]
mod tests;
mod translations;
mod ways;

use crate::cpu::Vcpu;
use crate::engine::Vm;
use crate::error::InvariantError;
use crate::role::Role;
use crate::shadow::Shadow;
use crate::shadow::spte::Spte;
use crate::types::{Access, ENTRIES, PageId, SptePos};

/// Findings after which the rest is only counted: a broken list yields one for each of its entries.
const MAX_FINDINGS: usize = 100;

/// `cr0_wp` in KVM's `kvm_mmu_page_role` (1.1.1 of the specification).
const ROLE_WP: u32 = 1 << 13;

/// Whether a leaf or a direct page may have the rights `have` where the guest's tables grant `granted`. With CR0.WP off
/// a supervisor write makes a read-only page writable for the supervisor alone, which is emulated by a page of its own
/// with W and without U (`FNAME(page_fault)`, 6.1).
const fn may_grant(granted: Access, have: Access, role: Role) -> bool {
    let own = role.0 & ROLE_WP == 0 && !have.has(Access::U);
    granted.with(if own { Access::W } else { Access::NONE }).has(have)
}

impl Vm {
    /// Checks every invariant that holds between two operations, whatever guest and host did.
    ///
    /// * Shadow pages: each live one is in its hash chain once; each valid one is on the active list once, in the order
    ///   of its chain; one that was zapped lives on only as a root, empty and unlinked. Levels, modes and rights of
    ///   parent and child fit. Root counts are those of the vCPUs' roots.
    /// * Lists: table pointers and parent lists match both ways, so do leaves and reverse maps; the sets of used entries
    ///   are right.
    /// * Unsync: only last-level pages are, of frames that are nothing but last-level tables; each is marked in all
    ///   parents up to the roots. Marks that lead to no unsync page are KVM's laziness and allowed; the count of marks
    ///   must be the number of bits.
    /// * Counts: write tracking and forbidden large pages per frame, `pages_*`, `mmu_unsync`, `nx_lpage_splits`, used
    ///   pages, pages with guest tables.
    /// * Leaves: inside one memslot; over the frame's own host page, in a state that allows it; W only with the marks
    ///   that must come with it, never in a read-only slot, and logged where writes are logged; no right beyond those
    ///   noted with the entry.
    /// * Write protection: no leaf that the guest can write maps a write-tracked frame, nor one that a synced last-level
    ///   page shadows. KVM has one hole here: a leaf that takes the place of an MMIO entry with W inherits W unseen
    ///   (`make_spte`, 6.1; 5.3.1 of the specification). Afterwards nothing tells such a leaf from others, but each costs
    ///   an MMIO entry made by a fault, and those are counted. So as many last-level leaves as there were
    ///   `pf_mmio_spte_created` may break this rule; one more is an error.
    ///
    /// * Remembered ways (`fault::ways`): those that still hold lead through the tables as they are.
    ///
    /// # Errors
    /// All that is wrong, a sentence each.
    pub fn audit(&self) -> Result<(), InvariantError> {
        let mut audit = Audit::new(&self.shadow, &self.vcpus);
        audit.check_page_lists();
        audit.check_pages();
        audit.check_roots();
        audit.check_entries();
        audit.check_parents();
        audit.check_unsync();
        audit.check_rmaps();
        audit.check_leaves();
        audit.check_counts();
        for (vcpu, ways) in self.vcpus.iter().zip(&self.ways) {
            audit.check_ways(vcpu, ways);
        }
        audit.finish()
    }

    /// Checks that the shadow translates as the guest's tables do now: every entry of an upper-level page, and of a
    /// synced last-level page, has the frame of the guest's entry and no right that the guest does not grant. Less is
    /// allowed: rights that the guest added come with the next fault.
    ///
    /// This is no invariant of KVM: what changes a guest table without a tracked guest store leaves the shadow behind
    /// until a fault, an INVLPG or a CR3 load repairs it, or for good. Call it only for a VM where none of these
    /// happened: host writes ([`Vm::write_memory`], [`Vm::write_table_page`]), host pages dropped
    /// ([`Vm::notifier_unmap`], [`Vm::set_host_pages`]), and W inherited from an MMIO entry (see [`Vm::audit`]; none
    /// while `pf_mmio_spte_created` is 0). A and D bits that walks set are no such change: they never take a right away.
    /// Nor is EFER.NX, which does not split shadow pages: bit 63 is read as "not executable" here. CR4.PSE and the PDPTEs
    /// of PAE paging do not split them either: do not change the first between the accesses that are judged.
    ///
    /// # Errors
    /// All entries that differ, a sentence each.
    pub fn audit_translations(&self) -> Result<(), InvariantError> {
        let mut audit = Audit::new(&self.shadow, &self.vcpus);
        audit.check_translations();
        audit.finish()
    }
}

/// One audit at work: the state, what a first look at all entries gave, and what was found wrong.
struct Audit<'a> {
    shadow: &'a Shadow,
    vcpus: &'a [Vcpu],
    /// Pages that are not freed, ascending.
    live: Vec<PageId>,
    is_live: Vec<bool>,
    /// Every entry that maps memory.
    leaves: Vec<(SptePos, Spte)>,
    /// Every entry that points to a table.
    tables: Vec<(SptePos, PageId)>,
    found: Vec<String>,
    unsaid: usize,
}

impl<'a> Audit<'a> {
    fn new(shadow: &'a Shadow, vcpus: &'a [Vcpu]) -> Self {
        let live = shadow.arena.live();
        let mut is_live = vec![false; shadow.arena.capacity()];
        let (mut leaves, mut tables) = (Vec::new(), Vec::new());
        for id in &live {
            is_live[id.0 as usize] = true;
            let level = shadow.arena[*id].level().0;
            for index in 0..ENTRIES {
                let pos = id.entry(index);
                let spte = shadow.spte(pos);
                if spte.is_table(level) {
                    tables.push((pos, spte.child()));
                } else if spte.present() {
                    leaves.push((pos, spte));
                }
            }
        }
        Self { shadow, vcpus, live, is_live, leaves, tables, found: Vec::new(), unsaid: 0 }
    }

    fn finish(mut self) -> Result<(), InvariantError> {
        if self.unsaid > 0 {
            self.found.push(format!("... and {} more", self.unsaid));
        }
        if self.found.is_empty() { Ok(()) } else { Err(InvariantError(self.found)) }
    }

    fn report(&mut self, text: String) {
        if self.found.len() < MAX_FINDINGS {
            self.found.push(text);
        } else {
            self.unsaid += 1;
        }
    }

    /// Reports unless `holds`; the sentence is only made when it is needed.
    fn expect(&mut self, holds: bool, text: impl FnOnce(&Self) -> String) {
        if !holds {
            let text = text(self);
            self.report(text);
        }
    }

    fn is_live(&self, id: PageId) -> bool {
        self.is_live.get(id.0 as usize).copied().unwrap_or(false)
    }

    /// Whether a page was not zapped; its generation is checked elsewhere.
    fn is_valid(&self, id: PageId) -> bool {
        self.is_live(id) && !self.shadow.arena[id].role.invalid()
    }

    fn name(&self, id: PageId) -> String {
        if !self.is_live(id) {
            return format!("freed page {}", id.0);
        }
        let page = &self.shadow.arena[id];
        format!("page {} (gfn {:#x} {}, root {})", id.0, page.gfn, page.role, page.root_count)
    }

    fn entry_name(&self, pos: SptePos) -> String {
        let spte = if (pos.page().0 as usize) < self.is_live.len() { self.shadow.spte(pos).0 } else { 0 };
        format!("entry {} = {spte:#x} of {}", pos.index(), self.name(pos.page()))
    }
}

//! Making one shadow entry: which bits it gets, and how it takes the place of the old one.

use crate::bits::{PT_A, PT_D, PT_NX, PT_P, PT_PS, PT_U, PT_W};
use crate::config::MMIO_GEN_BITS;
use crate::cpu::CpuRole;
use crate::guest::gpte::Gpte;
use crate::memory::Host;
use crate::outcome::RetPf;
use crate::shadow::spte::{HOST_WRITABLE, MMU_WRITABLE, SHADOW_PRESENT, Spte, sptep};
use crate::shadow::{Flush, Shadow};
use crate::types::{Access, Gfn, Level, Pfn, SptePos};

/// What a leaf is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaf {
    /// The frame, rounded to the leaf's size.
    pub gfn: Gfn,
    /// The rights that the guest grants.
    pub access: Access,
    /// The host page, `None` for a frame without a slot (MMIO).
    pub pfn: Option<Pfn>,
    /// The host may write the page.
    pub host_writable: bool,
    /// Nobody asked for the page yet: A stays clear, and no table goes out of sync for it.
    pub prefetch: bool,
    /// The fault that asks is a write.
    pub write: bool,
}

impl Shadow {
    /// The entry for a leaf, and whether write protection took W from it (`make_spte`, 6.1).
    pub(crate) fn make_spte(
        &mut self,
        pos: SptePos,
        leaf: &Leaf,
        pfn: Pfn,
        old: Spte,
        can_unsync: bool,
    ) -> (Spte, bool) {
        let level = self.arena[pos.page()].level();
        let mut bits = SHADOW_PRESENT | PT_P | pfn.0 << 12;
        if !leaf.prefetch {
            bits |= PT_A;
        }
        let executable = leaf.access.has(Access::X) && !(level > Level::PT && self.config.nx_huge_pages);
        if !executable {
            bits |= PT_NX;
        }
        if leaf.access.has(Access::U) {
            bits |= PT_U;
        }
        if level > Level::PT {
            bits |= PT_PS;
        }
        if leaf.host_writable {
            bits |= HOST_WRITABLE;
        }
        let mut protected = false;
        if leaf.access.has(Access::W) && leaf.host_writable {
            // An entry that was writable stays so without a second look (6.1 tests W alone, so an old MMIO entry
            // counts as well); D is not set again on this way.
            let was_writable = old.writable() && (level == Level::PT || old.large());
            if was_writable {
                bits |= PT_W | MMU_WRITABLE;
                if old.is_mmio() && self.write_tracked(leaf.gfn) {
                    self.memory.leak();
                }
            } else if self.try_to_unsync(leaf.gfn, can_unsync, leaf.prefetch) {
                bits |= PT_W | MMU_WRITABLE | PT_D;
            } else {
                protected = true;
            }
        }
        if bits & PT_W != 0 {
            self.memory.mark_dirty(leaf.gfn);
        }
        (Spte(bits), protected)
    }

    /// Writes a leaf (`mmu_set_spte`, 6.1).
    pub(crate) fn set_leaf(&mut self, pos: SptePos, leaf: &Leaf) -> (RetPf, Flush) {
        let level = self.arena[pos.page()].level();
        let old = self.spte(pos);
        let (mut flush, mut was_mapped) = (false, false);
        if old.present() {
            if old.is_table(level.0) {
                self.unlink_child(pos);
                flush = true;
            } else if leaf.pfn == Some(old.pfn()) {
                was_mapped = true;
            } else {
                self.drop_leaf(pos);
                flush = true;
            }
        }
        let Some(pfn) = leaf.pfn else {
            self.mark_mmio(pos, leaf.gfn, leaf.access);
            return (RetPf::Emulate, Flush::when(flush));
        };
        let current = self.spte(pos);
        let (new, protected) = self.make_spte(pos, leaf, pfn, current, true);
        let mut result = RetPf::Fixed;
        if new == current {
            result = RetPf::Spurious;
        } else {
            if current.present() {
                flush |= current.update_needs_flush(new);
            }
            self.arena.set_spte(pos, new);
            self.events.set_spte(leaf.gfn.0, new.0, sptep(pos.page(), pos.index()), level.0);
        }
        if protected && leaf.write {
            result = RetPf::WriteProtected;
        }
        let mut owed = Flush::when(flush);
        if was_mapped {
            self.arena.set_mapped(pos, self.arena.mapped_gfn(pos), leaf.access);
        } else {
            owed += self.rmap_add(pos, leaf.gfn, leaf.access);
        }
        (result, owed)
    }

    /// Writes an MMIO entry (`mark_mmio_spte`, 6.1).
    pub(crate) fn mark_mmio(&mut self, pos: SptePos, gfn: Gfn, access: Access) {
        let generation = self.memory.generation & ((1 << MMIO_GEN_BITS) - 1);
        let spte = Spte::mmio(gfn, access, generation);
        self.has_mmio = true;
        self.events.mark_mmio_spte(sptep(pos.page(), pos.index()), gfn.0, (spte.0 & 7) as u32, generation);
        self.arena.set_spte(pos, spte);
    }

    /// Fills an entry that is not present from a guest entry, if that needs no fault (`FNAME(prefetch_gpte)`, 6.1).
    /// Returns whether it was, so that the neighbours may go on.
    pub(crate) fn prefetch_gpte(
        &mut self,
        pos: SptePos,
        gpte: Gpte,
        role: &CpuRole,
        stop_at_dirty_log: bool,
    ) -> (bool, Flush) {
        if !gpte.present() || !gpte.accessed() || gpte.has_reserved(role, Level::PT) {
            // Not present as a leaf, but it may be a stale MMIO entry.
            if self.spte(pos) != Spte::EMPTY {
                self.arena.set_spte(pos, Spte::EMPTY);
            }
            return (false, Flush::NONE);
        }
        let granted = self.arena[pos.page()].role.access();
        let access = gpte.protect_clean(granted.and(gpte.access()));
        let gfn = gpte.gfn();
        if self.spte(pos) == Spte::EMPTY
            && let Some(flush) = self.set_plain_leaf::<true>(pos, gfn, access, 0)
        {
            return (true, flush);
        }
        if !self.prefetchable(gfn, access, stop_at_dirty_log) {
            return (false, Flush::NONE);
        }
        let leaf = Leaf { gfn, access, pfn: Some(Host::pfn(gfn)), host_writable: true, prefetch: true, write: false };
        let (_, flush) = self.set_leaf(pos, &leaf);
        (true, flush)
    }

    /// Whether a frame can be mapped without a fault: it has a slot that takes writes, the host's page is there and
    /// writable, and no write would have to be logged.
    pub(crate) fn prefetchable(&self, gfn: Gfn, access: Access, stop_at_dirty_log: bool) -> bool {
        let Some(slot) = self.memory.slot(gfn) else { return false };
        !(slot.readonly || stop_at_dirty_log && slot.logs_dirty() && access.has(Access::W))
            && self.memory.host.state(gfn).writable()
    }
}

//! Bringing unsync pages back into step with the guest's tables.

use crate::bits::{PT_A, PT_D};
use crate::cpu::CpuRole;
use crate::guest::gpte::Gpte;
use crate::memory::Slot;
use crate::mode::Mode;
use crate::shadow::make::Leaf;
use crate::shadow::page::Bitmap;
use crate::shadow::spte::{HOST_WRITABLE, Spte};
use crate::shadow::zap::ZapList;
use crate::shadow::{Flush, Shadow};
use crate::types::{Access, Gfn, Gva, Level, PageId, SptePos};

impl Shadow {
    /// Reads a guest entry without bringing in an absent page; `None` if that is not possible.
    pub(crate) fn read_gpte_atomic(&self, table: Gfn, index: usize, bytes: u8) -> Option<Gpte> {
        let readable = self.memory.slot(table).is_some() && self.memory.host.present(table);
        readable.then(|| Gpte(self.memory.host.entry(table, index, bytes)))
    }

    /// The guest's entry behind one of a page's entries, read likewise.
    fn gpte_behind(&self, pos: SptePos) -> Option<Gpte> {
        let page = &self.arena[pos.page()];
        let index = Mode::gpte_index(page.role.quadrant(), pos.index());
        self.read_gpte_atomic(page.gfn, index, page.role.entry_bytes())
    }

    /// Whether the page's entries mean the same to the vCPU as to the one that made them (`kvm_sync_page_check`, 6.12).
    fn can_sync(&self, id: PageId, role: &CpuRole) -> bool {
        let page = &self.arena[id];
        !page.role.direct() && page.role.sync_key() == role.root_role().sync_key()
    }

    /// Brings each entry of a page into step (`FNAME(sync_page)`, 6.1). `Some(flush)` says whether a right or mark
    /// went away; `None` that the page cannot be synced and must be zapped.
    fn sync_entries(&mut self, id: PageId, role: &CpuRole) -> Option<bool> {
        if !self.can_sync(id, role) {
            return None;
        }
        let page = &self.arena[id];
        let (table, used, granted) = (page.gfn, page.used, page.role.access());
        let (quadrant, bytes) = (page.role.quadrant(), page.role.entry_bytes());
        if used == Bitmap::default() {
            return Some(false);
        }
        self.read_gpte_atomic(table, 0, bytes)?;
        let logging = self.memory.slots().iter().any(Slot::logs_dirty);
        let mut flush = false;
        for (word, mut rest) in used.into_iter().enumerate().filter(|(_, rest)| *rest != 0) {
            let gptes = self.memory.host.entries(table, Mode::gpte_index(quadrant, 64 * word), bytes);
            while rest != 0 {
                let bit = rest.trailing_zeros() as usize;
                rest &= rest - 1;
                let (pos, gpte) = (id.entry(64 * word + bit), Gpte(gptes[bit]));
                let kept = if logging { None } else { self.keep_entry(pos, gpte, granted, role) };
                flush |= kept.unwrap_or_else(|| self.sync_entry(pos, gpte, role));
            }
        }
        Some(flush)
    }

    /// The short way for an entry whose guest entry says what it said before: the rebuilt entry is the old one without
    /// A and D. `None` if it is not so, or if write protection has to be asked again; nothing was done then.
    #[inline]
    fn keep_entry(&mut self, pos: SptePos, gpte: Gpte, granted: Access, role: &CpuRole) -> Option<bool> {
        let old = self.spte(pos);
        if !gpte.present() || !gpte.accessed() || gpte.has_reserved(role, Level::PT) || !old.present() {
            return None;
        }
        let access = gpte.protect_clean(granted.and(gpte.access()));
        if !self.arena.maps(pos, gpte.gfn(), access) {
            return None;
        }
        if self.config.kernel.sync_keeps_unchanged {
            return Some(false);
        }
        if access.has(Access::W) != old.writable() {
            return None;
        }
        let new = Spte(old.0 & !(PT_A | PT_D));
        if new == old {
            return Some(false);
        }
        self.arena.update_spte(pos, new);
        Some(true)
    }

    fn sync_entry(&mut self, pos: SptePos, gpte: Gpte, role: &CpuRole) -> bool {
        let old = self.spte(pos);
        if !gpte.present() || !gpte.accessed() || gpte.has_reserved(role, Level::PT) {
            self.zap_entry(pos);
            return true;
        }
        let gfn = gpte.gfn();
        let access = gpte.protect_clean(self.arena[pos.page()].role.access().and(gpte.access()));
        if old.is_mmio() {
            // An MMIO entry is renewed whether or not its frame got a slot in the meantime (sync_mmio_spte, 6.1).
            if old.mmio_gfn() == gfn {
                self.mark_mmio(pos, gfn, access);
            } else {
                self.arena.set_spte(pos, Spte::EMPTY);
            }
            return false;
        }
        if self.arena.mapped_gfn(pos) != gfn {
            self.drop_leaf(pos);
            return true;
        }
        if self.config.kernel.sync_keeps_unchanged && self.arena.maps(pos, gfn, access) {
            return false;
        }
        self.arena.set_mapped(pos, gfn, access);
        let pfn = old.pfn();
        let host_writable = old.0 & HOST_WRITABLE != 0;
        let leaf = Leaf { gfn, access, pfn: Some(pfn), host_writable, prefetch: true, write: false };
        let (new, _) = self.make_spte(pos, &leaf, pfn, old, false);
        self.arena.update_spte(pos, new);
        old.update_needs_flush(new)
    }

    /// Syncs a page or zaps it (`kvm_sync_page`, 6.1). `None` if it was zapped.
    pub(crate) fn sync_or_zap(&mut self, id: PageId, role: &CpuRole, list: &mut ZapList) -> Option<bool> {
        let done = self.sync_entries(id, role);
        if done.is_none() {
            let _ = self.prepare_zap(id, list);
        }
        done
    }

    /// Syncs every unsync page below `parent`, in batches (`mmu_sync_children`, 6.1).
    pub(crate) fn sync_children(&mut self, parent: PageId, role: &CpuRole) -> Flush {
        let mut owed = Flush::NONE;
        let (mut list, mut flush) = (ZapList::default(), false);
        while let Some(batch) = self.unsync_walk(parent) {
            let leaves = self.batch_leaves(&batch);
            let mut protected = false;
            for (leaf, _) in &leaves {
                protected |= self.write_protect(self.arena[*leaf].gfn, true);
            }
            if protected {
                // This one flush also pays for what the batch before it owed.
                owed += self.commit_or_flush(std::mem::take(&mut list), true);
                flush = false;
            }
            for (leaf, path) in &leaves {
                self.end_unsync(*leaf);
                flush |= self.sync_or_zap(*leaf, role, &mut list).unwrap_or(false);
                self.clear_marks(path);
            }
        }
        owed += self.commit_or_flush(list, flush);
        owed
    }

    /// Syncs one entry (`kvm_sync_spte`, 6.12), or drops it if that is not possible.
    fn sync_in_place(&mut self, pos: SptePos, role: &CpuRole) -> Flush {
        if self.spte(pos) == Spte::EMPTY {
            return Flush::NONE;
        }
        let Some(gpte) = self.gpte_behind(pos).filter(|_| self.can_sync(pos.page(), role)) else {
            self.zap_entry(pos);
            return Flush::when(true);
        };
        Flush::when(self.sync_entry(pos, gpte, role))
    }

    /// Drops one entry and, if the guest's entry allows it, makes it again (`FNAME(invlpg)`, 6.1).
    fn drop_and_prefetch(&mut self, pos: SptePos, role: &CpuRole) -> Flush {
        let was_present = self.zap_entry(pos);
        let mut owed = Flush::when(was_present);
        if let Some(gpte) = self.gpte_behind(pos) {
            owed += self.prefetch_gpte(pos, gpte, role, false).1;
        }
        owed
    }

    /// INVLPG below one root (`FNAME(invlpg)`, 6.1; `__kvm_mmu_invalidate_addr`, 6.12): only an entry of an unsync
    /// page may differ from the guest's.
    pub(crate) fn invlpg_root(&mut self, root: PageId, gva: Gva, role: &CpuRole) -> Flush {
        let mut owed = Flush::NONE;
        let mut id = root;
        loop {
            let level = self.arena[id].level();
            let pos = id.entry(gva.index(level));
            let spte = self.spte(pos);
            if level == Level::PT || spte.present() && spte.large() {
                if !self.arena[id].unsync {
                    break;
                }
                owed += if self.config.kernel.invlpg_syncs {
                    self.sync_in_place(pos, role)
                } else {
                    self.drop_and_prefetch(pos, role)
                };
            }
            let spte = self.spte(pos);
            if self.arena[id].unsync_children == 0 || !spte.is_table(level.0) {
                break;
            }
            id = spte.child();
        }
        owed
    }
}

//! Bringing unsync pages back into step with the guest's tables.

use crate::bits::{PT_A, PT_ADDR, PT_D, PT_P, PT_U, PT_W};
use crate::cpu::CpuRole;
use crate::guest::gpte::Gpte;
use crate::memory::Slot;
use crate::mode::Mode;
use crate::shadow::make::Leaf;
use crate::shadow::page::{Bitmap, bits};
use crate::shadow::spte::{HOST_WRITABLE, SHADOW_PRESENT, Spte};
use crate::shadow::zap::ZapList;
use crate::shadow::{Flush, Shadow};
use crate::types::{ENTRIES, Gfn, Gva, Level, PageId, SptePos};

/// The short way for entries whose guest entries say what they said before: the rebuilt entry is the old one without A
/// and D. It is most of the cost of shadow paging, so that it has a loop of its own.
struct Keep {
    /// The rights above the entries.
    granted: u64,
    /// Bits that are reserved in a guest entry of level 1.
    reserved: u64,
    /// What an entry loses when it is rebuilt.
    marks: u64,
}

impl Keep {
    /// Goes over the `used` entries of a page, 64 at a time. Returns those that were not kept, of which nothing was done, and
    /// whether any other one lost a mark.
    #[inline]
    fn all(
        &self,
        used: &Bitmap,
        sptes: &mut [u64; ENTRIES],
        shadowed: &[u64; ENTRIES],
        gptes: impl Fn(usize) -> [u64; 64],
    ) -> (Bitmap, bool) {
        let (mut others, mut lost) = (*used, 0);
        let blocks = sptes.as_chunks_mut().0.iter_mut().zip(shadowed.as_chunks().0);
        for (block, (sptes, shadowed)) in blocks.enumerate().filter(|(block, _)| used[*block] != 0) {
            let gptes = gptes(block * 64);
            if used[block] == !0 && self.whole_block(&gptes, sptes, shadowed, &mut lost) {
                others[block] = 0;
            } else {
                others[block] &= !self.part_of_block(used[block], &gptes, sptes, shadowed, &mut lost);
            }
        }
        (others, lost != 0)
    }

    /// 64 entries that are all in use, if all of them are kept. There is no branch in the loops, so that each step does
    /// several entries.
    #[inline(never)]
    fn whole_block(&self, gptes: &[u64; 64], sptes: &mut [u64; 64], shadowed: &[u64; 64], lost: &mut u64) -> bool {
        let (mut differ, mut had) = (0, 0);
        for i in 0..64 {
            differ |= self.differs(gptes[i], sptes[i], shadowed[i]);
            had |= sptes[i];
        }
        if differ == 0 {
            *lost |= had & self.marks;
            for spte in sptes {
                *spte &= !self.marks;
            }
        }
        differ == 0
    }

    /// Of 64 entries those in `used`; returns which were kept.
    fn part_of_block(
        &self,
        used: u64,
        gptes: &[u64; 64],
        sptes: &mut [u64; 64],
        shadowed: &[u64; 64],
        lost: &mut u64,
    ) -> u64 {
        let (mut rest, mut kept) = (used, 0);
        while rest != 0 {
            let i = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if self.differs(gptes[i], sptes[i], shadowed[i]) == 0 {
                *lost |= sptes[i] & self.marks;
                sptes[i] &= !self.marks;
                kept |= 1 << i;
            }
        }
        kept
    }

    /// No bit if the entry would be rebuilt as it is: the guest's entry is usable and maps the same frame with the same
    /// rights, and write protection need not be asked again.
    #[inline(always)]
    const fn differs(&self, gpte: u64, old: u64, shadowed: u64) -> u64 {
        let usable = PT_P | PT_A;
        // Rights as in `Access`: W and U have their place in the entry, X takes that of P. W counts while D is set.
        let rights = (gpte >> 63 ^ 1 | gpte & PT_U | gpte & gpte >> 5 & PT_W) & self.granted;
        let same_w = if self.marks == 0 { 0 } else { PT_W };
        (gpte ^ usable) & (usable | self.reserved)
            | !old & SHADOW_PRESENT
            | shadowed ^ ((gpte & PT_ADDR) >> 9 | rights)
            | (rights ^ old) & same_w
    }
}

impl Shadow {
    /// Reads a guest entry without bringing in an absent page; `None` if that is not possible.
    pub(crate) fn read_gpte_atomic(&self, table: Gfn, index: usize, bytes: u8) -> Option<Gpte> {
        let (there, entry) = self.memory.host.present_and_entry(table, index, bytes);
        (there && self.memory.has_slot(table)).then_some(Gpte(entry))
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
        self.counters.x_synced_entries += used.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        let contents = self.memory.host.contents(table);
        let (mut rest, mut flush) = (used, false);
        if !self.memory.slots().iter().any(Slot::logs_dirty) {
            let keep = Keep {
                granted: granted.0.into(),
                reserved: role.reserved[1][0],
                marks: if self.config.kernel.sync_keeps_unchanged { 0 } else { PT_A | PT_D },
            };
            let (sptes, shadowed) = self.arena.page_mut(id);
            let host = &self.memory.host;
            (rest, flush) = if bytes == 8 {
                keep.all(&used, sptes, shadowed, |first| host.block_in(contents, first))
            } else {
                let gpte = |i| host.entry_in(contents, Mode::gpte_index(quadrant, i), 4);
                keep.all(&used, sptes, shadowed, |first| std::array::from_fn(|i| gpte(first + i)))
            };
        }
        for index in bits(&rest) {
            let gpte = self.memory.host.entry_in(contents, Mode::gpte_index(quadrant, index), bytes);
            flush |= self.sync_entry(id.entry(index), Gpte(gpte), role);
        }
        Some(flush)
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

    /// Syncs pages, wherever they hang, and write-protects their tables again: what policies do beside KVM.
    fn sync_pages(&mut self, pages: &[PageId], role: &CpuRole) -> Flush {
        let (mut list, mut flush) = (ZapList::default(), false);
        for id in pages {
            // A page before it may have been zapped with it.
            if self.arena[*id].unsync && !self.arena[*id].role.invalid() {
                flush |= self.write_protect(self.arena[*id].gfn, true);
                self.end_unsync(*id);
                flush |= self.sync_or_zap(*id, role, &mut list).unwrap_or(true);
            }
        }
        self.commit_or_flush(list, flush)
    }

    /// Syncs every unsync page of the VM (`Rules::sync_all`).
    pub(crate) fn sync_all(&mut self, role: &CpuRole) -> Flush {
        if self.counters.mmu_unsync == 0 {
            return Flush::NONE;
        }
        let unsync: Vec<_> = self.arena.oldest_first().filter(|id| self.arena[*id].unsync).collect();
        self.sync_pages(&unsync, role)
    }

    /// Syncs the pages that went out of sync first, until there are no more than may be (`Rules::unsync_limit`).
    #[cold]
    pub(crate) fn keep_unsync_limit(&mut self, limit: u32, role: &CpuRole) -> Flush {
        let mut owed = Flush::NONE;
        while self.counters.mmu_unsync > u64::from(limit)
            && let Some(first) = self.unsync_queue.pop_front()
        {
            owed += self.sync_pages(&[first], role);
        }
        owed
    }

    /// Makes an entry from the guest's again (`Rules::update_on_write`), if the page means the same to this vCPU.
    pub(crate) fn refill(&mut self, pos: SptePos, role: &CpuRole) -> Flush {
        match self.gpte_behind(pos) {
            Some(gpte) if self.can_sync(pos.page(), role) => self.refetch(pos, gpte, role, true),
            _ => Flush::NONE,
        }
    }

    fn refetch(&mut self, pos: SptePos, gpte: Gpte, role: &CpuRole, stop_at_dirty_log: bool) -> Flush {
        let (filled, flush) = self.prefetch_gpte(pos, gpte, role, stop_at_dirty_log);
        self.counters.x_refetched += u64::from(filled);
        flush
    }

    /// Syncs one entry (`kvm_sync_spte`, 6.12), or drops it if that is not possible.
    fn sync_in_place(&mut self, pos: SptePos, role: &CpuRole) -> Flush {
        if self.spte(pos) == Spte::EMPTY {
            return Flush::NONE;
        }
        self.counters.x_synced_entries += 1;
        let Some(gpte) = self.gpte_behind(pos).filter(|_| self.can_sync(pos.page(), role)) else {
            self.zap_entry(pos);
            return Flush::when(true);
        };
        Flush::when(self.sync_entry(pos, gpte, role))
    }

    /// Drops one entry and, if the guest's entry allows it, makes it again (`FNAME(invlpg)`, 6.1).
    fn drop_and_prefetch(&mut self, pos: SptePos, role: &CpuRole) -> Flush {
        let gpte = self.gpte_behind(pos);
        if let Some(gpte) = gpte
            && self.renew_plain_leaf(pos, gpte, role)
        {
            self.counters.x_refetched += 1;
            return Flush::when(true);
        }
        let was_present = self.zap_entry(pos);
        let mut owed = Flush::when(was_present);
        if let Some(gpte) = gpte {
            owed += self.refetch(pos, gpte, role, false);
        }
        owed
    }

    /// INVLPG below one root (`FNAME(invlpg)`, 6.1; `__kvm_mmu_invalidate_addr`, 6.12): only an entry of an unsync
    /// page may differ from the guest's.
    pub(crate) fn invlpg_root(&mut self, root: PageId, gva: Gva, role: &CpuRole) -> Flush {
        let (mut id, mut level) = (root, self.arena[root].level());
        loop {
            let pos = id.entry(gva.index(level));
            let spte = self.spte(pos);
            if level == Level::PT || spte.present() && spte.large() {
                return if self.arena[id].unsync { self.invlpg_entry(pos, role) } else { Flush::NONE };
            }
            if self.arena[id].unsync_children == 0 || !spte.is_table(level.0) {
                return Flush::NONE;
            }
            (id, level) = (spte.child(), level.down());
        }
    }

    /// The same at the leaf's place, in an unsync page.
    fn invlpg_entry(&mut self, pos: SptePos, role: &CpuRole) -> Flush {
        let mut owed = if self.config.kernel.invlpg_syncs {
            self.sync_in_place(pos, role)
        } else {
            self.drop_and_prefetch(pos, role)
        };
        if self.policy.rules.invlpg_protects {
            owed += self.sync_pages(&[pos.page()], role);
        }
        owed
    }
}

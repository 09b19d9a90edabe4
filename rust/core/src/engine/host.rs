//! What the host does to the VM: memslots, dirty logging, its own memory accesses, MMU notifiers, the page quota.

use crate::config::{MAX_QUOTA, MIN_QUOTA};
use crate::engine::Vm;
use crate::error::{ConfigError, MemoryError, refuse};
use crate::memory::HostState;
use crate::shadow::Flush;
use crate::types::{Gfn, Gpa, Level, PAGE_SIZE};

/// Slot pages for one shadow page of the default quota (`KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO`).
const PAGES_PER_SHADOW_PAGE: u64 = 50;

impl Vm {
    /// Adds a memslot over the backing at the same address (`KVM_SET_USER_MEMORY_REGION`).
    ///
    /// # Errors
    /// See [`crate::memory::Memory::add_slot`]; nothing was changed.
    pub fn add_slot(
        &mut self,
        slot: u16,
        gpa: Gpa,
        size: u64,
        readonly: bool,
        dirty_log: bool,
    ) -> Result<(), ConfigError> {
        let maxphyaddr = self.shadow.config.cpu.maxphyaddr;
        self.shadow.memory.add_slot(slot, gpa, size, readonly, maxphyaddr)?;
        self.shadow.memory.slot_by_id(slot)?.set_dirty_log(dirty_log);
        let flush = self.shadow.memslots_changed();
        self.pay_all(flush);
        self.default_quota();
        Ok(())
    }

    /// Deletes a memslot: everything shadowed becomes obsolete (`kvm_mmu_zap_all_fast`, 6.1).
    ///
    /// # Errors
    /// The slot does not exist.
    pub fn delete_slot(&mut self, slot: u16) -> Result<(), ConfigError> {
        self.shadow.memory.slot_by_id(slot)?;
        // The slot becomes invalid first, which is a generation of its own.
        self.shadow.memory.generation += crate::config::ADDRESS_SPACES;
        let mut flush = self.shadow.memslots_changed();
        flush += self.shadow.zap_all_fast();
        self.shadow.memory.remove_slot(slot);
        flush += self.shadow.memslots_changed();
        self.pay_all(flush);
        self.default_quota();
        Ok(())
    }

    fn default_quota(&mut self) {
        if !self.shadow.quota_is_set {
            let pages = (self.shadow.memory.total_pages() / PAGES_PER_SHADOW_PAGE).clamp(MIN_QUOTA, MAX_QUOTA);
            self.change_quota(pages);
        }
    }

    /// `kvm_mmu_change_mmu_pages`, 6.1.
    fn change_quota(&mut self, pages: u64) {
        let mut pages = pages;
        if self.shadow.used_pages > pages {
            let flush = self.shadow.zap_oldest(self.shadow.used_pages - pages);
            self.pay_all(flush);
            pages = self.shadow.used_pages;
        }
        self.shadow.max_pages = pages;
    }

    /// Sets the quota of shadow pages (`KVM_SET_NR_MMU_PAGES`).
    ///
    /// # Errors
    /// Less than 64 or more than the engine can address.
    pub fn set_page_quota(&mut self, pages: u64) -> Result<(), ConfigError> {
        if !(MIN_QUOTA..=MAX_QUOTA).contains(&pages) {
            return refuse!("page quota {pages} must be {MIN_QUOTA} to {MAX_QUOTA}");
        }
        self.shadow.quota_is_set = true;
        self.change_quota(pages);
        Ok(())
    }

    /// Turns a slot's dirty log on or off. Nothing happens if it is so already.
    ///
    /// # Errors
    /// The slot does not exist.
    pub fn set_dirty_log(&mut self, slot: u16, on: bool) -> Result<(), ConfigError> {
        let memslot = self.shadow.memory.slot_by_id(slot)?;
        if memslot.logs_dirty() == on {
            return Ok(());
        }
        memslot.set_dirty_log(on);
        let readonly = memslot.readonly;
        let heads: Vec<_> = memslot.rmaps().map(|(_, _, head)| head).collect();
        // A change of flags is a new generation, so MMIO entries become stale (11.5 of the specification).
        self.shadow.memory.generation += crate::config::ADDRESS_SPACES;
        let mut flush = self.shadow.memslots_changed();
        if readonly {
            // kvm_mmu_slot_apply_flags (6.1) leaves a read-only slot alone: nothing in it is writable or gets dirty.
        } else if on {
            for head in heads {
                self.shadow.write_protect_list(head, false);
            }
            flush += Flush::when(true);
        } else {
            flush += self.shadow.zap_collapsible(slot);
        }
        self.pay_all(flush);
        Ok(())
    }

    /// The frames written since the last call, ascending; they are write-protected again (`KVM_GET_DIRTY_LOG`).
    ///
    /// # Errors
    /// The slot does not exist or has no log.
    pub fn get_dirty_log(&mut self, slot: u16) -> Result<Vec<u64>, ConfigError> {
        let Some(dirty) = self.shadow.memory.slot_by_id(slot)?.take_dirty() else {
            return refuse!("memslot {slot} has no dirty log; turn it on first");
        };
        for gfn in &dirty {
            let head = self.shadow.memory.slot(*gfn).map(|slot| slot.rmap(*gfn, Level::PT));
            if let Some(head) = head {
                self.shadow.write_protect_list(head, false);
            }
        }
        self.pay_all(Flush::when(!dirty.is_empty()));
        Ok(dirty.iter().map(|gfn| gfn.0).collect())
    }

    /// The host drops pages (`MADV_DONTNEED`): the MMU notifier takes every entry that maps them, the contents are
    /// gone, and the pages are absent until they are touched again.
    ///
    /// # Errors
    /// A range that is empty, not page-aligned, or not inside the VM's memory.
    pub fn notifier_unmap(&mut self, gpa: Gpa, size: u64) -> Result<(), ConfigError> {
        self.check_range("unmap", gpa, size)?;
        let (first, pages) = (gpa.gfn(), size / PAGE_SIZE);
        self.shadow.events.unmap_hva_range(gpa, Gpa(gpa.0 + size));
        let flush = self.shadow.unmap_range(first, pages);
        self.pay_all(flush);
        for gfn in first.0..first.0 + pages {
            self.shadow.memory.host.set_state(Gfn(gfn), HostState::Absent);
        }
        Ok(())
    }

    /// Sets what the host has behind a range, as if it had always been so: entries that map it are taken away first.
    ///
    /// # Errors
    /// A range that is empty, not aligned to the state's page size, or not inside the VM's memory.
    pub fn set_host_pages(&mut self, gpa: Gpa, size: u64, state: HostState) -> Result<(), ConfigError> {
        self.check_range("host pages", gpa, size)?;
        let bytes = state.level().pages() * PAGE_SIZE;
        if !gpa.0.is_multiple_of(bytes) || !size.is_multiple_of(bytes) {
            return refuse!(
                "host pages: gpa {gpa:#x} and size {size:#x} must be multiples of {bytes:#x} for huge pages"
            );
        }
        let first = gpa.gfn();
        let flush = self.shadow.unmap_range(first, size / PAGE_SIZE);
        self.pay_all(flush);
        for gfn in first.0..first.0 + size / PAGE_SIZE {
            self.shadow.memory.host.set_state(Gfn(gfn), state);
        }
        Ok(())
    }

    fn check_range(&self, what: &str, gpa: Gpa, size: u64) -> Result<(), ConfigError> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || gpa.offset() != 0 {
            return refuse!("{what}: gpa {gpa:#x} and size {size:#x} must be multiples of 4096, and the size not 0");
        }
        self.check_memory(gpa, size).map_err(|e| ConfigError(format!("{what}: {e}")))
    }

    /// Whether every page of a range is the VM's: in a slot, or in the memory that it was made with.
    fn check_memory(&self, gpa: Gpa, size: u64) -> Result<(), MemoryError> {
        let refused = |at| MemoryError { gpa: Gpa(at), start: gpa, size };
        let end = gpa.0.checked_add(size).ok_or_else(|| refused(gpa.0))?;
        let mut at = gpa.0;
        while at < end {
            let gfn = Gpa(at).gfn();
            at = match self.shadow.memory.slot(gfn) {
                Some(slot) => (slot.base.0 + slot.pages) * PAGE_SIZE,
                None if self.shadow.memory.host.populated(gfn) => (gfn.0 + 1) * PAGE_SIZE,
                None => return Err(refused(at)),
            };
        }
        Ok(())
    }

    /// The host writes guest memory. No fault, no tracking: a shadowed table that is written so is not resynced, as
    /// with a device or user space of a real VM.
    ///
    /// # Errors
    /// A range that is not the VM's memory; nothing was written.
    pub fn write_memory(&mut self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        if data.is_empty() {
            return Ok(());
        }
        self.check_memory(gpa, data.len() as u64)?;
        let last = Gpa(gpa.0 + data.len() as u64 - 1).gfn().0;
        let mut flush = Flush::NONE;
        for gfn in gpa.gfn().0..=last {
            flush += self.shadow.host_makes_writable(Gfn(gfn));
        }
        self.pay_all(flush);
        self.shadow.memory.host.write_bytes(gpa, data);
        Ok(())
    }

    /// The host reads guest memory; the state of its pages stays as it is.
    ///
    /// # Errors
    /// A range that is not the VM's memory.
    pub fn read_memory(&self, gpa: Gpa, size: usize) -> Result<Vec<u8>, MemoryError> {
        self.check_memory(gpa, size as u64)?;
        Ok(self.shadow.memory.host.read_bytes(gpa, size))
    }

    /// The host writes a page that a recorded guest changed by stores that the recording left out. Synced shadow
    /// pages of the frame are zapped, as so many stores would have flooded them.
    ///
    /// # Errors
    /// A frame that is not the VM's memory; nothing was written.
    pub fn write_table_page(&mut self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        let changed = self.read_memory(gpa, data.len())? != data;
        self.write_memory(gpa, data)?;
        if changed {
            let flush = self.shadow.page_rewritten(gpa.gfn());
            self.pay_all(flush);
        }
        Ok(())
    }
}

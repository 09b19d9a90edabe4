//! What the host does to the VM: memslots, its own memory accesses, the page quota, huge pages that must not be executed.

use crate::config::{MAX_QUOTA, MIN_QUOTA};
use crate::engine::Vm;
use crate::error::{ConfigError, MemoryError, refuse};
use crate::memory::HostState;
use crate::shadow::Flush;
use crate::types::{Gfn, Gpa, PAGE_SIZE};

/// Slot pages for one shadow page of the default quota (`KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO`).
const PAGES_PER_SHADOW_PAGE: u64 = 50;

/// `nx_huge_pages_recovery_ratio`.
const NX_RECOVERY_RATIO: u64 = 60;

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
        let initially_set = self.shadow.manual_dirty.initially_set;
        self.shadow.memory.set_dirty_log(slot, dirty_log, initially_set)?;
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

    /// Moves a memslot, with what is in it: as a deletion, everything shadowed becomes obsolete (`KVM_MR_MOVE`, 6.1).
    ///
    /// # Errors
    /// The slot does not exist, or the new place is refused as for a new slot; nothing was changed.
    pub fn move_slot(&mut self, slot: u16, gpa: Gpa) -> Result<(), ConfigError> {
        let maxphyaddr = self.shadow.config.cpu.maxphyaddr;
        let old = self.shadow.memory.slot_by_id(slot)?;
        let (base, pages) = (old.base, old.pages);
        if base.gpa() == gpa {
            return Ok(());
        }
        self.shadow.memory.check_place(slot, gpa, pages * PAGE_SIZE, maxphyaddr)?;
        // The slot is invalid while its pages go, which is a generation of its own.
        self.shadow.memory.generation += crate::config::ADDRESS_SPACES;
        let mut flush = self.shadow.memslots_changed();
        flush += self.shadow.zap_all_fast();
        self.shadow.memory.move_slot(slot, gpa.gfn());
        flush += self.shadow.memslots_changed();
        self.pay_all(flush);
        self.default_quota();
        Ok(())
    }

    /// Turns the splitting of huge pages for execution on or off (module parameter `nx_huge_pages`); a change makes all
    /// shadow pages obsolete (`set_nx_huge_pages`, 6.1).
    pub fn set_nx_huge_pages(&mut self, on: bool) {
        if self.shadow.config.nx_huge_pages != on {
            self.shadow.config.nx_huge_pages = on;
            let flush = self.shadow.zap_all_fast();
            self.pay_all(flush);
        }
    }

    /// One round of the thread that gives huge pages back: one in 60 of the pages that split one, the oldest first, at
    /// least one (`kvm_recover_nx_huge_pages`, 6.1). Returns how many went.
    pub fn recover_nx_huge_pages(&mut self) -> u64 {
        let count = self.shadow.counters.nx_lpage_splits.div_ceil(NX_RECOVERY_RATIO);
        let flush = self.shadow.zap_nx_splits(count);
        self.pay_all(flush);
        count
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

    pub(super) fn check_range(&self, what: &str, gpa: Gpa, size: u64) -> Result<(), ConfigError> {
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
        self.shadow.memory.ways_epoch += 1;
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

    /// What a load of user space does to its pages: an absent one becomes the zero page.
    ///
    /// # Errors
    /// A range that is not the VM's memory; nothing was changed.
    pub fn touch(&mut self, gpa: Gpa, size: usize) -> Result<(), MemoryError> {
        self.check_memory(gpa, size as u64)?;
        let host = &mut self.shadow.memory.host;
        for gfn in gpa.gfn().0..(gpa.0 + size as u64).div_ceil(PAGE_SIZE) {
            if host.state(Gfn(gfn)) == HostState::Absent {
                host.set_state(Gfn(gfn), HostState::Zero);
            }
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ADDRESS_SPACES, Config, MMIO_GEN_BITS};
    use crate::cpu::Registers;
    use crate::events::EventLog;
    use crate::fault::insn::{Action, Insn};
    use crate::outcome::Status;
    use crate::policy::Kvm;

    #[test]
    fn when_the_generation_of_mmio_entries_wraps_all_pages_go() {
        let mut vm = Vm::new(1 << 20, 1, Config::default(), Box::new(Kvm), EventLog::EVERYTHING).expect("a good size");
        let flat = Registers { cr0: 0x33, cr3: 0, cr4: 0, efer: 0, cs_l: false };
        vm.set_sregs(0, flat).expect("paging off");
        let device = Insn::new(Action::Load, 8 << 20, 8);
        assert_eq!(vm.execute(0, &device).status, Status::Mmio);
        vm.shadow.memory.generation = (1 << MMIO_GEN_BITS) - ADDRESS_SPACES;
        let pages = vm.shadow.used_pages();
        vm.add_slot(1, Gpa(2 << 20), 4096, false, false).expect("room there");
        assert_eq!(vm.shadow.counters.mmu_shadow_zapped, pages, "an entry of the last round must not look valid now");
        assert_eq!(vm.execute(0, &device).status, Status::Mmio);
        vm.audit().expect("the state is whole");
        vm.add_slot(2, Gpa(3 << 20), 4096, false, false).expect("room there");
        assert_eq!(vm.shadow.counters.mmu_shadow_zapped, pages + 4, "once a round; the obsolete roots went for good");
    }

    #[test]
    fn a_guest_page_of_1_gib_on_a_host_page_of_1_gib_is_one_leaf() {
        let config = Config { cpu: crate::config::QEMU_TCG, ..Config::default() };
        let mut vm = Vm::new(3 << 30, 1, config, Box::new(Kvm), 0).expect("a good size");
        vm.set_host_pages(Gpa(1 << 30), 2 << 30, HostState::Huge1g).expect("aligned");
        for (gpa, entry) in [(0x1000, 0x2067u64), (0x2008, 1 << 30 | 0xe7), (0x2010, 2 << 30 | 0xe7)] {
            vm.write_memory(Gpa(gpa), &entry.to_le_bytes()).expect("inside");
        }
        vm.set_sregs(0, Registers { cr3: 0x1000, ..Registers::default() }).expect("long mode");
        for gva in [1 << 30, (1 << 30) + (512 << 20), 2 << 30] {
            assert_eq!(vm.execute(0, &Insn::new(Action::Load, gva, 8)).status, Status::Done);
        }
        assert_eq!((vm.counters().pages_1g, vm.vcpu_counters().pf_fixed), (2, 2));
        vm.notifier_unmap(Gpa((1 << 30) + 0x5000), 0x1000).expect("memory");
        assert_eq!(vm.execute(0, &Insn::new(Action::Load, 1 << 30, 8)).status, Status::Done);
        assert_eq!((vm.counters().pages_1g, vm.counters().pages_2m), (1, 0), "the host's page was split to small ones");
        vm.audit().expect("the state is whole");
    }
}

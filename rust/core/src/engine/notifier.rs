//! MMU notifiers: what the host's memory management does to the guest's pages, and what KVM makes of it.

use crate::engine::Vm;
use crate::error::{ConfigError, refuse};
use crate::memory::HostState;
use crate::shadow::Flush;
use crate::types::{Gpa, PAGE_SIZE};

impl Vm {
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
        self.shadow.memory.host.set_states(first, pages, HostState::Absent);
        self.shadow.memory.ways_epoch += 1;
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
        self.shadow.memory.host.set_states(first, size / PAGE_SIZE, state);
        self.shadow.memory.ways_epoch += 1;
        Ok(())
    }

    /// The host puts one read-only page that others share in the place of each page (KSM). The notifier that announces it
    /// has taken all entries away before `kvm_set_spte_gfn` (6.1) could change any; a write gets a page of its own again.
    ///
    /// # Errors
    /// As [`Vm::notifier_unmap`].
    pub fn notifier_change(&mut self, gpa: Gpa, size: u64) -> Result<(), ConfigError> {
        self.check_range("change", gpa, size)?;
        let (first, pages) = (gpa.gfn(), size / PAGE_SIZE);
        self.shadow.events.unmap_hva_range(gpa, Gpa(gpa.0 + size));
        let flush = self.shadow.unmap_range(first, pages);
        self.shadow.page_replaced(gpa);
        self.pay_all(flush);
        self.shadow.memory.host.set_states(first, pages, HostState::Shared);
        self.shadow.memory.ways_epoch += 1;
        Ok(())
    }

    /// The host asks which pages were used and forgets it: A goes from every entry that maps one (`kvm_age_gfn`, 6.1).
    /// With `flush` (`clear_flush_young`) one remote flush follows if any had it; without (`clear_young`) none does.
    /// Returns whether any had it.
    ///
    /// # Errors
    /// As [`Vm::notifier_unmap`].
    pub fn notifier_age(&mut self, gpa: Gpa, size: u64, flush: bool) -> Result<bool, ConfigError> {
        self.check_range("age", gpa, size)?;
        let young = self.shadow.age_range(gpa.gfn(), size / PAGE_SIZE);
        self.pay_all(Flush::when(young && flush));
        Ok(young)
    }

    /// Whether any page was used since it was last aged (`kvm_test_age_gfn`, 6.1); nothing changes.
    ///
    /// # Errors
    /// As [`Vm::notifier_unmap`].
    pub fn notifier_test_young(&self, gpa: Gpa, size: u64) -> Result<bool, ConfigError> {
        self.check_range("test young", gpa, size)?;
        Ok(self.shadow.is_young(gpa.gfn(), size / PAGE_SIZE))
    }
}

//! The dirty log: which frames the guest wrote (`KVM_MEM_LOG_DIRTY_PAGES`, `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG`).

use crate::config::ADDRESS_SPACES;
use crate::engine::Vm;
use crate::error::{ConfigError, refuse};
use crate::memory::ManualDirty;
use crate::shadow::Flush;
use crate::types::{Gfn, Level};
use rustc_hash::FxHashSet;

impl Vm {
    /// Sets how dirty logs are read from now on.
    ///
    /// # Errors
    /// `initially_set` without `enabled`.
    pub fn set_manual_dirty(&mut self, how: ManualDirty) -> Result<(), ConfigError> {
        if how.initially_set && !how.enabled {
            return refuse!("initially_set: only a log that is cleared by hand can begin full");
        }
        self.shadow.manual_dirty = how;
        Ok(())
    }

    /// Whether a slot logs what is written; `false` if it does not exist.
    #[must_use]
    pub fn logs_dirty(&self, slot: u16) -> bool {
        self.shadow.memory.slots().iter().any(|other| other.id == slot && other.logs_dirty())
    }

    /// Turns a slot's dirty log on or off. Nothing happens if it is so already.
    ///
    /// # Errors
    /// The slot does not exist.
    pub fn set_dirty_log(&mut self, slot: u16, on: bool) -> Result<(), ConfigError> {
        let initially_set = self.shadow.manual_dirty.initially_set;
        let memslot = self.shadow.memory.slot_by_id(slot)?.clone();
        if memslot.logs_dirty() == on {
            return Ok(());
        }
        self.shadow.memory.set_dirty_log(slot, on, initially_set)?;
        let readonly = memslot.readonly;
        let heads: Vec<_> = self.shadow.memory.rmaps(&memslot).map(|(_, _, head)| head).collect();
        // A change of flags is a new generation, so MMIO entries become stale (11.5 of the specification).
        self.shadow.memory.generation += ADDRESS_SPACES;
        let mut flush = self.shadow.memslots_changed();
        if readonly || on && initially_set {
            // kvm_mmu_slot_apply_flags (6.1) leaves a read-only slot alone: nothing in it is writable or gets dirty. And
            // what counts as written already need not be caught.
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

    /// The frames written since the last call, ascending; they are write-protected again (`kvm_get_dirty_log_protect`,
    /// 6.1). With manual protection the log only is read.
    ///
    /// # Errors
    /// The slot does not exist or has no log.
    pub fn get_dirty_log(&mut self, slot: u16) -> Result<Vec<u64>, ConfigError> {
        let manual = self.shadow.manual_dirty.enabled;
        let memslot = self.shadow.memory.slot_by_id(slot)?;
        let Some(dirty) = memslot.dirty_frames() else { return no_log(slot) };
        if !manual {
            memslot.clear_dirty(&dirty);
            self.protect_again(&dirty);
        }
        Ok(dirty.iter().map(|gfn| gfn.0).collect())
    }

    /// Takes frames out of the log and write-protects those that were in it (`kvm_clear_dirty_log_protect`, 6.1).
    ///
    /// # Errors
    /// Manual protection is off, the slot does not exist or has no log, or a frame is not the slot's; nothing was changed.
    pub fn clear_dirty_log(&mut self, slot: u16, frames: &[u64]) -> Result<(), ConfigError> {
        let how = self.shadow.manual_dirty;
        if !how.enabled {
            return refuse!("memslot {slot}: a log is cleared by hand only with manual dirty-log protection");
        }
        let memslot = self.shadow.memory.slot_by_id(slot)?;
        let Some(dirty) = memslot.dirty_frames() else { return no_log(slot) };
        if let Some(gfn) = frames.iter().find(|gfn| !memslot.holds(Gfn(**gfn))) {
            return refuse!("memslot {slot}: frame {gfn:#x} is not in it");
        }
        let wanted: FxHashSet<u64> = frames.iter().copied().collect();
        let cleared: Vec<_> = dirty.into_iter().filter(|gfn| wanted.contains(&gfn.0)).collect();
        memslot.clear_dirty(&cleared);
        if how.initially_set {
            self.split_by_protection(&cleared);
        }
        self.protect_again(&cleared);
        Ok(())
    }

    /// Small leaves of these frames lose W; one flush if there are any frames.
    fn protect_again(&mut self, frames: &[Gfn]) {
        for gfn in frames {
            self.shadow.write_protect_list(self.shadow.memory.rmap(*gfn, Level::PT), false);
        }
        self.pay_all(Flush::when(!frames.is_empty()));
    }

    /// A log that began full has left huge leaves writable; they are protected now, so that the first write to one splits
    /// it (`kvm_arch_mmu_enable_log_dirty_pt_masked`, 6.1).
    fn split_by_protection(&mut self, frames: &[Gfn]) {
        let mut regions: Vec<_> = frames.iter().map(|gfn| gfn.round(Level::PD)).collect();
        regions.dedup();
        for first in regions {
            let Some(gfn) = frames.iter().find(|gfn| gfn.round(Level::PD) == first) else { continue };
            for level in [Level::PD, Level::PDPT] {
                self.shadow.write_protect_list(self.shadow.memory.rmap(*gfn, level), true);
            }
        }
    }
}

fn no_log<T>(slot: u16) -> Result<T, ConfigError> {
    refuse!("memslot {slot} has no dirty log; turn it on first")
}

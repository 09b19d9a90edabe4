//! Guest memory: the host's pages behind it and the memslots that show them to the guest.
//!
//! The host's backing is one sparse space addressed by guest frame; a memslot is a window on it. So a slot that is
//! deleted and added again shows the same contents, as with a hypervisor that keeps its mapping.

mod books;
mod frames;
mod host;
mod slot;

pub use books::{Near, SlotFrame};
pub use host::{Contents, Host, HostState};
pub use slot::Slot;

use crate::config::{ADDRESS_SPACES, MAX_GPA_BITS, MAX_MEMORY, MAX_SLOTS};
use crate::error::{ConfigError, InvariantError, refuse};
use crate::types::{Gfn, Gpa, PAGE_SIZE};
use serde::{Deserialize, Serialize};

/// How the log is read (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ManualDirty {
    /// Reading leaves the log and the write protection as they are; `clear_dirty_log` does both.
    pub enabled: bool,
    /// A log begins with every frame in it, so nothing is write-protected at first.
    pub initially_set: bool,
}

/// Memslots and the host's pages.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Memory {
    /// The host's pages.
    pub host: Host,
    slots: Vec<Slot>,
    /// Where the last lookup hit; neighbours are looked up together.
    last: usize,
    /// The memslot generation, without the in-progress flag (no guest runs while a slot changes here).
    pub generation: u64,
    /// Moves with every change that may change the way through the tables to an address: of a slot, of contents by
    /// anybody but the guest's CPU, and, by the shadow's hand, of a link between shadow tables.
    pub ways_epoch: u64,
    /// Some table that is write-tracked can be written without a fault, so that no way to one may be remembered.
    pub leaks: bool,
}

impl Memory {
    /// No slots; the first `pages` frames are present and writable in the host.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { host: Host::new(pages), slots: Vec::new(), last: 0, generation: 0, ways_epoch: 1, leaks: false }
    }

    /// The slots, in the order of their base.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Refuses slots that cannot be, and numbers that lead to nothing.
    pub(crate) fn check_bounds(&self) -> Result<(), InvariantError> {
        let unless = InvariantError::unless;
        self.slots.iter().try_for_each(Slot::check_bounds)?;
        let apart = self.slots.windows(2).all(|pair| pair[0].base.0 + pair[0].pages <= pair[1].base.0);
        unless(apart, "memslots that overlap or are out of order")?;
        let mut ids: Vec<_> = self.slots.iter().map(|slot| slot.id).collect();
        ids.sort_unstable();
        unless(ids.windows(2).all(|pair| pair[0] < pair[1]), "two memslots of one number")?;
        unless(self.ways_epoch > 0, "an epoch that never was")?;
        self.host.check_bounds()?;
        unless(self.books_are_slots(), "bookkeeping that does not add up, or of frames in no memslot")
    }

    /// The slot that holds a frame.
    #[inline]
    #[must_use]
    pub fn slot(&self, gfn: Gfn) -> Option<&Slot> {
        match self.slots.get(self.last) {
            Some(slot) if slot.holds(gfn) => Some(slot),
            _ => self.slots.iter().find(|slot| slot.holds(gfn)),
        }
    }

    /// A table that is write-tracked became writable. Whatever ways are remembered end, and none is from now on.
    #[cold]
    pub(crate) fn leak(&mut self) {
        (self.leaks, self.ways_epoch) = (true, self.ways_epoch + 1);
    }

    /// Whether a frame lies in a slot.
    #[inline]
    #[must_use]
    pub fn has_slot(&self, gfn: Gfn) -> bool {
        self.slot(gfn).is_some()
    }

    /// The slot that holds a frame, to change it.
    #[inline]
    pub fn slot_mut(&mut self, gfn: Gfn) -> Option<&mut Slot> {
        if !self.slots.get(self.last).is_some_and(|slot| slot.holds(gfn)) {
            self.last = self.slots.iter().position(|slot| slot.holds(gfn))?;
        }
        self.slots.get_mut(self.last)
    }

    /// Bytes that the bookkeeping of all slots' frames takes: reverse maps of one entry, write tracking, dirty logs.
    #[must_use]
    pub fn bookkeeping_bytes(&self) -> usize {
        self.host.frames.bytes().1
    }

    /// The slot with that number.
    ///
    /// # Errors
    /// No slot has the number.
    pub fn slot_by_id(&mut self, id: u16) -> Result<&mut Slot, ConfigError> {
        match self.slots.iter().position(|slot| slot.id == id) {
            Some(at) => Ok(&mut self.slots[at]),
            None => refuse!("memslot {id} does not exist"),
        }
    }

    /// Turns a slot's log of writes on (empty, or `full`) or off.
    ///
    /// # Errors
    /// No slot has the number.
    pub fn set_dirty_log(&mut self, id: u16, on: bool, full: bool) -> Result<(), ConfigError> {
        self.slot_by_id(id)?.set_dirty_log(on, full);
        self.host.frames.close();
        Ok(())
    }

    /// The frames of all slots, for the default quota.
    #[must_use]
    pub fn total_pages(&self) -> u64 {
        self.slots.iter().map(|slot| slot.pages).sum()
    }

    /// Adds a slot (`KVM_SET_USER_MEMORY_REGION`); the generation moves on.
    ///
    /// # Errors
    /// A number in use, a range that is empty, not page-aligned, too large, wraps, or overlaps another slot.
    pub fn add_slot(
        &mut self,
        id: u16,
        gpa: Gpa,
        size: u64,
        readonly: bool,
        maxphyaddr: u32,
    ) -> Result<(), ConfigError> {
        if self.slots.iter().any(|slot| slot.id == id) {
            return refuse!("memslot {id} exists already; delete it first");
        }
        self.check_place(id, gpa, size, maxphyaddr)?;
        self.insert(Slot::new(id, gpa.gfn(), size / PAGE_SIZE, readonly));
        self.generation += ADDRESS_SPACES;
        self.ways_epoch += 1;
        Ok(())
    }

    /// Whether a slot of that size may lie there.
    ///
    /// # Errors
    /// A number out of range; a range that is empty, not page-aligned, too large, wraps, or overlaps another slot.
    pub fn check_place(&self, id: u16, gpa: Gpa, size: u64, maxphyaddr: u32) -> Result<(), ConfigError> {
        if usize::from(id) >= MAX_SLOTS {
            return refuse!("memslot {id} is out of range: a VM has slots 0 to {}", MAX_SLOTS - 1);
        }
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || gpa.offset() != 0 {
            return refuse!(
                "memslot {id}: gpa {gpa:#x} and size {size:#x} must be multiples of 4096, and the size not 0"
            );
        }
        if size > MAX_MEMORY {
            return refuse!("memslot {id}: size {size:#x} is above the limit of {MAX_MEMORY:#x} bytes");
        }
        match gpa.0.checked_add(size) {
            Some(end) if end <= 1 << maxphyaddr.min(MAX_GPA_BITS) => {}
            _ => {
                return refuse!(
                    "memslot {id}: {gpa:#x} + {size:#x} is beyond the guest's {maxphyaddr} physical address bits"
                );
            }
        }
        let place = Slot::new(id, gpa.gfn(), size / PAGE_SIZE, false);
        if let Some(other) = self.slots.iter().find(|other| other.id != id && other.overlaps(&place)) {
            return refuse!("memslot {id}: gpa {gpa:#x}, size {size:#x} overlaps memslot {}", other.id);
        }
        Ok(())
    }

    fn insert(&mut self, slot: Slot) {
        let at = self.slots.partition_point(|other| other.base < slot.base);
        self.slots.insert(at, slot);
        self.last = 0;
        self.host.frames.close();
    }

    /// Moves a slot to another place with the host's pages behind it; nothing of it may be mapped any more.
    pub fn move_slot(&mut self, id: u16, base: Gfn) {
        let Some(at) = self.slots.iter().position(|slot| slot.id == id) else { return };
        let old = self.slots.remove(at);
        self.host.move_pages(old.base, base, old.pages);
        self.insert(old.moved(base));
        self.generation += ADDRESS_SPACES;
        self.ways_epoch += 1;
    }

    /// Takes the slot away; the generation moves on.
    pub fn remove_slot(&mut self, id: u16) {
        self.slots.retain(|slot| slot.id != id);
        self.last = 0;
        self.host.frames.close();
        self.generation += ADDRESS_SPACES;
        self.ways_epoch += 1;
    }

    /// Whether a write to the frame must be noted, and notes it (`mark_page_dirty`, 6.1).
    #[inline]
    pub fn mark_dirty(&mut self, gfn: Gfn) {
        if let Some(slot) = self.slot_mut(gfn) {
            slot.mark_dirty(gfn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_overlap_or_wrap_are_refused_and_nothing_changes() {
        let mut memory = Memory::new(16);
        memory.add_slot(0, Gpa(0), 0x10000, false, 48).unwrap();
        let before = memory.generation;
        for (id, gpa, size) in [
            (0, 0x20000, 0x1000),
            (1, 0xf000, 0x2000),
            (1, 0x20000, 0),
            (1, 0x20800, 0x1000),
            (1, (1 << 48) - 0x1000, 0x2000),
            (600, 0x20000, 0x1000),
        ] {
            assert!(memory.add_slot(id, Gpa(gpa), size, false, 48).is_err(), "{id} {gpa:x} {size:x}");
        }
        assert_eq!((memory.slots().len(), memory.generation), (1, before));
    }

    #[test]
    fn a_slot_that_comes_back_shows_the_same_bytes() {
        let mut memory = Memory::new(16);
        memory.add_slot(0, Gpa(0), 0x10000, false, 48).unwrap();
        memory.host.write(Gpa(0x3008), 8, 0x1122);
        memory.remove_slot(0);
        assert!(memory.slot(Gfn(3)).is_none());
        memory.add_slot(4, Gpa(0x3000), 0x1000, false, 48).unwrap();
        assert_eq!(memory.host.read(Gpa(0x3008), 8), 0x1122);
        assert_eq!(memory.slot_mut(Gfn(3)).unwrap().id, 4);
    }
}

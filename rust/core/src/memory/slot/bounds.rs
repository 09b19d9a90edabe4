//! Whether a slot of a state that was read can be.

use super::{Slot, parts};
use crate::config::{MAX_GPA_BITS, MAX_MEMORY, MAX_SLOTS};
use crate::error::InvariantError;
use crate::types::{Level, PAGE_SHIFT, RmapHead};

impl Slot {
    /// Refuses a range that no slot can have, and bookkeeping of another size.
    pub(crate) fn check_bounds(&self) -> Result<(), InvariantError> {
        let unless = InvariantError::unless;
        let end = self.base.0.checked_add(self.pages);
        let fits = end.is_some_and(|end| end <= 1 << (MAX_GPA_BITS - PAGE_SHIFT));
        let sized = (1..=MAX_MEMORY >> PAGE_SHIFT).contains(&self.pages);
        unless(fits && sized && usize::from(self.id) < MAX_SLOTS, "a memslot of impossible number, place or size")?;
        let logged = self.dirty.as_ref().is_none_or(|bits| bits.len() as u64 == self.pages.div_ceil(64));
        let giant = self.giant.len() == parts(self.base, self.pages, 18)
            && self.giants().all(|(gfn, head)| head == RmapHead::default() || self.covers(gfn, Level::PDPT));
        unless(logged && giant, "a memslot with bookkeeping that is not its own")
    }
}

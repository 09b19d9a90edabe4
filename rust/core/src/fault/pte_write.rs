//! What an emulated write to guest memory does to the shadow (`kvm_mmu_pte_write`, 6.1).

use crate::shadow::page::Bitmap;
use crate::shadow::zap::ZapList;
use crate::shadow::{Flush, Shadow};
use crate::types::{ENTRIES, Gfn, Gpa, Level, PageId};

/// Bytes of a guest entry.
const ENTRY: u64 = 8;

impl Shadow {
    /// Takes back whatever the written bytes were the source of: entries, or the whole page when the guest seems not
    /// to use it as a table any more.
    pub(crate) fn pte_write(&mut self, gpa: Gpa, bytes: u8) -> Flush {
        if self.indirect_pages == 0 {
            return Flush::NONE;
        }
        // Half of an 8-byte entry counts as the whole (mmu_pte_write_fetch_gpte, 6.1).
        let (gpa, bytes) = if bytes == 4 { (Gpa(gpa.0 & !7), 8) } else { (gpa, bytes) };
        let gentry = if bytes == 8 && gpa.offset() <= 4096 - 8 { self.memory.host.read(gpa, 8) } else { 0 };
        self.counters.mmu_pte_write += 1;
        let (mut list, mut flush) = (ZapList::default(), false);
        let mut at = self.next_gptes_page(gpa.gfn(), None);
        while let Some(id) = at {
            if is_misaligned(gpa, bytes) || self.is_flooding(id) {
                let _ = self.prepare_zap(id, &mut list);
                self.counters.mmu_flooded += 1;
            } else {
                let pos = id.entry((gpa.offset() / ENTRY) as usize % ENTRIES);
                flush |= self.zap_entry(pos);
                if gentry != 0 && self.arena[id].level() > Level::PT {
                    self.counters.mmu_pde_zapped += 1;
                }
            }
            at = self.next_gptes_page(gpa.gfn(), Some(id));
        }
        self.commit_or_flush(list, flush)
    }

    /// Counts a write to an upper-level page (`detect_write_flooding`, 6.1).
    fn is_flooding(&mut self, id: PageId) -> bool {
        if self.arena[id].level() == Level::PT {
            return false;
        }
        self.arena[id].flood += 1;
        let view = self.page_view(id);
        self.arena[id].flood >= self.policy.flood_threshold(&view)
    }

    /// The host replaced a whole page by the guest's own stores, of which the recording kept only the result. Pages
    /// that real KVM would have zapped for flooding go; unsync ones lag behind, as they would.
    pub(crate) fn page_rewritten(&mut self, gfn: Gfn) -> Flush {
        let mut list = ZapList::default();
        let mut at = self.next_gptes_page(gfn, None);
        while let Some(id) = at {
            // A page without entries holds nothing that could be wrong (a root that was loaded just before).
            if !self.arena[id].unsync && self.arena[id].used != Bitmap::default() {
                let _ = self.prepare_zap(id, &mut list);
                self.counters.mmu_flooded += 1;
            }
            at = self.next_gptes_page(gfn, Some(id));
        }
        self.commit_zap(list)
    }
}

/// Whether a write is not one that updates an entry (`detect_write_misaligned`, 6.1).
const fn is_misaligned(gpa: Gpa, bytes: u8) -> bool {
    let offset = gpa.offset();
    // An aligned single byte is how some guests clear an entry's bit.
    if offset.is_multiple_of(ENTRY) && bytes == 1 {
        return false;
    }
    (offset ^ (offset + bytes as u64 - 1)) & !(ENTRY - 1) != 0 || bytes < 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_entries_and_aligned_bytes_are_aligned() {
        assert!(!is_misaligned(Gpa(0x3040), 8));
        assert!(!is_misaligned(Gpa(0x3040), 1));
        assert!(is_misaligned(Gpa(0x3041), 1));
        assert!(is_misaligned(Gpa(0x3040), 2));
        assert!(is_misaligned(Gpa(0x3044), 8));
        assert!(is_misaligned(Gpa(0x3040), 16));
    }
}

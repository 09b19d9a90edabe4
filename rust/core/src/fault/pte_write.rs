//! What an emulated write to guest memory does to the shadow (`kvm_mmu_pte_write`, 6.1).

use crate::cpu::CpuRole;
use crate::role::Role;
use crate::shadow::page::Bitmap;
use crate::shadow::zap::ZapList;
use crate::shadow::{Flush, Shadow, page_view};
use crate::types::{ENTRIES, Gfn, Gpa, Level, PageId};
use std::ops::Range;

impl Shadow {
    /// Takes back whatever the written bytes were the source of: entries, or the whole page when the guest seems not
    /// to use it as a table any more.
    /// `pae`: the vCPU's CR4.PAE, whatever the page's entries are.
    pub(crate) fn pte_write(&mut self, gpa: Gpa, bytes: u8, role: &CpuRole, pae: bool) -> Flush {
        if self.indirect_pages == 0 {
            return Flush::NONE;
        }
        // Half of an 8-byte entry counts as the whole (mmu_pte_write_fetch_gpte, 6.1).
        let (gpa, bytes) = if pae && bytes == 4 { (Gpa(gpa.0 & !7), 8) } else { (gpa, bytes) };
        let whole = matches!(bytes, 4 | 8) && gpa.offset() + u64::from(bytes) <= 4096;
        let gentry = if whole { self.memory.host.read(gpa, bytes) } else { 0 };
        self.entry_written(gpa, bytes, gentry, role)
    }

    /// The same once the written value of a whole entry, else 0, is known.
    #[inline(always)]
    pub(crate) fn entry_written(&mut self, gpa: Gpa, bytes: u8, gentry: u64, role: &CpuRole) -> Flush {
        self.counters.mmu_pte_write += 1;
        let (mut list, mut flush, mut updates) = (ZapList::default(), false, Flush::NONE);
        let mut at = self.arena.chain_first(gpa.gfn());
        while let Some(id) = at {
            // Zapped pages keep their place until the list is committed.
            at = self.arena.chain_next(id);
            if !self.is_gptes_page(id, gpa.gfn()) {
                continue;
            }
            let page = self.arena[id].role;
            if is_misaligned(gpa, bytes, page.entry_bytes()) || self.is_flooding(id) {
                let _ = self.prepare_zap(id, &mut list);
                self.counters.mmu_flooded += 1;
            } else {
                for index in written_entries(gpa, page) {
                    flush |= self.zap_entry(id.entry(index));
                    if gentry != 0 && page.level() > Level::PT {
                        self.counters.mmu_pde_zapped += 1;
                    }
                    if self.policy.rules.update_on_write && page.level() == Level::PT {
                        updates += self.refill(id.entry(index), role);
                    }
                }
            }
        }
        updates += self.commit_or_flush(list, flush);
        updates
    }

    /// Counts a write to an upper-level page (`detect_write_flooding`, 6.1).
    #[inline(always)]
    fn is_flooding(&mut self, id: PageId) -> bool {
        let page = &mut self.arena[id];
        if page.level() == Level::PT {
            return false;
        }
        page.flood += 1;
        let count = page.flood;
        self.floods += 1;
        let (arena, policy) = (&self.arena, &mut self.policy);
        count >= policy.flood_threshold(|| page_view(arena, id))
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

/// The entries of a shadow page that were made from the guest entry at `gpa` (`get_written_sptes`, 6.1). A guest entry
/// of 4 bytes on level 2 maps 4 MiB and has two; one that lies in another quadrant has none here.
fn written_entries(gpa: Gpa, role: Role) -> Range<usize> {
    if !role.has_4_byte() {
        let index = (gpa.offset() / 8) as usize;
        return index..index + 1;
    }
    // Counted over all quadrants, as entries of 8 bytes would be.
    let (first, count) = match role.level() {
        Level::PT => ((gpa.offset() / 4) as usize, 1),
        _ => (2 * (gpa.offset() / 4) as usize, 2),
    };
    if first / ENTRIES == role.quadrant() { first % ENTRIES..first % ENTRIES + count } else { 0..0 }
}

/// Whether a write is not one that updates an entry of that size (`detect_write_misaligned`, 6.1).
const fn is_misaligned(gpa: Gpa, bytes: u8, entry: u8) -> bool {
    let (offset, entry) = (gpa.offset(), entry as u64);
    // An aligned single byte is how some guests clear an entry's bit.
    if offset.is_multiple_of(entry) && bytes == 1 {
        return false;
    }
    (offset ^ (offset + bytes as u64 - 1)) & !(entry - 1) != 0 || bytes < 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_entries_and_aligned_bytes_are_aligned() {
        assert!(!is_misaligned(Gpa(0x3040), 8, 8));
        assert!(!is_misaligned(Gpa(0x3040), 1, 8));
        assert!(is_misaligned(Gpa(0x3041), 1, 8));
        assert!(is_misaligned(Gpa(0x3040), 2, 8));
        assert!(is_misaligned(Gpa(0x3044), 8, 8));
        assert!(is_misaligned(Gpa(0x3040), 16, 8));
        assert!(!is_misaligned(Gpa(0x3044), 4, 4) && is_misaligned(Gpa(0x3040), 8, 4));
    }

    #[test]
    fn entries_of_4_bytes_belong_to_quadrants() {
        let root = Role::root(Level(3), true, false, false).with_entry_bytes(4);
        let (quarter, half) = (root.pae_root(1), root.pae_root(1).child(1, false, crate::types::Access::ALL));
        assert_eq!(written_entries(Gpa(0x1404), quarter), 2..4);
        assert_eq!(written_entries(Gpa(0x13fc), quarter), 0..0);
        assert_eq!(written_entries(Gpa(0x1804), half), 1..2);
        assert_eq!(written_entries(Gpa(0x1404), half), 0..0);
        assert_eq!(written_entries(Gpa(0x1ff8), Role::root(Level(4), true, false, false)), 511..512);
    }
}

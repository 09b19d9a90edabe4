//! The short way to make leaves of plain RAM: empty entries of a level-1 page with gptes, for frames that the host has and
//! may write, with no table in them and no log of writes. It comes to the same as `make`, which does all others.

use crate::bits::{PT_A, PT_D, PT_NX, PT_P, PT_U, PT_W};
use crate::config::{PREFETCH, RMAP_RECYCLE};
use crate::cpu::CpuRole;
use crate::events::EventKind;
use crate::guest::gpte::Gpte;
use crate::memory::{Contents, Host};
use crate::mode::Mode;
use crate::shadow::spte::{HOST_WRITABLE, MMU_WRITABLE, SHADOW_PRESENT, Spte, sptep};
use crate::shadow::{Flush, Shadow};
use crate::types::{Access, ENTRIES, Gfn, Level, RmapHead, SptePos};
use std::ops::Range;

/// The guest's entries behind a page.
#[derive(Clone, Copy)]
pub(crate) struct Guest<'a> {
    /// The guest's table.
    pub contents: Contents,
    /// The rights above it.
    pub granted: Access,
    /// Who reads it.
    pub role: &'a CpuRole,
}

/// The bits of a leaf for each set of rights, without A and the frame.
const LEAF: [u64; 8] = {
    let mut bits = [SHADOW_PRESENT | PT_P | HOST_WRITABLE; 8];
    let mut rights = 0;
    while rights < 8 {
        let access = Access(rights as u8);
        bits[rights] |= if access.has(Access::X) { 0 } else { PT_NX };
        bits[rights] |= if access.has(Access::W) { PT_W | MMU_WRITABLE | PT_D } else { 0 };
        bits[rights] |= if access.has(Access::U) { PT_U } else { 0 };
        rights += 1;
    }
    bits
};

#[inline]
const fn leaf_bits(gfn: Gfn, access: Access) -> u64 {
    LEAF[access.0 as usize & 7] | Host::pfn(gfn).0 << 12
}

impl Shadow {
    /// Makes a leaf; `mark` is A if somebody asks for the page. `None`, and nothing done, if it is not plain.
    #[inline(always)]
    pub(crate) fn set_plain_leaf<const EVENT: bool>(
        &mut self,
        pos: SptePos,
        gfn: Gfn,
        access: Access,
        mark: u64,
    ) -> Option<Flush> {
        let mut near = loop {
            if let Some(near) = self.memory.near(gfn) {
                break near;
            }
            if !self.memory.opens(gfn) {
                return None;
            }
        };
        let frame = near.plain_frame_here(gfn, access)?;
        let bits = leaf_bits(gfn, access) | mark;
        self.arena.set_leaf(pos, Spte(bits), gfn, access);
        let before = self.lists.add(&mut frame.rmap, pos);
        if EVENT {
            self.events.set_spte(gfn.0, bits, sptep(pos.page(), pos.index()), Level::PT.0);
        }
        self.counters.pages_4k += 1;
        Some(self.rmap_grew(gfn, Level::PT, before))
    }

    /// Drops a leaf and makes it again from its guest entry (`FNAME(invlpg)`, 6.1), if it maps the same frame again and is
    /// the only one that does: then its place in the frame's list stays what it is. `false`, and nothing done, otherwise.
    #[inline]
    pub(crate) fn renew_plain_leaf(&mut self, pos: SptePos, gpte: Gpte, role: &CpuRole) -> bool {
        let usable = gpte.present() && gpte.accessed() && !gpte.has_reserved(role, Level::PT);
        let gfn = gpte.gfn();
        if !usable || !self.spte(pos).present() || self.arena.mapped_gfn(pos) != gfn {
            return false;
        }
        let access = gpte.protect_clean(self.arena[pos.page()].role.access().and(gpte.access()));
        let Some(mut near) = self.memory.near(gfn) else { return false };
        let only = near.plain_frame_here(gfn, access).is_some_and(|frame| self.lists.only(frame.rmap) == Some(pos));
        if only {
            let bits = leaf_bits(gfn, access);
            self.arena.update_leaf(pos, Spte(bits), gfn, access);
            self.events.set_spte(gfn.0, bits, sptep(pos.page(), pos.index()), Level::PT.0);
        }
        only
    }

    /// Gives W to a leaf that a store faulted on (`make_spte`, 6.1), of a frame that is not write-tracked and otherwise plain;
    /// the `tables` that lie in it go out of step. `false`, and nothing done, if it is not plain. Nothing that the CPU may hold
    /// goes away, so that no flush is owed.
    #[inline(always)]
    pub(crate) fn unprotect_plain_leaf(&mut self, pos: SptePos, gfn: Gfn, access: Access, tables: u16) -> bool {
        let (old, new) = (self.spte(pos), Spte(leaf_bits(gfn, access) | PT_A));
        debug_assert!(old.lacks_w() && access.has(Access::W) && !old.update_needs_flush(new));
        if tables > 0 && !self.policy.unsyncs_like_kvm() {
            return false;
        }
        if !self.arena.maps(pos, gfn, access) {
            // The guest's entry is another now.
            if old.pfn() != Host::pfn(gfn) {
                return false;
            }
            self.arena.set_mapped(pos, gfn, access);
        }
        debug_assert_eq!(old.pfn(), Host::pfn(gfn), "no leaf maps a page that the host replaced");
        if tables > 0 {
            self.unsync_all_tables(gfn, tables);
        }
        self.arena.update_spte(pos, new);
        true
    }

    /// Fills the neighbours of a faulting entry, up to the first whose guest entry cannot be mapped without a fault
    /// (`FNAME(pte_prefetch)`, 6.1). Often there are none: all are there, or the first that is not has nothing behind it.
    /// `None` if nothing is owed.
    #[inline(always)]
    pub(crate) fn prefetch(&mut self, pos: SptePos, guest: Guest<'_>) -> Option<Flush> {
        let Guest { contents, granted, role } = guest;
        // An MMIO entry is neither empty nor present.
        if role.mode.entry_bytes == 8 && !self.has_mmio && self.policy.prefetches_like_kvm() {
            let start = pos.index() & !(PREFETCH - 1);
            let there = (self.arena[pos.page()].used[start / 64] >> (start % 64)) as u8;
            let first = there.trailing_ones() as usize;
            let gpte = self.memory.host.words_in(contents)[(start + first) % ENTRIES];
            if first == PREFETCH || gpte & (PT_P | PT_A) != PT_P | PT_A {
                return None;
            }
            if self.prefetch_eight(pos, !there, contents, granted, role) {
                return None;
            }
        }
        Some(self.prefetch_group(pos, contents, granted, role))
    }

    /// The same for a group of KVM's size of which those in a set are empty and all others present, as far as all is plain:
    /// whether that was to its end. A function of its own, so that what its loop needs stays in registers.
    #[inline(never)]
    fn prefetch_eight(&mut self, pos: SptePos, empty: u8, contents: Contents, granted: Access, role: &CpuRole) -> bool {
        let guest = Guest { contents, granted, role };
        let (index, block) = (pos.index() % 64, SptePos(pos.0 & !63));
        // The faulting entry is there, or its list grew too long and it has to fault again.
        let empty = u64::from(empty) << (index & !(PREFETCH - 1)) & !(1 << index);
        let mut none = Flush::NONE;
        !self.events.wants(EventKind::SetSpte)
            && matches!(self.prefetch_alike::<false>(block, empty, guest, &mut none), None | Some(0))
    }

    /// The same for a group of any size, and whatever its entries are.
    #[inline(never)]
    fn prefetch_group(&mut self, pos: SptePos, contents: Contents, granted: Access, role: &CpuRole) -> Flush {
        let guest = Guest { contents, granted, role };
        let (id, mut owed) = (pos.page(), Flush::NONE);
        let width = self.prefetch_width(id);
        let first = pos.index() & !(width - 1);
        let bytes = guest.role.mode.entry_bytes;
        let half = if bytes == 4 { self.arena[id].role.quadrant() } else { 0 };
        let plain = bytes == 8 && !self.events.wants(EventKind::SetSpte);
        let (mut index, end) = (first, first + width);
        while index < end {
            if plain {
                index = self.prefetch_run(pos, index..end, guest, &mut owed);
            }
            let at = id.entry(index % ENTRIES);
            if index == end || at == pos || self.spte(at).present() {
                index += 1;
                continue;
            }
            let gpte = Gpte(self.memory.host.entry_in(guest.contents, Mode::gpte_index(half, index), bytes));
            let (filled, flush) = self.prefetch_gpte(at, gpte, guest.role, true);
            owed += flush;
            if !filled {
                return owed;
            }
            self.counters.x_prefetched += 1;
            index += 1;
        }
        owed
    }

    /// The same as far as all is plain. Returns the entry where it is not so, or the end.
    fn prefetch_run(&mut self, pos: SptePos, indexes: Range<usize>, guest: Guest<'_>, owed: &mut Flush) -> usize {
        let (mut index, end) = (indexes.start, indexes.end);
        while index < end {
            let (word, mut stop) = (index / 64 % (ENTRIES / 64), end.min((index | 63) + 1));
            if self.has_mmio {
                let sptes = self.arena.sptes(pos.page());
                let absent = |index: &usize| sptes[index % ENTRIES] != 0 && !Spte(sptes[index % ENTRIES]).present();
                stop = (index..stop).find(absent).unwrap_or(stop);
                if stop == index {
                    return index;
                }
            }
            let mut empty = !self.arena[pos.page()].used[word] & (!0 >> (64 - (stop - index)) << (index % 64));
            if pos.index() / 64 == word {
                empty &= !(1 << (pos.index() % 64));
            }
            match self.prefetch_alike::<true>(pos.page().entry(word * 64), empty, guest, owed) {
                None => return end,
                Some(0) => index = stop,
                Some(left) => {
                    index = word * 64 + left.trailing_zeros() as usize;
                    if left == empty {
                        return index;
                    }
                }
            }
        }
        end
    }

    /// The same for empty entries among the 64 from `at` on, those in the set `all`, as long as they are like the first but for
    /// the frame, which is of the same region of 2 MiB and, unless `SHARED`, mapped by nobody yet. Returns those that are left;
    /// `None` if the guest's entry ends it all.
    #[inline(always)]
    fn prefetch_alike<const SHARED: bool>(
        &mut self,
        at: SptePos,
        all: u64,
        guest: Guest<'_>,
        owed: &mut Flush,
    ) -> Option<u64> {
        /// The address bits of a frame's place in its region.
        const PLACE: u64 = (ENTRIES as u64 - 1) << 12;
        let mut empty = all;
        if empty == 0 {
            return Some(0);
        }
        let block = at.index() / 64;
        let gptes = &self.memory.host.words_in(guest.contents).as_chunks::<64>().0[block];
        let first = Gpte(gptes[empty.trailing_zeros() as usize % 64]);
        if first.0 & (PT_P | PT_A | guest.role.reserved[1][0]) != PT_P | PT_A {
            return None;
        }
        let access = first.protect_clean(guest.granted.and(first.access()));
        let Some(mut near) = self.memory.near(first.gfn()) else { return Some(all) };
        let page = self.arena.block_mut(at);
        let gptes = &near.words_in(guest.contents).as_chunks::<64>().0[block];
        // What frame 0 of the region has; the others differ in their place.
        let region = Gfn(first.gfn().0 & !(ENTRIES as u64 - 1));
        let (bits, from) = (leaf_bits(region, access), region.0 << 3 | u64::from(access.0));
        // The longest list that grew, and the frame whose list grew last.
        let (mut count, mut longest, mut last) = (0, 0, region);
        while empty != 0 && longest <= RMAP_RECYCLE {
            let index = empty.trailing_zeros() as usize % 64;
            let place = gptes[index] & PLACE;
            if gptes[index] & !PLACE != first.0 & !PLACE {
                break;
            }
            let (gfn, pos) = (Gfn(region.0 | place >> 12), SptePos(at.0 + index as u32));
            if SHARED {
                let Some(frame) = near.plain_frame_here(gfn, access) else { break };
                longest = longest.max(self.lists.add(&mut frame.rmap, pos));
                last = gfn;
            } else {
                let Some(frame) = near.free_frame_here(gfn, access) else { break };
                frame.rmap = RmapHead::one(pos);
            }
            page.sptes[index] = bits | place;
            page.shadowed[index] = from | place >> 9;
            count += 1;
            empty &= empty - 1;
        }
        *page.used |= all ^ empty;
        self.counters.pages_4k += count;
        self.counters.x_prefetched += count;
        *owed += self.rmap_grew(last, Level::PT, longest);
        Some(empty)
    }
}

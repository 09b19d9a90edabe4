//! The short way to make leaves of plain RAM: empty entries of a level-1 page with gptes, for frames that the host has and
//! may write, with no table in them and no log of writes. It comes to the same as `make`, which does all others.

use crate::bits::{PT_A, PT_D, PT_NX, PT_P, PT_U, PT_W};
use crate::config::PREFETCH;
use crate::cpu::CpuRole;
use crate::events::EventKind;
use crate::guest::gpte::Gpte;
use crate::memory::{Contents, Host, Near};
use crate::mode::Mode;
use crate::shadow::spte::{HOST_WRITABLE, MMU_WRITABLE, SHADOW_PRESENT, Spte, sptep};
use crate::shadow::{Flush, Shadow};
use crate::types::{Access, ENTRIES, Gfn, Level, SptePos};
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
        let mut near = self.memory.near(gfn)?;
        let frame = near.plain_frame_here(gfn, access)?;
        let before = self.lists.add(&mut frame.rmap, pos);
        let bits = leaf_bits(gfn, access) | mark;
        self.arena.set_leaf(pos, Spte(bits), gfn, access);
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

    /// Gives W to a leaf `old` that a store faulted on (`make_spte`, 6.1), of a frame that is not write-tracked and otherwise
    /// plain; `tables` that lie in it go out of step. `None`, and nothing done, if it is not plain. Nothing that the CPU may
    /// hold goes away, so that no flush is owed.
    #[inline(always)]
    pub(crate) fn unprotect_plain_leaf(
        &mut self,
        (pos, old): (SptePos, Spte),
        gfn: Gfn,
        access: Access,
        tables: bool,
    ) -> Option<()> {
        debug_assert!(old == self.spte(pos) && old.lacks_w());
        if old.pfn() != Host::pfn(gfn) {
            return None;
        }
        if tables {
            if !self.policy.unsyncs_like_kvm() {
                return None;
            }
            let allowed = self.unsync_tables(gfn, true, false);
            debug_assert!(allowed, "nothing else forbids it");
        }
        let new = Spte(leaf_bits(gfn, access) | PT_A);
        debug_assert!(access.has(Access::W) && !old.update_needs_flush(new) && self.arena.mapped_gfn(pos) == gfn);
        self.arena.update_leaf(pos, new, gfn, access);
        Some(())
    }

    /// Whether there may be neighbours to fill. Often there are none: all are there, or the first that is not has nothing
    /// behind it. An MMIO entry is none of either.
    #[inline(always)]
    pub(crate) fn may_prefetch(&self, pos: SptePos, contents: Contents, role: &CpuRole) -> bool {
        if role.mode.entry_bytes != 8 || self.has_mmio || !self.policy.prefetches_like_kvm() {
            return true;
        }
        let start = pos.index() & !(PREFETCH - 1);
        let there = self.arena[pos.page()].used[start / 64] >> (start % 64);
        let first = (there as u8).trailing_ones() as usize;
        let gpte = self.memory.host.words_in(contents)[(start + first) % ENTRIES];
        first < PREFETCH && gpte & (PT_P | PT_A) == PT_P | PT_A
    }

    /// Fills the neighbours of a faulting entry, up to the first whose guest entry cannot be mapped without a fault
    /// (`FNAME(pte_prefetch)`, 6.1).
    #[inline(never)]
    pub(crate) fn prefetch_group(&mut self, pos: SptePos, guest: Guest<'_>) -> Flush {
        let (id, mut owed) = (pos.page(), Flush::NONE);
        let width = self.prefetch_width(id);
        let first = pos.index() & !(width - 1);
        let bytes = guest.role.mode.entry_bytes;
        let half = if bytes == 4 { self.arena[id].role.quadrant() } else { 0 };
        let (mut index, end) = (first, first + width);
        while index < end {
            index = self.prefetch_run(pos, index..end, guest, &mut owed);
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

    /// The same as far as all is plain. Returns the entry where it is not so, or the end. It raises no events, and leaves
    /// tables with small entries alone.
    #[inline]
    fn prefetch_run(&mut self, pos: SptePos, indexes: Range<usize>, guest: Guest<'_>, owed: &mut Flush) -> usize {
        let (id, end) = (pos.page(), indexes.end);
        let mut index = indexes.start;
        if guest.role.mode.entry_bytes != 8 || self.events.wants(EventKind::SetSpte) {
            return index;
        }
        let (marks, usable) = (PT_P | PT_A, PT_P | PT_A | guest.role.reserved[1][0]);
        loop {
            // Past what is there already, to the first frame: the others are expected around it.
            let sptes = self.arena.sptes(id);
            while index < end && (index == pos.index() || Spte(sptes[index % ENTRIES]).present()) {
                index += 1;
            }
            if index == end {
                return end;
            }
            let gpte = self.memory.host.words_in(guest.contents)[index % ENTRIES];
            if gpte & usable != marks {
                return if sptes[index % ENTRIES] == 0 { end } else { index };
            }
            let stopped = self.prefetch_alike(pos, index..end, Gpte(gpte), guest, owed);
            if stopped == index {
                return index;
            }
            index = stopped;
        }
    }

    /// Makes leaves of entries that are like the first but for the frame, all of one region of 2 MiB. Returns where that
    /// ends, or something else is to be done.
    #[inline(always)]
    fn prefetch_alike(
        &mut self,
        pos: SptePos,
        indexes: Range<usize>,
        first: Gpte,
        guest: Guest<'_>,
        owed: &mut Flush,
    ) -> usize {
        let access = first.protect_clean(guest.granted.and(first.access()));
        let (id, mut index) = (pos.page(), indexes.start);
        // One word of the set of entries at a time.
        let (word, end) = (index / 64 % (ENTRIES / 64), indexes.end.min((index | 63) + 1));
        let page = self.arena.page_mut(id);
        let Some(mut near) = self.memory.near(first.gfn()).filter(Near::is_whole) else { return index };
        let words = &near.host.words_in(guest.contents)[index..end];
        let entries = page.sptes[index..end].iter_mut().zip(&mut page.shadowed[index..end]).zip(words);
        // The leaf of frame 0 of the region; those of the others differ in their address bits.
        let bits = leaf_bits(Gfn(first.gfn().0 & !(ENTRIES as u64 - 1)), access);
        let (mut made, mut count, mut grown) = (0_u64, 0, None);
        for ((spte, shadowed), gpte) in entries {
            // All but the frame's place in its region must be the same.
            if (gpte ^ first.0) & !((ENTRIES as u64 - 1) << 12) != 0 {
                break;
            }
            if *spte == 0 && index != pos.index() {
                let gfn = Gpte(*gpte).gfn();
                let Some(frame) = near.plain_frame_here(gfn, access) else { break };
                let before = self.lists.add(&mut frame.rmap, id.entry(index));
                *spte = bits | gpte & (ENTRIES as u64 - 1) << 12;
                *shadowed = gfn.0 << 3 | u64::from(access.0);
                made |= 1 << (index % 64);
                count += 1;
                if before > 0 {
                    grown = Some((gfn, before));
                    index += 1;
                    break;
                }
            } else if index != pos.index() && !Spte(*spte).present() {
                break;
            }
            index += 1;
        }
        page.used[word] |= made;
        self.counters.pages_4k += count;
        self.counters.x_prefetched += count;
        if let Some((gfn, before)) = grown {
            *owed += self.rmap_grew(gfn, Level::PT, before);
        }
        index
    }
}

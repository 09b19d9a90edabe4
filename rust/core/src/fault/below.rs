//! The short way for faults below a directory whose last-level table is not remembered, or not there yet.

use crate::bits::PT_A;
use crate::config::MIN_FREE_PAGES;
use crate::cpu::AccessRow;
use crate::fault::Ctx;
use crate::fault::quick::{LastTable, Quick, Translation};
use crate::guest::gpte::Gpte;
use crate::role::Role;
use crate::shadow::spte::Spte;
use crate::types::{ErrorCode, Gfn, Gva, Level, PageId, SptePos};

/// A last-level table of the guest.
#[derive(Clone, Copy)]
struct Below {
    /// The guest's entry in the directory that names it.
    pde: Gpte,
    /// What is in it, and the rights above it.
    last: LastTable,
    /// The role of the shadow's table.
    wanted: Role,
}

impl Ctx<'_> {
    /// Handles the fault of an address to whose last-level tables no way is remembered. `None`, and nothing of the access
    /// done, if one is now: the fault can go it.
    #[inline(never)]
    pub(super) fn fault_below(&mut self, root: PageId, gva: Gva, row: AccessRow, code: ErrorCode) -> Option<Quick> {
        let way = loop {
            if let Some(way) = self.ways.find_directory(root, gva, self.shadow) {
                break way;
            }
            if !self.seek_way(root, gva) {
                return Some(Quick::No);
            }
            if self.ways.find(root, gva, self.shadow).is_some() {
                return None;
            }
        };
        let pde = self.entry_in(way.contents(&self.shadow.memory.host), gva, Level::PD);
        if !pde.leads_on(&self.vcpu.role, Level::PD) {
            return Some(Quick::No);
        }
        let (pos, granted) = (way.directory().entry(gva.index(Level::PD)), way.granted().and(pde.access()));
        let wanted = way.role_below(pos, granted);
        let Some(near) = self.shadow.memory.near(pde.gfn()) else {
            // The whole way takes it; the next one finds the region open if it can be.
            self.shadow.memory.opens(pde.gfn());
            return Some(Quick::No);
        };
        if !near.is_plain(pde.gfn()) {
            return Some(Quick::No);
        }
        let last = LastTable { contents: near.contents(pde.gfn()), granted };
        if self.shadow.spte(pos) == Spte::EMPTY {
            return self.fault_without_table(gva, (row, code), pos, Below { pde, last, wanted });
        }
        if !self.shadow.is_linked(pos, pde.gfn(), wanted) {
            return Some(Quick::No);
        }
        self.ways.remember(gva, self.shadow.spte(pos).child(), (pde, last.contents, last.granted));
        None
    }

    /// The same where the shadow has no table yet: it gets one (`FNAME(fetch)`, 6.1). Nothing is done if the frame of the
    /// address is not plain: what the whole way would refuse after it has linked tables must be known before.
    #[inline(always)]
    fn fault_without_table(
        &mut self,
        gva: Gva,
        (row, code): (AccessRow, ErrorCode),
        pos: SptePos,
        Below { pde, last, wanted }: Below,
    ) -> Option<Quick> {
        // The fault asks for room once, before it links, but the translation may be looked at again.
        if self.shadow.max_pages <= self.shadow.used_pages + MIN_FREE_PAGES {
            return Some(Quick::No);
        }
        let (gfn, access) = match self.plain_translation(last, gva, row) {
            Translation::Page(gfn, access) => (gfn, access),
            Translation::Fault(base) => return Some(Quick::Guest(self.guest_fault(gva, base, code))),
            Translation::Other => return Some(Quick::No),
        };
        if !self.is_plain_frame(gfn) {
            return Some(Quick::No);
        }
        let (table, is_new) = match self.shadow.new_table(pos, pde.gfn(), wanted) {
            Some((table, flush)) => {
                self.pay(flush);
                (table, true)
            }
            None => (self.find_and_link(pos, pde.gfn(), wanted), false),
        };
        if let Some(pages) = self.ways.goes_to_directory(gva, self.shadow.floods) {
            self.shadow.forget_floods(pages);
        }
        self.ways.remember(gva, table, (pde, last.contents, last.granted));
        // A page that was there already may have the entry, and the frame may hold this very table.
        let pos = table.entry(gva.index(Level::PT));
        if !is_new && self.shadow.spte(pos) != Spte::EMPTY {
            return None;
        }
        let owed = self.shadow.set_plain_leaf::<false>(pos, gfn, access, PT_A)?;
        Some(self.after_new_leaf((row, code), (pos, gfn), last, owed))
    }

    #[inline(never)]
    fn find_and_link(&mut self, pos: SptePos, gfn: Gfn, role: Role) -> PageId {
        let table = self.find_child(gfn, role);
        self.link_if_new(pos, Some(table))
    }

    /// Whether a frame may be mapped without more ado.
    #[inline(always)]
    fn is_plain_frame(&mut self, gfn: Gfn) -> bool {
        self.shadow.memory.near(gfn).is_some_and(|near| near.is_plain(gfn))
    }
}

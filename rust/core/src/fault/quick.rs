//! The short way for most faults: a page of RAM behind tables that are linked already.
//!
//! It comes to the same as the whole way in `page_fault` and `fetch`, and leaves everything to it that is not plain: it
//! looks first and changes nothing until all is known. It raises no events, so it is not taken while any are recorded;
//! tests/props compares the two.

use crate::bits::{PT_A, PT_D};
use crate::config::MIN_FREE_PAGES;
use crate::cpu::{AccessRow, Requests, permission_fault};
use crate::fault::Ctx;
use crate::fault::insn::{Action, Insn};
use crate::fault::ways::Way;
use crate::guest::gpte::Gpte;
use crate::guest::walk::{GuestFault, GuestWalk, fault_code};
use crate::memory::{Contents, Host};
use crate::outcome::RetPf;
use crate::shadow::make::Leaf;
use crate::shadow::spte::Spte;
use crate::shadow::{Flush, Guest};
use crate::types::{Access, AccessKind, ErrorCode, Gfn, Gva, Level, PageId, SptePos};

/// What a plain access needs to know of an instruction; everything else about it has its default.
#[derive(Clone, Copy)]
pub(crate) struct Plain {
    pub gva: Gva,
    pub size: u8,
    /// Load, store or fetch, by whom.
    pub row: AccessRow,
    /// KVM counts the store as one that writes page tables (`page_table_writing_insn`, 6.1).
    pub writes_tables: bool,
    /// The value that a store stores; `None` leaves memory as it is, or does not want what a load loads.
    pub value: Option<u64>,
}

impl Plain {
    /// The instruction as a plain access.
    #[inline]
    pub(crate) const fn of(insn: &Insn) -> Option<Self> {
        let kind = match insn.action {
            Action::Load => AccessKind::Read,
            Action::Store => AccessKind::Write,
            Action::Fetch => AccessKind::Fetch,
            Action::Rmw(_) | Action::Copy => return None,
        };
        if insn.rip.is_some() || insn.delivery || insn.system || insn.rep || insn.repeat != 1 || insn.size > 8 {
            return None;
        }
        let value = if insn.keep { None } else { Some(insn.value) };
        let row = AccessRow::of_kind(kind, insn.user, insn.ac);
        Some(Self { gva: insn.gva, size: insn.size, row, writes_tables: insn.writes_tables, value })
    }
}

/// How a fault ended on the short way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Quick {
    /// It did not take it; nothing was done.
    No,
    /// The guest forbids the access; it is to get this fault. The exit is counted.
    Guest(GuestFault),
    /// An entry that maps this frame was made; it allows the access.
    Allowed(Gfn),
    /// The entry there maps the page now, or did already.
    Mapped(SptePos),
    /// The page is write-protected; the store goes to a table of its own walk or not. Its exit is counted, the rest is
    /// to be done.
    Protected { write_to_table: bool },
}

/// The guest's last-level table of an address.
#[derive(Clone, Copy)]
pub(super) struct LastTable {
    /// What is in it.
    pub contents: Contents,
    /// The rights above it.
    pub granted: Access,
}

impl LastTable {
    #[inline(always)]
    pub(super) fn of(way: &Way, host: &Host) -> Self {
        Self { contents: way.contents(host), granted: way.granted }
    }
}

/// What the guest says of an address.
pub(super) enum Translation {
    /// The frame, and the rights that it gives.
    Page(Gfn, Access),
    /// A fault; P and RSVD of its code.
    Fault(ErrorCode),
    /// Nothing plain.
    Other,
}

impl Ctx<'_> {
    /// Handles the fault of an access, if everything about it is plain. `code` has no RSVD, and no events are recorded.
    #[inline(always)]
    pub(crate) fn quick_fault(&mut self, plain: Plain, code: ErrorCode) -> Quick {
        let gva = plain.gva;
        let Some(root) = self.vcpu.root.page() else { return Quick::No };
        let (table, last) = loop {
            if let Some(way) = self.ways.find(root, gva, self.shadow) {
                break (way.table, LastTable::of(way, &self.shadow.memory.host));
            }
            if let Some(end) = self.fault_below(root, gva, plain.row, code) {
                return end;
            }
        };
        let (gfn, access) = match self.plain_translation(last, gva, plain.row) {
            Translation::Page(gfn, access) => (gfn, access),
            Translation::Fault(base) => return Quick::Guest(self.guest_fault(gva, base, code)),
            Translation::Other => return Quick::No,
        };
        // No request is pending, so the root is none that was zapped.
        debug_assert!(self.shadow.is_valid(root));
        if code.has(ErrorCode::P.with(ErrorCode::W)) && self.shadow.write_tracked(gfn) {
            return Quick::No;
        }
        let pos = table.entry(gva.index(Level::PT));
        if self.shadow.spte(pos) == Spte::EMPTY
            && let Some(owed) = self.shadow.set_plain_leaf::<false>(pos, gfn, access, PT_A)
        {
            self.forget_floods(gva);
            return self.after_new_leaf((plain.row, code), (pos, gfn), last, owed);
        }
        let Some((result, owed)) = self.set_quick_leaf(pos, gfn, access, code) else { return Quick::No };
        self.forget_floods(gva);
        self.count_quick(code);
        if result == RetPf::Spurious {
            self.vcpu.counters.pf_spurious += 1;
            self.pay(owed);
            return Quick::Mapped(pos);
        }
        self.vcpu.counters.pf_fixed += u64::from(result == RetPf::Fixed);
        self.pay(owed);
        self.after_leaf(pos, last);
        if result == RetPf::Fixed { Quick::Mapped(pos) } else { self.protected(root, gva, gfn) }
    }

    /// What follows a plain entry that was made where none was.
    #[inline(always)]
    pub(super) fn after_new_leaf(
        &mut self,
        (row, code): (AccessRow, ErrorCode),
        (pos, gfn): (SptePos, Gfn),
        last: LastTable,
        owed: Flush,
    ) -> Quick {
        self.count_quick(code);
        self.vcpu.counters.pf_fixed += 1;
        self.pay(owed);
        self.after_leaf(pos, last);
        if self.vcpu.requests != Requests::default() {
            return Quick::Mapped(pos);
        }
        // What the guest allows, a new entry does: it has every right of the guest's, and A and D.
        debug_assert!(self.vcpu.role.leaf_test(row).passes(self.shadow.spte(pos).0));
        Quick::Allowed(gfn)
    }

    /// The fault is taken.
    #[inline(always)]
    pub(super) fn count_quick(&mut self, code: ErrorCode) {
        self.count_fault(code);
        self.vcpu.counters.pf_taken += 1;
    }

    /// What follows an entry that was made: its neighbours.
    #[inline(always)]
    pub(super) fn after_leaf(&mut self, pos: SptePos, last: LastTable) {
        let guest = Guest { contents: last.contents, granted: last.granted, role: &self.vcpu.role };
        if let Some(owed) = self.shadow.prefetch(pos, guest) {
            self.pay(owed);
        }
        self.keep_unsync_limit();
    }

    /// The fault is taken, and is the guest's own.
    #[inline(always)]
    pub(crate) fn guest_fault(&mut self, gva: Gva, base: ErrorCode, code: ErrorCode) -> GuestFault {
        self.count_quick(code);
        GuestFault { address: gva, code: fault_code(&self.vcpu.role, base, code) }
    }

    #[cold]
    fn protected(&mut self, root: PageId, gva: Gva, gfn: Gfn) -> Quick {
        if self.ways.walk(root, gva, self.shadow).is_none() {
            // Another GiB has the place of its directory.
            self.seek_way(root, gva);
        }
        let walk = self.ways.walk(root, gva, self.shadow);
        Quick::Protected { write_to_table: walk.is_some_and(|walk| self.writes_own_table(&GuestWalk { gfn, ..walk })) }
    }

    /// The leaf where an entry is already, or a table lies in the page.
    fn set_quick_leaf(&mut self, pos: SptePos, gfn: Gfn, access: Access, code: ErrorCode) -> Option<(RetPf, Flush)> {
        let write = code.has(ErrorCode::W);
        let slot = self.shadow.memory.slot(gfn)?;
        if slot.readonly || !self.shadow.memory.host.state(gfn).writable() {
            return None;
        }
        let leaf = Leaf { gfn, access, pfn: Some(Host::pfn(gfn)), host_writable: true, prefetch: false, write };
        Some(self.shadow.set_leaf(pos, &leaf))
    }

    /// The guest's entry for an address in a table of which the contents are known.
    #[inline(always)]
    pub(super) fn entry_in(&self, contents: Contents, gva: Gva, level: Level) -> Gpte {
        let (host, mode) = (&self.shadow.memory.host, self.vcpu.role.mode);
        Gpte(match mode.entry_bytes {
            8 => host.words_in(contents)[gva.index(level)],
            bytes => host.entry_in(contents, mode.index(gva, level), bytes),
        })
    }

    /// What the guest's last-level entry says.
    #[inline(always)]
    pub(super) fn plain_translation(&self, last: LastTable, gva: Gva, row: AccessRow) -> Translation {
        let (role, granted) = (&self.vcpu.role, last.granted);
        let gpte = self.entry_in(last.contents, gva, Level::PT);
        if !gpte.present() {
            return Translation::Fault(ErrorCode(0));
        }
        let room = self.shadow.max_pages >= self.shadow.used_pages + MIN_FREE_PAGES;
        if role.guest_test(row).passes(gpte.0, granted) && room {
            return Translation::Page(gpte.gfn(), gpte.protect_clean(granted.and(gpte.access())));
        }
        self.other_translation(gpte, granted, row)
    }

    /// What an entry says that is present but not in order at first sight.
    #[inline(never)]
    fn other_translation(&self, gpte: Gpte, granted: Access, row: AccessRow) -> Translation {
        let (role, write) = (&self.vcpu.role, row.is_store());
        if gpte.has_reserved(role, Level::PT) {
            return Translation::Fault(ErrorCode::P.with(ErrorCode::RSVD));
        }
        let granted = granted.and(gpte.access());
        if permission_fault(role, granted, row.code(), row.ac()) {
            return Translation::Fault(ErrorCode::P);
        }
        // Without the marks the walk would write the entry. A page that the supervisor may write although it is read-only
        // (CR0.WP off) becomes another page.
        let marks = if write { PT_A | PT_D } else { PT_A };
        let room = self.shadow.max_pages >= self.shadow.used_pages + MIN_FREE_PAGES;
        if gpte.0 & marks != marks || write && !granted.has(Access::W) || !room {
            return Translation::Other;
        }
        Translation::Page(gpte.gfn(), gpte.protect_clean(granted))
    }
}

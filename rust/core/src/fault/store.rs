//! The short way for stores to pages that the shadow maps read-only: one that is write-tracked, where the store is emulated,
//! and one that only lost W, because the guest or a table in it was to be seen by the MMU.
//!
//! As in `quick`, what it does comes to the same as the whole way, no events are recorded, and whatever is not plain is left
//! to the others before anything was done.

use crate::cpu::{AccessRow, Requests};
use crate::fault::Ctx;
use crate::fault::emulate::APIC_GFN;
use crate::fault::quick::{LastTable, Plain, Translation};
use crate::memory::Contents;
use crate::types::{ErrorCode, Gpa, Gva, PageId, SptePos};

/// How a store ended on this way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Written {
    /// It did not take it; nothing was done.
    No,
    /// The guest forbids it. Nothing was done; the fault has these bits beside those of the access.
    Forbidden(ErrorCode),
    /// The store was emulated; the guest is to be entered.
    Emulated,
    /// The page is writable now, and the store made.
    Made,
    /// It is, but KVM has something to do before the store is tried again.
    Again,
}

/// The code of the fault of a store to a page that is mapped.
#[inline(always)]
pub(crate) const fn store_code(row: AccessRow) -> ErrorCode {
    ErrorCode::P.with(ErrorCode::W).with(ErrorCode::U.when(row.user()))
}

impl Ctx<'_> {
    /// Handles the fault of a store to a page that the leaf at `pos` maps without W. No events are recorded.
    #[inline(always)]
    pub(crate) fn quick_write(&mut self, pos: SptePos, plain: Plain) -> Written {
        let gva = plain.gva;
        let Some(root) = self.vcpu.root.page() else { return Written::No };
        let Some(way) = self.ways.find(root, gva, self.shadow) else {
            let Plain { gva, size, row, writes_tables, value } = plain;
            return self.seek_to_write(root, pos, gva, (size, row, writes_tables), value);
        };
        // Behind a link that is not what the guest's tables say now, the whole way makes another.
        if way.table != pos.page() {
            return Written::No;
        }
        let last = LastTable::of(way, &self.shadow.memory.host);
        let (gfn, access) = match self.plain_translation(last, gva, plain.row) {
            Translation::Page(gfn, access) => (gfn, access),
            Translation::Fault(base) => return Written::Forbidden(base),
            Translation::Other => return Written::No,
        };
        let Some(mut near) = self.shadow.memory.near(gfn) else {
            // The whole way takes it; the next one finds the region open if it can be.
            self.shadow.memory.opens(gfn);
            return Written::No;
        };
        let Some(frame) = near.writable_frame(gfn).copied() else { return Written::No };
        let (contents, gpa) = (near.contents(gfn), Gpa(gfn.gpa().0 | gva.offset()));
        if frame.track > 0 {
            let Plain { gva, size, row, writes_tables, value } = plain;
            let Some(value) = value.filter(|_| writes_tables) else { return Written::No };
            return self.store_to_table(gpa, contents, gva, size, row, value);
        }
        if !self.shadow.unprotect_plain_leaf(pos, gfn, access, frame.tables) {
            return Written::No;
        }
        self.forget_floods(gva);
        self.count_quick(store_code(plain.row));
        self.vcpu.counters.pf_fixed += 1;
        self.after_leaf(pos, last);
        // A prefetch may owe a flush; then the store is made when it is paid.
        if self.vcpu.requests != Requests::default() {
            return Written::Again;
        }
        if let Some(value) = plain.value {
            self.shadow.memory.host.write_in(contents, gpa, plain.size, value);
        }
        Written::Made
    }

    /// The same where no way to the last-level tables is remembered. It is looked for, apart from the way of most. What the
    /// access is comes in pieces, so that most need not have it in memory.
    #[inline(never)]
    fn seek_to_write(
        &mut self,
        root: PageId,
        pos: SptePos,
        gva: Gva,
        (size, row, writes_tables): (u8, AccessRow, bool),
        value: Option<u64>,
    ) -> Written {
        let plain = Plain { gva, size, row, writes_tables, value };
        if self.seek_last_way(root, gva) { self.quick_write(pos, plain) } else { Written::No }
    }

    /// A store to a write-tracked page, emulated (`x86_emulate_instruction`, 6.1).
    #[inline(never)]
    fn store_to_table(
        &mut self,
        gpa: Gpa,
        contents: Contents,
        gva: Gva,
        size: u8,
        row: AccessRow,
        value: u64,
    ) -> Written {
        let (generation, gfn) = (self.shadow.memory.generation, gpa.gfn());
        if self.vcpu.mmio_matches(gva, generation) || self.vcpu.mmio_gfn_matches(gfn, generation) || gfn.0 == APIC_GFN {
            return Written::No;
        }
        self.count_quick(store_code(row));
        let counters = &mut self.vcpu.counters;
        counters.pf_emulate += 1;
        counters.insn_emulation += 1;
        self.forget_floods(gva);
        // Of the place where an instruction was last resumed only 6.12 still knows after another write, if it is this one.
        if !self.shadow.config.kernel.retry_needs_zap || self.vcpu.last_retry != (0, gva.0) {
            self.vcpu.last_retry = (0, 0);
        }
        if size == 8 && gpa.0.is_multiple_of(8) && self.shadow.indirect_pages > 0 {
            // What is left of `write_ram` for a whole entry in plain memory.
            self.shadow.memory.host.write_in(contents, gpa, 8, value);
            let flush = self.shadow.entry_written(gpa, 8, value, &self.vcpu.role);
            self.pay(flush);
        } else {
            self.write_ram(false, gpa, size, u128::from(value));
        }
        Written::Emulated
    }
}

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
use crate::shadow::Flush;
use crate::shadow::spte::Spte;
use crate::types::{ErrorCode, Gpa, Gva, SptePos};

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
    /// Handles the fault of a store to a page that `leaf` at `pos` maps without W. `stored` is what it stores, if KVM
    /// counts it as one that writes page tables and the value is known. No events are recorded.
    #[inline(always)]
    pub(crate) fn quick_write(&mut self, (pos, leaf): (SptePos, Spte), plain: Plain, stored: Option<u64>) -> Written {
        let (gva, code) = (plain.gva, store_code(plain.row));
        let Some(root) = self.vcpu.root.page() else { return Written::No };
        let last = loop {
            if let Some(way) = self.ways.find(root, gva, self.shadow) {
                // Behind a link that is not what the guest's tables say now, the whole way makes another.
                if way.table != pos.page() {
                    return Written::No;
                }
                break LastTable::of(way, &self.shadow.memory.host);
            }
            if !self.seek_last_way(root, gva) {
                return Written::No;
            }
        };
        let (gfn, access) = match self.plain_translation(last, gva, code, plain.row) {
            Translation::Page(gfn, access) => (gfn, access),
            Translation::Fault(base) => return Written::Forbidden(base),
            Translation::Other => return Written::No,
        };
        let Some(mut near) = self.shadow.memory.near(gfn) else { return Written::No };
        let Some(frame) = near.writable_frame(gfn).copied() else { return Written::No };
        let (contents, gpa) = (near.contents(gfn), Gpa(gfn.gpa().0 | gva.offset()));
        if frame.track > 0 {
            let Some(value) = stored else { return Written::No };
            return self.store_to_table((gpa, contents), gva, (plain.size, value), code);
        }
        if self.shadow.unprotect_plain_leaf((pos, leaf), gfn, access, frame.tables > 0).is_none() {
            return Written::No;
        }
        self.count_quick(gva, code);
        self.vcpu.counters.pf_fixed += 1;
        self.after_leaf(pos, last, Flush::NONE);
        // A prefetch may owe a flush; then the store is made when it is paid.
        if self.vcpu.requests != Requests::default() {
            return Written::Again;
        }
        if let Some(value) = plain.value {
            self.shadow.memory.host.write_in(contents, gpa, plain.size, value);
        }
        Written::Made
    }

    /// A store to a write-tracked page, emulated (`x86_emulate_instruction`, 6.1).
    #[inline(never)]
    fn store_to_table(
        &mut self,
        (gpa, contents): (Gpa, Contents),
        gva: Gva,
        (size, value): (u8, u64),
        code: ErrorCode,
    ) -> Written {
        let (generation, gfn) = (self.shadow.memory.generation, gpa.gfn());
        if self.vcpu.mmio_matches(gva, generation) || self.vcpu.mmio_gfn_matches(gfn, generation) || gfn.0 == APIC_GFN {
            return Written::No;
        }
        self.count_fault(code);
        let counters = &mut self.vcpu.counters;
        counters.pf_taken += 1;
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

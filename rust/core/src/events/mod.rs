//! KVM's tracepoints, as a table: name, meaning of the fields, and the text form of the kernel's line.
//!
//! An [`Event`] is a flat record, so that millions of them fit in one array. Which fields a kind uses is in its row.

mod text;

use crate::outcome::RetPf;
use crate::types::{Access, ErrorCode, Gpa, Gva};
use serde::{Deserialize, Serialize};

macro_rules! events {
    ($($code:literal $name:ident $text:literal $doc:literal;)*) => {
        /// The kind of an event: one of the kernel's tracepoints.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum EventKind {
            $(#[doc = $doc] $name = $code,)*
        }

        /// Code, tracepoint name and fields of every kind.
        pub const EVENTS: &[(u8, &str, &str)] = &[$(($code, $text, $doc),)*];

        impl EventKind {
            /// Every kind, in the order of its code.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The tracepoint's name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

events! {
    0 Exit "kvm_exit" "a VM exit: code = reason, a = rip, b = info1";
    1 PageFault "kvm_page_fault" "a #PF exit: a = rip, b = address, code = error code";
    2 PagetableWalk "kvm_mmu_pagetable_walk" "a guest walk begins: a = address, code = access";
    3 PagingElement "kvm_mmu_paging_element" "a guest entry was read: a = entry, level";
    4 SetAccessedBit "kvm_mmu_set_accessed_bit" "A was set in the guest entry at gpa a";
    5 SetDirtyBit "kvm_mmu_set_dirty_bit" "D was set in the guest entry at gpa a";
    6 WalkerError "kvm_mmu_walker_error" "the guest walk failed: code = error code";
    7 GetPage "kvm_mmu_get_page" "a shadow page was found (flag bit 1 clear) or made (set): a = gfn, code = role, b = root count, level = generation, flag bit 0 = unsync";
    8 SyncPage "kvm_mmu_sync_page" "a shadow page stops being unsync: fields as kvm_mmu_get_page";
    9 UnsyncPage "kvm_mmu_unsync_page" "a shadow page becomes unsync: fields as kvm_mmu_get_page";
    10 PrepareZapPage "kvm_mmu_prepare_zap_page" "a shadow page is zapped: fields as kvm_mmu_get_page";
    11 MarkMmioSpte "mark_mmio_spte" "an MMIO entry is written: a = address of the entry, b = gfn, code = access, c = generation";
    12 HandleMmioPageFault "handle_mmio_page_fault" "a fault on a valid MMIO entry: a = address, b = gfn, code = access";
    13 CheckMmioSpte "check_mmio_spte" "an MMIO entry's generation is compared: a = entry, b = KVM's generation, c = the entry's";
    14 FastPageFault "fast_page_fault" "a fault is tried without the lock: a = address, code = error code, b = entry before, c = address of the entry, flag bit 0 = spurious, bit 1 = fixed (W is set now)";
    15 SpteRequested "kvm_mmu_spte_requested" "an entry is about to be made: a = gfn, b = pfn (bit 63 alone: no slot), level";
    16 SetSpte "kvm_mmu_set_spte" "an entry was written: a = gfn, b = entry, c = address of the entry, level";
    17 ZapAllFast "kvm_mmu_zap_all_fast" "all shadow pages become obsolete: level = old generation, a = used pages";
    18 EmulateInsn "kvm_emulate_insn" "the emulator decodes an instruction: a = rip, flag = failed";
    19 InjException "kvm_inj_exception" "an exception goes to the guest: level = vector, code = error code, flag = reinjected";
    20 MatchMmio "vcpu_match_mmio" "the MMIO cache answers: a = gva, b = gpa, flag bit 0 = write, bit 1 = matched by gpa";
    21 Mmio "kvm_mmio" "an MMIO access: flag 0 unsatisfied read, 1 read, 2 write; level = length, a = gpa, b = value";
    22 UnmapHvaRange "kvm_unmap_hva_range" "MMU notifier: unmap, a = first gpa, b = last gpa + 1";
    23 SetSpteHva "kvm_set_spte_hva" "MMU notifier: change of one page, a = gpa";
}

/// A result of [`crate::engine`]'s `kvm_exit`: SVM's exit reasons that occur here, in the kernel's words.
pub const EXIT_REASONS: &[&str] =
    &["PF excp", "hlt", "io", "write_cr0", "cr0_sel_write", "write_cr3", "write_cr4", "invlpg", "msr", "invpcid"];

/// One event.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Number of the operation that raised it, counted from 0 over the VM's life.
    pub op: u64,
    /// See [`EVENTS`].
    pub a: u64,
    /// See [`EVENTS`].
    pub b: u64,
    /// See [`EVENTS`].
    pub c: u64,
    /// See [`EVENTS`].
    pub code: u32,
    /// What happened.
    pub kind: EventKind,
    /// The vCPU on which it happened.
    pub vcpu: u8,
    /// See [`EVENTS`].
    pub level: u8,
    /// See [`EVENTS`].
    pub flag: u8,
}

/// What a shadow page's events tell of it.
#[derive(Clone, Copy, Debug)]
pub struct PageText {
    /// The generation it belongs to.
    pub generation: u8,
    /// The guest frame it shadows.
    pub gfn: u64,
    /// The role's word.
    pub role: u32,
    /// How many roots it is.
    pub root_count: u32,
    /// Whether it is unsync.
    pub unsync: bool,
}

/// Records the kinds that were asked for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct EventLog {
    mask: u32,
    /// The operation under way.
    pub op: u64,
    /// The vCPU under way.
    pub vcpu: u8,
    records: Vec<Event>,
}

impl EventLog {
    /// A log of the kinds whose bit is set in `mask`.
    #[must_use]
    pub fn new(mask: u32) -> Self {
        Self { mask, op: 0, vcpu: 0, records: Vec::new() }
    }

    /// Records the kinds in `mask` from now on; what was recorded stays.
    pub const fn set_mask(&mut self, mask: u32) {
        self.mask = mask;
    }

    /// What is recorded.
    #[must_use]
    pub const fn mask(&self) -> u32 {
        self.mask
    }

    /// The mask that records everything.
    pub const EVERYTHING: u32 = (1 << EVENTS.len()) - 1;

    /// Whether that kind is recorded.
    #[inline]
    #[must_use]
    pub fn wants(&self, kind: EventKind) -> bool {
        self.mask & (1 << kind as u32) != 0
    }

    /// Whether any kind is recorded.
    #[inline]
    #[must_use]
    pub const fn wants_any(&self) -> bool {
        self.mask != 0
    }

    /// What was recorded so far.
    #[must_use]
    pub fn records(&self) -> &[Event] {
        &self.records
    }

    /// Takes the records away.
    pub fn take(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.records)
    }

    #[inline]
    fn push(&mut self, kind: EventKind, fill: impl FnOnce(&mut Event)) {
        if self.wants(kind) {
            self.push_wanted(kind, fill);
        }
    }

    /// Apart, so that who raises an event that nobody wants carries nothing of this.
    #[inline(never)]
    fn push_wanted(&mut self, kind: EventKind, fill: impl FnOnce(&mut Event)) {
        let mut event = Event { op: self.op, a: 0, b: 0, c: 0, code: 0, kind, vcpu: self.vcpu, level: 0, flag: 0 };
        fill(&mut event);
        self.records.push(event);
    }

    /// `kvm_exit`.
    pub fn exit(&mut self, reason: usize, rip: u64, info1: u64) {
        self.push(EventKind::Exit, move |e| (e.code, e.a, e.b) = (reason as u32, rip, info1));
    }

    /// `kvm_page_fault`.
    pub fn page_fault(&mut self, rip: u64, address: Gva, code: ErrorCode) {
        self.push(EventKind::PageFault, move |e| (e.a, e.b, e.code) = (rip, address.0, code.0 as u32));
    }

    /// `kvm_mmu_pagetable_walk`.
    pub fn pagetable_walk(&mut self, address: Gva, access: ErrorCode) {
        self.push(EventKind::PagetableWalk, move |e| (e.a, e.code) = (address.0, access.0 as u32));
    }

    /// `kvm_mmu_paging_element`.
    pub fn paging_element(&mut self, pte: u64, level: u8) {
        self.push(EventKind::PagingElement, move |e| (e.a, e.level) = (pte, level));
    }

    /// `kvm_mmu_set_accessed_bit`.
    pub fn set_accessed_bit(&mut self, gpa: Gpa) {
        self.push(EventKind::SetAccessedBit, move |e| e.a = gpa.0);
    }

    /// `kvm_mmu_set_dirty_bit`.
    pub fn set_dirty_bit(&mut self, gpa: Gpa) {
        self.push(EventKind::SetDirtyBit, move |e| e.a = gpa.0);
    }

    /// `kvm_mmu_walker_error`.
    pub fn walker_error(&mut self, code: ErrorCode) {
        self.push(EventKind::WalkerError, move |e| e.code = code.0 as u32);
    }

    /// One of the events that show a shadow page.
    pub fn page(&mut self, kind: EventKind, page: impl FnOnce() -> PageText, created: bool) {
        self.push(kind, move |e| {
            let p = page();
            (e.a, e.b, e.code, e.level) = (p.gfn, u64::from(p.root_count), p.role, p.generation);
            e.flag = u8::from(p.unsync) | u8::from(created) << 1;
        });
    }

    /// `mark_mmio_spte`.
    pub fn mark_mmio_spte(&mut self, sptep: u64, gfn: u64, access: u32, generation: u64) {
        self.push(EventKind::MarkMmioSpte, move |e| (e.a, e.b, e.code, e.c) = (sptep, gfn, access, generation));
    }

    /// `handle_mmio_page_fault`.
    pub fn handle_mmio_page_fault(&mut self, address: Gva, gfn: u64, access: Access) {
        self.push(EventKind::HandleMmioPageFault, move |e| (e.a, e.b, e.code) = (address.0, gfn, u32::from(access.0)));
    }

    /// `check_mmio_spte`.
    pub fn check_mmio_spte(&mut self, spte: u64, kvm_generation: u64, spte_generation: u64) {
        self.push(EventKind::CheckMmioSpte, move |e| (e.a, e.b, e.c) = (spte, kvm_generation, spte_generation));
    }

    /// `kvm_mmu_spte_requested`; `pfn` is `None` for a frame without a slot.
    pub fn spte_requested(&mut self, gfn: u64, pfn: Option<u64>, level: u8) {
        self.push(EventKind::SpteRequested, move |e| (e.a, e.b, e.level) = (gfn, pfn.unwrap_or(1 << 63), level));
    }

    /// `kvm_mmu_set_spte`.
    pub fn set_spte(&mut self, gfn: u64, spte: u64, sptep: u64, level: u8) {
        self.push(EventKind::SetSpte, move |e| (e.a, e.b, e.c, e.level) = (gfn, spte, sptep, level));
    }

    /// `fast_page_fault`.
    pub fn fast_page_fault(&mut self, address: Gva, code: ErrorCode, old: u64, sptep: u64, result: RetPf) {
        self.push(EventKind::FastPageFault, move |e| {
            (e.a, e.code, e.b, e.c) = (address.0, code.0 as u32, old, sptep);
            e.flag = u8::from(result == RetPf::Spurious) | u8::from(result == RetPf::Fixed) << 1;
        });
    }

    /// `kvm_mmu_zap_all_fast`.
    pub fn zap_all_fast(&mut self, generation: u8, used: u64) {
        self.push(EventKind::ZapAllFast, move |e| (e.level, e.a) = (generation, used));
    }

    /// `kvm_emulate_insn`.
    pub fn emulate_insn(&mut self, rip: u64, failed: bool) {
        self.push(EventKind::EmulateInsn, move |e| (e.a, e.flag) = (rip, u8::from(failed)));
    }

    /// `kvm_inj_exception`.
    pub fn inj_exception(&mut self, vector: u8, code: u32, reinjected: bool) {
        self.push(EventKind::InjException, move |e| (e.level, e.code, e.flag) = (vector, code, u8::from(reinjected)));
    }

    /// `vcpu_match_mmio`.
    pub fn match_mmio(&mut self, gva: Gva, gpa: Gpa, write: bool, by_gpa: bool) {
        self.push(EventKind::MatchMmio, move |e| {
            (e.a, e.b, e.flag) = (gva.0, gpa.0, u8::from(write) | u8::from(by_gpa) << 1);
        });
    }

    /// `kvm_mmio`: 0 unsatisfied read, 1 read, 2 write.
    pub fn mmio(&mut self, what: u8, len: u8, gpa: Gpa, value: u64) {
        self.push(EventKind::Mmio, move |e| (e.flag, e.level, e.a, e.b) = (what, len, gpa.0, value));
    }

    /// `kvm_unmap_hva_range`.
    pub fn unmap_hva_range(&mut self, first: Gpa, end: Gpa) {
        self.push(EventKind::UnmapHvaRange, move |e| (e.a, e.b) = (first.0, end.0));
    }

    /// `kvm_set_spte_hva`.
    pub fn set_spte_hva(&mut self, gpa: Gpa) {
        self.push(EventKind::SetSpteHva, move |e| e.a = gpa.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_kernels_shape() {
        let mut log = EventLog::new(EventLog::EVERYTHING);
        log.pagetable_walk(Gva(0x6320), ErrorCode(2));
        log.set_spte(0x400, 0x8000_0000_31fa_0e63, 0xa47_3000, 1);
        log.page(
            EventKind::GetPage,
            || PageText { generation: 0, gfn: 2, role: 0x3703, root_count: 0, unsync: false },
            true,
        );
        let lines: Vec<_> = log.records().iter().map(ToString::to_string).collect();
        assert_eq!(lines[0], "kvm_mmu_pagetable_walk: addr 6320 pferr 2 W");
        assert_eq!(lines[1], "kvm_mmu_set_spte: gfn 400 spte 8000000031fa0e63 (rw--) level 1 at a473000");
        assert_eq!(lines[2], "kvm_mmu_get_page: sp gen 0 gfn 2 l3 8-byte q0 wux nxe ad root 0 sync new");
    }

    #[test]
    fn what_is_not_asked_for_is_not_recorded() {
        let mut log = EventLog::new(1 << EventKind::SetDirtyBit as u32);
        log.set_accessed_bit(Gpa(8));
        log.set_dirty_bit(Gpa(8));
        assert_eq!(log.take().len(), 1);
        assert!(log.records().is_empty());
    }
}

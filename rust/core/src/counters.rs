//! KVM's statistics, as a table: scope, kind, name, meaning. Ours begin with `x_`.

use serde::{Deserialize, Serialize};

/// Who a counter belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// The VM.
    Vm,
    /// One vCPU.
    Vcpu,
}

/// How a counter moves (the kinds of KVM's binary statistics).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Only rises.
    Cumulative,
    /// The number there is now.
    Instant,
    /// The greatest value so far.
    Peak,
}

impl Kind {
    /// The kind's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cumulative => "cumulative",
            Self::Instant => "instant",
            Self::Peak => "peak",
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct CounterInfo {
    /// The name, exactly as KVM exports it.
    pub name: &'static str,
    /// VM or vCPU.
    pub scope: Scope,
    /// Cumulative, instant or peak.
    pub kind: Kind,
    /// What moves it.
    pub doc: &'static str,
}

macro_rules! counters {
    ($(#[$sdoc:meta])* $name:ident, $scope:ident: $($field:ident $kind:ident $doc:literal;)*) => {
        $(#[$sdoc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
        pub struct $name {
            $(#[doc = $doc] pub $field: u64,)*
        }

        impl $name {
            /// The rows of this scope, in the order of [`Self::values`].
            pub const INFO: &'static [CounterInfo] = &[
                $(CounterInfo { name: stringify!($field), scope: Scope::$scope, kind: Kind::$kind, doc: $doc },)*
            ];

            /// The values in the order of [`Self::INFO`].
            #[must_use]
            pub fn values(&self) -> Vec<u64> {
                vec![$(self.$field,)*]
            }

            /// Adds another's values (peaks: the greater one).
            pub fn add(&mut self, other: &Self) {
                $(self.$field = match Kind::$kind {
                    Kind::Peak => self.$field.max(other.$field),
                    Kind::Cumulative | Kind::Instant => self.$field + other.$field,
                };)*
            }
        }
    };
}

counters! {
    /// Statistics of the VM.
    VmCounters, Vm:
    mmu_shadow_zapped Cumulative "shadow pages prepared for zapping (a page that is still a root counts again when it is freed)";
    mmu_pte_write Cumulative "emulated guest writes to RAM while anything is shadowed (kvm_mmu_pte_write)";
    mmu_pde_zapped Cumulative "entries of upper-level shadow pages zapped by an emulated write of a value that is not zero";
    mmu_flooded Cumulative "shadow pages zapped by a misaligned or flooding write";
    mmu_recycled Cumulative "shadow pages zapped because the quota was used up";
    mmu_cache_miss Cumulative "shadow pages made (kvm_mmu_get_page found none)";
    mmu_unsync Instant "shadow pages that are unsync";
    pages_4k Instant "present leaf entries of 4 KiB";
    pages_2m Instant "present leaf entries of 2 MiB";
    pages_1g Instant "present leaf entries of 1 GiB";
    nx_lpage_splits Instant "shadow pages that stand for a huge page split to keep it from being executed";
    max_mmu_rmap_size Peak "entries of one rmap list before an entry was added";
    max_mmu_page_hash_collisions Peak "shadow pages of other frames met in one hash bucket";
    remote_tlb_flush_requests Cumulative "calls of kvm_flush_remote_tlbs";
    remote_tlb_flush Cumulative "those calls that had to interrupt another physical CPU (none here: one exit is handled at a time)";
    x_prefetched Cumulative "entries that a fault filled beside its own (pte_prefetch, direct_pte_prefetch)";
    x_refetched Cumulative "entries that INVLPG filled anew (invlpg), or a store under policy update_on_write";
    x_synced_entries Cumulative "present entries that a resync went over (sync_page; sync_spte, 6.12)";
}

counters! {
    /// Statistics of one vCPU.
    VcpuCounters, Vcpu:
    pf_taken Cumulative "page faults handled, without those answered by a valid MMIO entry";
    pf_fixed Cumulative "faults that repaired the shadow";
    pf_emulate Cumulative "faults that ended in emulation";
    pf_spurious Cumulative "faults that found the shadow right already";
    pf_fast Cumulative "faults fixed without the lock (only while guest paging is off)";
    pf_mmio_spte_created Cumulative "MMIO entries made by faults";
    pf_guest Cumulative "page faults queued for the guest";
    tlb_flush Cumulative "flushes of the vCPU's TLB entries at entry";
    invlpg Cumulative "INVLPG instructions carried out";
    insn_emulation Cumulative "instructions decoded by the emulator";
    insn_emulation_fail Cumulative "instructions that the emulator gave up";
    exits Cumulative "VM exits";
    mmio_exits Cumulative "exits to user space for MMIO";
    io_exits Cumulative "exits for IN and OUT";
    halt_exits Cumulative "exits for HLT";
    x_ops Cumulative "operations run";
    x_faults_fetch Cumulative "page-fault exits of instruction fetches";
    x_faults_read Cumulative "page-fault exits of loads";
    x_faults_write Cumulative "page-fault exits of stores";
    x_faults_user Cumulative "page-fault exits at CPL 3";
    x_mmio_faults Cumulative "page-fault exits answered by an MMIO entry (not in pf_taken)";
    x_retries Cumulative "instructions resumed after unprotecting a table (reexecute and retry rules)";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_ours_are_marked() {
        let names: Vec<_> = VmCounters::INFO.iter().chain(VcpuCounters::INFO).map(|c| c.name).collect();
        let unique: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
        assert_eq!(VmCounters::default().values().len(), VmCounters::INFO.len());
    }

    #[test]
    fn adding_keeps_the_greater_peak() {
        let mut a = VmCounters { max_mmu_rmap_size: 5, mmu_unsync: 1, ..Default::default() };
        a.add(&VmCounters { max_mmu_rmap_size: 3, mmu_unsync: 2, ..Default::default() });
        assert_eq!((a.max_mmu_rmap_size, a.mmu_unsync), (5, 3));
    }
}

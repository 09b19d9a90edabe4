//! The kernels that are modelled, and every rule in which one differs from another.
//!
//! A rule's code reads a field; nothing compares versions. docs/kernels.md has the evidence for each field.

use crate::error::{ConfigError, refuse};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};

/// A name from a table. Read from elsewhere it is looked up there, so that it lives as long.
pub type Name = &'static str;

/// What the shadow MMU of one kernel series does where the series differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// The model's name, `model_version`.
    #[serde(deserialize_with = "kernel_name")]
    pub name: Name,
    /// Sync leaves an entry alone, A and D included, if its guest entry still names the same frame and rights. Without
    /// it the entry is built anew, which clears A, drops D and so asks for a flush (`FNAME(sync_spte)`).
    pub sync_keeps_unchanged: bool,
    /// INVLPG syncs the one entry in place. Without it the entry is dropped and prefetched again
    /// (`__kvm_mmu_invalidate_addr`, `FNAME(invlpg)`).
    pub invlpg_syncs: bool,
    /// Registers set by user space that change the paging mode request a guest TLB flush (`kvm_set_sregs`).
    pub sregs_flush: bool,
    /// An instruction that does not write page tables is resumed, its target unprotected, only if it hit a
    /// write-protected page and a shadow page really went, and the place stays noted until another write-protected
    /// page is hit. Without it it is resumed once at a place, and every emulation forgets the place
    /// (`kvm_mmu_write_protect_fault`, `retry_instruction`).
    pub retry_needs_zap: bool,
    /// Each fault of an event's delivery first unprotects the page at its address. Without it only one that hits a
    /// write-protected page does (`kvm_mmu_unprotect_page_virt`).
    pub delivery_unprotects_first: bool,
    /// A guest's large page that holds one of the tables of its own walk is mapped by small pages
    /// (`is_self_change_mapping`). Without it only what is shadowed decides.
    pub self_mapping_is_small: bool,
    /// A vCPU whose CR3 or PDPTE points outside the slots shuts down. Without it a root is loaded behind which nothing is
    /// present, so that the guest takes faults (`mmu_alloc_shadow_roots`).
    pub lost_root_shuts_down: bool,
    /// The host tells a second time, by an event of its own, when another page has taken the place of one
    /// (`kvm_mmu_notifier_change_pte`). Without it the range is only invalidated.
    pub notifier_changes_pte: bool,
    /// A MOV to CR0 that changes nothing but WP frees the roots even while paging is off (`kvm_post_set_cr0`).
    pub unpaged_wp_resets: bool,
    /// With nx_huge_pages a region stays small where any table is linked. Without it only where a fault of an execution
    /// linked the table (`disallowed_hugepage_adjust`).
    pub nx_keeps_any_table: bool,
    /// A huge page that is split for execution counts as a split while paging is off, too (`direct_map`).
    pub nx_counts_unpaged: bool,
}

/// The name of a kernel, read by its bytes.
fn kernel_name<'de, D: Deserializer<'de>>(from: D) -> Result<Name, D::Error> {
    let name = <&str>::deserialize(from)?;
    Kernel::named(name).map(|kernel| kernel.name).map_err(D::Error::custom)
}

/// Linux 6.1, as Debian 12 has it.
pub const LINUX_6_1: Kernel = Kernel {
    name: "linux-6.1",
    sync_keeps_unchanged: false,
    invlpg_syncs: false,
    sregs_flush: false,
    retry_needs_zap: false,
    delivery_unprotects_first: true,
    self_mapping_is_small: true,
    lost_root_shuts_down: true,
    notifier_changes_pte: true,
    unpaged_wp_resets: true,
    nx_keeps_any_table: true,
    nx_counts_unpaged: false,
};

/// Linux 6.12, as Debian 12's backports and Debian 13 have it.
pub const LINUX_6_12: Kernel = Kernel {
    name: "linux-6.12",
    sync_keeps_unchanged: true,
    invlpg_syncs: true,
    sregs_flush: true,
    retry_needs_zap: true,
    delivery_unprotects_first: false,
    self_mapping_is_small: false,
    lost_root_shuts_down: false,
    notifier_changes_pte: false,
    unpaged_wp_resets: false,
    nx_keeps_any_table: false,
    nx_counts_unpaged: true,
};

/// Every kernel, oldest first.
pub const KERNELS: [&Kernel; 2] = [&LINUX_6_1, &LINUX_6_12];

impl Kernel {
    /// The kernel of that name.
    ///
    /// # Errors
    /// A name that is none of [`KERNELS`].
    pub fn named(name: &str) -> Result<Self, ConfigError> {
        KERNELS.iter().find(|k| k.name == name).map_or_else(
            || refuse!("model_version {name:?} is not known; choose one of {}", KERNELS.map(|k| k.name).join(", ")),
            |k| Ok(**k),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_by_name() {
        assert_eq!(KERNELS.map(|k| Kernel::named(k.name).unwrap()), [LINUX_6_1, LINUX_6_12]);
        let message = Kernel::named("linux-5.4").unwrap_err().to_string();
        assert_eq!(message, r#"model_version "linux-5.4" is not known; choose one of linux-6.1, linux-6.12"#);
    }
}

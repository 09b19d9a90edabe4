//! The kernels that are modelled, and every rule in which one differs from another.
//!
//! A rule's code reads a field; nothing compares versions. docs/kernels.md has the evidence for each field.

use crate::error::{ConfigError, refuse};

/// What the shadow MMU of one kernel series does where the series differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kernel {
    /// The model's name, `model_version`.
    pub name: &'static str,
    /// Sync leaves an entry alone, A and D included, if its guest entry still names the same frame and rights. Without
    /// it the entry is built anew, which clears A, drops D and so asks for a flush (`FNAME(sync_spte)`).
    pub sync_keeps_unchanged: bool,
    /// INVLPG syncs the one entry in place. Without it the entry is dropped and prefetched again
    /// (`__kvm_mmu_invalidate_addr`, `FNAME(invlpg)`).
    pub invlpg_syncs: bool,
    /// Registers set by user space that change the paging mode request a guest TLB flush (`kvm_set_sregs`).
    pub sregs_flush: bool,
}

/// Linux 6.1, as Debian 12 has it.
pub const LINUX_6_1: Kernel =
    Kernel { name: "linux-6.1", sync_keeps_unchanged: false, invlpg_syncs: false, sregs_flush: false };

/// Linux 6.12, as Debian 12's backports and Debian 13 have it.
pub const LINUX_6_12: Kernel =
    Kernel { name: "linux-6.12", sync_keeps_unchanged: true, invlpg_syncs: true, sregs_flush: true };

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

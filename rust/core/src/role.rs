//! The role of a shadow page: what it was made for. Two pages of one frame may differ in role only.
//!
//! It lives below `events` because an event prints it; `shadow` makes and compares roles.

use crate::types::{Access, Level};
use serde::{Deserialize, Serialize};
use std::fmt;

/// KVM's `kvm_mmu_page_role.word` (6.1), bit for bit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Role(pub u32);

const HAS_4_BYTE: u32 = 1 << 4;
const QUADRANT_SHIFT: u32 = 5;
const QUADRANT: u32 = 3 << QUADRANT_SHIFT;
const DIRECT: u32 = 1 << 7;
const ACCESS: u32 = 7 << 8;
const INVALID: u32 = 1 << 11;
const EFER_NX: u32 = 1 << 12;
const CR0_WP: u32 = 1 << 13;
const SMEP_ANDNOT_WP: u32 = 1 << 14;
const SMAP_ANDNOT_WP: u32 = 1 << 15;
const AD_DISABLED: u32 = 1 << 16;
const PASSTHROUGH: u32 = 1 << 18;

impl Role {
    /// The role of a root of `level`, as `kvm_init_shadow_mmu` (6.1) makes it: EFER.NX is forced on, and SMEP and SMAP
    /// count only while CR0.WP is off.
    #[must_use]
    pub const fn root(level: Level, wp: bool, smep: bool, smap: bool) -> Self {
        let mut word = level.0 as u32 | ACCESS | EFER_NX;
        if wp {
            word |= CR0_WP;
        } else {
            if smep {
                word |= SMEP_ANDNOT_WP;
            }
            if smap {
                word |= SMAP_ANDNOT_WP;
            }
        }
        Self(word)
    }

    /// The role of the roots with paging off: everything else is clear.
    #[must_use]
    pub const fn direct_root(level: Level) -> Self {
        Self(level.0 as u32 | DIRECT | ACCESS | EFER_NX)
    }

    /// The same role for guest entries of 4 or 8 bytes.
    #[must_use]
    pub const fn with_entry_bytes(self, bytes: u8) -> Self {
        if bytes == 4 { Self(self.0 | HAS_4_BYTE) } else { self }
    }

    /// The role of one of the four pages that a PAE root consists of (`mmu_alloc_root`, 6.1).
    #[must_use]
    pub const fn pae_root(self, quadrant: u32) -> Self {
        let quadrant = if self.has_4_byte() { quadrant << QUADRANT_SHIFT } else { 0 };
        Self((self.0 & !0xf) | 2 | quadrant)
    }

    /// The role of the table below entry `index` (`kvm_mmu_child_role`, 6.1). A guest table of 1,024 entries takes two
    /// shadow pages, and the entry's place says which half; pages below a large page have it, too.
    #[must_use]
    pub const fn child(self, index: usize, direct: bool, access: Access) -> Self {
        let mut word = self.0 & !(ACCESS | DIRECT | PASSTHROUGH);
        word = (word & !0xf) | ((self.0 & 0xf) - 1);
        if direct {
            word |= DIRECT;
        }
        Self(word).with_place(index, access)
    }

    /// That of a child without rights, below another entry and with these rights.
    #[inline(always)]
    #[must_use]
    pub const fn with_place(self, index: usize, access: Access) -> Self {
        let word = self.0 | (access.0 as u32) << 8;
        Self(if self.has_4_byte() { (word & !QUADRANT) | (index as u32 & 1) << QUADRANT_SHIFT } else { word })
    }

    /// Whether the guest's entries have 4 bytes.
    #[inline]
    #[must_use]
    pub const fn has_4_byte(self) -> bool {
        self.0 & HAS_4_BYTE != 0
    }

    /// Bytes of the guest's entries.
    #[inline]
    #[must_use]
    pub const fn entry_bytes(self) -> u8 {
        if self.has_4_byte() { 4 } else { 8 }
    }

    /// Which part of a table with 4-byte entries the page shadows: a half on level 1, a quarter on level 2.
    #[inline]
    #[must_use]
    pub const fn quadrant(self) -> usize {
        ((self.0 & QUADRANT) >> QUADRANT_SHIFT) as usize
    }

    /// The level of the page.
    #[must_use]
    pub const fn level(self) -> Level {
        Level((self.0 & 0xf) as u8)
    }

    /// Whether the page has no guest table behind it.
    #[must_use]
    pub const fn direct(self) -> bool {
        self.0 & DIRECT != 0
    }

    /// The rights that the guest's upper entries grant.
    #[must_use]
    pub const fn access(self) -> Access {
        Access((self.0 >> 8) as u8 & 7)
    }

    /// Whether the page was zapped.
    #[must_use]
    pub const fn invalid(self) -> bool {
        self.0 & INVALID != 0
    }

    /// The same role, marked as zapped.
    #[must_use]
    pub const fn invalidated(self) -> Self {
        Self(self.0 | INVALID)
    }

    /// What must agree with the current root for a page to be synced: all but level, access, quadrant and passthrough
    /// (`kvm_sync_page_check`, 6.1).
    #[must_use]
    pub const fn sync_key(self) -> u32 {
        self.0 & !(0xf | ACCESS | QUADRANT | PASSTHROUGH)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "l{} {}-byte q{}{} {}{} {}nxe {}ad",
            self.level().0,
            self.entry_bytes(),
            self.quadrant(),
            if self.direct() { " direct" } else { "" },
            self.access().text(),
            if self.invalid() { " invalid" } else { "" },
            if self.0 & EFER_NX != 0 { "" } else { "!" },
            if self.0 & AD_DISABLED != 0 { "!" } else { "" },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_one_level_lower_with_its_own_rights() {
        let root = Role::root(Level(4), true, true, true);
        let child = root.child(0, false, Access::W.with(Access::X));
        assert_eq!(root.to_string(), "l4 8-byte q0 wux nxe ad");
        assert_eq!(child.to_string(), "l3 8-byte q0 w-x nxe ad");
        assert_eq!(child.child(0, true, Access::X).to_string(), "l2 8-byte q0 direct --x nxe ad");
        assert_eq!(root.sync_key(), child.sync_key());
    }

    #[test]
    fn quadrants_are_a_matter_of_4_byte_entries_only() {
        let root = Role::root(Level(3), true, false, false).with_entry_bytes(4);
        let quarter = root.pae_root(3);
        assert_eq!(quarter.to_string(), "l2 4-byte q3 wux nxe ad");
        assert_eq!(quarter.child(7, false, Access::ALL).to_string(), "l1 4-byte q1 wux nxe ad");
        assert_eq!(quarter.child(6, true, Access::ALL).to_string(), "l1 4-byte q0 direct wux nxe ad");
        assert_eq!(Role::direct_root(Level(3)).pae_root(2).to_string(), "l2 8-byte q0 direct wux nxe ad");
        assert_eq!(quarter.sync_key(), root.sync_key());
    }

    #[test]
    fn smep_and_smap_split_roles_only_without_wp() {
        assert_eq!(Role::root(Level(4), true, true, true), Role::root(Level(4), true, false, false));
        assert_ne!(Role::root(Level(4), false, true, false), Role::root(Level(4), false, false, false));
    }
}

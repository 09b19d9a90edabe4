//! One newtype per address space, so that a guest frame number is never taken for a host one.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bits of an address below the page frame number.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Entries of a table with 8-byte entries, and of every shadow table.
pub const ENTRIES: usize = 512;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address!(
    /// A guest virtual (linear) address.
    Gva
);
address!(
    /// A guest physical address.
    Gpa
);
address!(
    /// A guest frame number: a [`Gpa`] without its page offset.
    Gfn
);
address!(
    /// A host frame number, as it stands in a shadow entry.
    Pfn
);

impl Gva {
    /// The offset inside the 4 KiB page.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 & (PAGE_SIZE - 1)
    }

    /// The address of the page that holds this one.
    #[must_use]
    pub const fn page(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// The index of the entry that translates this address in a shadow table, which has 512 entries in every mode.
    #[must_use]
    pub const fn index(self, level: Level) -> usize {
        (self.0 >> (PAGE_SHIFT + 9 * (level.0 as u32 - 1))) as usize & (ENTRIES - 1)
    }
}

impl Gpa {
    /// The frame that holds the address.
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }

    /// The offset inside the 4 KiB page.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 & (PAGE_SIZE - 1)
    }
}

impl Gfn {
    /// The address of the frame's first byte.
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }

    /// The first frame of the page of `level`'s size that holds this one.
    #[must_use]
    pub const fn round(self, level: Level) -> Self {
        Self(self.0 & !(level.pages() - 1))
    }
}

/// A level of a page table: 1 = page table (4 KiB), 2 = page directory (2 MiB), 3 = PDPT (1 GiB), 4 = PML4, 5 = PML5.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Level(pub u8);

impl Level {
    /// Level 1, 4 KiB pages.
    pub const PT: Self = Self(1);
    /// Level 2, 2 MiB pages.
    pub const PD: Self = Self(2);
    /// Level 3, 1 GiB pages.
    pub const PDPT: Self = Self(3);

    /// How many 4 KiB frames one entry of this level maps.
    #[must_use]
    pub const fn pages(self) -> u64 {
        1 << (9 * (self.0 as u32 - 1))
    }

    /// The level below.
    #[must_use]
    pub const fn down(self) -> Self {
        Self(self.0 - 1)
    }
}

/// Access rights in the form that KVM keeps in page roles: X=1 (executable), W=2, U=4.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Access(pub u8);

impl Access {
    /// No right at all.
    pub const NONE: Self = Self(0);
    /// The right to execute.
    pub const X: Self = Self(1);
    /// The right to write.
    pub const W: Self = Self(2);
    /// The right of user mode to use the page.
    pub const U: Self = Self(4);
    /// Every right.
    pub const ALL: Self = Self(7);

    /// Whether every right of `other` is there.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The rights that both have.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Without the rights of `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// With the rights of `other`.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// KVM's text of the rights in a shadow page's role.
    #[must_use]
    pub const fn text(self) -> &'static str {
        ["---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux"][self.0 as usize & 7]
    }
}

/// The index of a shadow page in the arena.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PageId(pub u32);

impl PageId {
    /// The position of this page's entry `index`.
    #[must_use]
    pub const fn entry(self, index: usize) -> SptePos {
        SptePos((self.0 << 9) | index as u32)
    }
}

/// The place of one shadow entry: page and index. KVM's `sptep`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct SptePos(pub u32);

impl SptePos {
    /// The shadow page that holds the entry.
    #[must_use]
    pub const fn page(self) -> PageId {
        PageId(self.0 >> 9)
    }

    /// The entry's index in its page.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize & (ENTRIES - 1)
    }
}

/// The head of a list of shadow entries: empty, one entry, or a block of the pool in `shadow::rmap`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RmapHead(pub u32);

/// A page-fault error code (SDM vol. 3 section 4.7), with KVM's bit 48 for implicit accesses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ErrorCode(pub u64);

impl ErrorCode {
    /// The translation was present.
    pub const P: Self = Self(1);
    /// The access was a write.
    pub const W: Self = Self(2);
    /// The access came from CPL 3.
    pub const U: Self = Self(4);
    /// A reserved bit was set.
    pub const RSVD: Self = Self(8);
    /// The access was an instruction fetch.
    pub const F: Self = Self(16);
    /// A protection key forbade it.
    pub const PK: Self = Self(32);
    /// The access was made by the system, not by the instruction (KVM's own bit).
    pub const IMPLICIT: Self = Self(1 << 48);

    /// Whether every bit of `other` is set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both codes' bits.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Without the bits of `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// `self` if `yes`, else no bit.
    #[must_use]
    pub const fn when(self, yes: bool) -> Self {
        if yes { self } else { Self(0) }
    }
}

impl fmt::Display for ErrorCode {
    /// The flags as the kernel's flag printer shows them: `P|W|U|RSVD|F`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (bit, name) in [(Self::P, "P"), (Self::W, "W"), (Self::U, "U"), (Self::RSVD, "RSVD"), (Self::F, "F")] {
            if self.has(bit) {
                if !first {
                    f.write_str("|")?;
                }
                f.write_str(name)?;
                first = false;
            }
        }
        Ok(())
    }
}

/// What an access wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessKind {
    /// A data load.
    Read,
    /// A data store.
    Write,
    /// An instruction fetch.
    Fetch,
}

impl AccessKind {
    /// The error-code bits that name the kind.
    #[must_use]
    pub const fn code(self) -> ErrorCode {
        match self {
            Self::Read => ErrorCode(0),
            Self::Write => ErrorCode::W,
            Self::Fetch => ErrorCode::F,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_and_rounding_follow_the_level() {
        let gva = Gva(0x0000_7f12_3456_7abc);
        assert_eq!(gva.index(Level(1)), 0x167);
        assert_eq!(gva.index(Level(4)), 0xfe);
        assert_eq!(Gfn(0x12345).round(Level::PD), Gfn(0x12200));
        assert_eq!(Level::PDPT.pages(), 1 << 18);
    }

    #[test]
    fn error_code_text_is_the_kernels() {
        assert_eq!(ErrorCode(0xb).to_string(), "P|W|RSVD");
        assert_eq!(ErrorCode(0x10).to_string(), "F");
        assert_eq!(ErrorCode(0).to_string(), "");
    }
}

//! The walk itself, once for all modes.

use crate::bits::{PT_A, PT_D, PT_G};
use crate::cpu::pdpte_reserved;
use crate::guest::gpte::Gpte;
use crate::image::{Source, Viewer};
use crate::mode::{BIT32, LEVEL4, Mode};
use crate::types::{Access, Gva, Level};

/// Why an address leads nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Fault {
    /// It leads somewhere.
    None = 0,
    /// An entry is not present.
    NotPresent = 1,
    /// An entry has a reserved bit set.
    Reserved = 2,
    /// The access is not allowed.
    Forbidden = 3,
    /// A table is not in the image.
    NotInImage = 4,
    /// The address is not one of the mode's.
    NotCanonical = 5,
}

/// Bits of [`Found::flags`], above the rights X, W and U.
pub(super) const ACCESSED: u8 = 8;
const DIRTY: u8 = 16;
const GLOBAL: u8 = 32;

/// What a walk found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// The physical address; 0 if there is none.
    pub gpa: u64,
    /// The level of the last entry that was looked for; 0 if none was.
    pub level: u8,
    /// The rights that all entries so far grant (X 1, W 2, U 4), and of a leaf A 8, D 16, G 32.
    pub flags: u8,
    /// Why it leads nowhere.
    pub fault: Fault,
}

impl Found {
    pub(super) const fn nowhere(fault: Fault, level: u8, granted: Access) -> Self {
        Self { gpa: 0, level, flags: granted.0, fault }
    }
}

/// An entry that a walk reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// The level of the table.
    pub level: u8,
    /// The table's physical address.
    pub table: u64,
    /// The entry's index.
    pub index: usize,
    /// The entry; `None` if it is not in the image.
    pub entry: Option<u64>,
    /// The rights that this entry and those above it grant.
    pub granted: Access,
}

/// A walk that has come to a table.
#[derive(Clone, Copy)]
pub(super) struct At {
    pub table: u64,
    pub granted: Access,
}

/// One step: what the entry of a table says.
pub(super) enum Next {
    /// The table below.
    Table(At),
    /// The end.
    End(Found),
}

impl Viewer {
    /// Walks for one address; `seen` is told of each entry.
    pub fn walk(&self, source: &impl Source, cr3: u64, gva: Gva, seen: impl FnMut(Step)) -> Found {
        match (self.role.mode.entry_bytes, self.role.mode.top.0) {
            (4, _) => self.walk_of::<4, 2>(source, cr3, gva, seen),
            (_, 2) => self.walk_of::<8, 2>(source, cr3, gva, seen),
            (_, 4) => self.walk_of::<8, 4>(source, cr3, gva, seen),
            _ => self.walk_of::<8, 5>(source, cr3, gva, seen),
        }
    }

    /// The same for tables of `TOP` levels with entries of `SIZE` bytes.
    #[inline(always)]
    pub(super) fn walk_of<const SIZE: usize, const TOP: u8>(
        &self,
        source: &impl Source,
        cr3: u64,
        gva: Gva,
        mut seen: impl FnMut(Step),
    ) -> Found {
        let mut at = match self.top_table(source, cr3, gva, &mut seen) {
            Ok(at) => at,
            Err(found) => return found,
        };
        let mut level = TOP;
        loop {
            match self.step::<SIZE>(source, at, level, gva, &mut seen) {
                Next::Table(below) => at = below,
                Next::End(found) => return found,
            }
            level -= 1;
        }
    }

    /// Where the walk begins; in PAE mode a PDPTE says it, which has no rights of its own.
    #[inline(always)]
    pub(super) fn top_table(
        &self,
        source: &impl Source,
        cr3: u64,
        gva: Gva,
        seen: &mut impl FnMut(Step),
    ) -> Result<At, Found> {
        let granted = Access::ALL;
        if !self.role.mode.takes(gva) {
            return Err(Found::nowhere(Fault::NotCanonical, 0, granted));
        }
        if !self.role.mode.pdptes {
            return Ok(At { table: Gpte(cr3).gfn().gpa().0, granted });
        }
        let (table, index) = (cr3 & 0xffff_ffe0, (gva.0 >> 30) as usize & 3);
        let entry = source.entry::<8>(table + 8 * index as u64);
        seen(Step { level: 3, table, index, entry, granted });
        let fault = match entry {
            None => Fault::NotInImage,
            Some(pdpte) if !Gpte(pdpte).present() => Fault::NotPresent,
            // QEMU's TCG sets A in a PDPTE, where the bit is reserved.
            Some(pdpte) if pdpte & pdpte_reserved(&self.cpu) & !PT_A != 0 => Fault::Reserved,
            Some(pdpte) => return Ok(At { table: Gpte(pdpte).gfn().gpa().0, granted }),
        };
        Err(Found::nowhere(fault, 3, granted))
    }

    /// Reads the entry for an address in a table of `level`.
    #[inline(always)]
    pub(super) fn step<const SIZE: usize>(
        &self,
        source: &impl Source,
        at: At,
        level: u8,
        gva: Gva,
        seen: &mut impl FnMut(Step),
    ) -> Next {
        let At { table, granted } = at;
        let index = layout::<SIZE>().index(gva, Level(level));
        let entry = source.entry::<SIZE>(table + (SIZE * index) as u64);
        let Some(raw) = entry else {
            seen(Step { level, table, index, entry, granted });
            return Next::End(Found::nowhere(Fault::NotInImage, level, granted));
        };
        let gpte = Gpte(raw);
        let rights = granted.and(gpte.access());
        seen(Step { level, table, index, entry, granted: rights });
        let leaf = gpte.is_leaf(&self.role, Level(level));
        if !leaf && gpte.present() && !gpte.has_reserved(&self.role, Level(level)) {
            return Next::Table(At { table: gpte.gfn().gpa().0, granted: rights });
        }
        Next::End(self.last::<SIZE>(gpte, level, gva, granted))
    }

    /// What the last entry of a walk says: a leaf, or one that ends it otherwise.
    #[inline(always)]
    pub(super) fn last<const SIZE: usize>(&self, gpte: Gpte, level: u8, gva: Gva, granted: Access) -> Found {
        if !gpte.present() {
            return Found::nowhere(Fault::NotPresent, level, granted);
        }
        if gpte.has_reserved(&self.role, Level(level)) {
            return Found::nowhere(Fault::Reserved, level, granted);
        }
        let rights = granted.and(gpte.access());
        if !self.allows(rights) {
            return Found::nowhere(Fault::Forbidden, level, rights);
        }
        leaf::<SIZE>(gpte, level, gva, rights)
    }

    #[inline(always)]
    pub(super) const fn allows(&self, rights: Access) -> bool {
        self.forbidden >> rights.0 & 1 == 0
    }
}

/// A mode with entries of `SIZE` bytes: their tables and leaves are alike in all of them.
#[inline(always)]
pub(super) const fn layout<const SIZE: usize>() -> &'static Mode {
    if SIZE == 4 { &BIT32 } else { &LEVEL4 }
}

#[inline(always)]
pub(super) fn leaf<const SIZE: usize>(gpte: Gpte, level: u8, gva: Gva, rights: Access) -> Found {
    let (mode, at) = (layout::<SIZE>(), Level(level));
    let (first, pages) = (gpte.leaf_gfn(mode, at), mode.pages(at));
    let marks = (gpte.0 & (PT_A | PT_D)) >> 2 | (gpte.0 & PT_G) >> 3;
    debug_assert!(marks as u8 & !(ACCESSED | DIRTY | GLOBAL) == 0);
    let gpa = first.gpa().0 | gva.0 & ((pages << 12) - 1);
    Found { gpa, level, flags: rights.0 | marks as u8, fault: Fault::None }
}

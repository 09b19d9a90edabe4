//! Many addresses at a time.

use crate::guest::gpte::Gpte;
use crate::image::walk::{At, Found, Next};
use crate::image::{Fault, Image, Source, Viewer};
use crate::types::{Access, Gva, Level};

/// Addresses and the arrays that take what is found, all of one length.
#[derive(Debug)]
pub struct Block<'a> {
    /// The addresses.
    pub gvas: &'a [u64],
    /// See [`Found::gpa`].
    pub gpa: &'a mut [u64],
    /// See [`Found::level`].
    pub level: &'a mut [u8],
    /// See [`Found::flags`].
    pub flags: &'a mut [u8],
    /// See [`Found::fault`].
    pub fault: &'a mut [u8],
}

/// Cuts a block into blocks of `size` addresses.
#[derive(Debug)]
pub struct Blocks<'a> {
    rest: Option<Block<'a>>,
    size: usize,
}

impl<'a> Block<'a> {
    /// Blocks of `size` addresses each, the last one shorter.
    #[must_use]
    pub const fn parts(self, size: usize) -> Blocks<'a> {
        Blocks { rest: Some(self), size }
    }

    #[inline(always)]
    fn set(&mut self, i: usize, found: Found) {
        self.gpa[i] = found.gpa;
        self.level[i] = found.level;
        self.flags[i] = found.flags;
        self.fault[i] = found.fault as u8;
    }
}

impl<'a> Iterator for Blocks<'a> {
    type Item = Block<'a>;

    fn next(&mut self) -> Option<Block<'a>> {
        let all = self.rest.take().filter(|block| !block.gvas.is_empty())?;
        let size = self.size.min(all.gvas.len());
        let (gvas, rest) = all.gvas.split_at(size);
        let (gpa, rest_gpa) = all.gpa.split_at_mut(size);
        let (level, rest_level) = all.level.split_at_mut(size);
        let (flags, rest_flags) = all.flags.split_at_mut(size);
        let (fault, rest_fault) = all.fault.split_at_mut(size);
        self.rest = Some(Block { gvas: rest, gpa: rest_gpa, level: rest_level, flags: rest_flags, fault: rest_fault });
        Some(Block { gvas, gpa, level, flags, fault })
    }
}

/// Addresses that go down together.
const STAGE: usize = 128;
/// Directories (of 1 GiB) that are remembered.
const DIRECTORIES: usize = 256;
/// No table stands here, and no image reaches so far.
const NOWHERE: u64 = !0 << 12;

/// The way to the directory (level 2) of a GiB.
#[derive(Clone, Copy)]
struct Directory {
    gib: u64,
    at: At,
}

/// A batch at work. Addresses go down in stages: the directory, which is mostly remembered; its entry; the last entry;
/// what it means. So the memory works on many of them at a time, and each stage is a short loop. Whether a page is large
/// changes no branch: its entry in the directory is read again, as the last one.
struct Batch<'a, S, const SIZE: usize, const TOP: u8> {
    viewer: &'a Viewer,
    source: &'a S,
    cr3: u64,
    directories: Vec<Directory>,
    /// Of each address: where its last entry stands, of what level, the rights above it, and the entry.
    slots: [u64; STAGE],
    levels: [u8; STAGE],
    granted: [Access; STAGE],
    entries: [u64; STAGE],
}

impl Viewer {
    /// Walks for each address of a block.
    ///
    /// # Panics
    /// If the arrays of the block differ in length.
    pub fn translate(&self, image: &Image<'_>, cr3: u64, block: Block<'_>) {
        match image.single() {
            Some(flat) => self.by_mode(&flat, cr3, block),
            None => self.by_mode(image, cr3, block),
        }
    }

    fn by_mode(&self, source: &impl Source, cr3: u64, block: Block<'_>) {
        match (self.role.mode.entry_bytes, self.role.mode.top.0) {
            (4, _) => Batch::<_, 4, 2>::run(self, source, cr3, block),
            (_, 2) => Batch::<_, 8, 2>::run(self, source, cr3, block),
            (_, 4) => Batch::<_, 8, 4>::run(self, source, cr3, block),
            _ => Batch::<_, 8, 5>::run(self, source, cr3, block),
        }
    }
}

impl<'a, S: Source, const SIZE: usize, const TOP: u8> Batch<'a, S, SIZE, TOP> {
    fn run(viewer: &'a Viewer, source: &'a S, cr3: u64, block: Block<'_>) {
        // No address has this GiB.
        let none = Directory { gib: !0, at: At { table: NOWHERE, granted: Access::NONE } };
        let (directories, slots, levels) = (vec![none; DIRECTORIES], [NOWHERE; STAGE], [1; STAGE]);
        let (granted, entries) = ([Access::NONE; STAGE], [0; STAGE]);
        let mut batch = Self { viewer, source, cr3, directories, slots, levels, granted, entries };
        for mut part in block.parts(STAGE) {
            batch.find_slots(&mut part);
            batch.read_entries(&mut part);
            batch.finish(&mut part);
        }
    }

    /// Finds where the last entry of each address stands; of one whose walk ends before, that is noted.
    #[inline]
    fn find_slots(&mut self, part: &mut Block<'_>) {
        for i in 0..part.gvas.len() {
            if let Err(found) = self.find_slot(i, Gva(part.gvas[i])) {
                part.set(i, found);
                self.slots[i] = NOWHERE;
            }
        }
    }

    #[inline(always)]
    fn find_slot(&mut self, i: usize, gva: Gva) -> Result<(), Found> {
        let (role, at) = (&self.viewer.role, self.directory(gva)?);
        let (bits, mask) = if SIZE == 4 { (10, 1023) } else { (9, 511) };
        let slot = at.table + SIZE as u64 * (gva.0 >> (12 + bits) & mask);
        let Some(raw) = self.source.entry::<SIZE>(slot) else {
            return Err(Found::nowhere(Fault::NotInImage, 2, at.granted));
        };
        let pde = Gpte(raw);
        if !pde.present() || pde.has_reserved(role, Level::PD) {
            return Err(self.viewer.last(pde, 2, gva, at.granted));
        }
        let large = pde.is_leaf(role, Level::PD);
        let below = pde.gfn().gpa().0 + SIZE as u64 * (gva.0 >> 12 & mask);
        self.slots[i] = if large { slot } else { below };
        self.levels[i] = 1 + u8::from(large);
        self.granted[i] = Access(at.granted.0 & (pde.access().0 | if large { Access::ALL.0 } else { 0 }));
        Ok(())
    }

    #[inline(always)]
    fn directory(&mut self, gva: Gva) -> Result<At, Found> {
        let gib = gva.0 >> 30;
        let known = &self.directories[gib as usize % DIRECTORIES];
        if known.gib == gib { Ok(known.at) } else { self.find_directory(gva) }
    }

    #[inline(never)]
    fn find_directory(&mut self, gva: Gva) -> Result<At, Found> {
        let mut at = self.viewer.top_table(self.source, self.cr3, gva, &mut |_| {})?;
        for level in (3..=TOP).rev() {
            match self.viewer.step::<SIZE>(self.source, at, level, gva, &mut |_| {}) {
                Next::Table(below) => at = below,
                Next::End(found) => return Err(found),
            }
        }
        let gib = gva.0 >> 30;
        self.directories[gib as usize % DIRECTORIES] = Directory { gib, at };
        Ok(at)
    }

    #[inline]
    fn read_entries(&mut self, part: &mut Block<'_>) {
        for i in 0..part.gvas.len() {
            if let Some(entry) = self.source.entry::<SIZE>(self.slots[i]) {
                self.entries[i] = entry;
            } else if self.slots[i] != NOWHERE {
                part.set(i, Found::nowhere(Fault::NotInImage, 1, self.granted[i]));
                self.slots[i] = NOWHERE;
            }
        }
    }

    #[inline]
    fn finish(&self, part: &mut Block<'_>) {
        let found = part.gpa.iter_mut().zip(&mut *part.level).zip(&mut *part.flags).zip(&mut *part.fault);
        let walks = part.gvas.iter().zip(&self.slots).zip(&self.levels).zip(&self.granted).zip(&self.entries);
        for (((((gva, slot), at), granted), entry), (((gpa, level), flags), fault)) in walks.zip(found) {
            if *slot != NOWHERE {
                let found = self.viewer.last(Gpte(*entry), *at, Gva(*gva), *granted);
                (*gpa, *level, *flags, *fault) = (found.gpa, found.level, found.flags, found.fault as u8);
            }
        }
    }
}

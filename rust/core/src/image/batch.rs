//! Many addresses at a time.

use crate::guest::gpte::Gpte;
use crate::image::walk::{At, Found, Next, layout, leaf};
use crate::image::{Fault, Image, Source, Viewer};
use crate::types::{Access, Gva, Level};
use std::hint::select_unpredictable;

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

/// Addresses that go down together: so many that the wait for the last entries of a stage is small beside the rest.
const STAGE: usize = 1024;
/// Directories (of 1 GiB) that are remembered.
const DIRECTORIES: usize = 256;
/// From here on no table stands, and no image reaches so far.
const NOWHERE: u64 = !0 << 12;

/// The way to the directory (level 2) of a GiB.
#[derive(Clone, Copy)]
struct Directory {
    gib: u64,
    at: At,
}

/// A batch at work. Addresses go down in stages, each step for all of a stage before the next: the directory, which is
/// mostly remembered; its entry; what that says; the last entry; what that says. Entries are read by loops that do
/// nothing else, so that the CPU has as many of them under way as it can.
struct Batch<'a, S, const SIZE: usize, const TOP: u8> {
    viewer: &'a Viewer,
    source: &'a S,
    cr3: u64,
    directories: Box<[Directory; DIRECTORIES]>,
}

/// The addresses of a stage. Each loop over them is a function of its own, to which viewer and source come as arguments:
/// so the compiler knows that nothing it writes changes them.
struct Stage<const SIZE: usize> {
    /// Where the entry stands that is looked at; from [`NOWHERE`] on if the walk has ended.
    slots: [u64; STAGE],
    /// The entry; 0 if it is not in the image.
    entries: [u64; STAGE],
    /// The rights that the entries above grant.
    granted: [Access; STAGE],
    /// Whether the directory's entry is the last one.
    large: [bool; STAGE],
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
        let mut batch = Self { viewer, source, cr3, directories: Box::new([none; DIRECTORIES]) };
        let mut stage = Stage::<SIZE>::new();
        for mut part in block.parts(STAGE) {
            batch.find_directories(&mut stage, &mut part);
            stage.read_entries(source, 2, &mut part);
            stage.descend(viewer, &mut part);
            stage.read_entries(source, 1, &mut part);
            stage.finish(viewer, &mut part);
        }
    }

    #[inline(never)]
    fn find_directories(&mut self, stage: &mut Stage<SIZE>, part: &mut Block<'_>) {
        for i in 0..part.gvas.len().min(STAGE) {
            let gva = Gva(part.gvas[i]);
            let at = self.directory(gva).unwrap_or_else(|found| {
                part.set(i, found);
                At { table: NOWHERE, granted: Access::NONE }
            });
            stage.slots[i] = slot::<SIZE>(at.table, gva, Level::PD);
            stage.granted[i] = at.granted;
        }
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
}

#[inline(always)]
fn slot<const SIZE: usize>(table: u64, gva: Gva, level: Level) -> u64 {
    table + (SIZE * layout::<SIZE>().index(gva, level)) as u64
}

impl<const SIZE: usize> Stage<SIZE> {
    const fn new() -> Self {
        Self { slots: [NOWHERE; STAGE], entries: [0; STAGE], granted: [Access::NONE; STAGE], large: [false; STAGE] }
    }

    #[inline(never)]
    fn read_entries(&mut self, source: &impl Source, level: u8, part: &mut Block<'_>) {
        let (count, mut missing) = (part.gvas.len(), false);
        for (slot, entry) in self.slots[..count].iter().zip(&mut self.entries[..count]) {
            if let Some(raw) = source.entry::<SIZE>(*slot) {
                *entry = raw;
            } else {
                *entry = 0;
                missing |= *slot < NOWHERE;
            }
        }
        if missing {
            self.end_missing(source, level, part);
        }
    }

    /// Ends the walks whose entry is not in the image.
    #[cold]
    fn end_missing(&mut self, source: &impl Source, level: u8, part: &mut Block<'_>) {
        for i in 0..part.gvas.len() {
            let slot = &mut self.slots[i];
            if self.entries[i] == 0 && *slot < NOWHERE && source.entry::<SIZE>(*slot).is_none() {
                part.set(i, Found::nowhere(Fault::NotInImage, level, self.granted[i]));
                *slot = NOWHERE;
            }
        }
    }

    /// From the directory's entry to the last one. A large page changes no branch: its entry is read again.
    #[inline(never)]
    fn descend(&mut self, viewer: &Viewer, part: &mut Block<'_>) {
        let (gvas, role) = (part.gvas, &viewer.role);
        for (i, gva) in gvas.iter().enumerate().take(STAGE) {
            let (pde, gva) = (Gpte(self.entries[i]), Gva(*gva));
            if !pde.present() || pde.has_reserved(role, Level::PD) {
                if self.slots[i] < NOWHERE {
                    part.set(i, last::<SIZE>(viewer, pde, 2, gva, self.granted[i]));
                    self.slots[i] = NOWHERE;
                }
                continue;
            }
            let (large, below) = (pde.is_leaf(role, Level::PD), slot::<SIZE>(pde.gfn().gpa().0, gva, Level::PT));
            self.slots[i] = select_unpredictable(large, self.slots[i], below);
            self.granted[i] = self.granted[i].and(pde.access());
            self.large[i] = large;
        }
    }

    /// What the last entries say. Those of large pages have no reserved bit, or the walk had ended before; so the bits
    /// that are reserved in small pages' entries, and in large ones' as well, do for both.
    #[inline(never)]
    fn finish(&self, viewer: &Viewer, part: &mut Block<'_>) {
        let (gvas, count) = (part.gvas, part.gvas.len().min(STAGE));
        let (gpa, level) = (&mut part.gpa[..count], &mut part.level[..count]);
        let (flags, fault) = (&mut part.flags[..count], &mut part.fault[..count]);
        for i in 0..count {
            let (gpte, gva, granted) = (Gpte(self.entries[i]), Gva(gvas[i]), self.granted[i]);
            let (at, rights) = (1 + u8::from(self.large[i]), granted.and(gpte.access()));
            let found = if gpte.present() && !gpte.has_reserved(&viewer.role, Level::PT) && viewer.allows(rights) {
                leaf::<SIZE>(gpte, at, gva, rights)
            } else if self.slots[i] < NOWHERE {
                last::<SIZE>(viewer, gpte, at, gva, granted)
            } else {
                continue;
            };
            (gpa[i], level[i], flags[i], fault[i]) = (found.gpa, found.level, found.flags, found.fault as u8);
        }
    }
}

/// What an entry says that is no plain one. Apart from the loops, which then keep all they need in registers.
#[inline(never)]
fn last<const SIZE: usize>(viewer: &Viewer, gpte: Gpte, level: u8, gva: Gva, granted: Access) -> Found {
    viewer.last::<SIZE>(gpte, level, gva, granted)
}

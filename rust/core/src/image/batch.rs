//! Many addresses at a time.

use crate::image::walk::{At, Found, Next};
use crate::image::{Image, Source, Viewer};
use crate::types::Gva;

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
        self.rest =
            Some(Block { gvas: rest, gpa: rest_gpa, level: rest_level, flags: rest_flags, fault: rest_fault });
        Some(Block { gvas, gpa, level, flags, fault })
    }
}

/// Addresses that are looked at to choose the way.
const SAMPLE: usize = 4096;
/// Addresses that go down a level together.
const STAGE: usize = 64;

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
            (4, _) => self.run::<4, 2>(source, cr3, block),
            (_, 2) => self.run::<8, 2>(source, cr3, block),
            (_, 4) => self.run::<8, 4>(source, cr3, block),
            _ => self.run::<8, 5>(source, cr3, block),
        }
    }

    /// One after the other is fastest while the tables are in the caches; where they are not, addresses go down
    /// together, so that the memory works on many at a time. Which it is, the first addresses tell.
    fn run<const SIZE: usize, const TOP: u8>(&self, source: &impl Source, cr3: u64, block: Block<'_>) {
        let spread = self.is_spread::<SIZE, TOP>(source, cr3, block.gvas);
        for mut part in block.parts(STAGE) {
            if spread {
                self.staged::<SIZE, TOP>(source, cr3, &mut part);
            } else {
                for i in 0..part.gvas.len() {
                    part.set(i, self.walk_of::<SIZE, TOP>(source, cr3, Gva(part.gvas[i]), |_| {}));
                }
            }
        }
    }

    /// Whether the addresses go to so many last tables that these are not in the caches.
    fn is_spread<const SIZE: usize, const TOP: u8>(&self, source: &impl Source, cr3: u64, gvas: &[u64]) -> bool {
        if gvas.len() < SAMPLE {
            return false;
        }
        let (mut seen, mut distinct) = (vec![false; 16 * SAMPLE], 0);
        let stride = gvas.len() / SAMPLE;
        for gva in gvas.iter().step_by(stride).take(SAMPLE) {
            let mut last = 0;
            self.walk_of::<SIZE, TOP>(source, cr3, Gva(*gva), |step| last = step.table);
            let slot = (last >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
            distinct += usize::from(!std::mem::replace(&mut seen[slot as usize], true));
        }
        distinct > SAMPLE / 2
    }

    #[cfg(test)]
    pub(super) fn staged_for_tests(&self, source: &impl Source, cr3: u64, part: &mut Block<'_>) {
        self.staged::<8, 4>(source, cr3, part);
    }

    fn staged<const SIZE: usize, const TOP: u8>(&self, source: &impl Source, cr3: u64, part: &mut Block<'_>) {
        let mut at = [const { None::<At> }; STAGE];
        for (i, gva) in part.gvas.iter().enumerate() {
            match self.top_table(source, cr3, Gva(*gva), &mut |_| {}) {
                Ok(top) => at[i] = Some(top),
                Err(found) => part.set(i, found),
            }
        }
        for level in (1..=TOP).rev() {
            for i in 0..part.gvas.len() {
                let Some(here) = at[i] else { continue };
                match self.step::<SIZE>(source, here, level, Gva(part.gvas[i]), &mut |_| {}) {
                    Next::Table(below) => at[i] = Some(below),
                    Next::End(found) => {
                        part.set(i, found);
                        at[i] = None;
                    }
                }
            }
        }
    }
}

//! Where the bytes of an image are.

use crate::bits::PT_ADDR;
use crate::error::{ConfigError, refuse};

/// Bytes that stand at a physical address.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// The address of the first one.
    pub base: u64,
    /// The bytes.
    pub bytes: &'a [u8],
}

/// What table entries are read from.
pub trait Source {
    /// The little-endian entry of `SIZE` (4 or 8) bytes at a physical address; `None` if any of them is not there.
    fn entry<const SIZE: usize>(&self, gpa: u64) -> Option<u64>;
}

#[inline(always)]
fn read<const SIZE: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk::<SIZE>().map(widen)
}

#[inline(always)]
fn widen<const SIZE: usize>(entry: &[u8; SIZE]) -> u64 {
    let mut wide = [0; 8];
    wide[..SIZE].copy_from_slice(entry);
    u64::from_le_bytes(wide)
}

impl Source for Segment<'_> {
    #[inline(always)]
    fn entry<const SIZE: usize>(&self, gpa: u64) -> Option<u64> {
        read::<SIZE>(self.bytes, gpa.wrapping_sub(self.base) as usize)
    }
}

/// An image of physical memory: segments in the order of their addresses, with gaps or without.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    segments: Vec<Segment<'a>>,
}

impl<'a> Image<'a> {
    /// An image of these segments.
    ///
    /// # Errors
    /// Segments that overlap, or one that goes beyond the last address.
    pub fn new(mut segments: Vec<Segment<'a>>) -> Result<Self, ConfigError> {
        segments.retain(|segment| !segment.bytes.is_empty());
        segments.sort_by_key(|segment| segment.base);
        for segment in &segments {
            if segment.base.checked_add(segment.bytes.len() as u64).is_none() {
                return refuse!("segment {:#x}: its {} bytes go beyond 2**64", segment.base, segment.bytes.len());
            }
        }
        for pair in segments.windows(2) {
            let end = pair[0].base + pair[0].bytes.len() as u64;
            if end > pair[1].base {
                return refuse!("segment {:#x} overlaps the one that ends at {end:#x}", pair[1].base);
            }
        }
        // No root and no entry names a table beyond.
        segments.retain(|segment| segment.base <= PT_ADDR | 0xfff);
        Ok(Self { segments })
    }

    /// The only segment, if there is no more than one and entries are aligned in it, too.
    pub(super) fn single(&self) -> Option<Aligned<'a>> {
        match self.segments[..] {
            [] => Some(Aligned(Segment { base: 0, bytes: &[] })),
            [only] if only.base.is_multiple_of(8) => Some(Aligned(only)),
            _ => None,
        }
    }
}

/// A segment that begins where an entry may: one comparison says whether an entry is in it.
#[derive(Clone, Copy)]
pub(super) struct Aligned<'a>(Segment<'a>);

impl Source for Aligned<'_> {
    #[inline(always)]
    fn entry<const SIZE: usize>(&self, gpa: u64) -> Option<u64> {
        let (entries, _) = self.0.bytes.as_chunks::<SIZE>();
        entries.get(gpa.wrapping_sub(self.0.base) as usize / SIZE).map(widen)
    }
}

impl Source for Image<'_> {
    #[inline]
    fn entry<const SIZE: usize>(&self, gpa: u64) -> Option<u64> {
        let after = self.segments.partition_point(|segment| segment.base <= gpa);
        self.segments.get(after.wrapping_sub(1))?.entry::<SIZE>(gpa)
    }
}

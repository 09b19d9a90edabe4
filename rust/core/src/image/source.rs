//! Where the bytes of an image are.

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
    let entry = bytes.get(at..)?.first_chunk::<SIZE>()?;
    let mut wide = [0; 8];
    wide[..SIZE].copy_from_slice(entry);
    Some(u64::from_le_bytes(wide))
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
        Ok(Self { segments })
    }

    /// The only segment, if there is no more than one.
    #[must_use]
    pub fn single(&self) -> Option<Segment<'a>> {
        match self.segments[..] {
            [] => Some(Segment { base: 0, bytes: &[] }),
            [only] => Some(only),
            _ => None,
        }
    }
}

impl Source for Image<'_> {
    #[inline]
    fn entry<const SIZE: usize>(&self, gpa: u64) -> Option<u64> {
        let after = self.segments.partition_point(|segment| segment.base <= gpa);
        self.segments.get(after.wrapping_sub(1))?.entry::<SIZE>(gpa)
    }
}

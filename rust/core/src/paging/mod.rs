//! What the hardware does beside an MMU: a model of TLBs and page-walk caches that runs along and counts.
//!
//! Nothing here decides what an access does. With no TLB asked for, a VM does not come here at all.

mod cache;
mod nested;
mod saved;
mod shadow;
#[cfg(test)]
mod testing;
mod tlb;

pub use nested::{Nested, NestedCounts, NestedSetup};
pub use shadow::{ShadowTlb, TlbCounts};
pub use tlb::{Tlb, TlbSizes, USUAL};

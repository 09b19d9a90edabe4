//! Caches as data: hash maps in an order, and whether what was read has the sizes of its VM.

use crate::error::InvariantError;
use crate::paging::cache::Cache;
use crate::paging::{Nested, ShadowTlb, Tlb};
use rustc_hash::{FxHashMap, FxHashSet};
use serde::{Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};

/// A hash map in the order of its keys: the same state gives the same bytes.
pub(super) fn in_order<V: Serialize, S: Serializer>(map: &FxHashMap<u64, V>, to: S) -> Result<S::Ok, S::Error> {
    map.iter().collect::<BTreeMap<_, _>>().serialize(to)
}

/// The same for a set.
pub(super) fn set_in_order<S: Serializer>(set: &FxHashSet<u64>, to: S) -> Result<S::Ok, S::Error> {
    set.iter().collect::<BTreeSet<_>>().serialize(to)
}

fn check_cpus(cpus: &[Tlb], vcpus: usize) -> Result<(), InvariantError> {
    let whole = cpus.iter().all(|tlb| tlb.caches().all(Cache::is_whole));
    InvariantError::unless(cpus.len() == vcpus && whole, "TLBs of another number or size")
}

impl ShadowTlb {
    /// Whether TLBs that were read can be those of a VM with that many vCPUs.
    ///
    /// # Errors
    /// They cannot.
    pub fn check_bounds(&self, vcpus: usize) -> Result<(), InvariantError> {
        check_cpus(self.cpus(), vcpus)
    }
}

impl Nested {
    /// Whether nested paging that was read can be that of a VM with so many vCPUs.
    ///
    /// # Errors
    /// It cannot.
    pub fn check_bounds(&self, vcpus: usize) -> Result<(), InvariantError> {
        InvariantError::unless((1..=3).contains(&self.level().0), "a second stage of an impossible level")?;
        InvariantError::unless(self.agile_is_whole(vcpus), "agile paging for another number of vCPUs")?;
        check_cpus(self.cpus(), vcpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::{NestedSetup, USUAL};
    use crate::types::Level;

    #[test]
    fn caches_of_other_sizes_are_refused() {
        let tlb = ShadowTlb::new(2, USUAL).unwrap();
        assert!(tlb.check_bounds(2).is_ok() && tlb.check_bounds(1).is_err());
        let setup = NestedSetup { sizes: USUAL, nested_tlb: 16, warm: false, level: Level::PT, agile: None };
        let nested = Nested::new(2, setup).unwrap();
        assert!(nested.check_bounds(2).is_ok() && nested.check_bounds(3).is_err());
    }
}

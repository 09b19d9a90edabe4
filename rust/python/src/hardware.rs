//! The hardware that runs beside a VM: TLBs that are followed, or nested paging instead of the shadow.

use crate::errors;
use pyo3::PyResult;
use shadowkvm_core::engine::{RunOptions, RunTotals, Vm as Engine};
use shadowkvm_core::error::TraceError;
use shadowkvm_core::outcome::Outcome;
use shadowkvm_core::paging::{AgileSetup, HostAct, Nested, NestedSetup, ShadowTlb, TlbSizes};
use shadowkvm_core::types::Level;

/// Entries, ways, page-walk caches.
pub(crate) type Sizes = (usize, usize, [usize; 3]);
/// The nested TLB, warm, level of the second stage, and for agile paging the interval and the roots kept.
pub(crate) type Stage = (usize, bool, u8, Option<(u64, usize)>);

/// What is followed, if anything is.
#[derive(Clone, Default)]
pub(crate) struct Hardware {
    pub(crate) tlb: Option<ShadowTlb>,
    /// The guest runs under nested (or agile) paging instead of the shadow.
    pub(crate) nested: Option<Nested>,
}

impl Hardware {
    /// Follows TLBs of these sizes from now on, empty ones; `None`: follows none.
    pub(crate) fn set_tlb(&mut self, vcpus: usize, sizes: Option<Sizes>) -> PyResult<()> {
        let made = sizes.map(|(entries, ways, walk)| ShadowTlb::new(vcpus, TlbSizes { entries, ways, walk }));
        self.tlb = made.transpose().map_err(errors::config)?;
        Ok(())
    }

    /// The guest runs under nested paging from now on.
    pub(crate) fn set_nested(
        &mut self,
        engine: &Engine,
        (entries, ways, walk): Sizes,
        (nested_tlb, warm, level, agile): Stage,
    ) -> PyResult<()> {
        if !engine.shadow().arena().live().is_empty() {
            return Err(errors::refused("nested paging: the VM has run under the shadow already".into()));
        }
        let sizes = TlbSizes { entries, ways, walk };
        let agile = agile.map(|(interval, roots)| AgileSetup { interval, roots });
        let setup = NestedSetup { sizes, nested_tlb, warm, level: Level(level), agile };
        self.nested = Some(Nested::new(engine.vcpus().len(), setup).map_err(errors::config)?);
        Ok(())
    }

    /// The numbers of `NestedStatistics`; `None` under the shadow.
    pub(crate) fn nested_counts(&self) -> Option<Vec<u64>> {
        let nested = self.nested.as_ref()?;
        let (c, a) = (nested.counts(), nested.agile_counts().unwrap_or_default());
        let walks = [c.accesses, c.hits, c.misses, c.guest_references, c.host_references];
        let exits = [c.stage_faults, c.dirty_faults, c.mmio_exits, c.other_exits, c.guest_faults];
        let agile = [a.shadow_references, a.fills, a.table_stores, a.reflected, a.cr3_exits];
        let tables = [a.to_nested, a.to_shadow, a.intervals, a.prefetched];
        Some([&walks[..], &exits, &agile, &tables].concat())
    }

    /// The host did something to the VM.
    pub(crate) fn told(&mut self, engine: &Engine, act: HostAct<'_>) {
        if let Some(nested) = &mut self.nested {
            nested.host_did(engine, act);
        }
    }

    /// Runs rows, with the TLBs if they are followed, or under nested paging.
    pub(crate) fn run(
        &mut self,
        engine: &mut Engine,
        rows: &[u8],
        options: &RunOptions<'_>,
        each: impl FnMut(&Outcome),
    ) -> Result<RunTotals, TraceError> {
        match self {
            Self { nested: Some(nested), .. } => nested.run(engine, rows, options, each),
            Self { tlb: Some(tlb), nested: None } => tlb.run(engine, rows, options, each),
            Self { tlb: None, nested: None } => engine.run(rows, options, each),
        }
    }
}

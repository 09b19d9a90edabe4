//! What the hardware does beside an MMU: a model of TLBs and page-walk caches that runs along and counts.
//!
//! Nothing here decides what an access does. With no TLB asked for, a VM does not come here at all.

mod agile;
mod cache;
mod nested;
mod saved;
mod shadow;
mod stage;
#[cfg(test)]
mod testing;
mod tlb;

pub use agile::{AgileCounts, AgileSetup};
pub use nested::{Nested, NestedCounts, NestedSetup, USUAL_NESTED_TLB};
pub use shadow::{ShadowTlb, TlbCounts};
pub use stage::HostAct;
pub use tlb::{Tlb, TlbSizes, USUAL};

use crate::engine::{RunOptions, RunTotals, Vm};
use crate::error::TraceError;
use crate::ops::{ROW_BYTES, Row};
use crate::outcome::Outcome;

/// Runs rows as [`Vm::run`] does, but each by `step`, which gets the row and its number.
fn run_each(
    vm: &mut Vm,
    rows: &[u8],
    options: &RunOptions<'_>,
    mut each: impl FnMut(&Outcome),
    mut step: impl FnMut(&mut Vm, &Row, u64) -> Result<Outcome, TraceError>,
) -> Result<RunTotals, TraceError> {
    let (mut totals, mut index) = (RunTotals::default(), options.first_row);
    let (whole, rest) = rows.as_chunks::<ROW_BYTES>();
    for bytes in whole {
        let row = Row::decode(bytes, index)?;
        let outcome = step(vm, &row, index)?;
        totals.note(&row, &outcome, index);
        each(&outcome);
        if vm.shadow.policy.failed() {
            return Err(TraceError { index, reason: "the policy failed".into() });
        }
        index += 1;
    }
    if !rest.is_empty() {
        vm.run(rest, &RunOptions { first_row: index, ..*options }, |_| {})?; // says what is wrong with it
    }
    Ok(totals)
}

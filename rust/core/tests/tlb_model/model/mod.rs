//! The model beside the engine: what x86 allows a CPU to do with the guest's tables as they are and have been.

mod control;
mod memory;
mod referee;
mod rules;
mod shadow;
mod tlb;
mod touch;
mod verdict;
mod walk;

use crate::adapt::{parts, perform};
use crate::decode::Act;
use crate::world::Machine;
use referee::Referee;

/// Runs acts on a machine under the model, at most so many operations; after every `sweep_every` of them, and at the
/// end, the whole shadow is compared. `audit`: the engine's own invariants are checked after each.
///
/// # Errors
/// Where the engine left the rules, and after which operation.
pub(crate) fn run(
    machine: Machine,
    acts: impl Iterator<Item = Act>,
    operations: usize,
    sweep_every: usize,
    audit: bool,
) -> Result<(), String> {
    let mut vm = machine.build();
    let mut referee = Referee::new(&vm, machine);
    let mut done = 0;
    for act in acts {
        for part in parts(&vm, act) {
            if done == operations {
                return shadow::check(&vm, &referee);
            }
            if touch::outside(&vm, &part) {
                continue;
            }
            let said = |error: String| format!("after operation {done}, {part:x?}:\n{error}");
            let before = referee.before(&vm, &part);
            let outcome = perform(&mut vm, &part);
            referee.after(&vm, &part, before, outcome).map_err(said)?;
            if shadow::hole_was_taken(&vm) {
                return Ok(());
            }
            if done % sweep_every == 0 {
                shadow::check(&vm, &referee).map_err(said)?;
            }
            if audit {
                vm.audit().map_err(|error| said(error.to_string()))?;
            }
            done += 1;
        }
    }
    shadow::check(&vm, &referee)
}

//! The fuzz targets' own code: what the bytes mean, and the TLB model of the engine's tests beside the engine.

pub mod adapt;
pub mod decode;
pub mod world;

#[path = "../../rust/core/tests/tlb_model/model/mod.rs"]
mod model;

pub use adapt::run;
use decode::{MAX_RECORDS, RECORD, act};

/// Operations of an input that the model looks at: it costs ten times the engine.
const MAX_OPERATIONS: usize = 200;

/// Runs an input under the model; every `sweep_every` operations, and at the end, the whole shadow is compared.
///
/// # Errors
/// Where the engine left the rules, and after which operation.
pub fn run_model(data: &[u8], sweep_every: usize) -> Result<(), String> {
    let Some((machine, rest)) = world::Machine::read(data) else { return Ok(()) };
    let records = rest.as_chunks::<RECORD>().0.iter().take(MAX_RECORDS);
    let acts = records.map(|record| act(*record, machine.vcpus()));
    model::run(machine, acts, MAX_OPERATIONS, sweep_every, false)
}

/// What is wrong with an input: a broken invariant, a panic, or, with `model`, a broken rule of the TLB.
#[must_use]
pub fn finding(data: &[u8], model: bool) -> Option<String> {
    let checked = || if model { run_model(data, 1) } else { run(data, 1).map(drop) };
    match std::panic::catch_unwind(checked) {
        Ok(Ok(())) => None,
        Ok(Err(text)) => Some(text),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Some(format!("panic\n{}", text.unwrap_or_else(|| "of another kind".to_owned())))
        }
    }
}

//! The fuzz targets' own code: what the bytes mean, and the TLB model of the engine's tests beside the engine.

pub mod decode;
pub mod world;

#[path = "../../rust/core/tests/tlb_model/referee.rs"]
mod referee;
#[path = "../../rust/core/tests/tlb_model/shadow.rs"]
mod shadow;
#[path = "../../rust/core/tests/tlb_model/tlb.rs"]
mod tlb;
#[path = "../../rust/core/tests/tlb_model/touch.rs"]
mod touch;
#[path = "../../rust/core/tests/tlb_model/walk.rs"]
mod walk;

pub use decode::run;
use decode::{MAX_RECORDS, RECORD, act, apply, parts};

/// Operations of an input that the model looks at: it costs ten times the engine.
const MAX_OPERATIONS: usize = 200;

/// Runs an input under the model; every `sweep_every` operations, and at the end, the whole shadow is compared.
///
/// # Errors
/// Where the engine left the rules, and after which operation.
pub fn run_model(data: &[u8], sweep_every: usize) -> Result<(), String> {
    let [kind, host, rest @ ..] = data else { return Ok(()) };
    let mut vm = world::build(*kind, *host);
    let mut referee = referee::of(&vm, *kind);
    let vcpus = vm.vcpus().len();
    let records = rest.as_chunks::<RECORD>().0.iter().take(MAX_RECORDS);
    let operations = records.flat_map(|record| parts(act(*record, vcpus))).take(MAX_OPERATIONS);
    for (i, part) in operations.enumerate() {
        if touch::outside(&vm, &part) {
            continue;
        }
        let said = |error: String| format!("after operation {i}, {part:x?}:\n{error}");
        let before = referee.before(&vm, &part);
        let outcome = apply(&mut vm, &part);
        referee.after(&vm, &part, before, outcome).map_err(said)?;
        if shadow::hole_was_taken(&vm) {
            return Ok(());
        }
        if i % sweep_every == 0 {
            shadow::check(&vm, &referee).map_err(said)?;
        }
    }
    shadow::check(&vm, &referee)
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

//! The core's tables (counters, events, operations, policies) for Python to document and check itself against.

use crate::errors;
use pyo3::prelude::*;
use shadowkvm_core::config::PROFILES;
use shadowkvm_core::counters::{Scope, VcpuCounters, VmCounters};
use shadowkvm_core::events::{EVENTS, Event, EventKind};
use shadowkvm_core::kernel::{KERNELS, LINUX_6_1};
use shadowkvm_core::ops::OPS;
use shadowkvm_core::outcome::Status;
use shadowkvm_core::paging::{USUAL, USUAL_NESTED_TLB};
use shadowkvm_core::policy::POLICIES;

/// Packed records of 40 bytes, as the kernel prints them.
#[pyfunction]
fn event_text(records: &[u8]) -> PyResult<Vec<String>> {
    let (whole, rest) = records.as_chunks::<40>();
    if !rest.is_empty() {
        return Err(errors::refused(format!("{} bytes are no events of 40 bytes", records.len())));
    }
    whole.iter().map(|record| event(record).map(|event| event.to_string())).collect()
}

fn event(record: &[u8; 40]) -> PyResult<Event> {
    let [op, a, b, c, rest] = *record.as_chunks::<8>().0 else { unreachable!("40 bytes are five words") };
    let [op, a, b, c] = [op, a, b, c].map(u64::from_le_bytes);
    let [code @ .., kind, vcpu, level, flag] = rest;
    let Some(kind) = EventKind::ALL.get(usize::from(kind)) else {
        return Err(errors::refused(format!("event kind {kind} does not exist (0 to {})", EventKind::ALL.len() - 1)));
    };
    Ok(Event { op, a, b, c, code: u32::from_le_bytes(code), kind: *kind, vcpu, level, flag })
}

/// Adds the tables to the module.
pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let counters: Vec<_> = VmCounters::INFO
        .iter()
        .chain(VcpuCounters::INFO)
        .map(|c| (c.name, if c.scope == Scope::Vm { "vm" } else { "vcpu" }, c.kind.name(), c.doc))
        .collect();
    module.add("COUNTERS", counters)?;
    module.add_function(wrap_pyfunction!(event_text, module)?)?;
    module.add("EVENTS", EVENTS.to_vec())?;
    module.add("OPS", OPS.to_vec())?;
    let policies: Vec<_> = POLICIES.iter().map(|row| (row.name, row.parameter.0, row.doc, row.source)).collect();
    module.add("POLICIES", policies)?;
    module.add("PROFILES", PROFILES.map(|p| p.name).to_vec())?;
    module.add("STATUSES", Status::ALL.map(Status::name).to_vec())?;
    module.add("USUAL_TLB", (USUAL.entries, USUAL.ways, <(usize, usize, usize)>::from(USUAL.walk)))?;
    module.add("USUAL_NESTED_TLB", USUAL_NESTED_TLB)?;
    module.add("MODEL_VERSIONS", KERNELS.map(|k| k.name).to_vec())?;
    module.add("MODEL_VERSION", LINUX_6_1.name)
}

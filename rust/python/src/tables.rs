//! The core's tables (counters, events, operations, policies) for Python to document and check itself against.

use pyo3::prelude::*;
use shadowkvm_core::config::PROFILES;
use shadowkvm_core::counters::{Scope, VcpuCounters, VmCounters};
use shadowkvm_core::events::EVENTS;
use shadowkvm_core::kernel::{KERNELS, LINUX_6_1};
use shadowkvm_core::ops::OPS;
use shadowkvm_core::outcome::Status;
use shadowkvm_core::policy::POLICIES;

/// Adds the tables to the module.
pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let counters: Vec<_> = VmCounters::INFO
        .iter()
        .chain(VcpuCounters::INFO)
        .map(|c| (c.name, if c.scope == Scope::Vm { "vm" } else { "vcpu" }, c.kind.name(), c.doc))
        .collect();
    module.add("COUNTERS", counters)?;
    module.add("EVENTS", EVENTS.to_vec())?;
    module.add("OPS", OPS.to_vec())?;
    let policies: Vec<_> = POLICIES.iter().map(|row| (row.name, row.parameter.0, row.doc, row.source)).collect();
    module.add("POLICIES", policies)?;
    module.add("PROFILES", PROFILES.map(|p| p.name).to_vec())?;
    module.add("STATUSES", Status::ALL.map(Status::name).to_vec())?;
    module.add("MODEL_VERSIONS", KERNELS.map(|k| k.name).to_vec())?;
    module.add("MODEL_VERSION", LINUX_6_1.name)
}

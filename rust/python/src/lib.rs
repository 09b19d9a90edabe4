//! The Python binding: `shadowkvm._core`. Conversions, the GIL, and nothing else; every rule is in `shadowkvm-core`.

mod buffer;
mod errors;
mod hardware;
mod image;
mod number;
mod policy;
mod saved;
mod snapshot;
mod tables;
mod vcpu;
mod vm;

use pyo3::prelude::*;

/// The compiled engine of shadowkvm.
#[pymodule(name = "_core", gil_used = false)]
fn core_module(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<vm::Vm>()?;
    module.add_class::<snapshot::Snapshot>()?;
    module.add_class::<vcpu::Vcpu>()?;
    module.add_class::<vcpu::Outcome>()?;
    module.add_class::<image::Viewer>()?;
    module.add_class::<policy::PageView>()?;
    tables::add(module)
}

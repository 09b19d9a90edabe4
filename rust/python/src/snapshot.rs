//! The state of a VM at one moment, to go back to and to take elsewhere.

use crate::hardware::Hardware;
use crate::policy::{Decider, Failure, Source};
use crate::saved;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyType};
use shadowkvm_core::engine::Vm as Engine;
use std::sync::Arc;

/// What a snapshot is made of anew: the bytes of the state, the name of the policy, and what decides beside it.
type Parts<'py> = (Bound<'py, PyBytes>, String, Option<Decider>);

/// The state of a VM at one moment.
#[pyclass(frozen, module = "shadowkvm._core")]
pub(crate) struct Snapshot {
    pub(crate) engine: Engine,
    pub(crate) failure: Option<Failure>,
    pub(crate) source: Arc<Source>,
    pub(crate) hardware: Hardware,
}

#[pymethods]
impl Snapshot {
    /// The snapshot of which these are the bytes.
    #[new]
    #[pyo3(signature = (state, policy, decider=None))]
    fn new(state: &Bound<'_, PyBytes>, policy: String, decider: Option<Decider>) -> PyResult<Self> {
        let py = state.py();
        let source = Arc::new(Source { base: policy, decider });
        let (policy, failure) = source.make(py)?;
        let bytes = state.as_bytes();
        let (engine, hardware) = py.detach(|| saved::read(bytes, policy))?;
        Ok(Self { engine, failure, source, hardware })
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyType>, Parts<'py>)> {
        let bytes = py.detach(|| saved::write(&self.engine, &self.hardware))?;
        let Source { base, decider } = &*self.source;
        let decider =
            decider.as_ref().map(|(object, asks, rules)| (object.clone_ref(py), asks.clone(), rules.clone_ref(py)));
        Ok((py.get_type::<Self>(), (PyBytes::new(py, &bytes), base.clone(), decider)))
    }

    /// As `Vm.state_hash` gave it then.
    fn state_hash(&self) -> u64 {
        self.engine.state_hash()
    }

    fn __repr__(&self) -> String {
        format!("<Snapshot {:#018x}>", self.engine.state_hash())
    }
}

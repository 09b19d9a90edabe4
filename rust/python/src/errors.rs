//! The core's refusals as the exceptions of `shadowkvm.errors`.

use pyo3::prelude::*;
use shadowkvm_core::error::{ConfigError, InvariantError, MemoryError, TraceError};

mod python {
    pyo3::import_exception!(shadowkvm.errors, ConfigError);
    pyo3::import_exception!(shadowkvm.errors, GuestMemoryError);
    pyo3::import_exception!(shadowkvm.errors, InvariantError);
    pyo3::import_exception!(shadowkvm.errors, PolicyError);
    pyo3::import_exception!(shadowkvm.errors, SavedStateError);
    pyo3::import_exception!(shadowkvm.errors, TraceError);
}

/// A setting that was refused.
#[allow(clippy::needless_pass_by_value, reason = "the form that map_err takes")]
pub(crate) fn config(error: ConfigError) -> PyErr {
    python::ConfigError::new_err(error.0)
}

/// A setting that was refused, in the binding's own words.
pub(crate) fn refused(message: String) -> PyErr {
    python::ConfigError::new_err(message)
}

/// Memory that is not the VM's.
#[allow(clippy::needless_pass_by_value, reason = "the form that map_err takes")]
pub(crate) fn memory(error: MemoryError) -> PyErr {
    python::GuestMemoryError::new_err((error.to_string(), error.gpa.0))
}

/// A row that cannot be run. The Python class puts the row's number before the message itself.
pub(crate) fn trace(error: TraceError) -> PyErr {
    python::TraceError::new_err((error.reason, error.index))
}

/// A policy raised an exception, which is the cause.
pub(crate) fn policy(py: Python<'_>, cause: PyErr) -> PyErr {
    let error = python::PolicyError::new_err(format!("the policy raised {}", cause.value(py)));
    error.set_cause(py, Some(cause));
    error
}

/// Bytes that are no saved state, or none that can be gone on from.
pub(crate) fn saved_state(message: String) -> PyErr {
    python::SavedStateError::new_err(message)
}

/// An invariant that does not hold.
#[allow(clippy::needless_pass_by_value, reason = "the form that map_err takes")]
pub(crate) fn invariant(error: InvariantError) -> PyErr {
    python::InvariantError::new_err(error.to_string())
}

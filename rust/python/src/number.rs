//! Numbers as the engine takes them: 0 to 2^64 - 1, and a `ConfigError` that names the limit for anything beyond.

use crate::errors;
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

/// An unsigned 64-bit number: an address, a value, a size.
pub(crate) fn word(object: &Bound<'_, PyAny>) -> PyResult<u64> {
    object.extract::<u64>().map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(object.py()) {
            errors::refused(format!("{object} is out of range: numbers here are 0 to 2**64 - 1"))
        } else {
            error
        }
    })
}

/// The same, or None.
pub(crate) fn maybe_word(object: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    if object.is_none() { Ok(None) } else { word(object).map(Some) }
}

/// An unsigned 128-bit number: a value of 16 bytes.
pub(crate) fn wide_word(object: &Bound<'_, PyAny>) -> PyResult<u128> {
    // Most are narrow, and those are read several times as fast.
    if let Ok(narrow) = object.extract::<u64>() {
        return Ok(narrow.into());
    }
    object.extract::<u128>().map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(object.py()) {
            errors::refused(format!("{object} is out of range: values here are 0 to 2**128 - 1"))
        } else {
            error
        }
    })
}

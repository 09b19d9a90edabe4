//! What is behind Python's buffers, for work without the GIL.

use crate::errors;
use pyo3::buffer::{Element, PyBuffer};
use pyo3::prelude::*;

fn contiguous<T: Element>(buffer: &PyBuffer<T>) -> PyResult<()> {
    if buffer.is_c_contiguous() { Ok(()) } else { Err(errors::refused("the buffer is not contiguous".into())) }
}

/// A buffer's items. It stays what it is as long as the buffer is held, with the GIL or without; another thread that
/// writes it meanwhile makes the values that are read from it any values, which is all that its readers need to bear.
#[allow(
    unsafe_code,
    reason = "PyO3 lends a buffer only with the GIL held; a dump is read, and a trace is run, for seconds"
)]
pub(crate) fn slice<T: Element>(buffer: &PyBuffer<T>) -> PyResult<&[T]> {
    contiguous(buffer)?;
    if buffer.item_count() == 0 {
        return Ok(&[]);
    }
    // SAFETY: the buffer protocol guarantees `item_count` items of T (PyO3 checked the format and the alignment) at
    // `buf_ptr` until the buffer is released, which the borrow outlives not.
    Ok(unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.item_count()) })
}

/// The items of a buffer that nobody else has: the package allocates it for the call.
#[allow(
    unsafe_code,
    reason = "PyO3 lends a buffer only with the GIL held; a dump is read, and a trace is run, for seconds"
)]
#[allow(clippy::mut_from_ref, reason = "the buffer is a handle; what it points to is ours alone")]
pub(crate) fn slice_mut<T: Element>(buffer: &PyBuffer<T>) -> PyResult<&mut [T]> {
    contiguous(buffer)?;
    if buffer.readonly() {
        return Err(errors::refused("the array for results is read-only".into()));
    }
    if buffer.item_count() == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `slice`; and the array was made for this call alone, so nothing else refers to its items.
    Ok(unsafe { std::slice::from_raw_parts_mut(buffer.buf_ptr().cast(), buffer.item_count()) })
}

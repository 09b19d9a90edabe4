//! States as bytes, for pickles: a head, a checksum, and what serde makes of the engine.
//!
//! postcard's bytes do not describe themselves, so a state is read by the version that wrote it and by no other: the head
//! names both the layout and the package. The checksum finds accidents; what is no accident is found by the core's look
//! at every number (`SavedVm::revive`) and by its audit.

use crate::errors;
use crate::hardware::Hardware;
use pyo3::PyResult;
use shadowkvm_core::engine::{SavedVm, Vm};
use shadowkvm_core::paging::{Nested, ShadowTlb};
use shadowkvm_core::policy::Policy;
use std::panic::{AssertUnwindSafe, catch_unwind};

const MAGIC: &[u8] = b"shadowkvm state\n";
/// Moves with every change of what is serialised, its order or its types; tests/unit/test_pickle.py notices one.
const SCHEMA: u16 = 3;
const VERSION: &str = env!("CARGO_PKG_VERSION");
const CHECKSUM_BYTES: usize = 4;

/// A state that was read.
pub(crate) type State = (Vm, Hardware);

/// The bytes of a state.
pub(crate) fn write(engine: &Vm, hardware: &Hardware) -> PyResult<Vec<u8>> {
    let payload = postcard::to_allocvec(&(engine, &hardware.tlb, &hardware.nested))
        .map_err(|error| errors::saved_state(format!("the state cannot be written: {error}")))?;
    let head = head();
    let mut bytes = Vec::with_capacity(head.len() + CHECKSUM_BYTES + payload.len());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    bytes.extend_from_slice(&payload);
    Ok(bytes)
}

/// The state that bytes hold, with a policy of the caller's.
pub(crate) fn read(bytes: &[u8], policy: Box<dyn Policy>) -> PyResult<State> {
    let payload = payload(bytes).map_err(errors::saved_state)?;
    // The checks below are to find everything that could make the engine panic. Should one be missing, the caller is
    // still told that the bytes are to blame.
    let state = catch_unwind(AssertUnwindSafe(|| decode(payload, policy)));
    let state = state.unwrap_or_else(|_| Err("a number in it leads to nothing".into()));
    state.map_err(|why| errors::saved_state(format!("the saved state is damaged: {why}")))
}

fn decode(payload: &[u8], policy: Box<dyn Policy>) -> Result<State, String> {
    type Parts = (SavedVm, Option<ShadowTlb>, Option<Nested>);
    let ((vm, tlb, nested), rest) = postcard::take_from_bytes::<Parts>(payload).map_err(|error| error.to_string())?;
    if !rest.is_empty() {
        return Err(format!("{} bytes too many", rest.len()));
    }
    let vm = vm.revive(policy).map_err(|error| error.to_string())?;
    let vcpus = vm.vcpus().len();
    tlb.as_ref().map_or(Ok(()), |tlb| tlb.check_bounds(vcpus)).map_err(|error| error.to_string())?;
    nested.as_ref().map_or(Ok(()), |nested| nested.check_bounds(vcpus)).map_err(|error| error.to_string())?;
    Ok((vm, Hardware { tlb, nested }))
}

/// What stands before the checksum: magic, schema, length and text of the version.
fn head() -> Vec<u8> {
    [MAGIC, &SCHEMA.to_le_bytes(), &[VERSION.len() as u8], VERSION.as_bytes()].concat()
}

/// What stands behind the checksum, if it is right.
fn payload(bytes: &[u8]) -> Result<&[u8], String> {
    let cut_off = || "the saved state is damaged: it ends in its head".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or("these bytes are no saved state of shadowkvm")?;
    let (schema, rest) = rest.split_first_chunk().ok_or_else(cut_off)?;
    let (length, rest) = rest.split_first().ok_or_else(cut_off)?;
    let (version, rest) = rest.split_at_checked((*length).into()).ok_or_else(cut_off)?;
    let schema = u16::from_le_bytes(*schema);
    if schema != SCHEMA || version != VERSION.as_bytes() {
        let version = String::from_utf8_lossy(version);
        return Err(format!(
            "a saved state of shadowkvm {version:?}, schema {schema}; this is {VERSION:?}, schema {SCHEMA}, and a state \
             is read by the version that wrote it"
        ));
    }
    let (sum, payload) = rest.split_first_chunk().ok_or_else(cut_off)?;
    if crc32fast::hash(payload) != u32::from_le_bytes(*sum) {
        return Err("the saved state is damaged: its checksum is another".into());
    }
    Ok(payload)
}

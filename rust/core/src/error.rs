//! Misuse of the API. What a guest does wrong is never an error: it is an [`Outcome`](crate::outcome::Outcome).

use crate::types::Gpa;
use thiserror::Error;

/// A setting, register value or host request that the engine refuses; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Host access to memory that is not the VM's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("guest memory: nothing is at gpa {gpa:#x} ({size} bytes from {start:#x} on were asked for)")]
pub struct MemoryError {
    /// The first address that could not be reached.
    pub gpa: Gpa,
    /// Where the access began.
    pub start: Gpa,
    /// How many bytes it wanted.
    pub size: u64,
}

/// A row of a trace that cannot be run; the rows before it were.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("row {index}: {reason}")]
pub struct TraceError {
    /// The row's number in the trace.
    pub index: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// An invariant of the shadow tables does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", .0.join("\n"))]
pub struct InvariantError(pub Vec<String>);

impl InvariantError {
    /// Refuses with `text` unless something holds.
    pub(crate) fn unless(holds: bool, text: &str) -> Result<(), Self> {
        if holds { Ok(()) } else { Err(Self(vec![text.to_owned()])) }
    }
}

/// Any refusal of a host request.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// See [`ConfigError`].
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// See [`MemoryError`].
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// See [`TraceError`].
    #[error(transparent)]
    Trace(#[from] TraceError),
}

/// Shorthand for a refusal with a formatted reason.
macro_rules! refuse {
    ($($arg:tt)*) => { Err($crate::error::ConfigError(format!($($arg)*))) };
}
pub(crate) use refuse;

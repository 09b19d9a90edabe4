//! Linux KVM's x86 shadow MMU (6.1, 6.12) as a library: guest walks, shadow pages, write protection, unsync, emulated writes,
//! zapping, event for event and in KVM's own names.
//!
//! No I/O, no clock, no randomness, no Python. The arrows (left may never import right; checked by `tests/arrows.rs`):
//!
//! ```text
//! types bits words | role | error outcome kernel config counters events ops | policy memory | mode | cpu | guest | image | shadow | hw | fault |
//! engine audit | paging
//! ```
//!
//! [`engine::Vm`] is the door: [`engine::Vm::step`] runs one operation, [`engine::Vm::run`] a trace.
#![forbid(unsafe_code)]

pub mod audit;
pub mod bits;
pub mod config;
pub mod counters;
pub mod cpu;
pub mod engine;
pub mod error;
pub mod events;
pub mod fault;
pub mod guest;
pub mod hw;
pub mod image;
pub mod kernel;
pub mod memory;
pub mod mode;
pub mod ops;
pub mod outcome;
pub mod paging;
pub mod policy;
pub mod role;
pub mod shadow;
pub mod types;
mod words;

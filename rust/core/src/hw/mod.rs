//! The hardware: what the CPU does with the shadow tables.

pub mod walk;

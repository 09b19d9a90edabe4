//! The guest's own page tables: their entries, their rights, and the walk through them.

pub mod gpte;
pub mod walk;

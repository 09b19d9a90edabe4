//! Whether the lists of a state that was read end.

use super::{BLOCK, ListPool, NONE, Shape, shape};
use crate::error::InvariantError;
use crate::types::RmapHead;

impl ListPool {
    /// Refuses blocks that name others which are not there, or each other in a circle.
    pub(crate) fn check_bounds(&self) -> Result<(), InvariantError> {
        let unless = InvariantError::unless;
        let count = self.blocks.len();
        unless(self.free.iter().all(|at| (*at as usize) < count), "a free block of a list beyond the last")?;
        // How often each block is named: a free one counts as named, since no list may hold it.
        let mut named = vec![0_u32; count];
        for at in &self.free {
            named[*at as usize] += 1;
        }
        let in_use: Vec<_> = (0..count).filter(|at| named[*at] == 0).collect();
        let goes_on = |at: u32| at == NONE || (at as usize) < count;
        unless(self.blocks.iter().all(|block| goes_on(block.more)), "a block of a list that goes on beyond the last")?;
        for at in &in_use {
            let block = &self.blocks[*at];
            let next = block.more as usize;
            unless((1..=BLOCK).contains(&block.len.into()), "a block of a list without entries")?;
            if block.more != NONE {
                named[next] += 1;
            }
        }
        unless(named.iter().all(|times| *times <= 1), "a block that is in two lists")?;
        let firsts: Vec<_> = in_use.iter().filter(|at| named[**at] == 0).collect();
        let in_lists: usize = firsts.into_iter().map(|at| self.length(*at)).sum();
        unless(in_lists == in_use.len(), "a list that never ends")
    }

    /// Blocks of the list that begins at `at`; no block is named twice, so it ends.
    fn length(&self, at: usize) -> usize {
        let next = |at: &usize| Some(self.blocks[*at].more).filter(|more| *more != NONE).map(|more| more as usize);
        std::iter::successors(Some(at), next).count()
    }

    /// Whether the list that a head names is there.
    pub(crate) fn has(&self, head: RmapHead) -> bool {
        match shape(head) {
            Shape::Empty | Shape::One(_) => true,
            Shape::Chain(at) => self.blocks.get(at as usize).is_some_and(|block| block.len > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::SptePos;

    #[test]
    fn circles_and_lost_ends_are_found() {
        let mut pool = ListPool::default();
        let mut head = RmapHead::default();
        for n in 0..40 {
            pool.add(&mut head, SptePos(n));
        }
        assert_eq!((pool.check_bounds(), pool.has(head), pool.has(RmapHead(200))), (Ok(()), true, false));
        for (more, expected) in [(0, "never ends"), (1, "two lists"), (9, "beyond the last")] {
            let mut harmed = pool.clone();
            harmed.blocks[2].more = more;
            let text = harmed.check_bounds().unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
        pool.free.push(1);
        assert!(pool.check_bounds().is_err(), "a free block in a list");
    }
}

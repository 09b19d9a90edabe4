//! Lists of shadow entries: which entries map a frame (rmap), and which point to a table (parents).
//!
//! As in KVM 6.1 (`pte_list_add` and neighbours) a head is empty, holds one entry itself, or names a chain of blocks
//! of 14. A new entry goes to the end; a removed one is replaced by the last of its block.

mod bounds;

use crate::types::{RmapHead, SptePos};
use serde::{Deserialize, Serialize};

/// Entries of one block (`PTE_LIST_EXT`).
const BLOCK: usize = 14;
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Block {
    entries: [SptePos; BLOCK],
    len: u8,
    more: u32,
}

/// The blocks of all lists of a VM.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ListPool {
    blocks: Vec<Block>,
    free: Vec<u32>,
}

enum Shape {
    Empty,
    One(SptePos),
    Chain(u32),
}

// 0 = empty, odd = one entry, even = block number + 1.
const fn shape(head: RmapHead) -> Shape {
    match head.0 {
        0 => Shape::Empty,
        h if h & 1 == 1 => Shape::One(SptePos(h >> 1)),
        h => Shape::Chain((h >> 1) - 1),
    }
}

const fn chain(block: u32) -> RmapHead {
    RmapHead((block + 1) << 1)
}

impl RmapHead {
    /// A list of one entry.
    #[inline(always)]
    pub(crate) const fn one(pos: SptePos) -> Self {
        Self(pos.0 << 1 | 1)
    }
}

impl ListPool {
    fn block(&mut self, first: SptePos, second: Option<SptePos>) -> u32 {
        let mut entries = [first; BLOCK];
        entries[1] = second.unwrap_or(first);
        let block = Block { entries, len: if second.is_some() { 2 } else { 1 }, more: NONE };
        if let Some(at) = self.free.pop() {
            self.blocks[at as usize] = block;
            at
        } else {
            self.blocks.push(block);
            self.blocks.len() as u32 - 1
        }
    }

    /// Bytes that the lists of more than one entry take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.blocks.len() * size_of::<Block>()
    }

    /// Appends an entry; returns how many the list had before.
    #[inline]
    pub fn add(&mut self, head: &mut RmapHead, pos: SptePos) -> u32 {
        if *head == RmapHead::default() {
            *head = RmapHead::one(pos);
            return 0;
        }
        self.add_to_some(head, pos)
    }

    fn add_to_some(&mut self, head: &mut RmapHead, pos: SptePos) -> u32 {
        match shape(*head) {
            Shape::Empty => 0,
            Shape::One(first) => {
                *head = chain(self.block(first, Some(pos)));
                1
            }
            Shape::Chain(mut at) => {
                let mut before = 0;
                loop {
                    let block = &mut self.blocks[at as usize];
                    let len = usize::from(block.len);
                    if len < BLOCK {
                        block.entries[len] = pos;
                        block.len += 1;
                        return before + len as u32;
                    }
                    before += BLOCK as u32;
                    if block.more == NONE {
                        let next = self.block(pos, None);
                        self.blocks[at as usize].more = next;
                        return before;
                    }
                    at = block.more;
                }
            }
        }
    }

    /// Removes an entry.
    ///
    /// # Panics
    /// If the entry is not in the list: the bookkeeping is broken, and going on would corrupt it further.
    #[inline]
    pub fn remove(&mut self, head: &mut RmapHead, pos: SptePos) {
        match shape(*head) {
            Shape::Empty => panic!("{pos:?} is not in an empty list"),
            Shape::One(only) => {
                assert_eq!(only, pos, "the list holds another entry");
                *head = RmapHead::default();
            }
            Shape::Chain(first) => self.remove_from_chain(head, first, pos),
        }
    }

    fn remove_from_chain(&mut self, head: &mut RmapHead, first: u32, pos: SptePos) {
        let (mut prev, mut at) = (NONE, first);
        loop {
            let block = &mut self.blocks[at as usize];
            let len = usize::from(block.len);
            if let Some(i) = block.entries[..len].iter().position(|p| *p == pos) {
                block.entries[i] = block.entries[len - 1];
                block.len -= 1;
                if block.len == 0 {
                    let more = block.more;
                    self.free.push(at);
                    match (prev, more) {
                        (NONE, NONE) => *head = RmapHead::default(),
                        (NONE, more) => *head = chain(more),
                        (prev, more) => self.blocks[prev as usize].more = more,
                    }
                }
                return;
            }
            assert_ne!(block.more, NONE, "{pos:?} is not in the list");
            (prev, at) = (at, block.more);
        }
    }

    /// The entries of a list, in their order.
    pub fn iter(&self, head: RmapHead) -> impl Iterator<Item = SptePos> + '_ {
        let mut single = match shape(head) {
            Shape::One(pos) => Some(pos),
            Shape::Empty | Shape::Chain(_) => None,
        };
        let mut at = match shape(head) {
            Shape::Chain(at) => at,
            Shape::Empty | Shape::One(_) => NONE,
        };
        let mut i = 0;
        std::iter::from_fn(move || {
            if single.is_some() {
                return single.take();
            }
            while at != NONE {
                let block = &self.blocks[at as usize];
                if i < usize::from(block.len) {
                    i += 1;
                    return Some(block.entries[i - 1]);
                }
                (at, i) = (block.more, 0);
            }
            None
        })
    }

    /// The entry of a list of one.
    #[inline]
    #[must_use]
    pub const fn only(&self, head: RmapHead) -> Option<SptePos> {
        match shape(head) {
            Shape::One(pos) => Some(pos),
            Shape::Empty | Shape::Chain(_) => None,
        }
    }

    /// The first entry of a list.
    #[must_use]
    pub fn first(&self, head: RmapHead) -> Option<SptePos> {
        match shape(head) {
            Shape::Empty => None,
            Shape::One(pos) => Some(pos),
            Shape::Chain(at) => Some(self.blocks[at as usize].entries[0]),
        }
    }

    /// Removes some entry and returns it; `None` from an empty list.
    #[inline]
    pub fn pop(&mut self, head: &mut RmapHead) -> Option<SptePos> {
        match shape(*head) {
            Shape::Empty => None,
            Shape::One(only) => {
                *head = RmapHead::default();
                Some(only)
            }
            Shape::Chain(first) => {
                let block = &self.blocks[first as usize];
                let last = block.entries[usize::from(block.len) - 1];
                self.remove_from_chain(head, first, last);
                Some(last)
            }
        }
    }

    /// Empties a list and returns its entries.
    pub fn take(&mut self, head: &mut RmapHead) -> Vec<SptePos> {
        let all = self.iter(*head).collect();
        if let Shape::Chain(mut at) = shape(*head) {
            while at != NONE {
                self.free.push(at);
                at = self.blocks[at as usize].more;
            }
        }
        *head = RmapHead::default();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(n: u32) -> (ListPool, RmapHead) {
        let (mut pool, mut head) = (ListPool::default(), RmapHead::default());
        for i in 0..n {
            assert_eq!(pool.add(&mut head, SptePos(i)), i);
        }
        (pool, head)
    }

    #[test]
    fn entries_keep_their_order() {
        for n in [0, 1, 2, 14, 15, 40] {
            let (pool, head) = list(n);
            assert_eq!(pool.iter(head).map(|p| p.0).collect::<Vec<_>>(), (0..n).collect::<Vec<_>>());
            assert_eq!(pool.first(head).map(|p| p.0), (n > 0).then_some(0));
        }
    }

    #[test]
    fn the_last_of_a_block_fills_a_hole() {
        let (mut pool, mut head) = list(20);
        pool.remove(&mut head, SptePos(3));
        let order: Vec<_> = pool.iter(head).map(|p| p.0).collect();
        assert_eq!(&order[..5], [0, 1, 2, 13, 4]);
        assert_eq!(pool.add(&mut head, SptePos(99)), 13, "the first block with room takes the next one");
    }

    #[test]
    fn lists_become_empty_again_and_blocks_are_reused() {
        for take in [true, false] {
            let (mut pool, mut head) = list(40);
            if take {
                assert_eq!(pool.take(&mut head).len(), 40);
            } else {
                for i in (0..40).rev() {
                    pool.remove(&mut head, SptePos(i));
                }
            }
            assert_eq!(head, RmapHead::default());
            assert_eq!(pool.free.len(), pool.blocks.len());
        }
    }
}

//! A cache of translations: set-associative, the least recently used way goes first.

use serde::{Deserialize, Serialize};

/// What a line is found by: which page (or table), and whose.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
struct Line {
    /// The tag, 0 = empty. Tags are moved by one so that none is 0.
    tag: u64,
    /// The address space, as the TLB numbers it.
    space: u32,
    /// What is kept with it.
    value: u32,
}

/// A cache of `sets` times `ways` lines. One without lines holds nothing and misses always.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Cache {
    lines: Vec<Line>,
    ways: usize,
    sets: u64,
}

impl Cache {
    /// A cache of `entries` lines, `ways` a set; `ways` divides `entries`.
    pub(super) fn new(entries: usize, ways: usize) -> Self {
        let sets = entries.checked_div(ways).unwrap_or(0);
        Self { lines: vec![Line::default(); sets * ways], ways, sets: sets as u64 }
    }

    /// Whether there are as many lines as sets and ways say; of a cache that was read.
    pub(super) fn is_whole(&self) -> bool {
        usize::try_from(self.sets).ok().and_then(|sets| sets.checked_mul(self.ways)) == Some(self.lines.len())
    }

    fn set(&mut self, tag: u64) -> &mut [Line] {
        let first = (tag % self.sets.max(1)) as usize * self.ways;
        &mut self.lines[first..first + if self.sets == 0 { 0 } else { self.ways }]
    }

    /// Looks a line up, and makes it the one used last.
    pub(super) fn get(&mut self, tag: u64, space: u32) -> Option<u32> {
        let set = self.set(tag);
        let at = set.iter().position(|line| line.tag == tag + 1 && line.space == space)?;
        set[..=at].rotate_right(1);
        Some(set[0].value)
    }

    /// Puts a line in as the one used last; the one used least goes.
    pub(super) fn put(&mut self, tag: u64, space: u32, value: u32) {
        let line = Line { tag: tag + 1, space, value };
        let set = self.set(tag);
        if set.is_empty() {
            return;
        }
        let at = set.iter().position(|old| old.tag == line.tag && old.space == space).unwrap_or(set.len() - 1);
        set[..=at].rotate_right(1);
        set[0] = line;
    }

    /// Takes a line out.
    pub(super) fn drop_line(&mut self, tag: u64, space: u32) {
        if let Some(line) = self.set(tag).iter_mut().find(|line| line.tag == tag + 1 && line.space == space) {
            *line = Line::default();
        }
    }

    /// Empties it.
    pub(super) fn clear(&mut self) {
        self.lines.fill(Line::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_used_least_goes_first() {
        let mut cache = Cache::new(4, 2);
        cache.put(2, 1, 20);
        cache.put(4, 1, 40);
        assert_eq!(cache.get(2, 1), Some(20));
        cache.put(6, 1, 60);
        assert_eq!((cache.get(4, 1), cache.get(2, 1), cache.get(6, 1)), (None, Some(20), Some(60)));
        assert_eq!(cache.get(2, 2), None, "another space");
        cache.put(2, 1, 21);
        assert_eq!((cache.get(2, 1), cache.get(6, 1)), (Some(21), Some(60)), "in place of itself");
        cache.drop_line(2, 1);
        assert_eq!(cache.get(2, 1), None);
    }

    #[test]
    fn one_without_lines_misses_always() {
        let mut cache = Cache::new(0, 0);
        cache.put(1, 1, 1);
        cache.drop_line(1, 1);
        cache.clear();
        assert_eq!(cache.get(1, 1), None);
    }
}

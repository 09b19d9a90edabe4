//! The guest's memory with all values that each word has had.

use std::collections::BTreeMap;

pub(crate) const A: u64 = 1 << 5;
pub(crate) const D: u64 = 1 << 6;

/// The place of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    pub(crate) gfn: u64,
    /// Which word of 8 bytes.
    pub(crate) word: usize,
    /// Entries of 4 bytes: the lower or the upper half.
    pub(crate) half: Option<bool>,
}

impl At {
    /// Entry `index` of a table with entries of 4 or 8 bytes.
    pub(crate) fn entry(gfn: u64, index: usize, four_bytes: bool) -> Self {
        if four_bytes {
            Self { gfn, word: index / 2, half: Some(index % 2 == 1) }
        } else {
            Self { gfn, word: index, half: None }
        }
    }

    /// The entry in its word.
    pub(crate) fn of(self, word: u64) -> u64 {
        match self.half {
            None => word,
            Some(false) => word & 0xffff_ffff,
            Some(true) => word >> 32,
        }
    }

    /// Bits of the entry as bits of its word.
    pub(crate) fn in_word(self, bits: u64) -> u64 {
        if self.half == Some(true) { bits << 32 } else { bits }
    }
}

/// A value of a word, and from which operation to which it was there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Version {
    pub(crate) value: u64,
    pub(crate) from: u64,
    pub(crate) to: u64,
}

static ZEROS: [u64; 512] = [0; 512];

/// The guest's memory as it is, and what was in the words that changed.
#[derive(Default)]
pub(crate) struct Memory {
    /// `Some(None)`: all zeros.
    #[allow(clippy::option_option, reason = "no frame, a frame of zeros, a frame with contents")]
    frames: Vec<Option<Option<Box<[u64; 512]>>>>,
    past: BTreeMap<(u64, usize), Past>,
    /// Tables from this frame on may be read-only to the guest: nobody can set A and D there, and KVM does without.
    pub(crate) unmarked: u64,
    /// Those frames are not there at present.
    pub(crate) gone: bool,
}

/// What a word was before, and since when it is what it is.
#[derive(Default)]
struct Past {
    versions: Vec<Version>,
    since: u64,
}

impl Memory {
    pub(crate) fn frame(&self, gfn: u64) -> Option<&[u64; 512]> {
        self.frames.get(usize::try_from(gfn).ok()?)?.as_ref().map(|words| words.as_deref().unwrap_or(&ZEROS))
    }

    /// There is memory, with these words or zeros.
    pub(crate) fn load(&mut self, gfn: u64, words: Option<Box<[u64; 512]>>) {
        if self.frames.len() <= gfn as usize {
            self.frames.resize(gfn as usize + 1, None);
        }
        self.frames[gfn as usize] = Some(words);
    }

    /// An entry as it is now.
    pub(crate) fn entry(&self, at: At) -> Option<u64> {
        self.frame(at.gfn).map(|words| at.of(words[at.word]))
    }

    /// The same, if memory is there at all.
    pub(crate) fn readable(&self, at: At) -> Option<u64> {
        self.entry(at).filter(|_| !(self.gone && at.gfn >= self.unmarked))
    }

    /// The word changes in operation `now`; both values count for it.
    pub(crate) fn change(&mut self, gfn: u64, index: usize, value: u64, now: u64) {
        let Some(Some(words)) = self.frames.get_mut(gfn as usize) else { return };
        let words = words.get_or_insert_with(|| Box::new(ZEROS));
        let past = self.past.entry((gfn, index)).or_default();
        past.versions.push(Version { value: words[index], from: past.since, to: now });
        past.since = now;
        words[index] = value;
    }

    /// The word also had this value, for as long as operation `now` took.
    pub(crate) fn passed_through(&mut self, at: At, value: u64, now: u64) {
        let past = self.past.entry((at.gfn, at.word)).or_default();
        past.versions.push(Version { value, from: now, to: now });
    }

    /// The entry as its readers see it: where A and D cannot be set, as if they were.
    pub(crate) fn marked(&self, table: u64, value: u64) -> u64 {
        if table >= self.unmarked { value | A | D } else { value }
    }

    /// All values of an entry since operation `since`; the last is the present one.
    pub(crate) fn versions(&self, at: At, since: u64) -> Vec<Version> {
        let past = self.past.get(&(at.gfn, at.word));
        let from = past.map_or(0, |past| past.since);
        let present = self.frame(at.gfn).map(|words| Version { value: words[at.word], from, to: u64::MAX });
        let before = past.map_or(&[][..], |past| &past.versions).iter();
        let all = before.filter(|v| v.to >= since).copied().chain(present);
        all.map(|v| Version { value: at.of(v.value), ..v }).collect()
    }
}

//! Many words as few bytes, for a state that leaves the process (serde): tables are long and mostly runs of one value.
//!
//! Bytes are groups: a number (LEB128) whose lowest bit says whether its upper bits count different words, or repetitions
//! of one word; then the words, little-endian. Reading checks every length, so that bytes from elsewhere cannot lead beyond
//! what there is.

use crate::types::ENTRIES;
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::ser::{Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;

/// Equal words in a row from which on a run is shorter than the words.
const RUN: usize = 4;
/// Words of one list; more is damage. The entries of as many shadow pages as there can be.
const MAX_WORDS: u64 = 1 << 31;

/// What fits into a word and is 0 when it is fresh.
pub(crate) trait Word: Copy + Default + PartialEq {
    /// As a word.
    fn word(self) -> u64;
    /// What a word stands for; what does not fit is cut off.
    fn of(word: u64) -> Self;
}

impl Word for u64 {
    fn word(self) -> u64 {
        self
    }

    fn of(word: u64) -> Self {
        word
    }
}

impl Word for u32 {
    fn word(self) -> u64 {
        self.into()
    }

    fn of(word: u64) -> Self {
        word as Self
    }
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..63).step_by(7) {
        let byte = take(bytes, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (first, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(first)
}

fn take_word<T: Word>(bytes: &mut &[u8]) -> Option<T> {
    Some(T::of(u64::from_le_bytes(*take(bytes, 8)?.first_chunk()?)))
}

fn pack<T: Word>(out: &mut Vec<u8>, words: &[T]) {
    let mut rest = words;
    while let Some(first) = rest.first() {
        let same = rest.iter().take_while(|word| *word == first).count();
        if same >= RUN {
            put_number(out, (same as u64) << 1 | 1);
            out.extend_from_slice(&first.word().to_le_bytes());
            rest = &rest[same..];
            continue;
        }
        let runs = rest.windows(RUN).position(|some| some.iter().all(|word| *word == some[0]));
        let (different, after) = rest.split_at(runs.unwrap_or(rest.len()));
        put_number(out, (different.len() as u64) << 1);
        for word in different {
            out.extend_from_slice(&word.word().to_le_bytes());
        }
        rest = after;
    }
}

/// Fills `out`, which is fresh, with just as many words. Runs of fresh ones are not written: memory that nobody touched
/// stays so.
fn unpack<T: Word>(mut bytes: &[u8], mut out: &mut [T]) -> Option<()> {
    while !out.is_empty() {
        let head = take_number(&mut bytes)?;
        let count = usize::try_from(head >> 1).ok().filter(|count| (1..=out.len()).contains(count))?;
        let (here, after) = std::mem::take(&mut out).split_at_mut(count);
        if head & 1 == 0 {
            for (to, from) in here.iter_mut().zip(take(&mut bytes, count * 8)?.as_chunks().0) {
                *to = T::of(u64::from_le_bytes(*from));
            }
        } else {
            let word = take_word(&mut bytes)?;
            if word != T::default() {
                here.fill(word);
            }
        }
        out = after;
    }
    bytes.is_empty().then_some(())
}

/// Words that are written.
struct Packed<'a, T>(&'a [T]);

impl<T: Word> Serialize for Packed<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = Vec::with_capacity(self.0.len() * 8 + 8);
        pack(&mut out, self.0);
        serializer.serialize_bytes(&out)
    }
}

/// Words that were read, made by `F` of the bytes.
struct Read<T, F>(F, PhantomData<T>);

impl<T, F: FnOnce(&[u8]) -> Option<T>> Visitor<'_> for Read<T, F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("packed words")
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<T, E> {
        (self.0)(bytes).ok_or_else(|| E::custom("words that do not fill their table"))
    }
}

struct Table<T>([T; ENTRIES]);

impl<'de, T: Word> Deserialize<'de> for Table<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = |bytes: &[u8]| {
            let mut table = [T::default(); ENTRIES];
            unpack(bytes, &mut table)?;
            Some(Self(table))
        };
        deserializer.deserialize_bytes(Read(read, PhantomData))
    }
}

/// `#[serde(with = "words::table")]`: the words of one table.
pub(crate) mod table {
    use super::{Deserialize, Deserializer, ENTRIES, Packed, Serialize, Serializer, Table, Word};

    pub(crate) fn serialize<T: Word, S: Serializer>(words: &[T; ENTRIES], to: S) -> Result<S::Ok, S::Error> {
        Packed(words).serialize(to)
    }

    pub(crate) fn deserialize<'de, T: Word, D: Deserializer<'de>>(from: D) -> Result<[T; ENTRIES], D::Error> {
        Table::deserialize(from).map(|table| table.0)
    }
}

/// Those of many tables.
pub(crate) mod tables {
    use super::{Deserialize, Deserializer, ENTRIES, Packed, Serializer, Table, Word};

    pub(crate) fn serialize<T: Word, S: Serializer>(tables: &[[T; ENTRIES]], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(tables.iter().map(|table| Packed(table)))
    }

    pub(crate) fn deserialize<'de, T: Word, D: Deserializer<'de>>(from: D) -> Result<Vec<[T; ENTRIES]>, D::Error> {
        Ok(Vec::<Table<T>>::deserialize(from)?.into_iter().map(|table| table.0).collect())
    }
}

/// A list of any length.
pub(crate) mod list {
    use super::{Deserializer, MAX_WORDS, PhantomData, Read, Serializer, Word, pack, put_number, take_number, unpack};

    pub(crate) fn serialize<T: Word, S: Serializer>(words: &[T], to: S) -> Result<S::Ok, S::Error> {
        let mut out = Vec::new();
        put_number(&mut out, words.len() as u64);
        pack(&mut out, words);
        to.serialize_bytes(&out)
    }

    pub(crate) fn deserialize<'de, T: Word, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
        let read = |mut bytes: &[u8]| {
            let count = take_number(&mut bytes).filter(|count| *count <= MAX_WORDS)?;
            let mut words = vec![T::default(); count as usize];
            unpack(bytes, &mut words)?;
            Some(words)
        };
        from.deserialize_bytes(Read(read, PhantomData))
    }
}

/// A list that may not be there.
pub(crate) mod maybe_list {
    use super::{Deserialize, Deserializer, Serialize, Serializer, Word, list};

    struct Lent<'a, T>(&'a [T]);

    impl<T: Word> Serialize for Lent<'_, T> {
        fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
            list::serialize(self.0, to)
        }
    }

    struct Own<T>(Vec<T>);

    impl<'de, T: Word> Deserialize<'de> for Own<T> {
        fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
            list::deserialize(from).map(Self)
        }
    }

    #[allow(clippy::ref_option, reason = "the form that serde calls")]
    pub(crate) fn serialize<T: Word, S: Serializer>(words: &Option<Vec<T>>, to: S) -> Result<S::Ok, S::Error> {
        words.as_deref().map(Lent).serialize(to)
    }

    pub(crate) fn deserialize<'de, T: Word, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<T>>, D::Error> {
        Ok(Option::<Own<T>>::deserialize(from)?.map(|own| own.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(words: &[u64]) -> Vec<u8> {
        let mut out = Vec::new();
        pack(&mut out, words);
        out
    }

    #[test]
    fn words_come_back() {
        let runs: Vec<u64> = [vec![1, 2, 3], vec![0; 300], vec![7; 3], vec![!0; 4], vec![5]].concat();
        for words in [vec![], vec![0], vec![9; 4], vec![9; 5], (0..1000).collect(), runs] {
            let mut back = vec![0; words.len()];
            assert_eq!(unpack(&packed(&words), &mut back), Some(()), "{words:?}");
            assert_eq!(back, words);
        }
        assert_eq!(packed(&[0; 512]).len(), 10, "a table of zeros takes next to no room");
    }

    #[test]
    fn bytes_that_lead_elsewhere_are_refused() {
        let good = packed(&[1, 2, 3, 4, 4, 4, 4, 4]);
        let read = |bytes: &[u8], count: usize| unpack(bytes, &mut vec![0_u64; count]);
        assert_eq!(read(&good, 8), Some(()));
        for (bytes, count) in
            [(&good[..], 7), (&good[..], 9), (&good[..good.len() - 1], 8), (&[0], 1), (&[0xff; 12], 1)]
        {
            assert_eq!(read(bytes, count), None, "{bytes:?} for {count}");
        }
        assert_eq!(read(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1), None, "a run of none");
    }
}

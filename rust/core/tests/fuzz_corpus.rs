//! The fuzzer's corpus, replayed: every input that once found new ground or a bug, with an audit after each act.
//!
//! How inputs are read, and how the corpus is made, stands in fuzz/.
#![allow(missing_docs, unreachable_pub, dead_code, reason = "what the bytes mean is fuzz/'s own code")]

#[path = "../../../fuzz/src/adapt.rs"]
mod adapt;
#[path = "../../../fuzz/src/decode.rs"]
mod decode;
#[path = "../../../fuzz/src/world.rs"]
mod world;

use std::path::Path;

#[test]
fn every_input_of_the_corpus_keeps_all_invariants() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/ops");
    let mut inputs: Vec<_> =
        std::fs::read_dir(&corpus).expect("the corpus").map(|entry| entry.expect("an entry").path()).collect();
    inputs.sort();
    assert!(inputs.len() > 100, "the corpus in {} is not whole", corpus.display());
    let mut acts = 0;
    for input in inputs {
        let data = std::fs::read(&input).expect("readable");
        acts += adapt::run(&data, 1).unwrap_or_else(|error| panic!("{}: {error}", input.display()));
    }
    assert!(acts > 10_000, "only {acts} acts: is the corpus older than src/decode.rs?");
}

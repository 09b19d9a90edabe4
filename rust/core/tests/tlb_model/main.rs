//! An independent second implementation: x86's rules for what a TLB may hold, and the engine held to them.
//!
//! The model walks the guest's tables, in whatever paging mode they are in, and remembers every value that an entry has
//! had. After each operation, each translation in the shadow must be one that the guest's tables gave at some time since
//! the last flush that covers it, each access must have gone where such a translation leads, each fault must be the one
//! that the tables give now, and the registers must be what the manuals say: an illegal write gives #GP and changes
//! nothing.
//!
//! The cases are the same in every run; `SHADOWKVM_PROPTEST_CASES=2000` (or `PROPTEST_CASES`) runs so many of each kind,
//! `SHADOWKVM_PROPTEST_SEED=7` others.
#![allow(missing_docs, unreachable_pub, dead_code, reason = "the guest is shared with fuzz/")]

#[path = "../../../../fuzz/src/adapt.rs"]
mod adapt;
#[path = "../../../../fuzz/src/decode.rs"]
mod decode;
mod guest;
mod model;
#[path = "../../../../fuzz/src/world.rs"]
mod world;

use guest::{Story, Style};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use world::{Machine, Paging};

/// Operations after which the whole shadow is compared. Each access is held to the model all the same.
const SWEEP_EVERY: usize = 3;

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn check(style: Style, cases: u32, salt: u8) {
    let cases = from_env("SHADOWKVM_PROPTEST_CASES").or(from_env("PROPTEST_CASES")).map_or(cases, |n| n as u32);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    let mut seed = [salt; 32];
    seed[..8].copy_from_slice(&from_env("SHADOWKVM_PROPTEST_SEED").unwrap_or(0).to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    let story = guest::story(style);
    if let Err(error) = runner.run(&story, |story| run(&story).map_err(TestCaseError::fail)) {
        panic!("{error}");
    }
}

fn run(story: &Story) -> Result<(), String> {
    model::run(story.machine, story.acts.iter().copied(), usize::MAX, SWEEP_EVERY, true)
}

const PLAIN: Style = Style { mode: None, switches: false, host: false, faulty: false };

#[test]
fn what_the_guest_does_by_itself_keeps_to_the_tlbs_rules() {
    check(Style { mode: Some(Paging::Four), ..PLAIN }, 120, 1);
}

#[test]
fn hosts_and_odd_instructions_keep_to_them_too() {
    check(Style { host: true, faulty: true, ..PLAIN }, 200, 2);
}

/// No run of real KVM has shown 5-level paging: this is what there is.
#[test]
fn five_levels_keep_to_them() {
    check(Style { mode: Some(Paging::Five), ..PLAIN }, 150, 3);
    check(Style { mode: Some(Paging::Five), faulty: true, ..PLAIN }, 150, 4);
}

#[test]
fn pae_paging_keeps_to_them() {
    check(Style { mode: Some(Paging::Pae), faulty: true, ..PLAIN }, 120, 5);
}

#[test]
fn thirty_two_bit_paging_keeps_to_them() {
    check(Style { mode: Some(Paging::Two), faulty: true, ..PLAIN }, 120, 6);
}

#[test]
fn switches_of_the_mode_keep_to_them() {
    check(Style { switches: true, faulty: true, ..PLAIN }, 200, 7);
    check(Style { switches: true, host: true, faulty: true, ..PLAIN }, 100, 8);
}

/// The fuzzer knows more ways; of each input the first acts.
#[test]
fn the_fuzzers_corpus_keeps_to_them_too() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/ops");
    for entry in std::fs::read_dir(corpus).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let data = std::fs::read(&path).expect("readable");
        let Some((machine, rest)) = Machine::read(&data) else { continue };
        let acts = rest.as_chunks().0.iter().take(100).map(|record| decode::act(*record, machine.vcpus())).collect();
        run(&Story { machine, acts }).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

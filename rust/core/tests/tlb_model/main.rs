//! An independent second implementation: x86's rules for what a TLB may hold, and the engine held to them.
//!
//! The model walks the guest's tables and remembers every value that an entry has had. After each operation, each
//! translation in the shadow must be one that the guest's tables gave at some time since the last flush that covers it,
//! each access must have gone where such a translation leads, and each fault must be the one that the tables give now.
//!
//! The cases are the same in every run; `SHADOWKVM_PROPTEST_CASES=2000` (or `PROPTEST_CASES`) runs so many of each kind,
//! `SHADOWKVM_PROPTEST_SEED=7` others.
#![allow(missing_docs, unreachable_pub, dead_code, reason = "the guest is shared with fuzz/")]

#[path = "../../../../fuzz/src/decode.rs"]
mod decode;
mod guest;
mod referee;
mod shadow;
mod tlb;
mod touch;
mod walk;
#[path = "../../../../fuzz/src/world.rs"]
mod world;

use guest::{Story, Style};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

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
    let mut vm = world::build(story.kind, story.host);
    let mut referee = referee::of(&vm, story.kind);
    for (i, act) in story.acts.iter().flat_map(|act| decode::parts(*act)).enumerate() {
        if touch::outside(&vm, &act) {
            continue;
        }
        let said = |error: String| format!("after act {i}, {act:x?}:\n{error}");
        let before = referee.before(&vm, &act);
        let outcome = decode::apply(&mut vm, &act);
        referee.after(&vm, &act, before, outcome).map_err(said)?;
        if shadow::hole_was_taken(&vm) {
            return Ok(());
        }
        if i % SWEEP_EVERY == 0 {
            shadow::check(&vm, &referee).map_err(said)?;
        }
        vm.audit().map_err(|error| said(error.to_string()))?;
    }
    shadow::check(&vm, &referee)
}

#[test]
fn what_the_guest_does_by_itself_keeps_to_the_tlbs_rules() {
    check(Style { host: false, faulty: false }, 400, 1);
}

#[test]
fn hosts_and_odd_instructions_keep_to_them_too() {
    check(Style { host: true, faulty: true }, 400, 2);
}

/// The fuzzer knows more ways; of each input the first acts.
#[test]
fn the_fuzzers_corpus_keeps_to_them_too() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/ops");
    for entry in std::fs::read_dir(corpus).expect("the corpus") {
        let path = entry.expect("an entry").path();
        let data = std::fs::read(&path).expect("readable");
        let [kind, host, rest @ ..] = data.as_slice() else { continue };
        let vcpus = world::build(*kind, *host).vcpus().len();
        let acts = rest.as_chunks().0.iter().take(100).map(|record| decode::act(*record, vcpus)).collect();
        let story = Story { kind: *kind, host: *host, acts };
        run(&story).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

//! Bytes -> a guest and its host -> audit. Any panic and any broken invariant is a crash.
#![no_main]

use libfuzzer_sys::fuzz_target;

// An audit costs as much as several operations: one in so many is followed by one, and the last always is. Replaying a
// finding (rust/core/tests/fuzz_corpus.rs) audits after each.
const AUDIT_EVERY: usize = 8;

fuzz_target!(|data: &[u8]| {
    if let Err(finding) = shadowkvm_fuzz::run(data, AUDIT_EVERY) {
        panic!("{finding}");
    }
});

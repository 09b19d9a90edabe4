//! Bytes -> a guest -> the TLB model of rust/core/tests/tlb_model. A translation that no walk since the last flush gives
//! is a crash.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Err(finding) = shadowkvm_fuzz::run_model(data, 8) {
        panic!("{finding}");
    }
});

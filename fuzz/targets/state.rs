//! See [`sanderling_fuzz::state`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::state(bytes));

//! See [`sanderling_fuzz::tokens`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::tokens(bytes));

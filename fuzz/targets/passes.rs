//! See [`sanderling_fuzz::passes`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::passes(bytes));

//! See [`sanderling_fuzz::payload`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::payload(bytes));

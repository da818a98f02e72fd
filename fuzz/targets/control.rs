//! See [`sanderling_fuzz::control`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::control(bytes));

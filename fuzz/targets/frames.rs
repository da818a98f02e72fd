//! See [`sanderling_fuzz::frames`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::frames(bytes));

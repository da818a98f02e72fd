//! See [`sanderling_fuzz::texts`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::texts(bytes));

//! See [`sanderling_fuzz::checkpoint`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::checkpoint(bytes));

//! See [`sanderling_fuzz::journal`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::journal(bytes));

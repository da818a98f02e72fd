//! See [`sanderling_fuzz::shards`].

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sanderling_fuzz::shards(bytes));

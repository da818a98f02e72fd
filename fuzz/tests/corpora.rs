//! Everything that fuzzing has found worth keeping, again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a failure names the input")]

use std::path::Path;

use sanderling_fuzz::TARGETS;

#[test]
fn corpora_are_decoded_as_they_were() {
    for (name, target) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let inputs = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let mut inputs: Vec<_> = inputs.collect();
        inputs.sort();
        assert!(inputs.len() >= 5, "{} has {} inputs", folder.display(), inputs.len());
        for input in inputs {
            println!("{}", input.display());
            target(&std::fs::read(&input).unwrap());
        }
    }
}

//! The cores have no IO, no clock and no global randomness, so that the same code runs over QUIC, in one process and
//! in the simulator.

use std::path::{Path, PathBuf};

/// What no core may name.
const FORBIDDEN: [&str; 13] = [
    "tokio",
    "quinn",
    "std::net",
    "std::fs",
    "std::io",
    "std::time",
    "std::thread",
    "std::env",
    "Instant",
    "SystemTime",
    "getrandom",
    "tracing",
    "println!",
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn core_sources() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = Vec::new();
    for folder in ["server/src/core", "worker/src/core", "common/src/sparse"] {
        sources(&root.join(folder), &mut found);
    }
    found
}

#[test]
fn cores_are_pure() {
    let files = core_sources();
    assert!(files.len() > 10, "the cores were moved: {files:?}");
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"));
        for (number, line) in code {
            let named = FORBIDDEN.iter().find(|word| line.contains(*word));
            assert!(named.is_none(), "{}:{}: a core names {named:?}", path.display(), number + 1);
        }
    }
}

#[test]
fn server_and_worker_never_see_each_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for (member, other) in [("server", "sanderling-worker"), ("worker", "sanderling-server")] {
        let manifest = std::fs::read_to_string(root.join(member).join("Cargo.toml")).unwrap();
        assert!(!manifest.contains(other), "{member} depends on {other}");
    }
}

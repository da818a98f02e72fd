//! The soak in short: processes that are really killed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use serde_json::Value;

#[test]
fn a_run_whose_processes_are_killed_is_what_its_journal_makes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("soak");
    let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling"));
    command.args(["chaos", "--minutes", "0.3", "--workers", "3", "--kill-every-s", "2", "--out"]).arg(&out);
    let output = command.output().unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{complained}");
    assert!(said.contains("bit for bit"), "{said}");
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("chaos.json")).unwrap()).unwrap();
    let count = |key: &str| report[key].as_u64().unwrap();
    assert!(count("server_kills") >= 2 && count("worker_kills") >= 2, "{report}");
    let findings = &report["findings"];
    assert!(
        findings["steps"].as_u64().unwrap() > 10 && findings["replicas"].as_u64().unwrap() > 0,
        "{report}"
    );

    // A folder that holds a soak is not used again, and what is no time is refused.
    let again = command.output().unwrap();
    assert!(!again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("there is a soak"), "{again:?}");
    let none =
        Command::new(env!("CARGO_BIN_EXE_sanderling")).args(["chaos", "--minutes", "-1"]).output().unwrap();
    assert_eq!(none.status.code(), Some(2), "{none:?}");
}

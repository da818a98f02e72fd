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
    assert!(findings["places"].as_u64().unwrap() > 0 && report["failure"].is_null(), "{report}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(out.join("join")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "it holds the token");
    }

    // A folder that holds a soak is not used again, and what is no time is refused.
    let again = command.output().unwrap();
    assert!(!again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("there is a soak"), "{again:?}");
    let none =
        Command::new(env!("CARGO_BIN_EXE_sanderling")).args(["chaos", "--minutes", "-1"]).output().unwrap();
    assert_eq!(none.status.code(), Some(2), "{none:?}");
    let none =
        Command::new(env!("CARGO_BIN_EXE_sanderling")).args(["chaos", "--workers", "0"]).output().unwrap();
    assert_eq!(none.status.code(), Some(2), "{none:?}");
}

/// A soak whose server is ready.
#[cfg(unix)]
fn begun(out: &std::path::Path) -> std::process::Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling"));
    command.args(["chaos", "--minutes", "30", "--workers", "2", "--out"]).arg(out);
    let mut soak = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    while !out.join("worker-1.log").exists() {
        assert_eq!(soak.try_wait().unwrap(), None, "it goes on");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    soak
}

/// Nothing of a soak that is killed goes on.
#[cfg(unix)]
#[test]
fn the_processes_of_a_soak_that_is_killed_end_with_it() {
    use sanderling_common::folder_lock::FolderLock;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("soak");
    let mut soak = begun(&out);
    // So that there is a worker that uses its folder.
    while !out.join("worker-0/lock").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    soak.kill().unwrap();
    soak.wait().unwrap();
    for name in ["state", "worker-0"] {
        let started = std::time::Instant::now();
        while let Err(error) = FolderLock::take(&out.join(name)) {
            assert!(started.elapsed() < std::time::Duration::from_secs(60), "{error}");
        }
    }
}

#[cfg(unix)]
#[test]
fn a_soak_that_does_not_come_to_its_end_says_why_in_its_report() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("soak");
    let mut soak = begun(&out);
    let id = rustix::process::Pid::from_child(&soak);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    assert!(!soak.wait().unwrap().success());
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("chaos.json")).unwrap()).unwrap();
    assert_eq!(report["failure"], "interrupted", "{report}");
}

//! What a person sees who types a command: exit codes, one sentence when something is wrong, and results.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn sanderling(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sanderling")).args(arguments).current_dir(folder).output().unwrap()
}

/// Runs `train` and expects it to fail with this code and a single line that contains `words`.
fn fails(folder: &Path, arguments: &[&str], code: i32, words: &str) -> String {
    let output = sanderling(folder, &[&["train"], arguments].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    let first = said.lines().next().unwrap();
    assert!(first.starts_with("error: ") && said.contains(words), "{arguments:?}: {said}");
    assert!(!said.contains("panicked") && !said.contains("backtrace"), "{said}");
    said
}

#[test]
fn bad_settings_are_named_with_what_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |arguments, words| drop(fails(folder.path(), arguments, 2, words));
    fails(&["--workers", "0"], "workers = 0");
    fails(&["--keep", "0"], "keep = 0");
    fails(&["--keep", "1.5"], "(0, 1]");
    fails(&["--secondary=-1"], "secondary");
    fails(&["--top-k", "9"], "only 8 experts");
    fails(&["--hidden-size", "36", "--heads", "12"], "even head size");
    fails(&["--method", "msgd"], "one worker");
    fails(&["--name", "a/b"], "plain file name");
    fails(&["--name", "a\tb"], "control characters");
    fails(&["--workers", "300"], "sessions_max = 256");
    fails(&["--learning-rate", "-1"], "learning_rate = -1");
    fails(&["--seed", "18446744073709551615"], "seed = 18446744073709551615");
    fails(&["--text", ""], "text = \"\"");
    fails(&["--advertise", "a/b?c"], "advertise = \"a/b?c\"");
    fails(&["--stepz", "3"], "--steps");
    fails(&["--config", "absent.toml"], "absent.toml");
}

#[test]
fn bad_run_files_are_named_with_the_place() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    for (text, words) in [
        ("[training]\nstep = 5", "did you mean steps"),
        ("[trainin]\nsteps = 5", "did you mean [training]"),
        ("[training\n", "line 1"),
        ("[training]\nsteps = 'x'", "line 2, column 9"),
    ] {
        fs::write(&file, text).unwrap();
        let said = fails(folder.path(), &["--config", "run.toml"], 2, words);
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn bad_texts_and_places_are_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("empty.txt"), "").unwrap();
    fs::write(folder.path().join("latin1.txt"), [0xe9; 5000]).unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let fails = |arguments, words| drop(fails(folder.path(), arguments, 1, words));
    fails(&["--text", "absent.txt"], "absent.txt");
    fails(&["--text", "empty.txt"], "empty.txt");
    fails(&["--text", "latin1.txt"], "latin1.txt");
    fails(&["--text", "."], "not a regular file");
    #[cfg(unix)]
    fails(&["--text", "/dev/zero"], "not a regular file");
    fails(&["--listen", "nowhere"], "nowhere");
    fails(&["--runs-dir", "file/runs"], "file/runs");
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    fails(&["--listen", &address], "in use");
}

#[test]
fn a_run_leaves_its_results_and_can_be_repeated_from_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let small = [
        "--overlap",
        "--steps",
        "8",
        "--eval-every",
        "4",
        "--workers",
        "2",
        "--batch-size",
        "2",
        "--hidden-size",
        "32",
        "--layers",
        "1",
        "--context",
        "32",
        "--name",
        "small",
        // Workers of this process need no name service.
        "--advertise",
        "nowhere.invalid",
    ];
    let output = sanderling(folder.path(), &[&["train"], &small[..]].concat());
    let table = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    for row in ["best validation loss", "test loss", "fewer than dense", "staleness", "checkpoint"] {
        assert!(table.contains(row), "{table}");
    }
    let results = folder.path().join("runs/small");
    for file in [
        "run.toml",
        "metrics.jsonl",
        "summary.json",
        "sample.txt",
        "loss.svg",
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "checkpoint/tokenizer.json",
    ] {
        assert!(fs::metadata(results.join(file)).unwrap().len() > 0, "{file} is empty");
    }
    let summary: serde_json::Value =
        serde_json::from_slice(&fs::read(results.join("summary.json")).unwrap()).unwrap();
    for key in [
        "method",
        "workers",
        "steps",
        "tokens",
        "val_loss",
        "best_val_loss",
        "test_loss",
        "bytes_up",
        "bytes_down",
        "dense_bytes_up",
        "dense_bytes_down",
        "staleness_mean",
        "staleness_max",
        "seconds",
        "tokens_per_second",
        "parameters",
        "active_parameters",
    ] {
        assert!(!summary[key].is_null(), "{key} is missing from {summary}");
    }
    let again = sanderling(folder.path(), &["train", "--config", "runs/small/run.toml"]);
    assert_eq!(again.status.code(), Some(0));
    assert!(folder.path().join("runs/small-2/summary.json").exists(), "results are never overwritten");
}

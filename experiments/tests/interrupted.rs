//! Runs as processes that are ended in the middle: by Ctrl-C, once and twice, and by a kill.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::Duration;

use tempfile::TempDir;

/// A run far too long for a test; it ends with the test at the latest.
struct Endless {
    process: Child,
    /// Standard error.
    said: std::io::Lines<BufReader<ChildStderr>>,
    folder: TempDir,
}

impl Drop for Endless {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Endless {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let arguments = "train --steps 1000000 --eval-every 5 --workers 2 --batch-size 2 --hidden-size 32 \
                         --layers 1 --context 32 --name endless";
        let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling"));
        let command = command.args(arguments.split_whitespace()).current_dir(folder.path());
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(process.stderr.take().unwrap()).lines();
        Self { process, said, folder }
    }

    /// Waits for a line with these words.
    fn wait_for(&mut self, words: &str) {
        assert!(self.said.any(|line| line.unwrap().contains(words)), "it ended before it said {words:?}");
    }

    fn interrupt(&self) {
        let sent = Command::new("kill").args(["-INT", &self.process.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// How it ended, what it printed, and what it said from now on.
    fn end(&mut self) -> (ExitStatus, String, Vec<String>) {
        // A pipe that is not read keeps its program from going on.
        let rest: Vec<String> = self.said.by_ref().map(Result::unwrap).collect();
        let mut printed = String::new();
        self.process.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
        (self.process.wait().unwrap(), printed, rest)
    }

    fn results(&self) -> PathBuf {
        self.folder.path().join("runs/endless")
    }
}

#[test]
fn ctrl_c_ends_a_run_with_its_table_and_checkpoint() {
    let mut run = Endless::start();
    run.wait_for("val loss");
    run.interrupt();
    let (status, table, rest) = run.end();
    assert_eq!(status.code(), Some(0), "{rest:?}");
    for row in ["stopped early", "best validation loss", "test loss", "A sample"] {
        assert!(table.contains(row), "{table}");
    }
    for file in ["summary.json", "loss.svg", "sample.txt", "checkpoint/model.safetensors"] {
        assert!(run.results().join(file).exists(), "{file}");
    }
}

#[test]
fn the_second_ctrl_c_ends_a_run_at_once() {
    let mut run = Endless::start();
    run.wait_for("results go to");
    run.interrupt();
    run.wait_for("Ctrl-C again");
    run.interrupt();
    let (status, _, rest) = run.end();
    // It may have come to its early end just before.
    assert!([Some(130), Some(0)].contains(&status.code()), "{status}: {rest:?}");
}

#[test]
fn a_killed_run_leaves_the_best_model_so_far() {
    let mut run = Endless::start();
    let results = run.results();
    // A better one may be taking its place at any moment, the kill's included.
    let is_saved = |results: &Path| {
        let file = |name: &str| results.join(name).join("model.safetensors").exists();
        file("checkpoint") || file("checkpoint.replaced")
    };
    while !is_saved(&results) {
        assert_eq!(run.process.try_wait().unwrap(), None, "the run goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
    run.process.kill().unwrap();
    assert!(!run.process.wait().unwrap().success());
    assert!(is_saved(&results) && !results.join("summary.json").exists());
}

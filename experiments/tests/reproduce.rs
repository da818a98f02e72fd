//! Every reproduction from end to end, far too short to learn anything: what it writes, and that it makes no run twice.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a reproduction in its short form with so many evaluations; returns its report.
fn reproduce(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_sanderling"))
        .arg("reproduce")
        .args(arguments)
        .args(["--quick", "--out"])
        .arg(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let report = fs::read_to_string(folder.join("README.md")).unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains(&report), "the report is shown");
    report
}

fn results(folder: &Path) -> Vec<serde_json::Value> {
    let lines = fs::read_to_string(folder.join("results.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The pictures that a report shows are there, each also as PNG.
fn pictures(folder: &Path, report: &str) -> Vec<PathBuf> {
    let shown =
        report.lines().filter_map(|line| line.strip_prefix("![")?.split_once("](")?.1.strip_suffix(')'));
    let all: Vec<PathBuf> = shown.map(|name| folder.join(name)).collect();
    for picture in &all {
        assert!(fs::read_to_string(picture).unwrap().contains("</svg>"), "{}", picture.display());
        assert!(fs::read(picture.with_extension("png")).unwrap().starts_with(b"\x89PNG"));
    }
    all
}

/// Runs it twice; the second time there is nothing to do. It takes so many runs, or more where a search goes on beyond its grid.
fn twice(arguments: &[&str], runs: usize) -> String {
    let folder = tempfile::tempdir().unwrap();
    let first = reproduce(folder.path(), arguments);
    let made = results(folder.path());
    assert!(made.len() >= runs, "{arguments:?}: {} runs", made.len());
    assert!(!pictures(folder.path(), &first).is_empty());
    let again = reproduce(folder.path(), arguments);
    assert_eq!(results(folder.path()), made, "{arguments:?}: no run is made twice");
    let without_time = |report: &str| {
        report.lines().filter(|line| !line.starts_with("Made in")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(without_time(&again), without_time(&first));
    for entry in fs::read_dir(folder.path().join("configurations")).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        sanderling_common::config::parse(&text).unwrap().resolve().unwrap();
    }
    first
}

#[test]
fn secondary_tells_what_each_fraction_saves() {
    let report = twice(&["secondary", "--steps", "8"], 5);
    assert!(report.contains("| 8 | 1 % |") && report.contains("times fewer bytes down"), "{report}");
}

#[test]
fn quantisation_has_every_format_each_way() {
    let report = twice(&["quantisation", "--steps", "8"], 10);
    for format in ["bf16", "int8", "sign"] {
        assert!(report.contains(format), "{report}");
    }
}

#[test]
fn staleness_shows_its_distributions() {
    let report = twice(&["staleness", "--steps", "8"], 6);
    assert!(report.contains("one ten times slower") && report.contains("half come and go"), "{report}");
}

#[test]
fn methods_are_all_searched_alike() {
    let report =
        twice(&["methods", "--subject", "digits", "--steps", "8"], 13 + 4 * (1 + 2 + 3 * 2 + 3 * 2 * 2));
    assert!(report.contains("dgs ≥ dgc-async") && report.contains("Lower momentum"), "{report}");
}

#[test]
fn the_recipe_is_held_against_adamw() {
    let report = twice(&["recipe", "--steps", "8"], 2 * 3 + 2);
    assert!(report.contains("data-parallel AdamW, 8") && report.contains("no worse than"), "{report}");
}

#[test]
fn the_time_to_a_loss_is_simulated_for_every_rate() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["bandwidth", "--part", "simulated", "--steps", "8"];
    let report = reproduce(folder.path(), &arguments);
    for rate in ["10 Gbit/s", "1 Gbit/s", "100 Mbit/s", "10 Mbit/s"] {
        assert!(report.contains(rate), "{report}");
    }
    assert_eq!(pictures(folder.path(), &report).len(), 4);
    assert!(!report.contains("measured over QUIC"));
}

#[test]
fn upcycling_runs_under_asynchronous_workers() {
    let folder = tempfile::tempdir().unwrap();
    let report = reproduce(folder.path(), &["upcycling", "--steps", "8", "--workers", "8"]);
    assert!(report.contains("8 asynchronous workers"), "{report}");
}

/// A folder of another process's results that ends in the middle of a line is gone on with.
#[test]
fn what_was_cut_off_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["secondary", "--steps", "8"];
    reproduce(folder.path(), &arguments);
    let made = results(folder.path());
    let path = folder.path().join("results.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 10]).unwrap();
    reproduce(folder.path(), &arguments);
    let text = fs::read_to_string(&path).unwrap();
    let again: Vec<serde_json::Value> =
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(again.len(), made.len());
    let spec = |run: &serde_json::Value| run["spec"].to_string();
    let mut specs: (Vec<_>, Vec<_>) = (made.iter().map(spec).collect(), again.iter().map(spec).collect());
    specs.0.sort();
    specs.1.sort();
    assert_eq!(specs.0, specs.1);
}

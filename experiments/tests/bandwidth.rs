//! `sanderling reproduce bandwidth` from end to end: the processes, the relay between them, and what is written. The model
//! is next to nothing; how fast anything is plays no part.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sanderling_common::config;

fn bandwidth(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling"));
    command.args(["reproduce", "bandwidth", "--quick", "--out"]).arg(folder).args(arguments);
    command
}

/// Over the relay, which needs nobody's permission.
const MEASURED: [&str; 6] = ["--part", "measured", "--tiny", "--link", "relay", "--compute-ms"];

fn measured(folder: &Path) -> Vec<serde_json::Value> {
    let lines = fs::read_to_string(folder.join("measured/results.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn updates_are_measured_over_a_relay_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    // What is measured by itself depends on no seeds, so that it replaces nothing of a report that does.
    for (name, content) in [
        ("reproduction.txt", "bandwidth --quick --compute-ms 5"),
        ("README.md", "seeds 1337, 1338, of both parts"),
    ] {
        fs::write(folder.path().join(name), content).unwrap();
    }
    let run = || {
        let output = bandwidth(folder.path(), &MEASURED).arg("5").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        (fs::read_to_string(folder.path().join("measured.md")).unwrap(), said)
    };
    let (report, said) = run();
    assert!(said.contains("measuring 8 of 8 cells, which is expected to take about"), "{said}");
    for part in
        ["1 Gbit/s, updates per second", "100 Mbit/s, updates per second", "## Verdict", "16 DGS workers"]
    {
        assert!(report.contains(part), "{part}: {report}");
    }
    assert!(!report.contains("simulated"), "{report}");
    let results = measured(folder.path());
    assert_eq!(results.len(), 8, "two links, two methods, 1 and 8 workers");
    for result in &results {
        let updates = &result["outcome"]["updates"];
        let moments = updates["moments"].as_array().unwrap_or_else(|| panic!("{result}"));
        let moments: Vec<f64> = moments.iter().map(|moment| moment.as_f64().unwrap()).collect();
        let wanted = result["setup"]["updates"].as_u64().unwrap() as usize;
        assert!(moments.len() > wanted && moments.is_sorted(), "{result}");
    }
    for (row, errors) in [("| 1 |", 3), ("| 8 |", 5)] {
        let rows: Vec<&str> = report.lines().filter(|line| line.starts_with(row)).collect();
        let have_errors = |line: &&str| line.matches(" ± ").count() == errors;
        assert!(rows.len() == 2 && rows.iter().all(have_errors), "rates and ratios have errors: {rows:?}");
    }
    for name in ["updates-1-gbit-s", "updates-100-mbit-s"] {
        assert!(
            report.contains(&format!("({name}.svg)")) && folder.path().join(format!("{name}.png")).exists()
        );
    }
    let files = |of: &str| fs::read_dir(folder.path().join(of)).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!((files("configurations").count(), files("setups").count()), (8, 8));
    for path in files("configurations") {
        let run = config::parse(&fs::read_to_string(path).unwrap()).unwrap().resolve().unwrap();
        assert!([1, 8].contains(&run.run.workers));
    }
    for path in files("setups") {
        let setup: serde_json::Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!((&setup["compute_ms"], &setup["link"]), (&5.into(), &"relay".into()));
    }
    // The second time there is nothing to do, and nothing new to say.
    let (again, said) = run();
    assert!(!said.contains("measuring"), "{said}");
    assert_eq!(measured(folder.path()), results);
    let without_time = |report: &str| {
        report.lines().filter(|line| !line.starts_with("Made in")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(without_time(&again), without_time(&report));
    // One of another link is not replaced.
    let of_namespaces = "Between two network namespaces of Linux, limited by `tc tbf`.";
    fs::write(folder.path().join("measured.md"), of_namespaces).unwrap();
    let output = bandwidth(folder.path(), &MEASURED).arg("5").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("over the other kind of link"), "{said}");
    assert_eq!(fs::read_to_string(folder.path().join("measured.md")).unwrap(), of_namespaces);
}

#[test]
fn every_seed_is_simulated() {
    let folder = tempfile::tempdir().unwrap();
    // Fewer would not bring every run to a loss that it does not begin with.
    let arguments = ["--part", "simulated", "--steps", "16", "--seeds", "2"];
    let output = bandwidth(folder.path(), &arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = fs::read_to_string(folder.path().join("simulated.md")).unwrap();
    assert!(report.contains("seeds 1337, 1338, mean") && report.contains("nothing is chosen"), "{report}");
    assert_eq!(report.matches("8 DGS workers reach the loss sooner").count(), 4, "{report}");
    let lines = fs::read_to_string(folder.path().join("simulated/results.jsonl")).unwrap();
    // What each of two methods with 1 and 8 workers begins with, and then four links and two seeds.
    assert_eq!(lines.lines().count(), 4 + 2 * 2 * 4 * 2);
    assert_eq!(fs::read_dir(folder.path().join("configurations")).unwrap().count(), 16);
    // A part's report is not replaced by one of fewer seeds, either.
    let output = bandwidth(folder.path(), &[&arguments[..4], &["--seeds", "1"]].concat()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("holds a report of 2 seeds"), "{said}");
}

/// A process that is killed when this is dropped.
struct Spawned(Child);

impl Drop for Spawned {
    fn drop(&mut self) {
        // It may be dead.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The processes that a process started, and that have not ended.
#[cfg(target_os = "linux")]
fn children(of: u32) -> Vec<u32> {
    let is_child =
        |id: &u32| parent_and_state(*id).is_some_and(|(parent, state)| parent == of && state != 'Z');
    let ids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(is_child).collect()
}

#[cfg(target_os = "linux")]
fn parent_and_state(id: u32) -> Option<(u32, char)> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let of = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    Some((of("PPid:")?.parse().ok()?, of("State:")?.chars().next()?))
}

/// Server and workers do not outlive a command that was killed.
#[cfg(target_os = "linux")]
#[test]
fn nothing_is_left_of_a_measurement_that_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    // Steps that take ten minutes: it is there for as long as it takes to be killed.
    let mut command = bandwidth(folder.path(), &MEASURED);
    command.args(["600000", "--longest-minutes", "100000"]).stdout(Stdio::null()).stderr(Stdio::null());
    // What it cannot clear away is with the rest.
    command.env("TMPDIR", folder.path());
    let mut running = Spawned(command.spawn().unwrap());
    const PATIENCE: Duration = Duration::from_secs(120);
    let begun = Instant::now();
    let started = loop {
        let started = children(running.0.id());
        if started.len() == 2 {
            break started;
        }
        assert!(
            running.0.try_wait().unwrap().is_none() && begun.elapsed() < PATIENCE,
            "it ended, or never began"
        );
        std::thread::sleep(Duration::from_millis(20));
    };
    running.0.kill().unwrap();
    running.0.wait().unwrap();
    // One that is nobody's child any more may stay as a zombie where nobody collects it.
    let is_there = |&id: &u32| parent_and_state(id).is_some_and(|(_, state)| state != 'Z');
    while started.iter().any(is_there) {
        assert!(begun.elapsed() < 2 * PATIENCE, "they outlive it");
        std::thread::sleep(Duration::from_millis(20));
    }
}

//! Every reproduction from end to end, far too short to learn anything: what it writes, and that it makes no run twice.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A reproduction in its short form.
fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling"));
    command.arg("reproduce").args(arguments).args(["--quick", "--out"]).arg(folder);
    command
}

/// Runs a reproduction in its short form; returns its report.
fn reproduce(folder: &Path, arguments: &[&str]) -> String {
    reproduce_part(folder, arguments, "README.md")
}

/// The same of one whose report has another name.
fn reproduce_part(folder: &Path, arguments: &[&str], name: &str) -> String {
    let output = command(folder, arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let report = fs::read_to_string(folder.join(name)).unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    // Another process may have written the same since, in another time.
    assert!(shown.contains(&without_time(&report)), "the report is shown");
    report
}

/// A report down to what it says of the time that it took.
fn without_time(report: &str) -> String {
    report.split_once("Made in").expect("it ends with its time").0.to_owned()
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
    assert_eq!(without_time(&again), without_time(&first));
    configurations(folder.path());
    first
}

/// Every resolved configuration can be read, and the run files among them be trained.
fn configurations(folder: &Path) {
    let mut resolved = 0;
    for entry in fs::read_dir(folder.join("configurations")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if path.extension().unwrap() == "toml" {
            let run = sanderling_common::config::parse(&text).unwrap().resolve().unwrap();
            assert_eq!(run.run.name, name);
        } else {
            let all: serde_json::Value = serde_json::from_str(&text).unwrap();
            // AdamW has no method, and a classifier of digits is no decoder.
            assert_eq!(all["adamw"].is_object(), all["training"].is_null(), "{name}: {all}");
            assert_eq!(all["model"]["classifier"].is_object(), all["subject"] == "digits", "{name}: {all}");
            // Numbers are written as they were stated.
            assert!(!text.contains("0.00999"), "{name}: {text}");
            resolved += 1;
        }
    }
    assert!(resolved > 0);
}

#[test]
fn secondary_tells_what_each_fraction_saves() {
    let report = twice(&["secondary", "--steps", "8"], 5);
    assert!(
        report.contains("| 8 | 1 % |")
            && report.contains("1 % down instead of everything: 1.8 times fewer bytes"),
        "{report}"
    );
}

#[test]
fn quantisation_has_every_format_each_way() {
    let report = twice(&["quantisation", "--steps", "8"], 10);
    let cells = |line: &str| line.split(" | ").take(2).map(str::to_owned).collect::<Vec<_>>();
    let rows: Vec<Vec<String>> = report.lines().filter(|line| line.starts_with("| ")).map(cells).collect();
    for format in ["bf16", "int8", "sign"] {
        for [up, down] in [[format, "f32"], ["f32", format], [format, format]] {
            assert!(rows.contains(&vec![format!("| {up}"), down.to_owned()]), "{up}, {down}: {report}");
        }
    }
}

#[test]
fn staleness_shows_its_distributions() {
    let report = twice(&["staleness", "--steps", "8"], 6);
    assert!(report.contains("](staleness-of-updates-8-workers.svg)"), "{report}");
    assert!(report.contains("one ten times slower") && report.contains("half come and go"), "{report}");
}

#[test]
fn methods_are_all_searched_alike() {
    let report =
        // MSGD's two momenta, and for three numbers of workers two methods without a momentum and two with two, each with four
        // rates; and of each the run that counts.
        twice(&["methods", "--subject", "digits", "--steps", "8"], 4 * (2 + 3 * (2 + 2 * 2)) + 13);
    assert!(
        report.contains("dgs is no worse than dgc-async, by mistakes")
            && report.contains("A lower momentum is better for 8 workers"),
        "{report}"
    );
}

#[test]
fn the_recipe_is_held_against_adamw() {
    let report = twice(&["recipe", "--steps", "8"], 3 * 3 + 2);
    assert!(report.contains("data-parallel AdamW, 8") && report.contains("no worse than"), "{report}");
    // The goals are for the default model and its length, neither of which this is.
    assert!(report.starts_with("# The default recipe on a small model against AdamW"), "{report}");
    assert!(
        report.contains("(that of asynchronous workers stays below its peak, since the warm-up of 100"),
        "{report}"
    );
}

/// A run file of a small model, with these settings besides.
fn run_file(folder: &Path, name: &str, settings: &str) -> String {
    let path = folder.join(name);
    let model = "[model]\nhidden_size = 32\nlayers = 1\nintermediate_size = 32\ncontext = 32\n";
    fs::write(&path, format!("{model}{settings}")).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A dense checkpoint that has hardly learnt anything.
fn dense(folder: &Path) -> String {
    let config = run_file(folder, "dense.toml", "experts = 1\n[run]\nworkers = 1\n[training]\nsteps = 4\n");
    let mut train = Command::new(env!("CARGO_BIN_EXE_sanderling"));
    train.args(["train", "--config", &config, "--name", "dense", "--runs-dir"]).arg(folder);
    let output = train.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    folder.join("dense/checkpoint").to_str().unwrap().to_owned()
}

/// Settings of one's own, from a start of one's own: an upcycled checkpoint.
#[test]
fn the_recipe_of_a_run_file_is_held_against_adamw() {
    let files = tempfile::tempdir().unwrap();
    let dense = dense(files.path());
    let settings = format!(
        "experts = 4\n[upcycle]\ndense = '{dense}'\n[training]\nlearning_rate = 1e-3\nlocal_steps = 2\ndecay = \"cosine\"\n"
    );
    let config = run_file(files.path(), "warm.toml", &settings);
    // The model's shape is the checkpoint's.
    let text = fs::read_to_string(&config).unwrap();
    let text = text.split_once("experts").unwrap().1;
    fs::write(&config, format!("[model]\ncontext = 32\nexperts{text}")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["recipe", "--config", &config, "--workers", "2", "--steps", "8"];
    let report = reproduce(folder.path(), &arguments);
    assert!(report.starts_with("# warm against AdamW") && report.contains("upcycled from"), "{report}");
    assert!(
        report.contains("| asynchronous, 2 | η0 0.001 |") && !report.contains("AdamW's, at most"),
        "{report}"
    );
    configurations(folder.path());
    for run in results(folder.path()) {
        let (spec, is_adamw) = (&run["spec"], run["spec"]["trainer"] == "adam-w");
        assert_eq!(spec["upcycle"]["dense"], dense);
        assert_eq!(spec["upcycle"]["dense_sha256"].as_str().unwrap().len(), 64);
        assert_eq!(spec["training"]["decay"], "cosine");
        // As many gradients for everyone, of which two are an exchange.
        assert_eq!(spec["training"]["steps"], if is_adamw { 8 } else { 4 }, "{spec}");
        let first = &run["outcome"]["curve"][0]["score"]["loss"];
        assert_eq!(first, &results(folder.path())[0]["outcome"]["curve"][0]["score"]["loss"], "one start");
    }
}

#[test]
fn run_files_are_compared_with_the_first() {
    let files = tempfile::tempdir().unwrap();
    let text = files.path().join("own.txt");
    fs::write(&text, "To be, or not to be, that is the question. ".repeat(60)).unwrap();
    let data = format!("[data]\ntext = '{}'\n", text.display());
    let plain = run_file(files.path(), "plain.toml", &format!("[training]\nsteps = 8\n{data}"));
    let local = run_file(files.path(), "local.toml", &format!("[training]\nlocal_steps = 4\n{data}"));
    let folder = tempfile::tempdir().unwrap();
    let compare = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling"));
        command.args(["reproduce", "compare", &plain, &local, "--seeds", "2", "--out"]).arg(folder.path());
        command.args(arguments).output().unwrap()
    };
    let output = compare(&["--workers", "2,4"]);
    let report = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        report.contains("8 gradient evaluations each, seeds 1337, 1338") && report.contains("own.txt"),
        "{report}"
    );
    assert!(
        report.contains("* 4 workers, local against plain:") && report.contains("| 2 | plain |"),
        "{report}"
    );
    assert_eq!(pictures(folder.path(), &report).len(), 2);
    for run in results(folder.path()) {
        let training = &run["spec"]["training"];
        let gradients = training["steps"].as_u64().unwrap() * training["local_steps"].as_u64().unwrap();
        assert_eq!((gradients, run["spec"]["contents"]["text_sha256"].as_str().unwrap().len()), (8, 64));
    }
    // Another text of the same name is another run.
    fs::write(&text, "Whether 'tis nobler in the mind to suffer ".repeat(60)).unwrap();
    assert!(compare(&["--workers", "2,4"]).status.success());
    assert_eq!(results(folder.path()).len(), 16);
    let said = String::from_utf8(compare(&[&plain]).stderr).unwrap();
    assert!(said.contains("plain.toml is named twice"), "{said}");
    fs::create_dir(files.path().join("other")).unwrap();
    let other = run_file(files.path(), "other/plain.toml", "");
    let said = String::from_utf8(compare(&[&other]).stderr).unwrap();
    assert!(said.contains("have the same name for tables and files"), "{said}");
    let endless = compare(&["--workers", "2", "--slow-workers", "1", "--slowness", "1e15"]);
    assert_eq!(endless.status.code(), Some(2));
    let said = String::from_utf8(compare(&["--workers", "2", "--slow-workers", "2"]).stderr).unwrap();
    assert!(said.contains("of 2 workers; take fewer"), "{said}");
    let absent = compare(&["absent.toml"]);
    assert_eq!(absent.status.code(), Some(2), "as for `train`");
    let said = String::from_utf8(absent.stderr).unwrap();
    assert!(said.contains("cannot read the run file absent.toml"), "{said}");
}

/// Its runs would be kept as those of the text that was there before.
#[cfg(unix)]
#[test]
fn a_text_that_is_changed_meanwhile_is_refused() {
    let files = tempfile::tempdir().unwrap();
    let text = files.path().join("own.txt");
    let write = |line: &str| {
        let beside = files.path().join("beside.txt");
        fs::write(&beside, line.repeat(60)).unwrap();
        fs::rename(beside, &text).unwrap();
    };
    write("To be, or not to be, that is the question. ");
    let settings = format!("[training]\nsteps = 8\n[data]\ntext = '{}'\n", text.display());
    let config = run_file(files.path(), "own.toml", &settings);
    let folder = tempfile::tempdir().unwrap();
    // Hundreds of runs.
    let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling"));
    command.args([
        "reproduce",
        "compare",
        &config,
        "--workers",
        "2,4",
        "--seeds",
        "100",
        "--jobs",
        "2",
        "--out",
    ]);
    let child = command.arg(folder.path()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    wait_until(|| fs::metadata(folder.path().join("results.jsonl")).is_ok_and(|file| file.len() > 0));
    write("Whether 'tis nobler in the mind to suffer. ");
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("own.txt was changed meanwhile"), "{said}");
    let made = results(folder.path());
    let of = |run: &serde_json::Value| run["spec"]["contents"]["text_sha256"].clone();
    assert!(made.len() < 200 && made.iter().all(|run| of(run) == of(&made[0])), "{} runs", made.len());
}

/// A worker that leaves updates out for want of a finite gradient sends fewer bytes, which is no merit.
#[test]
fn updates_that_changed_nothing_are_told_and_save_nothing() {
    let files = tempfile::tempdir().unwrap();
    let sound = run_file(files.path(), "sound.toml", "");
    let wrecked = "[training]\nmethod = \"asgd\"\nlearning_rate = 1e6\nclip_norm = 0\nwarmup_steps = 10\n";
    let wrecked = run_file(files.path(), "wrecked.toml", wrecked);
    let folder = files.path().join("results");
    let report = reproduce(&folder, &["compare", &sound, &wrecked, "--workers", "4", "--steps", "40"]);
    // Neither do they share how the rate goes.
    assert!(
        report.contains("of (4 workers, sound) stays below its peak, since the warm-up of 100"),
        "{report}"
    );
    assert!(report.contains("of (4 workers, wrecked) falls along half a cosine"), "{report}");
    assert!(report.contains("did not change the model, since loss or gradient was not finite"), "{report}");
    assert!(
        report.contains("wrecked against sound: no bytes to compare up and no bytes to compare down"),
        "{report}"
    );
}

/// What cannot be run is refused before anything is, and takes no folder.
#[test]
fn what_cannot_be_run_has_no_folder() {
    let files = tempfile::tempdir().unwrap();
    let threes = run_file(files.path(), "threes.toml", "[training]\nlocal_steps = 3\n");
    // Fit for one worker, as it says, and not for eight.
    let single = run_file(files.path(), "single.toml", "[training]\nmethod = \"msgd\"\n[run]\nworkers = 1\n");
    let cases: [(&[&str], &str); 5] = [
        (
            &["recipe", "--config", &threes, "--workers", "2", "--steps", "16"],
            "whole exchanges of 3 local steps",
        ),
        (
            &["compare", &threes, "--steps", "16"],
            "threes.toml: 16 gradient evaluations cannot be made in whole exchanges",
        ),
        (&["recipe", "--workers", "3", "--steps", "16"], "whole steps of 3 workers together"),
        (&["recipe", "--config", "absent.toml"], "cannot read the run file absent.toml"),
        (&["compare", &single, "--workers", "1,8"], "single.toml: "),
    ];
    for (arguments, sentence) in cases {
        let folder = files.path().join("results");
        let output = command(&folder, arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains(sentence), "{arguments:?}: {said}");
        assert!(!folder.exists(), "{arguments:?}");
    }
}

#[test]
fn the_time_to_a_loss_is_simulated_for_every_rate() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["bandwidth", "--part", "simulated", "--steps", "16"];
    let report = reproduce_part(folder.path(), &arguments, "simulated.md");
    for rate in ["10 Gbit/s", "1 Gbit/s", "100 Mbit/s", "10 Mbit/s"] {
        assert!(report.contains(rate), "{report}");
    }
    assert_eq!(pictures(folder.path(), &report).len(), 4);
    assert!(!report.contains("measured over QUIC"));
    // Both parts with more seeds are not replaced by one with fewer; what is measured depends on none (`tests/bandwidth.rs`).
    fs::write(folder.path().join("README.md"), "seeds 1337, 1338, of both parts").unwrap();
    let output = command(folder.path(), &arguments).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("holds a report of 2 seeds"), "{said}");
}

#[test]
fn upcycling_runs_under_asynchronous_workers() {
    let folder = tempfile::tempdir().unwrap();
    let report = reproduce(folder.path(), &["upcycling", "--steps", "8", "--workers", "8"]);
    assert!(report.contains("8 asynchronous workers"), "{report}");
    assert!(report.contains("% above AdamW's at as many gradient evaluations. At most 0.5 %"), "{report}");
    for (name, by, experts) in
        [("e8t2-tokens-8-workers", "workers", 8), ("e64g8t8-tokens-adamw", "adam-w", 64)]
    {
        let text = fs::read_to_string(folder.path().join(format!("configurations/{name}.json"))).unwrap();
        let resolved: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(resolved["run"]["by"][by].is_object(), "{name}: {resolved}");
        assert_eq!(resolved["upcycling"]["experts"], experts, "{name}: {resolved}");
    }
}

/// Waits for what happens soon.
fn wait_until(happens: impl Fn() -> bool) {
    const PATIENCE: Duration = Duration::from_secs(120);
    let begun = Instant::now();
    while !happens() {
        assert!(begun.elapsed() < PATIENCE, "it did not happen in {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Two processes share the work of a folder, and either has the whole report.
#[test]
fn two_processes_make_every_run_once() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["quantisation", "--steps", "16"];
    let reports = std::thread::scope(|scope| {
        let both = [0, 1].map(|_| scope.spawn(|| reproduce(folder.path(), &arguments)));
        both.map(|one| one.join().unwrap())
    });
    let tables = reports.map(|report| report.lines().filter(|line| line.starts_with('|')).count());
    assert_eq!(tables, [12, 12]);
    let mut specs: Vec<String> = results(folder.path()).iter().map(|run| run["spec"].to_string()).collect();
    specs.sort();
    specs.dedup();
    assert_eq!((specs.len(), results(folder.path()).len()), (10, 10));
}

#[test]
fn a_folder_of_another_reproduction_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    reproduce(folder.path(), &["secondary", "--steps", "8"]);
    let report = fs::read_to_string(folder.path().join("README.md")).unwrap();
    let output = command(folder.path(), &["quantisation", "--steps", "8"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success()
            && said.contains("holds the results of `reproduce secondary --quick --steps 8`, and not of"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(folder.path().join("README.md")).unwrap(), report);
}

/// Its report would be replaced, and its files stay beside those of the other form.
#[test]
fn a_folder_of_another_form_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    reproduce(folder.path(), &["secondary", "--steps", "8"]);
    let output = command(folder.path(), &["secondary", "--steps", "9"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && said.contains("--steps 8`, and not of `reproduce secondary"),
        "{said}"
    );
    // More seeds are the same experiment.
    reproduce(folder.path(), &["secondary", "--steps", "8", "--seeds", "2"]);
    assert_eq!(results(folder.path()).len(), 10);
    // Fewer would leave a report that says less in its place.
    let report = fs::read_to_string(folder.path().join("README.md")).unwrap();
    let output = command(folder.path(), &["secondary", "--steps", "8"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("holds a report of 2 seeds"), "{said}");
    assert_eq!(fs::read_to_string(folder.path().join("README.md")).unwrap(), report);
}

/// Results would lie among its files.
#[test]
fn a_folder_with_something_else_in_it_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("checkpoint")).unwrap();
    let output = command(folder.path(), &["secondary", "--steps", "8"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("holds checkpoint"), "{said}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let output = command(&file, &["secondary", "--steps", "8"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(2) && said.contains("file is no folder; give another --out"),
        "{said}"
    );
    let output = command(&file.join("inside"), &["secondary", "--steps", "8"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && said.contains("cannot make the folder"), "{said}");
}

/// Whose results they are was not written any more, or is lost.
#[test]
fn a_folder_that_was_hardly_begun_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("claims")).unwrap();
    fs::write(folder.path().join("reproduction.txt"), "").unwrap();
    reproduce(folder.path(), &["secondary", "--steps", "8"]);
}

#[test]
fn a_folder_of_somebody_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("README.md"), "my project").unwrap();
    let output = command(folder.path(), &["secondary", "--steps", "8"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("give another --out"), "{said}");
    assert_eq!(fs::read_to_string(folder.path().join("README.md")).unwrap(), "my project");
}

/// Ctrl-C ends it with a sentence, and what is finished is kept.
#[cfg(unix)]
#[test]
fn an_interrupt_keeps_what_is_finished() {
    use rustix::process::{Pid, Signal, kill_process};

    let folder = tempfile::tempdir().unwrap();
    reproduce(folder.path(), &["secondary", "--steps", "8"]);
    let made = results(folder.path());
    // Five hundred runs, which take minutes.
    let mut command = command(folder.path(), &["secondary", "--steps", "8", "--seeds", "100"]);
    let child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    // It claims a run once it listens to signals, and shows a bar before.
    wait_until(|| fs::read_dir(folder.path().join("claims")).unwrap().count() > 0);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("the runs that are finished are kept"), "{said}");
    let kept = results(folder.path());
    assert!(kept.starts_with(&made) && kept.len() < 500, "{} runs", kept.len());
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

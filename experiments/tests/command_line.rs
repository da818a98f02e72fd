//! What a person sees who types a command: exit codes, one sentence when something is wrong, and results.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../worker/tests/skip/mod.rs"]
mod skip;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use sanderling_common::checkpoint;
use sanderling_common::corpus::{Characters, SHAKESPEARE};
use sanderling_common::tokenizer::Tokenizer;
use sanderling_common::tokens::TokenFile;

fn sanderling(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sanderling")).args(arguments).current_dir(folder).output().unwrap()
}

/// What the pages lead to is there.
#[test]
fn links_of_the_pages_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let of_docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = of_docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let pages = pages.chain(["README.md", "ARCHITECTURE.md", "CHANGELOG.md"].map(|name| root.join(name)));
    let mut links = 0;
    for page in pages {
        for link in fs::read_to_string(&page).unwrap().split("](").skip(1) {
            let (file, _) = link.split_once(')').unwrap();
            let file = file.split('#').next().unwrap();
            if !file.is_empty() && !file.contains("://") {
                assert!(page.with_file_name(file).exists(), "{}: {file}", page.display());
                links += 1;
            }
        }
    }
    assert!(links > 10, "{links} links");
}

/// Runs `train` and expects it to fail with this code and a single line that contains `words`.
fn fails(folder: &Path, arguments: &[&str], code: i32, words: &str) -> String {
    command_fails(folder, &[&["train"], arguments].concat(), code, words)
}

fn command_fails(folder: &Path, arguments: &[&str], code: i32, words: &str) -> String {
    let output = sanderling(folder, arguments);
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
    fails(&["--durability", "async"], "state_dir");
    fails(&["--stepz", "3"], "--steps");
    fails(&["--config", "absent.toml"], "absent.toml");
}

/// Each of them would run for a very long time if it were begun.
#[test]
fn what_cannot_be_simulated_is_named_before_anything_is() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |arguments: &[&str], code, words| {
        drop(command_fails(folder.path(), &[&["simulate"], arguments].concat(), code, words));
    };
    fails(&["--seeds", "0"], 2, "--seeds");
    fails(&["--first", "18446744073709551000", "--seeds", "1000"], 2, "beyond the last seed");
    fails(&["--seeds", "100000000", "--json", "absent/faults.json"], 1, "cannot write absent/faults.json");
}

#[test]
fn bad_run_files_are_named_with_the_place() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    for (text, words) in [
        ("[training]\nstep = 5", "did you mean steps"),
        ("[trainin]\nsteps = 5", "did you mean [training]"),
        ("device = 'cuda'", "say it on the command line: --device"),
        ("[training]\nprecision = 'f32'", "--precision"),
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
    for (arguments, words) in [(["--listen", "nowhere"], "nowhere"), (["--granularity", "2"], "granularity")]
    {
        fails(folder.path(), &arguments, 2, words);
    }
    let fails = |arguments: &[&str], words| drop(fails(folder.path(), arguments, 1, words));
    fails(&["--text", "absent.txt"], "absent.txt");
    fails(&["--text", "empty.txt"], "empty.txt");
    fails(&["--text", "latin1.txt"], "latin1.txt");
    fails(&["--text", "."], "not a regular file");
    #[cfg(unix)]
    fails(&["--text", "/dev/zero"], "not a regular file");
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

/// Names of what lies in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn printed(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn texts_become_tokens_that_can_be_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let text = &SHAKESPEARE[..60_000];
    fs::write(folder.path().join("plays.txt"), text).unwrap();
    let run = |arguments: &[&str]| printed(&sanderling(folder.path(), arguments));
    let line = run(&[
        "tokenize",
        "plays.txt",
        "--train-vocab",
        "400",
        "--out",
        "plays.tok",
        "--save-tokenizer",
        "tokenizer.json",
        "--json",
    ]);
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&line["vocabulary_size"], &line["documents"], &line["text_bytes"]),
        (&400.into(), &1.into(), &60_000.into())
    );
    assert_eq!(names(folder.path()), ["plays.tok", "plays.txt", "tokenizer.json"]);

    let file = TokenFile::open(&folder.path().join("plays.tok")).unwrap();
    let saved = Tokenizer::load(&folder.path().join("tokenizer.json")).unwrap();
    assert_eq!((file.vocabulary_size(), file.tokenizer_json().unwrap()), (400, saved.json()));
    let tokens: Vec<u32> = file.tokens().iter().collect();
    assert_eq!(
        (line["tokens"].as_u64(), saved.decode(&tokens).unwrap().as_str()),
        (Some(tokens.len() as u64), text)
    );

    // The same text as documents with the same tokenizer: the same tokens but for the cuts and separators.
    let documents: String = text
        .split_inclusive("\n\n")
        .map(|part| format!("{}\n", serde_json::json!({ "content": part, "id": 1 })))
        .collect();
    fs::write(folder.path().join("plays.jsonl"), &documents).unwrap();
    let closing = run(&[
        "tokenize",
        "plays.jsonl",
        "--field",
        "content",
        "--tokenizer",
        "tokenizer.json",
        "--out",
        "lines.tok",
    ]);
    assert!(closing.starts_with("lines.tok: ") && closing.contains("vocabulary of 400"), "{closing}");
    let lines = TokenFile::open(&folder.path().join("lines.tok")).unwrap();
    let lines: Vec<u32> = lines.tokens().iter().collect();
    let parts: Vec<String> =
        lines.split(|&token| token == 0).map(|part| saved.decode(part).unwrap()).collect();
    assert_eq!(parts, text.split_inclusive("\n\n").collect::<Vec<_>>());

    let trained = run(&[
        "train",
        "--text",
        "plays.tok",
        "--steps",
        "6",
        "--eval-every",
        "6",
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
        "subwords",
    ]);
    assert!(trained.contains("test loss") && !trained.contains("1.54 M"), "{trained}");
    let results = folder.path().join("runs/subwords");
    assert_eq!(fs::read(results.join("checkpoint/tokenizer.json")).unwrap(), saved.json());
    let (config, _) = checkpoint::load(&results.join("checkpoint")).unwrap();
    assert_eq!(config.vocab_size, 400);
    assert!(fs::read_to_string(results.join("loss.svg")).unwrap().contains("nats per token"));
    assert!(!fs::read_to_string(results.join("sample.txt")).unwrap().is_empty());
}

#[test]
fn what_cannot_be_tokenized_is_named_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    write("good.txt", &SHAKESPEARE.as_bytes()[..5000]);
    write("latin1.txt", &[0xe9; 50]);
    write("empty.txt", b"");
    write("bad.jsonl", b"{\"text\": \"a\"}\n{\"txt\": \"b\"}\n");
    write("two.jsonl", b"{\"text\": \"ab\"}\n{\"text\": \"b\"}\n");
    write("data.csv", b"a,b");
    write("broken.json", b"{\"model\": 3}");
    let characters = Characters::of("ab").tokenizer_json();
    write("characters.json", characters.to_string().as_bytes());
    let before = names(folder.path());
    let fails = |inputs: &[&str], code, words| {
        command_fails(folder.path(), &[&["tokenize"], inputs].concat(), code, words);
        assert_eq!(names(folder.path()), before, "{inputs:?} left something");
    };
    let bpe = ["--train-vocab", "300", "--out", "x.tok"];
    let with_bpe = |inputs: &[&'static str]| [inputs, &bpe[..]].concat();
    fails(&with_bpe(&["absent.txt"]), 1, "absent.txt");
    fails(&with_bpe(&["latin1.txt"]), 1, "latin1.txt: it is not valid UTF-8");
    fails(&with_bpe(&["good.txt", "latin1.txt"]), 1, "latin1.txt");
    fails(&with_bpe(&["empty.txt"]), 1, "no text in empty.txt");
    fails(&with_bpe(&["bad.jsonl"]), 1, "bad.jsonl, line 2: it has no text in a field \"text\"");
    fails(&with_bpe(&["data.csv"]), 1, "data.csv");
    fails(&["good.txt", "--tokenizer", "broken.json", "--out", "x.tok"], 1, "broken.json");
    fails(&["good.txt", "--tokenizer", "absent.json", "--out", "x.tok"], 1, "absent.json");
    fails(&["two.jsonl", "--tokenizer", "characters.json", "--out", "x.tok"], 1, "--separator");
    fails(&["two.jsonl", "--tokenizer", "characters.json", "--separator", "q", "--out", "x.tok"], 1, "\"q\"");
    fails(&["good.txt", "--train-vocab", "300", "--out", "absent/x.tok"], 1, "absent/x.tok");
    fails(&["good.txt", "--train-vocab", "300", "--out", "."], 1, "cannot write .");
    fails(
        &["good.txt", "--train-vocab", "300", "--out", "x.tok", "--save-tokenizer", "absent/t"],
        1,
        "absent/t",
    );
    fails(&["good.txt", "--train-vocab", "300", "--out", "good.txt"], 2, "good.txt is to be read");
    fails(&["good.txt", "--train-vocab", "100", "--out", "x.tok"], 2, "257");
    fails(&["good.txt", "--out", "x.tok"], 2, "--train-vocab");
    fails(&with_bpe(&["good.txt", "--tokenizer", "characters.json"]), 2, "cannot be used with");

    write("cut.tok", b"\x89SNDTOK\n\x01\0\x02\0");
    self::fails(folder.path(), &["--text", "cut.tok"], 1, "cut.tok");
}

/// A file of the right name that is not the library is no reason to panic.
#[cfg(target_os = "linux")]
#[test]
fn libraries_that_are_not_cudas_are_told_in_a_sentence() {
    let Some(compiler) = skip::compiler() else { return };
    let folder = tempfile::tempdir().unwrap();
    let fakes = ["cuda", "nvrtc", "cublasLt"].map(|name| folder.path().join(format!("lib{name}.so")));
    let source = folder.path().join("empty.c");
    fs::write(&source, "int nothing;").unwrap();
    for fake in &fakes {
        let compile =
            Command::new(&compiler).arg("-shared").arg("-xc").arg(&source).arg("-o").arg(fake).status();
        assert!(compile.unwrap().success());
    }
    let bench = |device: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sanderling"));
        command.args(["bench", "model", "--context", "8", "--layers", "1", "--batch", "1", "--steps", "1"]);
        command.args(["--device", device, "--shape", "default"]).env("XDG_CACHE_HOME", folder.path());
        command.env("LD_LIBRARY_PATH", folder.path()).output().unwrap()
    };
    let said = |output: &Output| String::from_utf8(output.stderr.clone()).unwrap();
    let refused = bench("cuda");
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    let sentence =
        "NVIDIA's driver (libcuda) has no function cuInit, so it is too old or something else of that name";
    assert!(said(&refused).contains(sentence) && said(&refused).lines().count() == 1, "{}", said(&refused));
    let on_cpu = bench("auto");
    assert!(on_cpu.status.success(), "{}", said(&on_cpu));
    assert!(said(&on_cpu).contains("computing on the CPU, since no GPU can be used: NVIDIA's driver"));
    // And where there is nothing but the name, unless the loader finds CUDA's own elsewhere.
    fakes.iter().for_each(|fake| fs::write(fake, "").unwrap());
    let refused = bench("cuda");
    assert!([Some(0), Some(1)].contains(&refused.status.code()), "{}", said(&refused));
    assert!(!said(&refused).contains("panicked"), "{}", said(&refused));
}

/// A full disk, as a limit on the size of files: what was begun is taken away, and what was there stays.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("plays.txt"), &SHAKESPEARE[..60_000]).unwrap();
    fs::write(folder.path().join("x.tok"), "old").unwrap();
    let script = "trap '' XFSZ; ulimit -f 4; exec \"$0\" tokenize plays.txt --train-vocab 300 --out x.tok";
    let limited = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_sanderling")])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8(limited.stderr).unwrap();
    assert_eq!(limited.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: cannot write x.tok: ") && said.lines().count() == 1, "{said}");
    assert_eq!(names(folder.path()), ["plays.txt", "x.tok"]);
    assert_eq!(fs::read_to_string(folder.path().join("x.tok")).unwrap(), "old");
}

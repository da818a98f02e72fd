//! The commands around checkpoints, one after the other as a person would type them, and what they say when something is
//! wrong.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use serde_json::Value;
use tempfile::TempDir;

fn sanderling(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sanderling")).args(arguments).current_dir(folder).output().unwrap()
}

/// Runs a command that is to succeed.
fn says(folder: &Path, arguments: &[&str]) -> String {
    let output = sanderling(folder, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(folder: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&says(folder, &[arguments, &["--json"]].concat())).unwrap()
}

/// Expects exit code 1 and one sentence with all of these words.
fn fails(folder: &Path, arguments: &[&str], words: &[&str]) {
    fails_with(1, folder, arguments, words);
}

/// The same with another exit code.
fn fails_with(code: i32, folder: &Path, arguments: &[&str], words: &[&str]) {
    let output = sanderling(folder, arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(said.starts_with("error: ") && said.lines().count() == 1, "{arguments:?}: {said}");
    assert!(words.iter().all(|word| said.contains(word)), "{arguments:?}: {said}, expected {words:?}");
}

const SMALL: [&str; 12] = [
    "--hidden-size",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--kv-heads",
    "1",
    "--context",
    "64",
    "--batch-size",
    "4",
];

/// A folder with a dense model that was trained for a moment, made once.
static TRAINED: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let run = [
        "train",
        "--name",
        "dense",
        "--experts",
        "1",
        "--workers",
        "1",
        "--steps",
        "30",
        "--eval-every",
        "15",
    ];
    says(folder.path(), &[&run[..], &SMALL].concat());
    says(folder.path(), &["export", "--run", "runs/dense", "--out", "dense"]);
    folder
});

/// A copy of that model to spoil.
fn spoiled(name: &str, spoil: impl FnOnce(&Path)) -> PathBuf {
    let copy = TRAINED.path().join(name);
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(TRAINED.path().join("dense")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    spoil(&copy);
    copy
}

fn loss(folder: &Path, model: &str, options: &[&str]) -> f64 {
    let arguments = ["eval", "--model", model, "--data", "shakespeare", "--window", "64"];
    json(folder, &[&arguments[..], options].concat())["loss"].as_f64().unwrap()
}

#[test]
fn a_run_is_exported_with_its_tokenizer_and_its_story() {
    let folder = TRAINED.path();
    let description = json(folder, &["inspect", "dense"]);
    assert_eq!(description["architecture"], "LlamaForCausalLM");
    assert_eq!(description["parameters"], description["active_parameters"]);
    assert_eq!(description["tokenizer"], true);
    let card = fs::read_to_string(folder.join("dense/README.md")).unwrap();
    assert!(card.contains("dgs-adam") && card.contains("best validation loss"), "{card}");
    assert!(folder.join("dense/generation_config.json").exists());
    // Smaller, and nearly the same model.
    says(
        folder,
        &["export", "--run", "runs/dense", "--dtype", "bfloat16", "--shard-bytes", "30000", "--out", "half"],
    );
    let half = json(folder, &["inspect", "half"]);
    assert_eq!(2 * half["bytes"].as_u64().unwrap(), description["bytes"].as_u64().unwrap());
    assert!(half["files"].as_u64().unwrap() > 1, "{half}");
    assert!((loss(folder, "half", &[]) - loss(folder, "dense", &[])).abs() < 0.02);
    // What bfloat16 would round of exactly scaled weights is kept.
    let exact = ["upcycle", "--dense", "half", "--experts", "6", "--top-k", "2", "--granularity", "2"];
    says(folder, &[&exact[..], &["--scaling", "exact", "--out", "scaled"]].concat());
    assert!((loss(folder, "scaled", &[]) - loss(folder, "half", &[])).abs() < 1e-5);
}

#[test]
fn an_upcycled_model_starts_where_the_dense_one_stood_and_trains_on() {
    let folder = TRAINED.path();
    says(folder, &["upcycle", "--dense", "dense", "--experts", "4", "--out", "moe"]);
    let description = json(folder, &["inspect", "moe"]);
    assert_eq!(description["architecture"], "MixtralForCausalLM");
    let (dense, moe) = (loss(folder, "dense", &[]), loss(folder, "moe", &[]));
    assert!((dense - moe).abs() < 1e-5, "{dense} {moe}");
    let run =
        ["train", "--init", "moe", "--name", "on", "--workers", "2", "--steps", "40", "--eval-every", "20"];
    says(folder, &[&run[..], &["--capacity-factor", "1", "--learning-rate", "0.004"]].concat());
    let summary: Value =
        serde_json::from_slice(&fs::read(folder.join("runs/on/summary.json")).unwrap()).unwrap();
    assert_eq!(summary["parameters"], description["parameters"]);
    let dropped = summary["dropped_share"].as_f64().unwrap();
    assert!(dropped > 0.0 && dropped < 1.0, "{summary}");
    assert!(loss(folder, "runs/on/checkpoint", &[]) < moe);
    // What was resolved names what the checkpoint decided, and makes the same run again.
    let again =
        ["train", "--config", "runs/on/run.toml", "--name", "again", "--steps", "2", "--workers", "1"];
    says(folder, &again);
    // Online: the same mixture, made by server and workers.
    let online = ["train", "--dense", "dense", "--experts", "4", "--granularity", "2", "--name", "online"];
    says(folder, &[&online[..], &["--workers", "2", "--steps", "10", "--eval-every", "5"]].concat());
    assert_eq!(json(folder, &["inspect", "runs/online/checkpoint"])["architecture"], "MixtralForCausalLM");
}

#[test]
fn evaluation_counts_every_token_once_and_overlap_helps() {
    let folder = TRAINED.path();
    let text =
        &fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../common/assets/tinyshakespeare.txt"));
    fs::write(folder.join("part.txt"), &text.as_ref().unwrap()[..5000]).unwrap();
    let eval = |options: &[&str]| {
        let arguments = ["eval", "--model", "dense", "--data", "part.txt"];
        json(folder, &[&arguments[..], options].concat())
    };
    let apart = eval(&["--window", "64"]);
    assert_eq!((apart["tokens"].as_u64(), apart["stride"].as_u64()), (Some(4999), Some(64)));
    let loss = |result: &Value| result["loss"].as_f64().unwrap();
    assert!((apart["perplexity"].as_f64().unwrap() - loss(&apart).exp()).abs() < 1e-9);
    // Neither the batch nor the threads change what is added up.
    let alone = eval(&["--window", "64", "--batch-size", "1", "--threads", "1"]);
    assert!((loss(&alone) - loss(&apart)).abs() < 1e-6);
    let overlapping = eval(&["--window", "64", "--stride", "16"]);
    assert_eq!(overlapping["tokens"], apart["tokens"]);
    assert_ne!(loss(&overlapping), loss(&apart));
    // The same tokens from a token file.
    let tokenize = ["tokenize", "part.txt", "--tokenizer", "dense/tokenizer.json", "--out", "part.tok"];
    says(folder, &tokenize);
    let arguments = ["eval", "--model", "dense", "--data", "part.tok", "--window", "64"];
    assert_eq!(json(folder, &arguments)["loss"], apart["loss"]);
}

#[test]
fn multiple_choice_is_scored_per_file_and_overall() {
    let folder = TRAINED.path();
    let questions = folder.join("questions");
    fs::create_dir(&questions).unwrap();
    // A dense model of 64 tokens' context has room for little.
    fs::write(questions.join("a_b_test.csv"), "Q,w,x,y,z,A\nQ,w,x,y,z,B\nQ,w,x,y,z,C\nQ,w,x,y,z,D\n")
        .unwrap();
    let arguments = ["eval", "--model", "dense", "--data", "questions", "--task", "multiple-choice"];
    fails(folder, &arguments, &["a b", "context of 64"]);
    let run =
        ["train", "--name", "long", "--experts", "4", "--workers", "1", "--steps", "4", "--eval-every", "4"];
    let run = [&run[..], &SMALL, &["--context", "256"]].concat();
    let run: Vec<&str> = {
        // The last of an option that is given twice would be refused.
        let first = run.iter().position(|word| *word == "--context").unwrap();
        run.iter()
            .enumerate()
            .filter(|(i, _)| *i != first && *i != first + 1)
            .map(|(_, word)| *word)
            .collect()
    };
    says(folder, &run);
    let model = "runs/long/checkpoint";
    let result =
        json(folder, &["eval", "--model", model, "--data", "questions", "--task", "multiple-choice"]);
    // Four times the same question with every answer in turn: whatever the model chooses, one of four is right.
    assert_eq!((result["questions"].as_u64(), result["right"].as_u64()), (Some(4), Some(1)));
    assert_eq!(result["files"][0]["subject"], "a b");
    let error = result["standard_error"].as_f64().unwrap();
    assert!((error - 0.25).abs() < 1e-9, "{result}");
}

#[test]
fn generation_is_seeded_and_streams_what_it_returns() {
    let folder = TRAINED.path();
    let generate = |options: &[&str]| {
        let arguments = ["generate", "--model", "dense", "--prompt", "ROMEO:", "--max-new-tokens", "150"];
        says(folder, &[&arguments[..], options].concat())
    };
    let text = generate(&["--seed", "5"]);
    assert!(text.starts_with("ROMEO:") && text.chars().count() == 6 + 150 + 1, "{text:?}");
    assert_eq!(generate(&["--seed", "5"]), text);
    assert_ne!(generate(&["--seed", "6"]), text);
    let told: Value = serde_json::from_str(&generate(&["--seed", "5", "--json"])).unwrap();
    assert_eq!(format!("ROMEO:{}\n", told["text"].as_str().unwrap()), text);
    assert_eq!(told["tokens"].as_array().unwrap().len(), 150);
    let greedy = generate(&["--temperature", "0"]);
    assert_eq!(generate(&["--temperature", "0", "--seed", "9"]), greedy);
    assert_eq!(generate(&["--top-p", "0.0001"]), greedy);
    fails(folder, &["generate", "--model", "dense", "--prompt", ""], &["--prompt"]);
    fails_with(2, folder, &["generate", "--model", "dense", "--prompt", "a", "--top-p", "0"], &["--top-p"]);
}

#[test]
fn broken_checkpoints_are_named_with_file_and_tensor() {
    let folder = TRAINED.path();
    let truncated = spoiled("truncated", |copy| {
        let path = copy.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
    });
    let lying = spoiled("lying", |copy| {
        let path = copy.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        bytes[..8].copy_from_slice(&(1_u64 << 60).to_le_bytes());
        fs::write(&path, bytes).unwrap();
    });
    let other = spoiled("other", |copy| {
        let path = copy.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("LlamaForCausalLM", "GPTNeoXForCausalLM")).unwrap();
    });
    let wider = spoiled("wider", |copy| {
        let path = copy.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"intermediate_size\": 128", "\"intermediate_size\": 96")).unwrap();
    });
    let untyped = spoiled("untyped", |copy| {
        let path = copy.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let place = bytes.windows(5).position(|window| window == b"\"F32\"").unwrap();
        bytes[place..place + 5].copy_from_slice(b"\"F16\"");
        fs::write(&path, bytes).unwrap();
    });
    let squared = spoiled("squared", |copy| {
        let path = copy.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"silu\"", "\"relu2\"")).unwrap();
    });
    let cases: [(&Path, &[&str]); 6] = [
        (&untyped, &["untyped/model.safetensors", "tensor", "weight", "F16"]),
        (&truncated, &["truncated", "model.safetensors", "cut off"]),
        (&lying, &["lying", "model.safetensors"]),
        (&other, &["other", "GPTNeoXForCausalLM", "MixtralForCausalLM"]),
        (&wider, &["wider", "model.layers.0.mlp.gate_proj.weight", "96", "128"]),
        (&squared, &["squared", "relu2", "SwiGLU"]),
    ];
    for (directory, words) in cases {
        let directory = directory.to_str().unwrap();
        fails(folder, &["inspect", directory], words);
        fails(folder, &["upcycle", "--dense", directory, "--out", "never"], words);
        fails(folder, &["eval", "--model", directory, "--data", "shakespeare"], words);
        fails(folder, &["generate", "--model", directory, "--prompt", "a"], words);
        fails(folder, &["train", "--init", directory], words);
    }
    assert!(!folder.join("never").exists() && !folder.join("never.partial").exists());

    let large = spoiled("large", |copy| {
        let characters: String = (0x400..0x480).filter_map(char::from_u32).collect();
        let tokenizer = sanderling_common::corpus::Characters::of(&characters).tokenizer_json();
        fs::write(copy.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    });
    let large = large.to_str().unwrap();
    for arguments in [
        &["eval", "--model", large, "--data", "shakespeare"][..],
        &["generate", "--model", large, "--prompt", "a"],
        &["train", "--init", large],
        &["inspect", large],
        &["upcycle", "--dense", large, "--out", "never"],
    ] {
        fails(folder, arguments, &["tokenizer.json", "128", "65"]);
    }
    fails(
        folder,
        &["upcycle", "--dense", "dense", "--top-k", "3", "--granularity", "2", "--out", "x"],
        &["top_k (3)"],
    );
    fails(folder, &["upcycle", "--dense", "dense", "--out", "dense"], &["dense", "exists"]);
    // A token file in which the numbers stand for other characters.
    let far: String = (0x400..0x430).filter_map(char::from_u32).collect();
    fs::write(folder.join("far.txt"), far.repeat(40)).unwrap();
    let tokenizer = sanderling_common::corpus::Characters::of(&far).tokenizer_json();
    fs::write(folder.join("far.json"), tokenizer.to_string()).unwrap();
    says(folder, &["tokenize", "far.txt", "--tokenizer", "far.json", "--out", "far.tok"]);
    fails(folder, &["eval", "--model", "dense", "--data", "far.tok"], &["far.tok", "another tokenizer"]);
    fails(folder, &["train", "--init", "dense", "--text", "far.tok"], &["far.tok", "another tokenizer"]);
    fails(folder, &["export", "--run", "runs/none", "--out", "x"], &["runs/none"]);
    fails(folder, &["inspect", "nowhere"], &["nowhere/config.json"]);
}

//! Training, evaluating and generating with `--device cuda`, over libraries that stand in for CUDA's: the whole way from the
//! command line through the driver's own code.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(target_os = "linux")]

#[path = "../../worker/tests/skip/mod.rs"]
mod skip;
#[path = "../../worker/tests/standin/mod.rs"]
mod standin;

use std::fs;
use std::path::Path;

use serde_json::Value;
use standin::Standin;

/// A model that kernels on the CPU step through in no time.
const RUN: &str = "[run]\nworkers = 2\n[training]\nsteps = 6\n[data]\nbatch_size = 2\n\
    [model]\nhidden_size = 16\nheads = 2\nkv_heads = 1\nlayers = 1\nintermediate_size = 16\nexperts = 3\ncontext = 8\n";

/// What a command prints, and what it says beside that.
fn sanderling(standin: &Standin, folder: &Path, arguments: &[&str]) -> (String, String) {
    let mut command = standin.command(env!("CARGO_BIN_EXE_sanderling"));
    let output = command.current_dir(folder).args(arguments).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{arguments:?}: {said}");
    (String::from_utf8(output.stdout).unwrap(), said)
}

fn json(standin: &Standin, folder: &Path, arguments: &[&str]) -> Value {
    let (printed, said) = sanderling(standin, folder, arguments);
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed} {said}"))
}

#[test]
fn a_model_is_trained_evaluated_and_sampled_on_a_gpu() {
    let Some(compiler) = skip::compiler() else { return };
    let standin = Standin::new(compiler);
    let files = tempfile::tempdir().unwrap();
    let folder = files.path();
    fs::write(folder.join("run.toml"), RUN).unwrap();
    fs::write(folder.join("text.txt"), "To be, or not to be, that is the question. ".repeat(40)).unwrap();

    let train = ["train", "--config", "run.toml", "--text", "text.txt", "--name", "run", "--runs-dir", "."];
    let (_, said) = sanderling(&standin, folder, &[&train[..], &["--device", "cuda:1"]].concat());
    for part in ["computing on cuda:1, stand-in, in bf16", "of the GPU's memory, of which"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let summary: Value = serde_json::from_slice(&fs::read(folder.join("run/summary.json")).unwrap()).unwrap();
    assert_eq!(
        (&summary["steps"], &summary["completed"], &summary["skipped"]),
        (&6.into(), &true.into(), &0.into())
    );

    let eval = ["eval", "--model", "run/checkpoint", "--data", "text.txt", "--json"];
    let gpu = ["--device", "cuda", "--precision", "f32"];
    let on_cpu = json(&standin, folder, &eval);
    let on_gpu = json(&standin, folder, &[&eval[..], &gpu].concat());
    assert_eq!((&on_cpu["device"], &on_gpu["device"]), (&"cpu".into(), &"stand-in".into()));
    assert_eq!(on_gpu["precision"], "f32");
    let loss = |score: &Value| score["loss"].as_f64().unwrap();
    assert!((loss(&on_gpu) / loss(&on_cpu) - 1.0).abs() < 1e-5, "{on_gpu} and {on_cpu}");

    let generate =
        ["generate", "--model", "run/checkpoint", "--prompt", "To be", "--temperature", "0", "--json"];
    let generate = [&generate[..], &["--max-new-tokens", "12"]].concat();
    let on_cpu = json(&standin, folder, &generate);
    let on_gpu = json(&standin, folder, &[&generate[..], &gpu].concat());
    assert_eq!(on_gpu["text"], on_cpu["text"]);

    // There are two GPUs.
    let mut command = standin.command(env!("CARGO_BIN_EXE_sanderling"));
    let refused = command.args(["bench", "model", "--device", "cuda:2"]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("there is no GPU 2"), "{said}");
}

//! What is written is read back bit for bit, and files that do not fit are refused with the name of what is wrong.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use sanderling_common::checkpoint::{CONFIG_FILE, CheckpointError, TENSORS_FILE, load, save};
use sanderling_common::config::RunConfig;
use sanderling_common::init::initial_parameters;
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};

fn small() -> ModelConfig {
    let mut run = RunConfig::default();
    (run.model.hidden_size, run.model.layers, run.model.intermediate_size) = (32, 2, 16);
    run.model_config(65)
}

fn with_router(order: RouterOrder) -> ModelConfig {
    let mut config = small();
    let FeedForward::Moe { router, .. } = &mut config.feed_forward else {
        panic!("the default is a mixture")
    };
    *router = order;
    config
}

fn dense() -> ModelConfig {
    let mut run = RunConfig::default();
    (run.model.hidden_size, run.model.layers, run.model.experts, run.model.top_k) = (32, 2, 1, 1);
    run.model.tie_word_embeddings = false;
    run.model_config(65)
}

/// Parameters of which every bit matters.
fn parameters(config: &ModelConfig) -> Vec<f32> {
    initial_parameters(config, 3).unwrap()
}

fn edit(directory: &Path, from: &str, to: &str) {
    let path = directory.join(CONFIG_FILE);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&path, text.replace(from, to)).unwrap();
}

#[test]
fn every_architecture_comes_back_as_it_was_written() {
    let configs =
        [dense(), with_router(RouterOrder::TopkThenSoftmax), with_router(RouterOrder::SoftmaxThenTopk)];
    let names = ["LlamaForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"];
    for (config, name) in configs.into_iter().zip(names) {
        let directory = tempfile::tempdir().unwrap();
        let written = parameters(&config);
        save(directory.path(), &config, &written, &[("note.txt", b"beside it")]).unwrap();
        let text = fs::read_to_string(directory.path().join(CONFIG_FILE)).unwrap();
        assert!(text.contains(name), "{text}");
        let (read_config, read) = load(directory.path()).unwrap();
        assert_eq!(read_config, config);
        assert!(read.iter().zip(&written).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!(fs::read(directory.path().join("note.txt")).unwrap(), b"beside it");
        let left_over = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left_over, 3, "no temporary file is left");
    }
}

#[cfg(unix)]
#[test]
fn all_files_have_the_permissions_of_new_files() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), &small(), &parameters(&small()), &[]).unwrap();
    let mode = |name: &str| fs::metadata(directory.path().join(name)).unwrap().permissions().mode();
    fs::write(directory.path().join("new"), "").unwrap();
    assert_eq!((mode(CONFIG_FILE), mode(TENSORS_FILE)), (mode("new"), mode("new")));
}

#[test]
fn what_does_not_fit_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let error = load(path).unwrap_err();
    assert!(
        matches!(error, CheckpointError::Io { .. }) && error.to_string().contains(CONFIG_FILE),
        "{error}"
    );

    let rewrite = || save(path, &small(), &parameters(&small()), &[]).unwrap();
    rewrite();
    edit(path, "\"num_local_experts\": 8", "\"num_local_experts\": 4");
    let error = load(path).unwrap_err().to_string();
    assert!(error.contains("block_sparse_moe"), "{error}");

    rewrite();
    edit(path, "MixtralForCausalLM", "GPT2LMHeadModel");
    let error = load(path).unwrap_err().to_string();
    assert!(error.contains("GPT2LMHeadModel"), "{error}");

    rewrite();
    let tensors = fs::read(path.join(TENSORS_FILE)).unwrap();
    for length in [0, 7, 8, 100, tensors.len() - 1] {
        fs::write(path.join(TENSORS_FILE), &tensors[..length]).unwrap();
        let error = load(path).unwrap_err();
        assert!(matches!(error, CheckpointError::SafeTensors { .. }), "{length} bytes: {error}");
    }
    let mut huge_header = tensors;
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(path.join(TENSORS_FILE), &huge_header).unwrap();
    assert!(matches!(load(path).unwrap_err(), CheckpointError::SafeTensors { .. }));
}

//! What is written is read back bit for bit, and files that do not fit are refused with the name of what is wrong.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use std::ops::ControlFlow;

use sanderling_common::checkpoint::{
    CONFIG_FILE, Checkpoint, CheckpointError, FlatParameters, INDEX_FILE, SpecialTokens, StagedDirectory,
    StoredType, TENSORS_FILE, WriteOptions, load, save, write,
};
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
        assert_eq!(left_over, 4, "beside them the generation settings, and no temporary file is left");
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
    for length in [0, 7, 8, 100] {
        fs::write(path.join(TENSORS_FILE), &tensors[..length]).unwrap();
        let error = load(path).unwrap_err();
        assert!(matches!(error, CheckpointError::SafeTensors { .. }), "{length} bytes: {error}");
    }
    fs::write(path.join(TENSORS_FILE), &tensors[..tensors.len() - 1]).unwrap();
    let error = load(path).unwrap_err();
    assert!(matches!(&error, CheckpointError::WrongLength { cut_off: Some(_), .. }), "{error}");
    let words = [TENSORS_FILE, &(tensors.len() - 1).to_string(), &tensors.len().to_string(), "cut off"];
    assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
    fs::write(path.join(TENSORS_FILE), [&tensors[..], b"more"].concat()).unwrap();
    let error = load(path).unwrap_err();
    assert!(matches!(error, CheckpointError::WrongLength { cut_off: None, .. }), "{error}");
    let mut huge_header = tensors;
    huge_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(path.join(TENSORS_FILE), &huge_header).unwrap();
    assert!(matches!(load(path).unwrap_err(), CheckpointError::SafeTensors { .. }));
}

fn write_with(directory: &Path, config: &ModelConfig, options: &WriteOptions) -> Result<(), CheckpointError> {
    let layout = config.layout().unwrap();
    let values = parameters(config);
    let source = FlatParameters { layout: &layout, values: &values };
    write(directory, config, options, &source, &mut |_| ControlFlow::Continue(()))
}

/// A model with everything that `Qwen2MoeForCausalLM` has, no part of it zero.
fn with_shared_expert() -> ModelConfig {
    ModelConfig { shared_expert: Some(24), qkv_bias: true, ..with_router(RouterOrder::SoftmaxThenTopk) }
}

#[test]
fn shared_experts_and_biases_come_back_unless_they_are_zero() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let config = with_shared_expert();
    let layout = config.layout().unwrap();
    let mut values = parameters(&config);
    let range = layout.find("model.layers.1.self_attn.k_proj.bias").unwrap().range();
    values[range][3] = 0.5;
    save(&directory, &config, &values, &[]).unwrap();
    let (read_config, read) = load(&directory).unwrap();
    assert_eq!((&read_config, &read), (&config, &values));

    // Biases of zero and a shared expert that adds nothing change nothing, and are left out.
    layout
        .tensors()
        .iter()
        .filter(|t| t.name.ends_with("_proj.bias"))
        .for_each(|t| values[t.range()].fill(0.0));
    save(&directory, &config, &values, &[]).unwrap();
    assert_eq!(load(&directory).unwrap().0, ModelConfig { qkv_bias: false, ..config.clone() });
    let down = |name: &str| name.ends_with("shared_expert.down_proj.weight");
    layout.tensors().iter().filter(|t| down(&t.name)).for_each(|t| values[t.range()].fill(0.0));
    save(&directory, &config, &values, &[]).unwrap();
    assert_eq!(load(&directory).unwrap().0, with_router(RouterOrder::SoftmaxThenTopk));

    // The other order with such parts is written as the same architecture, renormalised.
    let config = ModelConfig { shared_expert: Some(24), ..small() };
    save(&directory, &config, &parameters(&config), &[]).unwrap();
    let text = fs::read_to_string(directory.join(CONFIG_FILE)).unwrap();
    assert!(text.contains("\"norm_topk_prob\": true") && text.contains("Qwen2MoeForCausalLM"), "{text}");
    assert_eq!(load(&directory).unwrap(), (config.clone(), parameters(&config)));

    let dense_with_biases = ModelConfig { qkv_bias: true, ..dense() };
    let refused = write_with(&directory, &dense_with_biases, &WriteOptions::default()).unwrap_err();
    assert!(matches!(refused, CheckpointError::NoArchitecture { .. }), "{refused}");
}

#[test]
fn a_checkpoint_in_shards_is_the_same_checkpoint() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let config = small();
    let limit = 20_000;
    let special_tokens = SpecialTokens { bos: Some(1), eos: vec![2, 3], pad: None };
    let options = WriteOptions { shard_bytes_max: limit, special_tokens, ..WriteOptions::default() };
    write_with(&directory, &config, &options).unwrap();
    let checkpoint = Checkpoint::open(&directory).unwrap();
    assert_eq!(checkpoint.config(), &config);
    assert_eq!(checkpoint.load().unwrap(), parameters(&config));
    assert_eq!(checkpoint.special_tokens(), &options.special_tokens);
    // Models that converse have further ends beside; tokens that the vocabulary lacks are none.
    fs::write(directory.join("generation_config.json"), "{\"eos_token_id\": [3, 7, 9999]}").unwrap();
    assert_eq!(Checkpoint::open(&directory).unwrap().special_tokens().eos, [2, 3, 7]);
    let stored = checkpoint.stored();
    assert!(stored.files > 3 && stored.bytes == 4 * config.layout().unwrap().len() as u64, "{stored:?}");
    let mut shards = 0;
    for entry in fs::read_dir(&directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.ends_with(".safetensors") {
            shards += 1;
            assert!(name.ends_with(&format!("-of-{:05}.safetensors", stored.files)), "{name}");
            // The header comes on top; the embedding alone has 8 320 bytes.
            assert!(entry.metadata().unwrap().len() < limit + 8_000, "{name}");
        }
    }
    assert_eq!(shards, stored.files);

    // A shard that is gone, one that was cut short, an index that lies.
    let first = directory.join(format!("model-00001-of-{:05}.safetensors", stored.files));
    let bytes = fs::read(&first).unwrap();
    fs::remove_file(&first).unwrap();
    let error = Checkpoint::open(&directory).unwrap_err();
    assert!(matches!(&error, CheckpointError::Io { path, .. } if *path == first), "{error}");
    fs::write(&first, &bytes[..bytes.len() - 4]).unwrap();
    let error = Checkpoint::open(&directory).unwrap_err();
    assert!(matches!(&error, CheckpointError::WrongLength { path, .. } if *path == first), "{error}");
    fs::write(&first, &bytes).unwrap();
    let index = directory.join(INDEX_FILE);
    let text = fs::read_to_string(&index).unwrap();
    let second = format!("model-00002-of-{:05}.safetensors", stored.files);
    let wrong = text.replacen(&format!("model-00001-of-{:05}.safetensors", stored.files), &second, 1);
    fs::write(&index, wrong).unwrap();
    let error = Checkpoint::open(&directory).unwrap_err();
    assert!(matches!(error, CheckpointError::MissingTensor { .. }), "{error}");
    fs::write(&index, text.replacen(&second, "../elsewhere.safetensors", 1)).unwrap();
    let error = Checkpoint::open(&directory).unwrap_err();
    assert!(matches!(error, CheckpointError::IndexPath { .. }), "{error}");
    fs::write(&index, "{}").unwrap();
    assert!(matches!(Checkpoint::open(&directory).unwrap_err(), CheckpointError::Index { .. }));
}

#[test]
fn half_precision_is_read_exactly_and_written_rounded() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let config = dense();
    let options = WriteOptions { stored_type: StoredType::Bfloat16, ..WriteOptions::default() };
    write_with(&directory, &config, &options).unwrap();
    let (_, read) = load(&directory).unwrap();
    let rounded =
        |values: Vec<f32>| values.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect::<Vec<_>>();
    assert_eq!(read, rounded(parameters(&config)));
    let text = fs::read_to_string(directory.join(CONFIG_FILE)).unwrap();
    assert!(text.contains("\"torch_dtype\": \"bfloat16\""), "{text}");
    let stored = Checkpoint::open(&directory).unwrap().stored();
    assert_eq!(stored.bytes, 2 * read.len() as u64);
    assert_eq!(stored.values.into_iter().collect::<Vec<_>>(), [("BF16".to_owned(), read.len() as u64)]);

    // The same header with the other half-precision format: every bit pattern keeps its value.
    let path = directory.join(TENSORS_FILE);
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(bytes[8..header].to_vec()).unwrap();
    let spaces = text.matches("BF16").count();
    let text = format!("{}{}", text.replace("BF16", "F16"), " ".repeat(spaces));
    bytes[8..header].copy_from_slice(text.as_bytes());
    fs::write(&path, &bytes).unwrap();
    let (_, as_f16) = load(&directory).unwrap();
    let layout = config.layout().unwrap();
    let norm = layout.find("model.norm.weight").unwrap().range();
    // 1.0 in bfloat16 is 0x3f80, which float16 reads as 1.875.
    assert!(as_f16[norm].iter().all(|&value| value == 1.875));
}

#[test]
fn work_that_is_called_off_leaves_nothing_and_keeps_what_was_there() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let config = small();
    let layout = config.layout().unwrap();
    let values = parameters(&config);
    let source = FlatParameters { layout: &layout, values: &values };
    let mut told = 0;
    let mut stop_late = |_| {
        told += 1;
        if told == 20 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let error = write(&directory, &config, &WriteOptions::default(), &source, &mut stop_late).unwrap_err();
    assert!(matches!(error, CheckpointError::Interrupted { .. }), "{error}");
    assert_eq!(told, 20, "nothing is made after the stop");
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);

    // What a crash of ours left is cleared away, what somebody else has under that name is not.
    let partial = parent.path().join("model.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("data"), "precious").unwrap();
    let error = save(&directory, &config, &values, &[]).unwrap_err();
    assert!(matches!(&error, CheckpointError::Exists { path } if *path == partial), "{error}");
    assert_eq!(fs::read_to_string(partial.join("data")).unwrap(), "precious");
    fs::write(partial.join(".sanderling-partial"), "").unwrap();

    save(&directory, &config, &values, &[]).unwrap();
    let mut stop = |_| ControlFlow::Break(());
    write(&directory, &config, &WriteOptions::default(), &source, &mut stop).unwrap_err();
    assert_eq!(load(&directory).unwrap().1, values);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);

    // Where nothing is to be replaced, neither is what somebody puts there while it is written.
    let other = parent.path().join("other");
    let options = WriteOptions { replaces: false, ..WriteOptions::default() };
    let mut meanwhile = |_| {
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("data"), "precious").unwrap();
        ControlFlow::Continue(())
    };
    let error = write(&other, &config, &options, &source, &mut meanwhile).unwrap_err();
    assert!(matches!(&error, CheckpointError::Exists { path } if *path == other), "{error}");
    assert_eq!(fs::read_to_string(other.join("data")).unwrap(), "precious");
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 2);
    // A link is not followed, and not replaced.
    #[cfg(unix)]
    {
        let (link, elsewhere) = (parent.path().join("link"), parent.path().join("elsewhere"));
        fs::create_dir(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        let error = StagedDirectory::refuse_existing(&link).unwrap_err();
        assert!(matches!(&error, CheckpointError::Exists { path } if *path == link), "{error}");
    }
    let error = StagedDirectory::refuse_existing(Path::new("..")).unwrap_err();
    assert!(matches!(error, CheckpointError::NoName { .. }), "{error}");
}

/// Whoever comes second is told so, and neither gets in the other's way.
#[test]
fn two_writers_of_one_directory_are_told_apart() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let config = dense();
    let values = parameters(&config);
    let first = StagedDirectory::create(&directory).unwrap();
    first.write_file("note", b"first").unwrap();
    let error = save(&directory, &config, &values, &[]).unwrap_err();
    assert!(matches!(&error, CheckpointError::Busy { path } if *path == directory), "{error}");
    first.commit().unwrap();
    assert_eq!(fs::read(directory.join("note")).unwrap(), b"first");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    save(&directory, &config, &values, &[]).unwrap();
    assert_eq!(load(&directory).unwrap().1, values);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);

    // Many at once: one at least gets through, and what is there in the end is whole.
    let writers: Vec<_> = (0..6)
        .map(|_| {
            let (directory, config, values) = (directory.clone(), config.clone(), values.clone());
            std::thread::spawn(move || save(&directory, &config, &values, &[]))
        })
        .collect();
    let written = writers.into_iter().filter_map(|writer| writer.join().unwrap().ok()).count();
    assert!(written >= 1);
    assert_eq!(load(&directory).unwrap().1, values);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
}

#[test]
fn values_that_no_model_has_are_refused_by_tensor() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let config = dense();
    let norm = config.layout().unwrap().find("model.norm.weight").unwrap().offset;
    for value in [f32::NAN, f32::NEG_INFINITY, 2e30] {
        let mut values = parameters(&config);
        values[norm + 3] = value;
        save(&directory, &config, &values, &[]).unwrap();
        let error = load(&directory).unwrap_err().to_string();
        assert!(error.contains("model.norm.weight") && error.contains("model.safetensors"), "{error}");
    }
}

/// Some configurations say -1 for a token that there is not.
#[test]
fn tokens_that_cannot_be_are_left_out() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    save(&directory, &dense(), &parameters(&dense()), &[]).unwrap();
    edit(&directory, "\"eos_token_id\": null", "\"eos_token_id\": -1");
    assert!(Checkpoint::open(&directory).unwrap().special_tokens().eos.is_empty());
    edit(&directory, "\"eos_token_id\": -1", "\"eos_token_id\": [-1, 7]");
    assert_eq!(Checkpoint::open(&directory).unwrap().special_tokens().eos, [7]);
}

/// Some files name the kind of rotary scaling in both spellings; one that makes no sense is refused.
#[test]
fn rotary_scaling_is_read_in_either_spelling_and_checked() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let read = |scaling: &str| {
        save(&directory, &dense(), &parameters(&dense()), &[]).unwrap();
        let path = directory.join(CONFIG_FILE);
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        json["rope_parameters"] = serde_json::Value::Null;
        json["rope_scaling"] = serde_json::from_str(scaling).unwrap();
        fs::write(&path, json.to_string()).unwrap();
        Checkpoint::open(&directory).map(|checkpoint| checkpoint.config().rope_llama3)
    };
    let rest =
        r#""factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64"#;
    let kinds =
        [r#""rope_type": "llama3""#, r#""type": "llama3""#, r#""type": "llama3", "rope_type": "llama3""#];
    for kind in kinds {
        let found = read(&format!("{{{kind}, {rest}}}")).unwrap().unwrap();
        assert_eq!((found.factor, found.original_context), (8.0, 64));
    }
    for (from, to, part) in [
        ("\"factor\": 8", "\"factor\": 0", "factor"),
        ("\"low_freq_factor\": 1", "\"low_freq_factor\": 4", "low_freq_factor"),
        ("\"high_freq_factor\": 4", "\"high_freq_factor\": -4", "high_freq_factor"),
        ("embeddings\": 64", "embeddings\": 0", "original_max_position_embeddings"),
    ] {
        let error = read(&format!("{{{}, {}}}", kinds[0], rest.replace(from, to))).unwrap_err();
        let error = sanderling_common::report::one_sentence(&error);
        assert!(error.contains("config.json") && error.contains(part), "{error}");
    }
}

#[test]
fn what_this_decoder_does_not_compute_is_refused_by_name() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("model");
    let check = |from: &str, to: &str, parts: &[&str]| {
        save(&directory, &dense(), &parameters(&dense()), &[]).unwrap();
        edit(&directory, from, to);
        let error = Checkpoint::open(&directory).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    check("\"silu\"", "\"relu2\"", &["config.json", "hidden_act", "relu2", "SwiGLU"]);
    check("\"silu\"", "\"gelu\"", &["hidden_act", "gelu", "SwiGLU"]);
    check("LlamaForCausalLM", "OlmoeForCausalLM", &["OlmoeForCausalLM", "MixtralForCausalLM"]);
    check("\"attention_bias\": false", "\"attention_bias\": true", &["attention_bias"]);
    check("\"hidden_size\": 32", "\"hidden_size\": 36", &["model.safetensors", "embed_tokens", "36"]);
    check("\"vocab_size\": 65", "\"vocab_size\": -1", &["config.json"]);
    check("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4000000000", &["config.json"]);
}

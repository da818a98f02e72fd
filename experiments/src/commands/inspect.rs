//! `sanderling inspect`: what a checkpoint directory holds.

use std::path::PathBuf;

use sanderling_common::checkpoint::{Checkpoint, TOKENIZER_FILE};
use sanderling_common::model_config::{FeedForward, ModelConfig};
use sanderling_server::progress::bytes as show_bytes;
use serde_json::{Value, json};

use super::{checked_tokenizer, say};
use crate::card::{count, shape_rows};
use crate::report::table;

/// Say what is in a checkpoint: architecture, parameters total and active, experts, sizes, number formats
///
/// Everything is checked as for training (names, shapes, formats, lengths, the tokenizer), but of the weights no more is
/// read than tells whether a part adds nothing, so it is quick whatever the size.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling inspect runs/NAME/checkpoint
  sanderling inspect --tensors Mixtral-8x7B | less
  sanderling inspect --json DIR | jq .active_parameters")]
pub struct Arguments {
    /// A LlamaForCausalLM, MixtralForCausalLM or Qwen2MoeForCausalLM directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// List every tensor with its shape
    #[arg(long)]
    tensors: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the checkpoint, in a sentence.
pub fn inspect(arguments: &Arguments) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&arguments.directory)?;
    let tokenizer = checked_tokenizer(&checkpoint)?;
    if arguments.json {
        return say(&format!("{:#}\n", describe(&checkpoint, arguments.tensors)?));
    }
    let (config, stored) = (checkpoint.config(), checkpoint.stored());
    let formats: Vec<String> =
        stored.values.iter().map(|(format, values)| format!("{} as {format}", count(*values))).collect();
    let mut rows = vec![
        ("architecture", checkpoint.architecture().class().to_owned()),
        ("parameters", count(checkpoint.layout().len() as u64)),
        ("active per token", count(config.active_parameters()? as u64)),
    ];
    if let Some(expert) = expert_parameters(config) {
        rows.push(("one expert", format!("{} in each of {} layers", count(expert), config.layers)));
    }
    rows.extend(shape_rows(config));
    rows.push(("rotary base", rotary(config)));
    rows.push(("stored", formats.join(", ")));
    let (bytes, files) = (show_bytes(stored.bytes), if stored.files == 1 { "file" } else { "files" });
    rows.push(("size", format!("{bytes} in {} tensors, {} {files}", stored.tensors, stored.files)));
    let tokens = tokenizer.map(|tokenizer| format!("tokenizer.json, {} tokens", tokenizer.vocabulary_size()));
    rows.push(("tokenizer", tokens.unwrap_or("none".to_owned())));
    let mut text = table(&rows);
    if arguments.tensors {
        text.push('\n');
        let listed = checkpoint.layout().tensors().iter();
        text.extend(listed.map(|tensor| format!("  {:?} {}\n", tensor.shape, tensor.name)));
    }
    say(&text)
}

/// Parameters of one expert of one layer.
fn expert_parameters(config: &ModelConfig) -> Option<u64> {
    matches!(config.feed_forward, FeedForward::Moe { .. })
        .then(|| 3 * (config.hidden_size * config.intermediate_size) as u64)
}

fn rotary(config: &ModelConfig) -> String {
    let stretched = config.rope_llama3.map(|scaling| {
        format!(
            ", stretched {} times from {} tokens as Llama 3 does",
            scaling.factor, scaling.original_context
        )
    });
    format!("{}{}", config.rope_theta, stretched.unwrap_or_default())
}

fn describe(checkpoint: &Checkpoint, tensors: bool) -> anyhow::Result<Value> {
    let (config, stored) = (checkpoint.config(), checkpoint.stored());
    let mut description = json!({
        "architecture": checkpoint.architecture().class(),
        "parameters": checkpoint.layout().len(),
        "active_parameters": config.active_parameters()?,
        "expert_parameters": expert_parameters(config),
        "model": config,
        "stored_values": stored.values,
        "bytes": stored.bytes,
        "stored_tensors": stored.tensors,
        "files": stored.files,
        "tokenizer": checkpoint.directory().join(TOKENIZER_FILE).is_file(),
    });
    if tensors {
        let listed = checkpoint.layout().tensors().iter();
        let listed = listed.map(|tensor| json!({ "name": tensor.name, "shape": tensor.shape }));
        description["tensors"] = listed.collect();
    }
    Ok(description)
}

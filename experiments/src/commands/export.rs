//! `sanderling export`: a run's best model as a directory to hand on.

use std::path::{Path, PathBuf};

use anyhow::Context;
use sanderling_common::checkpoint::{
    Checkpoint, StagedDirectory, TOKENIZER_FILE, WriteOptions, stored_bytes, write,
};
use sanderling_common::config::parse;
use sanderling_server::progress::bytes as show_bytes;
use serde_json::{Value, json};

use super::{StoredAs, checked_tokenizer, say};
use crate::card::{self, CARD_FILE, model_card};
use crate::report::table;
use crate::work::{Unit, Work};

/// The summary in a run's folder.
const SUMMARY_FILE: &str = "summary.json";

/// The largest summary that is read, in bytes.
const SUMMARY_BYTES_MAX: u64 = 1 << 20;

/// Write a run's best model as a Hugging Face directory, with a model card
///
/// `transformers` loads the result unchanged: LlamaForCausalLM for a dense model, MixtralForCausalLM for
/// topk-then-softmax, Qwen2MoeForCausalLM for softmax-then-topk. Models past --shard-bytes are cut into shards with an
/// index.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling export --run runs/shakespeare-dgs-adam-4w --out shakespeare-moe
  sanderling export --run runs/NAME --dtype bfloat16 --out small")]
pub struct Arguments {
    /// The run's folder
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Where the model goes; nothing may be there yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How values are stored.
    #[command(flatten)]
    stored_as: StoredAs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the model from being written, in a sentence.
pub fn export(arguments: &Arguments) -> anyhow::Result<()> {
    StagedDirectory::refuse_existing(&arguments.out)?;
    let summary = read_summary(&arguments.run)?;
    let checkpoint = Checkpoint::open(&arguments.run.join("checkpoint"))?;
    checked_tokenizer(&checkpoint)?;
    let config = checkpoint.config();
    let stored_type = arguments.stored_as.stored_type(&checkpoint);
    let name = arguments.out.file_name().unwrap_or(arguments.out.as_os_str()).to_string_lossy();
    let mut files = checkpoint.carried_files()?;
    let has_tokenizer = files.iter().any(|(name, _)| name == TOKENIZER_FILE);
    let made = made(&summary, &beginning(&arguments.run));
    let card = model_card(&name, config, (stored_type, has_tokenizer), &made);
    files.push((CARD_FILE.to_owned(), card.into_bytes()));
    let special_tokens = checkpoint.special_tokens().clone();
    let shard_bytes_max = arguments.stored_as.shard_bytes_max;
    let options = WriteOptions { stored_type, shard_bytes_max, special_tokens, files, replaces: false };
    let bytes = stored_bytes(config, stored_type);
    let mut work = Work::begin("exporting", bytes, Unit::Bytes)?;
    write(&arguments.out, config, &options, &checkpoint, &mut |done| work.at(done))?;
    work.end();
    if arguments.json {
        return say(&format!(
            "{:#}\n",
            json!({
                "out": arguments.out.display().to_string(), "bytes": bytes, "stored_type": stored_type.name(),
                "architecture": checkpoint.architecture().class(), "parameters": checkpoint.layout().len(),
            })
        ));
    }
    let mut rows = vec![("checkpoint", arguments.out.display().to_string())];
    rows.extend(card::rows(config, stored_type));
    rows.push(("weights", show_bytes(bytes)));
    say(&table(&rows))
}

fn read_summary(run: &Path) -> anyhow::Result<Value> {
    let path = run.join(SUMMARY_FILE);
    let not_a_run =
        || format!("{} is no folder of a finished run: cannot read {SUMMARY_FILE}", run.display());
    let bytes = std::fs::metadata(&path).with_context(not_a_run)?.len();
    anyhow::ensure!(bytes <= SUMMARY_BYTES_MAX, "{} has {bytes} bytes, which no summary has", path.display());
    let text = std::fs::read(&path).with_context(not_a_run)?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not a summary", path.display()))
}

/// What the run started from, as its resolved configuration says.
fn beginning(run: &Path) -> String {
    let text = std::fs::read_to_string(run.join("run.toml")).ok();
    let Some(settings) = text.and_then(|text| parse(&text).ok()) else {
        return "from a start unknown".to_owned();
    };
    let named = |path: Option<String>| {
        let path = path.filter(|path| !path.is_empty())?;
        Some(Path::new(&path).file_name()?.to_string_lossy().into_owned())
    };
    let upcycle = settings.upcycle;
    match (named(upcycle.dense), named(settings.model.init)) {
        (Some(dense), _) => format!(
            "from a mixture upcycled of the dense checkpoint `{dense}` (SHA-256 of its parameters {}, granularity {}, \
             scaling {}, seed {})",
            upcycle.dense_sha256.unwrap_or_default(),
            upcycle.granularity.unwrap_or(1),
            super::upcycle::scaling_name(upcycle.scaling.unwrap_or_default()),
            settings.run.seed.unwrap_or_default(),
        ),
        (None, Some(init)) => format!("from the checkpoint `{init}`"),
        (None, None) => "from random parameters".to_owned(),
    }
}

/// The card's paragraph and table. Whatever a summary lacks is left out.
fn made(summary: &Value, beginning: &str) -> String {
    let text = |key: &str| match &summary[key] {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Number(number) if number.is_f64() => number.as_f64().map(|value| format!("{value:.4}")),
        other => Some(other.to_string()),
    };
    let rows = [
        ("method", "method"),
        ("workers", "workers"),
        ("updates applied", "steps"),
        ("training tokens", "tokens"),
        ("seed", "seed"),
        ("best validation loss, nats per token", "best_val_loss"),
        ("step of that model", "best_step"),
        ("test loss, nats per token", "test_loss"),
        ("bytes sent by the workers", "bytes_up"),
        ("bytes sent to the workers", "bytes_down"),
        ("bytes of dense float32 exchange, each way", "dense_bytes_up"),
    ];
    let rows = rows.iter().filter_map(|(name, key)| Some(format!("| {name} | {} |\n", text(key)?)));
    format!(
        "Trained by Sanderling, asynchronously and with sparse exchange in both directions, {beginning}; the best model \
         by validation.\n\n| | |\n| --- | --- |\n{}",
        rows.collect::<String>()
    )
}

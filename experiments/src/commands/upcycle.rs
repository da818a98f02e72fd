//! `sanderling upcycle`: a dense checkpoint becomes a mixture of experts.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use sanderling_common::checkpoint::{
    Architecture, Checkpoint, StagedDirectory, TOKENIZER_FILE, WriteOptions, stored_bytes, write,
};
use sanderling_common::init::INIT_STD;
use sanderling_common::model_config::RouterOrder;
use sanderling_common::upcycle::{Recipe, Scaling, Upcycled};
use sanderling_server::progress::bytes as show_bytes;
use serde_json::json;

use super::{StoredAs, checked_tokenizer, say};
use crate::card::{self, CARD_FILE, model_card};
use crate::report::table;
use crate::work::{Unit, Work};

/// Make a mixture of experts from a dense Llama checkpoint
///
/// Each expert starts as a copy of the dense feed-forward network, or with --granularity G as a G-th of it; everything
/// else is copied. Tensors are mapped from the dense checkpoint and written as they are made, so the memory needed is
/// that of the largest tensor, whatever the size of the model. The same checkpoint, recipe and seed give the same bits
/// on every machine.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling upcycle --dense llama --out mixtral                     # 8 experts, 2 active: the same function
  sanderling upcycle --dense llama --experts 64 --top-k 8 --granularity 8 --out fine-grained
  sanderling upcycle --dense llama --router softmax-then-topk --scaling paper --out qwen2moe
  sanderling train --init mixtral --text corpus.txt                  # then train it on")]
pub struct Arguments {
    /// The dense checkpoint: a LlamaForCausalLM directory
    #[arg(long, value_name = "DIR")]
    dense: PathBuf,
    /// Where the mixture goes; nothing may be there yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// N, experts per layer
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// T, experts active per token; a multiple of the granularity
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// G: each expert has a G-th of the dense network's width
    #[arg(long, default_value_t = 1)]
    granularity: usize,
    /// Whether the router selects before or after its softmax
    #[arg(long, value_enum, default_value_t)]
    router: RouterOrder,
    /// How the experts' weights are scaled
    #[arg(long, value_enum, default_value_t)]
    scaling: Scaling,
    /// Seed of the routers
    #[arg(long, default_value_t = 1337)]
    seed: u64,
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
/// Whatever keeps the mixture from being written, in a sentence.
pub fn upcycle(arguments: &Arguments) -> anyhow::Result<()> {
    let started = Instant::now();
    StagedDirectory::refuse_existing(&arguments.out)?;
    let dense = Checkpoint::open(&arguments.dense)?;
    let recipe = Recipe {
        experts: arguments.experts,
        top_k: arguments.top_k,
        granularity: arguments.granularity,
        router: arguments.router,
        scaling: arguments.scaling,
        seed: arguments.seed,
    };
    let upcycled = Upcycled::new(&recipe, dense.config(), &dense);
    let upcycled = upcycled.with_context(|| format!("{} cannot be upcycled", arguments.dense.display()))?;
    checked_tokenizer(&dense)?;
    let config = upcycled.config().clone();
    // Products that bfloat16 does not hold would cost what exact scaling is for.
    let keeps_bits = recipe.scaling != Scaling::Exact || upcycled.scales_by_powers_of_two();
    let stored_type = arguments.stored_as.stored_type_of(&dense, keeps_bits);
    let mut files = dense.carried_files()?;
    let has_tokenizer = files.iter().any(|(name, _)| name == TOKENIZER_FILE);
    let made = made(&arguments.dense, &recipe);
    let card = model_card(&title(arguments), &config, (stored_type, has_tokenizer), &made);
    files.push((CARD_FILE.to_owned(), card.into_bytes()));
    let special_tokens = dense.special_tokens().clone();
    let shard_bytes_max = arguments.stored_as.shard_bytes_max;
    let options = WriteOptions { stored_type, shard_bytes_max, special_tokens, files, replaces: false };
    let bytes = stored_bytes(&config, stored_type);
    let mut work = Work::begin("upcycling", bytes, Unit::Bytes)?;
    write(&arguments.out, &config, &options, &upcycled, &mut |done| work.at(done))?;
    work.end();
    let (parameters, active) = (upcycled.layout().len(), config.active_parameters()?);
    let seconds = started.elapsed().as_secs_f64();
    let out = arguments.out.display();
    if arguments.json {
        let class = Architecture::of(&config).map(Architecture::class);
        return say(&format!(
            "{:#}\n",
            json!({
                "out": arguments.out.display().to_string(), "architecture": class, "parameters": parameters, "active_parameters": active,
                "bytes": bytes, "stored_type": stored_type.name(), "recipe": recipe, "seconds": seconds,
            })
        ));
    }
    let mut rows = vec![("checkpoint", out.to_string())];
    rows.extend(card::rows(&config, stored_type));
    rows.push(("weights", format!("{}, scaling {}", show_bytes(bytes), scaling_name(recipe.scaling))));
    rows.push(("time", format!("{seconds:.1} s")));
    say(&table(&rows))
}

fn title(arguments: &Arguments) -> String {
    let name = arguments.out.file_name().unwrap_or(arguments.out.as_os_str());
    name.to_string_lossy().into_owned()
}

pub(super) fn scaling_name(scaling: Scaling) -> &'static str {
    match scaling {
        Scaling::Paper => "paper",
        Scaling::Exact => "exact",
        Scaling::None => "none",
    }
}

/// The card's paragraph.
fn made(dense: &std::path::Path, recipe: &Recipe) -> String {
    let name = dense.file_name().unwrap_or(dense.as_os_str()).to_string_lossy();
    let Recipe { experts, top_k, granularity, scaling, seed, .. } = recipe;
    format!(
        "Upcycled by Sanderling from the dense checkpoint `{name}`: {experts} experts, {top_k} active, granularity \
         {granularity}, scaling `{}`, router rows normal with standard deviation {INIT_STD} from seed {seed}. It has not \
         been trained since.",
        scaling_name(*scaling)
    )
}

//! The README of a checkpoint: what the model is and how it was made.

use std::fmt::Write;

use sanderling_common::checkpoint::{Architecture, StoredType};
use sanderling_common::model_config::{FeedForward, ModelConfig, RouterOrder};

/// The name of the file.
pub const CARD_FILE: &str = "README.md";

/// A model card in the form that model hubs read: a heading, a table of the model, and `made`, a paragraph or more on
/// how it came to be. What a program has to write depends on whether there is a tokenizer.
pub fn model_card(
    title: &str,
    config: &ModelConfig,
    (stored_type, has_tokenizer): (StoredType, bool),
    made: &str,
) -> String {
    let mut card = format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- sanderling\n---\n\n# {title}\n\n"
    );
    card.push_str("| | |\n| --- | --- |\n");
    for (name, value) in rows(config, stored_type) {
        // Writing to a string does not fail.
        let _ = writeln!(card, "| {name} | {value} |");
    }
    let _ = write!(card, "\n## How it was made\n\n{}\n", made.trim_end());
    card.push_str(
        "\n## Use\n\n    from transformers import AutoModelForCausalLM, AutoTokenizer\n    model = \
         AutoModelForCausalLM.from_pretrained(\".\")\n",
    );
    card.push_str(match has_tokenizer {
        true => "    tokenizer = AutoTokenizer.from_pretrained(\".\")\n",
        false => "\nThere is no tokenizer here: the model takes the tokens that it was trained on.\n",
    });
    card
}

/// What there is to say of an architecture, in a few rows.
pub fn rows(config: &ModelConfig, stored_type: StoredType) -> Vec<(&'static str, String)> {
    let parameters = config.layout().map_or(0, |layout| layout.len());
    let active = config.active_parameters().unwrap_or(0);
    let mut rows = vec![
        ("architecture", Architecture::of(config).map_or("none", Architecture::class).to_owned()),
        ("parameters", count(parameters as u64)),
        ("active per token", count(active as u64)),
        ("stored as", stored_type.name().to_owned()),
    ];
    rows.extend(shape_rows(config));
    rows
}

/// The shape of a model.
pub fn shape_rows(config: &ModelConfig) -> Vec<(&'static str, String)> {
    let ModelConfig { heads, kv_heads, head_dim, .. } = config;
    let mut rows = vec![
        ("layers", config.layers.to_string()),
        ("hidden size", config.hidden_size.to_string()),
        ("attention", format!("{heads} query heads, {kv_heads} key and value heads, {head_dim} wide")),
    ];
    match config.feed_forward {
        FeedForward::Dense => {
            rows.push(("feed-forward", format!("dense, {} wide", config.intermediate_size)))
        }
        FeedForward::Moe { experts, top_k, router } => {
            let order = match router {
                RouterOrder::TopkThenSoftmax => "top-k, then softmax",
                RouterOrder::SoftmaxThenTopk => "softmax, then top-k, not renormalised",
            };
            let width = config.intermediate_size;
            rows.push(("experts", format!("{experts} per layer, {top_k} active, {width} wide ({order})")));
        }
    }
    if let Some(width) = config.shared_expert {
        rows.push(("shared expert", format!("{width} wide")));
    }
    if config.qkv_bias {
        rows.push(("biases", "of queries, keys and values".to_owned()));
    }
    rows.extend([
        ("vocabulary", config.vocab_size.to_string()),
        ("context", format!("{} tokens", config.context)),
        ("embeddings", if config.tie_word_embeddings { "tied" } else { "untied" }.to_owned()),
    ]);
    rows
}

/// A number of parameters, as people say it and exactly.
pub fn count(number: u64) -> String {
    let short = match number {
        0..1_000_000 => format!("{:.1} k", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} M", number as f64 / 1e6),
        _ => format!("{:.2} B", number as f64 / 1e9),
    };
    format!("{short} ({number})")
}

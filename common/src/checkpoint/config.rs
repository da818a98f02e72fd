//! `config.json`: what the Hugging Face architectures say, and what this decoder makes of it.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::names::NEUTRAL_SHARED_EXPERT;
use super::{CheckpointError, WriteOptions};
use crate::model_config::{FeedForward, Llama3Rope, ModelConfig, RouterOrder};

/// The Hugging Face class that computes a model of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Dense.
    Llama,
    /// Mixture of experts, top-k and then softmax.
    Mixtral,
    /// Mixture of experts, softmax and then top-k; also whatever has a shared expert, or biases of queries, keys and
    /// values.
    Qwen2Moe,
}

impl Architecture {
    /// The architecture that a configuration is written as; `None` if there is none.
    pub fn of(config: &ModelConfig) -> Option<Self> {
        match config.feed_forward {
            FeedForward::Dense => (!config.qkv_bias).then_some(Self::Llama),
            FeedForward::Moe { .. } if config.qkv_bias || config.shared_expert.is_some() => {
                Some(Self::Qwen2Moe)
            }
            FeedForward::Moe { router: RouterOrder::TopkThenSoftmax, .. } => Some(Self::Mixtral),
            FeedForward::Moe { router: RouterOrder::SoftmaxThenTopk, .. } => Some(Self::Qwen2Moe),
        }
    }

    /// The class of `transformers`.
    pub fn class(self) -> &'static str {
        self.names().0
    }

    /// (class, `model_type`).
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Llama => ("LlamaForCausalLM", "llama"),
            Self::Mixtral => ("MixtralForCausalLM", "mixtral"),
            Self::Qwen2Moe => ("Qwen2MoeForCausalLM", "qwen2_moe"),
        }
    }

    /// (`rms_norm_eps`, `rope_theta`) of `transformers` where a file leaves them out.
    fn defaults(self) -> (f32, f64) {
        match self {
            Self::Llama | Self::Qwen2Moe => (1e-6, 10_000.0),
            Self::Mixtral => (1e-5, 1_000_000.0),
        }
    }
}

/// Tokens with a meaning of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text; any of them.
    pub eos: Vec<u32>,
    /// Fills up a batch.
    pub pad: Option<u32>,
}

impl SpecialTokens {
    /// Adds the end tokens of a `generation_config.json`, where models that were trained to converse have theirs. One that
    /// cannot be read has none.
    pub(super) fn add_ends(&mut self, generation_config: &[u8]) {
        #[derive(Deserialize)]
        struct Ends {
            eos_token_id: Option<OneOrMore>,
        }
        let ends = serde_json::from_slice(generation_config).ok().and_then(|ends: Ends| ends.eos_token_id);
        for token in ends.map(OneOrMore::into_list).unwrap_or_default() {
            if !self.eos.contains(&token) {
                self.eos.push(token);
            }
        }
    }

    /// Leaves out tokens that a vocabulary of that size does not have.
    pub(super) fn leave_out_from(&mut self, vocab_size: usize) {
        let is_known = |token: &u32| (*token as usize) < vocab_size;
        self.bos = self.bos.filter(is_known);
        self.pad = self.pad.filter(is_known);
        self.eos.retain(is_known);
    }

    /// As `config.json` has them: one end token by itself, several as a list.
    fn to_json(&self) -> Value {
        let eos = match &self.eos[..] {
            [] => Value::Null,
            [only] => json!(only),
            several => json!(several),
        };
        json!({ "bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad })
    }

    /// The text of a `generation_config.json`.
    pub(super) fn generation_config(&self) -> String {
        let mut file = json!({ "_from_model_config": true });
        extend(&mut file, self.to_json());
        format!("{file:#}\n")
    }
}

/// One token or a list of them, as `eos_token_id` may be.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(i64),
    More(Vec<i64>),
}

/// For messages.
const KNOWN_CLASSES: &str = "LlamaForCausalLM, MixtralForCausalLM and Qwen2MoeForCausalLM are";

impl OneOrMore {
    /// Those that can be tokens; some models say -1 for none.
    fn into_list(self) -> Vec<u32> {
        let tokens = match self {
            Self::One(token) => vec![token],
            Self::More(tokens) => tokens,
        };
        tokens.into_iter().filter_map(|token| u32::try_from(token).ok()).collect()
    }
}

/// The settings that matter here; the others do not change what a decoder computes.
#[derive(Deserialize)]
struct File {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f32>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    num_local_experts: Option<usize>,
    num_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    moe_intermediate_size: Option<usize>,
    norm_topk_prob: Option<bool>,
    decoder_sparse_step: Option<usize>,
    mlp_only_layers: Option<Vec<usize>>,
    shared_expert_intermediate_size: Option<usize>,
    qkv_bias: Option<bool>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<OneOrMore>,
    pad_token_id: Option<i64>,
}

/// `rope_scaling`, or with its own theta `rope_parameters`.
#[derive(Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    /// The older spelling is `type`; some files have both.
    rope_type: Option<String>,
    r#type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    partial_rotary_factor: Option<f64>,
}

/// Reads the text of a `config.json`; `path` is for messages.
///
/// # Errors
/// A [`CheckpointError`] for text that is not such a configuration, or one that this decoder cannot follow.
pub fn parse_config(
    path: &Path,
    text: &[u8],
) -> Result<(Architecture, ModelConfig, SpecialTokens), CheckpointError> {
    let file: File = serde_json::from_slice(text)
        .map_err(|source| CheckpointError::Json { path: path.to_owned(), source })?;
    let reader = Reader { path, file: &file };
    let architecture = reader.architecture()?;
    reader.refuse_what_is_not_computed(architecture)?;
    let need = |value: Option<usize>, key| reader.need(value, key);
    let hidden_size = need(file.hidden_size, "hidden_size")?;
    let heads = need(file.num_attention_heads, "num_attention_heads")?;
    let (eps, theta) = architecture.defaults();
    let (rope_theta, rope_llama3) = reader.rope(theta)?;
    let config = ModelConfig {
        vocab_size: need(file.vocab_size, "vocab_size")?,
        hidden_size,
        layers: need(file.num_hidden_layers, "num_hidden_layers")?,
        heads,
        kv_heads: file.num_key_value_heads.unwrap_or(heads),
        head_dim: file.head_dim.unwrap_or_else(|| hidden_size.checked_div(heads).unwrap_or(0)),
        intermediate_size: match architecture {
            Architecture::Qwen2Moe => need(file.moe_intermediate_size, "moe_intermediate_size")?,
            _ => need(file.intermediate_size, "intermediate_size")?,
        },
        feed_forward: reader.feed_forward(architecture)?,
        rms_norm_eps: file.rms_norm_eps.unwrap_or(eps),
        rope_theta,
        rope_llama3,
        tie_word_embeddings: file.tie_word_embeddings.unwrap_or(false),
        shared_expert: match architecture {
            Architecture::Qwen2Moe => {
                Some(need(file.shared_expert_intermediate_size, "shared_expert_intermediate_size")?)
            }
            _ => None,
        },
        qkv_bias: architecture == Architecture::Qwen2Moe && file.qkv_bias.unwrap_or(true),
        context: need(file.max_position_embeddings, "max_position_embeddings")?,
    };
    config.validate().map_err(|source| CheckpointError::Model { path: path.to_owned(), source })?;
    Ok((architecture, config, file.special_tokens()))
}

impl File {
    fn special_tokens(&self) -> SpecialTokens {
        SpecialTokens {
            // Some files have a list, or -1 for none.
            bos: self
                .bos_token_id
                .as_ref()
                .and_then(Value::as_u64)
                .and_then(|token| u32::try_from(token).ok()),
            eos: self.eos_token_id.clone().map(OneOrMore::into_list).unwrap_or_default(),
            // Some files say -1 for none.
            pad: self.pad_token_id.and_then(|token| u32::try_from(token).ok()),
        }
    }
}

/// A parsed file with its name for messages.
struct Reader<'a> {
    path: &'a Path,
    file: &'a File,
}

impl Reader<'_> {
    fn need<T>(&self, value: Option<T>, key: &'static str) -> Result<T, CheckpointError> {
        value.ok_or_else(|| CheckpointError::MissingKey { path: self.path.to_owned(), key })
    }

    fn unsupported(
        &self,
        key: &'static str,
        value: impl ToString,
        supported: &'static str,
    ) -> CheckpointError {
        CheckpointError::Unsupported { path: self.path.to_owned(), key, value: value.to_string(), supported }
    }

    fn architecture(&self) -> Result<Architecture, CheckpointError> {
        let all = [Architecture::Llama, Architecture::Mixtral, Architecture::Qwen2Moe];
        if let Some(class) = self.file.architectures.as_ref().and_then(|classes| classes.first()) {
            let known = all.into_iter().find(|architecture| architecture.names().0 == class);
            return known.ok_or_else(|| self.unsupported("architectures", class, KNOWN_CLASSES));
        }
        let model_type = self.need(self.file.model_type.as_deref(), "architectures")?;
        let known = all.into_iter().find(|architecture| architecture.names().1 == model_type);
        known.ok_or_else(|| self.unsupported("model_type", model_type, KNOWN_CLASSES))
    }

    fn refuse_what_is_not_computed(&self, architecture: Architecture) -> Result<(), CheckpointError> {
        let file = self.file;
        if let Some(activation) = file.hidden_act.as_ref().filter(|name| *name != "silu") {
            return Err(self.unsupported(
                "hidden_act",
                activation,
                "experts are SwiGLU networks, whose activation is silu",
            ));
        }
        for (key, bias) in [("attention_bias", file.attention_bias), ("mlp_bias", file.mlp_bias)] {
            if bias == Some(true) {
                return Err(self.unsupported(key, true, "it must be false"));
            }
        }
        // A window as long as the context hides nothing.
        let window = file.sliding_window.filter(|_| file.use_sliding_window != Some(false));
        if let Some(window) = window.filter(|&window| Some(window) < file.max_position_embeddings) {
            return Err(self.unsupported("sliding_window", window, "attention sees the whole context"));
        }
        if architecture == Architecture::Qwen2Moe {
            if let Some(step) = file.decoder_sparse_step.filter(|&step| step != 1) {
                return Err(self.unsupported("decoder_sparse_step", step, "every layer must be sparse"));
            }
            if let Some(layers) = file.mlp_only_layers.as_ref().filter(|layers| !layers.is_empty()) {
                return Err(self.unsupported(
                    "mlp_only_layers",
                    format!("{layers:?}"),
                    "every layer must be sparse",
                ));
            }
        }
        Ok(())
    }

    fn feed_forward(&self, architecture: Architecture) -> Result<FeedForward, CheckpointError> {
        let (experts, key, router) = match architecture {
            Architecture::Llama => return Ok(FeedForward::Dense),
            Architecture::Mixtral => {
                (self.file.num_local_experts, "num_local_experts", RouterOrder::TopkThenSoftmax)
            }
            Architecture::Qwen2Moe => {
                // The softmax over all experts, renormalised over the kept ones, is the softmax over the kept ones.
                let order = match self.file.norm_topk_prob {
                    Some(true) => RouterOrder::TopkThenSoftmax,
                    _ => RouterOrder::SoftmaxThenTopk,
                };
                (self.file.num_experts, "num_experts", order)
            }
        };
        let experts = self.need(experts, key)?;
        let top_k = self.need(self.file.num_experts_per_tok, "num_experts_per_tok")?;
        Ok(FeedForward::Moe { experts, top_k, router })
    }

    /// Theta and Llama 3's scaling, from either spelling; the newer one wins where a file has both.
    fn rope(&self, default_theta: f64) -> Result<(f64, Option<Llama3Rope>), CheckpointError> {
        let newer = self.file.rope_parameters.as_ref();
        let theta = newer.and_then(|rope| rope.rope_theta).or(self.file.rope_theta).unwrap_or(default_theta);
        let Some(rope) = newer.or(self.file.rope_scaling.as_ref()) else { return Ok((theta, None)) };
        if let Some(factor) = rope.partial_rotary_factor.filter(|&factor| factor != 1.0) {
            return Err(self.unsupported("partial_rotary_factor", factor, "whole heads are rotated"));
        }
        match rope.rope_type.as_deref().or(rope.r#type.as_deref()) {
            None | Some("default") => Ok((theta, None)),
            Some("llama3") => {
                let scaling = Llama3Rope {
                    factor: self.need(rope.factor, "factor")?,
                    low_freq_factor: self.need(rope.low_freq_factor, "low_freq_factor")?,
                    high_freq_factor: self.need(rope.high_freq_factor, "high_freq_factor")?,
                    original_context: self
                        .need(rope.original_max_position_embeddings, "original_max_position_embeddings")?,
                };
                Ok((theta, Some(scaling)))
            }
            Some(other) => Err(self.unsupported("rope_type", other, "only default and llama3 are")),
        }
    }
}

/// The text of a `config.json` for a model; both spellings of the rotary settings are written.
///
/// # Panics
/// If no architecture holds the model.
pub(super) fn to_json(config: &ModelConfig, options: &WriteOptions) -> String {
    let architecture = Architecture::of(config).expect("the model can be written");
    let (class, model_type) = architecture.names();
    let mut file = json!({
        "architectures": [class],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": shortest(config.rms_norm_eps),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": crate::init::INIT_STD,
        "use_cache": true,
        "torch_dtype": options.stored_type.name(),
    });
    let mut set = |entries: Value| extend(&mut file, entries);
    set(options.special_tokens.to_json());
    set(rope_json(config));
    match (architecture, config.feed_forward) {
        (Architecture::Mixtral, FeedForward::Moe { experts, top_k, .. }) => set(json!({
            "num_local_experts": experts,
            "num_experts_per_tok": top_k,
            "output_router_logits": false,
            "router_jitter_noise": 0.0,
            "sliding_window": null,
        })),
        (Architecture::Qwen2Moe, FeedForward::Moe { experts, top_k, router }) => set(json!({
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": config.intermediate_size,
            "shared_expert_intermediate_size": config.shared_expert.unwrap_or(NEUTRAL_SHARED_EXPERT),
            "norm_topk_prob": router == RouterOrder::TopkThenSoftmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "qkv_bias": true,
            "output_router_logits": false,
            "use_sliding_window": false,
        })),
        _ => set(json!({ "attention_bias": false, "mlp_bias": false })),
    }
    format!("{file:#}\n")
}

/// Adds the entries of an object to another.
fn extend(file: &mut Value, entries: Value) {
    if let (Value::Object(file), Value::Object(entries)) = (file, entries) {
        file.extend(entries);
    }
}

fn rope_json(config: &ModelConfig) -> Value {
    let scaling = config.rope_llama3.map(|scaling| {
        json!({
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        })
    });
    let mut parameters = scaling.clone().unwrap_or_else(|| json!({ "rope_type": "default" }));
    parameters["rope_theta"] = json!(config.rope_theta);
    json!({ "rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters })
}

/// The number as its shortest decimal form: 1e-5 rather than the f64 nearest to the f32 nearest to it.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().expect("Rust parses the numbers that it prints")
}

//! The architecture of a Llama-style decoder, dense or mixture-of-experts, and the layout that follows from it.

use crate::layout::{Layout, LayoutError};

/// In which order a mixture-of-experts router normalises and selects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum RouterOrder {
    /// Keep the top-k router logits and take the softmax over those (Mixtral): the weights sum to one.
    #[default]
    TopkThenSoftmax,
    /// Take the softmax over all experts and keep the top-k probabilities as they are: they sum to less than one.
    SoftmaxThenTopk,
}

/// The feed-forward half of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FeedForward {
    /// One SwiGLU network.
    Dense,
    /// `experts` SwiGLU networks, `top_k` of them active per token.
    Moe {
        /// Experts per layer.
        experts: usize,
        /// Experts active per token.
        top_k: usize,
        /// How the router turns logits into weights.
        router: RouterOrder,
    },
}

/// Llama 3's stretching of the rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Llama3Rope {
    /// Long wavelengths are stretched by this factor.
    pub factor: f64,
    /// Wavelengths above `original_context / low_freq_factor` are stretched fully.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_context / high_freq_factor` stay as they are.
    pub high_freq_factor: f64,
    /// The context length before stretching (`original_max_position_embeddings`).
    pub original_context: usize,
}

/// Shape and constants of the decoder. `head_dim` is even; `heads` is a multiple of `kv_heads`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ModelConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads (grouped-query attention when fewer than `heads`).
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the feed-forward network, or of one expert.
    pub intermediate_size: usize,
    /// Dense or mixture of experts.
    pub feed_forward: FeedForward,
    /// Width of a SwiGLU network that serves every token beside the routed experts, its output scaled by a sigmoid gate
    /// of its own (Qwen2-MoE); only in a mixture of experts.
    pub shared_expert: Option<usize>,
    /// Whether queries, keys and values have biases (Qwen2).
    pub qkv_bias: bool,
    /// The epsilon inside RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Llama 3's frequency scaling, where the checkpoint has it.
    pub rope_llama3: Option<Llama3Rope>,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Longest sequence, in tokens (`max_position_embeddings`).
    pub context: usize,
}

/// The largest width, in elements, of anything: residual stream, heads together, feed-forward network, vocabulary.
pub const WIDTH_MAX: usize = 1 << 24;

/// The most decoder layers.
pub const LAYERS_MAX: usize = 1 << 12;

/// The most experts of a layer.
pub const EXPERTS_MAX: usize = 1 << 14;

/// The most tensors of a model; with the bounds above, every size that is computed fits 64 bits, and a description that
/// came from outside makes nothing large before it is refused.
pub const TENSORS_MAX: usize = 1 << 20;

/// The most elements of the rotary tables, positions times head size.
pub const ROTARY_ELEMENTS_MAX: usize = 1 << 28;

/// Why a model configuration cannot be built.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ModelConfigError {
    /// A size that must be positive is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// Rotary embedding turns pairs of channels.
    #[error("head_dim is {0}, but rotary embedding needs an even head size")]
    OddHeadDim(usize),
    /// Grouped-query attention shares each key head among the same number of query heads.
    #[error("heads ({heads}) must be a multiple of kv_heads ({kv_heads})")]
    HeadsNotGrouped {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
    },
    /// More active experts than experts.
    #[error("top_k is {top_k}, but there are only {experts} experts")]
    TopKTooLarge {
        /// Active experts asked for.
        top_k: usize,
        /// Experts there are.
        experts: usize,
    },
    /// A dense model with a shared expert.
    #[error("a shared expert needs a mixture of experts beside it")]
    SharedExpertAlone,
    /// A size beyond what any model has.
    #[error("{name} is {value}; at most {most} is supported")]
    TooLarge {
        /// The size.
        name: &'static str,
        /// Its value, saturating.
        value: usize,
        /// The limit.
        most: usize,
    },
    /// Wavelengths would have to be stretched and left as they are at once.
    #[error("low_freq_factor {low} must be below high_freq_factor {high}")]
    RopeFrequencies {
        /// The lower one, which is not.
        low: f64,
        /// The other.
        high: f64,
    },
    /// A constant that is not a usable number.
    #[error("{0} must be a positive finite number")]
    NotPositive(&'static str),
    /// The tensors do not fit the layout's bounds.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl ModelConfig {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// The first [`ModelConfigError`] found.
    pub fn validate(&self) -> Result<(), ModelConfigError> {
        for (name, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("context", self.context),
        ] {
            if size == 0 {
                return Err(ModelConfigError::Zero(name));
            }
        }
        self.check_sizes()?;
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelConfigError::OddHeadDim(self.head_dim));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelConfigError::HeadsNotGrouped { heads: self.heads, kv_heads: self.kv_heads });
        }
        if let FeedForward::Moe { experts, top_k, .. } = self.feed_forward {
            if experts == 0 {
                return Err(ModelConfigError::Zero("experts"));
            }
            if top_k == 0 {
                return Err(ModelConfigError::Zero("top_k"));
            }
            if top_k > experts {
                return Err(ModelConfigError::TopKTooLarge { top_k, experts });
            }
        }
        match (self.shared_expert, self.feed_forward) {
            (Some(0), _) => return Err(ModelConfigError::Zero("shared_expert")),
            (Some(_), FeedForward::Dense) => return Err(ModelConfigError::SharedExpertAlone),
            _ => {}
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps.is_finite()) {
            return Err(ModelConfigError::NotPositive("rms_norm_eps"));
        }
        if !(self.rope_theta > 0.0 && self.rope_theta.is_finite()) {
            return Err(ModelConfigError::NotPositive("rope_theta"));
        }
        self.check_rope_scaling()
    }

    fn check_rope_scaling(&self) -> Result<(), ModelConfigError> {
        let Some(rope) = &self.rope_llama3 else { return Ok(()) };
        for (name, value) in [
            ("the rotary factor", rope.factor),
            ("low_freq_factor", rope.low_freq_factor),
            ("high_freq_factor", rope.high_freq_factor),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(ModelConfigError::NotPositive(name));
            }
        }
        if rope.original_context == 0 {
            return Err(ModelConfigError::Zero("original_max_position_embeddings"));
        }
        let (low, high) = (rope.low_freq_factor, rope.high_freq_factor);
        if low < high { Ok(()) } else { Err(ModelConfigError::RopeFrequencies { low, high }) }
    }

    /// The named limits.
    fn check_sizes(&self) -> Result<(), ModelConfigError> {
        let experts = match self.feed_forward {
            FeedForward::Dense => 0,
            FeedForward::Moe { experts, .. } => experts,
        };
        let tensors = self.layers.saturating_mul(experts.saturating_mul(3).saturating_add(20));
        for (name, value, most) in [
            ("vocab_size", self.vocab_size, WIDTH_MAX),
            ("hidden_size", self.hidden_size, WIDTH_MAX),
            ("intermediate_size", self.intermediate_size, WIDTH_MAX),
            ("shared_expert", self.shared_expert.unwrap_or(0), WIDTH_MAX),
            ("heads · head_dim", self.heads.saturating_mul(self.head_dim), WIDTH_MAX),
            ("kv_heads · head_dim", self.kv_heads.saturating_mul(self.head_dim), WIDTH_MAX),
            ("layers", self.layers, LAYERS_MAX),
            ("experts", experts, EXPERTS_MAX),
            ("the number of tensors", tensors, TENSORS_MAX),
            ("context · head_dim", self.context.saturating_mul(self.head_dim), ROTARY_ELEMENTS_MAX),
        ] {
            if value > most {
                return Err(ModelConfigError::TooLarge { name, value, most });
            }
        }
        Ok(())
    }

    /// The named tensors of this model, in the order in which they lie in the flat vector.
    ///
    /// Names are those of `LlamaForCausalLM`, of `MixtralForCausalLM` for the experts, and of `Qwen2MoeForCausalLM` for
    /// a shared expert (under `block_sparse_moe`). Matrices that are multiplied with the same input lie side by side
    /// (q, k, v; w1, w3), so that one product serves them; so do the biases of q, k and v.
    ///
    /// # Errors
    /// A [`ModelConfigError`] if [`validate`](Self::validate) fails or a tensor is too large.
    pub fn layout(&self) -> Result<Layout, ModelConfigError> {
        self.validate()?;
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, d])];
        for layer in 0..self.layers {
            let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
            tensors.push((at("input_layernorm"), vec![d]));
            tensors.push((at("self_attn.q_proj"), vec![q, d]));
            tensors.push((at("self_attn.k_proj"), vec![kv, d]));
            tensors.push((at("self_attn.v_proj"), vec![kv, d]));
            if self.qkv_bias {
                for (projection, width) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                    tensors.push((format!("model.layers.{layer}.self_attn.{projection}.bias"), vec![width]));
                }
            }
            tensors.push((at("self_attn.o_proj"), vec![d, q]));
            tensors.push((at("post_attention_layernorm"), vec![d]));
            match self.feed_forward {
                FeedForward::Dense => {
                    tensors.push((at("mlp.gate_proj"), vec![f, d]));
                    tensors.push((at("mlp.up_proj"), vec![f, d]));
                    tensors.push((at("mlp.down_proj"), vec![d, f]));
                }
                FeedForward::Moe { experts, .. } => {
                    tensors.push((at("block_sparse_moe.gate"), vec![experts, d]));
                    for e in 0..experts {
                        tensors.push((at(&format!("block_sparse_moe.experts.{e}.w1")), vec![f, d]));
                        tensors.push((at(&format!("block_sparse_moe.experts.{e}.w3")), vec![f, d]));
                        tensors.push((at(&format!("block_sparse_moe.experts.{e}.w2")), vec![d, f]));
                    }
                    if let Some(shared) = self.shared_expert {
                        tensors.push((at("block_sparse_moe.shared_expert_gate"), vec![1, d]));
                        tensors.push((at("block_sparse_moe.shared_expert.gate_proj"), vec![shared, d]));
                        tensors.push((at("block_sparse_moe.shared_expert.up_proj"), vec![shared, d]));
                        tensors.push((at("block_sparse_moe.shared_expert.down_proj"), vec![d, shared]));
                    }
                }
            }
        }
        tensors.push(("model.norm.weight".to_owned(), vec![d]));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, d]));
        }
        Ok(Layout::new(tensors)?)
    }

    /// Parameters that one token passes through: all but the experts it is not routed to.
    ///
    /// # Errors
    /// As [`layout`](Self::layout).
    pub fn active_parameters(&self) -> Result<usize, ModelConfigError> {
        let idle = match self.feed_forward {
            FeedForward::Dense => 0,
            FeedForward::Moe { experts, top_k, .. } => {
                self.layers * (experts - top_k) * 3 * self.hidden_size * self.intermediate_size
            }
        };
        Ok(self.layout()?.len() - idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moe() -> ModelConfig {
        ModelConfig {
            vocab_size: 65,
            hidden_size: 32,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            intermediate_size: 48,
            feed_forward: FeedForward::Moe { experts: 8, top_k: 2, router: RouterOrder::TopkThenSoftmax },
            shared_expert: None,
            qkv_bias: false,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_llama3: None,
            tie_word_embeddings: true,
            context: 64,
        }
    }

    #[test]
    fn counts_parameters() {
        let config = moe();
        let attention = 32 * 32 + 2 * 16 * 32 + 32 * 32;
        let per_layer = attention + 2 * 32 + 8 * 32 + 8 * 3 * 32 * 48;
        assert_eq!(config.layout().unwrap().len(), 65 * 32 + 2 * per_layer + 32);
        let idle = 2 * 6 * 3 * 32 * 48;
        assert_eq!(config.active_parameters().unwrap(), 65 * 32 + 2 * per_layer + 32 - idle);

        let more = ModelConfig { shared_expert: Some(24), qkv_bias: true, ..config.clone() };
        let added = 2 * (64 + 32 + 3 * 32 * 24);
        assert_eq!(more.layout().unwrap().len(), config.layout().unwrap().len() + added);
        assert_eq!(more.active_parameters().unwrap(), config.active_parameters().unwrap() + added);
    }

    #[test]
    fn refuses_what_cannot_be_built() {
        let check = |change: fn(&mut ModelConfig), expected: ModelConfigError| {
            let mut config = moe();
            change(&mut config);
            assert_eq!(config.layout().unwrap_err(), expected);
        };
        check(|c| c.head_dim = 7, ModelConfigError::OddHeadDim(7));
        check(|c| c.kv_heads = 3, ModelConfigError::HeadsNotGrouped { heads: 4, kv_heads: 3 });
        check(|c| c.layers = 0, ModelConfigError::Zero("layers"));
        check(|c| c.shared_expert = Some(0), ModelConfigError::Zero("shared_expert"));
        let too_large = |name, value, most| ModelConfigError::TooLarge { name, value, most };
        check(|c| c.layers = usize::MAX, too_large("layers", usize::MAX, LAYERS_MAX));
        check(|c| c.vocab_size = 1 << 62, too_large("vocab_size", 1 << 62, WIDTH_MAX));
        check(|c| c.heads = 1 << 63, too_large("heads · head_dim", usize::MAX, WIDTH_MAX));
        check(|c| c.context = 1 << 50, too_large("context · head_dim", 1 << 53, ROTARY_ELEMENTS_MAX));
        check(
            |c| {
                let router = RouterOrder::TopkThenSoftmax;
                c.feed_forward = FeedForward::Moe { experts: EXPERTS_MAX, top_k: 2, router };
                c.layers = LAYERS_MAX;
            },
            too_large("the number of tensors", LAYERS_MAX * (3 * EXPERTS_MAX + 20), TENSORS_MAX),
        );
        check(
            |c| (c.feed_forward, c.shared_expert) = (FeedForward::Dense, Some(8)),
            ModelConfigError::SharedExpertAlone,
        );
        check(|c| c.rms_norm_eps = f32::NAN, ModelConfigError::NotPositive("rms_norm_eps"));
        check(
            |c| {
                c.feed_forward =
                    FeedForward::Moe { experts: 4, top_k: 5, router: RouterOrder::SoftmaxThenTopk }
            },
            ModelConfigError::TopKTooLarge { top_k: 5, experts: 4 },
        );
    }
}

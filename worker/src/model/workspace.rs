//! The memory of one pass, allocated once for the largest batch and reused.

use sanderling_common::model_config::{FeedForward, ModelConfig};

use crate::kernels::{ATTENTION_STATISTICS, Kernels, RouterShape};

/// What the forward pass computes and the backward pass needs.
pub(super) struct Activations<K: Kernels> {
    /// Tokens that there is room for.
    pub(super) rows: usize,
    pub(super) inputs: K::Tokens,
    pub(super) targets: K::Tokens,
    pub(super) layers: Vec<LayerActivations<K>>,
    /// The residual stream after the last layer (rows, d), its norm, and the norm's statistics (rows).
    pub(super) residual: K::Storage,
    pub(super) normed: K::Storage,
    pub(super) inverse_rms: K::Storage,
    /// Logits of a block of tokens, later their gradient (logits_rows, vocab), and losses (rows).
    pub(super) logits: K::Storage,
    /// Tokens whose logits there is room for.
    pub(super) logits_rows: usize,
    pub(super) losses: K::Storage,
    /// What a sublayer adds to the residual stream (rows, d).
    pub(super) delta: K::Storage,
    /// The experts' outputs in slot order (slots, d); empty in a dense model.
    pub(super) expert_outputs: K::Storage,
}

/// What one layer keeps.
pub(super) struct LayerActivations<K: Kernels> {
    /// The residual stream before attention and before the feed-forward network (rows, d).
    pub(super) attention_input: K::Storage,
    pub(super) feed_forward_input: K::Storage,
    /// Both after their norms (rows, d), and the norms' statistics (rows).
    pub(super) attention_normed: K::Storage,
    pub(super) attention_inverse_rms: K::Storage,
    pub(super) feed_forward_normed: K::Storage,
    pub(super) feed_forward_inverse_rms: K::Storage,
    /// Queries, keys and values, rotated (rows, qkv_width).
    pub(super) qkv: K::Storage,
    /// What attention puts out (rows, heads · head_dim), with its statistics.
    pub(super) attended: K::Storage,
    pub(super) statistics: K::Storage,
    /// Gates and ups, later their gradients (rows or slots, 2·f), and what SwiGLU makes of them (…, f).
    pub(super) gate_up: K::Storage,
    pub(super) hidden: K::Storage,
    pub(super) moe: Option<MoeActivations<K>>,
}

/// What a mixture-of-experts layer keeps besides.
pub(super) struct MoeActivations<K: Kernels> {
    /// Router logits (rows, experts).
    pub(super) logits: K::Storage,
    pub(super) routing: K::Routing,
    /// The normed tokens in slot order (slots, d).
    pub(super) sorted: K::Storage,
    pub(super) shared: Option<SharedExpertActivations<K>>,
}

/// What a shared expert of width s keeps.
pub(super) struct SharedExpertActivations<K: Kernels> {
    /// The sigmoid of its gate's logit (rows).
    pub(super) gate: K::Storage,
    /// As of the layer's own experts: (rows, 2·s) and (rows, s).
    pub(super) gate_up: K::Storage,
    pub(super) hidden: K::Storage,
}

/// Memory of the backward pass, shared by all layers.
pub(super) struct Gradients<K: Kernels> {
    /// Of the residual stream (rows, d).
    pub(super) residual: K::Storage,
    /// Of a norm's output (rows, d).
    pub(super) normed: K::Storage,
    /// Of attention's output (rows, heads · head_dim) and its input (rows, qkv_width).
    pub(super) attended: K::Storage,
    pub(super) qkv: K::Storage,
    /// Of SwiGLU's output (rows or slots, f).
    pub(super) hidden: K::Storage,
    /// Of the experts' outputs, then of their inputs (slots, d), and of the router's logits (rows, experts); empty
    /// in a dense model.
    pub(super) sorted: K::Storage,
    pub(super) router_logits: K::Storage,
    /// Of the shared expert's gate (rows) and hidden rows (rows, s); empty without one.
    pub(super) shared_gate: K::Storage,
    pub(super) shared_hidden: K::Storage,
}

/// What a training step holds besides the parameters and their gradient.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepMemory {
    /// Elements that stay `f32`.
    pub floats: usize,
    /// Of those, the ones that products multiply ([`Kernels::allocate_factors`]).
    pub factors: usize,
    /// Elements in the device's type for what passes between operations ([`Kernels::allocate_activations`]).
    pub activations: usize,
    /// Token ids.
    pub tokens: usize,
    /// The routings, one per layer; none in a dense model.
    pub routings: Vec<RouterShape>,
}

impl StepMemory {
    /// What [`Activations`] and [`Gradients`] allocate for so many tokens.
    pub(super) fn new(config: &ModelConfig, rows: usize) -> Self {
        let logits_rows = head_rows(config.vocab_size, LOGITS_MAX).min(rows);
        let (d, f, heads) = (config.hidden_size, config.intermediate_size, config.heads);
        let out = heads * config.head_dim;
        let qkv = out + 2 * config.kv_heads * config.head_dim;
        let (slots, wide) = (expert_slots(config, rows), feed_forward_rows(config, rows));
        let shared = config.shared_expert.unwrap_or(0);
        let gates = usize::from(config.shared_expert.is_some());
        let (experts, routings) = match config.feed_forward {
            FeedForward::Dense => (0, Vec::new()),
            FeedForward::Moe { experts, top_k, router: order } => {
                let shape = RouterShape { rows, experts, top_k, order, capacity: None };
                (experts, vec![shape; config.layers])
            }
        };
        let layer_floats = 2 * d + 2 + heads * ATTENTION_STATISTICS + experts + gates;
        let layer_activations = rows * (2 * d + qkv + out + 3 * shared) + wide * 3 * f + slots * d;
        let step_floats = 2 * d + 2 + experts + gates;
        let step_activations =
            rows * (3 * d + out + qkv + shared) + wide * f + slots * 2 * d + logits_rows * config.vocab_size;
        Self {
            floats: rows * (config.layers * layer_floats + step_floats),
            factors: rows * d,
            activations: config.layers * layer_activations + step_activations,
            tokens: 2 * rows,
            routings,
        }
    }
}

/// Logits that exist at a time, while a loss is computed: half a gigabyte of bfloat16, and enough for the products to be
/// large.
pub(super) const LOGITS_MAX: usize = 1 << 28;

/// What a block's tokens are a multiple of where there are enough of them.
const HEAD_ROWS: usize = 128;

/// Tokens whose logits may exist at a time.
pub(super) fn head_rows(vocab_size: usize, logits_max: usize) -> usize {
    let rows = (logits_max / vocab_size).max(1);
    if rows < HEAD_ROWS { rows } else { rows / HEAD_ROWS * HEAD_ROWS }
}

/// Rows that the experts of a layer see together: none in a dense model.
fn expert_slots(config: &ModelConfig, rows: usize) -> usize {
    match config.feed_forward {
        FeedForward::Dense => 0,
        FeedForward::Moe { top_k, .. } => rows * top_k,
    }
}

/// Rows that the feed-forward network, or its experts together, sees.
fn feed_forward_rows(config: &ModelConfig, rows: usize) -> usize {
    match config.feed_forward {
        FeedForward::Dense => rows,
        FeedForward::Moe { .. } => expert_slots(config, rows),
    }
}

impl<K: Kernels> Activations<K> {
    pub(super) fn new(
        config: &ModelConfig,
        kernels: &mut K,
        rows: usize,
        logits_rows: usize,
    ) -> Result<Self, K::Error> {
        let d = config.hidden_size;
        let layers = (0..config.layers).map(|_| LayerActivations::new(config, kernels, rows));
        Ok(Self {
            rows,
            layers: layers.collect::<Result<_, _>>()?,
            inputs: kernels.allocate_tokens(rows)?,
            targets: kernels.allocate_tokens(rows)?,
            residual: kernels.allocate(rows * d)?,
            normed: kernels.allocate_activations(rows * d)?,
            inverse_rms: kernels.allocate(rows)?,
            logits: kernels.allocate_activations(logits_rows * config.vocab_size)?,
            logits_rows,
            losses: kernels.allocate(rows)?,
            delta: kernels.allocate_activations(rows * d)?,
            expert_outputs: kernels.allocate_activations(expert_slots(config, rows) * d)?,
        })
    }
}

impl<K: Kernels> LayerActivations<K> {
    fn new(config: &ModelConfig, kernels: &mut K, rows: usize) -> Result<Self, K::Error> {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let out = config.heads * config.head_dim;
        let slots = feed_forward_rows(config, rows);
        let moe = match config.feed_forward {
            FeedForward::Dense => None,
            FeedForward::Moe { experts, top_k, router: order } => {
                let shape = RouterShape { rows, experts, top_k, order, capacity: None };
                Some(MoeActivations::new(config, kernels, shape)?)
            }
        };
        Ok(Self {
            attention_input: kernels.allocate(rows * d)?,
            feed_forward_input: kernels.allocate(rows * d)?,
            attention_normed: kernels.allocate_activations(rows * d)?,
            attention_inverse_rms: kernels.allocate(rows)?,
            feed_forward_normed: kernels.allocate_activations(rows * d)?,
            feed_forward_inverse_rms: kernels.allocate(rows)?,
            qkv: kernels.allocate_activations(rows * (out + 2 * config.kv_heads * config.head_dim))?,
            attended: kernels.allocate_activations(rows * out)?,
            statistics: kernels.allocate(rows * config.heads * ATTENTION_STATISTICS)?,
            gate_up: kernels.allocate_activations(slots * 2 * f)?,
            hidden: kernels.allocate_activations(slots * f)?,
            moe,
        })
    }
}

impl<K: Kernels> MoeActivations<K> {
    fn new(config: &ModelConfig, kernels: &mut K, shape: RouterShape) -> Result<Self, K::Error> {
        let shared =
            config.shared_expert.map(|width| SharedExpertActivations::new(kernels, shape.rows, width));
        Ok(Self {
            logits: kernels.allocate(shape.rows * shape.experts)?,
            routing: kernels.allocate_routing(shape)?,
            sorted: kernels.allocate_activations(shape.rows * shape.top_k * config.hidden_size)?,
            shared: shared.transpose()?,
        })
    }
}

impl<K: Kernels> SharedExpertActivations<K> {
    fn new(kernels: &mut K, rows: usize, width: usize) -> Result<Self, K::Error> {
        Ok(Self {
            gate: kernels.allocate(rows)?,
            gate_up: kernels.allocate_activations(rows * 2 * width)?,
            hidden: kernels.allocate_activations(rows * width)?,
        })
    }
}

impl<K: Kernels> Gradients<K> {
    pub(super) fn new(config: &ModelConfig, kernels: &mut K, rows: usize) -> Result<Self, K::Error> {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let out = config.heads * config.head_dim;
        let experts = match config.feed_forward {
            FeedForward::Dense => 0,
            FeedForward::Moe { experts, .. } => experts,
        };
        Ok(Self {
            residual: kernels.allocate_factors(rows * d)?,
            normed: kernels.allocate_activations(rows * d)?,
            attended: kernels.allocate_activations(rows * out)?,
            qkv: kernels.allocate_activations(rows * (out + 2 * config.kv_heads * config.head_dim))?,
            hidden: kernels.allocate_activations(feed_forward_rows(config, rows) * f)?,
            sorted: kernels.allocate_activations(expert_slots(config, rows) * d)?,
            router_logits: kernels.allocate(rows * experts)?,
            shared_gate: kernels.allocate(config.shared_expert.map_or(0, |_| rows))?,
            shared_hidden: kernels
                .allocate_activations(config.shared_expert.map_or(0, |width| rows * width))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_logits_than_that_exist_at_a_time() {
        for vocab_size in [2, 65, 32_000, 128_256, LOGITS_MAX, 2 * LOGITS_MAX] {
            let rows = head_rows(vocab_size, LOGITS_MAX);
            assert!(rows == 1 || rows * vocab_size <= LOGITS_MAX, "{rows} of {vocab_size}");
        }
        assert_eq!(head_rows(32_000, LOGITS_MAX), 8320);
        assert_eq!(head_rows(10, 50), 5);
    }
}

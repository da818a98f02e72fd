//! How much memory a model needs, before any is asked for.

use sanderling_common::model_config::{FeedForward, ModelConfig, ModelConfigError};

use super::Precision;
use super::attention::softmax_bytes;
use super::pointwise::{TOTAL_PARTS_MAX, bias_parts, embed_parts, norm_parts, total_bytes};
use super::router::{ROUTE_TOKENS, statistics_bytes};
use super::routing::routing_bytes;
use crate::model::step_memory;

/// Memory that the kernels' code and cuBLASLt's workspace take in a process, and what is left to other programs, in bytes.
pub const RESERVE_BYTES: usize = 1 << 30;

/// What a large allocation is rounded up to, in bytes.
const ALLOCATION_BYTES: usize = 2 << 20;

/// Buffers of a layer, of the rest of a step, and of a method, at most.
const BUFFERS_PER_LAYER: usize = 20;
const BUFFERS_BESIDE: usize = 64;

/// Multiprocessors that partial sums are reckoned for: more than any GPU has.
const MULTIPROCESSORS_MAX: usize = 256;

/// Memory of a training step on a GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNeeded {
    /// The parameters, their gradient, and what products read of the parameters.
    pub model: usize,
    /// The tables of rotations.
    pub rope: usize,
    /// What a batch's passes hold, which grows with its tokens.
    pub step: usize,
    /// What operations need while they run, at most.
    pub scratch: usize,
    /// What the rounding of allocations may take; small ones share what they are rounded up to.
    pub rounding: usize,
}

impl MemoryNeeded {
    /// Of a batch of so many tokens. [`RESERVE_BYTES`] come on top.
    ///
    /// # Errors
    /// For a configuration without a layout.
    pub fn new(config: &ModelConfig, precision: Precision, rows: usize) -> Result<Self, ModelConfigError> {
        let parameters = config.layout()?.len();
        let activation = if precision == Precision::Bf16 { 2 } else { 4 };
        let twin = if precision == Precision::Bf16 { 2 } else { 0 };
        let step = step_memory(config, rows);
        let routings: usize = step.routings.iter().map(|&shape| routing_bytes(shape)).sum();
        let step = step.floats * 4 + step.factors * twin + step.activations * activation + step.tokens * 4;
        // Gradients of router logits and of gates are floats without a twin, and converted where products read them.
        let converted = rows * experts_of(config).max(usize::from(config.shared_expert.is_some())) * twin;
        let scratch = partials_bytes(config, rows) + integers_bytes(config, rows) + converted;
        let rope = config.context * config.head_dim * 4;
        let (model, step) = (parameters * (2 * 4 + twin), step + routings);
        let buffers = BUFFERS_PER_LAYER * config.layers + BUFFERS_BESIDE;
        let rounding = (buffers * ALLOCATION_BYTES).min((model + step) / 4);
        Ok(Self { model, rope, step, scratch, rounding })
    }

    /// All together.
    pub fn bytes(self) -> usize {
        self.model + self.rope + self.step + self.scratch + self.rounding
    }
}

/// A batch to try where so many bytes were missing although `needed` of this batch was there: half of it at most, since nobody
/// knows by how much the estimate is too low, and so small that it needs less by what was missing last. With the bytes that it
/// needs less; `None` where no batch does.
pub fn smaller_batch(
    batch: usize,
    missing_bytes: usize,
    needed: impl Fn(usize) -> Option<usize>,
) -> Option<(usize, usize)> {
    let whole = needed(batch)?;
    let half = std::iter::successors(Some(batch / 2), |&batch| Some(batch / 2));
    let mut less = half
        .take_while(|&batch| batch > 0)
        .map_while(|batch| Some((batch, whole.saturating_sub(needed(batch)?))));
    less.find(|&(_, less_bytes)| less_bytes >= missing_bytes.max(1))
}

/// The most that any operation's partial sums take.
fn partials_bytes(config: &ModelConfig, rows: usize) -> usize {
    let (d, heads) = (config.hidden_size, config.heads);
    let qkv = (heads + 2 * config.kv_heads) * config.head_dim;
    let experts = experts_of(config);
    [
        softmax_bytes(rows, heads),
        norm_parts(rows, MULTIPROCESSORS_MAX) * d * size_of::<f32>(),
        embed_parts(rows) * d * size_of::<f32>(),
        bias_parts(rows) * qkv * size_of::<f32>(),
        statistics_bytes(rows, experts),
        total_bytes(TOTAL_PARTS_MAX),
    ]
    .into_iter()
    .max()
    .unwrap_or(0)
}

/// The most that any operation's tables of integers take.
fn integers_bytes(config: &ModelConfig, rows: usize) -> usize {
    let routing = match config.feed_forward {
        FeedForward::Dense => 0,
        FeedForward::Moe { experts, top_k, .. } => experts * rows.div_ceil(ROUTE_TOKENS) + 2 * rows * top_k,
    };
    size_of::<u32>() * routing.max(4 * rows)
}

fn experts_of(config: &ModelConfig) -> usize {
    match config.feed_forward {
        FeedForward::Dense => 0,
        FeedForward::Moe { experts, .. } => experts,
    }
}

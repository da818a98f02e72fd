//! The decoder: Llama's architecture, dense or mixture of experts, forward and backward.
//!
//! Written once over the [`Kernels`] trait. Tensors are views into one flat parameter vector, laid out by
//! [`ModelConfig::layout`]; gradients come back as one flat vector of the same layout. All memory of a pass is
//! allocated for the largest batch seen and reused.

mod cache;
mod pass;
mod plan;
mod rope;
mod too_large;
mod workspace;

use std::error::Error;

use ndarray::{ArrayView2, ArrayView3};
use sanderling_common::capacity::Capacity;
use sanderling_common::model_config::{FeedForward, ModelConfig, ModelConfigError};

pub use self::cache::Cache;
use self::pass::Pass;
use self::plan::Plan;
pub(crate) use self::too_large::who_needs;
pub use self::too_large::{TooLarge, bytes_text};
pub use self::workspace::StepMemory;
use self::workspace::{Activations, Gradients, LOGITS_MAX, head_rows};
use crate::kernels::{AttentionShape, HeadGradient, Kernels, RouterStatistics};

/// Tokens that [`Model::extend`] passes through the layers at a time: bounds the memory that a long prompt takes.
const EXTEND_ROWS_MAX: usize = 256;

/// The loss of one training batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepLoss {
    /// Mean cross-entropy per token, in nats.
    pub cross_entropy: f64,
    /// Mean over the layers of the load-balancing loss, without its coefficient; 1 at perfect balance, 0 for a
    /// dense model.
    pub auxiliary: f64,
    /// Mean over the layers of the share of choices that experts dropped because they were full; 0 for a dense model.
    pub dropped: f64,
}

/// How training keeps experts from being overrun.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Balancing {
    /// Coefficient of the mean over the layers of the load-balancing loss.
    pub auxiliary: f32,
    /// The limit on the tokens of an expert; none: nothing is dropped.
    pub capacity: Option<Capacity>,
}

/// What an evaluation of one batch found, as sums that add up over batches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvalSums {
    /// Sum of the cross-entropy over the tokens, in nats.
    pub loss_sum: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Mean over the layers of the load-balancing loss, times the tokens; 0 for a dense model.
    pub auxiliary_sum: f64,
    /// One entry per mixture-of-experts layer.
    pub layers: Vec<RouterSums>,
}

/// What one layer's router did during an evaluation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterSums {
    /// Token slots and summed probabilities per expert.
    pub statistics: RouterStatistics,
    /// Sum over the tokens of the entropy of the softmax over all experts, in nats.
    pub entropy_sum: f64,
}

impl EvalSums {
    /// Adds another batch's sums.
    ///
    /// # Panics
    /// If the two come from models with different layers or experts.
    pub fn merge(&mut self, other: &Self) {
        self.loss_sum += other.loss_sum;
        self.tokens += other.tokens;
        self.auxiliary_sum += other.auxiliary_sum;
        if self.layers.is_empty() {
            self.layers.clone_from(&other.layers);
            return;
        }
        assert_eq!(self.layers.len(), other.layers.len(), "evaluations of different models do not add up");
        for (sums, other) in self.layers.iter_mut().zip(&other.layers) {
            sums.entropy_sum += other.entropy_sum;
            sums.statistics.merge(&other.statistics);
        }
    }

    /// Mean cross-entropy per token, in nats; NaN without tokens.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.tokens as f64
    }
}

/// Why a pass over a batch was not possible.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configuration has no layout.
    #[error(transparent)]
    Config(#[from] ModelConfigError),
    /// A token that the vocabulary does not have.
    #[error(
        "token {token} at sequence {sequence}, position {position} is outside the vocabulary of {vocab_size}"
    )]
    TokenOutOfVocabulary {
        /// The token's id.
        token: u32,
        /// Its row in the batch.
        sequence: usize,
        /// Its place in the row.
        position: usize,
        /// Tokens that there are.
        vocab_size: usize,
    },
    /// A batch without tokens.
    #[error("a batch of {batch} sequences of {time} tokens is empty")]
    EmptyBatch {
        /// Sequences.
        batch: usize,
        /// Tokens per sequence.
        time: usize,
    },
    /// A sequence longer than the model's context.
    #[error("a sequence of {time} tokens is longer than the context of {context}")]
    SequenceTooLong {
        /// Tokens per sequence.
        time: usize,
        /// The most that the model takes.
        context: usize,
    },
    /// More tokens than a cache has room for.
    #[error("{tokens} more tokens do not fit a cache that holds {len} of at most {capacity}")]
    CacheFull {
        /// Tokens in the cache.
        len: usize,
        /// Tokens to be added.
        tokens: usize,
        /// The most it holds.
        capacity: usize,
    },
    /// Inputs and targets of different shapes.
    #[error("inputs have the shape {inputs:?}, targets {targets:?}")]
    ShapeMismatch {
        /// (batch, time) of the inputs.
        inputs: (usize, usize),
        /// (batch, time) of the targets.
        targets: (usize, usize),
    },
    /// The device has not enough memory for it.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The device has no kernels for such a model.
    #[error("{0}")]
    Unsupported(Box<dyn Error + Send + Sync>),
    /// The device failed.
    #[error("the compute device failed")]
    Device(#[source] Box<dyn Error + Send + Sync>),
}

impl ModelError {
    /// The device has no kernels for such a model, as that says.
    pub fn unsupported(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Unsupported(Box::new(error))
    }

    /// The device failed like that.
    pub fn device(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Device(Box::new(error))
    }
}

/// A decoder on a device: everything but its parameters, which the caller holds.
pub struct Model<K: Kernels> {
    config: ModelConfig,
    plan: Plan,
    kernels: K,
    rope: K::Storage,
    activations: Option<Activations<K>>,
    gradients: Option<Gradients<K>>,
    /// Where logits are handed out from (rows · vocab), or losses (rows).
    host_logits: Vec<f32>,
    /// Logits that may exist at a time while a loss is computed.
    logits_max: usize,
}

impl<K: Kernels> Model<K> {
    /// Prepares a model; memory for its passes comes with the first batch.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a configuration without a layout, [`ModelError::Device`] if the device fails.
    pub fn new(config: ModelConfig, mut kernels: K) -> Result<Self, ModelError> {
        let plan = Plan::new(&config)?;
        let tables = rope::tables(&config);
        let mut rope = kernels.allocate(tables.len()).map_err(ModelError::device)?;
        kernels.upload(&tables, &mut rope);
        let (activations, gradients, host_logits) = (None, None, Vec::new());
        let logits_max = LOGITS_MAX;
        Ok(Self { config, plan, kernels, rope, activations, gradients, host_logits, logits_max })
    }

    /// The configuration given to [`new`](Self::new).
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Elements of the flat parameter and gradient vectors.
    pub fn parameters(&self) -> usize {
        self.plan.parameters
    }

    /// Has losses computed over blocks of tokens with no more than so many logits each, and one token at least.
    ///
    /// Where a batch has more tokens, sums of gradients are rounded otherwise.
    pub fn limit_logits(&mut self, logits_max: usize) {
        (self.logits_max, self.activations, self.gradients) = (logits_max, None, None);
    }

    /// Takes the memory of a training step on so many tokens now, not with the first batch.
    ///
    /// # Errors
    /// [`ModelError::Device`] if the device has not that much.
    pub fn make_room(&mut self, rows: usize) -> Result<(), ModelError> {
        self.prepare_activations(rows)?;
        self.prepare_gradients()
    }

    /// The device, for instance to read its counters.
    pub fn kernels_mut(&mut self) -> &mut K {
        &mut self.kernels
    }

    /// The loss of a batch of (batch, time) tokens, and in `grad`, which is overwritten, the gradient of
    /// mean cross-entropy + `balancing.auxiliary` · mean over layers of the load-balancing loss.
    ///
    /// Experts drop what `balancing.capacity` has no room for; this is the only pass in which they do.
    ///
    /// # Errors
    /// A [`ModelError`] for a batch that does not fit the model or a failing device; `grad` is then unspecified.
    ///
    /// # Panics
    /// If `params` or `grad` are shorter than [`parameters`](Self::parameters).
    pub fn loss_and_grad(
        &mut self,
        params: &K::Buffer,
        inputs: ArrayView2<'_, u32>,
        targets: ArrayView2<'_, u32>,
        balancing: Balancing,
        grad: &mut K::Buffer,
    ) -> Result<StepLoss, ModelError> {
        let shape = self.prepare(inputs, Some(targets))?;
        let rows = shape.rows();
        self.prepare_gradients()?;
        let capacity = match self.config.feed_forward {
            FeedForward::Dense => None,
            FeedForward::Moe { experts, top_k, .. } => {
                balancing.capacity.map(|capacity| capacity.limit(rows, experts, top_k))
            }
        };
        self.kernels.begin_step();
        let head_rows = self.head_rows();
        let (activations, gradients) = (present(&mut self.activations), present(&mut self.gradients));
        let mut pass = Pass {
            config: &self.config,
            plan: &self.plan,
            kernels: &mut self.kernels,
            rope: &self.rope,
            shape,
            capacity,
            head_rows,
        };
        let scale = 1.0 / rows as f32;
        let gradient = HeadGradient { scale, grad: &mut *grad, dx: &mut *gradients.normed };
        pass.forward_loss(params, activations, Some(gradient));
        let per_layer = balancing.auxiliary / self.config.layers as f32;
        pass.backward(params, activations, gradients, per_layer, grad);
        self.kernels.end_step();
        // Nothing is asked of the device before all of the step is queued: it waits for the host nowhere in between, and what
        // fails in the backward pass is known before anybody has the gradient.
        let loss = self.kernels.sum(&activations.losses, rows).map_err(ModelError::device)?;
        let (auxiliary, dropped) = routers(&mut self.kernels, activations).map_err(ModelError::device)?;
        Ok(StepLoss { cross_entropy: loss / rows as f64, auxiliary, dropped })
    }

    /// The logits (batch, time, vocab) of a batch; no expert drops any token.
    ///
    /// # Errors
    /// As [`loss_and_grad`](Self::loss_and_grad).
    ///
    /// # Panics
    /// If `params` is shorter than [`parameters`](Self::parameters).
    pub fn logits(
        &mut self,
        params: &K::Buffer,
        inputs: ArrayView2<'_, u32>,
    ) -> Result<ArrayView3<'_, f32>, ModelError> {
        let shape = self.prepare(inputs, None)?;
        self.make_room_for_logits(shape.rows())?;
        let (mut pass, activations) = self.pass(shape);
        pass.forward(params, activations);
        self.host_logits.resize(shape.rows() * self.config.vocab_size, 0.0);
        let activations = present(&mut self.activations);
        self.kernels.download(&activations.logits, &mut self.host_logits).map_err(ModelError::device)?;
        let dimensions = (shape.batch, shape.time, self.config.vocab_size);
        let view = ArrayView3::from_shape(dimensions, &self.host_logits);
        Ok(view.expect("the logits were resized to their shape"))
    }

    /// The logits (places, vocab) of some places of a batch, each a sequence and a position in it.
    ///
    /// # Errors
    /// As [`loss_and_grad`](Self::loss_and_grad).
    ///
    /// # Panics
    /// If a place lies outside the batch, there are more of them than tokens, or `params` is shorter than
    /// [`parameters`](Self::parameters).
    pub fn logits_at(
        &mut self,
        params: &K::Buffer,
        inputs: ArrayView2<'_, u32>,
        places: &[(usize, usize)],
    ) -> Result<ArrayView2<'_, f32>, ModelError> {
        let shape = self.prepare(inputs, None)?;
        let row = |&(sequence, position): &(usize, usize)| {
            assert!(
                sequence < shape.batch && position < shape.time,
                "({sequence}, {position}) is not in {shape:?}"
            );
            u32::try_from(sequence * shape.time + position)
                .expect("a pass has fewer rows than there are token ids")
        };
        let rows: Vec<u32> = places.iter().map(row).collect();
        assert!(rows.len() <= shape.rows(), "{} places in {} tokens", rows.len(), shape.rows());
        self.make_room_for_logits(rows.len())?;
        let (mut pass, activations) = self.pass(shape);
        pass.forward_layers(params, activations);
        pass.logits_of(params, activations, &rows);
        self.host_logits.resize(rows.len() * self.config.vocab_size, 0.0);
        let logits = &present(&mut self.activations).logits;
        self.kernels.download(logits, &mut self.host_logits).map_err(ModelError::device)?;
        let view = ArrayView2::from_shape((rows.len(), self.config.vocab_size), &self.host_logits);
        Ok(view.expect("the logits were resized to their shape"))
    }

    /// The cross-entropy (batch, time) of every token of a batch, in nats, forward only.
    ///
    /// # Errors
    /// As [`loss_and_grad`](Self::loss_and_grad).
    ///
    /// # Panics
    /// If `params` is shorter than [`parameters`](Self::parameters).
    pub fn token_losses(
        &mut self,
        params: &K::Buffer,
        inputs: ArrayView2<'_, u32>,
        targets: ArrayView2<'_, u32>,
    ) -> Result<ArrayView2<'_, f32>, ModelError> {
        let shape = self.prepare(inputs, Some(targets))?;
        let (mut pass, activations) = self.pass(shape);
        pass.forward_loss(params, activations, None);
        let activations = present(&mut self.activations);
        self.host_logits.resize(shape.rows(), 0.0);
        self.kernels.download(&activations.losses, &mut self.host_logits).map_err(ModelError::device)?;
        let view = ArrayView2::from_shape((shape.batch, shape.time), &self.host_logits);
        Ok(view.expect("the losses were resized to their shape"))
    }

    /// Loss and routing of a batch, forward only; no expert drops any token.
    ///
    /// # Errors
    /// As [`loss_and_grad`](Self::loss_and_grad).
    ///
    /// # Panics
    /// If `params` is shorter than [`parameters`](Self::parameters).
    pub fn evaluate(
        &mut self,
        params: &K::Buffer,
        inputs: ArrayView2<'_, u32>,
        targets: ArrayView2<'_, u32>,
    ) -> Result<EvalSums, ModelError> {
        let shape = self.prepare(inputs, Some(targets))?;
        let rows = shape.rows();
        self.kernels.begin_step();
        let (mut pass, activations) = self.pass(shape);
        pass.forward_loss(params, activations, None);
        let activations = present(&mut self.activations);
        let kernels = &mut self.kernels;
        kernels.end_step();
        let loss_sum = kernels.sum(&activations.losses, rows).map_err(ModelError::device)?;
        let mut layers = Vec::new();
        for moe in activations.layers.iter().filter_map(|layer| layer.moe.as_ref()) {
            let mut sums = RouterSums::default();
            kernels.router_statistics(&moe.routing, &mut sums.statistics).map_err(ModelError::device)?;
            sums.entropy_sum = kernels.router_entropy(&moe.routing).map_err(ModelError::device)?;
            layers.push(sums);
        }
        let load: f64 = layers.iter().map(|sums| sums.statistics.load_balance()).sum();
        let auxiliary_sum = if layers.is_empty() { 0.0 } else { load / layers.len() as f64 * rows as f64 };
        Ok(EvalSums { loss_sum, tokens: rows as u64, auxiliary_sum, layers })
    }

    /// An empty cache for one sequence of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`ModelError::SequenceTooLong`] if the model's context is shorter, [`ModelError::Device`] if the device fails.
    pub fn new_cache(&mut self, capacity: usize) -> Result<Cache<K>, ModelError> {
        if capacity > self.config.context {
            return Err(ModelError::SequenceTooLong { time: capacity, context: self.config.context });
        }
        Cache::new(&self.config, &mut self.kernels, capacity).map_err(ModelError::device)
    }

    /// Appends tokens to the sequence in a cache, and returns the logits (vocab) of what follows the last of them.
    ///
    /// They are those of [`logits`](Self::logits) for the whole sequence, up to rounding; each token is computed once.
    ///
    /// # Errors
    /// [`ModelError::CacheFull`] if there is not room for all of them, and as [`logits`](Self::logits); the cache then
    /// holds what it held before.
    ///
    /// # Panics
    /// If `params` is shorter than [`parameters`](Self::parameters), or the cache is that of another architecture.
    pub fn extend(
        &mut self,
        params: &K::Buffer,
        cache: &mut Cache<K>,
        tokens: &[u32],
    ) -> Result<&[f32], ModelError> {
        let before = cache.len;
        let extended = self.extend_parts(params, cache, tokens);
        if let Err(error) = extended {
            cache.len = before;
            return Err(error);
        }
        Ok(&self.host_logits)
    }

    fn extend_parts(
        &mut self,
        params: &K::Buffer,
        cache: &mut Cache<K>,
        tokens: &[u32],
    ) -> Result<(), ModelError> {
        let (len, capacity) = (cache.len, cache.capacity);
        if tokens.len() > capacity - len {
            return Err(ModelError::CacheFull { len, tokens: tokens.len(), capacity });
        }
        assert_eq!(cache.layers.len(), self.config.layers, "the cache is that of another model");
        self.check(one_row(tokens))?;
        let mut shape = None;
        for part in tokens.chunks(EXTEND_ROWS_MAX) {
            let part = shape.insert(self.prepare(one_row(part), None)?);
            let (mut pass, activations) = self.pass(*part);
            pass.extend(params, activations, cache);
        }
        let shape = shape.expect("a sequence that passed the check has tokens");
        let (mut pass, activations) = self.pass(shape);
        let last = u32::try_from(shape.rows() - 1).expect("a pass has fewer rows than there are token ids");
        pass.logits_of(params, activations, &[last]);
        self.host_logits.resize(self.config.vocab_size, 0.0);
        let logits = &present(&mut self.activations).logits;
        self.kernels.download(logits, &mut self.host_logits).map_err(ModelError::device)
    }

    /// Checks that a batch has tokens, and all of them in the vocabulary.
    fn check(&self, ids: ArrayView2<'_, u32>) -> Result<(), ModelError> {
        let ((batch, time), vocab_size) = (ids.dim(), self.config.vocab_size);
        if batch == 0 || time == 0 {
            return Err(ModelError::EmptyBatch { batch, time });
        }
        let wrong = ids.indexed_iter().find(|&(_, &token)| token as usize >= vocab_size);
        wrong.map_or(Ok(()), |((sequence, position), &token)| {
            Err(ModelError::TokenOutOfVocabulary { token, sequence, position, vocab_size })
        })
    }

    /// Checks a batch, makes room for it and uploads it.
    fn prepare(
        &mut self,
        inputs: ArrayView2<'_, u32>,
        targets: Option<ArrayView2<'_, u32>>,
    ) -> Result<AttentionShape, ModelError> {
        let (batch, time) = inputs.dim();
        self.check(inputs)?;
        if time > self.config.context {
            return Err(ModelError::SequenceTooLong { time, context: self.config.context });
        }
        if let Some(targets) = targets
            && targets.dim() != inputs.dim()
        {
            return Err(ModelError::ShapeMismatch { inputs: inputs.dim(), targets: targets.dim() });
        }
        targets.map_or(Ok(()), |targets| self.check(targets))?;
        self.prepare_activations(batch * time)?;
        let activations = present(&mut self.activations);
        self.kernels.upload_tokens(inputs, &mut activations.inputs);
        if let Some(targets) = targets {
            self.kernels.upload_tokens(targets, &mut activations.targets);
        }
        let ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        Ok(AttentionShape { batch, time, heads, kv_heads, head_dim })
    }

    fn prepare_activations(&mut self, rows: usize) -> Result<(), ModelError> {
        if self.activations.as_ref().is_none_or(|activations| activations.rows < rows) {
            // The old memory goes first, so that both are never held at once.
            self.activations = None;
            self.gradients = None;
            let logits_rows = self.head_rows().min(rows);
            let activations = Activations::new(&self.config, &mut self.kernels, rows, logits_rows);
            self.activations = Some(activations.map_err(ModelError::device)?);
        }
        Ok(())
    }

    /// Tokens whose logits may exist at a time while a loss is computed.
    fn head_rows(&self) -> usize {
        head_rows(self.config.vocab_size, self.logits_max)
    }

    /// Room for the logits of so many tokens at once, for whoever wants to see them.
    fn make_room_for_logits(&mut self, rows: usize) -> Result<(), ModelError> {
        let activations = present(&mut self.activations);
        if activations.logits_rows < rows {
            // The old memory goes first, so that both are never held at once; and all of it if there is none for the new.
            let (kernels, len) = (&mut self.kernels, rows * self.config.vocab_size);
            let made = kernels.allocate_activations(0).and_then(|nothing| {
                activations.logits = nothing;
                kernels.allocate_activations(len)
            });
            match made {
                Ok(logits) => (activations.logits, activations.logits_rows) = (logits, rows),
                Err(error) => {
                    (self.activations, self.gradients) = (None, None);
                    return Err(ModelError::device(error));
                }
            }
        }
        Ok(())
    }

    fn prepare_gradients(&mut self) -> Result<(), ModelError> {
        if self.gradients.is_none() {
            let rows = present(&mut self.activations).rows;
            let gradients = Gradients::new(&self.config, &mut self.kernels, rows);
            self.gradients = Some(gradients.map_err(ModelError::device)?);
        }
        Ok(())
    }

    /// A pass over a prepared batch that drops nothing, and its memory.
    fn pass(&mut self, shape: AttentionShape) -> (Pass<'_, K>, &mut Activations<K>) {
        let head_rows = self.head_rows();
        let Self { config, plan, kernels, rope, activations, .. } = self;
        (Pass { config, plan, kernels, rope, shape, capacity: None, head_rows }, present(activations))
    }
}

/// Means over the layers of the load-balancing loss and of the share of dropped choices, 0 for a dense model.
fn routers<K: Kernels>(kernels: &mut K, activations: &Activations<K>) -> Result<(f64, f64), K::Error> {
    let mut statistics = RouterStatistics::default();
    let (mut load, mut dropped) = (0.0, 0.0);
    for layer in &activations.layers {
        if let Some(moe) = &layer.moe {
            kernels.router_statistics(&moe.routing, &mut statistics)?;
            load += statistics.load_balance();
            dropped += statistics.dropped_share();
        }
    }
    let layers = activations.layers.len() as f64;
    Ok((load / layers, dropped / layers))
}

fn one_row(tokens: &[u32]) -> ArrayView2<'_, u32> {
    ArrayView2::from_shape((1, tokens.len()), tokens).expect("one row has any length")
}

fn present<T>(memory: &mut Option<T>) -> &mut T {
    memory.as_mut().expect("a batch is prepared before a pass")
}

/// What a training step on so many tokens holds besides the parameters and their gradient.
pub fn step_memory(config: &ModelConfig, rows: usize) -> StepMemory {
    StepMemory::new(config, rows)
}

/// Floating-point operations of products and attention for one token's forward pass, counting a multiply-add as two.
///
/// A shared expert and its gate count; biases, norms and activations do not, as they are no products.
/// `causal` counts the half of attention that is computed; otherwise all of it, the convention of most published
/// MFU figures. Training costs three times as much.
pub fn forward_flops_per_token(config: &ModelConfig, time: usize, causal: bool) -> f64 {
    let (d, f) = (config.hidden_size as f64, config.intermediate_size as f64);
    let (out, kv) = ((config.heads * config.head_dim) as f64, (config.kv_heads * config.head_dim) as f64);
    let feed_forward = match config.feed_forward {
        FeedForward::Dense => 3.0 * d * f,
        FeedForward::Moe { experts, top_k, .. } => {
            let shared = config.shared_expert.map_or(0.0, |width| d + 3.0 * d * width as f64);
            experts as f64 * d + top_k as f64 * 3.0 * d * f + shared
        }
    };
    let seen = if causal { (time as f64 + 1.0) / 2.0 } else { time as f64 };
    let per_layer = d * (out + 2.0 * kv) + out * d + feed_forward + 2.0 * out * seen;
    2.0 * (config.layers as f64 * per_layer + d * config.vocab_size as f64)
}

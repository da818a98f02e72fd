//! The operations that the model is written over, and what implements them.
//!
//! [`Kernels`] is the one seam between the model, which is written once, and the device that computes it. Its
//! operations are as coarse as a hand-written GPU kernel would be (a whole RMSNorm, a whole attention), so that an
//! implementation can fuse what it likes and keep everything, the routing of tokens to experts included, in device
//! memory. Operations may be queued; only [`Kernels::sum`], [`Kernels::download`],
//! [`Kernels::router_statistics`] and [`Kernels::router_entropy`] have to wait for results.
//!
//! Buffers are flat and row-major. Activations start at element 0 of their buffer and may be shorter than it;
//! weights are views into the one flat parameter vector, given by offset, and gradients go to the same offsets of
//! one flat gradient vector. Most hold `f32`; a device may keep what only passes between operations in a narrower
//! type ([`Kernels::allocate_activations`]): a norm's output, queries, keys and values, what attention and SwiGLU take
//! and put out, tokens in slot order, a sublayer's output, logits over the vocabulary, and the gradients of all these.
//! Parameters, their gradient, the residual stream and its gradient, statistics, gates, losses and everything of a
//! router stay `f32`.
//!
//! Shapes use: rows = batch · time tokens, d the width of the residual stream, f the width of a feed-forward
//! network, E experts of which k serve each token, slots = rows · k, less the choices that a router dropped.

pub mod cpu;
pub mod cuda;
pub mod method;
pub mod timed;

use std::error::Error;
use std::ops::{DerefMut, Range};

use ndarray::ArrayView2;
use sanderling_common::model_config::RouterOrder;

/// A row-major matrix W of shape (outputs, inputs) in the flat parameter vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    /// Where the matrix starts, in elements.
    pub offset: usize,
    /// Rows of W, the width of y = x·Wᵀ.
    pub outputs: usize,
    /// Columns of W, the width of x.
    pub inputs: usize,
}

impl Weights {
    /// The elements of the flat vector that the matrix takes.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.outputs * self.inputs
    }
}

/// One matrix per expert, all of one shape, `stride` elements apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertWeights {
    /// The matrix of expert 0.
    pub first: Weights,
    /// From one expert's matrix to the next one's, in elements.
    pub stride: usize,
}

impl ExpertWeights {
    /// The matrix of one expert.
    pub fn expert(&self, expert: usize) -> Weights {
        Weights { offset: self.first.offset + expert * self.stride, ..self.first }
    }
}

/// Whether a result replaces what the destination holds or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// destination = result
    Replace,
    /// destination += result
    Add,
}

/// The last product of a model with its loss, over blocks of tokens: no more logits exist at a time than a block's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The matrix (vocab, d).
    pub weights: Weights,
    /// Tokens.
    pub rows: usize,
    /// Tokens of a block; the last one may have fewer.
    pub block_rows: usize,
}

impl Head {
    /// The tokens of each block.
    pub fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let Self { rows, block_rows, .. } = self;
        (0..rows).step_by(block_rows).map(move |first| first..rows.min(first + block_rows))
    }
}

/// Where the gradient of [`Kernels::head_loss`] goes.
pub struct HeadGradient<'a, B: ?Sized> {
    /// What is differentiated is this times the sum of the losses.
    pub scale: f32,
    /// dW replaces the weights' place in it.
    pub grad: &'a mut B,
    /// Replaced by the gradient of x (rows, d).
    pub dx: &'a mut B,
}

/// An RMSNorm, y = w ⊙ x / √(mean(x²) + ε), over the last axis of (rows, width).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Where the weight w starts in the flat parameter vector.
    pub offset: usize,
    /// Tokens.
    pub rows: usize,
    /// Elements per token.
    pub width: usize,
    /// The ε under the root.
    pub eps: f32,
}

/// The sizes of one causal grouped-query attention.
///
/// Queries, keys and values of a token lie side by side: a row has (heads + 2·kv_heads)·head_dim elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Tokens per sequence.
    pub time: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves heads / kv_heads query heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Elements of one token's queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Elements of one token's keys and values.
    pub fn kv_width(&self) -> usize {
        2 * self.kv_heads * self.head_dim
    }

    /// Elements of one token's attention output.
    pub fn out_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Tokens in all sequences.
    pub fn rows(&self) -> usize {
        self.batch * self.time
    }
}

/// Floats of softmax statistics that attention keeps per token and head for its backward pass.
pub const ATTENTION_STATISTICS: usize = 2;

/// Which way the rotary embedding turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// Forward pass.
    Forward,
    /// The transpose, for gradients.
    Inverse,
}

/// What multiplies each row of SwiGLU's output.
///
/// Scaling the hidden rows instead of what the down projection makes of them gives the same sum, and spares keeping
/// the experts' outputs for the scales' gradient.
#[derive(Debug)]
pub enum RowScale<'a, R, B: ?Sized> {
    /// Nothing.
    One,
    /// The rows are the slots of a routing, each with its router weight: all that were given, less those dropped.
    Router(&'a R),
    /// One factor per row (rows).
    Gate(&'a B),
}

/// The [`RowScale`] of the forward pass, and where its gradient goes.
#[derive(Debug)]
pub enum RowScaleGradient<'a, R, B: ?Sized> {
    /// Nothing was scaled.
    One,
    /// The gradient of the router weights is kept in the routing.
    Router(&'a mut R),
    /// One factor per row, and its gradient, which is replaced (rows).
    Gate {
        /// The factors.
        gate: &'a B,
        /// Their gradient.
        gradient: &'a mut B,
    },
}

/// The sizes and the rule of one router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterShape {
    /// Tokens to route.
    pub rows: usize,
    /// Experts to choose from.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// How logits become weights.
    pub order: RouterOrder,
    /// The most tokens that an expert takes, at least 1; none: as many as choose it.
    pub capacity: Option<usize>,
}

/// What a router did to one batch, per expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterStatistics {
    /// Tokens that chose each expert, dropped or not; they sum to rows · k.
    pub expert_tokens: Vec<u64>,
    /// Sum over the tokens of the softmax over all experts.
    pub probability_sums: Vec<f64>,
    /// Of all those choices, the ones that were dropped because their expert was full.
    pub dropped: u64,
}

impl RouterStatistics {
    /// Adds another batch's statistics of the same router.
    ///
    /// # Panics
    /// If the number of experts differs.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(
            self.expert_tokens.len(),
            other.expert_tokens.len(),
            "statistics of routers of different size"
        );
        self.expert_tokens.iter_mut().zip(&other.expert_tokens).for_each(|(sum, &tokens)| *sum += tokens);
        let sums = self.probability_sums.iter_mut().zip(&other.probability_sums);
        sums.for_each(|(sum, probability)| *sum += probability);
        self.dropped += other.dropped;
    }

    /// The share of all choices that were dropped.
    pub fn dropped_share(&self) -> f64 {
        self.dropped as f64 / self.expert_tokens.iter().sum::<u64>().max(1) as f64
    }

    /// The load-balancing loss N·Σ f_i·p_i: 1 at perfect balance, N when one expert takes all.
    ///
    /// f_i is the share of the choices, dropped ones included, p_i the mean router probability (Shazeer et al. 2017, Fedus et al. 2021).
    pub fn load_balance(&self) -> f64 {
        let slots = self.expert_tokens.iter().sum::<u64>() as f64;
        let rows = self.probability_sums.iter().sum::<f64>();
        if slots == 0.0 {
            return 0.0;
        }
        let shares = self.expert_tokens.iter().zip(&self.probability_sums);
        let dot: f64 =
            shares.map(|(&tokens, &probability)| tokens as f64 / slots * (probability / rows)).sum();
        self.expert_tokens.len() as f64 * dot
    }
}

/// A device that can run the decoder.
///
/// # Panics
/// Every operation may panic when a buffer is shorter than the stated sizes ask for: the model owns all sizes, so
/// that is a defect of ours.
pub trait Kernels {
    /// Borrowed memory of the device: `[f32]` on the CPU.
    type Buffer: ?Sized;
    /// Owned memory of the device.
    type Storage: DerefMut<Target = Self::Buffer>;
    /// Token ids in device memory.
    type Tokens;
    /// Which token goes to which expert with what weight, in device memory.
    type Routing;
    /// What can go wrong on the device.
    type Error: Error + Send + Sync + 'static;

    /// Zeroed memory for `len` floats.
    ///
    /// # Errors
    /// If the device has not that much memory.
    fn allocate(&mut self, len: usize) -> Result<Self::Storage, Self::Error>;
    /// Zeroed memory for `len` values that pass between operations, in the device's type for them.
    ///
    /// # Errors
    /// If the device has not that much memory.
    fn allocate_activations(&mut self, len: usize) -> Result<Self::Storage, Self::Error> {
        self.allocate(len)
    }
    /// Zeroed memory for `len` floats that are factors of products, such as parameters: the device may keep a copy in
    /// the type that it multiplies.
    ///
    /// # Errors
    /// If the device has not that much memory.
    fn allocate_factors(&mut self, len: usize) -> Result<Self::Storage, Self::Error> {
        self.allocate(len)
    }
    /// Room for `rows` token ids.
    ///
    /// # Errors
    /// If the device has not that much memory.
    fn allocate_tokens(&mut self, rows: usize) -> Result<Self::Tokens, Self::Error>;
    /// Room for the routing of up to `shape.rows` tokens.
    ///
    /// # Errors
    /// If the device has not that much memory.
    fn allocate_routing(&mut self, shape: RouterShape) -> Result<Self::Routing, Self::Error>;
    /// Copies host values to a buffer, from its element `first` on.
    fn upload_at(&mut self, values: &[f32], buffer: &mut Self::Buffer, first: usize);
    /// Copies host values to the start of a buffer.
    fn upload(&mut self, values: &[f32], buffer: &mut Self::Buffer) {
        self.upload_at(values, buffer, 0);
    }
    /// Copies token ids, row by row, to the device.
    fn upload_tokens(&mut self, ids: ArrayView2<'_, u32>, tokens: &mut Self::Tokens);
    /// Copies the start of a buffer to the host, after all operations before it.
    ///
    /// # Errors
    /// The first failure of the device since the last wait.
    fn download(&mut self, buffer: &Self::Buffer, values: &mut [f32]) -> Result<(), Self::Error>;
    /// Begins a step of the model: until [`end_step`](Self::end_step) operations may be held back, to be queued together, and
    /// what they read and write must not be dropped.
    fn begin_step(&mut self) {}
    /// Ends it: what was held back is queued.
    fn end_step(&mut self) {}
    /// The sum of the first `len` values, in f64.
    ///
    /// # Errors
    /// The first failure of the device since the last wait.
    fn sum(&mut self, values: &Self::Buffer, len: usize) -> Result<f64, Self::Error>;

    /// Sets a range to zero.
    fn zero(&mut self, buffer: &mut Self::Buffer, range: Range<usize>);
    /// out = a + b over the first `len` elements.
    fn add(&mut self, len: usize, a: &Self::Buffer, b: &Self::Buffer, out: &mut Self::Buffer);

    /// y (rows, outputs) = x (rows, inputs) · Wᵀ, or added to y.
    fn product(
        &mut self,
        params: &Self::Buffer,
        weights: Weights,
        rows: usize,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
        write: Write,
    );
    /// dx (rows, inputs) = dy (rows, outputs) · W, or added to dx.
    fn product_input_gradient(
        &mut self,
        params: &Self::Buffer,
        weights: Weights,
        rows: usize,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
        write: Write,
    );
    /// dW (outputs, inputs) = dyᵀ · x at the weights' place in `grad`, replacing what is there.
    fn product_weight_gradient(
        &mut self,
        grad: &mut Self::Buffer,
        weights: Weights,
        rows: usize,
        dy: &Self::Buffer,
        x: &Self::Buffer,
    );

    /// Adds the bias that lies at `bias` in `params` to every row of y (rows, bias.len()).
    fn add_bias(&mut self, params: &Self::Buffer, bias: Range<usize>, rows: usize, y: &mut Self::Buffer);
    /// The sum of dy over its rows (rows, bias.len()), replacing the bias's place in `grad`.
    fn bias_gradient(&mut self, grad: &mut Self::Buffer, bias: Range<usize>, rows: usize, dy: &Self::Buffer);

    /// [`product`](Self::product) with each expert's matrix over that expert's slots, replacing y; x and y are in slot
    /// order.
    fn expert_product(
        &mut self,
        params: &Self::Buffer,
        weights: ExpertWeights,
        routing: &Self::Routing,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
    );
    /// [`product_input_gradient`](Self::product_input_gradient) per expert, replacing dx.
    fn expert_product_input_gradient(
        &mut self,
        params: &Self::Buffer,
        weights: ExpertWeights,
        routing: &Self::Routing,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
    );
    /// [`product_weight_gradient`](Self::product_weight_gradient) per expert; zero for an expert without tokens.
    fn expert_product_weight_gradient(
        &mut self,
        grad: &mut Self::Buffer,
        weights: ExpertWeights,
        routing: &Self::Routing,
        dy: &Self::Buffer,
        x: &Self::Buffer,
    );

    /// y = RMSNorm(x), and 1/√(mean(x²) + ε) of each row for the backward pass.
    fn rms_norm(
        &mut self,
        norm: RmsNorm,
        params: &Self::Buffer,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
        inverse_rms: &mut Self::Buffer,
    );
    /// sum = x + delta, and what [`rms_norm`](Self::rms_norm) makes of it; `inputs` are x and delta.
    fn add_rms_norm(
        &mut self,
        norm: RmsNorm,
        params: &Self::Buffer,
        inputs: (&Self::Buffer, &Self::Buffer),
        sum: &mut Self::Buffer,
        y: &mut Self::Buffer,
        inverse_rms: &mut Self::Buffer,
    ) {
        self.add(norm.rows * norm.width, inputs.0, inputs.1, sum);
        self.rms_norm(norm, params, sum, y, inverse_rms);
    }
    /// With x̂ = x·r: dx += r·(w⊙dy − x̂·mean(w⊙dy⊙x̂)), and dw = Σ dy⊙x̂ replaces the weight's place in `grad`.
    ///
    /// `saved` is x and its inverse RMS, as they were in the forward pass.
    fn rms_norm_backward(
        &mut self,
        norm: RmsNorm,
        params: &Self::Buffer,
        saved: (&Self::Buffer, &Self::Buffer),
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
        grad: &mut Self::Buffer,
    );

    /// Turns queries and keys in place by their position's angles (rotate-half).
    ///
    /// `tables` has head_dim/2 cosines and then as many sines per position: channel i of a head and channel
    /// i + head_dim/2 make a pair.
    fn rotary(
        &mut self,
        shape: AttentionShape,
        tables: &Self::Buffer,
        rotation: Rotation,
        qkv: &mut Self::Buffer,
    );
    /// out = softmax(q·kᵀ/√head_dim, causal)·v per head, with [`ATTENTION_STATISTICS`] floats per token and head
    /// for the backward pass.
    fn attention(
        &mut self,
        shape: AttentionShape,
        qkv: &Self::Buffer,
        out: &mut Self::Buffer,
        statistics: &mut Self::Buffer,
    );
    /// The gradient of queries, keys and values, replacing `dqkv`; `saved` is out and its statistics.
    fn attention_backward(
        &mut self,
        shape: AttentionShape,
        qkv: &Self::Buffer,
        saved: (&Self::Buffer, &Self::Buffer),
        dout: &Self::Buffer,
        dqkv: &mut Self::Buffer,
    );

    /// Attention of the next `shape.time` tokens of one sequence, of which `past` tokens are in the cache.
    ///
    /// Turns queries and keys in `qkv`, whose first token is at position `past`, as [`rotary`](Self::rotary) does;
    /// puts keys and values of each token, side by side, into the cache's row of its position (…, 2·kv_heads·head_dim);
    /// and attends to all tokens up to each one's own, as [`attention`](Self::attention) does. `shape.batch` is 1.
    fn cached_attention(
        &mut self,
        shape: AttentionShape,
        past: usize,
        tables: &Self::Buffer,
        qkv: &mut Self::Buffer,
        cache: &mut Self::Buffer,
        out: &mut Self::Buffer,
    );

    /// out (rows, f) = scale · SiLU(gate) ⊙ up, where a row of `gate_up` is f gates and then f ups.
    fn swiglu(
        &mut self,
        rows: usize,
        width: usize,
        scale: RowScale<'_, Self::Routing, Self::Buffer>,
        gate_up: &Self::Buffer,
        out: &mut Self::Buffer,
    );
    /// Replaces `gate_up` by its gradient, and finds that of the scale.
    fn swiglu_backward(
        &mut self,
        rows: usize,
        width: usize,
        scale: RowScaleGradient<'_, Self::Routing, Self::Buffer>,
        dout: &Self::Buffer,
        gate_up: &mut Self::Buffer,
    );
    /// x ← 1/(1 + e⁻ˣ) for the first `len` elements.
    fn sigmoid(&mut self, len: usize, values: &mut Self::Buffer);
    /// The first `len` elements of the gradient of σ(x) become that of x, given σ(x).
    fn sigmoid_backward(&mut self, len: usize, sigma: &Self::Buffer, gradient: &mut Self::Buffer);

    /// Chooses k experts for each token (ties to the lower index), weighs them, and sorts the slots by expert.
    ///
    /// An expert that more tokens choose than its capacity keeps those of the largest probability in the softmax over
    /// all experts, ties to the lower token. A dropped choice has no slot and adds nothing to its token; the weights of
    /// the token's other choices stay as they are.
    fn route(&mut self, shape: RouterShape, logits: &Self::Buffer, routing: &mut Self::Routing);
    /// The gradient of the router's logits, replacing `dlogits` (rows, experts).
    ///
    /// It comes from the router weights' gradient that [`swiglu_backward`](Self::swiglu_backward) left, and from
    /// `auxiliary` · [`RouterStatistics::load_balance`], in which the shares f are constants.
    fn router_backward(&mut self, auxiliary: f32, routing: &Self::Routing, dlogits: &mut Self::Buffer);
    /// Counts and probability sums of the last [`route`](Self::route), replacing `statistics`.
    ///
    /// # Errors
    /// The first failure of the device since the last wait.
    fn router_statistics(
        &mut self,
        routing: &Self::Routing,
        statistics: &mut RouterStatistics,
    ) -> Result<(), Self::Error>;
    /// Sum over the tokens of the entropy, in nats, of the softmax over all experts.
    ///
    /// # Errors
    /// The first failure of the device since the last wait.
    fn router_entropy(&mut self, routing: &Self::Routing) -> Result<f64, Self::Error>;
    /// sorted (slots, width): slot s gets the row of its token. Its adjoint is [`unpermute`](Self::unpermute).
    fn permute(&mut self, routing: &Self::Routing, width: usize, x: &Self::Buffer, sorted: &mut Self::Buffer);
    /// out (rows, width): each token gets the sum of its slots, zero without any. Its adjoint is [`permute`](Self::permute).
    fn unpermute(
        &mut self,
        routing: &Self::Routing,
        width: usize,
        sorted: &Self::Buffer,
        out: &mut Self::Buffer,
    );

    /// out (rows, inputs): the table's row of each token.
    fn embed(
        &mut self,
        params: &Self::Buffer,
        table: Weights,
        rows: usize,
        tokens: &Self::Tokens,
        out: &mut Self::Buffer,
    );
    /// Adds each token's row of dout to its row of the table's place in `grad`.
    fn embed_backward(
        &mut self,
        grad: &mut Self::Buffer,
        table: Weights,
        rows: usize,
        tokens: &Self::Tokens,
        dout: &Self::Buffer,
    );
    /// losses (rows) = −ln softmax(logits) at the target, and with a scale, logits become scale · (softmax − one-hot).
    fn cross_entropy(
        &mut self,
        shape: (usize, usize),
        targets: &Self::Tokens,
        gradient_scale: Option<f32>,
        logits: &mut Self::Buffer,
        losses: &mut Self::Buffer,
    );
    /// losses (rows) = −ln softmax(x·Wᵀ) at the target, and with a gradient, that of the weights and of x (rows, d).
    ///
    /// `logits` has room for a block's, and holds nothing of use afterwards.
    fn head_loss(
        &mut self,
        params: &Self::Buffer,
        head: Head,
        inputs: (&Self::Buffer, &Self::Tokens),
        logits: &mut Self::Buffer,
        losses: &mut Self::Buffer,
        gradient: Option<HeadGradient<'_, Self::Buffer>>,
    );
}

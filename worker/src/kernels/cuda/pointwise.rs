//! Launches of everything that reads its operands once: sums, biases, gates, norms, rotations, embeddings, the loss.

use std::ops::Range;

use super::attention::{floats_at, floats_at_mut};
use super::driver::{Address, Scalar};
use super::scratch::Slot;
use super::{BLOCKS_ACROSS_MAX, Buffer, Cuda, CudaError, Tokens, Unit, arguments, flat, grid, int, long};
use crate::kernels::{AttentionShape, RmsNorm, Rotation, Weights};

/// Elements of a block of the kernels that go straight through.
const STRAIGHT: usize = 4096;

/// Shared memory for a row of logits, in bytes: two blocks have room on a multiprocessor.
const LOGITS_BYTES: usize = 96 * 1024;

/// Tokens whose gradients one block of the embedding adds up, and of how many of their elements at least.
const EMBED_RUN: usize = 32;
const EMBED_COLUMNS: usize = 128;

/// Biases of a block.
const BIAS_COLUMNS: usize = 256;

/// The most elements of a token, and the most biases, that launches have blocks for.
pub(super) const EMBEDDING_WIDTH_MAX: usize = EMBED_COLUMNS * BLOCKS_ACROSS_MAX;
pub(super) const BIASES_MAX: usize = BIAS_COLUMNS * BLOCKS_ACROSS_MAX;

/// Parts of a sum over all elements, at most.
pub(super) const TOTAL_PARTS_MAX: usize = 1024;

/// The parts of such a sum, and the sum.
pub(super) fn total_bytes(parts: usize) -> usize {
    (parts + 1) * size_of::<f64>()
}

/// Blocks that sum the gradient of a norm's weights, each over some of the rows.
pub(super) fn norm_parts(rows: usize, multiprocessors: usize) -> usize {
    rows.min(4 * multiprocessors)
}

/// Blocks that sum a bias's gradient for the same columns.
pub(super) fn bias_parts(rows: usize) -> usize {
    rows.div_ceil(32).min(128)
}

/// Rows of sums that the gradient of a table of tokens takes: a run's first and last token may go on in its neighbours.
pub(super) fn embed_parts(rows: usize) -> usize {
    2 * rows.div_ceil(EMBED_RUN)
}

impl Cuda {
    pub(super) fn add_buffers(&mut self, len: usize, a: &Buffer, b: &Buffer, out: &mut Buffer) {
        let name = if b.scalar() == Scalar::Float { "add_float" } else { "add_act" };
        let (a, b, out) = (floats_at(a, 0..len), b.at(0..len), floats_at_mut(out, len));
        let launch = flat(len.div_ceil(STRAIGHT), 256);
        self.launch(Unit::Pointwise, name, launch, arguments![a, b, out, long(len)]);
    }

    pub(super) fn sum_of(&mut self, values: &Buffer, len: usize) -> Result<f64, CudaError> {
        self.total((Unit::Pointwise, "sum_parts"), (floats_at(values, 0..len), len), STRAIGHT)
    }

    /// A sum over all elements, on the host: `kernel` makes one for every `part` elements, or a few more.
    pub(super) fn total(
        &mut self,
        (unit, kernel): (Unit, &'static str),
        (from, len): (Address, usize),
        part: usize,
    ) -> Result<f64, CudaError> {
        let parts = len.div_ceil(part).clamp(1, TOTAL_PARTS_MAX);
        let partials = self.scratch(Slot::Partials, total_bytes(parts));
        let total = partials + (parts * size_of::<f64>()) as u64;
        self.launch(unit, kernel, flat(parts, 256), arguments![from, long(len), partials]);
        self.launch(Unit::Pointwise, "sum_total", flat(1, 256), arguments![partials, int(parts), total]);
        let mut bytes = [0; size_of::<f64>()];
        self.fetch(total, &mut bytes)?;
        Ok(f64::from_ne_bytes(bytes))
    }

    /// Copies bytes to the host, after everything that was queued.
    pub(super) fn fetch(&mut self, from: Address, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.settle();
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => self.driver.download(from, bytes),
        }
    }

    /// out[column] = Σ over the parts of partials (parts, width).
    fn sum_columns(&mut self, partials: Address, parts: usize, width: usize, out: Address) {
        let launch = grid([width.div_ceil(32), 1, 1], [32, 8, 1], 0);
        let arguments = arguments![partials, int(parts), int(width), out];
        self.launch(Unit::Pointwise, "sum_columns", launch, arguments);
    }

    pub(super) fn bias(&mut self, params: &Buffer, bias: Range<usize>, rows: usize, y: &mut Buffer) {
        let width = bias.len();
        let y = self.activations_at_mut(y, rows * width);
        let launch = grid([rows.div_ceil(64), width.div_ceil(BIAS_COLUMNS), 1], [32, 8, 1], 0);
        let arguments = arguments![floats_at(params, bias), y, int(rows), int(width)];
        self.launch(Unit::Pointwise, "add_bias", launch, arguments);
    }

    pub(super) fn bias_backward(&mut self, grad: &mut Buffer, bias: Range<usize>, rows: usize, dy: &Buffer) {
        let (width, parts) = (bias.len(), bias_parts(rows));
        let partials = self.scratch(Slot::Partials, parts * width * size_of::<f32>());
        let dy = self.activations_at(dy, rows * width);
        let launch = grid([width.div_ceil(BIAS_COLUMNS), parts, 1], [32, 8, 1], 0);
        let arguments = arguments![dy, partials, int(rows), int(width)];
        self.launch(Unit::Pointwise, "bias_gradient_parts", launch, arguments);
        self.sum_columns(partials, parts, width, grad.at_mut(bias));
    }

    pub(super) fn norm(
        &mut self,
        norm: RmsNorm,
        params: &Buffer,
        x: &Buffer,
        y: &mut Buffer,
        inverse_rms: &mut Buffer,
    ) {
        let RmsNorm { offset, rows, width, eps } = norm;
        let weight = floats_at(params, offset..offset + width);
        let (x, inverse_rms) = (floats_at(x, 0..rows * width), floats_at_mut(inverse_rms, rows));
        let y = self.activations_at_mut(y, rows * width);
        let launch = flat(rows, norm_threads(width, 1024));
        self.launch(Unit::Norm, "rms_norm", launch, arguments![x, weight, y, inverse_rms, int(width), eps]);
    }

    /// `x_out` = x + b, and its norm.
    pub(super) fn add_norm(
        &mut self,
        norm: RmsNorm,
        params: &Buffer,
        (x, b): (&Buffer, &Buffer),
        x_out: &mut Buffer,
        y: &mut Buffer,
        inverse_rms: &mut Buffer,
    ) {
        let RmsNorm { offset, rows, width, eps } = norm;
        let weight = floats_at(params, offset..offset + width);
        let (x, b) = (floats_at(x, 0..rows * width), self.activations_at(b, rows * width));
        let (x_out, inverse_rms) = (floats_at_mut(x_out, rows * width), floats_at_mut(inverse_rms, rows));
        let y = self.activations_at_mut(y, rows * width);
        let launch = flat(rows, norm_threads(width, 1024));
        let arguments = arguments![x, b, x_out, weight, y, inverse_rms, int(width), eps];
        self.launch(Unit::Norm, "add_rms_norm", launch, arguments);
    }

    pub(super) fn norm_backward(
        &mut self,
        norm: RmsNorm,
        params: &Buffer,
        (x, inverse_rms): (&Buffer, &Buffer),
        dy: &Buffer,
        dx: &mut Buffer,
        grad: &mut Buffer,
    ) {
        let RmsNorm { offset, rows, width, .. } = norm;
        let weight = floats_at(params, offset..offset + width);
        let (x, inverse_rms) = (floats_at(x, 0..rows * width), floats_at(inverse_rms, 0..rows));
        let dy = self.activations_at(dy, rows * width);
        let parts = norm_parts(rows, self.properties().multiprocessors as usize);
        let partials = self.scratch(Slot::Partials, parts * width * size_of::<f32>());
        let twin = dx.twin_at(0..rows * width, self.activation()).unwrap_or(0);
        let to = floats_at_mut(dx, rows * width);
        let launch = flat(parts, norm_threads(width, 512));
        let arguments = arguments![x, inverse_rms, weight, dy, to, twin, partials, int(rows), int(width)];
        self.launch(Unit::Norm, "rms_norm_backward", launch, arguments);
        self.refresh_twin(dx, rows * width);
        self.sum_columns(partials, parts, width, grad.at_mut(offset..offset + width));
    }

    pub(super) fn rotate(
        &mut self,
        shape: AttentionShape,
        tables: &Buffer,
        rotation: Rotation,
        qkv: &mut Buffer,
    ) {
        let AttentionShape { time, heads, kv_heads, head_dim, .. } = shape;
        let (rows, turned) = (shape.rows(), heads + kv_heads);
        let channels = if head_dim.is_multiple_of(16) { head_dim / 16 } else { head_dim / 2 };
        let launch = flat((rows * channels * turned.div_ceil(4)).div_ceil(256), 256);
        let sign: f32 = match rotation {
            Rotation::Forward => 1.0,
            Rotation::Inverse => -1.0,
        };
        let tables = floats_at(tables, 0..time * head_dim);
        let qkv = self.activations_at_mut(qkv, rows * shape.qkv_width());
        let (rows, time, first) = (int(rows), int(time), 0i32);
        let (turned, width, head_dim) = (int(turned), int(shape.qkv_width()), int(head_dim));
        let arguments = arguments![qkv, tables, rows, time, first, turned, width, head_dim, sign];
        self.launch(Unit::Rotary, "rotary", launch, arguments);
    }

    /// `scale` is one factor per row or none (0), `used` the address of the rows in use or none (0).
    pub(super) fn gated(
        &mut self,
        (rows, width): (usize, usize),
        (scale, used): (Address, Address),
        gate_up: &Buffer,
        out: &mut Buffer,
    ) {
        let per_row = if width.is_multiple_of(8) { width / 8 } else { width };
        let gate_up = self.activations_at(gate_up, rows * 2 * width);
        let out = self.activations_at_mut(out, rows * width);
        let launch = flat((rows * per_row).div_ceil(512), 256);
        let arguments = arguments![gate_up, scale, used, out, int(rows), int(width)];
        self.launch(Unit::Pointwise, "swiglu", launch, arguments);
    }

    /// As [`gated`](Self::gated); `gradient` is that of the scale, or none (0).
    pub(super) fn gated_backward(
        &mut self,
        (rows, width): (usize, usize),
        (scale, used, gradient): (Address, Address, Address),
        dout: &Buffer,
        gate_up: &mut Buffer,
    ) {
        let dout = self.activations_at(dout, rows * width);
        let gate_up = self.activations_at_mut(gate_up, rows * 2 * width);
        let launch = flat(rows, (32 * width.div_ceil(256)).min(256));
        let arguments = arguments![dout, scale, used, gate_up, gradient, int(rows), int(width)];
        self.launch(Unit::Pointwise, "swiglu_backward", launch, arguments);
    }

    pub(super) fn sigmoid_of(&mut self, len: usize, values: &mut Buffer) {
        let arguments = arguments![floats_at_mut(values, len), long(len)];
        self.launch(Unit::Pointwise, "sigmoid", flat(len.div_ceil(256), 256), arguments);
    }

    pub(super) fn sigmoid_gradient(&mut self, len: usize, sigma: &Buffer, gradient: &mut Buffer) {
        let arguments = arguments![floats_at(sigma, 0..len), floats_at_mut(gradient, len), long(len)];
        self.launch(Unit::Pointwise, "sigmoid_backward", flat(len.div_ceil(256), 256), arguments);
    }

    pub(super) fn look_up(
        &mut self,
        params: &Buffer,
        table: Weights,
        rows: usize,
        tokens: &Tokens,
        out: &mut Buffer,
    ) {
        let width = table.inputs;
        let (from, out) = (floats_at(params, table.range()), floats_at_mut(out, rows * width));
        let launch = flat(rows, (32 * width.div_ceil(512)).min(256));
        self.launch(Unit::Embedding, "embed", launch, arguments![from, tokens.at(0..rows), out, int(width)]);
    }

    pub(super) fn look_up_backward(
        &mut self,
        grad: &mut Buffer,
        table: Weights,
        rows: usize,
        tokens: &Tokens,
        dout: &Buffer,
    ) {
        let width = table.inputs;
        let buffers = self.scratch(Slot::Integers, 4 * rows * size_of::<u32>());
        let runs = rows.div_ceil(EMBED_RUN);
        let partials = self.scratch(Slot::Partials, embed_parts(rows) * width * size_of::<f32>());
        let largest = table.outputs.max(2) - 1;
        let bits = int((usize::BITS - largest.leading_zeros()) as usize);
        let (rows_int, width_int) = (int(rows), int(width));
        let arguments = arguments![tokens.at(0..rows), buffers, rows_int, bits];
        self.launch(Unit::Embedding, "embed_sort", flat(1, 1024), arguments);
        let dout = floats_at(dout, 0..rows * width);
        let grad = grad.at_mut(table.range());
        let columns = if width.is_multiple_of(4) { 4 * EMBED_COLUMNS } else { EMBED_COLUMNS };
        let launch = grid([runs, width.div_ceil(columns), 1], [128, 1, 1], 0);
        let arguments = arguments![dout, buffers, grad, partials, rows_int, width_int];
        self.launch(Unit::Embedding, "embed_backward_runs", launch, arguments);
        let launch = grid([runs, width.div_ceil(EMBED_COLUMNS), 1], [128, 1, 1], 0);
        let arguments = arguments![buffers, partials, grad, rows_int, width_int];
        self.launch(Unit::Embedding, "embed_backward_ends", launch, arguments);
    }

    /// The loss of some tokens; their logits start at the beginning of their buffer.
    pub(super) fn loss(
        &mut self,
        (rows, vocabulary): (Range<usize>, usize),
        targets: &Tokens,
        gradient_scale: Option<f32>,
        logits: &mut Buffer,
        losses: &mut Buffer,
    ) {
        let bytes = self.activation().bytes();
        let kept = gradient_scale.map_or(0, |_| vocabulary.min(LOGITS_BYTES / bytes) / 16 * 16);
        let logits = self.activations_at_mut(logits, rows.len() * vocabulary);
        assert!(losses.scalar() == Scalar::Float, "losses are floats, not {losses:?}");
        let (losses, targets) = (losses.at_mut(rows.clone()), targets.at(rows.clone()));
        let launch = grid([rows.len(), 1, 1], [512, 1, 1], kept * bytes);
        let gradient = i32::from(gradient_scale.is_some());
        let scale = gradient_scale.unwrap_or(0.0);
        let vocabulary = int(vocabulary);
        let arguments = arguments![logits, targets, losses, vocabulary, scale, gradient, int(kept)];
        self.launch(Unit::CrossEntropy, "cross_entropy", launch, arguments);
    }
}

/// Threads of a row's block.
fn norm_threads(width: usize, most: usize) -> usize {
    (32 * width.div_ceil(512)).min(most)
}

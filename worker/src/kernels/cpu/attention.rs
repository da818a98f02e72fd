//! Causal grouped-query attention, forward and backward, in blocks of queries.
//!
//! The scores of a block of queries are kept transposed, (keys, queries of the block), so that a vector holds one
//! key and several queries: maxima, sums and masks of the softmax are then vertical and need no shuffles. Only the
//! block's queries (and in the backward pass its output gradients) are copied, transposed; keys and values are
//! read where they lie. Keys after a block's last query are never touched. The backward pass computes the
//! probabilities anew from two floats per query, as FlashAttention does, so memory is linear in the time.

#![expect(clippy::needless_range_loop, reason = "an index addresses several arrays at once")]

use pulp::{Simd, WithSimd};

use super::simd::{exp, load, store, vectors};
use super::tile::{Destination, Left, Strided, product};
use crate::kernels::{ATTENTION_STATISTICS, AttentionShape, Write};

/// Vectors of queries in a block.
const N: usize = 2;
/// Queries in a block of the widest vectors.
const BLOCK_MAX: usize = N * 16;
/// A score that the softmax turns into exactly zero.
const MASKED: f32 = f32::MIN;

/// Memory that attention reuses between calls.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    queries: Vec<f32>,       // (head_dim, block), transposed and scaled
    output_grad: Vec<f32>,   // (head_dim, block), transposed
    probabilities: Vec<f32>, // (time, block), at first the scores
    score_grad: Vec<f32>,    // (time, block)
    key_grad: Vec<f32>,      // (time, head_dim)
    value_grad: Vec<f32>,    // (time, head_dim)
}

impl Scratch {
    /// Makes room for attention to `past` keys beside those of `shape`.
    fn grow(&mut self, shape: AttentionShape, past: usize, backward: bool) {
        let grow = |buffer: &mut Vec<f32>, len| buffer.resize(buffer.len().max(len), 0.0);
        grow(&mut self.queries, shape.head_dim * BLOCK_MAX);
        grow(&mut self.probabilities, (past + shape.time) * BLOCK_MAX);
        if backward {
            grow(&mut self.output_grad, shape.head_dim * BLOCK_MAX);
            grow(&mut self.score_grad, shape.time * BLOCK_MAX);
            grow(&mut self.key_grad, shape.time * shape.head_dim);
            grow(&mut self.value_grad, shape.time * shape.head_dim);
        }
    }
}

/// Runs an operation with the widest vectors that divide a head: rows are read in whole vectors.
pub(super) fn dispatch<Op: WithSimd>(arch: pulp::Arch, head_dim: usize, op: Op) -> Op::Output {
    #[cfg(target_arch = "x86_64")]
    match (arch, pulp::x86::V3::try_new()) {
        (pulp::Arch::V4(simd), _) if head_dim.is_multiple_of(16) => Simd::vectorize(simd, op),
        (pulp::Arch::V4(_) | pulp::Arch::V3(_), Some(simd)) if head_dim.is_multiple_of(8) => {
            Simd::vectorize(simd, op)
        }
        _ => Simd::vectorize(pulp::Scalar, op),
    }
    // Elsewhere vectors have four lanes at most.
    #[cfg(not(target_arch = "x86_64"))]
    if head_dim.is_multiple_of(4) { arch.dispatch(op) } else { Simd::vectorize(pulp::Scalar, op) }
}

/// A block of queries of one sequence; they see the keys 0..first + queries, and those of the past before them.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    /// Queries that exist: the last block may have fewer than lanes.
    queries: usize,
}

impl Block {
    fn all<S: Simd>(time: usize) -> impl Iterator<Item = Self> {
        let width = N * S::F32_LANES;
        (0..time).step_by(width).map(move |first| Self { first, queries: width.min(time - first) })
    }

    fn keys(&self) -> usize {
        self.first + self.queries
    }
}

/// One query head of one sequence, with the key head that serves it.
struct Head<'a> {
    shape: AttentionShape,
    head: usize,
    /// Keys of tokens before the first query's.
    past: usize,
    queries: Strided<'a>,
    keys: Strided<'a>,
    values: Strided<'a>,
}

impl<'a> Head<'a> {
    fn new(shape: AttentionShape, head: usize, qkv: &'a [f32]) -> Self {
        let kv_head = head * shape.kv_heads / shape.heads;
        let part = |index: usize| Strided::new(qkv, index * shape.head_dim, shape.qkv_width());
        let keys = part(shape.heads + kv_head);
        let values = part(shape.heads + shape.kv_heads + kv_head);
        Self { shape, head, past: 0, queries: part(head), keys, values }
    }

    /// With keys and values in a cache, those of the queries' own tokens included.
    fn cached(shape: AttentionShape, head: usize, past: usize, qkv: &'a [f32], cache: &'a [f32]) -> Self {
        let kv_head = head * shape.kv_heads / shape.heads;
        let part = |index: usize| Strided::new(cache, index * shape.head_dim, shape.kv_width());
        let (keys, values) = (part(kv_head), part(shape.kv_heads + kv_head));
        let queries = Strided::new(qkv, head * shape.head_dim, shape.qkv_width());
        Self { shape, head, past, queries, keys, values }
    }

    /// Keys that the block's last query sees.
    fn keys_of(&self, block: Block) -> usize {
        self.past + block.keys()
    }

    /// Where this head's part of an output row starts.
    fn column(&self) -> usize {
        self.head * self.shape.head_dim
    }

    /// Fills `scores` (keys, block) with q·k/√head_dim, and [`MASKED`] where the key comes after the query.
    #[inline(always)]
    fn scores<S: Simd>(&self, simd: S, block: Block, queries: &mut [f32], scores: &mut [f32]) {
        let width = N * S::F32_LANES;
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        transpose(self.queries, block, (self.shape.head_dim, width), scale, queries);
        let destination = Destination {
            data: scores,
            stride: width,
            rows: self.keys_of(block),
            width,
            write: Write::Replace,
        };
        let queries = Strided::new(queries, 0, width);
        product(simd, destination, Left::Rows(self.keys), queries, |_| 0..self.shape.head_dim);
        for later in 1..block.queries {
            scores[(self.past + block.first + later) * width..][..later].fill(MASKED);
        }
    }
}

/// Copies the block's rows of a matrix into the columns of `out` (head_dim, width), times `scale`.
#[inline(always)]
fn transpose(
    from: Strided<'_>,
    block: Block,
    (head_dim, width): (usize, usize),
    scale: f32,
    out: &mut [f32],
) {
    for query in 0..width {
        let column = out[query..].iter_mut().step_by(width).take(head_dim);
        if query < block.queries {
            let row = from.row(block.first + query, 0, head_dim);
            column.zip(row).for_each(|(out, &value)| *out = value * scale);
        } else {
            column.for_each(|out| *out = 0.0);
        }
    }
}

/// out = softmax(q·kᵀ/√head_dim)·v; statistics are the maximal score and the inverse of the softmax's sum.
pub(super) struct Forward<'a> {
    pub(super) shape: AttentionShape,
    pub(super) qkv: &'a [f32],            // (batch, time, qkv_width)
    pub(super) out: &'a mut [f32],        // (batch, time, heads · head_dim)
    pub(super) statistics: &'a mut [f32], // (batch, time, heads, 2)
    pub(super) scratch: &'a mut Scratch,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { shape, scratch, .. } = self;
        scratch.grow(shape, 0, false);
        let sequences = self.qkv.chunks_exact(shape.time * shape.qkv_width());
        let outputs = self.out.chunks_exact_mut(shape.time * shape.out_width());
        let statistics = self.statistics.chunks_exact_mut(shape.time * shape.heads * ATTENTION_STATISTICS);
        for ((qkv, out), statistics) in sequences.zip(outputs).zip(statistics) {
            for head in 0..shape.heads {
                let head = Head::new(shape, head, qkv);
                for block in Block::all::<S>(shape.time) {
                    let saved = forward_block(simd, &head, block, scratch, out);
                    for query in 0..block.queries {
                        let at = ((block.first + query) * shape.heads + head.head) * ATTENTION_STATISTICS;
                        statistics[at] = saved[0][query];
                        statistics[at + 1] = saved[1][query];
                    }
                }
            }
        }
    }
}

/// Attention of a sequence's next tokens to a cache that holds their keys and values already.
pub(super) struct Cached<'a> {
    pub(super) shape: AttentionShape,
    pub(super) past: usize,
    pub(super) qkv: &'a [f32],     // (time, qkv_width)
    pub(super) cache: &'a [f32],   // (past + time, kv_width)
    pub(super) out: &'a mut [f32], // (time, heads · head_dim)
    pub(super) scratch: &'a mut Scratch,
}

impl WithSimd for Cached<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { shape, past, scratch, .. } = self;
        scratch.grow(shape, past, false);
        for head in 0..shape.heads {
            let head = Head::cached(shape, head, past, self.qkv, self.cache);
            if shape.time == 1 {
                single_query(simd, &head, &mut scratch.probabilities[..=past], self.out);
                continue;
            }
            for block in Block::all::<S>(shape.time) {
                forward_block(simd, &head, block, scratch, self.out);
            }
        }
    }
}

/// The only query of a head, with vectors along the channels: a block of queries would be empty but for one lane.
#[inline(always)]
fn single_query<S: Simd>(simd: S, head: &Head<'_>, probabilities: &mut [f32], out: &mut [f32]) {
    let head_dim = head.shape.head_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let query = head.queries.row(0, 0, head_dim);
    let mut max = MASKED;
    for (key, score) in probabilities.iter_mut().enumerate() {
        let key = head.keys.row(key, 0, head_dim);
        let mut sum = simd.splat_f32s(0.0);
        for i in 0..vectors::<S>(head_dim) {
            sum = simd.mul_add_e_f32s(load(simd, query, i), load(simd, key, i), sum);
        }
        *score = scale * simd.reduce_sum_f32s(sum);
        max = max.max(*score);
    }
    let (shift, mut sum) = (simd.splat_f32s(max), simd.splat_f32s(0.0));
    for i in 0..vectors::<S>(probabilities.len()) {
        let e = exp(simd, simd.sub_f32s(load(simd, probabilities, i), shift));
        store(simd, probabilities, i, e);
        // Loaded again, so that lanes past the end are zero.
        sum = simd.add_f32s(sum, load(simd, probabilities, i));
    }
    let inverse = simd.splat_f32s(1.0 / simd.reduce_sum_f32s(sum));
    let out = &mut out[head.column()..][..head_dim];
    for i in 0..vectors::<S>(head_dim) {
        let mut sum = simd.splat_f32s(0.0);
        for (key, &probability) in probabilities.iter().enumerate() {
            let value = load(simd, head.values.row(key, 0, head_dim), i);
            sum = simd.mul_add_e_f32s(simd.splat_f32s(probability), value, sum);
        }
        store(simd, out, i, simd.mul_f32s(sum, inverse));
    }
}

/// The output of a block of queries; returns their maximal scores and the inverses of their softmax's sums.
#[inline(always)]
fn forward_block<S: Simd>(
    simd: S,
    head: &Head<'_>,
    block: Block,
    scratch: &mut Scratch,
    out: &mut [f32],
) -> [[f32; BLOCK_MAX]; 2] {
    let shape = head.shape;
    let width = N * S::F32_LANES;
    head.scores(simd, block, &mut scratch.queries, &mut scratch.probabilities);
    let saved = softmax(simd, &mut scratch.probabilities[..head.keys_of(block) * width]);
    let destination = Destination {
        data: &mut out[block.first * shape.out_width() + head.column()..],
        stride: shape.out_width(),
        rows: block.queries,
        width: shape.head_dim,
        write: Write::Replace,
    };
    let probabilities = Strided::new(&scratch.probabilities, 0, width);
    let seen = head.past + block.first;
    product(simd, destination, Left::Columns(probabilities), head.values, |rows| 0..seen + rows.end);
    saved
}

/// The softmax of every column of (keys, N vectors), in place; returns the columns' maxima and inverse sums.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32]) -> [[f32; BLOCK_MAX]; 2] {
    let rows = S::as_mut_simd_f32s(scores).0;
    let mut max = [simd.splat_f32s(MASKED); N];
    for row in rows.chunks_exact(N) {
        for n in 0..N {
            max[n] = simd.max_f32s(max[n], row[n]);
        }
    }
    let mut sum = [simd.splat_f32s(0.0); N];
    for row in rows.chunks_exact_mut(N) {
        for n in 0..N {
            row[n] = exp(simd, simd.sub_f32s(row[n], max[n]));
            sum[n] = simd.add_f32s(sum[n], row[n]);
        }
    }
    let inverse = sum.map(|sum| simd.div_f32s(simd.splat_f32s(1.0), sum));
    for row in rows.chunks_exact_mut(N) {
        for n in 0..N {
            row[n] = simd.mul_f32s(row[n], inverse[n]);
        }
    }
    let mut statistics = [[0.0; BLOCK_MAX]; 2];
    for (out, vectors) in statistics.iter_mut().zip([max, inverse]) {
        S::as_mut_simd_f32s(out).0[..N].copy_from_slice(&vectors);
    }
    statistics
}

/// The gradients of queries, keys and values.
pub(super) struct Backward<'a> {
    pub(super) shape: AttentionShape,
    pub(super) qkv: &'a [f32],        // (batch, time, qkv_width)
    pub(super) out: &'a [f32],        // (batch, time, heads · head_dim)
    pub(super) statistics: &'a [f32], // (batch, time, heads, 2)
    pub(super) dout: &'a [f32],       // (batch, time, heads · head_dim)
    pub(super) dqkv: &'a mut [f32],   // (batch, time, qkv_width)
    pub(super) scratch: &'a mut Scratch,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { shape, scratch, .. } = self;
        scratch.grow(shape, 0, true);
        let group = shape.heads / shape.kv_heads;
        for sequence in 0..shape.batch {
            let part = |width: usize| sequence * shape.time * width..(sequence + 1) * shape.time * width;
            let qkv = &self.qkv[part(shape.qkv_width())];
            let dqkv = &mut self.dqkv[part(shape.qkv_width())];
            let saved = Saved {
                out: &self.out[part(shape.out_width())],
                dout: &self.dout[part(shape.out_width())],
                statistics: &self.statistics[part(shape.heads * ATTENTION_STATISTICS)],
            };
            for kv_head in 0..shape.kv_heads {
                scratch.key_grad[..shape.time * shape.head_dim].fill(0.0);
                scratch.value_grad[..shape.time * shape.head_dim].fill(0.0);
                for head in kv_head * group..(kv_head + 1) * group {
                    let head = Head::new(shape, head, qkv);
                    for block in Block::all::<S>(shape.time) {
                        backward_block(simd, &head, block, scratch, &saved, dqkv);
                    }
                }
                let rows = dqkv.chunks_exact_mut(shape.qkv_width());
                let grads = scratch.key_grad.chunks_exact(shape.head_dim);
                for ((row, keys), values) in
                    rows.zip(grads).zip(scratch.value_grad.chunks_exact(shape.head_dim))
                {
                    let at = (shape.heads + kv_head) * shape.head_dim;
                    row[at..at + shape.head_dim].copy_from_slice(keys);
                    let at = at + shape.kv_heads * shape.head_dim;
                    row[at..at + shape.head_dim].copy_from_slice(values);
                }
            }
        }
    }
}

/// What the forward pass left of one sequence, and the gradient of its output.
struct Saved<'a> {
    out: &'a [f32],
    dout: &'a [f32],
    statistics: &'a [f32],
}

#[inline(always)]
fn backward_block<S: Simd>(
    simd: S,
    head: &Head<'_>,
    block: Block,
    scratch: &mut Scratch,
    saved: &Saved<'_>,
    dqkv: &mut [f32],
) {
    let shape = head.shape;
    let (width, head_dim) = (N * S::F32_LANES, shape.head_dim);
    head.scores(simd, block, &mut scratch.queries, &mut scratch.probabilities);

    // dP (keys, block) = v·doutᵀ
    let dout = Strided::new(saved.dout, head.column(), shape.out_width());
    transpose(dout, block, (head_dim, width), 1.0, &mut scratch.output_grad);
    let destination = Destination {
        data: &mut scratch.score_grad,
        stride: width,
        rows: block.keys(),
        width,
        write: Write::Replace,
    };
    let columns = Strided::new(&scratch.output_grad, 0, width);
    product(simd, destination, Left::Rows(head.values), columns, |_| 0..head_dim);

    let statistics = block_statistics(head, block, saved);
    let elements = block.keys() * width;
    score_gradients(
        simd,
        head_dim,
        &statistics,
        &mut scratch.probabilities[..elements],
        &mut scratch.score_grad[..elements],
    );

    // dq (queries, head_dim) = dSᵀ·k; dv (keys, head_dim) += P·dout; dk += dS·q
    let score_grad = Strided::new(&scratch.score_grad, 0, width);
    let destination = Destination {
        data: &mut dqkv[block.first * shape.qkv_width() + head.column()..],
        stride: shape.qkv_width(),
        rows: block.queries,
        width: head_dim,
        write: Write::Replace,
    };
    product(simd, destination, Left::Columns(score_grad), head.keys, |rows| 0..block.first + rows.end);

    let keys_to =
        |data| Destination { data, stride: head_dim, rows: block.keys(), width: head_dim, write: Write::Add };
    // A key is seen by the block's queries from its own position on.
    let seen_by = |keys: std::ops::Range<usize>| keys.start.saturating_sub(block.first)..block.queries;
    let probabilities = Strided::new(&scratch.probabilities, 0, width);
    product(
        simd,
        keys_to(&mut scratch.value_grad),
        Left::Rows(probabilities),
        dout.skip_rows(block.first),
        seen_by,
    );
    let queries = head.queries.skip_rows(block.first);
    product(simd, keys_to(&mut scratch.key_grad), Left::Rows(score_grad), queries, seen_by);
}

/// Per query of a block: the maximal score, the inverse of the softmax's sum, and Σ out⊙dout.
///
/// Lanes without a query get zero for the inverse, so that their probabilities vanish.
fn block_statistics(head: &Head<'_>, block: Block, saved: &Saved<'_>) -> [[f32; BLOCK_MAX]; 3] {
    let shape = head.shape;
    let mut statistics = [[0.0; BLOCK_MAX]; 3];
    for query in 0..block.queries {
        let row = block.first + query;
        let at = (row * shape.heads + head.head) * ATTENTION_STATISTICS;
        statistics[0][query] = saved.statistics[at];
        statistics[1][query] = saved.statistics[at + 1];
        let at = row * shape.out_width() + head.column();
        let pairs = saved.out[at..at + shape.head_dim].iter().zip(&saved.dout[at..at + shape.head_dim]);
        statistics[2][query] = pairs.map(|(out, dout)| out * dout).sum();
    }
    statistics
}

/// Scores become probabilities P, and dP becomes dS/√head_dim = P⊙(dP − Σ out⊙dout)/√head_dim.
#[inline(always)]
fn score_gradients<S: Simd>(
    simd: S,
    head_dim: usize,
    statistics: &[[f32; BLOCK_MAX]; 3],
    scores: &mut [f32],
    grads: &mut [f32],
) {
    let [max, inverse, dot] = std::array::from_fn(|i| -> [S::f32s; N] {
        let vectors = S::as_simd_f32s(&statistics[i]).0;
        std::array::from_fn(|n| vectors[n])
    });
    let scale = simd.splat_f32s(1.0 / (head_dim as f32).sqrt());
    let rows = S::as_mut_simd_f32s(scores).0.chunks_exact_mut(N);
    for (scores, grads) in rows.zip(S::as_mut_simd_f32s(grads).0.chunks_exact_mut(N)) {
        for n in 0..N {
            let p = simd.mul_f32s(exp(simd, simd.sub_f32s(scores[n], max[n])), inverse[n]);
            scores[n] = p;
            grads[n] = simd.mul_f32s(simd.mul_f32s(p, scale), simd.sub_f32s(grads[n], dot[n]));
        }
    }
}

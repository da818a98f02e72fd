//! Launches of attention. The sizes of tiles follow the `.cu` files.

use super::driver::Scalar;
use super::scratch::Slot;
use super::{Buffer, Cuda, Unit, arguments, flat, grid, int};
use crate::kernels::{ATTENTION_STATISTICS, AttentionShape};

/// The widest head that the kernels have room for.
const HEAD_DIM_MAX: usize = 256;

/// Tiles of `attention_bf16.cu` and its backward pass: rows of queries and keys, and shared memory in bytes.
struct Bf16Tiles {
    query_rows: usize,
    key_rows: usize,
    key_parts: usize,
    forward_bytes: usize,
    keys_bytes: usize,
    queries_bytes: usize,
}

impl Bf16Tiles {
    fn new(head_dim: usize, small_shared: bool) -> Self {
        let depth = head_dim.next_multiple_of(16);
        let wide = depth <= 128 && !(small_shared && depth > 64);
        let query_rows = if wide { 128 } else { 64 };
        let forward_keys = if depth <= 128 { 64 } else { 32 };
        let key_rows = if depth <= 64 { 128 } else { 64 };
        let pass_queries = if wide { 64 } else { 32 };
        let pass_keys = if depth <= 64 { 64 } else { 32 };
        let row_bytes = (depth + 8) * 2;
        Self {
            query_rows,
            key_rows,
            key_parts: depth.div_ceil(128),
            forward_bytes: (query_rows + 4 * forward_keys) * row_bytes,
            keys_bytes: (2 * key_rows + 4 * pass_queries) * row_bytes + 16 * pass_queries,
            queries_bytes: (2 * query_rows + 4 * pass_keys) * row_bytes,
        }
    }
}

/// Queries of a block of `attention_float.cu` in the forward pass, and queries or keys in the backward pass.
const FLOAT_FORWARD_ROWS: usize = 64;
const FLOAT_BACKWARD_ROWS: usize = 32;

fn float_bytes(head_dim: usize, forward: bool) -> usize {
    let depth = head_dim.next_multiple_of(4);
    (128 * (depth + 4) + if forward { 64 * 36 } else { 2 * 32 * 36 }) * 4
}

fn unit(shape: AttentionShape) -> Unit {
    let AttentionShape { head_dim, heads, kv_heads, .. } = shape;
    assert!(head_dim % 2 == 0 && (2..=HEAD_DIM_MAX).contains(&head_dim), "no kernel for heads of {head_dim}");
    assert!(heads.is_multiple_of(kv_heads), "{heads} heads do not share {kv_heads} evenly");
    Unit::Attention { head_dim }
}

impl Cuda {
    pub(super) fn attend(
        &mut self,
        shape: AttentionShape,
        qkv: &Buffer,
        out: &mut Buffer,
        statistics: &mut Buffer,
    ) {
        let AttentionShape { batch, time, heads, kv_heads, head_dim } = shape;
        let rows = shape.rows();
        let launch = match self.activation() {
            Scalar::Bf16 => {
                let tiles = Bf16Tiles::new(head_dim, self.small_shared());
                grid([time.div_ceil(tiles.query_rows), heads, batch], [128, 1, 1], tiles.forward_bytes)
            }
            Scalar::Float => {
                let bytes = float_bytes(head_dim, true);
                grid([time.div_ceil(FLOAT_FORWARD_ROWS), heads, batch], [256, 1, 1], bytes)
            }
        };
        let qkv = self.activations_at(qkv, rows * shape.qkv_width());
        let out = self.activations_at_mut(out, rows * shape.out_width());
        let statistics = floats_at_mut(statistics, rows * heads * ATTENTION_STATISTICS);
        let arguments = arguments![qkv, out, statistics, int(time), int(heads), int(kv_heads)];
        self.launch(unit(shape), "attention_forward", launch, arguments);
    }

    pub(super) fn attend_backward(
        &mut self,
        shape: AttentionShape,
        qkv: &Buffer,
        (out, statistics): (&Buffer, &Buffer),
        dout: &Buffer,
        dqkv: &mut Buffer,
    ) {
        let AttentionShape { batch, time, heads, kv_heads, head_dim } = shape;
        let (unit, rows) = (unit(shape), shape.rows());
        let softmax = self.scratch(Slot::Partials, rows * heads * 2 * size_of::<f32>());
        let out = self.activations_at(out, rows * shape.out_width());
        let dout = self.activations_at(dout, rows * shape.out_width());
        let statistics = statistics.at(0..rows * heads * ATTENTION_STATISTICS);
        let launch = flat((rows * heads).div_ceil(32), 256);
        let (batch_int, time_int, heads_int) = (int(batch), int(time), int(heads));
        let arguments = arguments![out, dout, statistics, softmax, batch_int, time_int, heads_int];
        self.launch(unit, "attention_delta", launch, arguments);

        let (keys, queries) = match self.activation() {
            Scalar::Bf16 => {
                let tiles = Bf16Tiles::new(head_dim, self.small_shared());
                let blocks = time.div_ceil(tiles.key_rows) * tiles.key_parts;
                let keys = grid([blocks, kv_heads, batch], [128, 1, 1], tiles.keys_bytes);
                let blocks = time.div_ceil(tiles.query_rows);
                (keys, grid([blocks, heads, batch], [128, 1, 1], tiles.queries_bytes))
            }
            Scalar::Float => {
                let (blocks, bytes) = (time.div_ceil(FLOAT_BACKWARD_ROWS), float_bytes(head_dim, false));
                let keys = grid([blocks, kv_heads, batch], [256, 1, 1], bytes);
                (keys, grid([blocks, heads, batch], [256, 1, 1], bytes))
            }
        };
        let qkv = self.activations_at(qkv, rows * shape.qkv_width());
        let dqkv = self.activations_at_mut(dqkv, rows * shape.qkv_width());
        let arguments = arguments![qkv, dout, softmax, dqkv, time_int, heads_int, int(kv_heads)];
        self.launch(unit, "attention_backward_keys", keys, arguments);
        self.launch(unit, "attention_backward_queries", queries, arguments);
    }

    pub(super) fn attend_cached(
        &mut self,
        shape: AttentionShape,
        past: usize,
        tables: &Buffer,
        qkv: &mut Buffer,
        cache: &mut Buffer,
        out: &mut Buffer,
    ) {
        assert_eq!(shape.batch, 1, "a cache holds one sequence");
        let AttentionShape { time, heads, kv_heads, head_dim, .. } = shape;
        let unit = unit(shape);
        let qkv = self.activations_at_mut(qkv, time * shape.qkv_width());
        let cache = self.activations_at_mut(cache, (past + time) * shape.kv_width());
        let out = self.activations_at_mut(out, time * shape.out_width());
        let tables = tables.at(0..(past + time) * head_dim);
        let (past, heads_int, kv_heads) = (int(past), int(heads), int(kv_heads));
        let arguments = arguments![qkv, tables, cache, past, heads_int, kv_heads];
        self.launch(unit, "cached_attention_append", flat(time, 256), arguments);
        let launch = grid([heads, time, 1], [256, 1, 1], 0);
        self.launch(unit, "cached_attention", launch, arguments![qkv, cache, out, past, heads_int, kv_heads]);
    }
}

/// The first elements of a buffer of floats, to be written.
pub(super) fn floats_at_mut(buffer: &mut Buffer, len: usize) -> u64 {
    assert!(buffer.scalar() == Scalar::Float, "{buffer:?} holds no floats");
    buffer.at_mut(0..len)
}

/// The same to be read.
pub(super) fn floats_at(buffer: &Buffer, range: std::ops::Range<usize>) -> u64 {
    assert!(buffer.scalar() == Scalar::Float, "{buffer:?} holds no floats");
    buffer.at(range)
}

impl Cuda {
    /// The first elements of a buffer of activations, to be read.
    pub(super) fn activations_at(&self, buffer: &Buffer, len: usize) -> u64 {
        assert!(buffer.scalar() == self.activation(), "{buffer:?} holds no activations");
        buffer.at(0..len)
    }

    /// The same to be written.
    pub(super) fn activations_at_mut(&self, buffer: &mut Buffer, len: usize) -> u64 {
        assert!(buffer.scalar() == self.activation(), "{buffer:?} holds no activations");
        buffer.at_mut(0..len)
    }
}

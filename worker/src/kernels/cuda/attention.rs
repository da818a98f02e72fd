//! Launches of attention. The sizes of tiles follow the `.cu` files.

use super::driver::{Launch, Scalar};
use super::scratch::Slot;
use super::{Buffer, Cuda, Unit, arguments, flat, grid, int};
use crate::kernels::{ATTENTION_STATISTICS, AttentionShape};

/// The widest head that the kernels have room for.
const HEAD_DIM_MAX: usize = 256;

/// How the three large kernels are launched, for one width of heads.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    forward: Tile,
    keys: Tile,
    queries: Tile,
    /// Blocks that share the keys of one tile.
    key_parts: usize,
}

/// Rows of queries or keys of a block, its threads, and its shared memory in bytes.
#[derive(Clone, Copy, Debug)]
struct Tile {
    rows: usize,
    threads: usize,
    bytes: usize,
}

impl Tile {
    fn launch(self, time: usize, parts: usize, heads: usize, batch: usize) -> Launch {
        grid([time.div_ceil(self.rows) * parts, heads, batch], [self.threads, 1, 1], self.bytes)
    }
}

impl Tiles {
    /// `attention_hopper_forward.cu` and `attention_hopper_backward.cu`.
    fn hopper(head_dim: usize) -> Self {
        let row_bytes = head_dim * 2;
        // Warpgroups of 64 rows, and one that fetches: wide heads leave registers for two.
        let tile = |rows, bytes| Tile { rows, threads: 2 * rows + 128, bytes };
        let (rows, stages) = if head_dim == 64 { (192, 4) } else { (128, 3) };
        Self {
            forward: tile(rows, (rows + stages * 256) * row_bytes + 1024),
            keys: tile(rows, (2 * rows + 8 * 64) * row_bytes + 3072),
            queries: tile(192, (2 * 192 + 8 * 64) * row_bytes + 1024),
            key_parts: 1,
        }
    }

    /// `attention_tiles.cu`.
    fn bf16(head_dim: usize, small_shared: bool) -> Self {
        let depth = head_dim.next_multiple_of(16);
        let wide = depth <= 128 && !(small_shared && depth > 64);
        let query_rows = if wide { 128 } else { 64 };
        let forward_keys = if depth <= 128 { 64 } else { 32 };
        let key_rows = if depth <= 64 { 128 } else { 64 };
        let pass_queries = if wide { 64 } else { 32 };
        let pass_keys = if depth <= 64 { 64 } else { 32 };
        let row_bytes = (depth + 8) * 2;
        let tile = |rows, bytes| Tile { rows, threads: 128, bytes };
        Self {
            forward: tile(query_rows, (query_rows + 4 * forward_keys) * row_bytes),
            keys: tile(key_rows, (2 * key_rows + 4 * pass_queries) * row_bytes + 16 * pass_queries),
            queries: tile(query_rows, (2 * query_rows + 4 * pass_keys) * row_bytes),
            key_parts: depth.div_ceil(128),
        }
    }

    /// `attention_float.cu`.
    fn float(head_dim: usize) -> Self {
        let row = head_dim.next_multiple_of(4) + 4;
        let tile = |rows, scores: usize| Tile { rows, threads: 256, bytes: (128 * row + scores * 36) * 4 };
        Self { forward: tile(64, 64), keys: tile(32, 2 * 32), queries: tile(32, 2 * 32), key_parts: 1 }
    }
}

/// What the backward pass keeps of every row's softmax: a shift and, for its gradient, Σ out⊙dout.
pub(super) fn softmax_bytes(rows: usize, heads: usize) -> usize {
    rows * heads * 2 * size_of::<f32>()
}

fn unit(shape: AttentionShape) -> Unit {
    let AttentionShape { head_dim, heads, kv_heads, .. } = shape;
    assert!(head_dim % 2 == 0 && (2..=HEAD_DIM_MAX).contains(&head_dim), "no kernel for heads of {head_dim}");
    assert!(heads.is_multiple_of(kv_heads), "{heads} heads do not share {kv_heads} evenly");
    Unit::Attention { head_dim }
}

impl Cuda {
    /// The widest head that the kernels have room for on this device.
    pub(super) fn head_dim_max(&self) -> usize {
        let fits = |&head_dim: &usize| {
            let Tiles { forward, keys, queries, .. } = self.tiles(head_dim);
            [forward, keys, queries].iter().all(|tile| tile.bytes <= self.properties().shared_bytes as usize)
        };
        (2..=HEAD_DIM_MAX).rev().step_by(2).find(fits).unwrap_or(0)
    }

    fn tiles(&self, head_dim: usize) -> Tiles {
        match self.activation() {
            Scalar::Float => Tiles::float(head_dim),
            Scalar::Bf16 if self.target().attention_for_hopper(head_dim) => Tiles::hopper(head_dim),
            Scalar::Bf16 => Tiles::bf16(head_dim, self.target().small_shared),
        }
    }

    pub(super) fn attend(
        &mut self,
        shape: AttentionShape,
        qkv: &Buffer,
        out: &mut Buffer,
        statistics: &mut Buffer,
    ) {
        let AttentionShape { batch, time, heads, kv_heads, head_dim } = shape;
        let (unit, rows) = (unit(shape), shape.rows());
        let launch = self.tiles(head_dim).forward.launch(time, 1, heads, batch);
        let qkv = self.activations_at(qkv, rows * shape.qkv_width());
        let out = self.activations_at_mut(out, rows * shape.out_width());
        let statistics = floats_at_mut(statistics, rows * heads * ATTENTION_STATISTICS);
        let arguments = arguments![qkv, out, statistics, int(time), int(heads), int(kv_heads)];
        self.launch(unit, "attention_forward", launch, arguments);
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
        let softmax = self.scratch(Slot::Partials, softmax_bytes(rows, heads));
        let out = self.activations_at(out, rows * shape.out_width());
        let dout = self.activations_at(dout, rows * shape.out_width());
        let statistics = statistics.at(0..rows * heads * ATTENTION_STATISTICS);
        let launch = flat((rows * heads).div_ceil(32), 256);
        let (batch_int, time_int, heads_int) = (int(batch), int(time), int(heads));
        let arguments = arguments![out, dout, statistics, softmax, batch_int, time_int, heads_int];
        self.launch(unit, "attention_delta", launch, arguments);

        let tiles = self.tiles(head_dim);
        let keys = tiles.keys.launch(time, tiles.key_parts, kv_heads, batch);
        let queries = tiles.queries.launch(time, 1, heads, batch);
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
        // A text may have more tokens than the 65 535 blocks of the second direction; heads have been looked at.
        let launch = grid([time, heads, 1], [256, 1, 1], 0);
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

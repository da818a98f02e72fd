// Tiles of attention with bf16 activations, and their products by mma.sync: every device since Ampere.
//
// A tile is rows of one head in shared memory, DEPTH elements each and STRIDE apart; rows past the end are zeros.

#if ACT_BF16 && !ATTENTION_HOPPER

// Threads of the blocks of the three kernels.
constexpr int FORWARD_THREADS = 128, KEYS_THREADS = 128, QUERIES_THREADS = 128;
constexpr int DEPTH = (HEAD_DIM + 15) / 16 * 16;
// Elements from row to row in shared memory: eight rows' 16 bytes lie in different banks.
constexpr int STRIDE = DEPTH + 8;
constexpr bool WIDE = DEPTH <= 128 && !(SMALL_SHARED && DEPTH > 64);
// Blocks that a multiprocessor should hold: bounds the registers.
constexpr int RESIDENT = DEPTH <= 128 ? 2 : 1;

// A warp owns as many times 16 queries, or keys in the pass for dk and dv.
constexpr int QUERY_TILES = WIDE ? 2 : 1, KEY_TILES = DEPTH <= 64 ? 2 : 1;
// Rows of the other side that are loaded, and that are computed with, at a time: keys forward, queries in the pass for
// dk and dv, keys in the pass for dq.
constexpr int FORWARD_KEYS = DEPTH <= 128 ? 64 : 32;
constexpr int PASS_QUERIES = WIDE ? 64 : 32, PASS_QUERIES_CHUNK = DEPTH <= 64 ? 32 : PASS_QUERIES;
constexpr int PASS_KEYS = DEPTH <= 64 ? 64 : 32, PASS_KEYS_CHUNK = 32;
// Accumulators of dk and dv fit the registers for 128 columns: wider heads are divided among blocks.
constexpr int PARTS = (DEPTH + 127) / 128;

// The part of a tile that the warp computes with.
template <int TILES>
__device__ __forceinline__ act* own_part(act* tile) {
    return tile + threadIdx.x / WARP * TILES * 16 * STRIDE;
}

// ROWS rows from `first` on into shared memory.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(act* tile, const Rows<const act>& from, int first) {
    const act* const start = from.row(first);
    const int stride = from.stride, rows = from.count - first;
    if constexpr (HEAD_DIM % 8 == 0) {
        constexpr int CHUNKS = DEPTH / 8, ALL = ROWS * CHUNKS, STEPS = (ALL + THREADS - 1) / THREADS;
        if constexpr (THREADS % CHUNKS == 0 && ALL % THREADS == 0) {
            constexpr int APART = THREADS / CHUNKS;
            const int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * 8;
            act* const to = tile + row * STRIDE + column;
            const act* const at = start + row * stride + column;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const bool valid = row + step * APART < rows && column < HEAD_DIM;
                cp_async_16(to + step * APART * STRIDE, at + step * APART * stride, valid);
            }
        } else {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int i = threadIdx.x + step * THREADS, row = i / CHUNKS, column = i % CHUNKS * 8;
                if (ALL % THREADS != 0 && i >= ALL) break;
                const bool valid = row < rows && column < HEAD_DIM;
                cp_async_16(tile + row * STRIDE + column, start + row * stride + column, valid);
            }
        }
    } else {
        for (int i = threadIdx.x; i < ROWS * DEPTH; i += THREADS) {
            const int row = i / DEPTH, column = i % DEPTH;
            const bool valid = row < rows && column < HEAD_DIM;
            tile[row * STRIDE + column] = valid ? start[row * stride + column] : to_act(0.0f);
        }
    }
}

// Waits for this thread's copies; after a __syncthreads all can compute with the tiles.
__device__ __forceinline__ void tiles_wait() { cp_async_wait<0>(); }

// The warp writes COLUMNS columns of its own ROWS rows of a tile, which become the rows from `first` on.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void store_tile(const act* tile, const Rows<act>& to, int first, int from_column) {
    const int lane = threadIdx.x % WARP;
    __syncwarp();
    if constexpr (HEAD_DIM % 8 == 0) {
        for (int i = lane; i < ROWS * (COLUMNS / 8); i += WARP) {
            const int row = i / (COLUMNS / 8), column = from_column + i % (COLUMNS / 8) * 8;
            if (first + row < to.count && column < HEAD_DIM) {
                *(uint4*)(to.row(first + row) + column) = *(const uint4*)(tile + row * STRIDE + column);
            }
        }
    } else {
        for (int i = lane; i < ROWS * COLUMNS; i += WARP) {
            const int row = i / COLUMNS, column = from_column + i % COLUMNS;
            if (first + row < to.count && column < HEAD_DIM) {
                to.row(first + row)[column] = tile[row * STRIDE + column];
            }
        }
    }
}

// Puts accumulators, times a factor per row, into the warp's rows of a tile from `column` on.
template <int M, int N>
__device__ __forceinline__ void stage(act* tile, int column, const float (&c)[M][N][4], const float (&factor)[M][2]) {
    const int group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned* row = (unsigned*)(tile + (m * 16 + half * 8 + group) * STRIDE + column) + pair;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                row[n * 4] = pack_bf16(c[m][n][half * 2] * factor[m][half], c[m][n][half * 2 + 1] * factor[m][half]);
            }
        }
    }
}

// The 16 rows of a tile that start at `tile` as operand a.
__device__ __forceinline__ void load_a(unsigned (&a)[4], const act* tile) {
    const int lane = threadIdx.x % WARP;
    ldmatrix_x4(a, tile + lane % 16 * STRIDE + lane / 16 * 8);
}
// Two operands b side by side, their columns being 16 rows of a tile.
__device__ __forceinline__ void load_b(unsigned (&b)[4], const act* tile) {
    const int lane = threadIdx.x % WARP;
    ldmatrix_x4(b, tile + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8);
}
// Two operands b side by side, their rows being 16 rows of a tile.
__device__ __forceinline__ void load_b_trans(unsigned (&b)[4], const act* tile) {
    const int lane = threadIdx.x % WARP;
    ldmatrix_x4_trans(b, tile + lane % 16 * STRIDE + lane / 16 * 8);
}

// c = a·bᵀ for 16·M rows of tile a and 8·N rows of tile b, over the head's elements.
template <int M, int N>
__device__ __forceinline__ void scores(float (&c)[M][N][4], const act* a_tile, const act* b_tile) {
#pragma unroll
    for (int i = 0; i < M * N * 4; ++i) (&c[0][0][0])[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) load_a(a[m], a_tile + m * 16 * STRIDE + k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            load_b(b, b_tile + n * 8 * STRIDE + k);
#pragma unroll
            for (int m = 0; m < M; ++m) mma_bf16(c[m][n], a[m], b), mma_bf16(c[m][n + 1], a[m], b + 2);
        }
    }
}

// c += p·b, where p is accumulators of 8·K columns, rounded to bf16, and b 8·K rows of a tile, 8·N columns of it.
template <int M, int K, int N>
__device__ __forceinline__ void accumulate(float (&c)[M][N][4], const float (&p)[M][K][4], const act* b_tile) {
#pragma unroll
    for (int k = 0; k < K; k += 2) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            a[m][0] = pack_bf16(p[m][k][0], p[m][k][1]);
            a[m][1] = pack_bf16(p[m][k][2], p[m][k][3]);
            a[m][2] = pack_bf16(p[m][k + 1][0], p[m][k + 1][1]);
            a[m][3] = pack_bf16(p[m][k + 1][2], p[m][k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            load_b_trans(b, b_tile + k * 8 * STRIDE + n * 8);
#pragma unroll
            for (int m = 0; m < M; ++m) mma_bf16(c[m][n], a[m], b), mma_bf16(c[m][n + 1], a[m], b + 2);
        }
    }
}

#endif

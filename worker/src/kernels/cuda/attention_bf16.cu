// Attention with bf16 activations, by tensor cores: tiles, and the forward pass.
//
// A block has four warps; each owns 16·TILES rows of the block's resident matrices (queries, or keys in the pass for dk
// and dv) and goes through the other matrices' rows, which come in by cp.async into one of two buffers while the other
// is computed with. Rows past the end are zeros.

#if ACT_BF16

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int DEPTH = (HEAD_DIM + 15) / 16 * 16;
// Elements from row to row in shared memory: eight rows' 16 bytes lie in different banks.
constexpr int STRIDE = DEPTH + 8;
constexpr bool WIDE = DEPTH <= 128 && !(SMALL_SHARED && DEPTH > 64);
// Blocks that a multiprocessor should hold: bounds the registers.
constexpr int RESIDENT = DEPTH <= 128 ? 2 : 1;

// 16-row tiles of queries per warp.
constexpr int QUERY_TILES = WIDE ? 2 : 1;
constexpr int QUERY_ROWS = QUERY_TILES * 16 * WARPS;

// ROWS rows from `first` on into shared memory.
template <int ROWS>
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

// Keys that are computed with at a time in the forward pass.
constexpr int FORWARD_KEYS = DEPTH <= 128 ? 64 : 32;

// out = softmax(q·kᵀ/√HEAD_DIM, causal)·v, and the maximal score and the inverse sum of each row.
//
// launch: grid (ceil(time / QUERY_ROWS), heads, batch), block 128, shared (QUERY_ROWS + 4·FORWARD_KEYS)·(D + 8)·2 bytes,
// where D = HEAD_DIM rounded up to 16, QUERY_ROWS = 128 if D ≤ 128 and not (SMALL_SHARED and D > 64), else 64, and
// FORWARD_KEYS = 64 if D ≤ 128, else 32.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attention_forward(
    const act* qkv, act* out, float* statistics, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(act, shared);
    constexpr int KEYS = FORWARD_KEYS, TILES = QUERY_TILES, BUFFER = 2 * KEYS * STRIDE;
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    // The blocks that have most to do come first.
    const int first = (gridDim.x - 1 - blockIdx.x) * QUERY_ROWS;
    const int head = blockIdx.y, sequence = blockIdx.z;
    const Head<const act> at(qkv, sequence, time, head, head / (heads / kv_heads), heads, kv_heads);
    const int end = first + QUERY_ROWS < time ? first + QUERY_ROWS : time;
    act* const queries = shared;
    act* const buffers = shared + QUERY_ROWS * STRIDE;
    act* const own = queries + warp * TILES * 16 * STRIDE;
    const int own_first = first + warp * TILES * 16;

    load_tile<QUERY_ROWS>(queries, at.queries, first);
    load_tile<KEYS>(buffers, at.keys, 0);
    load_tile<KEYS>(buffers + KEYS * STRIDE, at.values, 0);
    cp_async_commit();

    float sum[TILES][DEPTH / 8][4] = {}, max[TILES][2], total[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) max[i / 2][i % 2] = -infinity(), total[i / 2][i % 2] = 0.0f;
    const float scale = score_scale2();

    for (int key = 0; key < end; key += KEYS) {
        const int buffer = key / KEYS % 2;
        const act* const keys = buffers + buffer * BUFFER;
        const act* const values = keys + KEYS * STRIDE;
        cp_async_wait<0>();
        __syncthreads();
        if (key + KEYS < end) {
            act* const next = buffers + (1 - buffer) * BUFFER;
            load_tile<KEYS>(next, at.keys, key + KEYS);
            load_tile<KEYS>(next + KEYS * STRIDE, at.values, key + KEYS);
            cp_async_commit();
        }
        // Keys that come after all of the warp's queries. No warp skips the first block, so maxima become finite.
        if (key > own_first + TILES * 16 - 1) continue;

        float p[TILES][KEYS / 8][4];
        scores(p, own, keys);
        if (key + KEYS - 1 > own_first) {
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        const int query = own_first + m * 16 + c / 2 * 8 + group;
                        if (key + n * 8 + pair * 2 + c % 2 > query) p[m][n][c] = -infinity();
                    }
                }
            }
        }
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float highest = max[m][half];
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
                    highest = fmaxf(highest, fmaxf(p[m][n][half * 2], p[m][n][half * 2 + 1]));
                }
                highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, 1));
                highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, 2));
                const float rescale = fast_exp2((max[m][half] - highest) * scale);
                const float shift = highest * scale;
                max[m][half] = highest;
                float part = total[m][half] * rescale;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int c = half * 2; c < half * 2 + 2; ++c) {
                        p[m][n][c] = fast_exp2(p[m][n][c] * scale - shift);
                        part += p[m][n][c];
                    }
                }
                total[m][half] = part;
#pragma unroll
                for (int n = 0; n < DEPTH / 8; ++n) {
                    sum[m][n][half * 2] *= rescale, sum[m][n][half * 2 + 1] *= rescale;
                }
            }
        }
        accumulate(sum, p, values);
    }

#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float all = total[m][half];
            all += __shfl_xor_sync(FULL_WARP, all, 1);
            all += __shfl_xor_sync(FULL_WARP, all, 2);
            total[m][half] = 1.0f / all;
            const int query = own_first + m * 16 + half * 8 + group;
            if (pair == 0 && query < time) {
                float* to = statistics + (((long long)sequence * time + query) * heads + head) * 2;
                to[0] = max[m][half] * score_scale(), to[1] = total[m][half];
            }
        }
    }
    stage(own, 0, sum, total);
    store_tile<TILES * 16, DEPTH>(own, output_rows(out, sequence, time, head, heads), own_first, 0);
}

#endif

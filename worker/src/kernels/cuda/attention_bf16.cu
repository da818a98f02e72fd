// Attention with bf16 activations, by tensor cores: the forward pass.
//
// Each warp of a block owns some rows of the block's resident matrices (queries, or keys in the pass for dk and dv) and
// goes through the other matrices' rows, which come in by cp.async into one of two buffers while the other is computed
// with. The tiles and their products are those of attention_tiles.cu.

#if ACT_BF16 && !ATTENTION_HOPPER

constexpr int QUERY_ROWS = QUERY_TILES * FORWARD_THREADS / 2;

// Scores of the warp's queries from own_first on and the keys from `key` on become probabilities but for the sums, which
// are found on the way; what was summed with the maxima before is to be multiplied by `rescale`.
template <int TILES, int N>
__device__ __forceinline__ void softmax(
    float (&p)[TILES][N][4], float (&max)[TILES][2], float (&total)[TILES][2], float (&rescale)[TILES][2], int own_first,
    int key) {
    const int group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    const float scale = score_scale2();
    if (key + N * 8 - 1 > own_first) {
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
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
            for (int n = 0; n < N; ++n) {
                highest = fmaxf(highest, fmaxf(p[m][n][half * 2], p[m][n][half * 2 + 1]));
            }
            highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, 2));
            const float factor = fast_exp2((max[m][half] - highest) * scale), shift = highest * scale;
            max[m][half] = highest;
            rescale[m][half] = factor;
            float part = total[m][half] * factor;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int c = half * 2; c < half * 2 + 2; ++c) {
                    p[m][n][c] = fast_exp2(p[m][n][c] * scale - shift);
                    part += p[m][n][c];
                }
            }
            total[m][half] = part;
        }
    }
}

// Multiplies each row by its factor.
template <int TILES, int N>
__device__ __forceinline__ void multiply(float (&sum)[TILES][N][4], const float (&factor)[TILES][2]) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[m][n][c] *= factor[m][c / 2];
        }
    }
}

// out = softmax(q·kᵀ/√HEAD_DIM, causal)·v, and the maximal score and the inverse sum of each row.
//
// launch: grid (ceil(time / QUERY_ROWS), heads, batch). With D = HEAD_DIM rounded up to 16: block 128, shared
// (QUERY_ROWS + 4·FORWARD_KEYS)·(D + 8)·2 bytes, QUERY_ROWS = 128 if D ≤ 128 and not (SMALL_SHARED and D > 64), else 64,
// FORWARD_KEYS = 64 if D ≤ 128, else 32.
extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, RESIDENT) attention_forward(
    const act* qkv, act* out, float* statistics, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(act, shared);
    constexpr int KEYS = FORWARD_KEYS, TILES = QUERY_TILES;
    constexpr int THREADS = FORWARD_THREADS, BUFFER = 2 * KEYS * STRIDE;
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    // The blocks that have most to do come first.
    const int first = (gridDim.x - 1 - blockIdx.x) * QUERY_ROWS;
    const int head = blockIdx.y, sequence = blockIdx.z;
    const Head<const act> at(qkv, sequence, time, head, head / (heads / kv_heads), heads, kv_heads);
    const int end = first + QUERY_ROWS < time ? first + QUERY_ROWS : time;
    act* const queries = shared;
    act* const buffers = queries + QUERY_ROWS * STRIDE;
    act* const own = own_part<TILES>(queries);
    const int own_first = first + warp * TILES * 16;

    load_tile<QUERY_ROWS, THREADS>(queries, at.queries, first);
    load_tile<KEYS, THREADS>(buffers, at.keys, 0);
    load_tile<KEYS, THREADS>(buffers + KEYS * STRIDE, at.values, 0);
    cp_async_commit();

    float sum[TILES][DEPTH / 8][4] = {}, max[TILES][2], total[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) max[i / 2][i % 2] = -infinity(), total[i / 2][i % 2] = 0.0f;

    for (int key = 0; key < end; key += KEYS) {
        const int buffer = key / KEYS % 2;
        const act* const keys = buffers + buffer * BUFFER;
        const act* const values = keys + KEYS * STRIDE;
        tiles_wait();
        __syncthreads();
        if (key + KEYS < end) {
            act* const next = buffers + (1 - buffer) * BUFFER;
            load_tile<KEYS, THREADS>(next, at.keys, key + KEYS);
            load_tile<KEYS, THREADS>(next + KEYS * STRIDE, at.values, key + KEYS);
            cp_async_commit();
        }
        // Keys that come after all of the queries. Nothing skips the first block, so that all maxima become finite.
        if (key > own_first + TILES * 16 - 1) continue;

        float p[TILES][KEYS / 8][4];
        scores(p, own, keys);
        float rescale[TILES][2];
        softmax(p, max, total, rescale, own_first, key);
        multiply(sum, rescale);
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

// Attention with bf16 activations, by tensor cores: the forward pass.
//
// Each warp of a block owns some rows of the block's resident matrices (queries, or keys in the pass for dk and dv) and
// goes through the other matrices' rows, which come in by cp.async into one of two buffers while the other is computed
// with. The tiles and their products are those of attention_tiles.cu or attention_hopper.cu.

#if ACT_BF16

constexpr int QUERY_ROWS = QUERY_TILES * FORWARD_THREADS / 2;

// out = softmax(q·kᵀ/√HEAD_DIM, causal)·v, and the maximal score and the inverse sum of each row.
//
// launch: grid (ceil(time / QUERY_ROWS), heads, batch), block 128, shared (QUERY_ROWS + 4·FORWARD_KEYS)·(D + 8)·2 bytes,
// where D = HEAD_DIM rounded up to 16, QUERY_ROWS = 128 if D ≤ 128 and not (SMALL_SHARED and D > 64), else 64, and
// FORWARD_KEYS = 64 if D ≤ 128, else 32.
extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, RESIDENT) attention_forward(
    const act* qkv, act* out, float* statistics, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(act, shared);
    constexpr int KEYS = FORWARD_KEYS, TILES = QUERY_TILES, TOGETHER = rows_together<TILES>();
    constexpr int THREADS = FORWARD_THREADS, BUFFER = 2 * KEYS * STRIDE;
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    // The blocks that have most to do come first.
    const int first = (gridDim.x - 1 - blockIdx.x) * QUERY_ROWS;
    const int head = blockIdx.y, sequence = blockIdx.z;
    const Head<const act> at(qkv, sequence, time, head, head / (heads / kv_heads), heads, kv_heads);
    const int end = first + QUERY_ROWS < time ? first + QUERY_ROWS : time;
    act* const queries = aligned_tiles(shared);
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
    const float scale = score_scale2();

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
        if (key > own_first / TOGETHER * TOGETHER + TOGETHER - 1) continue;

        float p[TILES][KEYS / 8][4];
        scores(p, own, keys);
        products_wait<0>();
        settle(p);
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
        products_wait<0>();
        settle(sum);
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

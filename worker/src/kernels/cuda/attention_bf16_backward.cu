// Attention with bf16 activations: the backward pass, in two kernels, over the same tiles as the forward pass.

#if ACT_BF16 && !ATTENTION_HOPPER

// Keys of a block in the pass for dk and dv, queries of one in the pass for dq.
constexpr int KEY_ROWS = KEY_TILES * KEYS_THREADS / 2;
constexpr int PASS_QUERY_ROWS = QUERY_TILES * QUERIES_THREADS / 2;
constexpr int PART_COLUMNS = (DEPTH / PARTS + 15) / 16 * 16;

// dk and dv of a block of keys, summed over the query heads that the keys serve.
//
// launch: grid (ceil(time / KEY_ROWS)·ceil(D / 128), kv_heads, batch). With D = HEAD_DIM rounded up to 16: block 128,
// shared (2·KEY_ROWS + 4·PASS_QUERIES)·(D + 8)·2 + 16·PASS_QUERIES bytes, KEY_ROWS = 128 if D ≤ 64, else 64, PASS_QUERIES =
// 64 where attention_forward's QUERY_ROWS is 128, else 32.
extern "C" __global__ void __launch_bounds__(KEYS_THREADS, RESIDENT) attention_backward_keys(
    const act* qkv, const act* dout, const float* softmax, act* dqkv, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(act, shared);
    constexpr int QUERIES = PASS_QUERIES, CHUNK = PASS_QUERIES_CHUNK, TILES = KEY_TILES;
    constexpr int THREADS = KEYS_THREADS, BUFFER = 2 * QUERIES * STRIDE;
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    const int first = blockIdx.x / PARTS * KEY_ROWS, kv_head = blockIdx.y, sequence = blockIdx.z;
    // The last part's columns may overlap the one's before it: both compute the same.
    const int column = blockIdx.x % PARTS == 0 ? 0 : DEPTH - PART_COLUMNS;
    const int shared_by = heads / kv_heads;
    const Head<const act> at(qkv, sequence, time, kv_head * shared_by, kv_head, heads, kv_heads);
    act* const keys = shared;
    act* const values = keys + KEY_ROWS * STRIDE;
    act* const buffers = values + KEY_ROWS * STRIDE;
    float* const saved = (float*)(buffers + 2 * BUFFER);
    act* const own_keys = own_part<TILES>(keys);
    act* const own_values = own_part<TILES>(values);
    const int own_first = first + warp * TILES * 16;

    // KEY_ROWS is a multiple of QUERIES: the first block of queries that sees the keys starts with them.
    const int query_blocks = (time - first + QUERIES - 1) / QUERIES;
    const int steps = query_blocks * shared_by;
    const auto load_queries = [&](int step, int buffer) {
        const int head = kv_head * shared_by + step / query_blocks, query = first + step % query_blocks * QUERIES;
        act* const to = buffers + buffer * BUFFER;
        load_tile<QUERIES, THREADS>(to, Head<const act>(qkv, sequence, time, head, kv_head, heads, kv_heads).queries, query);
        load_tile<QUERIES, THREADS>(to + QUERIES * STRIDE, output_rows(dout, sequence, time, head, heads), query);
        cp_async_commit();
    };
    // Queries past the end get an infinite sum, so that their probabilities are zero.
    const auto load_saved = [&](int step) {
        const int head = kv_head * shared_by + step / query_blocks;
        const int query = first + step % query_blocks * QUERIES + threadIdx.x;
        if (threadIdx.x >= QUERIES || query >= time) return make_float2(infinity(), 0.0f);
        const long long row = ((long long)sequence * heads + head) * time + query;
        return ((const float2*)softmax)[row];
    };
    const auto keep_saved = [&](float2 value, int buffer) {
        if (threadIdx.x < QUERIES) ((float2*)saved)[buffer * QUERIES + threadIdx.x] = value;
    };

    load_tile<KEY_ROWS, THREADS>(keys, at.keys, first);
    load_tile<KEY_ROWS, THREADS>(values, at.values, first);
    load_queries(0, 0);
    keep_saved(load_saved(0), 0);

    float dk[TILES][PART_COLUMNS / 8][4] = {}, dv[TILES][PART_COLUMNS / 8][4] = {};
    const float scale = score_scale2();
    for (int step = 0; step < steps; ++step) {
        const int buffer = step % 2, block_query = first + step % query_blocks * QUERIES;
        tiles_wait();
        __syncthreads();
        float2 next = make_float2(0.0f, 0.0f);
        if (step + 1 < steps) load_queries(step + 1, 1 - buffer), next = load_saved(step + 1);
#pragma unroll 1
        for (int chunk = 0; chunk < QUERIES; chunk += CHUNK) {
            const act* const queries = buffers + buffer * BUFFER + chunk * STRIDE;
            const act* const gradients = queries + QUERIES * STRIDE;
            const float* const row_saved = saved + (buffer * QUERIES + chunk) * 2;
            const int query = block_query + chunk;
            if (query + CHUNK - 1 < own_first) continue;

            // Everything is transposed: rows are keys, columns queries.
            float p[TILES][CHUNK / 8][4], ds[TILES][CHUNK / 8][4];
            scores(p, own_keys, queries);
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n) {
                const float4 pairs = *(const float4*)(row_saved + (n * 8 + pair * 2) * 2);
#pragma unroll
                for (int m = 0; m < TILES; ++m) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        p[m][n][c] = fast_exp2(p[m][n][c] * scale - (c % 2 ? pairs.z : pairs.x));
                    }
                }
            }
            if (query < own_first + TILES * 16 - 1) {
#pragma unroll
                for (int m = 0; m < TILES; ++m) {
#pragma unroll
                    for (int n = 0; n < CHUNK / 8; ++n) {
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
                            const int key = own_first + m * 16 + c / 2 * 8 + group;
                            if (key > query + n * 8 + pair * 2 + c % 2) p[m][n][c] = 0.0f;
                        }
                    }
                }
            }
            accumulate(dv, p, gradients + column);
            // Late: early it would take registers.
            scores(ds, own_values, gradients);
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n) {
                const float4 pairs = *(const float4*)(row_saved + (n * 8 + pair * 2) * 2);
#pragma unroll
                for (int m = 0; m < TILES; ++m) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        ds[m][n][c] = p[m][n][c] * (ds[m][n][c] - (c % 2 ? pairs.w : pairs.y));
                    }
                }
            }
            accumulate(dk, ds, queries + column);
        }
        keep_saved(next, 1 - buffer);
    }

    float one[TILES][2], scaled[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) one[i / 2][i % 2] = 1.0f, scaled[i / 2][i % 2] = score_scale();
    const Head<act> to(dqkv, sequence, time, kv_head * shared_by, kv_head, heads, kv_heads);
    stage(own_keys, column, dk, scaled);
    stage(own_values, column, dv, one);
    store_tile<TILES * 16, PART_COLUMNS>(own_keys, to.keys, own_first, column);
    store_tile<TILES * 16, PART_COLUMNS>(own_values, to.values, own_first, column);
}

// dq of a block of queries.
//
// launch: grid (ceil(time / PASS_QUERY_ROWS), heads, batch). With D = HEAD_DIM rounded up to 16: block 128, shared
// (2·PASS_QUERY_ROWS + 4·PASS_KEYS)·(D + 8)·2 bytes, PASS_QUERY_ROWS = 128 if D ≤ 128 and not (SMALL_SHARED and D > 64),
// else 64, PASS_KEYS = 64 if D ≤ 64, else 32.
extern "C" __global__ void __launch_bounds__(QUERIES_THREADS, RESIDENT) attention_backward_queries(
    const act* qkv, const act* dout, const float* softmax, act* dqkv, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(act, shared);
    constexpr int KEYS = PASS_KEYS, CHUNK = PASS_KEYS_CHUNK, TILES = QUERY_TILES, ROWS = PASS_QUERY_ROWS;
    constexpr int THREADS = QUERIES_THREADS, BUFFER = 2 * KEYS * STRIDE;
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads), sequence = blockIdx.z;
    const Head<const act> at(qkv, sequence, time, head, kv_head, heads, kv_heads);
    const int end = first + ROWS < time ? first + ROWS : time;
    act* const queries = shared;
    act* const gradients = queries + ROWS * STRIDE;
    act* const buffers = gradients + ROWS * STRIDE;
    act* const own_queries = own_part<TILES>(queries);
    act* const own_gradients = own_part<TILES>(gradients);
    const int own_first = first + warp * TILES * 16;

    load_tile<ROWS, THREADS>(queries, at.queries, first);
    load_tile<ROWS, THREADS>(gradients, output_rows(dout, sequence, time, head, heads), first);
    load_tile<KEYS, THREADS>(buffers, at.keys, 0);
    load_tile<KEYS, THREADS>(buffers + KEYS * STRIDE, at.values, 0);
    cp_async_commit();

    float2 saved[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) {
        const int query = own_first + i * 8 + group;
        const long long row = ((long long)sequence * heads + head) * time + query;
        saved[i / 2][i % 2] = query < time ? ((const float2*)softmax)[row] : make_float2(infinity(), 0.0f);
    }
    float dq[TILES][DEPTH / 8][4] = {};
    const float scale = score_scale2();
    for (int block = 0; block < end; block += KEYS) {
        const int buffer = block / KEYS % 2;
        tiles_wait();
        __syncthreads();
        if (block + KEYS < end) {
            act* const next = buffers + (1 - buffer) * BUFFER;
            load_tile<KEYS, THREADS>(next, at.keys, block + KEYS);
            load_tile<KEYS, THREADS>(next + KEYS * STRIDE, at.values, block + KEYS);
            cp_async_commit();
        }
#pragma unroll 1
        for (int chunk = 0; chunk < KEYS; chunk += CHUNK) {
            const act* const keys = buffers + buffer * BUFFER + chunk * STRIDE;
            const act* const values = keys + KEYS * STRIDE;
            const int key = block + chunk;
            if (key > own_first + TILES * 16 - 1) break;

            float p[TILES][CHUNK / 8][4], ds[TILES][CHUNK / 8][4];
            scores(p, own_queries, keys);
            scores(ds, own_gradients, values);
            const bool diagonal = key + CHUNK - 1 > own_first;
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
#pragma unroll
                for (int n = 0; n < CHUNK / 8; ++n) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        const float2 row = saved[m][c / 2];
                        const float probability = fast_exp2(p[m][n][c] * scale - row.x);
                        ds[m][n][c] = probability * (ds[m][n][c] - row.y);
                        const int query = own_first + m * 16 + c / 2 * 8 + group;
                        if (diagonal && key + n * 8 + pair * 2 + c % 2 > query) ds[m][n][c] = 0.0f;
                    }
                }
            }
            accumulate(dq, ds, keys);
        }
    }

    float scaled[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) scaled[i / 2][i % 2] = score_scale();
    const Head<act> to(dqkv, sequence, time, head, kv_head, heads, kv_heads);
    stage(own_queries, 0, dq, scaled);
    store_tile<TILES * 16, DEPTH>(own_queries, to.queries, own_first, 0);
}

#endif

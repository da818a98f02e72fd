// Attention with bf16 activations on Hopper: the backward pass, in two kernels.

#if ACT_BF16 && ATTENTION_HOPPER

// Keys of a block in the pass for dk and dv, queries of one in the pass for dq.
constexpr int KEYS_WARPGROUPS = DEPTH == 64 ? 3 : 2, QUERIES_WARPGROUPS = 3;
constexpr int KEY_ROWS = KEYS_WARPGROUPS * OWN_ROWS, KEYS_THREADS = (KEYS_WARPGROUPS + 1) * WARPGROUP;
constexpr int QUERY_ROWS = QUERIES_WARPGROUPS * OWN_ROWS, QUERIES_THREADS = (QUERIES_WARPGROUPS + 1) * WARPGROUP;
// Rows of the other side at a time.
constexpr int PASS_ROWS = 64, PASS_TILE = PASS_ROWS * DEPTH;
constexpr int PASS_STAGES = 4, PASS_LAG = 2;

// Goes on to fetch items until there are `items`, each published when LAG further ones have been asked for.
template <typename Load>
__device__ __forceinline__ void fetch(Ring<PASS_STAGES>& ring, int items, Load load) {
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
        ring.wait_empty(item);
        load(item);
        cp_async_commit();
        if (item < PASS_LAG) continue;
        tiles_wait<PASS_LAG>();
        ring.publish(item - PASS_LAG);
    }
    tiles_wait<0>();
    for (int item = items < PASS_LAG ? 0 : items - PASS_LAG; item < items; ++item) ring.publish(item);
}

// dk and dv of a block of keys, summed over the query heads that the keys serve.
//
// launch: grid (ceil(time / KEY_ROWS), kv_heads, batch), block KEYS_THREADS, shared (2·KEY_ROWS + 8·64)·HEAD_DIM·2 + 3072
// bytes. KEY_ROWS and threads are 192 and 512 for a head_dim of 64, 128 and 384 for 128.
extern "C" __global__ void __launch_bounds__(KEYS_THREADS, 1) attention_backward_keys(
    const act* qkv, const act* dout, const float* softmax, act* dqkv, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(act, shared);
    __shared__ Ring<PASS_STAGES> ring;
    const int2 place = tile_and_head();
    const int first = place.x * KEY_ROWS, kv_head = place.y, sequence = blockIdx.z, shared_by = heads / kv_heads;
    const Head<const act> at(qkv, sequence, time, kv_head * shared_by, kv_head, heads, kv_heads);
    act* const keys = aligned_tiles(shared);
    act* const values = keys + KEY_ROWS * DEPTH;
    act* const stages = values + KEY_ROWS * DEPTH;
    float2* const saved = (float2*)(stages + PASS_STAGES * 2 * PASS_TILE);
    // KEY_ROWS is a multiple of PASS_ROWS: the first block of queries that sees the keys starts with them.
    const int query_blocks = (time - first + PASS_ROWS - 1) / PASS_ROWS, items = query_blocks * shared_by;
    if (threadIdx.x == 0) ring.init(KEYS_WARPGROUPS);
    __syncthreads();
    const int warpgroup = warpgroup_index();

    if (warpgroup == KEYS_WARPGROUPS) {
        fewer_registers<KEYS_WARPGROUPS == 3 ? 32 : 24>();
        int head = kv_head * shared_by, query = first;
        fetch(ring, items, [&](int item) {
            act* const to = stages + item % PASS_STAGES * 2 * PASS_TILE;
            const int thread = threadIdx.x % WARPGROUP;
            load_tile<PASS_ROWS>(to, Head<const act>(qkv, sequence, time, head, kv_head, heads, kv_heads).queries, query);
            load_tile<PASS_ROWS>(to + PASS_TILE, output_rows(dout, sequence, time, head, heads), query);
            // Past the end are zeros, and the gradients there are too, so that nothing comes of them.
            if (thread < PASS_ROWS) {
                const float2* from = (const float2*)softmax + ((long long)sequence * heads + head) * time + query + thread;
                cp_async_8(saved + item % PASS_STAGES * PASS_ROWS + thread, from, query + thread < time);
            }
            query += PASS_ROWS;
            if (query >= time) query = first, ++head;
        });
        return;
    }
    more_registers<KEYS_WARPGROUPS == 3 ? 160 : 240>();
    act* const own_keys = keys + warpgroup * OWN_ROWS * DEPTH;
    act* const own_values = values + warpgroup * OWN_ROWS * DEPTH;
    const int own_first = first + warpgroup * OWN_ROWS;
    load_tile<OWN_ROWS>(own_keys, at.keys, own_first);
    load_tile<OWN_ROWS>(own_values, at.values, own_first);
    cp_async_commit();
    tiles_wait<0>();
    warpgroup_sync();

    const int pair = threadIdx.x % 4, own_key = threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
    const float scale = score_scale2();
    float dk[1][DEPTH / 8][4] = {}, dv[1][DEPTH / 8][4] = {};
    int query = first;
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
        const act* const queries = stages + item % PASS_STAGES * 2 * PASS_TILE;
        const act* const gradients = queries + PASS_TILE;
        const float2* const row_saved = saved + item % PASS_STAGES * PASS_ROWS + pair * 2;
        ring.wait(item);
        if (query >= own_first) {
            // Everything is transposed: rows are keys, columns queries.
            float p[1][PASS_ROWS / 8][4], ds[1][PASS_ROWS / 8][4];
            unsigned operand[PASS_ROWS / 16][4], rounded[PASS_ROWS / 16][4], ds_operand[PASS_ROWS / 16][4];
            scores(p, own_keys, queries);
            scores(ds, own_values, gradients);
            wgmma_wait<1>();
            settle(p);
#pragma unroll
            for (int n = 0; n < PASS_ROWS / 8; ++n) {
                const float4 pairs = *(const float4*)(row_saved + n * 8);
#pragma unroll
                for (int c = 0; c < 4; ++c) p[0][n][c] = fast_exp2(p[0][n][c] * scale - (c % 2 ? pairs.z : pairs.x));
            }
            if (query == own_first) {
#pragma unroll
                for (int n = 0; n < PASS_ROWS / 8; ++n) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        if (own_key + c / 2 * 8 > n * 8 + pair * 2 + c % 2) p[0][n][c] = 0.0f;
                    }
                }
            }
            as_operand(operand, p);
            copy_operand(rounded, operand);
            accumulate(dv, operand, gradients);
            wgmma_wait<1>();
            settle(ds);
#pragma unroll
            for (int n = 0; n < PASS_ROWS / 8; ++n) {
                const float4 pairs = *(const float4*)(row_saved + n * 8);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    // The probability as it was rounded, where registers are short. The copy takes none.
                    const unsigned both = rounded[n / 2][n % 2 * 2 + c / 2];
                    const float probability =
                        KEYS_WARPGROUPS == 2 ? p[0][n][c] : c % 2 ? high_bf16(both) : low_bf16(both);
                    ds[0][n][c] = probability * (ds[0][n][c] - (c % 2 ? pairs.w : pairs.y));
                }
            }
            as_operand(ds_operand, ds);
            accumulate(dk, ds_operand, queries);
            wgmma_wait<0>();
            settle(dv), settle(dk);
        }
        ring.release(item);
        query += PASS_ROWS;
        if (query >= time) query = first;
    }

    const float one[2] = {1.0f, 1.0f}, scaled[2] = {score_scale(), score_scale()};
    const Head<act> to(dqkv, sequence, time, kv_head * shared_by, kv_head, heads, kv_heads);
    store_sums(own_keys, dk, scaled, to.keys, own_first);
    store_sums(own_values, dv, one, to.values, own_first);
}

// dq of a block of queries.
//
// launch: grid (ceil(time / 192), heads, batch), block 512, shared (2·192 + 8·64)·HEAD_DIM·2 + 1024 bytes.
extern "C" __global__ void __launch_bounds__(QUERIES_THREADS, 1) attention_backward_queries(
    const act* qkv, const act* dout, const float* softmax, act* dqkv, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(act, shared);
    __shared__ Ring<PASS_STAGES> ring;
    const int2 place = tile_and_head();
    const int first = ((int)gridDim.x - 1 - place.x) * QUERY_ROWS, head = place.y, sequence = blockIdx.z;
    const int kv_head = head / (heads / kv_heads);
    const Head<const act> at(qkv, sequence, time, head, kv_head, heads, kv_heads);
    const int end = first + QUERY_ROWS < time ? first + QUERY_ROWS : time, blocks = (end + PASS_ROWS - 1) / PASS_ROWS;
    act* const queries = aligned_tiles(shared);
    act* const gradients = queries + QUERY_ROWS * DEPTH;
    act* const stages = gradients + QUERY_ROWS * DEPTH;
    if (threadIdx.x == 0) ring.init(QUERIES_WARPGROUPS);
    __syncthreads();
    const int warpgroup = warpgroup_index();

    if (warpgroup == QUERIES_WARPGROUPS) {
        fewer_registers<32>();
        fetch(ring, blocks, [&](int item) {
            act* const to = stages + item % PASS_STAGES * 2 * PASS_TILE;
            load_tile<PASS_ROWS>(to, at.keys, item * PASS_ROWS);
            load_tile<PASS_ROWS>(to + PASS_TILE, at.values, item * PASS_ROWS);
        });
        return;
    }
    more_registers<160>();
    act* const own_queries = queries + warpgroup * OWN_ROWS * DEPTH;
    act* const own_gradients = gradients + warpgroup * OWN_ROWS * DEPTH;
    const int own_first = first + warpgroup * OWN_ROWS;
    load_tile<OWN_ROWS>(own_queries, at.queries, own_first);
    load_tile<OWN_ROWS>(own_gradients, output_rows(dout, sequence, time, head, heads), own_first);
    cp_async_commit();

    const int pair = threadIdx.x % 4, own_query = threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
    float2 saved[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int query = own_first + own_query + half * 8;
        const long long row = ((long long)sequence * heads + head) * time + query;
        saved[half] = query < time ? ((const float2*)softmax)[row] : make_float2(infinity(), 0.0f);
    }
    tiles_wait<0>();
    warpgroup_sync();

    const float scale = score_scale2();
    float dq[1][DEPTH / 8][4] = {};
    // The warpgroup's last block is the one of the diagonal. Those after it are fewer than the ring's places: nobody waits
    // for their release.
    const int own_blocks = own_first / PASS_ROWS + 1 < blocks ? own_first / PASS_ROWS + 1 : blocks;
#pragma unroll 1
    for (int item = 0; item < own_blocks; ++item) {
        const act* const keys = stages + item % PASS_STAGES * 2 * PASS_TILE;
        float p[1][PASS_ROWS / 8][4], ds[1][PASS_ROWS / 8][4];
        unsigned operand[PASS_ROWS / 16][4];
        ring.wait(item);
        scores(p, own_queries, keys);
        scores(ds, own_gradients, keys + PASS_TILE);
        wgmma_wait<1>();
        settle(p);
#pragma unroll
        for (int n = 0; n < PASS_ROWS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) p[0][n][c] = fast_exp2(p[0][n][c] * scale - saved[c / 2].x);
        }
        if (item * PASS_ROWS == own_first) {
#pragma unroll
            for (int n = 0; n < PASS_ROWS / 8; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    if (n * 8 + pair * 2 + c % 2 > own_query + c / 2 * 8) p[0][n][c] = 0.0f;
                }
            }
        }
        settle(p);
        wgmma_wait<0>();
        settle(ds);
#pragma unroll
        for (int n = 0; n < PASS_ROWS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) ds[0][n][c] = p[0][n][c] * (ds[0][n][c] - saved[c / 2].y);
        }
        as_operand(operand, ds);
        accumulate(dq, operand, keys);
        wgmma_wait<0>();
        settle(dq);
        ring.release(item);
    }

    const float scaled[2] = {score_scale(), score_scale()};
    const Head<act> to(dqkv, sequence, time, head, kv_head, heads, kv_heads);
    store_sums(own_queries, dq, scaled, to.queries, own_first);
}

#endif

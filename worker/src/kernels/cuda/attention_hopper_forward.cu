// Attention with bf16 activations on Hopper: the forward pass.

#if ACT_BF16 && ATTENTION_HOPPER

constexpr int FORWARD_WARPGROUPS = DEPTH == 64 ? 3 : 2;
constexpr int FORWARD_ROWS = FORWARD_WARPGROUPS * OWN_ROWS, FORWARD_THREADS = (FORWARD_WARPGROUPS + 1) * WARPGROUP;
// What is fetched is published FORWARD_LAG tiles later. The others wait for a block's keys while they hold the block before
// and the values of the one before that, so that less than three stages would never be published.
constexpr int FORWARD_KEYS = 128, FORWARD_STAGES = DEPTH == 64 ? 4 : 3, FORWARD_LAG = 2;

// Scores become probabilities but for the sums, which are found on the way; what was summed with the maxima before is to
// be multiplied by `rescale`.
template <int N>
__device__ __forceinline__ void forward_softmax(
    float (&p)[1][N][4], float (&max)[2], float (&total)[2], float (&rescale)[2]) {
    const float scale = score_scale2();
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float highest[4] = {max[half], p[0][0][half * 2], p[0][0][half * 2 + 1], p[0][1][half * 2]};
#pragma unroll
        for (int i = 3; i < N * 2; ++i) highest[i % 4] = fmaxf(highest[i % 4], p[0][i / 2][half * 2 + i % 2]);
        float all = fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3]));
        all = fmaxf(all, __shfl_xor_sync(FULL_WARP, all, 1));
        all = fmaxf(all, __shfl_xor_sync(FULL_WARP, all, 2));
        rescale[half] = fast_exp2((max[half] - all) * scale);
        shift[half] = all * scale;
        max[half] = all;
    }
    float parts[2][2] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            p[0][n][c] = fast_exp2(p[0][n][c] * scale - shift[c / 2]);
            parts[c / 2][c % 2] += p[0][n][c];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) total[half] = total[half] * rescale[half] + (parts[half][0] + parts[half][1]);
}

// out = softmax(q·kᵀ/√HEAD_DIM, causal)·v, and the maximal score and the inverse sum of each row.
//
// launch: grid (ceil(time / FORWARD_ROWS), heads, batch), block FORWARD_THREADS, shared (FORWARD_ROWS +
// FORWARD_STAGES·256)·HEAD_DIM·2 + 1024 bytes. Rows, threads and stages are 192, 512 and 4 for a head_dim of 64, and 128, 384
// and 3 for 128.
extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, 1) attention_forward(
    const act* qkv, act* out, float* statistics, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(act, shared);
    __shared__ Ring<FORWARD_STAGES> key_ring, value_ring;
    constexpr int KEYS = FORWARD_KEYS, TILE = KEYS * DEPTH;
    const int2 place = tile_and_head();
    // The blocks that have most to do come first.
    const int first = ((int)gridDim.x - 1 - place.x) * FORWARD_ROWS, head = place.y, sequence = blockIdx.z;
    const Head<const act> at(qkv, sequence, time, head, head / (heads / kv_heads), heads, kv_heads);
    const int end = first + FORWARD_ROWS < time ? first + FORWARD_ROWS : time;
    const int blocks = (end + KEYS - 1) / KEYS;
    act* const queries = aligned_tiles(shared);
    act* const keys = queries + FORWARD_ROWS * DEPTH;
    act* const values = keys + FORWARD_STAGES * TILE;
    if (threadIdx.x == 0) key_ring.init(FORWARD_WARPGROUPS), value_ring.init(FORWARD_WARPGROUPS);
    __syncthreads();
    const int warpgroup = warpgroup_index();

    // Blocks of keys are items in both rings, the last block first.
    if (warpgroup == FORWARD_WARPGROUPS) {
        fewer_registers<DEPTH == 64 ? 32 : 40>();
        const auto publish = [&](int tile) {
            if (tile % 2 == 0) key_ring.publish(tile / 2);
            else value_ring.publish(tile / 2);
        };
#pragma unroll 1
        for (int tile = 0; tile < blocks * 2; ++tile) {
            const int item = tile / 2, from = (blocks - 1 - item) * KEYS;
            act* const to = (tile % 2 == 0 ? keys : values) + item % FORWARD_STAGES * TILE;
            if (tile % 2 == 0) key_ring.wait_empty(item);
            else value_ring.wait_empty(item);
            load_tile<KEYS>(to, tile % 2 == 0 ? at.keys : at.values, from);
            cp_async_commit();
            if (tile < FORWARD_LAG) continue;
            tiles_wait<FORWARD_LAG>();
            publish(tile - FORWARD_LAG);
        }
        // There are two tiles or more.
        tiles_wait<0>();
        publish(blocks * 2 - 2), publish(blocks * 2 - 1);
        return;
    }
    more_registers<DEPTH == 64 ? 160 : 232>();
    act* const own = queries + warpgroup * OWN_ROWS * DEPTH;
    const int own_first = first + warpgroup * OWN_ROWS;
    load_tile<OWN_ROWS>(own, at.queries, own_first);
    cp_async_commit();
    tiles_wait<0>();
    warpgroup_sync();

    float sum[1][DEPTH / 8][4] = {}, max[2] = {-infinity(), -infinity()}, total[2] = {}, rescale[2];
    unsigned probabilities[KEYS / 16][4];
    int item = 0;
    // Keys that come after all of the warpgroup's queries: never more than one block.
    if (own_first + OWN_ROWS <= (blocks - 1) * KEYS) {
        key_ring.release(0), value_ring.release(0), item = 1;
    }
    {
        // The block of the diagonal: the only one with keys to hide, and all queries see some of it.
        float p[1][KEYS / 8][4];
        key_ring.wait(item);
        scores(p, own, keys + item % FORWARD_STAGES * TILE);
        wgmma_wait<0>();
        settle(p);
        key_ring.release(item);
        const int key = (blocks - 1 - item) * KEYS + threadIdx.x % 4 * 2;
        const int query = own_first + threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if (key + n * 8 + c % 2 > query + c / 2 * 8) p[0][n][c] = -infinity();
            }
        }
        forward_softmax(p, max, total, rescale);
        as_operand(probabilities, p);
    }
    // The products of a block's scores and of the block's before with its values are under way together, so that
    // exponentials are taken while values are multiplied.
    ++item;
    if (item < blocks) key_ring.wait(item);
#pragma unroll 1
    for (; item < blocks; ++item) {
        float p[1][KEYS / 8][4];
        scores(p, own, keys + item % FORWARD_STAGES * TILE);
        value_ring.wait(item - 1);
        accumulate(sum, probabilities, values + (item - 1) % FORWARD_STAGES * TILE);
        wgmma_wait<1>();
        settle(p);
        key_ring.release(item);
        forward_softmax(p, max, total, rescale);
        settle(p);
        // Here, as the assembler would put the wait for values before the exponentials if there were no branch between them.
        if (item + 1 < blocks) key_ring.wait(item + 1);
        wgmma_wait<0>();
        settle(sum);
        value_ring.release(item - 1);
#pragma unroll
        for (int n = 0; n < DEPTH / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[0][n][c] *= rescale[c / 2];
        }
        as_operand(probabilities, p);
    }
    value_ring.wait(blocks - 1);
    accumulate(sum, probabilities, values + (blocks - 1) % FORWARD_STAGES * TILE);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float all = total[half];
        all += __shfl_xor_sync(FULL_WARP, all, 1);
        all += __shfl_xor_sync(FULL_WARP, all, 2);
        total[half] = 1.0f / all;
        const int query = own_first + threadIdx.x / WARP % 4 * 16 + half * 8 + threadIdx.x % WARP / 4;
        if (threadIdx.x % 4 == 0 && query < time) {
            float* to = statistics + (((long long)sequence * time + query) * heads + head) * 2;
            to[0] = max[half] * score_scale(), to[1] = total[half];
        }
    }
    wgmma_wait<0>();
    settle(sum);
    store_sums(own, sum, total, output_rows(out, sequence, time, head, heads), own_first);
}

#endif

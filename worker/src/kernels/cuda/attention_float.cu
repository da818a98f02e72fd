// Attention with float activations, by plain multiplications.
//
// 256 threads are a square of 16 × 16: thread (y, x) computes the scores of rows y + 16·i and columns x + 16·j of a
// tile, and of what is summed with them the rows y + 16·i and the columns 4·x + 64·n. A half-warp has all of its rows'
// scores, so that softmaxes and the way from scores to sums need no __syncthreads.

#if !ACT_BF16

constexpr int THREADS = 256;
constexpr int DEPTH = (HEAD_DIM + 3) / 4 * 4;
constexpr int STRIDE = DEPTH + 4;
// Vectors of four columns that a thread sums.
constexpr int COLUMNS = (DEPTH + 63) / 64;

constexpr int FORWARD_QUERIES = 64;
// Rows that are loaded at a time, and of either side in the backward pass.
constexpr int BLOCK = 32;
// From row to row of a tile of scores.
constexpr int SCORES = BLOCK + 4;

template <int ROWS>
__device__ __forceinline__ void load_tile(float* tile, const Rows<const float>& from, int first) {
    if constexpr (HEAD_DIM % 4 == 0) {
        constexpr int CHUNKS = DEPTH / 4;
        for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
            const int row = i / CHUNKS, column = i % CHUNKS * 4;
            float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (first + row < from.count) value = *(const float4*)(from.row(first + row) + column);
            *(float4*)(tile + row * STRIDE + column) = value;
        }
    } else {
        for (int i = threadIdx.x; i < ROWS * DEPTH; i += THREADS) {
            const int row = i / DEPTH, column = i % DEPTH;
            const bool valid = first + row < from.count && column < HEAD_DIM;
            tile[row * STRIDE + column] = valid ? from.row(first + row)[column] : 0.0f;
        }
    }
}

// s = a·bᵀ
template <int M, int N>
__device__ __forceinline__ void scores(float (&s)[M][N], const float* a_tile, const float* b_tile) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < M * N; ++i) (&s[0][0])[i] = 0.0f;
#pragma unroll 2
    for (int k = 0; k < DEPTH; k += 4) {
        float4 a[M], b[N];
#pragma unroll
        for (int m = 0; m < M; ++m) a[m] = *(const float4*)(a_tile + (y + 16 * m) * STRIDE + k);
#pragma unroll
        for (int n = 0; n < N; ++n) b[n] = *(const float4*)(b_tile + (x + 16 * n) * STRIDE + k);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                s[m][n] += a[m].x * b[n].x, s[m][n] += a[m].y * b[n].y;
                s[m][n] += a[m].z * b[n].z, s[m][n] += a[m].w * b[n].w;
            }
        }
    }
}

// Puts the thread's scores where its half-warp reads them.
template <int M, int N>
__device__ __forceinline__ void keep(float* tile, const float (&s)[M][N]) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) tile[(y + 16 * m) * SCORES + x + 16 * n] = s[m][n];
    }
}

// sum += p·b over the BLOCK rows of tile b.
template <int M>
__device__ __forceinline__ void accumulate(float (&sum)[M][COLUMNS][4], const float* p, const float* b_tile) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll 4
    for (int k = 0; k < BLOCK; ++k) {
        float a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) a[m] = p[(y + 16 * m) * SCORES + k];
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            if (n * 64 + x * 4 >= DEPTH) continue;
            const float4 b = *(const float4*)(b_tile + k * STRIDE + n * 64 + x * 4);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                sum[m][n][0] += a[m] * b.x, sum[m][n][1] += a[m] * b.y;
                sum[m][n][2] += a[m] * b.z, sum[m][n][3] += a[m] * b.w;
            }
        }
    }
}

// Writes the thread's sums, times a factor per row, to the rows from `first` on.
template <int M>
__device__ __forceinline__ void store_sums(
    const Rows<float>& to, int first, const float (&sum)[M][COLUMNS][4], const float (&factor)[M]) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const int row = first + y + 16 * m;
        if (row >= to.count) continue;
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int column = n * 64 + x * 4 + c;
                if (column < HEAD_DIM) to.row(row)[column] = sum[m][n][c] * factor[m];
            }
        }
    }
}

// launch: grid (ceil(time / 64), heads, batch), block 256, shared (128·(D + 4) + 64·36)·4 bytes, where D = HEAD_DIM rounded
// up to 4.
extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(
    const act* qkv, act* out, float* statistics, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(float, shared);
    constexpr int M = FORWARD_QUERIES / 16, N = BLOCK / 16;
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    const int first = (gridDim.x - 1 - blockIdx.x) * FORWARD_QUERIES, head = blockIdx.y, sequence = blockIdx.z;
    const Head<const float> at(qkv, sequence, time, head, head / (heads / kv_heads), heads, kv_heads);
    const int end = first + FORWARD_QUERIES < time ? first + FORWARD_QUERIES : time;
    float* const queries = shared;
    float* const keys = queries + FORWARD_QUERIES * STRIDE;
    float* const values = keys + BLOCK * STRIDE;
    float* const probabilities = values + BLOCK * STRIDE;
    load_tile<FORWARD_QUERIES>(queries, at.queries, first);

    float sum[M][COLUMNS][4] = {}, max[M], total[M];
#pragma unroll
    for (int m = 0; m < M; ++m) max[m] = -infinity(), total[m] = 0.0f;
    const float scale = score_scale2();
    for (int key = 0; key < end; key += BLOCK) {
        __syncthreads();
        load_tile<BLOCK>(keys, at.keys, key);
        load_tile<BLOCK>(values, at.values, key);
        __syncthreads();
        float p[M][N];
        scores(p, queries, keys);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float highest = max[m];
#pragma unroll
            for (int n = 0; n < N; ++n) {
                // Every query sees the first key, so that the maximum is finite from the first block on.
                if (key + x + 16 * n > first + y + 16 * m) p[m][n] = -infinity();
                highest = fmaxf(highest, p[m][n]);
            }
#pragma unroll
            for (int offset = 8; offset > 0; offset /= 2) {
                highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, offset));
            }
            const float rescale = fast_exp2((max[m] - highest) * scale);
            max[m] = highest;
            total[m] *= rescale;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                p[m][n] = fast_exp2((p[m][n] - highest) * scale);
                total[m] += p[m][n];
            }
#pragma unroll
            for (int i = 0; i < COLUMNS * 4; ++i) sum[m][i / 4][i % 4] *= rescale;
        }
        keep(probabilities, p);
        __syncwarp();
        accumulate(sum, probabilities, values);
    }

#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) total[m] += __shfl_xor_sync(FULL_WARP, total[m], offset);
        total[m] = 1.0f / total[m];
        const int query = first + y + 16 * m;
        if (x == 0 && query < time) {
            float* to = statistics + (((long long)sequence * time + query) * heads + head) * 2;
            to[0] = max[m] * score_scale(), to[1] = total[m];
        }
    }
    store_sums(output_rows(out, sequence, time, head, heads), first, sum, total);
}

// dk and dv of 32 keys, summed over the query heads that the keys serve.
//
// launch: grid (ceil(time / 32), kv_heads, batch), block 256, shared (128·(D + 4) + 2·32·36)·4 bytes, where D = HEAD_DIM
// rounded up to 4.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_keys(
    const act* qkv, const act* dout, const float* softmax, act* dqkv, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(float, shared);
    constexpr int M = BLOCK / 16;
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    const int first = blockIdx.x * BLOCK, kv_head = blockIdx.y, sequence = blockIdx.z, shared_by = heads / kv_heads;
    float* const keys = shared;
    float* const values = keys + BLOCK * STRIDE;
    float* const queries = values + BLOCK * STRIDE;
    float* const gradients = queries + BLOCK * STRIDE;
    float* const probabilities = gradients + BLOCK * STRIDE;
    float* const score_gradients = probabilities + BLOCK * SCORES;
    const Head<float> to(dqkv, sequence, time, 0, kv_head, heads, kv_heads);
    const Head<const float> of(qkv, sequence, time, 0, kv_head, heads, kv_heads);
    load_tile<BLOCK>(keys, of.keys, first);
    load_tile<BLOCK>(values, of.values, first);

    float dk[M][COLUMNS][4] = {}, dv[M][COLUMNS][4] = {};
    const float scale = score_scale2();
    for (int head = kv_head * shared_by; head < (kv_head + 1) * shared_by; ++head) {
        const Head<const float> at(qkv, sequence, time, head, kv_head, heads, kv_heads);
        const Rows<const float> of_head = output_rows(dout, sequence, time, head, heads);
        const float2* const saved = (const float2*)softmax + ((long long)sequence * heads + head) * time;
        for (int block = first; block < time; block += BLOCK) {
            __syncthreads();
            load_tile<BLOCK>(queries, at.queries, block);
            load_tile<BLOCK>(gradients, of_head, block);
            __syncthreads();
            float p[M][M], ds[M][M];
            scores(p, keys, queries);
            scores(ds, values, gradients);
#pragma unroll
            for (int n = 0; n < M; ++n) {
                const int query = block + x + 16 * n;
                const float2 row = query < time ? saved[query] : make_float2(infinity(), 0.0f);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    p[m][n] = first + y + 16 * m > query ? 0.0f : fast_exp2(p[m][n] * scale - row.x);
                    ds[m][n] = p[m][n] * (ds[m][n] - row.y);
                }
            }
            keep(probabilities, p);
            keep(score_gradients, ds);
            __syncwarp();
            accumulate(dv, probabilities, gradients);
            accumulate(dk, score_gradients, queries);
        }
    }
    const float one[M] = {1.0f, 1.0f}, scaled[M] = {score_scale(), score_scale()};
    store_sums(to.keys, first, dk, scaled);
    store_sums(to.values, first, dv, one);
}

// dq of 32 queries.
//
// launch: grid (ceil(time / 32), heads, batch), block 256, shared as attention_backward_keys.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_queries(
    const act* qkv, const act* dout, const float* softmax, act* dqkv, int time, int heads, int kv_heads) {
    DYNAMIC_SHARED(float, shared);
    constexpr int M = BLOCK / 16;
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    const int first = (gridDim.x - 1 - blockIdx.x) * BLOCK, head = blockIdx.y, sequence = blockIdx.z;
    const int kv_head = head / (heads / kv_heads);
    float* const queries = shared;
    float* const gradients = queries + BLOCK * STRIDE;
    float* const keys = gradients + BLOCK * STRIDE;
    float* const values = keys + BLOCK * STRIDE;
    float* const score_gradients = values + BLOCK * STRIDE;
    const Head<const float> at(qkv, sequence, time, head, kv_head, heads, kv_heads);
    load_tile<BLOCK>(queries, at.queries, first);
    load_tile<BLOCK>(gradients, output_rows(dout, sequence, time, head, heads), first);

    float2 saved[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const int query = first + y + 16 * m;
        const long long row = ((long long)sequence * heads + head) * time + query;
        saved[m] = query < time ? ((const float2*)softmax)[row] : make_float2(infinity(), 0.0f);
    }
    float dq[M][COLUMNS][4] = {};
    const float scale = score_scale2();
    for (int key = 0; key <= first; key += BLOCK) {
        __syncthreads();
        load_tile<BLOCK>(keys, at.keys, key);
        load_tile<BLOCK>(values, at.values, key);
        __syncthreads();
        float p[M][M], ds[M][M];
        scores(p, queries, keys);
        scores(ds, gradients, values);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < M; ++n) {
                const bool seen = key + x + 16 * n <= first + y + 16 * m;
                ds[m][n] = seen ? fast_exp2(p[m][n] * scale - saved[m].x) * (ds[m][n] - saved[m].y) : 0.0f;
            }
        }
        keep(score_gradients, ds);
        __syncwarp();
        accumulate(dq, score_gradients, keys);
    }
    const float scaled[M] = {score_scale(), score_scale()};
    const Head<float> to(dqkv, sequence, time, head, kv_head, heads, kv_heads);
    store_sums(to.queries, first, dq, scaled);
}

#endif

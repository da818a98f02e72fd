// Causal grouped-query attention, fused as FlashAttention-2 is: forward, backward, and against a cache.
//
// The translation unit is this file, attention_tiles.cu, attention_bf16.cu and attention_bf16_backward.cu,
// attention_hopper.cu, attention_hopper_forward.cu and attention_hopper_backward.cu, and attention_float.cu, in this order:
// of the three groups the defines leave one. It is for one head_dim: besides the prelude's, the host defines
//   HEAD_DIM          elements of a head, even, 2 to 256; what 16 does not divide is padded with zeros in shared memory
//   SMALL_SHARED      1 where a block cannot have 120 KB of shared memory: smaller tiles for head_dims past 64
//   ATTENTION_HOPPER  1 for sm_90a with bf16 activations and a head_dim of 64 or 128, where wgmma can be used
//
// Queries, keys and values of a token lie side by side in a row of (heads + 2·kv_heads)·HEAD_DIM elements; all buffers are
// 16-byte aligned. What the forward pass keeps per token and head is the maximal score and the inverse of the softmax's
// sum, as the CPU does. The backward pass knows them as (log2 of Σ e^score, Σ out⊙dout), which attention_delta finds,
// and computes the scores twice: once by key blocks for dk and dv, once by query blocks for dq. That is two products
// more than one pass with atomics would take, and gives the same bits every time.
//
// With bf16 activations the products are those of the tensor cores, accumulated in float; with float activations they are
// plain float multiplications.

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
#ifndef SMALL_SHARED
#define SMALL_SHARED 0
#endif
#ifndef ATTENTION_HOPPER
#define ATTENTION_HOPPER 0
#endif

#define LOG2E 1.4426950408889634f

// Scores are products of queries and keys times this; exponentials are powers of two.
__device__ __forceinline__ float score_scale() { return 1.0f / sqrtf((float)HEAD_DIM); }
__device__ __forceinline__ float score_scale2() { return LOG2E / sqrtf((float)HEAD_DIM); }

// The elements of one head in every token of a sequence.
template <typename T>
struct Rows {
    T* data;
    int stride, count;

    __device__ __forceinline__ T* row(int index) const { return data + (long long)index * stride; }
};

// One head's queries of a sequence, and the keys and values that serve it.
template <typename T>
struct Head {
    Rows<T> queries, keys, values;

    __device__ __forceinline__ Head(T* qkv, int sequence, int time, int head, int kv_head, int heads, int kv_heads) {
        const int stride = (heads + 2 * kv_heads) * HEAD_DIM;
        T* const first = qkv + (long long)sequence * time * stride;
        queries = {first + head * HEAD_DIM, stride, time};
        keys = {first + (heads + kv_head) * HEAD_DIM, stride, time};
        values = {first + (heads + kv_heads + kv_head) * HEAD_DIM, stride, time};
    }
};

// One head's rows of a sequence in (batch, time, heads, HEAD_DIM).
template <typename T>
__device__ __forceinline__ Rows<T> output_rows(T* out, int sequence, int time, int head, int heads) {
    return {out + ((long long)sequence * time * heads + head) * HEAD_DIM, heads * HEAD_DIM, time};
}

// Σ out⊙dout, and the softmax's statistics as the backward pass wants them.
//
// softmax (batch, heads, time, 2) is scratch of the backward pass: log2 of the sum of e^score, and the dot product.
// launch: grid ceil(batch·time·heads / 32), block 256, shared 0; first of the backward pass.
extern "C" __global__ void __launch_bounds__(256) attention_delta(
    const act* out, const act* dout, const float* statistics, float* softmax, int batch, int time, int heads) {
    const long long all = (long long)batch * time * heads;
    const long long index = (long long)blockIdx.x * 32 + threadIdx.x / 8;
    const int lane = threadIdx.x % 8;
    float sum = 0.0f;
    if (index < all) {
        const act *a = out + index * HEAD_DIM, *b = dout + index * HEAD_DIM;
        if (HEAD_DIM % 8 == 0) {
            for (int i = lane * 8; i < HEAD_DIM; i += 64) {
                float x[8], y[8];
                load8(a + i, x), load8(b + i, y);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
            }
        } else {
            for (int i = lane; i < HEAD_DIM; i += 8) sum += to_float(a[i]) * to_float(b[i]);
        }
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
    if (lane == 0 && index < all) {
        const long long row = index / heads, sequence = row / time;
        const int head = (int)(index % heads), token = (int)(row % time);
        float* to = softmax + ((sequence * heads + head) * time + token) * 2;
        to[0] = statistics[index * 2] * LOG2E - log2f(statistics[index * 2 + 1]);
        to[1] = sum;
    }
}

// ---- A sequence that grows ----

// Turns queries and keys of a sequence's next tokens, the first of which is at position `past`, in place, and puts keys
// and values into their positions' rows of the cache (…, 2·kv_heads·HEAD_DIM), which holds activations.
//
// launch: grid (time), block 256, shared 0; before cached_attention.
extern "C" __global__ void __launch_bounds__(256) cached_attention_append(
    act* qkv, const float* tables, act* cache, int past, int heads, int kv_heads) {
    constexpr int HALF = HEAD_DIM / 2;
    const int keys = kv_heads * HEAD_DIM;
    const long long position = (long long)past + blockIdx.x;
    act* const row = qkv + blockIdx.x * (long long)(heads + 2 * kv_heads) * HEAD_DIM;
    act* const to = cache + position * 2 * keys;
    const float *const cosines = tables + position * HEAD_DIM, *const sines = cosines + HALF;
    for (int i = threadIdx.x; i < (heads + kv_heads) * HALF; i += 256) {
        const int head = i / HALF, channel = i % HALF, at = head * HEAD_DIM + channel;
        const float a = to_float(row[at]), b = to_float(row[at + HALF]);
        const act first = to_act(a * cosines[channel] - b * sines[channel]);
        const act second = to_act(b * cosines[channel] + a * sines[channel]);
        row[at] = first, row[at + HALF] = second;
        if (head >= heads) {
            act* const key = to + (head - heads) * HEAD_DIM + channel;
            key[0] = first, key[HALF] = second;
        }
    }
    for (int i = threadIdx.x; i < keys; i += 256) to[keys + i] = row[(heads + kv_heads) * HEAD_DIM + i];
}

// Attention of a sequence's next tokens to all tokens up to each one's own, which are in the cache.
//
// launch: grid (time, heads), block 256, shared 0; the warps of a block share out the keys of one query.
extern "C" __global__ void __launch_bounds__(256) cached_attention(
    const act* qkv, const act* cache, act* out, int past, int heads, int kv_heads) {
    constexpr int PARTS_PER_LANE = (HEAD_DIM + WARP - 1) / WARP, KEYS = 4, GROUP = 256 / WARP;
    __shared__ float sums[GROUP][HEAD_DIM];
    __shared__ float maxima[GROUP], totals[GROUP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int token = blockIdx.x, head = blockIdx.y, seen = past + token + 1;
    const int kv_head = head / (heads / kv_heads);
    const long long stride = 2LL * kv_heads * HEAD_DIM;
    const act* const keys = cache + kv_head * HEAD_DIM;
    const act* const values = keys + kv_heads * HEAD_DIM;
    const act* const from = qkv + token * (long long)(heads + 2 * kv_heads) * HEAD_DIM + head * HEAD_DIM;

    float query[PARTS_PER_LANE], sum[PARTS_PER_LANE], max = -infinity(), total = 0.0f;
#pragma unroll
    for (int i = 0; i < PARTS_PER_LANE; ++i) {
        const int channel = i * WARP + lane;
        query[i] = channel < HEAD_DIM ? to_float(from[channel]) : 0.0f;
        sum[i] = 0.0f;
    }
    const float scale = score_scale2();
    for (int first = warp * KEYS; first < seen; first += GROUP * KEYS) {
        float score[KEYS], highest = max;
#pragma unroll
        for (int k = 0; k < KEYS; ++k) {
            const act* const key = keys + (first + k) * stride;
            score[k] = 0.0f;
#pragma unroll
            for (int i = 0; i < PARTS_PER_LANE; ++i) {
                const int channel = i * WARP + lane;
                if (first + k < seen && channel < HEAD_DIM) score[k] += query[i] * to_float(key[channel]);
            }
        }
#pragma unroll
        for (int k = 0; k < KEYS; ++k) {
            score[k] = warp_sum(score[k]);
            if (first + k >= seen) score[k] = -infinity();
            highest = fmaxf(highest, score[k]);
        }
        const float rescale = fast_exp2((max - highest) * scale);
        max = highest;
        total *= rescale;
#pragma unroll
        for (int i = 0; i < PARTS_PER_LANE; ++i) sum[i] *= rescale;
#pragma unroll
        for (int k = 0; k < KEYS; ++k) {
            const float probability = fast_exp2((score[k] - highest) * scale);
            const act* const value = values + (first + k) * stride;
            total += probability;
#pragma unroll
            for (int i = 0; i < PARTS_PER_LANE; ++i) {
                const int channel = i * WARP + lane;
                if (first + k < seen && channel < HEAD_DIM) sum[i] += probability * to_float(value[channel]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PARTS_PER_LANE; ++i) {
        if (i * WARP + lane < HEAD_DIM) sums[warp][i * WARP + lane] = sum[i];
    }
    if (lane == 0) maxima[warp] = max, totals[warp] = total;
    __syncthreads();

    float highest = -infinity(), all = 0.0f;
    for (int i = 0; i < GROUP; ++i) highest = fmaxf(highest, maxima[i]);
    for (int i = 0; i < GROUP; ++i) all += totals[i] * fast_exp2((maxima[i] - highest) * scale);
    for (int channel = threadIdx.x; channel < HEAD_DIM; channel += 256) {
        float value = 0.0f;
        for (int i = 0; i < GROUP; ++i) value += sums[i][channel] * fast_exp2((maxima[i] - highest) * scale);
        out[((long long)token * heads + head) * HEAD_DIM + channel] = to_act(value / all);
    }
}

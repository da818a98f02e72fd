// Softmax cross-entropy over a vocabulary of any size, one block per row: one pass over the logits for the largest and the sum
// of the exponentials, and one to put the gradient in their place.

#define CE_BLOCK 512
#define LOG2_E 1.4426950408889634f
// Vectors that each thread has under way.
#define CE_LOADS 4
// Below every logit, and small enough to be multiplied.
#define CE_LEAST -1e30f

// Logits wait in registers as they lie in memory.
__device__ __forceinline__ void unpack(const uint4& from, float (&to)[ACT_VECTOR]) {
    const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if ACT_BF16
        to[2 * j] = low_bf16(words[j]);
        to[2 * j + 1] = high_bf16(words[j]);
#else
        to[j] = bits_float(words[j]);
#endif
    }
}

// The largest logit so far and Σ e^(logit − largest).
struct Softmax {
    float largest, sum;

    __device__ __forceinline__ void take(float logit) {
        const float larger = fmaxf(largest, logit);
        sum = sum * fast_exp2((largest - larger) * LOG2_E) + fast_exp2((logit - larger) * LOG2_E);
        largest = larger;
    }

    __device__ __forceinline__ void take(const float (&logits)[ACT_VECTOR]) {
        float larger = largest;
#pragma unroll
        for (int j = 0; j < ACT_VECTOR; j++) larger = fmaxf(larger, logits[j]);
        sum *= fast_exp2((largest - larger) * LOG2_E);
#pragma unroll
        for (int j = 0; j < ACT_VECTOR; j++) sum += fast_exp2((logits[j] - larger) * LOG2_E);
        largest = larger;
    }
};

// losses (rows) = −ln softmax(logits)[target]; with `gradient` (0 or 1), logits (rows, vocabulary) ← scale·(softmax − one-hot).
//
// The first `kept` logits of a row (a multiple of 16) stay in shared memory between the passes; the others are read twice.
// launch: grid rows, block 512, shared kept·sizeof(act): kept the largest multiple of 16 up to the vocabulary with
// kept·sizeof(act) <= 96 KiB (2 blocks to a multiprocessor), or 0 without a gradient
extern "C" __global__ void __launch_bounds__(CE_BLOCK, 2) cross_entropy(
    act* logits, const unsigned* targets, float* losses, int vocabulary, float scale, int gradient, int kept) {
    __shared__ float shared[WARP];
    __shared__ float target_logit;
    DYNAMIC_SHARED(uint4, cache);
    act* row = logits + (long long)blockIdx.x * vocabulary;
    if (threadIdx.x == 0) target_logit = to_float(row[targets[blockIdx.x]]);

    // The row may start anywhere: a head of single logits, vectors, and a tail of single logits.
    int head = (int)((16 - (unsigned long long)row % 16) % 16 / sizeof(act));
    if (head > vocabulary) head = vocabulary;
    const int vectors = (vocabulary - head) / ACT_VECTOR;
    const int tail = head + vectors * ACT_VECTOR;
    const int kept_vectors = kept / ACT_VECTOR;
    const uint4* body = (const uint4*)(row + head);

    Softmax own = {CE_LEAST, 0.0f};
    for (int i = threadIdx.x; i < vectors; i += CE_LOADS * CE_BLOCK) {
        uint4 words[CE_LOADS];
#pragma unroll
        for (int j = 0; j < CE_LOADS; j++)
            if (i + j * CE_BLOCK < vectors) words[j] = body[i + j * CE_BLOCK];
#pragma unroll
        for (int j = 0; j < CE_LOADS; j++) {
            const int vector = i + j * CE_BLOCK;
            if (vector >= vectors) break;
            if (vector < kept_vectors) cache[vector] = words[j];
            float values[ACT_VECTOR];
            unpack(words[j], values);
            own.take(values);
        }
    }
    if (threadIdx.x < head) own.take(to_float(row[threadIdx.x]));
    if (tail + (int)threadIdx.x < vocabulary) own.take(to_float(row[tail + threadIdx.x]));

    const float largest = block_max(own.largest, shared);
    const float sum = block_sum(own.sum * fast_exp2((own.largest - largest) * LOG2_E), shared);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + (largest - target_logit);
    if (!gradient) return;

    const float factor = scale / sum;
    for (int i = threadIdx.x; i < vectors; i += CE_LOADS * CE_BLOCK) {
        uint4 words[CE_LOADS];
#pragma unroll
        for (int j = 0; j < CE_LOADS; j++) {
            const int vector = i + j * CE_BLOCK;
            if (vector < vectors) words[j] = vector < kept_vectors ? cache[vector] : body[vector];
        }
#pragma unroll
        for (int j = 0; j < CE_LOADS; j++) {
            const int vector = i + j * CE_BLOCK;
            if (vector >= vectors) break;
            float values[ACT_VECTOR];
            unpack(words[j], values);
#pragma unroll
            for (int k = 0; k < ACT_VECTOR; k++) values[k] = fast_exp2((values[k] - largest) * LOG2_E) * factor;
            store_global(row + head + (long long)vector * ACT_VECTOR, values);
        }
    }
    if (threadIdx.x < head) {
        const float logit = to_float(row[threadIdx.x]);
        row[threadIdx.x] = to_act(fast_exp2((logit - largest) * LOG2_E) * factor);
    }
    if (tail + (int)threadIdx.x < vocabulary) {
        act* place = row + tail + threadIdx.x;
        *place = to_act(fast_exp2((to_float(*place) - largest) * LOG2_E) * factor);
    }
    __syncthreads();
    if (threadIdx.x == 0) row[targets[blockIdx.x]] = to_act(fast_exp2((target_logit - largest) * LOG2_E) * factor - scale);
}

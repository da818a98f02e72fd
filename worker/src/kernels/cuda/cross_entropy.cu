// Softmax cross-entropy over a vocabulary of any size, one block per row: one pass over the logits for the largest and the sum
// of the exponentials, and one to put the gradient in their place.

#define CE_BLOCK 512
#define LOG2_E 1.4426950408889634f
// Vectors that each thread has under way.
#define CE_LOADS 4
// Below every logit, and small enough to be multiplied.
#define CE_LEAST -1e30f

__device__ __forceinline__ void load_logits(const act* from, float (&to)[ACT_VECTOR]) {
#if ACT_BF16
    load8(from, to);
#else
    load4(from, to);
#endif
}
__device__ __forceinline__ void store_logits(act* to, const float (&from)[ACT_VECTOR]) {
#if ACT_BF16
    store8(to, from);
#else
    store4(to, from);
#endif
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
extern "C" __global__ void __launch_bounds__(CE_BLOCK) cross_entropy(
    act* logits, const unsigned* targets, float* losses, int vocabulary, float scale, int gradient, int kept) {
    __shared__ float shared[WARP];
    DYNAMIC_SHARED(act, cache);
    act* row = logits + (long long)blockIdx.x * vocabulary;
    const unsigned target = targets[blockIdx.x];
    const float target_logit = to_float(row[target]);

    // The row may start anywhere: a head of single logits, vectors, and a tail of single logits.
    int head = (int)((16 - (unsigned long long)row % 16) % 16 / sizeof(act));
    if (head > vocabulary) head = vocabulary;
    const int vectors = (vocabulary - head) / ACT_VECTOR;
    const int tail = head + vectors * ACT_VECTOR;
    const int kept_vectors = kept / ACT_VECTOR;
    act* body = row + head;

    Softmax own = {CE_LEAST, 0.0f};
    for (int i = threadIdx.x; i < vectors; i += CE_LOADS * CE_BLOCK) {
        float values[CE_LOADS][ACT_VECTOR];
#pragma unroll
        for (int j = 0; j < CE_LOADS; j++)
            if (i + j * CE_BLOCK < vectors) load_logits(body + (long long)(i + j * CE_BLOCK) * ACT_VECTOR, values[j]);
#pragma unroll
        for (int j = 0; j < CE_LOADS; j++) {
            const int vector = i + j * CE_BLOCK;
            if (vector >= vectors) break;
            if (vector < kept_vectors) store_logits(cache + vector * ACT_VECTOR, values[j]);
            own.take(values[j]);
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
        float values[CE_LOADS][ACT_VECTOR];
#pragma unroll
        for (int j = 0; j < CE_LOADS; j++) {
            const int vector = i + j * CE_BLOCK;
            if (vector >= vectors) break;
            if (vector < kept_vectors) {
                load_logits(cache + vector * ACT_VECTOR, values[j]);
            } else {
                load_logits(body + (long long)vector * ACT_VECTOR, values[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < CE_LOADS; j++) {
            if (i + j * CE_BLOCK >= vectors) break;
#pragma unroll
            for (int k = 0; k < ACT_VECTOR; k++) values[j][k] = fast_exp2((values[j][k] - largest) * LOG2_E) * factor;
            store_logits(body + (long long)(i + j * CE_BLOCK) * ACT_VECTOR, values[j]);
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
    if (threadIdx.x == 0) row[target] = to_act(fast_exp2((target_logit - largest) * LOG2_E) * factor - scale);
}

// What a worker accumulates and sends, on the device: the twin of core/method and of the selection in common's `sparse`, to the
// bit. Only the entries that are sent cross the bus.
//
// Vectors are flat, like the layout. `tensors` has TENSOR_FIELDS numbers per tensor:
//   offset         its first element in the flat vector
//   len            its elements
//   kept           how many of them are sent; all: without selection
//   first_place    where its values begin among all that are sent: the sum of `kept` before
//   first_index    where its indices begin: the sum of `kept` before, without the tensors that are sent whole
//   first_span     its first span: the sum of ceil(len / SPAN) before
// A span is SPAN elements of one tensor, or what is left of it: ceil(len / SPAN) spans a tensor, in their order, and
// span_tensor says of which tensor each is. A span has SPAN_CHUNKS chunks, in use or not. Selection takes:
//   accumulate_*       counts magnitudes by their upper bits while it has them at hand
//   select_bin         finds the upper bits of each tensor's threshold
//   select_inside      looks at all elements: counts what is above, keeps what has these upper bits, counts their middle bits
//   select_bin         finds the middle bits
//   select_last        counts the lower bits of what has these upper and middle ones
//   select_bin         finds the lower bits: the threshold, and how many of the elements that equal it are sent
//   select_count       how many elements of each chunk are sent
//   select_scan        how many of its tensor's entries come before each chunk
//   select_write       looks at all elements again, and writes indices and values in order
// `histograms` (tensors, BINS) is zero before and after.

#define TENSOR_FIELDS 6
#define BLOCK 256
// Each thread has so many groups of 4 neighbouring elements of a chunk.
#define GROUPS 8
#define CHUNK (BLOCK * GROUPS * 4)
#define SPAN_CHUNKS 16
#define SPAN ((long long)CHUNK * SPAN_CHUNKS)
// A warp's part of a chunk is contiguous, so that the order of elements is that of warps, then groups, then lanes.
#define WARP_PART (WARP * GROUPS * 4)

#define BINS 2048
#define UPPER_SHIFT 20
#define MIDDLE_SHIFT 10
#define LOWER_BINS 1024
// Room per chunk for the elements that have the threshold's upper bits; a chunk with more is looked at again.
#define LIST 128

struct Tensor {
    long long offset, len, kept, first_place, first_index, first_span;
};

__device__ __forceinline__ Tensor tensor_at(const long long* tensors, int tensor) {
    const long long* row = tensors + (long long)tensor * TENSOR_FIELDS;
    return Tensor{row[0], row[1], row[2], row[3], row[4], row[5]};
}

// What select_bin knows of a tensor.
struct Threshold {
    // The bits of the threshold that are known.
    unsigned bits;
    // It is the rank-th largest of the elements that have these bits,
    unsigned rank;
    // of which there are so many.
    unsigned inside;
    unsigned unused;
};

// Orders magnitudes as integers, like the CPU: infinity and NaN above all others.
__device__ __forceinline__ unsigned magnitude(float value) { return float_bits(value) & 0x7fffffffu; }

// Arithmetic that is rounded after every operation, as on the CPU: no multiply-adds.
#ifdef SANDERLING_EMULATE
__device__ __forceinline__ float times(float a, float b) { return a * b; }
__device__ __forceinline__ float plus(float a, float b) { return a + b; }
__device__ __forceinline__ float minus(float a, float b) { return a - b; }
__device__ __forceinline__ float over(float a, float b) { return a / b; }
__device__ __forceinline__ float root(float a) { return sqrtf(a); }
#else
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float minus(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float over(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
#endif

// Four neighbouring elements, of which `valid` exist (any number, negative ones included); zeros for the others.
template <typename Count>
__device__ __forceinline__ void load_group(const float* from, Count valid, bool vectors, float (&to)[4]) {
    if (vectors && valid >= 4) {
        load4(from, to);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) to[j] = j < valid ? from[j] : 0.0f;
    }
}
template <typename Count>
__device__ __forceinline__ void store_group(float* to, Count valid, bool vectors, const float (&from)[4]) {
    if (vectors && valid >= 4) {
        store4(to, from);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (j < valid) to[j] = from[j];
    }
}

// Where a thread's group of a chunk begins.
__device__ __forceinline__ int group_start(int group) {
    return threadIdx.x / WARP * WARP_PART + group * WARP * 4 + threadIdx.x % WARP * 4;
}

// The sum over the lanes before this one.
__device__ __forceinline__ unsigned warp_sum_before(unsigned value) {
    unsigned sum = value;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const unsigned other = __shfl_up_sync(FULL_WARP, sum, offset);
        if ((int)(threadIdx.x % WARP) >= offset) sum += other;
    }
    return sum - value;
}

// ---- Clipping ----

// partials[block] = the sum of squares of the block's share of the values, in double, which no floats overflow: it is
// finite just when all of them are. sum_total (pointwise.cu) adds them up.
// launch: grid G = min(1024, max(1, ceil(len / 8192))), block 256, shared 0, scratch G doubles: partials
extern "C" __global__ void __launch_bounds__(BLOCK) squares_parts(const float* values, long long len, double* partials) {
    __shared__ double shared[WARP];
    double sum = 0.0;
    const long long stride = (long long)gridDim.x * (BLOCK * 8);
    const bool vectors = aligned(values, 16);
    for (long long start = (long long)blockIdx.x * (BLOCK * 8) + 4 * threadIdx.x; start < len; start += stride) {
        float groups[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) load_group(values + start + i * BLOCK * 4, len - start - i * BLOCK * 4, vectors, groups[i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) sum += (double)groups[i][j] * (double)groups[i][j];
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// ---- Accumulating ----

// Calls `step` with the flat index of each group of 4, how many of its elements exist, and whether it lies as vectors do; `step`
// returns the elements that are selected from, whose upper bits are counted if `histograms` is not null. Zeros are not:
// select_bin knows how many there must be.
template <typename Step>
__device__ __forceinline__ void accumulate(
    const long long* tensors, const int* span_tensor, unsigned* histograms, bool bases_aligned, Step step) {
    __shared__ unsigned counts[BINS];
    const int index = span_tensor[blockIdx.x];
    const Tensor tensor = tensor_at(tensors, index);
    const bool counting = histograms != nullptr && tensor.kept < tensor.len;
    if (counting) {
        for (int i = threadIdx.x; i < BINS; i += BLOCK) counts[i] = 0;
        __syncthreads();
    }
    const long long first = (blockIdx.x - tensor.first_span) * SPAN;
    const bool vectors = bases_aligned && tensor.offset % 4 == 0;
    const long long end = first + SPAN < tensor.len ? first + SPAN : tensor.len;
#pragma unroll 2
    for (long long i = first + 4 * threadIdx.x; i < end; i += BLOCK * 4) {
        float values[4];
        step(tensor.offset + i, tensor.len - i, vectors, values);
        if (counting) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned key = magnitude(values[j]);
                if (i + j < tensor.len && key != 0) atomicAdd(&counts[key >> UPPER_SHIFT], 1u);
            }
        }
    }
    if (!counting) return;
    __syncthreads();
    unsigned* histogram = histograms + (long long)index * BINS;
    for (int i = threadIdx.x; i < BINS; i += BLOCK)
        if (counts[i] != 0) atomicAdd(&histogram[i], counts[i]);
}

// d = scale·∇ + λ·θ of a group. Without weight decay θ is not read.
__device__ __forceinline__ void load_direction(
    const float* gradient,
    const float* theta,
    float scale,
    float weight_decay,
    long long at,
    long long valid,
    bool vectors,
    float (&d)[4]) {
    load_group(gradient + at, valid, vectors, d);
#pragma unroll
    for (int j = 0; j < 4; j++) d[j] = times(scale, d[j]);
    if (weight_decay != 0.0f) {
        float parameters[4];
        load_group(theta + at, valid, vectors, parameters);
#pragma unroll
        for (int j = 0; j < 4; j++) d[j] = plus(d[j], times(weight_decay, parameters[j]));
    }
}

// SAMomentum and what is made of it: u += η·d. theta may be null without weight decay. histograms is null if nothing
// is selected.
// launch: grid spans, block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK) accumulate_momentum(
    const long long* tensors,
    const int* span_tensor,
    unsigned* histograms,
    const float* gradient,
    const float* theta,
    float* u,
    float scale,
    float weight_decay,
    float rate) {
    const bool bases_aligned = aligned(gradient, 16) && aligned(theta, 16) && aligned(u, 16);
    accumulate(
        tensors, span_tensor, histograms, bases_aligned, [&](long long at, long long valid, bool vectors, float(&sums)[4]) {
            float d[4];
            load_group(u + at, valid, vectors, sums);
            load_direction(gradient, theta, scale, weight_decay, at, valid, vectors, d);
#pragma unroll
            for (int j = 0; j < 4; j++) sums[j] = plus(sums[j], times(rate, d[j]));
            store_group(u + at, valid, vectors, sums);
        });
}

// Deep gradient compression: u = m·u + d, r += u; selection is from r.
// launch: grid spans, block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK) accumulate_dgc(
    const long long* tensors,
    const int* span_tensor,
    unsigned* histograms,
    const float* gradient,
    const float* theta,
    float* u,
    float* r,
    float scale,
    float weight_decay,
    float momentum) {
    const bool bases_aligned = aligned(gradient, 16) && aligned(theta, 16) && aligned(u, 16) && aligned(r, 16);
    accumulate(
        tensors, span_tensor, histograms, bases_aligned, [&](long long at, long long valid, bool vectors, float(&sums)[4]) {
            float d[4], velocities[4];
            load_group(u + at, valid, vectors, velocities);
            load_group(r + at, valid, vectors, sums);
            load_direction(gradient, theta, scale, weight_decay, at, valid, vectors, d);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                velocities[j] = plus(times(momentum, velocities[j]), d[j]);
                sums[j] = plus(sums[j], velocities[j]);
            }
            store_group(u + at, valid, vectors, velocities);
            store_group(r + at, valid, vectors, sums);
        });
}

// dgs-adam: v = β2·v + (1 − β2)·∇²; u += η_l·(∇ / (√(v·correction) + ε) + λ·θ), with ∇ = scale · gradient and
// correction = 1 / (1 − β2^c).
// launch: grid spans, block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK) accumulate_adam(
    const long long* tensors,
    const int* span_tensor,
    unsigned* histograms,
    const float* gradient,
    const float* theta,
    float* u,
    float* v,
    float scale,
    float weight_decay,
    float local_rate,
    float beta2,
    float correction,
    float epsilon) {
    const bool bases_aligned = aligned(gradient, 16) && aligned(theta, 16) && aligned(u, 16) && aligned(v, 16);
    const float share = minus(1.0f, beta2);
    accumulate(
        tensors, span_tensor, histograms, bases_aligned, [&](long long at, long long valid, bool vectors, float(&sums)[4]) {
            float d[4], squares[4];
            load_group(u + at, valid, vectors, sums);
            load_group(v + at, valid, vectors, squares);
            load_direction(gradient, nullptr, scale, 0.0f, at, valid, vectors, d);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                squares[j] = plus(times(beta2, squares[j]), times(share, times(d[j], d[j])));
                d[j] = over(d[j], plus(root(times(squares[j], correction)), epsilon));
            }
            if (weight_decay != 0.0f) {
                float parameters[4];
                load_group(theta + at, valid, vectors, parameters);
#pragma unroll
                for (int j = 0; j < 4; j++) d[j] = plus(d[j], times(weight_decay, parameters[j]));
            }
#pragma unroll
            for (int j = 0; j < 4; j++) sums[j] = plus(sums[j], times(local_rate, d[j]));
            store_group(v + at, valid, vectors, squares);
            store_group(u + at, valid, vectors, sums);
        });
}

// ---- The threshold ----

// Finds the bin of each tensor's threshold among those counted, for the bits from `shift` on (UPPER_SHIFT, MIDDLE_SHIFT, then 0),
// and empties the histogram. Zeros were not counted: they are what is missing.
// launch: grid tensors, block 256, shared 0, scratch 4·tensors unsigned: thresholds
extern "C" __global__ void __launch_bounds__(BLOCK) select_bin(
    const long long* tensors, unsigned* histograms, unsigned* thresholds, int shift) {
    __shared__ unsigned sums[BLOCK / WARP];
    const Tensor tensor = tensor_at(tensors, blockIdx.x);
    Threshold* place = (Threshold*)thresholds + blockIdx.x;
    if (tensor.kept >= tensor.len) return;
    const Threshold known =
        shift == UPPER_SHIFT ? Threshold{0, (unsigned)tensor.kept, (unsigned)tensor.len, 0} : *place;
    unsigned* histogram = histograms + (long long)blockIdx.x * BINS;
    // From the largest bin down; each thread has neighbouring ones.
    const int mine = BINS / BLOCK;
    const int top = BINS - 1 - threadIdx.x * mine;
    unsigned counts[BINS / BLOCK], own = 0;
#pragma unroll
    for (int i = 0; i < mine; i++) {
        counts[i] = histogram[top - i];
        histogram[top - i] = 0;
        own += counts[i];
    }
    const int warp = threadIdx.x / WARP;
    unsigned before = warp_sum_before(own);
    if (threadIdx.x % WARP == WARP - 1) sums[warp] = before + own;
    __syncthreads();
    for (int i = 0; i < warp; i++) before += sums[i];
    if (threadIdx.x == BLOCK - 1) {
        // The last bin is that of zero, and has what was not counted.
        const unsigned missing = known.inside - (before + own);
        counts[mine - 1] += known.bits == 0 ? missing : 0;
        own += known.bits == 0 ? missing : 0;
    }
    if (before >= known.rank || before + own < known.rank) return;
#pragma unroll
    for (int i = 0; i < mine; i++) {
        if (before < known.rank && before + counts[i] >= known.rank)
            *place = Threshold{known.bits | (unsigned)(top - i) << shift, known.rank - before, counts[i], 0};
        before += counts[i];
    }
}

// A tensor's chunk that a block or warp looks at: `size` elements (0: there is no such chunk) from the tensor's element `first` on.
struct Chunk {
    long long first;
    int size;
    // Its place among the chunks of all tensors.
    long long place;
};

__device__ __forceinline__ Chunk chunk_at(const Tensor& tensor, int chunk) {
    const long long first = (blockIdx.x - tensor.first_span) * SPAN + (long long)chunk * CHUNK;
    const long long left = tensor.len - first;
    const int size = left < CHUNK ? left < 0 ? 0 : (int)left : CHUNK;
    return Chunk{first, size, (long long)blockIdx.x * SPAN_CHUNKS + chunk};
}

// Counts each chunk's elements above those with the threshold's upper bits, and those with these (zeros not counted), whose
// other bits go to the chunk's list, in any order, as far as there is room; and counts their middle bits.
// launch: grid spans, block 256, shared 0,
// scratch spans·16 unsigned: above, as many: inside, and spans·16·128 unsigned: lists
extern "C" __global__ void __launch_bounds__(BLOCK) select_inside(
    const long long* tensors,
    const int* span_tensor,
    const float* values,
    unsigned* histograms,
    const unsigned* thresholds,
    unsigned* above,
    unsigned* inside,
    unsigned* lists) {
    __shared__ unsigned counts[LOWER_BINS];
    __shared__ unsigned listed;
    __shared__ unsigned sums[WARP];
    const int index = span_tensor[blockIdx.x];
    const Tensor tensor = tensor_at(tensors, index);
    if (tensor.kept >= tensor.len) return;
    for (int i = threadIdx.x; i < LOWER_BINS; i += BLOCK) counts[i] = 0;
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    const unsigned upper = ((const Threshold*)thresholds)[index].bits >> UPPER_SHIFT;
    values += tensor.offset;
    const bool vectors = aligned(values, 16);
    for (int number = 0; number < SPAN_CHUNKS; number++) {
        const Chunk chunk = chunk_at(tensor, number);
        if (chunk.size == 0) break;
        float groups[GROUPS][4];
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
            load_group(values + chunk.first + group_start(i), chunk.size - group_start(i), vectors, groups[i]);
        unsigned mine = 0;
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned key = magnitude(groups[i][j]);
                mine += key >> UPPER_SHIFT > upper;
                if (key >> UPPER_SHIFT == upper && key != 0) {
                    const unsigned rest = key & ((1u << UPPER_SHIFT) - 1);
                    atomicAdd(&counts[rest >> MIDDLE_SHIFT], 1u);
                    const unsigned place = atomicAdd(&listed, 1u);
                    if (place < LIST) lists[chunk.place * LIST + place] = rest;
                }
            }
        }
        mine = block_sum(mine, sums);
        if (threadIdx.x == 0) {
            above[chunk.place] = mine;
            inside[chunk.place] = listed;
            listed = 0;
        }
        __syncthreads();
    }
    unsigned* histogram = histograms + (long long)index * BINS;
    for (int i = threadIdx.x; i < LOWER_BINS; i += BLOCK)
        if (counts[i] != 0) atomicAdd(&histogram[i], counts[i]);
}

// Calls `take` with the lower UPPER_SHIFT bits of each element of a chunk that is not zero and has the threshold's upper bits,
// from its list or, if that was too short, from the elements. A warp works together.
template <typename Take>
__device__ __forceinline__ void for_each_inside(
    const float* values, const Chunk& chunk, unsigned upper, unsigned inside, const unsigned* lists, Take take) {
    const int lane = threadIdx.x % WARP;
    if (inside <= LIST) {
        for (unsigned i = lane; i < inside; i += WARP) take(lists[chunk.place * LIST + i]);
        return;
    }
#pragma unroll 8
    for (int i = lane; i < chunk.size; i += WARP) {
        const unsigned key = magnitude(values[chunk.first + i]);
        if (key >> UPPER_SHIFT == upper && key != 0) take(key & ((1u << UPPER_SHIFT) - 1));
    }
}

// Counts the lower bits of the elements that have the threshold's upper and middle bits.
// launch: grid spans, block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK) select_last(
    const long long* tensors,
    const int* span_tensor,
    const float* values,
    unsigned* histograms,
    const unsigned* thresholds,
    const unsigned* inside,
    const unsigned* lists) {
    __shared__ unsigned counts[LOWER_BINS];
    const int index = span_tensor[blockIdx.x];
    const Tensor tensor = tensor_at(tensors, index);
    if (tensor.kept >= tensor.len) return;
    for (int i = threadIdx.x; i < LOWER_BINS; i += BLOCK) counts[i] = 0;
    __syncthreads();
    const unsigned bits = ((const Threshold*)thresholds)[index].bits;
    const unsigned middle = bits >> MIDDLE_SHIFT & (LOWER_BINS - 1);
    for (int number = threadIdx.x / WARP; number < SPAN_CHUNKS; number += BLOCK / WARP) {
        const Chunk chunk = chunk_at(tensor, number);
        if (chunk.size == 0) break;
        for_each_inside(
            values + tensor.offset, chunk, bits >> UPPER_SHIFT, inside[chunk.place], lists, [&](unsigned rest) {
                if (rest >> MIDDLE_SHIFT == middle) atomicAdd(&counts[rest & (LOWER_BINS - 1)], 1u);
            });
    }
    __syncthreads();
    unsigned* histogram = histograms + (long long)index * BINS;
    for (int i = threadIdx.x; i < LOWER_BINS; i += BLOCK)
        if (counts[i] != 0) atomicAdd(&histogram[i], counts[i]);
}

// ---- Compaction ----

// Of each chunk: above become the elements above the threshold, and inside those that equal it, zeros included.
// launch: grid spans, block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK) select_count(
    const long long* tensors,
    const int* span_tensor,
    const float* values,
    const unsigned* thresholds,
    unsigned* above,
    unsigned* inside,
    const unsigned* lists) {
    const int index = span_tensor[blockIdx.x];
    const Tensor tensor = tensor_at(tensors, index);
    if (tensor.kept >= tensor.len) return;
    const unsigned bits = ((const Threshold*)thresholds)[index].bits;
    const unsigned rest_of_threshold = bits & ((1u << UPPER_SHIFT) - 1);
    for (int number = threadIdx.x / WARP; number < SPAN_CHUNKS; number += BLOCK / WARP) {
        const Chunk chunk = chunk_at(tensor, number);
        if (chunk.size == 0) break;
        unsigned larger = 0, equal = 0;
        for_each_inside(
            values + tensor.offset, chunk, bits >> UPPER_SHIFT, inside[chunk.place], lists, [&](unsigned rest) {
                larger += rest > rest_of_threshold;
                equal += rest == rest_of_threshold;
            });
        larger = warp_sum(larger);
        equal = warp_sum(equal);
        if (threadIdx.x % WARP == 0) {
            const unsigned all_above = above[chunk.place] + larger;
            above[chunk.place] = all_above;
            inside[chunk.place] = bits == 0 ? (unsigned)chunk.size - all_above : equal;
        }
    }
}

#define SCAN_BLOCK 1024

// Of the chunks of the same tensor before each one: above becomes how many elements are sent, and inside how many equal the
// threshold.
// launch: grid tensors, block 1024, shared 0
extern "C" __global__ void __launch_bounds__(SCAN_BLOCK) select_scan(
    const long long* tensors, const unsigned* thresholds, unsigned* above, unsigned* inside) {
    __shared__ unsigned sums[2][SCAN_BLOCK / WARP];
    const Tensor tensor = tensor_at(tensors, blockIdx.x);
    if (tensor.kept >= tensor.len) return;
    const unsigned ties = ((const Threshold*)thresholds)[blockIdx.x].rank;
    const long long first = tensor.first_span * SPAN_CHUNKS;
    const long long chunks = (tensor.len + CHUNK - 1) / CHUNK;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // Numbers of elements of one tensor, which 32 bits hold.
    unsigned above_before = 0, equal_before = 0;
    for (long long start = 0; start < chunks; start += SCAN_BLOCK) {
        const long long chunk = start + threadIdx.x;
        const unsigned own_above = chunk < chunks ? above[first + chunk] : 0;
        const unsigned own_equal = chunk < chunks ? inside[first + chunk] : 0;
        unsigned lane_above = warp_sum_before(own_above);
        unsigned lane_equal = warp_sum_before(own_equal);
        if (lane == WARP - 1) {
            sums[0][warp] = lane_above + own_above;
            sums[1][warp] = lane_equal + own_equal;
        }
        __syncthreads();
        // All warps' sums are added up by each warp.
        const unsigned warp_above = sums[0][lane], warp_equal = sums[1][lane];
        const unsigned warps_above = warp_sum_before(warp_above);
        const unsigned warps_equal = warp_sum_before(warp_equal);
        lane_above += above_before + __shfl_sync(FULL_WARP, warps_above, warp);
        lane_equal += equal_before + __shfl_sync(FULL_WARP, warps_equal, warp);
        if (chunk < chunks) {
            inside[first + chunk] = lane_equal;
            above[first + chunk] = lane_above + (lane_equal < ties ? lane_equal : ties);
        }
        above_before += __shfl_sync(FULL_WARP, warps_above + warp_above, WARP - 1);
        equal_before += __shfl_sync(FULL_WARP, warps_equal + warp_equal, WARP - 1);
        __syncthreads();
    }
}

// The bits of `flags` that belong to a group.
__device__ __forceinline__ unsigned nibble(unsigned flags, int group) { return flags >> (4 * group) & 15u; }

// Calls `take` with each flag of the warp's part of a chunk, as its group and place in it, and its number in order from `number`
// on. All lanes take part.
template <typename Take>
__device__ __forceinline__ void for_each_flag(unsigned flags, unsigned number, Take take) {
    const unsigned below = (1u << threadIdx.x % WARP) - 1;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const unsigned own = nibble(flags, i);
        unsigned before = 0, all = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const unsigned lanes = __ballot_sync(FULL_WARP, own >> j & 1);
            before += __popc(lanes & below);
            all += __popc(lanes);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (own >> j & 1) take(i, j, number + before++);
        number += all;
    }
}

// The sum over the warps before this one, and of all.
__device__ __forceinline__ unsigned warps_sum_before(unsigned value, unsigned* shared) {
    const unsigned sum = warp_sum(value);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = sum;
    __syncthreads();
    unsigned before = 0;
    for (int i = 0; i < (int)(threadIdx.x / WARP); i++) before += shared[i];
    return before;
}

// Writes the entries that are sent, per tensor in the order of indices: `indices`, relative to the tensor, and values.
// Tensors that are sent whole have values only. sent_before and equal_before are what select_scan left in above and inside.
// launch: grid spans, block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK) select_write(
    const long long* tensors,
    const int* span_tensor,
    const float* values,
    const unsigned* thresholds,
    const unsigned* sent_before,
    const unsigned* equal_before,
    unsigned* indices,
    float* sent) {
    __shared__ unsigned shared[3][BLOCK / WARP];
    const int index = span_tensor[blockIdx.x];
    const Tensor tensor = tensor_at(tensors, index);
    const bool whole = tensor.kept >= tensor.len;
    const Threshold threshold = whole ? Threshold{0, 0, 0, 0} : ((const Threshold*)thresholds)[index];
    values += tensor.offset;
    const bool vectors = aligned(values, 16);
    for (int number = 0; number < SPAN_CHUNKS; number++) {
        const Chunk chunk = chunk_at(tensor, number);
        if (chunk.size == 0) break;
        float groups[GROUPS][4];
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
            load_group(values + chunk.first + group_start(i), chunk.size - group_start(i), vectors, groups[i]);
        if (whole) {
            float* to = sent + tensor.first_place + chunk.first;
            const bool aligned_vectors = aligned(to, 16);
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                store_group(to + group_start(i), chunk.size - group_start(i), aligned_vectors, groups[i]);
            continue;
        }
        unsigned taken = 0, equal = 0;
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned key = magnitude(groups[i][j]);
                const unsigned bit = group_start(i) + j < chunk.size ? 1u << (4 * i + j) : 0;
                taken |= key > threshold.bits ? bit : 0;
                equal |= key == threshold.bits ? bit : 0;
            }
        }
        // Of those that equal the threshold the first `rank` of the tensor are taken.
        const unsigned before_chunk = equal_before[chunk.place];
        if (before_chunk < threshold.rank) {
            const unsigned before = before_chunk + warps_sum_before(__popc(equal), shared[0]);
            for_each_flag(equal, before, [&](int i, int j, unsigned number) {
                taken |= number < threshold.rank ? 1u << (4 * i + j) : 0;
            });
        }
        // Which of the two rows are in use alternates, so that one barrier a chunk is enough.
        const unsigned before = sent_before[chunk.place] + warps_sum_before(__popc(taken), shared[1 + number % 2]);
        for_each_flag(taken, before, [&](int i, int j, unsigned place) {
            indices[tensor.first_index + place] = (unsigned)(chunk.first + group_start(i) + j);
            sent[tensor.first_place + place] = groups[i][j];
        });
    }
}

// ---- Entries ----
//
// Entries have the form that select_write gives them. Here `tensors` may be the table of any update: kept is its number of
// entries of each tensor (all of them, without indices, where that is len), and first_span is not read. `places` is the sum
// of kept. An element has one entry at most.

#define ENTRY_LOADS 4

// The tensor that an entry belongs to: the last one that begins at it or before.
__device__ __forceinline__ int tensor_of(const long long* tensors, int count, long long place) {
    int first = 0, last = count - 1;
    while (first < last) {
        const int middle = (first + last + 1) / 2;
        if (tensors[(long long)middle * TENSOR_FIELDS + 3] <= place) {
            first = middle;
        } else {
            last = middle - 1;
        }
    }
    return first;
}

// Calls `take` with the place of each of the block's values, and the flat index of its element.
template <typename Take>
__device__ __forceinline__ void for_each_entry(
    const long long* tensors, int count, long long places, const unsigned* indices, Take take) {
    Tensor tensor = {0, 0, 0, 0, 0, 0};
    for (int i = 0; i < ENTRY_LOADS; i++) {
        const long long place = ((long long)blockIdx.x * ENTRY_LOADS + i) * BLOCK + threadIdx.x;
        if (place >= places) return;
        if (place >= tensor.first_place + tensor.kept) tensor = tensor_at(tensors, tensor_of(tensors, count, place));
        const long long entry = place - tensor.first_place;
        take(place, tensor.offset + (tensor.kept < tensor.len ? indices[tensor.first_index + entry] : entry));
    }
}

// target += factor · value. shadow is null, or gets the new values rounded to activations; not_finite is null, or becomes 1
// if one of them is not finite.
// launch: grid ceil(places / 1024), block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK) entries_add(
    const long long* tensors,
    int count,
    long long places,
    const unsigned* indices,
    const float* values,
    float factor,
    float* target,
    act* shadow,
    int* not_finite) {
    for_each_entry(tensors, count, places, indices, [&](long long place, long long at) {
        const float sum = plus(target[at], times(factor, values[place]));
        target[at] = sum;
        if (shadow != nullptr) shadow[at] = to_act(sum);
        if (not_finite != nullptr && magnitude(sum) >= 0x7f800000u) *not_finite = 1;
    });
}

// target = 0 where something is sent.
// launch: grid ceil(places / 1024), block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK) entries_zero(
    const long long* tensors, int count, long long places, const unsigned* indices, float* target) {
    for_each_entry(tensors, count, places, indices, [&](long long, long long at) { target[at] = 0.0f; });
}

// ---- The local view ----

#define VIEW_LOADS 4

// view = θ − u. shadow is null, or gets the view rounded to activations.
// launch: grid ceil(len / 4096), block 256, shared 0
extern "C" __global__ void __launch_bounds__(BLOCK)
    local_view(const float* theta, const float* u, float* view, act* shadow, long long len) {
    const bool vectors = aligned(theta, 16) && aligned(u, 16) && aligned(view, 16);
    const bool shadow_vectors = aligned(shadow, 4 * sizeof(act));
    const long long first = (long long)blockIdx.x * (BLOCK * 4 * VIEW_LOADS) + 4 * threadIdx.x;
    float parameters[VIEW_LOADS][4], unsent[VIEW_LOADS][4];
#pragma unroll
    for (int i = 0; i < VIEW_LOADS; i++) {
        const long long at = first + i * BLOCK * 4;
        load_group(theta + at, len - at, vectors, parameters[i]);
        load_group(u + at, len - at, vectors, unsent[i]);
    }
#pragma unroll
    for (int i = 0; i < VIEW_LOADS; i++) {
        const long long at = first + i * BLOCK * 4;
#pragma unroll
        for (int j = 0; j < 4; j++) parameters[i][j] = minus(parameters[i][j], unsent[i][j]);
        store_group(view + at, len - at, vectors, parameters[i]);
        if (shadow == nullptr) continue;
        if (shadow_vectors && len - at >= 4) {
            store4(shadow + at, parameters[i]);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (j < len - at) shadow[at + j] = to_act(parameters[i][j]);
        }
    }
}

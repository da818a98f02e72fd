// Routing: probabilities, choices, and the sorting of choices by expert; its backward pass and statistics; tokens into the
// order of slots and back.
//
// A choice (row·top_k + j) is a token's jth expert, best first. Slots are the same sorted by expert, within an expert by token;
// starts (E + 1) says which are whose. Choices that were dropped have places after all slots, with the weight that they
// would have had: the softmax's gradient needs it. Nothing here waits for the host, and no result depends on the order in
// which blocks run: counting is by integers, and each block's first slots come from a scan of all blocks' counts.
//
// All of route: route_choose, route_scan, and without a capacity route_slots, with one route_candidates and route_limit.

// The most experts: the host refuses a model with more.
#define EXPERTS_MAX 256
#define EXPERTS_PER_LANE (EXPERTS_MAX / WARP)

// Tokens whose choices one block counts and places.
#define ROUTE_ROWS 128
#define ROUTE_BLOCK 256
#define MASK_WORDS (ROUTE_ROWS / 32)

// A token is dealt with by so many neighbouring lanes: a power of two, so that warps hold whole tokens.
__device__ __forceinline__ int lanes_per_row(int experts) {
    int lanes = 1;
    while (lanes < experts && lanes < WARP) lanes *= 2;
    return lanes;
}

__device__ __forceinline__ float group_sum(float value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}
__device__ __forceinline__ float group_max(float value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, offset));
    return value;
}
__device__ __forceinline__ unsigned long long group_max(unsigned long long value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
        const unsigned long long other = __shfl_xor_sync(FULL_WARP, value, offset);
        value = other > value ? other : value;
    }
    return value;
}

// Integers in the order of floats: what is not a number below all others, and both zeros the same.
__device__ __forceinline__ unsigned ordered(float value) {
    if (value != value) return 0;
    if (value == 0.0f) return 0x80000000u;
    const unsigned bits = float_bits(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The sum over the threads before this one; `total` becomes that of all. `shared` has room for 33, and may be used again at
// once.
template <typename T>
__device__ __forceinline__ T block_sum_before(T value, T* shared, T& total) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    T sum = value;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const T other = __shfl_up_sync(FULL_WARP, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == WARP - 1) shared[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        const T own = lane < warps ? shared[lane] : T(0);
        T before = own;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const T other = __shfl_up_sync(FULL_WARP, before, offset);
            if (lane >= offset) before += other;
        }
        if (lane < warps) shared[lane] = before - own;
        if (lane == WARP - 1) shared[WARP] = before;
    }
    __syncthreads();
    const T before = shared[warp] + sum - value;
    total = shared[WARP];
    __syncthreads();
    return before;
}

// ---- Choosing ----

template <int ITEMS>
__device__ __forceinline__ void choose(
    const float* logits, float* probabilities, int* chosen, int* counts, int rows, int experts, int top_k) {
    const int lanes = lanes_per_row(experts);
    const int lane = threadIdx.x % lanes;
    const int first = blockIdx.x * ROUTE_ROWS;
    const int end = first + ROUTE_ROWS < rows ? first + ROUTE_ROWS : rows;
    for (int start = first; start < end; start += ROUTE_BLOCK / lanes) {
        const int row = start + threadIdx.x / lanes;
        const bool valid = row < end;
        const long long place = (long long)row * experts + lane;
        float values[ITEMS];
        unsigned long long keys[ITEMS];
        float largest = -infinity();
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int expert = lane + i * lanes;
            const bool exists = valid && expert < experts;
            values[i] = exists ? logits[place + i * lanes] : -infinity();
            // The larger logit is the larger key, and of equals the lower index.
            keys[i] = exists ? (unsigned long long)ordered(values[i]) << 32 | (FULL_WARP - expert) : 0;
            largest = fmaxf(largest, values[i]);
        }
        largest = group_max(largest, lanes);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            values[i] = lane + i * lanes < experts ? expf(values[i] - largest) : 0.0f;
            sum += values[i];
        }
        const float scale = 1.0f / group_sum(sum, lanes);
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (valid && lane + i * lanes < experts) probabilities[place + i * lanes] = values[i] * scale;
        for (int j = 0; j < top_k; j++) {
            unsigned long long best = 0;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) best = keys[i] > best ? keys[i] : best;
            best = group_max(best, lanes);
#pragma unroll
            for (int i = 0; i < ITEMS; i++)
                if (keys[i] == best) keys[i] = 0;
            if (valid && lane == 0) {
                const int expert = (int)(FULL_WARP - (unsigned)best);
                chosen[(long long)row * top_k + j] = expert;
                atomicAdd(&counts[expert], 1);
            }
        }
    }
}

// Softmax over all experts, and the top_k logits of each token, best first, ties to the lower index. block_counts
// (experts, blocks) says how many of each block's tokens chose each expert.
// launch: grid B = ceil(rows / 128), block 256, shared 0, scratch experts·B ints: block_counts
extern "C" __global__ void __launch_bounds__(ROUTE_BLOCK) route_choose(
    const float* logits, float* probabilities, int* chosen, int* block_counts, int rows, int experts, int top_k) {
    __shared__ int counts[EXPERTS_MAX];
    for (int expert = threadIdx.x; expert < experts; expert += ROUTE_BLOCK) counts[expert] = 0;
    __syncthreads();
    if (experts <= WARP) {
        choose<1>(logits, probabilities, chosen, counts, rows, experts, top_k);
    } else {
        choose<EXPERTS_PER_LANE>(logits, probabilities, chosen, counts, rows, experts, top_k);
    }
    __syncthreads();
    for (int expert = threadIdx.x; expert < experts; expert += ROUTE_BLOCK)
        block_counts[(long long)expert * gridDim.x + blockIdx.x] = counts[expert];
}

// counts (experts) = the tokens that chose each expert, and block_counts become those of the blocks before.
// launch: grid experts, block 256, shared 0
extern "C" __global__ void __launch_bounds__(256) route_scan(int* block_counts, int* counts, int blocks) {
    __shared__ int shared[WARP + 1];
    block_counts += (long long)blockIdx.x * blocks;
    int sum = 0;
    for (int start = 0; start < blocks; start += 256) {
        const int i = start + threadIdx.x;
        int total;
        const int before = block_sum_before(i < blocks ? block_counts[i] : 0, shared, total);
        if (i < blocks) block_counts[i] = sum + before;
        sum += total;
    }
    if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

// ---- Slots ----

// What a chosen probability is multiplied with: 1 for a softmax over all, and for one over the chosen, which is that over
// all, renormalised, 1 / Σ of their probabilities.
__device__ __forceinline__ float weight_scale(
    const float* probabilities, const int* chosen, long long row, int experts, int top_k, int softmax_first) {
    if (softmax_first) return 1.0f;
    float sum = 0.0f;
    for (int j = 0; j < top_k; j++) sum += probabilities[row * experts + chosen[row * top_k + j]];
    return 1.0f / sum;
}

// Calls `take` with each of the block's choices, its token, its expert and its place among all choices by expert.
template <typename Take>
__device__ __forceinline__ void for_each_place(
    const int* chosen, const int* block_counts, const int* counts, int* starts, int rows, int experts, int top_k, Take take) {
    // Which of the block's tokens chose each expert.
    __shared__ unsigned masks[EXPERTS_MAX * MASK_WORDS];
    __shared__ int firsts[EXPERTS_MAX];
    __shared__ int shared[WARP + 1];
    for (int i = threadIdx.x; i < experts * MASK_WORDS; i += ROUTE_BLOCK) masks[i] = 0;
    // EXPERTS_MAX is the size of the block.
    const int expert = threadIdx.x;
    int slots;
    const int before = block_sum_before(expert < experts ? counts[expert] : 0, shared, slots);
    if (expert < experts) {
        firsts[expert] = before + block_counts[(long long)expert * gridDim.x + blockIdx.x];
        if (blockIdx.x == 0 && starts != nullptr) starts[expert] = before;
    }
    if (blockIdx.x == 0 && starts != nullptr && expert == 0) starts[experts] = slots;
    __syncthreads();
    const int first = blockIdx.x * ROUTE_ROWS;
    const int tokens = first + ROUTE_ROWS < rows ? ROUTE_ROWS : rows - first;
    const long long first_choice = (long long)first * top_k;
    for (int i = threadIdx.x; i < tokens * top_k; i += ROUTE_BLOCK) {
        const int token = i / top_k;
        // A token chooses an expert once, so that adding its bit is setting it.
        atomicAdd(&masks[chosen[first_choice + i] * MASK_WORDS + token / 32], 1u << token % 32);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * top_k; i += ROUTE_BLOCK) {
        const int token = i / top_k;
        const int expert = chosen[first_choice + i];
        const unsigned* mask = masks + expert * MASK_WORDS;
        int place = firsts[expert] + __popc(mask[token / 32] & ((1u << token % 32) - 1));
        for (int word = 0; word < token / 32; word++) place += __popc(mask[word]);
        take((int)first_choice + i, first + token, expert, place);
    }
}

// Sorts the choices by expert, without a limit. softmax_first: 1 if the weights are of the softmax over all experts, 0 if
// of one over the chosen.
// launch: grid B = ceil(rows / 128), block 256, shared 0
extern "C" __global__ void __launch_bounds__(ROUTE_BLOCK) route_slots(
    const float* probabilities,
    const int* chosen,
    const int* block_counts,
    const int* counts,
    int* starts,
    int* slot_of,
    int* token_of,
    float* weights,
    int rows,
    int experts,
    int top_k,
    int softmax_first) {
    for_each_place(
        chosen, block_counts, counts, starts, rows, experts, top_k, [&](int choice, int token, int expert, int slot) {
            const float scale = weight_scale(probabilities, chosen, token, experts, top_k, softmax_first);
            slot_of[choice] = slot;
            token_of[slot] = token;
            weights[slot] = probabilities[(long long)token * experts + expert] * scale;
        });
}

// ---- Capacity ----

// The choices by expert, within an expert by token, and the order of their probabilities: what route_limit picks from.
// launch: grid B = ceil(rows / 128), block 256, shared 0, scratch rows·top_k ints and unsigned: candidates and keys
extern "C" __global__ void __launch_bounds__(ROUTE_BLOCK) route_candidates(
    const float* probabilities,
    const int* chosen,
    const int* block_counts,
    const int* counts,
    int* candidates,
    unsigned* keys,
    int rows,
    int experts,
    int top_k) {
    for_each_place(
        chosen, block_counts, counts, nullptr, rows, experts, top_k, [&](int choice, int token, int expert, int place) {
            candidates[place] = choice;
            keys[place] = ordered(probabilities[(long long)token * experts + expert]);
        });
}

#define LIMIT_BLOCK 1024
#define LIMIT_LOADS 4
#define DIGIT_BITS 11
#define DIGITS (1 << DIGIT_BITS)

// The `rank`th largest of the keys, counted from 1. `ties` becomes how many of the keys equal to it are among the `rank`
// largest.
__device__ __forceinline__ unsigned largest_key(const unsigned* keys, int count, int rank, int* shared, int& ties) {
    __shared__ int digits[DIGITS];
    __shared__ int found[2];
    const int mine = DIGITS / LIMIT_BLOCK;
    unsigned prefix = 0, known = 0;
    // 11, 11 and 10 bits.
    for (int shift = 21; shift >= 0; shift -= shift == 21 ? 11 : 10) {
        for (int i = threadIdx.x; i < DIGITS; i += LIMIT_BLOCK) digits[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += LIMIT_BLOCK) {
            const unsigned key = keys[i];
            if ((key & known) == prefix) atomicAdd(&digits[key >> shift & (DIGITS - 1) & ~(known >> shift)], 1);
        }
        __syncthreads();
        // From the largest digit down.
        int own = 0;
#pragma unroll
        for (int i = 0; i < mine; i++) own += digits[DIGITS - 1 - (threadIdx.x * mine + i)];
        int total;
        int before = block_sum_before(own, shared, total);
        if (before < rank && before + own >= rank) {
            for (int i = 0; i < mine; i++) {
                const int digit = DIGITS - 1 - (threadIdx.x * mine + i);
                if (before + digits[digit] >= rank) {
                    found[0] = digit, found[1] = rank - before;
                    break;
                }
                before += digits[digit];
            }
        }
        __syncthreads();
        prefix |= (unsigned)found[0] << shift;
        known |= (unsigned)(DIGITS - 1) << shift;
        rank = found[1];
        __syncthreads();
        if (shift == 0) break;
    }
    ties = rank;
    return prefix;
}

// Gives each expert's likeliest tokens, up to `capacity`, ties to the lower one, the expert's slots in the order of tokens, and
// all others places after all slots.
// launch: grid experts, block 1024, shared 0
extern "C" __global__ void __launch_bounds__(LIMIT_BLOCK) route_limit(
    const float* probabilities,
    const int* chosen,
    const int* counts,
    const int* candidates,
    const unsigned* keys,
    int* starts,
    int* slot_of,
    int* token_of,
    float* weights,
    int experts,
    int top_k,
    int softmax_first,
    int capacity) {
    __shared__ int shared[WARP + 1];
    __shared__ int expert_firsts[3];
    const int expert = threadIdx.x;
    const int chose = expert < experts ? counts[expert] : 0;
    const int keeps = chose < capacity ? chose : capacity;
    int slots, choices;
    const int first_slot = block_sum_before(keeps, shared, slots);
    const int first_candidate = block_sum_before(chose, shared, choices);
    if (expert == (int)blockIdx.x)
        expert_firsts[0] = first_candidate, expert_firsts[1] = first_slot, expert_firsts[2] = chose;
    if (blockIdx.x == 0 && expert < experts) starts[expert] = first_slot;
    if (blockIdx.x == 0 && expert == 0) starts[experts] = slots;
    __syncthreads();
    const int count = expert_firsts[2];
    const int first_kept = expert_firsts[1];
    // The dropped of all experts before come first.
    const int first_dropped = slots + expert_firsts[0] - first_kept;
    candidates += expert_firsts[0];
    keys += expert_firsts[0];
    unsigned threshold = 0;
    int ties = count;
    if (count > capacity) threshold = largest_key(keys, count, capacity, shared, ties);
    int above = 0, equal = 0;
    for (int start = 0; start < count; start += LIMIT_BLOCK * LIMIT_LOADS) {
        const int first = start + threadIdx.x * LIMIT_LOADS;
        unsigned mine[LIMIT_LOADS];
        // Those above the threshold in the lower half, those that equal it in the upper one.
        unsigned own = 0, total;
#pragma unroll
        for (int i = 0; i < LIMIT_LOADS; i++) {
            mine[i] = first + i < count ? keys[first + i] : 0;
            if (first + i < count) own += mine[i] > threshold ? 1u : mine[i] == threshold ? 1u << 16 : 0u;
        }
        const unsigned before = block_sum_before(own, (unsigned*)shared, total);
        int above_before = above + (int)(before & 0xffff), equal_before = equal + (int)(before >> 16);
        for (int i = 0; i < LIMIT_LOADS && first + i < count; i++) {
            const bool tie = mine[i] == threshold;
            const bool kept = mine[i] > threshold || (tie && equal_before < ties);
            const int kept_before = above_before + (equal_before < ties ? equal_before : ties);
            const int place = kept ? first_kept + kept_before : first_dropped + first + i - kept_before;
            const int choice = candidates[first + i], token = choice / top_k;
            const float scale = weight_scale(probabilities, chosen, token, experts, top_k, softmax_first);
            slot_of[choice] = place;
            token_of[place] = token;
            weights[place] = probabilities[(long long)token * experts + blockIdx.x] * scale;
            above_before += mine[i] > threshold;
            equal_before += tie;
        }
        above += (int)(total & 0xffff), equal += (int)(total >> 16);
    }
}

// ---- Backward ----

template <int ITEMS>
__device__ __forceinline__ void backward_rows(
    const float* probabilities,
    const int* chosen,
    const int* slot_of,
    const float* weights,
    const float* weight_gradients,
    const int* counts,
    const int* starts,
    float* dlogits,
    int rows,
    int experts,
    int top_k,
    int softmax_first,
    float unit) {
    const int lanes = lanes_per_row(experts);
    const int lane = threadIdx.x % lanes;
    const int slots = starts[experts];
    const long long row = (long long)blockIdx.x * (256 / lanes) + threadIdx.x / lanes;
    const bool valid = row < rows;
    float p[ITEMS], gradient[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int expert = lane + i * lanes;
        const bool exists = valid && expert < experts;
        p[i] = exists ? probabilities[row * experts + expert] : 0.0f;
        gradient[i] = exists ? unit * (float)counts[expert] : 0.0f;
    }
    if (softmax_first && valid) {
        for (int j = 0; j < top_k; j++) {
            const int expert = chosen[row * top_k + j], slot = slot_of[row * top_k + j];
            const float change = slot < slots ? weight_gradients[slot] : 0.0f;
#pragma unroll
            for (int i = 0; i < ITEMS; i++)
                if (expert == lane + i * lanes) gradient[i] += change;
        }
    }
    float mean = 0.0f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) mean += gradient[i] * p[i];
    mean = group_sum(mean, lanes);
    // Softmax over all experts: d logit = p·(d p − Σ p·d p).
#pragma unroll
    for (int i = 0; i < ITEMS; i++) gradient[i] = p[i] * (gradient[i] - mean);
    if (!softmax_first && valid) {
        // Softmax over the chosen ones only.
        float chosen_mean = 0.0f;
        for (int j = 0; j < top_k; j++) {
            const int slot = slot_of[row * top_k + j];
            if (slot < slots) chosen_mean += weights[slot] * weight_gradients[slot];
        }
        for (int j = 0; j < top_k; j++) {
            const int expert = chosen[row * top_k + j], slot = slot_of[row * top_k + j];
            const float change = weights[slot] * ((slot < slots ? weight_gradients[slot] : 0.0f) - chosen_mean);
#pragma unroll
            for (int i = 0; i < ITEMS; i++)
                if (expert == lane + i * lanes) gradient[i] += change;
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (valid && lane + i * lanes < experts) dlogits[row * experts + lane + i * lanes] = gradient[i];
}

// The gradient of the logits, replacing dlogits (rows, experts), from that of the slots' weights and from the auxiliary loss:
// unit = auxiliary · experts / (rows · rows · top_k). Gradients of dropped choices are not read, and count as zero.
// launch: grid ceil(rows / (256 / L)), L = the power of two from `experts` up, at most 32; block 256, shared 0
extern "C" __global__ void __launch_bounds__(256, 4) router_backward(
    const float* probabilities,
    const int* chosen,
    const int* slot_of,
    const float* weights,
    const float* weight_gradients,
    const int* counts,
    const int* starts,
    float* dlogits,
    int rows,
    int experts,
    int top_k,
    int softmax_first,
    float unit) {
    if (experts <= WARP) {
        backward_rows<1>(
            probabilities, chosen, slot_of, weights, weight_gradients, counts, starts, dlogits, rows, experts, top_k,
            softmax_first, unit);
    } else {
        backward_rows<EXPERTS_PER_LANE>(
            probabilities, chosen, slot_of, weights, weight_gradients, counts, starts, dlogits, rows, experts, top_k,
            softmax_first, unit);
    }
}

// ---- Statistics ----

// partials (P, experts): row p is the sum of probabilities (rows, experts) over the p-th of P runs of rows, in double.
// launch: grid P = min(256, ceil(rows / 64)), block 256, shared 0, scratch P·experts doubles: partials
extern "C" __global__ void __launch_bounds__(256)
    router_sums_parts(const float* probabilities, double* partials, int rows, int experts) {
    __shared__ double sums[256];
    // So many rows at once, with one thread per element.
    const int at_once = 256 / experts;
    const int run = (rows + gridDim.x - 1) / gridDim.x;
    const int first = blockIdx.x * run;
    const int end = first + run < rows ? first + run : rows;
    const int lane = threadIdx.x / experts, expert = threadIdx.x - lane * experts;
    double sum = 0.0;
    if (lane < at_once) {
#pragma unroll 4
        for (int row = first + lane; row < end; row += at_once) sum += (double)probabilities[(long long)row * experts + expert];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if ((int)threadIdx.x >= experts) return;
    for (int i = 1; i < at_once; i++) sum += sums[i * experts + expert];
    partials[(long long)blockIdx.x * experts + expert] = sum;
}

// All statistics of a route as doubles, for one download: out (2·experts + 1) = the probabilities' sums, the tokens that
// chose each expert, and the slots in use.
// launch: grid 1, block 256, shared 0
extern "C" __global__ void __launch_bounds__(256) router_statistics(
    const double* partials, int parts, const int* counts, const int* starts, int experts, double* out) {
    const int expert = threadIdx.x;
    if (expert == 0) out[2 * experts] = (double)starts[experts];
    if (expert >= experts) return;
    double sum = 0.0;
#pragma unroll 8
    for (int part = 0; part < parts; part++) sum += partials[(long long)part * experts + expert];
    out[expert] = sum;
    out[experts + expert] = (double)counts[expert];
}

// partials[block] = −Σ p·ln p over the block's share of the probabilities, in double. sum_total (pointwise.cu) adds them up.
// launch: grid G = min(1024, max(1, ceil(len / 1024))), block 256, shared 0, scratch G doubles: partials
extern "C" __global__ void __launch_bounds__(256)
    router_entropy_parts(const float* probabilities, long long len, double* partials) {
    __shared__ double shared[WARP];
    double sum = 0.0;
    for (long long i = (long long)blockIdx.x * 256 + threadIdx.x; i < len; i += (long long)gridDim.x * 256) {
        const double p = probabilities[i];
        if (p > 0.0) sum -= p * log(p);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// ---- Order of slots ----

// Reads each token once and writes it to all its slots, which moves less than reading once per slot.
template <typename From>
__device__ __forceinline__ void permute(
    const From* x, const int* slot_of, const int* used, act* sorted, int width, int top_k) {
    const long long row = blockIdx.x;
    const int slots = *used;
    x += row * width;
    slot_of += row * top_k;
    if (width % 8 == 0 && aligned(x, 16) && aligned(sorted, 16)) {
        const int stride = 8 * blockDim.x;
        for (int i = 8 * threadIdx.x; i < width; i += 2 * stride) {
            float values[2][8];
            const bool second = i + stride < width;
            load8(x + i, values[0]);
            if (second) load8(x + i + stride, values[1]);
            for (int j = 0; j < top_k; j++) {
                const int slot = slot_of[j];
                if (slot >= slots) continue;
                act* to = sorted + (long long)slot * width + i;
                store8(to, values[0]);
                if (second) store8(to + stride, values[1]);
            }
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const act value = to_act(to_float(x[i]));
        for (int j = 0; j < top_k; j++)
            if (slot_of[j] < slots) sorted[(long long)slot_of[j] * width + i] = value;
    }
}

// sorted (slots, width): each slot gets the row of its token in x (rows, width). `used` is &starts[E]; dropped choices and
// rows of `sorted` from there on are left alone.
// launch: grid rows, block min(256, 32·ceil(width / 512)), shared 0
extern "C" __global__ void __launch_bounds__(256, 6)
    permute_act(const act* x, const int* slot_of, const int* used, act* sorted, int width, int top_k) {
    permute(x, slot_of, used, sorted, width, top_k);
}

// The same from floats, rounding them.
// launch: grid rows, block min(256, 32·ceil(width / 512)), shared 0
extern "C" __global__ void __launch_bounds__(256, 6)
    permute_float(const float* x, const int* slot_of, const int* used, act* sorted, int width, int top_k) {
    permute(x, slot_of, used, sorted, width, top_k);
}

// sums[v] (v < VECTORS) = Σ over the token's slots, in the order of its choices, of 8 elements from column + v·stride on.
// Up to AT_ONCE slots are read at a time.
template <int AT_ONCE, int VECTORS>
__device__ __forceinline__ void sum_slots(
    const act* sorted, const int* slot_of, int slots, int width, int top_k, int column, int stride, float (&sums)[VECTORS][8]) {
    for (int first = 0; first < top_k; first += AT_ONCE) {
        float values[AT_ONCE][VECTORS][8];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int slot = first + j < top_k ? slot_of[first + j] : slots;
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
#pragma unroll
                for (int e = 0; e < 8; e++) values[j][v][e] = 0.0f;
                if (slot < slots && column + v * stride < width)
                    load8(sorted + (long long)slot * width + column + v * stride, values[j][v]);
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
#pragma unroll
                for (int e = 0; e < 8; e++) sums[v][e] += values[j][v][e];
            }
        }
    }
}

template <typename To>
__device__ __forceinline__ void unpermute(
    const act* sorted, const int* slot_of, const int* used, To* out, int width, int top_k) {
    const long long row = blockIdx.x;
    const int slots = *used;
    out += row * width;
    slot_of += row * top_k;
    if (width % 8 == 0 && aligned(out, 16) && aligned(sorted, 16)) {
        const int stride = 8 * blockDim.x;
        for (int i = 8 * threadIdx.x; i < width; i += 2 * stride) {
            float sums[2][8] = {};
            if (top_k <= 2) {
                sum_slots<2>(sorted, slot_of, slots, width, top_k, i, stride, sums);
            } else {
                sum_slots<4>(sorted, slot_of, slots, width, top_k, i, stride, sums);
            }
            store8(out + i, sums[0]);
            if (i + stride < width) store8(out + i + stride, sums[1]);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0.0f;
        for (int j = 0; j < top_k; j++)
            if (slot_of[j] < slots) sum += to_float(sorted[(long long)slot_of[j] * width + i]);
        out[i] = from_float<To>(sum);
    }
}

// out (rows, width): each token gets the sum of its slots in sorted (slots, width), zero without any.
// launch: grid rows, block min(256, 32·ceil(width / 512)), shared 0
extern "C" __global__ void __launch_bounds__(256)
    unpermute_act(const act* sorted, const int* slot_of, const int* used, act* out, int width, int top_k) {
    unpermute(sorted, slot_of, used, out, width, top_k);
}

// The same without rounding the sums.
// launch: grid rows, block min(256, 32·ceil(width / 512)), shared 0
extern "C" __global__ void __launch_bounds__(256)
    unpermute_float(const act* sorted, const int* slot_of, const int* used, float* out, int width, int top_k) {
    unpermute(sorted, slot_of, used, out, width, top_k);
}

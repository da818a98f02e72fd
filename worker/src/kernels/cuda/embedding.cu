// The embedding's rows, and the sum of gradients back into them.
//
// A token may occur any number of times in a batch, and its gradients have to be added in an order that does not depend on
// which block comes first. So the tokens are sorted by id, stably, and runs of one id are summed: EMBED_RUN sorted
// places per block, and what belongs to an id that crosses blocks goes through a scratch buffer.

// out (rows, width) = the table's row of each token.
// launch: grid rows, block min(256, 32·ceil(width / 512)), shared 0
extern "C" __global__ void __launch_bounds__(256)
    embed(const float* table, const unsigned* tokens, float* out, int width) {
    const float* from = table + (long long)tokens[blockIdx.x] * width;
    float* to = out + (long long)blockIdx.x * width;
    if (width % 4 == 0 && aligned(table, 16) && aligned(out, 16)) {
        const int stride = 4 * blockDim.x;
        for (int i = 4 * threadIdx.x; i < width; i += 4 * stride) {
            float values[4][4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * stride < width) load4(from + i + j * stride, values[j]);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * stride < width) store4(to + i + j * stride, values[j]);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// ---- Sorting tokens ----

#define SORT_BLOCK 1024
#define SORT_WARPS (SORT_BLOCK / WARP)
#define DIGIT_BITS 6
#define DIGITS (1 << DIGIT_BITS)
// Keys that each lane has under way.
#define SORT_LOADS 4

// The lanes of the warp that have this lane's digit, of those that take part.
__device__ __forceinline__ unsigned same_digit(unsigned digit, bool takes_part) {
    unsigned same = __ballot_sync(FULL_WARP, takes_part);
#pragma unroll
    for (int bit = 0; bit < DIGIT_BITS; bit++) {
        const unsigned set = __ballot_sync(FULL_WARP, (digit >> bit) & 1);
        same &= (digit >> bit) & 1 ? set : ~set;
    }
    return same;
}

// Where the count is that comes number `index` when all are taken digit by digit, and warp by warp for one digit.
__device__ __forceinline__ int place_of(int index) { return index % SORT_WARPS * DIGITS + index / SORT_WARPS; }

// One stable pass over `rows` keys by the digit at `shift`: from (keys, order) to (sorted_keys, sorted_order). `order` null
// stands for 0, 1, 2, …. Each warp has a run of keys; counts[warp·DIGITS + digit] becomes the warp's next place.
__device__ __forceinline__ void sort_pass(
    const unsigned* keys,
    const int* order,
    unsigned* sorted_keys,
    int* sorted_order,
    int rows,
    int shift,
    int* counts,
    int* sums) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int run = (rows + SORT_BLOCK - 1) / SORT_BLOCK * WARP;
    const int first = warp * run;
    const int end = first + run < rows ? first + run : rows;
    for (int i = threadIdx.x; i < DIGITS * SORT_WARPS; i += SORT_BLOCK) counts[i] = 0;
    __syncthreads();
    const unsigned below = (1u << lane) - 1;
    // The same walk twice: it counts the warp's digits, and then hands out places in the order of the keys.
    for (int scatter = 0; scatter < 2; scatter++) {
        for (int start = first; start < end; start += WARP * SORT_LOADS) {
            unsigned key[SORT_LOADS];
            int value[SORT_LOADS];
#pragma unroll
            for (int j = 0; j < SORT_LOADS; j++) {
                const int i = start + WARP * j + lane;
                key[j] = i < end ? keys[i] : 0;
                value[j] = scatter && order != nullptr && i < end ? order[i] : i;
            }
#pragma unroll
            for (int j = 0; j < SORT_LOADS; j++) {
                const bool valid = start + WARP * j + lane < end;
                const unsigned digit = (key[j] >> shift) & (DIGITS - 1);
                const unsigned same = same_digit(digit, valid);
                int* count = counts + warp * DIGITS + digit;
                const int place = valid ? *count : 0;
                __syncwarp();
                if (valid && (same & below) == 0) *count = place + __popc(same);
                __syncwarp();
                if (scatter && valid) {
                    const int to = place + __popc(same & below);
                    sorted_keys[to] = key[j];
                    sorted_order[to] = value[j];
                }
            }
        }
        __syncthreads();
        if (scatter) break;
        // From counts to first places: an exclusive sum over digits, and over warps within a digit.
        const int mine = DIGITS * SORT_WARPS / SORT_BLOCK;
        int total = 0;
#pragma unroll
        for (int i = 0; i < mine; i++) total += counts[place_of(threadIdx.x * mine + i)];
        int before = total;
        for (int offset = 1; offset < WARP; offset *= 2) {
            const int other = __shfl_up_sync(FULL_WARP, before, offset);
            if (lane >= offset) before += other;
        }
        if (lane == WARP - 1) sums[warp] = before;
        __syncthreads();
        int sum = 0;
        for (int i = 0; i < warp; i++) sum += sums[i];
        before += sum - total;
#pragma unroll
        for (int i = 0; i < mine; i++) {
            int* count = counts + place_of(threadIdx.x * mine + i);
            const int own = *count;
            *count = before;
            before += own;
        }
        __syncthreads();
    }
}

// Sorts tokens by id, equal ones in their order: sorted (rows) are the ids, order (rows) the rows that they come from.
// bits is the number of bits of the largest id, at least 1. The sorted result is in the first 2·rows of `buffers`:
// sorted = buffers, order = buffers + rows.
// launch: grid 1, block 1024, shared 0, scratch 4·rows unsigned: buffers
extern "C" __global__ void __launch_bounds__(SORT_BLOCK)
    embed_sort(const unsigned* tokens, unsigned* buffers, int rows, int bits) {
    __shared__ int counts[DIGITS * SORT_WARPS];
    __shared__ int sums[SORT_WARPS];
    const int passes = (bits + DIGIT_BITS - 1) / DIGIT_BITS;
    const unsigned* keys = tokens;
    const int* order = nullptr;
    for (int pass = 0; pass < passes; pass++) {
        // The last pass writes to the first half.
        unsigned* to = buffers + ((passes - pass) % 2 == 1 ? 0ll : 2ll * rows);
        sort_pass(keys, order, to, (int*)(to + rows), rows, pass * DIGIT_BITS, counts, sums);
        keys = to;
        order = (const int*)(to + rows);
        __syncthreads();
    }
}

// ---- Adding up ----

#define EMBED_RUN 32
// Rows that are under way at once.
#define EMBED_LOADS 8

template <int VECTOR>
__device__ __forceinline__ void load_columns(const float* from, float (&to)[VECTOR]) {
    if constexpr (VECTOR == 4) {
        load4(from, to);
    } else {
        to[0] = from[0];
    }
}
template <int VECTOR>
__device__ __forceinline__ void store_columns(float* to, const float (&from)[VECTOR]) {
    if constexpr (VECTOR == 4) {
        store4(to, from);
    } else {
        to[0] = from[0];
    }
}
template <int VECTOR>
__device__ __forceinline__ void add_columns(float* to, const float (&from)[VECTOR]) {
    float sums[VECTOR];
    load_columns(to, sums);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) sums[j] += from[j];
    store_columns(to, sums);
}

// The columns `column`… of the sorted places of this block, of which there are `count`.
//
// A run of one id that lies within the block is added to the table. One that came from an earlier block goes to the first of
// the block's two partial rows, and one that only begins here and goes on to the second.
template <int VECTOR>
__device__ __forceinline__ void sum_runs(
    const float* dout,
    const unsigned* ids,
    const int* order,
    bool from_before,
    bool goes_on,
    int count,
    float* grad,
    float* partials,
    int width,
    int column) {
    float sum[VECTOR] = {};
    bool first_run = from_before;
    for (int start = 0; start < count; start += EMBED_LOADS) {
        float values[EMBED_LOADS][VECTOR];
#pragma unroll
        for (int i = 0; i < EMBED_LOADS; i++)
            if (start + i < count) load_columns(dout + (long long)order[start + i] * width + column, values[i]);
#pragma unroll
        for (int i = 0; i < EMBED_LOADS; i++) {
            const int place = start + i;
            if (place >= count) break;
#pragma unroll
            for (int j = 0; j < VECTOR; j++) sum[j] += values[i][j];
            const bool last = place + 1 == count;
            if (!last && ids[place + 1] == ids[place]) continue;
            if (first_run) {
                store_columns(partials + column, sum);
            } else if (last && goes_on) {
                store_columns(partials + width + column, sum);
            } else {
                add_columns(grad + (long long)ids[place] * width + column, sum);
            }
            first_run = false;
#pragma unroll
            for (int j = 0; j < VECTOR; j++) sum[j] = 0.0f;
        }
    }
}

// Adds the rows of dout (rows, width) of each run of one id to that row of grad, the table's gradient, but for ids that cross
// blocks, whose sums go to partials (2 · ceil(rows / 32), width). After embed_sort, with its `buffers`.
// launch: grid (ceil(rows / 32), C = ceil(width / 512) if width % 4 == 0, else ceil(width / 128)), block 128, shared 0,
// scratch 2 · ceil(rows / 32) · width floats: partials
extern "C" __global__ void __launch_bounds__(128) embed_backward_runs(
    const float* dout, const unsigned* buffers, float* grad, float* partials, int rows, int width) {
    __shared__ unsigned ids[EMBED_RUN];
    __shared__ int order[EMBED_RUN];
    const int start = blockIdx.x * EMBED_RUN;
    const int count = rows - start < EMBED_RUN ? rows - start : EMBED_RUN;
    if (threadIdx.x < count) {
        ids[threadIdx.x] = buffers[start + threadIdx.x];
        order[threadIdx.x] = (int)buffers[(long long)rows + start + threadIdx.x];
    }
    __syncthreads();
    const bool from_before = start > 0 && buffers[start - 1] == ids[0];
    const bool goes_on = start + count < rows && buffers[start + count] == ids[count - 1];
    partials += 2ll * blockIdx.x * width;
    if (width % 4 == 0) {
        const int column = 4 * (blockIdx.y * 128 + threadIdx.x);
        if (column >= width) return;
        if (aligned(dout, 16) && aligned(grad, 16) && aligned(partials, 16)) {
            sum_runs<4>(dout, ids, order, from_before, goes_on, count, grad, partials, width, column);
        } else {
            for (int j = 0; j < 4; j++)
                sum_runs<1>(dout, ids, order, from_before, goes_on, count, grad, partials, width, column + j);
        }
        return;
    }
    const int column = blockIdx.y * 128 + threadIdx.x;
    if (column < width) sum_runs<1>(dout, ids, order, from_before, goes_on, count, grad, partials, width, column);
}

// Adds up what embed_backward_runs left in partials: the block in which an id begins that goes on to later ones adds all of
// that id's partial sums, in their order.
// launch: grid (ceil(rows / 32), ceil(width / 128)), block 128, shared 0
extern "C" __global__ void __launch_bounds__(128)
    embed_backward_ends(const unsigned* buffers, const float* partials, float* grad, int rows, int width) {
    const int start = blockIdx.x * EMBED_RUN, next = start + EMBED_RUN;
    if (next >= rows) return;
    const unsigned id = buffers[next - 1];
    // An id that came from an earlier block is that one's to add.
    if (buffers[next] != id || (start > 0 && buffers[start - 1] == id)) return;
    const int column = blockIdx.y * 128 + threadIdx.x;
    if (column >= width) return;
    const float* partial = partials + 2ll * blockIdx.x * width + column;
    float sum = partial[width];
    for (int i = next; i < rows && buffers[i] == id; i += EMBED_RUN) {
        partial += 2ll * width;
        sum += partial[0];
    }
    grad[(long long)id * width + column] += sum;
}

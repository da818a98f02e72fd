// Products with one weight matrix per expert over slots sorted by expert, in one launch each: slots of expert e are
// starts[e]..starts[e + 1], which only the device knows. With one expert and starts = {0, rows} they are plain products.
//
//   expert_product                   y  (slots, outputs) = x  (slots, inputs) · Wᵀ
//   expert_product_input_gradient    dx (slots, inputs)  = dy (slots, outputs) · W
//   expert_product_weight_gradient   dW (outputs, inputs) = dyᵀ · x over the expert's slots, zero without any
//
// W (outputs, inputs) of expert e starts at weights + e · stride, its gradient at gradient + e · stride.
//
// A block computes one tile of an output, 128 × 128. It walks along the depth (the axis summed over), with the next
// slices of both operands on their way to shared memory while it multiplies one. bfloat16 goes through the tensor cores
// (mma m16n8k16), float through them as tf32 (m16n8k8) or, with PRECISION_F32, through plain multiply-adds. Each sum has
// one order, so a result depends on nothing but its operands. Rows of other experts and what lies outside a matrix are
// read as zero, so nothing that an unused slot holds can matter.

constexpr int TILE = 128;        // rows and columns of an output tile
constexpr int TILE_THREADS = 128; // four warps
constexpr int TILE_GROUP = 8;    // row tiles that share columns of the right operand in the second-level cache
#if ACT_BF16
constexpr int DEPTH = 32, STAGES = 4;
#else
constexpr int DEPTH = 16, STAGES = 3;
#endif
// Flags: the output is float, whatever activations are; and it is added to what is there. That of the weights' gradient is always
// float, and added to where the head's gradient comes block by block.
constexpr int OUTPUT_FLOAT = 1, OUTPUT_ADD = 2;

// Which axis of an operand is contiguous in memory: the depth, or its side of the output (rows or columns).
enum Layout { DEPTH_CONTIGUOUS, SIDE_CONTIGUOUS };

// A slice of an operand in shared memory, DEPTH × TILE.
template <Layout layout>
struct Slice {
    static constexpr int OUTER = layout == DEPTH_CONTIGUOUS ? TILE : DEPTH;
    static constexpr int INNER = layout == DEPTH_CONTIGUOUS ? DEPTH : TILE;
    static constexpr int CHUNKS = INNER / ACT_VECTOR;
    // Reads touch all banks once: bfloat16 by swizzled chunks of 16 bytes, float by padded rows.
#if ACT_BF16
    static constexpr int PITCH = INNER;
    static __device__ __forceinline__ int place(int outer, int chunk) {
        return outer * PITCH + (chunk ^ (layout == DEPTH_CONTIGUOUS ? (outer >> 1) & 3 : outer & 7)) * ACT_VECTOR;
    }
#else
    static constexpr int PITCH = INNER + (layout == DEPTH_CONTIGUOUS ? 4 : 8);
    static __device__ __forceinline__ int place(int outer, int chunk) { return outer * PITCH + chunk * ACT_VECTOR; }
#endif
    static __device__ __forceinline__ act at(const act* slice, int side, int depth) {
        return slice[layout == DEPTH_CONTIGUOUS ? side * PITCH + depth : depth * PITCH + side];
    }
};
// The larger of the two layouts of float; those of bfloat16 are of one size.
constexpr int SLICE_ELEMENTS = ACT_BF16 ? TILE * DEPTH : TILE * (DEPTH + 4);
static_assert(STAGES * 2 * SLICE_ELEMENTS * sizeof(act) == (ACT_BF16 ? 65536 : 61440), "the launch below says so");

// An operand in device memory, zero outside.
struct Operand {
    const act* data;
    int rows, width;
    bool vectors; // every 16 bytes of a row are aligned, and wholly in or out

    __device__ __forceinline__ Operand(const act* data, int rows, int width)
        : data(data), rows(rows), width(width), vectors(width % ACT_VECTOR == 0 && aligned(data, 16)) {}
};

template <Layout layout>
__device__ __forceinline__ void load_slice(const Operand& from, int side, int depth, act* slice) {
    const int outer = layout == DEPTH_CONTIGUOUS ? side : depth, inner = layout == DEPTH_CONTIGUOUS ? depth : side;
#pragma unroll
    for (int i = 0; i < Slice<layout>::OUTER * Slice<layout>::CHUNKS / TILE_THREADS; i++) {
        const int at = threadIdx.x + i * TILE_THREADS;
        const int row = at / Slice<layout>::CHUNKS, chunk = at % Slice<layout>::CHUNKS;
        const int column = inner + chunk * ACT_VECTOR;
        act* to = slice + Slice<layout>::place(row, chunk);
        const bool inside = outer + row < from.rows;
        const act* source = from.data + (long long)(outer + row) * from.width + column;
        if (from.vectors) {
            cp_async_16(to, source, inside && column < from.width);
        } else {
            for (int j = 0; j < ACT_VECTOR; j++)
                to[j] = inside && column + j < from.width ? source[j] : from_float<act>(0.0f);
        }
    }
}

// Where a tile goes.
struct Output {
    void* data;
    int rows, width;
    bool is_float, add;

    __device__ __forceinline__ void store(int row, int column, float value) const {
        if (row >= rows || column >= width) return;
        const long long at = (long long)row * width + column;
        if (is_float) {
            float* to = (float*)data + at;
            *to = add ? *to + value : value;
        } else {
            act* to = (act*)data + at;
            *to = to_act(add ? to_float(*to) + value : value);
        }
    }
    // Two neighbours of an even column.
    __device__ __forceinline__ void store(int row, int column, float first, float second) const {
        const bool pair = width % 2 == 0 && aligned(data, is_float ? 8 : 2 * (int)sizeof(act));
        if (!pair) {
            store(row, column, first);
            store(row, column + 1, second);
            return;
        }
        if (row >= rows || column >= width) return;
        const long long at = (long long)row * width + column;
        if (is_float || !ACT_BF16) {
            float2* to = (float2*)((float*)data + at);
            if (add) first += to->x, second += to->y;
            *to = make_float2(first, second);
        } else {
            unsigned* to = (unsigned*)((bf16*)data + at);
            if (add) first += low_bf16(*to), second += high_bf16(*to);
            *to = pack_bf16(first, second);
        }
    }
};

// ---- Multiplying a slice ----
//
// Sums has the block's share of a tile in the registers of its threads: `step` adds left · right over a slice, `store`
// writes the tile.

#if ACT_BF16 || PRECISION != PRECISION_F32
// Four warps, two by two, each with 64 × 64 of the tile in blocks of 16 × 8.
struct Sums {
    float c[4][8][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int r = 0; r < 4; r++) c[i][j][r] = 0.0f;
    }
    static __device__ __forceinline__ int row_of_warp() { return threadIdx.x / WARP / 2 * 64; }
    static __device__ __forceinline__ int column_of_warp() { return threadIdx.x / WARP % 2 * 64; }

#if ACT_BF16
    // Fragments of 16 along the side by 16 along the depth; the halves say which quarter matrix this lane addresses.
    template <Layout layout>
    static __device__ __forceinline__ void
    fragments(const act* slice, int side, int depth, int side_half, int depth_half, unsigned r[4]) {
        const int row = threadIdx.x % 8;
        if (layout == DEPTH_CONTIGUOUS)
            ldmatrix_x4(r, slice + Slice<layout>::place(side + side_half * 8 + row, depth / 8 + depth_half));
        else
            ldmatrix_x4_trans(r, slice + Slice<layout>::place(depth + depth_half * 8 + row, side / 8 + side_half));
    }
    template <Layout left_layout, Layout right_layout>
    __device__ __forceinline__ void step(const act* left, const act* right) {
        const int low = threadIdx.x / 8 & 1, high = threadIdx.x / 16 & 1;
#pragma unroll
        for (int depth = 0; depth < DEPTH; depth += 16) {
            unsigned a[4][4], b[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) fragments<left_layout>(left, row_of_warp() + i * 16, depth, low, high, a[i]);
#pragma unroll
            for (int j = 0; j < 4; j++) fragments<right_layout>(right, column_of_warp() + j * 16, depth, high, low, b[j]);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) mma_bf16(c[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
    }
#else
    template <Layout left_layout, Layout right_layout>
    __device__ __forceinline__ void step(const act* left, const act* right) {
        const int group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
#pragma unroll
        for (int depth = 0; depth < DEPTH; depth += 8) {
            unsigned a[4][4], b[8][2];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int r = 0; r < 4; r++)
                    a[i][r] = to_tf32(Slice<left_layout>::at(
                        left, row_of_warp() + i * 16 + group + r % 2 * 8, depth + pair + r / 2 * 4));
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    b[j][r] =
                        to_tf32(Slice<right_layout>::at(right, column_of_warp() + j * 8 + group, depth + pair + r * 4));
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) mma_tf32(c[i][j], a[i], b[j]);
        }
    }
#endif
    template <Layout, Layout>
    __device__ __forceinline__ void store(const Output& output, int row, int column) const {
        row += row_of_warp() + threadIdx.x % WARP / 4;
        column += column_of_warp() + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) {
                output.store(row + i * 16, column + j * 8, c[i][j][0], c[i][j][1]);
                output.store(row + i * 16 + 8, column + j * 8, c[i][j][2], c[i][j][3]);
            }
    }
};
#else
// 16 × 8 threads, each with 8 rows and 16 columns: strided where a column of the slice is read, else in fours.
struct Sums {
    float c[8][16];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 16; j++) c[i][j] = 0.0f;
    }
    template <Layout layout, int THREADS>
    static __device__ __forceinline__ int side(int thread, int i) {
        return layout == DEPTH_CONTIGUOUS ? thread + THREADS * i : thread * 4 + i % 4 + THREADS * 4 * (i / 4);
    }
    template <Layout left_layout, Layout right_layout>
    __device__ __forceinline__ void step(const act* left, const act* right) {
        const int row = threadIdx.x / 8, column = threadIdx.x % 8;
#pragma unroll 2
        for (int depth = 0; depth < DEPTH; depth++) {
            float a[8], b[16];
#pragma unroll
            for (int i = 0; i < 8; i++) a[i] = Slice<left_layout>::at(left, side<left_layout, 16>(row, i), depth);
#pragma unroll
            for (int j = 0; j < 16; j++) b[j] = Slice<right_layout>::at(right, side<right_layout, 8>(column, j), depth);
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 16; j++) c[i][j] = fmaf(a[i], b[j], c[i][j]);
        }
    }
    template <Layout left_layout, Layout right_layout>
    __device__ __forceinline__ void store(const Output& output, int row, int column) const {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 16; j++)
                output.store(
                    row + side<left_layout, 16>(threadIdx.x / 8, i), column + side<right_layout, 8>(threadIdx.x % 8, j),
                    c[i][j]);
    }
};
#endif

// The tile of left · right at (row, column).
template <Layout left_layout, Layout right_layout>
__device__ __forceinline__ void
product_tile(const Operand& left, const Operand& right, int depth, const Output& output, int row, int column) {
    DYNAMIC_SHARED(act, shared);
    act *lefts = shared, *rights = shared + STAGES * SLICE_ELEMENTS;
    const int steps = (depth + DEPTH - 1) / DEPTH;
    Sums sums;
    sums.clear();
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) {
            load_slice<left_layout>(left, row, step * DEPTH, lefts + step * SLICE_ELEMENTS);
            load_slice<right_layout>(right, column, step * DEPTH, rights + step * SLICE_ELEMENTS);
        }
        cp_async_commit();
    }
    int stage = 0, next_stage = STAGES - 1;
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        // The slice is there for all, and all are done with the one before, whose place the next one takes.
        __syncthreads();
        const int next = step + STAGES - 1;
        if (next < steps) {
            load_slice<left_layout>(left, row, next * DEPTH, lefts + next_stage * SLICE_ELEMENTS);
            load_slice<right_layout>(right, column, next * DEPTH, rights + next_stage * SLICE_ELEMENTS);
        }
        cp_async_commit();
        sums.template step<left_layout, right_layout>(lefts + stage * SLICE_ELEMENTS, rights + stage * SLICE_ELEMENTS);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
    }
    sums.template store<left_layout, right_layout>(output, row, column);
}

// ---- Which tile a block computes ----

__device__ __forceinline__ int tiles_of(int length) { return (length + TILE - 1) / TILE; }

// Row and column of the tile at `index`, in groups of TILE_GROUP rows of tiles, column by column within a group.
__device__ __forceinline__ void place_tile(int index, int row_tiles, int column_tiles, int& row, int& column) {
    const int group = index / (TILE_GROUP * column_tiles), within = index % (TILE_GROUP * column_tiles);
    const int left = row_tiles - group * TILE_GROUP, rows = left < TILE_GROUP ? left : TILE_GROUP;
    row = group * TILE_GROUP + within % rows;
    column = within / rows;
}

// The expert whose slots have the row tile at `tile`, counted through all experts, and which of its tiles that is; the
// number of experts if there are fewer tiles. A warp looks at 32 experts at a time.
__device__ __forceinline__ int expert_of_tile(const int* starts, int experts, int& tile) {
    const int lane = threadIdx.x % WARP;
    for (int first = 0; first < experts; first += WARP) {
        const int expert = first + lane;
        const int tiles = expert < experts ? tiles_of(starts[expert + 1] - starts[expert]) : 0;
        int through = tiles;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const int before = __shfl_up_sync(FULL_WARP, through, offset);
            if (lane >= offset) through += before;
        }
        const int found = warp_sum(through <= tile ? 1 : 0);
        if (found < WARP) {
            tile -= __shfl_sync(FULL_WARP, through - tiles, found);
            return first + found;
        }
        tile -= __shfl_sync(FULL_WARP, through, WARP - 1);
    }
    return experts;
}

// The block's row tile and column tile in slots × width; false if it has none.
struct SlotTile {
    int expert, first_slot, slots, row, column;

    __device__ __forceinline__ bool find(const int* starts, int experts, int row_tiles, int width) {
        int row_tile, column_tile;
        place_tile(blockIdx.x, row_tiles, tiles_of(width), row_tile, column_tile);
        expert = expert_of_tile(starts, experts, row_tile);
        if (expert >= experts) return false;
        first_slot = starts[expert], slots = starts[expert + 1] - first_slot;
        row = row_tile * TILE, column = column_tile * TILE;
        return true;
    }
};

// launch, all three: block 128, shared 65536 (ACT_BF16) or 61440 (float) bytes, no scratch; grid
//   expert_product                  row_tiles · ceil(outputs / 128)
//   expert_product_input_gradient   row_tiles · ceil(inputs / 128)
//   expert_product_weight_gradient  experts · ceil(outputs / 128) · ceil(inputs / 128)
// where row_tiles = slots / 128 (rounded down) + experts, for the most slots that there can be, is also an argument:
// each expert has at most one tile that is not full. Blocks past the last tile return. At least one expert.
// Widths of any size and addresses of any alignment work; 16-byte reads are used where the width is a multiple of 8
// (bfloat16) or 4 (float) elements and the address of 16 bytes.

// flags: OUTPUT_FLOAT = 1: y is float, else act; OUTPUT_ADD = 2: y += ….
extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) expert_product(
    const act* x, const act* weights, long long stride, const int* starts, int experts, int row_tiles, int inputs,
    int outputs, void* y, int flags) {
    SlotTile tile;
    if (!tile.find(starts, experts, row_tiles, outputs)) return;
    const bool is_float = !ACT_BF16 || flags & OUTPUT_FLOAT;
    const Operand left(x + (long long)tile.first_slot * inputs, tile.slots, inputs);
    const Operand right(weights + tile.expert * stride, outputs, inputs);
    const long long offset = (long long)tile.first_slot * outputs;
    const Output output{
        (char*)y + offset * (is_float ? sizeof(float) : sizeof(act)), tile.slots, outputs, is_float,
        (flags & OUTPUT_ADD) != 0};
    product_tile<DEPTH_CONTIGUOUS, DEPTH_CONTIGUOUS>(left, right, inputs, output, tile.row, tile.column);
}

// The same flags, of dx.
extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) expert_product_input_gradient(
    const act* dy, const act* weights, long long stride, const int* starts, int experts, int row_tiles, int inputs,
    int outputs, void* dx, int flags) {
    SlotTile tile;
    if (!tile.find(starts, experts, row_tiles, inputs)) return;
    const bool is_float = !ACT_BF16 || flags & OUTPUT_FLOAT;
    const Operand left(dy + (long long)tile.first_slot * outputs, tile.slots, outputs);
    const Operand right(weights + tile.expert * stride, outputs, inputs);
    const long long offset = (long long)tile.first_slot * inputs;
    const Output output{
        (char*)dx + offset * (is_float ? sizeof(float) : sizeof(act)), tile.slots, inputs, is_float,
        (flags & OUTPUT_ADD) != 0};
    product_tile<DEPTH_CONTIGUOUS, SIDE_CONTIGUOUS>(left, right, outputs, output, tile.row, tile.column);
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) expert_product_weight_gradient(
    const act* dy, const act* x, long long stride, const int* starts, int experts, int inputs, int outputs,
    float* gradient, int flags) {
    const int row_tiles = tiles_of(outputs), column_tiles = tiles_of(inputs), tiles = row_tiles * column_tiles;
    const int expert = blockIdx.x / tiles;
    if (expert >= experts) return;
    int row, column;
    place_tile(blockIdx.x % tiles, row_tiles, column_tiles, row, column);
    const long long first_slot = starts[expert];
    const int slots = starts[expert + 1] - (int)first_slot;
    const Operand left(dy + first_slot * outputs, slots, outputs);
    const Operand right(x + first_slot * inputs, slots, inputs);
    const Output output{gradient + expert * stride, outputs, inputs, true, (flags & OUTPUT_ADD) != 0};
    product_tile<SIDE_CONTIGUOUS, SIDE_CONTIGUOUS>(left, right, slots, output, row * TILE, column * TILE);
}

// The products of experts.cu for Hopper (sm_90a) with bfloat16: the tensor copy engine fills a ring of slices in shared
// memory, and warpgroups multiply from there (wgmma), so that no thread moves operands.
//
// A block has three warpgroups. The first one's first thread asks for slices as soon as their places in the ring are
// free; the other two multiply, each 64 × 256 of the block's tile of 128 × 256, and store. Blocks live as long as the
// launch and take tiles in turn, so that slices of the next tile are on their way while one is stored. Clusters of two
// blocks that share the right operand were tried, and were slower: 470 to 550 TFLOP/s against 610 to 780 on an H200.
//
// Slices are boxes of 64 × 64 elements, each row of a box 128 bytes, swizzled by the copy engine as wgmma reads it. What
// is outside an operand is zero. A box of activations may reach into the next expert's slots: for the first two products
// that concerns rows of the tile which are not stored; for the weights' gradient the rows past the expert's last slot
// are zeroed in shared memory, in both operands. So nothing that an unused slot holds can matter.
//
// Needs inputs, outputs and stride to be multiples of 8 elements, and addresses of 16 bytes; experts.cu has no such needs.

#if !ACT_BF16
#error "experts_hopper.cu is for activations of bfloat16"
#endif

constexpr int HOPPER_ROWS = 128, HOPPER_COLUMNS = 256, HOPPER_DEPTH = 64, HOPPER_STAGES = 4;
constexpr int HOPPER_THREADS = 3 * WARPGROUP, HOPPER_CONSUMER_WARPS = 8;
constexpr int HOPPER_EXPERTS = 256; // the most experts
// Row tiles that share columns of the right operand in the second-level cache.
constexpr int HOPPER_GROUP = 16;
constexpr int BOX = 64, BOX_BYTES = BOX * BOX * 2;
constexpr int LEFT_BYTES = HOPPER_ROWS * HOPPER_DEPTH * 2, RIGHT_BYTES = HOPPER_COLUMNS * HOPPER_DEPTH * 2;
constexpr int RING_STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
constexpr int HOPPER_OUTPUT_FLOAT = 1, HOPPER_OUTPUT_ADD = 2; // as in experts.cu

// What lies behind the ring, which starts at the first multiple of 1024 bytes of dynamic shared memory.
struct HopperShared {
    unsigned long long full[HOPPER_STAGES], empty[HOPPER_STAGES];
    int starts[HOPPER_EXPERTS + 1];
    int first_tile[HOPPER_EXPERTS + 1]; // row tiles before each expert's, and all
};
static_assert(
    1024 + HOPPER_STAGES * RING_STAGE_BYTES + sizeof(HopperShared) <= 199936, "the launch below says 199936 bytes");

enum HopperProduct { FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT };

// ---- Operands ----

// Operands in boxes, as whole descriptors, which go on in units of 16 bytes: registers are not as short here as in attention.
template <bool is_side_contiguous>
__device__ __forceinline__ unsigned long long box(unsigned address) {
    return descriptor(is_side_contiguous ? side_contiguous(address, BOX_BYTES) : depth_contiguous(address));
}
// 16 places further along the depth: with the depth contiguous, a row of a box has all 64 of them, else 8 rows are 1024 bytes.
template <bool is_side_contiguous>
__device__ __forceinline__ constexpr unsigned depth_step() {
    return is_side_contiguous ? 2048 / 16 : 32 / 16;
}

// ---- Which tiles a block computes ----

struct HopperTile {
    int expert, row, column; // the tile's first row and column in the expert's output
    int first_slot, slots;   // the expert's
};

template <HopperProduct product>
struct HopperTiles {
    const HopperShared& shared;
    int experts, row_tiles, column_tiles, tiles;
    int index;

    __device__ __forceinline__ HopperTiles(const HopperShared& shared, int experts, int rows, int columns)
        : shared(shared), experts(experts), index(blockIdx.x) {
        row_tiles = product == WEIGHT_GRADIENT ? (rows + HOPPER_ROWS - 1) / HOPPER_ROWS : shared.first_tile[experts];
        column_tiles = (columns + HOPPER_COLUMNS - 1) / HOPPER_COLUMNS;
        tiles = row_tiles * column_tiles * (product == WEIGHT_GRADIENT ? experts : 1);
    }
    // The next tile; false after the last.
    __device__ __forceinline__ bool next(HopperTile& tile) {
        if (index >= tiles) return false;
        int within = index;
        if (product == WEIGHT_GRADIENT) {
            tile.expert = index / (row_tiles * column_tiles);
            within = index % (row_tiles * column_tiles);
        }
        // Groups of rows of tiles, column by column within a group.
        const int group = within / (HOPPER_GROUP * column_tiles), in_group = within % (HOPPER_GROUP * column_tiles);
        const int left = row_tiles - group * HOPPER_GROUP, rows = left < HOPPER_GROUP ? left : HOPPER_GROUP;
        int row_tile = group * HOPPER_GROUP + in_group % rows;
        tile.column = in_group / rows * HOPPER_COLUMNS;
        if (product != WEIGHT_GRADIENT) {
            int low = 0, high = experts;
            while (high - low > 1) {
                const int middle = (low + high) / 2;
                if (shared.first_tile[middle] <= row_tile)
                    low = middle;
                else
                    high = middle;
            }
            tile.expert = low;
            row_tile -= shared.first_tile[low];
        }
        tile.row = row_tile * HOPPER_ROWS;
        tile.first_slot = shared.starts[tile.expert];
        tile.slots = shared.starts[tile.expert + 1] - tile.first_slot;
        index += gridDim.x;
        return true;
    }
};

// The first warp notes where the experts' slots and tiles start.
__device__ __forceinline__ void note_experts(const int* starts, int experts, HopperShared& shared) {
    const int lane = threadIdx.x;
    int before = 0;
    for (int first = 0; first < experts; first += WARP) {
        const int expert = first + lane;
        const int from = starts[expert < experts ? expert : experts];
        const int slots = expert < experts ? starts[expert + 1] - from : 0;
        int through = (slots + HOPPER_ROWS - 1) / HOPPER_ROWS;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const int lower = __shfl_up_sync(FULL_WARP, through, offset);
            if (lane >= offset) through += lower;
        }
        if (expert < experts) {
            shared.starts[expert + 1] = from + slots;
            shared.first_tile[expert + 1] = before + through;
        }
        before += __shfl_sync(FULL_WARP, through, WARP - 1);
    }
    if (lane == 0) shared.starts[0] = starts[0], shared.first_tile[0] = 0;
}

// ---- Storing ----

// The 4 × 4 words of four neighbouring lanes, transposed: lane i's word j becomes lane j's word i.
__device__ __forceinline__ void transpose_quad(unsigned (&words)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const unsigned got = __shfl_xor_sync(FULL_WARP, odd ? words[i] : words[i + 1], 1);
        if (odd)
            words[i] = got;
        else
            words[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned got = __shfl_xor_sync(FULL_WARP, upper ? words[i] : words[i + 2], 2);
        if (upper)
            words[i] = got;
        else
            words[i + 2] = got;
    }
}

// A warpgroup's sums to a matrix (rows, width) of act, 16 bytes a thread; `row` is this thread's first one.
__device__ __forceinline__ void
store_act(const float (&c)[1][32][4], act* output, int rows, int width, int row, int column) {
    column += threadIdx.x % 4 * 8;
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned words[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                words[i] = pack_bf16(c[0][j + i][half * 2], c[0][j + i][half * 2 + 1]);
            transpose_quad(words);
            if (row + half * 8 < rows && column + j * 8 < width)
                *(uint4*)(output + (long long)(row + half * 8) * width + column + j * 8) =
                    make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}
// Adds them to what is there.
__device__ __forceinline__ void
add_act(const float (&c)[1][32][4], act* output, int rows, int width, int row, int column) {
    column += threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 32; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (row + half * 8 >= rows || column + j * 8 >= width) continue;
            unsigned* to = (unsigned*)(output + (long long)(row + half * 8) * width + column + j * 8);
            *to = pack_bf16(
                c[0][j][half * 2] + low_bf16(*to), c[0][j][half * 2 + 1] + high_bf16(*to));
        }
    }
}
template <bool add>
__device__ __forceinline__ void
store_float(const float (&c)[1][32][4], float* output, int rows, int width, int row, int column) {
    column += threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 32; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = column + j * 8;
            if (row + half * 8 >= rows || at >= width) continue;
            float2* to = (float2*)(output + (long long)(row + half * 8) * width + at);
            float2 sum = make_float2(c[0][j][half * 2], c[0][j][half * 2 + 1]);
            if (add) {
                const float2 there = *to;
                sum.x += there.x, sum.y += there.y;
            }
            *to = sum;
        }
    }
}

// ---- The kernel ----

struct HopperOutput {
    void* data;
    long long stride; // elements between experts, for the weights' gradient
    int flags;
};

// Left and right operand of a product, and their shapes: the output is rows × columns per expert.
template <HopperProduct product>
__device__ __forceinline__ void hopper_product(
    const TensorMap& left_map, const TensorMap& right_map, const int* starts, int experts, int rows, int columns,
    int depth, const HopperOutput& output) {
    constexpr bool left_side_contiguous = product == WEIGHT_GRADIENT, right_side_contiguous = product != FORWARD;
    DYNAMIC_SHARED(unsigned char, dynamic);
    const unsigned ring = (shared_address(dynamic) + 1023) & ~1023u;
    unsigned char* ring_bytes = dynamic + (ring - shared_address(dynamic));
    HopperShared& shared = *(HopperShared*)(ring_bytes + HOPPER_STAGES * RING_STAGE_BYTES);
    const unsigned full = shared_address(shared.full), empty = shared_address(shared.empty);

    if (threadIdx.x < WARP) note_experts(starts, experts, shared);
    if (threadIdx.x == WARP) {
        for (int stage = 0; stage < HOPPER_STAGES; stage++) {
            barrier_init(full + stage * 8, 1);
            barrier_init(empty + stage * 8, HOPPER_CONSUMER_WARPS);
        }
        barrier_fence();
    }
    __syncthreads();

    HopperTiles<product> tiles(shared, experts, rows, columns);
    HopperTile tile;
    int stage = 0, parity = 0;
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            while (tiles.next(tile)) {
                const int length = product == WEIGHT_GRADIENT ? tile.slots : depth;
                for (int at = 0; at < length; at += HOPPER_DEPTH) {
                    const unsigned left = ring + stage * RING_STAGE_BYTES, right = left + LEFT_BYTES;
                    const unsigned barrier = full + stage * 8;
                    barrier_wait(empty + stage * 8, parity ^ 1);
                    barrier_expect(barrier, RING_STAGE_BYTES);
#pragma unroll
                    for (int box = 0; box < HOPPER_ROWS / BOX; box++) {
                        const int side = tile.row + box * BOX;
                        if (product == WEIGHT_GRADIENT)
                            load_box(left + box * BOX_BYTES, left_map, barrier, side, tile.first_slot + at);
                        else
                            load_box(left + box * BOX_BYTES, left_map, barrier, at, tile.first_slot + side);
                    }
#pragma unroll
                    for (int box = 0; box < HOPPER_COLUMNS / BOX; box++) {
                        const int side = tile.column + box * BOX;
                        const unsigned to = right + box * BOX_BYTES;
                        if (product == WEIGHT_GRADIENT)
                            load_box(to, right_map, barrier, side, tile.first_slot + at);
                        else if (product == INPUT_GRADIENT)
                            load_box(to, right_map, barrier, side, at, tile.expert);
                        else
                            load_box(to, right_map, barrier, at, side, tile.expert);
                    }
                    stage = stage + 1 == HOPPER_STAGES ? 0 : stage + 1;
                    parity ^= stage == 0;
                }
            }
        }
    } else {
        more_registers<232>();
        const int consumer = threadIdx.x / WARPGROUP - 1, lane = threadIdx.x % WARP;
        const unsigned long long lefts = box<left_side_contiguous>(ring + consumer * BOX_BYTES);
        const unsigned long long rights = box<right_side_contiguous>(ring + LEFT_BYTES);
        float c[1][32][4];
        while (tiles.next(tile)) {
            const int length = product == WEIGHT_GRADIENT ? tile.slots : depth;
            if (length == 0) {
#pragma unroll
                for (int i = 0; i < 128; i++) (&c[0][0][0])[i] = 0.0f;
            }
            int last = 0;
            for (int at = 0; at < length; at += HOPPER_DEPTH) {
                barrier_wait(full + stage * 8, parity);
                if (product == WEIGHT_GRADIENT && length - at < HOPPER_DEPTH) {
                    // Rows of the next expert, in all six boxes.
                    const int rest = (HOPPER_DEPTH - (length - at)) * (BOX * 2 / 16);
                    uint4* slice = (uint4*)(ring_bytes + stage * RING_STAGE_BYTES);
                    for (int i = threadIdx.x - WARPGROUP; i < rest * (RING_STAGE_BYTES / BOX_BYTES); i += 2 * WARPGROUP)
                        slice[(i / rest + 1) * (BOX_BYTES / 16) - 1 - i % rest] = make_uint4(0, 0, 0, 0);
                    shared_fence();
                    sync_some<2 * WARPGROUP>(1);
                }
                const unsigned long long left = lefts + stage * (RING_STAGE_BYTES / 16);
                const unsigned long long right = rights + stage * (RING_STAGE_BYTES / 16);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < HOPPER_DEPTH / 16; i++)
                    wgmma<left_side_contiguous, right_side_contiguous>(
                        c, left + i * depth_step<left_side_contiguous>(),
                        right + i * depth_step<right_side_contiguous>(), at > 0 || i > 0);
                wgmma_commit();
                // The slice before has been read.
                if (at > 0) {
                    wgmma_wait<1>();
                    if (lane == 0) barrier_arrive(empty + last * 8);
                }
                last = stage;
                stage = stage + 1 == HOPPER_STAGES ? 0 : stage + 1;
                parity ^= stage == 0;
            }
            wgmma_wait<0>();
            settle(c);
            if (length > 0 && lane == 0) barrier_arrive(empty + last * 8);
            const int row = tile.row + consumer * 64 + threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
            const int rows_here = product == WEIGHT_GRADIENT ? rows : tile.slots;
            const long long offset = product == WEIGHT_GRADIENT ? tile.expert * output.stride
                                                                : (long long)tile.first_slot * columns;
            switch (product == WEIGHT_GRADIENT ? HOPPER_OUTPUT_FLOAT : output.flags) {
            case 0:
                store_act(c, (act*)output.data + offset, rows_here, columns, row, tile.column);
                break;
            case HOPPER_OUTPUT_ADD:
                add_act(c, (act*)output.data + offset, rows_here, columns, row, tile.column);
                break;
            case HOPPER_OUTPUT_FLOAT:
                store_float<false>(c, (float*)output.data + offset, rows_here, columns, row, tile.column);
                break;
            default:
                store_float<true>(c, (float*)output.data + offset, rows_here, columns, row, tile.column);
            }
        }
    }
}

#define HOPPER_KERNEL extern "C" __global__ void __launch_bounds__(HOPPER_THREADS, 1)

// launch, all three: grid (multiprocessors; fewer do, if there are fewer tiles), block 384, shared 199936 bytes, no
// scratch; experts at least 1 and at most 256.
// Tensor maps (cuTensorMapEncodeTiled): type BFLOAT16, no interleave, SWIZZLE_128B, L2_PROMOTION_L2_256B, OOB_FILL_NONE,
// all element strides 1;
//   of activations (slots, width): rank 2, sizes {width, slots}, strides {2·width} bytes, box {64, 64}
//   of weights: rank 3, sizes {inputs, outputs, experts}, strides {2·inputs, 2·stride} bytes, box {64, 64, 1}
// where slots is the most that there can be.

// y (slots, outputs) = x · Wᵀ; flags of experts.cu.
HOPPER_KERNEL expert_product_hopper(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, const int* starts, int experts,
    int inputs, int outputs, void* y, int flags) {
    hopper_product<FORWARD>(x, weights, starts, experts, 0, outputs, inputs, HopperOutput{y, 0, flags});
}

// dx (slots, inputs) = dy · W; flags of experts.cu.
HOPPER_KERNEL expert_product_input_gradient_hopper(
    const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap weights, const int* starts, int experts,
    int inputs, int outputs, void* dx, int flags) {
    hopper_product<INPUT_GRADIENT>(dy, weights, starts, experts, 0, inputs, outputs, HopperOutput{dx, 0, flags});
}

// dW (outputs, inputs) = dyᵀ · x, at gradient + expert · stride; zero for an expert without slots.
HOPPER_KERNEL expert_product_weight_gradient_hopper(
    const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap x, const int* starts, int experts,
    int inputs, int outputs, long long stride, float* gradient) {
    hopper_product<WEIGHT_GRADIENT>(dy, x, starts, experts, outputs, inputs, 0, HopperOutput{gradient, stride, 0});
}

// Tiles of attention with bf16 activations, and their products by wgmma: Hopper (sm_90a), head_dims 64 and 128.
//
// The host chooses this file over attention_tiles.cu by ATTENTION_HOPPER 1. Four warps multiply 64 rows together, one
// operand or both straight from shared memory; three such warpgroups (two in the pass for dk and dv)
// share what a block loads, and while one takes exponentials the others multiply.
//
// A tile is boxes of 64 rows × 64 elements, the boxes of a row of boxes first. A row of a box is 128 bytes, whose eight
// chunks of 16 bytes are permuted by exclusive or with the row's number: the swizzle of 128 bytes that wgmma undoes. Boxes
// are aligned to 1024 bytes.

#if ACT_BF16 && ATTENTION_HOPPER

#if HEAD_DIM != 64 && HEAD_DIM != 128
#error "attention_hopper.cu is for head_dims 64 and 128"
#endif

constexpr int DEPTH = HEAD_DIM;
constexpr int FORWARD_THREADS = 384, KEYS_THREADS = 256, QUERIES_THREADS = 384;
// Elements of a tile per row, if rows come in whole boxes.
constexpr int STRIDE = DEPTH;
constexpr int BOX_ROWS = 64, BOX = BOX_ROWS * 64;
constexpr int RESIDENT = 1;
constexpr int QUERY_TILES = 1, KEY_TILES = 1;
constexpr int FORWARD_KEYS = 64;
constexpr int PASS_QUERIES = 64, PASS_QUERIES_CHUNK = 64;
constexpr int PASS_KEYS = 64, PASS_KEYS_CHUNK = 64;
constexpr int PARTS = 1;

// ---- wgmma ----

#ifdef SANDERLING_EMULATE

// Where an operand starts. The products are computed at once.
typedef const unsigned char* Operand;
__device__ __forceinline__ Operand operand_along_depth(const act* tile) { return (Operand)tile; }
__device__ __forceinline__ Operand operand_along_rows(const act* tile) { return (Operand)tile; }
__device__ __forceinline__ Operand further(Operand operand, int bytes) { return operand + bytes; }
__device__ __forceinline__ float swizzled(Operand start, int bytes) {
    unsigned long long address = (unsigned long long)(start + bytes);
    address ^= (address >> 7 & 7) << 4;
    return to_float(*(const act*)address);
}
template <int N>
__device__ __forceinline__ void wgmma_tiles(float (&c)[1][N][4], Operand left, Operand right, bool add) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 4; ++i) {
            const int row = warp * 16 + lane / 4 + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
            float sum = add ? c[0][n][i] : 0.0f;
            for (int k = 0; k < 16; ++k) {
                sum += swizzled(left, row / 8 * 1024 + row % 8 * 128 + k * 2) *
                       swizzled(right, column / 8 * 1024 + column % 8 * 128 + k * 2);
            }
            c[0][n][i] = sum;
        }
    }
}
template <int N>
__device__ __forceinline__ void wgmma_registers(float (&c)[1][N][4], const unsigned (&a)[4], Operand right) {
    const int lane = threadIdx.x % WARP;
    unsigned quad[4][4];
    for (int i = 0; i < 16; ++i) quad[i / 4][i % 4] = __shfl_sync(FULL_WARP, a[i % 4], lane / 4 * 4 + i / 4);
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 4; ++i) {
            const int column = n * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) {
                const unsigned pair = quad[k % 8 / 2][i / 2 + k / 8 * 2];
                c[0][n][i] += (k % 2 ? high_bf16(pair) : low_bf16(pair)) *
                              swizzled(right, k / 8 * 1024 + k % 8 * 128 + column / 64 * BOX * 2 + column % 64 * 2);
            }
        }
    }
}
__device__ __forceinline__ void wgmma_fence() {}
__device__ __forceinline__ void wgmma_commit() {}
__device__ __forceinline__ void shared_fence() {}
template <int LEFT>
__device__ __forceinline__ void products_wait() {}
template <int M, int N>
__device__ __forceinline__ void settle(float (&)[M][N][4]) {}

#else

// The lower half of a matrix descriptor: address and leading offset in units of 16 bytes. No step within shared memory
// carries into the upper half: a stride of 1024 bytes, and the swizzle of 128 bytes.
typedef unsigned Operand;
__device__ __forceinline__ unsigned long long descriptor(Operand operand) {
    return (unsigned long long)(1u << 30 | 1024 / 16) << 32 | operand;
}
// What is summed over lies along the rows of 128 bytes; 8 rows further is 1024 bytes.
__device__ __forceinline__ Operand operand_along_depth(const act* tile) {
    return (unsigned)1 << 16 | (shared_address(tile) & 0x3ffff) >> 4;
}
// What is summed over is the rows, 8 of them in 1024 bytes; 64 columns further is the next box.
__device__ __forceinline__ Operand operand_along_rows(const act* tile) {
    return (unsigned)(BOX * 2 / 16) << 16 | (shared_address(tile) & 0x3ffff) >> 4;
}
__device__ __forceinline__ Operand further(Operand operand, int bytes) { return operand + bytes / 16; }

#define SUMS_1(n) "+f"(c[0][n][0]), "+f"(c[0][n][1]), "+f"(c[0][n][2]), "+f"(c[0][n][3])
#define SUMS_4(n) SUMS_1(n), SUMS_1(n + 1), SUMS_1(n + 2), SUMS_1(n + 3)
// c (64 × 64) = left (64 × 16, shared) · right (16 × 64, shared), added to c or not. A warp's part of c is 16 rows, in
// fragments as those of mma side by side.
__device__ __forceinline__ void wgmma_tiles(float (&c)[1][8][4], Operand left, Operand right, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}"
        : SUMS_4(0), SUMS_4(4)
        : "l"(descriptor(left)), "l"(descriptor(right)), "r"((int)add));
}
// c (64 × 8·N) += a (64 × 16, registers, a warp's part as mma has it) · right (16 × 8·N, shared).
__device__ __forceinline__ void wgmma_registers(float (&c)[1][8][4], const unsigned (&a)[4], Operand right) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
        : SUMS_4(0), SUMS_4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(right)), "r"(1));
}
__device__ __forceinline__ void wgmma_registers(float (&c)[1][16][4], const unsigned (&a)[4], Operand right) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
        : SUMS_4(0), SUMS_4(4), SUMS_4(8), SUMS_4(12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(right)), "r"(1));
}
// Before products whose sums or operands in registers were written otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Makes this thread's writes to shared memory known to wgmma.
__device__ __forceinline__ void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Waits until at most LEFT of the scores() and accumulate() before are under way.
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps the compiler from using sums before the wait, or changing them after the products began.
template <int M, int N>
__device__ __forceinline__ void settle(float (&c)[M][N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : SUMS_1(n)::"memory");
}

#endif

// ---- Tiles ----

constexpr bool ASYNCHRONOUS = true;

// The first multiple of 1024 bytes of dynamic shared memory.
__device__ __forceinline__ act* aligned_tiles(act* shared) {
#ifdef SANDERLING_EMULATE
    const unsigned address = (unsigned)(unsigned long long)shared;
#else
    const unsigned address = shared_address(shared);
#endif
    return shared + (0u - address) % 1024 / sizeof(act);
}
template <int TILES>
__device__ __forceinline__ constexpr int rows_together() {
    return BOX_ROWS;
}
// The part of a tile that the warpgroup computes with.
template <int TILES>
__device__ __forceinline__ act* own_part(act* tile) {
    // By a shuffle, so that the compiler knows it to be one for the whole warp.
    const int warpgroup = __shfl_sync(FULL_WARP, (int)threadIdx.x / (4 * WARP), 0);
    return tile + warpgroup * BOX_ROWS * DEPTH;
}
// Where a chunk of eight elements lies in a tile.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
    return row / BOX_ROWS * BOX_ROWS * DEPTH + chunk / 8 * BOX + row % BOX_ROWS * 64 + (chunk % 8 ^ row % 8) * 8;
}

// ROWS rows from `first` on into shared memory.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(act* tile, const Rows<const act>& from, int first) {
    constexpr int CHUNKS = DEPTH / 8, APART = THREADS / CHUNKS, STEPS = (ROWS + APART - 1) / APART;
    static_assert(APART % 8 == 0, "a thread's rows have one swizzle");
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, stride = from.stride, rows = from.count - first;
    const act* const at = from.row(first) + row * stride + chunk * 8;
    act* const to = tile + chunk_at(row, chunk);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int further_row = row + step * APART;
        if (ROWS % APART != 0 && further_row >= ROWS) break;
        act* const box_to = ROWS == BOX_ROWS ? to + step * APART * 64 : tile + chunk_at(further_row, chunk);
        cp_async_16(box_to, at + step * APART * stride, further_row < rows);
    }
}
// Waits for this thread's copies; after a __syncthreads all can compute with the tiles.
__device__ __forceinline__ void tiles_wait() {
    cp_async_wait<0>();
    shared_fence();
}

// c = a·bᵀ for the warpgroup's part of one tile and 64 rows of another, over the head's elements: begins.
__device__ __forceinline__ void scores(float (&c)[1][8][4], const act* a_tile, const act* b_tile) {
    const Operand a = operand_along_depth(a_tile), b = operand_along_depth(b_tile);
    settle(c);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        const int bytes = k / 64 * BOX * 2 + k % 64 * 2;
        wgmma_tiles(c, further(a, bytes), further(b, bytes), k > 0);
    }
    wgmma_commit();
}

// Sums of 64 columns, rounded to bf16, as an operand.
__device__ __forceinline__ void as_operand(unsigned (&a)[4][4], const float (&p)[1][8][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int n = i / 4 * 2 + i % 4 / 2, half = i % 2 * 2;
        a[i / 4][i % 4] = pack_bf16(p[0][n][half], p[0][n][half + 1]);
    }
}

// c += p·b for 64 rows of a tile b: begins.
template <int N>
__device__ __forceinline__ void accumulate(float (&c)[1][N][4], const unsigned (&p)[4][4], const act* b_tile) {
    const Operand b = operand_along_rows(b_tile);
    settle(c);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_registers(c, p[k], further(b, k * 2048));
    wgmma_commit();
}
template <int N>
__device__ __forceinline__ void accumulate(float (&c)[1][N][4], const float (&p)[1][8][4], const act* b_tile) {
    unsigned operand[4][4];
    as_operand(operand, p);
    accumulate(c, operand, b_tile);
}

// Puts sums, times a factor per row, into the warp's rows of the warpgroup's part of a tile.
template <int N>
__device__ __forceinline__ void stage(act* own, int, const float (&c)[1][N][4], const float (&factor)[1][2]) {
    const int warp = threadIdx.x / WARP % 4, group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4;
    // No other warp multiplies with the tile any more.
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            unsigned* to = (unsigned*)(own + chunk_at(warp * 16 + half * 8 + group, n)) + pair;
            *to = pack_bf16(c[0][n][half * 2] * factor[0][half], c[0][n][half * 2 + 1] * factor[0][half]);
        }
    }
}
// The warp writes its own 16 rows of the warpgroup's part of a tile, which become the rows from `first` on.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void store_tile(const act* own, const Rows<act>& to, int first, int) {
    const int warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (int i = lane; i < ROWS * (COLUMNS / 8); i += WARP) {
        const int row = i / (COLUMNS / 8), chunk = i % (COLUMNS / 8);
        if (first + row >= to.count) continue;
        *(uint4*)(to.row(first + row) + chunk * 8) = *(const uint4*)(own + chunk_at(warp * 16 + row, chunk));
    }
}

#endif

// Attention with bf16 activations on Hopper (sm_90a), head_dims 64 and 128: products by wgmma, tiles and their pipeline.
//
// The host chooses this file and the two after it over attention_tiles.cu by ATTENTION_HOPPER 1. Four warps, a warpgroup,
// multiply 64 rows together, one operand or both straight from shared memory. A block has two or three such warpgroups, and
// one more, its last, that only fetches what all of them go through: they never wait for each other, so that while one takes
// exponentials the others multiply.
//
// A tile is panels of 64 columns, each with all of the tile's rows. A row of a panel is 128 bytes, whose eight chunks of
// 16 bytes are permuted by exclusive or with the row's number: the swizzle of 128 bytes that wgmma undoes. Tiles are
// aligned to 1024 bytes.

#if ACT_BF16 && ATTENTION_HOPPER

#if HEAD_DIM != 64 && HEAD_DIM != 128
#error "attention_hopper.cu is for head_dims 64 and 128"
#endif

constexpr int DEPTH = HEAD_DIM;
constexpr int WARPGROUP = 4 * WARP;
// Rows of a warpgroup.
constexpr int OWN_ROWS = 64;
// Bytes of 16 rows of a panel.
constexpr int PANEL_16_ROWS = 16 * 128;

// ---- wgmma ----

#ifdef SANDERLING_EMULATE

// Where an operand starts, and the bytes from panel to panel. The products are computed at once.
struct Operand {
    const unsigned char* start;
    int panel;
};
__device__ __forceinline__ Operand operand_along_depth(const act* tile) { return {(const unsigned char*)tile, 0}; }
__device__ __forceinline__ Operand operand_along_rows(const act* tile, int rows) {
    return {(const unsigned char*)tile, rows * 128};
}
__device__ __forceinline__ Operand further(Operand operand, int bytes) { return {operand.start + bytes, operand.panel}; }
__device__ __forceinline__ float swizzled(Operand operand, int bytes) {
    unsigned long long address = (unsigned long long)(operand.start + bytes);
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
                              swizzled(right, k / 8 * 1024 + k % 8 * 128 + column / 64 * right.panel + column % 64 * 2);
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

struct EmulateArrivals {
    unsigned short count, pending;
    unsigned phase;
};
static_assert(sizeof(EmulateArrivals) == sizeof(unsigned long long), "a barrier holds it");
static thread_local EmulateBarrier emulate_named[8];
// Spoiled at the start of a block, as all that is thread_local.
inline EmulateBarrier& emulate_barrier(int index, int threads) {
    if (emulate_named[index].alive != threads) emulate_named[index] = {0, threads, 0};
    return emulate_named[index];
}
__device__ __forceinline__ void barrier_init(unsigned long long* barrier, int arrivals) {
    *(EmulateArrivals*)barrier = {(unsigned short)arrivals, (unsigned short)arrivals, 0};
}
__device__ __forceinline__ void barrier_arrive(unsigned long long* barrier) {
    EmulateArrivals& arrivals = *(EmulateArrivals*)barrier;
    if (--arrivals.pending > 0) return;
    arrivals.pending = arrivals.count;
    arrivals.phase++;
    emulate_block.progress = true;
}
__device__ __forceinline__ void barrier_wait(unsigned long long* barrier, int parity) {
    while ((((volatile EmulateArrivals*)barrier)->phase & 1) == (unsigned)parity) emulate_yield();
}
__device__ __forceinline__ void warpgroup_sync() {
    emulate_wait(emulate_barrier(threadIdx.x / WARPGROUP, WARPGROUP));
}
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {}
template <int REGISTERS>
__device__ __forceinline__ void more_registers() {}
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid) {
    if (valid) memcpy(shared, global, 8);
    else memset(shared, 0, 8);
}

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
// What is summed over is the rows, 8 of them in 1024 bytes; 64 columns further is the next panel.
__device__ __forceinline__ Operand operand_along_rows(const act* tile, int rows) {
    return (unsigned)(rows * 128 / 16) << 16 | (shared_address(tile) & 0x3ffff) >> 4;
}
__device__ __forceinline__ Operand further(Operand operand, int bytes) { return operand + bytes / 16; }

#define SUMS_1(n) "+f"(c[0][n][0]), "+f"(c[0][n][1]), "+f"(c[0][n][2]), "+f"(c[0][n][3])
#define SUMS_4(n) SUMS_1(n), SUMS_1(n + 1), SUMS_1(n + 2), SUMS_1(n + 3)
// c (64 × 8·N) = left (64 × 16, shared) · right (16 × 8·N, shared), added to c or not. A warp's part of c is 16 rows, in
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
__device__ __forceinline__ void wgmma_tiles(float (&c)[1][16][4], Operand left, Operand right, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}"
        : SUMS_4(0), SUMS_4(4), SUMS_4(8), SUMS_4(12)
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

// Barriers in shared memory: so many arrivals end a phase; those who wait for its end give its number's parity.
__device__ __forceinline__ void barrier_init(unsigned long long* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned long long* barrier, int parity) {
    unsigned done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
}
// All threads of the warpgroup.
__device__ __forceinline__ void warpgroup_sync() {
    asm volatile("bar.sync %0, 128;" ::"r"((int)threadIdx.x / WARPGROUP + 1) : "memory");
}
// What the warpgroup that fetches gives up, the others take.
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
// As cp_async_16, for 8 bytes.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 8 : 0)
                 : "memory");
}

#endif

// ---- Tiles ----

// The first multiple of 1024 bytes of dynamic shared memory.
__device__ __forceinline__ act* aligned_tiles(act* shared) {
#ifdef SANDERLING_EMULATE
    const unsigned address = (unsigned)(unsigned long long)shared;
#else
    const unsigned address = shared_address(shared);
#endif
    return shared + (0u - address) % 1024 / sizeof(act);
}
// By a shuffle, so that the compiler knows it to be one for the whole warp.
__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(FULL_WARP, (int)threadIdx.x / WARPGROUP, 0); }
// Where a chunk of eight elements lies in a tile of ROWS rows.
template <int ROWS>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
    return chunk / 8 * ROWS * 64 + row * 64 + (chunk % 8 ^ row % 8) * 8;
}

// ROWS rows from `first` on into shared memory, by a warpgroup. Rows past the end become zeros.
template <int ROWS>
__device__ __forceinline__ void load_tile(act* tile, const Rows<const act>& from, int first) {
    constexpr int CHUNKS = DEPTH / 8, APART = WARPGROUP / CHUNKS;
    static_assert(APART % 8 == 0 && ROWS % APART == 0, "a thread's rows have one swizzle");
    const int row = threadIdx.x % WARPGROUP / CHUNKS, chunk = threadIdx.x % CHUNKS, rows = from.count - first;
    const act* at = from.row(first + row) + chunk * 8;
    const long long apart = (long long)APART * from.stride;
    act* const to = tile + chunk_at<ROWS>(row, chunk);
#pragma unroll
    for (int step = 0; step < ROWS / APART; ++step) {
        cp_async_16(to + step * APART * 64, at, row + step * APART < rows);
        at += apart;
    }
}
// Waits until at most LEFT of this thread's groups of copies are under way, and makes the others known to wgmma.
template <int LEFT>
__device__ __forceinline__ void tiles_wait() {
    cp_async_wait<LEFT>();
    shared_fence();
}

// c = a·bᵀ for the warpgroup's 64 rows and the 8·N rows of another tile, over the head's elements: begins.
template <int N>
__device__ __forceinline__ void scores(float (&c)[1][N][4], const act* a_tile, const act* b_tile) {
    const Operand a = operand_along_depth(a_tile), b = operand_along_depth(b_tile);
    settle(c);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        wgmma_tiles(c, further(a, k / 64 * OWN_ROWS * 128 + k % 64 * 2), further(b, k / 64 * N * 8 * 128 + k % 64 * 2), k > 0);
    }
    wgmma_commit();
}

// Sums of 16·K columns, rounded to bf16, as an operand.
template <int K, int N>
__device__ __forceinline__ void as_operand(unsigned (&a)[K][4], const float (&p)[1][N][4]) {
    static_assert(N == K * 2, "two fragments make one");
#pragma unroll
    for (int i = 0; i < K * 4; ++i) {
        const int n = i / 4 * 2 + i % 4 / 2, half = i % 2 * 2;
        a[i / 4][i % 4] = pack_bf16(p[0][n][half], p[0][n][half + 1]);
    }
}

// c += p·b for the 16·K rows of a tile b: begins.
template <int N, int K>
__device__ __forceinline__ void accumulate(float (&c)[1][N][4], const unsigned (&p)[K][4], const act* b_tile) {
    const Operand b = operand_along_rows(b_tile, K * 16);
    settle(c);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K; ++k) wgmma_registers(c, p[k], further(b, k * PANEL_16_ROWS));
    wgmma_commit();
}

// Puts sums, times a factor per row, into the warpgroup's tile of 64 rows, and from there into the rows from `first` on.
__device__ __forceinline__ void store_sums(
    act* own, const float (&c)[1][DEPTH / 8][4], const float (&factor)[2], const Rows<act>& to, int first) {
    const int warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4;
    // No other warp multiplies with the tile any more.
    warpgroup_sync();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < DEPTH / 8; ++n) {
            unsigned* at = (unsigned*)(own + chunk_at<OWN_ROWS>(warp * 16 + half * 8 + group, n)) + pair;
            *at = pack_bf16(c[0][n][half * 2] * factor[half], c[0][n][half * 2 + 1] * factor[half]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * (DEPTH / 8); i += WARP) {
        const int row = warp * 16 + i / (DEPTH / 8), chunk = i % (DEPTH / 8);
        if (first + row >= to.count) continue;
        *(uint4*)(to.row(first + row) + chunk * 8) = *(const uint4*)(own + chunk_at<OWN_ROWS>(row, chunk));
    }
}

// ---- The pipeline ----

// Tiles that go round in STAGES places: an item's place is its number modulo STAGES.
template <int STAGES>
struct Ring {
    unsigned long long full[STAGES], empty[STAGES];

    // By one thread, before a __syncthreads.
    __device__ __forceinline__ void init(int consumers) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + stage, WARPGROUP);
            barrier_init(empty + stage, consumers * 4);
        }
    }
    // Of the warpgroup that fetches: the item's place is free; this thread's part of the item is there.
    __device__ __forceinline__ void wait_empty(int item) {
        if (item >= STAGES) barrier_wait(empty + item % STAGES, (item / STAGES - 1) & 1);
    }
    __device__ __forceinline__ void publish(int item) { barrier_arrive(full + item % STAGES); }
    // Of the others: the item is there; the warp is done with it.
    __device__ __forceinline__ void wait(int item) { barrier_wait(full + item % STAGES, item / STAGES & 1); }
    __device__ __forceinline__ void release(int item) {
        __syncwarp();
        if (threadIdx.x % WARP == 0) barrier_arrive(empty + item % STAGES);
    }
};

// Which tile and head of its sequence a block computes: of all heads the first tiles first, so that the ends of a sequence's
// heads come together, and heads that share keys side by side.
__device__ __forceinline__ int2 tile_and_head() {
    const int index = blockIdx.x + gridDim.x * blockIdx.y;
    return make_int2(index / gridDim.y, index % gridDim.y);
}

#endif

// Hopper's own instructions (sm_90a), which attention and the experts' products go through: barriers in shared memory, the
// tensor copy engine, and wgmma, by which the four warps of a warpgroup multiply 64 rows together, one operand or both
// straight from shared memory. On the CPU emulator/hopper.hpp stands in for them.

// Unused where Hopper's attention is left out.
[[maybe_unused]] constexpr int WARPGROUP = 4 * WARP;

// ---- Operands ----

// An operand of bfloat16 in shared memory, in rows of 128 bytes whose eight chunks of 16 bytes are permuted by exclusive or
// with the row's number (the swizzle of 128 bytes); eight rows are 1024 bytes, at a multiple of 1024. It has a side, along
// the rows or columns of the result, and a depth, which is summed over.
//
// This is the lower half of wgmma's matrix descriptor: address and leading offset in units of 16 bytes. No step within
// shared memory carries into the upper half, which is the same for all.
typedef unsigned Operand;
__device__ __forceinline__ unsigned long long descriptor(Operand operand) {
    return (unsigned long long)(1u << 30 | 1024 / 16) << 32 | operand;
}
// The rows are the side, and hold 64 of the depth each.
__device__ __forceinline__ Operand depth_contiguous(unsigned address) {
    return (unsigned)1 << 16 | (address & 0x3ffff) >> 4;
}
// The rows are the depth, and hold 64 of the side each; the next 64 of the side are `leading_bytes` further.
__device__ __forceinline__ Operand side_contiguous(unsigned address, int leading_bytes) {
    return (unsigned)(leading_bytes / 16) << 16 | (address & 0x3ffff) >> 4;
}
__device__ __forceinline__ Operand further(Operand operand, int bytes) { return operand + bytes / 16; }

// A CUtensorMap, which the host encodes.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

#ifdef SANDERLING_EMULATE

#include "hopper.hpp"

#else

// ---- Barriers ----

// So many arrivals, and bytes that were announced, end a phase; those who wait for its end give its number's parity.
__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and announces bytes that the copy engine will count off.
__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
    unsigned done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}
// Makes barriers just initialised known to the copy engine.
__device__ __forceinline__ void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Makes this thread's writes to shared memory known to wgmma and the copy engine.
__device__ __forceinline__ void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for THREADS threads that give the same number, from 1 on: 0 is that of __syncthreads.
template <int THREADS>
__device__ __forceinline__ void sync_some(int number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory");
}

// ---- Registers ----

// What a warpgroup that only fetches gives up, the others take.
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- The copy engine ----

// A box of a matrix (y, x) or, with `z`, of one of many, to shared memory.
__device__ __forceinline__ void load_box(unsigned to, const TensorMap& map, unsigned barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void load_box(unsigned to, const TensorMap& map, unsigned barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// ---- wgmma ----

// Before products whose sums or operands in registers were written otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most LEFT groups are under way.
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
#define SUMS_1(n) "+f"(c[0][n][0]), "+f"(c[0][n][1]), "+f"(c[0][n][2]), "+f"(c[0][n][3])
#define SUMS_4(n) SUMS_1(n), SUMS_1(n + 1), SUMS_1(n + 2), SUMS_1(n + 3)
#define SUMS_16(n) SUMS_4(n), SUMS_4(n + 4), SUMS_4(n + 8), SUMS_4(n + 12)
#define FIRST_32                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "  \
    "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "  \
    "%28, %29, %30, %31"
#define FIRST_64                                                         \
    FIRST_32                                                             \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
    "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "  \
    "%58, %59, %60, %61, %62, %63"
#define FIRST_128                                                        \
    FIRST_64                                                             \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, " \
    "%77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "  \
    "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "     \
    "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
    "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127"

// Keeps the compiler from using sums before the wait, or changing them after the products began.
template <int N>
__device__ __forceinline__ void settle(float (&c)[1][N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : SUMS_1(n)::"memory");
}

// The same for an operand in registers.
template <int K>
__device__ __forceinline__ void settle(unsigned (&a)[K][4]) {
#pragma unroll
    for (int k = 0; k < K; ++k) asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
}
// A copy in registers of its own: until a product is waited for, those of its operand may not even be read.
template <int K>
__device__ __forceinline__ void copy_operand(unsigned (&to)[K][4], const unsigned (&a)[K][4]) {
#pragma unroll
    for (int i = 0; i < K * 4; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(to[i / 4][i % 4]) : "r"(a[i / 4][i % 4]));
}

// c (64 × 8·N) = left (64 × 16, shared) · right (16 × 8·N, shared), added to c or not; both by their descriptors. A thread's
// c[0][n][{0, 1}] are row 16 · warp + lane / 4 and columns 8·n + 2·(lane % 4) + {0, 1}; c[0][n][{2, 3}] are 8 rows below.
template <bool left_side_contiguous, bool right_side_contiguous>
__device__ __forceinline__ void
wgmma(float (&c)[1][8][4], unsigned long long left, unsigned long long right, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" FIRST_32 "}, %32, %33, p, 1, 1, %35, %36;\n}"
        : SUMS_4(0), SUMS_4(4)
        : "l"(left), "l"(right), "r"((int)add), "n"((int)left_side_contiguous), "n"((int)right_side_contiguous));
}
template <bool left_side_contiguous, bool right_side_contiguous>
__device__ __forceinline__ void
wgmma(float (&c)[1][16][4], unsigned long long left, unsigned long long right, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" FIRST_64 "}, %64, %65, p, 1, 1, %67, %68;\n}"
        : SUMS_16(0)
        : "l"(left), "l"(right), "r"((int)add), "n"((int)left_side_contiguous), "n"((int)right_side_contiguous));
}
template <bool left_side_contiguous, bool right_side_contiguous>
__device__ __forceinline__ void
wgmma(float (&c)[1][32][4], unsigned long long left, unsigned long long right, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" FIRST_128 "}, %128, %129, p, 1, 1, %131, %132;\n}"
        : SUMS_16(0), SUMS_16(16)
        : "l"(left), "l"(right), "r"((int)add), "n"((int)left_side_contiguous), "n"((int)right_side_contiguous));
}
// c (64 × 8·N) += a (64 × 16, registers, a warp's part as mma has it) · right (16 × 8·N, shared, its side contiguous).
__device__ __forceinline__ void
wgmma_registers(float (&c)[1][8][4], const unsigned (&a)[4], unsigned long long right) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" FIRST_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
        : SUMS_4(0), SUMS_4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "r"(1));
}
__device__ __forceinline__ void
wgmma_registers(float (&c)[1][16][4], const unsigned (&a)[4], unsigned long long right) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" FIRST_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
        : SUMS_16(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "r"(1));
}

#undef SUMS_1
#undef SUMS_4
#undef SUMS_16
#undef FIRST_32
#undef FIRST_64
#undef FIRST_128

#endif

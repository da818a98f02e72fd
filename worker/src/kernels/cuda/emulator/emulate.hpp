// CUDA's blocks on the CPU, for tests of the kernels on machines without a GPU.
//
// Each thread of a block is a fiber that runs until it has to wait for others: at a barrier of the block or of its warp. The
// blocks of a launch run one after the other. Shared memory that the launch sizes starts as NaNs and ends at a guarded place;
// threads that wait for ones that never come are told by name. Nothing here is safe to call from two threads at once.

#ifndef SANDERLING_EMULATE_HPP
#define SANDERLING_EMULATE_HPP

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __device__
#define __host__
#define __global__ __attribute__((visibility("default")))
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

// ---- Types ----

struct uint3 {
    unsigned x, y, z;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

struct __nv_bfloat16 {
    unsigned short bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float((unsigned)value.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return {0x7fff};
    return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline unsigned emulate_pack_bf16(float low, float high) {
    return __float2bfloat16_rn(low).bits | (unsigned)__float2bfloat16_rn(high).bits << 16;
}
// To the nearest, ties away from zero.
inline unsigned emulate_to_tf32(float value) { return (__float_as_uint(value) + 0x1000u) & ~0x1fffu; }

// ---- Functions ----

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz((unsigned)bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
template <typename T>
inline T __ldg(const T* from) {
    return *from;
}

// A fiber is only interrupted where it waits, so that plain code is atomic.
template <typename T, typename U>
inline T atomicAdd(T* to, U value) {
    const T before = *to;
    *to = before + (T)value;
    return before;
}
template <typename T, typename U>
inline T atomicMax(T* to, U value) {
    const T before = *to;
    if ((T)value > before) *to = (T)value;
    return before;
}
template <typename T, typename U>
inline T atomicMin(T* to, U value) {
    const T before = *to;
    if ((T)value < before) *to = (T)value;
    return before;
}
template <typename T, typename U>
inline T atomicOr(T* to, U value) {
    const T before = *to;
    *to = before | (T)value;
    return before;
}
template <typename T, typename U>
inline T atomicExch(T* to, U value) {
    const T before = *to;
    *to = (T)value;
    return before;
}
template <typename T>
inline T atomicCAS(T* to, T expected, T value) {
    const T before = *to;
    if (before == expected) *to = value;
    return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void emulate_fail(const char* reason) {
    fprintf(stderr, "emulated kernel: %s\n", reason);
    abort();
}
inline void __trap() { emulate_fail("a trap"); }

// ---- Fibers ----

#define EMULATE_THREADS_MAX 1024
#define EMULATE_STACK_BYTES (256 * 1024)
#define EMULATE_GUARD_BYTES 256

#if defined(__x86_64__)
// Keeps what a call must keep on the old stack, and goes on with the new one.
extern "C" void emulate_switch(void** from, void* to);
asm(".text\n"
    ".type emulate_switch, @function\n"
    "emulate_switch:\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n"
    "movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
    "ret\n");
#endif

struct EmulateFiber {
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    char* stack;
    bool done;
};

// What a warp's lanes hand to each other.
struct EmulateLane {
    unsigned long long value;
    unsigned a[4], b[2];
    const void* address;
};

struct EmulateBarrier {
    int waiting, alive;
    unsigned generation;
};

struct EmulateBlock {
    EmulateFiber fibers[EMULATE_THREADS_MAX];
    EmulateFiber scheduler;
    EmulateBarrier all, warps[EMULATE_THREADS_MAX / 32];
    EmulateLane lanes[EMULATE_THREADS_MAX];
    std::vector<char> memory;
    char* shared;
    int current;
    bool progress;
    void (*call)(void* kernel, const long long* words, const float* floats);
    void* kernel;
    const long long* words;
    const float* floats;
};

static EmulateBlock emulate_block;
static uint3 threadIdx, blockIdx, blockDim, gridDim;

inline void* emulate_dynamic_shared() { return emulate_block.shared; }

inline void emulate_go(EmulateFiber& from, EmulateFiber& to) {
#if defined(__x86_64__)
    emulate_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
}

inline void emulate_yield() {
    EmulateBlock& block = emulate_block;
    emulate_go(block.fibers[block.current], block.scheduler);
}

inline void emulate_wait(EmulateBarrier& barrier) {
    const unsigned generation = barrier.generation;
    emulate_block.progress = true;
    if (++barrier.waiting == barrier.alive) {
        barrier.waiting = 0;
        barrier.generation++;
        return;
    }
    while (barrier.generation == generation) emulate_yield();
}

// A thread that is done is waited for no more.
inline void emulate_leave(EmulateBarrier& barrier) {
    barrier.alive--;
    if (barrier.waiting > 0 && barrier.waiting == barrier.alive) {
        barrier.waiting = 0;
        barrier.generation++;
    }
}

inline void __syncthreads() { emulate_wait(emulate_block.all); }
inline EmulateBarrier& emulate_warp() { return emulate_block.warps[emulate_block.current / 32]; }
inline void __syncwarp(unsigned = 0xffffffffu) { emulate_wait(emulate_warp()); }

inline EmulateLane* emulate_lanes() { return emulate_block.lanes + emulate_block.current / 32 * 32; }
inline int emulate_lane() { return emulate_block.current % 32; }

template <typename T>
inline T emulate_exchange(T value, int from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    if (emulate_warp().alive != 32) emulate_fail("a shuffle without all lanes of the warp");
    EmulateLane* lanes = emulate_lanes();
    memcpy(&lanes[emulate_lane()].value, &value, sizeof(T));
    __syncwarp();
    T result;
    memcpy(&result, &lanes[from].value, sizeof(T));
    __syncwarp();
    return result;
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int from) {
    return emulate_exchange(value, from & 31);
}
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulate_exchange(value, (emulate_lane() ^ mask) & 31);
}
template <typename T>
inline T __shfl_up_sync(unsigned, T value, int by) {
    const int lane = emulate_lane();
    return emulate_exchange(value, lane >= by ? lane - by : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned, T value, int by) {
    const int lane = emulate_lane();
    return emulate_exchange(value, lane + by < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned, int vote) {
    EmulateLane* lanes = emulate_lanes();
    if (emulate_warp().alive != 32) emulate_fail("a vote without all lanes of the warp");
    lanes[emulate_lane()].value = vote != 0;
    __syncwarp();
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= (unsigned)lanes[lane].value << lane;
    __syncwarp();
    return votes;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }

// ---- Launches ----

inline void emulate_enter() {
    EmulateBlock& block = emulate_block;
    block.call(block.kernel, block.words, block.floats);
    const int current = block.current;
    block.fibers[current].done = true;
    block.progress = true;
    emulate_leave(block.all);
    emulate_leave(block.warps[current / 32]);
    emulate_yield();
}

inline void emulate_prepare(EmulateFiber& fiber) {
    if (fiber.stack == nullptr) fiber.stack = (char*)malloc(EMULATE_STACK_BYTES);
    fiber.done = false;
#if defined(__x86_64__)
    // Six registers and the address to return to, with the stack as a call leaves it: 8 bytes off a multiple of 16.
    void** top = (void**)(((unsigned long long)fiber.stack + EMULATE_STACK_BYTES) / 16 * 16) - 1;
    *--top = (void*)emulate_enter;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = EMULATE_STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, emulate_enter, 0);
#endif
}

// Arguments by their place among the integers and addresses, and among the floats: C's calling conventions for x86-64 and
// for ARM pass the two in registers of their own, and what has no register in the order of the parameters in slots of eight
// bytes, so that a function of fewer parameters finds them all as long as there are at most eight floats.
inline void emulate_call(void* kernel, const long long* w, const float* f) {
    typedef void (*Kernel)(
        float, float, float, float, float, float, float, float, long long, long long, long long, long long, long long,
        long long, long long, long long, long long, long long, long long, long long, long long, long long, long long,
        long long, long long, long long, long long, long long, long long, long long, long long, long long);
    ((Kernel)kernel)(
        f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10],
        w[11], w[12], w[13], w[14], w[15], w[16], w[17], w[18], w[19], w[20], w[21], w[22], w[23]);
}

// Runs all blocks of a launch. `words` has room for 24 integers and addresses, `floats` for 8 floats.
extern "C" __attribute__((visibility("default"))) void emulate_launch(
    void* kernel, const unsigned* grid, const unsigned* block_size, unsigned shared_bytes, const long long* words,
    const float* floats) {
    EmulateBlock& block = emulate_block;
    const unsigned threads = block_size[0] * block_size[1] * block_size[2];
    if (threads == 0 || threads > EMULATE_THREADS_MAX) emulate_fail("a block of a size that there is not");
    if (threads % 32 != 0) emulate_fail("a block of less than whole warps");
    block.kernel = kernel, block.words = words, block.floats = floats, block.call = emulate_call;
    block.memory.resize(shared_bytes + 1024 + EMULATE_GUARD_BYTES);
    block.shared = (char*)(((unsigned long long)block.memory.data() + 1023) / 1024 * 1024);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block_size[0], block_size[1], block_size[2]};
    for (unsigned index = 0; index < grid[0] * grid[1] * grid[2]; index++) {
        blockIdx = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
        memset(block.shared, 0xff, shared_bytes);
        memset(block.shared + shared_bytes, 0x5a, EMULATE_GUARD_BYTES);
        block.all = {0, (int)threads, 0};
        for (unsigned warp = 0; warp < threads / 32; warp++) block.warps[warp] = {0, 32, 0};
        for (unsigned thread = 0; thread < threads; thread++) emulate_prepare(block.fibers[thread]);
        for (unsigned left = threads; left > 0;) {
            left = 0;
            block.progress = false;
            for (unsigned thread = 0; thread < threads; thread++) {
                if (block.fibers[thread].done) continue;
                block.current = (int)thread;
                threadIdx = {
                    thread % block_size[0], thread / block_size[0] % block_size[1], thread / block_size[0] / block_size[1]};
                emulate_go(block.scheduler, block.fibers[thread]);
                left += !block.fibers[thread].done;
            }
            if (left > 0 && !block.progress) emulate_fail("threads wait for others that never come");
        }
        for (int i = 0; i < EMULATE_GUARD_BYTES; i++)
            if (block.shared[shared_bytes + i] != 0x5a) emulate_fail("a write past the end of shared memory");
    }
}

#endif

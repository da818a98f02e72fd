// CUDA's blocks on the CPU, for tests of the kernels on machines without a GPU.
//
// Each thread of a block is a fiber that runs until it has to wait for others: at a barrier of the block or of its warp. The
// blocks of a launch run one after the other. What a kernel may not rely on is as bad as it can be: threads that may run go on
// in an order that is drawn anew each time ($EMULATE_SEED draws other ones, 0 is their own order), and shared memory starts
// as NaNs and, where the launch sizes it, ends at a guarded place. A kernel that fails, or whose threads wait for ones that
// never come, is told by name. Not offered: masks of less than a warp, `extern __shared__` (see DYNAMIC_SHARED) and clusters.
// Nothing here is safe to call from two threads at once.

#ifndef SANDERLING_EMULATE_HPP
#define SANDERLING_EMULATE_HPP

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __device__
#define __host__
#define __global__ __attribute__((visibility("default")))
#define __forceinline__ inline
// Thread-local, so that they lie side by side for the start of a block to spoil: fibers are all one thread.
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

// ---- Types ----

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

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
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll((unsigned long long)bits); }
inline unsigned __brev(unsigned bits) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (bits >> i & 1) << (31 - i);
    return reversed;
}
inline int __float_as_int(float value) { return (int)__float_as_uint(value); }
inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
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
inline T atomicAnd(T* to, U value) {
    const T before = *to;
    *to = before & (T)value;
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
[[noreturn]] void emulate_fail(const char* reason);
inline void __trap() { emulate_fail("a trap"); }
inline void __nanosleep(unsigned) {}

// ---- Fibers ----

#define EMULATE_THREADS_MAX 1024
#define EMULATE_STACK_BYTES (256 * 1024)
#define EMULATE_GUARD_BYTES 256
// Turns of all threads in which none came to a barrier or to its end: in one or a few, they may have been let go by others.
#define EMULATE_IDLE_ROUNDS_MAX 1000

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
    // Products and copies that it has begun and not waited for.
    int products, copies;
    // Whether wgmma may use its registers.
    bool fenced;
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
    unsigned shared_bytes;
    // Of the shared memory that a launch sizes, what wgmma and the copy engine know, and of each 16 bytes which thread has
    // copied there since its last fence: its number from 1 on, or 0.
    std::vector<char> known;
    std::vector<unsigned short> copied_by;
    int current, threads;
    // What the copy engine was asked for and has not brought.
    int boxes;
    bool progress;
    void (*call)(void* kernel, const long long* words, const float* floats);
    void* kernel;
    const long long* words;
    const float* floats;
};

static EmulateBlock emulate_block;
static uint3 threadIdx, blockIdx, blockDim, gridDim;

[[noreturn]] inline void emulate_fail(const char* reason) {
    Dl_info found = {};
    const bool named = dladdr(emulate_block.kernel, &found) != 0 && found.dli_sname != nullptr;
    fprintf(
        stderr, "emulated kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s\n", named ? found.dli_sname : "?", blockIdx.x,
        blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, reason);
    abort();
}

inline void* emulate_dynamic_shared() { return emulate_block.shared; }

// Numbers for addresses in shared memory: what the launch sizes from 0 on, what kernels declare around the middle.
#define EMULATE_STATIC_SHARED 0x80000000u
static thread_local char emulate_shared_mark;
inline unsigned emulate_shared_address(const void* shared) {
    const EmulateBlock& block = emulate_block;
    const char* at = (const char*)shared;
    if (at >= block.shared && at <= block.shared + block.shared_bytes) return (unsigned)(at - block.shared);
    return EMULATE_STATIC_SHARED + (unsigned)(at - &emulate_shared_mark);
}
inline char* emulate_shared(unsigned address) {
    const EmulateBlock& block = emulate_block;
    if (address <= block.shared_bytes) return block.shared + address;
    return &emulate_shared_mark + (int)(address - EMULATE_STATIC_SHARED);
}

// A copy by cp.async is a thread's own write, of which only its own fence tells wgmma.
inline void emulate_copied(const void* shared) {
    const unsigned address = emulate_shared_address(shared);
    if (address < emulate_block.shared_bytes) emulate_block.copied_by[address / 16] = (unsigned short)(emulate_block.current + 1);
}

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
inline void emulate_whole(unsigned mask) {
    if (mask != 0xffffffffu) emulate_fail("a mask of less than a warp, which the emulator lacks");
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulate_whole(mask);
    emulate_wait(emulate_warp());
}
inline int __syncthreads_count(int vote) {
    EmulateBlock& block = emulate_block;
    block.lanes[block.current].value = vote != 0;
    __syncthreads();
    int votes = 0;
    for (int thread = 0; thread < block.threads; thread++)
        if (!block.fibers[thread].done) votes += (int)block.lanes[thread].value;
    __syncthreads();
    return votes;
}
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) != 0; }
inline int __syncthreads_and(int vote) { return __syncthreads_count(!vote) == 0; }

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
inline T __shfl_sync(unsigned lanes, T value, int from) {
    emulate_whole(lanes);
    return emulate_exchange(value, from & 31);
}
template <typename T>
inline T __shfl_xor_sync(unsigned lanes, T value, int mask) {
    emulate_whole(lanes);
    return emulate_exchange(value, (emulate_lane() ^ mask) & 31);
}
template <typename T>
inline T __shfl_up_sync(unsigned lanes, T value, int by) {
    emulate_whole(lanes);
    const int lane = emulate_lane();
    return emulate_exchange(value, lane >= by ? lane - by : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned lanes, T value, int by) {
    emulate_whole(lanes);
    const int lane = emulate_lane();
    return emulate_exchange(value, lane + by < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
    emulate_whole(mask);
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

#if defined(__linux__)
inline int emulate_find_shared(struct dl_phdr_info* module, size_t, void* found) {
    for (int i = 0; i < module->dlpi_phnum; i++) {
        if (module->dlpi_phdr[i].p_type != PT_TLS) continue;
        char* first = (char*)module->dlpi_tls_data;
        const size_t bytes = module->dlpi_phdr[i].p_memsz;
        if (first > &emulate_shared_mark || first + bytes <= &emulate_shared_mark) continue;
        ((char**)found)[0] = first, ((char**)found)[1] = first + bytes;
        return 1;
    }
    return 0;
}
#endif

// Where the static shared memory lies: there is nothing else that is thread-local in a library of kernels.
inline void emulate_static_shared(char* (&range)[2]) {
#if defined(__linux__)
    emulate_shared_mark = 1;
    dl_iterate_phdr(emulate_find_shared, range);
#endif
}

// The order in which threads go on until they wait again.
inline void emulate_shuffle(unsigned* order, unsigned threads, unsigned long long& state) {
    for (unsigned left = threads; left > 1 && state != 0; left--) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        const unsigned other = (unsigned)(state >> 33) % left, last = order[left - 1];
        order[left - 1] = order[other], order[other] = last;
    }
}

inline void emulate_enter() {
    EmulateBlock& block = emulate_block;
    block.call(block.kernel, block.words, block.floats);
    const int current = block.current;
    if (block.fibers[current].products != 0) emulate_fail("products that nobody waited for");
    if (block.fibers[current].copies != 0) emulate_fail("copies that nobody waited for");
    block.fibers[current].done = true;
    block.progress = true;
    emulate_leave(block.all);
    emulate_leave(block.warps[current / 32]);
    emulate_yield();
}

inline void emulate_prepare(EmulateFiber& fiber) {
    if (fiber.stack == nullptr) fiber.stack = (char*)malloc(EMULATE_STACK_BYTES);
    fiber.done = false;
    fiber.products = fiber.copies = 0;
    fiber.fenced = false;
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
    block.threads = (int)threads;
    block.shared_bytes = shared_bytes;
    block.memory.resize(shared_bytes + 1024 + EMULATE_GUARD_BYTES);
    block.shared = (char*)(((unsigned long long)block.memory.data() + 1023) / 1024 * 1024);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block_size[0], block_size[1], block_size[2]};
    const char* seed = getenv("EMULATE_SEED");
    unsigned long long state = seed != nullptr ? strtoull(seed, nullptr, 10) * 0x9e3779b97f4a7c15ull : 1;
    char* static_shared[2] = {emulate_block.memory.data(), emulate_block.memory.data()};
    emulate_static_shared(static_shared);
    unsigned order[EMULATE_THREADS_MAX];
    for (unsigned thread = 0; thread < threads; thread++) order[thread] = thread;
    for (unsigned index = 0; index < grid[0] * grid[1] * grid[2]; index++) {
        blockIdx = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
        memset(static_shared[0], 0xff, static_shared[1] - static_shared[0]);
        memset(block.shared, 0xff, shared_bytes);
        block.known.assign(shared_bytes, (char)0xff);
        block.copied_by.assign(shared_bytes / 16 + 1, 0);
        memset(block.shared + shared_bytes, 0x5a, EMULATE_GUARD_BYTES);
        block.all = {0, (int)threads, 0};
        for (unsigned warp = 0; warp < threads / 32; warp++) block.warps[warp] = {0, 32, 0};
        for (unsigned thread = 0; thread < threads; thread++) emulate_prepare(block.fibers[thread]);
        unsigned idle_rounds = 0;
        for (unsigned left = threads; left > 0;) {
            left = 0;
            block.progress = false;
            emulate_shuffle(order, threads, state);
            for (unsigned turn = 0; turn < threads; turn++) {
                const unsigned thread = order[turn];
                if (block.fibers[thread].done) continue;
                block.current = (int)thread;
                threadIdx = {
                    thread % block_size[0], thread / block_size[0] % block_size[1], thread / block_size[0] / block_size[1]};
                emulate_go(block.scheduler, block.fibers[thread]);
                left += !block.fibers[thread].done;
            }
            idle_rounds = block.progress ? 0 : idle_rounds + 1;
            if (left > 0 && idle_rounds > EMULATE_IDLE_ROUNDS_MAX) emulate_fail("threads wait for others that never come");
        }
        if (block.boxes != 0) emulate_fail("boxes that nobody waited for");
        for (int i = 0; i < EMULATE_GUARD_BYTES; i++)
            if (block.shared[shared_bytes + i] != 0x5a) emulate_fail("a write past the end of shared memory");
    }
}

#endif

// The instructions of hopper.cuh on the CPU: barriers in shared memory that count arrivals and bytes, the tensor copy engine
// with its swizzle, and wgmma, which reads by descriptors as PTX defines their layouts.
//
// What the device may do at any time is done at the worst one. What a box overwrites is gone at once, and it arrives when somebody
// waits for its barrier, so that a tile that is asked for too early is seen, and one that is read without its wait; wgmma reads
// shared memory and writes its sums only when it is waited for, so that a tile that is given back too early is seen, and so
// are sums that are used before. Copies by cp.async are like boxes (mma.hpp).
//
// wgmma and the copy engine know of a thread's writes to shared memory, of barriers and of registers only what a fence has
// told them, and a kernel that has them use more fails. It is not known which thread has stored what, so that any thread's
// shared_fence tells of all that was stored; of what cp.async copied only that of the thread whose copy it was.
//
// Not seen are stores that leave the bytes as they were, registers that are written between a fence and the product, an operand
// in registers that is read while its product is under way, a __threadfence that is missing, what the order in which threads see
// each other's plain writes may do, as a thread goes on alone until it waits, and what registers that a warpgroup gave up would
// be missed for.

#ifndef SANDERLING_HOPPER_HPP
#define SANDERLING_HOPPER_HPP

#include "emulate.hpp"

// ---- Barriers ----

// What a barrier's eight bytes hold. One that nobody initialised is all ones, and never comes to an end.
struct EmulateArrivals {
    unsigned count : 10, pending : 10, phase : 1;
    int bytes;
};
static_assert(sizeof(EmulateArrivals) == sizeof(unsigned long long), "a barrier holds it");

inline EmulateArrivals& emulate_arrivals(unsigned barrier) {
    if (barrier % 8 != 0) emulate_fail("a barrier at an address that is no multiple of 8");
    return *(EmulateArrivals*)emulate_shared(barrier);
}
inline void emulate_flip(EmulateArrivals& arrivals) {
    if (arrivals.pending > 0 || arrivals.bytes > 0) return;
    arrivals.phase ^= 1;
    arrivals.pending = arrivals.count;
    emulate_block.progress = true;
}
// Barriers that the copy engine was not told of, and the thread that can.
struct EmulateUntold {
    unsigned barrier;
    int thread;
};
static std::vector<EmulateUntold> emulate_untold;

inline void barrier_init(unsigned barrier, int count) {
    emulate_arrivals(barrier) = {(unsigned)count, (unsigned)count, 0, 0};
    for (size_t i = emulate_untold.size(); i-- > 0;)
        if (emulate_untold[i].barrier == barrier) emulate_untold.erase(emulate_untold.begin() + i);
    emulate_untold.push_back({barrier, emulate_block.current});
}
inline void barrier_arrive(unsigned barrier) {
    EmulateArrivals& arrivals = emulate_arrivals(barrier);
    if (arrivals.pending == 0) emulate_fail("more arrivals at a barrier than it counts");
    arrivals.pending--;
    emulate_flip(arrivals);
}
inline void barrier_expect(unsigned barrier, int bytes) {
    emulate_arrivals(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void emulate_deliver(unsigned barrier);
inline void barrier_wait(unsigned barrier, int parity) {
    const volatile EmulateArrivals& arrivals = emulate_arrivals(barrier);
    while (arrivals.phase == (unsigned)parity) {
        emulate_deliver(barrier);
        if (arrivals.phase == (unsigned)parity) emulate_yield();
    }
}
inline void barrier_fence() {
    for (size_t i = emulate_untold.size(); i-- > 0;)
        if (emulate_untold[i].thread == emulate_block.current) emulate_untold.erase(emulate_untold.begin() + i);
}

// Whether wgmma and the copy engine know what is in shared memory there.
inline bool emulate_is_known(unsigned address, unsigned bytes) {
    const EmulateBlock& block = emulate_block;
    if (address + bytes > block.shared_bytes) emulate_fail("an operand past the end of the shared memory that the launch sizes");
    return memcmp(block.known.data() + address, block.shared + address, bytes) == 0;
}
inline void emulate_know(unsigned address, unsigned bytes) {
    memcpy(emulate_block.known.data() + address, emulate_block.shared + address, bytes);
}
inline void shared_fence() {
    EmulateBlock& block = emulate_block;
    const unsigned short mine = (unsigned short)(block.current + 1);
    for (unsigned at = 0; at < block.shared_bytes; at += 16) {
        unsigned short& by = block.copied_by[at / 16];
        if (by != 0 && by != mine) continue;
        by = 0;
        emulate_know(at, block.shared_bytes - at < 16 ? block.shared_bytes - at : 16);
    }
}

// Spoiled at the start of a block, as all that is thread-local.
static thread_local EmulateBarrier emulate_some[16];
template <int THREADS>
void sync_some(int number) {
    EmulateBarrier& barrier = emulate_some[number];
    if (barrier.alive != THREADS) barrier = {0, THREADS, 0};
    emulate_wait(barrier);
}

template <int REGISTERS>
void fewer_registers() {}
template <int REGISTERS>
void more_registers() {}

// ---- The copy engine ----

// What tests put into a TensorMap: experts_hopper.cpp, and the stand-in for CUDA's driver.
struct EmulateTensor {
    const bf16* data;
    long long sizes[3], strides[2];
};

// The 16 bytes of a row of 128 change places by the row's number.
inline unsigned emulate_swizzle(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

// A box that is on its way.
struct EmulateBox {
    unsigned to, barrier;
    EmulateTensor tensor;
    int x, y, z;
};
static std::vector<EmulateBox> emulate_boxes;

inline void load_box(unsigned to, const TensorMap& map, unsigned barrier, int x, int y, int z = 0) {
    if (to % 1024 != 0) emulate_fail("a swizzled box that does not start at a multiple of 1024 bytes");
    if (!emulate_is_known(to, 64 * 128)) emulate_fail("a box over what was written before a fence");
    for (const EmulateUntold& untold : emulate_untold)
        if (untold.barrier == barrier) emulate_fail("a box for a barrier without its fence");
    emulate_boxes.push_back({to, barrier, *(const EmulateTensor*)&map, x, y, z});
    emulate_block.boxes++;
    memset(emulate_shared(to), 0xff, 64 * 128);
    emulate_know(to, 64 * 128);
    // Nobody's copies any more.
    for (unsigned at = to / 16; at < (to + 64 * 128) / 16; at++) emulate_block.copied_by[at] = 0;
}
inline void emulate_arrive(const EmulateBox& box) {
    for (int row = 0; row < 64; row++)
        for (int column = 0; column < 64; column++) {
            const EmulateTensor& tensor = box.tensor;
            const long long at[3] = {box.x + column, box.y + row, box.z};
            bool inside = true;
            for (int axis = 0; axis < 3; axis++) inside = inside && at[axis] >= 0 && at[axis] < tensor.sizes[axis];
            const bf16 value =
                inside ? tensor.data[at[2] * tensor.strides[1] + at[1] * tensor.strides[0] + at[0]] : bf16{0};
            memcpy(emulate_shared(emulate_swizzle(box.to + row * 128 + column * 2)), &value, 2);
        }
    emulate_know(box.to, 64 * 128);
    EmulateArrivals& arrivals = emulate_arrivals(box.barrier);
    arrivals.bytes -= 64 * 128;
    emulate_flip(arrivals);
}
// What is on its way to a barrier arrives.
inline void emulate_deliver(unsigned barrier) {
    for (size_t i = 0; i < emulate_boxes.size();) {
        if (emulate_boxes[i].barrier != barrier) {
            i++;
            continue;
        }
        emulate_arrive(emulate_boxes[i]);
        emulate_boxes.erase(emulate_boxes.begin() + i);
        emulate_block.boxes--;
    }
}

// ---- wgmma ----

// A product that was begun: with one operand in shared memory, or both.
struct EmulateProduct {
    float* c;
    int columns;
    unsigned long long left, right;
    bool left_side, right_side, in_registers, add;
    unsigned a[4][4]; // a lane's rows of the left operand: `a` of the four lanes that hold them
    int group;
    const unsigned* own; // the lane's part of them, which must live until the wait, and what it was
    unsigned own_before[4];
};
struct EmulateProducts {
    std::vector<EmulateProduct> begun;
    int groups;
};
static EmulateProducts emulate_products[EMULATE_THREADS_MAX];

// This thread's. What was left by a block before, which failed, is forgotten.
inline EmulateProducts& emulate_mine() {
    EmulateProducts& mine = emulate_products[emulate_block.current];
    if (emulate_block.fibers[emulate_block.current].products == 0) mine.begun.clear();
    return mine;
}

// An element of an operand: PTX's canonical layouts for a swizzle of 128 bytes.
inline float emulate_operand(unsigned long long descriptor, bool side_contiguous, int side, int depth) {
    if (descriptor >> 62 != 1) emulate_fail("a descriptor without the swizzle of 128 bytes");
    const unsigned start = (descriptor & 0x3fff) << 4;
    const unsigned leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const unsigned at = side_contiguous ? side % 64 * 2 + side / 64 * leading + depth % 8 * 128 + depth / 8 * stride
                                        : side % 8 * 128 + side / 8 * stride + depth * 2;
    const unsigned address = emulate_swizzle(start + at);
    if (!emulate_is_known(address, 2)) emulate_fail("a product of what was written without a fence, or after it began");
    bf16 value;
    memcpy(&value, emulate_shared(address), 2);
    return to_float(value);
}
inline void emulate_run(const EmulateProduct& product) {
    if (product.in_registers && memcmp(product.own, product.own_before, sizeof(product.own_before)) != 0)
        emulate_fail("an operand in registers that changed before the wait");
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int half = 0; half < 2; half++) {
        float left[16];
        for (int k = 0; k < 16; k++) {
            const unsigned pair = product.a[k % 8 / 2][half + k / 8 * 2];
            left[k] = product.in_registers ? (k % 2 ? high_bf16(pair) : low_bf16(pair))
                                           : emulate_operand(product.left, product.left_side, row + half * 8, k);
        }
        for (int j = 0; j < product.columns / 4; j++) {
            float sum = 0.0f;
            for (int k = 0; k < 16; k++)
                sum += left[k] * emulate_operand(product.right, product.right_side, j / 2 * 8 + column + j % 2, k);
            float& c = product.c[j / 2 * 4 + half * 2 + j % 2];
            c = product.add ? c + sum : sum;
        }
    }
}
inline void emulate_begin(EmulateProduct product) {
    EmulateProducts& mine = emulate_mine();
    if (!emulate_block.fibers[emulate_block.current].fenced) emulate_fail("a product of registers without a fence");
    product.group = mine.groups;
    mine.begun.push_back(product);
    emulate_block.fibers[emulate_block.current].products++;
}

inline void wgmma_fence() { emulate_block.fibers[emulate_block.current].fenced = true; }
// Lanes of a warp are together at every instruction of a product.
inline void wgmma_commit() {
    __syncwarp();
    emulate_mine().groups++;
}
template <int LEFT>
void wgmma_wait() {
    __syncwarp();
    EmulateProducts& mine = emulate_mine();
    size_t done = 0;
    while (done < mine.begun.size() && mine.begun[done].group < mine.groups - LEFT) emulate_run(mine.begun[done++]);
    mine.begun.erase(mine.begun.begin(), mine.begun.begin() + done);
    EmulateFiber& fiber = emulate_block.fibers[emulate_block.current];
    fiber.products -= (int)done;
    // Sums that came are the thread's, until its next fence.
    fiber.fenced = fiber.fenced && done == 0;
    __syncwarp();
}
template <int N>
void settle(float (&c)[1][N][4]) {
    for (const EmulateProduct& product : emulate_mine().begun)
        if (product.c == &c[0][0][0]) emulate_fail("sums of products that were not waited for");
}
template <int K>
void settle(unsigned (&)[K][4]) {}
template <int K>
void copy_operand(unsigned (&to)[K][4], const unsigned (&a)[K][4]) {
    memcpy(to, a, sizeof(to));
}
template <bool left_side_contiguous, bool right_side_contiguous, int N>
void wgmma(float (&c)[1][N][4], unsigned long long left, unsigned long long right, bool add) {
    emulate_begin({&c[0][0][0], N * 8, left, right, left_side_contiguous, right_side_contiguous, false, add});
}
template <int N>
void wgmma_registers(float (&c)[1][N][4], const unsigned (&a)[4], unsigned long long right) {
    EmulateProduct product = {&c[0][0][0], N * 8, 0, right, false, true, true, true};
    product.own = a;
    memcpy(product.own_before, a, sizeof(a));
    const int first = threadIdx.x % WARP / 4 * 4;
    for (int i = 0; i < 16; i++) product.a[i / 4][i % 4] = __shfl_sync(FULL_WARP, a[i % 4], first + i / 4);
    emulate_begin(product);
}

#endif

// The instructions of experts_hopper.cu on the CPU: barriers in shared memory that count bytes, the tensor copy engine with its
// swizzle, and wgmma, which reads by descriptors as PTX defines their layouts.
//
// What the device may do at any time is done at the worst one: boxes arrive at once, and wgmma reads only when it is waited
// for, so that a slice that is given back too early is seen.

#ifndef SANDERLING_HOPPER_HPP
#define SANDERLING_HOPPER_HPP

#define HOPPER_INSTRUCTIONS

#include <map>
#include <vector>

// What a test puts into a TensorMap.
struct EmulateTensor {
    const bf16* data;
    long long sizes[3], strides[2];
};

struct EmulateArrivals {
    int count, pending;
    long long bytes;
    unsigned phase;
};
static std::map<unsigned, EmulateArrivals> emulate_arrivals;
static EmulateBarrier emulate_consumers;

inline unsigned shared_address(const void* shared) { return (unsigned)((const char*)shared - emulate_block.shared); }
inline char* emulate_shared(unsigned address) { return emulate_block.shared + address; }

inline void emulate_flip(EmulateArrivals& barrier) {
    if (barrier.pending > 0 || barrier.bytes > 0) return;
    barrier.phase++;
    barrier.pending = barrier.count;
    emulate_block.progress = true;
}
inline void barrier_init(unsigned barrier, int arrivals) {
    emulate_arrivals[barrier] = {arrivals, arrivals, 0, 0};
}
inline void barrier_arrive(unsigned barrier) {
    EmulateArrivals& arrivals = emulate_arrivals.at(barrier);
    if (arrivals.pending == 0) emulate_fail("more arrivals at a barrier than it counts");
    arrivals.pending--;
    emulate_flip(arrivals);
}
inline void barrier_expect(unsigned barrier, int bytes) {
    emulate_arrivals.at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(unsigned barrier, int parity) {
    while ((emulate_arrivals.at(barrier).phase & 1) == (unsigned)parity) emulate_yield();
}
inline void barrier_fence() {}
inline void shared_fence() {}
inline void producer_registers() {}
inline void consumer_registers() {}
inline void consumers_sync() {
    emulate_consumers.alive = 256;
    emulate_wait(emulate_consumers);
}

// The 16 bytes of a row of 128 change places by the row's number.
inline unsigned emulate_swizzle(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

template <typename Map>
void load_box(unsigned to, const Map& map, unsigned barrier, int x, int y, int z = 0) {
    if (to % 1024 != 0) emulate_fail("a swizzled box that does not start at a multiple of 1024 bytes");
    const EmulateTensor& tensor = *(const EmulateTensor*)&map;
    for (int row = 0; row < 64; row++)
        for (int column = 0; column < 64; column++) {
            const long long at[3] = {x + column, y + row, z};
            bool inside = true;
            for (int axis = 0; axis < 3; axis++) inside = inside && at[axis] >= 0 && at[axis] < tensor.sizes[axis];
            const bf16 value =
                inside ? tensor.data[at[2] * tensor.strides[1] + at[1] * tensor.strides[0] + at[0]] : bf16{0};
            memcpy(emulate_shared(emulate_swizzle(to + row * 128 + column * 2)), &value, 2);
        }
    EmulateArrivals& arrivals = emulate_arrivals.at(barrier);
    arrivals.bytes -= 64 * 128;
    emulate_flip(arrivals);
}

// ---- wgmma ----

struct EmulateProduct {
    float* c;
    unsigned long long left, right;
    bool left_side, right_side;
    int accumulate, group;
};
struct EmulateProducts {
    std::vector<EmulateProduct> waiting;
    int groups;
};
static EmulateProducts emulate_products[EMULATE_THREADS_MAX];

// An element of an operand: PTX's canonical layouts for a swizzle of 128 bytes.
inline float emulate_operand(unsigned long long descriptor, bool side_contiguous, int side, int depth) {
    if (descriptor >> 62 != 1) emulate_fail("a descriptor without the swizzle of 128 bytes");
    const unsigned start = (descriptor & 0x3fff) << 4;
    const unsigned leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const unsigned at = side_contiguous ? side % 64 * 2 + side / 64 * leading + depth % 8 * 128 + depth / 8 * stride
                                        : side % 8 * 128 + side / 8 * stride + depth * 2;
    bf16 value;
    memcpy(&value, emulate_shared(emulate_swizzle(start + at)), 2);
    return to_float(value);
}
inline void emulate_run(const EmulateProduct& product) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int half = 0; half < 2; half++) {
        float left[16];
        for (int k = 0; k < 16; k++) left[k] = emulate_operand(product.left, product.left_side, row + half * 8, k);
        for (int j = 0; j < 64; j++) {
            float sum = 0.0f;
            for (int k = 0; k < 16; k++)
                sum += left[k] * emulate_operand(product.right, product.right_side, j / 2 * 8 + column + j % 2, k);
            float& c = product.c[j / 2 * 4 + half * 2 + j % 2];
            c = product.accumulate ? c + sum : sum;
        }
    }
}
inline EmulateProducts& emulate_mine() { return emulate_products[emulate_block.current]; }
inline void wgmma_fence() {}
// Lanes of a warp are together at every instruction of a product.
inline void wgmma_commit() {
    __syncwarp();
    emulate_mine().groups++;
}
template <int N>
void wgmma_wait() {
    __syncwarp();
    EmulateProducts& mine = emulate_mine();
    size_t done = 0;
    while (done < mine.waiting.size() && mine.waiting[done].group < mine.groups - N) emulate_run(mine.waiting[done++]);
    mine.waiting.erase(mine.waiting.begin(), mine.waiting.begin() + done);
    __syncwarp();
}
inline void wgmma_hold(float (&)[128]) {}
template <bool left_side_contiguous, bool right_side_contiguous>
void wgmma(float (&c)[128], unsigned long long left, unsigned long long right, int accumulate) {
    emulate_mine().waiting.push_back(
        {c, left, right, left_side_contiguous, right_side_contiguous, accumulate, emulate_mine().groups});
}

#endif

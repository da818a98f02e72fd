// The instructions of prelude.cuh that C++ has no words for, between the lanes of an emulated warp.

#ifndef SANDERLING_MMA_HPP
#define SANDERLING_MMA_HPP

#include "emulate.hpp"

inline float emulate_half(unsigned packed, int high) {
    return __uint_as_float(high ? packed & 0xffff0000u : packed << 16);
}

// Every lane's fragments, for all lanes to read until the next barrier.
inline EmulateLane* emulate_fragments(const unsigned* a, const unsigned* b) {
    EmulateLane* lanes = emulate_lanes();
    if (emulate_warp().alive != 32) emulate_fail("a product without all lanes of the warp");
    memcpy(lanes[emulate_lane()].a, a, sizeof lanes->a);
    memcpy(lanes[emulate_lane()].b, b, sizeof lanes->b);
    __syncwarp();
    return lanes;
}

inline void emulate_mma_bf16(float* c, const unsigned* a, const unsigned* b) {
    const EmulateLane* lanes = emulate_fragments(a, b);
    const int group = emulate_lane() / 4, pair = emulate_lane() % 4;
    for (int i = 0; i < 4; i++) {
        const int row = group + i / 2 * 8, column = 2 * pair + i % 2;
        for (int k = 0; k < 16; k++) {
            const unsigned left = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const unsigned right = lanes[column * 4 + k % 8 / 2].b[k / 8];
            c[i] += emulate_half(left, k % 2) * emulate_half(right, k % 2);
        }
    }
    __syncwarp();
}

inline void emulate_mma_tf32(float* c, const unsigned* a, const unsigned* b) {
    const EmulateLane* lanes = emulate_fragments(a, b);
    const int group = emulate_lane() / 4, pair = emulate_lane() % 4;
    for (int i = 0; i < 4; i++) {
        const int row = group + i / 2 * 8, column = 2 * pair + i % 2;
        for (int k = 0; k < 8; k++) {
            const unsigned left = lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2];
            const unsigned right = lanes[column * 4 + k % 4].b[k / 4];
            c[i] += __uint_as_float(left & ~0x1fffu) * __uint_as_float(right & ~0x1fffu);
        }
    }
    __syncwarp();
}

inline void emulate_load_matrices(unsigned* r, const void* shared, bool transposed) {
    if ((unsigned long long)shared % 16 != 0) emulate_fail("ldmatrix from an address that is no multiple of 16");
    EmulateLane* lanes = emulate_lanes();
    const int lane = emulate_lane();
    lanes[lane].address = shared;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        unsigned short halves[2];
        for (int half = 0; half < 2; half++) {
            const int along = 2 * (lane % 4) + half, row = transposed ? along : lane / 4;
            const int column = transposed ? lane / 4 : along;
            halves[half] = ((const unsigned short*)lanes[8 * i + row].address)[column];
        }
        r[i] = halves[0] | (unsigned)halves[1] << 16;
    }
    __syncwarp();
}
inline void emulate_ldmatrix_x4(unsigned* r, const void* shared) { emulate_load_matrices(r, shared, false); }
inline void emulate_ldmatrix_x4_trans(unsigned* r, const void* shared) { emulate_load_matrices(r, shared, true); }

// A copy that was begun. The device may do it at any time until it is waited for, so that the worst is done: what it
// overwrites is gone at once, and what it brings is there only after the wait.
struct EmulateCopy {
    void* shared;
    const void* global;
    unsigned bytes;
    bool valid;
    int group;
};
struct EmulateCopies {
    std::vector<EmulateCopy> begun;
    int groups;
};
static EmulateCopies emulate_copies[EMULATE_THREADS_MAX];

inline void emulate_cp_async(void* shared, const void* global, unsigned bytes, bool valid) {
    if ((unsigned long long)shared % bytes != 0 || (valid && (unsigned long long)global % bytes != 0))
        emulate_fail("cp.async with an address that is no multiple of its bytes");
    EmulateCopies& own = emulate_copies[emulate_block.current];
    own.begun.push_back({shared, global, bytes, valid, own.groups});
    emulate_block.fibers[emulate_block.current].copies++;
    memset(shared, 0xff, bytes);
}
inline void emulate_cp_async_commit() { emulate_copies[emulate_block.current].groups++; }
// Copies that belong to no group yet are not waited for.
inline void emulate_cp_async_wait(int left) {
    EmulateCopies& own = emulate_copies[emulate_block.current];
    size_t done = 0;
    for (; done < own.begun.size() && own.begun[done].group < own.groups - left; done++) {
        const EmulateCopy& copy = own.begun[done];
        if (copy.valid) {
            memcpy(copy.shared, copy.global, copy.bytes);
        } else {
            memset(copy.shared, 0, copy.bytes);
        }
        emulate_copied(copy.shared);
    }
    own.begun.erase(own.begun.begin(), own.begun.begin() + done);
    emulate_block.fibers[emulate_block.current].copies -= (int)done;
}

#endif

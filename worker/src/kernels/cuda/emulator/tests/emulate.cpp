// The emulator itself: what it computes against plain loops, and that it notices what a kernel may not do.
//
//   c++ -O1 -std=c++17 -rdynamic -DSANDERLING_EMULATE -DACT_BF16=1 -I . -I emulator emulator/tests/emulate.cpp
//
// in the folder of the kernels. Without an argument, wrong results are told; with one of the arguments in main, the program
// aborts and says why.

#include "prelude.cuh"

#include "hopper.cuh"

#include <cmath>
#include <random>
#include <string>

#define THREADS 96

// Reductions, and a scan through shared memory whose size the launch gives. Shared memory starts as NaNs.
// launch: grid (any), block 96, shared 96 floats
extern "C" __global__ void reductions(
    const float* values, float* sums, float* maxima, float* scans, int* votes, int* spoilt) {
    __shared__ float shared[WARP];
    DYNAMIC_SHARED(float, dynamic);
    const int thread = threadIdx.x, place = blockIdx.x * THREADS + thread;
    if (thread < WARP) {
        const bool both = shared[thread] != shared[thread] && dynamic[thread] != dynamic[thread];
        spoilt[blockIdx.x * WARP + thread] = both;
    }
    __syncthreads();
    const float sum = block_sum(values[place], shared), largest = block_max(values[place], shared);
    dynamic[thread] = values[place];
    __syncthreads();
    for (int by = 1; by < THREADS; by *= 2) {
        const float before = thread >= by ? dynamic[thread - by] : 0.0f;
        __syncthreads();
        dynamic[thread] += before;
        __syncthreads();
    }
    scans[place] = dynamic[thread];
    const int positive = __syncthreads_count(values[place] > 0.0f);
    if (thread == 0) sums[blockIdx.x] = sum, maxima[blockIdx.x] = largest, votes[blockIdx.x] = positive;
}

// Every way of a shuffle, one row of 32 each.
// launch: grid 1, block 32, shared 0
extern "C" __global__ void shuffles(int* out) {
    const int lane = threadIdx.x;
    out[lane] = __shfl_sync(FULL_WARP, lane * lane, 5);
    out[32 + lane] = __shfl_xor_sync(FULL_WARP, lane * lane, 9);
    out[64 + lane] = __shfl_up_sync(FULL_WARP, lane * lane, 3);
    out[96 + lane] = __shfl_down_sync(FULL_WARP, lane * lane, 3);
    out[128 + lane] = (int)__ballot_sync(FULL_WARP, lane % 3 == 0);
}

// c = a·b for a 16 × 16 and b 16 × 8, all row-major: a's fragments by ldmatrix, b's by its transposing form, which only needs
// half of what four matrices are; and by single elements into `plain`.
// launch: grid 1, block 32, shared 768 bytes
extern "C" __global__ void product_bf16(const bf16* a, const bf16* b, float* c, float* plain) {
    DYNAMIC_SHARED(bf16, left);
    bf16* right = left + 256;
    const int lane = threadIdx.x, group = lane / 4, pair = lane % 4;
    cp_async_16(left + lane * 8, a + lane * 8, true);
    cp_async_16(right + lane % 16 * 8, b + lane % 16 * 8, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    unsigned fragment[4], other[4];
    ldmatrix_x4(fragment, left + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    ldmatrix_x4_trans(other, right + lane % 16 * 8);
    float sums[4] = {}, others[4] = {};
    mma_bf16(sums, fragment, other);
    unsigned singles[4], right_singles[2];
    for (int i = 0; i < 4; i++) {
        const bf16* at = a + (group + i % 2 * 8) * 16 + 2 * pair + i / 2 * 8;
        singles[i] = pack_bf16(to_float(at[0]), to_float(at[1]));
    }
    for (int i = 0; i < 2; i++) {
        const bf16* at = b + (2 * pair + i * 8) * 8 + group;
        right_singles[i] = pack_bf16(to_float(at[0]), to_float(at[8]));
    }
    mma_bf16(others, singles, right_singles);
    for (int i = 0; i < 4; i++) {
        const int place = (group + i / 2 * 8) * 8 + 2 * pair + i % 2;
        c[place] = sums[i], plain[place] = others[i];
    }
}

// c = a·b for a 16 × 8 and b 8 × 8, row-major.
// launch: grid 1, block 32, shared 0
extern "C" __global__ void product_tf32(const float* a, const float* b, float* c) {
    const int group = threadIdx.x / 4, pair = threadIdx.x % 4;
    unsigned left[4], right[2];
    for (int i = 0; i < 4; i++) left[i] = to_tf32(a[(group + i % 2 * 8) * 8 + pair + i / 2 * 4]);
    for (int i = 0; i < 2; i++) right[i] = to_tf32(b[(pair + i * 4) * 8 + group]);
    float sums[4] = {};
    mma_tf32(sums, left, right);
    for (int i = 0; i < 4; i++) c[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = sums[i];
}

// Arguments of all kinds, more of them than registers have room for.
// launch: grid (2, 3, 2), block (32, 2, 1), shared 0
extern "C" __global__ void arguments(
    int* out, int a, float x, long long b, int c, float y, int d, int e, int f, int g, float z, int h) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int place = (block * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[place] = place + (a + b + c + d + e + f + g + h == 8 + (1ll << 40) && x == 0.5f && y == 1.5f && z == 2.5f);
}

// ---- What has to be noticed ----

extern "C" __global__ void left_alone(int*) {
    if (threadIdx.x == 0) __syncthreads();
    __syncwarp();
}
extern "C" __global__ void past_the_end(int*) {
    DYNAMIC_SHARED(int, dynamic);
    dynamic[blockDim.x + threadIdx.x] = 1;
}
extern "C" __global__ void some_lanes(int* out) {
    if (threadIdx.x < 4) out[threadIdx.x] = __shfl_sync(0xfu, (int)threadIdx.x, 0);
}
static void fill(bf16* tile, float value) {
    for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) tile[i] = __float2bfloat16_rn(value);
}
// A warpgroup's product of a tile of 64 × 64 with itself, begun.
static void multiply(float (&c)[1][8][4], bf16* tile) {
    const unsigned long long ones = descriptor(depth_contiguous(shared_address(tile)));
    wgmma<false, false>(c, ones, ones, false);
    wgmma_commit();
}
static void begin_product(float (&c)[1][8][4], bf16* tile) {
    fill(tile, 1.0f);
    shared_fence();
    __syncthreads();
    wgmma_fence();
    multiply(c, tile);
}
extern "C" __global__ void used_too_early(int*) {
    DYNAMIC_SHARED(bf16, tile);
    float c[1][8][4];
    begin_product(c, tile);
    settle(c);
}
extern "C" __global__ void never_waited_for(int*) {
    DYNAMIC_SHARED(bf16, tile);
    float c[1][8][4];
    begin_product(c, tile);
}
// Two groups of copies, of which the first is waited for, and both with `all`: what each lane sees of them then, and of the
// first before.
// launch: grid 1, block 32, shared 1024 bytes
extern "C" __global__ void copies(const int* from, int* out, int all) {
    DYNAMIC_SHARED(int, to);
    const int lane = threadIdx.x;
    to[4 * lane] = 7;
    cp_async_16(to + 4 * lane, from + 4 * lane, true);
    cp_async_commit();
    cp_async_16(to + 128 + 4 * lane, from + 4 * lane, lane % 2 == 0);
    cp_async_commit();
    out[lane] = to[4 * lane];
    cp_async_wait<1>();
    if (all) cp_async_wait<0>();
    out[32 + lane] = to[4 * lane], out[64 + lane] = to[128 + 4 * lane];
    cp_async_wait<0>();
}
extern "C" __global__ void never_copied(int* from) {
    DYNAMIC_SHARED(int, to);
    cp_async_16(to + 4 * threadIdx.x, from, false);
    cp_async_commit();
    cp_async_wait<1>();
}
// Without the fence between the tile and its product; or with that of one thread only, who copied a part of it.
extern "C" __global__ void unknown_tile(int*) {
    DYNAMIC_SHARED(bf16, tile);
    float c[1][8][4];
    fill(tile, 1.0f);
    __syncthreads();
    wgmma_fence();
    multiply(c, tile);
    wgmma_wait<0>();
}
extern "C" __global__ void unknown_copy(const bf16* from) {
    DYNAMIC_SHARED(bf16, tile);
    float c[1][8][4];
    for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) cp_async_16(tile + i * 8, from + i * 8, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (threadIdx.x == 0) shared_fence();
    __syncthreads();
    wgmma_fence();
    multiply(c, tile);
    wgmma_wait<0>();
}
// A second product of sums that came, without a fence between.
extern "C" __global__ void unfenced_sums(int*) {
    DYNAMIC_SHARED(bf16, tile);
    float c[1][8][4];
    begin_product(c, tile);
    wgmma_wait<0>();
    settle(c);
    c[0][0][0] *= 2.0f;
    multiply(c, tile);
    wgmma_wait<0>();
}
extern "C" __global__ void operand_used_again(int*) {
    DYNAMIC_SHARED(bf16, tile);
    float c[1][8][4] = {};
    unsigned a[4] = {1, 2, 3, 4};
    fill(tile, 1.0f);
    shared_fence();
    __syncthreads();
    wgmma_fence();
    wgmma_registers(c, a, descriptor(side_contiguous(shared_address(tile), 64 * 128)));
    wgmma_commit();
    a[3] = 5;
    wgmma_wait<0>();
}
// A box for a barrier that the copy engine was not told of, and one over what was stored without a fence.
static void ask_for_box(bf16* tile, bool fence_barrier, bool store) {
    __shared__ unsigned long long barrier;
    __shared__ bf16 from[64];
    TensorMap map;
    const EmulateTensor tensor = {from, {64, 1, 1}, {64, 0}};
    memcpy(map.bytes, &tensor, sizeof(tensor));
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&barrier), 1);
        if (fence_barrier) barrier_fence();
        if (store) tile[5] = __float2bfloat16_rn(0.0f);
        barrier_expect(shared_address(&barrier), 64 * 128);
        load_box(shared_address(tile), map, shared_address(&barrier), 0, 0);
        barrier_wait(shared_address(&barrier), 0);
    }
}
extern "C" __global__ void untold_barrier(int*) {
    DYNAMIC_SHARED(bf16, tile);
    ask_for_box(tile, false, false);
}
extern "C" __global__ void box_over_stores(int*) {
    DYNAMIC_SHARED(bf16, tile);
    ask_for_box(tile, true, true);
}
extern "C" __global__ void box(int*) {
    DYNAMIC_SHARED(bf16, tile);
    ask_for_box(tile, true, false);
}
// With the tile used again before the product is waited for, or after it.
extern "C" __global__ void tile_used_again(int* out, int too_early) {
    DYNAMIC_SHARED(bf16, tile);
    float c[1][8][4];
    begin_product(c, tile);
    if (!too_early) wgmma_wait<0>();
    __syncthreads();
    fill(tile, 0.0f);
    shared_fence();
    __syncthreads();
    wgmma_wait<0>();
    settle(c);
    out[threadIdx.x] = (int)c[0][7][3];
}
// Without a barrier before the sum is read.
extern "C" __global__ void race(int* out) {
    __shared__ int values[64];
    values[threadIdx.x] = 1;
    int sum = 0;
    for (int i = 0; i < 64; i++) sum += values[i];
    out[threadIdx.x] = sum;
}

// ---- The launches ----

static int failures;
static void expect(bool right, const char* what) {
    if (!right) fprintf(stderr, "wrong: %s\n", what), failures++;
}

template <typename... Parameters>
static void launch(
    void (*kernel)(Parameters...), unsigned x, unsigned y, unsigned z, unsigned threads, unsigned rows, unsigned shared,
    const std::vector<long long>& words, const std::vector<float>& floats) {
    long long all_words[24] = {};
    float all_floats[8] = {};
    std::copy(words.begin(), words.end(), all_words);
    std::copy(floats.begin(), floats.end(), all_floats);
    const unsigned grid[3] = {x, y, z}, block[3] = {threads, rows, 1};
    emulate_launch((void*)kernel, grid, block, shared, all_words, all_floats);
}
template <typename T>
static long long at(std::vector<T>& values) {
    return (long long)values.data();
}

static std::mt19937 generator(1);
static std::vector<float> random_values(int count) {
    std::uniform_real_distribution<float> values(-1.0f, 1.0f);
    std::vector<float> all(count);
    for (float& value : all) value = values(generator);
    return all;
}

static void test_reductions() {
    const int blocks = 3;
    std::vector<float> values = random_values(blocks * THREADS), sums(blocks), maxima(blocks), scans(blocks * THREADS);
    std::vector<int> votes(blocks), spoilt(blocks * WARP);
    launch(
        reductions, blocks, 1, 1, THREADS, 1, THREADS * sizeof(float),
        {at(values), at(sums), at(maxima), at(scans), at(votes), at(spoilt)}, {});
    for (int block = 0; block < blocks; block++) {
        double sum = 0.0;
        float largest = -INFINITY;
        int positive = 0;
        for (int i = block * THREADS; i < (block + 1) * THREADS; i++) {
            sum += values[i], largest = std::fmax(largest, values[i]), positive += values[i] > 0.0f;
            expect(std::fabs(scans[i] - sum) < 1e-5, "a scan");
        }
        expect(std::fabs(sums[block] - sum) < 1e-5, "a block's sum");
        expect(maxima[block] == largest, "a block's largest");
        expect(votes[block] == positive, "a block's votes");
    }
    for (int one : spoilt) expect(one == 1, "shared memory of a new block is NaNs");
}

static void test_shuffles() {
    std::vector<int> out(160);
    launch(shuffles, 1, 1, 1, 32, 1, 0, {at(out)}, {});
    unsigned thirds = 0;
    for (int lane = 0; lane < 32; lane++) thirds |= (unsigned)(lane % 3 == 0) << lane;
    for (int lane = 0; lane < 32; lane++) {
        const int up = lane < 3 ? lane : lane - 3, down = lane > 28 ? lane : lane + 3;
        expect(out[lane] == 25 && out[32 + lane] == (lane ^ 9) * (lane ^ 9), "a shuffle");
        expect(out[64 + lane] == up * up && out[96 + lane] == down * down, "a shuffle up or down");
        expect((unsigned)out[128 + lane] == thirds, "a vote");
    }
}

static void compare(
    const std::vector<float>& left, const std::vector<float>& right, const std::vector<float>& product, int inner,
    double tolerance, const char* what) {
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            double sum = 0.0;
            for (int k = 0; k < inner; k++) sum += (double)left[row * inner + k] * right[k * 8 + column];
            expect(std::fabs(product[row * 8 + column] - sum) < tolerance, what);
        }
}

static void test_products() {
    std::vector<float> left = random_values(256), right = random_values(128), product(128), plain(128);
    struct alignas(16) {
        bf16 left[256], right[128];
    } rounded;
    for (int i = 0; i < 256; i++) rounded.left[i] = __float2bfloat16_rn(left[i]), left[i] = to_float(rounded.left[i]);
    for (int i = 0; i < 128; i++) rounded.right[i] = __float2bfloat16_rn(right[i]), right[i] = to_float(rounded.right[i]);
    launch(
        product_bf16, 1, 1, 1, 32, 1, 768, {(long long)rounded.left, (long long)rounded.right, at(product), at(plain)}, {});
    compare(left, right, product, 16, 1e-5, "a product of bf16 with matrices loaded");
    compare(left, right, plain, 16, 1e-5, "a product of bf16");

    left = random_values(128), right = random_values(64);
    launch(product_tf32, 1, 1, 1, 32, 1, 0, {at(left), at(right), at(product)}, {});
    compare(left, right, product, 8, 8 * 1e-3, "a product of tf32");
    for (float& value : left) value = __uint_as_float(to_tf32(value));
    for (float& value : right) value = __uint_as_float(to_tf32(value));
    compare(left, right, product, 8, 1e-5, "a product of tf32 that was rounded before");
}

static void test_arguments() {
    std::vector<int> out(2 * 3 * 2 * 64);
    launch(arguments, 2, 3, 2, 32, 2, 0, {at(out), 1, 1ll << 40, 1, 1, 1, 1, 1, 2}, {0.5f, 1.5f, 2.5f});
    for (int i = 0; i < (int)out.size(); i++) expect(out[i] == i + 1, "arguments and places of blocks and threads");
}

static void test_race() {
    std::vector<int> out(64, 64);
    launch(race, 1, 1, 1, 64, 1, 0, {at(out)}, {});
    bool seen = false;
    for (int sum : out) seen |= sum != 64;
    expect(seen, "a race is seen");
}

static void test_tiles_used_again() {
    for (const int too_early : {0, 1}) {
        std::vector<int> out(128, -1);
        launch(tile_used_again, 1, 1, 1, 128, 1, 64 * 128, {at(out), too_early}, {});
        for (int sum : out) expect(sum == (too_early ? 0 : 16), "a tile that is used again too early is seen");
    }
}

static void test_copies() {
    for (const int all : {0, 1}) {
        struct alignas(16) {
            int values[128];
        } from;
        std::vector<int> out(96);
        for (int i = 0; i < 128; i++) from.values[i] = i;
        launch(copies, 1, 1, 1, 32, 1, 1024, {(long long)from.values, at(out), all}, {});
        for (int lane = 0; lane < 32; lane++) {
            expect(out[lane] == -1, "a place is read while it is copied to");
            expect(out[32 + lane] == 4 * lane, "a copy that was waited for");
            expect(out[64 + lane] == (!all ? -1 : lane % 2 ? 0 : 4 * lane), "a copy that was not waited for is seen");
        }
    }
}

int main(int count, char** arguments) {
    std::vector<int> out(64);
    if (count > 1) {
        const std::string name = arguments[1];
        if (name == "left_alone") launch(left_alone, 1, 1, 1, 64, 1, 0, {at(out)}, {});
        if (name == "past_the_end") launch(past_the_end, 1, 1, 1, 32, 1, 128, {at(out)}, {});
        if (name == "some_lanes") launch(some_lanes, 1, 1, 1, 32, 1, 0, {at(out)}, {});
        if (name == "used_too_early") launch(used_too_early, 1, 1, 1, 128, 1, 64 * 128, {at(out)}, {});
        if (name == "never_waited_for") launch(never_waited_for, 1, 1, 1, 128, 1, 64 * 128, {at(out)}, {});
        if (name == "unknown_tile") launch(unknown_tile, 1, 1, 1, 128, 1, 64 * 128, {at(out)}, {});
        if (name == "unfenced_sums") launch(unfenced_sums, 1, 1, 1, 128, 1, 64 * 128, {at(out)}, {});
        if (name == "operand_used_again") launch(operand_used_again, 1, 1, 1, 128, 1, 64 * 128, {at(out)}, {});
        if (name == "untold_barrier") launch(untold_barrier, 1, 1, 1, 128, 1, 64 * 128, {at(out)}, {});
        if (name == "box_over_stores") launch(box_over_stores, 1, 1, 1, 128, 1, 64 * 128, {at(out)}, {});
        if (name == "unknown_copy") {
            struct alignas(16) {
                bf16 values[64 * 64];
            } from = {};
            launch(unknown_copy, 1, 1, 1, 128, 1, 64 * 128, {(long long)&from}, {});
        }
        if (name == "never_copied") launch(never_copied, 1, 1, 1, 32, 1, 512, {at(out)}, {});
        return 2;
    }
    test_reductions();
    test_shuffles();
    test_products();
    test_arguments();
    test_race();
    test_tiles_used_again();
    test_copies();
    launch(box, 1, 1, 1, 128, 1, 64 * 128, {at(out)}, {});
    return failures > 0;
}

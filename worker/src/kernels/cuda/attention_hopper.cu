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
// Rows of a warpgroup.
constexpr int OWN_ROWS = 64;
// Bytes of 16 rows of a panel.
constexpr int PANEL_16_ROWS = 16 * 128;

// ---- Tiles ----

// The first multiple of 1024 bytes of dynamic shared memory.
__device__ __forceinline__ act* aligned_tiles(act* shared) {
    return shared + (0u - shared_address(shared)) % 1024 / sizeof(act);
}
// All threads of the warpgroup.
__device__ __forceinline__ void warpgroup_sync() { sync_some<WARPGROUP>((int)threadIdx.x / WARPGROUP + 1); }
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
    const Operand a = depth_contiguous(shared_address(a_tile)), b = depth_contiguous(shared_address(b_tile));
    settle(c);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        const Operand left = further(a, k / 64 * OWN_ROWS * 128 + k % 64 * 2);
        const Operand right = further(b, k / 64 * N * 8 * 128 + k % 64 * 2);
        wgmma<false, false>(c, descriptor(left), descriptor(right), k > 0);
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
__device__ __forceinline__ void accumulate(float (&c)[1][N][4], unsigned (&p)[K][4], const act* b_tile) {
    // The next 64 columns are the next panel, of 16·K rows.
    const Operand b = side_contiguous(shared_address(b_tile), K * 16 * 128);
    settle(c), settle(p);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < K; ++k) wgmma_registers(c, p[k], descriptor(further(b, k * PANEL_16_ROWS)));
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
            barrier_init(shared_address(full + stage), WARPGROUP);
            barrier_init(shared_address(empty + stage), consumers * 4);
        }
    }
    __device__ __forceinline__ static void wait_at(unsigned long long* barrier, int parity) {
        barrier_wait(shared_address(barrier), parity);
    }
    // Of the warpgroup that fetches: the item's place is free; this thread's part of the item is there.
    __device__ __forceinline__ void wait_empty(int item) {
        if (item >= STAGES) wait_at(empty + item % STAGES, (item / STAGES - 1) & 1);
    }
    __device__ __forceinline__ void publish(int item) { barrier_arrive(shared_address(full + item % STAGES)); }
    // Of the others: the item is there; the warp is done with it.
    __device__ __forceinline__ void wait(int item) { wait_at(full + item % STAGES, item / STAGES & 1); }
    __device__ __forceinline__ void release(int item) {
        __syncwarp();
        if (threadIdx.x % WARP == 0) barrier_arrive(shared_address(empty + item % STAGES));
    }
};

// Which tile and head of its sequence a block computes: of all heads the first tiles first, so that the ends of a sequence's
// heads come together, and heads that share keys side by side.
__device__ __forceinline__ int2 tile_and_head() {
    const int index = blockIdx.x + gridDim.x * blockIdx.y;
    return make_int2(index / gridDim.y, index % gridDim.y);
}

#endif

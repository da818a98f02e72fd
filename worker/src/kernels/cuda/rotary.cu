// Rotary position embedding in the rotate-half form.

// Heads that a thread turns by the same angles, all under way at once.
#define ROTARY_HEADS 4

template <int CHANNELS>
__device__ __forceinline__ void load_channels(const act* from, bool vectors, float (&to)[CHANNELS]) {
    if constexpr (CHANNELS == 8) {
        if (vectors) return load8(from, to);
    }
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) to[j] = to_float(from[j]);
}
template <int CHANNELS>
__device__ __forceinline__ void store_channels(act* to, bool vectors, const float (&from)[CHANNELS]) {
    if constexpr (CHANNELS == 8) {
        if (vectors) return store8(to, from);
    }
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) to[j] = to_act(from[j]);
}

// Turns CHANNELS pairs of ROTARY_HEADS heads of one row.
template <int CHANNELS>
__device__ __forceinline__ void turn(
    act* qkv, const float* tables, int rows, int time, int first, int heads, int row_width, int head_dim, float sign) {
    const int half = head_dim / 2, per_head = half / CHANNELS;
    const int per_row = per_head * ((heads + ROTARY_HEADS - 1) / ROTARY_HEADS);
    const long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long row = item / per_row;
    if (row >= rows) return;
    const int place = (int)(item - row * per_row);
    const int head = place / per_head * ROTARY_HEADS, channel = place % per_head * CHANNELS;
    const bool vectors = row_width % 8 == 0 && aligned(qkv, 16);
    act* const a = qkv + row * row_width + (long long)head * head_dim + channel;
    float firsts[ROTARY_HEADS][CHANNELS], seconds[ROTARY_HEADS][CHANNELS];
#pragma unroll
    for (int i = 0; i < ROTARY_HEADS; i++) {
        if (head + i < heads) {
            load_channels(a + i * head_dim, vectors, firsts[i]);
            load_channels(a + i * head_dim + half, vectors, seconds[i]);
        }
    }
    const float* cosines = tables + (long long)(first + (int)(row % time)) * head_dim + channel;
    float cosine[CHANNELS], sine[CHANNELS];
    bool loaded = false;
    if constexpr (CHANNELS == 8) {
        if (aligned(tables, 16)) {
            load8(cosines, cosine);
            load8(cosines + half, sine);
            loaded = true;
        }
    }
#pragma unroll
    for (int j = 0; j < CHANNELS; j++) {
        if (!loaded) cosine[j] = cosines[j], sine[j] = cosines[half + j];
        sine[j] *= sign;
    }
#pragma unroll
    for (int i = 0; i < ROTARY_HEADS; i++) {
        if (head + i >= heads) break;
#pragma unroll
        for (int j = 0; j < CHANNELS; j++) {
            const float x = firsts[i][j], y = seconds[i][j];
            firsts[i][j] = x * cosine[j] - y * sine[j];
            seconds[i][j] = x * sine[j] + y * cosine[j];
        }
        store_channels(a + i * head_dim, vectors, firsts[i]);
        store_channels(a + i * head_dim + half, vectors, seconds[i]);
    }
}

// (a, b) ← (a·cos − b·sin, b·cos + a·sin) for channels a = i and b = i + head_dim/2 of the first `heads` heads (queries
// and keys) of each row of qkv (rows, row_width), in place. Row r is at position first + r % time; tables have head_dim/2
// cosines and as many sines per position. sign is 1, or −1 to turn back.
// launch: grid ceil(rows · C · ceil(heads / 4) / 256), C = head_dim / 16 if head_dim % 16 == 0, else head_dim / 2 (in 64 bits);
// block 256, shared 0
extern "C" __global__ void __launch_bounds__(256) rotary(
    act* qkv,
    const float* tables,
    int rows,
    int time,
    int first,
    int heads,
    int row_width,
    int head_dim,
    float sign) {
    if (head_dim % 16 == 0) {
        turn<8>(qkv, tables, rows, time, first, heads, row_width, head_dim, sign);
    } else {
        turn<1>(qkv, tables, rows, time, first, heads, row_width, head_dim, sign);
    }
}

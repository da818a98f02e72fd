// Element by element: conversions, sums of two, biases, gates and SwiGLU; and sums in a fixed order.
//
// All vectors may start anywhere: the ways with 16-byte accesses are taken where addresses and widths allow.

// ---- Whole vectors ----

#define TILE_BLOCK 256
#define TILE_LOADS 4
// Elements that a block of the tiled kernels deals with: each thread has TILE_LOADS vectors of 4 in flight.
#define TILE (TILE_BLOCK * TILE_LOADS * 4)

template <typename From, typename To>
__device__ __forceinline__ void convert(const From* from, To* to, long long len) {
    const long long start = (long long)blockIdx.x * TILE;
    if (start + TILE <= len && aligned(from, 4 * sizeof(From)) && aligned(to, 4 * sizeof(To))) {
        float values[TILE_LOADS][4];
        const long long first = start + 4 * threadIdx.x;
#pragma unroll
        for (int i = 0; i < TILE_LOADS; i++) load4(from + first + 4 * TILE_BLOCK * i, values[i]);
#pragma unroll
        for (int i = 0; i < TILE_LOADS; i++) store4(to + first + 4 * TILE_BLOCK * i, values[i]);
        return;
    }
    const long long end = start + TILE < len ? start + TILE : len;
    for (long long i = start + threadIdx.x; i < end; i += TILE_BLOCK) to[i] = from_float<To>(to_float(from[i]));
}

// Rounds floats to activations: the shadow of the parameters that products read.
// launch: grid ceil(len / 4096), block 256, shared 0
extern "C" __global__ void __launch_bounds__(TILE_BLOCK) convert_to_act(const float* from, act* to, long long len) {
    convert(from, to, len);
}

template <typename B>
__device__ __forceinline__ void add(const float* a, const B* b, float* out, long long len) {
    const long long start = (long long)blockIdx.x * TILE;
    if (start + TILE <= len && aligned(a, 16) && aligned(b, 4 * sizeof(B)) && aligned(out, 16)) {
        float left[TILE_LOADS][4], right[TILE_LOADS][4];
        const long long first = start + 4 * threadIdx.x;
#pragma unroll
        for (int i = 0; i < TILE_LOADS; i++) load4(a + first + 4 * TILE_BLOCK * i, left[i]);
#pragma unroll
        for (int i = 0; i < TILE_LOADS; i++) load4(b + first + 4 * TILE_BLOCK * i, right[i]);
#pragma unroll
        for (int i = 0; i < TILE_LOADS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) left[i][j] += right[i][j];
            store4(out + first + 4 * TILE_BLOCK * i, left[i]);
        }
        return;
    }
    const long long end = start + TILE < len ? start + TILE : len;
    for (long long i = start + threadIdx.x; i < end; i += TILE_BLOCK) out[i] = a[i] + to_float(b[i]);
}

// out = a + b; out may be a.
// launch: grid ceil(len / 4096), block 256, shared 0
extern "C" __global__ void __launch_bounds__(TILE_BLOCK)
    add_act(const float* a, const act* b, float* out, long long len) {
    add(a, b, out, len);
}

// out = a + b; out may be a or b.
// launch: grid ceil(len / 4096), block 256, shared 0
extern "C" __global__ void __launch_bounds__(TILE_BLOCK)
    add_float(const float* a, const float* b, float* out, long long len) {
    add(a, b, out, len);
}

// x ← 1 / (1 + e^-x).
// launch: grid ceil(len / 256), block 256, shared 0
extern "C" __global__ void __launch_bounds__(256) sigmoid(float* values, long long len) {
    const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    if (i < len) values[i] = 1.0f / (1.0f + expf(-values[i]));
}

// The gradient of σ(x) becomes that of x, given σ(x).
// launch: grid ceil(len / 256), block 256, shared 0
extern "C" __global__ void __launch_bounds__(256)
    sigmoid_backward(const float* sigma, float* gradient, long long len) {
    const long long i = (long long)blockIdx.x * 256 + threadIdx.x;
    if (i < len) gradient[i] *= sigma[i] * (1.0f - sigma[i]);
}

// ---- Sums ----

// partials[block] = the sum of the block's share of the values, in double.
// launch: grid G = min(1024, max(1, ceil(len / 4096))), block 256, shared 0, scratch G doubles: partials
extern "C" __global__ void __launch_bounds__(256) sum_parts(const float* values, long long len, double* partials) {
    __shared__ double shared[WARP];
    double sum = 0.0;
    const long long stride = (long long)gridDim.x * 1024;
    const long long vectors = aligned(values, 16) ? len / 4 * 4 : 0;
    for (long long i = (long long)blockIdx.x * 1024 + 4 * threadIdx.x; i < vectors; i += stride) {
        float four[4];
        load4(values + i, four);
        sum += ((double)four[0] + four[1]) + ((double)four[2] + four[3]);
    }
    for (long long i = vectors + (long long)blockIdx.x * 256 + threadIdx.x; i < len; i += (long long)gridDim.x * 256)
        sum += values[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// total[0] = Σ partials.
// launch: grid 1, block 256, shared 0
extern "C" __global__ void __launch_bounds__(256) sum_total(const double* partials, int parts, double* total) {
    __shared__ double shared[WARP];
    double sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += 256) sum += partials[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) total[0] = sum;
}

#define COLUMNS 256
#define ROW_THREADS 8

// out[column] = Σ over the parts, in their order, of partials (parts, width): the second stage of bias_gradient and of
// rms_norm_backward.
// launch: grid ceil(width / 32), block (32, 8), shared 0
extern "C" __global__ void __launch_bounds__(256) sum_columns(const float* partials, int parts, int width, float* out) {
    __shared__ float sums[ROW_THREADS][WARP];
    const int column = blockIdx.x * WARP + threadIdx.x;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (int part = threadIdx.y; part < parts; part += ROW_THREADS) sum += partials[(long long)part * width + column];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
        for (int i = 1; i < ROW_THREADS; i++) sum += sums[i][threadIdx.x];
        out[column] = sum;
    }
}

// ---- Biases ----

// y (rows, width) += bias, row by row.
// launch: grid (ceil(rows / 64), ceil(width / 256)), block (32, 8), shared 0
extern "C" __global__ void __launch_bounds__(256) add_bias(const float* bias, act* y, int rows, int width) {
    const int first_row = blockIdx.x * 64 + threadIdx.y;
    const int end = blockIdx.x * 64 + 64 < rows ? blockIdx.x * 64 + 64 : rows;
    if (width % 8 == 0 && aligned(y, 16)) {
        const int column = blockIdx.y * COLUMNS + 8 * threadIdx.x;
        if (column >= width) return;
        float added[8];
#pragma unroll
        for (int j = 0; j < 8; j++) added[j] = bias[column + j];
        // Four rows are under way at once.
        for (int row = first_row; row < end; row += 4 * ROW_THREADS) {
            float values[4][8];
            act* place = y + (long long)row * width + column;
            const long long step = (long long)ROW_THREADS * width;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (row + i * ROW_THREADS < end) load8(place + i * step, values[i]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 8; j++) values[i][j] += added[j];
                if (row + i * ROW_THREADS < end) store8(place + i * step, values[i]);
            }
        }
        return;
    }
    for (int row = first_row; row < end; row += ROW_THREADS) {
        for (int j = 0; j < 8; j++) {
            const int column = blockIdx.y * COLUMNS + j * WARP + threadIdx.x;
            if (column >= width) break;
            act* place = y + (long long)row * width + column;
            *place = to_act(to_float(*place) + bias[column]);
        }
    }
}

// partials (P, width): row p is the sum of dy (rows, width) over the p-th of P runs of rows. sum_columns makes the gradient
// of them.
// launch: grid (ceil(width / 256), P = min(128, ceil(rows / 32))), block (32, 8), shared 0, scratch P·width floats: partials
extern "C" __global__ void __launch_bounds__(256)
    bias_gradient_parts(const act* dy, float* partials, int rows, int width) {
    __shared__ float sums[ROW_THREADS][COLUMNS];
    const int run = (rows + gridDim.y - 1) / gridDim.y;
    const int first = blockIdx.y * run;
    const int end = first + run < rows ? first + run : rows;
    const bool vectors = width % 8 == 0 && aligned(dy, 16);
    float sum[8] = {};
    if (vectors) {
        const int column = blockIdx.x * COLUMNS + 8 * threadIdx.x;
        if (column < width) {
#pragma unroll 4
            for (int row = first + threadIdx.y; row < end; row += ROW_THREADS) {
                float values[8];
                load8(dy + (long long)row * width + column, values);
#pragma unroll
                for (int j = 0; j < 8; j++) sum[j] += values[j];
            }
        }
    } else {
        for (int row = first + threadIdx.y; row < end; row += ROW_THREADS) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int column = blockIdx.x * COLUMNS + j * WARP + threadIdx.x;
                if (column < width) sum[j] += to_float(dy[(long long)row * width + column]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sums[threadIdx.y][vectors ? 8 * threadIdx.x + j : j * WARP + threadIdx.x] = sum[j];
    __syncthreads();
    const int local = threadIdx.y * WARP + threadIdx.x;
    const int column = blockIdx.x * COLUMNS + local;
    if (column >= width) return;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_THREADS; i++) total += sums[i][local];
    partials[(long long)blockIdx.y * width + column] = total;
}

// ---- SwiGLU ----
//
// A row of gate_up is `width` gates and then as many ups. `scale` has one factor per row: null, the weights of a routing by
// slot, or a gate. `used` is null or points to the number of rows in use, &starts[E] of a routing: rows beyond it are left
// alone.

__device__ __forceinline__ int rows_in_use(const int* used, int rows) {
    if (used == nullptr) return rows;
    const int count = *used;
    return count < rows ? count : rows;
}

#define SWIGLU_LOADS 2

// out (rows, width) = scale · SiLU(gate) ⊙ up.
// launch: grid ceil(rows · V / 512), V = width / 8 if width % 8 == 0, else width (in 64 bits); block 256, shared 0
extern "C" __global__ void __launch_bounds__(256)
    swiglu(const act* gate_up, const float* scale, const int* used, act* out, int rows, int width) {
    const bool vectors = width % 8 == 0;
    const unsigned per_row = vectors ? width / 8 : width;
    const long long start = (long long)blockIdx.x * (256 * SWIGLU_LOADS);
    const long long start_row = start / per_row;
    const unsigned start_item = (unsigned)(start - start_row * per_row);
    const int end = rows_in_use(used, rows);
    if (start_row >= end) return;
    if (vectors && aligned(gate_up, 16) && aligned(out, 16)) {
        float gate[SWIGLU_LOADS][8], up[SWIGLU_LOADS][8];
#pragma unroll
        for (int i = 0; i < SWIGLU_LOADS; i++) {
            const unsigned item = start_item + 256 * i + threadIdx.x, down = item / per_row;
            if (start_row + down < end) {
                const act* row = gate_up + (start_row + down) * 2 * width + 8 * (item - down * per_row);
                load8(row, gate[i]);
                load8(row + width, up[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < SWIGLU_LOADS; i++) {
            const unsigned item = start_item + 256 * i + threadIdx.x, down = item / per_row;
            if (start_row + down < end) {
                const long long row = start_row + down;
                const float factor = scale == nullptr ? 1.0f : scale[row];
#pragma unroll
                for (int j = 0; j < 8; j++) up[i][j] *= gate[i][j] * sigmoid_of(gate[i][j]) * factor;
                store8(out + row * width + 8 * (item - down * per_row), up[i]);
            }
        }
        return;
    }
    // With vectors' counts but not their alignment, an item is still 8 elements.
    const int elements = vectors ? 8 : 1;
    for (int i = 0; i < SWIGLU_LOADS; i++) {
        const unsigned item = start_item + 256 * i + threadIdx.x, down = item / per_row;
        const long long row = start_row + down;
        if (row >= end) return;
        const float factor = scale == nullptr ? 1.0f : scale[row];
        for (int j = 0; j < elements; j++) {
            const int column = (item - down * per_row) * elements + j;
            const float gate = to_float(gate_up[row * 2 * width + column]);
            const float up = to_float(gate_up[row * 2 * width + width + column]);
            out[row * width + column] = to_act(gate * sigmoid_of(gate) * up * factor);
        }
    }
}

// The gradients of one gate and one up, in their places, and what the pair adds to the gradient of the scale.
__device__ __forceinline__ float swiglu_gradient(float dout, float factor, float& gate, float& up) {
    const float sigma = sigmoid_of(gate);
    const float silu = gate * sigma;
    const float dout_up = dout * up;
    // σ·(1 + gate·(1 − σ)) = σ + silu·(1 − σ)
    const float slope = fmaf(silu, 1.0f - sigma, sigma);
    gate = factor * (dout_up * slope);
    up = factor * (dout * silu);
    return dout_up * silu;
}

// Replaces gate_up by its gradient, and scale_gradient (null, or one per row) by Σ dout ⊙ SiLU(gate) ⊙ up of each row.
// launch: grid rows, block min(256, 32·ceil(width / 256)), at least 32, shared 0
extern "C" __global__ void __launch_bounds__(256) swiglu_backward(
    const act* dout,
    const float* scale,
    const int* used,
    act* gate_up,
    float* scale_gradient,
    int rows,
    int width) {
    __shared__ float shared[WARP];
    const long long row = blockIdx.x;
    if (row >= rows_in_use(used, rows)) return;
    const float factor = scale == nullptr ? 1.0f : scale[row];
    act* gates = gate_up + row * 2 * width;
    act* ups = gates + width;
    dout += row * width;
    float sum = 0.0f;
    if (width % 8 == 0 && aligned(gate_up, 16) && aligned(dout, 16)) {
#pragma unroll 2
        for (int i = 8 * threadIdx.x; i < width; i += 8 * blockDim.x) {
            float gate[8], up[8], out[8];
            load8(gates + i, gate);
            load8(ups + i, up);
            load8(dout + i, out);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += swiglu_gradient(out[j], factor, gate[j], up[j]);
            store8(gates + i, gate);
            store8(ups + i, up);
        }
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            float gate = to_float(gates[i]), up = to_float(ups[i]);
            sum += swiglu_gradient(to_float(dout[i]), factor, gate, up);
            gates[i] = to_act(gate);
            ups[i] = to_act(up);
        }
    }
    if (scale_gradient == nullptr) return;
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) scale_gradient[row] = sum;
}

// RMSNorm, one block per row forward, and a run of rows per block backward.
//
// Rows of up to NORM_VECTORS·4 elements a thread stay in registers between the reduction and the result.

#define NORM_VECTORS 4

// The norm's weight may start anywhere in the parameters.
__device__ __forceinline__ void load_weight(const float* weight, bool vectors, float (&to)[4]) {
    if (vectors) {
        load4(weight, to);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) to[j] = weight[j];
    }
}

// 1/√(mean + ε), without the approximations of rsqrt.
__device__ __forceinline__ float inverse_root(float squares, int width, float eps) {
    return 1.0f / sqrtf(squares / width + eps);
}

// y = w ⊙ x·r and r = 1/√(mean(x²) + ε). With ADD, x is a + b, and is written to `x_out`.
template <bool ADD>
__device__ __forceinline__ void norm_row(
    const float* x, const act* b, float* x_out, const float* weight, act* y, float* inverse_rms, int width, float eps) {
    __shared__ float shared[WARP];
    const long long start = (long long)blockIdx.x * width;
    const int stride = 4 * blockDim.x, first = 4 * threadIdx.x;
    x += start, y += start;
    if (ADD) b += start, x_out += start;
    const bool in_vectors =
        width % 4 == 0 && aligned(x, 16) && aligned(y, 16) && (!ADD || (aligned(b, 16) && aligned(x_out, 16)));
    if (!ADD) x_out = (float*)x;
    if (in_vectors && width <= NORM_VECTORS * stride) {
        float values[NORM_VECTORS][4] = {};
#pragma unroll
        for (int i = 0; i < NORM_VECTORS; i++)
            if (first + i * stride < width) load4(x + first + i * stride, values[i]);
        if (ADD) {
            float added[NORM_VECTORS][4] = {};
#pragma unroll
            for (int i = 0; i < NORM_VECTORS; i++)
                if (first + i * stride < width) load4(b + first + i * stride, added[i]);
#pragma unroll
            for (int i = 0; i < NORM_VECTORS; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) values[i][j] += added[i][j];
                if (first + i * stride < width) store4(x_out + first + i * stride, values[i]);
            }
        }
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < NORM_VECTORS; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) squares = fmaf(values[i][j], values[i][j], squares);
        }
        const float scale = inverse_root(block_sum(squares, shared), width, eps);
        if (threadIdx.x == 0) inverse_rms[blockIdx.x] = scale;
        const bool weight_vectors = aligned(weight, 16);
#pragma unroll
        for (int i = 0; i < NORM_VECTORS; i++) {
            if (first + i * stride >= width) break;
            float factors[4];
            load_weight(weight + first + i * stride, weight_vectors, factors);
#pragma unroll
            for (int j = 0; j < 4; j++) values[i][j] = values[i][j] * factors[j] * scale;
            store4(y + first + i * stride, values[i]);
        }
        return;
    }
    // Each thread reads again the elements that it has written itself.
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = x[i];
        if (ADD) {
            value += to_float(b[i]);
            x_out[i] = value;
        }
        squares = fmaf(value, value, squares);
    }
    const float scale = inverse_root(block_sum(squares, shared), width, eps);
    if (threadIdx.x == 0) inverse_rms[blockIdx.x] = scale;
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[i] = to_act(x_out[i] * weight[i] * scale);
}

// y (rows, width) = w ⊙ x·r, and r = 1/√(mean(x²) + ε) of each row.
// launch: grid rows, block min(1024, 32·ceil(width / 512)), shared 0
extern "C" __global__ void __launch_bounds__(1024) rms_norm(
    const float* x, const float* weight, act* y, float* inverse_rms, int width, float eps) {
    norm_row<false>(x, nullptr, nullptr, weight, y, inverse_rms, width, eps);
}

// x_out = x + b, and the norm of x_out: what `add_act` and `rms_norm` do, without reading x_out again. x_out may be x.
// launch: grid rows, block min(1024, 32·ceil(width / 512)), shared 0
extern "C" __global__ void __launch_bounds__(1024) add_rms_norm(
    const float* x,
    const act* b,
    float* x_out,
    const float* weight,
    act* y,
    float* inverse_rms,
    int width,
    float eps) {
    norm_row<true>(x, b, x_out, weight, y, inverse_rms, width, eps);
}

// With x̂ = x·r: dx += r·(w⊙dy − x̂·mean(w⊙dy⊙x̂)), and partials (P, width): row p is Σ dy⊙x̂ over the rows p, p + P, …;
// sum_columns (pointwise.cu) makes dw of them. dx_act is null, or gets dx rounded to activations.
// launch: grid P = min(rows, 4 · multiprocessors), block min(512, 32·ceil(width / 512)), shared 0,
// scratch P·width floats: partials
extern "C" __global__ void __launch_bounds__(512) rms_norm_backward(
    const float* x,
    const float* inverse_rms,
    const float* weight,
    const act* dy,
    float* dx,
    act* dx_act,
    float* partials,
    int rows,
    int width) {
    __shared__ float shared[WARP];
    const int stride = 4 * blockDim.x, first = 4 * threadIdx.x;
    partials += (long long)blockIdx.x * width;
    const bool in_vectors = width % 4 == 0 && aligned(x, 16) && aligned(dy, 16) && aligned(dx, 16) && aligned(dx_act, 16);
    if (in_vectors && width <= NORM_VECTORS * stride) {
        const bool weight_vectors = aligned(weight, 16);
        float dweight[NORM_VECTORS][4] = {};
        for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
            const long long start = row * width + first;
            float values[NORM_VECTORS][4] = {}, dvalues[NORM_VECTORS][4] = {}, sums[NORM_VECTORS][4] = {};
#pragma unroll
            for (int i = 0; i < NORM_VECTORS; i++)
                if (first + i * stride < width) load4(x + start + i * stride, values[i]);
#pragma unroll
            for (int i = 0; i < NORM_VECTORS; i++)
                if (first + i * stride < width) load4(dy + start + i * stride, dvalues[i]);
#pragma unroll
            for (int i = 0; i < NORM_VECTORS; i++)
                if (first + i * stride < width) load4(dx + start + i * stride, sums[i]);
            const float scale = inverse_rms[row];
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < NORM_VECTORS; i++) {
                float factors[4] = {};
                if (first + i * stride < width) load_weight(weight + first + i * stride, weight_vectors, factors);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    // dy⊙x, then ·r for the weight and ·w for the projection.
                    const float product = dvalues[i][j] * values[i][j];
                    dweight[i][j] = fmaf(product, scale, dweight[i][j]);
                    dot = fmaf(product, factors[j], dot);
                    sums[i][j] = fmaf(dvalues[i][j] * factors[j], scale, sums[i][j]);
                }
            }
            // r·x̂·mean(w⊙dy⊙x̂) = x·(r³·dot/width)
            const float along = -block_sum(dot, shared) * scale * scale * scale / width;
#pragma unroll
            for (int i = 0; i < NORM_VECTORS; i++) {
                if (first + i * stride >= width) break;
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] = fmaf(values[i][j], along, sums[i][j]);
                store4(dx + start + i * stride, sums[i]);
                if (dx_act != nullptr) store4(dx_act + start + i * stride, sums[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < NORM_VECTORS; i++) {
            if (first + i * stride >= width) break;
#pragma unroll
            for (int j = 0; j < 4; j++) partials[first + i * stride + j] = dweight[i][j];
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) partials[i] = 0.0f;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long start = row * width;
        const float scale = inverse_rms[row];
        float dot = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float product = to_float(dy[start + i]) * x[start + i];
            partials[i] = fmaf(product, scale, partials[i]);
            dot = fmaf(product, weight[i], dot);
        }
        const float along = -block_sum(dot, shared) * scale * scale * scale / width;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float sum = fmaf(to_float(dy[start + i]) * weight[i], scale, dx[start + i]);
            const float result = fmaf(x[start + i], along, sum);
            dx[start + i] = result;
            if (dx_act != nullptr) dx_act[start + i] = to_act(result);
        }
    }
}

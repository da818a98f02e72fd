// What every kernel builds on: the type of activations, vector loads and stores, reductions, and the few instructions
// that C++ has no words for.
//
// A translation unit is this file followed by the .cu files of one unit. The host defines
//   ACT_BF16   0: activations are float, 1: bfloat16
//   PRECISION  PRECISION_F32, PRECISION_TF32 or PRECISION_BF16: what the products multiply
// and SANDERLING_EMULATE when the kernels are compiled for the CPU, where emulate.hpp and mma.hpp stand in for the device.
// Kernels use no special instruction but through this file, so that the emulator can run all of them; those of Hopper alone are in
// the files for it, with what stands in for them.
//
// Floating-point atomics are not used anywhere: all sums have a fixed order.

#ifndef SANDERLING_PRELUDE
#define SANDERLING_PRELUDE

#ifndef ACT_BF16
#define ACT_BF16 0
#endif
#define PRECISION_F32 0
#define PRECISION_TF32 1
#define PRECISION_BF16 2
#ifndef PRECISION
#define PRECISION (ACT_BF16 ? PRECISION_BF16 : PRECISION_F32)
#endif

#ifdef SANDERLING_EMULATE
#include "emulate.hpp"
#include "mma.hpp"
#else
// As in cuda_bf16.h, which NVRTC comes without: all that is needed of it, so that machines need no headers.
struct __align__(2) __nv_bfloat16 {
    unsigned short bits;
};
__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 value) {
    return __uint_as_float((unsigned)value.bits << 16);
}
__device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float value) {
    __nv_bfloat16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
    return rounded;
}
#endif

typedef __nv_bfloat16 bf16;
#if ACT_BF16
typedef bf16 act;
#else
typedef float act;
#endif

#define WARP 32
#define FULL_WARP 0xffffffffu
// Elements of activation in 16 bytes.
#define ACT_VECTOR (16 / (int)sizeof(act))

// Memory whose size the launch gives, as an array of `type` called `name`. Aligned for anything (128 bytes).
#ifdef SANDERLING_EMULATE
#define DYNAMIC_SHARED(type, name) type* name = (type*)emulate_dynamic_shared()
#else
#define DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
    type* name = (type*)dynamic_shared
#endif

// ---- Conversions ----

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <typename To>
__device__ __forceinline__ To from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
    return __float2bfloat16_rn(value);
}
__device__ __forceinline__ act to_act(float value) { return from_float<act>(value); }

__device__ __forceinline__ unsigned float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(unsigned bits) { return __uint_as_float(bits); }

// NVRTC has no INFINITY.
__device__ __forceinline__ float infinity() { return bits_float(0x7f800000u); }

// Two bf16 in one register, the first in the low half, as mma and memory have them.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#ifdef SANDERLING_EMULATE
    return emulate_pack_bf16(low, high);
#else
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}
__device__ __forceinline__ float low_bf16(unsigned packed) { return bits_float(packed << 16); }
__device__ __forceinline__ float high_bf16(unsigned packed) { return bits_float(packed & 0xffff0000u); }

// The nearest tf32 (ties away from zero), in the bits of a float.
__device__ __forceinline__ unsigned to_tf32(float value) {
#ifdef SANDERLING_EMULATE
    return emulate_to_tf32(value);
#else
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
    return rounded;
#endif
}

// ---- Vectors of memory: load4, load8, store4, store8 between registers of float and memory of float or bf16 ----
//
// The address is aligned to the vector's size, at most 16 bytes: see aligned().

__device__ __forceinline__ bool aligned(const void* address, int bytes) {
    return ((unsigned long long)address & (unsigned long long)(bytes - 1)) == 0;
}

__device__ __forceinline__ void load4(const float* from, float (&to)[4]) {
    const float4 vector = *(const float4*)from;
    to[0] = vector.x, to[1] = vector.y, to[2] = vector.z, to[3] = vector.w;
}
__device__ __forceinline__ void load4(const bf16* from, float (&to)[4]) {
    const uint2 vector = *(const uint2*)from;
    to[0] = low_bf16(vector.x), to[1] = high_bf16(vector.x);
    to[2] = low_bf16(vector.y), to[3] = high_bf16(vector.y);
}
__device__ __forceinline__ void load8(const float* from, float (&to)[8]) {
    const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}
__device__ __forceinline__ void load8(const bf16* from, float (&to)[8]) {
    const uint4 vector = *(const uint4*)from;
    to[0] = low_bf16(vector.x), to[1] = high_bf16(vector.x);
    to[2] = low_bf16(vector.y), to[3] = high_bf16(vector.y);
    to[4] = low_bf16(vector.z), to[5] = high_bf16(vector.z);
    to[6] = low_bf16(vector.w), to[7] = high_bf16(vector.w);
}
__device__ __forceinline__ void store4(float* to, const float (&from)[4]) {
    *(float4*)to = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void store4(bf16* to, const float (&from)[4]) {
    *(uint2*)to = make_uint2(pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]));
}
__device__ __forceinline__ void store8(float* to, const float (&from)[8]) {
    ((float4*)to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    ((float4*)to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}
__device__ __forceinline__ void store8(bf16* to, const float (&from)[8]) {
    *(uint4*)to = make_uint4(
        pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]), pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7]));
}

// 16 bytes to global memory in one store, where the compiler would make four of store8 or store4.
__device__ __forceinline__ void store_global(bf16* to, const float (&from)[8]) {
#ifdef SANDERLING_EMULATE
    store8(to, from);
#else
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(pack_bf16(from[0], from[1])), "r"(pack_bf16(from[2], from[3])),
                   "r"(pack_bf16(from[4], from[5])), "r"(pack_bf16(from[6], from[7]))
                 : "memory");
#endif
}
__device__ __forceinline__ void store_global(float* to, const float (&from)[4]) {
#ifdef SANDERLING_EMULATE
    store4(to, from);
#else
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
                 : "memory");
#endif
}

// ---- Functions ----

// e^x to about |x|·1e-7 of itself, in one multiplication and one special-function instruction.
__device__ __forceinline__ float fast_exp(float x) {
#ifdef SANDERLING_EMULATE
    return expf(x);
#else
    return __expf(x);
#endif
}
// 2^x.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef SANDERLING_EMULATE
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
// a / b to within 2 units in the last place; zero for b beyond 2^126.
__device__ __forceinline__ float fast_divide(float a, float b) {
#ifdef SANDERLING_EMULATE
    return a / b;
#else
    return __fdividef(a, b);
#endif
}
// 1 / (1 + e^-x).
__device__ __forceinline__ float sigmoid_of(float x) { return fast_divide(1.0f, 1.0f + fast_exp(-x)); }

// ---- Reductions ----
//
// All lanes or threads get the result, and the order of the sum depends on nothing but the block's size.

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_WARP, value, offset);
    return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, offset));
    return value;
}
// Over a block of a whole number of warps along x; `shared` has room for 32, and may be used again at once.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    value = warp_sum(value);
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    value = warp_sum(lane < warps ? shared[lane] : T(0));
    __syncthreads();
    return value;
}
__device__ __forceinline__ float block_max(float value, float* shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    value = warp_max(value);
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    value = warp_max(lane < warps ? shared[lane] : -infinity());
    __syncthreads();
    return value;
}

// ---- Tensor cores ----
//
// Fragments are the ones of PTX: with group = lane / 4 and pair = lane % 4, an accumulator of 16 × 8 has
// c[0], c[1] = (group, 2·pair + {0, 1}) and c[2], c[3] = (group + 8, 2·pair + {0, 1}).
// All lanes of the warp take part.

// c += a·b for a 16 × 16 (row-major), b 16 × 8 (column-major), c 16 × 8.
// a[0] = (group, 2·pair + {0, 1}), a[1] = (group + 8, …), a[2] = (group, 2·pair + 8 + {0, 1}), a[3] = (group + 8, … + 8);
// b[0] = (2·pair + {0, 1}, group), b[1] = (2·pair + 8 + {0, 1}, group).
__device__ __forceinline__ void mma_bf16(float c[4], const unsigned a[4], const unsigned b[2]) {
#ifdef SANDERLING_EMULATE
    emulate_mma_bf16(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// c += a·b for a 16 × 8 (row-major), b 8 × 8 (column-major), c 16 × 8, each register one tf32.
// a[0] = (group, pair), a[1] = (group + 8, pair), a[2] = (group, pair + 4), a[3] = (group + 8, pair + 4);
// b[0] = (pair, group), b[1] = (pair + 4, group).
__device__ __forceinline__ void mma_tf32(float c[4], const unsigned a[4], const unsigned b[2]) {
#ifdef SANDERLING_EMULATE
    emulate_mma_tf32(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The 32-bit address of shared memory that PTX asks for.
__device__ __forceinline__ unsigned shared_address(const void* shared) {
#ifdef SANDERLING_EMULATE
    return emulate_shared_address(shared);
#else
    return (unsigned)__cvta_generic_to_shared(shared);
#endif
}

// Four 8 × 8 matrices of 16-bit elements: lane 8·i + j gives the address of row j of matrix i (16 bytes, aligned), and
// gets, in r[i], elements 2·(lane % 4) + {0, 1} of row lane / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(unsigned r[4], const void* shared) {
#ifdef SANDERLING_EMULATE
    emulate_ldmatrix_x4(r, shared);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
#endif
}
// The same with each matrix transposed: r[i] has rows 2·(lane % 4) + {0, 1} of column lane / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned r[4], const void* shared) {
#ifdef SANDERLING_EMULATE
    emulate_ldmatrix_x4_trans(r, shared);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
#endif
}

// ---- Copies that do not wait ----

// 16 bytes from global to shared memory, or 16 zeros when not valid (the address is then not read). Both are aligned.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef SANDERLING_EMULATE
    emulate_cp_async(shared, global, 16, valid);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}
// The same for 8 bytes.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid) {
#ifdef SANDERLING_EMULATE
    emulate_cp_async(shared, global, 8, valid);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 8 : 0)
                 : "memory");
#endif
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() {
#ifdef SANDERLING_EMULATE
    emulate_cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most N of this thread's groups are under way. Others see the copies after a __syncthreads.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#ifdef SANDERLING_EMULATE
    emulate_cp_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#endif

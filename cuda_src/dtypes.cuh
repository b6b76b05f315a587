// `scalar`, the 16-bit type of weights and activations (-DDTYPE_BF16 or -DDTYPE_F16), its conversions, and vectors to load.
#pragma once
#include "ptx.cuh"

#if defined(__CUDACC_RTC__) && defined(DTYPE_BF16)
#include <cuda_bf16.h>
using scalar = __nv_bfloat16;
__device__ __forceinline__ float to_float(scalar x) { return __bfloat162float(x); }
__device__ __forceinline__ scalar round_to_scalar(float x) { return __float2bfloat16_rn(x); }

#elif defined(__CUDACC_RTC__) && defined(DTYPE_F16)
#include <cuda_fp16.h>
using scalar = __half;
__device__ __forceinline__ float to_float(scalar x) { return __half2float(x); }
__device__ __forceinline__ scalar round_to_scalar(float x) { return __float2half_rn(x); }

#elif defined(DTYPE_BF16)
struct scalar {
  unsigned short bits;
};
inline float to_float(scalar x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline scalar round_to_scalar(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

#elif defined(DTYPE_F16)
using scalar = _Float16;
inline float to_float(scalar x) { return static_cast<float>(x); }
inline scalar round_to_scalar(float x) { return static_cast<scalar>(x); }

#else
#error "one of DTYPE_BF16 and DTYPE_F16 must be defined"
#endif

// c += a times b, as `mma_m16n8k16_bf16` says, of scalars.
__device__ __forceinline__ void mma_of_scalars(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if defined(DTYPE_BF16)
  mma_m16n8k16_bf16(c, a, b0, b1);
#else
  mma_m16n8k16_f16(c, a, b0, b1);
#endif
}

// Two floats rounded to scalars, `low` in the lower half.
__device__ __forceinline__ unsigned round_pair_to_scalars(float low, float high) {
#if defined(DTYPE_BF16)
  return cvt_rn_bf16x2(low, high);
#else
  return cvt_rn_f16x2(low, high);
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  return round_to_scalar(x);
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

// N elements that one instruction moves where they fit its 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) vec {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ vec<T, N> load(const T* source) {
  return *reinterpret_cast<const vec<T, N>*>(source);
}

template <int N, class T>
__device__ __forceinline__ void store(T* target, const vec<T, N>& value) {
  *reinterpret_cast<vec<T, N>*>(target) = value;
  note_store(target, sizeof value);
}

template <class T>
__device__ __forceinline__ bool aligned_to_16(const T* pointer) {
  return reinterpret_cast<unsigned long long>(pointer) % 16 == 0;
}

// A norm in two halves: who writes the residual multiplies it by the gain, who reads it has the sum of squares and multiplies the
// product by 1 / rms.
#pragma once
#include "dtypes.cuh"

// float16 does not hold the largest residuals, times a gain, that are seen.
#if defined(DTYPE_F16)
constexpr float HEADROOM = 1.0f / 64;
#else
constexpr float HEADROOM = 1;
#endif

__device__ __forceinline__ float before_norm(float residual, float gain) { return residual * gain * HEADROOM; }
__device__ __forceinline__ float after_norm(float sum_of_squares, int width, float eps) {
  return 1.0f / (HEADROOM * sqrtf(sum_of_squares / width + eps));
}

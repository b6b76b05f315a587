// Floats as integers that compare as they do.
#pragma once
#include "ptx.cuh"

// Unsigned integers in the order of the floats; -0 is first made +0, which it equals.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Reductions over the threads of a CTA, in an order that depends on nothing but their number.
#pragma once
#include "ptx.cuh"

// combine(...) over the values of all threads, given to all of them. `scratch` is shared memory for blockDim.x / 32 values.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Combine combine) {
  for (int distance = 16; distance > 0; distance /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); warp++) value = combine(value, scratch[warp]);
  __syncthreads();  // nobody writes to scratch again while another still reads it
  return value;
}

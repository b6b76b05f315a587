// The sums of a tile in registers, by wgmma: tokens are its 64 rows, the rows of a stage's weights its columns.
//
//   x [64 tokens, 16] of a slice, in shared memory -> A       weights [32 rows, 16] of a stage, in shared memory -> B
//
// Of fewer tokens A reads what lies behind them: rows of the product that nobody looks at.
#pragma once
#include "stream_products.cuh"

// The stages of one warpgroup: with w the warp of the four, g = lane / 4 and t = lane % 4, sum[number][4 * strip + 2 * h + i] is of
// token 16 w + g + 8 h and row 2 t + i of the strip.
struct Sums {
  float sum[TILE_STAGES / WARPGROUPS][4 * STAGE_STRIPS] = {};

  __device__ static __forceinline__ bool has(int stage) { return threadIdx.x / 128 == stage % WARPGROUPS; }

  __device__ __forceinline__ void take(const XSlice&) {}

  // The products of a stage and a slice, which are over when this returns.
  __device__ __forceinline__ void add(int stage, const Shared& shared, int place, int, const XSlice& x) {
    const unsigned long long a = descriptor_of(x.at[0], 8 * sizeof(x.at[0][0]));
    const unsigned long long b = descriptor_of(shared.weights[place].strips[0].at[0], sizeof(shared.weights[place].strips[0]));
    float(&sums)[4 * STAGE_STRIPS] = sum[stage / WARPGROUPS];
    wgmma_fence_operand(sums);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < SLICE / 16; step++) {  // 32 bytes of the 128 of a block
      const unsigned long long of_x = a + (step / 4 * sizeof(x.at[0]) + step % 4 * 32) / 16;
      const unsigned long long of_weights = b + (step / 4 * STRIP * 128 + step % 4 * 32) / 16;
#if defined(DTYPE_BF16)
      wgmma_m64n32k16_bf16(sums, of_x, of_weights, 1);
#else
      wgmma_m64n32k16_f16(sums, of_x, of_weights, 1);
#endif
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_fence_operand(sums);
  }

  // Leaves the sums of a stage where they can be finished, the stage's first row in column `column`.
  __device__ __forceinline__ void turn(int stage, Turned& turned, int column) const {
    if (!has(stage)) return;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int token = threadIdx.x % 128 / 32 * 16 + 8 * h + lane / 4;
      if (token >= TOKENS) continue;
#pragma unroll
      for (int strip = 0; strip < STAGE_STRIPS; strip++) {
        const float* from = &sum[stage / WARPGROUPS][4 * strip + 2 * h];
        store(&turned.at[0][token][column + strip * STRIP + lane % 4 * 2], vec<float, 2>{from[0], from[1]});
      }
    }
  }

 private:
  // K-major; the address comes from lane 0, so that the compiler knows that all lanes have the same.
  template <class T>
  __device__ static __forceinline__ unsigned long long descriptor_of(const T& start, unsigned stride) {
    const unsigned long long descriptor = wgmma_descriptor(start, 0, stride);
    return descriptor >> 32 << 32 | __shfl_sync(0xffffffffu, static_cast<unsigned>(descriptor), 0);
  }
};

// The sums of a tile in registers: tokens are the rows of an mma, rows of weights its columns.
//
//   x [16 tokens, 16] from a slice, ldmatrix -> A       weights [8 rows, 16] of a strip, ldmatrix, from codes to scalars -> B
#pragma once
#include "stream_products.cuh"

constexpr int KEPT = WARP_STRIPS > 1 ? X_BLOCKS : 1;  // of a slice of x; and how many are in registers

// An mma waits for the one before it in its chain; those of other strips and chains fill the time.
constexpr int CHAINS = WARP_STRIPS > 1 ? 1 : 2;

// A warp's part of a tile: with g = lane / 4 and t = lane % 4, sum[stage][strip][chain][2 * h + i] is of token g + 8 h of the warp's
// and row 2 t + i of the strip.
struct Sums {
  float sum[TILE_STAGES][WARP_STRIPS][CHAINS][4] = {};
  unsigned tokens[KEPT][4][4];  // of 4 steps each: an mma's inner dimension is 16

  __device__ static __forceinline__ int first_token() { return threadIdx.x / 32 % TOKEN_PARTS * 16; }
  __device__ static __forceinline__ int first_strip() { return threadIdx.x / 32 / TOKEN_PARTS % STRIP_PARTS * WARP_STRIPS; }
  __device__ static __forceinline__ int inner_part() { return threadIdx.x / 32 / TOKEN_PARTS / STRIP_PARTS; }

  // Where there are but 8 tokens, an mma has each of them twice.
  __device__ static __forceinline__ void load_tokens(unsigned (&a)[4][4], const XSlice& x, int block) {
    const int lane = threadIdx.x % 32, token = (first_token() + lane % 16) % TOKENS;
#pragma unroll
    for (int step = 0; step < 4; step++) ldmatrix_x4(a[step], x.piece(block, token, 2 * step + lane / 16));
  }

  // A slice of x whose products come next. Kept in registers where it is used for many strips.
  __device__ __forceinline__ void take(const XSlice& x) {
    if constexpr (KEPT > 1) {
#pragma unroll
      for (int block = 0; block < X_BLOCKS; block++) load_tokens(tokens[block], x, block);
    }
  }

  // The products of a stage and the slice taken last. Half a block at a time: what an ldmatrix loads of a strip.
  __device__ __forceinline__ void add(int stage, const Shared& shared, int place, int count, const XSlice& x) {
    const int lane = threadIdx.x % 32;
    if (first_strip() >= count) return;
    constexpr int STEPS = WEIGHT_BLOCK / 32, HALVES = 2 * WEIGHT_BLOCKS / INNER_PARTS;
    const int first_half = inner_part() * HALVES;
    unsigned words[2][WARP_STRIPS][4];  // a strip that is not there is what was there before, and nobody wants its sums
    const auto load_strips = [&](unsigned(&into)[WARP_STRIPS][4], int half) {
#pragma unroll
      for (int s = 0; s < WARP_STRIPS; s++) {
        const auto& strip = shared.weights[place].strips[first_strip() + s];
        ldmatrix_x4(into[s], strip.piece(half / 2, lane % 8, half % 2 * 4 + lane / 8));
      }
    };
    load_strips(words[0], first_half);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
      if (half + 1 < HALVES) load_strips(words[(half + 1) % 2], first_half + half + 1);
      unsigned scales[WARP_STRIPS] = {};
#if WEIGHT_BITS == 4
#pragma unroll
      for (int s = 0; s < WARP_STRIPS; s++) scales[s] = shared.scales[place].at[first_strip() + s][first_half + half][lane / 4];
#endif
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        const int of_slice = half * STEPS + step;  // or of this warp's part of it
        unsigned(&a)[4][4] = tokens[of_slice / 4 % KEPT];
        if (KEPT == 1 && of_slice % 4 == 0) load_tokens(a, x, first_half * STEPS / 4 + of_slice / 4);
#pragma unroll
        for (int s = 0; s < WARP_STRIPS; s++) {
          unsigned b[2];
          fragment(b, words[half % 2][s], step, GroupScale(scales[s]));
          mma_of_scalars(sum[stage][s][step % CHAINS], a[of_slice % 4], b[0], b[1]);
        }
      }
    }
  }

  // Leaves the sums of a stage where they can be finished, the stage's first row in column `column`; or adds them to those of
  // another part of the inner dimension.
  __device__ __forceinline__ void turn(int stage, float (&turned)[TOKENS][PHASE_ROWS + 4], int column, bool adds) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < WARP_STRIPS; s++) {
#pragma unroll
      for (int h = 0; h < (TOKENS < 16 ? 1 : 2); h++) {
        float* target = &turned[first_token() + 8 * h + lane / 4][column + (first_strip() + s) * STRIP + lane % 4 * 2];
        vec<float, 2> both = {sum[stage][s][0][2 * h], sum[stage][s][0][2 * h + 1]};
        if constexpr (CHAINS == 2) both = {both.at[0] + sum[stage][s][1][2 * h], both.at[1] + sum[stage][s][1][2 * h + 1]};
        if (adds) both = {both.at[0] + target[0], both.at[1] + target[1]};
        store(target, both);
      }
    }
  }
};

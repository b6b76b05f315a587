// The sums of a tile in registers, by mma.sync: rows of weights are the rows of an mma, tokens its columns.
//
//   weights [8 rows, 16] of two strips, ldmatrix, from codes to scalars -> A       x [8 tokens, 16] from a slice, ldmatrix -> B
#pragma once
#include "stream_products.cuh"

constexpr int PAIRS = WARP_STRIPS / 2;                   // of strips: the 16 rows of an mma
constexpr int OCTETS = TOKENS / TOKEN_PARTS / 8;         // of tokens: its columns
constexpr int WARP_INNER = SLICE / INNER_PARTS;          // of a slice
constexpr int LOADS = WARP_INNER / 32;                   // of x: an ldmatrix has 32 of the inner dimension of 8 tokens
constexpr int HALVES = 2 * WARP_INNER / WEIGHT_BLOCK;    // of blocks of weights: what an ldmatrix has of a strip
constexpr int STEPS = WEIGHT_BLOCK / 32;                 // of a half: an mma's inner dimension is 16
static_assert(PAIRS > 0 && LOADS * 2 == HALVES * STEPS, "a warp has whole pairs of strips and whole halves of blocks");

// A warp's part of a tile: with g = lane / 4 and t = lane % 4, sum[stage][pair][octet][2 * h + i] is of row g of the pair's strip h
// and token 2 t + i of the octet.
struct Sums {
  float sum[TILE_STAGES][PAIRS][OCTETS][4] = {};
  unsigned tokens[LOADS][OCTETS][4];  // two steps each

  __device__ static __forceinline__ int first_token() { return threadIdx.x / 32 % TOKEN_PARTS * 16; }
  __device__ static __forceinline__ int first_strip() { return threadIdx.x / 32 / TOKEN_PARTS % STRIP_PARTS * WARP_STRIPS; }
  __device__ static __forceinline__ int inner_part() { return threadIdx.x / 32 / TOKEN_PARTS / STRIP_PARTS; }

  // Whether this warp takes part in a stage.
  __device__ static __forceinline__ bool has(int) { return true; }

  // A slice of x whose products come next.
  __device__ __forceinline__ void take(const XSlice& x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int load = 0; load < LOADS; load++) {
      const int piece = inner_part() * (WARP_INNER / 8) + 4 * load + lane / 8;
#pragma unroll
      for (int octet = 0; octet < OCTETS; octet++) {
        ldmatrix_x4(tokens[load][octet], x.piece(piece / 8, first_token() + 8 * octet + lane % 8, piece % 8));
      }
    }
  }

  // The products of a stage and the slice taken last.
  __device__ __forceinline__ void add(int stage, const Shared& shared, int place, int count, const XSlice&) {
    const int lane = threadIdx.x % 32;
    if (first_strip() >= count) return;
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
        const int number = half * STEPS + step;
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
          unsigned rows[2][2];
          for (int h = 0; h < 2; h++) {
            fragment(rows[h], words[half % 2][2 * pair + h], step, GroupScale(scales[2 * pair + h]));
          }
          const unsigned a[4] = {rows[0][0], rows[1][0], rows[0][1], rows[1][1]};
#pragma unroll
          for (int octet = 0; octet < OCTETS; octet++) {
            const unsigned(&b)[4] = tokens[number / 2][octet];
            mma_of_scalars(sum[stage][pair][octet], a, b[number % 2 * 2], b[number % 2 * 2 + 1]);
          }
        }
      }
    }
  }

  // Leaves the sums of a stage where they can be finished, the stage's first row in column `column`.
  __device__ __forceinline__ void turn(int stage, Turned& turned, int column) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
#pragma unroll
      for (int octet = 0; octet < OCTETS; octet++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int token = first_token() + 8 * octet + lane % 4 * 2 + i % 2;
          const int row = (first_strip() + 2 * pair + i / 2) * STRIP + lane / 4;
          turned.at[inner_part()][token][column + row] = sum[stage][pair][octet][i];
        }
      }
    }
  }
};

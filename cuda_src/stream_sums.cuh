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
// Loads of x that are in registers, as far as those go.
constexpr int KEPT = WEIGHT_BITS == 4 && TOKENS > 8 ? 2 : TOKENS == 64 ? LOADS / 2 : LOADS;
static_assert(PAIRS > 0 && LOADS * 2 == HALVES * STEPS, "a warp has whole pairs of strips and whole halves of blocks");

// A warp's part of a tile: with g = lane / 4 and t = lane % 4, sum[stage][pair][octet][2 * h + i] is of row g of the pair's strip h
// and token 2 t + i of the octet.
struct Sums {
  float sum[TILE_STAGES][PAIRS][OCTETS][4] = {};
  unsigned tokens[KEPT][OCTETS][4];  // two steps each
#if WEIGHT_BITS == 4
  float of_x[HALVES][OCTETS][2];  // sums of tokens 2 t + i of x over groups: a half is one
#endif

  __device__ static __forceinline__ int first_token() { return threadIdx.x / 32 % TOKEN_PARTS * 16; }
  __device__ static __forceinline__ int first_strip() { return threadIdx.x / 32 / TOKEN_PARTS % STRIP_PARTS * WARP_STRIPS; }
  __device__ static __forceinline__ int inner_part() { return threadIdx.x / 32 / TOKEN_PARTS / STRIP_PARTS; }

  // Whether this warp takes part in a stage.
  __device__ static __forceinline__ bool has(int) { return true; }

  // A slice of x whose products come next.
  __device__ __forceinline__ void take(const XSlice& x) {
    if (KEPT == LOADS) load_tokens(x, 0);
#if WEIGHT_BITS == 4
    static_assert(WEIGHT_BLOCK == 2 * GROUP, "a half is a group");
    constexpr unsigned ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
      float sums[OCTETS][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; step++) multiply(sums, ones, x, half * STEPS + step);
#pragma unroll
      for (int i = 0; i < 2 * OCTETS; i++) of_x[half][i / 2][i % 2] = sums[i / 2][i % 2];
    }
#endif
  }

  // The products of a stage and the slice taken last.
  __device__ __forceinline__ void add(int stage, const Shared& shared, int place, int count, const XSlice& x) {
    const int lane = threadIdx.x % 32;
    if (first_strip() >= count) return;
    unsigned words[2][2][4];  // of pairs; a strip that is not there is what was there before, and nobody wants its sums
    const auto load_pair = [&](int number) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const auto& strip = shared.weights[place].strips[first_strip() + number % PAIRS * 2 + h];
        const int half = number / PAIRS;
        ldmatrix_x4(words[number % 2][h], strip.piece(block_of<HALVES>(half), lane % 8, piece_of<HALVES>(half)));
      }
    };
    load_pair(0);
#pragma unroll
    for (int number = 0; number < HALVES * PAIRS; number++) {
      const int half = number / PAIRS, pair = number % PAIRS;
      if (number + 1 < HALVES * PAIRS) load_pair(number + 1);
#if WEIGHT_BITS == 4
      float sums[OCTETS][4] = {};
#else
      float(&sums)[OCTETS][4] = sum[stage][pair];
#endif
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        unsigned rows[2][2];
        for (int h = 0; h < 2; h++) fragment(rows[h], words[number % 2][h], step);
        const unsigned a[4] = {rows[0][0], rows[1][0], rows[0][1], rows[1][1]};
        multiply(sums, a, x, half * STEPS + step);
      }
#if WEIGHT_BITS == 4
      for (int h = 0; h < 2; h++) {
        const unsigned both = shared.scales[place].at[first_strip() + 2 * pair + h][inner_part() * HALVES + half][lane / 4];
        const GroupScale group(both);
#pragma unroll
        for (int i = 0; i < 2 * OCTETS; i++) {
          float& whole = sum[stage][pair][i / 2][2 * h + i % 2];
          whole += group(sums[i / 2][2 * h + i % 2], of_x[half][i / 2][i % 2]);
        }
      }
#endif
    }
  }

  // Leaves the sums of a stage where they can be finished, the stage's first row in column `column`.
  __device__ __forceinline__ void turn(int stage, Turned& turned, int column) const {
    const int lane = thread_here() % 32;
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

 private:
  // Of the COUNT halves of blocks that this warp has of a slice, the block that half i is of, and this lane's piece of it for
  // an ldmatrix. COUNT is 1 or even.
  template <int COUNT>
  __device__ static __forceinline__ int block_of(int i) {
    return COUNT == 1 ? inner_part() / 2 : inner_part() * (COUNT / 2) + i / 2;
  }
  template <int COUNT>
  __device__ static __forceinline__ int piece_of(int i) {
    return (COUNT == 1 ? inner_part() % 2 : i % 2) * 4 + threadIdx.x % 32 / 8;
  }

  __device__ __forceinline__ void load_tokens(const XSlice& x, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int load = 0; load < KEPT; load++) {
      const int block = block_of<LOADS>(first + load), piece = piece_of<LOADS>(first + load);
#pragma unroll
      for (int octet = 0; octet < OCTETS; octet++) {
        ldmatrix_x4(tokens[load][octet], x.piece(block, first_token() + 8 * octet + lane % 8, piece));
      }
    }
  }

  // sums += rows of weights, or what is in their place, times the tokens, in one step of those of this warp.
  __device__ __forceinline__ void multiply(float (&sums)[OCTETS][4], const unsigned (&rows)[4], const XSlice& x, int step) {
    if (KEPT < LOADS && step % (2 * KEPT) == 0) load_tokens(x, step / 2);
#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++) {
      const unsigned(&pairs)[4] = tokens[step / 2 % KEPT][octet];
      mma_of_scalars(sums[octet], rows, pairs[step % 2 * 2], pairs[step % 2 * 2 + 1]);
    }
  }
};

// The sums of a tile: in registers, in global memory on their way to the CTA that finishes the tile, and side by side in shared
// memory. What one CTA leaves for another comes in pieces of 16 bytes, each by one store; where the first word of one is UNWRITTEN
// it is yet to come, and who takes a piece away puts that back.
#pragma once
#include "stream_products.cuh"

// What is added to 8 rows of the product.
struct Bias {
  vec<scalar, 8> at;
  bool any;

  __device__ __forceinline__ Bias(const Product& product, int row) : at(), any(product.bias != nullptr && row < product.num_rows) {
    if (any) at = load<8>(product.bias + row);
  }
  __device__ __forceinline__ void add(vec<float, 8>& values, float factor) const {
#pragma unroll
    for (int i = 0; i < 8; i++) values.at[i] = values.at[i] * factor + (any ? to_float(at.at[i]) : 0.0f);
  }
};

// A warp's part of a tile: with g = lane / 4 and t = lane % 4, sum[m][j][2 * h + i] is row 16 m + 8 h + g of the warp's and token
// 8 j + 2 t + i.
struct Sums {
  float sum[2][GROUPS][4] = {};

  // The products of a unit.
  __device__ __forceinline__ void add(const Box<TILE>& weights, const Box<TOKENS>& x) {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * WARP_ROWS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned a[2][2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          ldmatrix_x4(a[m][k], weights.piece(first_row + 16 * m + lane % 16, 4 * half + 2 * k + lane / 16));
        }
      }
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        unsigned b[4];
        ldmatrix_x4(b, x.piece(8 * j + lane % 8, 4 * half + lane / 8));
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma_of_scalars(sum[m][j], a[m][0], b[0], b[1]);
          mma_of_scalars(sum[m][j], a[m][1], b[2], b[3]);
        }
      }
    }
  }

  // A thread finds what the same thread of another CTA has left.
  __device__ static __forceinline__ uint4* piece(const Chain& chain, int cta, int m, int j) {
    return chain.parts + ((cta * 2 + m) * GROUPS + j) * (32 * CONSUMER_WARPS) + threadIdx.x;
  }
  __device__ __forceinline__ void store(const Chain& chain) const {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        const float* from = sum[m][j];
        const uint4 bits = {__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]), __float_as_uint(from[3])};
        store_relaxed_gpu(piece(chain, blockIdx.x, m, j), bits);
      }
    }
  }
  // Adds what the CTAs first to last have left or will leave, in this order.
  __device__ __forceinline__ void add_parts(const Chain& chain, int first, int last) {
    constexpr int AT_ONCE = GROUPS < 4 ? 8 : 16 / GROUPS;  // halves of a part whose loading is under way
    uint4 half[AT_ONCE][GROUPS];
    const auto load_half = [&](uint4(&into)[GROUPS], int number) {
#pragma unroll
      for (int j = 0; j < GROUPS; j++) into[j] = load_relaxed_gpu(piece(chain, min(first + number / 2, last), number % 2, j));
    };
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) load_half(half[i], i);
    for (int number = 0; number < 2 * (last - first + 1); number += AT_ONCE) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        if (first + (number + i) / 2 > last) break;
        add_half(chain, first + (number + i) / 2, i % 2, half[i]);
        load_half(half[i], number + i + AT_ONCE);
      }
    }
  }

  __device__ __forceinline__ void add_half(const Chain& chain, int cta, int m, uint4 (&half)[GROUPS]) {
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      uint4& bits = half[j];
      uint4* source = piece(chain, cta, m, j);
      const auto look = [&] {
        if (bits.x != UNWRITTEN) return false;
        bits = load_relaxed_gpu(source);
        return true;
      };
      wait_while(look, chain.flag);
      store_for_others(&source->x, UNWRITTEN);
      sum[m][j][0] += __uint_as_float(bits.x);
      sum[m][j][1] += __uint_as_float(bits.y);
      sum[m][j][2] += __uint_as_float(bits.z);
      sum[m][j][3] += __uint_as_float(bits.w);
    }
  }

  // Leaves the sums of a group of tokens in the warp's room, where lanes find 8 rows of a token side by side.
  __device__ __forceinline__ void turn(Shared& shared, int j) const {
    const int lane = threadIdx.x % 32;
    auto& turned = shared.turned[threadIdx.x / 32];
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int e = 0; e < 4; e++) turned[lane % 4 * 2 + e % 2][16 * m + e / 2 * 8 + lane / 4] = sum[m][j][e];
    }
  }

  // f(j, first of 8 rows, token, the product's values[8]) for this lane's eighths of all that the warp has summed of a tile, j the
  // group of tokens. All lanes come along; rows and tokens may be beyond the last.
  template <class F>
  __device__ __forceinline__ void for_each_eight(const Product& product, Shared& shared, const float* factors, int tile, F f) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = tile * TILE + warp * WARP_ROWS + lane % 4 * 8;
    const Bias bias(product, row);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      __syncwarp();
      turn(shared, j);
      __syncwarp();
      const int token = 8 * j + lane / 4;
      vec<float, 8> values = load<8>(&shared.turned[warp][lane / 4][lane % 4 * 8]);
      bias.add(values, factors[token]);
      f(j, row, token, values);
    }
  }
};

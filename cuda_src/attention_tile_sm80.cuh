// What one warp computes: 16 query rows against a part of a KV step, on mma.sync (sm_80 and newer). Everything is in registers.
#pragma once
#include "kv_ring.cuh"
#include "softmax_state.cuh"

constexpr int WARP_ROWS = 16;

__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if defined(DTYPE_BF16)
  mma_m16n8k16_bf16(c, a, b0, b1);
#else
  mma_m16n8k16_f16(c, a, b0, b1);
#endif
}

__device__ __forceinline__ unsigned round_pair(float low, float high) {
#if defined(DTYPE_BF16)
  return cvt_rn_bf16x2(low, high);
#else
  return cvt_rn_f16x2(low, high);
#endif
}

// With g = lane / 4 and t = lane % 4, a lane holds of rows g and g + 8 (index i or half h = 0, 1) and of every 8 columns j the
// columns 8 j + 2 t and the next: x[j][2 * h], x[j][2 * h + 1].
struct WarpTile {
  unsigned q[HEAD_DIM / 16][4];  // a fragments
  float out[HEAD_DIM / 8][4] = {};  // sum of weighted values
  float top[2] = {minus_infinity(), minus_infinity()};  // the largest score, before the scale
  float sum[2] = {};  // of this lane's weights; of a row's four lanes together: see `share_sum`
  int first[2], last[2];  // positions that the row sees
  int all_first, all_last, any_first, any_last;  // positions that all rows of the warp see; that any sees

  // Rows first_row .. first_row + 15 of an item's tile, their queries [tokens, heads, HEAD_DIM] by way of `buffer`, this warp's
  // 16 x HEAD_DIM of shared memory. Rows past the tile's end have queries of 0, and the last one's position.
  __device__ __forceinline__ WarpTile(
      const scalar* queries, const Item& item, const TileRows& rows, int first_row, int window, scalar* buffer) {
    const int lane = threadIdx.x % 32, piece = lane % PIECES;
    vec<scalar, 8> loaded[WARP_ROWS / ROWS_AT_ONCE] = {};
#pragma unroll
    for (int i = 0; i < WARP_ROWS / ROWS_AT_ONCE; i++) {
      const int row = first_row + i * ROWS_AT_ONCE + lane / PIECES;
      if (row < rows.count) loaded[i] = load<8>(queries + rows.index(row) * HEAD_DIM + piece * 8);
    }
#pragma unroll
    for (int i = 0; i < WARP_ROWS / ROWS_AT_ONCE; i++) {  // where this lane itself has read the output of the item before
      store(buffer + swizzled(i * ROWS_AT_ONCE + lane / PIECES, piece), loaded[i]);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) ldmatrix_x4(q[k], buffer + swizzled(lane % 16, 2 * k + lane / 16));

    for (int h = 0; h < 2; h++) {
      const int position = rows.position(min(first_row + lane / 4 + 8 * h, rows.count - 1));
      first[h] = max(position - window + 1, item.kv_start);
      last[h] = min(position, item.kv_stop - 1);
    }
    any_first = __shfl_sync(0xffffffffu, first[0], 0);  // rows come in the order of their positions
    all_first = __shfl_sync(0xffffffffu, first[1], 31);
    all_last = __shfl_sync(0xffffffffu, last[0], 0);
    any_last = __shfl_sync(0xffffffffu, last[1], 31);
  }

  // Attends to POSITIONS positions from `position` on, which are in the rows of the stage from `slot` on.
  template <int POSITIONS>
  __device__ __forceinline__ void attend(const Stage& stage, int slot, int position, float scale) {
    if (position > any_last || position + POSITIONS <= any_first) return;
    const int lane = threadIdx.x % 32;
    const int lane_k = slot * HEAD_DIM + swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const int lane_v = slot * HEAD_DIM + swizzled(lane % 16, lane / 16);
    float score[POSITIONS / 8][4] = {};
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
#pragma unroll
      for (int j = 0; j < POSITIONS / 8; j += 2) {
        unsigned keys[4];  // of positions 8 j .. and 8 (j + 1) .., each pieces 2 k and 2 k + 1
        ldmatrix_x4(keys, stage.k + further(lane_k, 8 * j, 2 * k));
        mma(score[j], q[k], keys[0], keys[1]);
        mma(score[j + 1], q[k], keys[2], keys[3]);
      }
    }
    if (position < all_first || position + POSITIONS > all_last + 1) {
#pragma unroll
      for (int j = 0; j < POSITIONS / 8; j++) {
        for (int i = 0; i < 4; i++) {
          const int p = position + 8 * j + lane % 4 * 2 + i % 2;
          if (p < first[i / 2] || p > last[i / 2]) score[j][i] = minus_infinity();
        }
      }
    }

#pragma unroll
    for (int h = 0; h < 2; h++) {
      float new_top = top[h];
      for (int j = 0; j < POSITIONS / 8; j++) new_top = fmaxf(new_top, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
      for (int bits = 1; bits < 4; bits *= 2) new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, bits));
      const float base = new_top == minus_infinity() ? 0.0f : new_top * scale;  // nothing seen: -inf - -inf would be NaN
      const float kept = ex2_approx(fmaf(top[h], scale, -base));
      top[h] = new_top;
      sum[h] *= kept;
      for (int j = 0; j < POSITIONS / 8; j++) {
        for (int i = 2 * h; i < 2 * h + 2; i++) {
          score[j][i] = ex2_approx(fmaf(score[j][i], scale, -base));
          sum[h] += score[j][i];
        }
      }
      for (int j = 0; j < HEAD_DIM / 8; j++) {
        for (int i = 2 * h; i < 2 * h + 2; i++) out[j][i] *= kept;
      }
    }

#pragma unroll
    for (int p = 0; p < POSITIONS / 8; p += 2) {
      const unsigned weights[4] = {round_pair(score[p][0], score[p][1]), round_pair(score[p][2], score[p][3]),
                                   round_pair(score[p + 1][0], score[p + 1][1]), round_pair(score[p + 1][2], score[p + 1][3])};
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; j += 2) {
        unsigned values[4];  // of columns 8 j .. and 8 (j + 1) .., each 16 positions
        ldmatrix_x4_trans(values, stage.v + further(lane_v, 8 * p, j));
        mma(out[j], weights, values[0], values[1]);
        mma(out[j + 1], weights, values[2], values[3]);
      }
    }
  }

  __device__ __forceinline__ void share_sum() {
    for (int h = 0; h < 2; h++) {
      for (int bits = 1; bits < 4; bits *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], bits);
    }
  }
};

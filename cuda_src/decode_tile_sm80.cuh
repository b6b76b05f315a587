// What one warp computes of a decode tile: up to 16 query rows against its positions of a chunk, on mma.sync, in registers.
#pragma once
#include "attention_tile_sm80.cuh"

// The few rows are the columns of the products, 8 or 16 of them (one block or two), and positions or elements of V the rows:
// scores^T = K Q^T and out^T = V^T P^T. With g = lane / 4 and t = lane % 4 a lane holds of block b the query rows 8 b + 2 t + r,
// r = 0, 1: x[b][..][r] at g, x[b][..][2 + r] at 8 + g, of 16 positions m or 16 elements j. Where V is of 8 bits, at the
// elements 2 g and 2 g + 1 instead.
//
// Of 8-bit K a 32-bit word of ldmatrix is four neighbours of a row, where an mma wants two and two that are eight further on: a
// product does not mind the order of its terms, so the queries are loaded in the same one. Of 8-bit V a word is two neighbours
// of each of two positions: the even ones become the upper 8 rows of the mma, the odd ones the lower.
template <int BLOCKS>
struct DecodeTile {
  static constexpr float GROWTH = 8;  // weights may become 2^8 before `top` follows: seldom, as it costs reductions

  unsigned q[BLOCKS][HEAD_DIM / 16][2];  // b fragments
  float out[BLOCKS][HEAD_DIM / 16][4] = {};  // sum of weighted values
  float top[BLOCKS][2], sum[BLOCKS][2];  // in units of log 2; of this lane's weights, see `share_sum`
  int position_of[BLOCKS][2];
  int all_first, all_last, any_first, any_last;  // positions that all rows see; that any sees
  int kv_start, kv_stop, window;
#ifdef MASK
  const unsigned* mask[BLOCKS][2];
#endif

  __device__ __forceinline__ DecodeTile(const Params& params, const Part& part, const TileRows& rows)
      : kv_start(part.kv_start), kv_stop(part.kv_stop), window(params.window) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const int row = 8 * b + lane / 4;
      const auto* from = static_cast<const unsigned char*>(params.q) + rows.index(min(row, rows.count - 1)) * Q_BYTES;
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; k++) {
        const vec<unsigned, 2> pairs = query_pairs(from, k, row < rows.count);
        q[b][k][0] = pairs.at[0];
        q[b][k][1] = pairs.at[1];
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int token = rows.token(min(8 * b + lane % 4 * 2 + r, rows.count - 1));
        position_of[b][r] = rows.first_position + token;
        top[b][r] = minus_infinity();
        sum[b][r] = 0;
#ifdef MASK
        mask[b][r] = params.mask + part.tile.mask_begin + static_cast<long long>(token) * part.tile.mask_words;
#endif
      }
    }
#ifdef MASK
    any_first = kv_start;
    any_last = kv_stop - 1;
    all_first = 1;  // none is seen by all, as far as is known
    all_last = 0;
#else
    const int first_row = rows.position(0), last_row = rows.position(rows.count - 1);  // rows come in the order of positions
    any_first = max(first_row - window + 1, kv_start);
    all_first = max(last_row - window + 1, kv_start);
    all_last = min(first_row, kv_stop - 1);
    any_last = min(last_row, kv_stop - 1);
#endif
  }

  // Attends to POSITIONS positions from `position` on, which are in the rows of the stage from `slot` on.
  template <int POSITIONS>
  __device__ __forceinline__ void attend(const Stage& stage, int slot, int position, float scale) {
    if (position > any_last || position + POSITIONS <= any_first) return;
    constexpr int M = POSITIONS / 16;
    const int lane = threadIdx.x % 32;
    const int by_rows = slot * ROW_BYTES + swizzled(lane % 16, lane / 16);  // 16 positions, then their next piece
    const int by_pieces = slot * ROW_BYTES + swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2);  // 8 positions, their next piece
    float score[M][BLOCKS][4] = {}, other[M][BLOCKS][4] = {};  // two sums, for shorter chains
#pragma unroll
    for (int pieces = 0; pieces < PIECES; pieces += 2) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        unsigned keys[4];
        ldmatrix_x4(keys, stage.k + further(by_rows, 16 * m, pieces));
#if defined(KV_FP8) || defined(KV_INT8)
        unsigned pairs[4][2];
        for (int i = 0; i < 4; i++) pairs_of_codes<0x3210>(pairs[i], keys[i]);
        for (int i = 0; i < 2; i++) {
          const unsigned a[4] = {pairs[2 * i][0], pairs[2 * i + 1][0], pairs[2 * i][1], pairs[2 * i + 1][1]};
          for (int b = 0; b < BLOCKS; b++) mma(i ? other[m][b] : score[m][b], a, q[b][pieces + i][0], q[b][pieces + i][1]);
        }
#else
        const int k = pieces / 2;
        for (int b = 0; b < BLOCKS; b++) mma(k % 2 ? other[m][b] : score[m][b], keys, q[b][k][0], q[b][k][1]);
#endif
      }
    }
    const bool at_border = position < all_first || position + POSITIONS > all_last + 1;
    unsigned weights[M][BLOCKS][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
      for (int b = 0; b < BLOCKS; b++) {
        for (int i = 0; i < 4; i++) score[m][b][i] += other[m][b][i];
      }
#ifdef KV_INT8
      for (int h = 0; h < 2; h++) {
        const float k_scale = cvt_f32_f16(static_cast<unsigned short>(stage.scales[slot + 16 * m + 8 * h + lane / 4]));
        for (int b = 0; b < BLOCKS; b++) {
          for (int r = 0; r < 2; r++) score[m][b][2 * h + r] *= k_scale;
        }
      }
#endif
      if (at_border) hide(score[m], position + 16 * m);
    }

#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      float new_top[2];
      bool grows = false;
      for (int r = 0; r < 2; r++) {
        new_top[r] = minus_infinity();
        for (int m = 0; m < M; m++) new_top[r] = fmaxf(new_top[r], fmaxf(score[m][b][r], score[m][b][2 + r]));
        new_top[r] *= scale;
        grows |= new_top[r] > top[b][r] + GROWTH;
      }
      if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          for (int bits = 4; bits < 32; bits *= 2) new_top[r] = fmaxf(new_top[r], __shfl_xor_sync(0xffffffffu, new_top[r], bits));
          new_top[r] = fmaxf(new_top[r], top[b][r]);
          const float kept = new_top[r] == minus_infinity() ? 0.0f : ex2_approx(top[b][r] - new_top[r]);  // -inf - -inf is NaN
          top[b][r] = new_top[r];
          sum[b][r] *= kept;
          for (int j = 0; j < HEAD_DIM / 16; j++) {
            out[b][j][r] *= kept;
            out[b][j][2 + r] *= kept;
          }
        }
      }
      for (int m = 0; m < M; m++) {
        for (int i = 0; i < 4; i++) {
          const float base = top[b][i % 2] == minus_infinity() ? 0.0f : top[b][i % 2];
          score[m][b][i] = ex2_approx(fmaf(score[m][b][i], scale, -base));
          sum[b][i % 2] += score[m][b][i];
        }
        for (int h = 0; h < 2; h++) {
          weights[m][b][h] = movmatrix_trans(round_pair(score[m][b][2 * h], score[m][b][2 * h + 1]));
        }
      }
    }

#pragma unroll
    for (int m = 0; m < M; m++) {
#ifdef KV_INT8
      unsigned v_scales[2];  // of positions 2 t and the next, and 8 further on
      for (int h = 0; h < 2; h++) {
        const vec<unsigned, 2> scales = load<2>(stage.scales + slot + 16 * m + 8 * h + lane % 4 * 2);
        v_scales[h] = prmt(scales.at[0], scales.at[1], 0x7632);
      }
#endif
#pragma unroll
      for (int pieces = 0; pieces < PIECES; pieces += 2) {
        unsigned values[4];
#if defined(KV_FP8) || defined(KV_INT8)
        ldmatrix_x4_trans(values, stage.v + further(by_rows, 16 * m, pieces));
        for (int i = 0; i < 2; i++) {
          unsigned a[4];
          for (int h = 0; h < 2; h++) {
            unsigned pairs[2];  // of even and odd columns
            pairs_of_codes<0x3120>(pairs, values[2 * i + h]);
            for (int odd = 0; odd < 2; odd++) {
#ifdef KV_INT8
              pairs[odd] = mul_f16x2(pairs[odd], v_scales[h]);
#endif
              a[2 * h + odd] = pairs[odd];
            }
          }
          for (int b = 0; b < BLOCKS; b++) mma(out[b][pieces + i], a, weights[m][b][0], weights[m][b][1]);
        }
#else
        ldmatrix_x4_trans(values, stage.v + further(by_pieces, 16 * m, pieces));
        for (int b = 0; b < BLOCKS; b++) mma(out[b][pieces / 2], values, weights[m][b][0], weights[m][b][1]);
#endif
      }
    }
  }

  // -inf for what a row does not see, of 16 positions.
  __device__ __forceinline__ void hide(float (&score)[BLOCKS][4], int position) const {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = i % 2, p = position + threadIdx.x % 32 / 4 + i / 2 * 8;
        bool seen = p >= max(position_of[b][r] - window + 1, kv_start) && p <= min(position_of[b][r], kv_stop - 1);
#ifdef MASK
        seen = p >= kv_start && p < kv_stop && (mask[b][r][p / 32] >> p % 32 & 1);
#endif
        if (!seen) score[b][i] = minus_infinity();
      }
    }
  }

  __device__ __forceinline__ void share_sum() {
    for (int b = 0; b < BLOCKS; b++) {
      for (int r = 0; r < 2; r++) {
        for (int bits = 4; bits < 32; bits *= 2) sum[b][r] += __shfl_xor_sync(0xffffffffu, sum[b][r], bits);
      }
    }
  }

  // The element of the output that x[b][j][2 * h + r] is.
  static __device__ __forceinline__ int element(int j, int h) {
    const int g = threadIdx.x % 32 / 4;
    return 16 * j + (KV_BYTES == 2 ? g + 8 * h : 2 * g + h);
  }
};

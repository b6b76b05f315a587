// What one warp computes of a prefill tile: 16 query rows against a part of a chunk of K/V, on mma.sync (sm_80 and newer).
// Everything is in registers.
#pragma once
#include "kv_ring.cuh"
#include "softmax_state.cuh"

constexpr int ROWS = 16;  // of a block, the rows of an mma
constexpr int Q_BYTES = 2 * HEAD_DIM;  // of a row of queries

// The queries of a row that a lane holds of columns 16 k .. 16 k + 15, two pairs, or 0.
__device__ __forceinline__ vec<unsigned, 2> query_pairs(const unsigned char* row, int k, bool there) {
  const auto* words = reinterpret_cast<const unsigned*>(row) + 8 * k;
  const int t = threadIdx.x % 4;
  vec<unsigned, 2> pairs = {0, 0};
  if (there) {
    if constexpr (KV_BYTES == 1) {  // four neighbours
      pairs = load<2>(words + 2 * t);
    } else {
      pairs = {words[t], words[4 + t]};
    }
  }
  return {query_pair(pairs.at[0]), query_pair(pairs.at[1])};
}

// With g = lane / 4 and t = lane % 4, a lane holds of rows g and g + 8 (index i or half h = 0, 1) and of scores of every 8 positions
// j the positions 8 j + 2 t and the next: x[j][2 * h], x[j][2 * h + 1]. Of the output it holds HEAD_DIM / 4 / VECTOR vectors of
// VECTOR neighbours, see `vector`. What 8-bit K/V do to the order of things is as in decode_tile_sm80.cuh; of V, even and odd
// columns go to two mma, so that a lane ends with four neighbours.
struct WarpTile {
  static constexpr int VECTOR = KV_BYTES == 2 ? 2 : 4;

  unsigned q[HEAD_DIM / 16][4];  // a fragments
  float out[HEAD_DIM / 8][4] = {};  // sum of weighted values
  float top[2] = {minus_infinity(), minus_infinity()};  // the largest score, before the scale
  float sum[2] = {};  // of this lane's weights; of a row's four lanes together: see `share_sum`
  int position_of[2];  // of the row
  int all_first, all_last, any_first, any_last;  // positions that all rows of the warp see; that any sees
  int kv_start, kv_stop, window;
#ifdef MASK
  const Params& params;
  int mask_begin[2];  // word of the mask, of the row
#endif

  // Rows first_row and following of a part's tile; past the tile's end queries are 0, and the position is the last row's.
  __device__ __forceinline__ WarpTile(const Params& params, const Part& part, const TileRows& rows, int first_row)
      : kv_start(part.kv_start),
        kv_stop(part.kv_stop),
        window(params.window)
#ifdef MASK
        ,
        params(params)
#endif
  {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + lane / 4 + 8 * h, inside = min(row, rows.count - 1), token = rows.token(inside);
      position_of[h] = rows.first_position + token;
#ifdef MASK
      mask_begin[h] = part.tile.mask_begin + token * part.tile.mask_words;
#endif
      const auto* from = static_cast<const unsigned char*>(params.q) + rows.index(inside) * Q_BYTES;
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; k++) {
        const vec<unsigned, 2> pairs = query_pairs(from, k, row < rows.count);
        q[k][h] = pairs.at[0];
        q[k][2 + h] = pairs.at[1];
      }
    }
#ifdef MASK
    any_first = kv_start;
    any_last = kv_stop - 1;
    all_first = 1;  // none is seen by all, as far as is known
    all_last = 0;
#else
    any_first = __shfl_sync(0xffffffffu, first(0), 0);  // rows come in the order of their positions
    all_first = __shfl_sync(0xffffffffu, first(1), 31);
    all_last = __shfl_sync(0xffffffffu, last(0), 0);
    any_last = __shfl_sync(0xffffffffu, last(1), 31);
#endif
  }

  // The positions that a row sees, [first, last]; with a mask, at most these.
  __device__ __forceinline__ int first(int h) const { return max(position_of[h] - window + 1, kv_start); }
  __device__ __forceinline__ int last(int h) const { return min(position_of[h], kv_stop - 1); }

  // Attends to POSITIONS positions from `position` on, which are in the rows of the stage from `slot` on.
  template <int POSITIONS>
  __device__ __forceinline__ void attend(const Stage& stage, int slot, int position, float scale) {
    if (position > any_last || position + POSITIONS <= any_first) return;
    const int lane = threadIdx.x % 32;
    const int lane_k = slot * ROW_BYTES + swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const int lane_v = slot * ROW_BYTES + swizzled(lane % 16, lane / 16);
    float score[POSITIONS / 8][4] = {};
#pragma unroll
    for (int pieces = 0; pieces < PIECES; pieces += 2) {
      const int k = pieces / KV_BYTES;  // columns 16 k and following, 16 or 32
#pragma unroll
      for (int j = 0; j < POSITIONS / 8; j += 2) {
        unsigned keys[4];  // of positions 8 j .. and 8 (j + 1) .., each two pieces
        ldmatrix_x4(keys, stage.k + further(lane_k, 8 * j, pieces));
#if defined(KV_FP8) || defined(KV_INT8)
        unsigned pairs[4][2];
        for (int i = 0; i < 4; i++) pairs_of_codes<0x3210>(pairs[i], keys[i]);
        for (int i = 0; i < 2; i++) {
          mma(score[j], q[k + i], pairs[i][0], pairs[i][1]);
          mma(score[j + 1], q[k + i], pairs[2 + i][0], pairs[2 + i][1]);
        }
#else
        mma(score[j], q[k], keys[0], keys[1]);
        mma(score[j + 1], q[k], keys[2], keys[3]);
#endif
      }
    }
#ifdef KV_INT8
    unsigned v_scales[POSITIONS / 8];  // of this lane's positions, two float16
#pragma unroll
    for (int j = 0; j < POSITIONS / 8; j++) {
      const vec<unsigned, 2> scales = load<2>(stage.scales + slot + 8 * j + lane % 4 * 2);
      for (int i = 0; i < 4; i++) score[j][i] *= cvt_f32_f16(static_cast<unsigned short>(scales.at[i % 2]));
      v_scales[j] = prmt(scales.at[0], scales.at[1], 0x7632);
    }
#endif
    if (position < all_first || position + POSITIONS > all_last + 1) hide<POSITIONS>(score, position);

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
      for (int pieces = 0; pieces < PIECES; pieces += 2) {
        const int j = pieces * 2 / KV_BYTES;
        unsigned values[4];  // of two pieces, each of positions 8 p .. and 8 (p + 1) ..
        ldmatrix_x4_trans(values, stage.v + further(lane_v, 8 * p, pieces));
#if defined(KV_FP8) || defined(KV_INT8)
        unsigned pairs[4][2];  // of even and odd columns
        for (int i = 0; i < 4; i++) {
          pairs_of_codes<0x3120>(pairs[i], values[i]);
#ifdef KV_INT8
          for (int odd = 0; odd < 2; odd++) pairs[i][odd] = mul_f16x2(pairs[i][odd], v_scales[p + i % 2]);
#endif
        }
        for (int i = 0; i < 4; i++) mma(out[j + i], weights, pairs[i / 2 * 2][i % 2], pairs[i / 2 * 2 + 1][i % 2]);
#else
        mma(out[j], weights, values[0], values[1]);
        mma(out[j + 1], weights, values[2], values[3]);
#endif
      }
    }
  }

  // -inf for what a row does not see.
  template <int POSITIONS>
  __device__ __forceinline__ void hide(float (&score)[POSITIONS / 8][4], int position) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int j = 0; j < POSITIONS / 8; j++) {
#ifdef MASK
        const int start = position + j / 2 * 16;  // sixteen positions are in one word
        const unsigned word = start < kv_stop ? params.mask[mask_begin[h] + start / 32] : 0;
        const unsigned bits = word >> start % 32 >> j % 2 * 8 + threadIdx.x % 4 * 2;
#endif
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int p = position + 8 * j + threadIdx.x % 4 * 2 + i;
          bool seen = p >= first(h) && p <= last(h);
#ifdef MASK
          seen = p >= kv_start && p < kv_stop && (bits >> i & 1);
#endif
          if (!seen) score[j][2 * h + i] = minus_infinity();
        }
      }
    }
  }

  __device__ __forceinline__ void share_sum() {
    for (int h = 0; h < 2; h++) {
      for (int bits = 1; bits < 4; bits *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], bits);
    }
  }

  // This lane's i-th vector of row lane / 4 + 8 h, times a factor, and where it begins.
  static __device__ __forceinline__ int column(int i) { return VECTOR * 4 * i + VECTOR * (threadIdx.x % 4); }
  __device__ __forceinline__ vec<float, VECTOR> vector(int h, int i, float factor) const {
    vec<float, VECTOR> values;
    for (int n = 0; n < VECTOR; n++) {
      values.at[n] = factor * (VECTOR == 2 ? out[i][2 * h + n] : out[2 * i + n % 2][2 * h + n / 2]);
    }
    return values;
  }
};

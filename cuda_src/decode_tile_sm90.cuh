// What one consumer warp computes of a decode tile: up to 16 query rows against its 16 of a step's 128 positions, by mma.sync.
#pragma once
#include "query_room_sm90.cuh"
#include "softmax_state.cuh"

constexpr int WARP_SLOTS = STEP / CONSUMER_WARPS;  // positions of a step that a warp attends to
static_assert(WARP_SLOTS == 16, "one k step of the product with the values");

// With g = lane / 4 and t = lane % 4, a lane holds of rows g and g + 8 (half h = 0, 1) and of every 8 columns j the columns
// 8 j + 2 t and the next: x[j][2 * h], x[j][2 * h + 1].
struct DecodeTile {
  unsigned q[HEAD_DIM / 16][4];  // a fragments
  float out[HEAD_DIM / 8][4] = {};
  float top[2] = {minus_infinity(), minus_infinity()};  // the largest score, before the scale
  float sum[2] = {};  // of this lane's weights
  int first[2], last[2];  // positions that the row sees
  int all_first, all_last, any_first, any_last;  // positions that all rows see; that any sees

  __device__ __forceinline__ DecodeTile(QueryTile& queries, const Part& part, const TileRows& rows, int window) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) ldmatrix_x4(q[k], queries.piece(lane % 16, 2 * k + lane / 16));
    for (int h = 0; h < 2; h++) {
      const int position = rows.position(min(lane / 4 + 8 * h, rows.count - 1));
      first[h] = max(position - window + 1, part.kv_start);
      last[h] = min(position, part.kv_stop - 1);
    }
    any_first = __shfl_sync(0xffffffffu, first[0], 0);  // rows come in the order of their positions
    all_first = __shfl_sync(0xffffffffu, first[1], 31);
    all_last = __shfl_sync(0xffffffffu, last[0], 0);
    any_last = __shfl_sync(0xffffffffu, last[1], 31);
  }

  // Attends to the 16 positions from `position` on, which are in the tiles' rows from `slot` on.
  __device__ __forceinline__ void attend(KvTile& keys, KvTile& values, int slot, int position, float scale) {
    if (position > any_last || position + WARP_SLOTS <= any_first) return;
    const int lane = threadIdx.x % 32;
    float score[2][4] = {};
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
      unsigned fragments[4];  // of the first 8 positions and the last 8, each pieces 2 k and 2 k + 1
      ldmatrix_x4(fragments, keys.piece(slot + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      mma(score[0], q[k], fragments[0], fragments[1]);
      mma(score[1], q[k], fragments[2], fragments[3]);
    }
    if (position < all_first || position + WARP_SLOTS > all_last + 1) {
      for (int i = 0; i < 8; i++) {
        const int p = position + i / 4 * 8 + lane % 4 * 2 + i % 2, h = i / 2 % 2;
        if (p < first[h] || p > last[h]) score[i / 4][i % 4] = minus_infinity();
      }
    }
    for (int h = 0; h < 2; h++) {
      float new_top = top[h];
      for (int i = 0; i < 4; i++) new_top = fmaxf(new_top, score[i / 2][2 * h + i % 2]);
      for (int bits = 1; bits < 4; bits *= 2) new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, bits));
      const float base = new_top == minus_infinity() ? 0.0f : new_top * scale;  // nothing seen: -inf - -inf would be NaN
      const float kept = ex2_approx(fmaf(top[h], scale, -base));
      top[h] = new_top;
      sum[h] *= kept;
      for (int i = 0; i < 4; i++) {
        float& weight = score[i / 2][2 * h + i % 2];
        weight = ex2_approx(fmaf(weight, scale, -base));
        sum[h] += weight;
      }
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; j++) {
        for (int i = 2 * h; i < 2 * h + 2; i++) out[j][i] *= kept;
      }
    }
    const unsigned weights[4] = {round_pair(score[0][0], score[0][1]), round_pair(score[0][2], score[0][3]),
                                 round_pair(score[1][0], score[1][1]), round_pair(score[1][2], score[1][3])};
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j += 2) {
      unsigned fragments[4];  // of columns 8 j .. and 8 (j + 1) .., each 16 positions
      ldmatrix_x4_trans(fragments, values.piece(slot + lane % 16, j + lane / 16));
      mma(out[j], weights, fragments[0], fragments[1]);
      mma(out[j + 1], weights, fragments[2], fragments[3]);
    }
  }

  __device__ __forceinline__ void share_sum() {
    for (int h = 0; h < 2; h++) {
      for (int bits = 1; bits < 4; bits *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], bits);
    }
  }
};

// What one consumer warpgroup computes of a prefill tile: 64 query rows against steps of 128 positions, by wgmma (sm_90a).
//
//   score [64, 128]       = Q [64, HEAD_DIM] K^T        operands in shared memory, sums in registers
//   weight                = 2^(score - top), rounded    from the registers of sums to those of an operand, in place
//   out [64, HEAD_DIM]   += weight V                    V in shared memory
//
// The products run beside the other instructions. Of what is in flight, registers and operands are not to be touched until the
// wait for it.
#pragma once
#include "query_room_sm90.cuh"
#include "softmax_state.cuh"

constexpr float HEADROOM = 8;  // log 2 of how large a weight may be before `top` is raised and all else rescaled

// An operand from the atom `start` on; what is MN-major goes on to the next 64 columns in the next atom. The address comes from
// lane 0, so that the compiler knows that all lanes have the same, and adds to it in uniform registers, where wgmma wants it.
__device__ __forceinline__ unsigned long long descriptor_of(const scalar (&start)[HEAD_DIM / 64][8][64]) {
  const unsigned long long descriptor = wgmma_descriptor(start, sizeof(start[0]), sizeof(start));
  return descriptor >> 32 << 32 | __shfl_sync(0xffffffffu, static_cast<unsigned>(descriptor), 0);
}

// The descriptor of what lies so many bytes further on.
__device__ __forceinline__ unsigned long long further(unsigned long long descriptor, int bytes) {
  const unsigned low = static_cast<unsigned>(descriptor) + bytes / 16;  // no carry: an address in shared memory
  return descriptor >> 32 << 32 | low;
}

__device__ __forceinline__ void multiply_keys(float (&score)[64], unsigned long long q, unsigned long long k, int accumulate) {
  if constexpr (COMPUTE_BF16) {
    wgmma_m64n128k16_bf16(score, q, k, accumulate);
  } else {
    wgmma_m64n128k16_f16(score, q, k, accumulate);
  }
}

__device__ __forceinline__ void multiply_values(float (&out)[64], const unsigned (&weight)[4], unsigned long long v) {
  if constexpr (COMPUTE_BF16) {
    wgmma_m64n128k16_bf16_ra(out, weight, v, 1);
  } else {
    wgmma_m64n128k16_f16_ra(out, weight, v, 1);
  }
}
__device__ __forceinline__ void multiply_values(float (&out)[32], const unsigned (&weight)[4], unsigned long long v) {
  if constexpr (COMPUTE_BF16) {
    wgmma_m64n64k16_bf16_ra(out, weight, v, 1);
  } else {
    wgmma_m64n64k16_f16_ra(out, weight, v, 1);
  }
}

// With w the warp of the four, g = lane / 4 and t = lane % 4, a thread holds of rows 16 w + g and 16 w + g + 8 (half h = 0, 1)
// and of every 8 columns j the columns 8 j + 2 t and the next: x[4 j + 2 h], x[4 j + 2 h + 1].
struct WarpgroupTile {
  float out[HEAD_DIM / 2];  // sum of weighted values
  float score[STEP / 2];  // then its weights
  unsigned weight[STEP / 16][4];  // operands
  float top[2];  // what weights are relative to: the largest score, before the scale, or one near it
  float sum[2];  // of this thread's weights; of a row's four lanes together: see `share_sum`
  float kept[2];  // what the last step's new `top` leaves of the old weights, where it is `raised` for any row of the warp
  bool raised;
  int first[2], last[2];  // positions that the row sees
  int all_first, all_last;  // positions that all rows of the warp see

  // A new tile: its rows from first_row on.
  __device__ __forceinline__ void begin(const Part& part, const TileRows& rows, int first_row, int window) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = 0;
    for (int h = 0; h < 2; h++) {
      top[h] = minus_infinity();
      sum[h] = 0;
      const int position = rows.position(min(first_row + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4 + 8 * h, rows.count - 1));
      first[h] = max(position - window + 1, part.kv_start);
      last[h] = min(position, part.kv_stop - 1);
    }
    all_first = __shfl_sync(0xffffffffu, first[1], 31);  // rows come in the order of their positions
    all_last = __shfl_sync(0xffffffffu, last[0], 0);
  }

  // Begins score = Q K^T; one group.
  __device__ __forceinline__ void begin_scores(const QueryTile& queries, const KvTile& keys) {
    const unsigned long long q = descriptor_of(queries.at[0]), k = descriptor_of(keys.at[0]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) {  // 16 columns are 32 bytes of the 128
      const int bytes = i / 4 * sizeof(keys.at[0][0]) + i % 4 * 32;
      multiply_keys(score, further(q, bytes), further(k, bytes), i > 0);
    }
    wgmma_commit();
  }

  // Begins out += weight V; one group.
  __device__ __forceinline__ void begin_values(const KvTile& values) {
    const unsigned long long v = descriptor_of(values.at[0]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEP / 16; i++) multiply_values(out, weight[i], further(v, i * 2 * sizeof(values.at[0])));
    wgmma_commit();
  }

  // Waits for both products begun last.
  __device__ __forceinline__ void wait_for_values() {
    wgmma_wait<0>();
    wgmma_fence_operand(out);
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) wgmma_fence_operand(weight[k]);  // lived until here: else their registers are used anew
  }

  // Of the step at `position`: removes what a row does not see, and turns scores into weights.
  __device__ __forceinline__ void weigh(int position, float scale) {
    wgmma_fence_operand(score);
    const int column = position + threadIdx.x % 4 * 2;  // of score[0]
    if (position + STEP > all_last + 1) {
#pragma unroll
      for (int i = 0; i < STEP / 2; i++) {
        if (i / 4 * 8 + i % 2 > last[i / 2 % 2] - column) score[i] = minus_infinity();
      }
    }
    if (position < all_first) {
#pragma unroll
      for (int i = 0; i < STEP / 2; i++) {
        if (i / 4 * 8 + i % 2 < first[i / 2 % 2] - column) score[i] = minus_infinity();
      }
    }

    float tops[2][4];  // of both halves at once, by four chains each: what one instruction waits for is far behind
#pragma unroll
    for (int i = 0; i < STEP / 2; i++) {
      float& chain = tops[i / 2 % 2][i / 4 % 2 * 2 + i % 2];
      chain = i < 8 ? score[i] : fmaxf(chain, score[i]);
    }
    float new_top[2];
    for (int h = 0; h < 2; h++) {
      new_top[h] = fmaxf(fmaxf(fmaxf(tops[h][0], tops[h][1]), fmaxf(tops[h][2], tops[h][3])), top[h]);
    }
    for (int bits = 1; bits < 4; bits *= 2) {
      float others[2];
      for (int h = 0; h < 2; h++) others[h] = __shfl_xor_sync(0xffffffffu, new_top[h], bits);
      for (int h = 0; h < 2; h++) new_top[h] = fmaxf(new_top[h], others[h]);
    }
    const bool higher = (new_top[0] - top[0]) * scale > HEADROOM || (new_top[1] - top[1]) * scale > HEADROOM;
    raised = __any_sync(0xffffffffu, higher);
    if (raised) {
      for (int h = 0; h < 2; h++) {  // nothing seen yet: -inf - -inf would be NaN
        kept[h] = new_top[h] == minus_infinity() ? 0.0f : ex2_approx((top[h] - new_top[h]) * scale);
        sum[h] *= kept[h];
        top[h] = new_top[h];
      }
    }

    float sums[2][2] = {{sum[0], 0.0f}, {sum[1], 0.0f}};
    float base[2];
    for (int h = 0; h < 2; h++) base[h] = top[h] == minus_infinity() ? 0.0f : top[h] * scale;
#pragma unroll
    for (int i = 0; i < STEP / 2; i++) {
      score[i] = ex2_approx(fmaf(score[i], scale, -base[i / 2 % 2]));
      sums[i / 2 % 2][i % 2] += score[i];
    }
    for (int h = 0; h < 2; h++) sum[h] = sums[h][0] + sums[h][1];
  }

  // Rounds the weights to operands.
  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < STEP / 4; i++) weight[i / 4][i % 4] = round_pair(score[2 * i], score[2 * i + 1]);
  }
  // Takes `out` to the new `top`.
  __device__ __forceinline__ void rescale() {
    if (!raised) return;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) out[i] *= kept[i / 2 % 2];
  }

  __device__ __forceinline__ void share_sum() {
    for (int h = 0; h < 2; h++) {
      for (int bits = 1; bits < 4; bits *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], bits);
    }
  }
};

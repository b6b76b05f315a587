// Paged attention of a whole step, prefill and decode rows together, in one launch of as many CTAs as are resident at once.
//
//   parts of CTA c        | a tile of query rows, a range of positions | part | part ...     (work_list.cuh)
//   chunks of a part      | c0 | c1 | c2 | c3 | c4 |                   | c5 | c6 | ...
//   ring of STAGES        c computed while c + 1 and c + 2 are under way, into the next part too      (kv_ring.cuh)
//
//                   a stage                   decode: up to 16 rows           prefill: up to 64 rows
//   pages           CHUNK positions, K and V  all rows x                      all positions x
//    | cp.async     +----------------+        +-- warp 0's positions          +-- warp 0's 16 rows
//    | 16 bytes     | warp 0 fetches |        |   warp 1's                    |   warp 1's
//    v              | warp 1 fetches |        |   warp 2's                    |   warp 2's
//   each warp's     | warp 2 fetches |        +-- warp 3's                    +-- warp 3's
//   own quarter     | warp 3 fetches |        a warp meets no other until     the warps meet at every chunk:
//                   +----------------+        the part's end: merge of four   they fetch for one another
//
//   chunk (a warp): wait -> barrier -> refill the stage before -> S = Q K^T (mma; decode: K Q^T) -> mask where the rows' borders are
//                   -> online softmax, base 2, float32 -> O += P V (mma; P goes from accumulators to operands in registers)
//
// A whole task writes its output. A part writes a normalised partial result and its lse, and counts itself; who counts last
// merges the parts, in their order, so that the result does not depend on who that was. Nobody waits for another CTA.
// Positions outside of a part are never read: zeros stand in their place, masked.
//
// Variants: DTYPE_BF16 | DTYPE_F16; HEAD_DIM 64 | 128; STAGES; and, where wanted, KV_FP8 | KV_INT8, MASK,
// POINTERS, and DECODE_ONLY for a plan that has no prefill tiles: smaller code.
constexpr int STEP = 16;  // cuts may be as fine as this; what is processed at a time is a chunk
constexpr int TILE_ROWS = 64;

#include "softmax_state.cuh"
#include "kv_ring.cuh"
#include "attention_tile_sm80.cuh"
#include "decode_tile_sm80.cuh"

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "paged attention knows head_dim 64 and 128");
static_assert(TILE_ROWS == WARPS * ROWS, "a warp has 16 rows of a prefill tile");
static_assert(CHUNK % STEP == 0 && WARP_SLOTS % STEP == 0, "chunks begin at any step");

constexpr int THREADS = 32 * WARPS;
constexpr int VECTORS = HEAD_DIM / 4;  // of four floats, of a row
constexpr int AT_ONCE = 18;  // parts of a row whose merging a thread has under way: two rounds for the 33 of 8 heads on 264 CTAs
constexpr float LOG_2 = 0.693147181f;

struct Shared {
  Stage ring[STAGES];
  float top[WARPS][ROWS], sum[WARPS][ROWS];
  unsigned counted;
};

// Where results go, of a part of a tile.
struct Results {
  const Params& params;
  const TileRows& rows;
  const Part& part;

  __device__ __forceinline__ long long partial_row(int slot, int row) const { return static_cast<long long>(slot) * TILE_ROWS + row; }

  // N neighbours, from element d on, of a row of the tile: as output, or into the part's slot.
  template <int N>
  __device__ __forceinline__ void store_whole(int row, int d, const vec<float, N>& values) const {
    vec<scalar, N> rounded;
    for (int i = 0; i < N; i++) rounded.at[i] = from_float<scalar>(values.at[i]);
    store(static_cast<scalar*>(params.out) + rows.index(row) * HEAD_DIM + d, rounded);
  }
  template <int N>
  __device__ __forceinline__ void store_part(int row, int d, const vec<float, N>& values) const {
    float* target = params.partial_out + partial_row(part.slot, row) * HEAD_DIM + d;
    if constexpr (N == 4) {
      store_for_others(reinterpret_cast<float4*>(target), float4{values.at[0], values.at[1], values.at[2], values.at[3]});
    } else {
      store_for_others(reinterpret_cast<float2*>(target), float2{values.at[0], values.at[1]});
    }
  }
  __device__ __forceinline__ void store_lse(int row, float lse) const {  // base 2
    if (!part.whole()) {
      store_for_others(params.partial_lse + partial_row(part.slot, row), lse);
    } else {
      store_final_lse(row, lse);
    }
  }
  __device__ __forceinline__ void store_final_lse(int row, float lse) const {
    if (params.lse != nullptr) params.lse[rows.index(row)] = lse * LOG_2;
  }
};

// Where a partial result of a decode row leaves element d, number `warp` of up to four: in that warp's own quarter of a stage,
// which is as large. XORed with the row, so that what a warp stores at once lies in different banks.
__device__ __forceinline__ float* partial_of_warp(Stage& stage, int warp, int row, int d) {
  constexpr int HALF = HEAD_DIM / 2, GROUPS = HALF / 8;
  unsigned char* quarter = (d < HALF ? stage.k : stage.v) + warp * WARP_SLOTS * ROW_BYTES;
  const int group = d % HALF / 8 ^ row / 2 % GROUPS;
  return reinterpret_cast<float*>(quarter) + row * HALF + group * 8 + d % 8;
}

// `count` partial results of every row, in shared memory, become one: put(row, d, merged) for every four elements.
template <class Put>
__device__ __forceinline__ void merge_in_shared(Shared& shared, Stage& stage, int num_rows, int count, Put put) {
  for (int i = threadIdx.x; i < num_rows * VECTORS; i += THREADS) {
    const int row = i / VECTORS, d = i % VECTORS * 4;
    SoftmaxState<4> state;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      if (w < count) state.merge(shared.top[w][row], shared.sum[w][row], load<4>(partial_of_warp(stage, w, row, d)).at);
    }
    put(row, d, state);
  }
}

__device__ __forceinline__ vec<float, 4> normalised(const SoftmaxState<4>& state, float factor) {
  const float normaliser = state.normaliser() * factor;
  vec<float, 4> values;
  for (int i = 0; i < 4; i++) values.at[i] = state.out[i] * normaliser;
  return values;
}

// The four warps' partial results of a decode part, each over its own positions, become one.
template <int BLOCKS>
__device__ __forceinline__ void finish_decode(
    DecodeTile<BLOCKS>& tile, const Results& results, Shared& shared, Stage& stage, float v_scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_rows = results.rows.count;
  tile.share_sum();
  __syncwarp();  // for racecheck: ldmatrix has read for all lanes what is overwritten now
#pragma unroll
  for (int b = 0; b < BLOCKS; b++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = 8 * b + lane % 4 * 2 + r;
      if (row >= num_rows) continue;
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 16; j++) {
        for (int h = 0; h < 2; h++) *partial_of_warp(stage, warp, row, tile.element(j, h)) = tile.out[b][j][2 * h + r];
      }
      if (lane / 4 == 0) {
        shared.top[warp][row] = tile.top[b][r];
        shared.sum[warp][row] = tile.sum[b][r];
      }
    }
  }
  __syncthreads();
  merge_in_shared(shared, stage, num_rows, WARPS, [&](int row, int d, const SoftmaxState<4>& state) {
    const vec<float, 4> values = normalised(state, v_scale);
    if (results.part.whole()) {
      results.store_whole(row, d, values);
    } else {
      results.store_part(row, d, values);
    }
    if (d == 0) results.store_lse(row, state.lse());
  });
}

// Each warp's own rows of a prefill part.
__device__ __forceinline__ void finish_prefill(WarpTile& tile, const Results& results, int first_row, float scale, float v_scale) {
  const int lane = threadIdx.x % 32;
  tile.share_sum();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = first_row + lane / 4 + 8 * h;
    if (row >= results.rows.count) continue;
    SoftmaxState<1> state;
    state.top = tile.top[h] * scale;
    state.sum = tile.sum[h];
    const float normaliser = state.normaliser() * v_scale;
    if (lane % 4 == 0) results.store_lse(row, state.lse());
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 4 / tile.VECTOR; i++) {
      if (results.part.whole()) {
        results.store_whole(row, tile.column(i), tile.vector(h, i, normaliser));
      } else {
        results.store_part(row, tile.column(i), tile.vector(h, i, normaliser));
      }
    }
  }
}

// Merges the parts begin, begin + stride, ... into four elements of R rows, of which the first `there` are; as many loads as
// R * AT_ONCE are under way together.
template <int R, int AT_ONCE, int stride = 1>
__device__ __forceinline__ void merge_parts(
    SoftmaxState<4> (&states)[R], const Results& results, int row, int stride_of_rows, int there, int d, int begin) {
  const long long first = results.partial_row(results.part.first_slot + begin, row);
  const float* lse_from = results.params.partial_lse + first;
  const float* out_from = results.params.partial_out + first * HEAD_DIM + d;
  constexpr int step = stride * TILE_ROWS;  // from part to part, in rows
#pragma unroll 1
  for (int left = results.part.num_parts - begin; left > 0; left -= AT_ONCE * stride) {
    float lse[R][AT_ONCE];
    float4 out[R][AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
#pragma unroll
      for (int r = 0; r < R; r++) {
        lse[r][i] = minus_infinity();
        out[r][i] = {0, 0, 0, 0};
        if (r < there && i * stride < left) {
          const int rows = i * step + r * stride_of_rows;
          lse[r][i] = load_from_others(lse_from + rows);
          out[r][i] = load_from_others(reinterpret_cast<const float4*>(out_from + rows * HEAD_DIM));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      SoftmaxState<4>& state = states[r];
      float top = state.top;
      for (int i = 0; i < AT_ONCE; i++) top = fmaxf(top, lse[r][i]);
      const float base = top == minus_infinity() ? 0.0f : top, kept = ex2_approx(state.top - base);
      state.top = top;
      state.sum *= kept;
      for (int n = 0; n < 4; n++) state.out[n] *= kept;
      for (int i = 0; i < AT_ONCE; i++) {
        const float weight = ex2_approx(lse[r][i] - base);
        const float values[4] = {out[r][i].x, out[r][i].y, out[r][i].z, out[r][i].w};
        state.sum += weight;
        for (int n = 0; n < 4; n++) state.out[n] += weight * values[n];
      }
    }
    lse_from += AT_ONCE * step;
    out_from += static_cast<long long>(AT_ONCE) * step * HEAD_DIM;
  }
}

// Counts a part whose result all threads have stored; the CTA that counts last merges the parts into the output. Teams of
// VECTORS threads take rows; where there are few, four teams share a row and take its parts in turn.
__device__ __forceinline__ void finish_part(const Results& results, Shared& shared, Stage& stage) {
  const Part& part = results.part;
  const int num_rows = results.rows.count;
  __syncthreads();
  if (threadIdx.x == 0) shared.counted = atom_add_acq_rel_gpu(&results.params.counters[part.first_slot], 1);
  __syncthreads();
  if (shared.counted + 1 != part.num_parts) return;

  constexpr int TEAMS = THREADS / VECTORS;
  const int team = threadIdx.x / VECTORS, d = threadIdx.x % VECTORS * 4;
  if (num_rows * 4 <= TEAMS) {
    const int row = team / 4, number = team % 4;
    if (row < num_rows) {
      SoftmaxState<4> state[1];
      merge_parts<1, AT_ONCE, 4>(state, results, row, 0, 1, d, number);
      vec<float, 4> values;
      for (int i = 0; i < 4; i++) values.at[i] = state[0].out[i];
      store(partial_of_warp(stage, number, row, d), values);
      if (d == 0) {
        shared.top[number][row] = state[0].top;
        shared.sum[number][row] = state[0].sum;
      }
    }
    __syncthreads();
    merge_in_shared(shared, stage, num_rows, 4, [&](int row, int d, const SoftmaxState<4>& state) {
      results.store_whole(row, d, normalised(state, 1.0f));
      if (d == 0) results.store_final_lse(row, state.lse());
    });
  } else if (num_rows <= ROWS) {
    for (int row = team; row < num_rows; row += TEAMS) {
      SoftmaxState<4> state[1];
      merge_parts<1, AT_ONCE>(state, results, row, 0, 1, d, 0);
      results.store_whole(row, d, normalised(state[0], 1.0f));
      if (d == 0) results.store_final_lse(row, state[0].lse());
    }
  } else {
    for (int row = team; row < num_rows; row += 4 * TEAMS) {
      const int there = (num_rows - row + TEAMS - 1) / TEAMS;
      SoftmaxState<4> states[4];
      merge_parts<4, 4>(states, results, row, TEAMS, there, d, 0);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        if (r >= there) continue;
        results.store_whole(row + r * TEAMS, d, normalised(states[r], 1.0f));
        if (d == 0) results.store_final_lse(row + r * TEAMS, states[r].lse());
      }
    }
  }
  if (threadIdx.x == 0) results.params.counters[part.first_slot] = 0;  // for the next launch
}

// A part of a decode tile of up to 8 * BLOCKS rows: each warp attends to its quarter of every chunk.
template <int BLOCKS>
__device__ __forceinline__ void decode(const Params& params, KvRing& ring, const Part& part, Shared& shared) {
  const int warp = threadIdx.x / 32;
  const TileRows rows(params, part);
  const Results results = {params, rows, part};
  const vec<float, 2> scales = scales_of(params, part.kv_head);
  DecodeTile<BLOCKS> tile(params, part, rows);
  for (int position = part.first_step();;) {
    Stage& stage = ring.wait();
    if (position == part.first_step()) {
      __syncthreads();  // all are done with the stage before, whatever it was used for
    } else {
      __syncwarp();
    }
    ring.refill();
    tile.template attend<WARP_SLOTS>(stage, warp * WARP_SLOTS, position + warp * WARP_SLOTS, scales.at[0]);
    position += CHUNK;
    ring.release();
    if (position < part.kv_stop) continue;
    finish_decode(tile, results, shared, stage, scales.at[1]);
    if (!part.whole()) finish_part(results, shared, stage);
    return;
  }
}

// A part of a prefill tile: each warp attends with its rows, if it has any, to all positions.
__device__ __forceinline__ Stage& attend_prefill(WarpTile& tile, KvRing& ring, int position, bool any_rows, float scale) {
  for (;;) {
    Stage& stage = ring.wait();
    __syncthreads();  // all copies have landed, and all are done with the stage before, whatever it was used for
    ring.refill();
    if (any_rows) {
#pragma unroll 1
      for (int slot = 0; slot < CHUNK; slot += 64) tile.attend<64>(stage, slot, position + slot, scale);
    }
    position += CHUNK;
    ring.release();
    if (position >= tile.kv_stop) return stage;
  }
}

// The work list and the shapes of everything are as struct Params says; the row at position p sees the positions
// max(0, p - window + 1) .. p of [kv_start, kv_stop) of its tile, or what its mask says.
extern "C" __global__ void __launch_bounds__(THREADS, 2) persistent_attention(const __grid_constant__ Params params) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  KvRing ring(params, shared.ring);
  for (int number = 0;; number++) {
    const PartList parts = parts_of_cta(params, number);
    if (!parts.any()) return;
    const Part part = parts.get();
#ifndef DECODE_ONLY
    if (part.tile.num_rows > params.decode_rows) {
      const int first_row = threadIdx.x / 32 * ROWS;
      const TileRows rows(params, part);
      WarpTile tile(params, part, rows, first_row);
      const float scale = scales_of(params, part.kv_head).at[0];
      Stage& last = attend_prefill(tile, ring, part.first_step(), first_row < part.tile.num_rows, scale);
      const Part again = parts_of_cta(params, number).get();  // else it would take registers all along
      const TileRows rows_again(params, again);
      const Results results = {params, rows_again, again};
      const vec<float, 2> scales = scales_of(params, again.kv_head);
      finish_prefill(tile, results, first_row, scales.at[0], scales.at[1]);
      if (!again.whole()) finish_part(results, shared, last);
      continue;
    }
#endif
    if (part.tile.num_rows <= 8) {
      decode<1>(params, ring, part, shared);
    } else {
      decode<2>(params, ring, part, shared);
    }
  }
}

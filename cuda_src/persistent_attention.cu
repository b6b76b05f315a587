// Paged attention of a whole step, prefill and decode rows together, in one launch of as many CTAs as are resident at once.
//
//   items of CTA c        | item: a tile of query rows, a range of positions | item | item ...     (work_list.cuh)
//   steps, 64 positions   | s0 | s1 | s2 | s3 | s4 |                         | s5 | s6 | ...
//   ring of STAGES        s computed while s + 1 and s + 2 are under way, into the next item too      (kv_ring.cuh)
//
//                   a stage                   decode: up to 16 rows           prefill: up to 64 rows
//   pages           64 positions of K and V   all rows x                      all positions x
//    | cp.async     +----------------+        +-- warp 0's 16 positions       +-- warp 0's 16 rows
//    | 16 bytes     | warp 0 fetches |        |   warp 1's                    |   warp 1's
//    v              | warp 1 fetches |        |   warp 2's                    |   warp 2's
//   each warp's     | warp 2 fetches |        +-- warp 3's                    +-- warp 3's
//   own quarter     | warp 3 fetches |        a warp meets no other until     the warps meet at every step:
//                   +----------------+        the item's end: merge of four   they fetch for one another
//
//   step (a warp):  wait -> barrier -> refill the stage before -> S = Q K^T (mma) -> mask where the rows' borders are
//                   -> online softmax, base 2, float32 -> O += P V (mma; P goes from accumulators to operands in registers)
//
// A whole task writes its output. A part writes a normalised partial result and its lse, and counts itself; who counts last
// merges the parts, in their order, so that the result does not depend on who that was. Nobody waits for another CTA.
// Positions outside of an item are never read: zeros stand in their place, masked.
#include "dtypes.cuh"
#include "work_list.cuh"
#include "softmax_state.cuh"
#include "kv_ring.cuh"
#include "attention_tile_sm80.cuh"

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "paged attention knows head_dim 64 and 128");
static_assert(WARPS * WARP_ROWS == TILE_ROWS && DECODE_ROWS == WARP_ROWS, "a warp has 16 rows in both classes");

struct Shared {
  Stage ring[STAGES];
  scalar rows[WARPS][WARP_ROWS * HEAD_DIM];  // of each warp: queries, then outputs
  float top[WARPS][DECODE_ROWS], sum[WARPS][DECODE_ROWS];
  unsigned counted;
};
constexpr float LOG_2 = 0.693147181f;

struct Results {
  scalar* out;  // [num_tokens, num_heads, HEAD_DIM]
  float* lse;  // [num_tokens, num_heads], natural
  float* partial_out;  // [num_slots, TILE_ROWS, HEAD_DIM]
  float* partial_lse;  // [num_slots, TILE_ROWS], base 2

  __device__ __forceinline__ long long partial_row(int slot, int row) const {
    return static_cast<long long>(slot) * TILE_ROWS + row;
  }

  // Four elements, from d on, of a row of the tile: as output, or into the item's slot.
  __device__ __forceinline__ void store_whole(const TileRows& rows, int row, int d, const SoftmaxState<4>& state) const {
    const long long index = rows.index(row);
    const float normaliser = state.normaliser();
    vec<scalar, 4> rounded;
    for (int i = 0; i < 4; i++) rounded.at[i] = from_float<scalar>(state.out[i] * normaliser);
    store(out + index * HEAD_DIM + d, rounded);
    if (d == 0) lse[index] = state.lse() * LOG_2;
  }
  __device__ __forceinline__ void store_part(int slot, int row, int d, const SoftmaxState<4>& state) const {
    const float normaliser = state.normaliser();
    vec<float, 4> normalised;
    for (int i = 0; i < 4; i++) normalised.at[i] = state.out[i] * normaliser;
    store(partial_out + partial_row(slot, row) * HEAD_DIM + d, normalised);
    if (d == 0) partial_lse[partial_row(slot, row)] = state.lse();
  }
};

// Where warp w leaves element d of its partial result of a decode row: in its own quarter of a stage, which is as large. XORed
// with the row, so that what a warp stores at once lies in different banks.
__device__ __forceinline__ float* partial_of_warp(Stage& stage, int warp, int row, int d) {
  constexpr int HALF = HEAD_DIM / 2, CHUNKS = HALF / 8;
  scalar* quarter = (d < HALF ? stage.k : stage.v) + warp * WARP_SLOTS * HEAD_DIM;
  const int chunk = d % HALF / 8 ^ row % CHUNKS;
  return reinterpret_cast<float*>(quarter) + row * HALF + chunk * 8 + d % 8;
}

// The four warps' partial results of a decode item, each over its own positions, become one.
__device__ __forceinline__ void finish_decode(
    WarpTile& tile, const Item& item, const TileRows& rows, const Results& results, Shared& shared, Stage& stage, float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  tile.share_sum();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane / 4 + 8 * h;
    if (row >= rows.count) continue;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++) {
      const vec<float, 2> pair = {tile.out[j][2 * h], tile.out[j][2 * h + 1]};
      store(partial_of_warp(stage, warp, row, 8 * j + lane % 4 * 2), pair);
    }
    if (lane % 4 == 0) {
      shared.top[warp][row] = tile.top[h] * scale;
      shared.sum[warp][row] = tile.sum[h];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows.count * (HEAD_DIM / 4); i += 32 * WARPS) {
    const int row = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
    SoftmaxState<4> state;
    for (int w = 0; w < WARPS; w++) {
      state.merge(shared.top[w][row], shared.sum[w][row], load<4>(partial_of_warp(stage, w, row, d)).at);
    }
    if (item.whole()) {
      results.store_whole(rows, row, d, state);
    } else {
      results.store_part(item.slot, row, d, state);
    }
  }
}

// Each warp's own rows of a prefill item.
__device__ __forceinline__ void finish_prefill(
    WarpTile& tile, const Item& item, const TileRows& rows, const Results& results, Shared& shared, float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = warp * WARP_ROWS;
  scalar* buffer = shared.rows[warp];
  tile.share_sum();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = lane / 4 + 8 * h;
    const bool there = first_row + row < rows.count;
    SoftmaxState<1> state;
    state.top = tile.top[h] * scale;
    state.sum = tile.sum[h];
    const float normaliser = state.normaliser();
    if (there && lane % 4 == 0) {
      if (item.whole()) {
        results.lse[rows.index(first_row + row)] = state.lse() * LOG_2;
      } else {
        results.partial_lse[results.partial_row(item.slot, first_row + row)] = state.lse();
      }
    }
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++) {
      const vec<float, 2> pair = {tile.out[j][2 * h] * normaliser, tile.out[j][2 * h + 1] * normaliser};
      const int d = lane % 4 * 2;
      if (item.whole()) {
        *reinterpret_cast<unsigned*>(buffer + swizzled(row, j) + d) = round_pair(pair.at[0], pair.at[1]);
      } else if (there) {
        store(results.partial_out + results.partial_row(item.slot, first_row + row) * HEAD_DIM + 8 * j + d, pair);
      }
    }
  }
  if (!item.whole()) return;
  __syncwarp();
  const int piece = lane % PIECES;
  for (int row = lane / PIECES; row < WARP_ROWS && first_row + row < rows.count; row += ROWS_AT_ONCE) {  // 16 bytes a lane
    store(results.out + rows.index(first_row + row) * HEAD_DIM + piece * 8, load<8>(buffer + swizzled(row, piece)));
  }
}

// Counts a part whose result all threads have stored; the CTA that counts last merges the parts into the output.
__device__ __forceinline__ void finish_part(
    const Item& item, const TileRows& rows, const Results& results, const CutTask* tasks, unsigned* counters, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.counted = atom_add_acq_rel_gpu(&counters[item.task], 1);
  __syncthreads();
  const CutTask task = tasks[item.task];
  if (shared.counted + 1 != task.num_parts) return;
  for (int i = threadIdx.x; i < rows.count * (HEAD_DIM / 4); i += 32 * WARPS) {
    const int row = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
    SoftmaxState<4> state;
#pragma unroll 8
    for (int part = 0; part < task.num_parts; part++) {  // plain loads: other CTAs have written this during the launch
      const long long from = results.partial_row(task.first_slot + part, row);
      const float lse = results.partial_lse[from];
      state.merge(lse, lse == minus_infinity() ? 0.0f : 1.0f, load<4>(results.partial_out + from * HEAD_DIM + d).at);
    }
    results.store_whole(rows, row, d, state);
  }
  if (threadIdx.x == 0) counters[item.task] = 0;  // for the next launch
}

// q, out [num_tokens, num_kv_heads * group_size, HEAD_DIM]; pools [num_kv_heads, num_blocks, 1 << block_shift, HEAD_DIM]; the
// row at position p sees max(0, p - window + 1) .. p. The work list is as the planner says; counters are 0, and are left so.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) persistent_attention(
    const scalar* q, const scalar* k_pool, const scalar* v_pool, scalar* out, float* lse, const int* q_indptr,
    const int* seq_lens, const int* page_indptr, const int* page_indices, const Item* items, const int* cta_indptr,
    const CutTask* tasks, float* partial_out, float* partial_lse, unsigned* counters, int num_kv_heads, int group_size,
    int num_blocks, int block_shift, int window, float scale) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = threadIdx.x / 32;
  const PagedPool pool = {k_pool, v_pool, page_indptr, page_indices, num_blocks, block_shift};
  const Results results = {out, lse, partial_out, partial_lse};
  const float log2_scale = scale * 1.44269504f;  // log2(e), for exp2

  const int end = cta_indptr[blockIdx.x + 1];
  int next = cta_indptr[blockIdx.x];
  KvRing ring(pool, items, next, end, shared.ring);
  for (; next < end; next++) {
    const Item item = items[next];
    const int first_token = q_indptr[item.sequence], num_tokens = q_indptr[item.sequence + 1] - first_token;
    const int num_heads = num_kv_heads * group_size;
    const TileRows rows = {item.first_row, item.num_rows, group_size, num_heads, seq_lens[item.sequence] - num_tokens,
                           static_cast<long long>(first_token) * num_heads + item.kv_head * group_size};
    const bool decode = item.num_rows <= DECODE_ROWS;
    const int first_row = decode ? 0 : warp * WARP_ROWS;
    WarpTile tile(q, item, rows, first_row, window, shared.rows[warp]);

    int position = item.first_step();
    for (;;) {
      Stage& stage = ring.wait();
      if (decode && position != item.first_step()) {
        __syncwarp();
      } else {
        __syncthreads();  // all copies have landed, and all are done with the stage before, whatever it was used for
      }
      ring.refill();
      if (decode) {
        tile.attend<WARP_SLOTS>(stage, warp * WARP_SLOTS, position + warp * WARP_SLOTS, log2_scale);
      } else if (first_row < rows.count) {
        tile.attend<STEP>(stage, 0, position, log2_scale);
      }
      position += STEP;
      ring.release();
      if (position >= item.kv_stop) {
        if (decode) finish_decode(tile, item, rows, results, shared, stage, log2_scale);
        break;
      }
    }
    if (!decode) finish_prefill(tile, item, rows, results, shared, log2_scale);
    if (!item.whole()) finish_part(item, rows, results, tasks, counters, shared);
  }
}

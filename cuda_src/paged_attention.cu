// Causal attention of one query row over its own sequence, K and V read through the page table; right and simple.
//
//   grid: (query row, kv head, tile of HEADS query heads of its group)     4 warps per CTA
//
//   pages in global memory           shared memory, two stages            registers of warp w, private until the end
//   position: page_table[p / block]  K [TILE][HEAD_DIM + pad]             LANES lanes per position: score = q . k
//      |  cp.async, 16 bytes each    V [TILE][HEAD_DIM]                   HEAD_DIM / 32 elements a lane: out += weight * v
//      v                             tile: | warp 0 | warp 1 | warp 2 | warp 3 |     each a quarter of the tile's positions
//
//   tile t:    wait for stage t % 2 -> __syncthreads -> issue the copies of t + 1 into the other stage -> compute t
//   at last:   the four warps' (largest score, sum, out) are merged through shared memory
//
// Softmax is online (Milakov and Gimelshein 2018) and in base 2, sums in float32. Slots that the row must not see are neither
// fetched nor computed with: what is in them may be NaN. A long context of few rows keeps few SMs busy, so it is slow here.
#include "dtypes.cuh"
#include "paged_kv.cuh"

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "paged attention knows head_dim 64 and 128");

constexpr int WARPS = 4;
constexpr int LANES = HEAD_DIM / 32;             // that share a position's dot product, 32 elements each
constexpr int WARP_POSITIONS = 32 / LANES;       // of a tile
constexpr int TILE = WARPS * WARP_POSITIONS;     // positions in a stage
constexpr int K_STRIDE = HEAD_DIM + 8 * LANES;   // the padding spreads a quarter warp's 16-byte reads over all banks
constexpr int DIMS = HEAD_DIM / 32;              // elements of the output that a lane owns

struct Shared {
  scalar k[2][TILE][K_STRIDE];
  scalar v[2][TILE][HEAD_DIM];
  float q[HEADS][HEAD_DIM];
  float weight[WARPS][WARP_POSITIONS][HEADS];
};
struct Partial {  // of the warps, once the tiles are done with
  float out[WARPS][HEADS][HEAD_DIM];
  float largest[WARPS][HEADS];
  float sum[WARPS][HEADS];
};
static_assert(sizeof(Partial) <= sizeof(Shared), "the partial results take the place of the tiles");

// q, out [gridDim.x, gridDim.y * group_size, HEAD_DIM]; pools [gridDim.y, num_blocks, 1 << block_shift, HEAD_DIM]; the row at
// position p attends to positions max(0, p - window + 1) .. p.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 3) paged_attention(  // 3 CTAs: what fits the shared memory of sm_80
    const scalar* q, const scalar* k_pool, const scalar* v_pool, scalar* out, const int* q_indptr, const int* seq_lens,
    const int* page_indptr, const int* page_indices, int num_sequences, int group_size, int num_blocks, int block_shift,
    int window, float scale) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.x, kv_head = blockIdx.y, first_head = blockIdx.z * HEADS;
  const int sequence = sequence_of_row(row, q_indptr, num_sequences);
  const int position = position_of_row(row, sequence, q_indptr, seq_lens);
  const int* page_table = page_indices + page_indptr[sequence];
  const int start = position < window ? 0 : position - window + 1;
  const int count = max(0, position + 1 - start);
  const long long first_q = ((static_cast<long long>(row) * gridDim.y + kv_head) * group_size + first_head) * HEAD_DIM;

  auto fetch = [&](int tile) {
    constexpr int PIECES = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < TILE * PIECES; i += 32 * WARPS) {
      const int slot = i / PIECES, element = i % PIECES * 8, p = start + tile * TILE + slot;
      if (p <= position) {
        const long long offset = kv_offset(p, page_table, kv_head, num_blocks, block_shift, HEAD_DIM) + element;
        cp_async_16(&shared.k[tile % 2][slot][element], k_pool + offset);
        cp_async_16(&shared.v[tile % 2][slot][element], v_pool + offset);
      }
    }
    cp_async_commit();
  };

  const int num_tiles = (count + TILE - 1) / TILE;
  if (num_tiles > 0) fetch(0);
  for (int i = threadIdx.x * 8; i < HEADS * HEAD_DIM; i += 32 * WARPS * 8) {  // heads past the group's last are zeros
    vec<float, 8> scaled = {};
    if (first_head + i / HEAD_DIM < group_size) {
      const vec<scalar, 8> piece = load<8>(q + first_q + i);
      for (int j = 0; j < 8; j++) scaled.at[j] = to_float(piece.at[j]) * (scale * 1.44269504f);  // log2(e), for exp2
    }
    store<8>(&shared.q[0][0] + i, scaled);
  }

  const float infinity = __int_as_float(0x7f800000);
  float result[HEADS][DIMS] = {}, largest[HEADS], sum[HEADS] = {};
  for (int h = 0; h < HEADS; h++) largest[h] = -infinity;

  for (int tile = 0; tile < num_tiles; tile++) {
    cp_async_wait<0>();
    __syncthreads();  // all threads' copies have landed, and all are done with the other stage
    if (tile + 1 < num_tiles) fetch(tile + 1);
    const int first = warp * WARP_POSITIONS;
    const int valid = min(WARP_POSITIONS, count - tile * TILE - first);
    if (valid <= 0) continue;

    float score[HEADS] = {};
    const scalar* key = shared.k[tile % 2][first + lane / LANES];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int element = (i * LANES + lane % LANES) * 8;
      const vec<scalar, 8> k = load<8>(key + element);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const vec<float, 8> query = load<8>(&shared.q[h][element]);
        for (int j = 0; j < 8; j++) score[h] = fmaf(query.at[j], to_float(k.at[j]), score[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      for (int distance = 1; distance < LANES; distance *= 2) score[h] += __shfl_xor_sync(0xffffffffu, score[h], distance);
      if (lane / LANES >= valid) score[h] = -infinity;
      float top = score[h];
      for (int distance = LANES; distance < 32; distance *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
      top = fmaxf(top, largest[h]);
      const float kept = exp2f(largest[h] - top), weight = exp2f(score[h] - top);
      largest[h] = top;
      sum[h] = sum[h] * kept + weight;
      for (int d = 0; d < DIMS; d++) result[h][d] *= kept;
      if (lane % LANES == 0) shared.weight[warp][lane / LANES][h] = weight;
    }
    __syncwarp();
    for (int slot = 0; slot < valid; slot++) {
      const vec<scalar, DIMS> v = load<DIMS>(&shared.v[tile % 2][first + slot][lane * DIMS]);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float weight = shared.weight[warp][slot][h];
        for (int d = 0; d < DIMS; d++) result[h][d] = fmaf(weight, to_float(v.at[d]), result[h][d]);
      }
    }
  }

  __syncthreads();  // the tiles are done with
  Partial& partial = *reinterpret_cast<Partial*>(&shared);
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    for (int distance = LANES; distance < 32; distance *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], distance);
    for (int d = 0; d < DIMS; d++) partial.out[warp][h][lane * DIMS + d] = result[h][d];
    if (lane == 0) {
      partial.largest[warp][h] = largest[h];
      partial.sum[warp][h] = sum[h];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < HEADS * HEAD_DIM; i += 32 * WARPS) {
    const int h = i / HEAD_DIM, d = i % HEAD_DIM;
    if (first_head + h >= group_size) break;
    float top = -infinity, total = 0, value = 0;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, partial.largest[w][h]);
    for (int w = 0; w < WARPS; w++) {
      const float share = exp2f(partial.largest[w][h] - top);
      total = fmaf(share, partial.sum[w][h], total);
      value = fmaf(share, partial.out[w][h][d], value);
    }
    out[first_q + i] = from_float<scalar>(count == 0 ? 0.0f : value / total);
  }
}

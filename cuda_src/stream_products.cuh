// What weight_stream.cu computes: products in a chain, how the CTAs divide them, and the room that a CTA has.
#pragma once
#include "paged_kv.cuh"
#include "stream_norm.cuh"
#include "weight_codes.cuh"

constexpr int STRIP = 8;  // rows of weights that lie side by side
// Of the inner dimension: what of x is in shared memory at once. Longer where that is few bytes, of weights and of x.
constexpr int SLICE = TOKENS > 16 || WEIGHT_BITS == 16 ? 256 : TOKENS > 8 || WEIGHT_BITS == 8 ? 512 : 1024;
constexpr int X_BLOCK = 64, X_BLOCKS = SLICE / X_BLOCK;  // of 128 bytes, the width of a box
constexpr int WEIGHT_BLOCK = 1024 / WEIGHT_BITS, WEIGHT_BLOCKS = SLICE / WEIGHT_BLOCK;
constexpr int GROUPS = SLICE / GROUP;
constexpr int STAGE_STRIPS = 4;  // of one slice, in a stage
constexpr int TILE_STAGES = WEIGHT_BITS == 4 && TOKENS == 64 ? 3 : 6;  // of one slice, whose sums are in registers at once: as far as those go
constexpr int TILE_STRIPS = STAGE_STRIPS * TILE_STAGES, TILE_ROWS = STRIP * TILE_STRIPS;

// Which instruction multiplies: wgmma where there are many tokens and weights are scalars as they are, else mma.sync.
#define WIDE (TOKENS >= 16 && WEIGHT_BITS == 16)
// How the consumers divide a stage by mma.sync: each has up to 16 tokens, some of its strips, and a part of the slice. The fewer
// tokens, the more parts, so that each warp loads less of x: what shared memory gives in a second is what bounds them.
constexpr int CONSUMER_WARPS = WIDE || TOKENS < 64 ? 8 : 4;  // as far as registers go
constexpr int CONSUMER_THREADS = 32 * CONSUMER_WARPS, THREADS = CONSUMER_THREADS + 3 * 32;
constexpr int TOKEN_PARTS = TOKENS < 16 ? 1 : TOKENS / 16, INNER_PARTS = WIDE ? 1 : 64 / TOKENS;
constexpr int STRIP_PARTS = CONSUMER_WARPS / TOKEN_PARTS / INNER_PARTS, WARP_STRIPS = STAGE_STRIPS / STRIP_PARTS;
// By wgmma a warpgroup has every other stage.
constexpr int WARPGROUPS = WIDE ? 2 : 1;
#ifndef CLUSTER
#define CLUSTER 1
#endif
constexpr int CONSUMERS = 1;  // their named barrier
// How many stages' worth of sums are finished at once.
constexpr int PHASE_STAGES = 3, PHASE_ROWS = PHASE_STAGES * STAGE_STRIPS * STRIP;

#ifndef PATIENCE
#define PATIENCE 2000000000ull  // nanoseconds
#endif

#if defined(KV_FP8)
using kv_code = unsigned char;
#else
using kv_code = scalar;
#endif

enum Finish { STORE, STORE_FLOAT, SWIGLU, ADD, QKV };

struct Product {
  TensorMap weights, x;
  void* out;               // [tokens, num_rows]; of SWIGLU half as many, of QKV q's; of ADD the residual, which it reads too
  const scalar* bias;      // [num_rows] or null; added to the product
  const scalar* gain;      // ADD: [num_rows], of the norm that comes next, or null: then the two below are not written
  scalar* normed;          // ADD: [tokens, num_rows], the residual times the gain
  float* squares;          // ADD: [CTAs that have rows, TOKENS], of the residual, summed over the CTA's rows
  const float* x_squares;  // [x_parts, TOKENS] of what x was made from; null: x is taken as it is
  unsigned* done;          // CTAs that have finished
  const void* scales;      // of 8-bit codes float16 [num_rows], of int4 as quantize.cu says
  int num_rows, inner, x_parts, finish;
  float eps;
};
static_assert(sizeof(Product) == 384, "PRODUCT of cupaged/ops/products.py");

// Where QKV puts the keys and values of its tokens, each the last of its sequence: as in rope_append.cu.
struct Append {
  const float* rope_table;
  kv_code *k_pool, *v_pool;
  const float* kv_scales;
  const int *seq_lens, *page_indptr, *page_indices;
  int num_heads, num_kv_heads, head_dim, num_blocks, block_shift;
};

constexpr int MOST_PRODUCTS = 4;
struct Chain {
  Product products[MOST_PRODUCTS];
  unsigned* flag;  // of the host: 1 after a wait has lasted too long
  Append append;   // all zeros where no product is QKV
  int num_products, num_tokens;
};
static_assert(sizeof(Chain) == 1664, "CHAIN of cupaged/ops/products.py");

// ROWS rows of a slice, as boxes of 128 bytes of each row with the 128-byte swizzle: piece p (16 bytes) of row r at p XOR r % 8.
template <int ROWS, int BLOCKS>
struct alignas(1024) Boxes {
  unsigned char at[BLOCKS][ROWS][128];

  __device__ __forceinline__ const void* piece(int block, int row, int number) const {
    return &at[block][row][(number ^ row % 8) * 16];
  }
};
using XSlice = Boxes<TOKENS, X_BLOCKS>;
struct Stage {
  Boxes<STRIP, WEIGHT_BLOCKS> strips[STAGE_STRIPS];
};
#if WEIGHT_BITS == 4
struct Scales {  // and zeros, of a stage
  unsigned at[STAGE_STRIPS][GROUPS][STRIP];
};
#endif
// Stages that are asked for at once: enough for the full speed of memory.
#ifndef MOST_UNDER_WAY
#define MOST_UNDER_WAY (48 * 1024 / static_cast<int>(sizeof(Stage)))
#endif
// What is waited for is not yet overtaken; of two warpgroups one may be as far ahead of the other as it skips.
static_assert(MOST_UNDER_WAY + (WIDE ? 3 : 0) <= STAGES);

// The sums of a phase, on their way from who has them to who finishes them: each part of the inner dimension has its own.
struct Turned {
  float at[INNER_PARTS][TOKENS][PHASE_ROWS + 4];
  float squares[TILE_STAGES][TOKENS];
};

struct Shared {
  XSlice x[X_STAGES];
  Stage weights[STAGES];  // behind x: see stream_sums_wide.cuh
#if !WIDE && TOKENS < 64
  Turned turned;  // else in a slice of x that nobody needs any more
#endif
#if WEIGHT_BITS == 4
  Scales scales[STAGES];
#endif
  unsigned long long weights_full[STAGES], weights_empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES];
  unsigned long long x_made[MOST_PRODUCTS], factors_full[MOST_PRODUCTS];  // each of a product: no phase is taken for another
  float factors[MOST_PRODUCTS][TOKENS];    // 1 / rms
  int position[TOKENS], block[TOKENS];     // of QKV's tokens, and the pool's block that holds them; -1: no such token
  alignas(16) scalar bias[TILE_ROWS], gain[TILE_ROWS];  // of a tile that is finished
#if WEIGHT_BITS == 8
  unsigned short row_scale[TILE_ROWS];
#endif
};

// Whose turn it is in a ring of N stages: consumers wait for `parity` of full, the producer for the other parity of empty.
template <int N>
struct Turn {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == N) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Which strips of a product a CTA has: as many as the others, or one less; in pairs where two are finished together.
struct Cut {
  int unit, units, ctas, each, more;  // the first `more` CTAs have one unit more than `each`

  __device__ __forceinline__ explicit Cut(const Product& product)
      : unit(product.finish == SWIGLU || product.finish == QKV ? 2 : 1),
        units((product.num_rows + STRIP * unit - 1) / (STRIP * unit)),
        ctas(min(units, static_cast<int>(gridDim.x))),  // that have any
        each(units / static_cast<int>(gridDim.x)),
        more(units % static_cast<int>(gridDim.x)) {}

  __device__ __forceinline__ int begin(int cta) const { return unit * (cta * each + min(cta, more)); }
};

// f(first strip, number of strips) for the tiles of this CTA, all of a size but the last. Every CTA has as many tiles as those with
// most strips, of which the last may have no strips: CTAs of a cluster share what they read of x.
template <class F>
__device__ __forceinline__ void for_each_tile(const Product& product, F f) {
  const Cut cut(product);
  const int end = cut.begin(blockIdx.x + 1), all = cut.begin(1);
  const int tiles = (all + TILE_STRIPS - 1) / TILE_STRIPS;
  const int most = ((all + tiles - 1) / tiles + STAGE_STRIPS - 1) / STAGE_STRIPS * STAGE_STRIPS;
  int first = cut.begin(blockIdx.x);
  for (int tile = 0; tile < tiles; tile++, first += most) f(first, max(0, min(most, end - first)));
}

__device__ __forceinline__ int num_slices(const Product& product) { return (product.inner + SLICE - 1) / SLICE; }

// f(slice) for all of them. The clusters begin at different ones: no two neighbours want the same of x, and of memory not all the
// same columns.
template <class F>
__device__ __forceinline__ void for_each_slice(const Product& product, F f) {
  const int slices = num_slices(product), first = blockIdx.x / CLUSTER % slices;
  for (int slice = first; slice < slices; slice++) f(slice);
  for (int slice = 0; slice < first; slice++) f(slice);
}

// The first row of a strip. QKV's take turns between the halves of a head, whose elements turn together.
__device__ __forceinline__ int row_of_strip(const Product& product, const Append& append, int strip) {
  if (product.finish != QKV) return STRIP * strip;
  const int of_head = append.head_dim / STRIP, number = strip & (of_head - 1);
  return (strip - number + number % 2 * (of_head / 2) + number / 2) * STRIP;
}

// While `wanting()`, unless that lasts too long, here or elsewhere.
template <class Wanting>
__device__ __forceinline__ void wait_while(Wanting wanting, unsigned* flag) {
  unsigned long long began = 0;
  for (int looks = 1; wanting(); looks++) {
    if (looks % 256) continue;
    if (load_acquire_gpu(flag)) return;
    if (began == 0) began = globaltimer();
    if (globaltimer() - began > PATIENCE) {
      store_for_others(flag, 1u);
      return;
    }
  }
}

// Until all of a product is there.
__device__ __forceinline__ void wait_for(const Product& product, unsigned* flag) {
  const unsigned wanted = Cut(product).ctas;
  wait_while([&] { return load_acquire_gpu(product.done) != wanted; }, flag);
}

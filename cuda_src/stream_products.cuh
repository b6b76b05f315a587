// What weight_stream.cu computes: products in a chain, how the CTAs divide them, and the room that a CTA has.
#pragma once
#include "paged_kv.cuh"
#include "stream_norm.cuh"

constexpr int TILE = 128, DEPTH = 64;  // rows of weights and length of a unit
constexpr int CONSUMER_WARPS = 4, WARP_ROWS = TILE / CONSUMER_WARPS, THREADS = 32 * (CONSUMER_WARPS + 3);
constexpr int GROUPS = TOKENS / 8;  // of tokens, as many as an mma has columns
constexpr int CONSUMERS = 1;  // the named barrier of warps 0 to 3
constexpr unsigned UNWRITTEN = 0xffffffff;  // a NaN that no sum is; where it lies, a piece of 16 bytes is yet to come
#ifndef MOST_UNDER_WAY
#define MOST_UNDER_WAY 3
#endif
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
  void* out;              // [tokens, num_rows]; of SWIGLU half as many, of QKV q's; of ADD the residual, which it reads too
  const scalar* bias;     // [num_rows] or null; added to the product
  const scalar* gain;     // ADD: [num_rows], of the norm that comes next, or null: then the two below are not written
  scalar* normed;         // ADD: [tokens, num_rows], the residual times the gain
  float* squares;         // ADD: [tiles, TOKENS], of the residual, summed over the tile's rows
  const float* x_squares;  // [x_tiles, TOKENS] of what x was made from; null: x is taken as it is
  unsigned* done;         // tiles finished
  int num_rows, inner, x_tiles, finish;
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
  uint4* parts;    // [gridDim.x, TILE * TOKENS / 4], UNWRITTEN before and after
  unsigned* flag;  // of the host: 1 after a wait has lasted too long
  Append append;
  int num_products, num_tokens;
};
static_assert(sizeof(Chain) == 1664, "CHAIN of cupaged/ops/products.py");

// Rows of 64 scalars with the 128-byte swizzle: piece p (8 scalars) of row r lies at p XOR r % 8.
template <int ROWS>
struct alignas(1024) Box {
  scalar at[ROWS][DEPTH];

  __device__ __forceinline__ const scalar* piece(int row, int number) const { return &at[row][(number ^ row % 8) * 8]; }
};

struct Shared {
  Box<TILE> weights[STAGES];
  Box<TOKENS> x[X_STAGES];
  unsigned long long weights_full[STAGES], weights_empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES];
  unsigned long long factors_full[MOST_PRODUCTS];
  float factors[MOST_PRODUCTS][TOKENS];  // 1 / rms; one for each product: whoever has no unit may fall behind
  float squares[CONSUMER_WARPS][TOKENS];
  float turned[CONSUMER_WARPS][8][WARP_ROWS + 4];  // sums of a warp's rows and 8 tokens, on their way to who stores them
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

// The units of a product, and which CTA has which: none where there are fewer units than CTAs.
struct Cut {
  int units, per_tile, ctas;

  __device__ __forceinline__ explicit Cut(const Product& product)
      : per_tile((product.inner + DEPTH - 1) / DEPTH) {
    units = num_tiles(product) * per_tile;
    ctas = min(units, static_cast<int>(gridDim.x));
  }

  __device__ static __forceinline__ int num_tiles(const Product& product) { return (product.num_rows + TILE - 1) / TILE; }

  // The first unit of a CTA.
  __device__ __forceinline__ int begin(int cta) const {
    return static_cast<int>(static_cast<long long>(units) * min(cta, ctas) / ctas);
  }
  __device__ __forceinline__ int owner(int unit) const {
    return static_cast<int>((static_cast<long long>(unit + 1) * ctas - 1) / units);
  }
};

// f(tile, unit of the tile) for all units of this CTA.
template <class F>
__device__ __forceinline__ void for_each_unit(const Product& product, F f) {
  const Cut cut(product);
  const int end = cut.begin(blockIdx.x + 1);
  int unit = cut.begin(blockIdx.x), tile = unit / cut.per_tile, k = unit % cut.per_tile;
  for (; unit < end; unit++) {
    f(tile, k);
    if (++k == cut.per_tile) {
      k = 0;
      tile++;
    }
  }
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

// Until all tiles of a product are finished.
__device__ __forceinline__ void wait_for(const Product& product, unsigned* flag) {
  const unsigned wanted = Cut::num_tiles(product);
  wait_while([&] { return load_acquire_gpu(product.done) != wanted; }, flag);
}

// Products with up to 64 rows, one after another, as one stream of weight bytes: the matrices between two attentions of a layer.
//
//   out_p [tokens, num_rows] = finish_p(x_p [tokens, inner] times weights_p [num_rows, inner] transposed),  x_p+1 from out_p
//
//   units            a product is cut into units of 128 rows x 64 of the inner dimension, tile after tile; every CTA has the same
//                    number of them, one after another (the stream-K cut of Osama et al. 2023), so of up to two tiles only a part
//
//   warp 4           weights --- tensor copies ---> | 16 KB | 16 KB | ... |--+
//                    does not know what a product is: while the other        |   warps 0-3: 32 rows each, all tokens
//                    warps wait at a join, the next weights land             +-> ldmatrix, mma.sync: rows are m, tokens n
//   warp 5           waits for the product before,                           |
//                    x ------- tensor copies -----> | x | x | x | ... | -----+
//   warp 6           waits for the same, then 1 / rms of each token ---------+
//
//   a tile's end     of the CTAs that have a part of a tile all but the one with its last part end with it; they finish it together,
//                    a group of 8 tokens each in turn. Each leaves for the others what is theirs, where UNWRITTEN lay; waits for
//                    what they leave, adds all in the order of the parts, and puts UNWRITTEN back.
//
// A product waits for the one before it by a count of finished tiles, which whoever starts the step has set to zero; all CTAs are
// resident, one an SM. The cut is the same for any number of tokens: a token's result does not depend on the others. A wait that
// lasts too long raises a flag and goes on with what is there, so that nothing hangs.
//
// Between products, what counts is the way from one CTA to another and back, some eight times as long when memory is asked for
// all that the ring could hold: hence MOST_UNDER_WAY, just enough for its full speed.
//
// Norms: a product that adds to the residual writes it, it times the gain of the norm that comes next, and sums of squares. The
// next product takes the second and multiplies its result by 1 / rms, which is known only once all tiles have been written.
//
// Variants: DTYPE_BF16 | DTYPE_F16; TOKENS 8 | 16 | 32 | 64, the rows of x; STAGES, X_STAGES; KV_FP8 where pools hold such codes.
#include "dtypes.cuh"
#include "paged_kv.cuh"
#include "stream_norm.cuh"

constexpr int TILE = 128, DEPTH = 64;  // rows of weights and length of a unit
constexpr int CONSUMER_WARPS = 4, WARP_ROWS = TILE / CONSUMER_WARPS, THREADS = 32 * (CONSUMER_WARPS + 3);
constexpr int GROUPS = TOKENS / 8;  // of tokens, as many as an mma has columns
constexpr int CONSUMERS = 1;  // the named barrier of warps 0 to 3
constexpr unsigned UNWRITTEN = 0xffffffff;  // a NaN that no sum is
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
  const scalar* gain;     // ADD: [num_rows], of the norm that comes next
  scalar* normed;         // ADD: [tokens, num_rows], the residual times the gain
  float* squares;         // ADD: [tiles, TOKENS], of the residual, summed over the tile's rows
  const float* x_squares;  // [x_tiles, TOKENS] of what x was made from; null: x is taken as it is
  unsigned* done;         // groups of tokens finished, of all tiles
  int num_rows, inner, x_tiles, finish;
  float eps;
};
static_assert(sizeof(Product) == 384, "PRODUCT of cupaged/ops/chain.py");

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
  uint4* parts;    // [2 * gridDim.x, TILE * TOKENS / 4], UNWRITTEN before and after
  unsigned* flag;  // of the host: 1 after a wait has lasted too long
  Append append;
  int num_products, num_tokens;
};
static_assert(sizeof(Chain) == 1664, "CHAIN of cupaged/ops/chain.py");

// Rows of 64 scalars with the 128-byte swizzle: piece p (8 scalars) of row r lies at p XOR r % 8.
template <int ROWS>
struct alignas(1024) Box {
  scalar at[ROWS][DEPTH];

  __device__ __forceinline__ const scalar* piece(int row, int number) const { return &at[row][(number ^ row % 8) * 8]; }
};

struct Shared {
  Box<TILE> weights[STAGES];
  Box<TOKENS> x[X_STAGES];
  unsigned long long weights_full[STAGES], weights_empty[STAGES], x_full[X_STAGES], x_empty[X_STAGES], factors_full[2];
  float factors[2][TOKENS];  // 1 / rms, of this product and the next
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

// Until all groups of tokens of all tiles of a product are finished.
__device__ __forceinline__ void wait_for(const Product& product, unsigned* flag) {
  const unsigned wanted = Cut::num_tiles(product) * GROUPS;
  wait_while([&] { return load_acquire_gpu(product.done) != wanted; }, flag);
}

__device__ __forceinline__ void produce_weights(const Chain& chain, Shared& shared) {
  const unsigned long long once = createpolicy_evict_first();
  Turn<STAGES> turn, landing;
  int under_way = 0;
  for (int p = 0; p < chain.num_products; p++) {
    const Product& product = chain.products[p];
    for_each_unit(product, [&](int tile, int k) {
      if (under_way == MOST_UNDER_WAY) {
        mbarrier_wait_parity(&shared.weights_full[landing.stage], landing.parity);
        landing.advance();
        under_way--;
      }
      under_way++;
      mbarrier_wait_parity(&shared.weights_empty[turn.stage], turn.parity ^ 1);
      unsigned long long* full = &shared.weights_full[turn.stage];
      mbarrier_arrive_expect_tx(full, sizeof(Box<TILE>));
      tensor_copy_2d_hint(&shared.weights[turn.stage], &product.weights, k * DEPTH, tile * TILE, full, once);
      turn.advance();
    });
  }
}

__device__ __forceinline__ void produce_x(const Chain& chain, Shared& shared) {
  Turn<X_STAGES> turn;
  for (int p = 0; p < chain.num_products; p++) {
    const Product& product = chain.products[p];
    if (p) wait_for(chain.products[p - 1], chain.flag);
    fence_proxy_async_global();
    for_each_unit(product, [&](int, int k) {
      mbarrier_wait_parity(&shared.x_empty[turn.stage], turn.parity ^ 1);
      unsigned long long* full = &shared.x_full[turn.stage];
      mbarrier_arrive_expect_tx(full, sizeof(Box<TOKENS>));
      tensor_copy_2d(&shared.x[turn.stage], &product.x, k * DEPTH, 0, full);
      turn.advance();
    });
  }
}

// A whole warp's work.
__device__ __forceinline__ void produce_factors(const Chain& chain, Shared& shared) {
  const int lane = threadIdx.x % 32;
  for (int p = 0; p < chain.num_products; p++) {
    const Product& product = chain.products[p];
    if (p) wait_for(chain.products[p - 1], chain.flag);
    for (int token = lane; token < TOKENS; token += 32) {
      float factor = 1;
      if (product.x_squares != nullptr) {
        float sum = 0;
#pragma unroll 8
        for (int i = 0; i < product.x_tiles; i++) sum += load_from_others(product.x_squares + i * TOKENS + token);
        factor = after_norm(sum, product.inner, product.eps);
      }
      shared.factors[p % 2][token] = factor;
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.factors_full[p % 2]);
  }
}

// What of a tile a CTA finishes: the groups of tokens whose turn it is.
struct Share {
  int number, of;

  __device__ __forceinline__ bool has(int group) const { return group % of == number; }
  __device__ __forceinline__ int size() const { return (GROUPS - number + of - 1) / of; }
};

// What is added to 8 rows of the product.
struct Bias {
  vec<scalar, 8> at;
  bool any;

  __device__ __forceinline__ Bias(const Product& product, int row) : at(), any(product.bias != nullptr && row < product.num_rows) {
    if (any) at = load<8>(product.bias + row);
  }
  __device__ __forceinline__ void add(vec<float, 8>& values, float factor) const {
#pragma unroll
    for (int i = 0; i < 8; i++) values.at[i] = values.at[i] * factor + (any ? to_float(at.at[i]) : 0.0f);
  }
};

// What is to be finished.
struct Finishing {
  const Product& product;
  int tile;
  Share share;
  const float* factors;
  int num_tokens;
};

// A warp's part of a tile: with g = lane / 4 and t = lane % 4, sum[m][j][2 * h + i] is row 16 m + 8 h + g of the warp's and token
// 8 j + 2 t + i.
struct Sums {
  float sum[2][GROUPS][4] = {};

  // The products of a unit.
  __device__ __forceinline__ void add(const Box<TILE>& weights, const Box<TOKENS>& x) {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * WARP_ROWS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned a[2][2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          ldmatrix_x4(a[m][k], weights.piece(first_row + 16 * m + lane % 16, 4 * half + 2 * k + lane / 16));
        }
      }
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        unsigned b[4];
        ldmatrix_x4(b, x.piece(8 * j + lane % 8, 4 * half + lane / 8));
#pragma unroll
        for (int m = 0; m < 2; m++) {
          mma_of_scalars(sum[m][j], a[m][0], b[0], b[1]);
          mma_of_scalars(sum[m][j], a[m][1], b[2], b[3]);
        }
      }
    }
  }

  // A thread finds what the same thread of another CTA has left. A CTA leaves up to two parts of a product: a last one of a tile,
  // then another.
  __device__ static __forceinline__ uint4* piece(const Chain& chain, int cta, bool is_last, int m, int j) {
    return chain.parts + (((2 * cta + is_last) * 2 + m) * GROUPS + j) * (32 * CONSUMER_WARPS) + threadIdx.x;
  }
  // Leaves to the others what is not of the share.
  __device__ __forceinline__ void store(const Chain& chain, const Share& share, bool is_last) const {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        if (share.has(j)) continue;
        const float* from = sum[m][j];
        const uint4 bits = {__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]), __float_as_uint(from[3])};
        store_relaxed_gpu(piece(chain, blockIdx.x, is_last, m, j), bits);
      }
    }
  }

  // Makes of the share's sums those of all CTAs from first to last, added in this order.
  __device__ __forceinline__ void gather(const Chain& chain, const Share& share, int first, int last) {
    constexpr int AT_ONCE = GROUPS < 4 ? 8 / GROUPS : 2;  // CTAs whose sums are being loaded
    const int me = blockIdx.x;
#pragma unroll
    for (int m = 0; m < 2; m++) {
      float all[GROUPS][4] = {};
      uint4 part[AT_ONCE][GROUPS];
      const auto fetch = [&](uint4(&into)[GROUPS], int cta) {
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
          if (share.has(j) && cta <= last && cta != me) into[j] = load_relaxed_gpu(piece(chain, cta, cta == last, m, j));
        }
      };
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) fetch(part[i], first + i);
      for (int base = first; base <= last; base += AT_ONCE) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
          const int cta = base + i;
          if (cta > last) break;
#pragma unroll
          for (int j = 0; j < GROUPS; j++) {
            if (!share.has(j)) continue;
            if (cta == me) {
              for (int e = 0; e < 4; e++) all[j][e] += sum[m][j][e];
            } else {
              take(chain, part[i][j], piece(chain, cta, cta == last, m, j));
              all[j][0] += __uint_as_float(part[i][j].x);
              all[j][1] += __uint_as_float(part[i][j].y);
              all[j][2] += __uint_as_float(part[i][j].z);
              all[j][3] += __uint_as_float(part[i][j].w);
            }
          }
          fetch(part[i], cta + AT_ONCE);
        }
      }
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        if (!share.has(j)) continue;
#pragma unroll
        for (int e = 0; e < 4; e++) sum[m][j][e] = all[j][e];
      }
    }
  }

  // Loads again until all is there, and takes it away.
  __device__ __forceinline__ void take(const Chain& chain, uint4& bits, uint4* source) {
    const auto unwritten = [&] { return bits.x == UNWRITTEN || bits.y == UNWRITTEN || bits.z == UNWRITTEN || bits.w == UNWRITTEN; };
    const auto look = [&] {
      if (!unwritten()) return false;
      bits = load_relaxed_gpu(source);
      return true;
    };
    wait_while(look, chain.flag);
    store_for_others(source, uint4{UNWRITTEN, UNWRITTEN, UNWRITTEN, UNWRITTEN});
  }

  // Leaves the sums of a group of tokens in the warp's room, where lanes find 8 rows of a token side by side.
  __device__ __forceinline__ void turn(Shared& shared, int j) const {
    const int lane = threadIdx.x % 32;
    auto& turned = shared.turned[threadIdx.x / 32];
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
      for (int e = 0; e < 4; e++) turned[lane % 4 * 2 + e % 2][16 * m + e / 2 * 8 + lane / 4] = sum[m][j][e];
    }
  }

  // f(j, first of 8 rows, token, the product's values[8]) for this lane's eighths of all that the warp has summed of a share of a
  // tile, j the group of tokens. All lanes come along; rows and tokens may be beyond the last.
  template <class F>
  __device__ __forceinline__ void for_each_eight(const Finishing& at, Shared& shared, F f) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = at.tile * TILE + warp * WARP_ROWS + lane % 4 * 8;
    const Bias bias(at.product, row);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      if (!at.share.has(j)) continue;
      __syncwarp();
      turn(shared, j);
      __syncwarp();
      const int token = 8 * j + lane / 4;
      vec<float, 8> values = load<8>(&shared.turned[warp][lane / 4][lane % 4 * 8]);
      bias.add(values, at.factors[token]);
      f(j, row, token, values);
    }
  }
};

// Where 8 rows of a token are in an array [tokens, width]: multiples of 8 and 16 bytes.
template <class T>
__device__ __forceinline__ T* place(void* array, int width, int row, int token) {
  return static_cast<T*>(array) + static_cast<long long>(token) * width + row;
}

template <int N, class T>
__device__ __forceinline__ void store_rounded(T* target, const float* values) {
  vec<T, N> rounded;
#pragma unroll
  for (int i = 0; i < N; i++) rounded.at[i] = from_float<T>(values[i]);
  if constexpr (sizeof rounded > 16) {
    store_rounded<N / 2>(target, values);
    store_rounded<N / 2>(target + N / 2, values + N / 2);
  } else {
    store_for_others(reinterpret_cast<vec<T, N>*>(target), rounded);
  }
}

template <class T>
__device__ __forceinline__ void finish_store(
    const Finishing& at, const Sums& sums, Shared& shared) {
  const Product& product = at.product;
  sums.for_each_eight(at, shared, [&](int, int row, int token, const vec<float, 8>& values) {
    if (row >= product.num_rows || token >= at.num_tokens) return;
    T* target = place<T>(product.out, product.num_rows, row, token);
    if (product.num_rows % 8 == 0) {
      store_rounded<8>(target, values.at);
    } else {  // a vocabulary may have any size
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (row + i < product.num_rows) store_for_others(target + i, from_float<T>(values.at[i]));
      }
    }
  });
}

// Of every 16 rows the first 8 are gates and the others what they let through: who has the gates gets the others from the next
// lane.
__device__ __forceinline__ void finish_swiglu(
    const Finishing& at, const Sums& sums, Shared& shared) {
  const Product& product = at.product;
  sums.for_each_eight(at, shared, [&](int, int row, int token, vec<float, 8> gate) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float up = __shfl_down_sync(0xffffffffu, gate.at[i], 1);
      gate.at[i] = gate.at[i] / (1.0f + expf(-gate.at[i])) * up;
    }
    if (row % 16 || row >= product.num_rows || token >= at.num_tokens) return;
    store_rounded<8>(place<scalar>(product.out, product.num_rows / 2, row / 2, token), gate.at);
  });
}

// Queries and keys turn by their token's position, element i of a head's lower half with element i of the upper: what another
// warp has summed. Queries are stored, keys and values appended to their pages.
__device__ __forceinline__ void finish_qkv(
    const Finishing& at, const Append& append, const Sums& sums, Shared& shared) {
  const Product& product = at.product;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = append.head_dim / 2;
  const int row = at.tile * TILE + warp * WARP_ROWS + lane % 4 * 8, head = row / append.head_dim, d = row % append.head_dim;
  const bool lower = d < half, value_head = head >= append.num_heads + append.num_kv_heads;
  const int other_row = lower ? row + half : row - half, other_warp = other_row % TILE / WARP_ROWS;
  const Bias bias(product, row), other_bias(product, other_row);
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    if (!at.share.has(j)) continue;
    __syncwarp();
    named_barrier_sync(CONSUMERS, 32 * CONSUMER_WARPS);
    sums.turn(shared, j);
    named_barrier_sync(CONSUMERS, 32 * CONSUMER_WARPS);
    const int token = 8 * j + lane / 4;
    const int position = token < at.num_tokens ? append.seq_lens[token] - 1 : -1;
    if (row >= product.num_rows || position < 0) continue;
    vec<float, 8> values = load<8>(&shared.turned[warp][lane / 4][lane % 4 * 8]);
    bias.add(values, at.factors[token]);
    if (!value_head) {
      vec<float, 8> others = load<8>(&shared.turned[other_warp][lane / 4][lane % 4 * 8]);
      other_bias.add(others, at.factors[token]);
      const float* angles = append.rope_table + static_cast<long long>(position) * append.head_dim + d % half;
      const vec<float, 8> cosine = load<8>(angles), sine = load<8>(angles + half);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        values.at[i] = values.at[i] * cosine.at[i] + (lower ? -others.at[i] : others.at[i]) * sine.at[i];
      }
    }
    if (head < append.num_heads) {
      store_rounded<8>(place<scalar>(product.out, append.num_heads * append.head_dim, row, token), values.at);
      continue;
    }
    const int kv_head = (head - append.num_heads) % append.num_kv_heads;
    const int* page_table = append.page_indices + append.page_indptr[token];
    kv_code* pool = value_head ? append.v_pool : append.k_pool;
    pool += kv_offset(position, page_table, kv_head, append.num_blocks, append.block_shift, append.head_dim) + d;
#if defined(KV_FP8)
    const float scale = append.kv_scales[2 * kv_head + value_head];
    vec<kv_code, 8> codes;
#pragma unroll
    for (int i = 0; i < 8; i++) codes.at[i] = cvt_e4m3_satfinite(values.at[i] / scale);
    store(pool, codes);
#else
    store_rounded<8>(pool, values.at);
#endif
  }
}

__device__ __forceinline__ void finish_add(const Finishing& at, const Sums& sums, Shared& shared) {
  const Product& product = at.product;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = at.tile * TILE + warp * WARP_ROWS + lane % 4 * 8;
  vec<scalar, 8> gain = {}, residual[GROUPS] = {};
  if (first_row < product.num_rows) gain = load<8>(product.gain + first_row);
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    const int token = 8 * j + lane / 4;
    if (!at.share.has(j) || first_row >= product.num_rows || token >= at.num_tokens) continue;
    residual[j] = load_from_others(reinterpret_cast<vec<scalar, 8>*>(place<scalar>(product.out, product.num_rows, first_row, token)));
  }
  sums.for_each_eight(at, shared, [&](int j, int row, int token, const vec<float, 8>& values) {
    float squares = 0;
    if (row < product.num_rows && token < at.num_tokens) {
      vec<scalar, 8> sum, scaled;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sum.at[i] = from_float<scalar>(to_float(residual[j].at[i]) + values.at[i]);
        const float value = to_float(sum.at[i]);
        scaled.at[i] = before_norm(value, gain.at[i]);
        squares = fmaf(value, value, squares);
      }
      store_for_others(reinterpret_cast<vec<scalar, 8>*>(place<scalar>(product.out, product.num_rows, row, token)), sum);
      store_for_others(reinterpret_cast<vec<scalar, 8>*>(place<scalar>(product.normed, product.num_rows, row, token)), scaled);
    }
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    if (lane % 4 == 0) shared.squares[warp][token] = squares;
  });
  named_barrier_sync(CONSUMERS, 32 * CONSUMER_WARPS);
  if (threadIdx.x < TOKENS && at.share.has(threadIdx.x / 8)) {
    float sum = 0;
    for (int w = 0; w < CONSUMER_WARPS; w++) sum += shared.squares[w][threadIdx.x];
    store_for_others(product.squares + at.tile * TOKENS + threadIdx.x, sum);
  }
}

// The end of a part of a tile, from the tile's beginning or not and to its end or not.
__device__ __forceinline__ void end_part(
    const Chain& chain, const Product& product, const Cut& cut, Sums& sums, Shared& shared, const float* factors, int tile,
    bool from_beginning, bool to_end) {
  const int first = cut.owner(tile * cut.per_tile), last = cut.owner((tile + 1) * cut.per_tile - 1);
  const Share nothing = {GROUPS, GROUPS + 1}, share = {static_cast<int>(blockIdx.x) - first, max(last - first, 1)};
  if (to_end && !from_beginning) {
    sums.store(chain, nothing, true);
    return;
  }
  if (first < last) {
    sums.store(chain, share, false);
    if (share.number >= GROUPS) return;
    sums.gather(chain, share, first, last);
  }
  const Finishing at = {product, tile, share, factors, chain.num_tokens};
  if (product.finish == STORE) {
    finish_store<scalar>(at, sums, shared);
  } else if (product.finish == STORE_FLOAT) {
    finish_store<float>(at, sums, shared);
  } else if (product.finish == SWIGLU) {
    finish_swiglu(at, sums, shared);
  } else if (product.finish == QKV) {
    finish_qkv(at, chain.append, sums, shared);
  } else {
    finish_add(at, sums, shared);
  }
  fence_proxy_async_global();
  named_barrier_sync(CONSUMERS, 32 * CONSUMER_WARPS);
  if (threadIdx.x == 0) red_add_release_gpu(product.done, share.size());
}

__device__ __forceinline__ void release(unsigned long long* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

__device__ __forceinline__ void consume(const Chain& chain, Shared& shared) {
  Turn<STAGES> turn;
  Turn<X_STAGES> x_turn;
  for (int p = 0; p < chain.num_products; p++) {
    const Product& product = chain.products[p];
    const Cut cut(product);
    bool know_factors = false;
    const auto wait_for_factors = [&] {
      if (!know_factors) mbarrier_wait_parity(&shared.factors_full[p % 2], p / 2 % 2);
      know_factors = true;
    };
    Sums sums;
    int start = cut.begin(blockIdx.x) % cut.per_tile, left = cut.begin(blockIdx.x + 1) - cut.begin(blockIdx.x);
    for_each_unit(product, [&](int tile, int k) {
      mbarrier_wait_parity(&shared.weights_full[turn.stage], turn.parity);
      mbarrier_wait_parity(&shared.x_full[x_turn.stage], x_turn.parity);
      sums.add(shared.weights[turn.stage], shared.x[x_turn.stage]);
      release(&shared.weights_empty[turn.stage]);
      release(&shared.x_empty[x_turn.stage]);
      turn.advance();
      x_turn.advance();
      left--;
      if (k + 1 < cut.per_tile && left) return;
      wait_for_factors();
      end_part(chain, product, cut, sums, shared, shared.factors[p % 2], tile, start == 0, k + 1 == cut.per_tile);
      sums = Sums();
      start = 0;
    });
    wait_for_factors();  // whoever has no unit too: a phase left out would be taken for the next
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) weight_stream(const __grid_constant__ Chain chain) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = threadIdx.x / 32;
  griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(&shared.weights_full[i], 1);
      mbarrier_init(&shared.weights_empty[i], CONSUMER_WARPS);
    }
    for (int i = 0; i < X_STAGES; i++) {
      mbarrier_init(&shared.x_full[i], 1);
      mbarrier_init(&shared.x_empty[i], CONSUMER_WARPS);
    }
    for (int i = 0; i < 2; i++) mbarrier_init(&shared.factors_full[i], 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp == CONSUMER_WARPS) {
    if (threadIdx.x % 32 == 0) produce_weights(chain, shared);  // nobody's output: no need to wait for the kernel before
    return;
  }
  griddepcontrol_wait();
  if (warp < CONSUMER_WARPS) {
    consume(chain, shared);
  } else if (warp == CONSUMER_WARPS + 1) {
    if (threadIdx.x % 32 == 0) produce_x(chain, shared);
  } else {
    produce_factors(chain, shared);
  }
}

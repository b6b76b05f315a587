// What becomes of a tile's sums: in phases, by way of shared memory, octet by octet. An octet is a strip's 8 rows of one token.
#pragma once
#include "stream_products.cuh"
#if WIDE
#include "stream_sums_wide.cuh"
#else
#include "stream_sums.cuh"
#endif

constexpr int STAGE_OCTETS = STAGE_STRIPS * TOKENS;
constexpr int ROUNDS = (PHASE_STAGES * STAGE_OCTETS + CONSUMER_THREADS - 1) / CONSUMER_THREADS;  // of a phase, an octet a thread
constexpr int ROW_ROUNDS = (TILE_ROWS + CONSUMER_THREADS - 1) / CONSUMER_THREADS;  // of a tile, a row a thread
constexpr float LOG2_E = 1.44269504f;
constexpr int AT_ONCE = TOKENS < 32 && ROUNDS > 1 ? 2 : 1;  // rounds, as far as registers go

// Strips of a product, side by side.
struct Tile {
  int first, count;
};

struct Octet {
  int strip, token;  // strip of the tile
  int row;           // the first one, of the product
  int column;        // where the phase has it
  bool exists;

  __device__ __forceinline__ Octet(const Chain& chain, const Product& product, const Tile& tile, int phase, int round) {
    const int number = round * CONSUMER_THREADS + thread_here(), stage = number / STAGE_OCTETS;
    strip = (phase * PHASE_STAGES + stage) * STAGE_STRIPS + number % STAGE_STRIPS;
    token = number % STAGE_OCTETS / STAGE_STRIPS;
    row = row_of_strip(product, chain.append, tile.first + strip);
    column = (stage * STAGE_STRIPS + number % STAGE_STRIPS) * STRIP;
    exists = stage < PHASE_STAGES && strip < tile.count && row < product.num_rows && token < chain.num_tokens;
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

// All that the finishing of a product needs.
struct Finishing {
  const Chain& chain;
  const Product& product;
  Shared& shared;
  const float* factors;
  float squares = 0;  // thread `token`: of that token's residual, over the tiles so far

  // What is read from global memory long before it is wanted: of rows of the tile, and of the first octets.
  struct Ahead {
    scalar bias[ROW_ROUNDS], gain[ROW_ROUNDS];
    [[maybe_unused]] unsigned short row_scale[ROW_ROUNDS];
    vec<scalar, 8> residual[AT_ONCE];
  };

  __device__ __forceinline__ void fetch_residual(vec<scalar, 8>& residual, const Octet& octet) const {
    if (!octet.exists) return;
    const scalar* source = place<scalar>(product.out, product.num_rows, octet.row, octet.token);
    residual = load_from_others(reinterpret_cast<const vec<scalar, 8>*>(source));
  }

  __device__ __forceinline__ Ahead fetch(const Tile& tile) const {
    Ahead ahead;
#pragma unroll
    for (int i = 0; i < ROW_ROUNDS; i++) {
      const int of_tile = thread_here() + i * CONSUMER_THREADS;
      const int row = row_of_strip(product, chain.append, tile.first + of_tile / STRIP) + of_tile % STRIP;
      const bool exists = of_tile < tile.count * STRIP && row < product.num_rows;
      ahead.bias[i] = exists && product.bias != nullptr ? product.bias[row] : from_float<scalar>(0);
#if WEIGHT_BITS == 8
      if (exists) ahead.row_scale[i] = static_cast<const unsigned short*>(product.scales)[row];
#endif
      ahead.gain[i] = exists && product.gain != nullptr ? product.gain[row] : from_float<scalar>(0);
    }
    if (product.finish != ADD) return ahead;
    for_each_octet(tile, 0, 0, [&](int i, const Octet& octet) { fetch_residual(ahead.residual[i], octet); });
    return ahead;
  }

  // The product's values of a strip's 8 rows.
  __device__ __forceinline__ vec<float, 8> values(const Turned& turned, int token, int column, int strip) const {
    vec<float, 8> values = load<8>(&turned.at[0][token][column]);
#pragma unroll 4
    for (int part = 1; part < INNER_PARTS; part++) {
      const vec<float, 8> more = load<8>(&turned.at[part][token][column]);
#pragma unroll
      for (int i = 0; i < 8; i++) values.at[i] += more.at[i];
    }
    const vec<scalar, 8> bias = load<8>(&shared.bias[strip * STRIP]);
#if WEIGHT_BITS == 8
    const vec<unsigned short, 8> scale = load<8>(&shared.row_scale[strip * STRIP]);
#pragma unroll
    for (int i = 0; i < 8; i++) values.at[i] *= cvt_f32_f16(scale.at[i]);
#endif
#pragma unroll
    for (int i = 0; i < 8; i++) values.at[i] = values.at[i] * factors[token] + to_float(bias.at[i]);
    return values;
  }

  template <class T>
  __device__ __forceinline__ void store_octet(const Turned& turned, const Octet& octet) const {
    if (!octet.exists) return;
    const vec<float, 8> sums = values(turned, octet.token, octet.column, octet.strip);
    T* target = place<T>(product.out, product.num_rows, octet.row, octet.token);
    if (product.num_rows % 8 == 0) {
      store_rounded<8>(target, sums.at);
    } else {  // a vocabulary may have any size
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (octet.row + i < product.num_rows) store_for_others(target + i, from_float<T>(sums.at[i]));
      }
    }
  }

  // Of two strips the first has the gates, the second what they let through.
  __device__ __forceinline__ void swiglu(const Turned& turned, const Octet& octet) const {
    if (!octet.exists || octet.strip % 2) return;
    vec<float, 8> gate = values(turned, octet.token, octet.column, octet.strip);
    const vec<float, 8> up = values(turned, octet.token, octet.column + STRIP, octet.strip + 1);
#pragma unroll
    for (int i = 0; i < 8; i++) gate.at[i] *= rcp_approx(1.0f + ex2_approx(-LOG2_E * gate.at[i])) * up.at[i];
    store_rounded<8>(place<scalar>(product.out, product.num_rows / 2, octet.row / 2, octet.token), gate.at);
  }

  // What a lane adds to squares[stage of the tile][token].
  __device__ __forceinline__ void add(Turned& turned, const Octet& octet, const vec<scalar, 8>& residual) const {
    const bool normed = product.gain != nullptr;
    float square = 0;
    if (octet.exists) {
      const vec<float, 8> sums = values(turned, octet.token, octet.column, octet.strip);
      const vec<scalar, 8> gain = load<8>(&shared.gain[octet.strip * STRIP]);
      vec<float, 8> scaled;
      vec<scalar, 8> rounded;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        rounded.at[i] = from_float<scalar>(to_float(residual.at[i]) + sums.at[i]);
        const float value = to_float(rounded.at[i]);
        scaled.at[i] = before_norm(value, to_float(gain.at[i]));
        square = fmaf(value, value, square);
      }
      const auto target = [&](void* array) { return place<scalar>(array, product.num_rows, octet.row, octet.token); };
      store_for_others(reinterpret_cast<vec<scalar, 8>*>(target(product.out)), rounded);
      if (normed) store_rounded<8>(target(product.normed), scaled.at);
    }
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    square += __shfl_xor_sync(0xffffffffu, square, 2);
    const int stage = octet.strip / STAGE_STRIPS;
    if (threadIdx.x % STAGE_STRIPS == 0 && stage < TILE_STAGES) turned.squares[stage][octet.token] = square;
  }

  // Queries and keys turn by their token's position, element i of a head's lower half with element i of the upper: two strips of
  // a pair. Queries are stored, keys and values appended to their pages.
  struct Angles {
    vec<float, 8> cosine, sine;
  };
  __device__ __forceinline__ void fetch_angles(Angles& angles, const Octet& octet) const {
    if (!octet.exists || shared.position[octet.token] < 0) return;
    const int head_dim = chain.append.head_dim;
    const float* source = chain.append.rope_table + static_cast<long long>(shared.position[octet.token]) * head_dim;
    source += octet.row % (head_dim / 2);
    angles = {load<8>(source), load<8>(source + head_dim / 2)};
  }
  __device__ __forceinline__ void qkv(const Turned& turned, const Octet& octet, const Angles& angles) const {
    const Append& append = chain.append;
    const int position = octet.exists ? shared.position[octet.token] : -1;
    if (position < 0) return;
    const int head = octet.row / append.head_dim, d = octet.row % append.head_dim, other = octet.strip % 2 ? -1 : 1;
    const bool value_head = head >= append.num_heads + append.num_kv_heads;
    vec<float, 8> sums = values(turned, octet.token, octet.column, octet.strip);
    if (!value_head) {
      const vec<float, 8> others = values(turned, octet.token, octet.column + other * STRIP, octet.strip + other);
#pragma unroll
      for (int i = 0; i < 8; i++) sums.at[i] = sums.at[i] * angles.cosine.at[i] - other * others.at[i] * angles.sine.at[i];
    }
    if (head < append.num_heads) {
      store_rounded<8>(place<scalar>(product.out, append.num_heads * append.head_dim, octet.row, octet.token), sums.at);
      return;
    }
    const int kv_head = (head - append.num_heads) % append.num_kv_heads;
    kv_code* target = (value_head ? append.v_pool : append.k_pool) + d;
    target += slot_offset(shared.block[octet.token], position, kv_head, append.num_blocks, append.block_shift, append.head_dim);
#if defined(KV_FP8)
    const float scale = append.kv_scales[2 * kv_head + value_head];
    vec<kv_code, 8> codes;
#pragma unroll
    for (int i = 0; i < 8; i++) codes.at[i] = cvt_e4m3_satfinite(sums.at[i] / scale);
    store(target, codes);
#else
    store_rounded<8>(target, sums.at);
#endif
  }

  // f(i, octet) for this thread's octets of some rounds.
  template <class F>
  __device__ __forceinline__ void for_each_octet(const Tile& tile, int phase, int round, F f) const {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) f(i, Octet(chain, product, tile, phase, round + i));
  }

  __device__ __forceinline__ void finish(const Sums& sums, const Tile& tile, Ahead& ahead, Turned& turned) {
#pragma unroll
    for (int phase = 0; phase < TILE_STAGES / PHASE_STAGES; phase++) {
      const int first = phase * PHASE_STAGES;
      if (first * STAGE_STRIPS >= tile.count) continue;
      named_barrier_sync(CONSUMERS, CONSUMER_THREADS);  // what was there has been read
#pragma unroll
      for (int stage = 0; stage < PHASE_STAGES; stage++) {
        if ((first + stage) * STAGE_STRIPS < tile.count) sums.turn(first + stage, turned, stage * STAGE_STRIPS * STRIP);
      }
      if (phase == 0) {
#pragma unroll
        for (int i = 0; i < ROW_ROUNDS; i++) {
          const int row = threadIdx.x + i * CONSUMER_THREADS;
          if (row >= TILE_ROWS) continue;
          shared.bias[row] = ahead.bias[i];
          shared.gain[row] = ahead.gain[i];
#if WEIGHT_BITS == 8
          shared.row_scale[row] = ahead.row_scale[i];
#endif
        }
      }
      named_barrier_sync(CONSUMERS, CONSUMER_THREADS);
      const int octets = min(PHASE_STAGES, (tile.count + STAGE_STRIPS - 1) / STAGE_STRIPS - first) * STAGE_OCTETS;
#pragma unroll 1
      for (int round = 0; round * CONSUMER_THREADS < octets; round += AT_ONCE) {
        finish_octets(turned, tile, phase, round, ahead);
      }
    }
    if (product.finish != ADD) return;
    named_barrier_sync(CONSUMERS, CONSUMER_THREADS);
    if (threadIdx.x >= TOKENS) return;
    for (int stage = 0; stage * STAGE_STRIPS < tile.count; stage++) squares += turned.squares[stage][threadIdx.x];
  }

  __device__ __forceinline__ void finish_octets(Turned& turned, const Tile& tile, int phase, int round, Ahead& ahead) const {
    if (product.finish == STORE) {
      for_each_octet(tile, phase, round, [&](int, const Octet& octet) { store_octet<scalar>(turned, octet); });
    } else if (product.finish == STORE_FLOAT) {
      for_each_octet(tile, phase, round, [&](int, const Octet& octet) { store_octet<float>(turned, octet); });
    } else if (product.finish == SWIGLU) {
      for_each_octet(tile, phase, round, [&](int, const Octet& octet) { swiglu(turned, octet); });
    } else if (product.finish == ADD) {
      if (phase || round) for_each_octet(tile, phase, round, [&](int i, const Octet& octet) { fetch_residual(ahead.residual[i], octet); });
      for_each_octet(tile, phase, round, [&](int i, const Octet& octet) { add(turned, octet, ahead.residual[i]); });
    } else {
      Angles angles[AT_ONCE];
      if (AT_ONCE > 1) for_each_octet(tile, phase, round, [&](int i, const Octet& octet) { fetch_angles(angles[i], octet); });
      for_each_octet(tile, phase, round, [&](int i, const Octet& octet) {
        if (AT_ONCE == 1) fetch_angles(angles[i], octet);
        qkv(turned, octet, angles[i]);
      });
    }
  }

  // After the last tile of a CTA that has any.
  __device__ __forceinline__ void publish() const {
    if (product.finish == ADD && product.gain != nullptr && threadIdx.x < TOKENS) {
      store_for_others(product.squares + blockIdx.x * TOKENS + threadIdx.x, squares);
    }
    fence_proxy_async_global();
    named_barrier_sync(CONSUMERS, CONSUMER_THREADS);
    if (threadIdx.x == 0) red_add_release_gpu(product.done, 1);
  }
};

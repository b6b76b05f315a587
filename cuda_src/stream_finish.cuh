// What becomes of a tile's sums: of every group of 8 tokens a lane finishes 8 rows of one.
#pragma once
#include "stream_sums.cuh"

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
    const Product& product, const Sums& sums, Shared& shared, const float* factors, int tile, int num_tokens) {
  sums.for_each_eight(product, shared, factors, tile, [&](int, int row, int token, const vec<float, 8>& values) {
    if (row >= product.num_rows || token >= num_tokens) return;
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
    const Product& product, const Sums& sums, Shared& shared, const float* factors, int tile, int num_tokens) {
  sums.for_each_eight(product, shared, factors, tile, [&](int, int row, int token, vec<float, 8> gate) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float up = __shfl_down_sync(0xffffffffu, gate.at[i], 1);
      gate.at[i] = gate.at[i] / (1.0f + expf(-gate.at[i])) * up;
    }
    if (row % 16 || row >= product.num_rows || token >= num_tokens) return;
    store_rounded<8>(place<scalar>(product.out, product.num_rows / 2, row / 2, token), gate.at);
  });
}

// Queries and keys turn by their token's position, element i of a head's lower half with element i of the upper: what another
// warp has summed. Queries are stored, keys and values appended to their pages.
__device__ __forceinline__ void finish_qkv(
    const Product& product, const Append& append, const Sums& sums, Shared& shared, const float* factors, int tile, int num_tokens) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, half = append.head_dim / 2;
  const int row = tile * TILE + warp * WARP_ROWS + lane % 4 * 8, head = row / append.head_dim, d = row % append.head_dim;
  const bool lower = d < half, value_head = head >= append.num_heads + append.num_kv_heads;
  const int other_row = lower ? row + half : row - half, other_warp = other_row % TILE / WARP_ROWS;
  const Bias bias(product, row), other_bias(product, other_row);
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    __syncwarp();
    named_barrier_sync(CONSUMERS, 32 * CONSUMER_WARPS);
    sums.turn(shared, j);
    named_barrier_sync(CONSUMERS, 32 * CONSUMER_WARPS);
    const int token = 8 * j + lane / 4;
    const int position = token < num_tokens ? append.seq_lens[token] - 1 : -1;
    if (row >= product.num_rows || position < 0) continue;
    vec<float, 8> values = load<8>(&shared.turned[warp][lane / 4][lane % 4 * 8]);
    bias.add(values, factors[token]);
    if (!value_head) {
      vec<float, 8> others = load<8>(&shared.turned[other_warp][lane / 4][lane % 4 * 8]);
      other_bias.add(others, factors[token]);
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

// What of the residual a lane adds to, by group of tokens.
struct Residual {
  vec<scalar, 8> at[GROUPS];

  __device__ __forceinline__ void fetch(const Product& product, int tile, int num_tokens) {
    const int lane = threadIdx.x % 32, row = tile * TILE + threadIdx.x / 32 * WARP_ROWS + lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const int token = 8 * j + lane / 4;
      if (row >= product.num_rows || token >= num_tokens) continue;
      at[j] = load_from_others(reinterpret_cast<vec<scalar, 8>*>(place<scalar>(product.out, product.num_rows, row, token)));
    }
  }
};

__device__ __forceinline__ void finish_add(
    const Product& product, const Sums& sums, Shared& shared, const float* factors, int tile, int num_tokens,
    const Residual& residual) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  vec<scalar, 8> gain = {};
  const bool normed = product.gain != nullptr;
  const int first_row = tile * TILE + warp * WARP_ROWS + lane % 4 * 8;
  if (normed && first_row < product.num_rows) gain = load<8>(product.gain + first_row);
  sums.for_each_eight(product, shared, factors, tile, [&](int j, int row, int token, const vec<float, 8>& values) {
    float squares = 0;
    if (row < product.num_rows && token < num_tokens) {
      vec<scalar, 8> sum, scaled;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sum.at[i] = from_float<scalar>(to_float(residual.at[j].at[i]) + values.at[i]);
        const float value = to_float(sum.at[i]);
        scaled.at[i] = before_norm(value, gain.at[i]);
        squares = fmaf(value, value, squares);
      }
      store_for_others(reinterpret_cast<vec<scalar, 8>*>(place<scalar>(product.out, product.num_rows, row, token)), sum);
      if (normed) store_for_others(reinterpret_cast<vec<scalar, 8>*>(place<scalar>(product.normed, product.num_rows, row, token)), scaled);
    }
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    if (lane % 4 == 0) shared.squares[warp][token] = squares;
  });
  named_barrier_sync(CONSUMERS, 32 * CONSUMER_WARPS);
  if (normed && threadIdx.x < TOKENS) {
    float sum = 0;
    for (int w = 0; w < CONSUMER_WARPS; w++) sum += shared.squares[w][threadIdx.x];
    store_for_others(product.squares + tile * TOKENS + threadIdx.x, sum);
  }
}

// A tile of which this CTA has the first `count` units, and others the rest.
__device__ __forceinline__ void finish(
    const Chain& chain, const Product& product, Sums& sums, Shared& shared, const float* factors, int tile, int count) {
  Residual residual;
  if (product.finish == ADD) residual.fetch(product, tile, chain.num_tokens);
  const Cut cut(product);
  if (count < cut.per_tile) {
    const int last = cut.owner((tile + 1) * cut.per_tile - 1);
    sums.add_parts(chain, blockIdx.x + 1, last);
  }
  if (product.finish == STORE) {
    finish_store<scalar>(product, sums, shared, factors, tile, chain.num_tokens);
  } else if (product.finish == STORE_FLOAT) {
    finish_store<float>(product, sums, shared, factors, tile, chain.num_tokens);
  } else if (product.finish == SWIGLU) {
    finish_swiglu(product, sums, shared, factors, tile, chain.num_tokens);
  } else if (product.finish == QKV) {
    finish_qkv(product, chain.append, sums, shared, factors, tile, chain.num_tokens);
  } else {
    finish_add(product, sums, shared, factors, tile, chain.num_tokens, residual);
  }
  fence_proxy_async_global();
  named_barrier_sync(CONSUMERS, 32 * CONSUMER_WARPS);
  if (threadIdx.x == 0) red_add_release_gpu(product.done, 1);
}

// Products with up to 64 rows, one after another, as one stream of weight bytes: the matrices between two attentions of a layer.
//
//   out_p [tokens, num_rows] = finish_p(x_p [tokens, inner] times weights_p [num_rows, inner] transposed),  x_p+1 from out_p
//
//   the cut          every CTA has rows of its own, as many as the others, in strips of 8, and all of the inner dimension: its
//                    sums are whole, and it finishes them. It goes through x slice by slice, once for up to 24 strips.
//
//   a warp           strips of a slice --- tensor copies ---> | 16 KB | 16 KB | ... |--+
//                    does not know what a product is: while the other                  |   the others: few tokens, or codes, by
//                    warps wait at a join, the next weights land                       +-> mma.sync (stream_sums.cuh), else by
//   a warp           waits for the product before,                                     |   wgmma (stream_sums_wide.cuh)
//                    x ------- tensor copies -----> | slice | slice | ... | -----------+     (of a cluster each CTA a part, to all)
//   a warp           1 / rms of each token --------------------------------------------+
//
// What the ring gathers while a product is waited for is an advantage only as far as the consumers are faster than memory is.
//
// A product waits for the one before it by a count of CTAs, which whoever starts the step has set to zero; all CTAs are resident,
// one an SM. A token's result does not depend on the others of a launch, nor on their number as long as the kernel is the same. A
// wait that lasts too long raises a flag and goes on with what is there, so that nothing hangs.
//
// Between products, what counts is the way from one CTA to another and back, some eight times as long when memory is asked for
// all that the ring could hold: hence MOST_UNDER_WAY, just enough for its full speed.
//
// Norms: a product that adds to the residual writes it, it times the gain of the norm that comes next, and sums of squares. The
// next product takes the second and multiplies its result by 1 / rms, which is known only once all rows have been written.
//
// Variants: DTYPE_BF16 | DTYPE_F16; TOKENS 8 | 16 | 32 | 64, the rows of x; WEIGHT_INT8, WEIGHT_FP8, WEIGHT_INT4 for weights that are
// such codes; STAGES, X_STAGES; CLUSTER, if not 1; KV_FP8 where pools hold such codes.
#include "stream_finish.cuh"

__device__ __forceinline__ void produce_weights(const Chain& chain, Shared& shared) {
  const unsigned long long once = createpolicy_evict_first();
  Turn<STAGES> turn, landing;
  int under_way = 0;
  const auto fetch = [&](const Product& product, int first_strip, int count, int slice) {
    if (under_way == MOST_UNDER_WAY) {
      mbarrier_wait_parity(&shared.weights_full[landing.stage], landing.parity);
      landing.advance();
      under_way--;
    }
    under_way++;
    mbarrier_wait_parity(&shared.weights_empty[turn.stage], turn.parity ^ 1);
    unsigned long long* full = &shared.weights_full[turn.stage];
    const int groups = min(GROUPS, product.inner / GROUP - slice * GROUPS);
    const unsigned of_scales = WEIGHT_BITS == 4 ? groups * STRIP * sizeof(unsigned) : 0;
    mbarrier_arrive_expect_tx(full, count * (sizeof(Stage) / STAGE_STRIPS + of_scales));
    for (int i = 0; i < count; i++) {
      const int row = row_of_strip(product, chain.append, first_strip + i);
      tensor_copy_3d_hint(&shared.weights[turn.stage].strips[i], &product.weights, 0, row, slice * WEIGHT_BLOCKS, full, once);
#if WEIGHT_BITS == 4
      const unsigned* scales = static_cast<const unsigned*>(product.scales);
      scales += (static_cast<long long>(row) / STRIP * (product.inner / GROUP) + slice * GROUPS) * STRIP;
      bulk_copy(&shared.scales[turn.stage].at[i], scales, of_scales, full);
#endif
    }
    turn.advance();
  };
  for (int p = 0; p < chain.num_products; p++) {
    const Product& product = chain.products[p];
    for_each_tile(product, [&](int first, int count) {
      for_each_slice(product, [&](int slice) {
        for (int i = 0; i < count; i += STAGE_STRIPS) fetch(product, first + i, min(STAGE_STRIPS, count - i), slice);
      });
    });
  }
}

__device__ __forceinline__ void produce_x(const Chain& chain, Shared& shared) {
  Turn<X_STAGES> turn;
  for (int p = 0; p < chain.num_products; p++) {
    const Product& product = chain.products[p];
    if (p) wait_for(chain.products[p - 1], chain.flag);
    mbarrier_arrive(&shared.x_made[p]);
    fence_proxy_async_global();
    for_each_tile(product, [&](int, int) {
      for_each_slice(product, [&](int slice) {
        mbarrier_wait_parity(&shared.x_empty[turn.stage], turn.parity ^ 1);
        unsigned long long* full = &shared.x_full[turn.stage];
        mbarrier_arrive_expect_tx(full, sizeof(XSlice));
        XSlice& x = shared.x[turn.stage];
        if constexpr (CLUSTER == 1) {
          tensor_copy_3d(&x, &product.x, 0, 0, slice * X_BLOCKS, full);
        } else {  // each CTA brings a part to all
          const int first = cluster_ctarank() * (X_BLOCKS / CLUSTER);
          tensor_copy_3d_multicast(&x.at[first], &product.x, 0, 0, slice * X_BLOCKS + first, full, (1 << CLUSTER) - 1);
        }
        turn.advance();
      });
    });
  }
}

// Of each token, in the order that all numbers of tokens have: four tokens a lane, every other part a half of the warp.
__device__ __forceinline__ void store_factors(const Product& product, float (&factors)[TOKENS]) {
  const int half = threadIdx.x % 32 / 16, token = threadIdx.x % 16 * 4;
  vec<float, 4> sum = {};
  if (token < TOKENS && product.x_squares != nullptr) {
#pragma unroll 8
    for (int part = half; part < product.x_parts; part += 2) {
      const vec<float, 4> squares = load_from_others(reinterpret_cast<const vec<float, 4>*>(product.x_squares + part * TOKENS + token));
#pragma unroll
      for (int i = 0; i < 4; i++) sum.at[i] += squares.at[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum.at[i] += __shfl_xor_sync(0xffffffffu, sum.at[i], 16);
    if (half || token >= TOKENS) continue;
    factors[token + i] = product.x_squares == nullptr ? 1 : after_norm(sum.at[i], product.inner, product.eps);
  }
}

// A whole warp's work.
__device__ __forceinline__ void produce_factors(const Chain& chain, Shared& shared) {
  const int lane = threadIdx.x % 32;
  const Append& append = chain.append;
  if (append.seq_lens != nullptr) {
    for (int token = lane; token < TOKENS; token += 32) {
      const int position = token < chain.num_tokens ? append.seq_lens[token] - 1 : -1;
      shared.position[token] = position;
      if (position >= 0) shared.block[token] = append.page_indices[append.page_indptr[token] + (position >> append.block_shift)];
    }
  }
  for (int p = 0; p < chain.num_products; p++) {
    mbarrier_wait_parity(&shared.x_made[p], 0);
    store_factors(chain.products[p], shared.factors[p]);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.factors_full[p]);
  }
}

__device__ __forceinline__ void release(unsigned long long* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

__device__ __forceinline__ void release_in_cluster(unsigned long long* empty) {
  if constexpr (CLUSTER == 1) {
    release(empty);
  } else {
    __syncwarp();
    if (threadIdx.x % 32 < CLUSTER) mbarrier_arrive_cluster(empty, threadIdx.x % 32);
  }
}

__device__ __forceinline__ void consume(const Chain& chain, Shared& shared) {
  Turn<STAGES> turn;
  Turn<X_STAGES> x_turn;
  for (int p = 0; p < chain.num_products; p++) {
    const Product& product = chain.products[p];
    Finishing finishing{chain, product, shared, shared.factors[p]};
    bool any = false;
    for_each_tile(product, [&](int first, int count) {
      const Tile tile{first, count};
      mbarrier_wait_parity(&shared.x_full[x_turn.stage], x_turn.parity);  // all that came before is there
      Finishing::Ahead ahead = finishing.fetch(tile);
      Sums sums;
      for (int left = num_slices(product); left > 0; left--) {
        mbarrier_wait_parity(&shared.x_full[x_turn.stage], x_turn.parity);
        XSlice& x = shared.x[x_turn.stage];
        sums.take(x);
#pragma unroll
        for (int stage = 0; stage < TILE_STAGES; stage++) {
          if (stage * STAGE_STRIPS >= count) continue;
          if (Sums::has(stage)) {
            mbarrier_wait_parity(&shared.weights_full[turn.stage], turn.parity);
            sums.add(stage, shared, turn.stage, count - stage * STAGE_STRIPS, x);
            release(&shared.weights_empty[turn.stage]);
          }
          turn.advance();
        }
        if (left == 1 && count) {
          mbarrier_wait_parity(&shared.factors_full[p], 0);
#if !WIDE && TOKENS < 64
          finishing.finish(sums, tile, ahead, shared.turned);
#else
          static_assert(sizeof(Turned) <= sizeof(XSlice));
          finishing.finish(sums, tile, ahead, reinterpret_cast<Turned&>(x));  // nobody needs the slice any more
          fence_proxy_async_shared();
#endif
        }
        release_in_cluster(&shared.x_empty[x_turn.stage]);
        x_turn.advance();
      }
      any |= count > 0;
    });
    if (any) finishing.publish();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) weight_stream(const __grid_constant__ Chain chain) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = threadIdx.x / 32;
  griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(&shared.weights_full[i], 1);
      mbarrier_init(&shared.weights_empty[i], CONSUMER_WARPS / WARPGROUPS);
    }
    for (int i = 0; i < X_STAGES; i++) {
      mbarrier_init(&shared.x_full[i], 1);
      mbarrier_init(&shared.x_empty[i], CLUSTER * CONSUMER_WARPS);
    }
    for (int i = 0; i < MOST_PRODUCTS; i++) {
      mbarrier_init(&shared.x_made[i], 1);
      mbarrier_init(&shared.factors_full[i], 1);
    }
    fence_mbarrier_init();
  }
#if WEIGHT_BITS == 4
  // Behind the end of a matrix codes are 0 and so is x, and scales are what was there before: no NaN.
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.scales) / 16); i += THREADS) {
    reinterpret_cast<uint4*>(shared.scales)[i] = {};
  }
  fence_proxy_async_shared();
#endif
  if (CLUSTER > 1) barrier_cluster_sync();
  __syncthreads();
  if (warp == CONSUMER_WARPS) {
    if (threadIdx.x % 32 == 0) produce_weights(chain, shared);  // nobody's output: no need to wait for the kernel before
  } else {
    griddepcontrol_wait();
    if (warp < CONSUMER_WARPS) {
      consume(chain, shared);
    } else if (warp == CONSUMER_WARPS + 1) {
      if (threadIdx.x % 32 == 0) produce_x(chain, shared);
    } else {
      produce_factors(chain, shared);
    }
  }
  __syncwarp();
  if (CLUSTER > 1) barrier_cluster_sync();  // until nobody brings anything any more
}

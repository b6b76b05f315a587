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
//   a tile's end     the CTA that has its beginning finishes it. It comes to it last of all, as do those that have the middle; it
//                    waits for their sums, which lie where UNWRITTEN lay, adds them in their order, and puts UNWRITTEN back.
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
#include "stream_finish.cuh"

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
      shared.factors[p][token] = factor;
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.factors_full[p]);
  }
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
      if (start == 0) {
        mbarrier_wait_parity(&shared.factors_full[p], 0);
        finish(chain, product, sums, shared, shared.factors[p], tile, k + 1);
      } else {
        sums.store(chain);
      }
      sums = Sums();
      start = 0;
    });
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
    for (int i = 0; i < MOST_PRODUCTS; i++) mbarrier_init(&shared.factors_full[i], 1);
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

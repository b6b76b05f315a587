// The first residual of a step whose products are weight_stream.cu's, and what its first norm needs: one token per CTA.
//
//   row of the table: | 8 | 8 | 8 | ... |   thread t takes pieces t, t + blockDim.x, ...
#include "dtypes.cuh"
#include "reduce.cuh"
#include "stream_norm.cuh"

// table [vocab, width], token_ids [gridDim.x]; residual, normed [gridDim.x, width] and squares [gridDim.x] are as a product that
// adds leaves them; width is a multiple of 8. done [num_products] becomes zero. Shared memory for one float per warp.
extern "C" __global__ void __launch_bounds__(256) stream_start(
    const int* token_ids, const scalar* table, const scalar* gain, scalar* residual, scalar* normed, float* squares, unsigned* done,
    int width, int num_products) {
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < num_products; i += blockDim.x) done[i] = 0;
  }
  table += static_cast<long long>(token_ids[blockIdx.x]) * width;
  residual += static_cast<long long>(blockIdx.x) * width;
  normed += static_cast<long long>(blockIdx.x) * width;
  float sum = 0;
  for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
    const vec<scalar, 8> piece = load<8>(table + i), factor = load<8>(gain + i);
    vec<scalar, 8> scaled;
    for (int j = 0; j < 8; j++) {
      const float value = to_float(piece.at[j]);
      scaled.at[j] = from_float<scalar>(before_norm(value, to_float(factor.at[j])));
      sum = fmaf(value, value, sum);
    }
    store<8>(residual + i, piece);
    store<8>(normed + i, scaled);
  }
  sum = block_reduce(sum, reinterpret_cast<float*>(shared_memory()), [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

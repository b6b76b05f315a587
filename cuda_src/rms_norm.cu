// out = x / sqrt(mean(x^2) + eps) * weight: one row per CTA, arithmetic in float32, rounded once.
//
//   row: | 8 | 8 | 8 | ... |   thread t takes the 16-byte pieces t, t + blockDim.x, ...: once for the sum of squares, then
//                              again (from the cache) for the result; one by one where the width is no multiple of 8
#include "dtypes.cuh"
#include "reduce.cuh"

template <int N>
__device__ __forceinline__ void normalise(const scalar* x, const scalar* weight, scalar* out, int width, float eps) {
  float sum = 0;
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    const vec<scalar, N> piece = load<N>(x + i);
    for (int j = 0; j < N; j++) sum = fmaf(to_float(piece.at[j]), to_float(piece.at[j]), sum);
  }
  sum = block_reduce(sum, reinterpret_cast<float*>(shared_memory()), [](float a, float b) { return a + b; });
  const float factor = 1.0f / sqrtf(sum / width + eps);
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    vec<scalar, N> piece = load<N>(x + i);
    const vec<scalar, N> gain = load<N>(weight + i);
    for (int j = 0; j < N; j++) piece.at[j] = from_float<scalar>(to_float(piece.at[j]) * factor * to_float(gain.at[j]));
    store<N>(out + i, piece);
  }
}

// x, out [gridDim.x, width], weight [width]; shared memory for one float per warp.
extern "C" __global__ void __launch_bounds__(256)
    rms_norm(const scalar* x, const scalar* weight, scalar* out, int width, float eps) {
  x += static_cast<long long>(blockIdx.x) * width;
  out += static_cast<long long>(blockIdx.x) * width;
  if (width % 8 == 0 && aligned_to_16(x) && aligned_to_16(weight) && aligned_to_16(out)) {
    normalise<8>(x, weight, out, width, eps);
  } else {
    normalise<1>(x, weight, out, width, eps);
  }
}

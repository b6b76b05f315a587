// out[i] = f(x[i], y[i]) for add and swiglu, and the addition of a bias to the rows of a matrix.
//
//   | 8 | 8 | 8 | ... |   one 16-byte piece per thread, the grid over all; elements one by one where 8 do not divide them
#include "dtypes.cuh"

template <int N, class F>
__device__ __forceinline__ void map_pieces(const scalar* x, const scalar* y, scalar* out, long long size, F f) {
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x * N;
  for (long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < size; i += step) {
    vec<scalar, N> a = load<N>(x + i);
    const vec<scalar, N> b = load<N>(y + i);
    for (int j = 0; j < N; j++) a.at[j] = from_float<scalar>(f(to_float(a.at[j]), to_float(b.at[j])));
    store<N>(out + i, a);
  }
}

template <class F>
__device__ __forceinline__ void map(const scalar* x, const scalar* y, scalar* out, long long size, F f) {
  if (size % 8 == 0 && aligned_to_16(x) && aligned_to_16(y) && aligned_to_16(out)) {
    map_pieces<8>(x, y, out, size, f);
  } else {
    map_pieces<1>(x, y, out, size, f);
  }
}

extern "C" __global__ void __launch_bounds__(256) add(const scalar* x, const scalar* y, scalar* out, long long size) {
  map(x, y, out, size, [](float a, float b) { return a + b; });
}

// silu(gate) * up; exp(-gate) may be inf: the quotient is then 0, as it should be
extern "C" __global__ void __launch_bounds__(256) swiglu(const scalar* gate, const scalar* up, scalar* out, long long size) {
  map(gate, up, out, size, [](float g, float u) { return g / (1.0f + expf(-g)) * u; });
}

// out[row] += bias, one row of `width` elements per CTA
template <class T>
__device__ __forceinline__ void add_to_row(T* out, const scalar* bias, int width) {
  out += static_cast<long long>(blockIdx.x) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) out[i] = from_float<T>(to_float(out[i]) + to_float(bias[i]));
}

extern "C" __global__ void __launch_bounds__(256) add_bias(scalar* out, const scalar* bias, int width) {
  add_to_row(out, bias, width);
}

extern "C" __global__ void __launch_bounds__(256) add_bias_float32(float* out, const scalar* bias, int width) {
  add_to_row(out, bias, width);
}

// out = silu(gate) * up, gate and up lying in groups of 8 by turns, and the addition of a bias to the rows of a matrix.
//
//   | gate 8 | up 8 | gate 8 | up 8 | ... |      a thread reads two 16-byte pieces and writes one, the grid over all;
//   |     out 8     |     out 8     | ... |      elements one by one where 8 do not divide a row
#include "dtypes.cuh"

// silu(gate) * up; exp(-gate) may be inf: the quotient is then 0, as it should be
__device__ __forceinline__ scalar swiglu_of(scalar gate, scalar up) {
  const float x = to_float(gate);
  return from_float<scalar>(x / (1.0f + expf(-x)) * to_float(up));
}

// both [rows, 2 * width], out [rows, width], of `size` elements; the last group of a row may be of fewer than 8.
extern "C" __global__ void __launch_bounds__(256) swiglu(const scalar* both, scalar* out, long long size, int width) {
  const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  if (width % 8 == 0 && aligned_to_16(both) && aligned_to_16(out)) {
    for (long long i = first * 8; i < size; i += step * 8) {
      vec<scalar, 8> gate = load<8>(both + 2 * i);
      const vec<scalar, 8> up = load<8>(both + 2 * i + 8);
      for (int j = 0; j < 8; j++) gate.at[j] = swiglu_of(gate.at[j], up.at[j]);
      store<8>(out + i, gate);
    }
  } else {
    for (long long i = first; i < size; i += step) {
      const int column = static_cast<int>(i % width), in_group = column % 8;
      const int group = min(8, width - (column - in_group));
      const scalar* gate = both + 2 * (i - in_group) + in_group;
      store<1>(out + i, {swiglu_of(gate[0], gate[group])});
    }
  }
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

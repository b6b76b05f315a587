// Attention over two sets of keys, joined row by row (Milakov and Gimelshein 2018, section 3.1); 16 bytes of a row a thread.
//
// Variants: DTYPE_BF16 | DTYPE_F16 | DTYPE_F32.
#ifdef DTYPE_F32
#define DTYPE_F16
#endif
#include "dtypes.cuh"

#ifdef DTYPE_F32
using element = float;
#else
using element = scalar;
#endif
constexpr int N = 16 / sizeof(element);
constexpr float LOG2_E = 1.44269504f, LOG_2 = 0.693147181f;

// out_* [num_rows, head_dim], head_dim a multiple of N; lse_* [num_rows], natural. A part whose lse is -inf counts for nothing,
// whatever its out holds; a row without any keys gets 0 and -inf. `out` may be that of a part; lse may not: a row's threads
// read what one of them writes.
extern "C" __global__ void __launch_bounds__(256) merge_states(
    const element* out_a, const float* lse_a, const element* out_b, const float* lse_b, element* out, float* lse,
    long long num_rows, int head_dim) {
  const int pieces = head_dim / N;
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x, row = i / pieces;
  const int d = static_cast<int>(i % pieces) * N;
  if (row >= num_rows) return;
  const float a = lse_a[row], b = lse_b[row];
  const vec<element, N> part_a = load<N>(out_a + row * head_dim + d), part_b = load<N>(out_b + row * head_dim + d);
  const float top = fmaxf(a, b);
  const bool any = top > __int_as_float(0xff800000);
  const float weight_a = any ? ex2_approx((a - top) * LOG2_E) : 0.0f, weight_b = any ? ex2_approx((b - top) * LOG2_E) : 0.0f;
  const float sum = weight_a + weight_b, share_a = any ? weight_a / sum : 0.0f, share_b = any ? weight_b / sum : 0.0f;
  vec<element, N> merged;
#pragma unroll
  for (int e = 0; e < N; e++) {
    const float from_a = share_a == 0 ? 0.0f : share_a * to_float(part_a.at[e]);  // 0 * NaN would be NaN
    const float from_b = share_b == 0 ? 0.0f : share_b * to_float(part_b.at[e]);
    merged.at[e] = from_float<element>(from_a + from_b);
  }
  store(out + row * head_dim + d, merged);
  if (d == 0) lse[row] = any ? top + log2f(sum) * LOG_2 : top;
}

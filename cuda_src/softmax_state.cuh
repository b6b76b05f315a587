// Attention over a part of a row's keys, and how parts are put together (Milakov and Gimelshein 2018, section 3.1), in base 2.
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// N elements of a row of the output. `top` is the largest score in units of log 2, or another near it, -inf where there are no
// keys; with weights 2^(score - top), `sum` is their sum and `out` the sum of the weighted values.
template <int N>
struct SoftmaxState {
  float top = minus_infinity(), sum = 0, out[N] = {};

  __device__ __forceinline__ void merge(float other_top, float other_sum, const float (&other_out)[N]) {
    const float new_top = fmaxf(top, other_top);
    const float base = new_top == minus_infinity() ? 0.0f : new_top;  // -inf - -inf is NaN
    const float kept = ex2_approx(top - base), added = ex2_approx(other_top - base);
    top = new_top;
    sum = sum * kept + other_sum * added;
    for (int i = 0; i < N; i++) out[i] = out[i] * kept + other_out[i] * added;
  }

  // 1 / sum; 0 where there are no keys, and `out` is 0 too
  __device__ __forceinline__ float normaliser() const { return sum == 0 ? 0.0f : rcp_approx(sum); }

  // Log-sum-exp of the scores, in units of log 2.
  __device__ __forceinline__ float lse() const { return sum == 0 ? minus_infinity() : top + log2f(sum); }
};

// Weights [num_rows, inner] to codes (WEIGHT_INT8, WEIGHT_FP8, WEIGHT_INT4) and back. cupaged/ops/quantized.py says what codes and
// scales mean; here is how they lie, such that one 32-bit word of a row holds what thread t of a quad multiplies by mma.m16n8k16:
//
//   8 bits   codes [num_rows, inner], of every 16 k:            | t = 0 | t = 1 | t = 2 | t = 3 |      scales [num_rows]
//            a word t, of four k:   2 t | 2 t + 8 | 2 t + 1 | 2 t + 9      (the first one in the lowest bits)
//   4 bits   codes [num_rows, inner / 2], of every 32 k the same four words; a word t, of eight k:
//            2 t | 2 t + 8 | 2 t + 16 | 2 t + 24 | 2 t + 1 | 2 t + 9 | 2 t + 17 | 2 t + 25
//            {scale, zero} [ceil(num_rows / 128) * 16, inner / group, 8]: strips of 8 rows, in them by group; zeros for no row
//
// A thread takes what fills 16 bytes of codes. To 8 bits: a CTA a row, which is read twice, the second time from the cache. To 4
// bits: neighbouring threads that share a group find its extremes by shuffles.
#include "dtypes.cuh"
#include "reduce.cuh"

#if defined(WEIGHT_INT4)
constexpr int PIECE = 32, TILE = 128, STRIP = 8;
struct alignas(4) scale_type {
  unsigned short scale, zero;
};
using code_type = unsigned char;
#else
constexpr int PIECE = 16;
struct scale_type {
  unsigned short bits;
};
#if defined(WEIGHT_INT8)
using code_type = signed char;
constexpr float LARGEST = 127;
#else
using code_type = unsigned char;
constexpr float LARGEST = 448;
#endif
#endif

// What to divide by: where a scale is 0, all that it divides is 0.
__device__ __forceinline__ float divisor_of(unsigned short scale) {
  const float x = cvt_f32_f16(scale);
  return x == 0 ? 1.0f : x;
}

#if defined(WEIGHT_INT4)
__device__ __forceinline__ constexpr int k_of(int word, int nibble) {
  return 8 * (nibble % 4) + 2 * word + nibble / 4;
}

__device__ __forceinline__ long long scale_of(long long row, int k, int inner, int group) {
  return (row / STRIP * (inner / group) + k / group) * STRIP + row % STRIP;
}

// A thread a piece, of as many rows as whole tiles have: gridDim.x is tiles times pieces of a row.
extern "C" __global__ void __launch_bounds__(TILE)
    quantize(const scalar* matrix, code_type* codes, scale_type* scales, int num_rows, int inner, int group) {
  const long long item = static_cast<long long>(blockIdx.x) * TILE + threadIdx.x;
  const long long row = item / (inner / PIECE);
  const int k = static_cast<int>(item % (inner / PIECE)) * PIECE;
  vec<scalar, PIECE> weights = {};
  if (row < num_rows) weights = load<PIECE>(matrix + row * inner + k);
  float least = to_float(weights.at[0]), largest = least;
#pragma unroll
  for (int i = 1; i < PIECE; i++) {
    least = fminf(least, to_float(weights.at[i]));
    largest = fmaxf(largest, to_float(weights.at[i]));
  }
  for (int distance = group / PIECE / 2; distance > 0; distance /= 2) {
    least = fminf(least, __shfl_xor_sync(0xffffffffu, least, distance));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  least = fminf(fmaxf(least, -65504.0f), 65504.0f) + 0.0f;  // + 0: no -0, which fminf may take for it or not
  const unsigned short zero = cvt_rp_f16(-least) ^ 0x8000;
  const float from = cvt_f32_f16(zero);
  const unsigned short scale = cvt_rp_f16(fminf((largest - from) / 15.0f, 65504.0f) + 0.0f);
  if (k % group == 0) scales[scale_of(row, k, inner, group)] = {scale, zero};
  if (row >= num_rows) return;

  const float divisor = divisor_of(scale);
  vec<unsigned, 4> words = {};
#pragma unroll
  for (int word = 0; word < 4; word++) {
#pragma unroll
    for (int nibble = 0; nibble < 8; nibble++) {
      const float code = rintf((to_float(weights.at[k_of(word, nibble)]) - from) / divisor);
      words.at[word] |= static_cast<unsigned>(fminf(fmaxf(code, 0.0f), 15.0f)) << 4 * nibble;
    }
  }
  store<4>(reinterpret_cast<unsigned*>(codes + (row * inner + k) / 2), words);
}

#else
__device__ __forceinline__ constexpr int k_of(int place) {
  return place / 4 * 2 + 8 * (place % 2) + place % 4 / 2;
}

__device__ __forceinline__ code_type encode(float x) {
#if defined(WEIGHT_INT8)
  return static_cast<code_type>(fminf(fmaxf(rintf(x), -LARGEST), LARGEST));
#else
  return cvt_e4m3_satfinite(x);
#endif
}

// Shared memory for one float per warp.
extern "C" __global__ void __launch_bounds__(256)
    quantize(const scalar* matrix, code_type* codes, scale_type* scales, int num_rows, int inner, int group) {
  const long long start = static_cast<long long>(blockIdx.x) * inner;
  float largest = 0;
  for (int k = threadIdx.x * PIECE; k < inner; k += blockDim.x * PIECE) {
    const vec<scalar, PIECE> weights = load<PIECE>(matrix + start + k);
    for (int i = 0; i < PIECE; i++) largest = fmaxf(largest, fabsf(to_float(weights.at[i])));
  }
  largest = block_reduce(largest, reinterpret_cast<float*>(shared_memory()), [](float a, float b) { return fmaxf(a, b); });
  const scale_type scale = {cvt_rp_f16(fminf(largest / LARGEST, 65504.0f))};
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  const float divisor = divisor_of(scale.bits);
  for (int k = threadIdx.x * PIECE; k < inner; k += blockDim.x * PIECE) {
    const vec<scalar, PIECE> weights = load<PIECE>(matrix + start + k);
    vec<code_type, PIECE> piece;
#pragma unroll
    for (int i = 0; i < PIECE; i++) piece.at[i] = encode(to_float(weights.at[k_of(i)]) / divisor);
    store<PIECE>(codes + start + k, piece);
  }
}
#endif

// out [num_rows, inner]: the rows from first_row on.
extern "C" __global__ void __launch_bounds__(256) dequantize(
    const code_type* codes, const scale_type* scales, scalar* out, int first_row, int num_rows, int inner, int group) {
  const long long item = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= static_cast<long long>(num_rows) * (inner / PIECE)) return;
  const long long row = first_row + item / (inner / PIECE);
  const int k = static_cast<int>(item % (inner / PIECE)) * PIECE;
  vec<scalar, PIECE> weights;
#if defined(WEIGHT_INT4)
  const vec<unsigned, 4> words = load<4>(reinterpret_cast<const unsigned*>(codes + (row * inner + k) / 2));
  const scale_type both = scales[scale_of(row, k, inner, group)];
  const float scale = cvt_f32_f16(both.scale), zero = cvt_f32_f16(both.zero);
#pragma unroll
  for (int word = 0; word < 4; word++) {
#pragma unroll
    for (int nibble = 0; nibble < 8; nibble++) {
      const float code = static_cast<float>(words.at[word] >> 4 * nibble & 15);
      weights.at[k_of(word, nibble)] = from_float<scalar>(fmaf(code, scale, zero));
    }
  }
#else
  const vec<code_type, PIECE> piece = load<PIECE>(codes + row * inner + k);
  const float scale = cvt_f32_f16(scales[row].bits);
#pragma unroll
  for (int i = 0; i < PIECE; i++) {
#if defined(WEIGHT_INT8)
    const float code = piece.at[i];
#else
    const float code = cvt_f32_f16(static_cast<unsigned short>(cvt_f16x2_e4m3x2(piece.at[i])));
#endif
    weights.at[k_of(i)] = from_float<scalar>(code * scale);
  }
#endif
  store<PIECE>(out + item * PIECE, weights);
}

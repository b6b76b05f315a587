// Weights as an mma takes them, 8 rows by 16 of the inner dimension: from scalars as they are, or from codes that lie as quantize.cu
// puts them (WEIGHT_INT8, WEIGHT_FP8, WEIGHT_INT4). Codes become scalars by their bits, without rounding. Scales are applied to sums:
// those of 8 bits, the rows', to whole ones, those of 4 bits to the sum over a group.
#pragma once
#include "dtypes.cuh"

#if defined(WEIGHT_INT4)
#define WEIGHT_BITS 4
#elif defined(WEIGHT_INT8) || defined(WEIGHT_FP8)
#define WEIGHT_BITS 8
#else
#define WEIGHT_BITS 16
#endif
constexpr int GROUP = 128;  // of the inner dimension, that share an int4 scale

// Two scalars in a word.
#if defined(DTYPE_BF16)
constexpr unsigned ONES = 0x3f803f80, ONES_PLACE = 0x43004300;  // 1 and 128, twice: a code or'ed to the latter is added to it
constexpr float PLACE = 128;
__device__ __forceinline__ unsigned mul_scalars(unsigned a, unsigned b) { return mul_bf16x2(a, b); }
__device__ __forceinline__ unsigned sub_scalars(unsigned a, unsigned b) { return sub_bf16x2(a, b); }
#else
constexpr unsigned ONES = 0x3c003c00, ONES_PLACE = 0x64006400;
constexpr float PLACE = 1024;
__device__ __forceinline__ unsigned sub_scalars(unsigned a, unsigned b) { return sub_f16x2(a, b); }
#endif

// int4's scale and zero of a row and a group, applied to the sum over the group of x times (PLACE + code), and to that of x.
struct GroupScale {
  float scale, offset;

  __device__ __forceinline__ explicit GroupScale(unsigned both) : scale(cvt_f32_f16(both & 0xffff)) {
    offset = fmaf(-PLACE, scale, cvt_f32_f16(both >> 16));
  }
  __device__ __forceinline__ float operator()(float sum, float of_x) const { return fmaf(scale, sum, offset * of_x); }
};

// Two int8 codes, in bytes 0 and 2 of a word whose other bytes do not matter.
__device__ __forceinline__ unsigned scalars_of_int8(unsigned word) {
#if defined(DTYPE_BF16)
  // a bfloat16 has 7 bits behind its first one, and the sign has its own: 128 + low bits, less 128 or 256
  return sub_scalars(lop3_and_or(word, 0x007f007f, ONES_PLACE), lop3_and_or(word, 0x00800080, ONES_PLACE));
#else
  return sub_scalars(lop3_and_or(word, 0x00ff00ff, ONES_PLACE) ^ 0x00800080, ONES_PLACE | 0x00800080);
#endif
}

// The same of float8_e4m3.
__device__ __forceinline__ unsigned scalars_of_fp8(unsigned word) {
#if defined(DTYPE_BF16)
  const unsigned bits = lop3_and_or(word << 4, 0x07f007f0, word << 8 & 0x80008000);  // exponent and mantissa in their places
  return mul_scalars(bits, 0x7b807b80);  // 2^120: exponents count from 127 and not from 7
#else
  return cvt_f16x2_e4m3x2(static_cast<unsigned short>(prmt(word, 0, 0x4420)));
#endif
}

// Two int4 codes, in bits 0 to 3 and 16 to 19, each more by PLACE.
__device__ __forceinline__ unsigned scalars_of_int4(unsigned word) { return lop3_and_or(word, 0x000f000f, ONES_PLACE); }

// 16 of the inner dimension, a step of the 32 / WEIGHT_BITS that four words of a lane hold.
__device__ __forceinline__ void fragment(unsigned (&pairs)[2], const unsigned (&words)[4], int step) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
#if defined(WEIGHT_INT4)
    pairs[i] = scalars_of_int4(words[step / 2] >> 4 * (step % 2 * 2 + i));
#elif defined(WEIGHT_INT8)
    pairs[i] = scalars_of_int8(words[step] >> 8 * i);
#elif defined(WEIGHT_FP8)
    pairs[i] = scalars_of_fp8(words[step] >> 8 * i);
#else
    pairs[i] = words[2 * step + i];
#endif
  }
}

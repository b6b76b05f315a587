// What K/V are in memory, 16-bit like queries or codes of 8 bits (KV_FP8, KV_INT8), and what they are multiplied as.
#pragma once
#include "dtypes.cuh"
#include "work_list.cuh"

#if defined(KV_FP8) || defined(KV_INT8)
constexpr int KV_BYTES = 1;  // of an element
#else
constexpr int KV_BYTES = 2;
#endif
constexpr float LOG2_E = 1.44269504f;

// 8-bit K/V are computed in float16, which all codes are exactly, and with them queries and weights.
#if defined(DTYPE_BF16)
constexpr bool COMPUTE_BF16 = KV_BYTES == 2, CONVERT_QUERIES = KV_BYTES == 1;
#else
constexpr bool COMPUTE_BF16 = false, CONVERT_QUERIES = false;
#endif

__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (COMPUTE_BF16) {
    mma_m16n8k16_bf16(c, a, b0, b1);
  } else {
    mma_m16n8k16_f16(c, a, b0, b1);
  }
}

__device__ __forceinline__ unsigned round_pair(float low, float high) {
  return COMPUTE_BF16 ? cvt_rn_bf16x2(low, high) : cvt_rn_f16x2(low, high);
}

// A pair of queries as they are multiplied: bfloat16 to float16, of which the largest number is 65504.
__device__ __forceinline__ unsigned query_pair(unsigned pair) {
  if constexpr (CONVERT_QUERIES) {
    const unsigned clipped = max_nan_bf16x2(min_nan_bf16x2(pair, 0x477f477f), 0xc77fc77f);  // 65280, the next bfloat16
    return cvt_rn_f16x2(__uint_as_float(clipped << 16), __uint_as_float(clipped & 0xffff0000));
  }
  return pair;
}

#if defined(KV_FP8) || defined(KV_INT8)
// Four codes, of the bytes that SELECTED names, as two pairs of float16.
template <unsigned SELECTED>
__device__ __forceinline__ void pairs_of_codes(unsigned (&pairs)[2], unsigned codes) {
#ifdef KV_FP8
  const unsigned ordered = SELECTED == 0x3210 ? codes : prmt(codes, 0, SELECTED);
  pairs[0] = cvt_f16x2_e4m3x2(static_cast<unsigned short>(ordered));
  pairs[1] = cvt_f16x2_e4m3x2_upper(ordered);
#else
  const unsigned above = codes ^ 0x80808080;  // code + 128; as the low byte of a float16 whose high byte is 0x64: 1024 more
  pairs[0] = sub_f16x2(prmt(above, 0x64646464, 0x4040 | (SELECTED & 0xf) | (SELECTED & 0xf0) << 4), 0x64806480);  // 1152
  pairs[1] = sub_f16x2(prmt(above, 0x64646464, 0x4040 | (SELECTED >> 8 & 0xf) | (SELECTED >> 4 & 0xf00)), 0x64806480);
#endif
}
#endif

// Scales of a head: of the scores, for exp2, and of the output. (int8 has others beside them, of each position.)
__device__ __forceinline__ vec<float, 2> scales_of(const Params& params, int kv_head) {
#ifdef KV_FP8
  const vec<float, 2> scales = load<2>(static_cast<const float*>(params.kv_scales) + 2 * kv_head);
#else
  const vec<float, 2> scales = {1.0f, 1.0f};
#endif
  return {params.scale * LOG2_E * scales.at[0], scales.at[1]};
}

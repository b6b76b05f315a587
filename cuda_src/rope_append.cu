// Rotates q and k by their positions and appends k and v to the pool: one query row (all its heads) per CTA.
//
//   head: | lower half | upper half |   element i of the lower half turns with element i + head_dim / 2
//
// q, and k and v where the pool holds them as they are: a thread rotates 8 elements of the lower half with the 8 they turn with,
// or copies as many of v. Pools of codes (KV_INT8, KV_FP8): a warp does a head of k or v, each lane every 32nd element, twice
// for int8, whose scale is known once the largest is.
#include "dtypes.cuh"
#include "paged_kv.cuh"

#if defined(KV_INT8)
using kv_code = signed char;
struct kv_scale {  // float16, of a token and head: [num_kv_heads, num_blocks, 1 << block_shift, 2 (K, V)]
  unsigned short bits;
};
#elif defined(KV_FP8)
using kv_code = unsigned char;
using kv_scale = const float;  // of a head: [num_kv_heads, 2 (K, V)]
#else
using kv_code = scalar;
#endif

// 8 pairs beginning at elements i and i + half of one head; `angles` holds the cosines of a row, then its sines.
__device__ __forceinline__ void rotate(const scalar* source, scalar* target, const float* angles, int i, int half) {
  vec<scalar, 8> lower = load<8>(source + i), upper = load<8>(source + half + i);
  const vec<float, 8> cosine = load<8>(angles + i), sine = load<8>(angles + half + i);
  for (int j = 0; j < 8; j++) {
    const float a = to_float(lower.at[j]), b = to_float(upper.at[j]);
    lower.at[j] = from_float<scalar>(a * cosine.at[j] - b * sine.at[j]);
    upper.at[j] = from_float<scalar>(b * cosine.at[j] + a * sine.at[j]);
  }
  store<8>(target + i, lower);
  store<8>(target + half + i, upper);
}

#if defined(KV_INT8) || defined(KV_FP8)
// Element i of a head, rotated.
__device__ __forceinline__ float rotated(const scalar* head, const float* angles, int i, int half) {
  const float x = to_float(head[i]);
  return i < half ? x * angles[i] - to_float(head[i + half]) * angles[i + half]
                  : x * angles[i - half] + to_float(head[i - half]) * angles[i];
}

// A warp appends a head, value(i) being its elements, at `codes`; its scale is or will be at `scale`.
// (Loops are not unrolled: the divisions' slow paths would then spill registers.)
template <class Value>
__device__ __forceinline__ void append(Value value, kv_code* codes, kv_scale* scale, int head_dim) {
  const int lane = threadIdx.x % 32;
#if defined(KV_INT8)
  float largest = 0;
#pragma unroll 1
  for (int i = lane; i < head_dim; i += 32) largest = fmaxf(largest, fabsf(value(i)));
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  const kv_scale rounded_up = {cvt_rp_f16(fminf(largest / 127.0f, 65504.0f))};
  const float step = cvt_f32_f16(rounded_up.bits);
  if (lane == 0) *scale = rounded_up;
#pragma unroll 1
  for (int i = lane; i < head_dim; i += 32) {
    const float code = step == 0 ? 0.0f : rintf(value(i) / step);
    codes[i] = static_cast<kv_code>(fminf(fmaxf(code, -127.0f), 127.0f));
  }
#else
  const float step = *scale;
#pragma unroll 1
  for (int i = lane; i < head_dim; i += 32) codes[i] = cvt_e4m3_satfinite(value(i) / step);
#endif
}
#endif

// q, q_out [gridDim.x, num_heads, head_dim]; k, v [gridDim.x, num_kv_heads, head_dim]; rope_table [positions, head_dim];
// pools [num_kv_heads, num_blocks, 1 << block_shift, head_dim]; head_dim is a multiple of 16.
extern "C" __global__ void __launch_bounds__(128) rope_append(
    const scalar* q, const scalar* k, const scalar* v, const float* rope_table, scalar* q_out, kv_code* k_pool, kv_code* v_pool,
#if defined(KV_INT8) || defined(KV_FP8)
    kv_scale* kv_scales,
#endif
    const int* q_indptr, const int* seq_lens, const int* page_indptr, const int* page_indices, int num_sequences, int num_heads,
    int num_kv_heads, int head_dim, int num_blocks, int block_shift) {
  const int row = blockIdx.x;
  const int sequence = sequence_of_row(row, q_indptr, num_sequences);
  const int position = position_of_row(row, sequence, q_indptr, seq_lens);
  const int* page_table = page_indices + page_indptr[sequence];
  const float* angles = rope_table + static_cast<long long>(position) * head_dim;
  const int half = head_dim / 2, pieces = half / 8;

  const long long q_row = static_cast<long long>(row) * num_heads * head_dim;
  for (int item = threadIdx.x; item < num_heads * pieces; item += blockDim.x) {
    const long long head = q_row + item / pieces * head_dim;
    rotate(q + head, q_out + head, angles, item % pieces * 8, half);
  }

  const long long kv_row = static_cast<long long>(row) * num_kv_heads * head_dim;
#if defined(KV_INT8) || defined(KV_FP8)
  for (int item = threadIdx.x / 32; item < 2 * num_kv_heads; item += blockDim.x / 32) {
    const int head = item / 2, which = item % 2;
    const long long slot = kv_offset(position, page_table, head, num_blocks, block_shift, 1);
#if defined(KV_INT8)
    kv_scale* scale = kv_scales + 2 * slot + which;
#else
    kv_scale* scale = kv_scales + 2 * head + which;
#endif
    const scalar* source = (which == 0 ? k : v) + kv_row + head * head_dim;
    if (which == 0) {
      append([=](int i) { return rotated(source, angles, i, half); }, k_pool + slot * head_dim, scale, head_dim);
    } else {
      append([=](int i) { return to_float(source[i]); }, v_pool + slot * head_dim, scale, head_dim);
    }
  }
#else
  for (int item = threadIdx.x; item < num_kv_heads * pieces; item += blockDim.x) {
    const int head = item / pieces, i = item % pieces * 8;
    const long long slot = kv_offset(position, page_table, head, num_blocks, block_shift, head_dim);
    const scalar* value = v + kv_row + head * head_dim;
    rotate(k + kv_row + head * head_dim, k_pool + slot, angles, i, half);
    store<8>(v_pool + slot + i, load<8>(value + i));
    store<8>(v_pool + slot + half + i, load<8>(value + half + i));
  }
#endif
}

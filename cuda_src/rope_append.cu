// Rotates q and k by their positions and appends k and v to the pool: one query row (all its heads) per CTA.
//
//   row:  | heads of q | heads of k | heads of v |
//   head: | lower half | upper half |   element i of the lower half turns with element i + head_dim / 2
//
// q, and k and v where the pool holds them as they are: a thread rotates 8 elements of the lower half with the 8 they turn
// with, or copies as many of v. Pools of codes (KV_INT8, KV_FP8): a warp does a head of k or v, each lane every 32nd element,
// twice for int8, whose scale is known once the largest is. With QK_NORM the heads of q and k are normalised first, in float32:
// the threads of a head add up its squares by shuffles.
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

// So many CTAs at least are to find room in an SM: the registers that this leaves each suffice without spills, on all devices.
#if defined(QK_NORM)
constexpr int CTAS_PER_SM = 4;
#else
constexpr int CTAS_PER_SM = 10;
#endif

struct Norm {  // of the heads of q or of k before they turn; only with QK_NORM
  const scalar* gain;  // [head_dim]
  float eps;
};

#if defined(QK_NORM)
// What the elements of a head are multiplied by beside their gains. `squares` is this lane's part of the sum of their squares;
// `lanes` neighbours, a power of two, hold a head together. All lanes of a warp come here.
__device__ __forceinline__ float norm_factor(float squares, int lanes, int head_dim, float eps) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  return 1.0f / sqrtf(squares / head_dim + eps);
}
#endif

// Calls f(item) for 0 .. items - 1, the threads side by side; with QK_NORM in whole warps, whose surplus lanes repeat the first
// items.
template <class F>
__device__ __forceinline__ void for_each(int items, F f) {
#if defined(QK_NORM)
  for (int item = threadIdx.x; item < (items + 31) / 32 * 32; item += blockDim.x) f(item % items);
#else
  for (int item = threadIdx.x; item < items; item += blockDim.x) f(item);
#endif
}

// 8 pairs beginning at elements i and i + half of one head; `angles` holds the cosines of a row, then its sines.
__device__ __forceinline__ void rotate(
    const scalar* source, scalar* target, const float* angles, [[maybe_unused]] Norm norm, int i, int half) {
  vec<scalar, 8> lower = load<8>(source + i), upper = load<8>(source + half + i);
  const vec<float, 8> cosine = load<8>(angles + i), sine = load<8>(angles + half + i);
#if defined(QK_NORM)
  const vec<scalar, 8> lower_gain = load<8>(norm.gain + i), upper_gain = load<8>(norm.gain + half + i);
  float squares = 0;
  for (int j = 0; j < 8; j++) {
    squares = fmaf(to_float(lower.at[j]), to_float(lower.at[j]), squares);
    squares = fmaf(to_float(upper.at[j]), to_float(upper.at[j]), squares);
  }
  const float factor = norm_factor(squares, half / 8, 2 * half, norm.eps);
#endif
  for (int j = 0; j < 8; j++) {
    float a = to_float(lower.at[j]), b = to_float(upper.at[j]);
#if defined(QK_NORM)
    a *= factor * to_float(lower_gain.at[j]);
    b *= factor * to_float(upper_gain.at[j]);
#endif
    lower.at[j] = from_float<scalar>(a * cosine.at[j] - b * sine.at[j]);
    upper.at[j] = from_float<scalar>(b * cosine.at[j] + a * sine.at[j]);
  }
  store<8>(target + i, lower);
  store<8>(target + half + i, upper);
}

#if defined(KV_INT8) || defined(KV_FP8)
// A head of k that a warp appends: element i, normalised and rotated.
struct Key {
  const scalar* head;
  const float* angles;
  int half;
#if defined(QK_NORM)
  const scalar* gain;
  float factor;
#endif

  __device__ __forceinline__ Key(const scalar* head, const float* angles, Norm norm, int half)
      : head(head), angles(angles), half(half) {
#if defined(QK_NORM)
    gain = norm.gain;
    float squares = 0;
    for (int i = threadIdx.x % 32; i < 2 * half; i += 32) squares = fmaf(to_float(head[i]), to_float(head[i]), squares);
    factor = norm_factor(squares, 32, 2 * half, norm.eps);
#endif
  }

  __device__ __forceinline__ float normalised(int i) const {
#if defined(QK_NORM)
    return to_float(head[i]) * (factor * to_float(gain[i]));
#else
    return to_float(head[i]);
#endif
  }

  __device__ __forceinline__ float operator()(int i) const {
    return i < half ? normalised(i) * angles[i] - normalised(i + half) * angles[i + half]
                    : normalised(i) * angles[i - half] + normalised(i - half) * angles[i];
  }
};

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

// qkv [gridDim.x, num_heads + 2 * num_kv_heads, head_dim]; q_out [gridDim.x, num_heads, head_dim]; rope_table [positions,
// head_dim]; pools [num_kv_heads, num_blocks, 1 << block_shift, head_dim]; head_dim is a multiple of 16, with QK_NORM a power
// of two from 16 to 512. Rows from q_indptr[num_sequences] on belong to no sequence and are left alone.
extern "C" __global__ void __launch_bounds__(128, CTAS_PER_SM) rope_append(
    const scalar* qkv, const float* rope_table, scalar* q_out, kv_code* k_pool, kv_code* v_pool,
#if defined(KV_INT8) || defined(KV_FP8)
    kv_scale* kv_scales,
#endif
#if defined(QK_NORM)
    const scalar* q_gain, const scalar* k_gain, float eps,
#endif
    const int* q_indptr, const int* seq_lens, const int* page_indptr, const int* page_indices, int num_sequences, int num_heads,
    int num_kv_heads, int head_dim, int num_blocks, int block_shift) {
#if defined(QK_NORM)
  const Norm q_norm = {q_gain, eps}, k_norm = {k_gain, eps};
#else
  const Norm q_norm = {}, k_norm = {};
#endif
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int row = blockIdx.x;
  if (row >= q_indptr[num_sequences]) return;
  const int sequence = sequence_of_row(row, q_indptr, num_sequences);
  const int position = position_of_row(row, sequence, q_indptr, seq_lens);
  const int* page_table = page_indices + page_indptr[sequence];
  const float* angles = rope_table + static_cast<long long>(position) * head_dim;
  const int half = head_dim / 2, pieces = half / 8;

  const scalar* q = qkv + static_cast<long long>(row) * (num_heads + 2 * num_kv_heads) * head_dim;
  const scalar* kv = q + num_heads * head_dim;
  q_out += static_cast<long long>(row) * num_heads * head_dim;
  for_each(num_heads * pieces, [=](int item) {
    const int head = item / pieces * head_dim;
    rotate(q + head, q_out + head, angles, q_norm, item % pieces * 8, half);
  });

#if defined(KV_INT8) || defined(KV_FP8)
  for (int item = threadIdx.x / 32; item < 2 * num_kv_heads; item += blockDim.x / 32) {
    const int head = item / 2, which = item % 2;
    const scalar* source = kv + (which * num_kv_heads + head) * head_dim;
    const long long slot = kv_offset(position, page_table, head, num_blocks, block_shift, 1);
#if defined(KV_INT8)
    kv_scale* scale = kv_scales + 2 * slot + which;
#else
    kv_scale* scale = kv_scales + 2 * head + which;
#endif
    if (which == 0) {
      append(Key(source, angles, k_norm, half), k_pool + slot * head_dim, scale, head_dim);
    } else {
      append([=](int i) { return to_float(source[i]); }, v_pool + slot * head_dim, scale, head_dim);
    }
  }
#else
  for_each(num_kv_heads * pieces, [=](int item) {
    const int head = item / pieces, i = item % pieces * 8;
    const long long slot = kv_offset(position, page_table, head, num_blocks, block_shift, head_dim);
    const scalar *key = kv + head * head_dim, *value = key + num_kv_heads * head_dim;
    rotate(key, k_pool + slot, angles, k_norm, i, half);
    store<8>(v_pool + slot + i, load<8>(value + i));
    store<8>(v_pool + slot + half + i, load<8>(value + half + i));
  });
#endif
}

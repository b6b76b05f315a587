// Rotates q and k by their positions and appends k and v to the pool: one query row (all its heads) per CTA.
//
//   head: | lower half | upper half |   a thread rotates 8 elements of the lower half with the 8 they are paired with in the
//                                       upper (element i turns with i + head_dim / 2), or copies 8 elements of v
#include "dtypes.cuh"
#include "paged_kv.cuh"

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

// q, q_out [gridDim.x, num_heads, head_dim]; k, v [gridDim.x, num_kv_heads, head_dim]; rope_table [positions, head_dim];
// pools [num_kv_heads, num_blocks, 1 << block_shift, head_dim]; head_dim is a multiple of 16.
extern "C" __global__ void __launch_bounds__(128) rope_append(
    const scalar* q, const scalar* k, const scalar* v, const float* rope_table, scalar* q_out, scalar* k_pool, scalar* v_pool,
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
  for (int item = threadIdx.x; item < num_kv_heads * pieces; item += blockDim.x) {
    const int head = item / pieces, i = item % pieces * 8;
    const long long slot = kv_offset(position, page_table, head, num_blocks, block_shift, head_dim);
    const scalar* value = v + kv_row + head * head_dim;
    rotate(k + kv_row + head * head_dim, k_pool + slot, angles, i, half);
    store<8>(v_pool + slot + i, load<8>(value + i));
    store<8>(v_pool + slot + half + i, load<8>(value + half + i));
  }
}

// Where a query row and the K/V of a position are: q_indptr, the page table and the pool [kv head, block, slot, element].
#pragma once
#include "ptx.cuh"

// The sequence that query row `row` belongs to: the last one that begins at or before it, so that empty ones are passed over.
__device__ __forceinline__ int sequence_of_row(int row, const int* q_indptr, int num_sequences) {
  int low = 0, high = num_sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (q_indptr[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The row's position in its sequence: the last of n rows is the sequence's last token.
__device__ __forceinline__ int position_of_row(int row, int sequence, const int* q_indptr, const int* seq_lens) {
  return seq_lens[sequence] - (q_indptr[sequence + 1] - row);
}

// Offset in elements of a position's K (or V), in a block, in one kv head of the pool; a pool may hold more than 2^32 bytes.
__device__ __forceinline__ long long slot_offset(
    int block, int position, int kv_head, int num_blocks, int block_shift, int head_dim) {
  const long long of_pool = static_cast<long long>(kv_head) * num_blocks + block;
  const int slot = position & ((1 << block_shift) - 1);
  return ((of_pool << block_shift) + slot) * head_dim;
}
__device__ __forceinline__ long long kv_offset(
    int position, const int* page_table, int kv_head, int num_blocks, int block_shift, int head_dim) {
  return slot_offset(page_table[position >> block_shift], position, kv_head, num_blocks, block_shift, head_dim);
}

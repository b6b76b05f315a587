// What a CTA does and in which order, as cupaged/attention/planner.py writes it down.
#pragma once
#include "ptx.cuh"

constexpr int STEP = 64;  // positions of K/V that are processed at a time, from a multiple of STEP on
constexpr int TILE_ROWS = 64;  // of a tile, at most
constexpr int DECODE_ROWS = 16;  // of a tile whose positions the warps share, at most

// A tile of the packed rows of (sequence, kv_head), and the positions that it attends to here: all that its rows may see, or a
// part of them, whose result goes to workspace slot `slot` and is merged with the other parts of cut task `task`.
struct alignas(16) Item {
  int sequence, kv_head, first_row, num_rows, kv_start, kv_stop, slot, task;

  __device__ __forceinline__ bool whole() const { return slot < 0; }
  __device__ __forceinline__ int first_step() const { return kv_start & -STEP; }
};

struct alignas(8) CutTask {
  int first_slot, num_parts;  // the slots are consecutive, in the order of positions
};

// The rows of an item's tile: packed row r is query head r % group_size of the group, of the sequence's token r / group_size.
struct TileRows {
  int first, count;  // packed rows
  int group_size, num_heads;
  int first_position;  // of the sequence's first token
  long long first_index;  // of that token's row for the group's first head, in q and out [num_tokens, num_heads, ...]

  __device__ __forceinline__ int position(int row) const { return first_position + (first + row) / group_size; }
  __device__ __forceinline__ long long index(int row) const {
    const int token = (first + row) / group_size, head = (first + row) % group_size;
    return first_index + static_cast<long long>(token) * num_heads + head;
  }
};

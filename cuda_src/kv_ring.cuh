// A ring of stages in shared memory through which the K/V of a CTA's items flow, item after item, straight from their pages.
#pragma once
#include "dtypes.cuh"
#include "work_list.cuh"

constexpr int WARPS = 4;
constexpr int WARP_SLOTS = STEP / WARPS;  // positions of a step that a warp fetches
constexpr int ROW_BYTES = 2 * HEAD_DIM;
constexpr int PIECES = ROW_BYTES / 16;  // of 16 bytes, of a row
constexpr int ROWS_AT_ONCE = 32 / PIECES;  // rows that a warp copies by one instruction

// Where a piece of a row is in a tile of rows, in elements. By the XOR, one piece of each of eight rows lies in other banks.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * HEAD_DIM + ((piece ^ row & 7) * 8); }

// From swizzled(row, piece) to swizzled(row + more_rows, piece + more_pieces) where no bit is carried: one XOR and a constant.
__device__ __forceinline__ int further(int place, int more_rows, int more_pieces) {
  return (place ^ (more_pieces ^ more_rows & 7) * 8) + more_rows * HEAD_DIM;
}

struct Stage {
  scalar k[STEP * HEAD_DIM], v[STEP * HEAD_DIM];
};

struct PagedPool {
  const scalar *k, *v;  // [kv heads, num_blocks, 1 << block_shift, HEAD_DIM]
  const int *page_indptr, *page_indices;
  int num_blocks, block_shift;
};

// The stages, and what is ahead of the computation: the items whose steps are still to be fetched. Warp w fetches the positions
// 16 w .. 16 w + 15 of every step; its lanes look up one position's page each, a step ahead of the copies that need it, so that
// a page may be as small as one position.
class KvRing {
 public:
  // The items from number `first` to before `end`.
  __device__ __forceinline__ KvRing(const PagedPool& pool, const Item* items, int first, int end, Stage* stages)
      : pool(pool), items(items), next(first), end(end), stages(stages) {
    open_item();
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fetch(i);
  }

  // Waits until this thread's copies of the oldest stage have landed; what comes of others' needs a barrier besides.
  __device__ __forceinline__ Stage& wait() const {
    cp_async_wait<STAGES - 2>();
    return stages[current];
  }

  // Begins to fetch another step, into the stage that was released last.
  __device__ __forceinline__ void refill() { fetch(current == 0 ? STAGES - 1 : current - 1); }

  // The oldest stage is done with.
  __device__ __forceinline__ void release() { current = current == STAGES - 1 ? 0 : current + 1; }

 private:
  const PagedPool& pool;
  const Item* items;
  int next, end;
  Stage* stages;
  int current = 0;
  bool any = false;  // a step of an item, as follows, is still to be fetched
  int position, kv_start, kv_stop;  // of the step; of the item
  const unsigned char *k_rows, *v_rows;  // this lane's piece of the first row of the item's kv head in the pools
  const int* page_table;
  int page = 0;  // of this lane's position of the step, if that is in the item

  __device__ __forceinline__ int lane_position() const {
    return position + threadIdx.x / 32 * WARP_SLOTS + threadIdx.x % WARP_SLOTS;
  }
  __device__ __forceinline__ bool lane_in_item() const { return lane_position() >= kv_start && lane_position() < kv_stop; }

  __device__ __forceinline__ void open_item() {
    any = next < end;
    if (!any) return;
    const Item item = items[next++];
    position = item.first_step();
    kv_start = item.kv_start;
    kv_stop = item.kv_stop;
    const long long rows_before = static_cast<long long>(item.kv_head) * pool.num_blocks << pool.block_shift;
    const long long offset = rows_before * ROW_BYTES + threadIdx.x % PIECES * 16;
    k_rows = reinterpret_cast<const unsigned char*>(pool.k) + offset;
    v_rows = reinterpret_cast<const unsigned char*>(pool.v) + offset;
    page_table = pool.page_indices + pool.page_indptr[item.sequence];
    look_up();
  }

  __device__ __forceinline__ void look_up() {
    if (lane_in_item()) page = page_table[lane_position() >> pool.block_shift];
  }

  __device__ __forceinline__ void fetch(int stage) {
    if (any) {
      const int lane = threadIdx.x % 32, warp_slot = threadIdx.x / 32 * WARP_SLOTS;
      const int before = position + warp_slot - kv_start, length = kv_stop - kv_start;
      const unsigned block = page, slot = lane_position() & ((1 << pool.block_shift) - 1);
      const unsigned mine = (block << pool.block_shift) + slot;  // the pool's row for this lane's position
      const int first = warp_slot * HEAD_DIM + swizzled(lane / PIECES, lane % PIECES);
      scalar* k = stages[stage].k;
      scalar* v = stages[stage].v;
#pragma unroll
      for (int i = 0; i < WARP_SLOTS; i += ROWS_AT_ONCE) {
        const int row = i | lane / PIECES, to = further(first, i, 0);
        const bool there = static_cast<unsigned>(before + row) < static_cast<unsigned>(length);
        const unsigned long long from = __shfl_sync(0xffffffffu, mine, row);
        cp_async_16_or_zeros(k + to, k_rows + from * ROW_BYTES, there);
        cp_async_16_or_zeros(v + to, v_rows + from * ROW_BYTES, there);
      }
      position += STEP;
      if (position < kv_stop) {
        look_up();
      } else {
        open_item();
      }
    }
    cp_async_commit();  // an empty group at the end, so that groups count steps
  }
};

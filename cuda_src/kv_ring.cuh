// A ring of stages in shared memory through which the K/V of a CTA's parts flow, part after part, straight from their pages.
#pragma once
#include "kv_dtypes.cuh"

constexpr int WARPS = 4;
constexpr int ROW_BYTES = KV_BYTES * HEAD_DIM;
constexpr int CHUNK = ROW_BYTES == 256 ? 64 : 128;  // positions of a stage, which the four warps fetch a quarter each
constexpr int WARP_SLOTS = CHUNK / WARPS;
constexpr int PIECES = ROW_BYTES / 16;  // of 16 bytes, of a row
constexpr int ROWS_AT_ONCE = 32 / PIECES;  // rows that a warp copies by one instruction

// Where a piece of a row is in a tile of rows, in bytes. By the XOR, one piece of each of eight rows lies in other banks.
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * ROW_BYTES + (piece ^ (ROW_BYTES >= 128 ? row & 7 : row / 2 & 3)) * 16;
}

// From swizzled(row, piece) to swizzled(row + more_rows, piece + more_pieces) where no bit is carried: one XOR and a constant.
__device__ __forceinline__ int further(int place, int more_rows, int more_pieces) {
  return (place ^ (more_pieces ^ (ROW_BYTES >= 128 ? more_rows & 7 : more_rows / 2 & 3)) * 16) + more_rows * ROW_BYTES;
}

struct alignas(128) Stage {
  unsigned char k[CHUNK * ROW_BYTES], v[CHUNK * ROW_BYTES];
#ifdef KV_INT8
  unsigned scales[CHUNK];  // of each position: two float16, of k and of v
#endif
};

// This CTA's parts from number `first` on. The records are read again for each, from L1: registers are scarcer.
__device__ __forceinline__ PartList parts_of_cta(const Params& params, int first) {
  PartList parts(params, *params.header, params.ctas[blockIdx.x]);
  parts.advance(first);
  return parts;
}

// The stages, and what is ahead of the computation. Warp w fetches the w-th quarter of every chunk. Three cursors run over the
// CTA's parts, so that no load waits for another: one loads the next part's tile; one looks up page ids, a position for each
// lane, so that a page may be as small as that; one copies.
class KvRing {
 public:
  __device__ __forceinline__ KvRing(const Params& params, Stage* stages) : params(params), stages(stages) {
#ifdef EVICT_FIRST
    policy = createpolicy_evict_first();  // what is read once shall not drive out what every layer reads
#endif
    load_part();
    look_up();
    begin_span();
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fetch(i);
  }

  // Waits until this thread's copies of the oldest stage have landed; what comes of others' needs a barrier besides.
  __device__ __forceinline__ Stage& wait() const {
    cp_async_wait<STAGES - 2>();
    return stages[current];
  }

  // Begins to fetch another chunk, into the stage that was released last.
  __device__ __forceinline__ void refill() { fetch(current == 0 ? STAGES - 1 : current - 1); }

  // The oldest stage is done with.
  __device__ __forceinline__ void release() { current = current == STAGES - 1 ? 0 : current + 1; }

 private:
  static constexpr int SPAN = 32 / WARP_SLOTS;  // chunks that are looked up together: a warp has a position for every lane
  struct Range {
    bool any = false;
    int position, kv_start, kv_stop, kv_head, page_begin;  // of the next chunk; of its part
  };
  const Params& params;
  Stage* stages;
  int current = 0;
  int num_loaded = 0;  // parts
  Range loaded;  // the next part to look up
  Range looked_up;  // the chunks to fetch after `span`
  Range span;  // the chunks to fetch
  int left;  // of `span`
  unsigned long long policy;
#ifdef POINTERS
  unsigned long long k_page = 0, v_page = 0, k_row, v_row;  // of this lane's position in `looked_up`; in `span`
#else
  int page = 0;  // of this lane's position in `looked_up`
  unsigned row;  // the pool's, of this lane's position in `span`
#endif

  __device__ __forceinline__ void load_part() {
    const PartList parts = parts_of_cta(params, num_loaded++);
    loaded.any = parts.any();
    if (!loaded.any) return;
    const Part part = parts.get();
    loaded = {true, part.first_step(), part.kv_start, part.kv_stop, part.kv_head, part.tile.page_begin};
  }

  __device__ __forceinline__ int lane_position(const Range& range) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return range.position + warp * WARP_SLOTS + lane / WARP_SLOTS * CHUNK + lane % WARP_SLOTS;
  }

  // Goes on by SPAN chunks, within the part or to the next.
  __device__ __forceinline__ void look_up() {
    if (looked_up.any && looked_up.position + SPAN * CHUNK < looked_up.kv_stop) {
      looked_up.position += SPAN * CHUNK;
    } else {
      looked_up = loaded;
      if (loaded.any) load_part();
    }
    if (!looked_up.any) return;
    const int position = lane_position(looked_up);
    if (position < looked_up.kv_start || position >= looked_up.kv_stop) return;
    const long long entry = looked_up.page_begin + static_cast<long long>(position >> params.block_shift);
#ifdef POINTERS
    k_page = params.k_pages[entry];
    v_page = params.v_pages[entry];
#else
    page = params.page_indices[entry];
#endif
  }

  __device__ __forceinline__ void begin_span() {
    span = looked_up;
    if (!span.any) return;
    left = SPAN;
    const unsigned slot = lane_position(span) & ((1 << params.block_shift) - 1);
#ifdef POINTERS
    const unsigned long long k = k_page, v = v_page, offset = span.kv_head * params.head_stride + slot * ROW_BYTES;
    look_up();
    k_row = k + offset;
    v_row = v + offset;
#else
    unsigned block = page;
    look_up();  // under way before the page that was looked up last is waited for
    if (block >= static_cast<unsigned>(params.num_blocks)) {
      block = 0;
      *params.flag = 1;
    }
    row = (block << params.block_shift) + slot;
#endif
  }

  __device__ __forceinline__ void fetch(int number) {
    if (span.any) {
#ifdef EVICT_FIRST
      // Opaque: ptxas (12.9, 13.0) makes an illegal instruction of a copy with both a policy and an address of uniform parts.
      number += threadIdx.x & params.reserved;
#endif
      const int lane = threadIdx.x % 32, warp_slot = threadIdx.x / 32 * WARP_SLOTS;
      const int before = span.position + warp_slot - span.kv_start, length = span.kv_stop - span.kv_start;
      const int piece = lane % PIECES, first = warp_slot * ROW_BYTES + swizzled(lane / PIECES, piece);
      const int holder = (SPAN - left) * WARP_SLOTS;  // the lane that looked up the warp's first position
      Stage& stage = stages[number];
#ifndef POINTERS
      const long long offset = span.kv_head * params.head_stride + piece * 16;
      const unsigned char* k_rows = static_cast<const unsigned char*>(params.k_pool) + offset;
      const unsigned char* v_rows = static_cast<const unsigned char*>(params.v_pool) + offset;
#endif
#pragma unroll
      for (int i = 0; i < WARP_SLOTS; i += ROWS_AT_ONCE) {
        const int slot = i | lane / PIECES, to = further(first, i, 0);
        const bool there = static_cast<unsigned>(before + slot) < static_cast<unsigned>(length);
#ifdef POINTERS
        const auto* k = reinterpret_cast<const unsigned char*>(__shfl_sync(0xffffffffu, k_row, holder + slot) + piece * 16);
        const auto* v = reinterpret_cast<const unsigned char*>(__shfl_sync(0xffffffffu, v_row, holder + slot) + piece * 16);
#else
        const unsigned long long bytes = __shfl_sync(0xffffffffu, row, holder + slot) * static_cast<unsigned long long>(ROW_BYTES);
        const auto *k = k_rows + bytes, *v = v_rows + bytes;
#endif
        copy(stage.k + to, k, there);
        copy(stage.v + to, v, there);
      }
#ifdef KV_INT8
      static_assert(WARP_SLOTS == 32, "a lane fetches the scales of its own position");
      const auto* scales = static_cast<const unsigned*>(params.kv_scales);
      const long long rows_before = static_cast<long long>(span.kv_head) * params.num_blocks << params.block_shift;
      const bool there = static_cast<unsigned>(before + lane) < static_cast<unsigned>(length);
      cp_async_4_or_zeros(stage.scales + warp_slot + lane, scales + rows_before + row, there);
#endif
      span.position += CHUNK;
      if (--left == 0 || span.position >= span.kv_stop) begin_span();
    }
    cp_async_commit();  // an empty group at the end, so that groups count chunks
  }

  __device__ __forceinline__ void copy(unsigned char* to, const unsigned char* from, bool there) const {
#ifdef EVICT_FIRST
    cp_async_16_or_zeros_hint(to, from, there, policy);
#else
    cp_async_16_or_zeros(to, from, there);
#endif
  }
};

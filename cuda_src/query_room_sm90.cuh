// Where a warp of the producer warpgroup leaves a part's queries for one consumer warpgroup, with the part itself, so that
// consumers neither read the work list nor work out where rows are.
#pragma once
#include "kv_ring_sm90.cuh"

constexpr int WARPGROUP_ROWS = 64;
constexpr int TILE_ROWS = CONSUMERS * WARPGROUP_ROWS;
constexpr int DECODE_ROWS = 16;
using QueryTile = SwizzledRows<WARPGROUP_ROWS>;

struct QueryRoom {
  Part parts[2];  // by turns: a part may come before the queries of the one before are done with
  bool any[2];  // false: there is no part, nor will there be another
  unsigned long long full, empty;  // mbarriers

  // By one thread, before a barrier of the CTA.
  __device__ __forceinline__ void init() {
    mbarrier_init(&full, 1);
    mbarrier_init(&empty, WARPGROUP / 32);
  }
};

// By the warp that has brought them; each lane what it has waited for itself.
__device__ __forceinline__ void convert_queries(QueryTile& tile) {
  const int row = threadIdx.x % 32 / PIECES, piece = threadIdx.x % PIECES;
#pragma unroll 4
  for (int i = 0; i < WARPGROUP_ROWS; i += ROWS_AT_ONCE) {
    auto* at = reinterpret_cast<unsigned*>(tile.piece(i + row, piece));
    vec<unsigned, 4> pairs = load<4>(at);
    for (unsigned& pair : pairs.at) pair = query_pair(pair);
    store(at, pairs);
  }
}

// One warp brings the queries of all parts of this CTA, one part after another: 64 rows from first_row on, or all rows of a
// decode tile; rows past the end are 0. They are on their way into the L2 cache while the room is still in use.
__device__ __forceinline__ void bring_queries(const Params& params, QueryRoom& room, QueryTile& tile, int first_row) {
  const int lane = threadIdx.x % 32, piece = lane % PIECES;
  const scalar* queries = static_cast<const scalar*>(params.q);
  PartStream parts(params);
  int turn = 0;
  for (bool any = true; any; parts.advance()) {
    int count = 0;  // rows to bring
    unsigned mine[2] = {};  // rows of q that are this lane's, `lane` and `lane` + 32
    if (Part part; any = parts.look(part)) {
      if (lane == 0) room.parts[turn] = part;
      const TileRows rows(params, part);
      const int first = rows.count <= params.decode_rows ? 0 : first_row;
      count = rows.count - first;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (lane + 32 * i >= count) continue;
        mine[i] = static_cast<unsigned>(rows.index(first + lane + 32 * i));
        for (int d = 0; d < HEAD_DIM; d += 64) prefetch_global_l2(queries + static_cast<long long>(mine[i]) * HEAD_DIM + d);
      }
    }
    room.any[turn] = any;
    mbarrier_wait_parity(&room.empty, turn ^ 1);
    turn ^= 1;
    if (any) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll 4
        for (int i = 0; i < 32; i += ROWS_AT_ONCE) {
          const int row = i + lane / PIECES;
          const unsigned long long from = __shfl_sync(0xffffffffu, mine[half], row);
          const scalar* source = queries + from * HEAD_DIM + piece * 8;
          cp_async_16_or_zeros(tile.piece(32 * half + row, piece), source, 32 * half + row < count);
        }
      }
      cp_async_commit();
      cp_async_wait<0>();
      if constexpr (CONVERT_QUERIES) convert_queries(tile);
      fence_proxy_async_shared();
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&room.full);
  }
}

// The rings of K and of V tiles in shared memory, through which the parts of a CTA flow one after another: what the producer
// warpgroup copies from the pages, and what the consumers wait for and give back.
//
//                    full (copies have landed)            empty (all consumer warps are done)
//   producer  --->  tiles[K][0] ... [STAGES - 1]  --->  consumers  --->  producer
//             --->  tiles[V][0] ... [STAGES - 1]  --->
//
// wgmma takes no codes beside 16-bit queries. So with KV_FP8 what is copied are codes, into as many stages of their own, and
// the warp that has them copied turns them into tiles of float16:
//
//             landed (copies have)               full (converted)
//   producer  --->  codes[K][0] ... [STAGES - 1]  --->  tiles[K][0] ... [STAGES - 1]  --->  consumers, as above
//
// Steps go from a part's last positions to its first: those that need masks come first, while there is nothing to overlap.
// K and V of a step have barriers of their own, because a step's V is needed only after the next step's K.
#pragma once
#include "kv_dtypes.cuh"

constexpr int WARPGROUP = 128;  // threads
constexpr int CONSUMERS = 2;  // warpgroups
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes, of a row
constexpr int ROWS_AT_ONCE = 32 / PIECES;  // rows of which a warp moves all pieces by one instruction

// Rows of HEAD_DIM elements (scalars, or what is computed instead: see kv_dtypes.cuh) as wgmma takes them with the 128-byte
// swizzle: in atoms of 8 rows x 64 columns, 1024 bytes, where piece p (8 elements) of row r lies at p XOR r. So do tensor
// copies leave them: all rows of a page by one copy.
template <int ROWS>
struct SwizzledRows {
  scalar at[ROWS / 8][HEAD_DIM / 64][8][64];

  __device__ __forceinline__ scalar* piece(int row, int number) {
    return &at[row / 8][number / 8][row % 8][(number % 8 ^ row % 8) * 8];
  }
};
using KvTile = SwizzledRows<STEP>;
using CodeTile = unsigned char[STEP][HEAD_DIM];  // as in the pages

enum Ring { K, V };

struct alignas(1024) KvRings {
  KvTile tiles[2][STAGES];  // of K, of V
#ifdef KV_FP8
  CodeTile codes[2][STAGES];
  unsigned long long landed[2][STAGES];
#endif
  unsigned long long full[2][STAGES], empty[2][STAGES];  // mbarriers

  // By one thread, before a barrier of the CTA.
  __device__ __forceinline__ void init() {
    for (int ring = 0; ring < 2; ring++) {
      for (int i = 0; i < STAGES; i++) {
        mbarrier_init(&full[ring][i], 1);
        mbarrier_init(&empty[ring][i], CONSUMER_WARPS);
#ifdef KV_FP8
        mbarrier_init(&landed[ring][i], 1);
#endif
      }
    }
  }
};

// Whose turn it is in a ring: the stage, and the parity of its phase. Consumers wait for `parity` of full, the producer for the
// other parity of empty.
struct Turn {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A warp is done with a stage.
__device__ __forceinline__ void release(unsigned long long* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

__device__ __forceinline__ int first_step(const Part& part) { return part.kv_start & -STEP; }
__device__ __forceinline__ int last_step(const Part& part) {  // a part has at least one, if of no position
  return max(part.kv_stop - 1, part.kv_start) & -STEP;
}

// All parts of this CTA, one after another. The plan may have several records for a CTA, a grid of records apart: CTAs that go
// through the same kv heads at the same time share them in the L2 cache. Read anew for each part: registers are scarce.
class PartStream {
 public:
  __device__ __forceinline__ explicit PartStream(const Params& params) : params(params) {}

  // Whether there is another part; it is then in `part`.
  __device__ __forceinline__ bool look(Part& part) {
    const Header header = *params.header;
    for (; record < header.num_ctas; record += gridDim.x, done = 0) {
      PartList list(params, header, params.ctas[record]);
      list.advance(done);
      if (list.any()) {
        part = list.get();
        return true;
      }
    }
    return false;
  }
  __device__ __forceinline__ void advance() { done++; }

 private:
  const Params& params;
  int record = blockIdx.x, done = 0;  // parts of the record
};

// The entry of the page table for a position; then the page, or another in its place and a flag where the table is wrong. Two
// functions, because looking at the entry waits for it.
__device__ __forceinline__ int look_up(const Params& params, const Part& part, int position) {
  return params.page_indices[part.tile.page_begin + (position >> params.block_shift)];
}
__device__ __forceinline__ int page_of(const Params& params, int entry) {
  if (static_cast<unsigned>(entry) < static_cast<unsigned>(params.num_blocks)) return entry;
  *params.flag = 1;
  return 0;
}

#ifdef KV_FP8
// By one warp. A lane turns one piece of a row after another; neither loads nor stores of a warp meet in a bank. Places differ
// by constants but for the swizzle, which every eighth row has anew.
__device__ __forceinline__ void convert(const CodeTile& codes, KvTile& tile) {
  constexpr int AT_ONCE = 8, SWIZZLES = 8 / ROWS_AT_ONCE;  // loads under way together; places that are worked out
  const int row = threadIdx.x % 32 / PIECES, piece = threadIdx.x % PIECES;
  const auto* from = reinterpret_cast<const unsigned*>(&codes[row][8 * piece]);
  unsigned* to[SWIZZLES];
  for (int i = 0; i < SWIZZLES; i++) to[i] = reinterpret_cast<unsigned*>(tile.piece(i * ROWS_AT_ONCE + row, piece));
#pragma unroll 1
  for (int first = 0; first < STEP; first += AT_ONCE * ROWS_AT_ONCE) {
    vec<unsigned, 2> words[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) words[i] = load<2>(from + (first + i * ROWS_AT_ONCE) * (HEAD_DIM / 4));
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      unsigned low[2], high[2];
      pairs_of_codes<0x3210>(low, words[i].at[0]);
      pairs_of_codes<0x3210>(high, words[i].at[1]);
      const vec<unsigned, 4> pairs = {low[0], low[1], high[0], high[1]};
      store(to[i % SWIZZLES] + (first + i / SWIZZLES * 8) * (HEAD_DIM / 2), pairs);
    }
  }
}
#endif

// One warp's work, for K or for V: a lane copies a page, or STEP rows of it, by the copy engine. Pages that have no position of
// the part are not read; of the others all rows are: what does not belong there is the consumers' affair. Of codes there is no
// map: a page is one run of bytes, in memory and in its stage.
__device__ __forceinline__ void produce(const Params& params, const TensorMap* map, KvRings& rings, int ring) {
  const int lane = threadIdx.x % 32, rows = min(1 << params.block_shift, STEP), slot = lane * rows;
  PartStream parts(params);
  Turn turn;
#ifdef KV_FP8
  // After `turn` has advanced: the step whose codes are in the stage that is next to be copied to. It was copied STAGES - 1
  // steps ago, and these are under way meanwhile.
  int steps = 0;
  const auto convert_oldest = [&] {
    if (++steps < STAGES) return;
    const int stage = turn.stage;
    mbarrier_wait_parity(&rings.landed[ring][stage], turn.parity ^ 1);
    mbarrier_wait_parity(&rings.empty[ring][stage], turn.parity);
    convert(rings.codes[ring][stage], rings.tiles[ring][stage]);
    fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&rings.full[ring][stage]);
  };
#endif
  for (Part part; parts.look(part); parts.advance()) {
    const long long first_page = static_cast<long long>(part.kv_head) * params.num_blocks;
    const auto wanted = [&](int position) {
      return slot < STEP && position + slot + rows > part.kv_start && position + slot < part.kv_stop;
    };
    int position = last_step(part);
    int entry = wanted(position) ? look_up(params, part, position + slot) : 0;
#pragma unroll 1
    for (; position >= first_step(part); position -= STEP) {
      const bool mine = wanted(position);
      const unsigned bytes = __popc(__ballot_sync(0xffffffffu, mine)) * rows * HEAD_DIM * KV_BYTES;
      const int in_page = position + slot & (1 << params.block_shift) - 1;
      const long long row = (first_page + page_of(params, entry) << params.block_shift) + in_page;
      const int before = position - STEP;
      if (before >= first_step(part) && wanted(before)) entry = look_up(params, part, before + slot);

#ifdef KV_FP8
      const auto* pool = static_cast<const unsigned char*>(ring == K ? params.k_pool : params.v_pool);
      unsigned long long* landed = &rings.landed[ring][turn.stage];
      if (lane == 0) mbarrier_arrive_expect_tx(landed, bytes);
      __syncwarp();
      if (mine) bulk_copy(rings.codes[ring][turn.stage][slot], pool + row * HEAD_DIM, rows * HEAD_DIM, landed);
      turn.advance();
      convert_oldest();
#else
      unsigned long long* full = &rings.full[ring][turn.stage];
      mbarrier_wait_parity(&rings.empty[ring][turn.stage], turn.parity ^ 1);
      if (lane == 0) mbarrier_arrive_expect_tx(full, bytes);
      __syncwarp();
      if (mine) tensor_copy_4d(rings.tiles[ring][turn.stage].at[slot / 8], map, 0, 0, 0, static_cast<int>(row / 8), full);
      turn.advance();
#endif
    }
  }
#ifdef KV_FP8
#pragma unroll 1
  for (int i = 1; i < STAGES; i++) {
    turn.advance();
    convert_oldest();
  }
#endif
}

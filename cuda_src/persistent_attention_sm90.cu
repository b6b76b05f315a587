// Paged attention of a whole step in one launch, for steps that have prefill rows, on Hopper (sm_90a). It means the same as
// persistent_attention.cu, with tiles of 128 rows, steps of 128 positions and pages of 8 rows or more; K/V are of q's type or,
// with KV_FP8, float8_e4m3.
//
//   warpgroup 0, producer                   shared memory                        warpgroups 1 and 2, consumers
//   warp 0: pages of K  --tensor copies-->  ring of K (kv_ring_sm90.cuh)    -->  prefill: 64 rows each, every position
//   warp 1: pages of V  --tensor copies-->  ring of V                       -->    (attention_tile_sm90.cuh)
//   warps 2, 3: queries --cp.async------->  a room for each consumer        -->  decode: all rows, 16 positions a warp
//   part after part, always ahead           (query_room_sm90.cuh)                  (decode_tile_sm90.cuh)
//   KV_FP8: warps 0 and 1 copy codes, and turn them into the float16 tiles of the rings
//
//   prefill, one consumer    products   | S1 = Q K1, O += P0 V0 |              | S2 = Q K2, O += P1 V1 |            ...
//                            the rest                  | P1 = softmax S1, rounded |           | P2 = softmax S2 ...
//   the other one            products                           | S1 = Q K1, O += P0 V0 |              | S2 = Q K2, ...
//
// The consumers take turns in issuing products, so that the tensor cores have one's while the other does its softmax. A part's
// first scores are begun with the last values of the part before. A whole task writes its output. A part writes a normalised
// partial result and its lse, and counts itself; who counts last merges the parts, in their order.
constexpr int STEP = 128;
#include "attention_tile_sm90.cuh"
#include "decode_tile_sm90.cuh"

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "paged attention knows head_dim 64 and 128");

struct Shared {
  KvRings rings;
  QueryTile queries[CONSUMERS];
  QueryRoom rooms[CONSUMERS];
  float top[CONSUMER_WARPS][DECODE_ROWS], sum[CONSUMER_WARPS][DECODE_ROWS];
  unsigned counted;
};
static_assert(sizeof(Shared) <= 232448, "as much as a CTA can have; see shared_bytes_sm90 of cupaged/attention/kernel.py");
constexpr float LOG_2 = 0.693147181f;
constexpr int PRODUCER_REGISTERS = KV_BYTES == 1 ? 72 : 56;  // a thread; conversions need some
constexpr int CONSUMER_REGISTERS = KV_BYTES == 1 ? 216 : 224;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS == (1 + CONSUMERS) * 168, "as the kernel begins with");

enum NamedBarrier { TURN = 1, WARPGROUP_MEETS = 3, CONSUMERS_MEET = 5 };  // the first two of each consumer

__device__ __forceinline__ void consumers_meet() { named_barrier_sync(CONSUMERS_MEET, CONSUMERS * WARPGROUP); }

// A consumer warpgroup, and where it is in its work.
struct Consumer {
  const Params& params;
  Shared& shared;
  const int number = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
  const int first_row = number * WARPGROUP_ROWS;
  QueryRoom& room = shared.rooms[number];
  Turn k_turn, v_turn;
  int room_turn = 0;

  __device__ __forceinline__ void meet() const { named_barrier_sync(WARPGROUP_MEETS + number, WARPGROUP); }
  __device__ __forceinline__ void wait_turn() const { named_barrier_sync(TURN + number, CONSUMERS * WARPGROUP); }
  __device__ __forceinline__ void give_turn() const { named_barrier_arrive(TURN + 1 - number, CONSUMERS * WARPGROUP); }

  // Waits for the next part and its queries. Whether there is one.
  __device__ __forceinline__ bool take(Part& part) {
    mbarrier_wait_parity(&room.full, room_turn);
    part = room.parts[room_turn];
    const bool any = room.any[room_turn];
    room_turn ^= 1;
    return any;
  }
  __device__ __forceinline__ bool is_decode(const Part& part) const { return part.tile.num_rows <= params.decode_rows; }

  // Tensor copies bring whole pages: what of the step at `position` is not in the part, and not NaN times 0, must be zeros.
  // `thread` of `threads` does its share of the rows from `slot` on. True where there was anything to do.
  __device__ __forceinline__ bool clear_outside(
      KvTile& values, const Part& part, int position, int slot, int count, int thread, int threads) const {
    if (position + slot >= part.kv_start && position + slot + count <= part.kv_stop) return false;
    const auto clear = [&](int begin, int end) {
      for (int row = begin + thread / PIECES; row < end; row += threads / PIECES) {
        store(values.piece(row, thread % PIECES), vec<scalar, 8>{});
      }
    };
    clear(slot, min(part.kv_start - position, slot + count));
    clear(max(part.kv_stop - position, slot), slot + count);
    fence_proxy_async_shared();
    return true;
  }

  // ---- prefill ----
  __device__ __forceinline__ void attend_values(WarpgroupTile& tile, const Part& part, int position) {
    KvTile& values = shared.rings.tiles[V][v_turn.stage];
    mbarrier_wait_parity(&shared.rings.full[V][v_turn.stage], v_turn.parity);
    if (clear_outside(values, part, position, 0, STEP, thread, WARPGROUP)) meet();
    tile.begin_values(values);
  }
  __device__ __forceinline__ void release_k() {
    release(&shared.rings.empty[K][k_turn.stage]);
    k_turn.advance();
  }
  __device__ __forceinline__ void release_v() {
    release(&shared.rings.empty[V][v_turn.stage]);
    v_turn.advance();
  }

  __device__ __forceinline__ void wait_for_keys() const {
    mbarrier_wait_parity(&shared.rings.full[K][k_turn.stage], k_turn.parity);
  }
  __device__ __forceinline__ void begin_scores(WarpgroupTile& tile) const {
    tile.begin_scores(shared.queries[number], shared.rings.tiles[K][k_turn.stage]);
  }

  // Parts of prefill class, one after another as one sequence of steps, beginning with `part`. Leaves in it the first that is
  // of decode class; false where there is no other part.
  __device__ __forceinline__ bool prefill(Part& part) {
    WarpgroupTile tile;
    wait_for_keys();
    begin_scores(tile);
    wgmma_wait<0>();
    for (;;) {
      const float scale = scales_of(params, part.kv_head).at[0];
      tile.begin(part, TileRows(params, part), first_row, params.window);
      int position = last_step(part);  // of the scores
      release_k();
      if (position == first_step(part)) release(&room.empty);
      tile.weigh(position, scale);
      tile.round_weights();
#pragma unroll 1
      while (position > first_step(part)) {
        wait_for_keys();
        wait_turn();
        begin_scores(tile);
        attend_values(tile, part, position);
        give_turn();
        position -= STEP;
        wgmma_wait<1>();  // for the scores
        if (position == first_step(part)) release(&room.empty);
        tile.weigh(position, scale);
        // Always, but after the weights: the compiler would have them wait for the values.
        if (!(tile.sum[0] + tile.sum[1] < 0)) release_k();
        tile.wait_for_values();
        release_v();
        tile.rescale();
        tile.round_weights();
      }
      const Part done = part;
      const bool any = take(part);
      if (!any || is_decode(part)) {
        attend_values(tile, done, position);
        tile.wait_for_values();
        release_v();
        finish_prefill(tile, done);
        return any;
      }
      wait_for_keys();
      wait_turn();
      begin_scores(tile);  // the first of the new part
      attend_values(tile, done, position);
      give_turn();
      tile.wait_for_values();
      release_v();
      finish_prefill(tile, done);
    }
  }

  // Four lanes hold two columns each of every 8; then each holds 8 of every 32.
  __device__ __forceinline__ static void exchange(unsigned (&pairs)[4]) {
    const int lane = threadIdx.x;
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i & bit) continue;
        const unsigned received = __shfl_xor_sync(0xffffffffu, lane & bit ? pairs[i] : pairs[i | bit], bit);
        if (lane & bit) {
          pairs[i] = received;
        } else {
          pairs[i | bit] = received;
        }
      }
    }
  }

  __device__ __forceinline__ void finish_prefill(WarpgroupTile& tile, const Part& part) const {
    const vec<float, 2> scales = scales_of(params, part.kv_head);
    const TileRows rows(params, part);
    const int lane = thread % 32;
    tile.share_sum();
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + thread / 32 * 16 + lane / 4 + 8 * h;
      const bool there = row < rows.count;
      SoftmaxState<1> state;
      state.top = tile.top[h] * scales.at[0];
      state.sum = tile.sum[h];
      const float normaliser = state.normaliser() * scales.at[1];
      if (part.whole()) {
        const long long index = there ? rows.index(row) : 0;
        if (there && lane % 4 == 0 && params.lse != nullptr) params.lse[index] = state.lse() * LOG_2;
        scalar* out = static_cast<scalar*>(params.out) + index * HEAD_DIM + lane % 4 * 8;
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 32; j++) {
          unsigned pairs[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float* columns = &tile.out[16 * j + 4 * i + 2 * h];
            pairs[i] = round_pair_to_scalars(columns[0] * normaliser, columns[1] * normaliser);
          }
          exchange(pairs);
          if (there) store(reinterpret_cast<unsigned*>(out + 32 * j), vec<unsigned, 4>{pairs[0], pairs[1], pairs[2], pairs[3]});
        }
      } else if (there) {
        const long long to = partial_row(part.slot, row);
        if (lane % 4 == 0) store_for_others(params.partial_lse + to, state.lse());
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; j++) {
          const vec<float, 2> pair = {tile.out[4 * j + 2 * h] * normaliser, tile.out[4 * j + 2 * h + 1] * normaliser};
          store_for_others(reinterpret_cast<vec<float, 2>*>(params.partial_out + to * HEAD_DIM + 8 * j + lane % 4 * 2), pair);
        }
      }
    }
    if (!part.whole()) finish_part(part, rows);
  }

  // ---- decode ----
  __device__ __forceinline__ void decode(const Part& part) {
    const vec<float, 2> scales = scales_of(params, part.kv_head);
    const TileRows rows(params, part);
    const int warp = (threadIdx.x - WARPGROUP) / 32, lane = threadIdx.x % 32, slot = warp * WARP_SLOTS;
    DecodeTile tile(shared.queries[number], part, rows, params.window);
    release(&room.empty);
    int position = last_step(part);
    for (;; position -= STEP) {
      KvTile &keys = shared.rings.tiles[K][k_turn.stage], &values = shared.rings.tiles[V][v_turn.stage];
      mbarrier_wait_parity(&shared.rings.full[K][k_turn.stage], k_turn.parity);
      mbarrier_wait_parity(&shared.rings.full[V][v_turn.stage], v_turn.parity);
      if (clear_outside(values, part, position, slot, WARP_SLOTS, lane, 32)) __syncwarp();
      tile.attend(keys, values, slot, position + slot, scales.at[0]);
      if (position == first_step(part)) break;  // the last stage is needed below
      release_k();
      release_v();
    }
    leave_partial(tile, rows.count, scales.at[0]);
    consumers_meet();
    for (int i = threadIdx.x - WARPGROUP; i < rows.count * (HEAD_DIM / 4); i += CONSUMERS * WARPGROUP) {
      const int row = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
      SoftmaxState<4> state;
      for (int w = 0; w < CONSUMER_WARPS; w++) {
        state.merge(shared.top[w][row], shared.sum[w][row], load<4>(partial_of_warp(w, row, d)).at);
      }
      if (part.whole()) {
        store_whole(rows, row, d, state, scales.at[1]);
      } else {
        store_part(part.slot, row, d, state, scales.at[1]);
      }
    }
    fence_proxy_async_shared();
    release_k();
    release_v();
    consumers_meet();  // `top` and `sum` may be written again
    if (!part.whole()) finish_part(part, rows);
  }

  // Where a warp leaves element d of its partial result of a decode row: in its own rows of the stage, a quarter of the columns
  // in each of four pieces of 16 rows x 128 bytes. XORed with the row, so that what it stores at once lies in different banks.
  __device__ __forceinline__ float* partial_of_warp(int warp, int row, int d) const {
    constexpr int PLACES = HEAD_DIM / 32, HALVES = HEAD_DIM / 64;
    const int place = d / 32 % PLACES, slot = warp * WARP_SLOTS + row;
    KvTile& tile = place < HALVES ? shared.rings.tiles[K][k_turn.stage] : shared.rings.tiles[V][v_turn.stage];
    return reinterpret_cast<float*>(tile.at[slot / 8][place % HALVES][slot % 8]) + (d / 4 % 8 ^ row % 8) * 4 + d % 4;
  }

  __device__ __forceinline__ void leave_partial(DecodeTile& tile, int count, float scale) const {
    const int warp = (threadIdx.x - WARPGROUP) / 32, lane = threadIdx.x % 32;
    tile.share_sum();
    __syncwarp();  // all lanes have read the warp's rows
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = lane / 4 + 8 * h;
      if (row >= count) continue;
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; j++) {
        store(partial_of_warp(warp, row, 8 * j + lane % 4 * 2), vec<float, 2>{tile.out[j][2 * h], tile.out[j][2 * h + 1]});
      }
      if (lane % 4 == 0) {
        shared.top[warp][row] = tile.top[h] * scale;
        shared.sum[warp][row] = tile.sum[h];
      }
    }
  }

  // ---- results ----
  __device__ __forceinline__ static long long partial_row(int slot, int row) {
    return static_cast<long long>(slot) * TILE_ROWS + row;
  }

  // Four elements, from d on, of a row of the tile, times a factor: as output, or into a slot of the workspace.
  __device__ __forceinline__ void store_whole(
      const TileRows& rows, int row, int d, const SoftmaxState<4>& state, float factor) const {
    const long long index = rows.index(row);
    const float normaliser = state.normaliser() * factor;
    vec<scalar, 4> rounded;
    for (int i = 0; i < 4; i++) rounded.at[i] = from_float<scalar>(state.out[i] * normaliser);
    store(static_cast<scalar*>(params.out) + index * HEAD_DIM + d, rounded);
    if (d == 0 && params.lse != nullptr) params.lse[index] = state.lse() * LOG_2;
  }
  __device__ __forceinline__ void store_part(int slot, int row, int d, const SoftmaxState<4>& state, float factor) const {
    const float normaliser = state.normaliser() * factor;
    vec<float, 4> normalised;
    for (int i = 0; i < 4; i++) normalised.at[i] = state.out[i] * normaliser;
    store_for_others(reinterpret_cast<vec<float, 4>*>(params.partial_out + partial_row(slot, row) * HEAD_DIM + d), normalised);
    if (d == 0) store_for_others(params.partial_lse + partial_row(slot, row), state.lse());
  }

  // Counts a part whose result all consumers have stored; the CTA that counts last merges the parts into the output.
  __device__ __forceinline__ void finish_part(const Part& part, const TileRows& rows) const {
    unsigned* counter = &params.counters[part.first_slot];
    consumers_meet();
    if (threadIdx.x == WARPGROUP) shared.counted = atom_add_acq_rel_gpu(counter, 1);
    consumers_meet();
    if (shared.counted + 1 != part.num_parts) return;
    constexpr int AT_ONCE = 8, THREADS = CONSUMERS * WARPGROUP, COLUMNS = HEAD_DIM / 4;  // four elements a thread, of 8 rows
#pragma unroll 1
    for (int first = threadIdx.x - WARPGROUP; first < rows.count * COLUMNS; first += AT_ONCE * THREADS) {
      SoftmaxState<4> states[AT_ONCE];
#pragma unroll 1
      for (int p = 0; p < part.num_parts; p++) {
        float lse[AT_ONCE];
        vec<float, 4> out[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
          const int row = min((first + i * THREADS) / COLUMNS, rows.count - 1);
          const long long from = partial_row(part.first_slot + p, row);
          lse[i] = load_from_others(params.partial_lse + from);
          out[i] = load_from_others(
              reinterpret_cast<const vec<float, 4>*>(params.partial_out + from * HEAD_DIM + first % COLUMNS * 4));
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) states[i].merge(lse[i], lse[i] == minus_infinity() ? 0.0f : 1.0f, out[i].at);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int row = (first + i * THREADS) / COLUMNS;
        if (row < rows.count) store_whole(rows, row, first % COLUMNS * 4, states[i], 1.0f);
      }
    }
    if (threadIdx.x == WARPGROUP) *counter = 0;  // for the next launch
  }
};

__device__ __forceinline__ void consume(const Params& params, Shared& shared) {
  Consumer consumer{params, shared};
  if (consumer.number == 1) consumer.give_turn();  // the first is consumer 0's
  Part part;
  for (bool any = consumer.take(part); any;) {
    if (consumer.is_decode(part)) {
      consumer.decode(part);
      any = consumer.take(part);
    } else {
      any = consumer.prefill(part);
    }
  }
}

// q, out [num_tokens, num_kv_heads * group_size, HEAD_DIM]; pools [num_kv_heads, num_blocks, 1 << block_shift, HEAD_DIM], and
// their maps, of 16-bit ones, as in cupaged/cuda/tensor_map.py; the row at position p sees max(0, p - window + 1) .. p. The work
// list is as the planner says; counters are 0, and are left so.
extern "C" __global__ void __launch_bounds__(WARPGROUP*(1 + CONSUMERS), 1) persistent_attention_sm90(
#ifdef KV_FP8
    const __grid_constant__ Params params) {
#else
    const __grid_constant__ Params params, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
#endif
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  KvRings& rings = shared.rings;
  griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    rings.init();
    for (QueryRoom& room : shared.rooms) room.init();
    fence_mbarrier_init();
  }
  __syncthreads();
  griddepcontrol_wait();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x < WARPGROUP) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (warp < 2) {
#ifdef KV_FP8
      produce(params, nullptr, rings, warp);
#else
      produce(params, warp == K ? &k_map : &v_map, rings, warp);
#endif
    } else {
      bring_queries(params, shared.rooms[warp - 2], shared.queries[warp - 2], (warp - 2) * WARPGROUP_ROWS);
    }
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume(params, shared);
  }
}

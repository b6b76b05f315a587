// The plan of paged attention, made on the device: what cupaged/attention/planner.py makes on the host, bit by bit, by
// one CTA, for a grid that does not deal. So a captured graph can go on while lengths and pages change.
//
//   sequences  -- scan of tiles per sequence -->  tiles  -- scan of costs -->  where CTAs begin  -- scan of cuts -->  CTAs
//
// What cannot be is clamped, and *flag set to 1: a sequence with rows or pages outside of the arrays has none, a length is at
// least 0 and at most what the pages hold, and a batch of too many tiles is not computed at all.
//
// Variants: STEP, that of the kernel which is to run.
#include "work_list.cuh"

struct PlanParams {
  const int *q_indptr, *seq_lens, *page_indptr;  // [num_sequences + 1], [num_sequences], [num_sequences + 1]
  Header* header;
  Tile* tiles;  // [max_tiles]
  Cta* ctas;  // [num_ctas]
  long long* cost_end;  // [max_tiles], scratch: cost of a head's tiles up to and with this one
  int* first_cut;  // [num_ctas + 1], scratch: number of the first cut of each cut task
  unsigned* flag;
  int num_sequences, max_tokens, max_tokens_each, max_pages, max_tiles, num_kv_heads, group_size, block_size, window;
  int num_ctas, tile_rows, decode_rows, decode_cost, prefill_cost, item_cost, reserved;
};
static_assert(sizeof(PlanParams) == 136, "as NumPy writes it");

// Sum of the values of this thread and those before it; `total` of all. `scratch` is shared memory for 32 values.
__device__ __forceinline__ long long block_scan(long long value, long long* scratch, long long& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const long long before = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  long long sum = 0;
  for (int w = 0; w < warps; w++) {
    if (w == warp) value += sum;
    sum += scratch[w];
  }
  total = sum;
  __syncthreads();  // nobody writes to scratch again while another still reads it
  return value;
}

// Two counts in one number, to be scanned together.
__device__ __forceinline__ long long two(int first, int second) { return static_cast<long long>(second) << 32 | first; }
__device__ __forceinline__ int first_of(long long both) { return static_cast<int>(both & 0x7fffffff); }
__device__ __forceinline__ int second_of(long long both) { return static_cast<int>(both >> 32); }

struct Sequence {
  int first_token, num_tokens, length, page_begin;

  __device__ __forceinline__ Sequence(const PlanParams& params, int b) {
    first_token = params.q_indptr[b];
    length = params.seq_lens[b];
    page_begin = params.page_indptr[b];
    const int end = params.q_indptr[b + 1], page_end = params.page_indptr[b + 1];
    bool wrong = first_token < 0 || end < first_token || end > params.max_tokens;
    num_tokens = wrong ? 0 : end - first_token;
    if (num_tokens > params.max_tokens_each) wrong = true, num_tokens = 0;
    const bool pages_wrong = page_begin < 0 || page_end < page_begin || page_end > params.max_pages;
    const long long room = pages_wrong ? 0 : static_cast<long long>(page_end - page_begin) * params.block_size;
    if (length < 0) wrong = true, length = 0;
    if (length > room) wrong = true, length = static_cast<int>(room);
    if (wrong || pages_wrong || (length > 0 && num_tokens > length)) *params.flag = 1;
  }

  __device__ __forceinline__ int rows(const PlanParams& params) const { return num_tokens * params.group_size; }
  __device__ __forceinline__ int rest(const PlanParams& params) const { return rows(params) % params.tile_rows; }
  __device__ __forceinline__ int prefill_tiles(const PlanParams& params) const {
    return rows(params) / params.tile_rows + (rest(params) > params.decode_rows);
  }
  __device__ __forceinline__ int decode_tiles(const PlanParams& params) const {
    return rest(params) > 0 && rest(params) <= params.decode_rows;
  }

  __device__ __forceinline__ Tile tile(const PlanParams& params, int first_row) const {
    const int num_rows = min(rows(params) - first_row, params.tile_rows), first_position = length - num_tokens;
    Tile tile = {};
    tile.first_row = first_row;
    tile.num_rows = num_rows;
    tile.kv_start = max(first_position + first_row / params.group_size + 1 - params.window, 0);
    tile.kv_stop = max(first_position + (first_row + num_rows - 1) / params.group_size + 1, 0);
    tile.page_begin = page_begin;
    tile.first_token = first_token;
    tile.first_position = first_position;
    tile.num_parts = 1;
    return tile;
  }
};

// The first of `size` ascending values that is greater than `value`; `size` if none is.
template <class T>
__device__ __forceinline__ int first_above(const T* values, int size, T value) {
  int low = 0, high = size;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (values[middle] > value) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__device__ __forceinline__ int num_steps(const Tile& tile) { return (tile.kv_stop + STEP - 1) / STEP - tile.kv_start / STEP; }

// Does CTA c begin inside a task, where the one before does not begin (`is_new`), nor at another cut of the task (`is_first`)?
struct Cut {
  bool any, is_new, is_first;

  __device__ __forceinline__ Cut(const Cta* ctas, int c) {
    const Cta& cta = ctas[c];
    const bool same_task = c > 0 && ctas[c - 1].task == cta.task;
    any = cta.step > 0;
    is_new = any && !(same_task && ctas[c - 1].step == cta.step);
    is_first = is_new && !(same_task && ctas[c - 1].step > 0);
  }
};

// One CTA of whole warps. Dynamic shared memory: 8 * (32 + num_sequences) bytes.
extern "C" __global__ void __launch_bounds__(512) plan(const __grid_constant__ PlanParams params) {
  long long* scratch = reinterpret_cast<long long*>(shared_memory());
  long long* tiles_end = scratch + 32;  // [num_sequences]: prefill and decode tiles up to and with a sequence's
  const int thread = threadIdx.x, threads = blockDim.x;

  long long sum = 0, total = 0;
  for (int base = 0; base < params.num_sequences; base += threads) {
    const int b = base + thread;
    long long count = 0;
    if (b < params.num_sequences) {
      const Sequence sequence(params, b);
      count = two(sequence.prefill_tiles(params), sequence.decode_tiles(params));
    }
    const long long end = sum + block_scan(count, scratch, total);
    if (b < params.num_sequences) tiles_end[b] = end;
    sum += total;
  }
  __syncthreads();
  int num_prefill = first_of(sum), num_tiles = num_prefill + second_of(sum);
  if (num_tiles > params.max_tiles) {
    num_prefill = num_tiles = 0;
    if (thread == 0) *params.flag = 1;
  }

  for (int b = thread; b < params.num_sequences && num_tiles > num_prefill; b += threads) {
    const Sequence sequence(params, b);
    if (sequence.decode_tiles(params)) {
      const int index = num_prefill + second_of(tiles_end[b]) - 1;
      params.tiles[index] = sequence.tile(params, sequence.rows(params) - sequence.rest(params));
    }
  }
  for (int i = thread; i < num_prefill; i += threads) {
    int low = 0, high = params.num_sequences - 1;  // the first sequence whose tiles end after this one
    while (low < high) {
      const int middle = (low + high) / 2;
      if (first_of(tiles_end[middle]) > i) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int first = low == 0 ? 0 : first_of(tiles_end[low - 1]);
    params.tiles[i] = Sequence(params, low).tile(params, (i - first) * params.tile_rows);
  }
  __syncthreads();

  sum = 0;
  for (int base = 0; base < num_tiles; base += threads) {
    const int i = base + thread;
    long long cost = 0;
    if (i < num_tiles) {
      const int step_cost = i < num_prefill ? params.prefill_cost : params.decode_cost;
      cost = static_cast<long long>(num_steps(params.tiles[i])) * step_cost + params.item_cost;
    }
    const long long end = sum + block_scan(cost, scratch, total);
    if (i < num_tiles) params.cost_end[i] = end;
    sum += total;
  }
  __syncthreads();

  const long long in_prefill = num_prefill > 0 ? params.cost_end[num_prefill - 1] : 0;  // of a head
  for (int c = thread; c < params.num_ctas; c += threads) {
    Cta cta = {};
    if (num_tiles > 0) {
      long long rest = c * (sum * params.num_kv_heads) / params.num_ctas;
      const bool prefill = rest < in_prefill * params.num_kv_heads;
      const long long before = prefill ? 0 : in_prefill, of_head = prefill ? in_prefill : sum - in_prefill;
      rest -= before * params.num_kv_heads;
      const int head = static_cast<int>(rest / of_head);
      rest = rest % of_head + before;
      const int tile = first_above(params.cost_end, num_tiles, rest);
      const int step_cost = prefill ? params.prefill_cost : params.decode_cost;
      if (tile > 0) rest -= params.cost_end[tile - 1];
      const long long past_item = rest - params.item_cost + step_cost / 2;
      cta.task = prefill ? head * num_prefill + tile
                         : num_prefill * (params.num_kv_heads - 1) + head * (num_tiles - num_prefill) + tile;
      cta.step = past_item > 0 ? static_cast<int>(past_item / step_cost) : 0;  // the nearest
      if (cta.step > 0 && cta.step == num_steps(params.tiles[tile])) {
        cta.step = 0;
        cta.task++;
      }
    }
    params.ctas[c] = cta;
  }
  __syncthreads();

  sum = 0;  // cuts; tasks that are cut
  for (int base = 0; base < params.num_ctas; base += threads) {
    const int c = base + thread;
    long long count = 0;
    bool is_first = false;
    if (c < params.num_ctas) {
      const Cut cut(params.ctas, c);
      is_first = cut.is_first;
      count = two(cut.is_new, cut.is_first);
    }
    const long long end = sum + block_scan(count, scratch, total);
    if (is_first) params.first_cut[second_of(end) - 1] = first_of(end) - 1;
    if (c < params.num_ctas) {
      params.ctas[c].slot = first_of(end);  // for now
      params.ctas[c].head_first_slot = second_of(end);
    }
    sum += total;
  }
  if (thread == 0) {
    params.first_cut[second_of(sum)] = first_of(sum);
    *params.header = {num_tiles, num_prefill, params.num_ctas, 0};
  }
  __syncthreads();

  for (int c = thread; c < params.num_ctas; c += threads) {
    Cta cta = params.ctas[c];
    const bool last = c + 1 == params.num_ctas;
    const int cuts = cta.slot, cut_tasks = cta.head_first_slot;
    cta.stop_task = last ? num_tiles * params.num_kv_heads : params.ctas[c + 1].task;
    cta.stop_step = last ? 0 : params.ctas[c + 1].step;
    cta.slot = cta.head_first_slot = 0;
    if (!last && Cut(params.ctas, c + 1).is_first) {
      cta.slot = params.first_cut[cut_tasks] + cut_tasks;  // a task of n cuts has n + 1 slots
      cta.tail_parts = params.first_cut[cut_tasks + 1] - params.first_cut[cut_tasks] + 1;
    }
    if (cta.step > 0 && (cta.task != cta.stop_task || cta.step != cta.stop_step)) {
      const int task = cut_tasks - 1;
      cta.slot = cuts + task;
      cta.head_first_slot = params.first_cut[task] + task;
      cta.head_parts = params.first_cut[task + 1] - params.first_cut[task] + 1;
    }
    // fields of its own only: others still read task and step
    params.ctas[c].stop_task = cta.stop_task;
    params.ctas[c].stop_step = cta.stop_step;
    params.ctas[c].slot = cta.slot;
    params.ctas[c].head_first_slot = cta.head_first_slot;
    params.ctas[c].head_parts = cta.head_parts;
    params.ctas[c].tail_parts = cta.tail_parts;
  }
}

// What a CTA does and in which order, as cupaged/attention/planner.py writes it down. A kernel declares STEP, the positions of
// K/V that it processes at a time, before it includes this file.
//
//   task   (tile of query rows, kv head): [prefill tiles x kv heads][decode tiles x kv heads], tile by tile within a head
//   part   the steps of a task that one CTA does; a task in one part is whole
//   CTA    | last steps of a task | whole | whole | first steps of a task |        or one part from the middle of a task
#pragma once
#include "ptx.cuh"

struct alignas(16) Header {
  int num_tiles, num_prefill_tiles, num_ctas, slots_per_head;  // num_ctas: records, of the sm90 kernel maybe several for a CTA
};

// Up to TILE_ROWS consecutive packed rows of a sequence, for every kv head alike.
struct alignas(16) Tile {
  int first_row, num_rows, kv_start, kv_stop;  // positions that the rows see between them; none where kv_start == kv_stop
  int page_begin, first_token, first_position, mask_begin;  // of the sequence: its first page, query row, that row's position; mask
  int mask_words, first_slot, part, num_parts;  // 32-bit words of mask a token; of a batch-invariant plan's fixed parts
};

struct alignas(16) Cta {
  int task, step, stop_task, stop_step;  // from a step of one task to before a step of another, counted within the task
  int slot, head_first_slot, head_parts, tail_parts;  // slot of its first part; of what tasks its parts at either end are
};

// The argument of the attention kernels, by value; the same as a NumPy dtype in cupaged/attention/kernel.py.
struct Params {
  const void *q, *k_pool, *v_pool;  // [num_tokens, num_heads, HEAD_DIM]; [num_kv_heads, num_blocks, block_size, HEAD_DIM]
  void* out;  // like q
  float* lse;  // [num_tokens, num_heads], natural; null where it is not wanted
  const int* page_indices;
  const unsigned long long *k_pages, *v_pages;  // instead of the pools and page_indices: addresses of pages (POINTERS)
  const Header* header;
  const Tile* tiles;
  const Cta* ctas;
  const unsigned* mask;  // bit i of word w of a token's row: does it see position 32 w + i (MASK)
  const void* kv_scales;  // int8: half [num_kv_heads, num_blocks, block_size, 2]; fp8: float [num_kv_heads, 2]; of k and v
  float *partial_out, *partial_lse;  // [num_slots, TILE_ROWS, HEAD_DIM]; [num_slots, TILE_ROWS], base 2
  unsigned *counters, *flag;  // of cut tasks, by first slot: 0, and left so; set to 1 where a page id was out of range
  long long head_stride;  // bytes from one kv head to the next, of a pool or of a page that is pointed to
  int num_kv_heads, group_size, num_blocks, block_shift, window, decode_rows;
  float scale;
  int reserved;
};
static_assert(sizeof(Header) == 16 && sizeof(Tile) == 48 && sizeof(Cta) == 32 && sizeof(Params) == 176, "as NumPy writes them");

// A tile for one kv head, and the positions [kv_start, kv_stop) that it attends to here: all that its rows see, or a part, whose
// result goes to workspace slot `slot` and is merged with the others of slots first_slot .. first_slot + num_parts - 1.
struct Part {
  Tile tile;
  int kv_head, kv_start, kv_stop, slot, first_slot, num_parts;

  __device__ __forceinline__ bool whole() const { return num_parts <= 1; }
  __device__ __forceinline__ int first_step() const { return kv_start & -STEP; }  // a position
};

// The parts of a CTA, one after another: `for (PartList parts(...); parts.any(); parts.advance()) { Part part = parts.get(); }`
class PartList {
 public:
  __device__ __forceinline__ PartList(const Params& params, const Header& header, const Cta& cta)
      : tiles(params.tiles), num_kv_heads(params.num_kv_heads), header(header), cta(cta), task(cta.task), step(cta.step) {}

  __device__ __forceinline__ bool any() const { return task < cta.stop_task || (task == cta.stop_task && step < cta.stop_step); }

  __device__ __forceinline__ Part get() const {
    const int in_prefill = header.num_prefill_tiles * num_kv_heads;  // tasks
    const bool prefill = task < in_prefill;
    const int first = prefill ? 0 : header.num_prefill_tiles, of_class = task - (prefill ? 0 : in_prefill);
    const int count = (prefill ? header.num_prefill_tiles : header.num_tiles) - first;
    Part part;
    part.kv_head = of_class / count;
    part.tile = tiles[first + of_class % count];
    const bool head = step > 0, tail = task == cta.stop_task;  // does not begin, does not end with the task
    const int origin = part.tile.kv_start & -STEP;
    part.kv_start = head ? origin + step * STEP : part.tile.kv_start;
    part.kv_stop = tail ? origin + cta.stop_step * STEP : part.tile.kv_stop;
    if (part.kv_stop > part.tile.kv_stop) part.kv_stop = part.tile.kv_stop;
    if (part.tile.num_parts > 1) {
      part.first_slot = part.kv_head * header.slots_per_head + part.tile.first_slot;
      part.slot = part.first_slot + part.tile.part;
      part.num_parts = part.tile.num_parts;
    } else if (head) {
      part.slot = cta.slot;
      part.first_slot = cta.head_first_slot;
      part.num_parts = cta.head_parts;
    } else {
      part.slot = part.first_slot = cta.slot + (cta.step > 0);
      part.num_parts = tail ? cta.tail_parts : 1;
    }
    return part;
  }

  __device__ __forceinline__ void advance(int parts = 1) {
    task += parts;
    if (parts > 0) step = 0;
  }

 private:
  const Tile* tiles;
  int num_kv_heads;
  Header header;
  Cta cta;
  int task, step;  // where the next part begins
};

// The rows of a tile for one kv head: packed row r is query head r % group_size of the group, of token r / group_size.
struct TileRows {
  int first, count;  // packed rows
  int group_size, num_heads;
  int first_position;  // of the sequence's first token
  long long first_index;  // of that token's row for the group's first head, in q and out [num_tokens, num_heads, ...]

  __device__ __forceinline__ TileRows(const Params& params, const Part& part)
      : first(part.tile.first_row),
        count(part.tile.num_rows),
        group_size(params.group_size),
        num_heads(params.num_kv_heads * params.group_size),
        first_position(part.tile.first_position),
        first_index(static_cast<long long>(part.tile.first_token) * num_heads + part.kv_head * group_size) {}

  __device__ __forceinline__ int token(int row) const { return (first + row) / group_size; }  // of the sequence
  __device__ __forceinline__ int position(int row) const { return first_position + token(row); }
  __device__ __forceinline__ long long index(int row) const {
    const int head = (first + row) - token(row) * group_size;
    return first_index + static_cast<long long>(token(row)) * num_heads + head;
  }
};

// What happens to memory by itself or late: copies, mbarriers, and stores that one block leaves for another.
//
// A copy lands when it is issued, at any later moment, or not before it is waited for. A store for others lands at once, or not
// before a thread that knows of it releases it: its own thread, or one that has met that thread since at a barrier.
#include "fiber.h"

#include <array>
#include <algorithm>
#include <cstdlib>

namespace simt {

std::vector<Event> events;
std::vector<HeldStore> outlived;

static size_t shared_place(const Block& block, const void* address, size_t bytes) {
  size_t offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset >= block.shared_bytes || bytes > block.shared_bytes - offset) {
    fail("not an address in the shared memory of the block");
  }
  return offset;
}
size_t shared_place(const void* address) { return shared_place(*current().block, address, 1); }

void happen_later(Block& block, std::function<void()> what, const char* unfinished) {
  if (one_in(4)) {
    what();
  } else {
    events.push_back({&block, std::move(what), unfinished});
  }
}

// ---- cp.async ---------------------------------------------------------------------------------------------------
static void mark_unfenced(const Fiber& fiber, const void* target, size_t bytes) {
  Block& block = *fiber.block;
  size_t offset = static_cast<const unsigned char*>(target) - block.shared;
  if (offset >= block.shared_bytes) return;
  Unfenced mine = {static_cast<unsigned short>(fiber.index.x + 1), fiber.num_fences};
  size_t end = std::min((offset + bytes + 15) / 16, block.unfenced.size());
  std::fill(block.unfenced.begin() + offset / 16, block.unfenced.begin() + end, mine);
}

static bool is_unfenced(const Block& block, size_t place) {
  Unfenced state = block.unfenced[place / 16];
  return state.thread && block.threads[state.thread - 1]->num_fences == state.fences;
}

void note_store(const void* target, size_t bytes) { mark_unfenced(current(), target, bytes); }

static void land(const Fiber& fiber, const Copy& copy) {
  memcpy(copy.target, copy.source, copy.bytes);
  mark_unfenced(fiber, copy.target, copy.bytes);
}

template <class Predicate>
static void land_if(Fiber& fiber, Predicate chosen) {
  auto& copies = fiber.copies;
  for (size_t i = 0; i < copies.size();) {
    if (chosen(copies[i])) {
      land(fiber, copies[i]);
      copies[i] = copies.back();
      copies.pop_back();
    } else {
      i++;
    }
  }
}

void land_some_copies() {
  land_if(current(), [](const Copy&) { return one_in(8); });
}

void copy_async(void* target, const void* source, size_t bytes) {
  Fiber& fiber = current();
  Copy copy = {target, source, bytes, fiber.open_group, fiber.num_copies++};
  if (one_in(4)) {
    land(fiber, copy);
  } else {
    fiber.copies.push_back(copy);
  }
}

void commit_copies() { current().open_group++; }

void wait_copies(unsigned pending) {
  unsigned open = current().open_group;
  land_if(current(), [=](const Copy& copy) { return copy.group + pending < open; });
}

void fence_proxy_async() { current().num_fences++; }

const unsigned char* seen_by_wgmma(const Block& block, size_t offset, size_t bytes) {
  static const unsigned char nothing[16] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
  if (offset + bytes > block.shared_bytes) return nullptr;
  return is_unfenced(block, offset) ? nothing : block.shared + offset;
}

// ---- mbarriers --------------------------------------------------------------------------------------------------
static constexpr unsigned long long cookie = 0x7c6d62617272697cu;  // what the 8 bytes hold, so that who overwrites them shows

static Mbarrier& mbarrier_at(Block& block, const unsigned long long* address) {
  auto found = block.mbarriers.find(shared_place(block, address, sizeof *address));
  if (found == block.mbarriers.end() || *address != cookie) fail("an mbarrier that was not initialised, or was overwritten");
  return found->second;
}

static void count(Mbarrier& barrier, unsigned arrivals, long bytes) {
  if (arrivals > barrier.pending) fail("more arrivals at an mbarrier than its count");
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (std::abs(barrier.bytes) >= 1 << 20) fail("more than 2^20 - 1 bytes expected at an mbarrier");
  progress();
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.count;
  barrier.generation++;
  learn(barrier.known_after, barrier.known);
  barrier.known.clear();
}

void mbarrier_init(unsigned long long* address, unsigned count) {
  Block& block = *current().block;
  size_t place = shared_place(block, address, sizeof *address);
  if (count == 0 || count >= 1 << 20) fail("an mbarrier's count must be 1 to 2^20 - 1");
  Mbarrier barrier = {};
  barrier.count = barrier.pending = count;
  barrier.maker = &current();
  if (!block.mbarriers.emplace(place, barrier).second) fail("an mbarrier initialised twice");
  *address = cookie;
}

void fence_mbarrier_init() {
  for (auto& [place, barrier] : current().block->mbarriers) {
    if (barrier.maker == me) barrier.maker = nullptr;
  }
}

void mbarrier_arrive(unsigned long long* address, unsigned expected_bytes) {
  if (one_in(8)) yield();
  Block& block = *current().block;
  Mbarrier& barrier = mbarrier_at(block, address);
  if (!block.held.empty()) learn(barrier.known, current().known);
  barrier.bytes += expected_bytes;
  count(barrier, 1, 0);
}

void mbarrier_arrive_after_copies(unsigned long long* address) {
  Fiber& fiber = current();
  Block& block = *fiber.block;
  mbarrier_at(block, address);
  unsigned before = fiber.num_copies;
  auto arrive = [=, &fiber, &block] {
    land_if(fiber, [=](const Copy& copy) { return copy.number < before; });
    count(mbarrier_at(block, address), 1, 0);
  };
  happen_later(block, arrive, nullptr);
}

void mbarrier_wait(const unsigned long long* address, unsigned parity) {
  Block& block = *current().block;
  if (one_in(8)) yield();
  Mbarrier& barrier = mbarrier_at(block, address);
  if ((barrier.generation & 1) == (parity & 1)) wait_while(barrier.generation, parity & 1, 1);
  if (!block.held.empty()) learn(current().known, barrier.known_after);
}

// ---- the copy engine --------------------------------------------------------------------------------------------
static void copy_to_mbarrier(void* target, size_t bytes, unsigned long long* address, std::function<void(Block&)> copy) {
  Block& block = *current().block;
  size_t place = shared_place(block, target, bytes);
  if (mbarrier_at(block, address).maker) fail("a copy to an mbarrier without fence_mbarrier_init");
  auto land = [=, &block] {
    copy(block);
    for (size_t i = place; i < place + bytes; i += 16) {
      if (is_unfenced(block, i)) memset(block.shared + i, 255, 16);  // which of both writes came last is not defined
      block.unfenced[i / 16] = {};
    }
    count(mbarrier_at(block, address), 0, -long(bytes));
  };
  happen_later(block, land, "a block ended before its bulk copies had landed");
}

static bool aligned(const void* address, size_t to) { return reinterpret_cast<size_t>(address) % to == 0; }

void copy_bulk(void* target, const void* source, size_t bytes, unsigned long long* address) {
  if (!aligned(target, 16) || !aligned(source, 16) || bytes % 16) fail("a bulk copy that is not in multiples of 16 bytes");
  copy_to_mbarrier(target, bytes, address, [=](Block&) { memcpy(target, source, bytes); });
}

void copy_box(void* target, const HostTensorMap& map, const int (&at)[4], unsigned long long* address) {
  if (!aligned(target, map.swizzled ? 1024 : 128)) fail("the target of a tensor copy is not aligned");
  const size_t place = shared_place(target), elements = map.box[0] * map.box[1] * map.box[2] * map.box[3];
  const std::array<long long, 4> first = {at[0], at[1], at[2], at[3]};
  copy_to_mbarrier(target, elements * map.element_bytes, address, [=](Block& block) {
    for (size_t i = 0; i < elements; i++) {
      size_t to = place + i * map.element_bytes, rest = i;
      if (map.swizzled) to ^= (to >> 7 & 7) << 4;
      const unsigned char* from = map.base;
      bool inside = true;
      for (int d = 0; d < 4; rest /= map.box[d++]) {
        const long long index = first[d] + static_cast<long long>(rest % map.box[d]);
        inside = inside && index >= 0 && index < map.sizes[d];
        from += index * map.strides[d];
      }
      if (inside) {
        memcpy(block.shared + to, from, map.element_bytes);
      } else {
        memset(block.shared + to, 0, map.element_bytes);
      }
    }
  });
}

// ---- stores for other blocks ------------------------------------------------------------------------------------
void learn(Clock& mine, const Clock& other) {
  if (mine.size() < other.size()) mine.resize(other.size());
  for (size_t i = 0; i < other.size(); i++) mine[i] = std::max(mine[i], other[i]);
}

static bool known_to(const Fiber& fiber, const HeldStore& store) {
  return store.thread < fiber.known.size() && store.number < fiber.known[store.thread];
}

template <class Predicate>
static void land_held_if(Block& block, Predicate chosen) {
  auto landed = [=](const HeldStore& store) {
    if (!chosen(store)) return false;
    memcpy(store.target, store.value.data(), store.bytes);
    return true;
  };
  block.held.erase(std::remove_if(block.held.begin(), block.held.end(), landed), block.held.end());
}

static void land_overlapping(const void* address, size_t bytes) {
  const Fiber& fiber = current();
  auto* first = static_cast<const unsigned char*>(address);
  land_held_if(*fiber.block, [=, &fiber](const HeldStore& store) {
    return known_to(fiber, store) && store.target < first + bytes && first < store.target + store.bytes;
  });
}

void store_late(void* target, const void* value, size_t bytes) {
  Fiber& fiber = current();
  if (one_in(4)) {
    land_overlapping(target, bytes);
    memcpy(target, value, bytes);
    return;
  }
  HeldStore store = {static_cast<unsigned char*>(target), {}, unsigned(bytes), fiber.index.x, fiber.num_stores++};
  memcpy(store.value.data(), value, bytes);
  *static_cast<volatile unsigned char*>(target);  // a fault comes now
  fiber.block->held.push_back(store);
  fiber.known.resize(block_dim.x);
  fiber.known[fiber.index.x] = fiber.num_stores;
}

void see_own_stores(const void* address, size_t bytes) {
  if (!current().block->held.empty()) land_overlapping(address, bytes);
}

void release_stores() {
  const Fiber& fiber = current();
  land_held_if(*fiber.block, [&](const HeldStore& store) { return known_to(fiber, store); });
}

void land_outlived() {
  for (const HeldStore& store : outlived) memcpy(store.target, store.value.data(), store.bytes);
  outlived.clear();
}

// ---- a block's beginning and end --------------------------------------------------------------------------------
void begin_block_memory(Block& block) {
  block.mbarriers.clear();
  block.held.clear();
  block.unfenced.assign((block.shared_bytes + 15) / 16, {});
}

const char* end_block_memory(Block& block) {
  outlived.insert(outlived.end(), block.held.begin(), block.held.end());
  const char* wrong = nullptr;
  for (size_t i = 0; i < events.size();) {
    if (events[i].block != &block) {
      i++;
      continue;
    }
    if (events[i].unfinished) wrong = events[i].unfinished;
    std::swap(events[i], events.back());
    events.pop_back();
  }
  for (const Warpgroup& group : block.warpgroups) {
    if (!group.queue.empty()) wrong = "a block ended before its wgmma had, or not all warps of a warpgroup issued it";
  }
  return wrong;
}

}  // namespace simt

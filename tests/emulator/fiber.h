// Inside the emulator: what a thread, a warp and a block are, and who waits for what.
#pragma once
#include "simt.h"

#include <array>
#include <csetjmp>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace simt {

struct Fiber;
struct Block;

// How many stores of each thread of a block someone knows to come before him; nothing where it is empty.
using Clock = std::vector<unsigned>;

// Where threads wait for one another. `generation` counts the meetings that are over.
struct Rendezvous {
  unsigned arrived = 0;
  unsigned generation = 0;
  int kind = 0;
  Clock known;  // to those who have arrived
};

// Two sets of boxes suffice: nobody posts for the next meeting but one before all have come to the next.
struct Warp {
  Rendezvous meeting;
  alignas(16) unsigned char boxes[2][warp_size][box_bytes];
};

struct Mbarrier {
  unsigned count, pending;
  unsigned generation = 0;  // phases that are over
  long bytes = 0;           // expected, not yet here
  const Fiber* maker;       // until its fence
  Clock known, known_after;  // to those who have arrived in this phase; to who sees the last one end
};

// One wgmma of four warps, each of which multiplies its own 16 rows.
struct Multiplication {
  Product product;
  unsigned threads[4] = {};  // of each warp that have issued it
  unsigned short a[64][16];
  float* d[128];
};
struct Warpgroup {
  std::deque<Multiplication> queue;  // those not done by all four warps
  unsigned first = 0, issued = 0;    // number of the queue's first; how many all four warps have issued
  unsigned done[4] = {};             // by each warp
};

// A thread's results of products that it has not waited for.
struct Accumulator {
  float* d;
  unsigned size, last;  // the number of the last product
  std::array<float, 64> value;
};

struct HeldStore {
  unsigned char* target;
  std::array<unsigned char, 16> value;
  unsigned bytes, thread, number;
};

struct Unfenced {  // 16 bytes of shared memory: who has last written them other than by the copy engine, and not yet fenced
  unsigned short thread;  // + 1; 0: nobody
  unsigned fences;        // of the thread, before
};

struct Block {
  unsigned alive;  // threads that have not ended
  Fiber** threads;
  Rendezvous barrier, named[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<size_t, Mbarrier> mbarriers;  // by their place in shared memory
  std::vector<HeldStore> held;           // in each thread's order
  std::vector<Unfenced> unfenced;
  std::vector<unsigned char> storage;
  unsigned char* shared;  // inside `storage`, between its guard zones
  size_t shared_bytes;
};

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
  unsigned group, number;
};

struct Fiber : Thread {
  Block* block;
  bool done;
  const unsigned* watched;  // waits until it is no longer `unwanted` in the bits of `mask`
  unsigned unwanted, mask;
  std::vector<Copy> copies;  // issued, not yet landed
  unsigned open_group, num_copies;
  unsigned num_fences;  // fence.proxy.async
  unsigned num_stores;  // for others
  Clock known;
  unsigned num_products;
  std::vector<unsigned> product_groups;  // for each group committed, the products until then
  std::vector<Accumulator> accumulators;
  bool registers_fenced;
  std::jmp_buf context;
  std::unique_ptr<char[]> stack;

  bool ready() const { return !done && (!watched || (*watched ^ unwanted) & mask); }
};

// Something that happens by itself, between now and when it is waited for.
struct Event {
  Block* block;
  std::function<void()> happen;
  const char* unfinished;  // what is wrong if the block ends before, or nullptr
};

extern std::vector<Event> events;
extern std::vector<HeldStore> outlived;  // stores held back whose block has ended

inline Fiber& current() { return *static_cast<Fiber*>(me); }
unsigned random();

// Ends the launch, from inside a thread or an event.
[[noreturn]] void fail(const char* why);

// Lets others run until a counter has changed in the bits of `mask`.
void wait_while(const unsigned& counter, unsigned unwanted, unsigned mask);
void progress();  // this is no livelock

void happen_later(Block& block, std::function<void()> what, const char* unfinished);
void land_some_copies();  // of this thread, by chance
void begin_block_memory(Block& block);
const char* end_block_memory(Block& block);  // what is left undone
void land_outlived();

void learn(Clock& mine, const Clock& other);

// What lies at a place in shared memory for wgmma: nullptr where the block has no such place.
const unsigned char* seen_by_wgmma(const Block& block, size_t offset, size_t bytes);

}  // namespace simt

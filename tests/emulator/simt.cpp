// The scheduler of the emulator: it finds what a run on a GPU hides.
//
// Every thread is a fiber. One warp runs as far ahead as the barriers let it, its lanes in a random order, so whatever a
// missing barrier would have protected is read too early. Shared memory starts as 0xff (a NaN in every float type, -1 in
// every integer) between two guard zones. An asynchronous copy lands when it is issued, at any later moment, or not before
// it is waited for. Blocks begin in a random order, a bounded number of them resident at a time. A fault, a deadlock or a
// write into a guard zone ends the launch with a sentence.
#include "simt.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <deque>
#include <memory>
#include <ucontext.h>
#include <vector>

namespace simt {

constexpr size_t stack_bytes = 32 << 10;
constexpr size_t guard_bytes = 8 << 10;
constexpr unsigned max_resident_blocks = 64;
constexpr unsigned max_resident_threads = 4096;
constexpr long livelock = 5'000'000;  // threads resumed since one last met others or ended
constexpr unsigned char poison = 0xff;

// Where threads wait for one another. `generation` counts the meetings that are over.
struct Rendezvous {
  unsigned arrived = 0;
  unsigned generation = 0;
  int kind = 0;
};

// Two sets of boxes suffice: nobody posts for the next meeting but one before all have come to the next.
struct Warp {
  Rendezvous meeting;
  alignas(16) unsigned char boxes[2][warp_size][box_bytes];
};

struct Block {
  unsigned alive;  // threads that have not ended
  Rendezvous barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> storage;
  unsigned char* shared;  // inside `storage`, between its guard zones
};

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
  unsigned group;
};

struct Fiber : Thread {
  Block* block;
  bool done;
  const Rendezvous* waiting;  // for its generation to change from `generation`
  unsigned generation;
  std::vector<Copy> copies;  // issued, not yet landed
  unsigned open_group;
  std::jmp_buf context;
  std::unique_ptr<char[]> stack;

  bool ready() const { return !done && (!waiting || waiting->generation != generation); }
};

Thread* me;
uint3 block_dim, grid_dim;

static std::deque<Fiber> fibers;  // kept from launch to launch: to make one takes longer than to run it
static std::jmp_buf scheduler;
static void (*entry)(void* const*);
static void* const* arguments;
static const char* failure;
static long idle;
static unsigned random_state;

static Fiber& current() { return *static_cast<Fiber*>(me); }

static unsigned random() {  // xorshift32 (Marsaglia 2003)
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

bool one_in(unsigned n) { return random() % n == 0; }

// Ends the launch, from inside a thread: back to where the scheduler resumed it.
[[noreturn]] static void fail(const char* why) {
  failure = why;
  _longjmp(scheduler, 1);
}

// ---- asynchronous copies ----------------------------------------------------------------------------------------
static void land(const Copy& copy) { memcpy(copy.target, copy.source, copy.bytes); }

template <class Predicate>
static void land_if(Predicate chosen) {
  auto& copies = current().copies;
  for (size_t i = 0; i < copies.size();) {
    if (chosen(copies[i])) {
      land(copies[i]);
      copies[i] = copies.back();
      copies.pop_back();
    } else {
      i++;
    }
  }
}

void copy_async(void* target, const void* source, size_t bytes) {
  Copy copy = {target, source, bytes, current().open_group};
  if (one_in(4)) {
    land(copy);
  } else {
    current().copies.push_back(copy);
  }
}

void commit_copies() { current().open_group++; }

void wait_copies(unsigned pending) {
  unsigned open = current().open_group;
  land_if([=](const Copy& copy) { return copy.group + pending < open; });
}

// ---- waiting ----------------------------------------------------------------------------------------------------
__attribute__((noinline)) static void pause() {
  if (_setjmp(current().context) == 0) _longjmp(scheduler, 1);
}

void yield() {
  land_if([](const Copy&) { return one_in(8); });
  pause();
}

static void release(Rendezvous& rendezvous) {
  rendezvous.arrived = 0;
  rendezvous.generation++;
}

// Waits until `expected` threads have come, all for the same kind of meeting.
static void meet(Rendezvous& rendezvous, unsigned expected, int kind) {
  if (rendezvous.arrived == 0) rendezvous.kind = kind;
  if (rendezvous.kind != kind) fail("divergence: threads that must meet are at different barriers or warp instructions");
  idle = 0;
  if (++rendezvous.arrived == expected) {
    release(rendezvous);
    return;
  }
  current().waiting = &rendezvous;
  current().generation = rendezvous.generation;
  yield();
  current().waiting = nullptr;
}

static void meet_warp(unsigned mask, int kind) {
  if (mask != full_mask) fail("a partial warp mask: the emulator knows only full warps");
  meet(current().block->warps[me->index.x / warp_size].meeting, warp_size, kind);
}

void sync_warp(unsigned mask) { meet_warp(mask, 0); }

void sync_block(int line) { meet(current().block->barrier, current().block->alive, line); }

const unsigned char* post(const void* value, size_t bytes, unsigned mask) {
  Warp& warp = current().block->warps[me->index.x / warp_size];
  auto& boxes = warp.boxes[warp.meeting.generation % 2];
  memcpy(boxes[lane()], value, bytes);
  meet_warp(mask, int(bytes));
  return boxes[0];
}

// ---- running threads --------------------------------------------------------------------------------------------
// A fiber's whole life: one thread after another, of any block and any launch.
static void live() {
  for (;;) {
    entry(arguments);
    Block& block = *current().block;
    current().done = true;
    idle = 0;
    block.alive--;
    if (block.alive && block.barrier.arrived == block.alive) release(block.barrier);  // the ended count as arrived
    pause();
  }
}

__attribute__((noinline)) static void resume(Fiber& fiber) {
  me = &fiber;
  idle++;
  if (_setjmp(scheduler)) return;
  if (fiber.stack) _longjmp(fiber.context, 1);
  fiber.stack.reset(new char[stack_bytes]);
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = stack_bytes;
  start.uc_link = nullptr;
  makecontext(&start, live, 0);
  setcontext(&start);
}

// Runs one warp, lanes in random order, until all of its lanes wait for other warps (or, now and then, not so far).
static bool run_warp(Fiber* lanes[]) {
  bool ran = false;
  for (bool moved = true; moved && !(ran && one_in(16));) {
    moved = false;
    unsigned first = random(), step = random() | 1;
    for (unsigned i = 0; i < warp_size && !failure; i++) {
      Fiber& fiber = *lanes[(first + i * step) % warp_size];
      if (!fiber.ready()) continue;
      resume(fiber);
      ran = moved = true;
    }
  }
  return ran;
}

// ---- running blocks ---------------------------------------------------------------------------------------------
static void begin_block(Block& block, Fiber* threads[], unsigned long number, size_t shared_bytes) {
  unsigned long row = number / grid_dim.x;
  uint3 index = {unsigned(number % grid_dim.x), unsigned(row % grid_dim.y), unsigned(row / grid_dim.y)};
  block.alive = block_dim.x;
  block.barrier = {};
  block.warps.assign(block_dim.x / warp_size, {});
  block.storage.assign(shared_bytes + 2 * guard_bytes + 128, poison);
  void* start = block.storage.data() + guard_bytes;
  size_t room = shared_bytes + 128;
  block.shared = static_cast<unsigned char*>(std::align(128, shared_bytes, start, room));
  for (unsigned t = 0; t < block_dim.x; t++) {
    Fiber& fiber = *threads[t];
    fiber.index = {t, 0, 0};
    fiber.block_index = index;
    fiber.shared = block.shared;
    fiber.block = &block;
    fiber.done = false;
    fiber.waiting = nullptr;
    fiber.copies.clear();
    fiber.open_group = 0;
  }
}

static bool guards_intact(const Block& block, size_t shared_bytes) {
  auto untouched = [](unsigned char byte) { return byte == poison; };
  const unsigned char *first = block.storage.data(), *shared = block.shared;
  return std::all_of(first, shared, untouched) &&
         std::all_of(shared + shared_bytes, first + block.storage.size(), untouched);
}

static const char* run_grid(size_t shared_bytes) {
  unsigned long total = static_cast<unsigned long>(grid_dim.x) * grid_dim.y * grid_dim.z;
  unsigned threads = block_dim.x;
  unsigned resident = std::min<unsigned long>({total, max_resident_blocks, std::max(1u, max_resident_threads / threads)});
  unsigned warps = resident * threads / warp_size;
  while (fibers.size() < size_t(resident) * threads) fibers.emplace_back();
  std::vector<Fiber*> all;
  for (unsigned i = 0; i < resident * threads; i++) all.push_back(&fibers[i]);
  std::vector<unsigned long> order(total);
  for (unsigned long i = 0; i < total; i++) {
    order[i] = i;
    std::swap(order[i], order[random() % (i + 1)]);
  }
  std::vector<Block> blocks(resident);
  for (unsigned b = 0; b < resident; b++) begin_block(blocks[b], &all[b * threads], order[b], shared_bytes);

  unsigned long begun = resident, ended = 0;
  while (ended < total) {
    unsigned first = random() % warps, tried = 0;
    while (tried < warps && !run_warp(&all[(first + tried) % warps * warp_size])) tried++;
    if (failure) return failure;
    if (tried == warps) return "deadlock: every thread waits for another";
    if (idle > livelock) return "livelock: threads poll for what never comes";
    unsigned b = (first + tried) % warps * warp_size / threads;
    if (blocks[b].alive) continue;
    if (!guards_intact(blocks[b], shared_bytes)) return "a write outside the shared memory of the block";
    ended++;
    if (begun < total) begin_block(blocks[b], &all[b * threads], order[begun++], shared_bytes);
  }
  return nullptr;
}

// ---- faults -----------------------------------------------------------------------------------------------------
static void on_signal(int signal) {
  fail(signal == SIGSEGV || signal == SIGBUS ? "an access to memory that is not there"
                                             : "undefined behaviour: misaligned access, integer overflow or array bound");
}

// While it lives, a fault in a kernel is a failure of the launch and not the end of the process.
struct Faults {
  static constexpr int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  static constexpr int count = sizeof signals / sizeof *signals;
  struct sigaction actions[count];
  stack_t stack;
  char memory[64 << 10];  // a stack for the handler: the fiber's may have overflowed

  Faults() {
    stack_t mine = {};
    mine.ss_sp = memory;
    mine.ss_size = sizeof memory;
    sigaltstack(&mine, &stack);
    struct sigaction action = {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < count; i++) sigaction(signals[i], &action, &actions[i]);
  }
  ~Faults() {
    for (int i = 0; i < count; i++) sigaction(signals[i], &actions[i], nullptr);
    sigaltstack(&stack, nullptr);
  }
};

const char* launch(void (*kernel)(void* const*), void* const* args, const unsigned* grid, unsigned threads,
                   size_t shared_bytes, unsigned seed) {
  Faults faults;
  entry = kernel;
  arguments = args;
  grid_dim = {grid[0], grid[1], grid[2]};
  block_dim = {threads, 1, 1};
  random_state = seed * 2654435761u | 1;
  idle = 0;
  failure = nullptr;
  const char* what = run_grid(shared_bytes);
  if (what) fibers.clear();  // they stopped in the middle
  return what;
}

}  // namespace simt

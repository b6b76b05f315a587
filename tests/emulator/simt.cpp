// The scheduler of the emulator: it finds what a run on a GPU hides.
//
// Every thread is a fiber. One warp runs as far ahead as the barriers let it, its lanes in a random order, so whatever a
// missing barrier would have protected is read too early. Shared memory starts as 0xff (a NaN in every float type, -1 in
// every integer) between two guard zones. What is asynchronous happens when it is issued, at any later moment, or not before
// it is waited for (memory.cpp, wgmma.cpp). Blocks begin in a random order, a bounded number of them resident at a time. A
// fault, a deadlock or a write into a guard zone ends the launch with a sentence.
#include "fiber.h"

#include <algorithm>
#include <csignal>
#include <ucontext.h>

namespace simt {

constexpr size_t stack_bytes = 32 << 10;
constexpr size_t guard_bytes = 8 << 10;
constexpr unsigned max_resident_blocks = 64;
constexpr unsigned max_resident_threads = 4096;
constexpr long livelock = 5'000'000;  // threads resumed since one last met others or ended
constexpr unsigned char poison = 0xff;
constexpr size_t shared_alignment = 1024;

Thread* me;
uint3 block_dim, grid_dim;

static std::deque<Fiber> fibers;  // kept from launch to launch: to make one takes longer than to run it
static std::jmp_buf scheduler;
static void (*entry)(void* const*);
static void* const* arguments;
static const char* failure;
static long idle;
static unsigned random_state;

unsigned random() {  // xorshift32 (Marsaglia 2003)
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

bool one_in(unsigned n) { return random() % n == 0; }

unsigned long long nanoseconds() {
  static unsigned long long clock;
  return clock += 1000;
}

[[noreturn]] void fail(const char* why) {
  failure = why;
  _longjmp(scheduler, 1);
}

// ---- waiting ----------------------------------------------------------------------------------------------------
__attribute__((noinline)) static void pause() {
  if (_setjmp(current().context) == 0) _longjmp(scheduler, 1);
}

void yield() {
  land_some_copies();
  pause();
}

void progress() { idle = 0; }

void wait_while(const unsigned& counter, unsigned unwanted, unsigned mask) {
  current().watched = &counter;
  current().unwanted = unwanted;
  current().mask = mask;
  yield();
  current().watched = nullptr;
}

// Lets those who wait go on. What any of them knew of the block's stores for others, they now all know.
static void release(Block& block, Rendezvous& rendezvous) {
  if (!block.held.empty()) {
    for (unsigned t = 0; t < block_dim.x; t++) {
      if (block.threads[t]->watched == &rendezvous.generation) learn(block.threads[t]->known, rendezvous.known);
    }
  }
  rendezvous.known.clear();
  rendezvous.arrived = 0;
  rendezvous.generation++;
}

// Counts this thread at a meeting of one kind; whether it was the last of `expected`. A negative kind orders no memory.
static bool arrive(Rendezvous& rendezvous, unsigned expected, int kind) {
  Block& block = *current().block;
  if (rendezvous.arrived == 0) rendezvous.kind = kind;
  if (rendezvous.kind != kind) fail("divergence: threads that must meet are at different barriers or warp instructions");
  progress();
  if (!block.held.empty() && kind >= 0) learn(rendezvous.known, current().known);
  if (++rendezvous.arrived != expected) return false;
  release(block, rendezvous);
  return true;
}

static void meet(Rendezvous& rendezvous, unsigned expected, int kind) {
  const unsigned generation = rendezvous.generation;
  current().watched = &rendezvous.generation;  // for `release`, in case that it is the last
  const bool last = arrive(rendezvous, expected, kind);
  current().watched = nullptr;
  if (!last) wait_while(rendezvous.generation, generation, ~0u);
}

static void meet_warp(unsigned mask, int kind) {
  if (mask != full_mask) fail("a partial warp mask: the emulator knows only full warps");
  meet(current().block->warps[me->index.x / warp_size].meeting, warp_size, kind);
}

void sync_warp(unsigned mask) { meet_warp(mask, 0); }

void sync_block(int line) { meet(current().block->barrier, current().block->alive, line); }

static Rendezvous& named(int id, int threads) {
  if (id < 1 || id > 15) fail("a named barrier is 1 to 15");
  if (threads < 1 || threads % warp_size || unsigned(threads) > block_dim.x) fail("a named barrier is for whole warps");
  return current().block->named[id];
}
void sync_named(int id, int threads) { meet(named(id, threads), threads, threads); }
void arrive_named(int id, int threads) { arrive(named(id, threads), threads, threads); }

const unsigned char* post(const void* value, size_t bytes, unsigned mask) {
  Warp& warp = current().block->warps[me->index.x / warp_size];
  auto& boxes = warp.boxes[warp.meeting.generation % 2];
  memcpy(boxes[lane()], value, bytes);
  meet_warp(mask, -int(bytes));
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
    if (block.alive && block.barrier.arrived == block.alive) release(block, block.barrier);  // the ended count as arrived
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

// Lets one event happen, if there is any.
__attribute__((noinline)) static bool run_event() {
  if (events.empty()) return false;
  size_t which = random() % events.size();
  auto happen = std::move(events[which].happen);
  if (which + 1 < events.size()) events[which] = std::move(events.back());
  events.pop_back();
  if (!_setjmp(scheduler)) happen();
  return true;
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
  block.threads = threads;
  block.barrier = {};
  std::fill(std::begin(block.named), std::end(block.named), Rendezvous());
  block.warps.assign(block_dim.x / warp_size, {});
  block.warpgroups.assign(block_dim.x / warp_size / 4, {});
  block.storage.assign(shared_bytes + 2 * guard_bytes + shared_alignment, poison);
  void* start = block.storage.data() + guard_bytes;
  size_t room = shared_bytes + shared_alignment;
  block.shared = static_cast<unsigned char*>(std::align(shared_alignment, shared_bytes, start, room));
  block.shared_bytes = shared_bytes;
  begin_block_memory(block);
  for (unsigned t = 0; t < block_dim.x; t++) {
    Fiber& fiber = *threads[t];
    fiber.index = {t, 0, 0};
    fiber.block_index = index;
    fiber.shared = block.shared;
    fiber.block = &block;
    fiber.done = false;
    fiber.watched = nullptr;
    fiber.copies.clear();
    fiber.open_group = fiber.num_copies = fiber.num_fences = fiber.num_stores = fiber.num_products = 0;
    fiber.known.clear();
    fiber.product_groups.clear();
    fiber.accumulators.clear();
    fiber.registers_fenced = false;
  }
}

static bool guards_intact(const Block& block) {
  auto untouched = [](unsigned char byte) { return byte == poison; };
  const unsigned char *first = block.storage.data(), *shared = block.shared;
  return std::all_of(first, shared, untouched) &&
         std::all_of(shared + block.shared_bytes, first + block.storage.size(), untouched);
}

// Who waits: how many threads at mbarriers, and which is the first of these.
static const char* describe_deadlock(const std::vector<Fiber*>& all) {
  static char text[200];
  unsigned waiting = 0, at_mbarriers = 0;
  char first[80] = "";
  for (const Fiber* fiber : all) {
    if (fiber->done) continue;
    waiting++;
    for (const auto& [place, barrier] : fiber->block->mbarriers) {
      if (fiber->watched != &barrier.generation) continue;
      if (at_mbarriers++) continue;
      sprintf(first, ", thread %u of block %u for parity %u of the one at byte %zu", fiber->index.x, fiber->block_index.x,
              fiber->unwanted & 1, place);
    }
  }
  sprintf(text, "deadlock: every thread waits for another, %u of %u at an mbarrier%s", at_mbarriers, waiting, first);
  return text;
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
    bool happened = (tried == warps || one_in(4)) && run_event();
    if (failure) return failure;
    if (tried == warps && happened) continue;
    if (tried == warps) return describe_deadlock(all);
    if (idle > livelock) return "livelock: threads poll for what never comes";
    unsigned b = (first + tried) % warps * warp_size / threads;
    if (blocks[b].alive) continue;
    if (const char* undone = end_block_memory(blocks[b])) return undone;
    if (!guards_intact(blocks[b])) return "a write outside the shared memory of the block";
    ended++;
    if (begun < total) begin_block(blocks[b], &all[b * threads], order[begun++], shared_bytes);
  }
  land_outlived();
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
  events.clear();
  outlived.clear();
  const char* what = run_grid(shared_bytes);
  if (what) fibers.clear();  // they stopped in the middle
  return what;
}

}  // namespace simt

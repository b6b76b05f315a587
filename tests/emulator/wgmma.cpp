// wgmma: four warps multiply, and see nothing of it before they wait.
//
// A warp reads the operands in shared memory at one moment between its own issue and the warpgroup's first wait for it; the
// accumulators are NaN until the wait.
#include "fiber.h"

#include <algorithm>
#include <limits>

namespace simt {

constexpr unsigned group_size = 4 * warp_size;

static Warpgroup& my_group() {
  size_t number = me->index.x / group_size;
  if ((number + 1) * group_size > block_dim.x) fail("wgmma in a warpgroup of fewer than four warps");
  return current().block->warpgroups[number];
}

static float to_float(bool f16, unsigned short bits) {
  return f16 ? static_cast<float>(simt_bits<_Float16>(bits)) : __uint_as_float(unsigned(bits) << 16);
}

// Rows first .. first + count - 1, of M or N, of what a descriptor describes, all 16 k; in memory 8 elements lie together.
static void read_operand(const Block& block, unsigned long long descriptor, bool f16, bool mn_major, unsigned first,
                         unsigned count, float (*out)[16]) {
  auto field = [=](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
  size_t start = field(0), leading = field(16), stride = field(32);
  for (unsigned i = 0; i < 2 * count; i++) {
    unsigned row = first + (mn_major ? i / 16 * 8 : i / 2), k = mn_major ? i % 16 : i % 2 * 8;
    size_t place = mn_major ? start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                            : start + row / 8 * stride + row % 8 * 128 + k * 2;
    const unsigned char* at = seen_by_wgmma(block, place ^ (place >> 7 & 7) << 4, 16);
    if (!at) fail("wgmma reads outside of the shared memory of the block");
    unsigned short bits[8];
    memcpy(bits, at, sizeof bits);
    for (unsigned j = 0; j < 8; j++) {
      out[row - first + (mn_major ? j : 0)][k + (mn_major ? 0 : j)] = to_float(f16, bits[j]);
    }
  }
}

// The next product of one warp: its 16 rows.
static void multiply(Block& block, unsigned number, unsigned warp) {
  Warpgroup& group = block.warpgroups[number];
  const Multiplication& now = group.queue[group.done[warp] - group.first];
  const Product& product = now.product;
  const unsigned n = product.n, first_row = 16 * warp;
  static float a[16][16], b[128][16], b_transposed[16][128], sums[16][128];
  if (product.a_in_registers) {
    for (unsigned i = 0; i < 256; i++) a[i / 16][i % 16] = to_float(product.f16, now.a[first_row + i / 16][i % 16]);
  } else {
    read_operand(block, product.a, product.f16, false, first_row, 16, a);
  }
  read_operand(block, product.b, product.f16, product.a_in_registers, 0, n, b);
  for (unsigned i = 0; i < 16 * n; i++) b_transposed[i % 16][i / 16] = b[i / 16][i % 16];
  for (unsigned row = 0; row < 16; row++) {
    float* sum = sums[row];
    std::fill(sum, sum + n, 0.0f);
    for (unsigned k = 0; k < 16; k++) {
      for (unsigned column = 0; column < n; column++) sum[column] += a[row][k] * b_transposed[k][column];
    }
  }
  for (unsigned thread = warp * warp_size; thread < (warp + 1) * warp_size; thread++) {
    for (Accumulator& accumulator : block.threads[number * group_size + thread]->accumulators) {
      if (accumulator.d != now.d[thread]) continue;
      for (unsigned i = 0; i < accumulator.size; i++) {
        unsigned row = thread % warp_size / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        accumulator.value[i] = sums[row][column] + (product.accumulate ? accumulator.value[i] : 0.0f);
      }
    }
  }
  group.done[warp]++;
  if (std::all_of(group.done, group.done + 4, [&](unsigned done) { return done > group.first; })) {
    group.queue.pop_front();
    group.first++;
  }
}

static void multiply_until(Block& block, unsigned number, unsigned warp, unsigned done) {
  while (block.warpgroups[number].done[warp] < done) multiply(block, number, warp);
}

static bool same(const Product& x, const Product& y) {
  return x.n == y.n && x.f16 == y.f16 && x.a_in_registers == y.a_in_registers && x.accumulate == y.accumulate && x.b == y.b &&
         (x.a_in_registers || x.a == y.a);
}

static bool within_an_atom(unsigned long long descriptor) { return (descriptor >> 3 & 7) == 0; }

void wgmma(const Product& product, float* d, const unsigned* a) {
  Fiber& fiber = current();
  Warpgroup& group = my_group();
  if (one_in(8)) yield();
  if (!fiber.registers_fenced) fail("wgmma without wgmma_fence since its registers were used");
  if (!within_an_atom(product.b) || !product.a_in_registers && !within_an_atom(product.a)) {
    fail("a wgmma descriptor that does not begin in the first row of an atom of 1024 bytes");
  }
  unsigned number = fiber.num_products++;
  if (number - group.first == group.queue.size()) group.queue.push_back({product});
  Multiplication& mine = group.queue[number - group.first];
  if (!same(mine.product, product)) fail("divergence: the warps of a warpgroup issue different wgmma");

  unsigned size = product.n / 2, found = 0;
  while (found < fiber.accumulators.size() && fiber.accumulators[found].d != d) found++;
  if (found == fiber.accumulators.size()) {
    Accumulator fresh = {d, size};
    std::copy(d, d + size, fresh.value.begin());
    std::fill(d, d + size, std::numeric_limits<float>::quiet_NaN());
    fiber.accumulators.push_back(fresh);
  }
  fiber.accumulators[found].last = number;

  unsigned thread = me->index.x % group_size, row = thread / warp_size * 16 + lane() / 4, column = lane() % 4 * 2;
  mine.d[thread] = d;
  for (unsigned i = 0; product.a_in_registers && i < 8; i++) {
    mine.a[row + i / 2 % 2 * 8][column + i / 4 * 8 + i % 2] = a[i / 2] >> i % 2 * 16;
  }
  unsigned warp = thread / warp_size, which = me->index.x / group_size;
  if (++mine.threads[warp] < warp_size) return;
  if (std::all_of(mine.threads, mine.threads + 4, [](unsigned threads) { return threads == warp_size; })) group.issued++;
  Block& block = *fiber.block;
  happen_later(block, [=, &block] { multiply_until(block, which, warp, number + 1); }, nullptr);
}

void wgmma_fence() { current().registers_fenced = true; }

void wgmma_commit() { current().product_groups.push_back(current().num_products); }

void wgmma_wait(unsigned pending) {
  Fiber& fiber = current();
  Warpgroup& group = my_group();
  yield();
  auto& groups = fiber.product_groups;
  unsigned until = groups.size() > pending ? groups[groups.size() - 1 - pending] : 0;
  while (group.issued < until) wait_while(group.issued, group.issued, ~0u);
  for (unsigned warp = 0; warp < 4; warp++) multiply_until(*fiber.block, me->index.x / group_size, warp, until);
  for (size_t i = 0; i < fiber.accumulators.size();) {
    Accumulator& accumulator = fiber.accumulators[i];
    if (accumulator.last >= until) {
      i++;
      continue;
    }
    std::copy(accumulator.value.begin(), accumulator.value.begin() + accumulator.size, accumulator.d);
    accumulator = fiber.accumulators.back();
    fiber.accumulators.pop_back();
  }
  fiber.registers_fenced = false;
}

}  // namespace simt

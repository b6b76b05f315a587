// What the machine does at best, for benchmarks to hold their figures against: two ways to read memory, and random data to read.
#include "ptx.cuh"

constexpr int THREADS = 256;
constexpr int RING_WARPS = 5, RING_SLOTS = 4, SLOT_BYTES = 8192;  // a copy must be large: slots of 4 KB read 6 % less a second

// Uniform numbers of variance 1 in bfloat16, two to a word; or, for 8-bit pools, four random bytes to a word, with the bits of
// `byte_mask` only. The hash is Wellons' "lowbias32".
extern "C" __global__ void fill(unsigned* words, long long count, unsigned seed, unsigned byte_mask) {
  for (long long i = blockIdx.x * static_cast<long long>(THREADS) + threadIdx.x; i < count; i += gridDim.x * static_cast<long long>(THREADS)) {
    unsigned hash = static_cast<unsigned>(i) * 2654435761u ^ static_cast<unsigned>(i >> 32) ^ seed, pair[2];
    for (int j = 0; j < 2; j++) {
      hash ^= hash >> 16;
      hash *= 0x7feb352du;
      hash ^= hash >> 15;
      hash *= 0x846ca68bu;
      hash ^= hash >> 16;
      pair[j] = __float_as_uint((hash * 2.3283064e-10f - 0.5f) * 3.4641016f) >> 16;
    }
    words[i] = byte_mask ? hash & byte_mask : pair[0] | pair[1] << 16;
  }
}

struct alignas(16) Chunk {
  unsigned at[4];
};
__device__ __forceinline__ unsigned fold(const Chunk& x) { return x.at[0] ^ x.at[1] ^ x.at[2] ^ x.at[3]; }

// Plain loads, eight of 16 bytes in flight a thread.
extern "C" __global__ void __launch_bounds__(THREADS) read_plain(const Chunk* data, long long count, unsigned* sink) {
  unsigned sum = 0;
  const long long threads = gridDim.x * static_cast<long long>(THREADS);
  for (long long i = blockIdx.x * static_cast<long long>(THREADS) + threadIdx.x; i < count; i += 8 * threads) {
    Chunk chunks[8] = {};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (i + j * threads < count) chunks[j] = data[i + j * threads];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum ^= fold(chunks[j]);
  }
  if (sum == 0x12345678u) *sink = sum;
}

struct RingShared {
  unsigned char slots[RING_WARPS][RING_SLOTS][SLOT_BYTES];
  unsigned long long full[RING_WARPS][RING_SLOTS];
};

// Bulk copies: every warp owns a ring of slots and refills a slot as soon as it has read it. `count` slots of data.
extern "C" __global__ void __launch_bounds__(32 * RING_WARPS, 1) read_ring(const unsigned char* data, long long count, unsigned* sink) {
  RingShared& shared = *reinterpret_cast<RingShared*>(shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long first = blockIdx.x * RING_WARPS + warp, stride = static_cast<long long>(gridDim.x) * RING_WARPS;
  auto refill = [&](int slot, long long index) {
    if (index >= count) return;
    mbarrier_arrive_expect_tx(&shared.full[warp][slot], SLOT_BYTES);
    bulk_copy(shared.slots[warp][slot], data + index * SLOT_BYTES, SLOT_BYTES, &shared.full[warp][slot]);
  };
  if (lane == 0) {
    for (int slot = 0; slot < RING_SLOTS; slot++) mbarrier_init(&shared.full[warp][slot], 1);
    fence_mbarrier_init();
    for (int slot = 0; slot < RING_SLOTS; slot++) refill(slot, first + slot * stride);
  }
  __syncwarp();
  unsigned sum = 0, parity = 0;
  int slot = 0;
  for (long long index = first; index < count; index += stride) {
    mbarrier_wait_parity(&shared.full[warp][slot], parity);
#pragma unroll 4
    for (int i = lane * 16; i < SLOT_BYTES; i += 32 * 16) sum ^= fold(*reinterpret_cast<const Chunk*>(shared.slots[warp][slot] + i));
    __syncwarp();
    if (lane == 0) {
      fence_proxy_async_shared();
      refill(slot, index + RING_SLOTS * stride);
    }
    if (++slot == RING_SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
  if (sum == 0x12345678u) *sink = sum;
}

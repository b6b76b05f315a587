// Logits -> the most probable tokens, the place of a token among all, log-probabilities; one row per CTA, float32.
//
//   largest:  a pass over the row (which stays in L2) for each token wanted: the largest entry below the one found before,
//             an entry being {key of the value, complement of the id}, so that of equal values the first token comes first
#include "float_order.cuh"
#include "reduce.cuh"

typedef unsigned long long u64;

__device__ __forceinline__ const float* row_of(const float* logits, int vocab) {
  return logits + static_cast<long long>(blockIdx.x) * vocab;
}

// ids [gridDim.x, count]; count <= vocab.
extern "C" __global__ void __launch_bounds__(1024) largest(const float* logits, int* ids, int vocab, int count) {
  u64* scratch = reinterpret_cast<u64*>(shared_memory());
  const float* row = row_of(logits, vocab);
  u64 below = ~0ull;
  for (int i = 0; i < count; i++) {
    u64 best = 0;
    for (int token = threadIdx.x; token < vocab; token += blockDim.x) {
      const u64 entry = static_cast<u64>(key_of(row[token])) << 32 | (0xffffffffu - token);
      if (entry < below && entry > best) best = entry;
    }
    below = block_reduce(best, scratch, [](u64 a, u64 b) { return a < b ? b : a; });
    if (threadIdx.x == 0) ids[static_cast<long long>(blockIdx.x) * count + i] = 0xffffffffu - static_cast<unsigned>(below);
  }
}

// ranks [gridDim.x]: 1 + the number of larger logits than that of token_ids [gridDim.x].
extern "C" __global__ void __launch_bounds__(1024) ranks(const float* logits, const int* token_ids, int* ranks, int vocab) {
  int* scratch = reinterpret_cast<int*>(shared_memory());
  const float* row = row_of(logits, vocab);
  const float own = row[token_ids[blockIdx.x]];
  int larger = 0;
  for (int token = threadIdx.x; token < vocab; token += blockDim.x) larger += row[token] > own;
  larger = block_reduce(larger, scratch, [](int a, int b) { return a + b; });
  if (threadIdx.x == 0) ranks[blockIdx.x] = 1 + larger;
}

// out [gridDim.x, count]: of token_ids [gridDim.x, count], log of exp(logit) over the sum of all.
extern "C" __global__ void __launch_bounds__(1024)
    logprobs(const float* logits, const int* token_ids, float* out, int vocab, int count) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const float* row = row_of(logits, vocab);
  float top = row[0], sum = 0;
  for (int token = threadIdx.x; token < vocab; token += blockDim.x) top = fmaxf(top, row[token]);
  top = block_reduce(top, scratch, [](float a, float b) { return fmaxf(a, b); });
  for (int token = threadIdx.x; token < vocab; token += blockDim.x) sum += expf(row[token] - top);
  sum = block_reduce(sum, scratch, [](float a, float b) { return a + b; });
  const long long first = static_cast<long long>(blockIdx.x) * count;
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[first + i] = row[token_ids[first + i]] - top - logf(sum);
}

// Logits -> tokens: penalties and bans in place, and one draw per row; one row per CTA, float32.
//
// sample:   threshold of top_k, threshold of top_p, then one pass for the largest logit / temperature + Gumbel noise
//
//   threshold = the largest key with which the tokens of that key and above amount to a target (k tokens; top_p of the sum):
//     32-bit keys in the order of the values; their next 11, 11, 10 bits choose one of 2048 bins in shared memory;
//     walk the bins down from the top until the target is reached; only the tokens of that bin go on to the next bits
//
//   Amounts are integers (probabilities in units of 2^-40 of the largest), so that a sum is the same in any order.
#include "float_order.cuh"
#include "reduce.cuh"

typedef unsigned long long u64;

constexpr int DIGIT_BITS = 11, BINS = 1 << DIGIT_BITS, GROUPS = 64, GROUP_BINS = BINS / GROUPS;

struct Shared {
  unsigned low[BINS], high[BINS];  // the halves of each bin's amount: there are no 64-bit additions in shared memory
  u64 groups[GROUPS];              // amounts of 32 bins each
  u64 scratch[32];
  u64 remaining;                   // of the target, within the bin chosen
  unsigned prefix;                 // the digits chosen so far
};

__device__ __forceinline__ void add_to_bin(Shared& shared, unsigned bin, u64 amount) {
  const unsigned low = static_cast<unsigned>(amount);
  const unsigned carry = atomicAdd(&shared.low[bin], low) > 0xffffffffu - low;
  const unsigned high = static_cast<unsigned>(amount >> 32) + carry;
  if (high) atomicAdd(&shared.high[bin], high);
}

__device__ __forceinline__ u64 bin_amount(const Shared& shared, int bin) {
  return static_cast<u64>(shared.high[bin]) << 32 | shared.low[bin];
}

__device__ __forceinline__ float value_of(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// f(first token, values of four) for all of a row, 16 bytes a load where aligned; the last four may reach past the row.
template <class F>
__device__ __forceinline__ void for_each_four(const float* row, int vocab, F f) {
  const bool aligned = vocab % 4 == 0 && reinterpret_cast<u64>(row) % 16 == 0;
  for (int first = 4 * threadIdx.x; first < vocab; first += 4 * blockDim.x) {
    float4 values = {};
    if (aligned) {
      values = *reinterpret_cast<const float4*>(row + first);
    } else {
      values.x = row[first];
      if (first + 1 < vocab) values.y = row[first + 1];
      if (first + 2 < vocab) values.z = row[first + 2];
      if (first + 3 < vocab) values.w = row[first + 3];
    }
    const float four[4] = {values.x, values.y, values.z, values.w};
    f(first, four);
  }
}

template <class F>
__device__ __forceinline__ void for_each_token(const float* row, int vocab, F f) {
  for_each_four(row, vocab, [&](int first, const float(&four)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (first + i < vocab) f(first + i, four[i]);
    }
  });
}

// The largest key such that the amounts of the tokens with that key or a larger one sum to at least target(sum of all).
// amount_of(value, key&) gives a token's amount and key; tokens of amount 0 do not count.
template <class AmountOf, class Target>
__device__ unsigned threshold(Shared& shared, const float* row, int vocab, AmountOf amount_of, Target target) {
  for (int digit_end = 32; digit_end > 0;) {
    const int digit_begin = max(digit_end - DIGIT_BITS, 0);
    const unsigned digit_mask = (1u << (digit_end - digit_begin)) - 1;
    const bool first_digit = digit_end == 32;
    const unsigned prefix = first_digit ? 0 : shared.prefix;
    for (int bin = threadIdx.x; bin < BINS; bin += blockDim.x) shared.low[bin] = shared.high[bin] = 0;
    __syncthreads();
    for_each_token(row, vocab, [&](int, float value) {
      unsigned key;
      const u64 amount = amount_of(value, key);
      if (amount && (first_digit || key >> digit_end == prefix)) add_to_bin(shared, key >> digit_begin & digit_mask, amount);
    });
    __syncthreads();
    for (int group = threadIdx.x; group < GROUPS; group += blockDim.x) {
      u64 sum = 0;
      for (int i = 0; i < GROUP_BINS; i++) {
        sum += bin_amount(shared, group * GROUP_BINS + (i + group) % GROUP_BINS);  // each thread in another bank
      }
      shared.groups[group] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      u64 remaining = shared.remaining;
      if (first_digit) {
        u64 total = 0;
        for (int group = 0; group < GROUPS; group++) total += shared.groups[group];
        remaining = target(total);
      }
      int group = GROUPS - 1;
      for (; group > 0 && shared.groups[group] < remaining; group--) remaining -= shared.groups[group];
      int bin = group * GROUP_BINS + GROUP_BINS - 1;
      for (; bin > group * GROUP_BINS && bin_amount(shared, bin) < remaining; bin--) remaining -= bin_amount(shared, bin);
      shared.remaining = remaining;
      shared.prefix = prefix << (digit_end - digit_begin) | bin;
    }
    __syncthreads();
    digit_end = digit_begin;
  }
  return shared.prefix;  // a next threshold overwrites it, three barriers later
}

// Philox4x32-10 (Salmon et al. 2011): four words for a counter and a key.
__device__ __forceinline__ void philox(u64 seed, unsigned c0, unsigned c1, unsigned c2, unsigned (&word)[4]) {
  unsigned c3 = 0, key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const unsigned low0 = 0xD2511F53u * c0, high0 = __umulhi(0xD2511F53u, c0);
    const unsigned low2 = 0xCD9E8D57u * c2, high2 = __umulhi(0xCD9E8D57u, c2);
    c0 = high2 ^ c1 ^ key0;
    c1 = low2;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

// logits [gridDim.x, vocab] -> tokens [gridDim.x]; the meaning of the parameters, [gridDim.x] each, is in ops/numpy.py.
extern "C" __global__ void __launch_bounds__(1024) sample(
    const float* logits, const float* temperature, const int* top_k, const float* top_p, const float* min_p, const u64* seed,
    const int* candidate, const int* position, int* tokens, int vocab) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int b = blockIdx.x;
  const float* row = logits + static_cast<long long>(b) * vocab;
  const bool greedy = temperature[b] == 0;
  const float divisor = greedy ? 1.0f : temperature[b];
  auto larger = [](u64 a, u64 b) { return a < b ? b : a; };

  unsigned least_key = 0;
  float least_weight = 0, largest = 0;
  if (!greedy && top_k[b] > 0 && top_k[b] < vocab) {
    auto one = [&](float value, unsigned& key) {
      key = key_of(value / divisor);
      return 1ull;
    };
    least_key = threshold(shared, row, vocab, one, [&](u64) { return static_cast<u64>(top_k[b]); });
  }
  if (!greedy && (top_p[b] < 1 || min_p[b] > 0)) {
    u64 top = 0;
    for_each_token(row, vocab, [&](int, float value) { top = larger(top, key_of(value / divisor)); });
    largest = value_of(static_cast<unsigned>(block_reduce(top, shared.scratch, larger)));
  }
  if (!greedy && top_p[b] < 1) {
    auto probability = [&](float value, unsigned& key) {
      const float weight = key_of(value / divisor) >= least_key ? expf(value / divisor - largest) : 0.0f;
      key = __float_as_uint(weight);
      return weight > 0 ? static_cast<u64>(weight * 1099511627776.0f) : 0;  // 2^40
    };
    auto share = [&](u64 total) {
      const double wanted = static_cast<double>(top_p[b]) * static_cast<double>(total);
      const u64 whole = static_cast<u64>(wanted);
      return larger(whole + (static_cast<double>(whole) < wanted), 1);
    };
    least_weight = __uint_as_float(threshold(shared, row, vocab, probability, share));
  }
  if (!greedy) least_weight = fmaxf(least_weight, min_p[b]);

  u64 best = 0xffffffffu;  // key of the value, then the complement of the token: of equal values the first token wins
  for_each_four(row, vocab, [&](int first, const float(&four)[4]) {
    unsigned kept = 0, word[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float scaled = four[i] / divisor;
      const bool keep = key_of(scaled) >= least_key && (least_weight == 0 || expf(scaled - largest) >= least_weight);
      if (first + i < vocab && keep) kept |= 1u << i;
    }
    if (kept && !greedy) philox(seed[b], first / 4, position[b], candidate[b], word);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float uniform = (static_cast<float>(word[i] >> 9) + 0.5f) * 1.1920929e-7f;  // 2^-23
      const float value = greedy ? four[i] : four[i] / divisor - logf(-logf(uniform));
      if (kept >> i & 1) best = larger(best, static_cast<u64>(key_of(value)) << 32 | (0xffffffffu - (first + i)));
    }
  });
  best = block_reduce(best, shared.scratch, larger);
  if (threadIdx.x == 0) tokens[b] = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
}

// Of every seen token of row blockIdx.x: logit / repetition if positive, else logit * repetition; of a generated one, minus
// presence + count * frequency. The ids of a row are distinct.
extern "C" __global__ void __launch_bounds__(128) penalise(
    float* logits, const int* seen_indptr, const int* seen_ids, const int* seen_counts, const float* repetition,
    const float* presence, const float* frequency, int vocab) {
  const int b = blockIdx.x;
  float* row = logits + static_cast<long long>(b) * vocab;
  for (int i = seen_indptr[b] + threadIdx.x; i < seen_indptr[b + 1]; i += blockDim.x) {
    const float logit = row[seen_ids[i]];
    float value = logit > 0 ? logit / repetition[b] : logit * repetition[b];
    if (seen_counts[i] > 0) value -= presence[b] + static_cast<float>(seen_counts[i]) * frequency[b];
    row[seen_ids[i]] = value;
  }
}

// logits[b, t] += value for the tokens t of row b = blockIdx.x, which are distinct.
extern "C" __global__ void __launch_bounds__(128) bias(
    float* logits, const int* indptr, const int* token_ids, const float* values, int vocab) {
  float* row = logits + static_cast<long long>(blockIdx.x) * vocab;
  for (int i = indptr[blockIdx.x] + threadIdx.x; i < indptr[blockIdx.x + 1]; i += blockDim.x) row[token_ids[i]] += values[i];
}

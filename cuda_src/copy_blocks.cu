// Copies of blocks of the KV pool, for sequences that were forked and go on by different tokens.
#include "ptx.cuh"

// pool [planes, num_blocks, words]; in plane blockIdx.y, block targets[blockIdx.x] = block sources[blockIdx.x].
extern "C" __global__ void __launch_bounds__(256) copy_blocks(
    unsigned* pool, const int* sources, const int* targets, int num_blocks, int words) {
  unsigned* plane = pool + static_cast<long long>(blockIdx.y) * num_blocks * words;
  const unsigned* source = plane + static_cast<long long>(sources[blockIdx.x]) * words;
  unsigned* target = plane + static_cast<long long>(targets[blockIdx.x]) * words;
  for (int i = threadIdx.x; i < words; i += blockDim.x) target[i] = source[i];
}

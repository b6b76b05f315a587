// out[t] = table[token_ids[t]]: one row per CTA, copied as bytes, so that one kernel serves every dtype.
//
//   row: | 16 bytes | 16 bytes | ... |   thread t copies pieces t, t + blockDim.x, ...  (2 bytes a piece where 16 do not fit)
#include "ptx.cuh"

template <class Piece>
__device__ __forceinline__ void copy_row(const void* source, void* target, long long bytes) {
  const Piece* from = static_cast<const Piece*>(source);
  Piece* to = static_cast<Piece*>(target);
  for (long long i = threadIdx.x; i < bytes / static_cast<long long>(sizeof(Piece)); i += blockDim.x) to[i] = from[i];
}

// table [num_rows, row_bytes], token_ids [gridDim.x], out [gridDim.x, row_bytes]; row_bytes is even.
extern "C" __global__ void __launch_bounds__(128)
    embedding(const int* token_ids, const void* table, void* out, long long row_bytes) {
  const char* source = static_cast<const char*>(table) + token_ids[blockIdx.x] * row_bytes;
  char* target = static_cast<char*>(out) + blockIdx.x * row_bytes;
  if ((reinterpret_cast<unsigned long long>(source) | reinterpret_cast<unsigned long long>(target) | row_bytes) % 16 == 0) {
    copy_row<uint4>(source, target, row_bytes);
  } else {
    copy_row<unsigned short>(source, target, row_bytes);
  }
}

// What a kernel sees of the emulator: CUDA's words for C++, and the instructions that take more than one thread.
//
// Every thread of a grid is a fiber that runs until it must wait for others; simt.cpp draws who runs next, and is as unkind
// as a GPU may be. Rules for kernels: one-dimensional blocks of whole warps, full warp masks, all shared memory from
// `simt::shared_memory()`, and `simt::yield()` in every loop that polls memory.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

// ---- words of the language --------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

namespace simt {

constexpr unsigned warp_size = 32;
constexpr unsigned full_mask = 0xffffffff;
constexpr size_t box_bytes = 64;

struct Thread {
  uint3 index;        // in its block
  uint3 block_index;  // in the grid
  void* shared;       // the block's shared memory
};
extern Thread* me;
extern uint3 block_dim, grid_dim;

inline unsigned lane() { return me->index.x % warp_size; }
inline void* shared_memory() { return me->shared; }

// True once in n times, by the schedule's seed.
bool one_in(unsigned n);

// A clock that goes on by a microsecond whenever somebody looks.
unsigned long long nanoseconds();

// Lets other threads run; to be called wherever a thread polls memory.
void yield();

void sync_warp(unsigned mask);
void sync_block(int line);
void sync_named(int id, int threads);
void arrive_named(int id, int threads);

// cp.async: the source is read and the target written at one moment between now and the wait.
void copy_async(void* target, const void* source, size_t bytes);
void commit_copies();
void wait_copies(unsigned pending);  // until at most the latest `pending` committed groups have not landed

// A place in the block's shared memory, in bytes.
size_t shared_place(const void* address);

// mbarriers, as in PTX; `mbarrier_arrive_after_copies` is cp.async's arrive.noinc.
void mbarrier_init(unsigned long long* barrier, unsigned count);
void fence_mbarrier_init();
void mbarrier_arrive(unsigned long long* barrier, unsigned expected_bytes);
void mbarrier_arrive_after_copies(unsigned long long* barrier);
void mbarrier_wait(const unsigned long long* barrier, unsigned parity);

// The copy engine: lands as cp.async does, waited for or not, and then counts at an mbarrier.
struct HostTensorMap {  // the innermost dimension first
  const unsigned char* base;
  size_t element_bytes, swizzled;
  long long sizes[4], strides[4];  // of the array, in elements and bytes; 1 and 0 where it has fewer dimensions
  size_t box[4];
};
void copy_bulk(void* target, const void* source, size_t bytes, unsigned long long* barrier);
void copy_box(void* target, const HostTensorMap& map, const int (&at)[4], unsigned long long* barrier);

// wgmma sees what a thread's cp.async and noted stores have written once that thread has fenced, and not before.
void note_store(const void* target, size_t bytes);
void fence_proxy_async();

// d [64, n] (+)= a [64, 16] b [16, n], both by descriptor and K-major; or a from registers, and b MN-major.
struct Product {
  unsigned n;
  bool f16, a_in_registers, accumulate;
  unsigned long long a, b;
};
void wgmma(const Product& product, float* d, const unsigned* a);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(unsigned pending);

// A store that other blocks see at once, or not before a release by a thread that it comes before; at the launch's end all do.
void store_late(void* target, const void* value, size_t bytes);
void see_own_stores(const void* address, size_t bytes);
void release_stores();

// Every lane posts a value and all meet; returns the 32 boxes, which hold until the lane's next meeting.
const unsigned char* post(const void* value, size_t bytes, unsigned mask);

// The same for a type: the one primitive under shuffles, votes, ldmatrix and mma. Read with `at`.
template <class T>
inline const T* exchange(const T& value, unsigned mask = full_mask) {
  static_assert(sizeof(T) <= box_bytes, "too large for one box");
  return reinterpret_cast<const T*>(post(&value, sizeof value, mask));
}

template <class T>
inline const T& at(const T* boxes, unsigned lane) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(boxes) + lane * box_bytes);
}

// Runs a grid to its end. Returns what went wrong, or nullptr; the same seed gives the same schedule.
const char* launch(void (*kernel)(void* const*), void* const* args, const unsigned* grid, unsigned threads,
                   size_t shared_bytes, unsigned seed);

// ---- how the host calls a kernel: void* args, as in cuLaunchKernel -------------------------------------------------
template <auto Kernel>
struct Entry;

template <class... Parameters, void (*Kernel)(Parameters...)>
struct Entry<Kernel> {
  template <size_t... i>
  static void call(void* const* args, std::index_sequence<i...>) {
    Kernel(*static_cast<std::remove_cv_t<Parameters>*>(args[i])...);
  }
  static void run(void* const* args) { call(args, std::index_sequence_for<Parameters...>()); }

  // One letter and a size for every parameter, '*' before what a pointer points to: "*f4 i4 *?2 "
  template <class T>
  static void describe(char*& out) {
    using Bare = std::remove_cv_t<T>;
    if constexpr (std::is_pointer_v<Bare>) {
      *out++ = '*';
      describe<std::remove_pointer_t<Bare>>(out);
    } else if constexpr (std::is_void_v<Bare>) {
      out += sprintf(out, "?0 ");
    } else {
      char kind = std::is_floating_point_v<Bare> ? 'f' : !std::is_integral_v<Bare> ? '?' : std::is_signed_v<Bare> ? 'i' : 'u';
      out += sprintf(out, "%c%d ", kind, int(sizeof(Bare)));
    }
  }
  static const char* signature() {
    static char text[12 * sizeof...(Parameters) + 1];
    char* out = text;
    (describe<Parameters>(out), ...);
    return text;
  }
};

}  // namespace simt

// ---- what a kernel may call -------------------------------------------------------------------------------------
#define threadIdx (simt::me->index)
#define blockIdx (simt::me->block_index)
#define blockDim (simt::block_dim)
#define gridDim (simt::grid_dim)
#define __syncthreads() simt::sync_block(__LINE__)

inline void __syncwarp(unsigned mask = simt::full_mask) { simt::sync_warp(mask); }
inline void __threadfence() { simt::release_stores(); }
inline void __threadfence_block() {}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  auto* box = simt::exchange(value, mask);
  return simt::at(box, simt::lane() / width * width + source % width);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  auto* box = simt::exchange(value, mask);
  return simt::at(box, simt::lane() ^ bits);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  auto* box = simt::exchange(value, mask);
  return simt::lane() % width + distance < unsigned(width) ? simt::at(box, simt::lane() + distance) : value;
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  auto* box = simt::exchange(value, mask);
  return simt::lane() % width >= distance ? simt::at(box, simt::lane() - distance) : value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  auto* box = simt::exchange(predicate != 0, mask);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < simt::warp_size; lane++) votes |= unsigned(simt::at(box, lane)) << lane;
  return votes;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == simt::full_mask; }

// An atomic operation is a moment at which others may come first.
template <class T, class Change>
inline T simt_atomic(T* address, Change change) {
  if (simt::one_in(8)) simt::yield();
  T before = *address;
  *address = change(before);
  return before;
}
template <class T>
inline T atomicAdd(T* address, std::common_type_t<T> value) {
  return simt_atomic(address, [=](T old) { return old + value; });
}
template <class T>
inline T atomicMax(T* address, std::common_type_t<T> value) {
  return simt_atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicMin(T* address, std::common_type_t<T> value) {
  return simt_atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
inline T atomicExch(T* address, std::common_type_t<T> value) {
  return simt_atomic(address, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return simt_atomic(address, [=](T old) { return old == expected ? value : old; });
}

template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}

template <class To, class From>
inline To simt_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline float __int_as_float(int x) { return simt_bits<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

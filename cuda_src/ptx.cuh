// Every line of inline PTX, one function per instruction and named after it, each with a host body that means the same.
#pragma once
#ifdef __CUDACC_RTC__

// The CTA's one block of dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// 16 bytes from global to shared memory, both aligned to 16, not through registers; lands by the wait for its group.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Ends the group of this thread's copies issued since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's latest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else
#include "simt.h"

inline unsigned char* shared_memory() { return static_cast<unsigned char*>(simt::shared_memory()); }
inline void cp_async_16(void* shared, const void* global) { simt::copy_async(shared, global, 16); }
inline void cp_async_commit() { simt::commit_copies(); }
template <int N>
inline void cp_async_wait() {
  simt::wait_copies(N);
}

#endif

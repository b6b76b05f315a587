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

// The same, or 16 zeros where not `valid`: the source is then not read.
__device__ __forceinline__ void cp_async_16_or_zeros(void* shared, const void* global, bool valid) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// Ends the group of this thread's copies issued since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's latest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes, and
// gets of every matrix the elements 2 * (i % 4) and the next of row i / 4.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&matrices)[4], const void* shared) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices: lane i gets the elements 2 * (i % 4) and the next of column i / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&matrices)[4], const void* shared) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// c [16, 8] += a [16, 16] times b [16, 8], float32 sums. With g = lane / 4 and t = lane % 4 a lane holds: of c the elements
// (g, 2t), (g, 2t + 1) and the same of row g + 8; of a the pairs from (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) on;
// of b the pairs (2t, g), (2t + 1, g) and (2t + 8, g), (2t + 9, g).
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to 16 bits each, `low` in the lower half.
__device__ __forceinline__ unsigned cvt_rn_bf16x2(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ unsigned cvt_rn_f16x2(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x, right to 2 ulp; 0 for -inf.
__device__ __forceinline__ float ex2_approx(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Adds to a counter that CTAs share and gives what it was. What this CTA wrote before its last barrier is there for all whose
// later addition sees this one.
__device__ __forceinline__ unsigned atom_add_acq_rel_gpu(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
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
inline void cp_async_16_or_zeros(void* shared, const void* global, bool valid) {
  static const unsigned char zeros[16] = {};
  simt::copy_async(shared, valid ? global : zeros, 16);
}

struct alignas(16) simt_row {  // of a matrix
  unsigned short at[8];
};
inline void ldmatrix_x4(unsigned (&matrices)[4], const void* shared) {
  const auto* rows = simt::exchange(*static_cast<const simt_row*>(shared));  // read before the lanes meet: none may be late
  const unsigned row = simt::lane() / 4, column = simt::lane() % 4 * 2;
  for (int i = 0; i < 4; i++) {
    const simt_row& from = simt::at(rows, 8 * i + row);
    matrices[i] = from.at[column] | static_cast<unsigned>(from.at[column + 1]) << 16;
  }
}
inline void ldmatrix_x4_trans(unsigned (&matrices)[4], const void* shared) {
  const auto* rows = simt::exchange(*static_cast<const simt_row*>(shared));
  const unsigned column = simt::lane() / 4, row = simt::lane() % 4 * 2;
  for (int i = 0; i < 4; i++) {
    const unsigned high = simt::at(rows, 8 * i + row + 1).at[column];
    matrices[i] = simt::at(rows, 8 * i + row).at[column] | high << 16;
  }
}

template <class ToFloat>
inline void simt_mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, ToFloat to_float) {
  struct Operands {
    unsigned a[4], b[2];
  };
  const auto* lanes = simt::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int i = 0; i < 4; i++) {
    const int row = simt::lane() / 4, column = simt::lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const unsigned x = simt::at(lanes, row * 4 + k % 8 / 2).a[i / 2 + k / 8 * 2];
      const unsigned y = simt::at(lanes, column * 4 + k % 8 / 2).b[k / 8];
      c[i] += to_float(x >> k % 2 * 16 & 0xffff) * to_float(y >> k % 2 * 16 & 0xffff);
    }
  }
}
inline void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  simt_mma_m16n8k16(c, a, b0, b1, [](unsigned bits) { return __uint_as_float(bits << 16); });
}
inline void mma_m16n8k16_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  simt_mma_m16n8k16(c, a, b0, b1, [](unsigned bits) {
    return static_cast<float>(simt_bits<_Float16>(static_cast<unsigned short>(bits)));
  });
}

inline unsigned cvt_rn_bf16x2(float low, float high) {
  auto round = [](float x) {
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  };
  return round(low) | round(high) << 16;
}
inline unsigned cvt_rn_f16x2(float low, float high) {
  auto round = [](float x) -> unsigned { return simt_bits<unsigned short>(static_cast<_Float16>(x)); };
  return round(low) | round(high) << 16;
}
inline float ex2_approx(float x) { return exp2f(x); }
inline unsigned atom_add_acq_rel_gpu(unsigned* counter, unsigned value) { return atomicAdd(counter, value); }

#endif

// The instructions of cuda_src/ptx.cuh on the emulator: a body that means the same for each.
#pragma once
#include "simt.h"

inline unsigned char* shared_memory() { return static_cast<unsigned char*>(simt::shared_memory()); }
inline void cp_async_16(void* shared, const void* global) { simt::copy_async(shared, global, 16); }
inline void cp_async_4(void* shared, const void* global) { simt::copy_async(shared, global, 4); }
inline void prefetch_global_l2(const void*) {}
inline void cp_async_commit() { simt::commit_copies(); }
template <int N>
inline void cp_async_wait() {
  simt::wait_copies(N);
}
inline const unsigned char simt_zeros[16] = {};
inline void cp_async_16_or_zeros(void* shared, const void* global, bool valid) {
  cp_async_16(shared, valid ? global : simt_zeros);
}
inline void cp_async_4_or_zeros(void* shared, const void* global, bool valid) {
  cp_async_4(shared, valid ? global : simt_zeros);
}
inline unsigned long long createpolicy_evict_first() { return 0; }
inline void cp_async_16_or_zeros_hint(void* shared, const void* global, bool valid, unsigned long long) {
  cp_async_16_or_zeros(shared, global, valid);
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

inline unsigned movmatrix_trans(unsigned pair) {
  const auto* rows = simt::exchange(pair);
  const unsigned column = simt::lane() / 4, row = simt::lane() % 4 * 2;
  const unsigned low = simt::at(rows, 4 * row + column / 2), high = simt::at(rows, 4 * (row + 1) + column / 2);
  return (low >> column % 2 * 16 & 0xffff) | (high >> column % 2 * 16) << 16;
}

inline float simt_half(unsigned bits) { return static_cast<float>(simt_bits<_Float16>(static_cast<unsigned short>(bits))); }
inline unsigned simt_half_bits(float x) { return simt_bits<unsigned short>(static_cast<_Float16>(x)); }

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
  simt_mma_m16n8k16(c, a, b0, b1, simt_half);
}

inline unsigned cvt_rn_bf16x2(float low, float high) {
  auto round = [](float x) {
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  };
  return round(low) | round(high) << 16;
}
inline unsigned cvt_rn_f16x2(float low, float high) { return simt_half_bits(low) | simt_half_bits(high) << 16; }
inline float cvt_f32_f16(unsigned short bits) { return simt_half(bits); }
inline unsigned short cvt_rp_f16(float x) {
  const unsigned nearest = simt_half_bits(x);
  if (!(simt_half(nearest) < x)) return nearest;
  return nearest == 0x8000 ? 1 : nearest & 0x8000 ? nearest - 1 : nearest + 1;  // the next towards +infinity
}
inline float ex2_approx(float x) { return exp2f(x); }
inline int thread_here() { return threadIdx.x; }
inline float rcp_approx(float x) { return 1 / x; }

// ---- between CTAs -----------------------------------------------------------------------------------------------
inline void fence_acq_rel_gpu() { simt::release_stores(); }
inline unsigned load_acquire_gpu(const unsigned* counter) {
  simt::yield();
  return *counter;
}
inline unsigned long long globaltimer() { return simt::nanoseconds(); }
inline unsigned atom_add_relaxed_gpu(unsigned* counter, unsigned value) { return atomicAdd(counter, value); }
inline unsigned atom_add_acq_rel_gpu(unsigned* counter, unsigned value) {
  simt::release_stores();
  return atomicAdd(counter, value);
}
template <class T>
inline void store_for_others(T* target, const T& value) {
  static_assert(sizeof(T) <= 16, "no GPU stores more at once");
  simt::store_late(target, &value, sizeof value);
}
template <class T>
inline T load_from_others(const T* source) {
  simt::see_own_stores(source, sizeof(T));
  return *source;
}

inline void red_add_release_gpu(unsigned* counter, unsigned value) { atom_add_acq_rel_gpu(counter, value); }

inline void note_store(const void* target, int bytes) { simt::note_store(target, bytes); }

// ---- bytes and pairs of float16 ---------------------------------------------------------------------------------
inline unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = a | static_cast<unsigned long long>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned digit = selector >> 4 * i & 15, byte = bytes >> 8 * (digit & 7) & 255;
    result |= (digit < 8 ? byte : byte >= 128 ? 255u : 0u) << 8 * i;  // 8 and more: the byte's sign in all its bits
  }
  return result;
}
// Products and sums of two float16 are exact in double: rounded once.
template <class Operation>
inline unsigned simt_f16x2(Operation operation, unsigned a, unsigned b) {
  unsigned pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const double result = operation(double(simt_half(a >> shift & 0xffff)), double(simt_half(b >> shift & 0xffff)));
    pair |= (result != result ? 0x7fffu : simt_bits<unsigned short>(static_cast<_Float16>(result))) << shift;
  }
  return pair;
}
inline unsigned mul_f16x2(unsigned a, unsigned b) {
  return simt_f16x2([](double x, double y) { return x * y; }, a, b);
}
inline unsigned sub_f16x2(unsigned a, unsigned b) {
  return simt_f16x2([](double x, double y) { return x - y; }, a, b);
}
inline unsigned lop3_and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }
template <class Operation>
inline unsigned simt_bf16x2(Operation operation) {  // of a shift
  unsigned pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float result = operation([=](unsigned x) { return double(__uint_as_float((x >> shift & 0xffff) << 16)); });
    const unsigned bits = __float_as_uint(result);
    pair |= (result != result ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16) << shift;
  }
  return pair;
}
inline unsigned mul_bf16x2(unsigned a, unsigned b) {
  return simt_bf16x2([=](auto at) { return at(a) * at(b); });
}
inline unsigned sub_bf16x2(unsigned a, unsigned b) {
  return simt_bf16x2([=](auto at) { return at(a) - at(b); });
}
inline unsigned min_nan_bf16x2(unsigned a, unsigned b) {
  return simt_bf16x2([=](auto at) { return at(a) != at(a) || at(b) != at(b) ? NAN : at(a) < at(b) ? at(a) : at(b); });
}
inline unsigned max_nan_bf16x2(unsigned a, unsigned b) {
  return simt_bf16x2([=](auto at) { return at(a) != at(a) || at(b) != at(b) ? NAN : at(a) > at(b) ? at(a) : at(b); });
}

inline float simt_e4m3(unsigned code) {  // 1 sign, 4 exponent and 3 mantissa bits; no infinities
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return (code & 0x7f) == 0x7f ? NAN : code & 0x80 ? -size : size;
}
inline unsigned cvt_f16x2_e4m3x2(unsigned short codes) {
  auto convert = [](unsigned code) { return (code & 0x7f) == 0x7f ? 0x7fff : simt_half_bits(simt_e4m3(code)); };
  return convert(codes & 255) | convert(codes >> 8) << 16;
}
inline unsigned cvt_f16x2_e4m3x2_upper(unsigned codes) { return cvt_f16x2_e4m3x2(codes >> 16); }
inline unsigned char cvt_e4m3_satfinite(float x) {
  if (x != x) return 0x7f;
  unsigned nearest = 0;  // of two as near the even one
  const double size = fabs(static_cast<double>(x));
  for (unsigned code = 1; code < 0x7f; code++) {
    const double before = size - simt_e4m3(nearest), after = simt_e4m3(code) - size;
    if (after < before || (after == before && code % 2 == 0)) nearest = code;
  }
  return nearest | (std::signbit(x) ? 0x80 : 0);
}

// ---- barriers that a part of the CTA meets at, mbarriers, the copy engine -------------------------------------------
inline void named_barrier_sync(int id, int threads) { simt::sync_named(id, threads); }
inline void named_barrier_arrive(int id, int threads) { simt::arrive_named(id, threads); }

inline void mbarrier_init(unsigned long long* barrier, unsigned count) { simt::mbarrier_init(barrier, count); }
inline void fence_mbarrier_init() { simt::fence_mbarrier_init(); }
inline void mbarrier_arrive(unsigned long long* barrier) { simt::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(unsigned long long* barrier, unsigned bytes) { simt::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait_parity(unsigned long long* barrier, unsigned parity) { simt::mbarrier_wait(barrier, parity); }
inline void cp_async_mbarrier_arrive_noinc(unsigned long long* barrier) { simt::mbarrier_arrive_after_copies(barrier); }

inline void bulk_copy(void* shared, const void* global, unsigned bytes, unsigned long long* barrier) {
  simt::copy_bulk(shared, global, bytes, barrier);
}
inline void tensor_copy_4d(void* shared, const TensorMap* map, int x, int y, int z, int w, unsigned long long* barrier) {
  simt::copy_box(shared, *reinterpret_cast<const simt::HostTensorMap*>(map), {x, y, z, w}, barrier);
}
inline void tensor_copy_3d(void* shared, const TensorMap* map, int x, int y, int z, unsigned long long* barrier) {
  static_assert(sizeof(simt::HostTensorMap) <= sizeof(TensorMap));
  simt::copy_box(shared, *reinterpret_cast<const simt::HostTensorMap*>(map), {x, y, z, 0}, barrier);
}
inline void tensor_copy_3d_hint(
    void* shared, const TensorMap* map, int x, int y, int z, unsigned long long* barrier, unsigned long long) {
  tensor_copy_3d(shared, map, x, y, z, barrier);
}
// A cluster is one CTA here.
inline unsigned cluster_ctarank() { return 0; }
inline void barrier_cluster_sync() { __syncthreads(); }
inline void mbarrier_arrive_cluster(unsigned long long* barrier, unsigned) { mbarrier_arrive(barrier); }
inline void tensor_copy_3d_multicast(
    void* shared, const TensorMap* map, int x, int y, int z, unsigned long long* barrier, unsigned short) {
  tensor_copy_3d(shared, map, x, y, z, barrier);
}
inline void fence_proxy_async_shared() { simt::fence_proxy_async(); }
inline void fence_proxy_async_global() {}
inline void griddepcontrol_launch_dependents() {}  // a launch begins when the one before has ended
inline void griddepcontrol_wait() {}

// ---- wgmma ------------------------------------------------------------------------------------------------------
template <int REGISTERS>
inline void setmaxnreg_inc() {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0);
}
template <int REGISTERS>
inline void setmaxnreg_dec() {
  setmaxnreg_inc<REGISTERS>();
}
inline void wgmma_fence() { simt::wgmma_fence(); }
inline void wgmma_commit() { simt::wgmma_commit(); }
template <int N>
inline void wgmma_wait() {
  simt::wgmma_wait(N);
}
template <int N>
inline void wgmma_fence_operand(float (&)[N]) {}
template <int N>
inline void wgmma_fence_operand(unsigned (&)[N]) {}

inline unsigned long long wgmma_descriptor(const void* shared, unsigned leading_bytes, unsigned stride_bytes) {
  const unsigned long long start = simt::shared_place(shared) >> 4;
  return start | (leading_bytes >> 4 & 0x3fffull) << 16 | (stride_bytes >> 4 & 0x3fffull) << 32 | 1ull << 62;
}
inline void wgmma_m64n128k16_bf16(float (&d)[64], unsigned long long a, unsigned long long b, int accumulate) {
  simt::wgmma({128, false, false, accumulate != 0, a, b}, d, nullptr);
}
inline void wgmma_m64n128k16_f16(float (&d)[64], unsigned long long a, unsigned long long b, int accumulate) {
  simt::wgmma({128, true, false, accumulate != 0, a, b}, d, nullptr);
}
inline void wgmma_m64n32k16_bf16(float (&d)[16], unsigned long long a, unsigned long long b, int accumulate) {
  simt::wgmma({32, false, false, accumulate != 0, a, b}, d, nullptr);
}
inline void wgmma_m64n32k16_f16(float (&d)[16], unsigned long long a, unsigned long long b, int accumulate) {
  simt::wgmma({32, true, false, accumulate != 0, a, b}, d, nullptr);
}
inline void wgmma_m64n128k16_bf16_ra(float (&d)[64], const unsigned (&a)[4], unsigned long long b, int accumulate) {
  simt::wgmma({128, false, true, accumulate != 0, 0, b}, d, a);
}
inline void wgmma_m64n128k16_f16_ra(float (&d)[64], const unsigned (&a)[4], unsigned long long b, int accumulate) {
  simt::wgmma({128, true, true, accumulate != 0, 0, b}, d, a);
}
inline void wgmma_m64n64k16_bf16_ra(float (&d)[32], const unsigned (&a)[4], unsigned long long b, int accumulate) {
  simt::wgmma({64, false, true, accumulate != 0, 0, b}, d, a);
}
inline void wgmma_m64n64k16_f16_ra(float (&d)[32], const unsigned (&a)[4], unsigned long long b, int accumulate) {
  simt::wgmma({64, true, true, accumulate != 0, 0, b}, d, a);
}

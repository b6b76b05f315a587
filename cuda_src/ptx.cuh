// Every line of inline PTX, one function per instruction and named after it. Under g++ the emulator's header stands in their
// place, with a body that means the same for each.
#pragma once

// A description of a tensor and of a box in it that the driver makes (cuTensorMapEncodeTiled); passed by value, as a
// __grid_constant__.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

#ifdef __CUDACC_RTC__

// The CTA's one block of dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, both aligned to 16, not through registers; lands by the wait for its group.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// The same, or 16 zeros where not `valid`: the source is then not read.
__device__ __forceinline__ void cp_async_16_or_zeros(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// The same by a policy for what is read once: it leaves L2 first.
__device__ __forceinline__ unsigned long long createpolicy_evict_first() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void cp_async_16_or_zeros_hint(
    void* shared, const void* global, bool valid, unsigned long long policy) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes), "l"(policy)
               : "memory");
}

// 4 bytes, aligned to 4.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_4_or_zeros(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Brings the 128 bytes around an address nearer, into the L2 cache.
__device__ __forceinline__ void prefetch_global_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

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
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(shared))
               : "memory");
}

// The same of the transposed matrices: lane i gets the elements 2 * (i % 4) and the next of column i / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&matrices)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(shared))
               : "memory");
}

// An 8x8 matrix of 16-bit elements, of which lane i holds the elements 2 * (i % 4) and the next of row i / 4, transposed.
__device__ __forceinline__ unsigned movmatrix_trans(unsigned pair) {
  unsigned transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
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

// The bits of the least float16 that is no less than x, and a float16's value.
__device__ __forceinline__ unsigned short cvt_rp_f16(float x) {
  unsigned short bits;
  asm("cvt.rp.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ float cvt_f32_f16(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// 2^x, right to 2 ulp; 0 for -inf.
__device__ __forceinline__ float ex2_approx(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// 1 / x, right to 1 ulp.
__device__ __forceinline__ float rcp_approx(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// threadIdx.x, but what is computed of it is computed where it stands: the compiler would do that far ahead, and run out of
// registers in between.
__device__ __forceinline__ int thread_here() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// ---- between CTAs -----------------------------------------------------------------------------------------------
// Adds to a counter that CTAs share and gives what it was. What this CTA wrote before its last barrier is there for all whose
// later addition sees this one.
__device__ __forceinline__ unsigned atom_add_acq_rel_gpu(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// The same with no promise about what else was written.
__device__ __forceinline__ unsigned atom_add_relaxed_gpu(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// The same without a look at what it was.
__device__ __forceinline__ void red_add_release_gpu(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// What another CTA has counted; what that CTA wrote before its addition is there for this thread from here on.
__device__ __forceinline__ unsigned load_acquire_gpu(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Nanoseconds on a clock that all CTAs see.
__device__ __forceinline__ unsigned long long globaltimer() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  return now;
}

// What this thread has written and read before comes first for all that see what it writes after.
__device__ __forceinline__ void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// What one CTA leaves in global memory for another within the launch, and the other's look at it: a plain store and a plain
// load. The emulator keeps the store back until its CTA releases it.
template <class T>
__device__ __forceinline__ void store_for_others(T* target, const T& value) {
  *target = value;
}
template <class T>
__device__ __forceinline__ T load_from_others(const T* source) {
  return *source;
}

// No instruction: tells the emulator of a plain store, which `fence_proxy_async_shared` is about.
__device__ __forceinline__ void note_store(const void*, int) {}

// ---- bytes and pairs of float16 -----------------------------------------------------------------------------------
// Byte i of the result is the byte of {b, a} (0 to 3 are a's) that hexadecimal digit i of the selector names.
__device__ __forceinline__ unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  unsigned bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}
__device__ __forceinline__ unsigned mul_f16x2(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ unsigned sub_f16x2(unsigned a, unsigned b) {
  unsigned difference;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

// Of two bfloat16 each: the smaller and the larger, NaN where either is.
__device__ __forceinline__ unsigned min_nan_bf16x2(unsigned a, unsigned b) {
  unsigned smaller;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
  return smaller;
}
__device__ __forceinline__ unsigned max_nan_bf16x2(unsigned a, unsigned b) {
  unsigned larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// a & b | c by one instruction: of constants it can have only one in itself, and the compiler takes two instructions instead.
__device__ __forceinline__ unsigned lop3_and_or(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned mul_bf16x2(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ unsigned sub_bf16x2(unsigned a, unsigned b) {
  unsigned difference;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}
#endif

// Below: the conversions where there is no instruction for them (sm_80, sm_86).
__device__ __forceinline__ unsigned f16x2_of_e4m3x2(unsigned short codes);
__device__ __forceinline__ unsigned char e4m3_of_float(float x);

// Two codes of float8_e4m3 to float16, exactly; NaN is 0x7fff. The lower code goes to the lower half.
__device__ __forceinline__ unsigned cvt_f16x2_e4m3x2(unsigned short codes) {
#if __CUDA_ARCH__ >= 890
  unsigned pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(codes));
  return pair;
#else
  return f16x2_of_e4m3x2(codes);
#endif
}

// The same of the two upper codes of a word, which the instruction takes as they are.
__device__ __forceinline__ unsigned cvt_f16x2_e4m3x2_upper(unsigned codes) {
#if __CUDA_ARCH__ >= 890
  unsigned pair;
  asm("{ .reg .b16 lower, upper; mov.b32 {lower, upper}, %1; cvt.rn.f16x2.e4m3x2 %0, upper; }" : "=r"(pair) : "r"(codes));
  return pair;
#else
  return f16x2_of_e4m3x2(static_cast<unsigned short>(codes >> 16));
#endif
}

// To float8_e4m3, to nearest; what is too large becomes 448 and NaN 0x7f.
__device__ __forceinline__ unsigned char cvt_e4m3_satfinite(float x) {
#if __CUDA_ARCH__ >= 890
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return static_cast<unsigned char>(pair);
#else
  return e4m3_of_float(x);
#endif
}

// ---- barriers that a part of the CTA meets at ------------------------------------------------------------------------
// Barrier 1 to 15: waits until so many threads, whole warps, have synced or arrived. __syncthreads() is barrier 0.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
// ---- mbarriers: 8 bytes of shared memory that count arrivals, and bytes that copies bring ------------------------------
// A phase ends when `count` threads have arrived and all expected bytes have come; phase 0 begins.
__device__ __forceinline__ void mbarrier_init(unsigned long long* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes this thread's `mbarrier_init` known to the copies; to the other threads a barrier does.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(unsigned long long* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and has the phase wait for so many more bytes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned long long* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity: 0 for the first, then 1, 0, ... (A new barrier counts as past a phase of 1.)
__device__ __forceinline__ void mbarrier_wait_parity(unsigned long long* barrier, unsigned parity) {
  unsigned over;
  do {
    asm volatile(
        "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over; }"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!over);
}

// This thread's cp.async copies so far arrive, when they have landed, in its place: one of the barrier's count.
__device__ __forceinline__ void cp_async_mbarrier_arrive_noinc(unsigned long long* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// ---- copies by the copy engine -------------------------------------------------------------------------------------
// One thread copies bytes from global to shared memory, all multiples of 16; they count at the barrier as they land.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes, unsigned long long* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// The box of a 3-D tensor map at (x, y, z), into shared memory at a multiple of 128 bytes (1024 where it swizzles).
__device__ __forceinline__ void tensor_copy_3d(void* shared, const TensorMap* map, int x, int y, int z, unsigned long long* barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
               :
               : "r"(shared_address(shared)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
               : "memory");
}
// The same by a policy.
__device__ __forceinline__ void tensor_copy_3d_hint(
    void* shared, const TensorMap* map, int x, int y, int z, unsigned long long* barrier, unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// The box of a 4-D tensor map.
__device__ __forceinline__ void tensor_copy_4d(void* shared, const TensorMap* map, int x, int y, int z, int w, unsigned long long* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
      : "memory");
}

// What this thread has done to shared memory (stores, cp.async that it has waited for, reads) comes before what the copy
// engine and wgmma do there after a barrier.
__device__ __forceinline__ void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory: by who has stored there before others are told, and by those once they know, before they copy.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- clusters: CTAs that know each other's shared memory ---------------------------------------------------------------
__device__ __forceinline__ unsigned cluster_ctarank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster meet; nobody is reached by others before the first time nor after the last.
__device__ __forceinline__ void barrier_cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// At the barrier in the same place of another CTA's shared memory. What this thread has written is not told to that CTA.
__device__ __forceinline__ void mbarrier_arrive_cluster(unsigned long long* barrier, unsigned rank) {
  asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)),
               "r"(rank)
               : "memory");
}
// The box of a 3-D tensor map into the same place of the CTAs whose bits are in `ranks`, each told at its own barrier.
__device__ __forceinline__ void tensor_copy_3d_multicast(
    void* shared, const TensorMap* map, int x, int y, int z, unsigned long long* barrier, unsigned short ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], "
      "[%5], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier)), "h"(ranks)
      : "memory");
}

#endif

// ---- dependent launches ------------------------------------------------------------------------------------------------
// The next kernel of the stream may come as soon as all CTAs have said so, where it was launched as a dependent one.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before have ended and what they wrote is there. No effect where this one was launched plainly.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// ---- wgmma: products of a warpgroup, four warps from a multiple of four ----------------------------------------------
// Registers a thread, 24 to 256 in steps of 8: a warpgroup takes some or gives some back.
template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Before the first wgmma, and wherever other instructions have touched its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends the group of the products issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N of the latest groups are under way; until then their registers and operands are not to be touched.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// No instruction: the compiler moves no use of these registers across this line. For after a wait, before the results are used.
template <int N>
__device__ __forceinline__ void wgmma_fence_operand(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void wgmma_fence_operand(unsigned (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// An operand in shared memory, in atoms of 8 rows of 128 bytes: of a row's 16-byte pieces, piece p of row r lies at p XOR r. An
// atom begins at a multiple of 1024. K-major (rows are of M or N): the next 8 rows are stride_bytes on; leading_bytes unused.
// MN-major (rows are of k): the next 8 k are stride_bytes on, the next 64 columns leading_bytes.
__device__ __forceinline__ unsigned long long wgmma_descriptor(
    const void* shared, unsigned leading_bytes, unsigned stride_bytes) {
  const unsigned long long swizzle_128 = 1, start = shared_address(shared) >> 4 & 0x3fff;
  const unsigned long long leading = leading_bytes >> 4 & 0x3fff, stride = stride_bytes >> 4 & 0x3fff;
  return start | leading << 16 | stride << 32 | swizzle_128 << 62;
}

#define OUT_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT_8(d, i) OUT_4(d, i), OUT_4(d, i + 4)
#define OUT_16(d) OUT_8(d, 0), OUT_8(d, 8)
#define OUT_32(d) OUT_16(d), OUT_8(d, 16), OUT_8(d, 24)
#define OUT_64(d) OUT_32(d), OUT_8(d, 32), OUT_8(d, 40), OUT_8(d, 48), OUT_8(d, 56)
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                \
  NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
           "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(shape, type) "wgmma.mma_async.sync.aligned." shape ".f32." type "." type

// d [64, N] = a [64, 16] times b [16, N], plus d where `accumulate`; float32 sums. A thread holds of d: with w its warp of the
// four, g = lane / 4 and t = lane % 4, d[4 j + 2 h + i] is element (16 w + g + 8 h, 8 j + 2 t + i).
// a and b from shared memory, both K-major:
#define WGMMA_SHARED(name, size, shape, type, a_desc, b_desc, flag)                                          \
  __device__ __forceinline__ void name(                                                                      \
      float(&d)[size], unsigned long long a, unsigned long long b, int accumulate) {                         \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" flag ", 0; " WGMMA(shape, type) " {" NAMES_##size        \
                 "}, %" a_desc ", %" b_desc ", p, 1, 1, 0, 0; }"                                             \
                 : OUT_##size(d)                                                                             \
                 : "l"(a), "l"(b), "r"(accumulate));                                                         \
  }
WGMMA_SHARED(wgmma_m64n128k16_bf16, 64, "m64n128k16", "bf16", "64", "65", "66")
WGMMA_SHARED(wgmma_m64n128k16_f16, 64, "m64n128k16", "f16", "64", "65", "66")
WGMMA_SHARED(wgmma_m64n32k16_bf16, 16, "m64n32k16", "bf16", "16", "17", "18")
WGMMA_SHARED(wgmma_m64n32k16_f16, 16, "m64n32k16", "f16", "16", "17", "18")

// a from registers, each warp's 16 rows as in mma_m16n8k16; b from shared memory, MN-major:
#define WGMMA_REGISTERS(name, size, shape, type, a0, a1, a2, a3, desc, flag)                                 \
  __device__ __forceinline__ void name(                                                                      \
      float(&d)[size], const unsigned(&a)[4], unsigned long long b, int accumulate) {                        \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" flag ", 0; " WGMMA(shape, type) " {" NAMES_##size        \
                 "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" desc ", p, 1, 1, 1; }"                         \
                 : OUT_##size(d)                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                     \
  }
WGMMA_REGISTERS(wgmma_m64n128k16_bf16_ra, 64, "m64n128k16", "bf16", "64", "65", "66", "67", "68", "69")
WGMMA_REGISTERS(wgmma_m64n128k16_f16_ra, 64, "m64n128k16", "f16", "64", "65", "66", "67", "68", "69")
WGMMA_REGISTERS(wgmma_m64n64k16_bf16_ra, 32, "m64n64k16", "bf16", "32", "33", "34", "35", "36", "37")
WGMMA_REGISTERS(wgmma_m64n64k16_f16_ra, 32, "m64n64k16", "f16", "32", "33", "34", "35", "36", "37")
#endif

#else
#include "ptx_on_cpu.h"
#endif

// e4m3 is float16 shifted by 7 bits, its exponents less by 8.
__device__ __forceinline__ unsigned f16x2_of_e4m3x2(unsigned short codes) {
  const unsigned high = prmt(codes, 0, 0x1404);  // each code in the upper byte of a half
  const unsigned pair = mul_f16x2((high & 0x80008000) | (high & 0x7f007f00) >> 1, 0x5c005c00);  // 256
  const unsigned nan = (((high & 0x7f007f00) + 0x01000100) & 0x80008000) >> 15;  // 1 in a half whose code is 0x7f or 0xff
  return (pair & ~(nan * 0xffff)) | nan * 0x7fff;
}

__device__ __forceinline__ unsigned char e4m3_of_float(float x) {
  const unsigned bits = __float_as_uint(x), size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7f;
  unsigned code;
  if (size < 0x3c800000) {  // below 2^-6: steps of 2^-9, which is the last place of 2^14
    code = __float_as_uint(__uint_as_float(size) + 16384.0f) - 0x46800000;
  } else {
    code = min(((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3), 0x7eu);  // to nearest, ties to even
  }
  return static_cast<unsigned char>(code | (bits >> 24 & 0x80));
}

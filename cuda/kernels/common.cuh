// The vocabulary of all kernels: the 16-bit types and named PTX instructions. hopper.cuh has the instructions that sm_90 adds. No CUDA
// headers are included, because NVRTC finds none on a user's machine.
//
// With -DHALF=1 the 16-bit type of a kernel is fp16, otherwise bf16. A u32 holds two of them, the first in its low 16 bits.
#pragma once

#ifndef HALF
#define HALF 0
#endif
#if !HALF && __CUDA_ARCH__ < 800
#error "sm_75 has no bf16: compile with -DHALF=1"
#endif

#define DEVICE __device__ __forceinline__

typedef signed char s8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// How an activation's codes are stored, the values of -DCODES. activation_layout.py defines the orders of the columns.
enum CodeStorage {
  INT8 = 0,         // 8-bit codes, one scale per token and part of the columns
  INT4_BYTES = 1,   // 4-bit codes, one per byte, one scale per token and group of 64 columns: for tensor cores without int4
  INT4_NIBBLES = 2  // the same codes, two per byte: for tensor cores with int4
};

constexpr float MAGIC = 12582912.f;  // 1.5 x 2^23: v + MAGIC has round(v) in its low bits, in two's complement

constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// --- 16-bit floats ----------------------------------------------------------------------------------------------------

DEVICE float to_float(u16 x) {
#if HALF
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
  return f;
#else
  return __uint_as_float((u32)x << 16);
#endif
}

// The first of a word's two numbers. bf16 is the upper 16 bits of a float, so that either conversion is one instruction.
DEVICE float low_float(u32 word) {
#if HALF
  float f;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(f) : "r"(word));
  return f;
#else
  return __uint_as_float(word << 16);
#endif
}

DEVICE float high_float(u32 word) {
#if HALF
  return low_float(word >> 16);
#else
  return __uint_as_float(word & 0xffff0000u);
#endif
}

DEVICE float2 to_float2(u32 word) {
#if HALF
  return make_float2(to_float((u16)word), to_float((u16)(word >> 16)));
#else
  return make_float2(low_float(word), high_float(word));
#endif
}

// Rounds to nearest even. A number too large for fp16 becomes Inf, so that the overflow is visible.
DEVICE u16 from_float(float f) {
  u16 x;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x) : "f"(f));
#endif
  return x;
}

DEVICE u32 from_float2(float first, float second) {
#if __CUDA_ARCH__ < 800
  return from_float(first) | (u32)from_float(second) << 16;
#else
  u32 x;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
#endif
  return x;
#endif
}

// Within 2 units in the last place. An exact division would be a call with a slow path.
DEVICE float divide(float a, float b) {
  float ratio;
  asm("div.full.f32 %0, %1, %2;" : "=f"(ratio) : "f"(a), "f"(b));
  return ratio;
}

// 1 / x to one unit in the last place, also for denormal numbers. The operator / would make a call for rare cases.
DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// 1 / x in one instruction, which takes denormal numbers for zero.
DEVICE float reciprocal_ftz(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// The inverse of a power of two, exactly.
DEVICE float power_inverse(float power) { return __uint_as_float(0x7f000000u - __float_as_uint(power)); }

// --- Programmatic dependent launch, sm_90 and newer -------------------------------------------------------------------

// A kernel launched with pdl=True may start while the previous kernel ends. Before this wait it must not touch memory that another kernel
// may write, which includes its weights. In an ordinary launch the wait returns at once. (The second kernel of a layer reads its weights
// earlier. That is safe: the first kernel has waited before it lets the second one start, and it writes no weights.)
DEVICE void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- Global memory ----------------------------------------------------------------------------------------------------

// Loads 16 bytes that are read only once, bypassing L1.
DEVICE uint4 load_once16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// --- Shared memory ----------------------------------------------------------------------------------------------------

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE uint4 load_shared16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

DEVICE uint2 load_shared8(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

DEVICE u32 load_shared4(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

DEVICE u16 load_shared2(u32 address) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return v;
}

DEVICE float load_shared_float(u32 address) {
  float f;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(f) : "r"(address) : "memory");
  return f;
}

DEVICE float2 load_shared_float2(u32 address) {
  const uint2 v = load_shared8(address);
  return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
}

DEVICE float4 load_shared_float4(u32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

DEVICE void load_shared_floats(float (&f)[4], u32 address) {
  const uint4 v = load_shared16(address);
  f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y), f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
}

DEVICE void store_shared4(u32 address, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }

DEVICE void store_shared_float(u32 address, float f) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(f) : "memory"); }

DEVICE void store_shared8(u32 address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

DEVICE void store_shared16(u32 address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// --- cp.async, sm_80 and newer; sm_75 copies synchronously and has no groups to wait for -------------------------------

// Copies 16 bytes, or writes 16 zero bytes where `valid` is false (the source is then not read).
DEVICE void cp_async16(u32 shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ < 800
  store_shared16(shared, valid ? *(const uint4*)global : uint4{});
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
#endif
}

DEVICE void cp_async8(u32 shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}

DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are in flight.
template <int pending> DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// --- Tensor cores -----------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements (or 8x16 of bytes). Lanes 8 i .. 8 i + 7 give the addresses of matrix i's rows;
// lane 4 r + c gets the c-th pair of each matrix's row r.
DEVICE void ldmatrix4(u32 (&d)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// ldmatrix, each matrix transposed.
DEVICE void ldmatrix4_transposed(u32 (&d)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// c (16 x 8, fp32) += a (16 x 16) b (16 x 8), with g = lane / 4 and q = lane % 4:
//   a[0..3]  rows g, g + 8, g, g + 8; columns 2 q, 2 q + 1 of the first eight, the first, the last, the last
//   b[0..1]  column g; rows 2 q, 2 q + 1 of the first eight, of the last eight
//   c[0..3]  (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1)
DEVICE void mma_16816(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ < 800  // Turing's MMA has half of this K
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#elif HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// --- Barriers and bulk copy ------------------------------------------------------------------------------------------

// A barrier for this many of the CTA's threads, in whole warps. Barrier 0 is __syncthreads()'s.
DEVICE void barrier_named(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Arrives at the barrier without waiting.
DEVICE void barrier_named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// mbarriers and bulk copies: sm_90 and newer.

// How many lanes of a warp arrive at an mbarrier when the warp is done. compute-sanitizer's racecheck counts an arrival only for its own
// lane, and so needs all lanes to arrive.
#ifdef ALL_LANES_ARRIVE
constexpr int ARRIVALS = 32;
#else
constexpr int ARRIVALS = 1;
#endif

DEVICE void mbarrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes newly initialized barriers visible to the copy engine. A __syncthreads() must follow.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Makes ordinary stores to shared memory visible to wgmma and the copy engine.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase also wait for `bytes` of bulk copies or st.async.
DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase with this parity. A barrier begins in phase 0, and the phase before that counts as ended.
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile("{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}"
               ::"r"(barrier), "r"(parity) : "memory");
}

// An mbarrier, by its address in shared memory; and several mbarriers, 8 bytes apart: full[stage].wait(parity).
struct Barrier {
  u32 address;

  DEVICE void init(int arrivals) const { mbarrier_init(address, arrivals); }
  DEVICE void arrive() const { mbarrier_arrive(address); }
  DEVICE void arrive_expect(u32 bytes) const { mbarrier_arrive_expect(address, bytes); }
  DEVICE void wait(u32 parity) const { mbarrier_wait(address, parity); }
};

struct Barriers {
  u32 first;

  DEVICE Barrier operator[](int i) const { return {first + 8 * i}; }
};

// Copies `bytes` to shared memory; the barrier counts them. `bytes` and both addresses are multiples of 16.
DEVICE void bulk_copy(u32 shared, const void* global, u32 bytes, u32 barrier) {
#if __CUDA_ARCH__ >= 1000  // the .cluster form is a system call on sm_120; CUDA before 12.8 doesn't know the .cta form
  asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier) : "memory");
#endif
}

// Common parts of the kernels that quantize: numbers, the LoRA branch's activation, and a cluster's shared memory.
// HALF=1: x is fp16, else bf16.
#pragma once
#include "common.cuh"
#include "hopper.cuh"
#include "lora.cuh"

// --- Numbers ---------------------------------------------------------------------------------------------------------

// The first (high = 0) or the second (high = 1) of a word's two numbers, where `high` differs between lanes.
DEVICE float either_float(u32 word, u32 high) {
#if HALF
  return low_float(word >> (16 * high));
#else
  return __uint_as_float(__byte_perm(word, 0, high ? 0x3244 : 0x1044));
#endif
}

// max(a, |b|), or NaN if one of them is NaN, because a NaN in x must reach the scale. fmaxf would drop it.
DEVICE float max_abs(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float m;
  asm("{\n.reg .f32 t;\nabs.f32 t, %2;\nmax.NaN.f32 %0, %1, t;\n}" : "=f"(m) : "f"(a), "f"(b));
  return m;
#else
  // The bits of non-negative floats have the order of the values, and NaNs come last.
  return __int_as_float(max(__float_as_int(a), __float_as_int(b) & 0x7fffffff));
#endif
}

// Whether a >= 0 is neither Inf nor NaN.
DEVICE bool finite(float a) { return a < __int_as_float(0x7f800000); }

// --- Data movement ---------------------------------------------------------------------------------------------------

// Lets the next kernel start, if it has programmatic dependent launch. It waits for this kernel's end before it reads its outputs.
// It may read its weights at once, because this kernel has waited for the end of all previous kernels.
DEVICE void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// value += eight floats.
DEVICE void add_eight(float (&value)[8], float4 a, float4 b) {
  value[0] += a.x, value[1] += a.y, value[2] += a.z, value[3] += a.w;
  value[4] += b.x, value[5] += b.y, value[6] += b.z, value[7] += b.w;
}

// The same for floats at an address that is a multiple of 16.
DEVICE void add_eight(float (&value)[8], const float* from) { add_eight(value, ((const float4*)from)[0], ((const float4*)from)[1]); }

// The power of two by which sums of magnitude `peak` are divided to stay below 2^14, and its inverse. Smaller and infinite peaks, and NaN,
// leave both as they are.
DEVICE void find_scale(float peak, float& scale, float& inverse) {
  if (peak >= 16384 && finite(peak)) {
    const int exponent = (__float_as_int(peak) >> 23) - 13;
    scale = __int_as_float(exponent << 23), inverse = __int_as_float((254 - exponent) << 23);
  }
}

// Stores a row's sums of the LoRA branch in the activation layout. PIECES neighbouring lanes have 8 ranks each; this is lane `piece`. In
// fp16 the sums are scaled to stay below 2^14; bf16 has float's range.
template <int PIECES>
DEVICE void store_lora_act(const float (&value)[8], int piece, int row, bool exists, int M, int padded, u16* lora_act,
                           float* lora_act_scale) {
  float scale = 1, inverse = 1;
#if HALF
  float peak = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) peak = max_abs(peak, value[i]);
  peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 1));
  peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 2));
  if (PIECES > 4) peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 4));
  find_scale(peak, scale, inverse);
#endif
  if (exists) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = from_float2(value[2 * i] * inverse, value[2 * i + 1] * inverse);
    *(uint4*)(lora_act + ((size_t)(piece >> 2) * padded + row) * 32 + (piece & 3 ^ row >> 1 & 3) * 8) =
      make_uint4(words[0], words[1], words[2], words[3]);
    if (piece == 0) lora_act_scale[row] = row < M ? scale : 0;
  }
}

// Eight 16-bit numbers, each times its factor.
DEVICE uint4 multiply_eight(uint4 v, const float* factors) {
  u32* const words = (u32*)&v;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 value = to_float2(words[i]), factor = *(const float2*)(factors + 2 * i);
    words[i] = from_float2(value.x * factor.x, value.y * factor.y);
  }
  return v;
}

// For ranks that cuBLAS has multiplied: stores rows first, first + step, .. of an (M, R) product, with rows `pitch` apart, in the
// activation layout. This is `thread` of `threads`, which share the work. scale: where to write lora_act_scale, which is 1 in bf16; null
// if it is written elsewhere, as always in fp16. strength: a factor per rank, or null for ones.
DEVICE void copy_lora_act(const u16* product, const float* strength, int pitch, u16* lora_act, float* scale, int M, int padded, int R,
                          int first, int step, int count, int thread, int threads) {
  const int pieces = (R + 31) / 32 * 4;
#pragma unroll 1
  for (int i = thread; i < count * pieces; i += threads) {
    const int row = first + i / pieces * step, piece = i % pieces;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < M && piece * 8 < R) {
      v = *(const uint4*)(product + (size_t)row * pitch + piece * 8);
      if (strength) v = multiply_eight(v, strength + piece * 8);
    }
    if (!HALF && scale && piece == 0 && row < padded) scale[row] = row < M;
    if (row < padded) *(uint4*)(lora_act + ((size_t)(piece >> 2) * padded + row) * 32 + (piece & 3 ^ row >> 1 & 3) * 8) = v;
  }
}

#if LORA
// The same for a product that also has LoRAs' ranks, after the branch's R. Their blocks follow the branch's too. strength: of the LoRAs'
// ranks. In fp16 the product has it already.
DEVICE void copy_lora_act(const u16* product, const float* strength, const LoraRanks& ranks, int pitch, u16* lora_act, float* scale, int M,
                          int padded, int R, int first, int step, int count, int thread, int threads) {
#pragma unroll 1
  for (int part = -1, rank = R; ; rank = ranks.rank_of(part)) {
    copy_lora_act(product, HALF || part < 0 ? nullptr : strength, pitch, lora_act, scale, M, padded, rank, first, step, count, thread,
                  threads);
    if (++part == ranks.parts) break;
    product += rank, lora_act += (size_t)((rank + 31) / 32) * padded * 32;
    if (part > 0) strength += rank;
  }
}
#endif

// --- Clusters: CTAS thread blocks that read each other's shared memory ----------------------------------------------

#if CTAS > 1
#define CLUSTER __cluster_dims__(CTAS, 1, 1)
#else
#define CLUSTER
#endif

#ifdef CTAS
// The address in CTA `cta` that corresponds to `address` in this CTA; and loads from such addresses.
DEVICE u32 address_in(u32 cta, u32 address) {
  if constexpr (CTAS == 1) return address;
  else return cluster_address(address, cta);
}

DEVICE float load_float_there(u32 address) {
  if constexpr (CTAS == 1) return load_shared_float(address);
  else return load_remote_float(address);
}

DEVICE float4 load_float4_there(u32 address) {
  if constexpr (CTAS == 1) return load_shared_float4(address);
  else return load_remote_float4(address);
}
#endif

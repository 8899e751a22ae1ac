// The elementwise work between the linears of a transformer block, in one pass over the hidden states:
//
//     z = x + gate * y                                   -DRESIDUAL=1   the end of an attention or of an MLP
//     m = (z - mean) / deviation * (1 + scale) + shift   -DNORM=1       the input of the next linear; without RESIDUAL, z is x
//
// TEAM warps have one token, whose row stays in their registers: each lane has PIECES pieces of 8 columns. Reading and writing memory
// bounds the kernel, so every tensor is read and written once, 16 bytes a lane; gate, scale and shift are a few rows that stay in L1.
//
//     columns   0..7    8..15    ..  248..255 | 256..263  ..          team of one warp
//     lane        0       1      ..     31    |     0     ..
//     piece       0       0      ..      0    |     1     ..
//
// -D: HALF as in common.cuh;  RESIDUAL, NORM 0 or 1, at least one of them 1;  TEAM 1..32 warps of a token;  PIECES 1..3
#include "residual.cuh"

constexpr int WARPS = TEAM == 1 ? 8 : TEAM;  // warps of a CTA

DEVICE void unpack(float (&f)[8], uint4 v) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) f[2 * i] = low_float(words[i]), f[2 * i + 1] = high_float(words[i]);
}

DEVICE uint4 pack(const float (&f)[8]) {
  return make_uint4(from_float2(f[0], f[1]), from_float2(f[2], f[3]), from_float2(f[4], f[5]), from_float2(f[6], f[7]));
}

// Loads 16 bytes that other tokens read too, through L1.
DEVICE uint4 load_shared_row16(const u16* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// The sum over the lanes of a token's team, the same bits in each of them.
DEVICE float team_sum(float v, int slot) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
#if TEAM > 1
  __shared__ float sums[2][TEAM];
  if (threadIdx.x % 32 == 0) sums[slot][threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
#pragma unroll
  for (int warp = 0; warp < TEAM; warp++) v += sums[slot][warp];
#endif
  return v;
}

DEVICE uint4 modulated(uint4 z, uint4 scale, uint4 shift, float mean, float inverse) {
  float f[8], s[8], t[8];
  unpack(f, z), unpack(s, scale), unpack(t, shift);
#pragma unroll
  for (int i = 0; i < 8; i++) f[i] = fmaf((f[i] - mean) * inverse, 1.f + s[i], t[i]);
  return pack(f);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) modulate(
    const u16* __restrict__ x, const u16* __restrict__ y, const u16* __restrict__ gate, const u16* __restrict__ scale,
    const u16* __restrict__ shift, u16* __restrict__ z, u16* __restrict__ m, int tokens, int image_tokens, int K, int stride_x,
    int stride_y, int stride_gate, int stride_norm) {
  wait_for_previous_grid();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = TEAM == 1 ? blockIdx.x * WARPS + warp : blockIdx.x;
  if (token >= tokens) return;
  const int first = ((TEAM == 1 ? 0 : warp) * 32 + lane) * 8, image = token / image_tokens;
  constexpr int STEP = TEAM * 256;  // columns from one piece of a lane to the next

  uint4 row[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int column = first + i * STEP;
    row[i] = make_uint4(0, 0, 0, 0);
    if (column < K) row[i] = load_once16(x + (size_t)token * stride_x + column);
  }
#if RESIDUAL
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int column = first + i * STEP;
    if (column < K) {
      const uint4 added = load_once16(y + (size_t)token * stride_y + column);
      // z is rounded to 16 bits: the mean and the deviation are those of the numbers that the model keeps.
      row[i] = add_gated(row[i], added, load_shared_row16(gate + (size_t)image * stride_gate + column));
      *(uint4*)(z + (size_t)token * K + column) = row[i];
    }
  }
#endif
#if NORM
  float sum = 0;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    float f[8];
    unpack(f, row[i]);  // zeros beyond K
    sum += ((f[0] + f[1]) + (f[2] + f[3])) + ((f[4] + f[5]) + (f[6] + f[7]));
  }
  const float inverse_K = reciprocal(K), mean = team_sum(sum, 0) * inverse_K;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    float f[8];
    unpack(f, row[i]);
    if (first + i * STEP < K)
#pragma unroll
      for (int j = 0; j < 8; j++) squares = fmaf(f[j] - mean, f[j] - mean, squares);
  }
  float inverse;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(inverse) : "f"(fmaf(team_sum(squares, 1), inverse_K, EPSILON)));
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int column = first + i * STEP;
    if (column < K) {
      const uint4 s = load_shared_row16(scale + (size_t)image * stride_norm + column);
      const uint4 t = load_shared_row16(shift + (size_t)image * stride_norm + column);
      *(uint4*)(m + (size_t)token * K + column) = modulated(row[i], s, t, mean, inverse);
    }
  }
#endif
}

// Rows of the hidden states in registers: TEAM warps have one token, and each of their lanes PIECES pieces of 8 columns.
//
//     columns   0..7    8..15    ..  248..255 | 256..263  ..          team of one warp
//     lane        0       1      ..     31    |     0     ..
//     piece       0       0      ..      0    |     1     ..
#pragma once
#include "common.cuh"

constexpr int WARPS = TEAM == 1 ? 8 : TEAM;  // warps of a CTA
constexpr int STEP = TEAM * 256;             // columns from one piece of a lane to the next

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

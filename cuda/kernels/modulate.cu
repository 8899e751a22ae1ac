// The elementwise work between the linears of a transformer block, in one pass over the hidden states:
//
//     z = x + gate * y                                   -DRESIDUAL=1   the end of an attention or of an MLP
//     m = (z - mean) / deviation * (1 + scale) + shift   -DNORM=1       the input of the next linear; without RESIDUAL, z is x
//
// A token's row stays in the registers of its warps (rows.cuh). Reading and writing memory bounds the kernel, so every tensor is read and
// written once, 16 bytes a lane; gate, scale and shift are a few rows that stay in L1.
//
// -D: HALF as in common.cuh;  RESIDUAL, NORM 0 or 1, at least one of them 1;  TEAM 1..32 warps of a token;  PIECES 1..3
#include "residual.cuh"
#include "rows.cuh"

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

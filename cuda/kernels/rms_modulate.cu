// The elementwise work between the linears of a block whose norms are RMSNorms with weights, in one pass over the hidden states:
//
//     z = x + gate * RMSNorm(y) * y_weight          -DRESIDUAL=1   the end of an attention or of an MLP
//     m = RMSNorm(z) * weight * (1 + scale)         -DNORM=1       the input of the next linear; without RESIDUAL, z is x
//
// A token's row stays in the registers of its warps (rows.cuh). Reading and writing memory bounds the kernel, so every tensor is read and
// written once, 16 bytes a lane; weights, gate and scale are a few rows that stay in L1.
//
// -D: HALF as in common.cuh;  RESIDUAL, NORM 0 or 1, at least one of them 1;  MODULATED 0: neither gate nor scale;  TEAM 1..32 warps of a
//     token;  PIECES 1..3;  EPSILON of the norms
#include "rows.cuh"

// 1 / sqrt(mean of the squares + EPSILON) of a token's row, whose columns beyond K are zeros.
DEVICE float inverse_rms(const uint4 (&row)[PIECES], int K, int slot) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    float f[8];
    unpack(f, row[i]);
#pragma unroll
    for (int j = 0; j < 8; j++) squares = fmaf(f[j], f[j], squares);
  }
  float inverse;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(inverse) : "f"(fmaf(team_sum(squares, slot), reciprocal(K), EPSILON)));
  return inverse;
}

// f[j] *= inverse * weight[j]
DEVICE void normalize(float (&f)[8], const u16* weight, float inverse) {
  float w[8];
  unpack(w, load_shared_row16(weight));
#pragma unroll
  for (int j = 0; j < 8; j++) f[j] *= inverse * w[j];
}

// A thread has 64 registers. Without the second bound ptxas leaves it fewer, and keeps one of them in local memory.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 32 / WARPS) rms_modulate(
    const u16* __restrict__ x, const u16* __restrict__ y, const u16* __restrict__ y_weight, const u16* __restrict__ gate,
    const u16* __restrict__ weight, const u16* __restrict__ scale, u16* __restrict__ z, u16* __restrict__ m, int tokens, int image_tokens,
    int K, int stride_x, int stride_y, int stride_gate, int stride_scale) {
  wait_for_previous_grid();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = TEAM == 1 ? blockIdx.x * WARPS + warp : blockIdx.x;
  if (token >= tokens) return;
  const int first = ((TEAM == 1 ? 0 : warp) * 32 + lane) * 8, image = token / image_tokens;

  uint4 row[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    row[i] = make_uint4(0, 0, 0, 0);
    if (first + i * STEP < K) row[i] = load_once16(x + (size_t)token * stride_x + first + i * STEP);
  }
#if RESIDUAL
  uint4 added[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    added[i] = make_uint4(0, 0, 0, 0);
    if (first + i * STEP < K) added[i] = load_once16(y + (size_t)token * stride_y + first + i * STEP);
  }
  const float inverse_y = inverse_rms(added, K, 0);
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int column = first + i * STEP;
    if (column < K) {
      float f[8], update[8], g[8] = {1, 1, 1, 1, 1, 1, 1, 1};
      unpack(f, row[i]), unpack(update, added[i]);
      normalize(update, y_weight + column, inverse_y);
#if MODULATED
      unpack(g, load_shared_row16(gate + (size_t)image * stride_gate + column));
#endif
#pragma unroll
      for (int j = 0; j < 8; j++) f[j] = fmaf(g[j], update[j], f[j]);
      row[i] = pack(f);  // the next norm is that of the rounded numbers, which the model keeps
      *(uint4*)(z + (size_t)token * K + column) = row[i];
    }
  }
#endif
#if NORM
  const float inverse = inverse_rms(row, K, 1);
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const int column = first + i * STEP;
    if (column < K) {
      float f[8];
      unpack(f, row[i]);
      normalize(f, weight + column, inverse);
#if MODULATED
      float s[8];
      unpack(s, load_shared_row16(scale + (size_t)image * stride_scale + column));
#pragma unroll
      for (int j = 0; j < 8; j++) f[j] = fmaf(f[j], s[j], f[j]);
#endif
      *(uint4*)(m + (size_t)token * K + column) = pack(f);
    }
  }
#endif
}

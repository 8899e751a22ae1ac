// The arithmetic of gemm_mma.cu: it multiplies a stage's weights and tokens into a warp's accumulators.
//
// acc[i][t][e] belongs to the i-th 16 weight rows and the t-th 8 tokens; e is the index of imma.cuh's d.
#pragma once
#include "gemm_mma.cuh"
#include "imma.cuh"

constexpr u32 ALL_8 = 0x08080808, ALL_128 = 0x80808080;

// The scales of a lane's eight weight rows.
DEVICE void load_scales(float (&scale)[8], u32 address) {
  uint4 v = load_shared16(address);
  u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 two = to_float2(word[i]);
    scale[2 * i] = two.x;
    scale[2 * i + 1] = two.y;
  }
}

// The fragments of two token tiles for one MMA step: the pieces of halves 0 and 1 of each tile.
DEVICE void load_tokens(u32 (&b)[2][2], u32 address) {
  u32 d[4];
  ldmatrix4(d, address);
  b[0][0] = d[0], b[0][1] = d[1], b[1][0] = d[2], b[1][1] = d[3];
}

// --- INT8: int32 sums over all of K -----------------------------------------------------------------------------------

// Four codes times their group's integer i, as int8. u = code + 8 is 0..15 and i is -15..16, so that every byte of u i + (128 - 8 i) is in
// 0..255. Flipping bit 7 of each byte then subtracts 128. low_nibbles is 0x0f0f0f0f.
DEVICE u32 times_integer(u32 nibbles, u32 low_nibbles, u32 integer, u32 offset) {
  return (((nibbles & low_nibbles) ^ ALL_8) * integer + offset) ^ ALL_128;
}

// Multiplies the 128 columns of a block in four MMA steps. Word s of a lane's 16 bytes of a row belongs to step s, and all 16 bytes are
// columns of one group. live: whether the lane's group is part of this step.
DEVICE void multiply_block(int (&acc)[4][TILES][4], u32 shared, u32 inverses, u32 w, u32 ws, u32 x, int lane, bool live) {
  const u32 low_nibbles = load_shared4(shared + CONSTANTS);
  u32 word[8][4], integer[8], offset[8];
  float scale[8];
  load_scales(scale, ws);
  const uint4 first = load_shared16(inverses), last = load_shared16(inverses + 16);
  const u32 inverse[8] = {first.x, first.y, first.z, first.w, last.x, last.y, last.z, last.w};
#pragma unroll
  for (int j = 0; j < 8; j++) {
    uint4 v = load_shared16(w + j * 512);
    word[j][0] = v.x, word[j][1] = v.y, word[j][2] = v.z, word[j][3] = v.w;
    integer[j] = live ? __float_as_int(fmaf(scale[j], __uint_as_float(inverse[j]), MAGIC)) - MAGIC_BITS : 0;
    offset[j] = ALL_128 - integer[j] * ALL_8;
  }
#pragma unroll
  for (int s = 0; s < 4; s++) {
    __syncwarp();  // stops the compiler from loading further ahead than registers allow
    u32 a[4][4];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      a[j / 2][j % 2] = times_integer(word[j][s], low_nibbles, integer[j], offset[j]);
      a[j / 2][j % 2 + 2] = times_integer(word[j][s] >> 4, low_nibbles, integer[j], offset[j]);
    }
    const u32 column = x + (((2 * s + (lane >> 3 & 1)) ^ (lane & 7)) << 4);
#pragma unroll
    for (int t = 0; t < TILES; t += 2) {
      if (t) __syncwarp();
      u32 b[2][2];
      load_tokens(b, column + t * 8 * X_ROW);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        imma_8bit(acc[i][t], a[i], b[0], acc[i][t]);
        imma_8bit(acc[i][t + 1], a[i], b[1], acc[i][t + 1]);
      }
    }
  }
}

// --- 4 bits: both group scales every 64 columns -----------------------------------------------------------------------

constexpr int MMA_STEPS = CODES == INT4_NIBBLES ? 1 : 2;  // MMA steps per group
constexpr int HEIGHT = CODES == INT4_NIBBLES ? 4 : 2;     // runs of 16 rows that are computed together, as many as fit in registers

// The fragments of the j-th weight row computed together, from the lane's 8 bytes of the group in the warp's row `row`.
DEVICE void load_weights(u32 (&a)[MMA_STEPS][HEIGHT][4], u32 w, int row, int j) {
  if constexpr (CODES == INT4_NIBBLES) {
    // An 8-byte load would fill adjacent registers, but the MMA needs them two apart. ^ keeps the compiler from joining the loads.
    a[0][j / 2][j % 2] = load_shared4(w + row * 512);
    a[0][j / 2][j % 2 + 2] = load_shared4((w ^ 4) + row * 512);
  } else {
    // A code in the upper four bits of its byte is 16 times the code as int8. The inner scale divides by 16.
    const uint2 v = load_shared8(w + row * 512);
    a[0][j / 2][j % 2] = v.x << 4 & 0xf0f0f0f0;
    a[0][j / 2][j % 2 + 2] = v.x & 0xf0f0f0f0;
    a[MMA_STEPS - 1][j / 2][j % 2] = v.y << 4 & 0xf0f0f0f0;
    a[MMA_STEPS - 1][j / 2][j % 2 + 2] = v.y & 0xf0f0f0f0;
  }
}

// Multiplies one group of 64 columns. x: the lane's row of the first ldmatrix; w: the lane's 8 bytes of row 8 g.
template <bool x_unsigned>
DEVICE void multiply_group(float (&acc)[4][TILES][4], u32 w, u32 ws, u32 x, u32 xs, const int (&magic)[4]) {
  float scale[8];
  load_scales(scale, ws);
#pragma unroll
  for (int above = 0; above < 4; above += HEIGHT) {
    u32 a[MMA_STEPS][HEIGHT][4];
    float shift[2 * HEIGHT];
#pragma unroll
    for (int j = 0; j < 2 * HEIGHT; j++) {
      shift[j] = -MAGIC * scale[2 * above + j];
      load_weights(a, w, 2 * above + j, j);
    }
#pragma unroll
    for (int t = 0; t < TILES; t += 2) {
      __syncwarp();  // stops the compiler from loading further ahead than registers allow
      u32 b[MMA_STEPS][2][2];
#pragma unroll
      for (int s = 0; s < MMA_STEPS; s++) load_tokens(b[s], (x ^ s * 32) + t * 8 * X_ROW);
      float token_scale[4];
      load_shared_floats(token_scale, xs + t / 2 * 64);
#pragma unroll
      for (int i = 0; i < HEIGHT; i++)
#pragma unroll
        for (int u = 0; u < 2; u++) {
          int sum[4];
          if constexpr (CODES == INT4_NIBBLES) {
            imma_4bit<x_unsigned>(sum, a[0][i], b[0][u], magic);
          } else {
            imma_8bit(sum, a[0][i], b[0][u], magic);
            imma_8bit(sum, a[MMA_STEPS - 1][i], b[MMA_STEPS - 1][u], sum);
          }
          float (&d)[4] = acc[above + i][t + u];
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float product = fmaf(__int_as_float(sum[e]), scale[2 * (above + i) + e / 2], shift[2 * i + e / 2]);
            d[e] = fmaf(product, token_scale[2 * u + e % 2], d[e]);
          }
        }
    }
  }
}

// --- The LoRA branch --------------------------------------------------------------------------------------------------

// Multiplies one block of 32 ranks. up, lora_act: the lane's rows for ldmatrix, as swizzled pieces of the block's first half.
DEVICE void multiply_branch(float (&acc)[4][TILES][4], u32 up, u32 lora_act, int lane) {
#pragma unroll
  for (int s = 0; s < 2; s++) {
    const int piece = 2 * s + (lane >> 4);
    u32 a[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      ldmatrix4(a[i], up + i * 1024 + (lane >> 3 & 1) * 512 + piece * 128 + (((lane & 7) ^ swizzle(piece)) << 4));
#pragma unroll
    for (int t = 0; t < TILES; t += 2) {
      u32 b[2][2];
      load_tokens(b, (lora_act ^ s * 32) + t * 8 * RANK_ROW);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        mma_16816(acc[i][t], a[i], b[0]);
        mma_16816(acc[i][t + 1], a[i], b[1]);
      }
    }
  }
}

// The epilogue of a gemm_mma.cu tile whose output, GELU(y), only the next layer reads. Instead of y, the epilogue stores the codes and
// scales of x = GELU(y) in 16 bits, equal to quantize.cu's to the bit, and this tile's partial sum of the LoRA branch's x @ proj_down.
//
// A warp's 64 rows are one group of the next layer's columns. Lane (g, q) has columns 8 g .. 8 g + 7 of a token. In both 4-bit storages
// the codes of these columns are whole words of the token's row in the activation layout.
//
//     x in shared memory:  a token has ROWS / 8 pieces of 8 columns, piece c at c ^ (token & 7)
//     proj_down's rows:    a slab for each 32 ranks; row k has its 4 pieces of 8 ranks at piece ^ (k / 2 % 4)
#pragma once
#include "gelu.cuh"
#include "gemm_mma.cuh"
#include "group.cuh"

static_assert(!TURING, "a tile's epilogue needs more shared memory than Turing has");

struct Next {
  u8* act;              // (n / 128, padded m, 64 or 128) codes, in the activation layout
  float* act_scale;     // (n / 64, padded m)
  float* partial_sums;  // (n / ROWS, padded m, NEXT), which partial_sums.cu adds up
  const u16* smooth;    // (n)
  const u8* proj_down;  // (n, rank) 16-bit numbers
  int rank;             // at most NEXT
  int unsigned_from;    // from this column on codes are 0..15
};

constexpr int NEXT_DOWN = TOKENS * ROWS * 2;  // proj_down's offset in shared memory

DEVICE void fetch_proj_down(u32 shared, const Next& next, int n0) {
  constexpr int PIECES = NEXT / 8;  // pieces of a row
#pragma unroll
  for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
    const int index = threadIdx.x + i * THREADS, row = index / PIECES, piece = index % PIECES;
    const u32 target = shared + NEXT_DOWN + ((piece >> 2) * ROWS + row) * 64 + ((piece & 3 ^ row >> 1 & 3) << 4);
    cp_async16(target, next.proj_down + ((size_t)(n0 + row) * next.rank + piece * 8) * 2, piece * 8 < next.rank);
  }
  cp_async_commit();
}

// Stores the codes of a token's eight columns. One lane stores the scale of the group.
DEVICE void store_codes(const u32 (&x)[4], const float (&inverse)[8], bool is_unsigned, int g, int token, int group, int m, int padded_m,
                        const Next& next) {
  const float shift = is_unsigned ? SHIFT : 0;
  float v[8];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = to_float2(x[i]);
    v[2 * i] = (two.x + shift) * inverse[2 * i], v[2 * i + 1] = (two.y + shift) * inverse[2 * i + 1];
  }
  const Group codes = group_of<4, 16>(v, token < m, is_unsigned);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = codes.code(v[i]);
  if (token >= padded_m) return;
  if (g == 0) next.act_scale[(size_t)group * padded_m + token] = codes.scale;
  u8* const row = next.act + ((size_t)(group / 2) * padded_m + token) * X_ROW + g / 2 * 4;
  if constexpr (CODES == INT4_NIBBLES) {
    *(u32*)(row + ((group % 2 * 2 + g % 2 ^ token >> 1 & 3) << 4)) = pack_nibbles(v) & codes.keep;
  } else {
#pragma unroll
    for (int odd = 0; odd < 2; odd++)
      *(u32*)(row + ((group % 2 * 4 + g % 2 * 2 + odd ^ token & 7) << 4)) =
          pack_bytes(v[odd], v[2 + odd], v[4 + odd], v[6 + odd]) & codes.keep;
  }
}

// x @ proj_down for the tile's columns. A warp has 16 tokens and all ranks, or some ranks if there are more such warps than tokens.
DEVICE void multiply_proj_down(u32 shared, const Next& next, int m0, int n0, int m, int padded_m) {
  constexpr int TOKEN_TILES = TOKENS / 16, RANK_TILES = NEXT / 8 / (THREADS / 32 / TOKEN_TILES);
  static_assert(RANK_TILES * (THREADS / 32) == TOKEN_TILES * NEXT / 8 && RANK_TILES % 2 == 0, "two tiles of ranks come at once");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_token = warp % TOKEN_TILES * 16, first_piece = warp / TOKEN_TILES * RANK_TILES;
  const u32 x = shared + (first_token + lane % 16) * ROWS * 2 + ((lane / 16 ^ lane & 7) << 4);
  float sums[RANK_TILES][4] = {};
#pragma unroll 4
  for (int step = 0; step < ROWS / 16; step++) {
    u32 a[4];
    ldmatrix4(a, x ^ step << 5);
#pragma unroll
    for (int r = 0; r < RANK_TILES; r += 2) {
      const int piece = first_piece + r + lane / 16;
      u32 p[4];
      ldmatrix4_transposed(p, shared + NEXT_DOWN + ((piece >> 2) * ROWS + 16 * step + lane % 16) * 64 +
                                      ((piece & 3 ^ lane >> 1 & 3) << 4));
      const u32 b[2][2] = {{p[0], p[1]}, {p[2], p[3]}};
      mma_16816(sums[r], a, b[0]);
      mma_16816(sums[r + 1], a, b[1]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int token = m0 + first_token + 8 * half + lane / 4;
    float* const row = next.partial_sums + ((size_t)(n0 / ROWS) * padded_m + token) * NEXT + first_piece * 8 + lane % 4 * 2;
    if (token < m)
#pragma unroll
      for (int r = 0; r < RANK_TILES; r++) *(float2*)(row + 8 * r) = make_float2(sums[r][2 * half], sums[r][2 * half + 1]);
  }
}

// y = acc outer_scale + offset, as in gemm_mma.cu.
DEVICE void finish_for_next(const float (&acc)[4][TILES][4], const float (&offset)[8], const float* outer_scale, u32 shared, int m0, int n0,
                            int m, const Next& next) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int row_warp = warp % ROW_WARPS, token_warp = warp / ROW_WARPS, padded_m = (m + 15) / 16 * 16;
  const int group = n0 / 64 + row_warp;
  __syncthreads();  // all warps are done with the ring, whose memory the epilogue reuses
  fetch_proj_down(shared, next, n0);
  const bool is_unsigned = group * 64 >= next.unsigned_from;
  const uint4 s = *(const uint4*)(next.smooth + group * 64 + 8 * g);
  const u32 smooth[4] = {s.x, s.y, s.z, s.w};
  float inverse[8];
#pragma unroll
  for (int i = 0; i < 4; i++) inverse[2 * i] = reciprocal(low_float(smooth[i])), inverse[2 * i + 1] = reciprocal(high_float(smooth[i]));
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int token = (token_warp * TILES + t) * 8 + 2 * q + e;
      u32 x[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[i] = from_float2(gelu(fmaf(acc[i][t][e], outer_scale[token], offset[2 * i])),
                           gelu(fmaf(acc[i][t][e + 2], outer_scale[token], offset[2 * i + 1])));
      store_shared16(shared + token * ROWS * 2 + ((row_warp * 8 + g ^ token & 7) << 4), make_uint4(x[0], x[1], x[2], x[3]));
      store_codes(x, inverse, is_unsigned, g, m0 + token, group, m, padded_m, next);
    }
  cp_async_wait<0>();
  __syncthreads();
  multiply_proj_down(shared, next, m0, n0, m, padded_m);
}

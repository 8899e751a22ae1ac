// The second kernel of an SVDQuant layer, with mma.sync: y = outer_scale (acc + lora_act proj_up^T) + bias. acc is the product of the 4-bit
// weights and the activation, divided by outer_scale. It serves all GPUs; on Hopper, gemm_wgmma.cu takes int8 codes instead.
//
// CODES         activation                                   MMA                       scales
// INT8          int8 codes, a scale per token (two if the    s8: expanded weights      group scale = integer x row_scale: int32 sums
//               columns have two parts)                      times their integer       over all of K, scaled once at the end
// INT4_BYTES    4-bit codes in bytes, a scale per group      s8: expanded weights      both group scales, in fp32, every 64 columns
// INT4_NIBBLES  4-bit codes, a scale per group               s4 x s4 or s4 x u4        as INT4_BYTES
//
// The weights are the MMA's rows (A), the tokens its columns (B). A warp has 64 weight rows x TILES x 8 tokens, and may assign its weight
// rows to the MMA's rows in any order. Lane (g, q) has the rows 8 g .. 8 g + 7 of the 64, the even ones as row g and the odd ones as row
// g + 8 of the four MMAs. Then its group scales are 16 contiguous bytes, and so are its outputs of a token in y: they need neither
// shuffles nor shared memory.
//
//                 TOKEN_WARPS x TILES x 8 tokens      a stage of the ring:  X   tokens x 64 or 128 B   activation layout, as in memory
//                +--------+--------+-- - -                                  W   rows x 64 B            128 columns of weights
//             64 | warp 0 | warp 2 |                                        WS  2 x rows               the two groups' 16-bit scales
//   ROW_WARPS    +--------+--------+-- - -                                  XS  2 x tokens             the two groups' fp32 scales
//             64 | warp 1 | warp 3 |          after the K blocks, the LoRA branch's blocks of 32 ranks pass through the same ring:
//                +--------+--------+-- - -    lora_act as X, proj_up (with LORA then lora_up) as W. Both have rows of 64 B.
//
// W in a stage, for each warp's 64 rows: [row % 8][piece c][slot], 16 bytes each, slot = (row / 8) ^ swizzle(c). In one phase of a
// shared-memory read the lanes access 4 rows 8 apart and 2 pieces (8 bytes per lane), or 2 rows and 4 pieces (16 bytes per lane), or all
// 8 rows and one piece (ldmatrix). The swizzle 0, 4, 2, 6 distributes each of these, and the copies' writes, over all banks.
//
// The conversion from int to float is part of an FFMA that is needed anyway. The MMA starts from C = 0x4B400000, the bits of MAGIC =
// 1.5 x 2^23, so that its integer result v, read as a float, is MAGIC + v. Then fma(MAGIC + v, s, -MAGIC s) = v s. This is exact: MAGIC s
// needs 2 bits more than the 16-bit scale s, and v s needs 13 + 11. A second FFMA multiplies by the token's scale and accumulates. An
// MMA's 4 sums take 8 FFMAs, with one rounding per group.
//
// With NEXT, GELU(y) is the next layer's input, and next.cuh is the tile's epilogue.
//
// The roles: gemm_mma_fetch.cuh fills the ring, gemm_mma_multiply.cuh computes a stage, and the epilogue is here or in next.cuh.

#include "gelu.cuh"
#include "gemm_mma.cuh"
#include "gemm_mma_fetch.cuh"
#include "gemm_mma_multiply.cuh"
#include "residual.cuh"
#ifdef NEXT
#include "next.cuh"
#endif

// The first of the lane's two tokens in its warp's token tile t, relative to the CTA's tile.
DEVICE int token_of(int token_warp, int q, int t) { return (token_warp * TILES + t) * 8 + 2 * q; }

// --- Before the main loop: tables for the epilogue --------------------------------------------------------------------

// Constants that the kernel reads from shared memory. The compiler would move known constants into registers again for every use: four
// MAGICs for every MMA, INT8's mask for every second LOP3. It keeps values that it has loaded.
DEVICE void write_constants(u8* memory) {
  const int thread = threadIdx.x;
  if (thread < 4) ((u32*)(memory + CONSTANTS))[thread] = CODES == INT8 ? 0x0f0f0f0f : MAGIC_BITS;
}

// For each token: the inner scale, which multiplies acc within the parentheses; the outer scale, which multiplies the parentheses; and
// INT8's ratio of the first part's scale to the second's.
DEVICE void write_token_scales(float* tables, const float* act_scale, const float* outer_scale, int m0, int padded_m, Steps steps) {
  for (int i = threadIdx.x; i < TOKENS; i += THREADS) {
    const int token = min(m0 + i, padded_m - 1);
    const float outer = outer_scale ? outer_scale[token] : 1.f;
    float inner = power_inverse(outer), ratio = 1.f;
    if (CODES == INT4_BYTES) inner *= 1.f / 16;
    if (CODES == INT8) {
      const float last = act_scale[steps.border < steps.groups ? padded_m + token : token];
      if (steps.two_parts) {
        const float first = act_scale[token];
        ratio = last == 0.f ? 0.f : divide(first, last);
        inner *= first - first;  // NaN if first is NaN or infinite, otherwise zero
        inner = power_inverse(outer) + inner;
      }
      inner *= last;
    }
    tables[i] = inner;
    tables[TOKENS + i] = outer;
    tables[2 * TOKENS + i] = ratio;
  }
}

DEVICE void write_row_inverses(u8* memory, const float* row_scale, int n0, int n) {
  for (int i = threadIdx.x; i < ROWS; i += THREADS) {
    const float c = n0 + i < n ? row_scale[n0 + i] : 0.f;
    ((float*)(memory + INVERSES))[i] = c == 0.f ? 0.f : divide(1.f, c);
  }
}

// --- The main loop ----------------------------------------------------------------------------------------------------

// Converts sums from units of the first part's scale to units of the second's.
DEVICE void change_units(int (&sums)[4][TILES][4], u32 shared, int token_warp, int q) {
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const float2 ratio = load_shared_float2(shared + TABLES + (2 * TOKENS + (token_warp * TILES + t) * 8 + 2 * q) * 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][t][e] = __float2int_rn((float)sums[i][t][e] * (e % 2 ? ratio.y : ratio.x));
  }
}

// INT8: int32 sums over all of K.
DEVICE void multiply_columns(int (&sums)[4][TILES][4], Ring& ring, Steps steps, int border, int groups, u32 shared, u32 w_words,
                             u32 ws_lane, u32 x_lane, int row_warp, int token_warp, int lane, int g, int q) {
  const bool two_parts = border > 0 && border < groups;
  for (int part = two_parts ? 0 : 1, step = 0; part < 2; part++) {
    for (const int end = part ? steps.columns : steps.border_step; step < end; step++) {
      ring.wait_for_stage(step);
      const int group = 2 * (part ? step - steps.twice : step) + q / 2;
      multiply_block(sums, shared, shared + INVERSES + (row_warp * 64 + 8 * g) * 4, w_words + ring.stage,
                     ws_lane + ring.stage + q / 2 * ROWS * 2, x_lane + ring.stage, lane,
                     !two_parts || group >= border == part);
      ring.advance(step);
    }
    if (part == 0) change_units(sums, shared, token_warp, q);
  }
}

// 4 bits: fp32 sums of the groups' scaled products.
DEVICE void multiply_columns(float (&acc)[4][TILES][4], Ring& ring, Steps steps, u32 shared, u32 w_lane, u32 ws_lane, int token_row,
                             u32 rank_lane) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int token_warp = warp / ROW_WARPS;
  __syncthreads();
  const uint4 magic_words = load_shared16(shared + CONSTANTS);
  const int magic[4] = {(int)magic_words.x, (int)magic_words.y, (int)magic_words.z, (int)magic_words.w};
  const u32 w_words = w_lane + (q >> 1) * 128 + ((g ^ swizzle(q >> 1)) << 4) + (q & 1) * 8;  // group 0; group 1 is two pieces further
  const u32 x_lane = X_ROW == RANK_ROW ? rank_lane : X + token_row * 128 + (((lane >> 3 & 1) ^ (lane & 7)) << 4);
  const u32 xs_lane = XS + (token_warp * (TILES / 2) * 4 + q) * 16;
  for (int step = 0; step < steps.columns; step++) {
    ring.wait_for_stage(step);
    // Unrolled, INT4_BYTES would spill registers, except on sm_90.
#pragma unroll (CODES == INT4_BYTES && __CUDA_ARCH__ != 900 ? 1 : 2)
    for (int half = 0; half < 2; half++) {
      const int group = 2 * step + half;
      const u32 w = ((w_words + ring.stage) ^ half * 32) + half * 256, ws = ws_lane + ring.stage + half * ROWS * 2;
      const u32 x = (x_lane + ring.stage) ^ half * (X_ROW / 2), xs = xs_lane + ring.stage + half * TOKENS * 4;
      if (group >= steps.groups) break;
      if (CODES == INT4_NIBBLES && group >= steps.border) multiply_group<true>(acc, w, ws, x, xs, magic);
      else multiply_group<false>(acc, w, ws, x, xs, magic);
    }
    ring.advance(step);
  }
}

// --- The epilogue -----------------------------------------------------------------------------------------------------

// Scales acc into units of 1 / outer_scale, for the sum in the parentheses.
DEVICE void apply_inner_scale(float (&acc)[4][TILES][4], u32 shared, int token_warp, int q) {
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const float2 inner = load_shared_float2(shared + TABLES + token_of(token_warp, q, t) * 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][t][e] *= e % 2 ? inner.y : inner.x;
  }
}

// INT8: scales the int32 sums also by the row scales, which the main loop leaves out. lane_row: the first of the lane's eight weight rows.
DEVICE void apply_inner_scale(float (&acc)[4][TILES][4], const int (&sums)[4][TILES][4], u32 shared, const float* row_scale, int lane_row,
                              int n, int token_warp, int q) {
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const float2 inner = load_shared_float2(shared + TABLES + token_of(token_warp, q, t) * 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float c = lane_row < n ? row_scale[lane_row + 2 * i + e / 2] : 0.f;
        acc[i][t][e] = (float)sums[i][t][e] * c;
        acc[i][t][e] *= e % 2 ? inner.y : inner.x;
      }
  }
}

DEVICE void load_bias(float (&offset)[8], const u16* bias, int lane_row) {
  if (!bias) return;
  const uint4 v = *(const uint4*)(bias + lane_row);
  const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = to_float2(word[i]);
    offset[2 * i] = two.x, offset[2 * i + 1] = two.y;
  }
}

// Stores y = acc outer_scale + offset, 16 bytes of each token. GATED: residual + gate * that, for the lane's gates.
DEVICE void store_outputs(u16* y, const float (&acc)[4][TILES][4], const float (&offset)[8], const float* outer_scale, int m0, int m, int n,
                          int lane_row, bool activated, const u16* residual, uint4 gate, int token_warp, int q) {
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int token = token_of(token_warp, q, t) + e;
      const float outer = outer_scale[token];
      float out[8];
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] = fmaf(acc[i / 2][t][e + i % 2 * 2], outer, offset[i]);
      if (activated)
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = gelu(out[i]);
      u32 word[4];
#pragma unroll
      for (int i = 0; i < 4; i++) word[i] = from_float2(out[2 * i], out[2 * i + 1]);
      if (m0 + token < m) {
        const size_t at = (size_t)(m0 + token) * n + lane_row;
        uint4 outputs = make_uint4(word[0], word[1], word[2], word[3]);
        if (GATED) outputs = add_gated(load_once16(residual + at), outputs, gate);
        *(uint4*)(y + at) = outputs;
      }
    }
}

// --- The kernel -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm(u16* __restrict__ y,                    // (m, n); unused with NEXT
#if GATED
     const u16* __restrict__ residual,       // (m, n)
#endif
     const u8* __restrict__ act,             // (blocks, padded m, X_ROW) codes, in the activation layout
     const float* __restrict__ act_scale,    // INT8: (2, padded m), otherwise (k / 64, padded m)
     const u8* __restrict__ lora_act,        // (rank blocks, padded m, 64 bytes) 16-bit numbers, in the activation layout
     const float* __restrict__ outer_scale,  // (padded m), lora_act_scale: powers of two, or null for ones
     const u8* __restrict__ weight,          // (n, k / 2)
     const u16* __restrict__ weight_scale,   // (k / 64, n)
     const float* __restrict__ row_scale,    // INT8: (n)
     const u8* __restrict__ proj_up,         // (n, rank) 16-bit numbers
     const u16* __restrict__ bias,           // (n) or null
#if GATED
     const u16* __restrict__ gate,           // (n), 16-byte aligned
#endif
#if LORA
     const u8* __restrict__ lora_up,         // 16-bit numbers, part by part: (rows of the part, its ranks)
#endif
#ifdef NEXT
     u8* next_act, float* next_scale, float* next_sums, const u16* next_smooth, const u8* next_proj_down,  // as in struct Next
#endif
     int m, int n, int k, int rank,
     int unsigned_from                       // first column of the second part, with unsigned 4-bit codes; k if there is none
#if LORA
     , u64 lora_eighths, int lora_parts, int lora_part_rows  // LoraRanks
#endif
#if GELU
     , int gelu_from                         // first column of y that gets GELU, a multiple of 64
#endif
#ifdef NEXT
     , int next_rank, int next_unsigned_from
#endif
    ) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 shared = shared_address(memory);
  float* const tables = (float*)(memory + TABLES);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int row_warp = warp % ROW_WARPS, token_warp = warp / ROW_WARPS;
  const int padded_m = (m + 15) / 16 * 16;
  const int groups = k / 64, border = unsigned_from / 64;
  const Tile tile(m, n);
  const Steps steps(groups, border, rank);
#if LORA
  if (thread == 0) LoraSteps::write(memory, {lora_eighths, lora_parts, lora_part_rows}, tile.n0, steps);
  __syncthreads();
#else
  constexpr const u8* lora_up = nullptr;
#endif
  const Fetcher fetcher(act, act_scale, lora_act, weight, weight_scale, proj_up, lora_up, shared, n, k, rank, padded_m, tile, steps);
  Ring ring(fetcher, shared);
  ring.start();

  write_constants(memory);
  write_token_scales(tables, act_scale, outer_scale, tile.m0, padded_m, steps);

  const u32 w_lane = W + row_warp * 4096, ws_lane = WS + (row_warp * 64 + 8 * g) * 2;
  const int token_row = token_warp * TILES * 8 + (lane >> 4) * 8 + (lane & 7);  // ldmatrix: halves 0 and 1 of two token tiles
  const u32 rank_lane = X + token_row * RANK_ROW + (((lane >> 3 & 1) ^ (lane >> 1 & 3)) << 4);
  const int lane_row = tile.n0 + row_warp * 64 + 8 * g;  // the first of the lane's eight weight rows
  float acc[4][TILES][4] = {};
  if constexpr (CODES == INT8) {
    const u32 w_words = w_lane + q * 128 + ((g ^ swizzle(q)) << 4), x_lane = X + token_row * 128;
    write_row_inverses(memory, row_scale, tile.n0, n);
    int sums[4][TILES][4] = {};
    multiply_columns(sums, ring, steps, steps.border, steps.groups, shared, w_words, ws_lane, x_lane, row_warp, token_warp, lane, g, q);
    apply_inner_scale(acc, sums, shared, row_scale, lane_row, n, token_warp, q);
  } else {
    multiply_columns(acc, ring, steps, shared, w_lane, ws_lane, token_row, rank_lane);
    apply_inner_scale(acc, shared, token_warp, q);
  }
  for (int step = steps.columns, end = fetcher.count(); step < end; step++) {
    ring.wait_for_stage(step);
    multiply_branch(acc, w_lane + ring.stage, rank_lane + ring.stage, lane);
    ring.advance(step);
  }

  if (lane_row >= n) return;
  float offset[8] = {};
  load_bias(offset, bias, lane_row);
#ifdef NEXT
  finish_for_next(acc, offset, tables + TOKENS, shared, tile.m0, tile.n0, m,
                  {next_act, next_scale, next_sums, next_smooth, next_proj_down, next_rank, next_unsigned_from});
#else
#if GELU
  const bool activated = lane_row >= gelu_from;  // the same for all rows of the warp
#else
  constexpr bool activated = false;
#endif
#if GATED
  const uint4 gates = *(const uint4*)(gate + lane_row);
#else
  constexpr uint4 gates = {};
  constexpr const u16* residual = nullptr;
#endif
  store_outputs(y, acc, offset, tables + TOKENS, tile.m0, m, n, lane_row, activated, residual, gates, token_warp, q);
#endif
}

// The second kernel of an SVDQuant layer through mma.sync: y = low_scale (acc + low up^T) + bias, where acc is the product of the 4-bit
// weights with the activation's codes over low_scale. For sm_75 .. sm_89, sm_100 and sm_120; Hopper has gemm_wgmma.cu.
//
// MODE     activation                                       MMA                       scales
// INTEGER  int8 codes, a scale a token (two, if the         s8: weights expanded,     group scale = integer x row_scale: int32 sums
//          columns have two parts)                          times their integer       over all of K, scaled once at the end
// BYTES    4-bit codes in bytes, a scale a group            s8: weights expanded      both group scales, in fp32, every 64 columns
// NIBBLES  4-bit codes, a scale a group                     s4 x s4 or s4 x u4        the same
//
// The weights are the MMA's rows (A), the tokens its columns (B). A warp has 64 weight rows x TILES x 8 tokens, and which of its weight
// rows is which row of an MMA is ours to choose: lane (g, q) gets the rows 8 g .. 8 g + 7 of the 64, as row g (even ones) and g + 8 (odd
// ones) of the four MMAs. So its group scales are 16 contiguous bytes, and so is what it has of a token in y: no shuffles, no detour
// through shared memory.
//
//                 TOKEN_WARPS x TILES x 8 tokens      a stage of the ring:  X   tokens x 64 or 128 B   image, as it is in device memory
//                +--------+--------+-- - -                                  W   rows x 64 B            128 columns of weights
//             64 | warp 0 | warp 2 |                                        WS  2 x rows               the two groups' 16-bit scales
//   ROW_WARPS    +--------+--------+-- - -                                  XS  2 x tokens             the two groups' fp32 scales
//             64 | warp 1 | warp 3 |          after the K blocks, the branch's blocks of 32 ranks go through the same ring:
//                +--------+--------+-- - -    low as X (64 B rows), up as W. Both happen to be 64 B a row.
//
// W in a stage, for each warp's 64 rows: [row % 8][piece c][slot], 16 bytes each, slot = (row / 8) ^ swizzle(c). In one phase of a
// shared-memory read the lanes want 4 rows 8 apart and 2 pieces (8 bytes a lane), or 2 rows and 4 pieces (16 bytes a lane), or all 8
// rows and one piece (ldmatrix): the swizzle 0, 4, 2, 6 spreads each of these over all banks, and the copies' writes too.
//
// Int to float costs nothing but an FFMA that is needed anyway. The MMA starts from C = 0x4B400000, the bits of MAGIC = 1.5 x 2^23, so
// its integer result v is, read as a float, MAGIC + v. Then fma(MAGIC + v, s, -MAGIC s) = v s, and no rounding happens: MAGIC s needs 2
// bits more than the 16-bit scale s, v s needs 13 + 11. A second FFMA multiplies by the token's scale and accumulates: 8 FFMAs for the
// 4 sums of an MMA, and one rounding a group.
//
// NEXT, defined for the modes with a scale a group: GELU(y) is the next layer's input, and the tile ends as next.cuh has it. It is that
// layer's rank, padded to 32.

#include "common.cuh"
#include "gelu.cuh"
#include "imma.cuh"

#define INTEGER 0
#define BYTES 1
#define NIBBLES 2

constexpr int ROWS = 64 * ROW_WARPS;            // weight rows of a tile
constexpr int TOKENS = 8 * TILES * TOKEN_WARPS; // tokens of a tile
constexpr int THREADS = 32 * ROW_WARPS * TOKEN_WARPS;
constexpr int X_ROW = MODE == NIBBLES ? 64 : 128;
constexpr int X = 0, W = X + TOKENS * X_ROW, WS = W + ROWS * 64, XS = WS + 2 * ROWS * 2;
constexpr int STAGE = XS + (MODE == INTEGER ? 0 : 2 * TOKENS * 4);
#ifdef NEXT
constexpr int NEXT_SHARED = (TOKENS + NEXT) * ROWS * 2;
#else
constexpr int NEXT_SHARED = 0;
#endif
constexpr int TABLES = STAGES * STAGE > NEXT_SHARED ? STAGES * STAGE : NEXT_SHARED;  // three floats a token, for the end
constexpr int CONSTANTS = TABLES + 3 * TOKENS * 4;
constexpr int INVERSES = CONSTANTS + 16;        // INTEGER: 1 / row_scale
constexpr int SHARED = INVERSES + (MODE == INTEGER ? ROWS * 4 : 0);
constexpr int X_PIECES = TOKENS * X_ROW / 16 / THREADS, W_PIECES = ROWS * 64 / 16 / THREADS;
constexpr int BAND = 16;                        // token tiles that are worked on side by side
constexpr int MAGIC_BITS = 0x4B400000;
constexpr u32 ALL_8 = 0x08080808, ALL_128 = 0x80808080;
static_assert(SHARED == SHARED_BYTES, "the host reserves what the kernel uses");
static_assert(TILES % 2 == 0 && X_PIECES > 0 && W_PIECES > 0, "every thread copies the same number of pieces");

#ifdef NEXT
#include "next.cuh"
#endif

DEVICE int swizzle(int piece) { return (piece & 1) << 2 | (piece & 2); }

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

// Two token tiles' fragments for one MMA step: the pieces of the halves 0 and 1 of each.
DEVICE void load_tokens(u32 (&b)[2][2], u32 address) {
  u32 d[4];
  ldmatrix4(d, address);
  b[0][0] = d[0], b[0][1] = d[1], b[1][0] = d[2], b[1][1] = d[3];
}

#if MODE == INTEGER

// Four codes times their group's integer as int8. u = code + 8 is 0..15 and the integer -15..16, so no byte of u i + (128 - 8 i) leaves
// 0..255, and turning bit 7 of each takes the 128 off again.
// low_nibbles is 0x0f0f0f0f.
DEVICE u32 times_integer(u32 nibbles, u32 low_nibbles, u32 integer, u32 offset) {
  return (((nibbles & low_nibbles) ^ ALL_8) * integer + offset) ^ ALL_128;
}

// All 128 columns of a block: four MMA steps. Word s of a lane's 16 bytes of a row is step s; all of them are columns of one group.
// live: whether the lane's group counts in this turn.
DEVICE void multiply(int (&acc)[4][TILES][4], u32 shared, u32 inverses, u32 w, u32 ws, u32 x, int lane, bool live) {
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
    __syncwarp();  // not for the lanes but for the compiler, which would fetch further ahead than there are registers for
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

#else

// One group of 64 columns. x: the lane's row of the first ldmatrix; w: the lane's 8 bytes of the row 8 g.
template <bool x_unsigned>
DEVICE void multiply(float (&acc)[4][TILES][4], u32 w, u32 ws, u32 x, u32 xs, const int (&magic)[4]) {
  constexpr int STEPS = MODE == NIBBLES ? 1 : 2;       // MMA steps of a group
  constexpr int HEIGHT = MODE == NIBBLES ? 4 : 2;      // 16 rows each that are worked on together: what the registers hold
  float scale[8];
  load_scales(scale, ws);
#pragma unroll
  for (int above = 0; above < 4; above += HEIGHT) {
    u32 a[STEPS][HEIGHT][4];
    float shift[2 * HEIGHT];
#pragma unroll
    for (int j = 0; j < 2 * HEIGHT; j++) {
      const u32 row = w + (2 * above + j) * 512;
      shift[j] = -MAGIC * scale[2 * above + j];
#if MODE == NIBBLES
      // One load of 8 bytes would put side by side what the MMA wants two registers apart; ^ rather than + lest the compiler join them.
      a[0][j / 2][j % 2] = load_shared4(row);
      a[0][j / 2][j % 2 + 2] = load_shared4((w ^ 4) + (2 * above + j) * 512);
#else
      // A code in the upper half of its byte is 16 times the code as int8: the end takes the 16 off.
      const uint2 v = load_shared8(row);
      a[0][j / 2][j % 2] = v.x << 4 & 0xf0f0f0f0;
      a[0][j / 2][j % 2 + 2] = v.x & 0xf0f0f0f0;
      a[1][j / 2][j % 2] = v.y << 4 & 0xf0f0f0f0;
      a[1][j / 2][j % 2 + 2] = v.y & 0xf0f0f0f0;
#endif
    }
#pragma unroll
    for (int t = 0; t < TILES; t += 2) {
      __syncwarp();  // not for the lanes but for the compiler, which would fetch further ahead than there are registers for
      u32 b[STEPS][2][2];
#pragma unroll
      for (int s = 0; s < STEPS; s++) load_tokens(b[s], (x ^ s * 32) + t * 8 * X_ROW);
      const uint4 v = load_shared16(xs + t / 2 * 64);
      const float token_scale[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
      for (int i = 0; i < HEIGHT; i++)
#pragma unroll
        for (int u = 0; u < 2; u++) {
          int sum[4];
#if MODE == NIBBLES
          imma_4bit<x_unsigned>(sum, a[0][i], b[0][u], magic);
#else
          imma_8bit(sum, a[0][i], b[0][u], magic);
          imma_8bit(sum, a[1][i], b[1][u], sum);
#endif
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

#endif

// One block of 32 ranks of the branch. up, low: the lane's rows for ldmatrix, as swizzled pieces of the block's first half.
DEVICE void multiply_branch(float (&acc)[4][TILES][4], u32 up, u32 low, int lane) {
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
      load_tokens(b, (low ^ s * 32) + t * 8 * 64);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        mma_16816(acc[i][t], a[i], b[0]);
        mma_16816(acc[i][t + 1], a[i], b[1]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm(u16* __restrict__ y,                   // (m, n); with NEXT nothing
     const u8* __restrict__ act,            // (blocks, padded m, X_ROW) image
     const float* __restrict__ act_scale,   // INTEGER: (2, padded m), otherwise (k / 64, padded m)
     const u8* __restrict__ low,            // (rank blocks, padded m, 64) image of 16-bit numbers
     const float* __restrict__ low_scale,   // (padded m), powers of two, or null for ones
     const u8* __restrict__ weight,         // (n, k / 2)
     const u16* __restrict__ weight_scale,  // (k / 64, n)
     const float* __restrict__ row_scale,   // INTEGER: (n)
     const u8* __restrict__ proj_up,        // (n, rank) of 16-bit numbers
     const u16* __restrict__ bias,          // (n) or null
#ifdef NEXT
     u8* next_act, float* next_scale, float* next_shares, const u16* next_smooth, const u8* next_proj_down,  // of a struct Next
#endif
     int m, int n, int k, int rank,
     int unsigned_from                      // the second part of the columns, unsigned codes in int4; k where there is none
#if GELU
     , int gelu_from                        // y's column, a multiple of 64, from which on it is gelu(y)
#endif
#ifdef NEXT
     , int next_rank, int next_unsigned_from
#endif
    ) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 shared = shared_address(memory);
  float* const tables = (float*)(memory + TABLES);  // [3][TOKENS]
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int row_warp = warp % ROW_WARPS, token_warp = warp / ROW_WARPS;
  const int padded_m = (m + 15) / 16 * 16, groups = k / 64, border = unsigned_from / 64;

  // Tiles go down the tokens first, in bands: the CTAs at work share few weight rows and few tokens, which stay in L2.
  const int token_tiles = ceil_div(m, TOKENS), row_tiles = ceil_div(n, ROWS);
  const int first = blockIdx.x / (BAND * row_tiles) * BAND, width = min(BAND, token_tiles - first);
  const int place = blockIdx.x - first * row_tiles;
  const int m0 = (first + place % width) * TOKENS, n0 = place / width * ROWS;

  // A turn is a block of columns, or of ranks. INTEGER's columns may have two parts whose border lies within a block. The lanes' words
  // are of one group each, so that such a block takes two turns, and in each of them the other part's integers are zero.
  const bool two_parts = MODE == INTEGER && border > 0 && border < groups;
  const int border_turn = two_parts ? (border + 1) / 2 : 0, twice = two_parts ? border % 2 : 0;
  const int k_turns = (groups + 1) / 2 + twice, turns = k_turns + (rank + 31) / 32;

  // What a thread copies in a turn: pieces of 16 bytes of X and W, perhaps one of WS, perhaps two tokens' scales. Registers are what this
  // kernel is short of, so that all sources are 32-bit offsets in bytes from a kernel's argument.
  const int w_piece = thread % 4, w_row = (thread / 4 & 1) * 8 + (thread / 8 & 7) + thread / 64 * 16;
  const u32 w_target = W + w_row / 64 * 4096 + w_row % 8 * 512 + w_piece * 128 + ((w_row / 8 % 8 ^ swizzle(w_piece)) << 4);
  auto w_place = [&](int i) {  // 64 rows on is the next warp's part; 32 rows on, the other half of the slots of the same
    return THREADS == 256 ? w_target + i * 4096 : w_target ^ i * 64;
  };
  auto w_source = [&](int i, int pitch) { return (u32)(min(n0 + w_row + i * (THREADS / 4), n - 1) * pitch + w_piece * 16); };
  u32 weight_source[W_PIECES];
#pragma unroll
  for (int i = 0; i < W_PIECES; i++) weight_source[i] = w_source(i, k / 2);
  const u32 ws_source = (thread / (ROWS / 8) * n + min(n0 + thread % (ROWS / 8) * 8, n - 8)) * 2;
#if MODE != INTEGER
  const int xs_group = thread / (TOKENS / 2), xs_pair = thread % (TOKENS / 2);
  const u32 xs_source = (xs_group * padded_m + min(m0 + 2 * xs_pair, padded_m - 2)) * 4;
  // Lane q's tokens of two neighbouring tiles side by side: 16 bytes for one load.
  const u32 xs_target = XS + xs_group * TOKENS * 4 + (xs_pair / 8 * 4 + xs_pair % 4) * 16 + xs_pair / 4 % 2 * 8;
#endif
  const int x_rows = min(padded_m - m0, TOKENS);

  // copy(piece, bytes, target, source, valid) for everything that the thread brings in this turn, to the stage at `in`.
  auto for_each_piece = [&](int turn, u32 in, auto copy) {
    const bool branch = turn >= k_turns;
    const int block = branch ? turn - k_turns : MODE != INTEGER || turn < border_turn ? turn : turn - twice;
    const u32 x_target = in + thread * 16;
    auto copy_scales = [&](bool both) {
      if (thread < (both ? ROWS / 4 : ROWS / 8))
        copy(W_PIECES + X_PIECES, 16, x_target + WS, (const u8*)weight_scale + (u32)(ws_source + block * n * 4), true);
#if MODE != INTEGER
      if (thread < (both ? TOKENS : TOKENS / 2))
        copy(W_PIECES + X_PIECES + 1, 8, in + xs_target, (const u8*)act_scale + (u32)(xs_source + block * padded_m * 8), true);
#endif
    };
    if (!branch && x_rows == TOKENS && 2 * block + 1 < groups) {  // all of a tile and both groups: nothing to be careful about
#pragma unroll
      for (int i = 0; i < W_PIECES; i++) copy(i, 16, in + w_place(i), weight + (u32)(weight_source[i] + block * 64), true);
      const u8* const x = act + (u32)((block * padded_m + m0) * X_ROW + thread * 16);
#pragma unroll
      for (int i = 0; i < X_PIECES; i++) copy(W_PIECES + i, 16, x_target + X + i * THREADS * 16, x + i * THREADS * 16, true);
      copy_scales(true);
    } else {
      const int pitch = branch ? rank * 2 : k / 2, width = branch ? 64 : X_ROW;
#pragma unroll
      for (int i = 0; i < W_PIECES; i++)
        copy(i, 16, in + w_place(i), (branch ? proj_up : weight) + (u32)(w_source(i, pitch) + block * 64),
             block * 64 + w_piece * 16 < pitch);
      const u8* const x = (branch ? low : act) + (u32)((block * padded_m + m0) * width + thread * 16);
#pragma unroll
      for (int i = 0; i < X_PIECES; i++)
        if (thread * 16 < x_rows * width - i * THREADS * 16)
          copy(W_PIECES + i, 16, x_target + X + i * THREADS * 16, x + i * THREADS * 16, true);
      if (!branch) copy_scales(2 * block + 1 < groups);
    }
  };
  auto after = [&](u32 stage) { return stage == shared + (STAGES - 1) * STAGE ? shared : stage + STAGE; };
  auto before = [&](u32 stage) { return stage == shared ? shared + (STAGES - 1) * STAGE : stage - STAGE; };
  u32 stage = shared;  // of this turn

#if TURING  // no asynchronous copies: through registers, loaded before the turn's arithmetic and stored after it
  static_assert(STAGES == 2, "the turn at work and the next one");
  uint4 held[W_PIECES + X_PIECES + 2];
  auto fetch = [&](int turn) {
    if (turn < turns)
      for_each_piece(turn, 0, [&](int i, int bytes, u32, const void* source, bool valid) {
        held[i] = make_uint4(0, 0, 0, 0);
        if (!valid) return;
        if (bytes == 16) held[i] = *(const uint4*)source;
        else held[i].x = ((const u32*)source)[0], held[i].y = ((const u32*)source)[1];
      });
  };
  auto land = [&](int turn, u32 in) {
    if (turn < turns)
      for_each_piece(turn, in, [&](int i, int bytes, u32 target, const void*, bool) {
        if (bytes == 16) store_shared16(target, held[i]);
        else store_shared8(target, make_uint2(held[i].x, held[i].y));
      });
  };
  auto begin_turn = [&](int turn) { __syncthreads(); fetch(turn + 1); };
  auto end_turn = [&](int turn) { land(turn + 1, after(stage)); stage = after(stage); };
  fetch(0);
  land(0, stage);
#else
  auto fetch = [&](int turn, u32 in) {
    if (turn < turns)
      for_each_piece(turn, in, [&](int, int bytes, u32 target, const void* source, bool valid) {
        if (bytes == 16) cp_async16(target, source, valid);
        else cp_async8(target, source);
      });
    cp_async_commit();
  };
  // One barrier a turn: after it, this turn's data is there for all, and everybody is done with the stage of the turn before, which is
  // filled next.
  auto begin_turn = [&](int turn) { cp_async_wait<STAGES - 2>(); __syncthreads(); fetch(turn + STAGES - 1, before(stage)); };
  auto end_turn = [&](int) { stage = after(stage); };
#pragma unroll
  for (int turn = 0; turn < STAGES - 1; turn++) fetch(turn, stage + turn * STAGE);
#endif

  // Constants by way of shared memory. What the compiler knows it moves into registers again and again: the magic's quadruple for every
  // MMA, INTEGER's mask for every other LOP3. What it has read it keeps.
  if (thread < 4) ((u32*)(memory + CONSTANTS))[thread] = MODE == INTEGER ? 0x0f0f0f0f : MAGIC_BITS;

  // What the end needs of each token: the factor of acc within the parentheses, the factor around them, and INTEGER's ratio of the
  // first part's scale to the second's.
  for (int i = thread; i < TOKENS; i += THREADS) {
    const int token = min(m0 + i, padded_m - 1);
    const float around = low_scale ? low_scale[token] : 1.f;
    float within = power_inverse(around), ratio = 1.f;
    if (MODE == BYTES) within *= 1.f / 16;
    if (MODE == INTEGER) {
      const float last = act_scale[border < groups ? padded_m + token : token];
      if (two_parts) {
        const float before = act_scale[token];
        ratio = last == 0.f ? 0.f : divide(before, last);
        within *= before - before;  // NaN if it is NaN or infinite, otherwise zero ...
        within = power_inverse(around) + within;
      }
      within *= last;
    }
    tables[i] = within;
    tables[TOKENS + i] = around;
    tables[2 * TOKENS + i] = ratio;
  }

  const u32 w_lane = W + row_warp * 4096, ws_lane = WS + (row_warp * 64 + 8 * g) * 2;
  const int token_row = token_warp * TILES * 8 + (lane >> 4) * 8 + (lane & 7);  // ldmatrix: two tiles, halves 0 and 1 of each
  const u32 low_lane = X + token_row * 64 + (((lane >> 3 & 1) ^ (lane >> 1 & 3)) << 4);
  const int lane_row = n0 + row_warp * 64 + 8 * g;  // of the lane's eight weight rows the first
  float acc[4][TILES][4] = {};

#if MODE == INTEGER
  const u32 w_words = w_lane + q * 128 + ((g ^ swizzle(q)) << 4), x_lane = X + token_row * 128;
  for (int i = thread; i < ROWS; i += THREADS) {
    const float c = n0 + i < n ? row_scale[n0 + i] : 0.f;
    ((float*)(memory + INVERSES))[i] = c == 0.f ? 0.f : divide(1.f, c);
  }
  int sums[4][TILES][4] = {};
  for (int part = two_parts ? 0 : 1, turn = 0; part < 2; part++) {
    for (const int end = part ? k_turns : border_turn; turn < end; turn++) {
      begin_turn(turn);
      const int group = 2 * (part ? turn - twice : turn) + q / 2;
      multiply(sums, shared, shared + INVERSES + (row_warp * 64 + 8 * g) * 4, w_words + stage, ws_lane + stage + q / 2 * ROWS * 2,
               x_lane + stage, lane, !two_parts || group >= border == part);
      end_turn(turn);
    }
    if (part == 0)  // from units of the first part's scale to units of the second's
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const float2 ratio = load_pair(shared + TABLES + (2 * TOKENS + (token_warp * TILES + t) * 8 + 2 * q) * 4);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) sums[i][t][e] = __float2int_rn((float)sums[i][t][e] * (e % 2 ? ratio.y : ratio.x));
      }
  }
#else
  __syncthreads();
  const uint4 magic_words = load_shared16(shared + CONSTANTS);
  const int magic[4] = {(int)magic_words.x, (int)magic_words.y, (int)magic_words.z, (int)magic_words.w};
  const u32 w_words = w_lane + (q >> 1) * 128 + ((g ^ swizzle(q >> 1)) << 4) + (q & 1) * 8;  // group 0; 1 is two pieces on
  const u32 x_lane = X_ROW == 64 ? low_lane : X + token_row * 128 + (((lane >> 3 & 1) ^ (lane & 7)) << 4);
  const u32 xs_lane = XS + (token_warp * (TILES / 2) * 4 + q) * 16;
  for (int turn = 0; turn < k_turns; turn++) {
    begin_turn(turn);
    // Unrolled, BYTES would need more registers than there are, but for sm_90's compiler.
#pragma unroll (MODE == BYTES && __CUDA_ARCH__ != 900 ? 1 : 2)
    for (int half = 0; half < 2; half++) {
      const int group = 2 * turn + half;
      const u32 w = ((w_words + stage) ^ half * 32) + half * 256, ws = ws_lane + stage + half * ROWS * 2;
      const u32 x = (x_lane + stage) ^ half * (X_ROW / 2), xs = xs_lane + stage + half * TOKENS * 4;
      if (group >= groups) break;
      if (MODE == NIBBLES && group >= border) multiply<true>(acc, w, ws, x, xs, magic);
      else multiply<false>(acc, w, ws, x, xs, magic);
    }
    end_turn(turn);
  }
#endif

  // Into the parentheses: acc over low_scale, in INTEGER with the scales that the loop left out.
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const float2 within = load_pair(shared + TABLES + ((token_warp * TILES + t) * 8 + 2 * q) * 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
#if MODE == INTEGER
        const float c = lane_row < n ? row_scale[lane_row + 2 * i + e / 2] : 0.f;
        acc[i][t][e] = (float)sums[i][t][e] * c;
#endif
        acc[i][t][e] *= e % 2 ? within.y : within.x;
      }
  }

  for (int turn = k_turns; turn < turns; turn++) {
    begin_turn(turn);
    multiply_branch(acc, w_lane + stage, low_lane + stage, lane);
    end_turn(turn);
  }

  if (lane_row >= n) return;
  float offset[8] = {};
  if (bias) {
    const uint4 v = *(const uint4*)(bias + lane_row);
    const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = to_float2(word[i]);
      offset[2 * i] = two.x, offset[2 * i + 1] = two.y;
    }
  }
#ifdef NEXT
  finish_for_next(acc, offset, tables + TOKENS, shared, m0, n0, m,
                  {next_act, next_scale, next_shares, next_smooth, next_proj_down, next_rank, next_unsigned_from});
#else
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int token = (token_warp * TILES + t) * 8 + 2 * q + e;
      const float around = tables[TOKENS + token];
      float out[8];
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] = fmaf(acc[i / 2][t][e + i % 2 * 2], around, offset[i]);
#if GELU
      if (lane_row >= gelu_from)  // of all lanes, or of none
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = gelu(out[i]);
#endif
      u32 word[4];
#pragma unroll
      for (int i = 0; i < 4; i++) word[i] = from_float2(out[2 * i], out[2 * i + 1]);
      if (m0 + token < m) *(uint4*)(y + (size_t)(m0 + token) * n + lane_row) = make_uint4(word[0], word[1], word[2], word[3]);
    }
#endif
}

// The tile of gemm_mma.cu: its sizes, its shared memory, and its steps through the columns. The other gemm_mma_*.cuh files are the
// kernel's roles.
//
// -D: CODES         a CodeStorage (common.cuh)
//     HALF          1 for fp16, else bf16
//     ROW_WARPS, TOKEN_WARPS, TILES, STAGES   as in the picture in gemm_mma.cu
//     GELU          1: GELU applies to y's columns from gelu_from on
//     LORA          1: the branch also has LoRAs' ranks
//     GATED         1: y is residual + gate * the layer's output; without GELU and NEXT
//     NEXT          only for 4-bit codes: the kernel ends with the next layer's codes (next.cuh); the next layer's rank, padded to 32
//     SHARED_BYTES  bytes of shared memory that the host reserves
#pragma once
#include "common.cuh"
#include "imma.cuh"
#include "lora.cuh"

constexpr int ROWS = 64 * ROW_WARPS;             // weight rows of a tile
constexpr int TOKENS = 8 * TILES * TOKEN_WARPS;  // tokens of a tile
constexpr int THREADS = 32 * ROW_WARPS * TOKEN_WARPS;
constexpr int BAND = 16;                         // token tiles of a band, see Tile

// Bytes per row in a stage: a token's codes of 128 columns, a weight row's codes, and 32 16-bit ranks of either.
constexpr int X_ROW = CODES == INT4_NIBBLES ? 64 : 128;
constexpr int W_ROW = 64;
constexpr int RANK_ROW = 64;

// Shared memory begins with the ring; these are the offsets within a stage.
constexpr int X = 0;
constexpr int W = X + TOKENS * X_ROW;
constexpr int WS = W + ROWS * W_ROW;
constexpr int XS = WS + 2 * ROWS * 2;
constexpr int STAGE = XS + (CODES == INT8 ? 0 : 2 * TOKENS * 4);
#ifdef NEXT
constexpr int NEXT_SHARED = (TOKENS + NEXT) * ROWS * 2;
#else
constexpr int NEXT_SHARED = 0;
#endif
// These offsets follow the ring, or next.cuh's data, which reuse the ring's memory:
constexpr int TABLES = STAGES * STAGE > NEXT_SHARED ? STAGES * STAGE : NEXT_SHARED;  // [3][TOKENS] float: inner scale, outer scale, ratio
constexpr int CONSTANTS = TABLES + 3 * TOKENS * 4;                                   // [4] words of write_constants
constexpr int INVERSES = CONSTANTS + 16;                                             // INT8: [ROWS] float, 1 / row_scale
constexpr int LORA_PART = INVERSES + (CODES == INT8 ? ROWS * 4 : 0);                 // LORA: LoraSteps, see gemm_mma_fetch.cuh
constexpr int SHARED = LORA_PART + (LORA ? 16 : 0);
static_assert(SHARED == SHARED_BYTES, "the host reserves what the kernel uses");

// 16-byte pieces that each thread copies per step.
constexpr int X_PIECES = TOKENS * X_ROW / 16 / THREADS;
constexpr int W_PIECES = ROWS * W_ROW / 16 / THREADS;
static_assert(TILES % 2 == 0 && X_PIECES > 0 && W_PIECES > 0, "every thread copies the same number of pieces");

constexpr int MAGIC_BITS = 0x4B400000;  // the bits of MAGIC

// Piece c of a weight row is in slot (row / 8) ^ swizzle(c).
DEVICE int swizzle(int piece) { return (piece & 1) << 2 | (piece & 2); }

// The first token and the first weight row of the CTA's tile. The order of the tiles runs along the tokens first, in bands, so that the
// running CTAs read few different weight rows and tokens, which stay in L2.
struct Tile {
  int m0, n0;

  DEVICE Tile(int m, int n) {
    const int token_tiles = ceil_div(m, TOKENS), row_tiles = ceil_div(n, ROWS);
    const int first = blockIdx.x / (BAND * row_tiles) * BAND, width = min(BAND, token_tiles - first);
    const int index = blockIdx.x - first * row_tiles;
    m0 = (first + index % width) * TOKENS, n0 = index / width * ROWS;
  }
};

// A step is a block of 128 columns, or of 32 ranks. INT8's columns may have two parts whose border lies within a block. Such a block takes
// two steps, and in each step the integers of the other part's group are zero. This works because a lane's word belongs to one group.
struct Steps {
  int groups, border;  // groups of 64 columns: all, and those of the first part
  bool two_parts;      // INT8: whether the parts have scales of their own
  int border_step;     // the first step of the second part
  int twice;           // 1 if a block takes two steps, else 0
  int columns, count;  // the number of steps over columns, and of all steps including proj_up's ranks

  DEVICE Steps(int groups, int border, int rank) : groups(groups), border(border) {
    two_parts = CODES == INT8 && border > 0 && border < groups;
    border_step = two_parts ? (border + 1) / 2 : 0, twice = two_parts ? border % 2 : 0;
    columns = (groups + 1) / 2 + twice, count = columns + (rank + 31) / 32;
  }
};

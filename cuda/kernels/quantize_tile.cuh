// The tile of quantize.cu: its sizes, its shared memory, and the parts of the work.
//
// -D: HALF 1 for fp16, else bf16
//     CODES a CodeStorage (common.cuh)
//     RANKS 0..128, a multiple of 32: the branch's rank, padded; 0 also if cuBLAS computes the branch
//     LORA 1, with RANKS 0: cuBLAS has also multiplied LoRAs' ranks
//     TILES ROWS / 16: 1, 2, 4;  CTAS 1..8
#pragma once
#include "codes.cuh"
#include "quantize.cuh"

constexpr int ROWS = 16 * TILES;
constexpr int THREADS = 128 * TILES;
constexpr int SPANS = 4;                      // spans of 32 columns in a block
constexpr int DEPTH = 4;                      // blocks of x in flight to shared memory
constexpr int BLOCK_BYTES = ROWS * 256;       // x: 128 columns of all rows
constexpr int SLAB_BYTES = 128 * RANKS * 2;   // proj_down: 128 rows. The float sums (ROWS, RANKS), which are no larger, reuse it
constexpr int RANK_TILES = RANKS / 8;
constexpr int SLAB_ROW = RANK_TILES > 0 ? RANK_TILES : 1;  // pieces of 8 ranks
constexpr int SLAB_PIECES = RANKS * 16 / THREADS;  // 16-byte pieces of a slab that each thread copies

// 4 MULTI warps divide x @ proj_down of MULTI tiles and a block by ranks and by columns. With many ranks, proj_down is read once for
// two tiles, which saves shared-memory bandwidth, and a warp has sums of only some ranks, which saves registers.
constexpr int MULTI = RANKS > 64 && TILES > 1 ? 2 : 1;
constexpr int RANK_SPLIT = RANKS > 64 ? (RANKS == 128 ? 2 * MULTI : 2) : 1;
constexpr int COLUMN_SPLIT = 4 * MULTI / RANK_SPLIT;
constexpr int WARP_SPANS = SPANS / COLUMN_SPLIT;
constexpr int WARP_RANK_TILES = RANK_TILES / RANK_SPLIT;
static_assert(WARP_SPANS * MULTI == RANK_SPLIT, "of the warps with the same x, each takes the maxima of one tile and span");

constexpr int LORA_THREADS = 4 * ROWS / CTAS > 32 ? 4 * ROWS / CTAS : 32;
constexpr int CTAS_PER_SM = TILES == 4 || RANKS > 64 ? 1 : 2;  // the least number of CTAs for which registers should suffice

// The addresses of the shared-memory plan. `kept` is the number of blocks of 1 / smooth: all of the CTA's, or 1.
struct SharedPlan {
  u32 x;            // [slots] blocks
  u32 slab;         // [RANKS / 32][128 rows][4 pieces]
  u32 smooth;       // [kept][16 runs of 8 columns][4 even, 4 odd] float, 1 / smooth
  u32 warp_max;     // [2 parts][SPANS][ROWS] float
  u32 row_max;      // [2 parts][ROWS] float, this CTA's maxima
  u32 row_inverse;  // [ROWS][2 parts] float, 1 / scale; NaN if the row has a NaN
  DEVICE SharedPlan(u32 base, int slots, int kept) {
    x = base;
    slab = x + slots * BLOCK_BYTES;
    smooth = slab + SLAB_BYTES;
    warp_max = smooth + kept * 512;
    row_max = warp_max + 2 * SPANS * ROWS * 4;
    row_inverse = row_max + 2 * ROWS * 4;
  }
};

// The first and the last blocks of x have their own slots; the blocks between pass through the last DEPTH slots.
DEVICE int slot_of(int block, int slots) {
  const int own = slots - DEPTH;
  return block < own ? block : own + ((block - own) & (DEPTH - 1));
}

// x: row r has its 16 pieces of 8 columns at piece ^ 4 (r & 1), so that four neighbouring pieces of two rows cover all banks.
DEVICE u32 x_offset(int row, int piece) { return row * 256 + ((piece ^ (row & 1) << 2) << 4); }

// slab: runs of 32 ranks; row k has its 4 pieces of 8 ranks at piece ^ (k / 8 % 4): ldmatrix takes k = 8 L + {0, 1}, L = 0..3.
DEVICE u32 slab_offset(int row, int piece) {
  return (((piece >> 2) * 128 + row) * 4 + (piece & 3 ^ row >> 3 & 3)) << 4;
}

// The sums: tile c of 8 ranks is at c ^ (row & 3).
DEVICE u32 sum_offset(int row, int tile) { return (row * RANKS + ((tile ^ row & 3) << 3)) << 2; }

// The kernel's arguments, and this CTA's part of them.
struct Work {
  const u16 *x, *smooth, *proj_down;
  char* act;
  float* act_scale;
  int M, K, R, stride, unsigned_from, slots, kept;
  SharedPlan at;
  int padded;        // M padded to 16
  int rank;          // the CTA's rank in its cluster
  int first_row;     // the CTA's first token
  int first, count;  // the CTA's blocks of columns

  DEVICE u32 x_block(int block) const { return at.x + slot_of(block, slots) * BLOCK_BYTES; }
  DEVICE u32 smooth_block(int block) const { return at.smooth + (kept > 1 ? block : 0) * 512; }
};

// A lane's part of the work. In the MMAs, lane g * 4 + L has rows g and g + 8 of 16, and columns 8 L .. 8 L + 7 of each 32: one read of
// 16 bytes. A fragment's registers may hold any columns, as long as proj_down's rows have the same order.
struct Lane {
  int lane, g, L;
  int first_tile, rank_part, column_part;  // the warp's tiles of 16 rows, its ranks, and its columns of a block
  int max_row, max_span;                   // the row and the span of which the lane takes maxima
  int row_lane, row, token;                // for encoding: eight lanes per row, each with 16 bytes of codes, which write whole lines

  DEVICE Lane(int warp, int lane, int first_row) : lane(lane) {
    g = lane / 4, L = lane % 4;
    first_tile = warp / (4 * MULTI) * MULTI, rank_part = warp % (4 * MULTI) / COLUMN_SPLIT, column_part = warp % COLUMN_SPLIT;
    max_row = (first_tile + rank_part % MULTI) * 16 + g, max_span = column_part * WARP_SPANS + rank_part / MULTI;
    row_lane = lane % 8, row = warp * 4 + lane / 8, token = first_row + row;
  }
};

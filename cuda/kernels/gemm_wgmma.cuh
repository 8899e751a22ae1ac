// The tile of gemm_wgmma.cu: its sizes, its shared memory and barriers, and the tiles over which a CTA loops.
//
// -D: HALF            1 for fp16, else bf16
//     ROWS, TOKENS    weight rows and tokens of a tile;  STAGES of the ring
//     CLUSTER, SPLIT  two CTAs share their tokens, or their K
//     GELU            1: GELU applies to y's columns from gelu_from on
//     GATED           1: y is residual + gate * the layer's output; without GELU
//     LORA            1: the branch also has LoRAs' ranks, or more ranks than the ring has stages for
#pragma once
#include "common.cuh"
#include "hopper.cuh"
#include "lora.cuh"

constexpr int CONSUMERS = ROWS / 64;            // consumer warpgroups
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = ROWS * 64;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int S_BYTES = 2 * ROWS * 2;           // apart from the stages, so that X is aligned to 1024 bytes
constexpr int RING = STAGES * STAGE_BYTES;
constexpr int OUT = TOKENS / SPLIT;             // tokens whose outputs a CTA finishes
constexpr int SLICE = OUT < 64 ? OUT : 64;      // tokens that a warpgroup transposes and stores at a time
constexpr int SLICES = OUT / SLICE;
constexpr int AHEAD = TOKENS == 192 && ROWS == 192 ? 0 : 1;  // slices of the branch's product that may run ahead, as registers allow
constexpr int SLICE_BYTES = SLICE * 128;
// A warpgroup's slots for slices: in one it writes while the copy engine reads the other. GATED: they also take the residual's slices, which
// arrive while the tile is multiplied; only tiles of 256 tokens have more slices than slots.
constexpr int MOST_SLOTS = GATED ? 3 : 2, SLOTS = SLICES < MOST_SLOTS ? SLICES : MOST_SLOTS;
constexpr int STORE_BYTES = SLOTS * SLICE_BYTES;
constexpr int SUM_BYTES = SPLIT == 1 ? 0 : OUT * 64 * 4;  // a warpgroup's sums from the CTA with the other part of K
// Offsets of a tile's factors: OUT scales each of the last part, of the first part and of lora_act; ROWS each of row_scale and bias.
constexpr int LAST = 0, FIRST = OUT * 4, OUTER = 2 * OUT * 4, ROW_SCALE = 3 * OUT * 4, BIAS = ROW_SCALE + ROWS * 4;
constexpr int FACTOR_BYTES = BIAS + ROWS * 2;
constexpr int STORES = RING;                    // aligned to 1024 bytes, since the copy engine swizzles by the address
constexpr int SCALES = STORES + CONSUMERS * STORE_BYTES;
constexpr int SUMS = SCALES + STAGES * S_BYTES;
constexpr int FACTORS = SUMS + CONSUMERS * SUM_BYTES;
constexpr int INVERSES = FACTORS + 2 * FACTOR_BYTES;  // GATED: 1 / row_scale of a tile's rows
constexpr int BARRIERS = INVERSES + (GATED ? ROWS * 4 : 0);
constexpr int RESIDUALS = GATED ? CONSUMERS * SLICES : 0;  // barriers for slices of the residual
// A thread starts with 128 registers (four warpgroups) or 168 (three). The consumers may take as many as the producers release.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40, CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS == (CONSUMERS == 3 ? 4 * 128 : 3 * 168), "the CTA's registers");
static_assert(BARRIERS + 16 * STAGES + 16 + 16 * CONSUMERS + 8 * RESIDUALS <= 232448, "more shared memory than an SM has");
static_assert(STAGES >= 4, "without LORA, a branch of at most 128 ranks lies in the ring at once");
static_assert(CLUSTER * SPLIT == 2, "two CTAs share their tokens or their K");
static_assert(!GATED || !GELU, "no layer has both");
static_assert(CLUSTER == 1 || TOKENS % 16 == 0, "each CTA of a cluster fetches whole atoms of 8 tokens");

// A position in the ring: the stage, and the parity of its barriers' phase.
struct RingPosition {
  u32 parity = 0;
  int stage = 0;
  DEVICE void next() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

// The barriers, in their order in shared memory.
struct SharedBarriers {
  Barriers full, empty;       // [STAGES] a stage is filled; a stage is read
  Barriers used;              // [2] a buffer of factors is read
  Barriers summed, sendable;  // [CONSUMERS] the other CTA's sums have arrived; the other CTA has read the sums sent to it
  Barriers residual;          // GATED: [CONSUMERS][SLICES] a slice of the residual has arrived

  DEVICE SharedBarriers(u32 shared) {
    full = {shared + BARRIERS}, empty = {full.first + 8 * STAGES}, used = {empty.first + 8 * STAGES};
    summed = {used.first + 16}, sendable = {summed.first + 8 * CONSUMERS};
    residual = {sendable.first + 8 * CONSUMERS};
  }

  DEVICE void init() const {
    for (int s = 0; s < STAGES; s++) {
      full[s].init(128 + 1);  // the producers' copies, and the thread that starts the bulk copy
      empty[s].init(CONSUMERS * 4 * CLUSTER * ARRIVALS);
    }
    for (int i = 0; i < 2; i++) used[i].init(CONSUMERS * 4 * ARRIVALS);
    for (int i = 0; i < CONSUMERS; i++) {
      summed[i].init(1);
      sendable[i].init(4 * ARRIVALS);
    }
    for (int i = 0; i < RESIDUALS; i++) residual[i].init(1);
    fence_mbarrier_init();
  }
};

struct Problem {
  int begin, end;  // the CTA's blocks of K
  int own_rank_blocks, token_tiles, row_tiles;
#if LORA
  LoraRanks lora;
#endif

  // The blocks of ranks of a tile whose first weight row is n0.
  DEVICE int rank_blocks(int n0) const {
#if LORA
    return own_rank_blocks + lora.part_of_row(n0).blocks();
#else
    return own_rank_blocks;
#endif
  }
};

// Whether a tile's blocks of ranks lie in the ring all at once, while its slices are multiplied. Otherwise each slice fetches them again.
DEVICE bool resident(int rank_blocks) { return !LORA || rank_blocks <= STAGES; }

// A tile. The order of the tiles runs along the tokens first: the running CTAs read few weight rows, and the activation stays in L2.
struct Tile {
  int token, row, token_step, row_step;

  DEVICE Tile(const Problem& p) {
    const int first = blockIdx.x / (CLUSTER * SPLIT), step = gridDim.x / (CLUSTER * SPLIT);
    token = first % p.token_tiles, row = first / p.token_tiles;
    token_step = step % p.token_tiles, row_step = step / p.token_tiles;
  }

  DEVICE bool exists(const Problem& p) const { return row < p.row_tiles; }

  DEVICE void next(const Problem& p) {
    token += token_step, row += row_step;
    if (token >= p.token_tiles) token -= p.token_tiles, row++;
  }

  DEVICE bool last(const Problem& p) const {
    Tile following = *this;
    following.next(p);
    return !following.exists(p);
  }

  DEVICE int m0() const { return token * TOKENS; }
  DEVICE int n0(u32 cta) const { return (row * CLUSTER + (int)(cta % CLUSTER)) * ROWS; }
};

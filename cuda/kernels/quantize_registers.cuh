// The tile of quantize_registers.cu: its sizes, its shared memory, its barriers, and the state that all warps share.
#pragma once
#include "codes.cuh"
#include "quantize.cuh"


// The communication warp is an additional warp, or the last of WARPS: 16 warps can have 128 registers each, 17 can't.
constexpr bool OWN_COMMUNICATION_WARP = TILES == 1;
constexpr int ROWS = 16 * TILES, WORKERS = 32 * WARPS, THREADS = WORKERS + 32 * OWN_COMMUNICATION_WARP;
constexpr int WARPS_PER_SM = RANKS > 32 ? 12 : 16;  // as many as registers allow
constexpr int FITTING = 32 * WARPS_PER_SM / THREADS, CTAS_PER_SM = FITTING > 4 ? 4 : FITTING < 1 ? 1 : FITTING;
constexpr int SLOTS = LOOP ? 2 : 1;
constexpr int SLAB_BYTES = 128 * RANKS * 2, SUM_BYTES = ROWS * RANKS * 4;
constexpr int SUM_SLOTS = LOOP ? (WARPS + 1) / 2 : WARPS;      // slots for warps' sums; in a loop, pairs of warps share a slot
constexpr int OWN_ROWS = (ROWS + CTAS - 1) / CTAS;
constexpr int QUADS = RANKS / 4 + !RANKS;
constexpr int PIECES = RANKS / 8 + !RANKS;  // pieces of 8 ranks in a row of proj_down
constexpr int LANES_ROWS = 32 / PIECES;     // rows that a warp loads at a time, with one lane per piece
constexpr int MAX_BYTES = CTAS * 2 * ROWS * 4, ALL_SUMS = CTAS * OWN_ROWS * RANKS * 4;  // received in a round
static_assert(!LOOP || TILES == 1, "x of two rounds has to fit the registers");

// Shared memory. Without LOOP, the sums reuse proj_down's memory, since no later round needs it.
// The mbarriers: [SLOTS] all CTAs' maxima have arrived; [SLOTS] their sums have arrived; this CTA's warps have stored their maxima; they
// have stored their sums; the communication warp has read these sums.
constexpr int MAX_READY = 0, SUMS_READY = 16, WARP_MAX_READY = 32, WARP_SUMS_READY = 40, WARP_SUMS_READ = 48;
constexpr int ROW_MAX = 128;                                        // [SLOTS][CTAS][2 parts][ROWS] float, received
constexpr int WARP_MAX = ROW_MAX + SLOTS * MAX_BYTES;               // [WARPS][2 parts][ROWS] float
constexpr int SUMS = WARP_MAX + WARPS * 2 * ROWS * 4;               // [SLOTS][CTAS][OWN_ROWS][RANKS] float, received
constexpr int SMOOTH = SUMS + SLOTS * ALL_SUMS;                     // [WARPS][16 runs][4 even, 4 odd] float, 1 / smooth
constexpr int SLABS = SMOOTH + WARPS * 512;                         // [WARPS][128 rows][PIECES]
constexpr int WARP_SUMS = LOOP ? SLABS + WARPS * SLAB_BYTES : SLABS;  // [SUM_SLOTS][ROWS][RANKS] float
constexpr int WARP_SUMS_PITCH = LOOP ? SUM_BYTES : SLAB_BYTES;
static_assert(LOOP || SUM_BYTES <= SLAB_BYTES && RANKS <= 32, "a warp's sums take its slab's memory, once it has read it");
static_assert(!LOOP || 1 + RANKS / 32 * SUM_SLOTS <= 16, "a barrier for each pair of warps and each pass");

// A slab: row k has piece p at p ^ a function of k. ldmatrix reads rows k = 8 L + {0, 1}, L = 0..3, and two rows of 32 ranks share a line.
DEVICE u32 slab_offset(int row, int piece) {
  return (row * PIECES + (piece ^ (PIECES > 4 ? row >> 2 & 6 | row & 1 : row >> 3 & 3))) << 4;
}
// A warp's sums: tile c of 8 ranks is at c ^ (row & 3), so that a fragment's eight rows are in different banks.
DEVICE u32 sum_offset(int row, int tile) { return (row * RANKS + ((tile ^ row & 3) << 3)) << 2; }

// The kernel's arguments, and this CTA's part of them.
struct Work {
  const u16 *x, *smooth, *proj_down;
  char* act;
  float* act_scale;
  u16* lora_act;
  float* lora_act_scale;
  int M, K, R, stride, unsigned_from;
  unsigned char* memory;
  u32 base;      // address of the shared memory
  int rank;      // the CTA's rank in its cluster
  int padded;    // M padded to 16
  int own_rows;  // number of rows of a tile that this CTA finishes: rows rank, rank + CTAS, ..
  u32 own_bytes; // bytes that these rows receive
#if LORA
  const float* lora_strength;
  LoraRanks lora;
  int product_ranks;  // number of columns of the product, the LoRAs' included
#endif

  DEVICE float* floats(int offset) const { return (float*)(memory + offset); }
  DEVICE Barrier barrier(int offset) const { return {base + offset}; }
  DEVICE Barrier max_ready(int slot) const { return {base + MAX_READY + 8 * slot}; }
  DEVICE Barrier sums_ready(int slot) const { return {base + SUMS_READY + 8 * slot}; }

  DEVICE void init_barriers() const {
    for (int slot = 0; slot < SLOTS; slot++) {
      max_ready(slot).init(1);
      sums_ready(slot).init(1);
    }
    barrier(WARP_MAX_READY).init(WARPS * ARRIVALS);
    barrier(WARP_SUMS_READY).init(WARPS * ARRIVALS);
    barrier(WARP_SUMS_READ).init(ARRIVALS);
    fence_mbarrier_init();
    for (int slot = 0; slot < SLOTS; slot++) {
      max_ready(slot).arrive_expect(MAX_BYTES);
      if (RANKS) sums_ready(slot).arrive_expect(own_bytes);
    }
  }
};

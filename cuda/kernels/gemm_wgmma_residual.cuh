// The residual of gemm_wgmma.cu with GATED. A consumer warpgroup adds it to its outputs in the shared memory from which they are stored.
#pragma once
#include "gemm_wgmma.cuh"
#include "residual.cuh"

struct Residual {
  const TensorMap* map;  // (m, n), as y's
  const u16* gate;       // (n)
  int n;

  DEVICE float gate_of(int column) const {
    u16 g = 0;
    if (column < n) asm volatile("ld.global.u16 %0, [%1];" : "=h"(g) : "l"(gate + column));
    return to_float(g);
  }
};

// A warpgroup's part of a tile of the residual. One thread loads its slices, each to the slot in which the same slice of y is packed.
struct ResidualPart {
  const TensorMap* map;
  int column, row;
  u32 slots;         // the warpgroup's slots
  Barriers arrived;  // [SLICES]

  DEVICE void load(int slice) const {
    arrived[slice].arrive_expect(SLICE_BYTES);
    bulk_load_box(slots + slice % SLOTS * SLICE_BYTES, map, column, row + slice * SLICE, arrived[slice].address);
  }

  // Loads as many slices as there are slots, once the previous tile's outputs have left them.
  DEVICE void begin() const {
    bulk_stores_wait_read();
#pragma unroll
    for (int slice = 0; slice < SLOTS; slice++) load(slice);
  }

  // Brings the slices that wait for a slot to L2.
  DEVICE void prefetch() const {
#pragma unroll
    for (int slice = SLOTS; slice < SLICES; slice++) bulk_prefetch_box(map, column, row + slice * SLICE);
  }

  // Loads the next slice that waits for a slot, if `slice` is the one after that slot's.
  DEVICE void load_after(int slice) const {
    if (slice == 0 || slice - 1 + SLOTS >= SLICES) return;
    bulk_stores_wait_read();
    load(slice - 1 + SLOTS);
  }
};

// The communication warp of quantize_registers.cu: a separate warp, or the last worker warp.
#pragma once
#include "quantize_registers.cuh"

// Sends a tile's row maxima over this CTA's warps to all CTAs of the cluster.
DEVICE void send_maxima(const Work& w, int tile, int slot, int lane) {
  const int first_row = tile * ROWS, row_max = ROW_MAX + slot * MAX_BYTES;
  w.barrier(WARP_MAX_READY).wait(slot);
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int index = i * 32 + lane;  // part * ROWS + row
    float m = 0;
#pragma unroll 8
    for (int warp = 0; warp < WARPS; warp++) m = max_abs(m, w.floats(WARP_MAX)[warp * 2 * ROWS + index]);
    if (first_row + index % ROWS >= w.M) m = 0;
#pragma unroll
    for (int cta = 0; cta < CTAS; cta++)
      store_async(cluster_address(w.base + row_max + (w.rank * 2 * ROWS + index) * 4, cta), m,
                  cluster_address(w.base + MAX_READY + 8 * slot, cta));
  }
}

// Sends the sums over this CTA's warps to the CTAs that finish the rows. This is thread `index` of `threads`.
DEVICE void send_sums(const Work& w, int slot, int index, int threads) {
#pragma unroll 1
  for (int i = index; i < ROWS * QUADS; i += threads) {
    const int quad = i % QUADS, row = i / QUADS;
    float4 sum = {};
#pragma unroll
    for (int s = 0; s < SUM_SLOTS; s++) {
      const float4 v = *(const float4*)w.floats(WARP_SUMS + s * WARP_SUMS_PITCH + sum_offset(row, quad / 2) + quad % 2 * 16);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const int offset = SUMS + slot * ALL_SUMS + ((w.rank * OWN_ROWS + row / CTAS) * RANKS + quad * 4) * 4;
    store_async(cluster_address(w.base + offset, row % CTAS), sum, cluster_address(w.base + SUMS_READY + 8 * slot, row % CTAS));
  }
}

// Stores a tile's scales; the first CTA of the cluster does this.
DEVICE void store_scales(const Work& w, int first_row, int row_max, int lane) {
#pragma unroll 1
  for (int row = lane; w.rank == 0 && row < ROWS; row += 32) {
    float m[2] = {}, s[2];
#pragma unroll
    for (int part = 0; part < 2; part++) {
#pragma unroll
      for (int cta = 0; cta < CTAS; cta++) m[part] = max_abs(m[part], w.floats(row_max)[(cta * 2 + part) * ROWS + row]);
      s[part] = part_scale(m[part]);
    }
    if (0 < w.unsigned_from && w.unsigned_from < w.K) tie_parts(s);
    const bool whole = finite(max_abs(m[0], m[1]));
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const bool used = part ? w.unsigned_from < w.K : w.unsigned_from > 0;
      if (first_row + row < w.padded)
        w.act_scale[(size_t)part * w.padded + first_row + row] = used ? (whole ? s[part] : __int_as_float(0x7fffffff)) : 0;
    }
  }
}

// Stores lora_act of the rows that this CTA finishes. A row has PIECES lanes with 8 ranks each.
DEVICE void add_and_store_lora_act(const Work& w, int first_row, int slot, int lane) {
  const int piece = lane % PIECES;
#pragma unroll 1
  for (int own = lane / PIECES; own < (OWN_ROWS + LANES_ROWS - 1) / LANES_ROWS * LANES_ROWS; own += LANES_ROWS) {
    const int row = own * CTAS + w.rank, t = first_row + row;
    float value[8] = {};
    if (row < ROWS)
#pragma unroll 4
      for (int source = 0; source < CTAS; source++) {
        const int offset = SUMS + slot * ALL_SUMS + ((source * OWN_ROWS + own) * RANKS + piece * 8) * 4;
        add_eight(value, w.floats(offset));
      }
    store_lora_act<PIECES>(value, piece, t, row < ROWS && t < w.padded, w.M, w.padded, w.lora_act, w.lora_act_scale);
  }
}

// Stores the scales and lora_act of a tile, once all CTAs' maxima and sums have arrived.
DEVICE void finish(const Work& w, int tile, int slot, int parity, int lane) {
  const int first_row = tile * ROWS, row_max = ROW_MAX + slot * MAX_BYTES;
#if LORA
  copy_lora_act(w.proj_down, w.lora_strength, w.lora, w.product_ranks, w.lora_act, w.lora_act_scale, w.M, w.padded, w.R,
                first_row + w.rank, CTAS, w.own_rows, lane, 32);
#else
  if (!RANKS && w.R > 0)
    copy_lora_act(w.proj_down, nullptr, w.R, w.lora_act, w.lora_act_scale, w.M, w.padded, w.R, first_row + w.rank, CTAS, w.own_rows, lane,
                  32);
#endif
  w.max_ready(slot).wait(parity);
  if (LOOP && lane == 0) w.max_ready(slot).arrive_expect(MAX_BYTES);  // for the round after next
  store_scales(w, first_row, row_max, lane);
  if (RANKS) {
    w.sums_ready(slot).wait(parity);
    if (LOOP && lane == 0) w.sums_ready(slot).arrive_expect(w.own_bytes);
    add_and_store_lora_act(w, first_row, slot, lane);
  }
  __syncwarp();
}

// The loop of a separate communication warp.
DEVICE void communicate(const Work& w, int cluster, int clusters, int tiles, int lane) {
  cluster_wait();
#pragma unroll 1
  for (int tile = cluster, round = 0; tile < tiles; tile = LOOP ? tile + clusters : tiles, round++) {
    send_maxima(w, tile, round & 1, lane);
    if (RANKS) {
      w.barrier(WARP_SUMS_READY).wait(round & 1);
      send_sums(w, round & 1, lane, 32);
      __syncwarp();
      if (LOOP && lane < ARRIVALS) w.barrier(WARP_SUMS_READ).arrive();
    }
    finish(w, tile, round & 1, round >> 1 & 1, lane);
  }
}

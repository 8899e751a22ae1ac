// The producer warpgroup of gemm_wgmma.cu, which copies everything from device memory to shared memory.
#pragma once
#include "gemm_wgmma.cuh"

// The kernel's arguments that the producers read, as in gemm_wgmma.cu.
struct Operands {
  const char* act;
  const float* act_scale;
  const char* lora_act;
  const float* outer_scale;
  const char* weight;
  const u16* weight_scale;
  const float* row_scale;
  const char* proj_up;
  const u16* bias;
  int padded_m, n, k, rank, border, part;
#if LORA
  const u16* lora_up;
#endif
};

// A producer thread's part of W's blocks: 16 bytes of every 32nd row, at the same column of each block.
struct Rows {
  const char* source;
  u32 step;   // bytes from one of the thread's rows to the next
  int count;  // the thread's rows that exist
  int bytes;  // bytes of a row from the thread's column of the first block on
  u32 offset; // offset of the first row's bytes in the block

  DEVICE Rows(const void* matrix, int row_bytes, int n0, int n, bool swizzled) {
    const int thread = threadIdx.x & 127, row = n0 + (thread >> 2), column = (thread & 3) * 16;
    offset = thread * 16 ^ (swizzled ? (thread >> 3 & 3) * 16 : 0);
    source = (const char*)matrix + (size_t)row * row_bytes + column;
    step = 32 * row_bytes;
    count = (n - row + 31) / 32;
    bytes = row_bytes - column;
  }

  DEVICE void skip(int blocks) {
    source += blocks * 64;
    bytes -= blocks * 64;
  }

  // Copies the next block. Bytes outside the matrix become zeros.
  DEVICE void fetch(u32 target) {
#pragma unroll
    for (int i = 0; i < ROWS / 32; i++)
      cp_async16(target + i * 2048 + offset, source + i * step, i < count && bytes > 0);
    source += 64;
    bytes -= 64;
  }
};

// Producer threads 0 .. 47 copy the two groups' scales, 8 rows each.
DEVICE void fetch_scales(u32 target, const u16* scales, int block, int n0, int n, int groups) {
  const int thread = threadIdx.x & 127, second = thread >= ROWS / 8, piece = thread - second * (ROWS / 8), group = 2 * block + second;
  if (thread < ROWS / 4)
    cp_async16(target + thread * 16, scales + (size_t)group * n + n0 + piece * 8, group < groups && n0 + piece * 8 < n);
}

// Copies the factors of a tile's tokens and rows. Missing ones become zero.
DEVICE void fetch_factors(u32 target, const float* act_scale, int last, bool two, const float* outer_scale, const float* row_scale,
                          const u16* bias, int m0, int padded_m, int n0, int n) {
  const int thread = threadIdx.x & 127, token = m0 + thread * 4;
  if (thread < OUT / 4) {
    const bool valid = token < padded_m;
    cp_async16(target + LAST + thread * 16, act_scale + last + token, valid);
    if (two) cp_async16(target + FIRST + thread * 16, act_scale + token, valid);
    if (HALF) cp_async16(target + OUTER + thread * 16, outer_scale + token, valid && outer_scale);
  }
  if (thread < ROWS / 4) cp_async16(target + ROW_SCALE + thread * 16, row_scale + n0 + thread * 4, n0 + thread * 4 < n);
  if (thread < ROWS / 8) cp_async16(target + BIAS + thread * 16, bias + n0 + thread * 8, bias && n0 + thread * 8 < n);
}

// Copies `rows` tokens, at most `most`, of a block in the activation layout, one contiguous piece of memory.
DEVICE void fetch_tokens(u32 target, const char* source, size_t row_bytes, int rows, int most, Barrier full, u32 cta) {
  full.arrive_expect(rows * row_bytes);
#if CLUSTER == 1
  if (rows > 0) bulk_copy(target, source, rows * row_bytes, full.address);
#else
  int first = cta % CLUSTER * (most / 2), count = min(rows - first, most / 2);
  u16 ctas = 3 << (cta / CLUSTER * CLUSTER);
  if (count > 0) bulk_copy_multicast(target + first * row_bytes, source + first * row_bytes, count * row_bytes, full.address, ctas);
#endif
}

// Copies the weights of the first stages before the previous kernel, which makes the tokens, has ended. Returns the number of blocks.
DEVICE int fetch_early_weights(const Operands& from, u32 shared, const Problem& p, int n0) {
  int early = 0;
  Rows rows(from.weight, from.k / 2, n0, from.n, false);
  rows.skip(p.begin);
#pragma unroll 1
  for (; early < min(STAGES, p.end - p.begin); early++) {
    rows.fetch(shared + early * STAGE_BYTES + X_BYTES);
    fetch_scales(shared + SCALES + early * S_BYTES, from.weight_scale, p.begin + early, n0, from.n, from.k / 64);
  }
  return early;
}

// Copies a tile's blocks of K; the first `early` blocks have their weights already. Returns that number for the next tile.
DEVICE int fetch_columns(const Operands& from, u32 shared, const SharedBarriers& barriers, RingPosition& position, const Problem& p, int m0,
                          int n0, int early, u32 cta) {
  Rows rows(from.weight, from.k / 2, n0, from.n, false);
  rows.skip(p.begin + early);
#pragma unroll 1
  for (int block = p.begin; block < p.end; block++, position.next()) {
    const u32 x = shared + position.stage * STAGE_BYTES;
    const Barrier full = barriers.full[position.stage];
    barriers.empty[position.stage].wait(position.parity ^ 1);
    if (threadIdx.x == CONSUMERS * 128)
      fetch_tokens(x, from.act + ((size_t)block * from.padded_m + m0) * 128, 128, min(TOKENS, from.padded_m - m0), TOKENS, full, cta);
    if (early) {
      early--;
    } else {
      rows.fetch(x + X_BYTES);
      fetch_scales(shared + SCALES + position.stage * S_BYTES, from.weight_scale, block, n0, from.n, from.k / 64);
    }
    mbarrier_arrive_after_copies(full.address);
  }
  return early;
}

// Copies `blocks` blocks of ranks: `rows` of proj_up or lora_up, and of lora_act from block `first` on, at most `most` tokens from m0 on.
DEVICE void fetch_rank_blocks(const Operands& from, u32 shared, const SharedBarriers& barriers, RingPosition& position, Rows rows,
                              int first, int blocks, int m0, int most, u32 cta) {
#pragma unroll 1
  for (int block = first; block < first + blocks; block++, position.next()) {
    const u32 x = shared + position.stage * STAGE_BYTES;
    const Barrier full = barriers.full[position.stage];
    barriers.empty[position.stage].wait(position.parity ^ 1);
    if (threadIdx.x == CONSUMERS * 128)
      fetch_tokens(x, from.lora_act + ((size_t)block * from.padded_m + m0) * 64, 64, max(min(most, from.padded_m - m0), 0), most, full,
                   cta);
    rows.fetch(x + X_BYTES);
    mbarrier_arrive_after_copies(full.address);
  }
}

// Copies the branch's blocks of ranks: once for a tile's OUT tokens, or for each slice again.
DEVICE void fetch_ranks(const Operands& from, u32 shared, const SharedBarriers& barriers, RingPosition& position, const Problem& p,
                        int out_m0, int n0, u32 cta) {
#if LORA
  const LoraPart part = p.lora.part_of_row(n0);
  const u16* const up = from.lora_up + (size_t)part.first_rank * p.lora.part_rows;
  const int most = resident(p.own_rank_blocks + part.blocks()) ? OUT : SLICE;
#pragma unroll 1
  for (int m0 = out_m0; m0 < out_m0 + OUT; m0 += most) {
    fetch_rank_blocks(from, shared, barriers, position, Rows(from.proj_up, from.rank * 2, n0, from.n, true), 0, p.own_rank_blocks, m0, most,
                      cta);
    fetch_rank_blocks(from, shared, barriers, position, Rows(up, part.rank * 2, n0 - part.first_row, from.n - part.first_row, true),
                      p.own_rank_blocks + part.first_block, part.blocks(), m0, most, cta);
  }
#else
  fetch_rank_blocks(from, shared, barriers, position, Rows(from.proj_up, from.rank * 2, n0, from.n, true), 0, p.own_rank_blocks, out_m0, OUT,
                    cta);
#endif
}

DEVICE void produce(const Operands& from, u32 shared, const SharedBarriers& barriers, RingPosition& position, const Problem& p, u32 cta) {
  give_registers<PRODUCER_REGISTERS>();
  const u32 half = cta / CLUSTER;
  Tile tile(p);
  int early = fetch_early_weights(from, shared, p, tile.n0(cta));
  cluster_wait();
  wait_for_previous_grid();
  int buffer = 0;
  u32 buffer_parity = 1;
  for (; tile.exists(p); tile.next(p)) {
    const int m0 = tile.m0(), n0 = tile.n0(cta);
    const int out_m0 = m0 + half * OUT;
    barriers.used[buffer].wait(buffer_parity);
    fetch_factors(shared + FACTORS + buffer * FACTOR_BYTES, from.act_scale, from.part * from.padded_m, from.border != 0, from.outer_scale,
                  from.row_scale, from.bias, out_m0, from.padded_m, n0, from.n);
    buffer_parity ^= buffer;
    buffer ^= 1;
    early = fetch_columns(from, shared, barriers, position, p, m0, n0, early, cta);
    fetch_ranks(from, shared, barriers, position, p, out_m0, n0, cta);
  }
  cluster_arrive();
}

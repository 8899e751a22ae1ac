// The copies of gemm_mma.cu's operands from global to shared memory: the bytes that a thread copies, and the ring of stages that it fills.
#pragma once
#include "gemm_mma.cuh"

// LORA: the steps over the LoRAs' ranks, of the part that has the CTA's weight rows. It lies in shared memory, since the main loop has no
// registers for it.
struct LoraSteps {
  int rank;
  u32 first;    // offset in lora_up of the weight row 0, if that were the part's
  int skipped;  // blocks of lora_act of the parts before
  int count;    // the number of all steps

  DEVICE static void write(u8* memory, const LoraRanks& ranks, int n0, const Steps& steps) {
    const LoraPart part = ranks.part_of_row(n0);
    const u32 first = (part.first_rank * ranks.part_rows - part.first_row * part.rank) * 2;
    *(uint4*)(memory + LORA_PART) = make_uint4(part.rank, first, part.first_block, steps.count + part.blocks());
  }

  DEVICE static LoraSteps load(u32 shared) {
    const uint4 v = load_shared16(shared + LORA_PART);
    return {(int)v.x, v.y, (int)v.z, (int)v.w};
  }
};

// The bytes that this thread copies in a step: 16-byte pieces of X and W, in some threads a piece of WS and two tokens' scales. To save
// registers, all sources are 32-bit byte offsets from a kernel argument.
struct Fetcher {
  const u8* act;
  const float* act_scale;
  const u8* lora_act;
  const u8* weight;
  const u16* weight_scale;
  const u8* proj_up;
  const u8* lora_up;
  u32 shared;
  int n, k, rank, padded_m, m0, n0;
  Steps steps;
  int w_piece, w_row;               // piece and row of this thread's first piece of W
  u32 w_target;                     // the offset of that piece in a stage
  u32 weight_source[W_PIECES];
  u32 ws_source;
  u32 xs_source, xs_target;
  int x_rows;                       // tokens of the tile that exist

  DEVICE Fetcher(const u8* act, const float* act_scale, const u8* lora_act, const u8* weight, const u16* weight_scale, const u8* proj_up,
                 const u8* lora_up, u32 shared, int n, int k, int rank, int padded_m, Tile tile, Steps steps)
      : act(act), act_scale(act_scale), lora_act(lora_act), weight(weight), weight_scale(weight_scale), proj_up(proj_up), lora_up(lora_up),
        shared(shared), n(n), k(k), rank(rank), padded_m(padded_m), m0(tile.m0), n0(tile.n0), steps(steps) {
    const int thread = threadIdx.x;
    const int w_piece = thread % 4, w_row = (thread / 4 & 1) * 8 + (thread / 8 & 7) + thread / 64 * 16;
    const u32 w_target = W + w_row / 64 * 4096 + w_row % 8 * 512 + w_piece * 128 + ((w_row / 8 % 8 ^ swizzle(w_piece)) << 4);
    this->w_piece = w_piece, this->w_row = w_row, this->w_target = w_target;
#pragma unroll
    for (int i = 0; i < W_PIECES; i++) weight_source[i] = w_source(i, k / 2);
    ws_source = (thread / (ROWS / 8) * n + min(n0 + thread % (ROWS / 8) * 8, n - 8)) * 2;
    if constexpr (CODES != INT8) {
      const int xs_group = thread / (TOKENS / 2), xs_pair = thread % (TOKENS / 2);
      xs_source = (xs_group * padded_m + min(m0 + 2 * xs_pair, padded_m - 2)) * 4;
      // Lane q's tokens of two neighbouring tiles are side by side, so that one 16-byte load reads them.
      xs_target = XS + xs_group * TOKENS * 4 + (xs_pair / 8 * 4 + xs_pair % 4) * 16 + xs_pair / 4 % 2 * 8;
    }
    x_rows = min(padded_m - m0, TOKENS);
  }

  // The number of all steps.
  DEVICE int count() const { return LORA ? (int)load_shared4(shared + LORA_PART + 12) : steps.count; }

  // The source offset of this thread's i-th piece of W, in a matrix with rows of `pitch` bytes.
  DEVICE u32 w_source(int i, int pitch) const {
    const int row = n0 + w_row + i * (THREADS / 4), column = w_piece * 16;
    return (u32)(min(row, n - 1) * pitch + column);
  }

  // The offset of that piece in a stage. 64 rows further is the next warp's part; 32 rows further is the same part with other slots.
  DEVICE u32 w_offset(int i) const { return THREADS == 256 ? w_target + i * 4096 : w_target ^ i * 64; }

  // Calls copy(piece, bytes, target, source, valid) for every piece that the thread copies in a step to the stage at `stage`.
  template <class Copy> DEVICE void for_each_piece(int step, const int columns, u32 stage, Copy copy) const {
    const int thread = threadIdx.x;
    const bool branch = step >= columns;
    const int block = step - (branch ? columns : CODES != INT8 || step < steps.border_step ? 0 : steps.twice);
    const u32 x_target = stage + thread * 16;
    const int rank_pitch = rank * 2, ws_pitch = n * 4;
    auto copy_scales = [&](bool both, int block_tokens) {  // for both groups, or only for the first
      if (thread < (both ? ROWS / 4 : ROWS / 8))
        copy(W_PIECES + X_PIECES, 16, x_target + WS, (const u8*)weight_scale + (u32)(ws_source + block * ws_pitch), true);
      if constexpr (CODES != INT8) {
        if (thread < (both ? TOKENS : TOKENS / 2))
          copy(W_PIECES + X_PIECES + 1, 8, stage + xs_target, (const u8*)act_scale + (u32)(xs_source + block_tokens * 8), true);
      }
    };
    if (!branch && x_rows == TOKENS && 2 * block + 1 < steps.groups) {  // a full tile and both groups: no piece needs a check
#pragma unroll
      for (int i = 0; i < W_PIECES; i++) copy(i, 16, stage + w_offset(i), weight + (u32)(weight_source[i] + block * W_ROW), true);
      const int block_tokens = block * padded_m;
      const u8* const x = act + (u32)((block_tokens + m0) * X_ROW + thread * 16);
#pragma unroll
      for (int i = 0; i < X_PIECES; i++) copy(W_PIECES + i, 16, x_target + X + i * THREADS * 16, x + i * THREADS * 16, true);
      copy_scales(true, block_tokens);
    } else {
      const int width = branch ? RANK_ROW : X_ROW;
      int pitch = branch ? rank_pitch : k / 2, row_block = block, token_block = block;
      u32 first = 0;  // the offset of the matrix's row 0
      const u8* rows = branch ? proj_up : weight;
#if LORA
      if (step >= steps.count) {
        const LoraSteps lora = LoraSteps::load(shared);
        rows = lora_up, pitch = lora.rank * 2, first = lora.first, row_block = step - steps.count, token_block += lora.skipped;
      }
#endif
#pragma unroll
      for (int i = 0; i < W_PIECES; i++)
        copy(i, 16, stage + w_offset(i), rows + (u32)(first + w_source(i, pitch) + row_block * 64),
             row_block * 64 + w_piece * 16 < pitch);
      const int block_tokens = token_block * padded_m;
      const u8* const x = (branch ? lora_act : act) + (u32)((block_tokens + m0) * width + thread * 16);
#pragma unroll
      for (int i = 0; i < X_PIECES; i++)
        if (thread * 16 < x_rows * width - i * THREADS * 16)
          copy(W_PIECES + i, 16, x_target + X + i * THREADS * 16, x + i * THREADS * 16, true);
      if (!branch) copy_scales(2 * block + 1 < steps.groups, block_tokens);
    }
  }
};

// The ring of stages. A step waits for its stage, computes on it, and advances to the next one:
//
//     start();  for each step { wait_for_stage(step);  compute on `stage`;  advance(step); }
struct Ring {
  const Fetcher& fetcher;
  const u32 shared;  // address of the first stage
  u32 stage;         // offset of this step's stage

  DEVICE Ring(const Fetcher& fetcher, u32 shared) : fetcher(fetcher), shared(shared), stage(shared) {}

  DEVICE u32 next_stage() const { return stage == shared + (STAGES - 1) * STAGE ? shared : stage + STAGE; }
  DEVICE u32 previous_stage() const { return stage == shared ? shared + (STAGES - 1) * STAGE : stage - STAGE; }

#if TURING  // Turing has no asynchronous copies: loads come before the step's arithmetic, stores to shared memory after it.
  static_assert(STAGES == 2, "the stage at work and the next one");
  uint4 held[W_PIECES + X_PIECES + 2];

  DEVICE void fetch(int step) {
    if (step < fetcher.count())
      fetcher.for_each_piece(step, fetcher.steps.columns, 0, [&](int i, int bytes, u32, const void* source, bool valid) {
        held[i] = make_uint4(0, 0, 0, 0);
        if (!valid) return;
        if (bytes == 16) held[i] = *(const uint4*)source;
        else held[i].x = ((const u32*)source)[0], held[i].y = ((const u32*)source)[1];
      });
  }

  DEVICE void store_fetched(int step, u32 target_stage) {
    if (step < fetcher.count())
      fetcher.for_each_piece(step, fetcher.steps.columns, target_stage, [&](int i, int bytes, u32 target, const void*, bool) {
        if (bytes == 16) store_shared16(target, held[i]);
        else store_shared8(target, make_uint2(held[i].x, held[i].y));
      });
  }

  DEVICE void start() {
    fetch(0);
    store_fetched(0, stage);
  }

  DEVICE void wait_for_stage(int step) {
    __syncthreads();
    fetch(step + 1);
  }

  DEVICE void advance(int step) {
    store_fetched(step + 1, next_stage());
    stage = next_stage();
  }
#else
  DEVICE void fetch(int step, u32 target_stage) {
    if (step < fetcher.count())
      fetcher.for_each_piece(step, fetcher.steps.columns, target_stage, [&](int, int bytes, u32 target, const void* source, bool valid) {
        if (bytes == 16) cp_async16(target, source, valid);
        else cp_async8(target, source);
      });
    cp_async_commit();
  }

  DEVICE void start() {
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) fetch(step, stage + step * STAGE);
  }

  // One barrier per step. After it, this step's data are visible to all threads, and no thread reads the previous step's stage, which is
  // filled next.
  DEVICE void wait_for_stage(int step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    fetch(step + STAGES - 1, previous_stage());
  }

  DEVICE void advance(int) { stage = next_stage(); }
#endif
};

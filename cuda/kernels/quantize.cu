// Kernel 1 of a linear: quantizes the activation and computes the LoRA branch's x @ proj_down, in one pass over x.
//
//     x (M, K) 16 bit  ->  act             codes of (x + shift) / smooth / scale, in the activation layout
//                          act_scale       float32
//                          lora_act        x @ proj_down / lora_act_scale, in x's dtype and the activation layout
//                          lora_act_scale  (Mp) float32
//
// A CTA takes ROWS tokens; a cluster of CTAS of them shares the columns of the same tokens:
//
//              K: blocks of 128 columns
//            +-----------+-----------+-----------+-----------+
//     ROWS   |   CTA 0   |   CTA 1   |   CTA 2   |   CTA 3   |    partial x @ proj_down and row maxima are combined
//     tokens |           |           |           |           |    in the cluster's shared memory, CTA by CTA: no atomics
//            +-----------+-----------+-----------+-----------+
//
// An int8 code needs the largest value of its whole row. Shared memory keeps x until that value is known, so that device memory is
// read once. If a CTA's part is larger than its shared memory, the middle of the part is read again, from L2. 4-bit codes have a
// scale for each group of 64 columns, and are written in the same pass.
#include "quantize_tile.cuh"

// --- From global to shared memory -------------------------------------------------------------------------------------

// Copies a block of x by cp.async.
DEVICE void fetch_x(const Work& w, int block) {
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = (thread + i * THREADS) / 16, piece = thread % 16, column = (w.first + block) * 128 + piece * 8;
    const bool valid = w.first_row + row < w.M && column < w.K;
    const u16* source = w.x + (valid ? (size_t)(w.first_row + row) * w.stride + column : 0);
    cp_async16(w.x_block(block) + x_offset(row, piece), source, valid);
  }
}

// proj_down and smooth pass through registers, two blocks ahead. They come from L2, whose latency under load exceeds the time of one block.
struct Prefetched {
  uint4 slab[SLAB_PIECES > 0 ? SLAB_PIECES : 1];
  u32 smooth;
};

DEVICE void prefetch(Prefetched& to, const Work& w, int block) {
  const int thread = threadIdx.x, column = (w.first + block) * 128;
  if (thread < 128) to.smooth = block < w.count && column + thread < w.K ? w.smooth[column + thread] : 0;
#pragma unroll
  for (int i = 0; i < SLAB_PIECES; i++) {
    const int index = thread + i * THREADS, k = column + index / SLAB_ROW, piece = index % SLAB_ROW;
    to.slab[i] = make_uint4(0, 0, 0, 0);
    if (block < w.count && k < w.K && piece * 8 < w.R) to.slab[i] = *(const uint4*)(w.proj_down + (size_t)k * w.R + piece * 8);
  }
}

// Stores 1 / smooth of a block. A column beyond K gets 0, and so codes of 0.
DEVICE void store_smooth(u32 bits, const Work& w, int block) {
  const int thread = threadIdx.x;
  const float s = low_float(bits), r = (w.first + block) * 128 + thread < w.K ? reciprocal(s) : 0;
  const u32 address = w.smooth_block(block) + (thread / 8 * 8 + thread % 2 * 4 + thread / 2 % 4) * 4;
  if (thread < 128) store_shared_float(address, r);
}

DEVICE void store_prefetched(const Prefetched& from, const Work& w, int block) {
  const int thread = threadIdx.x;
  store_smooth(from.smooth, w, block);
#pragma unroll
  for (int i = 0; i < SLAB_PIECES; i++) {
    const int index = thread + i * THREADS;
    store_shared16(w.at.slab + slab_offset(index / SLAB_ROW, index % SLAB_ROW), from.slab[i]);
  }
}

// --- Codes ------------------------------------------------------------------------------------------------------------

// Encodes `block`, from x in shared memory. Blocks first_again .. end_again read x again from global memory.
DEVICE void encode(const Work& w, const Lane& me, int block, int first_again, int end_again, const float (&inverse)[2], u32 keep) {
  const bool again = block >= first_again && block < end_again;
  const int row_lane = me.row_lane, row = me.row, token = me.token;
  const int column = (w.first + block) * 128;
  uint4 runs[RUNS];
  float shifts[RUNS], inverses[RUNS];
  bool is_unsigned = false;
  const bool real = token < w.M;
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int run = run_of(row_lane, i), start = column + run * 8;
    const u32 address = w.x_block(block) + x_offset(row, run);
    if (!again) runs[i] = load_shared16(address);
    else if (real && start < w.K) runs[i] = *(const uint4*)(w.x + (size_t)token * w.stride + start);
    else runs[i] = make_uint4(0, 0, 0, 0);
    is_unsigned = start >= w.unsigned_from;
    shifts[i] = is_unsigned ? SHIFT : 0;
    inverses[i] = is_unsigned ? inverse[1] : inverse[0];
  }
  const int group = (column >> 6) + (row_lane >> 2);
  const bool scaled = CODES != INT8 && (me.lane & 3) == 0 && token < w.padded && group * 64 < w.K;
  encode_row(runs, w.smooth_block(block), row_lane, token, real, shifts, inverses, keep, is_unsigned,
             scaled ? w.act_scale + (size_t)group * w.padded + token : nullptr,
             token < w.padded ? w.act + ((size_t)(w.first + block) * w.padded + token) * (CODES == INT4_NIBBLES ? 64 : 128) : nullptr);
}

// --- The pass over x: maxima, and the product with proj_down ----------------------------------------------------------

typedef float Sums[MULTI][RANKS > 0 ? WARP_RANK_TILES : 1][4];
typedef float Maxima[2][2];  // [part][rows g, g + 8] of one tile and one span of each block

// The maxima of a lane's runs a (row g) and b (row g + 8) of a span.
DEVICE void update_maxima(Maxima& row_max, uint4 a, uint4 b, const Work& w, int block, int span, int L) {
  const u32 run = w.smooth_block(block) + (4 * span + L) * 32;
  float even[4], odd[4];
  load_shared_floats(even, run), load_shared_floats(odd, run + 16);
  const bool part = (w.first + block) * 128 + span * 32 >= w.unsigned_from;
  const float shift = part ? SHIFT : 0;
  const float of_a = max_of_run(a, even, odd, shift), of_b = max_of_run(b, even, odd, shift);
  row_max[0][0] = max_abs(row_max[0][0], part ? 0 : of_a), row_max[0][1] = max_abs(row_max[0][1], part ? 0 : of_b);
  row_max[1][0] = max_abs(row_max[1][0], part ? of_a : 0), row_max[1][1] = max_abs(row_max[1][1], part ? of_b : 0);
}

// sums += x @ proj_down over a span of columns.
DEVICE void multiply_span(Sums& sums, const uint4 (&a)[MULTI], const uint4 (&b)[MULTI], const Work& w, int span, const Lane& me) {
#pragma unroll
  for (int step = 0; step < 2; step++) {
    // Matrix i of ldmatrix: rows (k) 4 step + 2 (i & 1) + {0, 1} of each run, ranks of tile t + (i >> 1).
    const int k = 32 * span + 8 * (me.lane % 8 / 2) + 4 * step + 2 * (me.lane / 8 & 1) + me.lane % 2;
#pragma unroll
    for (int t = 0; t < WARP_RANK_TILES; t += 2) {
      u32 p[4];
      ldmatrix4_transposed(p, w.at.slab + slab_offset(k, me.rank_part * WARP_RANK_TILES + t + me.lane / 16));
#pragma unroll
      for (int m = 0; m < MULTI; m++) {
        const u32 fragment[4] = {step ? a[m].z : a[m].x, step ? b[m].z : b[m].x, step ? a[m].w : a[m].y, step ? b[m].w : b[m].y};
        mma_16816(sums[m][t], fragment, {p[0], p[1]});
        mma_16816(sums[m][t + 1], fragment, {p[2], p[3]});
      }
    }
  }
}

DEVICE void process_block(Prefetched& arrived, Sums& sums, Maxima& row_max, const Work& w, int block, const Lane& me) {
  store_prefetched(arrived, w, block);
  prefetch(arrived, w, block + 2);
  cp_async_wait<DEPTH - 1>();
  __syncthreads();
  const u32 block_x = w.x_block(block);
  if (RANKS > 0 || CODES == INT8)
#pragma unroll
    for (int s = 0; s < WARP_SPANS; s++) {
      const int span = me.column_part * WARP_SPANS + s;
      uint4 a[MULTI], b[MULTI];
#pragma unroll
      for (int m = 0; m < MULTI; m++) {
        const int row = (me.first_tile + m) * 16 + me.g;
        a[m] = load_shared16(block_x + x_offset(row, 4 * span + me.L));
        b[m] = load_shared16(block_x + x_offset(row + 8, 4 * span + me.L));
        if (CODES == INT8 && s * MULTI + m == me.rank_part) update_maxima(row_max, a[m], b[m], w, block, span, me.L);
      }
      multiply_span(sums, a, b, w, span, me);
    }
  if (CODES != INT8) encode(w, me, block, 0, 0, {0, 0}, 0);
  __syncthreads();
  if (block + DEPTH < w.count) fetch_x(w, block + DEPTH);
  cp_async_commit();
}

// --- The CTA's sums and maxima in shared memory -----------------------------------------------------------------------

DEVICE void store_maxima(const Maxima& row_max, const Work& w, const Lane& me) {
#pragma unroll
  for (int part = 0; part < 2; part++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float m = row_max[part][half];
      m = max_abs(m, __shfl_xor_sync(~0u, m, 1));
      m = max_abs(m, __shfl_xor_sync(~0u, m, 2));
      const u32 address = w.at.warp_max + ((part * SPANS + me.max_span) * ROWS + me.max_row + 8 * half) * 4;
      if (me.L == 0) store_shared_float(address, m);
    }
}

// The warps that share ranks add their sums one after the other.
DEVICE void add_sums(const Sums& sums, unsigned char* memory, const Work& w, const Lane& me) {
#pragma unroll
  for (int part = 0; part < (RANKS ? COLUMN_SPLIT : 0); part++) {
    if (me.column_part == part)
#pragma unroll
      for (int i = 0; i < 2 * MULTI * WARP_RANK_TILES; i++) {
        const int half = i % 2, m = i / 2 % MULTI, t = i / 2 / MULTI;
        const u32 offset = sum_offset((me.first_tile + m) * 16 + 8 * half + me.g, me.rank_part * WARP_RANK_TILES + t) + 8 * me.L;
        float2* sum = (float2*)(memory + (w.at.slab - w.at.x) + offset);
        const float2 before = part ? *sum : make_float2(0, 0);
        *sum = make_float2(before.x + sums[m][t][2 * half], before.y + sums[m][t][2 * half + 1]);
      }
    __syncthreads();
  }
}

DEVICE void merge_maxima(unsigned char* memory, const Work& w) {
  const int thread = threadIdx.x;
  if (thread >= 2 * ROWS) return;
  const int part = thread / ROWS, row = thread % ROWS;
  float m = 0;
#pragma unroll
  for (int s = 0; s < SPANS; s++)
    m = max_abs(m, *(const float*)(memory + (w.at.warp_max - w.at.x) + ((part * SPANS + s) * ROWS + row) * 4));
  *(float*)(memory + (w.at.row_max - w.at.x) + thread * 4) = w.first_row + row < w.M ? m : 0;
}

// --- The cluster's sums and scales ------------------------------------------------------------------------------------

// Computes a row's scales from the maxima of all CTAs. One CTA stores them.
DEVICE void finish_scales(unsigned char* memory, const Work& w) {
  const int thread = threadIdx.x;
  float m[2], s[2];
#pragma unroll
  for (int part = 0; part < 2; part++) {
    m[part] = 0;
#pragma unroll
    for (int cta = 0; cta < CTAS; cta++)
      m[part] = max_abs(m[part], load_float_there(address_in(cta, w.at.row_max + (part * ROWS + thread) * 4)));
    s[part] = part_scale(m[part]);
  }
  if (0 < w.unsigned_from && w.unsigned_from < w.K) tie_parts(s);
  const bool whole = finite(max_abs(m[0], m[1]));
#pragma unroll
  for (int part = 0; part < 2; part++) {
    const bool used = part ? w.unsigned_from < w.K : w.unsigned_from > 0;
    const float nan = __int_as_float(0x7fffffff);
    *(float*)(memory + (w.at.row_inverse - w.at.x) + (thread * 2 + part) * 4) = whole ? inverse_scale(s[part]) : nan;
    if (w.rank == 0 && w.first_row + thread < w.padded)
      w.act_scale[(size_t)part * w.padded + w.first_row + thread] = used ? (whole ? s[part] : nan) : 0;
  }
}

// Finishes every CTAS-th row. A row has four lanes, each with a piece of 8 of every 32 ranks. index: the lane's index among all of them.
DEVICE void finish_lora_act(u16* lora_act, float* lora_act_scale, const Work& w, int index, int L) {
  const int row = index / 4 * CTAS + w.rank;
  float value[RANKS / 32 + 1][8] = {};
  float peak = 0;
  if (row < ROWS)
#pragma unroll
    for (int part = 0; part < RANKS / 32; part++) {
#pragma unroll
      for (int cta = 0; cta < CTAS; cta++) {
        const u32 there = address_in(cta, w.at.slab + sum_offset(row, 4 * part + L));
        add_eight(value[part], load_float4_there(there), load_float4_there(there + 16));
      }
#pragma unroll
      for (int i = 0; i < 8; i++) peak = max_abs(peak, value[part][i]);
    }
  float scale = 1, inverse = 1;
#if HALF
  peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 1));
  peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 2));
  find_scale(peak, scale, inverse);
#endif
  const int t = w.first_row + row;
  if (row < ROWS && t < w.padded) {
#pragma unroll
    for (int part = 0; part < RANKS / 32; part++) {
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] = from_float2(value[part][2 * i] * inverse, value[part][2 * i + 1] * inverse);
      *(uint4*)(lora_act + ((size_t)part * w.padded + t) * 32 + (L ^ t >> 1 & 3) * 8) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (L == 0) lora_act_scale[t] = t < w.M ? scale : 0;
  }
}

// int8: encodes all blocks, once the rows' scales are known.
DEVICE void encode_all(const unsigned char* memory, const Work& w, const Lane& me) {
  const int thread = threadIdx.x;
  const float2 pair = *(const float2*)(memory + (w.at.row_inverse - w.at.x) + me.row * 8);
  const float inverse[2] = {pair.x, pair.y};
  const u32 keep = pair.x == pair.x ? ~0u : 0;
#pragma unroll 1
  for (int block = 0; block < w.count; block++) {
    if (w.kept == 1 && w.count > 1) {
      __syncthreads();
      const int column = (w.first + block) * 128 + thread;
      store_smooth(thread < 128 && column < w.K ? w.smooth[column] : 0, w, block);
      __syncthreads();
    }
    encode(w, me, block, w.slots - DEPTH, w.count - DEPTH, inverse, keep);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) CLUSTER quantize(
    const u16* x,           // (M, K), rows `stride` apart, 16-byte aligned
    const u16* smooth,      // (K)
    const u16* proj_down,   // (K, R); RANKS 0: x @ proj_down, (M, R), followed in each row by the LoRAs' ranks
    char* act,              // (K blocks, Mp, 128), nibbles (K blocks, Mp, 64)
    float* act_scale,       // int8: (2 parts, Mp); else (K / 64, Mp)
    u16* lora_act,          // (blocks of 32 ranks, Mp, 32)
    float* lora_act_scale,  // (Mp)
#if LORA
    const float* lora_strength,  // (LoRAs' ranks), 16-byte aligned
#endif
    int M, int K, int R, int stride,
    int unsigned_from,      // from this column on, x is shifted, and 4-bit codes are 0..15
#if LORA
    u64 lora_eighths, int lora_parts, int product_ranks,  // LoraRanks; ranks of the product in all
#endif
    int slots,              // blocks of x that fit in shared memory; at least DEPTH, or all that a CTA has
    int kept) {             // blocks of 1 / smooth that fit: all that a CTA has, or 1
  extern __shared__ __align__(128) unsigned char memory[];
  const SharedPlan at(shared_address(memory), slots, kept);
  wait_for_previous_grid();
  let_next_grid_start();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int rank = blockIdx.x % CTAS, first_row = blockIdx.x / CTAS * ROWS, padded = (M + 15) & ~15;
  const int blocks = (K + 127) / 128, first = blocks * rank / CTAS, count = blocks * (rank + 1) / CTAS - first;
  const Work w{x, smooth, proj_down, act, act_scale, M, K, R, stride, unsigned_from, slots, kept, at, padded, rank, first_row, first,
               count};
  const Lane me(warp, lane, first_row);

  Prefetched ahead[2];
  prefetch(ahead[0], w, 0);
  prefetch(ahead[1], w, 1);
#pragma unroll
  for (int block = 0; block < DEPTH; block++) {
    if (block < count) fetch_x(w, block);
    cp_async_commit();
  }
#if LORA
  copy_lora_act(proj_down, lora_strength, {lora_eighths, lora_parts, 0}, product_ranks, lora_act, lora_act_scale, M, padded, R,
                first_row + rank, CTAS, ROWS / CTAS, thread, THREADS);
#else
  if (RANKS == 0 && R > 0)
    copy_lora_act(proj_down, nullptr, R, lora_act, lora_act_scale, M, padded, R, first_row + rank, CTAS, ROWS / CTAS, thread, THREADS);
#endif
  Sums sums = {};
  Maxima row_max = {};
#pragma unroll 1
  for (int block = 0; block < count; block += 2) {
    process_block(ahead[0], sums, row_max, w, block, me);
    if (block + 1 < count) process_block(ahead[1], sums, row_max, w, block + 1, me);
  }

  if (CODES == INT8) store_maxima(row_max, w, me);
  add_sums(sums, memory, w, me);
  if (CODES == INT8) {
    if (!RANKS) __syncthreads();
    merge_maxima(memory, w);
  }
  if (CODES != INT8 && !RANKS) return;

  if constexpr (CTAS > 1) cluster_arrive(), cluster_wait();
  else __syncthreads();
  if (CODES == INT8 && thread < ROWS) finish_scales(memory, w);
  if (RANKS && thread >= THREADS - LORA_THREADS)
    finish_lora_act(lora_act, lora_act_scale, w, thread - (THREADS - LORA_THREADS), me.L);
  if constexpr (CTAS > 1) cluster_arrive();  // this CTA has read the other CTAs' shared memory
  else __syncthreads();
  if (CODES == INT8) {
    if (CTAS > 1) __syncthreads();
    encode_all(memory, w, me);
  }
  if constexpr (CTAS > 1) cluster_wait();  // the other CTAs have read this one's
}

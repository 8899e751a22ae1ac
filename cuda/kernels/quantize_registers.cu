// Kernel 1 of a linear, for int8 codes on GPUs with clusters. It has quantize.cu's outputs and keeps x in registers: device memory is read
// once, and x doesn't pass through shared memory.
//
// A warp has ROWS tokens and one block of 128 columns. Lane g * 4 + L has 16 bytes at columns 32 s + 8 L of each span s, of rows g, g + 8,
// .. These are the MMA's fragments, and their codes are two whole pieces of the activation layout. A CTA has WARPS such warps and a
// communication warp. A cluster of CTAS CTAs shares the columns of the same tokens:
//
//              warp 0   warp 1   ..         CTA 1
//            +--------+--------+--------+--------+--------+
//     ROWS   | 128    | 128    |        |        |        |    row maxima go to all CTAs of the cluster, sums of x @ proj_down to
//     tokens | columns|        |        |        |        |    the one that finishes the row; a barrier at the target counts them
//            +--------+--------+--------+--------+--------+
//
// With few tokens there is a cluster for each ROWS tokens. With many tokens (LOOP) there are only as many clusters as fit on the GPU, and
// each loops over tiles t. Its part of proj_down and of 1 / smooth stays in shared memory:
//
//     worker warps        load t + 1 | maxima of t | product of t | codes of t
//     communication warp  send maxima of t | add and send the warps' sums of t | scales and lora_act of t
//
// In a loop, two warps first add their sums in one slot. This saves shared memory, which is taken from the L1 cache, where x arrives.
//
// Rounds receive their data in two slots alternately. A CTA sends a round's maxima only after its communication warp has finished the
// previous round, and encodes only with all CTAs' maxima. So when new data arrive in a slot, all its old data have been read.
//
// -D: HALF as in quantize.cuh, CODES 0;  RANKS 0, 32 or, with LOOP, 64: the branch's rank, padded;  CTAS 2..16 per cluster
//     WARPS at least the CTA's blocks;  LOOP 1: persistent clusters;  TILES ROWS / 16: 1, without LOOP also 2
//     LORA 1, with RANKS 0: cuBLAS has also multiplied LoRAs' ranks
#include "quantize_communicate.cuh"
#include "quantize_registers.cuh"

typedef uint4 Rows[TILES][2][4];  // x of a lane: [tile][rows g, g + 8][span]

// A worker warp's block of columns, and this lane's part of it.
struct Lane {
  int warp, lane, g, L;
  int columns;         // first column of the block
  bool exists, both;   // whether the block's first 64 columns exist; whether all 128 do
  u32 slab;            // the warp's rows of proj_down
  u32 inverse_smooth;  // 1 / smooth of the warp's columns
  int warp_sums;       // the slot of the warp's sums

  // 1 / smooth of the even and the odd columns of a lane's run of a span.
  DEVICE void load_inverse_smooth(float (&even)[4], float (&odd)[4], int span) const {
    load_shared_floats(even, inverse_smooth + (4 * span + L) * 32), load_shared_floats(odd, inverse_smooth + (4 * span + L) * 32 + 16);
  }
};

// --- Loads ------------------------------------------------------------------------------------------------------------

DEVICE void load_x(Rows& to, const Work& w, const Lane& me, int tile) {
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = tile * ROWS + t * 16 + h * 8 + me.g;
      const u16* from = w.x + (size_t)row * w.stride + me.columns + me.L * 8;
      const bool lower = me.exists && row < w.M, upper = me.both && row < w.M;
#pragma unroll
      for (int span = 0; span < 4; span++) {
        to[t][h][span] = make_uint4(0, 0, 0, 0);
        if (span < 2 ? lower : upper) to[t][h][span] = load_once16(from + span * 32);
      }
    }
}

// The lane's four columns of smooth; 0 beyond K.
DEVICE uint2 load_smooth(const Work& w, const Lane& me) {
  uint2 s = make_uint2(0, 0);
  if (me.exists && me.columns + me.lane * 4 < w.K) s = *(const uint2*)(w.smooth + me.columns + me.lane * 4);
  return s;
}

DEVICE void fetch_proj_down(const Work& w, const Lane& me) {
  const int piece = me.lane % PIECES, k = me.lane / PIECES;
  const bool lower = me.exists && piece * 8 < w.R, upper = me.both && piece * 8 < w.R;
  const char* from = (const char*)(w.proj_down + (lower ? (size_t)(me.columns + k) * w.R + piece * 8 : 0));
#pragma unroll
  for (int i = 0; i < 4 * PIECES; i++) {
    const int row = k + LANES_ROWS * i;
    const bool real = i < 2 * PIECES ? lower : upper;
    cp_async16(me.slab + slab_offset(row, piece), from + (real ? i * LANES_ROWS * 2 * w.R : 0), real);
  }
}

// 1 / smooth of the warp's columns; 0 for a column beyond K. s: the lane's four columns.
DEVICE void store_inverse_smooth(uint2 s, const Work& w, const Lane& me) {
  const bool real = me.exists && me.columns + me.lane * 4 < w.K;
  const u32 address = me.inverse_smooth + me.lane / 2 * 32 + me.lane % 2 * 8;
  const float r0 = real ? reciprocal(low_float(s.x)) : 0, r1 = real ? reciprocal(high_float(s.x)) : 0;
  const float r2 = real ? reciprocal(low_float(s.y)) : 0, r3 = real ? reciprocal(high_float(s.y)) : 0;
  store_shared_float(address, r0), store_shared_float(address + 4, r2);
  store_shared_float(address + 16, r1), store_shared_float(address + 20, r3);
}

// --- Maxima -----------------------------------------------------------------------------------------------------------

DEVICE void find_maxima(const Rows& a, const Work& w, const Lane& me) {
  float row_max[TILES][2][2] = {};  // [tile][half][part]
#pragma unroll
  for (int span = 0; span < 4; span++) {
    if (span == 2) __syncwarp();  // otherwise ptxas loads all of 1 / smooth at once, and spills
    float even[4], odd[4];
    me.load_inverse_smooth(even, odd, span);
    const bool part = me.columns + span * 32 >= w.unsigned_from;
    const float shift = part ? SHIFT : 0;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float m = max_of_run(a[t][h][span], even, odd, shift);
        row_max[t][h][0] = max_abs(row_max[t][h][0], part ? 0 : m);
        row_max[t][h][1] = max_abs(row_max[t][h][1], part ? m : 0);
      }
  }
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int part = 0; part < 2; part++) {
        float m = row_max[t][h][part];
        m = max_abs(m, __shfl_xor_sync(~0u, m, 1));
        m = max_abs(m, __shfl_xor_sync(~0u, m, 2));
        if (me.L == 0) w.floats(WARP_MAX)[(me.warp * 2 + part) * ROWS + t * 16 + h * 8 + me.g] = m;
      }
}

// --- The product with proj_down ---------------------------------------------------------------------------------------

typedef float Sums[TILES][4][4];

// sums += x times the 32 ranks of proj_down of this pass. own: the lane's offset in the slab for ldmatrix.
DEVICE void multiply(Sums& sums, const Rows& a, const Lane& me, u32 own, int pass) {
#pragma unroll
  for (int span = 0; span < 4; span++)
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        u32 p[4];
        ldmatrix4_transposed(p, me.slab + (own ^ (4 * pass + n) << 4) + slab_offset(32 * span + 4 * step, 0));
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          const uint4 u = a[t][0][span], v = a[t][1][span];
          const u32 fragment[4] = {step ? u.z : u.x, step ? v.z : v.x, step ? u.w : u.y, step ? v.w : v.y};
          mma_16816(sums[t][n], fragment, {p[0], p[1]});
          mma_16816(sums[t][n + 1], fragment, {p[2], p[3]});
        }
      }
}

// Stores the warp's sums in its slot, at this lane's offset `mine`. adds: adds them to the sums of the previous warp.
DEVICE void store_sums(const Sums& sums, const Work& w, const Lane& me, int mine, bool adds) {
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float2& sum = *(float2*)(w.memory + me.warp_sums + (mine ^ n << 5) + sum_offset(t * 16 + h * 8, 0));
        const float2 other = adds ? sum : make_float2(0, 0);
        sum = make_float2(sums[t][n][2 * h] + other.x, sums[t][n][2 * h + 1] + other.y);
      }
}

DEVICE void multiply_proj_down(const Rows& a, const Work& w, const Lane& me, int round, int slot) {
  const int lane = me.lane;
  int warp = me.warp;
  asm volatile("" : "+r"(warp));  // computes the barriers' conditions again in each round, to save registers
  if (round == 0) {
    cp_async_wait<0>();
    __syncwarp();
  }
  const u32 own = slab_offset(8 * (lane % 8 / 2) + 2 * (lane / 8 & 1) + lane % 2, lane / 16);
  const bool adds = LOOP && warp % 2;  // odd warps add to the previous warp's sums
#pragma unroll
  for (int pass = 0; pass < RANKS / 32; pass++) {  // registers suffice for 32 ranks
    Sums sums = {};
    multiply(sums, a, me, own, pass);
    if (!LOOP && pass == RANKS / 32 - 1) __syncwarp();  // all lanes have read the slab
    if (LOOP && pass == 0 && round > 0) w.barrier(WARP_SUMS_READ).wait(slot ^ 1);
    int mine = sum_offset(me.g, 4 * pass) + 8 * me.L;  // computed again in each round, to save a register
    asm volatile("" : "+r"(mine));
    const int pair = 1 + pass * SUM_SLOTS + warp / 2;
    if (adds) barrier_named(pair, 64);
    store_sums(sums, w, me, mine, adds);
    if (LOOP && !adds && warp + 1 < WARPS) barrier_named_arrive(pair, 64);
  }
}

// --- Codes ------------------------------------------------------------------------------------------------------------

// Loads 1 / scale of a lane's rows. keep is ~0, or 0 for rows whose codes must be 0.
DEVICE void load_scales(float (&inverse)[TILES][2][2], u32 (&keep)[TILES][2], const Work& w, const Lane& me, int first_row, int row_max) {
  const int K = w.K, unsigned_from = w.unsigned_from;
  const bool tied = 0 < unsigned_from && unsigned_from < K;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = t * 16 + h * 8 + me.g;
      float m[2] = {}, scale[2];
      if (unsigned_from > 0)
#pragma unroll
        for (int cta = 0; cta < CTAS; cta++) m[0] = max_abs(m[0], w.floats(row_max)[(cta * 2 + 0) * ROWS + row]);
      if (unsigned_from < K)
#pragma unroll
        for (int cta = 0; cta < CTAS; cta++) m[1] = max_abs(m[1], w.floats(row_max)[(cta * 2 + 1) * ROWS + row]);
      scale[0] = part_scale(m[0]), scale[1] = part_scale(m[1]);
      if (tied) tie_parts(scale);
      keep[t][h] = finite(max_abs(m[0], m[1])) && first_row + row < w.M ? ~0u : 0;
      inverse[t][h][0] = inverse_scale(scale[0]), inverse[t][h][1] = inverse_scale(scale[1]);
    }
}

typedef u32 Codes[TILES][2][2][4];  // [tile][half][even, odd][span]

DEVICE void encode_span(Codes& codes, const Rows& a, const Work& w, const Lane& me, int span, const float (&inverse)[TILES][2][2],
                        const u32 (&keep)[TILES][2]) {
  float even[4], odd[4];
  me.load_inverse_smooth(even, odd, span);
  const bool part = me.columns + span * 32 >= w.unsigned_from;
  const float shift = part ? SHIFT : 0;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint4 run = a[t][h][span];
      const u32 words[4] = {run.x, run.y, run.z, run.w};
      const float factor = part ? inverse[t][h][1] : inverse[t][h][0];
      float e[4], o[4];
#pragma unroll
      for (int b = 0; b < 4; b++) {
        e[b] = fmaf((low_float(words[b]) + shift) * even[b], factor, MAGIC);
        o[b] = fmaf((high_float(words[b]) + shift) * odd[b], factor, MAGIC);
      }
      codes[t][h][0][span] = pack_bytes(e[0], e[1], e[2], e[3]) & keep[t][h];
      codes[t][h][1][span] = pack_bytes(o[0], o[1], o[2], o[3]) & keep[t][h];
    }
}

// Stores a row's codes in the activation layout. Lanes of adjacent rows exchange a piece, so that eight lanes store a whole line.
DEVICE void store_row(u32 (&c)[2][4], const Work& w, const Lane& me, int rows, int token, bool exists) {
  const bool odd_row = me.g & 1;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 other = __shfl_xor_sync(~0u, odd_row ? c[0][i] : c[1][i], 4);
    if (odd_row) c[0][i] = other;
    else c[1][i] = other;
  }
  const int piece = 2 * me.L + odd_row;
  if (exists)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int to = (token & ~1) + i;
      const u32 offset = (u32)(rows + to) * 8 + (piece ^ to & 7);
      ((uint4*)w.act)[offset] = make_uint4(c[i][0], c[i][1], c[i][2], c[i][3]);
    }
}

DEVICE void encode(const Rows& a, const Work& w, const Lane& me, int first_row, const float (&inverse)[TILES][2][2],
                   const u32 (&keep)[TILES][2]) {
  Codes codes;
  // The offset is computed again in each round, to save a register. Which of its factors ptxas must not know depends on the variant.
  int rows = me.columns / 128 * (LORA ? w.padded : 1);
  asm volatile("" : "+r"(rows));
  if (!LORA) rows *= w.padded;  // now the number of rows in the blocks before the warp's
#pragma unroll
  for (int span = 0; span < 4; span++) encode_span(codes, a, w, me, span, inverse, keep);
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int token = first_row + t * 16 + h * 8 + me.g;
      store_row(codes[t][h], w, me, rows, token, me.exists && token < w.padded);
    }
}

// Makes ptxas treat x as a new value. Otherwise it keeps x as floats from the maxima on, which take twice the registers.
DEVICE void hide_x(Rows& a, int tile) {
  const u32 zero = __shfl_sync(~0u, tile, 0) ^ tile;
#pragma unroll
  for (int i = 0; i < TILES * 8; i++) {
    uint4& v = a[i / 8][i / 4 % 2][i % 4];
    v.x ^= zero, v.y ^= zero, v.z ^= zero, v.w ^= zero;
  }
}

// --- The kernel -------------------------------------------------------------------------------------------------------

// Processes one tile, whose x is in `a`.
DEVICE void process_tile(Rows& a, const Work& w, const Lane& me, int tile, int round, int thread) {
  const int first_row = tile * ROWS, slot = round & 1, parity = round >> 1 & 1;
  const int row_max = ROW_MAX + slot * MAX_BYTES;
  find_maxima(a, w, me);
  __syncwarp();
  if (me.lane < ARRIVALS) w.barrier(WARP_MAX_READY).arrive();
  if (!OWN_COMMUNICATION_WARP) {
    if (round == 0) cluster_wait();
    if (me.warp == WARPS - 1) send_maxima(w, tile, slot, me.lane);
  }
  if (RANKS) {
    multiply_proj_down(a, w, me, round, slot);
    if (OWN_COMMUNICATION_WARP) {
      __syncwarp();
      if (me.lane < ARRIVALS) w.barrier(WARP_SUMS_READY).arrive();
    } else {
      __syncthreads();
      send_sums(w, slot, thread, WORKERS);
    }
  }
  if (OWN_COMMUNICATION_WARP && round == 0) cluster_wait();

  hide_x(a, tile);
  w.max_ready(slot).wait(parity);
  float inverse[TILES][2][2];
  u32 keep[TILES][2];
  load_scales(inverse, keep, w, me, first_row, row_max);
  encode(a, w, me, first_row, inverse, keep);
  if (!OWN_COMMUNICATION_WARP && me.warp == WARPS - 1) finish(w, tile, slot, parity, me.lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) CLUSTER quantize_registers(
    const u16* x,           // (M, K), rows `stride` apart, 16-byte aligned
    const u16* smooth,      // (K), 8-byte aligned
    const u16* proj_down,   // (K, R); RANKS 0: x @ proj_down, (M, R), followed in each row by the LoRAs' ranks
    char* act,              // (K blocks, Mp, 128)
    float* act_scale,       // (2 parts, Mp)
    u16* lora_act,          // (blocks of 32 ranks, Mp, 32)
    float* lora_act_scale,  // (Mp)
#if LORA
    const float* lora_strength,  // (LoRAs' ranks), 16-byte aligned
#endif
    int M, int K, int R, int stride,
    int unsigned_from       // from this column on, x is shifted
#if LORA
    , u64 lora_eighths, int lora_parts, int product_ranks  // LoraRanks; ranks of the product in all
#endif
    ) {
  extern __shared__ __align__(128) unsigned char memory[];
  const u32 base = shared_address(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, L = lane % 4;
  const int rank = blockIdx.x % CTAS, cluster = blockIdx.x / CTAS, clusters = gridDim.x / CTAS;
  const int padded = (M + 15) & ~15, tiles = (M + ROWS - 1) / ROWS;
  const int blocks = (K + 127) / 128, first = blocks * rank / CTAS, count = blocks * (rank + 1) / CTAS - first;
  const int own_rows = (ROWS - rank + CTAS - 1) / CTAS;
  const Work w{x, smooth, proj_down, act, act_scale, lora_act, lora_act_scale, M, K, R, stride, unsigned_from, memory, base, rank, padded,
               own_rows, own_rows * RANKS * 4 * (u32)CTAS
#if LORA
               , lora_strength, {lora_eighths, lora_parts, 0}, product_ranks
#endif
  };
  if (thread == 0) w.init_barriers();
  __syncthreads();
  cluster_arrive_relaxed();  // other CTAs must see the barriers, which are fenced
  wait_for_previous_grid();
  let_next_grid_start();
  if (OWN_COMMUNICATION_WARP && warp == WARPS) {
    communicate(w, cluster, clusters, tiles, lane);
    return;
  }

  const int columns = (first + warp) * 128;
  const bool exists = warp < count, both = exists && columns + 64 < w.K;
  const Lane me{warp, lane, g, L, columns, exists, both, base + SLABS + warp * SLAB_BYTES, base + SMOOTH + warp * 512,
                WARP_SUMS + (LOOP ? warp / 2 : warp) * WARP_SUMS_PITCH};
  Rows a, next;
  const uint2 s = load_smooth(w, me);
  load_x(a, w, me, cluster);
  if (RANKS) fetch_proj_down(w, me);
  cp_async_commit();
  store_inverse_smooth(s, w, me);
  __syncwarp();
#pragma unroll 1
  for (int tile = cluster, round = 0; tile < tiles; tile = LOOP ? tile + clusters : tiles, round++) {
    if (LOOP) load_x(next, w, me, tile + clusters);
    process_tile(a, w, me, tile, round, thread);
    if (LOOP)
#pragma unroll
      for (int i = 0; i < TILES * 8; i++) a[i / 8][i / 4 % 2][i % 4] = next[i / 8][i / 4 % 2][i % 4];
  }
}

// Kernel 1 of a linear for int8 codes where thread blocks form clusters: the same outputs as quantize.cu's, with x in registers. Device
// memory is read once, and nothing of x passes through shared memory.
//
// A warp takes ROWS tokens and one block of 128 columns. Lane g * 4 + L has, of rows g, g + 8, .., the 16 bytes at columns 32 s + 8 L of
// each span s: the MMA's fragments, and, once coded, two whole pieces of the image. A CTA is WARPS such warps and a messenger; a cluster
// of CTAS of them shares the columns of the same tokens:
//
//              warp 0   warp 1   ..         CTA 1
//            +--------+--------+--------+--------+--------+
//     ROWS   | 128    | 128    |        |        |        |    row maxima go to all CTAs of the cluster, sums of x @ proj_down to
//     tokens | columns|        |        |        |        |    the one that finishes the row; a barrier at the target counts them
//            +--------+--------+--------+--------+--------+
//
// With few tokens there is a cluster for each ROWS of them. With many (LOOP) as many clusters as fit stay on the GPU, and each takes tokens
// after tokens; its part of proj_down and of 1 / smooth stays in shared memory:
//
//     workers      load t + 1 | maxima of t | product of t | codes of t
//     messenger           send maxima of t | add and send the warps' sums of t | scales and low of t
//
// In a loop two warps add up their sums in one place before, since shared memory is short: it is taken from the L1, where x arrives.
//
// What a round receives lies in two turns' places. A CTA sends a round's maxima only after its messenger has finished the round before, and
// codes only with all CTAs' maxima: so when something comes for a turn's place, everybody has read what was there.
//
// -D: HALF as in quantize.cuh, CODES 0;  RANKS 0, 32 or, with LOOP, 64: the branch's rank, padded;  CTAS 2..16 in a cluster
//     WARPS at least the CTA's blocks;  LOOP 1: clusters that stay;  TILES ROWS / 16: 1, without LOOP also 2
#include "codes.cuh"
#include "quantize.cuh"

constexpr bool MESSENGER = TILES == 1;  // a warp of its own. Else the last of WARPS is it: 16 warps find 128 registers, 17 don't
constexpr int ROWS = 16 * TILES, WORKERS = 32 * WARPS, THREADS = WORKERS + 32 * MESSENGER;
constexpr int WARPS_PER_SM = RANKS > 32 ? 12 : 16;  // as registers go
constexpr int FITTING = 32 * WARPS_PER_SM / THREADS, CTAS_PER_SM = FITTING > 4 ? 4 : FITTING < 1 ? 1 : FITTING;
constexpr int TURNS = LOOP ? 2 : 1;
constexpr int SLAB_BYTES = 128 * RANKS * 2, SUM_BYTES = ROWS * RANKS * 4;
constexpr int PLACES = LOOP ? (WARPS + 1) / 2 : WARPS;      // of warps' sums: in a loop a pair's
constexpr int OWN_ROWS = (ROWS + CTAS - 1) / CTAS;
constexpr int QUADS = RANKS / 4 + !RANKS;
constexpr int PIECES = RANKS / 8 + !RANKS;  // of 8 ranks, in a row of proj_down
constexpr int LANES_ROWS = 32 / PIECES;     // that a warp takes at a time, a lane for each piece
constexpr int MAX_BYTES = CTAS * 2 * ROWS * 4, ALL_SUMS = CTAS * OWN_ROWS * RANKS * 4;  // a round's, received
static_assert(!LOOP || TILES == 1, "x of two rounds has to fit the registers");

// Shared memory. A round that is the only one needs proj_down no more when it has its sums: they take its place.
// mbarriers: [TURNS] what all CTAs send, [TURNS]; what this CTA's warps have for the messenger; the messenger has read their sums
constexpr int MAX_READY = 0, SUMS_READY = 16, WARP_MAX_READY = 32, WARP_SUMS_READY = 40, WARP_SUMS_READ = 48;
constexpr int ROW_MAX = 128;                                        // [TURNS][CTAS][2 parts][ROWS] float, received
constexpr int WARP_MAX = ROW_MAX + TURNS * MAX_BYTES;               // [WARPS][2 parts][ROWS] float
constexpr int SUMS = WARP_MAX + WARPS * 2 * ROWS * 4;               // [TURNS][CTAS][OWN_ROWS][RANKS] float, received
constexpr int SMOOTH = SUMS + TURNS * ALL_SUMS;                     // [WARPS][16 runs][4 even, 4 odd] float, 1 / smooth
constexpr int SLABS = SMOOTH + WARPS * 512;                         // [WARPS][128 rows][PIECES]
constexpr int WARP_SUMS = LOOP ? SLABS + WARPS * SLAB_BYTES : SLABS;  // [PLACES][ROWS][RANKS] float
constexpr int WARP_SUMS_PITCH = LOOP ? SUM_BYTES : SLAB_BYTES;
static_assert(LOOP || SUM_BYTES <= SLAB_BYTES && RANKS <= 32, "a warp's sums take its slab's place, once it has read it");
static_assert(!LOOP || 1 + RANKS / 32 * PLACES <= 16, "a barrier for each pair of warps and each pass");

// A slab: row k has piece p at p ^ (its place among eight): ldmatrix takes k = 8 L + {0, 1}, L = 0..3, and two rows of 32 ranks share a line.
DEVICE u32 slab_offset(int row, int piece) {
  return (row * PIECES + (piece ^ (PIECES > 4 ? row >> 2 & 6 | row & 1 : row >> 3 & 3))) << 4;
}
// A warp's sums: tile c of 8 ranks lies at c ^ (row & 3), so that a fragment's eight rows don't meet in one bank.
DEVICE u32 sum_offset(int row, int tile) { return (row * RANKS + ((tile ^ row & 3) << 3)) << 2; }

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) CLUSTER quantize_registers(
  const u16* x,          // (M, K), rows `stride` apart, 16-byte aligned
  const u16* smooth,     // (K), 8-byte aligned
  const u16* proj_down,  // (K, R); RANKS 0: x @ proj_down, (M, R)
  char* act,             // (K blocks, Mp, 128)
  float* act_scale,      // (2 parts, Mp)
  u16* lora_act,              // (R blocks of 32, Mp, 32)
  float* lora_act_scale,      // (Mp)
  int M, int K, int R, int stride,
  int unsigned_from) {   // from this column on, x is shifted
  extern __shared__ __align__(128) unsigned char memory[];
  const u32 base = shared_address(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, L = lane % 4;
  const int rank = blockIdx.x % CTAS, cluster = blockIdx.x / CTAS, clusters = gridDim.x / CTAS;
  const int padded = (M + 15) & ~15, tiles = (M + ROWS - 1) / ROWS;
  const int blocks = (K + 127) / 128, first = blocks * rank / CTAS, count = blocks * (rank + 1) / CTAS - first;
  auto floats = [&](int place) { return (float*)(memory + place); };
  const int own_rows = (ROWS - rank + CTAS - 1) / CTAS;  // whose low this CTA finishes: rank, rank + CTAS, ..
  const u32 own_bytes = own_rows * RANKS * 4 * CTAS;
  if (thread == 0) {
    for (int turn = 0; turn < TURNS; turn++) {
      mbarrier_init(base + MAX_READY + 8 * turn, 1);
      mbarrier_init(base + SUMS_READY + 8 * turn, 1);
    }
    mbarrier_init(base + WARP_MAX_READY, WARPS * ARRIVALS);
    mbarrier_init(base + WARP_SUMS_READY, WARPS * ARRIVALS);
    mbarrier_init(base + WARP_SUMS_READ, ARRIVALS);
    fence_mbarrier_init();
    for (int turn = 0; turn < TURNS; turn++) {
      mbarrier_arrive_expect(base + MAX_READY + 8 * turn, MAX_BYTES);
      if (RANKS) mbarrier_arrive_expect(base + SUMS_READY + 8 * turn, own_bytes);
    }
  }
  __syncthreads();
  cluster_arrive_relaxed();  // what the others have to see are the barriers, which are fenced
  wait_for_previous_grid();
  let_next_grid_start();

  // The messenger's work: of a warp of its own, or of the last.
  auto send_maxima = [&](int tile, int turn) {
    const int first_row = tile * ROWS, row_max = ROW_MAX + turn * MAX_BYTES;
    mbarrier_wait(base + WARP_MAX_READY, turn);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      const int place = i * 32 + lane;  // part * ROWS + row
      float m = 0;
#pragma unroll 8
      for (int w = 0; w < WARPS; w++) m = max_abs(m, floats(WARP_MAX)[w * 2 * ROWS + place]);
      if (first_row + place % ROWS >= M) m = 0;
#pragma unroll
      for (int cta = 0; cta < CTAS; cta++)
        store_async(cluster_address(base + row_max + (rank * 2 * ROWS + place) * 4, cta), m, cluster_address(base + MAX_READY + 8 * turn, cta));
    }
  };
  // Of all warps, by `threads` threads of which this is `index`.
  auto send_sums = [&](int turn, int index, int threads) {
#pragma unroll 1
    for (int i = index; i < ROWS * QUADS; i += threads) {
      const int quad = i % QUADS, row = i / QUADS;
      float4 sum = {};
#pragma unroll
      for (int w = 0; w < PLACES; w++) {
        const float4 v = *(const float4*)floats(WARP_SUMS + w * WARP_SUMS_PITCH + sum_offset(row, quad / 2) + quad % 2 * 16);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      const int place = SUMS + turn * ALL_SUMS + ((rank * OWN_ROWS + row / CTAS) * RANKS + quad * 4) * 4;
      store_async(cluster_address(base + place, row % CTAS), sum, cluster_address(base + SUMS_READY + 8 * turn, row % CTAS));
    }
  };
  auto finish = [&](int tile, int turn, int parity) {
    const int first_row = tile * ROWS, row_max = ROW_MAX + turn * MAX_BYTES;
    if (!RANKS && R > 0) copy_lora_act(proj_down, lora_act, lora_act_scale, M, padded, R, first_row + rank, CTAS, own_rows, lane, 32);
    mbarrier_wait(base + MAX_READY + 8 * turn, parity);
    if (LOOP && lane == 0) mbarrier_arrive_expect(base + MAX_READY + 8 * turn, MAX_BYTES);  // for the round after the next
#pragma unroll 1
    for (int row = lane; rank == 0 && row < ROWS; row += 32) {
      float m[2] = {}, s[2];
#pragma unroll
      for (int part = 0; part < 2; part++) {
#pragma unroll
        for (int cta = 0; cta < CTAS; cta++) m[part] = max_abs(m[part], floats(row_max)[(cta * 2 + part) * ROWS + row]);
        s[part] = part_scale(m[part]);
      }
      if (0 < unsigned_from && unsigned_from < K) tie_parts(s);
      const bool whole = finite(max_abs(m[0], m[1]));
#pragma unroll
      for (int part = 0; part < 2; part++) {
        const bool used = part ? unsigned_from < K : unsigned_from > 0;
        if (first_row + row < padded)
          act_scale[(size_t)part * padded + first_row + row] = used ? (whole ? s[part] : __int_as_float(0x7fffffff)) : 0;
      }
    }
    if (RANKS) {
      mbarrier_wait(base + SUMS_READY + 8 * turn, parity);
      if (LOOP && lane == 0) mbarrier_arrive_expect(base + SUMS_READY + 8 * turn, own_bytes);
      // PIECES lanes a row, each a piece of 8 ranks.
      const int piece = lane % PIECES;
#pragma unroll 1
      for (int own = lane / PIECES; own < (OWN_ROWS + LANES_ROWS - 1) / LANES_ROWS * LANES_ROWS; own += LANES_ROWS) {
        const int row = own * CTAS + rank, t = first_row + row;
        float value[8] = {};
        if (row < ROWS)
#pragma unroll 4
          for (int source = 0; source < CTAS; source++) {
            const int place = SUMS + turn * ALL_SUMS + ((source * OWN_ROWS + own) * RANKS + piece * 8) * 4;
            add_eight(value, floats(place));
          }
        store_lora_act<PIECES>(value, piece, t, row < ROWS && t < padded, M, padded, lora_act, lora_act_scale);
      }
    }
    __syncwarp();
  };
  if (MESSENGER && warp == WARPS) {
    cluster_wait();
#pragma unroll 1
    for (int tile = cluster, round = 0; tile < tiles; tile = LOOP ? tile + clusters : tiles, round++) {
      send_maxima(tile, round & 1);
      if (RANKS) {
        mbarrier_wait(base + WARP_SUMS_READY, round & 1);
        send_sums(round & 1, lane, 32);
        __syncwarp();
        if (LOOP && lane < ARRIVALS) mbarrier_arrive(base + WARP_SUMS_READ);
      }
      finish(tile, round & 1, round >> 1 & 1);
    }
    return;
  }

  // --- Workers ---
  const int columns = (first + warp) * 128;
  const bool there = warp < count, both = there && columns + 64 < K;  // of a block's halves of 64 the first is there, or both
  uint4 a[TILES][2][4], next[TILES][2][4];
  auto load = [&](uint4 (&to)[TILES][2][4], int tile) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = tile * ROWS + t * 16 + h * 8 + g;
        const u16* from = x + (size_t)row * stride + columns + L * 8;
        const bool lower = there && row < M, upper = both && row < M;
#pragma unroll
        for (int span = 0; span < 4; span++) {
          to[t][h][span] = make_uint4(0, 0, 0, 0);
          if (span < 2 ? lower : upper) to[t][h][span] = load_once16(from + span * 32);
        }
      }
  };
  const u32 slab = base + SLABS + warp * SLAB_BYTES;
  const int warp_sums = WARP_SUMS + (LOOP ? warp / 2 : warp) * WARP_SUMS_PITCH;
  uint2 s = make_uint2(0, 0);
  if (there && columns + lane * 4 < K) s = *(const uint2*)(smooth + columns + lane * 4);
  load(a, cluster);
  if (RANKS) {
    const int piece = lane % PIECES, k = lane / PIECES;
    const bool lower = there && piece * 8 < R, upper = both && piece * 8 < R;
    const char* from = (const char*)(proj_down + (lower ? (size_t)(columns + k) * R + piece * 8 : 0));
#pragma unroll
    for (int i = 0; i < 4 * PIECES; i++) {
      const int row = k + LANES_ROWS * i;
      const bool real = i < 2 * PIECES ? lower : upper;
      cp_async16(slab + slab_offset(row, piece), from + (real ? i * LANES_ROWS * 2 * R : 0), real);
    }
  }
  cp_async_commit();
  // 1 / smooth; 0 for a column beyond K.
  const u32 inverse_smooth = base + SMOOTH + warp * 512;
  {
    const bool real = there && columns + lane * 4 < K;
    const u32 place = inverse_smooth + lane / 2 * 32 + lane % 2 * 8;
    const float r0 = real ? reciprocal(low_float(s.x)) : 0, r1 = real ? reciprocal(high_float(s.x)) : 0;
    const float r2 = real ? reciprocal(low_float(s.y)) : 0, r3 = real ? reciprocal(high_float(s.y)) : 0;
    store_shared_float(place, r0), store_shared_float(place + 4, r2), store_shared_float(place + 16, r1), store_shared_float(place + 20, r3);
  }
  __syncwarp();

#pragma unroll 1
  for (int tile = cluster, round = 0; tile < tiles; tile = LOOP ? tile + clusters : tiles, round++) {
    const int first_row = tile * ROWS, turn = round & 1, parity = round >> 1 & 1;
    const int row_max_place = ROW_MAX + turn * MAX_BYTES;
    if (LOOP) load(next, tile + clusters);
    // Maxima.
    float row_max[TILES][2][2] = {};  // [tile][half][part]
#pragma unroll
    for (int span = 0; span < 4; span++) {
      if (span == 2) __syncwarp();  // ptxas would load all of 1 / smooth at once, and spill
      float even[4], odd[4];
      load_shared_floats(even, inverse_smooth + (4 * span + L) * 32), load_shared_floats(odd, inverse_smooth + (4 * span + L) * 32 + 16);
      const bool part = columns + span * 32 >= unsigned_from;
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
          if (L == 0) floats(WARP_MAX)[(warp * 2 + part) * ROWS + t * 16 + h * 8 + g] = m;
        }
    __syncwarp();
    if (lane < ARRIVALS) mbarrier_arrive(base + WARP_MAX_READY);
    if (!MESSENGER) {
      if (round == 0) cluster_wait();
      if (warp == WARPS - 1) send_maxima(tile, turn);
    }
    // The product.
    if (RANKS) {
      if (round == 0) {
        cp_async_wait<0>();
        __syncwarp();
      }
      const u32 own = slab_offset(8 * (lane % 8 / 2) + 2 * (lane / 8 & 1) + lane % 2, lane / 16);
      const bool adds = LOOP && warp % 2;  // to what the warp before has left
#pragma unroll
      for (int pass = 0; pass < RANKS / 32; pass++) {  // registers don't suffice for more ranks
        float sums[TILES][4][4] = {};
#pragma unroll
        for (int span = 0; span < 4; span++)
#pragma unroll
          for (int step = 0; step < 2; step++)
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
              u32 p[4];
ldmatrix4_transposed(p, slab + (own ^ (4 * pass + n) << 4) + slab_offset(32 * span + 4 * step, 0));
#pragma unroll
              for (int t = 0; t < TILES; t++) {
                const uint4 u = a[t][0][span], v = a[t][1][span];
                mma_16816(sums[t][n], {step ? u.z : u.x, step ? v.z : v.x, step ? u.w : u.y, step ? v.w : v.y}, {p[0], p[1]});
                mma_16816(sums[t][n + 1], {step ? u.z : u.x, step ? v.z : v.x, step ? u.w : u.y, step ? v.w : v.y}, {p[2], p[3]});
              }
            }
        if (!LOOP && pass == RANKS / 32 - 1) __syncwarp();  // all lanes have read the slab
        if (LOOP && pass == 0 && round > 0) mbarrier_wait(base + WARP_SUMS_READ, turn ^ 1);
        int mine = sum_offset(g, 4 * pass) + 8 * L;  // anew in each round
        asm volatile("" : "+r"(mine));
        const int pair = 1 + pass * PLACES + warp / 2;
        if (adds) barrier_named(pair, 64);
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int n = 0; n < 4; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              float2& place = *(float2*)(memory + warp_sums + (mine ^ n << 5) + sum_offset(t * 16 + h * 8, 0));
              const float2 other = adds ? place : make_float2(0, 0);
              place = make_float2(sums[t][n][2 * h] + other.x, sums[t][n][2 * h + 1] + other.y);
            }
        if (LOOP && !adds && warp + 1 < WARPS) barrier_named_arrive(pair, 64);
      }
      if (MESSENGER) {
        __syncwarp();
        if (lane < ARRIVALS) mbarrier_arrive(base + WARP_SUMS_READY);
      } else {
        __syncthreads();
        send_sums(turn, thread, WORKERS);
      }
    }
    if (MESSENGER && round == 0) cluster_wait();

    // Codes. x as floats would take twice the registers: ptxas keeps it from above, unless it is another x for all that it knows.
    const u32 zero = __shfl_sync(~0u, tile, 0) ^ tile;
#pragma unroll
    for (int i = 0; i < TILES * 8; i++) {
      uint4& v = a[i / 8][i / 4 % 2][i % 4];
      v.x ^= zero, v.y ^= zero, v.z ^= zero, v.w ^= zero;
    }
    mbarrier_wait(base + MAX_READY + 8 * turn, parity);
    const bool tied = 0 < unsigned_from && unsigned_from < K;
    float inverse[TILES][2][2];
    u32 keep[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = t * 16 + h * 8 + g;
        float m[2] = {}, scale[2];
        if (unsigned_from > 0)
#pragma unroll
          for (int cta = 0; cta < CTAS; cta++) m[0] = max_abs(m[0], floats(row_max_place)[(cta * 2 + 0) * ROWS + row]);
        if (unsigned_from < K)
#pragma unroll
          for (int cta = 0; cta < CTAS; cta++) m[1] = max_abs(m[1], floats(row_max_place)[(cta * 2 + 1) * ROWS + row]);
        scale[0] = part_scale(m[0]), scale[1] = part_scale(m[1]);
        if (tied) tie_parts(scale);
        keep[t][h] = finite(max_abs(m[0], m[1])) && first_row + row < M ? ~0u : 0;
        inverse[t][h][0] = inverse_scale(scale[0]), inverse[t][h][1] = inverse_scale(scale[1]);
      }
    {
      u32 codes[TILES][2][2][4];  // [tile][half][even, odd][span]
      int block = columns / 128;
      asm volatile("" : "+r"(block));  // its place in the image is computed anew in each round: it would be a register too many
#pragma unroll
      for (int span = 0; span < 4; span++) {
        float even[4], odd[4];
        load_shared_floats(even, inverse_smooth + (4 * span + L) * 32), load_shared_floats(odd, inverse_smooth + (4 * span + L) * 32 + 16);
        const bool part = columns + span * 32 >= unsigned_from;
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
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int token = first_row + t * 16 + h * 8 + g;
          u32(&c)[2][4] = codes[t][h];
          // A lane gives one of its pieces for one of the row beside: eight lanes then store a whole line.
          const bool odd_row = g & 1;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const u32 other = __shfl_xor_sync(~0u, odd_row ? c[0][i] : c[1][i], 4);
            if (odd_row) c[0][i] = other;
            else c[1][i] = other;
          }
          const int piece = 2 * L + odd_row;
          if (there && token < padded)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int to = (token & ~1) + i;
              const u32 place = (u32)(block * padded + to) * 8 + (piece ^ to & 7);
              ((uint4*)act)[place] = make_uint4(c[i][0], c[i][1], c[i][2], c[i][3]);
            }
        }
    }
    if (!MESSENGER && warp == WARPS - 1) finish(tile, turn, parity);
    if (LOOP)
#pragma unroll
      for (int i = 0; i < TILES * 8; i++) a[i / 8][i / 4 % 2][i % 4] = next[i / 8][i / 4 % 2][i % 4];
  }
}

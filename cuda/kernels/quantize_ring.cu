// Kernel 1 of a linear for int8 codes where thread blocks form clusters: the same outputs as quantize.cu's. With many columns it is closer
// to the speed of memory, since the rows of one tile are loaded while those of another are coded.
//
// As many clusters as fit stay on the GPU, each takes 16 tokens after another. A CTA has the same columns every time, and so
//   - its part of proj_down lives in registers for good: 16 ranks and WARP_SPANS spans of 32 columns a warp;
//   - x flows through a ring of slots in shared memory, filled by the copy engine while earlier tokens are worked on:
//
//         slot    tokens 0-15 | tokens 16-31 | tokens 32-47 |         a slot: 16 rows of the CTA's columns
//                   coded         loading        loading
//
// For a slot's tokens: multiply and take row maxima; add up the CTA's warps and send the sums to the CTA of the cluster that
// finishes the row, the maxima to all; scales and codes; free the slot. Sums are always added in the same order. What is sent is
// counted by a barrier at its target, so that nobody waits for his own stores; meanwhile the next slot's tokens are multiplied:
//
//         round t    multiply tokens t | refill the slot of t - 2 | add up and send t (some warps) | scales, low and codes of t - 1
//
// -D: HALF as in quantize.cuh, CODES 0;  RANKS 0, 32: the branch's rank, padded;  CTAS 2, 4, 8 in a cluster;
//     WARP_SPANS at least the CTA's columns / 32 / GROUPS
#include "codes.cuh"
#include "quantize.cuh"

constexpr int ROWS = 16, WARPS = 16, THREADS = 32 * WARPS;
constexpr int RANK_SPLIT = RANKS > 0 ? RANKS / 16 : 1;  // warps that read the same x, for 16 ranks each
constexpr int GROUPS = WARPS / RANK_SPLIT;              // of warps that share ranks and divide the columns
constexpr int SUM_BYTES = ROWS * RANKS * 4;             // float (16, RANKS)
constexpr int TURNS = 4;                                // rounds whose sums are kept: a CTA may send three rounds after what another still reads
constexpr int OWN_ROWS = ROWS / CTAS;                   // whose low this CTA finishes: rank, rank + CTAS, ...
constexpr int RECEIVED = CTAS * 2 * ROWS * 4 + SUM_BYTES;  // bytes a round from all CTAs, itself too
constexpr int LOW_THREADS = 64 / CTAS > 32 ? 64 / CTAS : 32;

// Shared memory, in its order.
struct Places {
    u32 full;         // [16 slots] mbarrier: the slot's x has come
    u32 ready;        // [TURNS] mbarrier: all CTAs' maxima and sums have come. 64 bytes
    u32 row_max;      // [TURNS][CTAS][2 parts][ROWS] float
    u32 warp_max;     // [2 parts][WARPS][ROWS] float
    u32 sums;         // [TURNS][CTAS][OWN_ROWS][RANKS] float
    u32 warp_sums;    // [GROUPS][ROWS][RANKS] float; at the start each warp's way from proj_down's rows to fragments
    u32 smooth;       // [blocks][16 runs of 8 columns][4 even, 4 odd] float, 1 / smooth
    u32 x;            // [slots][ROWS] rows, `pitch` bytes each: 64 more than whole lines, so that two rows meet all banks
    __device__ Places(u32 base, int blocks) {
        full = base;
        ready = full + 128;
        row_max = ready + 64;
        warp_max = row_max + TURNS * CTAS * 2 * ROWS * 4;
        sums = warp_max + 2 * WARPS * ROWS * 4;
        warp_sums = sums + TURNS * SUM_BYTES;
        smooth = warp_sums + GROUPS * SUM_BYTES;
        x = smooth + blocks * 512;
    }
};

// A warp's sums: tile c of 8 ranks lies at c ^ (row & 3), so that a fragment's eight rows don't meet in one bank.
__device__ __forceinline__ u32 sum_offset(int row, int tile) { return (row * RANKS + ((tile ^ row & 3) << 3)) << 2; }

extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER quantize_ring(
    const u16* x,          // (M, K), rows `stride` apart, 16-byte aligned
    const u16* smooth,     // (K)
    const u16* proj_down,  // (K, R); RANKS 0: x @ proj_down, (M, R)
    char* act,             // (K blocks, Mp, 128)
    float* act_scale,      // (2 parts, Mp)
    u16* low,              // (R blocks of 32, Mp, 32)
    float* low_scale,      // (Mp)
    int M, int K, int R, int stride,
    int unsigned_from,     // from this column on, x is shifted
    int slots,             // tiles of x that fit in shared memory
    int) {                 // (quantize.cu's `kept`)
    extern __shared__ __align__(128) unsigned char memory[];
    let_next_grid_start();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, L = lane % 4;
    const int rank = blockIdx.x % CTAS, cluster = blockIdx.x / CTAS, clusters = gridDim.x / CTAS;
    const int padded = (M + 15) & ~15, tiles = padded / ROWS;
    const int blocks = (K + 127) / 128, first = blocks * rank / CTAS, count = blocks * (rank + 1) / CTAS - first;
    const int most = (blocks + CTAS - 1) / CTAS;
    const int columns = min(K, (first + count) * 128) - first * 128, spans = columns / 32;
    const int pitch = most * 256 + 64, slot_bytes = ROWS * pitch;
    const Places at(shared_address(memory), most);
    auto floats = [&](u32 address) { return (float*)(memory + (address - at.full)); };

    // The copy engine brings a row's columns in one piece, one row a warp. Rows beyond M stay what they were: whatever comes of
    // them is masked.
    auto fetch = [&](int tile, int slot) {
        const int rows = min(ROWS, M - tile * ROWS);
        if (thread == 0) mbarrier_arrive_expect(at.full + slot * 8, rows * columns * 2);
        if (lane == 0 && warp < rows)
            bulk_copy(at.x + slot * slot_bytes + warp * pitch, x + (size_t)(tile * ROWS + warp) * stride + first * 128, columns * 2,
                      at.full + slot * 8);
    };
    if (thread == 0) {
        for (int slot = 0; slot < slots; slot++) mbarrier_init(at.full + slot * 8, 1);
        for (int turn = 0; turn < TURNS; turn++) mbarrier_init(at.ready + turn * 8, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    cluster_arrive();
    for (int slot = 0; slot < slots; slot++)
        if (cluster + slot * clusters < tiles) fetch(cluster + slot * clusters, slot);

    // Half a block at K's end: the copies never write its other half, which has to be numbers.
    if (columns < count * 128)
        for (int i = thread; i < slots * ROWS * 8; i += THREADS)
            store_shared(at.x + i / 8 * pitch + columns * 2 + i % 8 * 16, make_uint4(0, 0, 0, 0));
    for (int i = thread; i < most * 128; i += THREADS) {
        // A column beyond the CTA's has 1 / smooth = 0, and so codes of 0.
        const float r = i < columns ? reciprocal(low_float(smooth[first * 128 + i])) : 0;
        store_float(at.smooth + (i / 8 * 8 + i % 2 * 4 + i / 2 % 4) * 4, r);
    }

    // proj_down's fragments. The MMA's lane g * 4 + L has rows g and g + 8 of 16, and of each span columns 8 L .. 8 L + 7 of x,
    // 16 bytes at once: which columns a fragment's register stands for is free, as long as both sides agree. Here lane k has row k
    // of a span; ldmatrix turns it: its matrix i holds rows 4 step + 2 (i & 1) + {0, 1} of each 8, ranks 8 (i >> 1) .. + 7.
    const int rank_part = warp / GROUPS, group = warp % GROUPS;
    uint4 down[RANKS > 0 ? WARP_SPANS : 1][2];
    if (RANKS > 0) {
        const u32 stage = at.warp_sums + warp * 1024;
        const bool there = rank_part * 16 < R;  // R is a multiple of 16
#pragma unroll
        for (int s = 0; s < WARP_SPANS; s++) {
            const int span = group + s * GROUPS;
            const uint4* row = (const uint4*)(proj_down + (size_t)(first * 128 + span * 32 + lane) * R + rank_part * 16);
            down[s][0] = there && span < spans ? row[0] : make_uint4(0, 0, 0, 0);
            down[s][1] = there && span < spans ? row[1] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int s = 0; s < WARP_SPANS; s++) {
            __syncwarp();
            store_shared(stage + lane * 32, down[s][0]);
            store_shared(stage + lane * 32 + 16, down[s][1]);
            __syncwarp();
#pragma unroll
            for (int step = 0; step < 2; step++) {
                const int k = 8 * (lane % 8 / 2) + 4 * step + 2 * (lane / 8 & 1) + lane % 2;
                down[s][step] = load_transposed(stage + k * 32 + lane / 16 * 16);
            }
        }
    }

    // Coding: eight lanes a row, each one 16 bytes of x's image in the end, so that a warp writes whole lines.
    const int code_lane = lane % 8, my_code_row = warp % 4 * 4 + lane / 8;

    __syncthreads();
    const int rounds = (tiles - cluster + clusters - 1) / clusters;
    int slot = 0, parity = 0, turn = 0, slot_before = 0, turn_before = 0, slot_free = 0;
    auto tile_at = [&](int round) { return cluster + round * clusters; };
    for (int round = 0; round <= rounds; round++) {
        if (round < rounds) {
            const u32 slot_x = at.x + slot * slot_bytes;
            mbarrier_wait(at.full + slot * 8, parity);
            float sums[2][4] = {}, row_max[2][2] = {};  // [part][rows g, g + 8]
#pragma unroll
            for (int s = 0; s < WARP_SPANS; s++) {
                const int span = group + s * GROUPS;
                if (span < spans) {
                    const u32 mine = slot_x + span * 64 + L * 16;
                    const uint4 a = load_shared(mine + g * pitch), b = load_shared(mine + (g + 8) * pitch);
                    if (s % RANK_SPLIT == rank_part) {
                        const u32 run = at.smooth + (span * 4 + L) * 32;
                        float even[4], odd[4];
                        load_floats(even, run), load_floats(odd, run + 16);
                        const bool part = first * 128 + span * 32 >= unsigned_from;
                        const float shift = part ? SHIFT : 0;
                        const float of_a = max_of_run(a, even, odd, shift), of_b = max_of_run(b, even, odd, shift);
                        row_max[0][0] = max_abs(row_max[0][0], part ? 0 : of_a), row_max[0][1] = max_abs(row_max[0][1], part ? 0 : of_b);
                        row_max[1][0] = max_abs(row_max[1][0], part ? of_a : 0), row_max[1][1] = max_abs(row_max[1][1], part ? of_b : 0);
                    }
                    if (RANKS > 0) {
                        mma(sums[0], a.x, b.x, a.y, b.y, down[s][0].x, down[s][0].y);
                        mma(sums[1], a.x, b.x, a.y, b.y, down[s][0].z, down[s][0].w);
                        mma(sums[0], a.z, b.z, a.w, b.w, down[s][1].x, down[s][1].y);
                        mma(sums[1], a.z, b.z, a.w, b.w, down[s][1].z, down[s][1].w);
                    }
                }
            }
            __syncthreads();  // the sums and maxima of the round before have been added up
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int part = i / 2, half = i % 2;
                float m = row_max[part][half];
                m = max_abs(m, __shfl_xor_sync(~0u, m, 1));
                m = max_abs(m, __shfl_xor_sync(~0u, m, 2));
                if (L == 0) store_float(at.warp_max + ((part * WARPS + warp) * ROWS + g + 8 * half) * 4, m);
            }
            if (RANKS > 0)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int half = i % 2, t = i / 2;
                    *(float2*)floats(at.warp_sums + group * SUM_BYTES + sum_offset(g + 8 * half, rank_part * 2 + t) + 8 * L) =
                        make_float2(sums[t][2 * half], sums[t][2 * half + 1]);
                }
        }
        __syncthreads();
        if (round >= 2) {
            const int next = tile_at(round - 2 + slots);
            if (next < tiles) fetch(next, slot_free);
        }
        if (round < rounds) {
            const u32 barrier = at.ready + turn * 8;
            if (thread == 0) mbarrier_arrive_expect(barrier, RECEIVED);
            if (round == 0) cluster_wait();  // all of the cluster have their barriers
#pragma unroll
            for (int i = thread; i < ROWS * RANKS / 4; i += THREADS) {
                const int row = i / (RANKS / 4 + !RANKS), quad = i % (RANKS / 4 + !RANKS);
                float4 sum = {};
#pragma unroll 4
                for (int j = 0; j < GROUPS; j++) {
                    const float4 v = *(const float4*)floats(at.warp_sums + j * SUM_BYTES + sum_offset(row, quad / 2) + quad % 2 * 16);
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                send_floats(at.sums + turn * SUM_BYTES + ((rank * OWN_ROWS + row / CTAS) * RANKS + quad * 4) * 4, sum, barrier, row % CTAS);
            }
            if (thread >= THREADS - 8 * CTAS) {
                // A thread takes four rows of a part, for one of the CTAs.
                const int index = thread - (THREADS - 8 * CTAS), four = index % 8, row = tile_at(round) * ROWS + four % 4 * 4;
                float4 m = {};
#pragma unroll 4
                for (int w = 0; w < WARPS; w++) {
                    const float4 v = *(const float4*)floats(at.warp_max + (four / 4 * WARPS + w) * ROWS * 4 + four % 4 * 16);
                    m.x = max_abs(m.x, v.x), m.y = max_abs(m.y, v.y), m.z = max_abs(m.z, v.z), m.w = max_abs(m.w, v.w);
                }
                if (row >= M) m.x = 0;
                if (row + 1 >= M) m.y = 0;
                if (row + 2 >= M) m.z = 0;
                if (row + 3 >= M) m.w = 0;
                send_floats(at.row_max + ((turn * CTAS + rank) * 2 * ROWS + four * 4) * 4, m, barrier, index / 8);
            }
        }
        if (round > 0) {
            const int tile = tile_at(round - 1);
            const u32 slot_x = at.x + slot_before * slot_bytes;
            mbarrier_wait(at.ready + turn_before * 8, (round - 1) / TURNS & 1);
            if (RANKS > 0 && thread >= THREADS - LOW_THREADS) {
                // The CTA finishes every CTAS-th row, four lanes a row, each a piece of 8 ranks of every 32.
                const int index = thread - (THREADS - LOW_THREADS), row = index / 4 * CTAS + rank, token = tile * ROWS + row;
                auto collect = [&](float (&value)[8], int part) {
#pragma unroll
                    for (int i = 0; i < 8; i++) value[i] = 0;
                    if (row < ROWS && token < M)
#pragma unroll 4
                        for (int cta = 0; cta < CTAS; cta++) {
                            const u32 place = ((cta * OWN_ROWS + index / 4) * RANKS + part * 32 + L * 8) * 4;
                            const float4* from = (const float4*)floats(at.sums + turn_before * SUM_BYTES + place);
                            const float4 a = from[0], b = from[1];
                            value[0] += a.x, value[1] += a.y, value[2] += a.z, value[3] += a.w;
                            value[4] += b.x, value[5] += b.y, value[6] += b.z, value[7] += b.w;
                        }
                };
                float value[8], scale = 1, inverse = 1;
#if HALF
                float peak = 0;
#pragma unroll 1
                for (int part = 0; part < RANKS / 32; part++) {
                    collect(value, part);
#pragma unroll
                    for (int i = 0; i < 8; i++) peak = max_abs(peak, value[i]);
                }
                peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 1));
                peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 2));
                if (peak >= 16384 && finite(peak)) {
                    const int exponent = (__float_as_int(peak) >> 23) - 13;  // of the power of two that brings it below 2^14
                    scale = __int_as_float(exponent << 23), inverse = __int_as_float((254 - exponent) << 23);
                }
#endif
#pragma unroll 1
                for (int part = 0; part * 32 < R; part++) {
                    collect(value, part);
                    u32 words[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) words[i] = from_float2(value[2 * i] * inverse, value[2 * i + 1] * inverse);
                    if (row < ROWS)
                        *(uint4*)(low + ((size_t)part * padded + token) * 32 + (L ^ token >> 1 & 3) * 8) =
                            make_uint4(words[0], words[1], words[2], words[3]);
                }
                if (row < ROWS && L == 0) low_scale[token] = token < M ? scale : 0;
            }

            if (RANKS == 0 && R > 0) image_of_low(proj_down, low, low_scale, M, padded, R, tile * ROWS + rank, CTAS, OWN_ROWS);

            const int token = tile * ROWS + my_code_row;
            // The eight lanes of a row read the maxima of up to eight CTAs.
            float m[2], scale[2], inverse[2];
#pragma unroll
            for (int part = 0; part < 2; part++) {
                m[part] = code_lane < CTAS ? floats(at.row_max)[((turn_before * CTAS + code_lane) * 2 + part) * ROWS + my_code_row] : 0;
#pragma unroll
                for (int other = 1; other < CTAS; other *= 2) m[part] = max_abs(m[part], __shfl_xor_sync(~0u, m[part], other));
                m[part] = __shfl_sync(~0u, m[part], lane & 24);
                scale[part] = part_scale(m[part]);
            }
            if (0 < unsigned_from && unsigned_from < K) tie_parts(scale);
            const bool whole = finite(max_abs(m[0], m[1]));
            const u32 keep = whole && token < M ? ~0u : 0;
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const bool used = part ? unsigned_from < K : unsigned_from > 0;
                inverse[part] = inverse_of(scale[part]);
                if (rank == 0 && warp < 4 && code_lane == 0)
                    act_scale[(size_t)part * padded + token] = used ? (whole ? scale[part] : __int_as_float(0x7fffffff)) : 0;
            }
#pragma unroll 1
            for (int block = warp / 4; block < count; block += WARPS / 4) {
                uint4 runs[RUNS];
                float shifts[RUNS], inverses[RUNS];
#pragma unroll
                for (int i = 0; i < RUNS; i++) {
                    const int run = run_of(code_lane, i);
                    runs[i] = load_shared(slot_x + my_code_row * pitch + block * 256 + run * 16);
                    const bool part = (first + block) * 128 + run * 8 >= unsigned_from;
                    shifts[i] = part ? SHIFT : 0;
                    inverses[i] = part ? inverse[1] : inverse[0];
                }
                code_row(runs, at.smooth + block * 512, code_lane, token, token < M, shifts, inverses, keep, false, nullptr,
                         act + ((size_t)(first + block) * padded + token) * 128);
            }
        }
        slot_free = slot_before, slot_before = slot, turn_before = turn;
        if (++slot == slots) slot = 0, parity ^= 1;
        if (++turn == TURNS) turn = 0;
    }
}

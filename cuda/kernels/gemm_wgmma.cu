// The second kernel of an SVDQuant layer on Hopper: y = low_scale (s c W4 X8^T + up low^T) + bias, transposed on its way out.
//
// A CTA is two or three consumer warpgroups of 64 weight rows and one producer warpgroup; its tile is ROWS x TOKENS tokens, and it goes
// from tile to tile (one CTA an SM). Weights travel packed: 4 bits from device memory to registers, where two instructions make int8 of
// four of them, scaled by their group's integer: w8 = i (code), |w8| <= 128. So the int32 sums run over all of K with nothing to do
// between two wgmma, and the row's float scale c and the token's s are applied once, at the end.
//
//           tokens (B, shared memory)                     one stage of the ring:   X  TOKENS x 128 B   codes, INTEGER order, swizzled
//          +----------------+                                                      W  ROWS x 64 B      two codes a byte, natural order
//   64     | warpgroup 0    |  A: weights, registers                               S  2 x ROWS         the two groups' 16-bit scales
//   64     | warpgroup 1    |                             after the K blocks, the branch's blocks of 32 ranks go through the same ring:
//   64     | warpgroup 2    |                                                      X  TOKENS x 64 B    low, 16 bit, swizzled
//          +----------------+                                                      W  ROWS x 64 B      up, 16 bit, swizzled
//
// CLUSTER 2: two CTAs side by side along the weight rows need the same tokens; each fetches half of them for both.
//
// See images.py for the order of the codes: lane q of a weight row reads bytes 16 q .. 16 q + 15 of its 64, which are 32 columns of one
// group. Word s of the four is MMA step s: its low nibbles fill registers 0 and 1, its high nibbles 2 and 3.

#include "common.cuh"
#include "hopper.cuh"
#include "wgmma.cuh"

constexpr int CONSUMERS = ROWS / 64;            // warpgroups
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = ROWS * 64;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int S_BYTES = 2 * ROWS * 2;           // kept apart, so that X stays on 1024 bytes
constexpr int RING = STAGES * STAGE_BYTES;
constexpr int SLICE = 32;                       // tokens that a warpgroup turns and stores at a time
constexpr int SLICE_BYTES = SLICE * 128;
constexpr int STORE_BYTES = 2 * SLICE_BYTES;    // two slices, so that one barrier each is enough
constexpr int FACTOR_BYTES = (3 * TOKENS + 64) * 4;
constexpr int STORES = RING + STAGES * S_BYTES;
constexpr int FACTORS = STORES + CONSUMERS * STORE_BYTES;
constexpr int BARRIERS = FACTORS + CONSUMERS * FACTOR_BYTES;
// A lane's registers at the launch are 128 (four warpgroups) or 168 (three); what the producers give is what the consumers may take.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40, CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS == (CONSUMERS == 3 ? 4 * 128 : 3 * 168), "the CTA's registers");
constexpr int PART = CONSUMERS == 3 ? 32 : 64;  // tokens of the branch's product that fit beside the accumulators
static_assert(BARRIERS + 16 * STAGES <= 232448, "more shared memory than an SM has");
static_assert(CLUSTER == 1 || TOKENS % 16 == 0, "each CTA of a cluster fetches whole atoms of 8 tokens");

// A place in the ring: the stage, and the parity of the barrier's phase.
struct Place {
    int stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
    }
};

struct Problem {
    int blocks, rank_blocks, token_tiles, tiles;
};

// Tiles go down the tokens first: the CTAs at work share few weight rows, and the activation stays in L2.
DEVICE void tile_origin(const Problem& p, int tile, u32 cta, int& m0, int& n0) {
    m0 = tile % p.token_tiles * TOKENS;
    n0 = (tile / p.token_tiles * CLUSTER + (int)cta) * ROWS;
}

// A producer thread's share of W's blocks: 16 bytes of every 32nd row, from the same column of each block.
struct Rows {
    const char* source;
    u32 step;   // bytes from one of its rows to the next
    int count;  // of its rows that exist
    int bytes;  // that its rows have from its column of the first block on
    u32 place;  // of the first row's bytes in the block

    __device__ __forceinline__ Rows(const void* matrix, int row_bytes, int n0, int n, bool swizzled) {
        const int thread = threadIdx.x & 127, row = n0 + (thread >> 2), column = (thread & 3) * 16;
        place = thread * 16 ^ (swizzled ? (thread >> 3 & 3) * 16 : 0);
        source = (const char*)matrix + (size_t)row * row_bytes + column;
        step = 32 * row_bytes;
        count = (n - row + 31) / 32;
        bytes = row_bytes - column;
    }

    // The next block; what is outside the matrix becomes zeros.
    __device__ __forceinline__ void fetch(u32 target) {
#pragma unroll
        for (int i = 0; i < ROWS / 32; i++)
            cp_async16(target + i * 2048 + place, source + i * step, i < count && bytes > 0);
        source += 64;
        bytes -= 64;
    }
};

// Threads 0 .. 47 of the producers: the two groups' scales, 8 rows each.
DEVICE void fetch_scales(u32 target, const u16* scales, int block, int n0, int n, int groups) {
    const int thread = threadIdx.x & 127, second = thread >= ROWS / 8, piece = thread - second * (ROWS / 8), group = 2 * block + second;
    if (thread < ROWS / 4)
        cp_async16(target + thread * 16, scales + (size_t)group * n + n0 + piece * 8, group < groups && n0 + piece * 8 < n);
}

// `rows` tokens of an image's block, which is one contiguous piece of memory.
DEVICE void fetch_tokens(u32 target, const char* image, size_t row_bytes, int rows, u32 barrier, u32 cta) {
    mbarrier_arrive_expect(barrier, rows * row_bytes);
#if CLUSTER == 1
    bulk_copy(target, image, rows * row_bytes, barrier);
#else
    int first = cta * (TOKENS / 2), count = min(rows - first, TOKENS / 2);
    if (count > 0) bulk_copy_multicast(target + first * row_bytes, image + first * row_bytes, count * row_bytes, barrier, 3);
#endif
}

DEVICE void release(u32 barrier) {
    int lane = threadIdx.x & 31;
#if CLUSTER == 1
    if (lane == 0) mbarrier_arrive(barrier);
#else
    if (lane < CLUSTER) mbarrier_arrive_at(barrier, lane);
#endif
}

// Four codes times their group's integer i as int8, twice: of the low nibbles and of the high ones. u = code + 8 is 0..15, so no byte of
// u i + (128 - 8 i) leaves 0..255 for i in -15..16, and turning bit 7 of each takes the 128 off again.
DEVICE void expand(u32 word, u32 multiplier, u32 offset, u32& even, u32& odd) {
    word ^= 0x88888888;
    even = ((word & 0x0f0f0f0f) * multiplier + offset) ^ 0x80808080;
    odd = (((word >> 4) & 0x0f0f0f0f) * multiplier + offset) ^ 0x80808080;
}

// A lane's weights of a block: two rows of 32 columns, each within one group.
struct Weights {
    uint4 a, b;              // rows g and g + 8
    u32 i, j;                // their groups' integers
    u32 offset_i, offset_j;  // 128 - 8 i in each byte

    // w, s: the stage's packed weights and scales, at this lane's place; inverse: 1 / c of the two rows.
    __device__ __forceinline__ void load(u32 w, u32 s, const float* inverse) {
        a = load_shared16(w);
        b = load_shared16(w + 8 * 64);
        i = integer(s, inverse[0]);
        j = integer(s + 8 * 2, inverse[8]);
        offset_i = 0x80808080u - 0x08080808u * i;
        offset_j = 0x80808080u - 0x08080808u * j;
    }

    // The scale at s as a multiple of the row's c. A float of this size counts in ones: its last bits are the rounded integer.
    static __device__ __forceinline__ u32 integer(u32 s, float inverse) {
        return __float_as_int(fmaf(to_float(load_shared2(s)), inverse, 12582912.f)) - 0x4b400000;
    }
};

// One MMA step: d += 32 columns' weights (a of row g, b of row g + 8) times the tokens'. Three may be running while the next expands.
DEVICE void multiply(int (&d)[TOKENS / 2], u32 a, u32 b, const Weights& w, u64 tokens) {
    u32 fragment[4];
    wgmma_wait<3>();  // the registers of four steps ago are free
    expand(a, w.i, w.offset_i, fragment[0], fragment[2]);
    expand(b, w.j, w.offset_j, fragment[1], fragment[3]);
    wgmma_fence();
    wgmma_s8(d, fragment, tokens);
    wgmma_commit();
}

// low_rank (64 rows x PART tokens) = up low^T over all the branch's blocks, left running.
DEVICE void multiply_branch(float (&low_rank)[PART / 2], u32 shared, int warpgroup, int part, Place place, int blocks) {
#pragma unroll 1
    for (int block = 0; block < blocks; block++, place.next()) {
        wgmma_fence();
        const u32 x = shared + place.stage * STAGE_BYTES;
        const u64 up = wgmma_descriptor<64>(x + X_BYTES + warpgroup * 4096), low = wgmma_descriptor<64>(x + part * (PART * 64));
        wgmma_half(low_rank, up, low, block > 0);
        wgmma_half(low_rank, up + 2, low + 2, 1);
    }
    wgmma_commit();
}

extern "C" __global__ void __launch_bounds__(ROWS * 2 + 128, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
gemm(u16* __restrict__ y,                       // (m, n)
     const char* __restrict__ act,              // (blocks, padded_m, 128) int8 image
     const float* __restrict__ act_scale,       // (2, padded_m)
     const char* __restrict__ low,              // (rank_blocks, padded_m, 32) 16-bit image
     const float* __restrict__ low_scale,       // (padded_m) or null
     const char* __restrict__ weight,           // (n, k / 2)
     const u16* __restrict__ weight_scale,      // (k / 64, n)
     const float* __restrict__ row_scale,       // (n)
     const char* __restrict__ up,               // (n, rank)
     const u16* __restrict__ bias,              // (n) or null
     int m, int padded_m, int n, int k, int rank,
     int border,                                // the block at which the second part of the columns begins; 0: one part
     int part) {                                // the row of act_scale that the last part uses
    extern __shared__ __align__(1024) char memory[];
    const u32 shared = shared_address(memory), full = shared + BARRIERS, empty = full + 8 * STAGES;
    const u32 cta = CLUSTER == 1 ? 0 : cluster_rank();
    const int row_tiles = (n + ROWS * CLUSTER - 1) / (ROWS * CLUSTER), token_tiles = (m + TOKENS - 1) / TOKENS;
    const Problem p{(k + 127) / 128, (rank + 31) / 32, token_tiles, row_tiles * token_tiles};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full + 8 * s, 128 + 1);  // the producers' copies, and the one that announces the bulk copy
            mbarrier_init(empty + 8 * s, CONSUMERS * 4 * CLUSTER);
        }
        fence_mbarrier_init();
    }
    if (CLUSTER == 1) __syncthreads(); else cluster_sync();

    const int warpgroup = threadIdx.x / 128;
    Place place;
    if (warpgroup == CONSUMERS) {
        give_registers<PRODUCER_REGISTERS>();
        for (int tile = blockIdx.x / CLUSTER; tile < p.tiles; tile += gridDim.x / CLUSTER) {
            int m0, n0;
            tile_origin(p, tile, cta, m0, n0);
            const int tokens = min(TOKENS, padded_m - m0);
            Rows rows(weight, k / 2, n0, n, false);
#pragma unroll 1
            for (int block = 0; block < p.blocks; block++, place.next()) {
                const u32 x = shared + place.stage * STAGE_BYTES, ready = full + 8 * place.stage;
                mbarrier_wait(empty + 8 * place.stage, place.parity ^ 1);
                if (threadIdx.x == CONSUMERS * 128) fetch_tokens(x, act + ((size_t)block * padded_m + m0) * 128, 128, tokens, ready, cta);
                rows.fetch(x + X_BYTES);
                fetch_scales(shared + RING + place.stage * S_BYTES, weight_scale, block, n0, n, k / 64);
                mbarrier_arrive_after_copies(ready);
            }
            rows = Rows(up, rank * 2, n0, n, true);
#pragma unroll 1
            for (int block = 0; block < p.rank_blocks; block++, place.next()) {
                const u32 x = shared + place.stage * STAGE_BYTES, ready = full + 8 * place.stage;
                mbarrier_wait(empty + 8 * place.stage, place.parity ^ 1);
                if (threadIdx.x == CONSUMERS * 128) fetch_tokens(x, low + ((size_t)block * padded_m + m0) * 64, 64, tokens, ready, cta);
                rows.fetch(x + X_BYTES);
                mbarrier_arrive_after_copies(ready);
            }
        }
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3;
        const int row = warpgroup * 64 + warp * 16 + g;       // of the tile; the lane's other row is 8 below
        const u32 store = shared + STORES + warpgroup * STORE_BYTES;
        // TOKENS each of: the last part's scale, the parts' ratio, low_scale; then 1 / c of the warpgroup's rows.
        float* const factors = (float*)(memory + FACTORS + warpgroup * FACTOR_BYTES);
        for (int tile = blockIdx.x / CLUSTER; tile < p.tiles; tile += gridDim.x / CLUSTER) {
            int m0, n0;
            tile_origin(p, tile, cta, m0, n0);
            barrier_named(1 + warpgroup, 128);  // the tile before is done with `factors`
            for (int i = thread; i < TOKENS; i += 128) {
                const int token = min(m0 + i, padded_m - 1);
                const float first = act_scale[token], last = act_scale[part * padded_m + token];
                factors[i] = last;
                factors[TOKENS + i] = last != 0.f ? first * reciprocal(last) : 0.f;
                factors[2 * TOKENS + i] = low_scale ? low_scale[token] : 1.f;
            }
            if (thread < 64) {
                const float scale = row_scale[min(n0 + warpgroup * 64 + thread, n - 1)];
                factors[3 * TOKENS + thread] = scale != 0.f ? reciprocal(scale) : 0.f;
            }
            barrier_named(1 + warpgroup, 128);

            const u32 w = shared + X_BYTES + row * 64 + q * 16, s = shared + RING + (q >> 1) * (ROWS * 2) + row * 2;
            const float* const inverse = factors + 3 * TOKENS + warp * 16 + g;
            int d[TOKENS / 2];
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
            for (int begin = 0, end = border ? border : p.blocks;; begin = end, end = p.blocks) {
                Weights weights;
                mbarrier_wait(full + 8 * place.stage, place.parity);
                weights.load(w + place.stage * STAGE_BYTES, s + place.stage * S_BYTES, inverse);
#pragma unroll 1
                for (int block = begin; block < end; block++) {
                    const u64 tokens = wgmma_descriptor<128>(shared + place.stage * STAGE_BYTES);
                    multiply(d, weights.a.x, weights.b.x, weights, tokens);
                    multiply(d, weights.a.y, weights.b.y, weights, tokens + 2);
                    multiply(d, weights.a.z, weights.b.z, weights, tokens + 4);
                    wgmma_wait<3>();  // all of the block before is multiplied
                    if (block > begin) release(empty + 8 * (place.stage ? place.stage - 1 : STAGES - 1));
                    multiply(d, weights.a.w, weights.b.w, weights, tokens + 6);
                    place.next();
                    if (block + 1 < end) {
                        mbarrier_wait(full + 8 * place.stage, place.parity);
                        weights.load(w + place.stage * STAGE_BYTES, s + place.stage * S_BYTES, inverse);
                    }
                }
                wgmma_wait<0>();
                release(empty + 8 * (place.stage ? place.stage - 1 : STAGES - 1));
                if (end == p.blocks) break;
                // The parts' scales are within a factor of 16 (quantize.cu), so the sums stay within 32 bits; their rounding is half a
                // unit of the product's last place.
#pragma unroll
                for (int t = 0; t < TOKENS / 8; t++) {
                    const float2 ratio = *(const float2*)&factors[TOKENS + 8 * t + 2 * q];
                    d[4 * t] = __float2int_rn(d[4 * t] * ratio.x);
                    d[4 * t + 1] = __float2int_rn(d[4 * t + 1] * ratio.y);
                    d[4 * t + 2] = __float2int_rn(d[4 * t + 2] * ratio.x);
                    d[4 * t + 3] = __float2int_rn(d[4 * t + 3] * ratio.y);
                }
            }

            // The branch's blocks are all in the ring.
            const int n_a = min(n0 + row, n - 1), n_b = min(n0 + row + 8, n - 1);
            const float scale_a = row_scale[n_a], scale_b = row_scale[n_b];
            const float bias_a = bias ? to_float(bias[n_a]) : 0.f, bias_b = bias ? to_float(bias[n_b]) : 0.f;
            Place branch = place;
            for (int block = 0; block < p.rank_blocks; block++, place.next()) mbarrier_wait(full + 8 * place.stage, place.parity);
            fence_proxy_async();  // `up` was copied by threads, and wgmma reads it
            float low_rank[PART / 2];
#pragma unroll
            for (int slice = 0; slice < TOKENS / SLICE; slice++) {
                const u32 buffer = store + (slice & 1) * SLICE_BYTES;
                if (slice * SLICE % PART == 0 && p.rank_blocks) {
                    multiply_branch(low_rank, shared, warpgroup, slice * SLICE / PART, branch, p.rank_blocks);
                    wgmma_wait<0>();
                }
#pragma unroll
                for (int pair = 0; pair < SLICE / 16; pair++) {
                    u32 packed[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int t = slice * (SLICE / 8) + pair * 2 + i, v = slice * SLICE % PART / 2 + pair * 8 + i * 4;
                        const float2 scale = *(const float2*)&factors[8 * t + 2 * q];
                        float y0 = fmaf(d[4 * t], scale.x * scale_a, bias_a), y1 = fmaf(d[4 * t + 1], scale.y * scale_a, bias_a);
                        float y2 = fmaf(d[4 * t + 2], scale.x * scale_b, bias_b), y3 = fmaf(d[4 * t + 3], scale.y * scale_b, bias_b);
                        if (p.rank_blocks) {
                            const float2 factor = *(const float2*)&factors[2 * TOKENS + 8 * t + 2 * q];
                            y0 = fmaf(low_rank[v], factor.x, y0), y1 = fmaf(low_rank[v + 1], factor.y, y1);
                            y2 = fmaf(low_rank[v + 2], factor.x, y2), y3 = fmaf(low_rank[v + 3], factor.y, y3);
                        }
                        packed[2 * i] = from_float2(y0, y1);
                        packed[2 * i + 1] = from_float2(y2, y3);
                    }
                    // Row = token, 128 bytes of 64 outputs, its 16-byte pieces swizzled against bank conflicts.
                    const int token = pair * 16 + (lane >> 4) * 8 + (lane & 7), piece = warp * 2 + ((lane >> 3) & 1);
                    stmatrix4_transposed(buffer + token * 128 + ((piece ^ (token & 7)) << 4), packed);
                }
                barrier_named(1 + warpgroup, 128);
#pragma unroll
                for (int i = 0; i < SLICE / 16; i++) {
                    const int token = i * 16 + (thread >> 3), piece = thread & 7;
                    const int to_m = m0 + slice * SLICE + token, to_n = n0 + warpgroup * 64 + piece * 8;
                    const uint4 outputs = load_shared16(buffer + token * 128 + ((piece ^ (token & 7)) << 4));
                    if (to_m < m && to_n < n) *(uint4*)(y + (size_t)to_m * n + to_n) = outputs;
                }
            }
            for (int block = 0; block < p.rank_blocks; block++, branch.next()) release(empty + 8 * branch.stage);
        }
    }
    if (CLUSTER > 1) cluster_sync();  // nobody leaves while another may still arrive at its barriers
}

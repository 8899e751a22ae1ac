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
// SPLIT 2: two CTAs share a tile's K. At the end each sends the other its int32 sums of half of the tile's tokens, and finishes its own
// half; integer sums come out the same in any order.
//
// What the end of a tile needs (the tokens' and rows' factors, bias) comes with the tile's first block, into one of two buffers. The
// consumers touch no global memory but y.
//
// See images.py for the order of the codes: lane q of a weight row reads bytes 16 q .. 16 q + 15 of its 64, which are 32 columns of one
// group. Word s of the four is MMA step s: its low nibbles fill registers 0 and 1, its high nibbles 2 and 3.

#include "common.cuh"
#include "gelu.cuh"
#include "hopper.cuh"
#include "wgmma.cuh"

constexpr int CONSUMERS = ROWS / 64;            // warpgroups
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = ROWS * 64;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int S_BYTES = 2 * ROWS * 2;           // kept apart, so that X stays on 1024 bytes
constexpr int RING = STAGES * STAGE_BYTES;
constexpr int OUT = TOKENS / SPLIT;             // tokens whose outputs a CTA finishes
constexpr int SLICE = OUT < 64 ? OUT : 64;      // tokens that a warpgroup turns and stores at a time
constexpr int SLICES = OUT / SLICE;
constexpr int AHEAD = TOKENS == 192 && ROWS == 192 ? 0 : 1;  // slices whose registers fit beside the accumulators, but one
constexpr int SLICE_BYTES = SLICE * 128;
constexpr int STORE_BYTES = (SLICES == 1 ? 1 : 2) * SLICE_BYTES;  // two: one is written while the copy engine reads the other
constexpr int SUM_BYTES = SPLIT == 1 ? 0 : OUT * 64 * 4;  // of a warpgroup, from the CTA that has the rest of K
// Factors of a tile, as offsets: OUT each of the last part's scale, the first's, low_scale; ROWS each of row_scale and bias.
constexpr int LAST = 0, FIRST = OUT * 4, LOW = 2 * OUT * 4, ROW_SCALE = 3 * OUT * 4, BIAS = ROW_SCALE + ROWS * 4;
constexpr int FACTOR_BYTES = BIAS + ROWS * 2;
constexpr int STORES = RING;                    // on 1024 bytes too: the copy engine swizzles by the address
constexpr int SCALES = STORES + CONSUMERS * STORE_BYTES;
constexpr int SUMS = SCALES + STAGES * S_BYTES;
constexpr int FACTORS = SUMS + CONSUMERS * SUM_BYTES;
constexpr int BARRIERS = FACTORS + 2 * FACTOR_BYTES;
// A lane's registers at the launch are 128 (four warpgroups) or 168 (three); what the producers give is what the consumers may take.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40, CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS == (CONSUMERS == 3 ? 4 * 128 : 3 * 168), "the CTA's registers");
static_assert(BARRIERS + 16 * STAGES + 16 + 16 * CONSUMERS <= 232448, "more shared memory than an SM has");
static_assert(STAGES >= 4, "a branch of 128 ranks lies in the ring at once");
static_assert(CLUSTER * SPLIT == 2, "two CTAs share their tokens or their K");
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
    int begin, end;  // the CTA's blocks of K
    int rank_blocks, token_tiles, row_tiles;
};

// A tile of a cluster's. They go down the tokens first: the CTAs at work share few weight rows, and the activation stays in L2.
struct Tile {
    int token, row, token_step, row_step;

    __device__ __forceinline__ Tile(const Problem& p) {
        const int first = blockIdx.x / (CLUSTER * SPLIT), step = gridDim.x / (CLUSTER * SPLIT);
        token = first % p.token_tiles, row = first / p.token_tiles;
        token_step = step % p.token_tiles, row_step = step / p.token_tiles;
    }

    __device__ __forceinline__ bool there(const Problem& p) const { return row < p.row_tiles; }

    __device__ __forceinline__ void next(const Problem& p) {
        token += token_step, row += row_step;
        if (token >= p.token_tiles) token -= p.token_tiles, row++;
    }

    __device__ __forceinline__ bool last(const Problem& p) const {
        Tile following = *this;
        following.next(p);
        return !following.there(p);
    }

    __device__ __forceinline__ int m0() const { return token * TOKENS; }
    __device__ __forceinline__ int n0(u32 cta) const { return (row * CLUSTER + (int)(cta % CLUSTER)) * ROWS; }
};

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

    __device__ __forceinline__ void skip(int blocks) {
        source += blocks * 64;
        bytes -= blocks * 64;
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

// The factors of a tile's tokens and rows; what there is none of becomes zero.
DEVICE void fetch_factors(u32 target, const float* act_scale, int last, bool two, const float* low_scale, const float* row_scale,
                          const u16* bias, int m0, int padded_m, int n0, int n) {
    const int thread = threadIdx.x & 127, token = m0 + thread * 4;
    if (thread < OUT / 4) {
        const bool valid = token < padded_m;
        cp_async16(target + LAST + thread * 16, act_scale + last + token, valid);
        if (two) cp_async16(target + FIRST + thread * 16, act_scale + token, valid);
        if (HALF) cp_async16(target + LOW + thread * 16, low_scale + token, valid && low_scale);
    }
    if (thread < ROWS / 4) cp_async16(target + ROW_SCALE + thread * 16, row_scale + n0 + thread * 4, n0 + thread * 4 < n);
    if (thread < ROWS / 8) cp_async16(target + BIAS + thread * 16, bias + n0 + thread * 8, bias && n0 + thread * 8 < n);
}

// `rows` tokens of an image's block, which is one contiguous piece of memory.
DEVICE void fetch_tokens(u32 target, const char* image, size_t row_bytes, int rows, u32 barrier, u32 cta) {
    mbarrier_arrive_expect(barrier, rows * row_bytes);
#if CLUSTER == 1
    if (rows > 0) bulk_copy(target, image, rows * row_bytes, barrier);
#else
    int first = cta % CLUSTER * (TOKENS / 2), count = min(rows - first, TOKENS / 2);
    u16 ctas = 3 << (cta / CLUSTER * CLUSTER);
    if (count > 0) bulk_copy_multicast(target + first * row_bytes, image + first * row_bytes, count * row_bytes, barrier, ctas);
#endif
}

DEVICE void release(u32 barrier, u32 cta) {
    int lane = threadIdx.x & 31;
#if CLUSTER == 1
    if (lane < ARRIVALS) mbarrier_arrive(barrier);
#else
    const u32 first = cta / CLUSTER * CLUSTER;
    if (ARRIVALS == 1 && lane < CLUSTER) mbarrier_arrive_at(barrier, first + lane);
    for (u32 i = 0; ARRIVALS > 1 && i < CLUSTER; i++) mbarrier_arrive_at(barrier, first + i);
#endif
}

#if HALF
// Two tokens' low_scale; 1 where there are no ranks.
DEVICE float2 load_low_scales(u32 address) {
    const float2 pair = load_shared_float2(address);
    return make_float2(pair.x != 0.f ? pair.x : 1.f, pair.y != 0.f ? pair.y : 1.f);
}
#endif

// 1 / x, and 0 of 0.
DEVICE float inverse_or_zero(float x) { return x != 0.f ? reciprocal_ftz(x) : 0.f; }

// Four codes times their group's integer i as int8, twice: of the low nibbles and of the high ones. u = code + 8 is 0..15, so no byte of
// u i + (128 - 8 i) leaves 0..255 for i in -15..16, and turning bit 7 of each takes the 128 off again.
DEVICE void expand(u32 word, u32 multiplier, u32 offset, u32& even, u32& odd) {
#if SPLIT == 1
    word ^= 0x88888888;
    even = ((word & 0x0f0f0f0f) * multiplier + offset) ^ 0x80808080;
    odd = (((word >> 4) & 0x0f0f0f0f) * multiplier + offset) ^ 0x80808080;
#else  // ptxas makes other instructions of this; small tiles, which wait for them, were 3 % faster
    even = ((word & 0x0f0f0f0f ^ 0x08080808) * multiplier + offset) ^ 0x80808080;
    odd = ((word >> 4 & 0x0f0f0f0f ^ 0x08080808) * multiplier + offset) ^ 0x80808080;
#endif
}

// A lane's weights of a block: two rows of 32 columns, each within one group.
struct Weights {
    uint4 a, b;              // rows g and g + 8
    u32 i, j;                // their groups' integers
    u32 offset_i, offset_j;  // 128 - 8 i in each byte

    // w, s: the stage's packed weights and scales, at this lane's place; inverse: 1 / c of the two rows.
    __device__ __forceinline__ void load(u32 w, u32 s, u32 inverse) {
        a = load_shared16(w);
        b = load_shared16(w + 8 * 64);
        i = integer(s, load_shared_float(inverse));
        j = integer(s + 8 * 2, load_shared_float(inverse + 128));
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

// y (64 rows x SLICE tokens) += up low^T over all the branch's blocks, left running.
DEVICE void multiply_branch(float (&y)[SLICE / 2], u32 shared, int warpgroup, int slice, Place place, int blocks) {
    wgmma_fence();
#pragma unroll 1
    for (int block = 0; block < blocks; block++, place.next()) {
        const u32 x = shared + place.stage * STAGE_BYTES;
        const u64 up = wgmma_descriptor<64>(x + X_BYTES + warpgroup * 4096), low = wgmma_descriptor<64>(x + slice * (SLICE * 64));
        wgmma_half(y, up, low);
        wgmma_half(y, up + 2, low + 2);
    }
    wgmma_commit();
}

extern "C" __global__ void __launch_bounds__(ROWS * 2 + 128, 1)
__cluster_dims__(CLUSTER * SPLIT, 1, 1)
gemm(const __grid_constant__ TensorMap y,       // (m, n), boxes of SLICE x 64
     const char* __restrict__ act,              // (blocks, padded_m, 128) int8 image
     const float* __restrict__ act_scale,       // (2, padded_m)
     const char* __restrict__ low,              // (rank_blocks, padded_m, 32) 16-bit image
     const float* __restrict__ low_scale,       // (padded_m), powers of two, or null; not looked at in bf16, whose are ones
     const char* __restrict__ weight,           // (n, k / 2)
     const u16* __restrict__ weight_scale,      // (k / 64, n)
     const float* __restrict__ row_scale,       // (n)
     const char* __restrict__ up,               // (n, rank)
     const u16* __restrict__ bias,              // (n) or null
     int m, int padded_m, int n, int k, int rank,
     int border,                                // the block at which the second part of the columns begins; 0: one part
     int part                                   // the row of act_scale that the last part uses
#if GELU
     , int gelu_from                            // y's column, a multiple of 64, from which on it is gelu(y)
#endif
    ) {
    extern __shared__ __align__(1024) char memory[];
    // Barriers: the ring's, the factors' buffers read; for each warpgroup the other CTA's sums here, and its buffer read.
    const u32 shared = shared_address(memory), full = shared + BARRIERS, empty = full + 8 * STAGES, used = empty + 8 * STAGES;
    const u32 summed = used + 16, sendable = summed + 8 * CONSUMERS;
    const u32 cta = cluster_rank(), half = cta / CLUSTER;
    const int row_tiles = (n + ROWS * CLUSTER - 1) / (ROWS * CLUSTER), token_tiles = (m + TOKENS - 1) / TOKENS, blocks = (k + 127) / 128;
    const Problem p{blocks * (int)half / SPLIT, blocks * ((int)half + 1) / SPLIT, (rank + 31) / 32, token_tiles, row_tiles};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full + 8 * s, 128 + 1);  // the producers' copies, and the one that announces the bulk copy
            mbarrier_init(empty + 8 * s, CONSUMERS * 4 * CLUSTER * ARRIVALS);
        }
        for (int i = 0; i < 2; i++) mbarrier_init(used + 8 * i, CONSUMERS * 4 * ARRIVALS);
        for (int i = 0; i < CONSUMERS; i++) {
            mbarrier_init(summed + 8 * i, 1);
            mbarrier_init(sendable + 8 * i, 4 * ARRIVALS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    cluster_arrive_relaxed();

    const int warpgroup = threadIdx.x / 128;
    Place place;
    if (warpgroup == CONSUMERS) {
        give_registers<PRODUCER_REGISTERS>();
        // Weights don't wait for the kernel before, which makes the tokens.
        Tile tile(p);
        int early = 0;
        {
            const int n0 = tile.n0(cta);
            Rows rows(weight, k / 2, n0, n, false);
            rows.skip(p.begin);
#pragma unroll 1
            for (; early < min(STAGES, p.end - p.begin); early++) {
                rows.fetch(shared + early * STAGE_BYTES + X_BYTES);
                fetch_scales(shared + SCALES + early * S_BYTES, weight_scale, p.begin + early, n0, n, k / 64);
            }
        }
        cluster_wait();
        wait_for_previous_grid();
        int buffer = 0;
        u32 buffer_parity = 1;
        for (; tile.there(p); tile.next(p)) {
            const int m0 = tile.m0(), n0 = tile.n0(cta);
            const int out_m0 = m0 + half * OUT;
            mbarrier_wait(used + 8 * buffer, buffer_parity);
            fetch_factors(shared + FACTORS + buffer * FACTOR_BYTES, act_scale, part * padded_m, border != 0, low_scale, row_scale, bias,
                          out_m0, padded_m, n0, n);
            buffer_parity ^= buffer;
            buffer ^= 1;
            Rows rows(weight, k / 2, n0, n, false);
            rows.skip(p.begin + early);
#pragma unroll 1
            for (int block = p.begin; block < p.end; block++, place.next()) {
                const u32 x = shared + place.stage * STAGE_BYTES, ready = full + 8 * place.stage;
                mbarrier_wait(empty + 8 * place.stage, place.parity ^ 1);
                if (threadIdx.x == CONSUMERS * 128)
                    fetch_tokens(x, act + ((size_t)block * padded_m + m0) * 128, 128, min(TOKENS, padded_m - m0), ready, cta);
                if (early) {
                    early--;
                } else {
                    rows.fetch(x + X_BYTES);
                    fetch_scales(shared + SCALES + place.stage * S_BYTES, weight_scale, block, n0, n, k / 64);
                }
                mbarrier_arrive_after_copies(ready);
            }
            rows = Rows(up, rank * 2, n0, n, true);
#pragma unroll 1
            for (int block = 0; block < p.rank_blocks; block++, place.next()) {
                const u32 x = shared + place.stage * STAGE_BYTES, ready = full + 8 * place.stage;
                mbarrier_wait(empty + 8 * place.stage, place.parity ^ 1);
                if (threadIdx.x == CONSUMERS * 128)
                    fetch_tokens(x, low + ((size_t)block * padded_m + out_m0) * 64, 64, max(min(OUT, padded_m - out_m0), 0), ready, cta);
                rows.fetch(x + X_BYTES);
                mbarrier_arrive_after_copies(ready);
            }
        }
        cluster_arrive();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        cluster_wait();
        const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3;
        const int row = warpgroup * 64 + warp * 16 + g;       // of the tile; the lane's other row is 8 below
        const u32 store = shared + STORES + warpgroup * STORE_BYTES;
        const u32 w = shared + X_BYTES + row * 64 + q * 16, s = shared + SCALES + (q >> 1) * (ROWS * 2) + row * 2;
        // 1 / row_scale, as registers are short: where nobody but this warp writes its first two tokens' outputs, at the end of the tile.
        const u32 inverse = store + warp * 32 + g * 4;
        u32 factors = shared + FACTORS;
#if SPLIT > 1
        u32 sums_parity = 0;
#endif
        for (Tile tile(p); tile.there(p); tile.next(p)) {
            mbarrier_wait(full + 8 * place.stage, place.parity);
            store_shared4(inverse, __float_as_uint(inverse_or_zero(load_shared_float(factors + ROW_SCALE + row * 4))));
            store_shared4(inverse + 128, __float_as_uint(inverse_or_zero(load_shared_float(factors + ROW_SCALE + row * 4 + 32))));
            __syncwarp();
            int d[TOKENS / 2];
#pragma unroll
            for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
            for (int begin = p.begin, end = SPLIT == 1 && border ? border : p.end;; begin = end, end = p.end) {
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
                    if (block > begin) release(empty + 8 * (place.stage ? place.stage - 1 : STAGES - 1), cta);
                    multiply(d, weights.a.w, weights.b.w, weights, tokens + 6);
                    place.next();
                    if (block + 1 < end) {
                        mbarrier_wait(full + 8 * place.stage, place.parity);
                        weights.load(w + place.stage * STAGE_BYTES, s + place.stage * S_BYTES, inverse);
                    }
                }
                wgmma_wait<0>();
                release(empty + 8 * (place.stage ? place.stage - 1 : STAGES - 1), cta);
                if (end == p.end) break;
                // The parts' scales are within a factor of 16 (codes.cuh), so the sums stay within 32 bits; their rounding is half a
                // unit of the product's last place.
#pragma unroll
                for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const u32 token = factors + 32 * t + 8 * q + 4 * e;
                        const float ratio = load_shared_float(token + FIRST) * inverse_or_zero(load_shared_float(token + LAST));
                        d[4 * t + e] = __float2int_rn(d[4 * t + e] * ratio);
                        d[4 * t + 2 + e] = __float2int_rn(d[4 * t + 2 + e] * ratio);
                    }
            }

#if SPLIT > 1
            {
                const u32 sums = SUMS + warpgroup * SUM_BYTES + thread * 16, other = cta ^ CLUSTER;
                const u32 remote = cluster_address(shared + sums, other), remote_barrier = cluster_address(summed + 8 * warpgroup, other);
                mbarrier_wait(sendable + 8 * warpgroup, sums_parity ^ 1);
                if (thread == 0) mbarrier_arrive_expect(summed + 8 * warpgroup, SUM_BYTES);
#pragma unroll
                for (int i = 0; i < OUT / 2; i += 4) {
                    int sent[4];
#pragma unroll
                    for (int j = i; j < i + 4; j++) {
                        sent[j - i] = half ? d[j] : d[OUT / 2 + j];
                        d[j] = half ? d[OUT / 2 + j] : d[j];
                    }
                    store_async(remote + i * 512, make_int4(sent[0], sent[1], sent[2], sent[3]), remote_barrier);
                }
                mbarrier_wait(summed + 8 * warpgroup, sums_parity);
                sums_parity ^= 1;
#pragma unroll
                for (int i = 0; i < OUT / 2; i += 4) {
                    const uint4 more = load_shared16(shared + sums + i * 512);
                    d[i] += more.x, d[i + 1] += more.y, d[i + 2] += more.z, d[i + 3] += more.w;
                }
                __syncwarp();
                if (lane < ARRIVALS) mbarrier_arrive_at(sendable + 8 * warpgroup, other);
            }
#endif

            // A slice of the tokens at a time: its sums become floats, the branch's product is added to them, and the copy engine stores them.
            // Where registers suffice (AHEAD), the product runs while the slice before is packed.
            const int m0 = tile.m0(), n0 = tile.n0(cta);
            u32 rows = factors;
            asm volatile("" : "+r"(rows));  // the address anew: kept from the tile's beginning, it would be a register too many
            rows += ROW_SCALE + row * 4;
            const float scale_a = load_shared_float(rows), scale_b = load_shared_float(rows + 32);
            const float bias_a = to_float(load_shared2(factors + BIAS + row * 2)), bias_b = to_float(load_shared2(factors + BIAS + row * 2 + 16));
            float out[AHEAD + 1][SLICE / 2];
#if GELU
            const bool activated = n0 + warpgroup * 64 >= gelu_from;  // all of the warpgroup's rows, or none
#endif
#pragma unroll
            for (int turn = 0; turn < SLICES + AHEAD; turn++) {
                if (turn < SLICES) {
                    float (&begun)[SLICE / 2] = out[turn % (AHEAD + 1)];
#pragma unroll
                    for (int t = 0; t < SLICE / 8; t++) {
                        const int v = turn * (SLICE / 2) + 4 * t;
                        const u32 token = factors + (turn * SLICE + 8 * t + 2 * q) * 4;
                        float2 scale = load_shared_float2(token + LAST);
#if HALF
                        const float2 around = load_low_scales(token + LOW);
                        scale.x *= power_inverse(around.x), scale.y *= power_inverse(around.y);
                        const float offset_a = 0.f, offset_b = 0.f;
#else
                        const float offset_a = bias_a, offset_b = bias_b;
#endif
                        begun[4 * t] = fmaf(d[v], scale.x * scale_a, offset_a), begun[4 * t + 1] = fmaf(d[v + 1], scale.y * scale_a, offset_a);
                        begun[4 * t + 2] = fmaf(d[v + 2], scale.x * scale_b, offset_b), begun[4 * t + 3] = fmaf(d[v + 3], scale.y * scale_b, offset_b);
                    }
                    if (turn == 0) {
                        Place branch = place;
                        for (int block = 0; block < p.rank_blocks; block++, branch.next()) mbarrier_wait(full + 8 * branch.stage, branch.parity);
                        fence_proxy_async();  // `up` was copied by threads, and wgmma reads it
                    }
                    multiply_branch(begun, shared, warpgroup, turn, place, p.rank_blocks);
                    if (!AHEAD || !turn) wgmma_wait<0>();
                }
                if (turn < AHEAD) continue;
                const int slice = turn - AHEAD;
                float (&ended)[SLICE / 2] = out[slice % (AHEAD + 1)];
                const u32 target = store + (slice & 1) * SLICE_BYTES;
#pragma unroll
                for (int pair = 0; pair < SLICE / 16; pair++) {
                    u32 packed[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int t = 2 * pair + i;
                        float y0 = ended[4 * t], y1 = ended[4 * t + 1], y2 = ended[4 * t + 2], y3 = ended[4 * t + 3];
#if HALF
                        const float2 around = load_low_scales(factors + LOW + (slice * SLICE + 8 * t + 2 * q) * 4);
                        y0 = fmaf(y0, around.x, bias_a), y1 = fmaf(y1, around.y, bias_a);
                        y2 = fmaf(y2, around.x, bias_b), y3 = fmaf(y3, around.y, bias_b);
#endif
#if GELU
                        if (activated) y0 = gelu(y0), y1 = gelu(y1), y2 = gelu(y2), y3 = gelu(y3);
#endif
                        packed[2 * i] = from_float2(y0, y1);
                        packed[2 * i + 1] = from_float2(y2, y3);
                    }
                    // Row = token, 128 bytes of 64 outputs, its 16-byte pieces swizzled as the copy engine has it.
                    const int token = pair * 16 + (lane >> 4) * 8 + (lane & 7), piece = warp * 2 + ((lane >> 3) & 1);
                    stmatrix4_transposed(target + token * 128 + ((piece ^ (token & 7)) << 4), packed);
                }
                if (slice == SLICES - 1) {
                    if (lane < ARRIVALS) mbarrier_arrive(factors == shared + FACTORS ? used : used + 8);
                    for (int block = 0; block < p.rank_blocks; block++, place.next()) release(empty + 8 * place.stage, cta);
                    if (tile.last(p)) cluster_arrive();  // no CTA is without a tile
                }
                if (thread == 0) bulk_stores_wait_read();  // the slice before, whose memory the next one takes
                barrier_named(1 + warpgroup, 128);
                if (thread == 0) {
                    fence_proxy_async();
                    bulk_store_box(&y, n0 + warpgroup * 64, m0 + half * OUT + slice * SLICE, target);
                }
                if (AHEAD && turn < SLICES) wgmma_wait<0>();
            }
            if (SLICES % 2) {  // the next tile begins with the same half of the memory
                if (thread == 0) bulk_stores_wait_read();
                barrier_named(1 + warpgroup, 128);
            }
            factors = factors == shared + FACTORS ? factors + FACTOR_BYTES : shared + FACTORS;
        }
    }
    if (warpgroup < CONSUMERS && threadIdx.x % 128 == 0) bulk_stores_wait_read();  // the last stores still read shared memory
    cluster_wait();  // nobody leaves while another may still arrive at its barriers
}

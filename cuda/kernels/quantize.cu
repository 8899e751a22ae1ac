// Kernel 1 of a linear: quantize the activation and compute the branch's x @ proj_down, in one pass over x.
//
//     x (M, K) 16 bit  ->  act        codes of (x + shift) / smooth / scale, as an image (cuda/images.py)
//                          act_scale  float32
//                          low        x @ proj_down / low_scale, x's dtype, as an image;  low_scale (Mp) float32
//
// A CTA takes ROWS tokens; a cluster of CTAS of them shares the columns of the same tokens:
//
//              K: blocks of 128 columns
//            +-----------+-----------+-----------+-----------+
//     ROWS   |   CTA 0   |   CTA 1   |   CTA 2   |   CTA 3   |    partial x @ proj_down and row maxima are summed up
//     tokens |           |           |           |           |    in the cluster's shared memory, CTA by CTA: no atomics
//            +-----------+-----------+-----------+-----------+
//
// An int8 code needs the largest value of its whole row, so x waits in shared memory until that is known, and device memory is
// read once. Where a CTA's share is larger than its shared memory, the middle of it is read again (it is in L2 by then). 4-bit
// codes, with a scale for each group of 64 columns, are written as x comes by.
//
// -D: HALF 1 for fp16, else bf16
//     CODES 0 int8, a scale a token and part, INTEGER order; 1 4-bit codes as bytes, GROUP order; 2 4-bit codes, NIBBLE order
//     RANKS 0..128, a multiple of 32: the branch's rank, padded;  TILES ROWS / 16: 1, 2, 4;  CTAS 1..8
#include "quantize.cuh"

enum { INTEGER, GROUP, NIBBLE };
constexpr int ROWS = 16 * TILES;
constexpr int SPANS = 4;                      // warps that share 16 rows; each multiplies 32 of a block's 128 columns
constexpr int THREADS = 32 * SPANS * TILES;
constexpr int DEPTH = 4;                      // blocks of x on their way to shared memory
constexpr int BLOCK_BYTES = ROWS * 256;       // x: 128 columns of all rows
constexpr int SLAB_BYTES = 128 * RANKS * 2;   // proj_down: 128 rows. Later float (ROWS, RANKS), the sums, which are no larger
constexpr int RANK_TILES = RANKS / 8;
constexpr int SLAB_ROW = RANK_TILES > 0 ? RANK_TILES : 1;  // pieces of 8 ranks
constexpr int SLAB_PIECES = RANKS * 16 / THREADS;  // 16-byte pieces of a slab that each thread brings
constexpr int LOW_THREADS = 4 * ROWS / CTAS > 32 ? 4 * ROWS / CTAS : 32;
constexpr int CTAS_PER_SM = TILES == 4 || RANKS > 64 ? 1 : 2;  // at least so many should find registers
constexpr float SHIFT = 0.171875f;            // int4.GELU_SHIFT
constexpr float TINY = 7.888609e-31f;         // 2^-100: maxima below count as 0, since their scale would have no reciprocal
constexpr float MAGIC = 12582912.f;           // 1.5 * 2^23: adding it leaves round(v) in a float's low bits, two's complement

// Shared memory, in its order. `kept` is the number of blocks of reciprocals: all of the CTA's, or 1.
struct Places {
    u32 x;            // [slots] blocks
    u32 slab;         // [RANKS / 32][128 rows][4 pieces]
    u32 smooth;       // [kept][16 runs of 8 columns][4 even, 4 odd] float, 1 / smooth
    u32 warp_max;     // [2 parts][SPANS][ROWS] float
    u32 row_max;      // [2 parts][ROWS] float, of this CTA
    u32 row_inverse;  // [ROWS][2 parts] float, 1 / scale; NaN where the row has one
    __device__ Places(u32 base, int slots, int kept) {
        x = base;
        slab = x + slots * BLOCK_BYTES;
        smooth = slab + SLAB_BYTES;
        warp_max = smooth + kept * 512;
        row_max = warp_max + 2 * SPANS * ROWS * 4;
        row_inverse = row_max + 2 * ROWS * 4;
    }
};

// The first and last blocks of x have slots of their own, those between pass through the last DEPTH slots.
__device__ __forceinline__ int slot_of(int block, int slots) {
    const int own = slots - DEPTH;
    return block < own ? block : own + ((block - own) & (DEPTH - 1));
}

// x: row r has its 16 pieces of 8 columns at piece ^ 4 (r & 1), so that two rows of four neighbouring pieces meet all banks.
__device__ __forceinline__ u32 x_offset(int row, int piece) { return row * 256 + ((piece ^ (row & 1) << 2) << 4); }

// slab: 32 ranks after another; row k has its 4 pieces of 8 ranks at piece ^ (k / 8 % 4): ldmatrix takes k = 8 L + {0, 1}, L = 0..3.
__device__ __forceinline__ u32 slab_offset(int row, int piece) {
    return (((piece >> 2) * 128 + row) * 4 + (piece & 3 ^ row >> 3 & 3)) << 4;
}

// The sums: tile c of 8 ranks lies at c ^ (row & 3).
__device__ __forceinline__ u32 sum_offset(int row, int tile) { return (row * RANKS + ((tile ^ row & 3) << 3)) << 2; }

// max over 8 columns of |(x + shift) / smooth|
__device__ __forceinline__ float max_of_run(uint4 x, const float (&even)[4], const float (&odd)[4], float shift) {
    const u32 words[4] = {x.x, x.y, x.z, x.w};
    float m = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        m = max_abs(m, (low_float(words[i]) + shift) * even[i]);
        m = max_abs(m, (high_float(words[i]) + shift) * odd[i]);
    }
    return m;
}

__device__ __forceinline__ void load_floats(float (&f)[4], u32 address) {
    const uint4 v = load_shared(address);
    f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y), f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
}

// Four codes, in the low bytes of v + MAGIC, as one word.
__device__ __forceinline__ u32 pack_bytes(float a, float b, float c, float d) {
    const u32 ab = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
    const u32 cd = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
    return __byte_perm(ab, cd, 0x5410);
}

// The place of run i (8 columns, as a piece of a block) of those whose codes make up piece `lane` of a row of the image.
// int8 images: a piece is the even or the odd columns of four runs. Nibbles: half a piece is all columns of two runs.
__device__ __forceinline__ int run_of(int lane, int i) {
    const int pair = lane >> 1;
    if (CODES == INTEGER) return 4 * i + pair;
    return 8 * (pair >> 1) + 2 * (CODES == NIBBLE ? 2 * (lane & 1) + i : i) + (pair & 1);
}

constexpr int RUNS = CODES == NIBBLE ? 2 : 4;

// Codes one row's 16 columns, lane 0..7 of the row's eight, from its runs of x.
//     inverse, keep   int8: 1 / scale of each run; ~0, or 0 if the row is NaN
//     scale           4 bits: written by one lane for each group of 64; null where there is no such group or row
__device__ __forceinline__ void code_row(const uint4 (&x)[RUNS], u32 smooth, int lane, int row, bool real, const float (&shift)[RUNS],
                                         const float (&inverse)[RUNS], u32 keep, bool is_unsigned, float* scale, char* image) {
    const int half = lane & 1;
    float v[16];
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
        const u32 words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
        const u32 run = smooth + run_of(lane, i) * 32;
        float even[4], odd[4];
        if (CODES == NIBBLE) {
            load_floats(even, run), load_floats(odd, run + 16);
#pragma unroll
            for (int b = 0; b < 4; b++) {
                v[8 * i + 2 * b] = (low_float(words[b]) + shift[i]) * even[b];
                v[8 * i + 2 * b + 1] = (high_float(words[b]) + shift[i]) * odd[b];
            }
        } else {
            load_floats(even, run + 16 * half);
#pragma unroll
            for (int b = 0; b < 4; b++) v[4 * i + b] = (either_float(words[b], half) + shift[i]) * even[b];
        }
    }
    float local = 0, floor = 0;
    if (CODES != INTEGER) {
        float m = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) m = max_abs(m, v[i]);
        m = max_abs(m, __shfl_xor_sync(~0u, m, 1));
        m = max_abs(m, __shfl_xor_sync(~0u, m, 2));
        if (!real || m < TINY) m = 0;
        const float s = finite(m) ? m * (is_unsigned ? 1 / 15.f : 1 / 7.f) : __int_as_float(0x7fffffff);
        local = s > 0 ? reciprocal(s) : 0;
        keep = finite(m) ? ~0u : 0;
        floor = is_unsigned ? MAGIC : 0;
        if (scale) *scale = s;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        v[i] = fmaf(v[i], CODES == INTEGER ? inverse[i / 4 % RUNS] : local, MAGIC);
        if (CODES != INTEGER) v[i] = fmaxf(v[i], floor);
    }
    if (CODES == NIBBLE) {
        u32 words[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 even = pack_bytes(v[8 * i], v[8 * i + 2], v[8 * i + 4], v[8 * i + 6]);
            const u32 odd = pack_bytes(v[8 * i + 1], v[8 * i + 3], v[8 * i + 5], v[8 * i + 7]);
            words[i] = (even & 0x0f0f0f0f | odd << 4 & 0xf0f0f0f0) & keep;
        }
        if (image) *(uint2*)(image + ((lane >> 1 ^ row >> 1 & 3) << 4) + 8 * half) = make_uint2(words[0], words[1]);
    } else {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = pack_bytes(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]) & keep;
        if (image) *(uint4*)(image + ((lane ^ row & 7) << 4)) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) CLUSTER quantize(
    const u16* x,          // (M, K), rows `stride` apart, 16-byte aligned
    const u16* smooth,     // (K)
    const u16* proj_down,  // (K, R)
    char* act,             // (K blocks, Mp, 128), nibbles (K blocks, Mp, 64)
    float* act_scale,      // int8: (2 parts, Mp), else (K / 64, Mp)
    u16* low,              // (R blocks of 32, Mp, 32)
    float* low_scale,      // (Mp)
    int M, int K, int R, int stride,
    int unsigned_from,     // from this column on, x is shifted, and 4-bit codes are 0..15
    int slots,             // blocks of x that fit in shared memory; at least DEPTH, or all that a CTA has
    int kept) {            // blocks of 1 / smooth that fit: all that a CTA has, or 1
    extern __shared__ __align__(128) unsigned char memory[];
    const Places at(shared_address(memory), slots, kept);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int rank = blockIdx.x % CTAS, first_row = blockIdx.x / CTAS * ROWS;
    const int padded = (M + 15) & ~15;
    const int blocks = (K + 127) / 128, first = blocks * rank / CTAS, count = blocks * (rank + 1) / CTAS - first;

    // The MMA's lane g * 4 + L has rows g and g + 8 of 16, and of each 32 columns 8 L .. 8 L + 7: 16 bytes at once. Which columns
    // a fragment's register stands for is free, as long as proj_down's rows are taken in the same order.
    const int tile = warp / SPANS, span = warp % SPANS, g = lane / 4, L = lane % 4;
    const int my_row = tile * 16 + g;
    // Coding: eight lanes a row, each one 16 bytes of x's image in the end, so that a warp writes whole lines.
    const int code_lane = lane % 8, code_row_ = warp * 4 + lane / 8, token = first_row + code_row_;

    auto fetch = [&](int block) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = (thread + i * THREADS) / 16, piece = thread % 16, column = (first + block) * 128 + piece * 8;
            const bool there = first_row + row < M && column < K;
            const u16* source = x + (there ? (size_t)(first_row + row) * stride + column : 0);
            copy_async(at.x + slot_of(block, slots) * BLOCK_BYTES + x_offset(row, piece), source, there);
        }
    };

    // proj_down and smooth come through registers: they are in L2, and a block ahead is early enough.
    uint4 slab[SLAB_PIECES > 0 ? SLAB_PIECES : 1];
    u32 next_smooth = 0;
    auto load = [&](int block) {
        const int column = (first + block) * 128;
        if (thread < 128) next_smooth = column + thread < K ? smooth[column + thread] : 0;
#pragma unroll
        for (int i = 0; i < SLAB_PIECES; i++) {
            const int index = thread + i * THREADS, k = column + index / SLAB_ROW, piece = index % SLAB_ROW;
            slab[i] = make_uint4(0, 0, 0, 0);
            if (k < K && piece * 8 < R) slab[i] = *(const uint4*)(proj_down + (size_t)k * R + piece * 8);
        }
    };
    auto store_smooth = [&](int block) {
        // A column beyond K has 1 / smooth = 0, and so codes of 0.
        const float s = low_float(next_smooth), r = (first + block) * 128 + thread < K ? reciprocal(s) : 0;
        const u32 address = at.smooth + (kept > 1 ? block : 0) * 512 + (thread / 8 * 8 + thread % 2 * 4 + thread / 2 % 4) * 4;
        if (thread < 128) store_float(address, r);
    };
    auto store = [&](int block) {
        store_smooth(block);
#pragma unroll
        for (int i = 0; i < SLAB_PIECES; i++) {
            const int index = thread + i * THREADS;
            store_shared(at.slab + slab_offset(index / SLAB_ROW, index % SLAB_ROW), slab[i]);
        }
    };

    // Codes `block`: its rows' x from shared or, `again`, from global memory.
    auto code = [&](int block, bool again, const float (&inverse)[2], u32 keep) {
        const int column = (first + block) * 128;
        uint4 runs[RUNS];
        float shifts[RUNS], inverses[RUNS];
        bool is_unsigned = false;
        const bool real = token < M;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const int run = run_of(code_lane, i), start = column + run * 8;
            const u32 address = at.x + slot_of(block, slots) * BLOCK_BYTES + x_offset(code_row_, run);
            if (!again) runs[i] = load_shared(address);
            else if (real && start < K) runs[i] = *(const uint4*)(x + (size_t)token * stride + start);
            else runs[i] = make_uint4(0, 0, 0, 0);
            is_unsigned = start >= unsigned_from;
            shifts[i] = is_unsigned ? SHIFT : 0;
            inverses[i] = is_unsigned ? inverse[1] : inverse[0];
        }
        const int group = (column >> 6) + (code_lane >> 2);
        const bool scaled = CODES != INTEGER && (lane & 3) == 0 && token < padded && group * 64 < K;
        code_row(runs, at.smooth + (kept > 1 ? block : 0) * 512, code_lane, token, real, shifts, inverses, keep, is_unsigned,
                 scaled ? act_scale + (size_t)group * padded + token : nullptr,
                 token < padded ? act + ((size_t)(first + block) * padded + token) * (CODES == NIBBLE ? 64 : 128) : nullptr);
    };

    // --- The pass over x ---
    if (count > 0) load(0);
#pragma unroll
    for (int block = 0; block < DEPTH; block++) {
        if (block < count) fetch(block);
        copies_commit();
    }
    float sums[RANK_TILES > 0 ? RANK_TILES : 1][4] = {};
    float row_max[2][2] = {};  // [part][rows g, g + 8]
#pragma unroll 1
    for (int block = 0; block < count; block++) {
        store(block);
        if (block + 1 < count) load(block + 1);
        copies_wait<DEPTH - 1>();
        __syncthreads();
        if (RANKS > 0 || CODES == INTEGER) {
            const u32 mine = at.x + slot_of(block, slots) * BLOCK_BYTES;
            const uint4 a = load_shared(mine + x_offset(my_row, 4 * span + L)), b = load_shared(mine + x_offset(my_row + 8, 4 * span + L));
            if (CODES == INTEGER) {
                const u32 run = at.smooth + (kept > 1 ? block : 0) * 512 + (4 * span + L) * 32;
                float even[4], odd[4];
                load_floats(even, run), load_floats(odd, run + 16);
                const bool part = (first + block) * 128 + span * 32 >= unsigned_from;
                const float shift = part ? SHIFT : 0;
                const float of_a = max_of_run(a, even, odd, shift), of_b = max_of_run(b, even, odd, shift);
                row_max[0][0] = max_abs(row_max[0][0], part ? 0 : of_a), row_max[0][1] = max_abs(row_max[0][1], part ? 0 : of_b);
                row_max[1][0] = max_abs(row_max[1][0], part ? of_a : 0), row_max[1][1] = max_abs(row_max[1][1], part ? of_b : 0);
            }
#pragma unroll
            for (int step = 0; step < 2; step++) {
                // Matrix i of ldmatrix: rows (k) 4 step + 2 (i & 1) + {0, 1} of each run, ranks of tile t + (i >> 1).
                const int k = 32 * span + 8 * (lane % 8 / 2) + 4 * step + 2 * (lane / 8 & 1) + lane % 2;
#pragma unroll
                for (int t = 0; t < RANK_TILES; t += 2) {
                    const uint4 m = load_transposed(at.slab + slab_offset(k, t + lane / 16));
                    mma(sums[t], step ? a.z : a.x, step ? b.z : b.x, step ? a.w : a.y, step ? b.w : b.y, m.x, m.y);
                    mma(sums[t + 1], step ? a.z : a.x, step ? b.z : b.x, step ? a.w : a.y, step ? b.w : b.y, m.z, m.w);
                }
            }
        }
        if (CODES != INTEGER) code(block, false, {0, 0}, 0);
        __syncthreads();
        if (block + DEPTH < count) fetch(block + DEPTH);
        copies_commit();
    }

    // --- The CTA's sums and maxima, in shared memory ---
    if (CODES == INTEGER) {
#pragma unroll
        for (int part = 0; part < 2; part++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float m = row_max[part][half];
                m = max_abs(m, __shfl_xor_sync(~0u, m, 1));
                m = max_abs(m, __shfl_xor_sync(~0u, m, 2));
                const u32 address = at.warp_max + ((part * SPANS + span) * ROWS + my_row + 8 * half) * 4;
                if (L == 0) store_float(address, m);
            }
    }
#pragma unroll
    for (int turn = 0; turn < (RANKS ? SPANS : 0); turn++) {
        if (span == turn)
#pragma unroll
            for (int t = 0; t < RANK_TILES; t++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float2* sum = (float2*)(memory + (at.slab - at.x) + sum_offset(my_row + 8 * half, t) + 8 * L);
                    const float2 before = turn ? *sum : make_float2(0, 0);
                    *sum = make_float2(before.x + sums[t][2 * half], before.y + sums[t][2 * half + 1]);
                }
        __syncthreads();
    }
    if (CODES == INTEGER) {
        if (!RANKS) __syncthreads();
        if (thread < 2 * ROWS) {
            const int part = thread / ROWS, row = thread % ROWS;
            float m = 0;
#pragma unroll
            for (int s = 0; s < SPANS; s++) m = max_abs(m, *(const float*)(memory + (at.warp_max - at.x) + ((part * SPANS + s) * ROWS + row) * 4));
            *(float*)(memory + (at.row_max - at.x) + thread * 4) = first_row + row < M ? m : 0;
        }
    }
    if (CODES != INTEGER && !RANKS) return;

    // --- The cluster's ---
    cluster_arrive();
    cluster_wait();
    if (CODES == INTEGER && thread < ROWS) {
        float m[2], s[2];
#pragma unroll
        for (int part = 0; part < 2; part++) {
            m[part] = 0;
#pragma unroll
            for (int cta = 0; cta < CTAS; cta++) m[part] = max_abs(m[part], load_float_at(address_at(at.row_max + (part * ROWS + thread) * 4, cta)));
            s[part] = m[part] < TINY ? 0 : m[part] * (1 / 127.f);
        }
        if (0 < unsigned_from && unsigned_from < K) {  // so that the GEMM can carry one part's sum over to the other's scale
            const float other = s[0] * (1 / 16.f);
            s[0] = fmaxf(s[0], s[1] * (1 / 16.f));
            s[1] = fmaxf(s[1], other);
        }
        const bool whole = finite(max_abs(m[0], m[1]));
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const bool used = part ? unsigned_from < K : unsigned_from > 0;
            const float nan = __int_as_float(0x7fffffff);
            *(float*)(memory + (at.row_inverse - at.x) + (thread * 2 + part) * 4) = whole ? (s[part] > 0 ? reciprocal(s[part]) : 0) : nan;
            if (rank == 0 && first_row + thread < padded)
                act_scale[(size_t)part * padded + first_row + thread] = used ? (whole ? s[part] : nan) : 0;
        }
    }
    if (RANKS && thread >= THREADS - LOW_THREADS) {
        // The CTA finishes every CTAS-th row, four lanes a row, each a piece of 8 ranks of every 32.
        const int index = thread - (THREADS - LOW_THREADS), row = index / 4 * CTAS + rank;
        float value[RANKS / 32 + 1][8] = {};
        float peak = 0;
        if (row < ROWS)
#pragma unroll
            for (int part = 0; part < RANKS / 32; part++) {
#pragma unroll
                for (int cta = 0; cta < CTAS; cta++) {
                    const u32 there = address_at(at.slab + sum_offset(row, 4 * part + L), cta);
                    const float4 a = load_floats_at(there), b = load_floats_at(there + 16);
                    value[part][0] += a.x, value[part][1] += a.y, value[part][2] += a.z, value[part][3] += a.w;
                    value[part][4] += b.x, value[part][5] += b.y, value[part][6] += b.z, value[part][7] += b.w;
                }
#pragma unroll
                for (int i = 0; i < 8; i++) peak = max_abs(peak, value[part][i]);
            }
        float scale = 1, inverse = 1;
#if HALF
        peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 1));
        peak = max_abs(peak, __shfl_xor_sync(~0u, peak, 2));
        if (peak >= 16384 && finite(peak)) {
            const int exponent = (__float_as_int(peak) >> 23) - 13;  // of the power of two that brings it below 2^14
            scale = __int_as_float(exponent << 23), inverse = __int_as_float((254 - exponent) << 23);
        }
#endif
        const int t = first_row + row;
        if (row < ROWS && t < padded) {
#pragma unroll
            for (int part = 0; part < RANKS / 32; part++) {
                u32 words[4];
#pragma unroll
                for (int i = 0; i < 4; i++) words[i] = pack_halves(value[part][2 * i] * inverse, value[part][2 * i + 1] * inverse);
                *(uint4*)(low + ((size_t)part * padded + t) * 32 + (L ^ t >> 1 & 3) * 8) = make_uint4(words[0], words[1], words[2], words[3]);
            }
            if (L == 0) low_scale[t] = t < M ? scale : 0;
        }
    }
    cluster_arrive();  // this CTA has read what it wants of the others
    if (CODES == INTEGER) {
        if (CTAS > 1) __syncthreads();
        const float2 pair = *(const float2*)(memory + (at.row_inverse - at.x) + code_row_ * 8);
        const float inverse[2] = {pair.x, pair.y};
        const u32 keep = pair.x == pair.x ? ~0u : 0;
#pragma unroll 1
        for (int block = 0; block < count; block++) {
            if (kept == 1 && count > 1) {
                __syncthreads();
                if (thread < 128) next_smooth = (first + block) * 128 + thread < K ? smooth[(first + block) * 128 + thread] : 0;
                store_smooth(block);
                __syncthreads();
            }
            code(block, block >= slots - DEPTH && block < count - DEPTH, inverse, keep);
        }
    }
    cluster_wait();  // the others have read what they want of this one
}

// From x to codes: what the kernels that quantize an activation share. CODES says how codes are stored (cuda/images.py):
// 0 int8, a scale a token and part, INTEGER order; 1 4-bit codes as bytes, GROUP order; 2 4-bit codes, NIBBLE order.
#pragma once
#include "quantize.cuh"

enum { INTEGER, GROUP, NIBBLE };
constexpr float SHIFT = 0.171875f;            // int4.GELU_SHIFT
constexpr float TINY = 7.888609e-31f;         // 2^-100: maxima below count as 0, since their scale would have no reciprocal
constexpr float MAGIC = 12582912.f;           // 1.5 * 2^23: adding it leaves round(v) in a float's low bits, two's complement

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
    float local = 0, floor = 0, ceiling = 0;
    if (CODES != INTEGER) {
        float m = 0, high = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) m = max_abs(m, v[i]), high = fmaxf(high, v[i]);
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            m = max_abs(m, __shfl_xor_sync(~0u, m, lanes));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, lanes));
        }
        if (!real || m < TINY) m = 0;
        // Without a sign the largest is 15. With one, whichever sign it has, it is -8: a positive one makes the scale negative.
        const float unit = is_unsigned ? 1 / 15.f : m > 0 && high == m ? -1 / 8.f : 1 / 8.f;
        const float s = finite(m) ? m * unit : __int_as_float(0x7fffffff);
        local = s != 0 ? reciprocal(s) : 0;
        keep = real && finite(m) ? ~0u : 0;
        floor = is_unsigned ? MAGIC : 0, ceiling = is_unsigned ? MAGIC + 15 : MAGIC + 7;
        if (scale) *scale = s;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        v[i] = fmaf(v[i], CODES == INTEGER ? inverse[i / 4 % RUNS] : local, MAGIC);
        if (CODES != INTEGER) v[i] = fminf(fmaxf(v[i], floor), ceiling);
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

// The scale of a row's part from its largest value. One division by 127 would bring a CALL.
__device__ __forceinline__ float part_scale(float m) { return m < TINY ? 0 : m * (1 / 127.f); }

// Keeps the scales of a row's two parts within a factor of 16, so that the GEMM can carry one part's sum over to the other's scale.
__device__ __forceinline__ void tie_parts(float (&s)[2]) {
    const float first = s[0];
    s[0] = fmaxf(s[0], s[1] * (1 / 16.f)), s[1] = fmaxf(s[1], first * (1 / 16.f));
}

// 1 / scale, or 0 for a row of zeros.
__device__ __forceinline__ float inverse_of(float s) { return s > 0 ? reciprocal(s) : 0; }

// The encoding of x, for both kernels that quantize an activation. CODES is a CodeStorage (common.cuh).
#pragma once
#include "group.cuh"

// max over 8 columns of |(x + shift) / smooth|
DEVICE float max_of_run(uint4 x, const float (&even)[4], const float (&odd)[4], float shift) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
  float m = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    m = max_abs(m, (low_float(words[i]) + shift) * even[i]);
    m = max_abs(m, (high_float(words[i]) + shift) * odd[i]);
  }
  return m;
}

// Piece `lane` of a row of the activation layout holds the codes of several runs of 8 columns; this is the index of the i-th such run in
// its block. With codes in bytes, a piece holds the even or the odd columns of four runs. With nibbles, half a piece holds two runs.
DEVICE int run_of(int lane, int i) {
  const int pair = lane >> 1;
  if (CODES == INT8) return 4 * i + pair;
  return 8 * (pair >> 1) + 2 * (CODES == INT4_NIBBLES ? 2 * (lane & 1) + i : i) + (pair & 1);
}

constexpr int RUNS = CODES == INT4_NIBBLES ? 2 : 4;

// Encodes 16 columns of a row, from runs of x to `target`, the row in the activation layout. Eight lanes encode a row.
//     inverse, keep   int8: 1 / scale of each run; ~0, or 0 if the row is NaN
//     scale           4 bits: one lane writes it for each group of 64; null if there is no such group or row
DEVICE void encode_row(const uint4 (&x)[RUNS], u32 smooth, int lane, int row, bool real, const float (&shift)[RUNS],
                       const float (&inverse)[RUNS], u32 keep, bool is_unsigned, float* scale, char* target) {
  const int half = lane & 1;
  float v[16];
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const u32 words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
    const u32 run = smooth + run_of(lane, i) * 32;
    float even[4], odd[4];
    if (CODES == INT4_NIBBLES) {
      load_shared_floats(even, run), load_shared_floats(odd, run + 16);
#pragma unroll
      for (int b = 0; b < 4; b++) {
        v[8 * i + 2 * b] = (low_float(words[b]) + shift[i]) * even[b];
        v[8 * i + 2 * b + 1] = (high_float(words[b]) + shift[i]) * odd[b];
      }
    } else {
      load_shared_floats(even, run + 16 * half);
#pragma unroll
      for (int b = 0; b < 4; b++) v[4 * i + b] = (either_float(words[b], half) + shift[i]) * even[b];
    }
  }
  Group group = {};
  if (CODES != INT8) {
    group = group_of<1, 2>(v, real, is_unsigned);
    keep = group.keep;
    if (scale) *scale = group.scale;
  }
#pragma unroll
  for (int i = 0; i < 16; i++) v[i] = CODES == INT8 ? fmaf(v[i], inverse[i / 4 % RUNS], MAGIC) : group.code(v[i]);
  if (CODES == INT4_NIBBLES) {
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; i++) words[i] = pack_nibbles(v + 8 * i) & keep;
    if (target) *(uint2*)(target + ((lane >> 1 ^ row >> 1 & 3) << 4) + 8 * half) = make_uint2(words[0], words[1]);
  } else {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = pack_bytes(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]) & keep;
    if (target) *(uint4*)(target + ((lane ^ row & 7) << 4)) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The scale of a row's part from its largest value. A division by 127 would compile to a CALL.
DEVICE float part_scale(float m) { return m < TINY ? 0 : m * (1 / 127.f); }

// Keeps the scales of a row's two parts within a factor of 16, so that the GEMM can convert one part's sum to the other's scale.
DEVICE void tie_parts(float (&s)[2]) {
  const float first = s[0];
  s[0] = fmaxf(s[0], s[1] * (1 / 16.f)), s[1] = fmaxf(s[1], first * (1 / 16.f));
}

// 1 / scale, or 0 for a row of zeros.
DEVICE float inverse_scale(float s) { return s > 0 ? reciprocal(s) : 0; }

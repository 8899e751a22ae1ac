// The 4-bit codes of a group of 64 columns of a token, for the kernels that quantize x and the GEMM that ends with codes.
#pragma once
#include "quantize.cuh"

constexpr float SHIFT = 0.171875f;            // int4.GELU_SHIFT
constexpr float TINY = 7.888609e-31f;         // 2^-100: smaller maxima count as 0, so that every scale has a finite reciprocal

// A group's scale, and the encoding of its numbers.
struct Group {
  float scale, inverse, floor, ceiling;
  u32 keep;  // ~0, or 0 to make all codes 0, for NaN, Inf or a missing token

  // The code of v, in the low bits of a float.
  DEVICE float code(float v) const { return fminf(fmaxf(fmaf(v, inverse, MAGIC), floor), ceiling); }
};

// Computes the scale from all numbers of the group. This lane has COUNT of them; the lanes whose indices differ in bits FIRST .. LAST have
// the others. real: whether the token exists.
template <int FIRST, int LAST, int COUNT>
DEVICE Group group_of(const float (&v)[COUNT], bool real, bool is_unsigned) {
  Group group;
  float m = 0, high = 0;  // the largest magnitude; the largest number, or 0 if all are negative
#pragma unroll
  for (int i = 0; i < COUNT; i++) m = max_abs(m, v[i]), high = fmaxf(high, v[i]);
#pragma unroll
  for (int lanes = FIRST; lanes <= LAST; lanes *= 2) {
    m = max_abs(m, __shfl_xor_sync(~0u, m, lanes));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, lanes));
  }
  if (!real || m < TINY) m = 0;
  // The largest unsigned number gets code 15. The largest signed magnitude gets code -8; if that number is positive, the scale is negative.
  const float unit = is_unsigned ? 1 / 15.f : m > 0 && high == m ? -1 / 8.f : 1 / 8.f;
  group.scale = finite(m) ? m * unit : __int_as_float(0x7fffffff);
  group.inverse = group.scale != 0 ? reciprocal(group.scale) : 0;
  group.keep = real && finite(m) ? ~0u : 0;
  group.floor = is_unsigned ? MAGIC : 0, group.ceiling = is_unsigned ? MAGIC + 15 : MAGIC + 7;
  return group;
}

// Four codes, in the low bytes of v + MAGIC, as one word.
DEVICE u32 pack_bytes(float a, float b, float c, float d) {
  const u32 ab = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  const u32 cd = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(ab, cd, 0x5410);
}

// Eight codes, two per byte.
DEVICE u32 pack_nibbles(const float* v) {
  return pack_bytes(v[0], v[2], v[4], v[6]) & 0x0f0f0f0f | pack_bytes(v[1], v[3], v[5], v[7]) << 4 & 0xf0f0f0f0;
}

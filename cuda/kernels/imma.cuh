// Integer MMAs of 16 weight rows by 8 tokens: one Ampere instruction, or four Turing instructions of a quarter of its size.
//
// With g = lane / 4 and q = lane % 4:
//   a[0..3]  rows g, g + 8, g, g + 8; the lane's 4 bytes of the first half of the columns, the first, the last, the last
//   b[0..1]  token g; the lane's 4 bytes of the first half of the columns, of the last
//   d[0..3]  (g, 2 q), (g, 2 q + 1), (g + 8, 2 q), (g + 8, 2 q + 1)
#pragma once
#include "common.cuh"

#ifndef TURING
#define TURING (__CUDA_ARCH__ < 800)  // -DTURING=1 tests Turing's path on a newer GPU
#endif

#define IMMA_16(shape, types)                                                                                    \
  asm("mma.sync.aligned." shape ".row.col.s32." types ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "      \
      "{%10, %11, %12, %13};"                                                                                    \
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))

#define IMMA_8(shape, types, x, y, a, b, cx, cy)                                                                 \
  asm("mma.sync.aligned." shape ".row.col.s32." types ".s32 {%0, %1}, {%2}, {%3}, {%4, %5};"                     \
      : "=r"(x), "=r"(y) : "r"(a), "r"(b), "r"(cx), "r"(cy))

#if TURING
#define IMMA(shape16, shape8, types)                                 \
  int t[4];                                                          \
  IMMA_8(shape8, types, t[0], t[1], a[0], b[0], c[0], c[1]);         \
  IMMA_8(shape8, types, t[2], t[3], a[1], b[0], c[2], c[3]);         \
  IMMA_8(shape8, types, d[0], d[1], a[2], b[1], t[0], t[1]);         \
  IMMA_8(shape8, types, d[2], d[3], a[3], b[1], t[2], t[3])
#else
#define IMMA(shape16, shape8, types) IMMA_16(shape16, types)
#endif

// d = a (16 x 64, signed 4 bit) b (64 x 8, 4 bit, signed or not) + c
template <bool b_unsigned>
DEVICE void imma_4bit(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
  if (b_unsigned) {
    IMMA("m16n8k64", "m8n8k32", "s4.u4");
  } else {
    IMMA("m16n8k64", "m8n8k32", "s4.s4");
  }
}

// d = a (16 x 32, int8) b (32 x 8, int8) + c
DEVICE void imma_8bit(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const int (&c)[4]) {
  IMMA("m16n8k32", "m8n8k16", "s8.s8");
}

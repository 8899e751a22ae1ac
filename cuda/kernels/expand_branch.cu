// A low-rank branch in 8 bits, expanded to 16 bits for a call of its layer:
//
//     out[row][r] = code[row][r] * scale[row], rounded once
//
// The rows of proj_down come first, then those of proj_up, in `scale` and in `out`. A thread expands a piece of 16 ranks of one row.
//
// -D: HALF as in common.cuh
#include "common.cuh"

// Four codes, the first in the low byte, as two words.
DEVICE uint2 expand4(u32 codes, float scale) {
  float f[4];
#pragma unroll
  for (int i = 0; i < 4; i++) f[i] = (float)(signed char)(codes >> 8 * i) * scale;
  return make_uint2(from_float2(f[0], f[1]), from_float2(f[2], f[3]));
}

extern "C" __global__ void __launch_bounds__(256) expand_branch(
    const uint4* __restrict__ proj_down,   // (K, R) int8, in pieces
    const uint4* __restrict__ proj_up,     // (N, R) int8, in pieces
    const u16* __restrict__ scale,         // (K + N,) bf16
    uint4* __restrict__ out,               // (K + N, R)
    int down_pieces,                       // K * R / 16
    int pieces,                            // (K + N) * R / 16
    int row_pieces) {                      // R / 16
  wait_for_previous_grid();
  const int piece = blockIdx.x * 256 + threadIdx.x;
  if (piece >= pieces) return;
  const uint4 codes = load_once16(piece < down_pieces ? proj_down + piece : proj_up + (piece - down_pieces));
  const float row_scale = __uint_as_float((u32)scale[piece / row_pieces] << 16);  // bf16, also where HALF
  const uint2 a = expand4(codes.x, row_scale), b = expand4(codes.y, row_scale);
  const uint2 c = expand4(codes.z, row_scale), d = expand4(codes.w, row_scale);
  out[2 * piece] = make_uint4(a.x, a.y, b.x, b.y);
  out[2 * piece + 1] = make_uint4(c.x, c.y, d.x, d.y);
}

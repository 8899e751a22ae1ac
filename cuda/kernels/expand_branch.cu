// Low-rank branches in 8 bits, expanded to 16 bits for the calls of their layers:
//
//     out[row][r] = code[row][r] * scale[row], rounded once
//
// The rows of proj_down come first, then those of proj_up, in `scale` and in `out`. A thread expands a piece of 16 ranks of one row. A CTA
// works for one layer of the table: the last one whose first CTA is not behind it.
//
// -D: HALF as in common.cuh, LAYERS of the table
#include "common.cuh"

// The branch of a layer. Each field takes 8 bytes, as expand_branch.py writes it.
struct Branch {
  const uint4* proj_down;  // (K, R) int8, in pieces
  const uint4* proj_up;    // (N, R) int8, in pieces
  const u16* scale;        // (K + N,) bf16
  long long offset;        // where the expanded branch (K + N, R) begins, in pieces of 16 bytes
  long long first_cta;     // a number that no CTA has, where the table has no further layer
  long long down_pieces;   // K * R / 16
  long long pieces;        // (K + N) * R / 16
  long long row_pieces;    // R / 16
};

struct Branches {
  Branch of[LAYERS];
};

// Four codes, the first in the low byte, as two words.
DEVICE uint2 expand4(u32 codes, float scale) {
  float f[4];
#pragma unroll
  for (int i = 0; i < 4; i++) f[i] = (float)(signed char)(codes >> 8 * i) * scale;
  return make_uint2(from_float2(f[0], f[1]), from_float2(f[2], f[3]));
}

extern "C" __global__ void __launch_bounds__(256) expand_branch(
    uint4* __restrict__ out, const __grid_constant__ Branches branches) {
  int layer = 0;
#pragma unroll
  for (int next = 1; next < LAYERS; next++) layer += (int)blockIdx.x >= (int)branches.of[next].first_cta;
  const Branch& branch = branches.of[layer];
  const int piece = ((int)blockIdx.x - (int)branch.first_cta) * 256 + threadIdx.x, down_pieces = (int)branch.down_pieces;
  wait_for_previous_grid();
  if (piece >= (int)branch.pieces) return;
  const uint4 codes = load_once16(piece < down_pieces ? branch.proj_down + piece : branch.proj_up + (piece - down_pieces));
  const float row_scale = __uint_as_float((u32)branch.scale[piece / (int)branch.row_pieces] << 16);  // bf16, also where HALF
  const uint2 a = expand4(codes.x, row_scale), b = expand4(codes.y, row_scale);
  const uint2 c = expand4(codes.z, row_scale), d = expand4(codes.w, row_scale);
  uint4* const to = out + branch.offset + 2 * piece;
  to[0] = make_uint4(a.x, a.y, b.x, b.y);
  to[1] = make_uint4(c.x, c.y, d.x, d.y);
}

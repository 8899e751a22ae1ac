// y = x W^T + bias with W = (code - 8) * scale + zero: 4-bit weights, 16-bit activations (W4A16), a scale and a zero a group of 64.
//
// FLUX's modulation layers: one token a picture and megabytes of weights, so all that counts is that the weights stream. Tensor
// cores do the sums, because at 8 tokens the CUDA cores would take longer than the memory: the weights are the MMA's A operand
// (16 rows), the tokens its B operand (8 columns, those beyond M zero). Within a group the weights are the integers code - 8,
// exact in 16 bits; fp32 scales each group's sum:
//
//   y[m, n] = sum over groups of  scale[g, n] * (sum over k of (code - 8) x[m, k])  +  zero[g, n] * (sum over k of x[m, k])
//
// The second sum is an MMA with ones: it lands in the registers where it is wanted, and the tensor cores are idle anyway.
//
//   CTA   16 rows of W, 8 * TILES tokens; blockIdx.x the rows, blockIdx.y the tokens
//   warp  groups warp, warp + WARPS, ...: neighbours in a row are read at the same time. Each warp copies what it reads itself, so
//         no warp waits for another before the end, where their sums are added in the order of the warps.
//   lane  with r = lane / 4 and q = lane % 4: of each group columns 16 q .. 16 q + 15 of rows 2 r and 2 r + 1 (MMA rows r and r + 8)
//         and of tokens r + 8 t
//
// A warp's ring in shared memory has DEPTH slots of one group, all of them under way as soon as the kernel starts:
//
//   bytes   0..255  rows 0, 2, .. 14, 32 bytes of codes each      512..543  scales of rows 0 .. 15
//         256..511  rows 1, 3, .. 15                              544..575  zeros
//
// (A lane's two rows lie 256 bytes apart, so that the 32 lanes' 8-byte reads of either are 256 bytes in a row: no bank conflicts.)
//
// The order of the columns in an MMA is free as long as A and B agree: MMA j of a group takes lane q's columns
//   j, j + 4 (A registers 0, 1 and B register 0)  and  j + 8, j + 12 (A registers 2, 3 and B register 1)
// since nibbles four apart come out of a word with one shift and one mask.

#include "common.cuh"

#ifndef TILES
#define TILES 1
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef DEPTH
#define DEPTH 6  // with 8 warps all of K = 3072
#endif

constexpr int ROWS = 16;
constexpr int TOKENS = 8 * TILES;
constexpr int SLOT = ROWS * 32 + 2 * ROWS * 2;  // bytes of a group
constexpr int PITCH = ROWS + 4;                 // floats between the tokens of a warp's sums
constexpr int RING = WARPS * DEPTH * SLOT, SUMS = WARPS * TOKENS * PITCH * 4;

// Codes `shift` / 4 and `shift` / 4 + 4 of a word, less 8, as two 16-bit floats. A nibble in the low mantissa bits of 128 (bf16)
// or 1024 (fp16) adds its value; the subtraction is exact.
DEVICE u32 weights(u32 word, int shift) {
#if HALF
  u32 biased = (word >> shift) & 0x000f000fu | 0x64006400u, d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(biased), "r"(0x3c003c00u), "r"(0xe408e408u));
#else
  u32 biased = (word >> shift) & 0x000f000fu | 0x43004300u, d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(biased), "r"(0x3f803f80u), "r"(0xc308c308u));
#endif
  return d;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, TILES == 1 ? 4 : 1) awq(
    const u16* __restrict__ x,             // (M, K), rows x_stride elements apart, 16-byte aligned
    const u8* __restrict__ weight,         // (N, K/2), the even column in the low nibble
    const u16* __restrict__ weight_scale,  // (K/64, N)
    const u16* __restrict__ weight_zeros,  // (K/64, N)
    const u16* __restrict__ bias,          // (N,) or null
    u16* __restrict__ y,                   // (M, N)
    int M, int N, int K, int x_stride) {
  __shared__ __align__(16) u8 memory[RING > SUMS ? RING : SUMS];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
  const int groups = K / 64;
  const u8* slots = memory + warp * DEPTH * SLOT;

  // Of each group a lane copies half a row's codes; lanes 0 to 3 the halves of the scales and of the zeros.
  const int row = lane / 2, half = lane % 2;
  const u8* codes = weight + (size_t)(first_row + row) * (K / 2) + warp * 32 + 16 * half;
  const u16* scales = (row ? weight_zeros : weight_scale) + (size_t)warp * N + first_row + 8 * half;
  const u32 to_codes = shared_address(slots) + row % 2 * 256 + row / 2 * 32 + 16 * half;
  const u32 to_scales = shared_address(slots) + 512 + 16 * lane;
  int left = groups - warp;  // groups from the next one to copy on, the other warps' among them
  auto copy_next = [&](int slot) {
    if (left > 0) {
      cp_async16(to_codes + slot * SLOT, codes);
      if (lane < 4) cp_async16(to_scales + slot * SLOT, scales);
    }
    cp_async_commit();
    codes += WARPS * 32;
    scales += (size_t)WARPS * N;
    left -= WARPS;
  };
#pragma unroll
  for (int slot = 0; slot < DEPTH; slot++) copy_next(slot);

  const u16* token = x + (size_t)(first_token + r) * x_stride + warp * 64 + 16 * q;
  float acc[TILES][4] = {};
  const u32 one = HALF ? 0x3c003c00u : 0x3f803f80u;
  const u32 ones[4] = {one, one, one, one};

  for (int start = warp; start < groups; start += DEPTH * WARPS) {
#pragma unroll
    for (int slot = 0; slot < DEPTH; slot++) {
      if (start + slot * WARPS >= groups) break;
      cp_async_wait<DEPTH - 1>();
      __syncwarp();
      const u8* group = slots + slot * SLOT;
      const uint2 even = *(const uint2*)(group + 8 * lane), odd = *(const uint2*)(group + 256 + 8 * lane);
      const float2 scale = to_float2(*(const u32*)(group + 512 + 4 * r)), zero = to_float2(*(const u32*)(group + 544 + 4 * r));
      __syncwarp();
      copy_next(slot);

      u32 a[4][4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        a[j][0] = weights(even.x, 4 * j);
        a[j][1] = weights(odd.x, 4 * j);
        a[j][2] = weights(even.y, 4 * j);
        a[j][3] = weights(odd.y, 4 * j);
      }

#pragma unroll
      for (int t = 0; t < TILES; t++) {
        uint4 v[2] = {};  // columns 16 q .. 16 q + 15 of the token, two a word
        if (first_token + 8 * t + r < M) {
          const uint4* source = (const uint4*)(token + (size_t)(8 * t) * x_stride + slot * WARPS * 64);
          v[0] = __ldg(source);
          v[1] = __ldg(source + 1);
        }
        const u32 word[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};

        float p[4] = {}, s[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const u32 pick = j % 2 ? 0x7632 : 0x5410;  // the upper or the lower halves of two words
          const u32 b[2] = {__byte_perm(word[j / 2], word[j / 2 + 2], pick), __byte_perm(word[j / 2 + 4], word[j / 2 + 6], pick)};
          mma_16816(p, a[j], b);
          mma_16816(s, ones, b);
        }
        acc[t][0] = fmaf(scale.x, p[0], fmaf(zero.x, s[0], acc[t][0]));
        acc[t][1] = fmaf(scale.x, p[1], fmaf(zero.x, s[1], acc[t][1]));
        acc[t][2] = fmaf(scale.y, p[2], fmaf(zero.y, s[2], acc[t][2]));
        acc[t][3] = fmaf(scale.y, p[3], fmaf(zero.y, s[3], acc[t][3]));
      }
    }
    token += DEPTH * WARPS * 64;
  }

  // acc[0], acc[1] are tokens 2 q and 2 q + 1 of row 2 r, acc[2], acc[3] of row 2 r + 1.
  __syncthreads();
  float(*sums)[TOKENS][PITCH] = (float(*)[TOKENS][PITCH])memory;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    *(float2*)&sums[warp][8 * t + 2 * q][2 * r] = make_float2(acc[t][0], acc[t][2]);
    *(float2*)&sums[warp][8 * t + 2 * q + 1][2 * r] = make_float2(acc[t][1], acc[t][3]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * ROWS; i += 32 * WARPS) {
    const int m = i / ROWS, n = i % ROWS;
    if (first_token + m >= M) break;
    float sum = bias ? to_float(bias[first_row + n]) : 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w][m][n];
    y[(size_t)(first_token + m) * N + first_row + n] = from_float(sum);
  }
}

// y = x W^T + bias with W = (code - 8) * scale + zero: 4-bit weights, 16-bit activations (W4A16), a scale and a zero per group of 64.
//
// It runs modulation layers, which have one token per image and megabytes of weights, so the reading of the weights takes the time.
// Tensor cores compute the sums, because at 8 tokens the CUDA cores would be slower than the memory. The weights are the MMA's A
// operand (16 rows) and the tokens its B operand (8 columns; those beyond M are zero). Within a group the weights are the integers
// code - 8, exact in 16 bits, and each group's sum is scaled in fp32:
//
//   y[m, n] = sum over groups of  scale[g, n] * (sum over k of (code - 8) x[m, k])  +  zero[g, n] * (sum over k of x[m, k])
//
// The second sum is an MMA with ones. Its result is in the right registers, and the tensor cores have time to spare.
//
//   CTA   ROWS rows of W, 8 * TILES tokens; blockIdx.x the rows, blockIdx.y the tokens
//   warp  chunks of 4 groups: number warp, warp + WARPS, ... A chunk has 128 bytes of each row, a whole memory line. A warp copies its
//         own chunks, so that no warp waits for another before the end, where the warps' sums are added in order.
//   lane  with r = lane / 4 and q = lane % 4: columns 16 q .. 16 q + 15 of each group, of rows 2 r and 2 r + 1 of each 16 (MMA rows r
//         and r + 8) and of tokens r + 8 t
//
// A warp's ring in shared memory has DEPTH slots of one chunk each. The copies of all slots start with the kernel. The CTAs are small,
// so that all of them are resident at once: with 18432 rows, an SM of an H100 has 8.7 of them, and 160 KB in flight.
//
//   bytes      0 ..       128 bytes of codes per row; the 32 bytes of group g are in slot g ^ (row / 2 % 4), so that the 8-byte reads
//                         of 16 lanes (4 rows of a group) hit different banks
//   bytes CODES ..        for each group, the rows' scales and then the rows' zeros
//
// The order of the columns in an MMA is free as long as A and B agree: MMA j of a group takes lane q's columns
//   j, j + 4 (A registers 0, 1 and B register 0)  and  j + 8, j + 12 (A registers 2, 3 and B register 1)
// since one shift and one mask extract nibbles four apart from a word.

#include "common.cuh"

#ifndef TILES
#define TILES 1
#endif
#ifndef ROWS
#define ROWS 32
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef DEPTH
#define DEPTH 2
#endif
#ifndef RESIDENT
#define RESIDENT 5  // CTAs per SM
#endif
#ifndef UNROLL
#define UNROLL 1
#endif

static_assert(ROWS == 16 || ROWS == 32, "the lanes copy a chunk's scales at once");

constexpr int TOKENS = 8 * TILES;
constexpr int ROW_TILES = ROWS / 16;
constexpr int CHUNK = 4;  // groups
constexpr int CODES = ROWS * CHUNK * 32, SLOT = CODES + CHUNK * ROWS * 4;  // bytes
constexpr int PITCH = ROWS + 4;  // floats from one token of a warp's sums to the next
constexpr int RING = WARPS * DEPTH * SLOT, SUMS = WARPS * TOKENS * PITCH * 4;

// Codes `shift` / 4 and `shift` / 4 + 4 of a word, minus 8, as two 16-bit floats. A nibble in the low mantissa bits of 128 (bf16)
// or 1024 (fp16) adds its value, and the subtraction is exact. nibbles: 0x000f000f, in a register.
DEVICE u32 weights(u32 word, int shift, u32 nibbles) {
#if HALF
  u32 biased = (word >> shift) & nibbles | 0x64006400u, d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(biased), "r"(0x3c003c00u), "r"(0xe408e408u));
#else
  u32 biased = (word >> shift) & nibbles | 0x43004300u, d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(biased), "r"(0x3f803f80u), "r"(0xc308c308u));
#endif
  return d;
}

// A lane's part of copying chunks into its warp's ring. It copies 16 bytes of codes of every fourth row. The first ROWS lanes also copy
// 16 bytes of scales or of zeros. Data beyond K or N become zeros, which add nothing.
struct Fetcher {
  const u8* codes;
  const u16* scales;
  u32 ring, to_codes;
  int first_row, scale_row, scale_group, groups, N, K;
  int next, next_slot;  // the first group of the chunk to copy next, and its slot

  DEVICE Fetcher(const u8* weight, const u16* weight_scale, const u16* weight_zeros, u32 ring, int first_row, int groups, int N, int K)
      : ring(ring), first_row(first_row), groups(groups), N(N), K(K) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    codes = weight + (size_t)(first_row + lane / 8) * (K / 2) + warp * 128 + lane % 8 * 16;
    const int part = lane % (ROWS / 4);
    scale_group = lane / (ROWS / 4), scale_row = first_row + part % (ROWS / 8) * 8;
    scales = (part < ROWS / 8 ? weight_scale : weight_zeros) + (size_t)(CHUNK * warp + scale_group) * N + scale_row;
    to_codes = ring + lane / 8 * 128 + (lane % 8 ^ lane / 16 * 2) * 16;
    next = CHUNK * warp, next_slot = 0;
  }

  DEVICE void fetch_next() {
    const int lane = threadIdx.x % 32;
    if (next < groups) {
#pragma unroll
      for (int i = 0; i < ROWS / 4; i++)
        cp_async16((to_codes + next_slot + i * 512) ^ i % 2 * 64, codes + (size_t)(4 * i) * (K / 2),
                   next + lane % 8 / 2 < groups && (ROWS == 16 || first_row + 4 * i < N));
      if (lane < ROWS)
        cp_async16(ring + next_slot + CODES + lane * 16, scales, next + scale_group < groups && (ROWS == 16 || scale_row < N));
    }
    cp_async_commit();
    codes += WARPS * 128;
    scales += (size_t)(CHUNK * WARPS) * N;
    next += CHUNK * WARPS;
    next_slot = next_slot == (DEPTH - 1) * SLOT ? 0 : next_slot + SLOT;
  }
};

// A group's fragments of 8 tokens, from columns 16 q .. 16 q + 15 of the lane's token, two per word.
DEVICE void arrange_tokens(u32 (&b)[4][2], const uint4 (&v)[2]) {
  const u32 word[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32 pick = j % 2 ? 0x7632 : 0x5410;  // the upper or the lower 16 bits of two words
    b[j][0] = __byte_perm(word[j / 2], word[j / 2 + 2], pick);
    b[j][1] = __byte_perm(word[j / 2 + 4], word[j / 2 + 6], pick);
  }
}

// A group's fragments of 16 rows, from the lane's 16 codes of its even row and of its odd row.
DEVICE void expand_weights(u32 (&a)[4][4], uint2 even, uint2 odd, u32 nibbles) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    a[j][0] = weights(even.x, 4 * j, nibbles);
    a[j][1] = weights(odd.x, 4 * j, nibbles);
    a[j][2] = weights(even.y, 4 * j, nibbles);
    a[j][3] = weights(odd.y, 4 * j, nibbles);
  }
}

// acc += group g of the chunk in `slot`, times its tokens b. ones: the fragment of a matrix of ones.
DEVICE void multiply_group(float (&acc)[ROW_TILES][TILES][4], const u32 (&b)[TILES][4][2], u32 slot, int g, const u32 (&ones)[4],
                           u32 nibbles, int r, int q) {
  float total[TILES][4] = {};
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int j = 0; j < 4; j++) mma_16816(total[t], ones, b[t][j]);

#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
    const u32 codes = slot + i * 2048 + r * 256 + q * 8 + (g ^ r % 4) * 32;
    const uint2 even = load_shared8(codes), odd = load_shared8(codes + 128);
    const u32 scales = slot + CODES + g * ROWS * 4 + i * 32 + r * 4;
    const float2 scale = to_float2(load_shared4(scales)), zero = to_float2(load_shared4(scales + ROWS * 2));
    u32 a[4][4];
    expand_weights(a, even, odd, nibbles);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float p[4] = {};
#pragma unroll
      for (int j = 0; j < 4; j++) mma_16816(p, a[j], b[t][j]);
      acc[i][t][0] = fmaf(scale.x, p[0], fmaf(zero.x, total[t][0], acc[i][t][0]));
      acc[i][t][1] = fmaf(scale.x, p[1], fmaf(zero.x, total[t][1], acc[i][t][1]));
      acc[i][t][2] = fmaf(scale.y, p[2], fmaf(zero.y, total[t][2], acc[i][t][2]));
      acc[i][t][3] = fmaf(scale.y, p[3], fmaf(zero.y, total[t][3], acc[i][t][3]));
    }
  }
}

// Adds the warps' sums in the order of the warps, and stores y. acc[0] and acc[1] are tokens 2 q and 2 q + 1 of row 2 r, acc[2] and acc[3]
// those of row 2 r + 1. The sums reuse the ring's memory.
DEVICE void add_and_store(u16* y, const float (&acc)[ROW_TILES][TILES][4], u8* memory, const u16* bias, int first_row, int first_token,
                          int M, int N, int warp, int r, int q) {
  __syncthreads();
  float(*sums)[TOKENS][PITCH] = (float(*)[TOKENS][PITCH])memory;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      *(float2*)&sums[warp][8 * t + 2 * q][16 * i + 2 * r] = make_float2(acc[i][t][0], acc[i][t][2]);
      *(float2*)&sums[warp][8 * t + 2 * q + 1][16 * i + 2 * r] = make_float2(acc[i][t][1], acc[i][t][3]);
    }
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * ROWS; i += 32 * WARPS) {
    const int m = i / ROWS, n = i % ROWS;
    if (first_token + m >= M) break;
    if (ROWS > 16 && first_row + n >= N) continue;
    float sum = bias ? to_float(bias[first_row + n]) : 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w][m][n];
    y[(size_t)(first_token + m) * N + first_row + n] = from_float(sum);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, TILES == 1 ? RESIDENT : 1) awq(
    const u16* __restrict__ x,             // (M, K), rows x_stride elements apart, 16-byte aligned
    const u8* __restrict__ weight,         // (N, K/2), the even column in the low nibble
    const u16* __restrict__ weight_scale,  // (K/64, N)
    const u16* __restrict__ weight_zeros,  // (K/64, N)
    const u16* __restrict__ bias,          // (N,) or null
    u16* __restrict__ y,                   // (M, N)
    int M, int N, int K, int x_stride) {
  __shared__ __align__(128) u8 memory[RING > SUMS ? RING : SUMS];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
  const int groups = K / 64;
  const u32 ring = shared_address(memory) + warp * DEPTH * SLOT;
  wait_for_previous_grid();
  Fetcher fetcher(weight, weight_scale, weight_zeros, ring, first_row, groups, N, K);
#pragma unroll
  for (int slot = 0; slot < DEPTH; slot++) fetcher.fetch_next();

  // Columns 16 q .. 16 q + 15 of a group's tokens: zeros beyond M, and beyond K those of the previous group.
  const char* token = (const char*)(x + (size_t)(first_token + r) * x_stride + warp * (CHUNK * 64) + 16 * q);
  uint4 v[TILES][2] = {};

  float acc[ROW_TILES][TILES][4] = {};
  // The compiler must not recognize these constants, or it reloads them for every use. K is a multiple of 64.
  const u32 nothing = K & 63, nibbles = 0x000f000fu | nothing << 4, one = HALF ? 0x3c003c00u : 0x3f803f80u;
  const u32 ones[4] = {one | nothing, one | nothing << 1, one | nothing << 2, one | nothing << 3};

  int slot = 0;
  for (int first = CHUNK * warp; first < groups; first += CHUNK * WARPS) {
    cp_async_wait<DEPTH - 1>();
    __syncwarp();
#pragma unroll UNROLL
    for (int g = 0; g < CHUNK; g++) {
      u32 b[TILES][4][2];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        if (first + g < groups && first_token + 8 * t + r < M) {
          const uint4* source = (const uint4*)(token + (size_t)(8 * t) * (2 * x_stride) + g * 128);
          v[t][0] = __ldg(source);
          v[t][1] = __ldg(source + 1);
        }
        arrange_tokens(b[t], v[t]);
      }
      multiply_group(acc, b, ring + slot, g, ones, nibbles, r, q);
    }
    token += CHUNK * WARPS * 128;
    __syncwarp();
    fetcher.fetch_next();
    slot = slot == (DEPTH - 1) * SLOT ? 0 : slot + SLOT;
  }
  add_and_store(y, acc, memory, bias, first_row, first_token, M, N, warp, r, q);
}

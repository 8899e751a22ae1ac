// From the outputs of qkv linears to the tensors that attention reads, in one pass: RMSNorm of each head of q and k, their rotation by the
// position embedding, and the join of the text's tokens with the image's.
//
//     rows of text, of image: q, k, v: heads x HEAD each      ->      q, k (and v): (images, tokens, heads, HEAD)
//
// q, k and v of a stream have addresses of their own, and rows equally far apart: they are tensors of their own, or parts of longer rows.
// A CTA has one token. HEAD / 8 lanes have a head, 8 columns each, so that the CTA's 128 threads have ROUND heads at a time; the lane's part
// of the position embedding stays in registers for all of them. Reading and writing memory bounds the kernel.
//
// -D: HALF as in common.cuh;  HEAD 64, 128 or 256: columns of a head;  HEADS: of q, and of k and v;  PARTS 2: q and k; 3: also v, unchanged
//     EPSILON of the RMSNorm;  PE16 1: the position embedding is in 16 bits too; 0: in float32
#include "common.cuh"

constexpr int THREADS = 128, LANES = HEAD / 8, ROUND = THREADS / LANES, ROUNDS = ceil_div(PARTS * HEADS, ROUND);

// The sum over the lanes of a head.
DEVICE float head_sum(float v) {
#pragma unroll
  for (int lanes = LANES / 2; lanes; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  return v;
}

// Two columns times the 2 x 2 matrix (m.x m.y; m.z m.w), as a word.
DEVICE u32 rotated(float a, float b, float4 m) { return from_float2(fmaf(m.x, a, m.y * b), fmaf(m.z, a, m.w * b)); }

// 8 columns of a head after the RMSNorm with weights `weight` and the rotation by `turn`. Every lane of the warp calls it.
DEVICE uint4 normed_and_rotated(uint4 v, uint4 weight, const float4 (&turn)[4]) {
  const u32 words[4] = {v.x, v.y, v.z, v.w}, weights[4] = {weight.x, weight.y, weight.z, weight.w};
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) squares = fmaf(low_float(words[i]), low_float(words[i]), fmaf(high_float(words[i]), high_float(words[i]), squares));
  float inverse;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(inverse) : "f"(head_sum(squares) * (1.f / HEAD) + EPSILON));
  u32 out[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    out[i] = rotated(low_float(words[i]) * inverse * low_float(weights[i]), high_float(words[i]) * inverse * high_float(weights[i]), turn[i]);
  return make_uint4(out[0], out[1], out[2], out[3]);
}

#if PE16
// The 2 x 2 matrices of a lane's 4 pairs of columns, from pair `first` on.
DEVICE void load_turn(float4 (&turn)[4], const u16* pe, size_t first) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint4 two = ((const uint4*)(pe + first * 4))[i];
    turn[2 * i] = make_float4(low_float(two.x), high_float(two.x), low_float(two.y), high_float(two.y));
    turn[2 * i + 1] = make_float4(low_float(two.z), high_float(two.z), low_float(two.w), high_float(two.w));
  }
}
#else
DEVICE void load_turn(float4 (&turn)[4], const float4* pe, size_t first) {
#pragma unroll
  for (int i = 0; i < 4; i++) turn[i] = pe[first + i];
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) qk_norm_rope(
    const u16* __restrict__ text_q, const u16* __restrict__ text_k, const u16* __restrict__ text_v, const u16* __restrict__ image_q,
    const u16* __restrict__ image_k, const u16* __restrict__ image_v, const u16* __restrict__ text_q_norm,
    const u16* __restrict__ text_k_norm, const u16* __restrict__ image_q_norm, const u16* __restrict__ image_k_norm,
#if PE16
    const u16* __restrict__ pe,
#else
    const float4* __restrict__ pe,
#endif
    u16* __restrict__ q, u16* __restrict__ k, u16* __restrict__ v, int text_tokens, int tokens, int stride_text, int stride_image,
    int stride_pe) {
  wait_for_previous_grid();
  const int token = blockIdx.x, batch = blockIdx.y, lane = threadIdx.x % LANES, head = threadIdx.x / LANES;
  const bool of_text = token < text_tokens;
  const size_t from = lane * 8 + (of_text ? (size_t)(batch * text_tokens + token) * stride_text
                                          : (size_t)(batch * (tokens - text_tokens) + token - text_tokens) * stride_image);
  const u16 *from_q = (of_text ? text_q : image_q) + from, *from_k = (of_text ? text_k : image_k) + from,
            *from_v = (of_text ? text_v : image_v) + from;
  uint4 row[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int all = i * ROUND + head, part = all / HEADS;
    row[i] = make_uint4(0, 0, 0, 0);
    if (all < PARTS * HEADS) row[i] = load_once16((part == 0 ? from_q : part == 1 ? from_k : from_v) + (all - part * HEADS) * HEAD);
  }
  float4 turn[4];
  load_turn(turn, pe, (size_t)batch * stride_pe + token * (HEAD / 2) + lane * 4);
  const uint4 q_norm = *(const uint4*)((of_text ? text_q_norm : image_q_norm) + lane * 8);
  const uint4 k_norm = *(const uint4*)((of_text ? text_k_norm : image_k_norm) + lane * 8);
  const size_t to = ((size_t)batch * tokens + token) * HEADS;
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const int all = i * ROUND + head, part = all / HEADS;
    const uint4 turned = normed_and_rotated(row[i], part == 0 ? q_norm : k_norm, turn);
    u16* out = part == 0 ? q : part == 1 ? k : v;
    if (all < PARTS * HEADS) *(uint4*)(out + (to + all - part * HEADS) * HEAD + lane * 8) = part < 2 ? turned : row[i];
  }
}

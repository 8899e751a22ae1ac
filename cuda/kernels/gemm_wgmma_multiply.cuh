// The consumers' arithmetic in gemm_wgmma.cu: the products of a stage, and the exchange of sums between CTAs that share K.
#pragma once
#include "gemm_wgmma.cuh"
#include "wgmma.cuh"

// A warp that has read a stage releases it to the producers, to those of both CTAs if the CTAs share their tokens.
DEVICE void release(Barrier empty, u32 cta) {
  int lane = threadIdx.x & 31;
#if CLUSTER == 1
  if (lane < ARRIVALS) empty.arrive();
#else
  const u32 first = cta / CLUSTER * CLUSTER;
  if (ARRIVALS == 1 && lane < CLUSTER) mbarrier_arrive_at(empty.address, first + lane);
  for (u32 i = 0; ARRIVALS > 1 && i < CLUSTER; i++) mbarrier_arrive_at(empty.address, first + i);
#endif
}

#if HALF
// Two tokens' outer scales; 1 if there are no ranks.
DEVICE float2 load_outer_scales(u32 address) {
  const float2 pair = load_shared_float2(address);
  return make_float2(pair.x != 0.f ? pair.x : 1.f, pair.y != 0.f ? pair.y : 1.f);
}
#endif

// 1 / x, or 0 for 0.
DEVICE float inverse_or_zero(float x) { return x != 0.f ? reciprocal_ftz(x) : 0.f; }

// Four codes times their group's integer i, as int8, of the low nibbles and of the high nibbles. u = code + 8 is 0..15, so that for i in
// -15..16 every byte of u i + (128 - 8 i) is in 0..255. Flipping bit 7 of each byte then subtracts 128.
DEVICE void expand(u32 word, u32 multiplier, u32 offset, u32& even, u32& odd) {
#if SPLIT == 1
  word ^= 0x88888888;
  even = ((word & 0x0f0f0f0f) * multiplier + offset) ^ 0x80808080;
  odd = (((word >> 4) & 0x0f0f0f0f) * multiplier + offset) ^ 0x80808080;
#else  // ptxas compiles this form differently, and small tiles, which wait for it, were 3 % faster
  even = ((word & 0x0f0f0f0f ^ 0x08080808) * multiplier + offset) ^ 0x80808080;
  odd = ((word >> 4 & 0x0f0f0f0f ^ 0x08080808) * multiplier + offset) ^ 0x80808080;
#endif
}

// A lane's weights of a block: two rows of 32 columns, each within one group.
struct Weights {
  uint4 a, b;              // rows g and g + 8
  u32 i, j;                // their groups' integers
  u32 offset_i, offset_j;  // 128 - 8 i in each byte

  // w, s: the stage's packed weights and scales, at this lane's bytes; inverse: 1 / c of the two rows.
  DEVICE void load(u32 w, u32 s, u32 inverse) {
    a = load_shared16(w);
    b = load_shared16(w + 8 * 64);
    i = integer(s, load_shared_float(inverse));
    j = integer(s + 8 * 2, load_shared_float(inverse + 128));
    offset_i = 0x80808080u - 0x08080808u * i;
    offset_j = 0x80808080u - 0x08080808u * j;
  }

  // The scale at s as a multiple of the row's c. A float near 1.5 x 2^23 has a unit in the last place of 1, so that its low bits are the
  // rounded integer.
  static DEVICE u32 integer(u32 s, float inverse) {
    return __float_as_int(fmaf(to_float(load_shared2(s)), inverse, 12582912.f)) - 0x4b400000;
  }
};

// One MMA step: d += 32 columns' weights (a of row g, b of row g + 8) times the tokens. Three steps may run while the next expands.
DEVICE void multiply(int (&d)[TOKENS / 2], u32 a, u32 b, const Weights& w, u64 tokens) {
  u32 fragment[4];
  wgmma_wait<3>();  // frees the registers of four steps ago
  expand(a, w.i, w.offset_i, fragment[0], fragment[2]);
  expand(b, w.j, w.offset_j, fragment[1], fragment[3]);
  wgmma_fence();
  wgmma_s8(d, fragment, tokens);
  wgmma_commit();
}

// y (64 rows x SLICE tokens) += proj_up lora_act^T over all blocks of the branch. Returns while it runs.
DEVICE void multiply_branch(float (&y)[SLICE / 2], u32 shared, int warpgroup, int slice, RingPosition position, int blocks) {
  wgmma_fence();
#pragma unroll 1
  for (int block = 0; block < blocks; block++, position.next()) {
    const u32 x = shared + position.stage * STAGE_BYTES;
    const u64 up = wgmma_descriptor<64>(x + X_BYTES + warpgroup * 4096), lora_act = wgmma_descriptor<64>(x + slice * (SLICE * 64));
    wgmma_half(y, up, lora_act);
    wgmma_half(y, up + 2, lora_act + 2);
  }
  wgmma_commit();
}

#if LORA
// The same for a branch that does not lie in the ring at once: each stage is released as soon as its product is complete, and the slice's
// tokens are the stage's first. Returns after the last product.
DEVICE void stream_branch(float (&y)[SLICE / 2], u32 shared, const SharedBarriers& barriers, int warpgroup, RingPosition& position,
                          int blocks, u32 cta) {
  int previous = 0;
#pragma unroll 1
  for (int block = 0; block < blocks; block++, position.next()) {
    const u32 x = shared + position.stage * STAGE_BYTES;
    const u64 up = wgmma_descriptor<64>(x + X_BYTES + warpgroup * 4096), lora_act = wgmma_descriptor<64>(x);
    barriers.full[position.stage].wait(position.parity);
    fence_proxy_async();
    wgmma_fence();
    wgmma_half(y, up, lora_act);
    wgmma_half(y, up + 2, lora_act + 2);
    wgmma_commit();
    if (block) {
      wgmma_wait<1>();
      release(barriers.empty[previous], cta);
    }
    previous = position.stage;
  }
  wgmma_wait<0>();
  release(barriers.empty[previous], cta);
}
#endif

// The stage before the ring's current position.
DEVICE int previous_stage(const RingPosition& position) { return position.stage ? position.stage - 1 : STAGES - 1; }

// d += the products of blocks begin .. end of K, at least one. w, s: this lane's bytes of the first stage's weights and scales.
DEVICE void multiply_columns(int (&d)[TOKENS / 2], u32 shared, const SharedBarriers& barriers, RingPosition& position, int begin, int end,
                             u32 w, u32 s, u32 inverse, u32 cta) {
  Weights weights;
  barriers.full[position.stage].wait(position.parity);
  weights.load(w + position.stage * STAGE_BYTES, s + position.stage * S_BYTES, inverse);
#pragma unroll 1
  for (int block = begin; block < end; block++) {
    const u64 tokens = wgmma_descriptor<128>(shared + position.stage * STAGE_BYTES);
    multiply(d, weights.a.x, weights.b.x, weights, tokens);
    multiply(d, weights.a.y, weights.b.y, weights, tokens + 2);
    multiply(d, weights.a.z, weights.b.z, weights, tokens + 4);
    wgmma_wait<3>();  // the previous block's products are complete
    if (block > begin) release(barriers.empty[previous_stage(position)], cta);
    multiply(d, weights.a.w, weights.b.w, weights, tokens + 6);
    position.next();
    if (block + 1 < end) {
      barriers.full[position.stage].wait(position.parity);
      weights.load(w + position.stage * STAGE_BYTES, s + position.stage * S_BYTES, inverse);
    }
  }
  wgmma_wait<0>();
  release(barriers.empty[previous_stage(position)], cta);
}

// Converts sums from units of the first part's scale to units of the second's. The scales are within a factor of 16 (codes.cuh), so that
// the sums fit 32 bits. The rounding error is half a unit in the product's last place.
DEVICE void change_units(int (&d)[TOKENS / 2], u32 factors, int q) {
#pragma unroll
  for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const u32 token = factors + 32 * t + 8 * q + 4 * e;
      const float ratio = load_shared_float(token + FIRST) * inverse_or_zero(load_shared_float(token + LAST));
      d[4 * t + e] = __float2int_rn(d[4 * t + e] * ratio);
      d[4 * t + 2 + e] = __float2int_rn(d[4 * t + 2 + e] * ratio);
    }
}

// For two CTAs that share K: each sends its sums of the tokens that the other finishes, and adds the sums that it receives.
DEVICE void exchange_sums(int (&d)[TOKENS / 2], u32 shared, const SharedBarriers& barriers, u32 parity, u32 half, u32 cta, int warpgroup,
                          int thread, int lane) {
  const u32 sums = SUMS + warpgroup * SUM_BYTES + thread * 16, other = cta ^ CLUSTER;
  const Barrier summed = barriers.summed[warpgroup], sendable = barriers.sendable[warpgroup];
  const u32 remote = cluster_address(shared + sums, other), remote_barrier = cluster_address(summed.address, other);
  sendable.wait(parity ^ 1);
  if (thread == 0) summed.arrive_expect(SUM_BYTES);
#pragma unroll
  for (int i = 0; i < OUT / 2; i += 4) {
    int sent[4];
#pragma unroll
    for (int j = i; j < i + 4; j++) {
      sent[j - i] = half ? d[j] : d[OUT / 2 + j];
      d[j] = half ? d[OUT / 2 + j] : d[j];
    }
    store_async(remote + i * 512, make_int4(sent[0], sent[1], sent[2], sent[3]), remote_barrier);
  }
  summed.wait(parity);
#pragma unroll
  for (int i = 0; i < OUT / 2; i += 4) {
    const uint4 more = load_shared16(shared + sums + i * 512);
    d[i] += more.x, d[i + 1] += more.y, d[i + 2] += more.z, d[i + 3] += more.w;
  }
  __syncwarp();
  if (lane < ARRIVALS) mbarrier_arrive_at(sendable.address, other);
}

// The second kernel of an SVDQuant layer on Hopper: y = outer_scale (s c W4 X8^T + proj_up lora_act^T) + bias, transposed on its way out.
//
// A CTA is two or three consumer warpgroups of 64 weight rows and one producer warpgroup. There is one CTA per SM, which loops over tiles
// of ROWS weight rows x TOKENS tokens. Weights stay packed in 4 bits from device memory to registers, where two instructions expand four
// of them to int8 and multiply by their group's integer: w8 = i code, |w8| <= 128. The int32 sums run over all of K without any work
// between two wgmmas, and the row's float scale c and the token's scale s are applied once, at the end.
//
//           tokens (B, shared memory)                     one stage of the ring:   X  TOKENS x 128 B   codes, activation layout
//          +----------------+                                                      W  ROWS x 64 B      two codes per byte, natural order
//   64     | warpgroup 0    |  A: weights, registers                               S  2 x ROWS         the two groups' 16-bit scales
//   64     | warpgroup 1    |                             after the K blocks, the branch's blocks of 32 ranks use the same ring:
//   64     | warpgroup 2    |                                                      X  TOKENS x 64 B    lora_act, 16 bit, swizzled
//          +----------------+                                                      W  ROWS x 64 B      proj_up, 16 bit, swizzled
//
// LORA: after proj_up's blocks come lora_up's, of the part that has the tile's weight rows (lora.cuh). If all of these are more blocks than
// stages, they pass through the ring once for each slice of the tokens.
//
// CLUSTER 2: two CTAs side by side along the weight rows need the same tokens. Each CTA fetches half of them for both.
// SPLIT 2: two CTAs share a tile's K. At the end each sends its int32 sums of half of the tile's tokens, and finishes the other half.
// Integer sums are the same in any order.
//
// GATED: y = residual + gate * (the layer's output, rounded to 16 bits), where modulate.cu would need a pass of its own. The copy engine
// brings each slice of the residual to the slot from which the slice of y is stored, while the tile is multiplied.
//
// The operands of the epilogue (the tokens' and rows' factors, bias) come with the tile's first block, into one of two buffers. The
// consumers access no global memory except y, residual and gate.
//
// The activation layout gives the order of the codes: lane q of a weight row reads bytes 16 q .. 16 q + 15 of the row's 64, which are 32
// columns of one group. Word s of these four belongs to MMA step s. Its low nibbles fill registers 0 and 1, its high nibbles 2 and 3.
//
// The roles: gemm_wgmma_fetch.cuh is the producer, gemm_wgmma_multiply.cuh the consumers' main loop; their epilogue is here.

#include "gelu.cuh"
#include "gemm_wgmma.cuh"
#include "gemm_wgmma_fetch.cuh"
#include "gemm_wgmma_multiply.cuh"
#include "gemm_wgmma_residual.cuh"

// A consumer lane's operands for the epilogue of a tile.
struct Epilogue {
  u32 factors;                                // address of the tile's buffer of factors
  float scale_a, scale_b, bias_a, bias_b;     // scales and biases of the lane's two rows
  bool activated;                             // whether GELU applies to the warpgroup's rows
  float gate_a, gate_b;                       // GATED: gates of the lane's two rows
};

// Converts the sums of a slice of the tokens to floats.
DEVICE void scale_slice(float (&begun)[SLICE / 2], const int (&d)[TOKENS / 2], int slice, const Epilogue& e, int q) {
#pragma unroll
  for (int t = 0; t < SLICE / 8; t++) {
    const int v = slice * (SLICE / 2) + 4 * t;
    const u32 token = e.factors + (slice * SLICE + 8 * t + 2 * q) * 4;
    float2 scale = load_shared_float2(token + LAST);
#if HALF
    const float2 outer = load_outer_scales(token + OUTER);
    scale.x *= power_inverse(outer.x), scale.y *= power_inverse(outer.y);
    const float offset_a = 0.f, offset_b = 0.f;
#else
    const float offset_a = e.bias_a, offset_b = e.bias_b;
#endif
    begun[4 * t] = fmaf(d[v], scale.x * e.scale_a, offset_a), begun[4 * t + 1] = fmaf(d[v + 1], scale.y * e.scale_a, offset_a);
    begun[4 * t + 2] = fmaf(d[v + 2], scale.x * e.scale_b, offset_b), begun[4 * t + 3] = fmaf(d[v + 3], scale.y * e.scale_b, offset_b);
  }
}

// Stores a slice's outputs, in 16 bits and transposed, to shared memory at `target`. A row is a token's 64 outputs, 128 bytes, with its
// 16-byte pieces swizzled as the copy engine reads them. GATED: the residual's are there, and each lane's take the place of its own.
DEVICE void pack_slice(u32 target, const float (&ended)[SLICE / 2], int slice, const Epilogue& e, int warp, int lane, int q) {
#pragma unroll
  for (int pair = 0; pair < SLICE / 16; pair++) {
    u32 packed[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = 2 * pair + i;
      float y0 = ended[4 * t], y1 = ended[4 * t + 1], y2 = ended[4 * t + 2], y3 = ended[4 * t + 3];
#if HALF
      const float2 outer = load_outer_scales(e.factors + OUTER + (slice * SLICE + 8 * t + 2 * q) * 4);
      y0 = fmaf(y0, outer.x, e.bias_a), y1 = fmaf(y1, outer.y, e.bias_a);
      y2 = fmaf(y2, outer.x, e.bias_b), y3 = fmaf(y3, outer.y, e.bias_b);
#endif
#if GELU
      if (e.activated) y0 = gelu(y0), y1 = gelu(y1), y2 = gelu(y2), y3 = gelu(y3);
#endif
      packed[2 * i] = from_float2(y0, y1);
      packed[2 * i + 1] = from_float2(y2, y3);
    }
    const int token = pair * 16 + (lane >> 4) * 8 + (lane & 7), piece = warp * 2 + ((lane >> 3) & 1);
    const u32 address = target + token * 128 + ((piece ^ (token & 7)) << 4);
    if constexpr (GATED) {
      u32 x[4];
      ldmatrix4_transposed(x, address);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float gate = i % 2 ? e.gate_b : e.gate_a;
        packed[i] = add_gated(x[i], packed[i], gate, gate);
      }
    }
    stmatrix4_transposed(address, packed);
  }
}

// Waits for the branch's blocks. The fence makes proj_up, which threads have copied, visible to wgmma.
DEVICE void wait_for_ranks(const SharedBarriers& barriers, RingPosition position, int blocks) {
  for (int block = 0; block < blocks; block++, position.next()) barriers.full[position.stage].wait(position.parity);
  fence_proxy_async();
}

// The epilogue of a tile, for one slice of the tokens at a time: it converts the sums to floats, adds the branch's product, and the copy
// engine stores the result. If registers suffice (AHEAD), the product runs while the previous slice is packed.
DEVICE void store_tile(const TensorMap* y, const int (&d)[TOKENS / 2], const Epilogue& e, u32 shared, const SharedBarriers& barriers,
                       RingPosition& position, const Problem& p, const Tile& tile, int m0, int n0, u32 store, u32 half, u32 cta,
                       int warpgroup, int warp, int thread, int lane, int q, const ResidualPart& residual,
                       u32 residual_parity) {
  float out[AHEAD + 1][SLICE / 2];
  const int rank_blocks = p.rank_blocks(n0);
  if (GATED && thread == 0) residual.prefetch();
#pragma unroll
  for (int step = 0; step < SLICES + AHEAD; step++) {
    if (step < SLICES) {
      float (&begun)[SLICE / 2] = out[step % (AHEAD + 1)];
      scale_slice(begun, d, step, e, q);
      if (resident(rank_blocks)) {
        if (step == 0) wait_for_ranks(barriers, position, rank_blocks);
        multiply_branch(begun, shared, warpgroup, step, position, rank_blocks);
        if (!AHEAD || !step) wgmma_wait<0>();
      }
#if LORA
      else stream_branch(begun, shared, barriers, warpgroup, position, rank_blocks, cta);
#endif
    }
    if (step < AHEAD) continue;
    const int slice = step - AHEAD;
    const u32 target = store + slice % SLOTS * SLICE_BYTES;
    if constexpr (GATED) residual.arrived[slice].wait(residual_parity);
    pack_slice(target, out[slice % (AHEAD + 1)], slice, e, warp, lane, q);
    if (slice == SLICES - 1) {
      if (lane < ARRIVALS) (e.factors == shared + FACTORS ? barriers.used[0] : barriers.used[1]).arrive();
      if (resident(rank_blocks))
        for (int block = 0; block < rank_blocks; block++, position.next()) release(barriers.empty[position.stage], cta);
      if (tile.last(p)) cluster_arrive();  // every CTA has at least one tile
    }
    if (thread == 0) {
      if constexpr (GATED) residual.load_after(slice);
      else bulk_stores_wait_read();  // the next slice reuses the memory of the previous one
    }
    barrier_named(1 + warpgroup, 128);
    if (thread == 0) {
      fence_proxy_async();
      bulk_store_box(y, n0 + warpgroup * 64, m0 + half * OUT + slice * SLICE, target);
    }
    if (AHEAD && step < SLICES) wgmma_wait<0>();
  }
  if (!GATED && SLICES % 2) {  // the next tile begins with the same slot
    if (thread == 0) bulk_stores_wait_read();
    barrier_named(1 + warpgroup, 128);
  }
}

// A consumer warpgroup: it multiplies the ring's stages and stores y.
DEVICE void consume(const TensorMap* y, const Residual& residual, u32 shared, const SharedBarriers& barriers, RingPosition& position,
                    const Problem& p, int border, int gelu_from, u32 cta, int warpgroup) {
  take_registers<CONSUMER_REGISTERS>();
  cluster_wait();
  const u32 half = cta / CLUSTER;
  const int thread = threadIdx.x & 127, warp = thread >> 5, lane = thread & 31, g = lane >> 2, q = lane & 3;
  const int row = warpgroup * 64 + warp * 16 + g;       // in the tile; the lane's other row is row + 8
  const u32 store = shared + STORES + warpgroup * STORE_BYTES;
  const u32 w = shared + X_BYTES + row * 64 + q * 16, s = shared + SCALES + (q >> 1) * (ROWS * 2) + row * 2;
  // To save registers, 1 / row_scale is in shared memory. Without GATED only this warp later writes its first two tokens' outputs there.
  const u32 inverse = (GATED ? shared + INVERSES + warpgroup * 256 : store) + warp * 32 + g * 4;
  u32 factors = shared + FACTORS, sums_parity = 0, residual_parity = 0;
  if (GATED && thread == 0) wait_for_previous_grid();
  for (Tile tile(p); tile.exists(p); tile.next(p)) {
    const ResidualPart part{residual.map, tile.n0(cta) + warpgroup * 64, tile.m0() + (int)half * OUT, store,
                            {barriers.residual[warpgroup * SLICES].address}};
    if (GATED && thread == 0) part.begin();
    barriers.full[position.stage].wait(position.parity);
    store_shared4(inverse, __float_as_uint(inverse_or_zero(load_shared_float(factors + ROW_SCALE + row * 4))));
    store_shared4(inverse + 128, __float_as_uint(inverse_or_zero(load_shared_float(factors + ROW_SCALE + row * 4 + 32))));
    __syncwarp();
    int d[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
    for (int begin = p.begin, end = SPLIT == 1 && border ? border : p.end;; begin = end, end = p.end) {
      multiply_columns(d, shared, barriers, position, begin, end, w, s, inverse, cta);
      if (end == p.end) break;
      change_units(d, factors, q);
    }
    if constexpr (SPLIT > 1) {
      exchange_sums(d, shared, barriers, sums_parity, half, cta, warpgroup, thread, lane);
      sums_parity ^= 1;
    }

    const int m0 = tile.m0(), n0 = tile.n0(cta);
    u32 rows = factors;
    asm volatile("" : "+r"(rows));  // computes the address again, since keeping it would cost a register
    rows += ROW_SCALE + row * 4;
    Epilogue e;
    e.factors = factors;
    e.scale_a = load_shared_float(rows), e.scale_b = load_shared_float(rows + 32);
    e.bias_a = to_float(load_shared2(factors + BIAS + row * 2)), e.bias_b = to_float(load_shared2(factors + BIAS + row * 2 + 16));
    e.activated = GELU && n0 + warpgroup * 64 >= gelu_from;
    if constexpr (GATED) e.gate_a = residual.gate_of(n0 + row), e.gate_b = residual.gate_of(n0 + row + 8);
    store_tile(y, d, e, shared, barriers, position, p, tile, m0, n0, store, half, cta, warpgroup, warp, thread, lane, q, part,
               residual_parity);
    residual_parity ^= 1;
    factors = factors == shared + FACTORS ? factors + FACTOR_BYTES : shared + FACTORS;
  }
}

extern "C" __global__ void __launch_bounds__(ROWS * 2 + 128, 1)
__cluster_dims__(CLUSTER * SPLIT, 1, 1)
gemm(const __grid_constant__ TensorMap y,       // (m, n), boxes of SLICE x 64
#if GATED
     const __grid_constant__ TensorMap residual_map,  // of the residual, likewise
#endif
     const char* __restrict__ act,              // (blocks, padded_m, 128) int8 codes, in the activation layout
     const float* __restrict__ act_scale,       // (2, padded_m)
     const char* __restrict__ lora_act,         // (blocks of ranks, padded_m, 32) 16-bit numbers, in the activation layout
     const float* __restrict__ outer_scale,     // (padded_m), lora_act_scale: powers of two, or null for ones; not read in bf16
     const char* __restrict__ weight,           // (n, k / 2)
     const u16* __restrict__ weight_scale,      // (k / 64, n)
     const float* __restrict__ row_scale,       // (n)
     const char* __restrict__ proj_up,          // (n, rank)
     const u16* __restrict__ bias,              // (n) or null
#if GATED
     const u16* gate,                           // (n)
#endif
#if LORA
     const u16* __restrict__ lora_up,           // part by part: (rows of the part, its ranks)
#endif
     int m, int padded_m, int n, int k, int rank,
     int border,                                // the block where the second part of the columns begins; 0: there is one part
     int part                                   // the row of act_scale that the last part uses
#if LORA
     , u64 lora_eighths, int lora_parts, int lora_part_rows  // LoraRanks
#endif
#if GELU
     , int gelu_from                            // first column of y that gets GELU, a multiple of 64
#endif
    ) {
#if !GELU
  constexpr int gelu_from = 0;
#endif
#if GATED
  const Residual residual{&residual_map, gate, n};
#else
  constexpr Residual residual{};
#endif
  extern __shared__ __align__(1024) char memory[];
  const u32 shared = shared_address(memory);
  const SharedBarriers barriers(shared);
  const u32 cta = cluster_rank(), half = cta / CLUSTER;
  const int row_tiles = (n + ROWS * CLUSTER - 1) / (ROWS * CLUSTER), token_tiles = (m + TOKENS - 1) / TOKENS, blocks = (k + 127) / 128;
  const Problem p{blocks * (int)half / SPLIT, blocks * ((int)half + 1) / SPLIT, (rank + 31) / 32, token_tiles, row_tiles
#if LORA
                  , {lora_eighths, lora_parts, lora_part_rows}
#endif
  };
  if (threadIdx.x == 0) barriers.init();
  __syncthreads();
  cluster_arrive_relaxed();

  const int warpgroup = threadIdx.x / 128;
  RingPosition position;
  if (warpgroup == CONSUMERS)
    produce({act, act_scale, lora_act, outer_scale, weight, weight_scale, row_scale, proj_up, bias, padded_m, n, k, rank, border, part
#if LORA
             , lora_up
#endif
            }, shared, barriers, position, p, cta);
  else
    consume(&y, residual, shared, barriers, position, p, border, gelu_from, cta, warpgroup);
  if (warpgroup < CONSUMERS && threadIdx.x % 128 == 0) bulk_stores_wait_read();  // the last stores still read shared memory
  cluster_wait();  // no CTA exits while another may still arrive at its barriers
}

// The LoRA branch's activation x @ proj_down of a layer whose input was never in memory. Each tile of gemm_mma.cu has stored a partial sum
// over its own columns (next.cuh). This kernel adds them in the order of the columns, so that equal inputs give equal bits.
//
// A thread has 8 ranks of a token; PIECES neighbouring threads have the whole token.
//
// -D: HALF 1 for fp16, else bf16;  RANKS 32 or 64: the branch's rank, padded
#include "quantize.cuh"

constexpr int THREADS = 128;
constexpr int PIECES = RANKS / 8;

extern "C" __global__ void __launch_bounds__(THREADS) add_partial_sums(
    const float* partial_sums,  // (tiles, Mp, RANKS); rows from M on are undefined
    u16* lora_act,              // (RANKS / 32, Mp, 32), the sums / lora_act_scale, in the activation layout
    float* lora_act_scale,      // (Mp)
    int M, int tiles) {
  const int padded = (M + 15) & ~15, row = (blockIdx.x * THREADS + threadIdx.x) / PIECES, piece = threadIdx.x % PIECES;
  float value[8] = {};
  if (row < M) {
    const float* from = partial_sums + (size_t)row * RANKS + piece * 8;
#pragma unroll 8
    for (int tile = 0; tile < tiles; tile++, from += padded * RANKS) add_eight(value, from);
  }
  store_lora_act<PIECES>(value, piece, row, row < padded, M, padded, lora_act, lora_act_scale);
}

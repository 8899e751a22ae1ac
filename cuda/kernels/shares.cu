// The branch's activation of a layer whose input was never in memory: x @ proj_down, of which gemm_mma.cu's tiles have left a share each
// (next.cuh). They are added up in the order of the columns, so that the same input gives the same bits.
//
// -D: HALF 1 for fp16, else bf16;  RANKS 32 or 64: the branch's rank, padded
#include "quantize.cuh"

constexpr int THREADS = 128;
constexpr int PIECES = RANKS / 8;  // a thread has 8 ranks of a row

extern "C" __global__ void __launch_bounds__(THREADS) add_shares(
    const float* shares,  // (tiles, Mp, RANKS), rows from M on anything
    u16* low,             // (RANKS / 32, Mp, 32) image of the sums over low_scale
    float* low_scale,     // (Mp)
    int M, int tiles) {
    const int padded = (M + 15) & ~15, row = (blockIdx.x * THREADS + threadIdx.x) / PIECES, piece = threadIdx.x % PIECES;
    float value[8] = {};
    if (row < M) {
        const float* from = shares + (size_t)row * RANKS + piece * 8;
#pragma unroll 8
        for (int tile = 0; tile < tiles; tile++, from += padded * RANKS) add_eight(value, from);
    }
    store_low<PIECES>(value, piece, row, row < padded, M, padded, low, low_scale);
}

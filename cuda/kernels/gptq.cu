// GPTQ's inner loop (the mathematics is in quant/quantizer/gptq.py): it rounds a block of B columns of the weight, from last to first.
// Column i gets the code nearest to  w_i + p_i / C_ii.  Its error e_i times C_ij is then added to p_j of the columns j before it.
//
// Rows are independent, and columns depend on each other. A warp has a row, and a lane holds four neighbouring columns in registers.
// A step is the rounding in one lane, a shuffle of its error to all lanes, and four multiply-adds per lane. C is in shared memory, and
// the warp reads 512 bytes of a row of it at a time. Its zeros above the diagonal leave the finished columns unchanged.
//
//   CTA   16 warps; each takes the rows  warp, warp + warps of the grid, ...

constexpr int WARPS = 16;

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) gptq_block(
    const float* __restrict__ weight,   // (N, B), rows weight_stride floats apart; B at most 128, a multiple of 4
    const float* __restrict__ pending,  // (N, B), rows pending_stride floats apart
    const float* __restrict__ steps,    // (N, groups_a_row)
    const float* __restrict__ inverse,  // (N, groups_a_row), 1 / steps, because a division is a subroutine call
    const int* __restrict__ groups,     // (B,)
    const float* __restrict__ lower,    // (B, B)
    const float* __restrict__ turned,   // (B,), 1 / the diagonal of lower
    signed char* __restrict__ codes,    // (N, B), rows codes_stride apart
    float* __restrict__ lost,           // (N, B)
    int N, int B, int weight_stride, int pending_stride, int codes_stride, int groups_a_row) {
  extern __shared__ __align__(16) float c[];  // (B, B)

  for (int i = threadIdx.x; i < B * B / 4; i += 32 * WARPS) ((float4*)c)[i] = ((const float4*)lower)[i];
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = 4 * lane;
  const bool mine = first < B;  // with B = 64 half of the lanes have no columns
  float scale[4] = {};
  int group[4] = {};
  if (mine)
#pragma unroll
    for (int s = 0; s < 4; s++) {
      scale[s] = turned[first + s];
      group[s] = groups[first + s];
    }

  for (int row = blockIdx.x * WARPS + warp; row < N; row += gridDim.x * WARPS) {
    float w[4] = {}, p[4] = {}, step[4] = {}, per_step[4] = {}, error[4] = {};
    signed char code[4] = {};
    if (mine) {
      *(float4*)w = *(const float4*)(weight + (size_t)row * weight_stride + first);
      *(float4*)p = *(const float4*)(pending + (size_t)row * pending_stride + first);
#pragma unroll
      for (int s = 0; s < 4; s++) {
        step[s] = steps[(size_t)row * groups_a_row + group[s]];
        per_step[s] = inverse[(size_t)row * groups_a_row + group[s]];
      }
    }

    for (int owner = B / 4 - 1; owner >= 0; owner--) {
#pragma unroll
      for (int s = 3; s >= 0; s--) {
        if (lane == owner) {
          const float nearest = rintf((w[s] + p[s] * scale[s]) * per_step[s]);
          const float clamped = fminf(fmaxf(nearest, -8.0f), 7.0f);
          code[s] = (signed char)(int)clamped;
          error[s] = w[s] - clamped * step[s];
        }
        const float e = __shfl_sync(0xffffffffu, error[s], owner);
        if (mine) {
          const float4 factor = *(const float4*)(c + (4 * owner + s) * B + first);
          p[0] = fmaf(e, factor.x, p[0]);
          p[1] = fmaf(e, factor.y, p[1]);
          p[2] = fmaf(e, factor.z, p[2]);
          p[3] = fmaf(e, factor.w, p[3]);
        }
      }
    }

    if (mine) {
      *(char4*)(codes + (size_t)row * codes_stride + first) = make_char4(code[0], code[1], code[2], code[3]);
      *(float4*)(lost + (size_t)row * B + first) = *(float4*)error;
    }
  }
}

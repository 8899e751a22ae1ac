// The 4-bit rounding error of groups of 64 weights with given steps: the sum of energy * (weight - code * step)^2. The search for scales
// computes it twenty times for every group. PyTorch needs eight passes over the weight each time, this kernel one.
//
// 16 lanes have a group, with four neighbouring weights each. The lanes' sums are added in a fixed order.

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS, 4) group_error(
    const float4* __restrict__ weight,   // (count, 64)
    const float* __restrict__ steps,     // (count,)
    const float* __restrict__ inverse,   // (count,), 1 / steps, because a division is a subroutine call
    const float4* __restrict__ energy,   // (groups_a_row, 64)
    float* __restrict__ error,           // (count,)
    int count, int groups_a_row) {
  const int lane = threadIdx.x % 16;
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;  // this group's lanes; the other group's may have left the loop
  for (int group = (blockIdx.x * THREADS + threadIdx.x) / 16; group < count; group += gridDim.x * (THREADS / 16)) {
    const float4 w = weight[group * 16 + lane], e = energy[group % groups_a_row * 16 + lane];
    const float step = steps[group], per_step = inverse[group];
    const auto lost = [&](float value, float weighs) {
      const float code = fminf(fmaxf(rintf(value * per_step), -8.0f), 7.0f), difference = fmaf(code, step, -value);
      return weighs * difference * difference;
    };
    float sum = lost(w.x, e.x) + lost(w.y, e.y) + (lost(w.z, e.z) + lost(w.w, e.w));
#pragma unroll
    for (int apart = 8; apart; apart /= 2) sum += __shfl_xor_sync(half, sum, apart);
    if (lane == 0) error[group] = sum;
  }
}

// y = silu(gate) * up, rounded once, in one pass. A thread has 8 numbers; reading and writing memory bounds the kernel.
//
// -D: HALF as in common.cuh
#include "common.cuh"

// gate / (1 + exp(-gate)) * up. The exponential of a large -gate is Inf, and the quotient then 0.
DEVICE float gated(float gate, float up) {
  float power;
  asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.4426950409f));
  return divide(gate, 1.f + power) * up;
}

DEVICE u32 gated(u32 gate, u32 up) {
  return from_float2(gated(low_float(gate), low_float(up)), gated(high_float(gate), high_float(up)));
}

extern "C" __global__ void __launch_bounds__(256) swiglu(const u16* __restrict__ gate, const u16* __restrict__ up, u16* __restrict__ y,
                                                         int pieces) {
  wait_for_previous_grid();
  const int piece = blockIdx.x * 256 + threadIdx.x;
  if (piece >= pieces) return;
  const uint4 g = load_once16(gate + (size_t)piece * 8), u = load_once16(up + (size_t)piece * 8);
  *(uint4*)(y + (size_t)piece * 8) = make_uint4(gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, u.w));
}

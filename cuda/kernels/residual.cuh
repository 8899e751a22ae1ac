// The end of an attention or of an MLP: the states plus a gate times the update.
#pragma once
#include "common.cuh"

// An fp16 model limits its hidden states to fp16's range, as ComfyUI's blocks do: NaN becomes 0, and Inf the largest number.
DEVICE float in_range(float f) {
#if HALF
  return f == f ? fminf(fmaxf(f, -65504.f), 65504.f) : 0.f;
#else
  return f;
#endif
}

// x + gate * y of a word's two numbers, with a gate for each, rounded to 16 bits. y is rounded before: separate passes give the same bits.
DEVICE u32 add_gated(u32 x, u32 y, float low_gate, float high_gate) {
  return from_float2(in_range(fmaf(low_gate, low_float(y), low_float(x))), in_range(fmaf(high_gate, high_float(y), high_float(x))));
}

// The same for eight numbers.
DEVICE uint4 add_gated(uint4 x, uint4 y, uint4 gate) {
  return make_uint4(add_gated(x.x, y.x, low_float(gate.x), high_float(gate.x)), add_gated(x.y, y.y, low_float(gate.y), high_float(gate.y)),
                    add_gated(x.z, y.z, low_float(gate.z), high_float(gate.z)), add_gated(x.w, y.w, low_float(gate.w), high_float(gate.w)));
}

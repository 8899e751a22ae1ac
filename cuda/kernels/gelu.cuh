// The activation function that a GEMM may apply to its outputs: PyTorch's GELU with approximate="tanh".
#pragma once
#include "common.cuh"

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), with one instruction for the tanh. The instruction's relative error is at most
// 2^-11, and it returns exactly 1 for large arguments. The result is within 2^-12 |x| and at least -0.1703, so that GELU_SHIFT makes it
// positive.
DEVICE float gelu(float x) {
  float tanh;
  const float inner = x * fmaf(0.0356774081f, x * x, 0.7978845608f), half = 0.5f * x;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(inner));
  return fmaf(half, tanh, half);
}

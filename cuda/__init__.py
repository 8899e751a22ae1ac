"""The arithmetic of SVDQuant: the 4-bit format, every op in plain PyTorch, and the CUDA kernels behind the ops that a model calls."""

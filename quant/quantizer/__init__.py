"""The algorithm: calibration, smoothing, low rank, scales, rounding, GPTQ, refit, the pipeline and its report."""

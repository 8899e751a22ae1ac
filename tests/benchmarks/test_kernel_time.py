"""The kinds of kernels in benchmarks/kernel_time.py. The names are those that profilers print on an H100 or H200."""

import kernel_time
import pytest
import torch

NAMES = {
    "gemm": ["gemm", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "gemm_norm_next", "add_partial_sums",
             "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<...>>>(Params)",
             "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams<float>)",
             "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1_execute_kernel__5x_cublas",
             "void gemv2T_kernel_val<int, int, __nv_bfloat16, 128, 16, 4, 4, false>(Params)", "triton_tem_fused_mm_3"],
    "attention": ["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 4, cutlass::bfloat16_t>>(Flash_fwd_params)",
                  "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
                  "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x128_kernel0_0", "qk_int_sv_f8_attn_kernel"],
    "quantize": ["quantize", "quantize_registers", "norm_quantize",
                 "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, float*)"],
    "awq": ["awq"],
    "other": ["void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl, std::array<char*, 2ul>>(int)",
              "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int)",
              "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>>(int)",
              "Memcpy DtoD (Device -> Device)",
              "triton_red_fused__scaled_mm__to_copy_abs_amax_native_layer_norm_7", "triton_poi_fused_addmm_gelu_2", "qk_norm_rope",
              "triton_poi_fused__scaled_dot_product_flash_attention_cat_mul_12"]}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in NAMES.items() for name in names])
def test_the_kind_of_a_kernel(kind, name):
    assert kernel_time.kind(name) == kind


def test_every_kernel_is_counted_once():
    times = [(name, 1000.0) for names in NAMES.values() for name in names]
    assert kernel_time.by_kind(times) == {kind: len(names) for kind, names in NAMES.items()}


@pytest.mark.gpu
def test_the_kernels_of_a_product_and_an_addition():
    x = torch.randn(4096, 4096, device="cuda").bfloat16()
    (x @ x).add_(1)
    found = kernel_time.by_kind(kernel_time.kernel_times(lambda: (x @ x).add_(1)))
    assert 0.1 < found["gemm"] < 2 and 0.005 < found["other"] < found["gemm"] and found["attention"] == found["quantize"] == 0

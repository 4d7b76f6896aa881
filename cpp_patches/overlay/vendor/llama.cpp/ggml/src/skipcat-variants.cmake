# The CPU backends that a wheel for unknown machines holds, one of which is chosen when the
# library is loaded. Fewer than ggml's own list: none for x86-64 before SSE4.2, none with AMX
# (flags.cmake says why), and none with SME, which GCC 12 does not know.
if (GGML_SYSTEM_ARCH STREQUAL "x86")
    ggml_add_cpu_backend_variant(sse42       SSE42)
    ggml_add_cpu_backend_variant(sandybridge SSE42 AVX)
    ggml_add_cpu_backend_variant(haswell     SSE42 AVX F16C FMA AVX2 BMI2)
    ggml_add_cpu_backend_variant(alderlake   SSE42 AVX F16C FMA AVX2 BMI2 AVX_VNNI)
    ggml_add_cpu_backend_variant(skylakex    SSE42 AVX F16C FMA AVX2 BMI2 AVX512)
    ggml_add_cpu_backend_variant(icelake     SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI)
    ggml_add_cpu_backend_variant(zen4        SSE42 AVX F16C FMA AVX2 BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16)
elseif (GGML_SYSTEM_ARCH STREQUAL "ARM")
    ggml_add_cpu_backend_variant(armv8.0_1)
    ggml_add_cpu_backend_variant(armv8.2_1 DOTPROD)
    ggml_add_cpu_backend_variant(armv8.2_2 DOTPROD FP16_VECTOR_ARITHMETIC)
    # many phones have i8mm, but offer no SVE
    ggml_add_cpu_backend_variant(armv8.6_0 DOTPROD FP16_VECTOR_ARITHMETIC MATMUL_INT8)
    ggml_add_cpu_backend_variant(armv8.6_1 DOTPROD FP16_VECTOR_ARITHMETIC SVE MATMUL_INT8)
    ggml_add_cpu_backend_variant(armv8.6_2 DOTPROD FP16_VECTOR_ARITHMETIC SVE MATMUL_INT8 SVE2)
else()
    message(FATAL_ERROR "SKIPCAT_CPU_VARIANTS knows no variants for ${CMAKE_SYSTEM_PROCESSOR}")
endif()

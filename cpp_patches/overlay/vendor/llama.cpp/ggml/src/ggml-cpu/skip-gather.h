#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void ggml_compute_forward_skip_gather (const struct ggml_compute_params * params, struct ggml_tensor * dst);
void ggml_compute_forward_skip_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of the work buffer for SKIP_MUL_MAT
size_t ggml_skip_mul_mat_work_size(int n_threads, const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif

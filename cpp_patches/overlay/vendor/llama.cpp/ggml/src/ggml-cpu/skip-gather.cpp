#include "skip-gather.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include "skip-rows.h"

void ggml_compute_forward_skip_gather(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * x    = dst->src[0]; // [n, n1, n2, n3]
    const ggml_tensor * mask = dst->src[1]; // [(n + 31)/32]

    const int64_t n      = x->ne[0];
    const int64_t rank   = ggml_get_op_params_i32(dst, 0);
    const int64_t n_rest = n - rank;
    const int64_t n_rows = x->ne[1]*x->ne[2]*x->ne[3];

    // the graph may come from elsewhere (RPC)
    GGML_ASSERT(rank > 0 && rank < n);
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float));
    GGML_ASSERT(mask->type == GGML_TYPE_I32 && ggml_is_contiguous(mask) && ggml_nelements(mask) == (n + 31)/32);
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst) && ggml_nelements(dst) == n*n_rows);

    float * rest_data = (float *) dst->data;       // [n_rest, n_rows]
    float * skip_data = rest_data + n_rest*n_rows; // [rank,   n_rows]

    const int64_t per_thread = (n_rows + params->nth - 1)/params->nth;
    const int64_t row_begin  = std::min(n_rows, per_thread*params->ith);
    const int64_t row_end    = std::min(n_rows, row_begin + per_thread);

    for (int64_t row = row_begin; row < row_end; row++) {
        const float * x_row = row_of(x, row);

        half_row skip = { skip_data + row*rank,   rank   };
        half_row rest = { rest_data + row*n_rest, n_rest };

        if (params->use_ref) {
            split_scalar(x_row, (const uint32_t *) mask->data, 0, n, skip, rest);
        } else {
            split_row(x_row, (const uint32_t *) mask->data, n, skip, rest);
        }
    }
}

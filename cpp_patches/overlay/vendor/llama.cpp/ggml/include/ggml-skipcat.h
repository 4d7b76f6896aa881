#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// split the inputs of a low-rank projection by its skip mask
//
// x:    [n, n1, n2, n3]  F32, rows may be strided
// mask: [(n + 31)/32]    I32, bit j%32 of word j/32 set: input j is in the skip set
// rank: inputs in the skip set, 0 < rank < n
//
// result: [n*n_rows] F32, n_rows = n1*n2*n3: first the rest of every row, [n - rank, n_rows],
// then the skip set of every row, [rank, n_rows]. Both parts are contiguous matrices, so that
// every mul_mat kernel takes them (AMX refuses strided rows).
GGML_API struct ggml_tensor * ggml_skip_gather(
        struct ggml_context * ctx,
        struct ggml_tensor  * x,
        struct ggml_tensor  * mask,
        int64_t               rank);

// the same split, the product with T and the sum in one: T x_R + x_S, F32 [rank, n1, n2, n3]
//
// t: [n - rank, rank]
GGML_API struct ggml_tensor * ggml_skip_mul_mat(
        struct ggml_context * ctx,
        struct ggml_tensor  * t,
        struct ggml_tensor  * x,
        struct ggml_tensor  * mask);

#ifdef __cplusplus
}
#endif

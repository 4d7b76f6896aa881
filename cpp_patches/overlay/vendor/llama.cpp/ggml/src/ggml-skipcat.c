#include "ggml-skipcat.h"

#include "ggml-impl.h"

struct ggml_tensor * ggml_skip_gather(
        struct ggml_context * ctx,
        struct ggml_tensor  * x,
        struct ggml_tensor  * mask,
        int64_t               rank) {
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float));
    GGML_ASSERT(mask->type == GGML_TYPE_I32 && ggml_is_contiguous(mask));
    GGML_ASSERT(ggml_nelements(mask) == (x->ne[0] + 31)/32);
    GGML_ASSERT(rank > 0 && rank < x->ne[0] && rank <= INT32_MAX);

    struct ggml_tensor * result = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ggml_nelements(x));

    ggml_set_op_params_i32(result, 0, (int32_t) rank);

    result->op     = GGML_OP_SKIP_GATHER;
    result->src[0] = x;
    result->src[1] = mask;

    return result;
}

struct ggml_tensor * ggml_skip_mul_mat(
        struct ggml_context * ctx,
        struct ggml_tensor  * t,
        struct ggml_tensor  * x,
        struct ggml_tensor  * mask) {
    GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float));
    GGML_ASSERT(mask->type == GGML_TYPE_I32 && ggml_is_contiguous(mask));
    GGML_ASSERT(ggml_nelements(mask) == (x->ne[0] + 31)/32);
    GGML_ASSERT(ggml_is_matrix(t) && ggml_is_contiguous(t));
    GGML_ASSERT(t->ne[0] + t->ne[1] == x->ne[0]);

    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, t->ne[1], x->ne[1], x->ne[2], x->ne[3]);

    result->op     = GGML_OP_SKIP_MUL_MAT;
    result->src[0] = t;
    result->src[1] = x;
    result->src[2] = mask;

    return result;
}

#include "skipcat-impl.h"

#include "llama-model.h"

#include "ggml-skipcat.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

// SKIPCAT_FUSED: 1 the fused op wherever it can be, 0 nowhere, else where it was measured faster: for one token,
// where three barriers less are 4 to 9 % of the time, and for more with repacked weights, where up to 10 % were
// found and no loss; other kernels take x_R as the composed graph makes it, and both forms are as fast
static bool use_fused(const ggml_tensor * t, const ggml_tensor * x) {
    ggml_backend_buffer_type_t buft = t->buffer ? ggml_backend_buffer_get_type(t->buffer) : nullptr;
    const bool repacked = buft != nullptr && strcmp(ggml_backend_buft_name(buft), "CPU_REPACK") == 0;
    if (buft == nullptr || (!repacked && !ggml_backend_buft_is_host(buft))) {
        return false;
    }
    if (const char * forced = getenv("SKIPCAT_FUSED")) {
        if (strcmp(forced, "0") == 0 || strcmp(forced, "1") == 0) {
            return forced[0] == '1';
        }
        static std::once_flag warned;
        std::call_once(warned, [&] { LLAMA_LOG_WARN("SKIPCAT_FUSED is '%s'; only 0 and 1 mean something\n", forced); });
    }
    return repacked || ggml_nrows(x) == 1;
}

// z = x_S + T x_R, or A x without Skip: {rank, n1, n2, n3}
static ggml_tensor * build_z(ggml_context * ctx, const skipcat_owner & owner, ggml_tensor * x) {
    if (owner.mask == nullptr) {
        return ggml_mul_mat(ctx, owner.a, x);
    }

    if (x->type != GGML_TYPE_F32) {
        x = ggml_cast(ctx, x, GGML_TYPE_F32);
    }

    if (use_fused(owner.a, x)) {
        return ggml_skip_mul_mat(ctx, owner.a, x, owner.mask);
    }

    const int64_t n_rest = owner.n - owner.rank;
    const int64_t n_rows = ggml_nrows(x);

    ggml_tensor * parts = ggml_skip_gather(ctx, x, owner.mask, owner.rank);

    // contiguous [n_part, n1, n2, n3] at an element offset
    const auto part = [&](int64_t n_part, int64_t offset) {
        const size_t nb1 = n_part*sizeof(float);
        const size_t nb2 = nb1*x->ne[1];
        return ggml_view_4d(ctx, parts, n_part, x->ne[1], x->ne[2], x->ne[3], nb1, nb2, nb2*x->ne[2], offset*sizeof(float));
    };

    ggml_tensor * x_rest = part(n_rest, 0);
    ggml_tensor * x_skip = part(owner.rank, n_rest*n_rows);

    return ggml_add(ctx, ggml_mul_mat(ctx, owner.a, x_rest), x_skip);
}

ggml_tensor * skipcat_mul_mat(
        ggml_context * ctx,
        const skipcat_model * model,
        int32_t below,
        skipcat_graph_cache & cache,
        const ggml_tensor * w,
        ggml_tensor * x) {
    if (model == nullptr) {
        return nullptr;
    }
    skipcat_check_input(w, x);
    const auto it = model->weights.find(w);
    if (it == model->weights.end()) {
        return nullptr;
    }

    const int32_t level = (int32_t) model->levels.size() - 1 - below;

    ggml_tensor * y = nullptr;
    for (const auto & factors : it->second.factors) {
        if (!skipcat_uses(factors, level)) {
            continue;
        }
        ggml_tensor *& z = cache[{ factors.owner, x }];
        if (z == nullptr) {
            z = build_z(ctx, *factors.owner, x);
        }
        ggml_tensor * part = ggml_mul_mat(ctx, factors.b, z);
        y = y == nullptr ? part : ggml_add(ctx, y, part);
    }

    return y == nullptr ? ggml_mul_mat(ctx, it->second.dense, x) : y;
}

void skipcat_check_graph(const skipcat_model * model, ggml_cgraph * gf) {
    if (model == nullptr) {
        return;
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_ROPE) {
            skipcat_check_rope(node);
        }
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            if (node->src[j] != nullptr && model->weights.count(node->src[j]) != 0) {
                throw std::runtime_error(format("this architecture uses '%s' in a way that low-rank factors cannot serve", ggml_get_name(node->src[j])));
            }
        }
    }
}

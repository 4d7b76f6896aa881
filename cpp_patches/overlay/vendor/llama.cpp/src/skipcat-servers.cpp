// How llama_encode and llama_decode end. An exception is an error there, as they are called from C. A graph on an RPC
// server is computed after it was handed over, and what is read of a lost server is zeros: so both end with the question
// whether all servers are still there.

#include "skipcat.h"

#include "llama-context.h"
#include "llama-impl.h"

#include "ggml-backend.h"

#include <cstring>
#include <exception>

static constexpr int32_t FAILED = -3; // as for every graph that could not be computed

static int32_t unless_lost(const llama_context * ctx, int32_t status) {
    ggml_backend_sched_t sched = ctx->get_sched();
    for (int i = 0; sched != nullptr && i < ggml_backend_sched_get_n_backends(sched); i++) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        ggml_backend_dev_t dev = ggml_backend_get_device(backend);
        ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
        if (reg == nullptr || strcmp(ggml_backend_reg_name(reg), "RPC") != 0) {
            continue;
        }
        const auto is_lost = (bool (*)(ggml_backend_dev_t)) ggml_backend_reg_get_proc_address(reg, "skipcat_rpc_is_lost");
        ggml_backend_synchronize(backend);
        if (is_lost != nullptr && is_lost(dev)) {
            status = FAILED;
        }
    }
    return status;
}

int32_t skipcat_encode(llama_context * ctx, const llama_batch & batch) {
    int32_t status = FAILED;
    try {
        status = ctx->encode(batch);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("llama_encode: %s\n", err.what());
    }
    return unless_lost(ctx, status);
}

int32_t skipcat_decode(llama_context * ctx, const llama_batch & batch) {
    int32_t status = FAILED;
    try {
        status = ctx->decode(batch);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("llama_decode: %s\n", err.what());
    }
    return unless_lost(ctx, status);
}

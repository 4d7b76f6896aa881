#pragma once

// Low-rank projections with skip masks, for every architecture whose graph multiplies its
// weights through llm_graph_context::build_lora_mm.
//
// A weight W {n, m} may be stored as factors: z = x_S + T x_R once per owner and input,
// y = B' z. The loader gives the architecture a placeholder of W's shape, without data;
// build_lora_mm finds the factors by the placeholder.

#include "llama.h"
#include "llama-arch.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

struct llama_model_loader;

// a projection, shared by the layers of a group that read the same input
struct skipcat_owner {
    ggml_tensor * a;    // T {n - rank, rank}, or A {n, rank} without a mask
    ggml_tensor * mask; // I32 {(n + 31)/32}, or null
    int64_t       n;
    int64_t       rank;
};

struct skipcat_weight {
    const skipcat_owner * owner;
    ggml_tensor         * b; // B' {rank, m}
};

struct skipcat_model {
    std::unordered_map<const ggml_tensor *, skipcat_weight> weights; // by placeholder
    std::map<std::string, skipcat_owner> owners;                     // by the name of a
    std::set<std::string> created;                                   // names of all tensors in use
    ggml_context_ptr ctx;                                            // the placeholders
};

// z by owner and input, within one graph
using skipcat_graph_cache = std::map<std::pair<const skipcat_owner *, const ggml_tensor *>, ggml_tensor *>;

using skipcat_create_fn = std::function<ggml_tensor * (const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, int flags)>;

// "skipcat-llama" -> "llama"; other names are returned as they are
std::string skipcat_base_arch(const std::string & name);

// null for an ordinary file; throws if the file needs a newer runtime
std::shared_ptr<skipcat_model> skipcat_open(const llama_model_loader & ml);

// the placeholder of a weight that the file holds as factors, null for any other weight;
// throws with the tensor's name if mask, ranks or types do not fit
ggml_tensor * skipcat_create_tensor(
        llama_model_loader & ml,
        const LLM_TN_IMPL & tn,
        const std::initializer_list<int64_t> & ne,
        int flags,
        const skipcat_create_fn & create);

// throws with the tensor's name if a factor of the file was not used
std::shared_ptr<const skipcat_model> skipcat_finish(const llama_model_loader & ml);

// y = B' z for a placeholder w, null for any other weight
ggml_tensor * skipcat_mul_mat(
        ggml_context * ctx,
        const skipcat_model * model,
        skipcat_graph_cache & cache,
        const ggml_tensor * w,
        ggml_tensor * x);

// throws if an architecture used a placeholder without build_lora_mm
void skipcat_check_graph(const skipcat_model * model, ggml_cgraph * gf);

extern "C" {
    // revision of the patch set, for example "skipcat.1"
    LLAMA_API const char * skipcat_runtime_version(void);

    // newest version of the file format that this runtime reads
    LLAMA_API int32_t skipcat_format_version(void);
}

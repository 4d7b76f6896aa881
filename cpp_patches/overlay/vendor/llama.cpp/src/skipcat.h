#pragma once

// Low-rank projections with skip masks, for every architecture whose graph multiplies its
// weights through llm_graph_context::build_lora_mm.
//
// A weight W {n, m} may be stored as factors: z = x_S + T x_R once per owner and input,
// y = B' z. The loader gives the architecture a placeholder of W's shape, without data;
// build_lora_mm finds the factors by the placeholder.
//
// A file may have rank levels: at a level, W is the sum of the factors that the level uses,
// and the dense weight where it uses none.

#include "llama.h"
#include "llama-arch.h"

#include "ggml-cpp.h"

#include "skipcat-assert.h"

#include <cstdint>
#include <cstdio>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct llama_model_loader;

// a projection, shared by the layers of a group that read the same input
struct skipcat_owner {
    ggml_tensor * a;    // T {n - rank, rank}, or A {n, rank} without a mask
    ggml_tensor * mask; // I32 {(n + 31)/32}, or null
    int64_t       n;
    int64_t       rank;
};

// one summand of a weight, used by the levels from first to last
struct skipcat_factors {
    const skipcat_owner * owner;
    ggml_tensor         * b; // B' {rank, m}
    int32_t first;
    int32_t last;
};

struct skipcat_weight {
    std::vector<skipcat_factors> factors;
    ggml_tensor * dense; // null if every level has factors
};

// the levels that some factors are for; infix: what stands for them in the factors' names, "" for all levels
struct skipcat_range {
    int32_t     first;
    int32_t     last;
    std::string infix;
};

struct skipcat_loading {
    skipcat_loading()  { skipcat_n_loading++; }
    ~skipcat_loading() { skipcat_n_loading--; }
    skipcat_loading(const skipcat_loading &) = delete;
    skipcat_loading & operator=(const skipcat_loading &) = delete;
};

struct skipcat_model {
    std::unique_ptr<skipcat_loading> loading = std::make_unique<skipcat_loading>(); // null once it is loaded
    std::vector<float>         levels; // their ratios, rising; the last one is the whole file
    std::vector<skipcat_range> ranges; // all that a name may have
    std::unordered_map<const ggml_tensor *, skipcat_weight> weights; // by placeholder
    std::map<std::string, skipcat_owner> owners;                     // by the name of a
    std::set<std::string> created;                                   // names of all tensors in use
    ggml_context_ptr ctx;                                            // the placeholders
    bool creating_dense = false;                                     // the next weight is itself, not a placeholder
};

// z by owner and input, within one graph
using skipcat_graph_cache = std::map<std::pair<const skipcat_owner *, const ggml_tensor *>, ggml_tensor *>;

using skipcat_create_fn = std::function<ggml_tensor * (const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, int flags)>;

// "skipcat-llama" -> "llama"; other names are returned as they are
std::string skipcat_base_arch(const std::string & name);

// throws with the key's or the tensor's name if the structure of a GGUF file does not add up, before llama.cpp reads it
void skipcat_check_file(const char * path);
void skipcat_check_file(FILE * file);

// null for an ordinary file; throws if the file needs a newer runtime, or with the name of a key that cannot be
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

// y for a placeholder w, null for any other weight; below: how far the level is from the last one
ggml_tensor * skipcat_mul_mat(
        ggml_context * ctx,
        const skipcat_model * model,
        int32_t below,
        skipcat_graph_cache & cache,
        const ggml_tensor * w,
        ggml_tensor * x);

// throws if an architecture used a placeholder without build_lora_mm, or rotates what keys make impossible
void skipcat_check_graph(const skipcat_model * model, ggml_cgraph * gf);

// what llama_encode and llama_decode return: the code of a failed graph where an exception, which may not reach a
// caller in C, ends them, or where an RPC server of the context is lost
int32_t skipcat_encode(llama_context * ctx, const llama_batch & batch);
int32_t skipcat_decode(llama_context * ctx, const llama_batch & batch);

// the token that SentencePiece spells a byte with, or the unknown token
llama_token skipcat_byte_to_token(const llama_vocab & vocab, uint8_t byte);

extern "C" {
    // revision of the patch set, for example "skipcat.1"
    LLAMA_API const char * skipcat_runtime_version(void);

    // newest version of the file format that this runtime reads
    LLAMA_API int32_t skipcat_format_version(void);

    // number of the file's rank levels, 1 for a file without
    LLAMA_API int32_t skipcat_n_levels(const struct llama_model * model);

    // kept share of the layers' parameters at a level, by its place from 0; 1 for a dense file, -1 for no such level
    LLAMA_API float skipcat_level_ratio(const struct llama_model * model, int32_t level);

    // the level that decodes of this context use, at first the last one
    LLAMA_API int32_t skipcat_get_level(const struct llama_context * ctx);

    // from the next decode on; returns 0, or -1 and changes nothing if the file has no such level
    LLAMA_API int32_t skipcat_set_level(struct llama_context * ctx, int32_t level);
}

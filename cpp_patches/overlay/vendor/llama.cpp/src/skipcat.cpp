#include "skipcat.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "ggml-skipcat.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <vector>

#define SKIPCAT_RUNTIME_REVISION 5
#define SKIPCAT_FORMAT_VERSION   2

#define SKIPCAT_MAX_LEVELS 8

#define SKIPCAT_STR_(x) #x
#define SKIPCAT_STR(x) SKIPCAT_STR_(x)

static const char * const SKIPCAT_ARCH_PREFIX    = "skipcat-";
static const char * const SKIPCAT_RUNTIME_PREFIX = "skipcat.";

const char * skipcat_runtime_version(void) {
    return "skipcat." SKIPCAT_STR(SKIPCAT_RUNTIME_REVISION);
}

int32_t skipcat_format_version(void) {
    return SKIPCAT_FORMAT_VERSION;
}

static bool starts_with(const std::string & s, const char * prefix) {
    return s.compare(0, strlen(prefix), prefix) == 0;
}

static bool ends_with(const std::string & s, const char * suffix) {
    const size_t n = strlen(suffix);
    return s.size() >= n && s.compare(s.size() - n, n, suffix) == 0;
}

std::string skipcat_base_arch(const std::string & name) {
    return starts_with(name, SKIPCAT_ARCH_PREFIX) ? name.substr(strlen(SKIPCAT_ARCH_PREFIX)) : name;
}

//
// loading
//

static bool is_factor(const std::string & name) {
    return name.find(".lr_a") != std::string::npos || name.find(".lr_b") != std::string::npos ||
           name.find(".skip_mask") != std::string::npos;
}

// N of "skipcat.N", 0 for anything else; strtol alone would take spaces, signs and words
static long parse_runtime(const std::string & s) {
    if (!starts_with(s, SKIPCAT_RUNTIME_PREFIX)) {
        return 0;
    }
    const std::string digits = s.substr(strlen(SKIPCAT_RUNTIME_PREFIX));
    return digits.find_first_not_of("0123456789") == std::string::npos ? strtol(digits.c_str(), nullptr, 10) : 0;
}

// the file's format version
static uint32_t check_versions(const gguf_context * meta) {
    const int64_t version_id = gguf_find_key(meta, "skipcat.format_version");
    if (version_id < 0 || gguf_get_kv_type(meta, version_id) != GGUF_TYPE_UINT32) {
        throw std::runtime_error("key 'skipcat.format_version' is missing or not a u32");
    }
    const uint32_t version = gguf_get_val_u32(meta, version_id);
    if (version < 1 || version > SKIPCAT_FORMAT_VERSION) {
        throw std::runtime_error(format("skipcat.format_version is %u, but this runtime (%s) reads up to %d",
                version, skipcat_runtime_version(), SKIPCAT_FORMAT_VERSION));
    }

    const int64_t runtime_id = gguf_find_key(meta, "skipcat.runtime_min");
    if (runtime_id < 0 || gguf_get_kv_type(meta, runtime_id) != GGUF_TYPE_STRING) {
        throw std::runtime_error("key 'skipcat.runtime_min' is missing or not a string");
    }
    const std::string runtime = gguf_get_val_str(meta, runtime_id);
    const long revision = parse_runtime(runtime);
    if (revision < 1) {
        throw std::runtime_error("key 'skipcat.runtime_min' is not of the form 'skipcat.N'");
    }
    if (revision > SKIPCAT_RUNTIME_REVISION) {
        throw std::runtime_error(format("skipcat.runtime_min is %s, but this runtime is %s", runtime.c_str(), skipcat_runtime_version()));
    }

    return version;
}

static std::vector<float> read_levels(const gguf_context * meta, uint32_t version) {
    const int64_t levels_id = gguf_find_key(meta, "skipcat.levels");
    if (version == 1) {
        if (levels_id >= 0) {
            throw std::runtime_error("key 'skipcat.levels' is in a file of skipcat.format_version 1, which has no levels");
        }
        const int64_t ratio_id = gguf_find_key(meta, "skipcat.ratio");
        const bool has_ratio = ratio_id >= 0 && gguf_get_kv_type(meta, ratio_id) == GGUF_TYPE_FLOAT32;
        return { has_ratio ? gguf_get_val_f32(meta, ratio_id) : 1.0f };
    }

    if (levels_id < 0 || gguf_get_kv_type(meta, levels_id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, levels_id) != GGUF_TYPE_FLOAT32) {
        throw std::runtime_error("key 'skipcat.levels' is missing or not an array of f32");
    }
    const size_t n_levels = gguf_get_arr_n(meta, levels_id);
    if (n_levels < 2 || n_levels > SKIPCAT_MAX_LEVELS) {
        throw std::runtime_error(format("key 'skipcat.levels' has %zu values, but a file has 2 to %d levels", n_levels, SKIPCAT_MAX_LEVELS));
    }
    const float * ratios = (const float *) gguf_get_arr_data(meta, levels_id);
    float below = 0.0f;
    for (size_t i = 0; i < n_levels; i++) {
        // written so that it refuses NaN as well
        if (!(ratios[i] > below && ratios[i] <= 1.0f)) {
            throw std::runtime_error("key 'skipcat.levels' does not rise between 0 and 1");
        }
        below = ratios[i];
    }
    return { ratios, ratios + n_levels };
}

static bool has_factor_name(const std::string & name, const std::vector<skipcat_range> & ranges) {
    if (!starts_with(name, "blk.")) {
        return false;
    }
    for (const auto & range : ranges) {
        if (ends_with(name, (".lr_a" + range.infix + ".weight").c_str()) || ends_with(name, (".lr_b" + range.infix + ".weight").c_str()) ||
                ends_with(name, (".skip_mask" + range.infix).c_str())) {
            return true;
        }
    }
    return false;
}

std::shared_ptr<skipcat_model> skipcat_open(const llama_model_loader & ml) {
    if (!starts_with(ml.get_arch_name(), SKIPCAT_ARCH_PREFIX)) {
        return nullptr;
    }

    auto model = std::make_shared<skipcat_model>();

    const uint32_t version = check_versions(ml.metadata);
    model->levels = read_levels(ml.metadata, version);

    const int32_t n_levels = (int32_t) model->levels.size();
    for (int32_t first = 0; first < n_levels; first++) {
        for (int32_t last = first; last < n_levels; last++) {
            const bool all = first == 0 && last == n_levels - 1;
            model->ranges.push_back({ first, last, all ? "" : format(".%d.%d", first, last) });
        }
    }

    size_t n_factors = 0;
    for (const auto & [name, weight] : ml.weights_map) {
        if (!is_factor(name)) {
            continue;
        }
        if (!has_factor_name(name, model->ranges)) {
            throw std::runtime_error(format("tensor '%s' is not a tensor of skipcat.format_version %u with %d level%s",
                    name.c_str(), version, n_levels, n_levels == 1 ? "" : "s"));
        }
        n_factors++;
    }

    ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead()*(n_factors + 1),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };

    model->ctx.reset(ggml_init(params));
    if (!model->ctx) {
        throw std::runtime_error("failed to create ggml context");
    }

    return model;
}

// the group of a layer that may be low-rank, LLM_TENSOR_TOKEN_EMBD for any other
static llm_tensor group_of(llm_tensor member) {
    switch (member) {
        case LLM_TENSOR_ATTN_Q:
        case LLM_TENSOR_ATTN_K:
        case LLM_TENSOR_ATTN_V:
        case LLM_TENSOR_ATTN_QKV:
            return LLM_TENSOR_SKIPCAT_ATTN_IN;
        case LLM_TENSOR_ATTN_OUT:
            return LLM_TENSOR_SKIPCAT_ATTN_OUT;
        case LLM_TENSOR_FFN_GATE:
        case LLM_TENSOR_FFN_UP:
            return LLM_TENSOR_SKIPCAT_FFN_IN;
        case LLM_TENSOR_FFN_DOWN:
            return LLM_TENSOR_SKIPCAT_FFN_OUT;
        default:
            return LLM_TENSOR_TOKEN_EMBD;
    }
}

// Q8_1 and Q8_K hold activations only, the integer types and F64 have no mul_mat
static void check_weight_type(const ggml_tensor * t) {
    const bool is_float = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16;
    const bool is_quant = ggml_is_quantized(t->type) && t->type != GGML_TYPE_Q8_1 && t->type != GGML_TYPE_Q8_K;
    if (!is_float && !is_quant) {
        throw std::runtime_error(format("tensor '%s' has type %s, which cannot be multiplied", ggml_get_name(t), ggml_type_name(t->type)));
    }
}

// the mask decides where the op reads: it is checked against the rank before anything uses it
static void check_mask(llama_model_loader & ml, const std::string & name, int64_t n, int64_t rank) {
    const auto & weight = ml.require_weight(name.c_str());
    const int64_t n_words = (n + 31)/32;

    if (weight.tensor->type != GGML_TYPE_I32 || ggml_n_dims(weight.tensor) != 1 || weight.tensor->ne[0] != n_words) {
        throw std::runtime_error(format("tensor '%s' is not I32 with %lld elements", name.c_str(), (long long) n_words));
    }

    std::vector<uint32_t> words(n_words);
    const auto & file = ml.files.at(weight.idx);
    file->seek(weight.offs, SEEK_SET);
    file->read_raw(words.data(), n_words*sizeof(uint32_t));

    int64_t popcount = 0;
    for (int64_t j = 0; j < 32*n_words; j++) {
        const bool set = words[j/32] >> (j%32) & 1;
        if (set && j >= n) {
            throw std::runtime_error(format("tensor '%s' has a bit set past input %lld", name.c_str(), (long long) n - 1));
        }
        popcount += set;
    }
    if (popcount != rank) {
        throw std::runtime_error(format("tensor '%s' has %lld bits set, but the rank is %lld", name.c_str(), (long long) popcount, (long long) rank));
    }
}

static const skipcat_owner * create_owner(
        llama_model_loader & ml,
        const LLM_TN & tn,
        llm_tensor tensor,
        int bid,
        const std::string & infix,
        int64_t n,
        int64_t rank,
        const std::string & b_name,
        const skipcat_create_fn & create) {
    skipcat_model & model = *ml.skipcat;

    const std::string a_suffix    = "lr_a" + infix + ".weight";
    const std::string mask_suffix = "skip_mask" + infix;

    const auto a_tn    = tn(tensor, a_suffix.c_str(),    bid);
    const auto mask_tn = tn(tensor, mask_suffix.c_str(), bid);

    const auto it = model.owners.find(a_tn.str());
    if (it != model.owners.end()) {
        if (it->second.n != n || it->second.rank != rank) {
            throw std::runtime_error(format("tensor '%s' does not fit the projection '%s' (rank %lld, inputs %lld)",
                    b_name.c_str(), a_tn.str().c_str(), (long long) it->second.rank, (long long) it->second.n));
        }
        return &it->second;
    }

    const bool has_mask = ml.get_weight(mask_tn.str().c_str()) != nullptr;

    // without Skip a rank above n would be no factorisation, with Skip there must be a rest
    if (rank < 1 || rank > n || (has_mask && rank == n)) {
        throw std::runtime_error(format("tensor '%s' has rank %lld, but the layer has %lld inputs", b_name.c_str(), (long long) rank, (long long) n));
    }

    check_weight_type(ml.require_tensor_meta(a_tn.str()));

    skipcat_owner owner = { nullptr, nullptr, n, rank };
    owner.a = create(a_tn, { has_mask ? n - rank : n, rank }, 0);
    model.created.insert(a_tn.str());
    if (has_mask) {
        check_mask(ml, mask_tn.str(), n, rank);
        owner.mask = create(mask_tn, { (n + 31)/32 }, 0);
        model.created.insert(mask_tn.str());
    }

    return &model.owners.emplace(a_tn.str(), owner).first->second;
}

// the factors that a range of levels uses; b is null if the file has none of that range
static skipcat_factors create_factors(
        llama_model_loader & ml,
        const LLM_TN_IMPL & tn,
        llm_tensor group,
        const skipcat_range & range,
        const std::initializer_list<int64_t> & ne,
        const skipcat_create_fn & create) {
    const LLM_TN make_tn(tn.arch);

    const std::string a_suffix = "lr_a" + range.infix + ".weight";
    const std::string b_suffix = "lr_b" + range.infix + ".weight";

    const auto b_tn = make_tn(tn.tensor, b_suffix.c_str(), tn.bid, tn.xid);
    const std::string b_name = b_tn.str();

    skipcat_factors factors = { nullptr, nullptr, range.first, range.last };

    const ggml_tensor * b_meta = ml.get_tensor_meta(b_name.c_str());
    if (b_meta == nullptr) {
        return factors;
    }

    const int64_t n    = ne.begin()[0];
    const int64_t m    = ne.begin()[1];
    const int64_t rank = b_meta->ne[0];

    const std::string own_name   = make_tn(tn.tensor, a_suffix.c_str(), tn.bid).str();
    const std::string group_name = make_tn(group,     a_suffix.c_str(), tn.bid).str();

    const bool is_own   = ml.get_weight(own_name.c_str())   != nullptr;
    const bool is_group = ml.get_weight(group_name.c_str()) != nullptr;
    if (!is_own && !is_group) {
        throw std::runtime_error(format("tensor '%s' has no projection '%s' or '%s'", b_name.c_str(), own_name.c_str(), group_name.c_str()));
    }

    check_weight_type(b_meta);

    factors.owner = create_owner(ml, make_tn, is_own ? tn.tensor : group, tn.bid, range.infix, n, rank, b_name, create);
    factors.b     = create(b_tn, { rank, m }, 0);
    ml.skipcat->created.insert(b_name);

    return factors;
}

static bool uses(const skipcat_factors & factors, int32_t level) {
    return factors.first <= level && level <= factors.last;
}

// the lowest level without factors, -1 if there is none
static int32_t dense_level(const skipcat_weight & weight, int32_t n_levels) {
    for (int32_t level = 0; level < n_levels; level++) {
        bool has_factors = false;
        for (const auto & factors : weight.factors) {
            has_factors = has_factors || uses(factors, level);
        }
        if (!has_factors) {
            return level;
        }
    }
    return -1;
}

ggml_tensor * skipcat_create_tensor(
        llama_model_loader & ml,
        const LLM_TN_IMPL & tn,
        const std::initializer_list<int64_t> & ne,
        int flags,
        const skipcat_create_fn & create) {
    skipcat_model * model = ml.skipcat.get();
    if (model == nullptr || model->creating_dense || tn.bid < 0 || tn.suffix == nullptr || strcmp(tn.suffix, "weight") != 0) {
        return nullptr;
    }

    const std::string w_name = tn.str();

    std::string b_name; // of any factor, for messages
    for (const auto & range : model->ranges) {
        const std::string suffix = "lr_b" + range.infix + ".weight";
        const std::string name   = LLM_TN(tn.arch)(tn.tensor, suffix.c_str(), tn.bid, tn.xid).str();
        if (ml.get_weight(name.c_str()) != nullptr) {
            b_name = name;
        }
    }
    if (b_name.empty()) {
        return nullptr;
    }

    const llm_tensor group = group_of(tn.tensor);
    if (group == LLM_TENSOR_TOKEN_EMBD || ne.size() != 2) {
        throw std::runtime_error(format("tensor '%s': this layer cannot be low-rank", b_name.c_str()));
    }
    if (flags & llama_model_loader::TENSOR_SKIP) {
        throw std::runtime_error(format("tensor '%s': the architecture does not use this layer", b_name.c_str()));
    }
    if (ggml_tensor * w = ggml_get_tensor(model->ctx.get(), w_name.c_str())) {
        return w;
    }

    skipcat_weight weight = { {}, nullptr };
    for (const auto & range : model->ranges) {
        const skipcat_factors factors = create_factors(ml, tn, group, range, ne, create);
        if (factors.b != nullptr) {
            weight.factors.push_back(factors);
        }
    }

    const ggml_tensor * dense_meta = ml.get_tensor_meta(w_name.c_str());
    const int32_t level = dense_level(weight, (int32_t) model->levels.size());
    if (level < 0 && dense_meta != nullptr) {
        throw std::runtime_error(format("tensor '%s' is in the file besides its factor '%s'", w_name.c_str(), b_name.c_str()));
    }
    if (level >= 0) {
        if (dense_meta == nullptr) {
            throw std::runtime_error(format("tensor '%s' is missing, but level %d has no factors in its place", w_name.c_str(), level));
        }
        check_weight_type(dense_meta);
        model->creating_dense = true;
        weight.dense = create(tn, ne, 0);
        model->creating_dense = false;
    }

    ggml_tensor * w = ggml_new_tensor_2d(model->ctx.get(), GGML_TYPE_F16, ne.begin()[0], ne.begin()[1]);
    ggml_set_name(w, w_name.c_str());
    model->weights.emplace(w, std::move(weight));

    return w;
}

std::shared_ptr<const skipcat_model> skipcat_finish(const llama_model_loader & ml) {
    if (!ml.skipcat) {
        return nullptr;
    }
    for (const auto & [name, weight] : ml.weights_map) {
        if (is_factor(name) && ml.skipcat->created.count(name) == 0) {
            throw std::runtime_error(format("tensor '%s' belongs to no low-rank layer of this architecture", name.c_str()));
        }
    }
    return ml.skipcat;
}

//
// graph
//

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
    const auto it = model->weights.find(w);
    if (it == model->weights.end()) {
        return nullptr;
    }

    const int32_t level = (int32_t) model->levels.size() - 1 - below;

    ggml_tensor * y = nullptr;
    for (const auto & factors : it->second.factors) {
        if (!uses(factors, level)) {
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
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            if (node->src[j] != nullptr && model->weights.count(node->src[j]) != 0) {
                throw std::runtime_error(format("this architecture uses '%s' in a way that low-rank factors cannot serve", ggml_get_name(node->src[j])));
            }
        }
    }
}

//
// levels
//

int32_t skipcat_n_levels(const llama_model * model) {
    return model->skipcat ? (int32_t) model->skipcat->levels.size() : 1;
}

float skipcat_level_ratio(const llama_model * model, int32_t level) {
    if (level < 0 || level >= skipcat_n_levels(model)) {
        return -1.0f;
    }
    return model->skipcat ? model->skipcat->levels[level] : 1.0f;
}

int32_t skipcat_get_level(const llama_context * ctx) {
    return skipcat_n_levels(&ctx->get_model()) - 1 - ctx->get_cparams().skipcat_below;
}

int32_t skipcat_set_level(llama_context * ctx, int32_t level) {
    const int32_t n_levels = skipcat_n_levels(&ctx->get_model());
    if (level < 0 || level >= n_levels) {
        return -1;
    }
    ctx->get_cparams().skipcat_below = n_levels - 1 - level;
    return 0;
}

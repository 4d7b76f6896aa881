#include "skipcat-impl.h"

#include "llama-model-loader.h"

#include <cstring>
#include <stdexcept>

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

    skipcat_check_rank(b_name, n, rank, has_mask);
    skipcat_check_weight_type(ml.require_tensor_meta(a_tn.str()));

    skipcat_owner owner = { nullptr, nullptr, n, rank };
    owner.a = create(a_tn, { has_mask ? n - rank : n, rank }, 0);
    model.created.insert(a_tn.str());
    if (has_mask) {
        skipcat_check_mask(ml, mask_tn.str(), n, rank);
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

    skipcat_check_weight_type(b_meta);

    factors.owner = create_owner(ml, make_tn, is_own ? tn.tensor : group, tn.bid, range.infix, n, rank, b_name, create);
    factors.b     = create(b_tn, { rank, m }, 0);
    ml.skipcat->created.insert(b_name);

    return factors;
}

// the lowest level without factors, -1 if there is none
static int32_t dense_level(const skipcat_weight & weight, int32_t n_levels) {
    for (int32_t level = 0; level < n_levels; level++) {
        bool has_factors = false;
        for (const auto & factors : weight.factors) {
            has_factors = has_factors || skipcat_uses(factors, level);
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
    if (model == nullptr) {
        return nullptr;
    }
    const std::string w_name = tn.str();
    const ggml_tensor * meta = ml.get_tensor_meta(w_name.c_str());
    if (meta != nullptr && !skipcat_is_factor(w_name)) {
        skipcat_check_type(meta, tn.tensor, tn.suffix);
    }
    if (model->creating_dense || tn.bid < 0 || tn.suffix == nullptr || strcmp(tn.suffix, "weight") != 0) {
        return nullptr;
    }

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

    const int32_t level = dense_level(weight, (int32_t) model->levels.size());
    if (level < 0 && meta != nullptr) {
        throw std::runtime_error(format("tensor '%s' is in the file besides its factor '%s'", w_name.c_str(), b_name.c_str()));
    }
    if (level >= 0) {
        if (meta == nullptr) {
            throw std::runtime_error(format("tensor '%s' is missing, but level %d has no factors in its place", w_name.c_str(), level));
        }
        model->creating_dense = true;
        weight.dense = create(tn, ne, 0);
        model->creating_dense = false;
    }

    ggml_tensor * w = ggml_new_tensor_2d(model->ctx.get(), GGML_TYPE_F16, ne.begin()[0], ne.begin()[1]);
    ggml_set_name(w, w_name.c_str());
    model->weights.emplace(w, std::move(weight));

    return w;
}

// throws with the name of a tensor that no layer took
static void check_all_created(const llama_model_loader & ml) {
    for (const auto & [name, weight] : ml.weights_map) {
        bool is_created = false;
        for (const auto & [key, ctx] : ml.ctx_map) {
            is_created = is_created || ggml_get_tensor(ctx.get(), name.c_str()) != nullptr;
        }
        if (!is_created) {
            throw std::runtime_error(format("tensor '%s' belongs to no layer of this architecture", name.c_str()));
        }
    }
}

std::shared_ptr<const skipcat_model> skipcat_finish(const llama_model_loader & ml) {
    if (!ml.skipcat) {
        return nullptr;
    }
    for (const auto & [name, weight] : ml.weights_map) {
        if (skipcat_is_factor(name) && ml.skipcat->created.count(name) == 0) {
            throw std::runtime_error(format("tensor '%s' belongs to no low-rank layer of this architecture", name.c_str()));
        }
    }
    if (ml.n_created != ml.n_tensors) {
        check_all_created(ml); // else llama.cpp says how many, but not which
    }
    ml.skipcat->loading.reset();
    return ml.skipcat;
}

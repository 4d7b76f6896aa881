// Keys of a low-rank file that llama.cpp takes at their word: each check here stands before an assertion, a division, an
// allocation or a table look-up of llama.cpp's. Missing keys and keys of another type it refuses by name itself.

#include "skipcat-keys.h"
#include "skipcat-impl.h"

#include "llama-hparams.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

static void check_sizes(const skipcat_keys & keys, const llama_model_loader & ml) {
    const int64_t most = 1 << 24; // so that no product of two overflows

    keys.require_between(keys.full("block_count"), 1, LLAMA_MAX_LAYERS);
    const int64_t n_layer = keys.number(keys.full("block_count"), 1);

    keys.require_between(keys.full("nextn_predict_layers"), 0, n_layer - 1);
    keys.require_between(keys.full("embedding_length"), 1, most);
    // what a model gives out is as wide as it is inside, but for a layer behind the last one
    const bool has_dense = ml.get_weight("dense_2.weight") != nullptr || ml.get_weight("dense_3.weight") != nullptr;
    keys.require_between(keys.full("embedding_length_out"), 1, has_dense ? most : keys.number(keys.full("embedding_length"), most));
    keys.require_between(keys.full("feed_forward_length"), 0, most);
    keys.require_between(keys.full("context_length"), 1, INT32_MAX);
    keys.require_between(keys.full("pooling_type"), 0, LLAMA_POOLING_TYPE_RANK);
    keys.require_between(keys.full("classifier.pooling_type"), 0, LLAMA_POOLING_TYPE_RANK);
    keys.require_between("general.file_type", 0, LLAMA_FTYPE_GUESSED); // alone: a type without a number of its own

    for (const char * name : { "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.group_norm_epsilon" }) {
        keys.require_float(keys.full(name), 0.0f);
    }
}

// Most architectures assert these (skipcat-assert.h): the common ones are told which key it is.
static void check_equal_heads(const skipcat_keys & keys, int64_t n_each) {
    const bool is_llama = keys.arch == "llama";
    if (!is_llama && keys.arch != "bert") {
        return;
    }
    const int64_t n_key = keys.number(keys.full("attention.key_length"), n_each);
    const int64_t n_own = is_llama ? n_key : n_each;
    keys.require_between(keys.full("attention.key_length"), n_own, n_own);
    keys.require_between(keys.full("attention.value_length"), n_own, n_own);
    if (keys.number(keys.full("attention.value_length"), n_each) != n_own) {
        throw std::runtime_error(format("key '%s' is missing, but keys have heads of %lld", keys.full("attention.value_length").c_str(), (long long) n_own));
    }
    if (is_llama) {
        keys.require_between(keys.full("rope.dimension_count"), n_own, n_own);
    }
}

static void check_heads(const skipcat_keys & keys) {
    const int64_t n_layer = keys.number(keys.full("block_count"), 1);
    const int64_t n_embd  = keys.number(keys.full("embedding_length"), 0);
    if (n_embd == 0) {
        return; // llama.cpp says that it is missing
    }

    const std::string head_key    = keys.full("attention.head_count");
    const std::string head_kv_key = keys.full("attention.head_count_kv");

    const std::vector<int64_t> heads    = keys.numbers(head_key);
    const std::vector<int64_t> heads_kv = keys.numbers(head_kv_key);
    for (const auto * counts : { &heads, &heads_kv }) {
        if (counts->size() > 1 && (int64_t) counts->size() != n_layer) {
            throw std::runtime_error(format("key '%s' has %zu values for %lld layers",
                    (counts == &heads ? head_key : head_kv_key).c_str(), counts->size(), (long long) n_layer));
        }
    }

    const bool has_attention = std::any_of(heads.begin(), heads.end(), [](int64_t n) { return n > 0; });
    if (!heads.empty() && !has_attention && keys.number(keys.full("attention.key_length"), 0) == 0) {
        throw std::runtime_error(format("key '%s' is 0", head_key.c_str()));
    }

    for (int64_t i = 0; i < n_layer && has_attention; i++) {
        const int64_t n_head    = heads[heads.size() > 1 ? i : 0];
        const int64_t n_head_kv = heads_kv.empty() ? n_head : heads_kv[heads_kv.size() > 1 ? i : 0];
        if (n_head > n_embd) {
            throw std::runtime_error(format("key '%s' is %lld, more than the embedding's length", head_key.c_str(), (long long) n_head));
        }
        // layers without attention have 0 of both or of the latter
        if (n_head_kv > n_head || (n_head_kv > 0 && n_head % n_head_kv != 0)) {
            throw std::runtime_error(format("key '%s' is %lld, which does not divide the %lld heads", head_kv_key.c_str(), (long long) n_head_kv, (long long) n_head));
        }
    }
    if (has_attention && heads[0] > 0 && gguf_find_key(keys.meta, keys.full("attention.key_length").c_str()) < 0 && n_embd % heads[0] != 0) {
        throw std::runtime_error(format("key '%s' is %lld, which does not divide the embedding's length %lld", head_key.c_str(), (long long) heads[0], (long long) n_embd));
    }

    const int64_t most   = 1 << 16;
    const int64_t n_each = has_attention && heads[0] > 0 ? n_embd/heads[0] : 0;
    for (const char * suffix : { "", "_swa" }) {
        const std::string key_key = keys.full("attention.key_length") + suffix;
        keys.require_between(key_key, 1, most);
        keys.require_between(keys.full("attention.value_length") + suffix, 1, most);
        // rotated in pairs, within a head
        const std::string rope_key = keys.full("rope.dimension_count") + suffix;
        const int64_t n_rot = keys.number(rope_key, 0);
        if (n_rot % 2 != 0 || n_rot > keys.number(key_key, keys.number(keys.full("attention.key_length"), n_each))) {
            throw std::runtime_error(format("key '%s' is %lld, which is no even part of a head", rope_key.c_str(), (long long) n_rot));
        }
    }
    check_equal_heads(keys, n_each);
}

static void check_rope(const skipcat_keys & keys) {
    for (const char * name : { "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor" }) {
        keys.require_float(keys.full(name), 0.0f);
    }
    keys.require_between(keys.full("rope.scaling.original_context_length"), 1, INT32_MAX);

    const std::string key  = keys.full("rope.scaling.type");
    const std::string type = keys.string(key);
    if (keys.find(key, GGUF_TYPE_STRING) >= 0 && type != "none" && type != "linear" && type != "yarn" && type != "longrope") {
        throw std::runtime_error(format("key '%s' is '%s', which this runtime does not know", key.c_str(), type.c_str()));
    }
}

static void check_experts(const skipcat_keys & keys) {
    const std::string used_key   = keys.full("expert_used_count");
    const std::string groups_key = keys.full("expert_group_count");

    keys.require_between(keys.full("expert_count"), 0, LLAMA_MAX_EXPERTS);
    const int64_t n_expert = keys.number(keys.full("expert_count"), 0);

    keys.require_between(used_key, 0, n_expert);
    const std::vector<int64_t> used = keys.numbers(used_key);
    if (n_expert > 0 && std::none_of(used.begin(), used.end(), [](int64_t n) { return n > 0; })) {
        throw std::runtime_error(format("key '%s' is missing or 0, but the model has %lld experts", used_key.c_str(), (long long) n_expert));
    }

    keys.require_between(groups_key, 0, n_expert > 0 ? n_expert - 1 : 0);
    const int64_t n_groups = keys.number(groups_key, 0);
    if (n_groups > 1) {
        if (n_expert % n_groups != 0) {
            throw std::runtime_error(format("key '%s' is %lld, which does not divide the %lld experts", groups_key.c_str(), (long long) n_groups, (long long) n_expert));
        }
        if (const int64_t n_used = keys.number(keys.full("expert_group_used_count"), 0); n_used < 1 || n_used >= n_groups) {
            throw std::runtime_error(format("key '%s' is %lld, but it must be 1 to %lld",
                    keys.full("expert_group_used_count").c_str(), (long long) n_used, (long long) n_groups - 1));
        }
    }
    keys.require_between(keys.full("expert_gating_func"), 0, LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS);
}

void skipcat_check_keys(const llama_model_loader & ml) {
    const skipcat_keys keys(ml.metadata, skipcat_base_arch(ml.get_arch_name()));
    check_sizes(keys, ml);
    check_heads(keys);
    check_rope(keys);
    check_experts(keys);
    skipcat_check_vocabulary(keys, ml);
}

#pragma once

// What a program does with a model that it got from a stranger: load it, make a context, read a text with its vocabulary,
// and decode with every rank level.

#include "llama.h"
#include "skipcat.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

struct verdict {
    bool        loaded = false; // else refused
    std::string message;        // llama.cpp's lines of errors
};

static void keep_errors(ggml_log_level level, const char * text, void * message) {
    static ggml_log_level last = GGML_LOG_LEVEL_NONE;
    last = level == GGML_LOG_LEVEL_CONT ? last : level;
    if (last == GGML_LOG_LEVEL_ERROR) {
        *(std::string *) message += text;
    }
}

static std::vector<llama_token> read_text(const llama_model * model) {
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens = { 0, 1, 2, 3 };
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE) {
        const std::string text = "Once upon a time\n\xc3\xb6 \x01";
        tokens.resize(text.size() + 8);
        const int n = llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), true, true);
        tokens.resize(std::max(n, 0));

        char piece[512];
        for (llama_token id = 0; id < std::min(llama_vocab_n_tokens(vocab), 512); id++) {
            llama_token_to_piece(vocab, id, piece, sizeof(piece), 0, true);
        }
        llama_detokenize(vocab, tokens.data(), tokens.size(), piece, sizeof(piece), false, true);
    }
    const llama_token n_vocab = llama_vocab_n_tokens(vocab);
    tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [&](llama_token id) { return id < 0 || id >= n_vocab; }), tokens.end());
    tokens.resize(std::min<size_t>(tokens.size(), 8));
    return tokens;
}

// several tokens at once, then one: two forms of the graph
static bool decode(llama_context * ctx, std::vector<llama_token> tokens) {
    for (const int n : { (int) tokens.size(), 1 }) {
        if (n > 0 && llama_decode(ctx, llama_batch_get_one(tokens.data(), n)) != 0) {
            return false;
        }
    }
    volatile float sink = 0.0f;
    if (const float * logits = llama_get_logits(ctx)) {
        sink = logits[0];
    }
    if (const float * embedding = llama_get_embeddings_seq(ctx, 0)) {
        sink = sink + embedding[0];
    }
    return true;
}

// is_read: the weights are read into memory whose ends the sanitizer guards, else the file is mapped
static verdict load_model(const char * path, bool is_read) {
    verdict result;
    llama_log_set(keep_errors, &result.message);

    llama_model_params model_params = llama_model_default_params();
    model_params.load_mode = is_read ? LLAMA_LOAD_MODE_NONE : LLAMA_LOAD_MODE_MMAP;
    llama_model * model = llama_model_load_from_file(path, model_params);
    if (model == nullptr) {
        return result;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 64;
    params.n_batch         = 16;
    params.n_ubatch        = 16;
    params.n_threads       = 1;
    params.n_threads_batch = 1;

    llama_context * ctx = llama_init_from_model(model, params);
    if (ctx != nullptr) {
        const bool is_encoder = llama_pooling_type(ctx) > LLAMA_POOLING_TYPE_NONE;
        llama_set_embeddings(ctx, is_encoder);
        const std::vector<llama_token> tokens = read_text(model);

        result.loaded = skipcat_format_version() > 0 && skipcat_runtime_version() != nullptr;
        for (const int32_t level : { -1, 0, skipcat_n_levels(model) }) { // two of which are no levels
            const bool is_one = skipcat_level_ratio(model, level) >= 0.0f;
            result.loaded = result.loaded && is_one == (skipcat_set_level(ctx, level) == 0);
        }
        for (int32_t level = 0; level < skipcat_n_levels(model) && result.loaded; level++) {
            result.loaded = skipcat_set_level(ctx, level) == 0 && skipcat_get_level(ctx) == level && decode(ctx, tokens);
        }
        llama_free(ctx);
    }
    llama_model_free(model);
    return result;
}

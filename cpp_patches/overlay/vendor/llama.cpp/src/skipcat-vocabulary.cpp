// The vocabulary of a low-rank file, as skipcat-keys.cpp.

#include "skipcat-keys.h"
#include "skipcat-impl.h"

#include "llama-model-loader.h"
#include "llama-vocab.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

// the tokens that a kind of vocabulary puts around every text, by their numbers where the file does not say them
struct skipcat_vocabulary {
    const char * model;
    int64_t      bos;
    int64_t      eos;
    int64_t      sep;
    bool         add_bos;
    bool         add_eos;
    bool         add_sep;
};

static const skipcat_vocabulary SKIPCAT_VOCABULARIES[] = {
    { "llama",   1,  2,  -1, true,  false, false },
    { "bert",  101, -1, 102, true,  false, true  },
    { "gpt2",   11, 11,  -1, true,  false, false }, // some kinds of gpt2 add it
    { "t5",     -1,  1,  -1, false, true,  false },
};

static void check_special_tokens(const skipcat_keys & keys, const std::string & model, int64_t n_tokens) {
    const std::string prefix = "tokenizer.ggml.";
    skipcat_vocabulary own = { model.c_str(), -1, -1, -1, model == "gemma4", false, false };
    for (const auto & known : SKIPCAT_VOCABULARIES) {
        own = model == known.model ? known : own;
    }
    const struct { const char * name; int64_t id; bool add; } tokens[] = {
        { "bos",       own.bos, own.add_bos },
        { "eos",       own.eos, own.add_eos },
        { "seperator", own.sep, own.add_sep }, // GGUF's own spelling
    };
    const char * const adds[] = { "add_bos_token", "add_eos_token", "add_sep_token" };

    for (size_t i = 0; i < 3; i++) {
        const std::string key = prefix + tokens[i].name + "_token_id";
        const int64_t     id  = keys.number(key, tokens[i].id);
        // llama.cpp takes its own in place of one that the vocabulary does not have
        const bool is_there = (id >= 0 && id < n_tokens) || (tokens[i].id >= 0 && tokens[i].id < n_tokens);
        if (keys.flag(prefix + adds[i], tokens[i].add) && !is_there) {
            throw std::runtime_error(format("key '%s' is missing or none of the %lld tokens, but the vocabulary adds that token to every text",
                    key.c_str(), (long long) n_tokens));
        }
    }
}

// tokens of type BYTE are read as <0x41>
static void check_byte_types(const skipcat_keys & keys, const std::string & model) {
    const int64_t types_id  = keys.find("tokenizer.ggml.token_type", GGUF_TYPE_ARRAY);
    const int64_t tokens_id = keys.find("tokenizer.ggml.tokens", GGUF_TYPE_ARRAY);
    if (types_id < 0) {
        return;
    }
    const int32_t * types = (const int32_t *) gguf_get_arr_data(keys.meta, types_id);
    for (size_t i = 0; i < gguf_get_arr_n(keys.meta, types_id); i++) {
        const size_t length = types[i] == LLAMA_TOKEN_TYPE_BYTE ? strlen(gguf_get_arr_str(keys.meta, tokens_id, i)) : 6;
        if (length != 6 || (model == "bert" && types[i] == LLAMA_TOKEN_TYPE_BYTE)) {
            throw std::runtime_error(format("key 'tokenizer.ggml.token_type' says that token %zu is a byte, which it does not spell", i));
        }
    }
}

// SentencePiece spells what it does not know in bytes: llama.cpp's own look-up ends the program where a byte has no token
llama_token skipcat_byte_to_token(const llama_vocab & vocab, uint8_t byte) {
    llama_token id = vocab.text_to_token(format("<0x%02X>", byte));
    if (id == LLAMA_TOKEN_NULL) {
        id = vocab.text_to_token(std::string(1, (char) byte));
    }
    return id == LLAMA_TOKEN_NULL ? vocab.token_unk() : id;
}

void skipcat_check_vocabulary(const skipcat_keys & keys, const llama_model_loader & ml) {
    const std::string model = keys.string("tokenizer.ggml.model");
    const std::string key   = "tokenizer.ggml.tokens";

    const int64_t n_tokens = keys.array_size(key, { GGUF_TYPE_STRING });

    // llama.cpp makes as many dummy tokens as this key says
    const auto * embeddings = ml.get_tensor_meta("token_embd.weight");
    if (embeddings == nullptr) {
        throw std::runtime_error("tensor 'token_embd.weight' is missing");
    }
    keys.require_between(keys.full("vocab_size"), 1, std::max<int64_t>(1, embeddings->ne[1]));

    if (n_tokens < 0 || model == "no_vocab" || model == "none") {
        return;
    }
    if (n_tokens == 0) {
        throw std::runtime_error(format("key '%s' is empty", key.c_str()));
    }
    for (const char * name : { "tokenizer.ggml.scores", "tokenizer.ggml.token_type" }) {
        const bool    is_score = strcmp(name, "tokenizer.ggml.scores") == 0;
        const int64_t n        = is_score ? keys.array_size(name, { GGUF_TYPE_FLOAT32, GGUF_TYPE_INT32 }) : keys.array_size(name, { GGUF_TYPE_INT32 });
        if (n >= 0 && n != n_tokens) {
            throw std::runtime_error(format("key '%s' has %lld values for %lld tokens", name, (long long) n, (long long) n_tokens));
        }
    }
    keys.array_size("tokenizer.ggml.merges", { GGUF_TYPE_STRING });
    keys.array_size("tokenizer.ggml.suppress_tokens", { GGUF_TYPE_INT32 });

    if (model == "rwkv") {
        throw std::runtime_error("key 'tokenizer.ggml.model' is 'rwkv', which has no low-rank models");
    }
    if (keys.arch == "bert" && keys.number("tokenizer.ggml.token_type_count", 0) == 0) {
        throw std::runtime_error("key 'tokenizer.ggml.token_type_count' is missing or 0");
    }
    check_byte_types(keys, model);
    check_special_tokens(keys, model, n_tokens);
}

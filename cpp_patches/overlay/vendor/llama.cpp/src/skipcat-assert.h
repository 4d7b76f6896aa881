#pragma once

// What llama.cpp asserts of a model, in the files that include llama-hparams.h or skipcat.h, a model from a stranger may
// break: there an assertion that fails is an exception, which loading a model, making a context, llama_encode and
// llama_decode turn into an error. Anywhere else it still ends the program.

#include "ggml.h"

#include <cstdio>
#include <stdexcept>
#include <string>

// low-rank models that this thread is loading: their files are the likely cause
inline thread_local int skipcat_n_loading = 0;

[[noreturn]] inline void skipcat_abort(const char * file, int line, const std::string & what) {
    const std::string path = file;
    const char * cause = skipcat_n_loading > 0 ? "the keys and tensors of this model do not fit its architecture: " : "llama.cpp's assertion failed: ";
    throw std::runtime_error(cause + what + " (" +
            path.substr(path.find_last_of("/\\") + 1) + ":" + std::to_string(line) + ")");
}

template <typename... Args> std::string skipcat_format(const char * text, Args... args) {
    if constexpr (sizeof...(args) == 0) {
        return text;
    } else {
        const int length = snprintf(nullptr, 0, text, args...);
        std::string result(length > 0 ? length : 0, '\0');
        snprintf(&result[0], result.size() + 1, text, args...);
        return result;
    }
}

// GGML_ASSERT expands to it
#undef GGML_ABORT
#define GGML_ABORT(...) skipcat_abort(__FILE__, __LINE__, skipcat_format(__VA_ARGS__))

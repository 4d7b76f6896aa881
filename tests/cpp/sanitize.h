#pragma once

// What the drivers share: each includes the source of an op, and has ggml functions that it links to.

#include "ggml.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#if defined(__AVX2__)
static const char * const code_path = "avx2";
#elif defined(__ARM_NEON) && defined(__aarch64__)
static const char * const code_path = "neon";
#else
static const char * const code_path = "generic";
#endif

// exit status where the CPU lacks what the driver is built for
static constexpr int CPU_LACKS_IT = 77;

static bool cpu_lacks_it() {
#if defined(__AVX2__)
    return !__builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

extern "C" void ggml_abort(const char * file, int line, const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, fmt, args);
    va_end(args);
    abort();
}

extern "C" int64_t ggml_nelements(const ggml_tensor * t) {
    return t->ne[0]*t->ne[1]*t->ne[2]*t->ne[3];
}

// of types whose block is one element
extern "C" bool ggml_is_contiguous(const ggml_tensor * t) {
    size_t next = t->nb[0];
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        if (t->ne[i] != 1 && t->nb[i] != next) {
            return false;
        }
        next *= t->ne[i];
    }
    return true;
}

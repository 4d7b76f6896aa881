#pragma once

#include "ggml.h"

#include <cstdint>

namespace ggml::cpu {

// what the traits of repacked weights tell SKIP_MUL_MAT, so that it packs its rows as they do
class skip_repacked {
  public:
    virtual ~skip_repacked() = default;

    // of one row, and of four interleaved ones
    virtual ggml_type row_type() const = 0;

    // rows x: [4, n] F32 to y, interleaved
    virtual void pack_four(const float * x, void * y, int64_t n) const = 0;
};

}  // namespace ggml::cpu

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace ggml::cpu {

// what the traits of repacked weights offer SKIP_MUL_MAT: to pack its rows, and to multiply by a part of the weights
class skip_repacked {
  public:
    virtual ~skip_repacked() = default;

    // of one packed row, and of four interleaved ones
    virtual ggml_type row_type() const = 0;

    // rows of the weights that are interleaved
    virtual int64_t n_cols() const = 0;

    // rows x: [4, n] F32 to y, interleaved
    virtual void pack_four(const float * x, void * y, int64_t n) const = 0;

    // op: the MUL_MAT of a matrix of F32; its packed rows: size bytes; begin and end: multiples of n_cols
    virtual void product(ggml_tensor * op, void * rows, size_t size, int64_t begin, int64_t end) = 0;
};

}  // namespace ggml::cpu

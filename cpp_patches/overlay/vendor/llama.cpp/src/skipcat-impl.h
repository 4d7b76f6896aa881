#pragma once

// what the parts of skipcat.h share

#include "skipcat.h"

#include "llama-arch.h"
#include "llama-impl.h"

#include <string>

bool skipcat_starts_with(const std::string & s, const char * prefix);

// a factor or a mask, by its name
bool skipcat_is_factor(const std::string & name);

inline bool skipcat_uses(const skipcat_factors & factors, int32_t level) {
    return factors.first <= level && level <= factors.last;
}

//
// checks, each of which throws with the key's or the tensor's name
//

// keys with which llama.cpp would fail an assertion, or allocate more than the file accounts for
void skipcat_check_keys(const llama_model_loader & ml);

// the type of a matrix: a factor, a dense weight or embeddings
void skipcat_check_weight_type(const ggml_tensor * t);

// the type of any tensor of the architecture, by what is done with it
void skipcat_check_type(const ggml_tensor * t, llm_tensor tensor, const char * suffix);

// the mask of a projection with n inputs
void skipcat_check_mask(llama_model_loader & ml, const std::string & name, int64_t n, int64_t rank);

// the rank of b, a factor of a layer with n inputs
void skipcat_check_rank(const std::string & b_name, int64_t n, int64_t rank, bool has_mask);

// a rotation of a graph
void skipcat_check_rope(const ggml_tensor * node);

// x, which a graph multiplies by w
void skipcat_check_input(const ggml_tensor * w, const ggml_tensor * x);

#include "skipcat-impl.h"

#include "llama-model-loader.h"

#include <cstring>
#include <stdexcept>
#include <vector>

// Q8_1 and Q8_K hold activations only, the integer types and F64 have no mul_mat
void skipcat_check_weight_type(const ggml_tensor * t) {
    const bool is_float = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16;
    const bool is_quant = ggml_is_quantized(t->type) && t->type != GGML_TYPE_Q8_1 && t->type != GGML_TYPE_Q8_K;
    if (!is_float && !is_quant) {
        throw std::runtime_error(format("tensor '%s' has type %s, which cannot be multiplied", ggml_get_name(t), ggml_type_name(t->type)));
    }
}

// the CPU aborts, or reads what is not there, where a type is none that its operation knows
void skipcat_check_type(const ggml_tensor * t, llm_tensor tensor, const char * suffix) {
    const ggml_op op = llm_tensor_info_for(tensor).op;
    if (op == GGML_OP_NONE || tensor == LLM_TENSOR_FFN_GATE_TID2EID || tensor == LLM_TENSOR_PLE_CONV1D) {
        return; // not used, rows of indices, and one that is cast
    }
    const bool is_matrix = op == GGML_OP_MUL_MAT || op == GGML_OP_MUL_MAT_ID || op == GGML_OP_GET_ROWS;
    // the row of token_types is added to each position
    if (is_matrix && tensor != LLM_TENSOR_TOKEN_TYPES && suffix != nullptr && strcmp(suffix, "weight") == 0) {
        skipcat_check_weight_type(t);
    } else if (t->type != GGML_TYPE_F32) {
        throw std::runtime_error(format("tensor '%s' has type %s, but the runtime takes it as F32 only", ggml_get_name(t), ggml_type_name(t->type)));
    }
}

// the mask decides where the op reads: it is checked against the rank before anything uses it
void skipcat_check_mask(llama_model_loader & ml, const std::string & name, int64_t n, int64_t rank) {
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

void skipcat_check_rank(const std::string & b_name, int64_t n, int64_t rank, bool has_mask) {
    // without Skip a rank above n would be no factorisation, with Skip there must be a rest
    if (rank < 1 || rank > n || (has_mask && rank == n)) {
        throw std::runtime_error(format("tensor '%s' has rank %lld, but the layer has %lld inputs", b_name.c_str(), (long long) rank, (long long) n));
    }
}

// the keys decide x and the loader has compared w with them, but not what a graph does between two layers
void skipcat_check_input(const ggml_tensor * w, const ggml_tensor * x) {
    const bool fits = w->ne[0] == x->ne[0] && w->ne[2] > 0 && w->ne[3] > 0 && x->ne[2] % w->ne[2] == 0 && x->ne[3] % w->ne[3] == 0;
    if (!fits || ggml_is_transposed(w)) {
        throw std::runtime_error(format("tensor '%s' takes %lld inputs, but the keys of this model give it %lld",
                ggml_get_name(w), (long long) w->ne[0], (long long) x->ne[0]));
    }
    if (x->nb[0] != ggml_type_size(x->type)) {
        throw std::runtime_error(format("tensor '%s' is multiplied by a transposed matrix, which low-rank factors cannot serve", ggml_get_name(w)));
    }
}

// the CPU asserts these when it rotates
void skipcat_check_rope(const ggml_tensor * node) {
    const int32_t n_dims = node->op_params[1];
    const int32_t mode   = node->op_params[2];
    if (n_dims < 0 || n_dims % 2 != 0 || n_dims > node->ne[0]) {
        throw std::runtime_error(format("key 'rope.dimension_count' stands for %d of %lld values of a head, which cannot be rotated",
                n_dims, (long long) node->ne[0]));
    }
    const int32_t * sections = node->op_params + 11;
    if ((mode & GGML_ROPE_TYPE_MROPE) && sections[0] <= 0 && sections[1] <= 0 && sections[2] <= 0) {
        throw std::runtime_error("key 'rope.dimension_sections' is missing or 0, but this architecture rotates by sections");
    }
}

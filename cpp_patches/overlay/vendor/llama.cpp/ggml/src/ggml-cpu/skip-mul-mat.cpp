#include "skip-gather.h"
#include "skip-repack.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "repack.h"
#include "skip-rows.h"
#include "tiled/tiled.h"
#include "traits.h"

#include <cstring>

// z = T x_R + x_S in three phases, with barriers between them:
//   1. x_R is gathered row by row and packed at once as T's mul_mat takes it
//   2. T's own mul_mat, whichever it is (vec_dot, tinyBLAS, tiled, repacked), runs on the packed rows
//   3. x_S is added to its result

// an F32 matrix or packed rows, contiguous: [n, n_rows]
static ggml_tensor make_matrix(ggml_type type, int64_t n, int64_t n_rows, void * data) {
    ggml_tensor t = {};
    t.type  = type;
    t.ne[0] = n;
    t.ne[1] = n_rows;
    t.ne[2] = 1;
    t.ne[3] = 1;
    t.nb[0] = ggml_type_size(type);
    t.nb[1] = ggml_row_size(type, n);
    t.nb[2] = t.nb[1]*n_rows;
    t.nb[3] = t.nb[2];
    t.data  = data;
    return t;
}

// the same for all threads of a call
struct skip_call {
    const ggml_tensor * t;    // [n - rank, rank]
    const ggml_tensor * x;    // [n, n1, n2, n3]
    const ggml_tensor * mask; // [(n + 31)/32]

    int64_t n;
    int64_t rank;
    int64_t n_rest;
    int64_t n_rows;

    ggml::cpu::tensor_traits * traits;         // of repacked weights, else null
    const ggml::cpu::skip_repacked * repacked; // the same
    ggml_type row_type;

    explicit skip_call(const ggml_tensor * dst) :
        t(dst->src[0]), x(dst->src[1]), mask(dst->src[2]),
        n(x->ne[0]), rank(t->ne[1]), n_rest(t->ne[0]), n_rows(ggml_nrows(x)), traits(nullptr), repacked(nullptr) {
        // the graph may come from elsewhere (RPC)
        GGML_ASSERT(rank > 0 && n_rest == n - rank && dst->ne[0] == rank && ggml_nrows(dst) == n_rows);
        GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && ggml_nelements(mask) == (n + 31)/32);

        if (t->buffer && t->buffer->buft == ggml_backend_cpu_repack_buffer_type()) {
            traits   = (ggml::cpu::tensor_traits *) t->extra;
            repacked = dynamic_cast<ggml::cpu::skip_repacked *>(traits);
            GGML_ASSERT(repacked != nullptr);
            row_type = repacked->row_type();
        } else {
            // the tiled kernels pack rows in a way of their own
            row_type = tiled_size(1) > 0 ? GGML_TYPE_F32 : ggml_get_type_traits_cpu(t->type)->vec_dot_type;
        }
    }

    ggml_tensor product(ggml_tensor * rows, void * data) const {
        ggml_tensor p = make_matrix(GGML_TYPE_F32, rank, n_rows, data);
        p.op     = GGML_OP_MUL_MAT;
        p.src[0] = const_cast<ggml_tensor *>(t);
        p.src[1] = rows;
        return p;
    }

    size_t tiled_size(int n_threads) const {
        ggml_tensor rows = make_matrix(GGML_TYPE_F32, n_rest, n_rows, nullptr);
        ggml_tensor p    = product(&rows, nullptr);
        return ggml_tiled_wdata_size(n_threads, &p);
    }

    // bytes of the work buffer: the packed rows, scratch of each thread, and what mul_mat itself needs
    size_t row_size() const     { return ggml_row_size(row_type, n_rest); }
    size_t rows_size() const    { return GGML_PAD(row_size()*n_rows, 64); }
    size_t scratch_size() const { return GGML_PAD((4*n_rest + 32)*sizeof(float), 64); }

    size_t inner_size(int n_threads) const {
        if (row_type != GGML_TYPE_F32) {
            return 64;
        }
        const ggml_type vec_dot_type = ggml_get_type_traits_cpu(t->type)->vec_dot_type;
        return GGML_PAD(ggml_row_size(vec_dot_type, n_rest)*n_rows, 64) + tiled_size(n_threads) + 64;
    }

    const float * row(int64_t i) const {
        const int64_t i1 = i % x->ne[1];
        const int64_t i2 = i / x->ne[1] % x->ne[2];
        const int64_t i3 = i / (x->ne[1]*x->ne[2]);
        return (const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]);
    }

    const uint32_t * words() const { return (const uint32_t *) mask->data; }
    int64_t n_words() const        { return mask->ne[0]; }
};

size_t ggml_skip_mul_mat_work_size(int n_threads, const ggml_tensor * dst) {
    const skip_call call(dst);
    return call.rows_size() + n_threads*call.scratch_size() + call.inner_size(n_threads) + 64;
}

static void gather_rest(const skip_call & call, const float * x, float * out) {
    drop      skip;
    gather_to rest = { out, call.n_rest };
    split_row(x, call.words(), call.n, skip, rest);
}

// elements [begin, end) of a row's rest, packed; both are whole blocks
static void pack_part(const skip_call & call, const float * x, char * out, int64_t begin, int64_t end, float * scratch) {
    if (begin >= end) {
        return;
    }
    const uint32_t * words = call.words();
    int64_t w      = 0;
    int64_t before = 0; // elements of the rest before word w
    while (w < call.n_words()) {
        const int64_t here = 32 - __builtin_popcount(words[w]);
        if (before + here > begin) {
            break;
        }
        before += here;
        w++;
    }
    int64_t last = w;
    for (int64_t seen = before; last < call.n_words() && seen < end; last++) {
        seen += 32 - __builtin_popcount(words[last]);
    }
    drop      skip;
    gather_to rest = { scratch, end - before };
    split_row(x + 32*w, words + w, std::min(call.n, 32*last) - 32*w, skip, rest);
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(call.row_type)->from_float;
    from_float(scratch + (begin - before), out + ggml_row_size(call.row_type, begin), end - begin);
}

static void pack(const skip_call & call, char * out, float * scratch, int ith, int nth) {
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(call.row_type)->from_float;
    const size_t row_size = call.row_size();

    // repacked weights take rows by four, and what is left one by one
    const int64_t n_four = call.repacked ? call.n_rows - call.n_rows % 4 : 0;
    for (int64_t i = 4*ith; i < n_four; i += 4*nth) {
        for (int64_t k = 0; k < 4; k++) {
            gather_rest(call, call.row(i + k), scratch + k*call.n_rest);
        }
        call.repacked->pack_four(scratch, out + i*row_size, call.n_rest);
    }
    const int64_t n_left = call.n_rows - n_four;
    if (n_left >= nth) {
        for (int64_t i = n_four + ith; i < call.n_rows; i += nth) {
            if (call.row_type == GGML_TYPE_F32) {
                gather_rest(call, call.row(i), (float *) (out + i*row_size));
            } else {
                gather_rest(call, call.row(i), scratch);
                from_float(scratch, out + i*row_size, call.n_rest);
            }
        }
        return;
    }
    // fewer rows than threads: each takes a part of every row
    const int64_t block    = ggml_blck_size(call.row_type);
    const int64_t n_blocks = call.n_rest/block;
    for (int64_t i = n_four; i < call.n_rows; i++) {
        pack_part(call, call.row(i), out + i*row_size, block*(n_blocks*ith/nth), block*(n_blocks*(ith + 1)/nth), scratch);
    }
}

static void add_skip(const skip_call & call, float * dst, int ith, int nth) {
    drop rest;
    if (call.n_rows >= nth) {
        const int64_t begin = call.n_rows*ith/nth;
        const int64_t end   = call.n_rows*(ith + 1)/nth;
        for (int64_t i = begin; i < end; i++) {
            add_to skip = { dst + i*call.rank, call.rank };
            split_row(call.row(i), call.words(), call.n, skip, rest);
        }
        return;
    }
    const int64_t w_begin = call.n_words()*ith/nth;
    const int64_t w_end   = call.n_words()*(ith + 1)/nth;
    int64_t before = 0; // of the skip set
    for (int64_t w = 0; w < w_begin; w++) {
        before += __builtin_popcount(call.words()[w]);
    }
    before = std::min(before, call.rank);
    const int64_t n_part = std::min(call.n, 32*w_end) - 32*w_begin;
    for (int64_t i = 0; n_part > 0 && i < call.n_rows; i++) {
        add_to skip = { dst + i*call.rank + before, call.rank - before };
        split_row(call.row(i) + 32*w_begin, call.words() + w_begin, n_part, skip, rest);
    }
}

void ggml_compute_forward_skip_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const skip_call call(dst);

    char *  rows_data = (char *) params->wdata;
    float * scratch   = (float *) (rows_data + call.rows_size() + params->ith*call.scratch_size());

    pack(call, rows_data, scratch, params->ith, params->nth);

    ggml_barrier(params->threadpool);

    ggml_tensor rows    = make_matrix(call.row_type, call.n_rest, call.n_rows, rows_data);
    ggml_tensor product = call.product(&rows, dst->data);

    ggml_compute_params inner = *params;
    const size_t used = call.rows_size() + params->nth*call.scratch_size();
    inner.wdata = rows_data + used;
    inner.wsize = params->wsize - used;

    if (call.traits) {
        call.traits->compute_forward(&inner, &product);
    } else {
        ggml_compute_forward_mul_mat(&inner, &product);
    }

    ggml_barrier(params->threadpool);

    add_skip(call, (float *) dst->data, params->ith, params->nth);
}

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
#include "vec.h"

// z = T x_R + x_S. A thread multiplies by some rows of T and adds their part of x_S while it is in the cache:
//   one row of x       each thread packs x_R for itself, as waiting for others takes longer
//   repacked weights   the threads pack x_R together, four rows interleaved, then take parts of T in turns
//   others             as the latter, but T's own mul_mat (tinyBLAS, tiled, vec_dot) runs whole, then x_S is added

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

    ggml::cpu::skip_repacked * repacked; // of repacked weights, else null
    ggml_type row_type;

    bool use_ref = false;

    explicit skip_call(const ggml_tensor * dst) :
        t(dst->src[0]), x(dst->src[1]), mask(dst->src[2]),
        n(x->ne[0]), rank(t->ne[1]), n_rest(t->ne[0]), n_rows(ggml_nrows(x)), repacked(nullptr) {
        // the graph may come from elsewhere (RPC)
        GGML_ASSERT(rank > 0 && n_rest == n - rank && dst->ne[0] == rank && ggml_nrows(dst) == n_rows);
        GGML_ASSERT(x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float));
        GGML_ASSERT(mask->type == GGML_TYPE_I32 && ggml_is_contiguous(mask) && ggml_nelements(mask) == (n + 31)/32);
        GGML_ASSERT(dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst) && ggml_is_contiguous(t));

        if (t->buffer && t->buffer->buft == ggml_backend_cpu_repack_buffer_type()) {
            repacked = dynamic_cast<ggml::cpu::skip_repacked *>((ggml::cpu::tensor_traits *) t->extra);
            GGML_ASSERT(repacked != nullptr);
            row_type = repacked->row_type();
        } else {
            // of many rows, the tiled kernels pack them in a way of their own, and some of F16 weights take F32
            const bool as_f32 = n_rows > 1 && (t->type == GGML_TYPE_F16 || tiled_size(1) > 0);
            row_type = as_f32 ? GGML_TYPE_F32 : ggml_get_type_traits_cpu(t->type)->vec_dot_type;
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

    // bytes of the work buffer: x_R packed, x_S, four rows of x_R for each thread, and what mul_mat itself needs
    size_t row_size() const     { return ggml_row_size(row_type, n_rest); }
    size_t packed_size() const  { return GGML_PAD(row_size()*n_rows, 64); }
    size_t skip_size() const    { return GGML_PAD(rank*sizeof(float)*n_rows, 64); }
    size_t scratch_size() const { return GGML_PAD(n_rest*sizeof(float)*4, 64); }

    // one row: each thread has all of these
    size_t private_size() const { return packed_size() + skip_size() + scratch_size(); }
    size_t shared_size(int n_threads) const { return packed_size() + skip_size() + n_threads*scratch_size(); }

    size_t inner_size(int n_threads) const {
        if (row_type != GGML_TYPE_F32) {
            return 64;
        }
        const ggml_type vec_dot_type = ggml_get_type_traits_cpu(t->type)->vec_dot_type;
        return GGML_PAD(ggml_row_size(vec_dot_type, n_rest)*n_rows, 64) + tiled_size(n_threads) + 64;
    }

    // rows of T that are multiplied together: AVX-512 takes 16 for many rows of x, and is slower for what is left over
    int64_t unit() const {
        const int64_t n_cols = repacked ? repacked->n_cols() : 1;
        return repacked && n_rows > 1 && rank % 16 == 0 ? std::max<int64_t>(n_cols, 16) : n_cols;
    }

    const uint32_t * words() const { return (const uint32_t *) mask->data; }
};

size_t ggml_skip_mul_mat_work_size(int n_threads, const ggml_tensor * dst) {
    const skip_call call(dst);
    return call.n_rows == 1 ? n_threads*call.private_size() : call.shared_size(n_threads) + call.inner_size(n_threads);
}

// row i of x: x_R to x_rest, x_S to x_skip
static void split(const skip_call & call, int64_t i, float * x_rest, float * x_skip) {
    half_row skip = { x_skip, call.rank };
    half_row rest = { x_rest, call.n_rest };
    if (call.use_ref) {
        split_scalar(row_of(call.x, i), call.words(), 0, call.n, skip, rest);
    } else {
        split_row(row_of(call.x, i), call.words(), call.n, skip, rest);
    }
}

static void pack_row(const skip_call & call, int64_t i, char * packed, float * x_skip, float * scratch) {
    if (call.row_type == GGML_TYPE_F32) {
        split(call, i, (float *) packed, x_skip);
        return;
    }
    split(call, i, scratch, x_skip);
    ggml_get_type_traits_cpu(call.row_type)->from_float(scratch, packed, call.n_rest);
}

// rows [begin, end) of T that part i of n has, in whole units; the larger parts come first, so that turns even out
static void split_units(int64_t n_rows, int64_t unit, int64_t i, int64_t n, int64_t & begin, int64_t & end) {
    const int64_t n_units = n_rows/unit;
    const int64_t each    = n_units/n;
    const int64_t left    = n_units%n;
    begin = unit*(i*each + std::min(i, left));
    end   = begin + unit*(each + (i < left));
}

static void compute_one_row(const ggml_compute_params * params, const skip_call & call, float * dst) {
    char *  packed  = (char *) params->wdata + params->ith*call.private_size();
    float * x_skip  = (float *) (packed + call.packed_size());
    float * scratch = (float *) (packed + call.packed_size() + call.skip_size());
    pack_row(call, 0, packed, x_skip, scratch);

    int64_t begin;
    int64_t end;
    split_units(call.rank, call.unit(), params->ith, params->nth, begin, end);
    if (begin == end) {
        return;
    }
    if (call.repacked) {
        ggml_tensor rows    = make_matrix(GGML_TYPE_F32, call.n_rest, 1, scratch);
        ggml_tensor product = call.product(&rows, dst);
        call.repacked->product(&product, packed, call.packed_size(), begin, end);
    } else {
        const ggml_vec_dot_t vec_dot = ggml_get_type_traits_cpu(call.t->type)->vec_dot;
        for (int64_t i = begin; i < end; i++) {
            vec_dot(call.n_rest, dst + i, 0, (const char *) call.t->data + i*call.t->nb[1], 0, packed, 0, 1);
        }
    }
    ggml_vec_acc_f32(end - begin, dst + begin, x_skip + begin);
}

// the threads pack x together, rows of four or one
static void pack_rows(const ggml_compute_params * params, const skip_call & call, char * packed, float * x_skip, float * scratch) {
    const int64_t n_four = call.repacked ? call.n_rows - call.n_rows % 4 : 0;
    for (int64_t i = 4*params->ith; i < n_four; i += 4*params->nth) {
        for (int64_t k = 0; k < 4; k++) {
            split(call, i + k, scratch + k*call.n_rest, x_skip + (i + k)*call.rank);
        }
        call.repacked->pack_four(scratch, packed + i*call.row_size(), call.n_rest);
    }
    for (int64_t i = n_four + params->ith; i < call.n_rows; i += params->nth) {
        pack_row(call, i, packed + i*call.row_size(), x_skip + i*call.rank, scratch);
    }
}

// of columns [begin, end) of all rows
static void add_skip(const skip_call & call, float * dst, const float * x_skip, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < call.n_rows; i++) {
        ggml_vec_acc_f32(end - begin, dst + i*call.rank + begin, x_skip + i*call.rank + begin);
    }
}

static void multiply_repacked(
        const ggml_compute_params * params, const skip_call & call, float * dst, char * packed, const float * x_skip) {
    const int64_t n_chunks = 4*params->nth;
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    ggml_tensor rows    = make_matrix(GGML_TYPE_F32, call.n_rest, call.n_rows, packed);
    ggml_tensor product = call.product(&rows, dst);

    for (int64_t i = params->ith; i < n_chunks; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        int64_t begin;
        int64_t end;
        split_units(call.rank, call.unit(), i, n_chunks, begin, end);
        if (begin < end) {
            call.repacked->product(&product, packed, call.packed_size(), begin, end);
            add_skip(call, dst, x_skip, begin, end);
        }
    }
}

static void multiply_others(
        const ggml_compute_params * params, const skip_call & call, float * dst, char * packed, const float * x_skip) {
    ggml_barrier(params->threadpool);

    ggml_tensor rows    = make_matrix(call.row_type, call.n_rest, call.n_rows, packed);
    ggml_tensor product = call.product(&rows, dst);

    ggml_compute_params inner = *params;
    inner.wdata = (char *) params->wdata + call.shared_size(params->nth);
    inner.wsize = params->wsize - call.shared_size(params->nth);
    ggml_compute_forward_mul_mat(&inner, &product);

    ggml_barrier(params->threadpool);

    int64_t begin;
    int64_t end;
    split_units(call.rank, 1, params->ith, params->nth, begin, end);
    add_skip(call, dst, x_skip, begin, end);
}

void ggml_compute_forward_skip_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    skip_call call(dst);
    call.use_ref = params->use_ref;
    float * z = (float *) dst->data;

    if (call.n_rows == 1) {
        compute_one_row(params, call, z);
        return;
    }

    char *  packed  = (char *) params->wdata;
    float * x_skip  = (float *) (packed + call.packed_size());
    float * scratch = (float *) (packed + call.shared_size(params->ith));
    pack_rows(params, call, packed, x_skip, scratch);

    if (call.repacked) {
        multiply_repacked(params, call, z, packed, x_skip);
    } else {
        multiply_others(params, call, z, packed, x_skip);
    }
}

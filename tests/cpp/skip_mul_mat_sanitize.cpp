// SKIP_MUL_MAT over exactly sized heap buffers, to be run under sanitizers by real threads: every rank,
// number of rows and of threads, and kind of weights against the definition, and masks whose bits do not
// match the rank, which may give wrong numbers but must not touch anything outside the buffers.
//
// All numbers are small integers, so every order of addition gives the same result.
//
// An argument k leaves one case of k, for an emulator.
//
// Exits with 0, with 1 after saying what differs, or with 77 where the CPU lacks what it is built for.

#include "skip-mul-mat.cpp"

#include "sanitize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

//
// types: F32, and numbers of two bytes under the names of types whose rows are packed
//

static constexpr ggml_type PACKED_T    = GGML_TYPE_Q4_0;
static constexpr ggml_type TILED_T     = GGML_TYPE_Q4_K;
static constexpr ggml_type PACKED_ROWS = GGML_TYPE_Q8_0;

// the upper half of a float holds a small integer
static uint16_t pack(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    return (uint16_t) (bits >> 16);
}

static float unpack(uint16_t v) {
    const uint32_t bits = (uint32_t) v << 16;
    float result;
    memcpy(&result, &bits, sizeof(result));
    return result;
}

static float element(ggml_type type, const void * data, int64_t i) {
    return type == GGML_TYPE_F32 ? ((const float *) data)[i] : unpack(((const uint16_t *) data)[i]);
}

static void set_element(ggml_type type, void * data, int64_t i, float v) {
    if (type == GGML_TYPE_F32) {
        ((float *) data)[i] = v;
    } else {
        ((uint16_t *) data)[i] = pack(v);
    }
}

static void packed_from_float(const float * x, void * y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        set_element(PACKED_ROWS, y, i, x[i]);
    }
}

template <ggml_type type>
static void naive_vec_dot(int n, float * s, size_t /* bs */, const void * x, size_t /* bx */, const void * y, size_t /* by */, int /* nrc */) {
    float sum = 0;
    for (int i = 0; i < n; i++) {
        sum += element(type, x, i)*element(type, y, i);
    }
    *s = sum;
}

extern "C" int64_t ggml_nrows(const ggml_tensor * t) {
    return t->ne[1]*t->ne[2]*t->ne[3];
}

extern "C" size_t ggml_type_size(ggml_type type) {
    return type == GGML_TYPE_F32 ? sizeof(float) : sizeof(uint16_t);
}

extern "C" size_t ggml_row_size(ggml_type type, int64_t n) {
    return n*ggml_type_size(type);
}

extern "C" const ggml_type_traits_cpu * ggml_get_type_traits_cpu(ggml_type type) {
    static const ggml_type_traits_cpu f32    = { nullptr,           naive_vec_dot<GGML_TYPE_F32>, GGML_TYPE_F32, 1 };
    static const ggml_type_traits_cpu packed = { packed_from_float, naive_vec_dot<PACKED_ROWS>,   PACKED_ROWS,   1 };
    return type == GGML_TYPE_F32 ? &f32 : &packed;
}

//
// threads
//

struct ggml_threadpool {
    std::mutex              mutex;
    std::condition_variable all_there;
    int                     n_threads;
    int                     n_waiting = 0;
    int                     n_passed  = 0;
    std::atomic<int>        chunk{0};
};

extern "C" void ggml_barrier(ggml_threadpool * tp) {
    std::unique_lock<std::mutex> lock(tp->mutex);
    const int n_passed = tp->n_passed;
    if (++tp->n_waiting == tp->n_threads) {
        tp->n_waiting = 0;
        tp->n_passed++;
        tp->all_there.notify_all();
    } else {
        tp->all_there.wait(lock, [&] { return tp->n_passed != n_passed; });
    }
}

// as in ggml, no order of other memory comes with the counter
extern "C" void ggml_threadpool_chunk_set(ggml_threadpool * tp, int value) {
    tp->chunk.store(value, std::memory_order_relaxed);
}

extern "C" int ggml_threadpool_chunk_add(ggml_threadpool * tp, int value) {
    return tp->chunk.fetch_add(value, std::memory_order_relaxed);
}

//
// MUL_MAT, also with the workspaces that tiled kernels have behind the packed rows
//

static constexpr size_t TILED_SLOT = 192;

extern "C" size_t ggml_tiled_wdata_size(int n_threads, ggml_tensor * dst) {
    return dst->src[0]->type == TILED_T ? 64 + n_threads*TILED_SLOT : 0;
}

void ggml_compute_forward_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * t = dst->src[0]; // [n, rank]
    const ggml_tensor * x = dst->src[1]; // [n, n_rows]

    const ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(t->type);

    const char * rows     = (const char *) x->data;
    size_t       row_size = x->nb[1];

    if (x->type != traits->vec_dot_type) {
        char * wdata = (char *) params->wdata;
        row_size     = ggml_row_size(traits->vec_dot_type, x->ne[0]);
        const size_t packed_size = GGML_PAD(row_size*x->ne[1], 64);
        GGML_ASSERT(params->wsize >= packed_size + ggml_tiled_wdata_size(params->nth, dst));
        for (int64_t k = params->ith; k < x->ne[1]; k += params->nth) {
            traits->from_float((const float *) (rows + k*x->nb[1]), wdata + k*row_size, x->ne[0]);
        }
        memset(wdata + packed_size + 64 + params->ith*TILED_SLOT, 0xff, TILED_SLOT);
        rows = wdata;
    }
    ggml_barrier(params->threadpool);

    for (int64_t i = params->ith; i < t->ne[1]; i += params->nth) {
        for (int64_t k = 0; k < x->ne[1]; k++) {
            float * z = (float *) ((char *) dst->data + k*dst->nb[1]);
            traits->vec_dot(t->ne[0], z + i, 0, (const char *) t->data + i*t->nb[1], 0, rows + k*row_size, 0, 1);
        }
    }
}

//
// weights whose rows are interleaved by fours, as are those of x
//

ggml::cpu::tensor_traits::~tensor_traits() {}

ggml_backend_buffer_type_t ggml_backend_cpu_repack_buffer_type() {
    static ggml_backend_buffer_type type = {};
    return &type;
}

// of element i of a row
static int64_t interleaved(int64_t row, int64_t n, int64_t i) {
    return (row/4*n + i)*4 + row%4;
}

class interleaved_traits : public ggml::cpu::tensor_traits, public ggml::cpu::skip_repacked {
  public:
    bool work_size(int, const ggml_tensor *, size_t &) override { return false; }
    bool compute_forward(ggml_compute_params *, ggml_tensor *) override { return false; }

    ggml_type row_type() const override { return PACKED_ROWS; }
    int64_t   n_cols()   const override { return 4; }

    void pack_four(const float * x, void * y, int64_t n) const override {
        for (int64_t k = 0; k < 4; k++) {
            for (int64_t i = 0; i < n; i++) {
                set_element(PACKED_ROWS, y, interleaved(k, n, i), x[k*n + i]);
            }
        }
    }

    void product(ggml_tensor * op, void * rows, size_t size, int64_t begin, int64_t end) override {
        const ggml_tensor * t = op->src[0]; // [n, rank]
        const ggml_tensor * x = op->src[1]; // [n, n_rows]

        const int64_t n      = t->ne[0];
        const int64_t rank   = t->ne[1];
        const int64_t n_rows = x->ne[1];

        GGML_ASSERT(0 <= begin && begin < end && end <= rank && begin % 4 == 0 && end % 4 == 0);
        GGML_ASSERT(x->type == GGML_TYPE_F32 && x->ne[0] == n && ggml_nrows(x) == n_rows);
        GGML_ASSERT(op->type == GGML_TYPE_F32 && op->ne[0] == rank && op->ne[1] == n_rows && ggml_nrows(op) == n_rows);
        GGML_ASSERT(size >= n_rows*ggml_row_size(PACKED_ROWS, n));

        const int64_t n_four = n_rows - n_rows % 4;
        for (int64_t k = 0; k < n_rows; k++) {
            float * z = (float *) ((char *) op->data + k*op->nb[1]);
            for (int64_t i = begin; i < end; i++) {
                float sum = 0;
                for (int64_t j = 0; j < n; j++) {
                    const int64_t at = k < n_four ? interleaved(k, n, j) : k*n + j;
                    sum += element(t->type, t->data, interleaved(i, n, j))*element(PACKED_ROWS, rows, at);
                }
                z[i] = sum;
            }
        }
    }
};

//
// cases
//

enum class Weights { F32, PACKED, TILED, REPACKED };

struct Case {
    Weights weights;
    int64_t n;         // inputs
    int64_t rank;
    int64_t n_rows;
    int64_t padding;   // elements between rows of x
    int     n_threads;
    bool    use_ref;
};

[[noreturn]] static void fail(const Case & c, int64_t row, int64_t i, double got, double want) {
    fprintf(stderr, "row %lld, element %lld: %g, not %g: weights %d, n %lld, rank %lld, rows %lld, padding %lld, threads %d, ref %d\n",
            (long long) row, (long long) i, got, want, (int) c.weights, (long long) c.n, (long long) c.rank,
            (long long) c.n_rows, (long long) c.padding, c.n_threads, c.use_ref);
    exit(1);
}

static void run(const Case & c, const std::vector<bool> & skip, std::mt19937 & rng) {
    const bool    repacked = c.weights == Weights::REPACKED;
    const int64_t n_rest   = c.n - c.rank;

    const ggml_type t_type = c.weights == Weights::F32 ? GGML_TYPE_F32 : c.weights == Weights::TILED ? TILED_T : PACKED_T;
    std::unique_ptr<char[]> t_data(new char[c.rank*ggml_row_size(t_type, n_rest)]);
    std::vector<double>     t(c.rank*n_rest); // [n_rest, rank]
    for (int64_t i = 0; i < c.rank; i++) {
        for (int64_t j = 0; j < n_rest; j++) {
            const int v = (int) (rng() % 9) - 4;
            t[i*n_rest + j] = v;
            set_element(t_type, t_data.get(), repacked ? interleaved(i, n_rest, j) : i*n_rest + j, (float) v);
        }
    }

    // the rows are split over two dimensions where they can be, with a gap between planes too
    const int64_t ne1     = c.n_rows % 3 == 0 ? c.n_rows/3 : c.n_rows % 2 == 0 ? c.n_rows/2 : c.n_rows;
    const int64_t ne2     = c.n_rows/ne1;
    const int64_t stride1 = c.n + c.padding;
    const int64_t stride2 = stride1*ne1 + c.padding;
    const int64_t n_x     = (ne2 - 1)*stride2 + (ne1 - 1)*stride1 + c.n;
    std::unique_ptr<float[]> x_data(new float[n_x]);
    std::fill_n(x_data.get(), n_x, NAN);
    const auto x = [&](int64_t row) { return x_data.get() + row/ne1*stride2 + row%ne1*stride1; };
    for (int64_t row = 0; row < c.n_rows; row++) {
        for (int64_t j = 0; j < c.n; j++) {
            x(row)[j] = (float) ((int) (rng() % 17) - 8);
        }
    }

    // bits behind the last input belong to nothing
    const int64_t n_words = (c.n + 31)/32;
    std::unique_ptr<uint32_t[]> words(new uint32_t[n_words]());
    const bool trailing = rng() % 2;
    for (int64_t j = 0; j < 32*n_words; j++) {
        words[j/32] |= (uint32_t) (j < c.n ? (bool) skip[j] : trailing) << j%32;
    }

    std::unique_ptr<float[]> dst_data(new float[c.rank*c.n_rows]);
    std::fill_n(dst_data.get(), c.rank*c.n_rows, NAN);

    interleaved_traits  traits;
    ggml_backend_buffer buffer = {};
    buffer.buft = ggml_backend_cpu_repack_buffer_type();

    ggml_tensor t_tensor    = make_matrix(t_type, n_rest, c.rank, t_data.get());
    ggml_tensor x_tensor    = make_matrix(GGML_TYPE_F32, c.n, ne1, x_data.get());
    ggml_tensor mask_tensor = make_matrix(GGML_TYPE_I32, n_words, 1, words.get());
    ggml_tensor dst         = make_matrix(GGML_TYPE_F32, c.rank, ne1, dst_data.get());
    if (repacked) {
        t_tensor.buffer = &buffer;
        t_tensor.extra  = (ggml::cpu::tensor_traits *) &traits;
    }
    x_tensor.ne[2] = ne2;
    x_tensor.nb[1] = stride1*sizeof(float);
    x_tensor.nb[2] = stride2*sizeof(float);
    x_tensor.nb[3] = x_tensor.nb[2]*ne2;
    dst.ne[2]      = ne2;
    dst.nb[3]      = dst.nb[2]*ne2;
    dst.src[0]     = &t_tensor;
    dst.src[1]     = &x_tensor;
    dst.src[2]     = &mask_tensor;

    // what is read before it is written shows as NaN in the result
    const size_t work_size = ggml_skip_mul_mat_work_size(c.n_threads, &dst);
    std::unique_ptr<char[]> work(new char[work_size]);
    memset(work.get(), 0xff, work_size);

    ggml_threadpool pool;
    pool.n_threads = c.n_threads;
    const auto compute = [&](int ith) {
        ggml_compute_params params = {};
        params.ith        = ith;
        params.nth        = c.n_threads;
        params.wsize      = work_size;
        params.wdata      = work.get();
        params.threadpool = &pool;
        params.use_ref    = c.use_ref;
        ggml_compute_forward_skip_mul_mat(&params, &dst);
    };
    std::vector<std::thread> threads;
    for (int ith = 1; ith < c.n_threads; ith++) {
        threads.emplace_back(compute, ith);
    }
    compute(0);
    for (auto & thread : threads) {
        thread.join();
    }

    if (std::count(skip.begin(), skip.end(), true) != c.rank) {
        return;
    }
    for (int64_t row = 0; row < c.n_rows; row++) {
        std::vector<double> x_skip;
        std::vector<double> x_rest;
        for (int64_t j = 0; j < c.n; j++) {
            (skip[j] ? x_skip : x_rest).push_back(x(row)[j]);
        }
        for (int64_t i = 0; i < c.rank; i++) {
            double want = x_skip[i];
            for (int64_t j = 0; j < n_rest; j++) {
                want += t[i*n_rest + j]*x_rest[j];
            }
            const double got = dst_data[row*c.rank + i];
            if (got != want) {
                fail(c, row, i, got, want);
            }
        }
    }
}

// three of the rank and then six that need not be
static std::vector<std::vector<bool>> masks(int64_t n, int64_t rank, std::mt19937 & rng) {
    std::vector<std::vector<bool>> result;
    const auto add = [&](auto && chosen) {
        std::vector<bool> skip(n);
        for (int64_t j = 0; j < n; j++) {
            skip[j] = chosen(j);
        }
        result.push_back(skip);
    };
    add([&](int64_t j) { return j < rank; });
    add([&](int64_t j) { return j >= n - rank; });
    result.push_back(result[0]);
    std::shuffle(result[2].begin(), result[2].end(), rng);
    add([&](int64_t j) { return j < rank - 1; });
    add([&](int64_t j) { return j <= rank; });
    add([&](int64_t j) { return j%2 == 0; });
    const uint32_t threshold = rng();
    add([&](int64_t) { return rng() < threshold; });
    add([&](int64_t) { return false; });
    add([&](int64_t) { return true; });
    return result;
}

int main(int argc, char ** argv) {
    if (cpu_lacks_it()) {
        return CPU_LACKS_IT;
    }

    std::mt19937 rng(0);
    const unsigned one_of = argc > 1 ? std::max(1, atoi(argv[1])) : 1;
    long n_cases = 0;

    std::vector<int64_t> sizes = { 31, 32, 33, 40, 63, 65, 100, 130 };
    for (int64_t n = 2; n <= 24; n++) {
        sizes.push_back(n);
    }
    for (const int64_t n : sizes) {
        for (int64_t rank = 1; rank < n; rank += n <= 40 ? 1 : 7) {
            const auto choices = masks(n, rank, rng);
            for (const auto weights : { Weights::F32, Weights::PACKED, Weights::TILED, Weights::REPACKED }) {
                if (weights == Weights::REPACKED && rank % 4 != 0) {
                    continue;
                }
                for (const int64_t n_rows : { 1, 2, 3, 4, 5, 9 }) {
                    for (const int n_threads : { 1, 2, 3, 5 }) {
                        if (rng() % one_of != 0) {
                            continue;
                        }
                        const auto & skip = choices[rng() % choices.size()];
                        run({ weights, n, rank, n_rows, rng() % 2 ? 0 : 3, n_threads, rng() % 4 == 0 }, skip, rng);
                        n_cases++;
                    }
                }
            }
        }
    }

    printf("%s: %ld cases\n", code_path, n_cases);
    return 0;
}

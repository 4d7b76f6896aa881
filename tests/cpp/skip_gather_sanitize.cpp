// SKIP_GATHER over exactly sized heap buffers, to be run under sanitizers: every rank, mask edge and
// thread split against the definition, and masks whose bits do not match the rank, which may give
// wrong numbers but must not touch anything outside a row.
//
// Exits with 0, with 1 after saying what differs, or with 77 where the CPU lacks what it is built for.

#include "skip-gather.cpp"

#include "sanitize.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

struct Case {
    int64_t n;       // inputs
    int64_t rank;    // what the op is told
    int64_t n_rows;
    int64_t stride;  // elements between rows, at least n
    int     n_threads;
    bool    backwards; // the last thread's rows first: what a row spills then meets a finished neighbour
    bool    use_ref;
};

[[noreturn]] static void fail(const Case & c, const char * what, int64_t row, int64_t i) {
    fprintf(stderr, "%s, row %lld, element %lld: n %lld, rank %lld, rows %lld, stride %lld, threads %d, backwards %d, ref %d\n",
            what, (long long) row, (long long) i, (long long) c.n, (long long) c.rank, (long long) c.n_rows,
            (long long) c.stride, c.n_threads, c.backwards, c.use_ref);
    exit(1);
}

// where the mask has fewer inputs of a kind than the rank says, the rest of the row is unspecified
static void check_row(const Case & c, const char * what, const float * got, int64_t size, const std::vector<float> & want,
        int64_t row) {
    for (int64_t i = 0; i < std::min<int64_t>(size, want.size()); i++) {
        if (got[i] != want[i]) {
            fail(c, what, row, i);
        }
    }
}

static void run(const Case & c, const std::vector<bool> & skip) {
    const int64_t n_words = (c.n + 31)/32;
    std::unique_ptr<float[]>    x(new float[(c.n_rows - 1)*c.stride + c.n]);
    std::unique_ptr<uint32_t[]> words(new uint32_t[n_words]);
    std::unique_ptr<float[]>    dst_data(new float[c.n*c.n_rows]);

    for (int64_t i = 0; i < (c.n_rows - 1)*c.stride + c.n; i++) {
        x[i] = (float) i;
    }
    std::fill_n(words.get(), n_words, 0u);
    for (int64_t j = 0; j < c.n; j++) {
        words[j/32] |= (uint32_t) skip[j] << j%32;
    }

    ggml_tensor x_tensor    = {};
    ggml_tensor mask_tensor = {};
    ggml_tensor dst         = {};

    // the rows are split over two dimensions where they can be
    const int64_t ne1 = c.n_rows % 2 == 0 ? c.n_rows/2 : c.n_rows;
    x_tensor.type  = GGML_TYPE_F32;
    x_tensor.ne[0] = c.n;
    x_tensor.ne[1] = ne1;
    x_tensor.ne[2] = c.n_rows/ne1;
    x_tensor.ne[3] = 1;
    x_tensor.nb[0] = sizeof(float);
    x_tensor.nb[1] = c.stride*sizeof(float);
    x_tensor.nb[2] = x_tensor.nb[1]*ne1;
    x_tensor.nb[3] = x_tensor.nb[2]*x_tensor.ne[2];
    x_tensor.data  = x.get();

    mask_tensor.type = GGML_TYPE_I32;
    mask_tensor.data = words.get();
    std::fill_n(mask_tensor.ne, GGML_MAX_DIMS, 1);
    mask_tensor.ne[0] = n_words;

    dst.src[0] = &x_tensor;
    dst.src[1] = &mask_tensor;
    dst.data   = dst_data.get();
    std::fill_n(dst.ne, GGML_MAX_DIMS, 1);
    dst.ne[0]  = c.n*c.n_rows;
    dst.op_params[0] = (int32_t) c.rank;

    for (int i = 0; i < c.n_threads; i++) {
        ggml_compute_params params = {};
        params.ith     = c.backwards ? c.n_threads - 1 - i : i;
        params.nth     = c.n_threads;
        params.use_ref = c.use_ref;
        ggml_compute_forward_skip_gather(&params, &dst);
    }

    const int64_t n_rest = c.n - c.rank;
    for (int64_t row = 0; row < c.n_rows; row++) {
        std::vector<float> want_skip;
        std::vector<float> want_rest;
        for (int64_t j = 0; j < c.n; j++) {
            (skip[j] ? want_skip : want_rest).push_back(x[row*c.stride + j]);
        }
        check_row(c, "rest", dst_data.get() + row*n_rest, n_rest, want_rest, row);
        check_row(c, "skip", dst_data.get() + n_rest*c.n_rows + row*c.rank, c.rank, want_skip, row);
    }
}

static std::vector<std::vector<bool>> masks(int64_t n, std::mt19937 & rng) {
    std::vector<std::vector<bool>> result;
    const auto add = [&](auto && chosen) {
        std::vector<bool> skip(n);
        for (int64_t j = 0; j < n; j++) {
            skip[j] = chosen(j);
        }
        result.push_back(skip);
    };
    add([&](int64_t j) { return j == 0; });
    add([&](int64_t j) { return j == n - 1; });
    add([&](int64_t j) { return j != 0; });
    add([&](int64_t j) { return j != n - 1; });
    add([&](int64_t j) { return j == n/2; });
    add([&](int64_t j) { return j != n/2; });
    add([&](int64_t j) { return j < n/2; });
    add([&](int64_t j) { return j >= n/2; });
    add([&](int64_t j) { return j%2 == 0; });
    add([&](int64_t j) { return j%2 == 1; });
    add([&](int64_t j) { return j/8%2 == 0; });
    for (int i = 0; i < 4; i++) {
        const uint32_t threshold = rng();
        add([&](int64_t) { return rng() < threshold; });
    }
    add([&](int64_t) { return false; });
    add([&](int64_t) { return true; });
    return result;
}

int main() {
    if (cpu_lacks_it()) {
        return CPU_LACKS_IT;
    }

    std::mt19937 rng(0);
    long n_cases = 0;

    for (int64_t n = 2; n <= 300; n++) {
        for (const auto & skip : masks(n, rng)) {
            const int64_t popcount = std::count(skip.begin(), skip.end(), true);
            // the right rank, its neighbours, the extremes, and one that has nothing to do with the mask
            const int64_t other = 1 + rng() % (n - 1);
            const int64_t ranks[] = { popcount, popcount - 1, popcount + 1, popcount + 9, 1, n - 1, other };
            for (const int64_t rank : ranks) {
                if (rank < 1 || rank >= n) {
                    continue;
                }
                for (const int n_threads : { 1, 2, 7 }) {
                    const int64_t n_rows = 1 + rng() % 6;
                    const int64_t stride = n + (rng() % 2 ? 0 : 5);
                    run({ n, rank, n_rows, stride, n_threads, rng() % 2 == 0, rng() % 4 == 0 }, skip);
                    n_cases++;
                }
            }
        }
    }

    printf("%s: %ld cases\n", code_path, n_cases);
    return 0;
}

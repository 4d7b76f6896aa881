#include "skip-gather.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <array>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

// one half of a row while it is filled; a mask with too many bits cannot write past the end
struct gather_out {
    float * data;
    int64_t size;
    int64_t used = 0;

    void push(float v) {
        if (used < size) {
            data[used++] = v;
        }
    }
};

// inputs [j, n) of a row, one at a time: the definition of the op, and the tail of the SIMD paths
static void gather_scalar(const float * x, const uint32_t * mask, int64_t j, int64_t n, gather_out & skip, gather_out & rest) {
    for (; j < n; j++) {
        if (mask[j/32] >> (j%32) & 1) {
            skip.push(x[j]);
        } else {
            rest.push(x[j]);
        }
    }
}

#if defined(__AVX2__)

// entry b: the positions of the set bits of b, in ascending order, a byte each
static constexpr std::array<uint64_t, 256> make_compress_table() {
    std::array<uint64_t, 256> table{};
    for (uint32_t b = 0; b < 256; b++) {
        int k = 0;
        for (uint64_t i = 0; i < 8; i++) {
            if (b >> i & 1) {
                table[b] |= i << 8*k++;
            }
        }
    }
    return table;
}

static constexpr std::array<uint64_t, 256> compress_table = make_compress_table();

// append the lanes of v whose bit in b is set
static inline void append8(gather_out & out, __m256 v, uint32_t b) {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) compress_table[b]));
    const __m256  w     = _mm256_permutevar8x32_ps(v, lanes);
    const int64_t k     = std::min<int64_t>(__builtin_popcount(b), out.size - out.used);

    if (out.used + 8 <= out.size) {
        _mm256_storeu_ps(out.data + out.used, w);
    } else {
        const __m256i first_k = _mm256_cmpgt_epi32(_mm256_set1_epi32((int) k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        _mm256_maskstore_ps(out.data + out.used, first_k, w);
    }
    out.used += k;
}

static void gather_row(const float * x, const uint32_t * mask, int64_t n, gather_out & skip, gather_out & rest) {
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        const uint32_t b = mask[j/32] >> (j%32) & 0xff;
        const __m256   v = _mm256_loadu_ps(x + j);
        append8(skip, v, b);
        append8(rest, v, b ^ 0xff);
    }
    gather_scalar(x, mask, j, n, skip, rest);
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct lane_bytes {
    uint8_t b[16];
};

// entry b: byte indices that move the lanes whose bit is set in b to the front
static constexpr std::array<lane_bytes, 16> make_compress_table() {
    std::array<lane_bytes, 16> table{};
    for (uint32_t b = 0; b < 16; b++) {
        int k = 0;
        for (uint32_t i = 0; i < 4; i++) {
            if (b >> i & 1) {
                for (uint32_t byte = 0; byte < 4; byte++) {
                    table[b].b[4*k + byte] = (uint8_t) (4*i + byte);
                }
                k++;
            }
        }
    }
    return table;
}

static constexpr std::array<lane_bytes, 16> compress_table = make_compress_table();

// append the lanes of v whose bit in b is set
static inline void append4(gather_out & out, float32x4_t v, uint32_t b) {
    const uint8x16_t  lanes = vld1q_u8(compress_table[b].b);
    const float32x4_t w     = vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), lanes));
    const int64_t     k     = std::min<int64_t>(__builtin_popcount(b), out.size - out.used);

    if (out.used + 4 <= out.size) {
        vst1q_f32(out.data + out.used, w);
    } else {
        float tmp[4];
        vst1q_f32(tmp, w);
        std::copy(tmp, tmp + k, out.data + out.used);
    }
    out.used += k;
}

static void gather_row(const float * x, const uint32_t * mask, int64_t n, gather_out & skip, gather_out & rest) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        const uint32_t    b = mask[j/32] >> (j%32) & 0xf;
        const float32x4_t v = vld1q_f32(x + j);
        append4(skip, v, b);
        append4(rest, v, b ^ 0xf);
    }
    gather_scalar(x, mask, j, n, skip, rest);
}

#else

static void gather_row(const float * x, const uint32_t * mask, int64_t n, gather_out & skip, gather_out & rest) {
    gather_scalar(x, mask, 0, n, skip, rest);
}

#endif

void ggml_compute_forward_skip_gather(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * x    = dst->src[0]; // [n, n1, n2, n3]
    const ggml_tensor * mask = dst->src[1]; // [(n + 31)/32]

    GGML_TENSOR_LOCALS(int64_t, ne, x, ne)
    GGML_TENSOR_LOCALS(size_t,  nb, x, nb)

    const int64_t n      = ne0;
    const int64_t rank   = ggml_get_op_params_i32(dst, 0);
    const int64_t n_rest = n - rank;
    const int64_t n_rows = ne1*ne2*ne3;

    // the graph may come from elsewhere (RPC)
    GGML_ASSERT(rank > 0 && rank < n && ggml_nelements(dst) == n*n_rows && ggml_nelements(mask) == (n + 31)/32);

    float * rest_data = (float *) dst->data;       // [n_rest, n_rows]
    float * skip_data = rest_data + n_rest*n_rows; // [rank,   n_rows]

    const int64_t per_thread = (n_rows + params->nth - 1)/params->nth;
    const int64_t row_begin  = std::min(n_rows, per_thread*params->ith);
    const int64_t row_end    = std::min(n_rows, row_begin + per_thread);

    for (int64_t row = row_begin; row < row_end; row++) {
        const int64_t i1 = row % ne1;
        const int64_t i2 = row / ne1 % ne2;
        const int64_t i3 = row / (ne1*ne2);

        const float * x_row = (const float *) ((const char *) x->data + i1*nb1 + i2*nb2 + i3*nb3);

        gather_out skip = { skip_data + row*rank,   rank   };
        gather_out rest = { rest_data + row*n_rest, n_rest };

        if (params->use_ref) {
            gather_scalar(x_row, (const uint32_t *) mask->data, 0, n, skip, rest);
        } else {
            gather_row(x_row, (const uint32_t *) mask->data, n, skip, rest);
        }
    }
}

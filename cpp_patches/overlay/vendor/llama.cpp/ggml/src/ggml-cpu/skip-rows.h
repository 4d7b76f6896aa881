#pragma once

// The inputs of one row, split by the skip mask: what SKIP_GATHER and SKIP_MUL_MAT share.
// The scalar path is the definition and the tail of the others.

#include "ggml.h"

#include <algorithm>
#include <array>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

// row i of x: [n, n1, n2, n3]
static const float * row_of(const ggml_tensor * x, int64_t i) {
    const int64_t i1 = i % x->ne[1];
    const int64_t i2 = i / x->ne[1] % x->ne[2];
    const int64_t i3 = i / (x->ne[1]*x->ne[2]);
    return (const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]);
}

// one half of a row while it is filled; a mask with too many bits cannot write past the end
struct half_row {
    float * data;
    int64_t size;
    int64_t used = 0;

    void push(float v) {
        if (used < size) {
            data[used++] = v;
        }
    }
};

// inputs [j, n) of a row, one at a time
static void split_scalar(const float * x, const uint32_t * mask, int64_t j, int64_t n, half_row & skip, half_row & rest) {
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

// the lanes of v whose bit in b is set, in front
static inline __m256 compress8(__m256 v, uint32_t b) {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) compress_table[b]));
    return _mm256_permutevar8x32_ps(v, lanes);
}

static inline __m256i first_lanes(int64_t k) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int) k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline void append8(half_row & out, __m256 v, uint32_t b) {
    const __m256  w = compress8(v, b);
    const int64_t k = std::min<int64_t>(__builtin_popcount(b), out.size - out.used);

    if (out.used + 8 <= out.size) {
        _mm256_storeu_ps(out.data + out.used, w);
    } else {
        _mm256_maskstore_ps(out.data + out.used, first_lanes(k), w);
    }
    out.used += k;
}

static void split_row(const float * x, const uint32_t * mask, int64_t n, half_row & skip, half_row & rest) {
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        const uint32_t b = mask[j/32] >> (j%32) & 0xff;
        const __m256   v = _mm256_loadu_ps(x + j);
        append8(skip, v, b);
        append8(rest, v, b ^ 0xff);
    }
    split_scalar(x, mask, j, n, skip, rest);
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

// the lanes of v whose bit in b is set, in front
static inline float32x4_t compress4(float32x4_t v, uint32_t b) {
    const uint8x16_t lanes = vld1q_u8(compress_table[b].b);
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), lanes));
}

static inline void append4(half_row & out, float32x4_t v, uint32_t b) {
    const float32x4_t w = compress4(v, b);
    const int64_t     k = std::min<int64_t>(__builtin_popcount(b), out.size - out.used);

    if (out.used + 4 <= out.size) {
        vst1q_f32(out.data + out.used, w);
    } else {
        float tmp[4];
        vst1q_f32(tmp, w);
        std::copy(tmp, tmp + k, out.data + out.used);
    }
    out.used += k;
}

static void split_row(const float * x, const uint32_t * mask, int64_t n, half_row & skip, half_row & rest) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        const uint32_t    b = mask[j/32] >> (j%32) & 0xf;
        const float32x4_t v = vld1q_f32(x + j);
        append4(skip, v, b);
        append4(rest, v, b ^ 0xf);
    }
    split_scalar(x, mask, j, n, skip, rest);
}

#else

static void split_row(const float * x, const uint32_t * mask, int64_t n, half_row & skip, half_row & rest) {
    split_scalar(x, mask, 0, n, skip, rest);
}

#endif

// Compiled kernels over one row of a block: panel look-ups by shuffles (AVX-512), by loads of a panel's row otherwise.
//
//   cost per pair   AVX-512: 15 (float 6) shuffles and fused operations, one square root, about 10 more, in vectors;
//                   else: 4 (float 2) row loads and as many fused operations, a transposition, 3 more
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "../math/table.h"
#include "block.h"

namespace ntk {

#ifdef __AVX512F__
// GCC 12 takes the undefined operands of its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
constexpr int kTableVectors = 4;  // evaluated together, to hide the latency of the fused operations

// The panel of a bin is a byte of the 128 in lut0, lut1: the word that holds it, rotated. Only the low bits of the result
// count, because shuffles ignore the others. (One vpermi2b would do; x86-64-v4 does not have it, and it is no faster.)
NTK_INLINE __m512i panel_of(__m512i bin, __m512i lut0, __m512i lut1, double) {
    const __m512i word = _mm512_permutex2var_epi64(lut0, _mm512_srli_epi64(bin, 3), lut1);
    return _mm512_rorv_epi64(word, _mm512_slli_epi64(bin, 3));
}
NTK_INLINE __m512i panel_of(__m512i bin, __m512i lut0, __m512i lut1, float) {
    const __m512i word = _mm512_permutex2var_epi32(lut0, _mm512_srli_epi32(bin, 2), lut1);
    return _mm512_rorv_epi32(word, _mm512_slli_epi32(bin, 3));
}

template <int TERMS>
NTK_INLINE void evaluate(const Table<double>& t, const double* x, const double* s, double* out) {
    constexpr int U = kTableVectors;
    const __m512d delta = _mm512_set1_pd(t.delta), centre0 = _mm512_load_pd(t.centre), centre1 = _mm512_load_pd(t.centre + 8);
    const __m512i flip = _mm512_set1_epi64(kTableBins);
    const __m512i lut0 = _mm512_load_si512(t.panel), lut1 = _mm512_load_si512(t.panel + 64);
    const __m128i shift = _mm_cvtsi32_si128(t.shift);
    __m512d h[U], q[U];
    __m512i panel[U];
    for (int u = 0; u < U; ++u) {
        const __m512d y = _mm512_sqrt_pd(_mm512_load_pd(x + 8 * u));
        const __mmask8 negative = _mm512_movepi64_mask(_mm512_castpd_si512(_mm512_load_pd(s + 8 * u)));
        const __m512i bin = _mm512_srl_epi64(_mm512_castpd_si512(_mm512_add_pd(y, delta)), shift);
        panel[u] = panel_of(_mm512_mask_xor_epi64(bin, negative, bin, flip), lut0, lut1, 0.0);
        h[u] = _mm512_sub_pd(y, _mm512_permutex2var_pd(centre0, panel[u], centre1));
    }
    for (int u = 0; u < U; ++u)
        q[u] = _mm512_permutex2var_pd(_mm512_load_pd(t.c[TERMS - 1]), panel[u], _mm512_load_pd(t.c[TERMS - 1] + 8));
#pragma GCC unroll 16
    for (int k = TERMS - 2; k >= 0; --k) {
        const __m512d c0 = _mm512_load_pd(t.c[k]), c1 = _mm512_load_pd(t.c[k] + 8);
        for (int u = 0; u < U; ++u) q[u] = _mm512_fmadd_pd(q[u], h[u], _mm512_permutex2var_pd(c0, panel[u], c1));
    }
    for (int u = 0; u < U; ++u) _mm512_store_pd(out + 8 * u, q[u]);
}
template <int TERMS>
NTK_INLINE void evaluate(const Table<float>& t, const float* x, const float* s, float* out) {
    constexpr int U = kTableVectors;
    const __m512 delta = _mm512_set1_ps(t.delta), centre0 = _mm512_load_ps(t.centre), centre1 = _mm512_load_ps(t.centre + 16);
    const __m512i flip = _mm512_set1_epi32(kTableBins);
    const __m512i lut0 = _mm512_load_si512(t.panel), lut1 = _mm512_load_si512(t.panel + 64);
    const __m128i shift = _mm_cvtsi32_si128(t.shift);
    __m512 h[U], q[U];
    __m512i panel[U];
    for (int u = 0; u < U; ++u) {
        const __m512 y = _mm512_sqrt_ps(_mm512_load_ps(x + 16 * u));
        const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(_mm512_load_ps(s + 16 * u)));
        const __m512i bin = _mm512_srl_epi32(_mm512_castps_si512(_mm512_add_ps(y, delta)), shift);
        panel[u] = panel_of(_mm512_mask_xor_epi32(bin, negative, bin, flip), lut0, lut1, 0.0f);
        h[u] = _mm512_sub_ps(y, _mm512_permutex2var_ps(centre0, panel[u], centre1));
    }
    for (int u = 0; u < U; ++u)
        q[u] = _mm512_permutex2var_ps(_mm512_load_ps(t.c[TERMS - 1]), panel[u], _mm512_load_ps(t.c[TERMS - 1] + 16));
#pragma GCC unroll 16
    for (int k = TERMS - 2; k >= 0; --k) {
        const __m512 c0 = _mm512_load_ps(t.c[k]), c1 = _mm512_load_ps(t.c[k] + 16);
        for (int u = 0; u < U; ++u) q[u] = _mm512_fmadd_ps(q[u], h[u], _mm512_permutex2var_ps(c0, panel[u], c1));
    }
    for (int u = 0; u < U; ++u) _mm512_store_ps(out + 16 * u, q[u]);
}

template <int TERMS, class T>
static void table_loop(const Table<T>& t, const T* x, const T* s, T* out, int n) {
    constexpr int step = kTableVectors * 64 / int(sizeof(T));
    for (int k = 0; k < n; k += step) evaluate<TERMS>(t, x + k, s + k, out + k);
}
#pragma GCC diagnostic pop
#else
constexpr int kTableStep = 64;

// Four partial polynomials a panel, in the powers 0, 4, 8, ..., 1, 5, 9, ... of h and so on: a row of coefficients is read
// four at a time, with h^4 between the reads.
template <int TERMS, class T>
static void table_loop(const Table<T>& t, const T* x, const T* s, T* out, int n) {
    constexpr int width = Table<T>::Shape::row;
    alignas(64) T h[kTableStep], part[kTableStep][4];
    int panel[kTableStep];
    for (int start = 0; start < n; start += kTableStep) {
#pragma omp simd
        for (int k = 0; k < kTableStep; ++k) {
            h[k] = sqrt_(x[start + k]);
            panel[k] = table_bin(t, h[k], s[start + k] < T(0));
        }
        for (int k = 0; k < kTableStep; ++k) {
            panel[k] = t.panel[panel[k]];
            h[k] -= t.centre[panel[k]];
        }
        for (int k = 0; k < kTableStep; ++k) {
            const T* c = t.row[panel[k]];
            const T second = h[k] * h[k], fourth = second * second;
            T a[4] = {c[width - 4], c[width - 3], c[width - 2], c[width - 1]};
#pragma GCC unroll 4
            for (int m = width - 8; m >= 0; m -= 4)
#pragma GCC unroll 4
                for (int e = 0; e < 4; ++e) a[e] = fma_(a[e], fourth, c[m + e]);
#pragma GCC unroll 4
            for (int e = 0; e < 4; ++e) part[k][e] = a[e];
        }
#pragma omp simd
        for (int k = 0; k < kTableStep; ++k)
            out[start + k] = fma_(fma_(fma_(part[k][3], h[k], part[k][2]), h[k], part[k][1]), h[k], part[k][0]);
    }
}
#endif

// out[k] = the compiled kernel of the pair (x[k], s[k]) for k < n, rounded up to whole vectors (at most 64 pairs).
// Arrays aligned to 64 bytes.
template <class T>
static void table_row(const Table<T>& t, const T* x, const T* s, T* out, int n) {
    using Shape = typename Table<T>::Shape;
    if (t.terms == Shape::few) table_loop<Shape::few>(t, x, s, out, n);
    else table_loop<Shape::terms>(t, x, s, out, n);
}

// The same for any n and any alignment.
template <class T>
static void table_values(const Table<T>& t, std::int64_t n, const T* x, const T* s, T* out) {
    alignas(64) T bx[kCols], bs[kCols], value[kCols];
    for (std::int64_t start = 0; start < n; start += kCols) {
        const int size = n - start < kCols ? int(n - start) : kCols;
        for (int k = 0; k < kCols; ++k) bx[k] = k < size ? x[start + k] : T(0), bs[k] = k < size ? s[start + k] : T(1);
        table_row(t, bx, bs, value, size);
        for (int k = 0; k < size; ++k) out[start + k] = value[k];
    }
}

}  // namespace ntk

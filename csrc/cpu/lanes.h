// One vector register of T: the few operations the product needs, for the instruction set this file is compiled for.
//
//   kLanes<T>    numbers in a register
//   Lanes<T>     V, the register; load, save (any alignment), broadcast, fma, stream (aligned, past the caches)
//   transpose    a kLanes x kLanes block in registers
//
// Everything is static or in an unnamed namespace: objects of different instruction sets must not share a function.
#pragma once
#include <cstdint>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../math/portable.h"

namespace ntk {
namespace {

// The micro-kernel keeps kNarrow x kVectors sums in registers: 24 of 32 (AVX-512), 12 of 16 (AVX2), 8 of 16 (the rest,
// where a product and its operands need registers of their own). kNarrow divides the numbers in kVectors registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectors = 3, kNarrow = 8;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32, kVectors = 3, kNarrow = 4;
#else
constexpr int kVectorBytes = 16, kVectors = 2, kNarrow = 4;
#endif
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct Lanes;
template <>
struct Lanes<double> {
    typedef double V __attribute__((vector_size(kVectorBytes), may_alias));
    typedef long long Mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<float> {
    typedef float V __attribute__((vector_size(kVectorBytes), may_alias));
    typedef int Mask __attribute__((vector_size(kVectorBytes)));
};

template <class T>
NTK_INLINE typename Lanes<T>::V load_lanes(const T* from) {
    typename Lanes<T>::V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}
template <class T>
NTK_INLINE void save_lanes(T* to, typename Lanes<T>::V v) {
    __builtin_memcpy(to, &v, sizeof v);
}
template <class T>
NTK_INLINE typename Lanes<T>::V broadcast(T x) {
    return x - typename Lanes<T>::V{};  // x - 0 is x, also for -0 and NaN
}

#if defined(__AVX512F__)
NTK_INLINE __m512d fma_lanes(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
NTK_INLINE __m512 fma_lanes(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
NTK_INLINE __m512d sqrt_lanes(__m512d a) { return _mm512_maskz_sqrt_pd(-1, a); }
NTK_INLINE __m512 sqrt_lanes(__m512 a) { return _mm512_maskz_sqrt_ps(-1, a); }
// The second operand if one is NaN.
NTK_INLINE __m512d max_lanes(__m512d a, __m512d b) { return _mm512_maskz_max_pd(-1, a, b); }
NTK_INLINE __m512 max_lanes(__m512 a, __m512 b) { return _mm512_maskz_max_ps(-1, a, b); }
NTK_INLINE __m512d min_lanes(__m512d a, __m512d b) { return _mm512_maskz_min_pd(-1, a, b); }
NTK_INLINE __m512 min_lanes(__m512 a, __m512 b) { return _mm512_maskz_min_ps(-1, a, b); }
NTK_INLINE void stream_lanes(double* to, __m512d v) { _mm512_stream_pd(to, v); }
NTK_INLINE void stream_lanes(float* to, __m512 v) { _mm512_stream_ps(to, v); }
#elif defined(__AVX2__) && defined(__FMA__)
NTK_INLINE __m256d fma_lanes(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
NTK_INLINE __m256 fma_lanes(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
NTK_INLINE __m256d sqrt_lanes(__m256d a) { return _mm256_sqrt_pd(a); }
NTK_INLINE __m256 sqrt_lanes(__m256 a) { return _mm256_sqrt_ps(a); }
NTK_INLINE __m256d max_lanes(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
NTK_INLINE __m256 max_lanes(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
NTK_INLINE __m256d min_lanes(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }
NTK_INLINE __m256 min_lanes(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
NTK_INLINE void stream_lanes(double* to, __m256d v) { _mm256_stream_pd(to, v); }
NTK_INLINE void stream_lanes(float* to, __m256 v) { _mm256_stream_ps(to, v); }
#else
template <class V>
NTK_INLINE V fma_lanes(V a, V b, V c) {
    return a * b + c;
}
#ifdef __x86_64__
NTK_INLINE __m128d sqrt_lanes(__m128d a) { return _mm_sqrt_pd(a); }
NTK_INLINE __m128 sqrt_lanes(__m128 a) { return _mm_sqrt_ps(a); }
NTK_INLINE __m128d max_lanes(__m128d a, __m128d b) { return _mm_max_pd(a, b); }
NTK_INLINE __m128 max_lanes(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
NTK_INLINE __m128d min_lanes(__m128d a, __m128d b) { return _mm_min_pd(a, b); }
NTK_INLINE __m128 min_lanes(__m128 a, __m128 b) { return _mm_min_ps(a, b); }
NTK_INLINE void stream_lanes(double* to, __m128d v) { _mm_stream_pd(to, v); }
NTK_INLINE void stream_lanes(float* to, __m128 v) { _mm_stream_ps(to, v); }
#else
template <class V>
NTK_INLINE V sqrt_lanes(V a) {
    for (unsigned k = 0; k < sizeof(V) / sizeof(a[0]); ++k) a[k] = sqrt_(a[k]);
    return a;
}
template <class V>
NTK_INLINE V max_lanes(V a, V b) {
    return a > b ? a : b;
}
template <class V>
NTK_INLINE V min_lanes(V a, V b) {
    return a < b ? a : b;
}
template <class T>
NTK_INLINE void stream_lanes(T* to, typename Lanes<T>::V v) {
    save_lanes(to, v);
}
#endif
#endif

// Streamed stores of this thread become visible to the others.
NTK_INLINE void finish_lanes() {
#ifdef __x86_64__
    _mm_sfence();
#endif
}

// The lanes of two registers by number; the mask is a constant once everything is inlined.
template <class T>
NTK_INLINE typename Lanes<T>::V pick(typename Lanes<T>::V a, typename Lanes<T>::V b, typename Lanes<T>::Mask from) {
#if defined(__GNUC__) && !defined(__clang__)
    return __builtin_shuffle(a, b, from);
#else
    typename Lanes<T>::V r;
    for (int k = 0; k < kLanes<T>; ++k) r[k] = from[k] < kLanes<T> ? a[from[k]] : b[from[k] - kLanes<T>];
    return r;
#endif
}

// r (kLanes registers) becomes its transpose: blocks of half the side change places, then within them, down to one.
template <class T>
NTK_INLINE void transpose(typename Lanes<T>::V* r) {
    constexpr int n = kLanes<T>;
#pragma GCC unroll 4
    for (int half = n / 2; half >= 1; half /= 2) {
        typename Lanes<T>::Mask low{}, high{};
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) {
            low[k] = k & half ? n + k - half : k;
            high[k] = k & half ? n + k : k + half;
        }
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) {
            if (k & half) continue;
            const typename Lanes<T>::V a = r[k], b = r[k + half];
            r[k] = pick<T>(a, b, low);
            r[k + half] = pick<T>(a, b, high);
        }
    }
}

}  // namespace
}  // namespace ntk

// The only file with #ifdefs between host compilers, nvcc and NVRTC. Everything in csrc/math includes only this.
//
// Functions here are select-only scalars (c ? a : b, no branches, no library calls but sqrt), so that
// `#pragma omp simd` loops over them vectorise with -fno-math-errno -fno-trapping-math.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define NTK_INLINE __device__ static inline
#define NTK_MEMBER __device__ inline
#define NTK_CONSTANT __device__ static constexpr
#define NTK_UNROLL _Pragma("unroll")
#else
// static: a function emitted by the AVX-512 object must never be picked by the linker for an old processor.
#define NTK_INLINE __attribute__((always_inline)) static inline
#define NTK_MEMBER __attribute__((always_inline)) inline
#define NTK_CONSTANT static constexpr
#define NTK_UNROLL _Pragma("GCC unroll 32")
#endif

namespace ntk {

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
NTK_INLINE double sqrt_(double x) { return ::sqrt(x); }
NTK_INLINE float sqrt_(float x) { return ::sqrtf(x); }
NTK_INLINE double fma_(double a, double b, double c) { return ::fma(a, b, c); }
NTK_INLINE float fma_(float a, float b, float c) { return ::fmaf(a, b, c); }
NTK_INLINE long long bits(double x) { return __double_as_longlong(x); }
NTK_INLINE double from_bits(long long b) { return __longlong_as_double(b); }
#else
NTK_INLINE double sqrt_(double x) { return __builtin_sqrt(x); }
NTK_INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }
#if defined(__FMA__) || defined(__aarch64__)
NTK_INLINE double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
NTK_INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Without the instruction __builtin_fma is a library call, thirty times slower than two roundings.
NTK_INLINE double fma_(double a, double b, double c) { return a * b + c; }
NTK_INLINE float fma_(float a, float b, float c) { return a * b + c; }
#endif
NTK_INLINE long long bits(double x) {
    long long b;
    __builtin_memcpy(&b, &x, sizeof b);
    return b;
}
NTK_INLINE double from_bits(long long b) {
    double x;
    __builtin_memcpy(&x, &b, sizeof x);
    return x;
}
#endif

template <class T>
NTK_INLINE T abs_(T x) {
    return x < T(0) ? -x : x;
}
// NaN in x survives: the comparison is false and x is returned.
template <class T>
NTK_INLINE T at_least(T x, T low) {
    return x < low ? low : x;
}

// c[0] + c[1] x + ... + c[N-1] x^(N-1), x2 = x^2. Even and odd terms are two independent chains: one chain of N fused
// operations would leave the multipliers idle for most of its latency.
template <class T, int N>
NTK_INLINE T horner(const double (&c)[N], T x, T x2) {
    constexpr int last = N - 1;
    T even = T(c[last - last % 2]), odd = T(c[last - 1 + last % 2]);
    NTK_UNROLL
    for (int k = last - last % 2 - 2; k >= 0; k -= 2) even = fma_(even, x2, T(c[k]));
    NTK_UNROLL
    for (int k = last - 3 + last % 2; k >= 1; k -= 2) odd = fma_(odd, x2, T(c[k]));
    return fma_(odd, x, even);
}

NTK_CONSTANT double kInvPi = 0.318309886183790671538;
NTK_CONSTANT double kInv2Pi = 0.159154943091895335769;
NTK_CONSTANT double kInvSqrt2Pi = 0.398942280401432677940;

// A sum that keeps its rounding errors: two floats for float, a plain double for double (1e-16 a layer is enough).
template <class T>
struct Wide;
template <>
struct Wide<double> {
    double hi;
};
template <>
struct Wide<float> {
    float hi, lo;
};
NTK_INLINE Wide<double> add(Wide<double> a, double d) { return {a.hi + d}; }
// Kahan's sum: |d| <= |hi| but for the first layer. Compile without contraction and without reassociation.
NTK_INLINE Wide<float> add(Wide<float> a, float d) {
    float y = d + a.lo;
    float s = a.hi + y;
    return {s, y - (s - a.hi)};
}
NTK_INLINE Wide<double> wide(double a) { return {a}; }
NTK_INLINE Wide<float> wide(float a) { return {a, 0.0f}; }
// 2 - a
NTK_INLINE Wide<double> two_minus(Wide<double> a) { return {2.0 - a.hi}; }
NTK_INLINE Wide<float> two_minus(Wide<float> a) { return {2.0f - a.hi, -a.lo}; }

}  // namespace ntk

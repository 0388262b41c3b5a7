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
NTK_INLINE double root_(double z) { return ::sqrt(z); }
// sqrtf branches (subnormals take another way), and the pairs a thread holds would come one after the other. This is a Newton
// step from the approximate inverse root, without branches: within an ulp for z >= 1e-37 (an angle of 1e-18), 0 for 0, NaN for NaN.
NTK_INLINE float root_(float z) {
    const float r = ::rsqrtf(z < 1e-37f ? 1e-37f : z), y = z * r;
    return fma_(fma_(-y, y, z), 0.5f * r, y);
}
NTK_INLINE double magnitude(double x) { return ::fabs(x); }
NTK_INLINE float magnitude(float x) { return ::fabsf(x); }
NTK_INLINE double sign_of(double x) { return ::copysign(1.0, x); }
NTK_INLINE float sign_of(float x) { return ::copysignf(1.0f, x); }
NTK_INLINE long long bits(double x) { return __double_as_longlong(x); }
NTK_INLINE int bits(float x) { return __float_as_int(x); }
NTK_INLINE double from_bits(long long b) { return __longlong_as_double(b); }
#else
NTK_INLINE double sqrt_(double x) { return __builtin_sqrt(x); }
NTK_INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }
template <class T>
NTK_INLINE T root_(T z) { return sqrt_(z); }
#if defined(__FMA__) || defined(__aarch64__)
NTK_INLINE double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
NTK_INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Without the instruction __builtin_fma is a library call, thirty times slower than two roundings.
NTK_INLINE double fma_(double a, double b, double c) { return a * b + c; }
NTK_INLINE float fma_(float a, float b, float c) { return a * b + c; }
#endif
NTK_INLINE double magnitude(double x) { return __builtin_fabs(x); }
NTK_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
NTK_INLINE double sign_of(double x) { return __builtin_copysign(1.0, x); }
NTK_INLINE float sign_of(float x) { return __builtin_copysignf(1.0f, x); }
NTK_INLINE long long bits(double x) {
    long long b;
    __builtin_memcpy(&b, &x, sizeof b);
    return b;
}
NTK_INLINE int bits(float x) {
    int b;
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
template <class T>
NTK_INLINE T at_most(T x, T high) {
    return x > high ? high : x;
}
// c ? yes : no, also for types whose comparisons are masks.
template <class T>
NTK_INLINE T choose(bool c, T yes, T no) {
    return c ? yes : no;
}

// Whether the constants of T need single precision only.
template <class T>
struct Single {
    static constexpr bool value = false;
};
template <>
struct Single<float> {
    static constexpr bool value = true;
};

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

// A plain sum, and one that keeps its rounding errors (Kahan): |d| <= |hi| but for the first layer. Compile without
// contraction and without reassociation.
template <class T>
struct Plain {
    T hi;
};
template <class T>
struct Kahan {
    T hi, lo = T(0);
};
template <class T>
NTK_INLINE Plain<T> add(Plain<T> a, T d) { return {a.hi + d}; }
template <class T>
NTK_INLINE Kahan<T> add(Kahan<T> a, T d) {
    T y = d + a.lo;
    T s = a.hi + y;
    return {s, y - (s - a.hi)};
}
// 2 - a
template <class T>
NTK_INLINE Plain<T> two_minus(Plain<T> a) { return {T(2) - a.hi}; }
template <class T>
NTK_INLINE Kahan<T> two_minus(Kahan<T> a) { return {T(2) - a.hi, -a.lo}; }

// What the layers of a network add up in: two floats for float, a plain double for double (1e-16 a layer is enough).
template <class T>
struct WideOf;
template <>
struct WideOf<double> {
    using type = Plain<double>;
};
template <>
struct WideOf<float> {
    using type = Kahan<float>;
};
template <class T>
using Wide = typename WideOf<T>::type;

}  // namespace ntk

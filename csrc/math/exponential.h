// exp and expm1 in double: select-only, so that loops over them vectorise.
#pragma once
#include "portable.h"

namespace ntk {

// (expm1(r) - r - r^2/2) / r^3 on |r| <= ln2/2, relative error 4e-19; mpmath: chebyfit(f, [-log(2)/2, log(2)/2], 10)
NTK_CONSTANT double kExpm1[] = {0.166666666666666675,      0.0416666666666666672,    0.00833333333333006445,
                                0.00138888888888865544,    0.000198412698630405453,  0.0000248015873171351642,
                                2.75572684803100255e-6,    2.75572829840558766e-7,   2.51003758325612337e-8,
                                2.09112297297585633e-9};

struct Reduced {
    double n;      // x = n ln2 + r
    double expm1;  // expm1(r)
};

NTK_INLINE Reduced reduce(double x) {
    // 1.5 * 2^52: adding it rounds to an integer. ln2 in two parts, the first with 20 zero bits at the end
    // (Cody and Waite): n * high is exact.
    const double shift = 6755399441055744.0, log2e = 1.44269504088896340736;
    const double high = 0.693147180369123816490, low = 1.90821492927058770002e-10;
    double n = (x * log2e + shift) - shift;
    double r = fma_(-n, low, fma_(-n, high, x));
    double r2 = r * r;
    return {n, fma_(horner(kExpm1, r, r2), r2 * r, fma_(0.5, r2, r))};
}

// 2^n for integer |n| <= 1022
NTK_INLINE double power_of_two(double n) {
    return from_bits((long long)((unsigned long long)bits(n + 6755399441055744.0) << 52) + 0x3ff0000000000000LL);
}

NTK_INLINE double clamp_exponent(double x) {
    // exp(-1400) and exp(1400) are 0 and infinity; beyond, 2^(n/2) would leave its range. NaN stays NaN.
    double y = x < -1400.0 ? -1400.0 : x;
    return y > 1400.0 ? 1400.0 : y;
}

// exp(x): any x; relative error 2 ulp (without FMA 3), also in the subnormal range up to its rounding.
NTK_INLINE double exp_(double x) {
    Reduced e = reduce(clamp_exponent(x));
    double half = (0.5 * e.n + 6755399441055744.0) - 6755399441055744.0;
    return (e.expm1 + 1.0) * power_of_two(half) * power_of_two(e.n - half);
}

// exp(x) - 1: any x; relative error 3 ulp, also for small |x|.
NTK_INLINE double expm1_(double x) {
    Reduced e = reduce(clamp_exponent(x));
    double half = (0.5 * e.n + 6755399441055744.0) - 6755399441055744.0;
    double a = power_of_two(half), b = power_of_two(e.n - half);
    double scale = a * b;
    // 2^n expm1(r) + (2^n - 1); the second bracket is exact where it matters, and inf - inf cannot occur.
    double small = fma_(scale, e.expm1, scale - 1.0);
    return e.n > 60.0 ? (e.expm1 + 1.0) * a * b : small;
}

}  // namespace ntk

// Expectations of any smooth activation from its Hermite coefficients a_k(A) = E s(sqrt(A) z) h_k(z), h_k orthonormal:
//   Q_ij = sum_k a_k(A) a_k(B) rho^k,   D_ij = sum_k k a_k(A) a_k(B) rho^(k-1) / sqrt(AB).
// Even k come first (k = 0, 2, ...; `evens` of them), then odd k (1, 3, ...; `odds` of them).
#pragma once
#include "activations.h"

namespace ntk {

struct HermiteTable {
    int evens, odds;
    // Rows of different variance: a_k as Chebyshev series in sqrt(A) on panels.
    int panels, order;           // panels = 0: all rows have the same variance
    const double* edges;         // (panels + 1,) of sqrt(A)
    const double* coefficients;  // (panels, evens + odds, order)
    // One variance for all rows: with p_k = a_k^2, Horner coefficients in rho^2 of
    //   sum_even p_k (1 - rho^k) / (1 - rho^2),  sum_even k p_k rho^(k-2) / A,
    //   sum_odd p_k (1 - |rho|^(k-1)) / (1 - rho^2),  sum_odd k p_k rho^(k-1) / A
    const double* even_defect;      // (evens,)
    const double* even_derivative;  // (evens,)
    const double* odd_defect;       // (odds,)
    const double* odd_derivative;   // (odds,)
    double even_sum, odd_sum;       // sum_even p_k, sum_odd p_k
    double mean;                    // a_0; with panels: s(0), for rows of variance 0
};

// One variance: w = (Q_ii + Q_jj)/2 - side Q_ij and D from the four sums above; side = 1 for an even activation, else s.
NTK_INLINE PairNumbers hermite_pair(double x, double s, double side, double even_defect, double even_derivative, double odd_defect,
                                    double odd_derivative, double even_sum, double odd_sum) {
    double cosine = 1.0 - x, u = x * (2.0 - x);
    double even = u * even_defect, odd = fma_(x, odd_sum, cosine * u * odd_defect);
    double q = (even_sum - even) + s * (odd_sum - odd);
    even = side < 0.0 ? 2.0 * even_sum - even : even;
    return {even + odd, fma_(s * cosine, even_derivative, odd_derivative), side, q, -1.0};
}

// Rows of different variance, term by term; e = 1 - rho^(2m) is carried, not a power to be subtracted from 1.
struct HermiteSum {
    double w, q, d;    // w, Q of PairNumbers; the even (odd) part of sum k a_k a_k rho^(k-2) (rho^(k-1))
    double e, before;  // 1 - rho^(2m), rho^(2m-2)
};
// k = 2m
NTK_INLINE void hermite_even(HermiteSum& t, double ai, double aj, double k, double side, double r2, double u) {
    double p = ai * aj, diff = ai - side * aj;
    t.w = fma_(0.5 * diff, diff, fma_(side * p, t.e, t.w));
    t.q = fma_(p, 1.0 - t.e, t.q);
    t.d = fma_(k * p, t.before, t.d);
    t.before = 1.0 - t.e;
    t.e = fma_(t.e, r2, u);
}
// k = 2m + 1
NTK_INLINE void hermite_odd(HermiteSum& t, double ai, double aj, double k, double x, double s, double r2, double u) {
    double p = ai * aj, diff = ai - aj;
    t.w = fma_(0.5 * diff, diff, fma_(p, fma_(1.0 - x, t.e, x), t.w));
    t.q = fma_(p * s, (1.0 - x) * (1.0 - t.e), t.q);
    t.d = fma_(k * p, 1.0 - t.e, t.d);
    t.e = fma_(t.e, r2, u);
}

}  // namespace ntk

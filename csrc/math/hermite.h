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

// The panel of a row and its place on it, -1 <= y <= 1.
struct HermitePlace {
    const double* coefficients;  // (evens + odds, order) of the panel
    double y;
};
NTK_INLINE HermitePlace hermite_place(const HermiteTable& t, double root) {
    int panel = 0;
    while (panel + 1 < t.panels && root > t.edges[panel + 1]) ++panel;
    double low = t.edges[panel], high = t.edges[panel + 1];
    double ratio = (2.0 * root - low - high) / (high - low);
    // Rounding of the variance may leave the panel.
    return {t.coefficients + static_cast<long long>(panel) * (t.evens + t.odds) * t.order,
            ratio > 1.0 ? 1.0 : at_least(ratio, -1.0)};
}
// Sum of c[k] T_k(y), k < order, by Clenshaw's recurrence.
NTK_INLINE double chebyshev(const double* c, int order, double y) {
    double b1 = 0.0, b2 = 0.0;
    for (int k = order - 1; k > 0; --k) {
        double b = fma_(2.0 * y, b1, c[k] - b2);
        b2 = b1, b1 = b;
    }
    return fma_(y, b1, c[0] - b2);
}

// Even activations put w on side 1, others on the side of rho.
NTK_INLINE double hermite_side(const HermiteTable& t, double s) { return t.odds == 0 ? 1.0 : s; }

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
// D from its two parts and 1 / sqrt(A), 1 / sqrt(B).
NTK_INLINE double hermite_derivative(double even, double odd, double x, double s, double inv_i, double inv_j) {
    return (odd + even * s * (1.0 - x)) * inv_i * inv_j;
}

}  // namespace ntk

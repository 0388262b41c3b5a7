// What stands before and after the layers of a pair: inner products to correlations, states to results.
#pragma once
#include "layer.h"

namespace ntk {

// 1 - |rho| and sign of rho from an inner product and the inverses of the norms (0 for a zero row).
template <class T>
struct Start {
    T x, s;
};
template <class T>
NTK_INLINE Start<T> start_pair(T product, T inv_i, T inv_j) {
    T rho = product * inv_i * inv_j;
    return {at_least(T(1) - magnitude(rho), T(0)), sign_of(rho)};
}

// Row state before the suffix, nu and beta those of the prefix: sqrt(S_ii), S_ii, mean of a point of norm r.
struct RowStart {
    double norm, var, mean;
};
NTK_INLINE RowStart start_row(double nu, double beta, double r) { return {sqrt_(nu) * r, nu * r * r, beta * r}; }

NTK_INLINE double covariance(double x, double s, double ni, double nj) { return s * ni * nj * (1.0 - x); }

// theta Theta + cov S + mean b_i b_j + last G
struct Mix {
    double theta, cov, mean, last;
};
// After a prefix alone: theta is Theta / (nu |x_i| |x_j|), unit_mean the mean of unit-norm points for nu = 1. `last` is
// added by the caller, who did not compute it unless it is asked for.
NTK_INLINE double mix_homogeneous(const Mix& m, double theta, double x, double s, double unit_mean) {
    return m.theta * theta + m.cov * (s * (1.0 - x)) + m.mean * unit_mean * unit_mean;
}
// Only what is asked for: Theta may be infinite where the covariance is not.
NTK_INLINE double mix_general(const Mix& m, double theta, double cov, double last, double mean_i, double mean_j) {
    double v = m.mean * mean_i * mean_j;
    v += m.cov != 0.0 ? m.cov * cov : 0.0;
    v += m.theta != 0.0 ? m.theta * theta : 0.0;
    return v + (m.last != 0.0 ? m.last * last : 0.0);
}
// From sums over positions: both = Theta + S.
NTK_INLINE double mix_sums(const Mix& m, double both, double cov, double last) {
    return mix_general({m.theta, m.cov - m.theta, 0.0, m.last}, both, cov, last, 0.0, 0.0);
}

// Own Grams of one layer for layer_grams, before the factors of the later layers.
NTK_INLINE double own_gram_w(const GeneralLayer& l, double own_w, double own_b) { return l.w * own_w + l.wb * own_b; }
NTK_INLINE double own_gram_v(const GeneralLayer& l, double own_v) { return l.v * own_v + l.vvb * l.vb; }

}  // namespace ntk

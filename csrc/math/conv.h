// One layer of a convolutional network at one position of a pair of images (MATH.md, sections 3, 3b and 9b). The window sums
// are the callers'.
#pragma once
#include "layer.h"

namespace ntk {

// Bias-free layers with a positively homogeneous activation.
//
// State of a pair: E, half squared distances, which stay right where correlations are 1 up to rounding, and M = T + S.
//   e = cw sum E,  m = cw sum M over the window,  n = root_i root_j,  x = 1 - rho = (e - (root_i - root_j)^2 / 2) / n
//   Q = n (h0 (1 - x) + h1 g),  E_Q = h0 e - h1 n g,  D = slope + h1 (1 - theta)
//   E' = p^2 E + p q (b_i - b_j)(mu_i - mu_j) + r E_Q,   M' = p^2 M + r D m + p q (b_i mu_j + b_j mu_i) + r Q
// The first layer has any sign and carries F, half squared norms of sums, too: 1 + rho = (f - (root_i - root_j)^2 / 2) / n.

// Window variances below this share of the image's mean are zero: the inverse of their product must be finite.
NTK_INLINE double least_variance(double) { return 1e-280; }
NTK_INLINE double least_variance(float) { return 1e-32; }

NTK_INLINE double mean_factor(const GeneralLayer& l) { return (1.0 - l.slope) * kInvSqrt2Pi; }

// Numbers of a layer in the type of the arithmetic; h0, h1 and slope contain the branch variance r.
template <class T>
struct FastLayer {
    T skip, cross, h0, h1, slope;
    bool even;
};
template <class T>
NTK_INLINE FastLayer<T> fast_layer(const GeneralLayer& l) {
    return {T(l.p * l.p), T(l.p * l.q * mean_factor(l)), T(l.r * 0.5 * fma_(l.slope, l.slope, 1.0)),
            T(l.r * 0.5 * (1.0 - l.slope) * (1.0 - l.slope)), T(l.r * l.slope), l.slope == -1.0};
}

// One image at a position: root and inverse root (0 for 0) of the window's variance; mean and half the variance before the
// layer. The last two are for skips only.
template <class T>
struct FastPoint {
    T root, inv, mean, half;
};
template <class T>
struct FastState {
    T e, m;  // E and M, or their window sums; F in place of M before the first layer
};

template <class T>
struct FastTerms {
    T n, x;  // x - 2 if rho < 0
    T q, eq, d;  // r Q, r E_Q, r D
    T difference;
};
template <class T>
NTK_INLINE FastTerms<T> fast_terms(const FastLayer<T>& l, T e, FastPoint<T> i, FastPoint<T> j) {
    const T difference = i.root - j.root, n = i.root * j.root;
    T x = at_least(fma_(T(-0.5) * difference, difference, e), T(0)) * i.inv * j.inv;
    x = x > T(1) ? T(1) : x;
    const Arc<T> u = arc(x);
    const T area = n * u.area;
    return {n, x, fma_(l.h1, area, l.h0 * (n - n * x)), fma_(l.h0, e, -l.h1 * area), fma_(l.h1, T(1) - u.theta, l.slope), difference};
}
// The first layer: f in place of m.
template <class T>
NTK_INLINE FastTerms<T> fast_first(const FastLayer<T>& l, T e, T f, FastPoint<T> i, FastPoint<T> j) {
    const T difference = i.root - j.root, n = i.root * j.root, half = T(0.5) * difference * difference;
    const bool negative = f < e;
    const T near = negative ? f : e;
    T x = at_least(near - half, T(0)) * i.inv * j.inv;
    x = x > T(1) ? T(1) : x;
    const Arc<T> u = arc(x);
    const T area = n * u.area, c = n - n * x;
    const bool below = negative && !l.even;
    const T q = below ? fma_(l.h1, area + c, -l.h0 * c) : fma_(l.h1, area, l.h0 * c);
    const T eq = below ? fma_(l.h0, T(0.5) * (e + f), -q) : fma_(l.h0, near, -l.h1 * area);
    return {n, negative ? x - T(2) : x, q, eq, fma_(l.h1, negative ? u.theta : T(1) - u.theta, l.slope), difference};
}
template <class T>
NTK_INLINE T signed_cosine(T x) {
    return x < T(0) ? T(1) + x : T(1) - x;
}

// What a layer leaves at a position: its state, S alone and the layer's own term r D C. E may round to a little below 0, which
// is caught where x is formed.
template <class T>
struct FastResult {
    FastState<T> state;
    T s, own;
};
// w: sums over the window times cw; before: the state at the position (for skips); trained: w of the first layer, 0 or 1.
template <bool FIRST, bool SKIP, class T>
NTK_INLINE FastResult<T> fast_step(const FastLayer<T>& l, T trained, FastState<T> w, FastState<T> before, FastPoint<T> i, FastPoint<T> j) {
    const FastTerms<T> t = FIRST ? fast_first(l, w.e, w.m, i, j) : fast_terms(l, w.e, i, j);
    const T m = FIRST ? trained * T(0.5) * (w.m - w.e) : w.m;
    T s = t.q, e = t.eq, kernel = t.d * m;
    if (SKIP) {
        s = fma_(l.cross, fma_(i.mean, j.root, j.mean * i.root), s);
        kernel = fma_(l.skip, before.m, kernel);
        e = fma_(l.skip, before.e, fma_(l.cross * (i.mean - j.mean), t.difference, e));
    }
    kernel += s;
    if (SKIP) s = fma_(l.skip, (i.half + j.half) - before.e, s);
    const T cosine = FIRST ? signed_cosine(t.x) : T(1) - t.x;
    return {{e, kernel}, s, t.d * (t.n * cosine)};
}

// Any layer, in double.
//
// State of a pair: E and F, half squared distances and half squared norms of sums (both are sums of positive terms, so one of
// them is right where |rho| is 1 up to rounding), and T. With e, f, t the window sums times cw, f' = f + 2 cb:
//   1 - rho = (e - (root_i - root_j)^2 / 2) / n,   1 + rho = (f' - (root_i - root_j)^2 / 2) / n,   C = (f' - e) / 2
//   E' = p^2 E + p q (b_i - b_j)(mu_i - mu_j) + r E_Q,   F' with plus signs,   E_Q + F_Q = Q_ii + Q_jj
//   T' = p^2 T + r D (t + w (f - e) / 2 + wb cb)
struct ConvState {
    double e, f, t;
};

// One image at a position: root and inverse root of the window's variance, mean before the layer, mean and variance of s.
struct ConvPoint {
    double root, inv, mean, mu, q;
};

NTK_INLINE Correlation conv_correlation(const GeneralLayer& l, double e, double f, double root_i, double inv_i, double root_j, double inv_j) {
    const double dn = root_i - root_j, half = 0.5 * dn * dn, scale = inv_i * inv_j;
    const double minus = at_least(e - half, 0.0) * scale, plus = at_least(f + 2.0 * l.cb - half, 0.0) * scale;
    const double least = plus < minus ? plus : minus;
    return {least > 1.0 ? 1.0 : least, plus < minus ? -1.0 : 1.0};
}

struct ConvResult {
    ConvState state;
    double own;    // r D (w C + wb cb): Gram of the layer's own parameters
    double last;   // r D C
    double factor; // r cw D: what the layer does to earlier Grams, at every slot of the window
};
// window: sums times cw; before: the state at the position; u: expectations of the activation at conv_correlation.
NTK_INLINE ConvResult conv_step(const GeneralLayer& l, ConvState window, ConvState before, PairNumbers u, ConvPoint i, ConvPoint j) {
    const double other = at_least((i.q + j.q) - u.w, 0.0);
    const double eq = u.side < 0.0 ? other : u.w, fq = u.side < 0.0 ? u.w : other;
    const double minus = (i.mean - j.mean) * (i.mu - j.mu), plus = (i.mean + j.mean) * (i.mu + j.mu);
    const double cov = 0.5 * (window.f - window.e), skip = l.p * l.p, d = l.r * u.d;
    const double own = fma_(l.w, cov, l.wb * l.cb);
    return {{fma_(skip, before.e, fma_(l.p * l.q, minus, l.r * eq)), fma_(skip, before.f, fma_(l.p * l.q, plus, l.r * fq)),
             fma_(skip, before.t, d * (window.t + own))},
            d * own, d * cov, l.r * l.cw * u.d};
}

}  // namespace ntk

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
//
// Numbers are kept in units that make most factors 1 (true = unit times kept): with V the unit of the state before the layer,
// U = cw V that of its window sums, V' = r h0 U that after the layer, k = h1 / h0, kept roots s = root / sqrt(2 U), kept inverses
// sqrt(U / 2) / root, z = x / 2:
//   z = (e - (s_i - s_j)^2) inv_i inv_j,   E' = e - 2 k s_i s_j g,   M' = (slope / h0 + k (1 - theta)) m + s_i s_j (2 - 4 z + 2 k g)
// A layer with a skip, or whose V' is far from 1, takes V' = 1 and multiplies (`scaled`).

// Window variances below this share of the image's mean are zero: the inverse of their product must be finite.
NTK_INLINE double least_variance(double) { return 1e-280; }
NTK_INLINE double least_variance(float) { return 1e-32; }
NTK_INLINE double fast_variance(const GeneralLayer& l, double sum, double least) {
    const double lam = l.cw * sum;
    return lam < least ? 0.0 : lam;
}

NTK_INLINE double mean_factor(const GeneralLayer& l) { return (1.0 - l.slope) * kInvSqrt2Pi; }
NTK_INLINE double even_part(const GeneralLayer& l) { return 0.5 * fma_(l.slope, l.slope, 1.0); }          // h0
NTK_INLINE double odd_part(const GeneralLayer& l) { return 0.5 * (1.0 - l.slope) * (1.0 - l.slope); }     // h1

// E and F are first kept as whole squared norms.
NTK_CONSTANT double kFirstUnit = 0.5;
struct FastUnits {
    double before, sums, after;  // V, U, V'
    bool scaled;
};
NTK_INLINE FastUnits fast_units(const GeneralLayer& l, double before) {
    const double sums = before * l.cw, own = sums * l.r * even_part(l);
    const bool scaled = l.p != 0.0 || own < 0x1p-40 || own > 0x1p40;
    return {before, sums, scaled ? 1.0 : own, scaled};
}

// Numbers of a layer in the type of the arithmetic.
template <class T>
struct FastLayer {
    T skip, scale, k, slope;
    bool even;
};
template <class T>
NTK_INLINE FastLayer<T> fast_layer(const GeneralLayer& l, const FastUnits& u) {
    const double h0 = even_part(l);
    return {T(l.p * l.p * u.before / u.after), T(u.scaled ? u.sums * l.r * h0 / u.after : 1.0), T(odd_part(l) / h0), T(l.slope / h0),
            l.slope == -1.0};
}

// One image at a position: root and inverse root (0 for 0) of the window's variance; mean (with its factors) and half the
// variance before the layer. The last two are for scaled layers only.
template <class T>
struct FastPoint {
    T root, inv, mean, half;
};
// lam: variance of the window; mean, var: before the layer.
NTK_INLINE FastPoint<double> fast_point(const GeneralLayer& l, const FastUnits& u, double lam, double mean, double var) {
    const double root = sqrt_(lam);
    return {root * sqrt_(0.5 / u.sums), root > 0.0 ? sqrt_(0.5 * u.sums) / root : 0.0,
            l.p * l.q * mean_factor(l) * sqrt_(2.0 * u.sums) / u.after * mean, 0.5 / u.before * var};
}
template <class T>
struct FastState {
    T e, m;  // E and M, or their window sums; F in place of M before the first layer
};

template <class T>
struct FastTerms {
    T q, e, d;  // Q, E_Q and D, in units of U h0
    T cov;      // C, in units of U
    T difference;
    T watch;    // what the caller must look at: the loss of the first layer, z of later ones
};
// From z; e: what E_Q starts from.
template <int RANGE = 0, class T>
NTK_INLINE FastTerms<T> fast_terms_at(const FastLayer<T>& l, T n, T z, T e, T difference) {
    const Arc<T> u = arc_half<RANGE>(z);
    const T odd = (l.k + l.k) * n, cov = n * fma_(T(-4), z, T(2));
    return {fma_(odd, u.area, cov), fma_(-odd, u.area, e), fma_(-l.k, u.theta, l.slope + l.k), cov, difference, z};
}
// RANGE > 0: useless where z exceeds kArcRange[RANGE].
template <int RANGE = 0, class T>
NTK_INLINE FastTerms<T> fast_terms(const FastLayer<T>& l, T e, const FastPoint<T>& i, const FastPoint<T>& j) {
    const T difference = i.root - j.root;
    const T z = at_least(fma_(-difference, difference, e), T(0)) * (i.inv * j.inv);
    return fast_terms_at<RANGE>(l, i.root * j.root, RANGE ? z : at_most(z, T(0.5)), e, difference);
}
// The first layer, negative: rho < 0; near: what E_Q starts from if |rho| is near 1, half: what it starts from if rho < 0.
template <class T, class Mask>
NTK_INLINE FastTerms<T> fast_first_at(const FastLayer<T>& l, T n, T z, Mask negative, T near, T half, T difference, T loss) {
    const Arc<T> u = arc_half(z);
    const T area = n * ((l.k + l.k) * u.area), cov = n * fma_(T(-4), z, T(2));
    const T q = fma_(l.k - T(1), cov, area);  // if rho < 0
    const T d = fma_(l.k, choose(negative, u.theta, T(1) - u.theta), l.slope), signed_cov = choose(negative, T(0) - cov, cov);
    if (l.even) return {cov + area, near - area, d, signed_cov, difference, loss};
    return {choose(negative, q, cov + area), choose(negative, half - q, near - area), d, signed_cov, difference, loss};
}

// Where patches are nearly multiples of each other, of different norms, z is the small difference of (s_i - s_j)^2 inv_i inv_j = y
// and its like: it is off by eps y, theta by eps y / sqrt(z). That is too much where y - loss_ratio z exceeds least_loss.
template <class T>
NTK_INLINE T loss_ratio() { return T(Single<T>::value ? 1e4 : 1e6); }
NTK_INLINE double least_loss(double) { return 1e-10; }
NTK_INLINE double least_loss(float) { return 1e-6; }

// The first layer: f in place of m.
template <class T>
NTK_INLINE FastTerms<T> fast_first(const FastLayer<T>& l, T e, T f, const FastPoint<T>& i, const FastPoint<T>& j) {
    const T difference = i.root - j.root, inverse = i.inv * j.inv, square = difference * difference;
    const auto negative = f < e;
    const T near = choose(negative, f, e);
    const T z = at_most(at_least(near - square, T(0)) * inverse, T(0.5));
    const T loss = fma_(-loss_ratio<T>(), z, square * inverse);
    return fast_first_at(l, i.root * j.root, z, negative, near, T(0.5) * (e + f), difference, loss);
}

// The same without loss: the state is X = n - C, in place of E, and n + C, in place of F; apart: what different norms within the
// windows add to z, the sum of (a_i inv_i - a_j inv_j)^2 over the window, a the kept norm at a position (s of the layer before).
//   z = apart + X inv_i inv_j,   X' = 4 s_i s_j z - 2 k s_i s_j g
template <bool FIRST, class T>
NTK_INLINE FastTerms<T> exact_terms(const FastLayer<T>& l, T x, T y, T apart, const FastPoint<T>& i, const FastPoint<T>& j) {
    const T n = i.root * j.root;
    const auto negative = y < x;
    const T z = at_most(fma_(FIRST ? choose(negative, y, x) : x, i.inv * j.inv, apart), T(0.5)), near = T(4) * n * z;
    return FIRST ? fast_first_at(l, n, z, negative, near, n + n, T(0), T(0)) : fast_terms_at(l, n, z, near, T(0));
}

// What a channel adds to E and F before the first layer, in units of kFirstUnit.
template <class T>
NTK_INLINE FastState<T> fast_channel(FastState<T> sum, T x, T y) {
    const T minus = x - y, plus = x + y;
    return {fma_(minus, minus, sum.e), fma_(plus, plus, sum.m)};
}
// What a channel adds to n - C and n + C before the first layer, in units of kFirstUnit: from values divided by the norms a.
template <class T>
NTK_INLINE FastState<T> exact_channel(FastState<T> sum, T x_i, T a_i, T x_j, T a_j) {
    const T u = a_i > T(0) ? x_i / a_i : T(0), v = a_j > T(0) ? x_j / a_j : T(0), n = a_i * a_j, minus = u - v, plus = u + v;
    return {fma_(n * minus, minus, sum.e), fma_(n * plus, plus, sum.m)};
}
// What a slot of the windows adds to `apart`; a is 0 outside the image.
template <class T>
NTK_INLINE T norms_apart(T sum, T a_i, T inv_i, T a_j, T inv_j) {
    const T apart = a_i * inv_i - a_j * inv_j;
    return fma_(apart, apart, sum);
}

// What a layer leaves at a position: its state, S alone and the layer's own term r D C. E may round to a little below 0, which
// is caught where z is formed.
template <class T>
struct FastResult {
    FastState<T> state;
    T s, own, watch;
};
// w: sums over the window; before: the state at the position (if scaled); trained: w of the first layer, 0 or 1.
template <bool FIRST, bool SCALED, class T>
NTK_INLINE FastResult<T> fast_result(const FastLayer<T>& l, T trained, const FastTerms<T>& t, const FastState<T>& w,
                                     const FastState<T>& before, const FastPoint<T>& i, const FastPoint<T>& j) {
    const T m = FIRST ? trained * T(0.5) * (w.m - w.e) : w.m;
    if (!SCALED) return {{t.e, fma_(t.d, m, t.q)}, t.q, t.d * t.cov, t.watch};
    const T d = l.scale * t.d, branch = fma_(i.mean, j.root, fma_(j.mean, i.root, l.scale * t.q));
    return {{fma_(l.skip, before.e, fma_(i.mean - j.mean, t.difference, l.scale * t.e)), fma_(l.skip, before.m, fma_(d, m, branch))},
            fma_(l.skip, (i.half + j.half) - before.e, branch), d * t.cov, t.watch};
}
template <bool FIRST, bool SCALED, int RANGE = 0, class T>
NTK_INLINE FastResult<T> fast_step(const FastLayer<T>& l, T trained, const FastState<T>& w, const FastState<T>& before,
                                   const FastPoint<T>& i, const FastPoint<T>& j) {
    const FastTerms<T> t = FIRST ? fast_first(l, w.e, w.m, i, j) : fast_terms<RANGE>(l, w.e, i, j);
    return fast_result<FIRST, SCALED>(l, trained, t, w, before, i, j);
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

NTK_INLINE Correlation conv_correlation(const GeneralLayer& l, double e, double f, double root_i, double inv_i, double root_j,
                                        double inv_j) {
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

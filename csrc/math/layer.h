// One layer of the recursion (MATH.md, section 9, in the form without cancellation of 9b).
#pragma once
#include "activations.h"

namespace ntk {

// A bias-free layer with a positively homogeneous activation. Norms factor out: with unit-norm inputs, nu the common
// diagonal of S (nu' after the layer) and beta the mean,
//   a = p^2 nu / nu',  c = r cw nu / nu',  drift = 2 p q beta mu / nu',  a + c h0 + drift = 1.
// h0 = (1 + e^2) / 2, h1 = (1 - e)^2 / 2 for s(u) = e u (u < 0):  Q = h0 rho + h1 g,  D = e + h1 kappa0.
struct HomogeneousLayer {
    double drift;  // see above
    double decay;  // 1 - a
    double c_e;    // c e
    double c_h0;   // c h0
    double c_h1;   // c h1
    double turn;   // 2 a + c (1 + e)^2 / 2
    double w;      // factor of the Gram of W
    double v;      // factor of the Gram of V
    double w_all;  // w if W is counted as trained (last_hidden)
    int signs;     // 0: rho >= 0 is certain for the input of this layer
    int signs_after;  // the same for its result
    int range;     // index of kArcRange; 0 if signs
    int slice_w;   // index in layer_grams, -1 for none
    int slice_v;
};

// The same in the type of the arithmetic.
template <class T>
struct HomogeneousNumbers {
    T drift, decay, c_e, c_h0, c_h1, turn, w, v;
};
template <class T>
NTK_INLINE HomogeneousNumbers<T> numbers(const HomogeneousLayer& l) {
    return {T(l.drift), T(l.decay), T(l.c_e), T(l.c_h0), T(l.c_h1), T(l.turn), T(l.w), T(l.v)};
}

// State of a pair: x = 1 - |rho|, s = sign of rho, theta = Theta / (nu |x_i| |x_j|).
template <class T, class W = Wide<T>>
struct PairState {
    W x;
    T s;
    W theta;
};

// What a layer adds itself, and what it does to earlier Grams, all divided by nu'.
template <class T>
struct LayerTerms {
    T own_w;   // c D rho:  Gram of W for w = 1
    T own_v;   // c Q / nu: Gram of V for v = 1
    T growth;  // a + c D - 1: relative change of every earlier Gram
};

// The state after one layer.
//   1 - rho' = (1 - rho) - drift (1 - rho) - c h1 g,  and in the same way 1 + rho' on the negative side; every change is
//   an increment, so that a thousand layers lose nothing. a + c D - 1 = -drift - c h1 theta for rho >= 0: there
//   c (e + h1) = c h0 cancels against 1 - a exactly.
//   SIGNED = false (rho >= 0 is certain) and OUTER = false (v = 0) drop what is not needed.
template <bool SIGNED, int RANGE, bool OUTER, class T, class W>
NTK_INLINE LayerTerms<T> homogeneous_step(PairState<T, W>& p, const HomogeneousNumbers<T>& l) {
    T x = p.x.hi;
    Arc<T> u = arc<RANGE>(x);
    bool negative = SIGNED && p.s < T(0);
    T cosine = T(1) - x;  // |rho|
    T rho = SIGNED ? p.s * cosine : cosine;
    T gap = negative ? T(2) - x : x;                   // 1 - rho
    T area = negative ? u.area + cosine : u.area;      // g of the whole angle
    T kappa0 = negative ? u.theta : T(1) - u.theta;
    LayerTerms<T> t;
    t.own_w = fma_(l.c_h1, kappa0, l.c_e) * rho;
    t.own_v = OUTER ? fma_(l.c_h1, area, l.c_h0 * rho) : T(0);
    t.growth = negative ? fma_(l.c_h1, kappa0, l.c_e - l.decay) : -fma_(l.c_h1, u.theta, l.drift);
    T own = OUTER ? fma_(l.w, t.own_w, l.v * t.own_v) : l.w * t.own_w;
    p.theta = add(p.theta, fma_(t.growth, p.theta.hi, own));
    T change = fma_(l.drift, gap, l.c_h1 * area);      // rho' - rho
    p.x = add(p.x, SIGNED ? -p.s * change : -change);
    if (SIGNED) {
        bool flip = p.x.hi > T(1);
        // From below 0 to above: 1 - rho' = turn - (a + c e)(1 + rho) - c h1 g, small if abs meets opposite points.
        W above = {fma_(-l.c_h1, u.area, fma_(l.decay - l.c_e - T(1), x, l.turn))};
        W below = two_minus(p.x);
        W other = negative ? above : below;
        p.x = flip ? other : p.x;
        p.s = flip ? -p.s : p.s;
    }
    return t;
}

// Any layer. The coefficients are those of Network.coefficients (MATH.md, section 9).
struct GeneralLayer {
    double p, q, r, cw, cb, w, wb, v, vb, vvb, w_all;
    double slope;          // of a homogeneous activation
    int activation;        // enum ActivationId
    int table;             // index of the Hermite table, -1 for none
    int slice_w, slice_v;  // index in layer_grams, -1 for none
};

enum ActivationId { kHomogeneous, kErf, kGaussian, kExp, kSin, kCos, kGelu, kHermite };

// Covariance and mean of one point.
struct RowState {
    double var, mean;
};
NTK_INLINE RowState advance_row(const GeneralLayer& l, RowState r, double q, double mu) {
    return {fma_(l.p * l.p, r.var, 2.0 * l.p * l.q * r.mean * mu) + fma_(l.r, q, l.vb), fma_(l.p, r.mean, l.q * mu)};
}

// State of a pair: x = 1 - |rho| and the sign s of rho, rho the correlation of S_ij; Theta.
struct GeneralState {
    double x, s, theta;
};

struct Correlation {
    double x, s;
};

// 1 - |rho| and sign of the pre-activations, covariance Lam = cw S + cb; ni, nj: square roots of S_ii, S_jj. With
// root = sqrt(Lam_ii), N = ni + nj, R = root_i + root_j, c = cw ni nj (1 - x), every term is positive:
//   sqrt(Lam_ii Lam_jj) - cw ni nj - cb = spread = cw (ni - nj)^2 / 2 * (R^2 - cw N^2) / R^2
//   sqrt(Lam_ii Lam_jj) - Lam_ij = spread + cw ni nj (1 - rho),   sqrt(..) + Lam_ij = spread + cw ni nj (1 + rho) + 2 cb
NTK_INLINE Correlation correlation(const GeneralLayer& l, double x, double s, double ni, double nj, const RowNumbers& i,
                                   const RowNumbers& j) {
    double dn = ni - nj, sum = i.root + j.root, n = l.cw * ni * nj;
    double cross = fma_(i.root, j.root, n);
    double excess = 2.0 * l.cb * (1.0 + (cross > 0.0 ? fma_(l.cw, ni * ni + nj * nj, l.cb) / cross : 0.0));
    double spread = sum > 0.0 ? 0.5 * l.cw * dn * dn * excess / (sum * sum) : 0.0;
    double below = fma_(n, s < 0.0 ? 2.0 - x : x, spread) * i.inv * j.inv;                  // 1 - rho
    double above = fma_(n, s < 0.0 ? x : 2.0 - x, spread + 2.0 * l.cb) * i.inv * j.inv;     // 1 + rho
    bool negative = above < below;
    double least = negative ? above : below;
    return {least > 1.0 ? 1.0 : least, negative ? -1.0 : 1.0};
}

struct GeneralTerms {
    double own_w;   // r D cw S:  Gram of W for w = 1
    double own_b;   // r D cb:    Gram of the inner bias for wb = 1
    double own_v;   // r Q:       Gram of V for v = 1
    double factor;  // p^2 + r cw D: what the layer does to earlier Grams
};

// What a point brings to general_step: sqrt(S_ii) and mean before the layer, 1 / sqrt(S_ii) too after it.
struct PointState {
    double root, mean, next_root, next_inv;
};

// The state after one layer, given the expectations u of the activation.
//   exact: a homogeneous activation without skip and outer bias keeps parallel points parallel: its own 1 - |rho| (PairNumbers.gap);
//   close: half the squared distance (sum, for side = -1), a sum of small terms, less what the norms contribute;
//   far:   the covariance itself, right relative to the norms however different they are (1 - |rho| to eps).
NTK_INLINE GeneralTerms general_step(const GeneralLayer& l, GeneralState& p, PairNumbers u, const RowNumbers& i,
                                     const RowNumbers& j, PointState a, PointState b) {
    double n = a.root * b.root, dn = a.root - b.root;
    double cov = p.s * n * (1.0 - p.x);
    GeneralTerms t;
    t.own_w = l.r * u.d * (l.cw * cov);
    t.own_b = l.r * u.d * l.cb;
    t.own_v = l.r * u.q;
    t.factor = fma_(l.r * l.cw, u.d, l.p * l.p);
    p.theta = fma_(t.factor, p.theta, fma_(l.w, t.own_w, fma_(l.wb, t.own_b, fma_(l.v, t.own_v, l.vvb * l.vb))));
    double next_n = a.next_root * b.next_root, next_dn = a.next_root - b.next_root;
    double half = fma_(n, u.side == p.s ? p.x : 2.0 - p.x, 0.5 * dn * dn);
    double cross = l.p * l.q * (a.mean - u.side * b.mean) * (i.mu - u.side * j.mu);
    half = fma_(l.p * l.p, half, cross) + fma_(l.r, u.w, (1.0 - u.side) * l.vb);
    double far = fma_(l.p * l.p, cov, l.p * l.q * fma_(a.mean, j.mu, b.mean * i.mu)) + fma_(l.r, u.q, l.vb);
    bool exact = l.p == 0.0 && l.vb == 0.0 && u.gap >= 0.0, close = half < 0.25 * next_n;
    // One factor at a time: the product of two inverses may overflow where the variances are tiny.
    double gap = exact ? l.r * u.gap : half - 0.5 * next_dn * next_dn;
    double x = exact || close ? gap * a.next_inv * b.next_inv : 1.0 - abs_(far) * a.next_inv * b.next_inv;
    double sign = exact || close ? u.side : (far < 0.0 ? -1.0 : 1.0);
    x = at_least(x, 0.0);
    p.x = x > 1.0 ? 2.0 - x : x;
    p.s = x > 1.0 ? -sign : sign;
    return t;
}

}  // namespace ntk

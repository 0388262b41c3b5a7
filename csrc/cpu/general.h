// Layers with biases or without homogeneity over one block, in double.
//
// Every layer makes three passes over one row of the block (192 pairs, in L1): correlations of the pre-activations,
// expectations of the activation, new state. Row numbers are advanced with the layers, so nothing grows with depth.
#pragma once
#include "../math/pair.h"
#include "block.h"

namespace ntk {

// Numbers of the rows (or columns) of a block; with ELEMENTWISE pairs both sides have one entry a pair.
struct RowArrays {
    double var[kCols], mean[kCols], norm[kCols];  // S_ii, mean, sqrt(S_ii)
    double next_var[kCols], next_mean[kCols], next_norm[kCols], next_inv[kCols];
    double lam[kCols], root[kCols], inv[kCols], q[kCols], mu[kCols], a1[kCols], a2[kCols], a3[kCols];
    double* hermite;  // (evens + odds, kCols)
};

NTK_INLINE RowNumbers row_numbers(const RowArrays& a, int k) {
    return {a.lam[k], a.root[k], a.inv[k], a.q[k], a.mu[k], a.a1[k], a.a2[k], a.a3[k]};
}
NTK_INLINE void put_row(RowArrays& a, int k, const RowNumbers& r) {
    a.lam[k] = r.lam, a.root[k] = r.root, a.inv[k] = r.inv, a.q[k] = r.q;
    a.mu[k] = r.mu, a.a1[k] = r.a1, a.a2[k] = r.a2, a.a3[k] = r.a3;
}

struct GeneralArrays {
    double x[kBlock], s[kBlock], theta[kBlock];     // state
    double lx[kCols], ls[kCols];                    // of one row: correlation of the pre-activations
    double w[kCols], d[kCols], side[kCols], q[kCols], gap[kCols];  // of one row: expectations (PairNumbers)
    double e[4][kCols];                             // Hermite sums
};

template <class Activation>
static void rows_of(const Activation& act, const GeneralLayer& l, RowArrays& a, int n) {
    for (int k = 0; k < n; ++k) put_row(a, k, act.row(fma_(l.cw, a.var[k], l.cb)));
}

// a_k of each row by Clenshaw's recurrence on its panel; or the common numbers of all rows.
static void hermite_rows(const HermiteTable& t, const GeneralLayer& l, RowArrays& a, int n) {
    const int terms = t.evens + t.odds;
    for (int k = 0; k < n; ++k) {
        RowNumbers r = make_row(fma_(l.cw, a.var[k], l.cb));
        r.q = t.even_sum + t.odd_sum;
        r.mu = t.mean;
        if (t.panels > 0 && r.lam == 0.0) {  // s(0) is all there is
            for (int m = 0; m < terms; ++m) a.hermite[m * kCols + k] = 0.0;
            if (t.evens > 0) a.hermite[k] = t.mean;
            r.q = t.mean * t.mean;
        } else if (t.panels > 0) {
            const HermitePlace place = hermite_place(t, r.root);
            r.q = 0.0;
            for (int m = 0; m < terms; ++m) {
                const double value = chebyshev(place.coefficients + std::int64_t(m) * t.order, t.order, place.y);
                a.hermite[m * kCols + k] = value;
                r.q = fma_(value, value, r.q);
            }
            r.mu = t.evens > 0 ? a.hermite[k] : 0.0;
        }
        put_row(a, k, r);
    }
}

static void advance_rows(const GeneralLayer& l, const HermiteTable* tables, RowArrays& a, int n) {
    switch (l.activation) {
        case kHomogeneous: rows_of(Homogeneous{l.slope}, l, a, n); break;
        case kErf: rows_of(Erf{}, l, a, n); break;
        case kGaussian: rows_of(Gaussian{}, l, a, n); break;
        case kExp: rows_of(Exp{}, l, a, n); break;
        case kSin: rows_of(Sin{}, l, a, n); break;
        case kCos: rows_of(Cos{}, l, a, n); break;
        case kGelu: rows_of(Gelu{}, l, a, n); break;
        default: hermite_rows(tables[l.table], l, a, n);
    }
    for (int k = 0; k < n; ++k) {
        RowState next = advance_row(l, {a.var[k], a.mean[k]}, a.q[k], a.mu[k]);
        const RowNumbers r = make_row(next.var);
        a.next_var[k] = next.var, a.next_mean[k] = next.mean, a.next_norm[k] = r.root, a.next_inv[k] = r.inv;
    }
}

static void finish_layer(RowArrays& a) {
    __builtin_memcpy(a.var, a.next_var, sizeof a.var);
    __builtin_memcpy(a.mean, a.next_mean, sizeof a.mean);
    __builtin_memcpy(a.norm, a.next_norm, sizeof a.norm);
}

template <bool ELEMENTWISE>
NTK_INLINE void correlate_pair(const GeneralLayer& l, const RowArrays& ri, const RowArrays& rj, int i, int k,
                               const double* x, const double* s, GeneralArrays& g) {
    const int r = ELEMENTWISE ? k : i;
    const Correlation c = correlation(l, x[k], s[k], ri.norm[r], rj.norm[k], row_numbers(ri, r), row_numbers(rj, k));
    g.lx[k] = c.x, g.ls[k] = c.s;
}
template <bool ELEMENTWISE>
static void correlate(const GeneralLayer& l, const RowArrays& ri, const RowArrays& rj, int i, int n, const double* x,
                      const double* s, GeneralArrays& g) {
#pragma omp simd
    for (int k = 0; k < n; ++k) correlate_pair<ELEMENTWISE>(l, ri, rj, i, k, x, s, g);
}

template <bool ELEMENTWISE, class Activation>
NTK_INLINE void expect_pair(const Activation& act, const RowArrays& ri, const RowArrays& rj, int i, int k,
                            GeneralArrays& g) {
    const PairNumbers u = act.pair(row_numbers(ri, ELEMENTWISE ? k : i), row_numbers(rj, k), g.lx[k], g.ls[k]);
    g.w[k] = u.w, g.d[k] = u.d, g.side[k] = u.side, g.q[k] = u.q, g.gap[k] = u.gap;
}
template <bool ELEMENTWISE, class Activation>
static void expect(const Activation& act, const RowArrays& ri, const RowArrays& rj, int i, int n, GeneralArrays& g) {
#pragma omp simd
    for (int k = 0; k < n; ++k) expect_pair<ELEMENTWISE>(act, ri, rj, i, k, g);
}

// Hermite sums with one variance for all rows: four Horner polynomials in rho^2.
static void expect_uniform(const HermiteTable& t, int n, GeneralArrays& g) {
    for (int q = 0; q < 4; ++q)
        for (int k = 0; k < n; ++k) g.e[q][k] = 0.0;
    const double* table[4] = {t.even_defect, t.even_derivative, t.odd_defect, t.odd_derivative};
    for (int q = 0; q < 4; q += 2) {
        const double *defect = table[q], *derivative = table[q + 1];
        double *a = g.e[q], *b = g.e[q + 1];
        const int length = q ? t.odds : t.evens;
        // 16 pairs at a time: their two sums stay in registers over all terms.
        for (int start = 0; start < n; start += 16) {
            double r2[16], u[16], v[16];
            for (int k = 0; k < 16; ++k) r2[k] = (1.0 - g.lx[start + k]) * (1.0 - g.lx[start + k]), u[k] = v[k] = 0.0;
            for (int m = length - 1; m >= 0; --m) {
#pragma omp simd
                for (int k = 0; k < 16; ++k) u[k] = fma_(u[k], r2[k], defect[m]), v[k] = fma_(v[k], r2[k], derivative[m]);
            }
            for (int k = 0; k < 16; ++k) a[start + k] = u[k], b[start + k] = v[k];
        }
    }
    for (int k = 0; k < n; ++k) {
        const double side = hermite_side(t, g.ls[k]);
        const PairNumbers p = hermite_pair(g.lx[k], g.ls[k], side, g.e[0][k], g.e[1][k], g.e[2][k], g.e[3][k], t.even_sum, t.odd_sum);
        g.w[k] = p.w, g.d[k] = p.d, g.side[k] = p.side, g.q[k] = p.q, g.gap[k] = p.gap;
    }
}

template <bool EVEN, bool ELEMENTWISE>
NTK_INLINE void hermite_term(int i, int k, const double* ai, const double* aj, double degree, GeneralArrays& g) {
    HermiteSum t{g.w[k], g.q[k], g.d[k], g.e[0][k], g.e[1][k]};
    const double a = ai[ELEMENTWISE ? k : i], x = g.lx[k], r2 = (1.0 - x) * (1.0 - x), u = x * (2.0 - x);
    if (EVEN) hermite_even(t, a, aj[k], degree, g.side[k], r2, u);
    else hermite_odd(t, a, aj[k], degree, x, g.ls[k], r2, u);
    g.w[k] = t.w, g.q[k] = t.q, g.d[k] = t.d, g.e[0][k] = t.e, g.e[1][k] = t.before;
}
template <bool EVEN, bool ELEMENTWISE>
static void hermite_terms(int i, int n, int terms, const double* ai, const double* aj, GeneralArrays& g) {
    for (int k = 0; k < n; ++k) g.d[k] = g.e[0][k] = g.e[1][k] = 0.0;
    for (int m = 0; m < terms; ++m) {
        const double *a = ai + m * kCols, *b = aj + m * kCols;
        const double degree = EVEN ? 2.0 * m : 2.0 * m + 1.0;
#pragma omp simd
        for (int k = 0; k < n; ++k) hermite_term<EVEN, ELEMENTWISE>(i, k, a, b, degree, g);
    }
}
template <bool ELEMENTWISE>
static void expect_hermite(const HermiteTable& t, const RowArrays& ri, const RowArrays& rj, int i, int n, GeneralArrays& g) {
    for (int k = 0; k < n; ++k) g.w[k] = g.q[k] = 0.0, g.gap[k] = -1.0, g.side[k] = hermite_side(t, g.ls[k]);
    hermite_terms<true, ELEMENTWISE>(i, n, t.evens, ri.hermite, rj.hermite, g);
    for (int k = 0; k < n; ++k) g.e[2][k] = g.d[k];
    const std::int64_t skip = std::int64_t(t.evens) * kCols;
    hermite_terms<false, ELEMENTWISE>(i, n, t.odds, ri.hermite + skip, rj.hermite + skip, g);
    for (int k = 0; k < n; ++k)
        g.d[k] = hermite_derivative(g.e[2][k], g.d[k], g.lx[k], g.ls[k], ri.inv[ELEMENTWISE ? k : i], rj.inv[k]);
}

template <bool ELEMENTWISE>
static void expectations(const GeneralLayer& l, const HermiteTable* tables, const RowArrays& ri, const RowArrays& rj, int i,
                  int n, GeneralArrays& g) {
    switch (l.activation) {
        case kHomogeneous: return expect<ELEMENTWISE>(Homogeneous{l.slope}, ri, rj, i, n, g);
        case kErf: return expect<ELEMENTWISE>(Erf{}, ri, rj, i, n, g);
        case kGaussian: return expect<ELEMENTWISE>(Gaussian{}, ri, rj, i, n, g);
        case kExp: return expect<ELEMENTWISE>(Exp{}, ri, rj, i, n, g);
        case kSin: return expect<ELEMENTWISE>(Sin{}, ri, rj, i, n, g);
        case kCos: return expect<ELEMENTWISE>(Cos{}, ri, rj, i, n, g);
        case kGelu: return expect<ELEMENTWISE>(Gelu{}, ri, rj, i, n, g);
        default: break;
    }
    const HermiteTable& t = tables[l.table];
    if (t.panels == 0) return expect_uniform(t, n, g);
    expect_hermite<ELEMENTWISE>(t, ri, rj, i, n, g);
}

NTK_INLINE PointState point_state(const RowArrays& a, int k) {
    return {a.norm[k], a.mean[k], a.next_norm[k], a.next_inv[k]};
}
template <bool ELEMENTWISE>
NTK_INLINE void general_pair(const GeneralLayer& l, const RowArrays& ri, const RowArrays& rj, int i, int k, double* x,
                             double* s, double* theta, const GeneralArrays& g, double* terms) {
    const int r = ELEMENTWISE ? k : i;
    GeneralState p{x[k], s[k], theta[k]};
    const GeneralTerms t = general_step(l, p, {g.w[k], g.d[k], g.side[k], g.q[k], g.gap[k]}, row_numbers(ri, r), row_numbers(rj, k),
                                        point_state(ri, r), point_state(rj, k));
    x[k] = p.x, s[k] = p.s, theta[k] = p.theta;
    terms[k] = t.own_w, terms[k + kCols] = t.own_b, terms[k + 2 * kCols] = t.own_v, terms[k + 3 * kCols] = t.factor;
}
template <bool ELEMENTWISE>
static void general_row(const GeneralLayer& l, const RowArrays& ri, const RowArrays& rj, int i, int n, double* x, double* s,
                        double* theta, const GeneralArrays& g, double* terms) {
#pragma omp simd
    for (int k = 0; k < n; ++k) general_pair<ELEMENTWISE>(l, ri, rj, i, k, x, s, theta, g, terms);
}

// All layers of the suffix over rows x cols pairs. own: (n_suffix, 4, own_stride) own_w, own_b, own_v, factor of every
// layer for layer_grams, or null; last, cov: (kBlock,) Gram of the last inner matrix and S.
template <bool ELEMENTWISE>
static void general_block(const Plan& plan, RowArrays& ri, RowArrays& rj, int rows, int cols, GeneralArrays& g, double* own,
                          std::int64_t own_stride, double* last, double* cov) {
    const int n = (cols + 15) & ~15;  // whole vectors; the columns after cols hold finite leftovers
    double terms[4 * kCols];
    for (int h = 0; h < plan.n_suffix; ++h) {
        const GeneralLayer& l = plan.suffix[h];
        advance_rows(l, plan.tables, ri, ELEMENTWISE ? n : rows);
        advance_rows(l, plan.tables, rj, n);
        for (int i = 0; i < rows; ++i) {
            double *x = g.x + i * kCols, *s = g.s + i * kCols, *theta = g.theta + i * kCols;
            correlate<ELEMENTWISE>(l, ri, rj, i, n, x, s, g);
            expectations<ELEMENTWISE>(l, plan.tables, ri, rj, i, n, g);
            general_row<ELEMENTWISE>(l, ri, rj, i, n, x, s, theta, g, terms);
            if (own)
                for (int t = 0; t < 4; ++t)
                    __builtin_memcpy(own + (4 * h + t) * own_stride + i * kCols, terms + t * kCols, n * sizeof(double));
            if (h == plan.n_suffix - 1)
                for (int k = 0; k < n; ++k) last[i * kCols + k] = l.w_all * terms[k];
        }
        finish_layer(ri);
        finish_layer(rj);
    }
    for (int i = 0; i < rows; ++i)
        for (int k = 0; k < n; ++k) {
            const int at = i * kCols + k;
            cov[at] = covariance(g.x[at], g.s[at], ri.norm[ELEMENTWISE ? k : i], rj.norm[k]);
        }
}

}  // namespace ntk

// Gaussian expectations of one layer for each activation, without cancellation (MATH.md, sections 8 and 9b).
//
// u, v centred Gaussian, Var u = A, Var v = B, correlation rho = s (1 - x), s = +-1, 0 <= x <= 1. Every activation has
//   row(A)           numbers of one variable: Q_ii = E s(u)^2, mu = E s(u), and what its pairs need
//   pair(i, j, x, s) side = +-1, w = (Q_ii + Q_jj)/2 - side Q_ij as a sum of positive terms, and D = E s'(u) s'(v).
// The side is s, or 1 if the activation is even: w keeps its relative accuracy for close points, and for opposite ones if
// the activation is odd or even.
#pragma once
#include "arccos.h"
#include "exponential.h"

namespace ntk {

struct RowNumbers {
    double lam;         // A
    double root, inv;   // sqrt(A), 1/sqrt(A) (0 for A = 0)
    double q, mu;       // Q_ii, mu
    double a1, a2, a3;  // of the activation
};

struct PairNumbers {
    double w, d, side, q;
    double gap;  // sqrt(Q_ii Q_jj) - side Q if the activation is homogeneous, else -1
};

NTK_INLINE RowNumbers make_row(double lam) {
    double root = sqrt_(lam);
    return {lam, root, lam > 0.0 ? 1.0 / root : 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
}

// What all pairs need: n = sqrt(AB), |C| = n (1 - x), half squared distance e = (A+B)/2 - |C| and f = (A+B)/2 + |C|.
struct PairGeometry {
    double n, c, e, f, gap;  // gap = |A - B|
    double det;              // A B - C^2
};
NTK_INLINE PairGeometry geometry(const RowNumbers& i, const RowNumbers& j, double x) {
    double n = i.root * j.root, dn = i.root - j.root, half = 0.5 * dn * dn;
    return {n, n * (1.0 - x), fma_(n, x, half), fma_(n, 2.0 - x, half), abs_(dn) * (i.root + j.root),
            n * n * (x * (2.0 - x))};
}

// s(u) = u (u > 0), slope * u (u < 0): relu, leaky_relu, abs, identity.          any A; error of w and D: 8 ulp
struct Homogeneous {
    double slope;
    NTK_MEMBER RowNumbers row(double lam) const {
        RowNumbers r = make_row(lam);
        r.q = 0.5 * fma_(slope, slope, 1.0) * lam;
        r.mu = (1.0 - slope) * kInvSqrt2Pi * r.root;
        return r;
    }
    NTK_MEMBER PairNumbers pair(const RowNumbers& i, const RowNumbers& j, double x,
                                                           double s) const {
        double h0 = 0.5 * fma_(slope, slope, 1.0), h1 = 0.5 * (1.0 - slope) * (1.0 - slope);
        PairGeometry g = geometry(i, j, x);
        Arc<double> u = arc(x);
        double kappa0 = s < 0.0 ? u.theta : 1.0 - u.theta;
        double side = slope == -1.0 ? 1.0 : s;  // abs is even
        double area = side < 0.0 ? u.area + (1.0 - x) : -u.area;
        double q = g.n * fma_(h1, s < 0.0 ? u.area + (1.0 - x) : u.area, h0 * s * (1.0 - x));
        return {fma_(h0, g.e, h1 * g.n * area), fma_(h1, kappa0, slope), side, q, g.n * fma_(h0, x, h1 * area)};
    }
};

// erf(u). Q = (2/pi) phi with sin phi = 2C / sqrt((1+2A)(1+2B)); w = (phi_i + phi_j - 2 phi)/pi from
//   sin((phi_i + phi_j)/2 - phi) = [8 (AB - C^2) + (P_i - P_j)^2 / 2] / [2 (1+2A)(1+2B) sin((phi_i + phi_j)/2 + phi)],
// P = sqrt(1 + 4A), derived from cos 2phi - cos(phi_i + phi_j).
struct Erf {
    NTK_MEMBER RowNumbers row(double lam) const {
        RowNumbers r = make_row(lam);
        double m = 1.0 + 2.0 * lam, p = sqrt_(1.0 + 4.0 * lam);
        r.a1 = 1.0 / m;
        r.a2 = lam * sqrt_(2.0 * r.a1 / (m + p));       // sin(phi/2)
        r.a3 = p;
        double z = r.a2 * r.a2;
        r.q = 2.0 * r.a2 * angle_fit<0>(z, z * z);
        return r;
    }
    NTK_MEMBER PairNumbers pair(const RowNumbers& i, const RowNumbers& j, double x,
                                                           double s) const {
        PairGeometry g = geometry(i, j, x);
        double m = i.a1 * j.a1;
        double ci = sqrt_(1.0 - i.a2 * i.a2), cj = sqrt_(1.0 - j.a2 * j.a2);
        double root = sqrt_(m);
        // Sine and cosine of (phi_i + phi_j)/2; ci cj - a2 a2 would cancel for large variances.
        double sum = fma_(i.a2, cj, ci * j.a2), cosum = 0.5 * root * (i.a3 + j.a3);
        double det = fma_(4.0, g.det, 1.0 + 2.0 * (i.lam + j.lam));
        double cosine = sqrt_(det) * root, sine = 2.0 * g.c * root;
        double dp = 4.0 * g.gap / (i.a3 + j.a3);
        double top = fma_(8.0, g.det, 0.5 * dp * dp) * m;
        double bottom = 2.0 * fma_(sum, cosine, cosum * sine);
        double sin_diff = bottom > 0.0 ? top / bottom : 0.0;
        double cos_diff = at_least(fma_(cosum, cosine, sum * sine), 0.0);
        double z = 0.5 * sin_diff * sin_diff / (1.0 + cos_diff);  // sin^2 of half the difference
        z = z > 0.5 ? 0.5 : z;
        double zq = 0.5 * sine * sine / (1.0 + cosine);  // sin^2 of half of phi
        double q = 2.0 * s * sqrt_(zq) * angle_fit<0>(zq, zq * zq);
        return {2.0 * sqrt_(z) * angle_fit<0>(z, z * z), 4.0 * kInvPi / sqrt_(det), s, q, -1.0};
    }
};

// exp(-u^2), even.
struct Gaussian {
    NTK_MEMBER RowNumbers row(double lam) const {
        RowNumbers r = make_row(lam);
        r.a1 = sqrt_(1.0 + 4.0 * lam);
        r.q = 1.0 / r.a1;
        r.mu = 1.0 / sqrt_(1.0 + 2.0 * lam);
        return r;
    }
    NTK_MEMBER PairNumbers pair(const RowNumbers& i, const RowNumbers& j, double x,
                                                           double s) const {
        PairGeometry g = geometry(i, j, x);
        double det = fma_(4.0, g.det, 1.0 + 2.0 * (i.lam + j.lam)), root = sqrt_(det);
        double sum = i.a1 + j.a1, diff = 4.0 * g.gap / sum, both = i.a1 * j.a1;
        double top = fma_(0.25 * diff * diff, 3.0 * sum * sum - diff * diff, 4.0 * g.det * sum * sum);
        double w = top / (2.0 * both * root * fma_(sum, root, 2.0 * both));
        return {w, s * 4.0 * g.c / (det * root), 1.0, 1.0 / root, -1.0};
    }
};

// exp(u).
struct Exp {
    NTK_MEMBER RowNumbers row(double lam) const {
        RowNumbers r = make_row(lam);
        r.a1 = exp_(lam);
        r.q = r.a1 * r.a1;
        r.mu = exp_(0.5 * lam);
        return r;
    }
    NTK_MEMBER PairNumbers pair(const RowNumbers& i, const RowNumbers& j, double x,
                                                           double s) const {
        PairGeometry g = geometry(i, j, x);
        double larger = i.a1 > j.a1 ? i.a1 : j.a1, m = expm1_(-g.gap);
        double q = exp_(s < 0.0 ? g.e : g.f);
        double close = fma_(0.5 * larger * larger * m, m, -i.a1 * j.a1 * expm1_(-g.e));
        return {s < 0.0 ? 0.5 * (i.q + j.q) + q : close, q, s, q, -1.0};
    }
};

// sin(u), odd.
struct Sin {
    NTK_MEMBER RowNumbers row(double lam) const {
        RowNumbers r = make_row(lam);
        r.a1 = exp_(-lam);
        r.q = -0.5 * expm1_(-2.0 * lam);
        return r;
    }
    NTK_MEMBER PairNumbers pair(const RowNumbers& i, const RowNumbers& j, double x,
                                                           double s) const {
        PairGeometry g = geometry(i, j, x);
        double larger = i.a1 > j.a1 ? i.a1 : j.a1, m = expm1_(-g.gap);
        double far = exp_(-g.f), near1 = -expm1_(-g.e);
        double t = 0.5 * larger * larger * m * m;
        double q = -0.5 * s * (1.0 - near1) * expm1_(-2.0 * g.c);  // e^-e - e^-f without cancellation
        return {0.5 * fma_(near1, 1.0 + far, -t), 0.5 * ((1.0 - near1) + far), s, q, -1.0};
    }
};

// cos(u), even.
struct Cos {
    NTK_MEMBER RowNumbers row(double lam) const {
        RowNumbers r = make_row(lam);
        r.a1 = exp_(-lam);
        r.q = 0.5 * fma_(r.a1, r.a1, 1.0);
        r.mu = exp_(-0.5 * lam);
        return r;
    }
    NTK_MEMBER PairNumbers pair(const RowNumbers& i, const RowNumbers& j, double x,
                                                           double s) const {
        PairGeometry g = geometry(i, j, x);
        double larger = i.a1 > j.a1 ? i.a1 : j.a1, m = expm1_(-g.gap);
        double near1 = -expm1_(-g.e), far1 = -expm1_(-g.f);
        double w = 0.5 * fma_(near1, far1, 0.5 * larger * larger * m * m);
        double d = -0.5 * (1.0 - near1) * expm1_(-2.0 * g.c);
        return {w, s * d, 1.0, 0.5 * ((1.0 - near1) + (1.0 - far1)), -1.0};
    }
};

// gelu: u Phi(u) = u/2 + h(u), h even; Q = C/4 + H with H = E h(u) h(v). The part of w from H is a difference (absolute
// error 1e-16 of H): enough for smooth layers, whose expectations do not magnify it.
struct Gelu {
    NTK_MEMBER RowNumbers row(double lam) const {
        RowNumbers r = make_row(lam);
        double a = 1.0 + lam, root = sqrt_(1.0 + 2.0 * lam);
        r.a1 = 1.0 / a;
        double z = 0.5 * lam * lam * r.a1 / (a + root);
        double phi = sqrt_(z) * angle_fit<0>(z, z * z);  // asin(A / (1 + A)) / pi
        r.a2 = fma_(0.5 * lam, phi, kInvPi * lam * lam * r.a1 / root);
        r.q = fma_(0.25, lam, r.a2);
        r.mu = lam * kInvSqrt2Pi * sqrt_(r.a1);
        return r;
    }
    NTK_MEMBER PairNumbers pair(const RowNumbers& i, const RowNumbers& j, double x,
                                                           double s) const {
        PairGeometry g = geometry(i, j, x);
        double m = i.a1 * j.a1, det = 1.0 + i.lam + j.lam + g.det, root = sqrt_(det);
        double sine2 = g.c * g.c * m, cosine = root * sqrt_(m);
        double z = 0.5 * sine2 / (1.0 + cosine);
        double phi = sqrt_(z) * angle_fit<0>(z, z * z);  // asin(|C| / sqrt((1+A)(1+B))) / pi
        double ab = i.lam * j.lam, f = kInv2Pi / root;
        double h = fma_(0.5 * g.c, phi, f * fma_(ab * m, det, sine2));  // AB + C^2 (1 - AB) m
        double hd = 0.5 * (i.a2 + j.a2);
        double d = fma_(0.5, s * phi, 0.25) + s * g.c * f * (i.a1 + j.a1 + 1.0 / det);
        return {fma_(0.25, g.e, hd - s * h), d, s, fma_(0.25 * s, g.c, h), -1.0};
    }
};

}  // namespace ntk

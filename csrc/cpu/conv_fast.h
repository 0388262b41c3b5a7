// Bias-free convolutional networks with a positively homogeneous activation (MATH.md, sections 3, 3b and 9b).
//
// State of a pair: E, half squared distances, which stay right where correlations are 1 up to rounding, and M = T + S.
//   e = cw sum E,  m = cw sum M over the window,  n = root_i root_j,  x = 1 - rho = (e - (root_i - root_j)^2 / 2) / n
//   Q = n (h0 (1 - x) + h1 g),  E_Q = h0 e - h1 n g,  D = slope + h1 (1 - theta)
//   E' = p^2 E + p q (b_i - b_j)(mu_i - mu_j) + r E_Q,   M' = p^2 M + r D m + p q (b_i mu_j + b_j mu_i) + r Q
// The first layer has any sign and carries F, half squared norms of sums, too: 1 + rho = (f - (root_i - root_j)^2 / 2) / n.
// Only the first layer may be frozen.
#pragma once
#include "conv_planes.h"

namespace ntk {
namespace {

// Arrays of one layer of one image: root, 1/root of the window's variance; half the variance before the layer, its sums over
// the columns of the window, the mean before the layer (the last three not for flatten kernels without skips).
enum FastArray { kRoot, kInverse, kHalf, kHalfSum, kMean };
static int fast_arrays(const ConvPlan& p) {
    bool skip = false;
    for (int h = 0; h < p.n_layers; ++h) skip = skip || p.layers[h].p != 0.0;
    return skip || (p.pooled && !p.circular) ? kMean + 1 : kInverse + 1;
}

// Window variances below this share of the image's mean are zero: the inverse of their product must be finite.
NTK_INLINE double least_variance(double) { return 1e-280; }
NTK_INLINE double least_variance(float) { return 1e-32; }

template <class T>
struct FastImage {
    const T* data;  // (n_layers, arrays, size), then the channels, (channels, size)
    int size;       // of a plane, compact or doubled
    int arrays;
    // The first one if there is no such array: nobody reads it then.
    const T* array(int layer, int a) const { return data + (std::int64_t(layer) * arrays + (a < arrays ? a : 0)) * size; }
};

NTK_INLINE double mean_factor(const GeneralLayer& l) { return (1.0 - l.slope) * kInvSqrt2Pi; }

// Numbers of all layers of one image. x: (channels, positions); room: (6, positions).
template <class T>
void fast_image(const ConvPlan& p, const Geometry<T>& g, const T* x, bool twice, double* room, T* to, int size) {
    const int n = g.height * g.width, arrays = fast_arrays(p);
    double *var = room, *mean = room + n, *columns = room + 2 * n, *lam = room + 3 * n, *a = room + 4 * n, *b = room + 5 * n;
    for (int k = 0; k < n; ++k) {
        double sum = 0.0;
        for (int c = 0; c < p.channels; ++c) sum += double(x[c * n + k]) * double(x[c * n + k]);
        var[k] = sum, mean[k] = 0.0;
    }
    for (int c = 0; c < p.channels; ++c) {
        for (int k = 0; k < n; ++k) a[k] = double(x[c * n + k]);
        put_plane(g, twice, a, to + (std::int64_t(p.n_layers) * arrays + c) * size);
    }
    for (int h = 0; h < p.n_layers; ++h) {
        const GeneralLayer& l = p.layers[h];
        T* out = to + std::int64_t(h) * arrays * size;
        window_variances(g, var, columns, lam);
        for (int k = 0; k < n; ++k) {
            lam[k] *= l.cw;
            if (lam[k] < least_variance(T(0))) lam[k] = 0.0;
            a[k] = sqrt_(lam[k]), b[k] = lam[k] > 0.0 ? 1.0 / a[k] : 0.0;
        }
        put_plane(g, twice, a, out + kRoot * size);
        put_plane(g, twice, b, out + kInverse * size);
        if (arrays > kHalf) {
            put_plane(g, twice, mean, out + kMean * size);
            for (int k = 0; k < n; ++k) b[k] = 0.5 * var[k], columns[k] *= 0.5;
            put_plane(g, twice, b, out + kHalf * size);
            put_plane(g, twice, columns, out + kHalfSum * size);
        }
        for (int k = 0; k < n; ++k) {
            const double mu = mean_factor(l) * a[k];
            var[k] = l.p * l.p * var[k] + 2.0 * l.p * l.q * mean[k] * mu + l.r * 0.5 * fma_(l.slope, l.slope, 1.0) * lam[k];
            mean[k] = l.p * mean[k] + l.q * mu;
        }
    }
}

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

// Rows of a layer, one vector after the other. e, m, roots: of the window; E, M: the state, in place; sum_m, sum_s, sum_own:
// (span,) totals of the last layer. step, step_j, stride: between rows of the first image, of the second, of the state.
template <class T>
struct FastRows {
    const T *e, *m;
    const T *root_i, *inv_i, *root_j, *inv_j, *mean_i, *mean_j, *half_i, *half_j;
    T *E, *M;
    T *sum_m, *sum_s, *sum_own;
    int step, step_j, stride, rows;
};

template <class T>
struct FastTerms {
    T n, x;  // x - 2 if rho < 0
    T q, eq, d;  // r Q, r E_Q, r D
    T difference;
};
template <class T>
NTK_INLINE FastTerms<T> fast_terms(const FastLayer<T>& l, T e, T root_i, T inv_i, T root_j, T inv_j) {
    const T difference = root_i - root_j, n = root_i * root_j;
    T x = at_least(fma_(T(-0.5) * difference, difference, e), T(0)) * inv_i * inv_j;
    x = x > T(1) ? T(1) : x;
    const Arc<T> u = arc(x);
    const T area = n * u.area;
    return {n, x, fma_(l.h1, area, l.h0 * (n - n * x)), fma_(l.h0, e, -l.h1 * area), fma_(l.h1, T(1) - u.theta, l.slope), difference};
}
// The first layer: m is f here.
template <class T>
NTK_INLINE FastTerms<T> fast_first(const FastLayer<T>& l, T e, T f, T root_i, T inv_i, T root_j, T inv_j) {
    const T difference = root_i - root_j, n = root_i * root_j, half = T(0.5) * difference * difference;
    const bool negative = f < e;
    const T near = negative ? f : e;
    T x = at_least(near - half, T(0)) * inv_i * inv_j;
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

template <bool FIRST, bool SKIP, bool LAST, class T>
NTK_INLINE void fast_position(const FastLayer<T>& l, const FastRows<T>& a, T trained, int column, int c, int j, int at) {
    const T e = a.e[c], f = a.m[c];
    const FastTerms<T> t = FIRST ? fast_first(l, e, f, a.root_i[c], a.inv_i[c], a.root_j[j], a.inv_j[j])
                                 : fast_terms(l, e, a.root_i[c], a.inv_i[c], a.root_j[j], a.inv_j[j]);
    const T m = FIRST ? trained * T(0.5) * (f - e) : f;
    T s = t.q, state = t.eq, kernel = t.d * m;
    if (SKIP) {
        const T bi = a.mean_i[c], bj = a.mean_j[j];
        s = fma_(l.cross, fma_(bi, a.root_j[j], bj * a.root_i[c]), s);
        kernel = fma_(l.skip, a.M[at], kernel);
        state = fma_(l.skip, a.E[at], fma_(l.cross * (bi - bj), t.difference, state));
    }
    kernel += s;
    if (LAST) {
        if (SKIP) s = fma_(l.skip, (a.half_i[c] + a.half_j[j]) - a.E[at], s);
        const T cosine = FIRST ? signed_cosine(t.x) : T(1) - t.x;
        a.sum_m[column] += kernel, a.sum_s[column] += s, a.sum_own[column] += t.d * (t.n * cosine);
    } else {
        a.E[at] = state, a.M[at] = kernel;  // rounding below 0 is caught where x is formed
    }
}
// TOGETHER positions are done together, to hide the latency of their square roots.
template <bool FIRST, bool SKIP, bool LAST, int TOGETHER, class T>
__attribute__((noinline)) static void fast_rows_by(const FastLayer<T>& layer, const FastRows<T>& rows, T trained) {
    const FastLayer<T> l = layer;
    const FastRows<T> a = rows;
    for (int r = 0; r < a.rows; ++r)
        for (int start = 0; start < a.step; start += TOGETHER) {
            const int c = r * a.step + start, j = r * a.step_j + start, at = r * a.stride + start;
#pragma omp simd
            for (int k = 0; k < TOGETHER; ++k)
                fast_position<FIRST, SKIP, LAST>(l, a, trained, start + k, c + k, j + k, at + k);
        }
}
template <bool FIRST, bool SKIP, bool LAST, class T>
NTK_INLINE void fast_rows(const FastLayer<T>& l, const FastRows<T>& a, T trained) {
    if (a.step % (2 * kLanes<T>)) fast_rows_by<FIRST, SKIP, LAST, kLanes<T>>(l, a, trained);
    else fast_rows_by<FIRST, SKIP, LAST, 2 * kLanes<T>>(l, a, trained);
}
template <class T>
static void fast_rows_of(bool first, bool skip, bool last, const FastLayer<T>& l, const FastRows<T>& a, T trained) {
    if (first) return last ? fast_rows<true, false, true>(l, a, trained) : fast_rows<true, false, false>(l, a, trained);
    if (skip) return last ? fast_rows<false, true, true>(l, a, trained) : fast_rows<false, true, false>(l, a, trained);
    return last ? fast_rows<false, false, true>(l, a, trained) : fast_rows<false, false, false>(l, a, trained);
}

// E and F before the first layer. CHANNELS = 0: any number.
template <int CHANNELS, class T>
NTK_INLINE void start_row_of(const T* x, const T* y, int channels, int x_step, int y_step, int n, T* E, T* F) {
    constexpr int known = CHANNELS ? CHANNELS : 1;
#pragma omp simd
    for (int c = 0; c < n; ++c) {
        T e = T(0), f = T(0);
        NTK_UNROLL
        for (int k = 0; k < known; ++k) {
            const T minus = x[k * x_step + c] - y[k * y_step + c], plus = x[k * x_step + c] + y[k * y_step + c];
            e = fma_(T(0.5) * minus, minus, e), f = fma_(T(0.5) * plus, plus, f);
        }
        E[c] = e, F[c] = f;
    }
    for (int k = known; !CHANNELS && k < channels; ++k)
#pragma omp simd
        for (int c = 0; c < n; ++c) {
            const T minus = x[k * x_step + c] - y[k * y_step + c], plus = x[k * x_step + c] + y[k * y_step + c];
            E[c] = fma_(T(0.5) * minus, minus, E[c]), F[c] = fma_(T(0.5) * plus, plus, F[c]);
        }
}
template <class T>
NTK_INLINE void start_row(const T* x, const T* y, int channels, int x_step, int y_step, int n, T* E, T* F) {
    if (channels == 3) start_row_of<3>(x, y, channels, x_step, y_step, n, E, F);
    else start_row_of<0>(x, y, channels, x_step, y_step, n, E, F);
}

// What one thread needs for a plane of one pair.
template <class T>
struct FastRoom {
    Buffer<T> E, M, e, m, columns, sums;
    FastRoom(const ConvPlan&, const Geometry<T>& g)
        : E(g.padded()), M(g.padded()), e(g.compact()), m(g.compact()), columns(g.compact()), sums(4 * g.span) {
        if (!ready()) return;
        for (int k = 0; k < g.padded(); ++k) E.data[k] = M.data[k] = T(0);
        for (int c = 0; c < 4 * g.span; ++c) sums.data[c] = T(0);
    }
    bool ready() const {
        return E.ready() && M.ready() && e.ready() && m.ready() && columns.ready() && sums.ready();
    }
};

// All layers of one plane; total (3,) += T + S, S, own term of the last layer, over its positions.
template <class T>
void fast_plane(const ConvPlan& p, const Geometry<T>& g, const Shift<T>& s, const FastImage<T>& i, const FastImage<T>& j,
                FastRoom<T>& room, double* total) {
    const T *x = i.array(p.n_layers, 0), *y = j.array(p.n_layers, 0);
    T* zeros = room.sums.data + 3 * g.span;
    const int stride_j = p.pooled ? g.double_stride() : g.span, offset_j = p.pooled ? g.pad + s.x : 0;
    for (int c = 0; c < 3 * g.span; ++c) room.sums.data[c] = T(0);
    for (int r = 0; r < g.height; ++r) {
        const int other = r + s.y < g.height ? r + s.y : r + s.y - g.height;
        T *E = room.E.data + r * g.stride + g.pad, *F = room.M.data + r * g.stride + g.pad;
        start_row(x + r * g.span, y + other * stride_j + offset_j, p.channels, g.compact(), j.size, g.span, E, F);
        finish_row(g, E), finish_row(g, F);
    }
    const bool seam = s.seam_x || s.seam_y;
    for (int h = 0; h < p.n_layers; ++h) {
        const GeneralLayer& layer = p.layers[h];
        const FastLayer<T> l = fast_layer<T>(layer);
        const Fill<T> fill{i.array(h, kHalf), j.array(h, kHalf), i.array(h, kHalfSum), j.array(h, kHalfSum)};
        const bool first = h == 0, last = h == p.n_layers - 1;
        window_sum<T>(g, s, seam ? &fill : nullptr, T(layer.cw), room.E.data, room.e.data, room.columns.data, zeros);
        window_sum<T>(g, s, seam && first ? &fill : nullptr, T(layer.cw), room.M.data, room.m.data, room.columns.data, zeros);
        // The rows before the partner wraps, and those after.
        for (int part = 0; part < 2; ++part) {
            const int r = part ? g.height - s.y : 0, count = part ? s.y : g.height - s.y;
            const int at = r * g.span, other = (part ? 0 : s.y) * stride_j + offset_j, state = r * g.stride + g.pad;
            const FastRows<T> a{room.e.data + at, room.m.data + at, i.array(h, kRoot) + at, i.array(h, kInverse) + at,
                                j.array(h, kRoot) + other, j.array(h, kInverse) + other, i.array(h, kMean) + at,
                                j.array(h, kMean) + other, i.array(h, kHalf) + at, j.array(h, kHalf) + other,
                                room.E.data + state, room.M.data + state, room.sums.data, room.sums.data + g.span,
                                room.sums.data + 2 * g.span, g.span, stride_j, g.stride, count};
            if (count) fast_rows_of<T>(first, layer.p != 0.0, last, l, a, T(layer.w));
        }
        for (int r = 0; !last && (g.circular || g.span != g.width) && r < g.height; ++r) {
            finish_row(g, room.E.data + r * g.stride + g.pad);
            finish_row(g, room.M.data + r * g.stride + g.pad);
        }
    }
    for (int k = 0; k < 3; ++k)
        for (int c = 0; c < g.width; ++c) total[k] += double(room.sums.data[k * g.span + c]);
}

}  // namespace
}  // namespace ntk

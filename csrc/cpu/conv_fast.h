// Bias-free convolutional networks with a positively homogeneous activation (MATH.md, sections 3, 3b and 9b).
// The formulas are in csrc/math/conv.h. Only the first layer may be frozen.
#pragma once
#include "../math/conv.h"
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

template <class T>
struct FastImage {
    const T* data;  // (n_layers, arrays, size), then the channels, (channels, size)
    int size;       // of a plane, compact or doubled
    int arrays;
    // The first one if there is no such array: nobody reads it then.
    const T* array(int layer, int a) const { return data + (std::int64_t(layer) * arrays + (a < arrays ? a : 0)) * size; }
};

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

template <bool FIRST, bool SKIP, bool LAST, class T>
NTK_INLINE void fast_position(const FastLayer<T>& l, const FastRows<T>& a, T trained, int column, int c, int j, int at) {
    const T zero = T(0);
    const FastPoint<T> first{a.root_i[c], a.inv_i[c], SKIP ? a.mean_i[c] : zero, SKIP && LAST ? a.half_i[c] : zero};
    const FastPoint<T> second{a.root_j[j], a.inv_j[j], SKIP ? a.mean_j[j] : zero, SKIP && LAST ? a.half_j[j] : zero};
    const FastState<T> before{SKIP ? a.E[at] : zero, SKIP ? a.M[at] : zero};
    const FastResult<T> r = fast_step<FIRST, SKIP>(l, trained, {a.e[c], a.m[c]}, before, first, second);
    if (LAST) a.sum_m[column] += r.state.m, a.sum_s[column] += r.s, a.sum_own[column] += r.own;
    else a.E[at] = r.state.e, a.M[at] = r.state.m;
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

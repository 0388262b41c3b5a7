// Planes on which patches are multiples of each other, of different norms: flat backgrounds of different brightness, an image and
// its multiple. Several times slower than conv_fast.h, but no digit is lost (exact_terms of csrc/math/conv.h). Without skips only.
#pragma once
#include "conv_image.h"

namespace ntk {
namespace {

// What one thread needs for a plane of one pair.
template <class T>
struct FastRoom {
    Buffer<T> E, M, e, m, columns, sums, zeros;  // E and M twice: before and after a layer
    FastRoom(const ConvPlan&, const Geometry<T>& g)
        : E(2 * g.padded()), M(2 * g.padded()), e(g.compact()), m(g.compact()), columns(g.compact()), sums(5 * g.span),
          zeros(g.stride + g.pad) {
        if (!ready()) return;
        for (int k = 0; k < 2 * g.padded(); ++k) E.data[k] = M.data[k] = T(0);
        for (int c = 0; c < 5 * g.span; ++c) sums.data[c] = T(0);
        for (int c = 0; c < g.stride + g.pad; ++c) zeros.data[c] = T(0);
    }
    bool ready() const {
        return E.ready() && M.ready() && e.ready() && m.ready() && columns.ready() && sums.ready() && zeros.ready();
    }
};

// A plane (height, width) of one image, unshifted, with what windows see outside; from: rows step apart.
template <class T>
static void pad_plane(const Geometry<T>& g, const T* from, int step, T factor, T* to) {
    for (int r = 0; r < g.height; ++r) {
        T* row = to + r * g.stride + g.pad;
        for (int c = 0; c < g.width; ++c) row[c] = factor * from[r * step + c];
        finish_row(g, row);
    }
}

// Norms of the positions of one image, padded.
template <class T>
static void position_norms(const Geometry<T>& g, const T* x, int size, int channels, int step, T* norms) {
    for (int r = 0; r < g.height; ++r) {
        T* row = norms + r * g.stride + g.pad;
        for (int c = 0; c < g.width; ++c) row[c] = T(0);
        for (int k = 0; k < channels; ++k) {
            const T* from = x + k * size + r * step;
#pragma omp simd
            for (int c = 0; c < g.width; ++c) row[c] = fma_(from[c], from[c], row[c]);
        }
#pragma omp simd
        for (int c = 0; c < g.width; ++c) row[c] = sqrt_(row[c]);
        finish_row(g, row);
    }
}

// Row `at` of a padded plane or, outside, a row of zeros.
template <class T>
NTK_INLINE const T* row_or_zeros(const Geometry<T>& g, const T* plane, const T* zeros, int at) {
    if (g.circular) return plane + ((at % g.height + g.height) % g.height) * g.stride + g.pad;
    return at >= 0 && at < g.height ? plane + at * g.stride + g.pad : zeros;
}

// to (height, span): sums of (a_i inv_i - a_j inv_j)^2 over the windows. a: padded planes of norms, inv_j shifted with rows step_j apart;
// zeros: (stride,).
template <class T>
static void windows_apart(const Geometry<T>& g, const Shift<T>& s, const T* a_i, const T* a_j, const T* inv_i, const T* inv_j, int step_j,
                        const T* zeros, T* to) {
    for (int r = 0; r < g.height; ++r) {
        const int other = r + s.y < g.height ? r + s.y : r + s.y - g.height;
        const T *one = inv_i + r * g.span, *two = inv_j + other * step_j;
        T* sum = to + r * g.span;
        for (int c = 0; c < g.span; ++c) sum[c] = T(0);
        for (int dy = -g.reach_y; dy <= g.reach_y; ++dy) {
            const T *first = row_or_zeros(g, a_i, zeros + g.pad, r + dy), *second = row_or_zeros(g, a_j, zeros + g.pad, other + dy);
            for (int dx = -g.reach_x; dx <= g.reach_x; ++dx)
                for (int part = 0; part < 2; ++part) {  // the columns before the partner wraps, and those after
                    const int start = part ? g.width - s.x : 0, stop = part ? g.width : g.width - s.x;
                    const T* shifted = second + dx + (part ? s.x - g.width : s.x);
#pragma omp simd
                    for (int c = start; c < stop; ++c) sum[c] = norms_apart(sum[c], first[c + dx], one[c], shifted[c], two[c]);
                }
        }
    }
}

// n - C and n + C before the first layer, in units of kFirstUnit, from channels divided by the norms a.
template <class T>
static void exact_start(const Geometry<T>& g, const Shift<T>& s, const T* x, int x_size, const T* y, int y_size, int step_j, int channels,
                        const T* a_i, const T* a_j, T* X, T* Y) {
    for (int r = 0; r < g.height; ++r) {
        const int other = r + s.y < g.height ? r + s.y : r + s.y - g.height;
        T *minus = X + r * g.stride + g.pad, *plus = Y + r * g.stride + g.pad;
        const T *one = a_i + r * g.stride + g.pad, *row = a_j + other * g.stride + g.pad;
        for (int c = 0; c < g.width; ++c) minus[c] = plus[c] = T(0);
        for (int part = 0; part < 2; ++part) {  // the columns before the partner wraps, and those after
            const int start = part ? g.width - s.x : 0, stop = part ? g.width : g.width - s.x;
            const T* two = row + (part ? s.x - g.width : s.x);
            for (int k = 0; k < channels; ++k) {
                const T *first = x + k * x_size + r * g.span, *second = y + k * y_size + other * step_j;
#pragma omp simd
                for (int c = start; c < stop; ++c) {
                    const FastState<T> sum = exact_channel({minus[c], plus[c]}, first[c], one[c], second[c], two[c]);
                    minus[c] = sum.e, plus[c] = sum.m;
                }
            }
        }
        finish_row(g, minus), finish_row(g, plus);
    }
}

template <bool FIRST, class T>
static void exact_layer(const Geometry<T>& g, const Shift<T>& s, const FastLayer<T>& l, T trained, const FastImage<T>& i,
                        const FastImage<T>& j, int h, int step_j, int offset_j, const FastRoom<T>& room, const T* apart, T* sums) {
    for (int r = 0; r < g.height; ++r) {
        const int at = r * g.span, other = (r + s.y < g.height ? r + s.y : r + s.y - g.height) * step_j + offset_j;
        const T *root_i = i.array(h, kRoot) + at, *inv_i = i.array(h, kInverse) + at;
        const T *root_j = j.array(h, kRoot) + other, *inv_j = j.array(h, kInverse) + other;
        T *X = room.E.data + r * g.stride + g.pad, *M = room.M.data + r * g.stride + g.pad;
        const T *e = room.e.data + at, *m = room.m.data + at, *beta = apart + at;
        T *sum_m = sums, *sum_s = sums + g.span, *sum_own = sums + 2 * g.span;
#pragma omp simd
        for (int c = 0; c < g.width; ++c) {
            const T zero = T(0);
            const FastPoint<T> first{root_i[c], inv_i[c], zero, zero}, second{root_j[c], inv_j[c], zero, zero};
            const FastTerms<T> t = exact_terms<FIRST>(l, e[c], m[c], beta[c], first, second);
            const FastResult<T> result = fast_result<FIRST, true>(l, trained, t, {e[c], m[c]}, {zero, zero}, first, second);
            X[c] = result.state.e, M[c] = result.state.m;
            sum_m[c] += result.state.m, sum_s[c] += result.s, sum_own[c] += result.own;
        }
        finish_row(g, X), finish_row(g, M);
    }
}

// All layers of one plane; total (3,) += T + S, S, own term of the last layer, over its positions.
template <class T>
static void exact_plane(const ConvPlan& p, const Geometry<T>& g, const Shift<T>& s, const FastImage<T>& i, const FastImage<T>& j,
                        FastRoom<T>& room, double* total) {
    const int step_j = p.pooled ? g.double_stride() : g.span, offset_j = p.pooled ? g.pad + s.x : 0, base_j = p.pooled ? g.pad : 0;
    const T *x = i.array(p.n_layers, 0), *y = j.array(p.n_layers, 0);
    T *a_i = room.E.data + g.padded(), *a_j = room.M.data + g.padded(), *sums = room.sums.data, *zeros = sums + 3 * g.span;
    T* const planes[] = {room.E.data, room.M.data, a_i, a_j};
    for (int r = 0; r < g.height && !g.circular; ++r)  // a layer may have left something beside the rows
        for (T* plane : planes)
            for (int d = 1; d <= g.reach_x; ++d) plane[r * g.stride + g.pad - d] = plane[r * g.stride + g.pad + g.span - 1 + d] = T(0);
    position_norms(g, x, g.compact(), p.channels, g.span, a_i);
    position_norms(g, y + base_j, j.size, p.channels, step_j, a_j);
    exact_start(g, s, x, g.compact(), y + offset_j, j.size, step_j, p.channels, a_i, a_j, room.E.data, room.M.data);
    double unit = kFirstUnit;
    for (int h = 0; h < p.n_layers; ++h) {
        const FastUnits u = fast_units(p.layers[h], unit);
        const FastLayer<T> l = fast_layer<T>(p.layers[h], u);
        for (int c = 0; c < 3 * g.span; ++c) sums[c] = T(0);
        window_sum<T>(g, s, nullptr, T(1), room.E.data, room.e.data, room.columns.data, zeros);
        window_sum<T>(g, s, nullptr, T(1), room.M.data, room.m.data, room.columns.data, zeros);
        windows_apart(g, s, a_i, a_j, i.array(h, kInverse), j.array(h, kInverse) + offset_j, step_j, room.zeros.data, room.columns.data);
        (h ? exact_layer<false, T> : exact_layer<true, T>)(g, s, l, T(p.layers[h].w), i, j, h, step_j, offset_j, room,
                                                           room.columns.data, sums);
        const T factor = sqrt_(l.scale);
        pad_plane(g, i.array(h, kRoot), g.span, factor, a_i);
        pad_plane(g, j.array(h, kRoot) + base_j, step_j, factor, a_j);
        unit = u.after;
    }
    for (int k = 0; k < 3; ++k) {
        double sum = 0.0;
        for (int c = 0; c < g.width; ++c) sum += double(sums[k * g.span + c]);
        total[k] += unit * sum;
    }
}

}  // namespace
}  // namespace ntk

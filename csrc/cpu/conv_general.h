// Any convolutional network (MATH.md, sections 3, 3b and 9b), in double: biases, frozen layers, all activations.
// The formulas are in csrc/math/conv.h.
#pragma once
#include "../math/conv.h"
#include "conv_planes.h"
#include "general.h"

namespace ntk {
namespace {

// Arrays of one layer of one image: numbers of its rows (RowNumbers, mean before the layer), half the variance before the
// layer and its sums over the columns of the window; then the Hermite coefficients.
enum GeneralArray { kLam, kRowRoot, kRowInverse, kRowQ, kRowMu, kA1, kA2, kA3, kRowMean, kRowHalf, kRowHalfSum, kRowArrays };

static int most_terms(const ConvPlan& p) {
    int most = 0;
    for (int h = 0; h < p.n_layers; ++h) {
        const int table = p.layers[h].table;
        const int terms = table >= 0 && p.tables[table].panels > 0 ? p.tables[table].evens + p.tables[table].odds : 0;
        most = terms > most ? terms : most;
    }
    return most;
}
static int general_arrays(const ConvPlan& p) { return kRowArrays + most_terms(p); }

struct GeneralImage {
    const double* data;  // (n_layers, arrays, size), then the channels, (channels, size)
    int size, arrays;
    const double* array(int layer, int a) const { return data + (std::int64_t(layer) * arrays + a) * size; }
};

// One array of RowArrays.
NTK_INLINE double* row_array(RowArrays& a, int which) {
    switch (which) {
        case kLam: return a.lam;
        case kRowRoot: return a.root;
        case kRowInverse: return a.inv;
        case kRowQ: return a.q;
        case kRowMu: return a.mu;
        case kA1: return a.a1;
        case kA2: return a.a2;
        case kA3: return a.a3;
        default: return a.mean;
    }
}

// Numbers of all layers of one image; room: (6 + arrays, positions). False: no memory.
static bool general_image(const ConvPlan& p, const Geometry<double>& g, const double* x, bool twice, double* room, double* to, int size) {
    const int n = g.height * g.width, arrays = general_arrays(p), terms = most_terms(p);
    double *var = room, *mean = room + n, *columns = room + 2 * n, *lam = room + 3 * n, *half = room + 4 * n, *made = room + 6 * n;
    Buffer<RowArrays> rows(1);
    Buffer<double> coefficients(std::size_t(most_terms(p)) * kCols);
    if (!rows.ready() || !coefficients.ready()) return false;
    RowArrays& a = *rows.data;
    a.hermite = coefficients.data;
    for (int k = 0; k < n; ++k) {
        double sum = 0.0;
        for (int c = 0; c < p.channels; ++c) sum = fma_(x[c * n + k], x[c * n + k], sum);
        var[k] = sum, mean[k] = 0.0;
    }
    for (int c = 0; c < p.channels; ++c) put_plane(g, twice, x + c * n, to + (std::int64_t(p.n_layers) * arrays + c) * size);
    for (int h = 0; h < p.n_layers; ++h) {
        GeneralLayer l = p.layers[h];
        double* out = to + std::int64_t(h) * arrays * size;
        window_variances(g, var, columns, lam);
        for (int k = 0; k < n; ++k) half[k] = 0.5 * var[k], columns[k] *= 0.5;
        put_plane(g, twice, half, out + kRowHalf * size);
        put_plane(g, twice, columns, out + kRowHalfSum * size);
        put_plane(g, twice, mean, out + kRowMean * size);
        for (int start = 0; start < n; start += kCols) {
            const int count = n - start < kCols ? n - start : kCols;
            for (int k = 0; k < count; ++k) a.var[k] = lam[start + k], a.mean[k] = mean[start + k];
            advance_rows(l, p.tables, a, count);  // its next_var is not the one wanted: the skip goes round the window
            for (int which = 0; which < kRowMean; ++which)
                __builtin_memcpy(made + std::int64_t(which) * n + start, row_array(a, which), count * sizeof(double));
            for (int m = 0; m < terms && l.table >= 0; ++m)
                __builtin_memcpy(made + std::int64_t(kRowArrays + m) * n + start, a.hermite + m * kCols, count * sizeof(double));
            for (int k = 0; k < count; ++k) {
                const RowState next = advance_row(l, {var[start + k], mean[start + k]}, a.q[k], a.mu[k]);
                var[start + k] = next.var, mean[start + k] = next.mean;
            }
        }
        for (int which = 0; which < arrays; ++which)
            if (which < kRowMean || (which >= kRowArrays && l.table >= 0))
                put_plane(g, twice, made + std::int64_t(which) * n, out + std::int64_t(which) * size);
    }
    return true;
}

struct GeneralRoom {
    Buffer<double> E, F, T, e, f, t, columns, zeros, hermite;
    Buffer<RowArrays> rows;
    Buffer<GeneralArrays> arrays;
    Buffer<double> layers;  // (n_layers, 2, compact): r D C and r cw D of every layer, for layer_grams
    GeneralRoom(const ConvPlan& p, const Geometry<double>& g)
        : E(g.padded()), F(g.padded()), T(g.padded()), e(g.compact() + kCols), f(g.compact() + kCols), t(g.compact() + kCols),
          columns(g.compact()), zeros(g.span), hermite(2 * std::size_t(most_terms(p)) * kCols), rows(2), arrays(1),
          layers(p.pooled ? 0 : 2 * std::size_t(p.n_layers) * g.compact()) {
        if (!ready()) return;
        for (int k = 0; k < g.padded(); ++k) E.data[k] = F.data[k] = T.data[k] = 0.0;
        for (int c = 0; c < g.span; ++c) zeros.data[c] = 0.0;
        rows.data[0].hermite = hermite.data;
        rows.data[1].hermite = hermite.data + std::size_t(most_terms(p)) * kCols;
    }
    bool ready() const {
        return E.ready() && F.ready() && T.ready() && e.ready() && f.ready() && t.ready() && columns.ready() && zeros.ready() &&
               hermite.ready() && rows.ready() && arrays.ready() && layers.ready();
    }
};

// Some columns of rows first .. first + count - 1 of a layer of one image, shifted, one row behind the other.
static void gather(const ConvPlan& p, const Geometry<double>& g, const GeneralImage& image, int h, int first, int count, int cols,
                   int step, int offset, int shift, RowArrays& to) {
    const int terms = p.layers[h].table >= 0 ? most_terms(p) : 0;
    for (int which = 0; which < kRowMean + 1 + terms; ++which) {
        const bool term = which > kRowMean;
        const double* from = image.array(h, term ? kRowArrays + which - kRowMean - 1 : which);
        double* out = term ? to.hermite + (which - kRowMean - 1) * kCols : row_array(to, which);
        for (int r = 0; r < count; ++r) {
            const int row = first + r + shift < g.height ? first + r + shift : first + r + shift - g.height;
            __builtin_memcpy(out + r * cols, from + row * step + offset, cols * sizeof(double));
        }
    }
}

// One chunk: correlations, expectations, new state. E, F, T point to the first row of the chunk in the padded planes; total
// (3,) of the last layer.
struct GeneralChunk {
    double *E, *F, *T;
    const double *e, *f, *t;
    double *own, *factor;  // (rows, span) for layer_grams, or null
    int rows, cols;
    bool last;
};
NTK_INLINE ConvPoint conv_point(const RowArrays& a, int k) { return {a.root[k], a.inv[k], a.mean[k], a.mu[k], a.q[k]}; }

static void general_chunk(const ConvPlan& p, const Geometry<double>& g, const GeneralLayer& l, const GeneralChunk& c, const RowArrays& ri,
                          const RowArrays& rj, GeneralArrays& a, double* total) {
    const int n = c.rows * c.cols, whole = (n + 15) & ~15;
    for (int r = 0; r < c.rows; ++r)
        for (int k = 0; k < c.cols; ++k) {
            const int at = r * c.cols + k;
            const Correlation rho = conv_correlation(l, c.e[r * g.span + k], c.f[r * g.span + k], ri.root[at], ri.inv[at],
                                                     rj.root[at], rj.inv[at]);
            a.lx[at] = rho.x, a.ls[at] = rho.s;
        }
    for (int k = n; k < whole; ++k) a.lx[k] = 0.0, a.ls[k] = 1.0;
    expectations<true>(l, p.tables, ri, rj, 0, whole, a);
    for (int r = 0; r < c.rows; ++r)
        for (int k = 0; k < c.cols; ++k) {
            const int at = r * c.cols + k, state = r * g.stride + k, plane = r * g.span + k;
            const ConvResult u = conv_step(l, {c.e[plane], c.f[plane], c.t[plane]}, {c.E[state], c.F[state], c.T[state]},
                                           {a.w[at], a.d[at], a.side[at], 0.0, 0.0}, conv_point(ri, at), conv_point(rj, at));
            if (c.own) c.own[plane] = u.own, c.factor[plane] = u.factor;
            if (c.last) {
                const double S = 0.5 * (u.state.f - u.state.e);
                total[0] += u.state.t + S, total[1] += S, total[2] += u.last;
            }
            c.E[state] = u.state.e, c.F[state] = u.state.f, c.T[state] = u.state.t;
        }
}

// layer_grams of a flatten kernel: B = 1 at the end, G = sum own B, B = p^2 B + window sum of factor B. slices (n_layers, step).
static void general_slices(const ConvPlan& p, const Geometry<double>& g, const Shift<double>& s, GeneralRoom& room, double* slices,
                           std::int64_t step) {
    double *B = room.E.data + g.pad, *product = room.F.data + g.pad;
    for (int r = 0; r < g.height; ++r)
        for (int c = 0; c < g.width; ++c) B[r * g.stride + c] = 1.0;
    for (int h = p.n_layers - 1; h >= 0; --h) {
        const double *own = room.layers.data + 2 * std::int64_t(h) * g.compact(), *factor = own + g.compact();
        double sum = 0.0;
        for (int r = 0; r < g.height; ++r) {
            for (int c = 0; c < g.width; ++c) {
                sum = fma_(own[r * g.span + c], B[r * g.stride + c], sum);
                product[r * g.stride + c] = factor[r * g.span + c] * B[r * g.stride + c];
            }
            finish_row(g, product + r * g.stride);
        }
        slices[h * step] = sum;
        window_sum<double>(g, s, nullptr, 1.0, room.F.data, room.e.data, room.columns.data, room.zeros.data);
        const double skip = p.layers[h].p * p.layers[h].p;
        for (int r = 0; r < g.height; ++r)
            for (int c = 0; c < g.width; ++c)
                B[r * g.stride + c] = fma_(skip, B[r * g.stride + c], room.e.data[r * g.span + c]);
    }
}

// All layers of one plane; total (3,) += T + S, S, own term of the last layer, over its positions.
static void general_plane(const ConvPlan& p, const Geometry<double>& g, const Shift<double>& s, const GeneralImage& i,
                          const GeneralImage& j, GeneralRoom& room, double* total, double* slices, std::int64_t step) {
    const int stride_j = p.pooled ? g.double_stride() : g.span, offset_j = p.pooled ? g.pad + s.x : 0;
    const double *x = i.array(p.n_layers, 0), *y = j.array(p.n_layers, 0);
    for (int r = 0; r < g.height; ++r) {
        const int other = r + s.y < g.height ? r + s.y : r + s.y - g.height;
        double *E = room.E.data + r * g.stride + g.pad, *F = room.F.data + r * g.stride + g.pad, *T = room.T.data + r * g.stride + g.pad;
        for (int c = 0; c < g.span; ++c) E[c] = F[c] = T[c] = 0.0;
        for (int k = 0; k < p.channels; ++k)
            for (int c = 0; c < g.width; ++c) {
                const double a = x[k * i.size + r * g.span + c], b = y[k * j.size + other * stride_j + offset_j + c];
                E[c] = fma_(0.5 * (a - b), a - b, E[c]), F[c] = fma_(0.5 * (a + b), a + b, F[c]);
            }
        finish_row(g, E), finish_row(g, F), finish_row(g, T);
    }
    const int most = kCols / g.width > 0 ? kCols / g.width : 1;
    const bool seam = s.seam_x || s.seam_y;
    for (int h = 0; h < p.n_layers; ++h) {
        const GeneralLayer& l = p.layers[h];
        const Fill<double> fill{i.array(h, kRowHalf), j.array(h, kRowHalf), i.array(h, kRowHalfSum), j.array(h, kRowHalfSum)};
        window_sum<double>(g, s, seam ? &fill : nullptr, l.cw, room.E.data, room.e.data, room.columns.data, room.zeros.data);
        window_sum<double>(g, s, seam ? &fill : nullptr, l.cw, room.F.data, room.f.data, room.columns.data, room.zeros.data);
        window_sum<double>(g, s, nullptr, l.cw, room.T.data, room.t.data, room.columns.data, room.zeros.data);
        for (int first = 0; first < g.height; first += most)
            for (int start = 0; start < g.width; start += kCols) {
                const int count = g.height - first < most ? g.height - first : most;
                const int cols = g.width - start < kCols ? g.width - start : kCols;
                gather(p, g, i, h, first, count, cols, g.span, start, 0, room.rows.data[0]);
                gather(p, g, j, h, first, count, cols, stride_j, offset_j + start, s.y, room.rows.data[1]);
                const int state = first * g.stride + g.pad + start, plane = first * g.span + start;
                double* own = slices ? room.layers.data + 2 * std::int64_t(h) * g.compact() + plane : nullptr;
                const GeneralChunk c{room.E.data + state, room.F.data + state, room.T.data + state, room.e.data + plane,
                                     room.f.data + plane, room.t.data + plane, own, own ? own + g.compact() : nullptr, count, cols,
                                     h == p.n_layers - 1};
                general_chunk(p, g, l, c, room.rows.data[0], room.rows.data[1], *room.arrays.data, total);
            }
        for (int r = 0; r < g.height; ++r) {
            const int at = r * g.stride + g.pad;
            finish_row(g, room.E.data + at), finish_row(g, room.F.data + at), finish_row(g, room.T.data + at);
        }
    }
    if (slices) general_slices(p, g, s, room, slices, step);
}

}  // namespace
}  // namespace ntk

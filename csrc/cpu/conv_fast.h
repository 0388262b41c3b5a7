// Bias-free convolutional networks with a positively homogeneous activation (MATH.md, sections 3, 3b and 9b).
//
// The formulas are in csrc/math/conv.h. Only the first layer may be frozen. A layer goes down the plane, some registers wide:
// it sums the columns of the next row of windows, keeps three such sums and writes the new state to a second plane.
#pragma once
#include "conv_exact.h"
#include "pack.h"

namespace ntk {
namespace {

// Half variances (height,) of one image beside two columns that are not neighbours in the other image.
template <class T>
struct Beside {
    const T *left, *right;
};

// A layer of one plane. Arrays of the second image point to its shifted column 0, with rows step_j apart.
template <class T>
struct FastSweep {
    FastLayer<double> layer;
    double trained;                 // of the first layer
    const T *E, *M, *sum_e, *sum_m; // padded; compact window sums if there are such
    T *to_E, *to_M;                 // padded, other planes
    const T *root_i, *inv_i, *mean_i, *half_i, *half_sum_i, *root_j, *inv_j, *mean_j, *half_j, *half_sum_j;
    Beside<T> seam;                 // of the first image, beside the seam
    Beside<T> next;                 // of the second image, beside the rows, for the next layer; null if finish_plane writes them
    int step_j;
    T* totals;                      // (3, span) of the last layer: M, S, own term
    T* watch;                       // (span,) the largest loss of a column in the first layer; the largest z in later ones (kState)
};

// Where window sums come from: planes of sums, the state, the state with a seam between two columns.
enum FastSource { kSums, kState, kSeam };

// Registers that work together hide each other's latency; the coefficients need registers, too.
constexpr int kTogether = 2;

// Sums over the columns of windows of reach 1, in the columns from c on, and over their rows where the partner wraps.
template <FastSource SOURCE, int U, class T>
struct FastWindow {
    using P = Pack<T, U>;
    Geometry<T> g;
    FastSweep<T> a;
    PackMask<T, U> left_of, right_of;  // columns whose left or right neighbour is beyond the seam
    int c, sy;
    bool wrap, fill_rows;

    NTK_MEMBER int partner(int r) const { return r + sy < g.height ? r + sy : r + sy - g.height; }
    // fill: there is something where only one image is.
    NTK_MEMBER P columns(const T* plane, int r, bool fill) const {
        const T* from = plane + r * g.stride + g.pad + c;
        P left = load_pack<U>(from - 1), right = load_pack<U>(from + 1);
        if (SOURCE == kSeam) {
            left = fill ? choose(left_of, P(a.seam.left[r]), left) : drop(left_of, left);
            right = fill ? choose(right_of, P(a.seam.right[r]), right) : drop(right_of, right);
        }
        return (left + right) + load_pack<U>(from);
    }
    // Row r + dy, which is not in both images, or beyond the row where the partner wraps.
    NTK_MEMBER P beyond(const T* plane, int r, int dy, bool fill) const {
        if (wrap) return columns(plane, (r + dy + g.height) % g.height, fill);
        if (!fill || !fill_rows) return P(0.0);
        const int i = r + dy, j = partner(r) + dy;
        if (i >= 0 && i < g.height) return load_pack<U>(a.half_sum_i + i * g.span + c);
        return j >= 0 && j < g.height ? load_pack<U>(a.half_sum_j + j * a.step_j + c) : P(0.0);
    }
};

template <bool FIRST, bool SCALED, bool LAST, int RANGE, FastSource SOURCE, int U, class T>
__attribute__((noinline)) static void fast_sweep(const Geometry<T>& geometry, const Shift<T>& s, const FastSweep<T>& sweep) {
    using P = Pack<T, U>;
    // Copies: a store might change what a reference points to, as far as the compiler knows.
    const Geometry<T> g = geometry;
    const FastSweep<T> a = sweep;
    const FastLayer<P> l{P(a.layer.skip), P(a.layer.scale), P(a.layer.k), P(a.layer.slope), a.layer.even};
    const P trained(a.trained), zero(0.0);
    FastWindow<SOURCE, U, T> w{g, a, {}, {}, 0, s.y, g.circular && g.reach_y, s.seam_y};
    for (int c = w.c = 0; c < g.span; c = w.c += P::kWidth) {
        P totals[3] = {zero, zero, zero}, watch = zero;
        int shift = s.y;  // of the partner's row
        auto step = [&](int r, const P& e, const P& m) __attribute__((always_inline)) {
            const int i = r * g.span + c, j = (r + shift) * a.step_j + c, state = r * g.stride + g.pad + c;
            const FastPoint<P> first{load_pack<U>(a.root_i + i), load_pack<U>(a.inv_i + i), SCALED ? load_pack<U>(a.mean_i + i) : zero,
                                     SCALED && LAST ? load_pack<U>(a.half_i + i) : zero};
            const FastPoint<P> second{load_pack<U>(a.root_j + j), load_pack<U>(a.inv_j + j), SCALED ? load_pack<U>(a.mean_j + j) : zero,
                                      SCALED && LAST ? load_pack<U>(a.half_j + j) : zero};
            const FastState<P> before{SCALED ? load_pack<U>(a.E + state) : zero, SCALED ? load_pack<U>(a.M + state) : zero};
            const FastResult<P> result = fast_step<FIRST, SCALED, RANGE>(l, trained, FastState<P>{e, m}, before, first, second);
            if (FIRST || SOURCE == kState) watch = at_least(watch, result.watch);
            if (LAST) totals[0] = totals[0] + result.state.m, totals[1] = totals[1] + result.s, totals[2] = totals[2] + result.own;
            else save_pack(a.to_E + state, result.state.e), save_pack(a.to_M + state, result.state.m);
            if (SOURCE == kSeam && !LAST && a.next.left && c == 0)
                a.to_E[state - 1] = a.next.left[r + shift], a.to_E[state + g.width] = a.next.right[r + shift];
        };
        if (SOURCE == kSeam) w.left_of = load_mask<U>(s.seams + c), w.right_of = load_mask<U>(s.seams + g.span + c);
        // The rows before the partner wraps, and those after.
        for (int r = 0, stop = g.height - s.y; r < g.height; stop = g.height, shift = s.y - g.height) {
            for (; SOURCE == kSums && r < stop; ++r)
                step(r, load_pack<U>(a.sum_e + r * g.span + c), load_pack<U>(a.sum_m + r * g.span + c));
            if (SOURCE == kSums) continue;
            P e_above = w.beyond(a.E, r, -1, true), m_above = w.beyond(a.M, r, -1, FIRST);
            P e_here = w.columns(a.E, r, true), m_here = w.columns(a.M, r, FIRST);
            for (; r + 1 < stop; ++r) {
                const P e_next = w.columns(a.E, r + 1, true), m_next = w.columns(a.M, r + 1, FIRST);
                step(r, (e_above + e_here) + e_next, (m_above + m_here) + m_next);
                e_above = e_here, e_here = e_next, m_above = m_here, m_here = m_next;
            }
            step(r, (e_above + w.beyond(a.E, r, 1, true)) + e_here, (m_above + w.beyond(a.M, r, 1, FIRST)) + m_here);
            ++r;
        }
        if (FIRST || SOURCE == kState) save_pack(a.watch + c, watch);
        for (int k = 0; LAST && k < 3; ++k) save_pack(a.totals + k * g.span + c, totals[k]);
    }
}
template <bool FIRST, int RANGE, FastSource SOURCE, int U, class T>
static void fast_layer_by(bool scaled, bool last, const Geometry<T>& g, const Shift<T>& s, const FastSweep<T>& a) {
    if (scaled) {
        return last ? fast_sweep<FIRST, true, true, RANGE, SOURCE, U>(g, s, a)
                    : fast_sweep<FIRST, true, false, RANGE, SOURCE, U>(g, s, a);
    }
    return last ? fast_sweep<FIRST, false, true, RANGE, SOURCE, U>(g, s, a) : fast_sweep<FIRST, false, false, RANGE, SOURCE, U>(g, s, a);
}
template <FastSource SOURCE, int U, class T>
static void fast_layer_with(bool first, bool scaled, bool last, int range, const Geometry<T>& g, const Shift<T>& s,
                            const FastSweep<T>& a) {
    if (first) return fast_layer_by<true, 0, SOURCE, U>(scaled, last, g, s, a);
    if (SOURCE != kState || range == 0) return fast_layer_by<false, 0, SOURCE, U>(scaled, last, g, s, a);
    return range == 1 ? fast_layer_by<false, 1, kState, U>(scaled, last, g, s, a)
                      : fast_layer_by<false, 2, kState, U>(scaled, last, g, s, a);
}
template <class T>
static void fast_layer_of(FastSource source, bool first, bool scaled, bool last, int range, const Geometry<T>& g, const Shift<T>& s,
                          const FastSweep<T>& a) {
    if (source == kSums) return fast_layer_with<kSums, 1>(first, scaled, last, range, g, s, a);
    constexpr int many = kTogether;
    if (g.span % (many * kLanes<T>)) {
        return source == kSeam ? fast_layer_with<kSeam, 1>(first, scaled, last, range, g, s, a)
                               : fast_layer_with<kState, 1>(first, scaled, last, range, g, s, a);
    }
    return source == kSeam ? fast_layer_with<kSeam, many>(first, scaled, last, range, g, s, a)
                           : fast_layer_with<kState, many>(first, scaled, last, range, g, s, a);
}

// E and F before the first layer, in units of kFirstUnit. CHANNELS = 0: any number.
template <int CHANNELS, class T>
NTK_INLINE void start_row_of(const T* x, const T* y, int channels, int x_step, int y_step, int n, T* E, T* F) {
    constexpr int known = CHANNELS ? CHANNELS : 1;
#pragma omp simd
    for (int c = 0; c < n; ++c) {
        T e = T(0), f = T(0);  // a struct here, or fast_channel, would not become vectors
        NTK_UNROLL
        for (int k = 0; k < known; ++k) {
            const T minus = x[k * x_step + c] - y[k * y_step + c], plus = x[k * x_step + c] + y[k * y_step + c];
            e = fma_(minus, minus, e), f = fma_(plus, plus, f);
        }
        E[c] = e, F[c] = f;
    }
    for (int k = known; !CHANNELS && k < channels; ++k)
#pragma omp simd
        for (int c = 0; c < n; ++c) {
            const FastState<T> sum = fast_channel<T>({E[c], F[c]}, x[k * x_step + c], y[k * y_step + c]);
            E[c] = sum.e, F[c] = sum.m;
        }
}
template <class T>
NTK_INLINE void start_row(const T* x, const T* y, int channels, int x_step, int y_step, int n, T* E, T* F) {
    if (channels == 3) start_row_of<3>(x, y, channels, x_step, y_step, n, E, F);
    else start_row_of<0>(x, y, channels, x_step, y_step, n, E, F);
}

// The columns beside the rows of a plane that a layer reads: what finish_row says, or what is there in the second image only.
template <class T>
NTK_INLINE void finish_plane(const Geometry<T>& g, const Shift<T>& s, const Beside<T>& only, T* plane) {
    for (int r = 0; r < g.height; ++r) {
        T* row = plane + r * g.stride + g.pad;
        finish_row(g, row);
        if (only.left) {
            const int other = r + s.y < g.height ? r + s.y : r + s.y - g.height;
            row[-1] = only.left[other], row[g.width] = only.right[other];
        } else if (g.fused() && !g.circular) {
            row[-1] = row[g.width] = T(0);
        }
    }
}

template <class T>
static T largest(const Geometry<T>& g, const T* columns) {
    T most = T(0);
#pragma omp simd reduction(max : most)
    for (int c = 0; c < g.width; ++c) most = columns[c] > most ? columns[c] : most;
    return most;
}
// Whether patches of different norms are so close to multiples of each other that the first layer lost digits.
template <class T>
static bool parallel(const ConvPlan& p, T loss) {
    bool skip = false;
    for (int h = 0; h < p.n_layers; ++h) skip = skip || p.layers[h].p != 0.0;
    return loss > T(least_loss(T(0))) && !skip;
}
// The shortest fit for z as large as in the layer before: correlations mostly grow from layer to layer. Not so beyond a seam, and with
// windows that are summed first the fits are not what takes the time: those always take the long one.
template <class T>
static int range_for(T z) {
    int range = 0;
    while (range < 2 && z <= T(kArcRange[range + 1])) ++range;
    return range;
}

// All layers of one plane; total (3,) += T + S, S, own term of the last layer, over its positions.
template <class T>
void fast_plane(const ConvPlan& p, const Geometry<T>& g, const Shift<T>& s, const FastImage<T>& i, const FastImage<T>& j,
                FastRoom<T>& room, double* total) {
    const T *x = i.array(p.n_layers, 0), *y = j.array(p.n_layers, 0);
    const int step_j = p.pooled ? g.double_stride() : g.span, offset_j = p.pooled ? g.pad + s.x : 0;
    T *E = room.E.data, *M = room.M.data, *next_E = E + g.padded(), *next_M = M + g.padded();
    for (int r = 0; r < g.height; ++r) {
        const int other = r + s.y < g.height ? r + s.y : r + s.y - g.height, at = r * g.stride + g.pad;
        start_row(x + r * g.span, y + other * step_j + offset_j, p.channels, g.compact(), j.size, g.span, E + at, M + at);
    }
    const bool renew = g.circular || g.span != g.width;  // every layer writes beside the rows
    const bool seam = s.seam_x || s.seam_y, beside = p.pooled || renew;
    const FastSource source = !g.fused() ? kSums : s.seam_x ? kSeam : kState;
    const Beside<T> nothing{nullptr, nullptr};
    auto beside_seam = [&](int h) {
        const T* right = i.array(h, kHalfColumns) + (g.width - s.x) * g.height;
        return s.seam_x ? Beside<T>{right - g.height, right} : nothing;
    };
    auto beside_rows = [&](int h) {
        const T* right = j.array(h, kHalfColumns) + s.x * g.height;
        return s.seam_x ? Beside<T>{right - g.height, right} : nothing;
    };
    double unit = kFirstUnit;
    int range = 0;
    for (int h = 0; h < p.n_layers; ++h) {
        const GeneralLayer& l = p.layers[h];
        const FastUnits u = fast_units(l, unit);
        const bool first = h == 0, last = h == p.n_layers - 1;
        const FastSweep<T> a{fast_layer<double>(l, u), l.w, E, M, room.e.data, room.m.data, next_E, next_M,
                             i.array(h, kRoot), i.array(h, kInverse), i.array(h, kMean), i.array(h, kHalf), i.array(h, kHalfSum),
                             j.array(h, kRoot) + offset_j, j.array(h, kInverse) + offset_j, j.array(h, kMean) + offset_j,
                             j.array(h, kHalf) + offset_j, j.array(h, kHalfSum) + offset_j,
                             beside_seam(h), last || renew ? nothing : beside_rows(h + 1), step_j, room.sums.data,
                             room.sums.data + 4 * g.span};
        // Beside the rows of M there are zeros, but for F, whose plane the third layer (h = 2) reads again.
        if (beside && (first || renew || source != kSeam)) finish_plane(g, s, source == kSeam ? beside_rows(h) : nothing, E);
        if (beside && (first || renew || h == 2)) finish_plane(g, s, source == kSeam && first ? beside_rows(h) : nothing, M);
        if (source == kSums) {
            const Fill<T> fill{a.half_i, j.array(h, kHalf), a.half_sum_i, j.array(h, kHalfSum)};
            window_sum<T>(g, s, seam ? &fill : nullptr, T(1), E, room.e.data, room.columns.data, room.sums.data + 3 * g.span);
            window_sum<T>(g, s, seam && first ? &fill : nullptr, T(1), M, room.m.data, room.columns.data, room.sums.data + 3 * g.span);
        }
        fast_layer_of(source, first, u.scaled, last, range, g, s, a);
        const T most = first || source == kState ? largest(g, a.watch) : T(0);
        if (first && parallel(p, most)) return exact_plane(p, g, s, i, j, room, total);
        if (range && most > T(kArcRange[range])) fast_layer_of(source, first, u.scaled, last, 0, g, s, a);  // rare: the longest will do
        range = first || source != kState ? 0 : range_for(most);  // what the first layer watches is no z
        T *old_E = E, *old_M = M;
        E = next_E, M = next_M, next_E = old_E, next_M = old_M;
        unit = u.after;
    }
    for (int k = 0; k < 3; ++k) {
        double sum = 0.0;
        for (int c = 0; c < g.width; ++c) sum += double(room.sums.data[k * g.span + c]);
        total[k] += unit * sum;
    }
}

}  // namespace
}  // namespace ntk

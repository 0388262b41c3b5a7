// A patch of pairs: from inner products to results in memory. What tiles (gram_dense.cpp) are made of.
//
//   correlations (from products, or from differences for close pairs) -> layers, or a table -> results and their mirror image
#pragma once
#include "../math/pair.h"
#include "block.h"
#include "differences.h"
#include "general.h"
#include "homogeneous.h"
#include "table.h"
#include "write.h"

namespace ntk {
namespace {

template <class T>
struct Scratch {
    Block<T> block;
    DifferenceArrays differences;
    GeneralArrays general;
    RowArrays ri, rj;
    double last[kBlock], cov[kBlock];  // results of the suffix
    alignas(64) T result[kBlock];              // of a slice
    alignas(64) T turned[kLanes<T> * kPatch];  // of write_patch
};

int hermite_terms_of(const Plan& plan) {
    int most = 0;
    for (int h = 0; h < plan.n_suffix; ++h)
        if (plan.suffix[h].table >= 0) {
            const HermiteTable& t = plan.tables[plan.suffix[h].table];
            if (t.panels > 0 && t.evens + t.odds > most) most = t.evens + t.odds;
        }
    return most;
}

constexpr int kAhead = 8;  // rows

// Inverse norms of the columns of a block, zeros behind.
template <class P>
struct Inverses {
    P of[kCols];
    Inverses(const Tile& t, std::int64_t j0, int cols) {
        for (int j = 0; j < kCols; ++j) of[j] = j < cols ? P(t.j.inv[j0 + j]) : P(0);
    }
};

// x = 1 - |rho| and the sign of rho of one row of a block from the inner products, which are P; the pairs beyond cols become
// (x, s) = (0, 1). Returns the least x of the row, the diagonal apart.
template <class P, class T>
NTK_INLINE T correlate_row(const Tile& t, std::int64_t i, std::int64_t j0, int cols, const P* inv, T* x, T* s) {
    const P* row = static_cast<const P*>(t.products) + i * t.stride + j0;
    const P scale = P(t.i.inv[i]);
    // The rows of a patch are far apart; the processor does not foresee the next one.
    if (i + kAhead < t.rows)
        for (int j = 0; j < cols; j += 64 / int(sizeof(P))) __builtin_prefetch(row + kAhead * t.stride + j, 1);
    const std::int64_t own = t.diagonal == INT64_MIN ? -1 : i - t.diagonal - j0;
    T lowest = T(1);
#pragma omp simd reduction(min : lowest)
    for (int j = 0; j < cols; ++j) {
        const Start<P> p = start_pair(row[j], scale, inv[j]);
        x[j] = T(p.x);
        s[j] = T(p.s);
        lowest = x[j] < lowest ? x[j] : lowest;
    }
    for (int j = cols; j < kCols; ++j) x[j] = T(0), s[j] = T(1);
    if (own >= 0 && own < cols) {
        x[own] = T(0), s[own] = T(1), lowest = T(1);
        for (int j = 0; j < cols; ++j) lowest = j != own && x[j] < lowest ? x[j] : lowest;
    }
    return lowest;
}
// All rows of a block; the pairs beyond them become (0, 1), too. Returns the least x.
template <class P, class T>
T correlations(const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, Block<T>& b) {
    const Inverses<P> inv(t, j0, cols);
    T least = T(1);
    for (int i = 0; i < rows; ++i) {
        const T lowest = correlate_row(t, i0 + i, j0, cols, inv.of, b.x + i * kCols, b.s + i * kCols);
        least = lowest < least ? lowest : least;
    }
    for (int k = rows * kCols; k < kBlock; ++k) b.x[k] = T(0), b.s[k] = T(1);
    return least;
}

// Theta = 0 before the first layer.
template <class T>
void clear_state(Block<T>& b, int n) {
    for (int k = 0; k < n; ++k) b.x_low[k] = b.theta[k] = b.theta_low[k] = T(0);
}

// Row states before the suffix: norms, and zeros beyond n.
void start_rows(const Plan& plan, const double* norm, std::int64_t start, int n, RowArrays& a) {
    for (int k = 0; k < kCols; ++k) {
        const RowStart r = start_row(plan.nu, plan.beta, k < n ? norm[start + k] : 0.0);
        a.norm[k] = r.norm, a.var[k] = r.var, a.mean[k] = r.mean;
    }
}

// The suffix takes over from the prefix: Theta gets its norms back.
template <class T>
void start_general(const Block<T>& b, const RowArrays& ri, const RowArrays& rj, int rows,
                   bool elementwise, GeneralArrays& g) {
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < kCols; ++j) {
            const int at = i * kCols + j;
            g.x[at] = whole(load(b.x, b.x_low, at));
            g.s[at] = double(b.s[at]);
            g.theta[at] = whole(load(b.theta, b.theta_low, at)) * ri.norm[elementwise ? j : i] * rj.norm[j];
        }
}

// theta Theta + cov S + mean b_i b_j + last G of one row of the block, as T.
template <class T>
void mix_row(const Plan& plan, const Mix& m, const Scratch<T>& s, int i, int cols, bool elementwise, double* value) {
    const int at = i * kCols;
    if (plan.n_suffix) {
        // `value` may be s.cov itself.
        for (int j = 0; j < cols; ++j)
            value[j] = mix_general(m, s.general.theta[at + j], s.cov[at + j], s.last[at + j],
                                   s.ri.mean[elementwise ? j : i], s.rj.mean[j]);
        return;
    }
    const double mean = plan.beta / sqrt_(plan.nu);
    for (int j = 0; j < cols; ++j) {
        const double x = whole(load(s.block.x, s.block.x_low, at + j));
        const double theta = whole(load(s.block.theta, s.block.theta_low, at + j));
        value[j] = mix_homogeneous(m, theta, x, double(s.block.s[at + j]), mean);
    }
    if (m.last != 0.0)  // else it was not computed
        for (int j = 0; j < cols; ++j) value[j] += m.last * double(s.block.last[at + j]);
}

// The results of a block by the layers, (rows, kCols) each.
template <class T>
void layer_results(const Plan& plan, const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, Scratch<T>& s,
                   T* results) {
    double value[kCols];
    for (int o = 0; o < t.n_outputs; ++o, results += kPatch * kCols) {
        const Output& out = t.outputs[o];
        const double *fj = out.fj + j0, *hj = out.hj + j0;
        for (int i = 0; i < rows; ++i) {
            mix_row(plan, {out.theta, out.cov, out.mean, out.last}, s, i, cols, false, value);
            const double fi = out.fi[i0 + i], hi = out.hi[i0 + i];
            T* row = results + i * kCols;
            for (int j = 0; j < cols; ++j) row[j] = T(value[j] * fi * fj[j] + hi * hj[j]);
        }
    }
}

// One side of the factors in the type of the results. False if they leave its range, where only double will do.
NTK_INLINE bool narrow(const double* f, int n, double* to) {
    for (int k = 0; k < n; ++k) to[k] = f[k];
    return true;
}
NTK_INLINE bool narrow(const double* f, int n, float* to) {
    int outside = 0;
#pragma omp simd reduction(+ : outside)
    for (int k = 0; k < n; ++k) {
        to[k] = float(f[k]);
        outside += f[k] != 0.0 && !(f[k] > 0x1p-40 && f[k] < 0x1p40) ? 1 : 0;
    }
    return outside == 0;
}

// The factors of one output for a block.
template <class T>
struct TableFactors {
    T fi[kRows], hi[kRows], fj[kCols], hj[kCols];
    bool fits;
    void take(const Output& out, std::int64_t i0, std::int64_t j0, int rows, int cols) {
        fits = narrow(out.fi + i0, rows, fi);
        fits = narrow(out.hi + i0, rows, hi) && fits;
        fits = narrow(out.fj + j0, cols, fj) && fits;
        fits = narrow(out.hj + j0, cols, hj) && fits;
    }
};
// Row i of the block by a table.
template <class T>
NTK_INLINE void table_line(const Output& out, const TableFactors<T>& c, std::int64_t i0, std::int64_t j0, int i, int cols,
                           const T* x, const T* s, T* row) {
    table_row(*static_cast<const Table<T>*>(out.table), x, s, row, cols);
    if (c.fits) {
        const T f = c.fi[i], h = c.hi[i];
        if (h != T(0)) for (int j = 0; j < cols; ++j) row[j] = fma_(row[j] * f, c.fj[j], h * c.hj[j]);
        else for (int j = 0; j < cols; ++j) row[j] = row[j] * f * c.fj[j];
    } else {
        const double f = out.fi[i0 + i], h = out.hi[i0 + i];
        for (int j = 0; j < cols; ++j) row[j] = T(double(row[j]) * f * out.fj[j0 + j] + h * out.hj[j0 + j]);
    }
}

// The same by tables.
template <class T>
void table_results(const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, const Block<T>& b, T* results) {
    TableFactors<T> factors;
    for (int o = 0; o < t.n_outputs; ++o, results += kPatch * kCols) {
        factors.take(t.outputs[o], i0, j0, rows, cols);
        for (int i = 0; i < rows; ++i)
            table_line(t.outputs[o], factors, i0, j0, i, cols, b.x + i * kCols, b.s + i * kCols, results + i * kCols);
    }
}

// From products to results row by row: correlations never leave the L1 cache. False as soon as a pair is close.
template <class P, class T>
bool table_block(const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, T* results) {
    TableFactors<T> factors;
    alignas(64) T x[kCols], s[kCols];
    const Inverses<P> inv(t, j0, cols);
    factors.take(t.outputs[0], i0, j0, rows, cols);
    for (int i = 0; i < rows; ++i) {
        if (correlate_row(t, i0 + i, j0, cols, inv.of, x, s) < T(t.close)) return false;
        table_line(t.outputs[0], factors, i0, j0, i, cols, x, s, results + i * kCols);
    }
    return true;
}

template <class T>
void write_slice(const Tile& t, int slice, std::int64_t i0, std::int64_t j0, int rows, int cols, Scratch<T>& s,
                 double constant) {
    const Slices& out = t.slices;
    const std::int64_t below = t.diagonal == INT64_MIN ? INT64_MIN : i0 - t.diagonal - j0;
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j)
            s.result[i * kCols + j] = T(s.cov[i * kCols + j] * out.fi[i0 + i] * out.fj[j0 + j] + constant);
    T* data = static_cast<T*>(out.data) + slice * out.slice_stride + i0 * out.stride + j0;
    T* mirror = out.mirror ? static_cast<T*>(out.mirror) + slice * out.slice_stride + j0 * out.mirror_stride + i0 : nullptr;
    write_patch(s.result, rows, cols, below, data, out.stride, mirror, out.mirror_stride, t.stream && t.apart,
                t.stream, s.turned);
}

// What every layer added itself and did to earlier Grams, for layer_grams.
template <class T>
struct OwnTerms {
    T* prefix;            // (n_prefix, 3, stride) own_w, own_v, growth
    double* suffix;       // (n_suffix, 4, stride) own_w, own_b, own_v, factor
    std::int64_t stride;  // pairs of a block
};

// layer_grams: own terms times the factors of all later layers, from the last layer to the first.
template <class T>
void write_slices(const Plan& plan, const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, Scratch<T>& s,
                  const OwnTerms<T>& own) {
    const int n = rows * kCols;
    double *later = s.general.x, *value = s.cov;  // both are free once the readout's slice is written
    if (t.slices.readout >= 0) {
        for (int i = 0; i < rows; ++i)
            mix_row(plan, {0.0, t.slices.readout_cov, 0.0, 0.0}, s, i, kCols, false, value + i * kCols);
        write_slice<T>(t, t.slices.readout, i0, j0, rows, cols, s, t.slices.readout_const);
    }
    for (int k = 0; k < n; ++k) later[k] = 1.0;
    for (int h = plan.n_suffix - 1; h >= 0; --h) {
        const GeneralLayer& l = plan.suffix[h];
        const double *own_w = own.suffix + 4 * h * own.stride, *own_b = own_w + own.stride, *own_v = own_b + own.stride;
        const double* factor = own_v + own.stride;
        if (l.slice_w >= 0) {
            for (int k = 0; k < n; ++k) value[k] = own_gram_w(l, own_w[k], own_b[k]) * later[k];
            write_slice<T>(t, l.slice_w, i0, j0, rows, cols, s, 0.0);
        }
        if (l.slice_v >= 0) {
            for (int k = 0; k < n; ++k) value[k] = own_gram_v(l, own_v[k]) * later[k];
            write_slice<T>(t, l.slice_v, i0, j0, rows, cols, s, 0.0);
        }
        for (int k = 0; k < n; ++k) later[k] *= factor[k];
    }
    if (plan.n_suffix)
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < cols; ++j) later[i * kCols + j] *= plan.nu * t.i.norm[i0 + i] * t.j.norm[j0 + j];
    for (int h = plan.n_prefix - 1; h >= 0; --h) {
        const HomogeneousLayer& l = plan.prefix[h];
        const T *own_w = own.prefix + 3 * h * own.stride, *own_v = own_w + own.stride, *growth = own_v + own.stride;
        if (l.slice_w >= 0) {
            for (int k = 0; k < n; ++k) value[k] = l.w * double(own_w[k]) * later[k];
            write_slice<T>(t, l.slice_w, i0, j0, rows, cols, s, 0.0);
        }
        if (l.slice_v >= 0) {
            for (int k = 0; k < n; ++k) value[k] = l.v * double(own_v[k]) * later[k];
            write_slice<T>(t, l.slice_v, i0, j0, rows, cols, s, 0.0);
        }
        for (int k = 0; k < n; ++k) later[k] = fma_(later[k], double(growth[k]), later[k]);
    }
}

// Rows of a block: fewer where layer_grams keeps every layer, so that a thread stays under 16 MB.
int rows_of_block(const Plan& plan, bool slices) {
    int rows = kRows;
    const double layer = kCols * sizeof(double) * (3.0 * plan.n_prefix + 4.0 * plan.n_suffix);
    while (slices && rows > 1 && rows * layer > 16e6) rows /= 2;
    return rows;
}

// What one thread needs.
template <class T>
struct Worker {
    int most_rows;  // of a block
    Buffer<Scratch<T>> scratch;
    Buffer<T> prefix, results;  // results: (outputs, kPatch, kCols)
    Buffer<double> suffix, coefficients;
    OwnTerms<T> own;

    Worker(const Plan& plan, int outputs, bool slices)
        : most_rows(rows_of_block(plan, slices)), scratch(1), prefix(slices ? 3 * pairs() * plan.n_prefix : 0),
          results(std::size_t(outputs) * kPatch * kCols), suffix(slices ? 4 * pairs() * plan.n_suffix : 0),
          coefficients(2 * std::size_t(hermite_terms_of(plan)) * kCols),
          own{prefix.data, suffix.data, std::int64_t(pairs())} {
        if (!ready()) return;
        scratch.data->ri.hermite = coefficients.data;
        scratch.data->rj.hermite = coefficients.data + std::size_t(hermite_terms_of(plan)) * kCols;
    }
    bool ready() const {
        return scratch.data && prefix.ready() && results.ready() && suffix.ready() && coefficients.ready();
    }

   private:
    std::size_t pairs() const { return std::size_t(most_rows) * kCols; }
};

// results: (n_outputs, kPatch, kCols), the block's first row; untouched if there are slices.
template <class T>
void block(const Plan& plan, const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, Worker<T>& w, T* results) {
    Scratch<T>& s = *w.scratch.data;
    const OwnTerms<T>& own = w.own;
    const bool table = t.n_outputs && t.outputs[0].table;
    if (table && t.n_outputs == 1)
        if (t.wide ? table_block<double>(t, i0, j0, rows, cols, results) : table_block<T>(t, i0, j0, rows, cols, results)) return;
    const T least = t.wide ? correlations<double>(t, i0, j0, rows, cols, s.block) : correlations<T>(t, i0, j0, rows, cols, s.block);
    if (!table) clear_state(s.block, rows * kCols);
    if (least < T(t.close)) close_pairs(t, i0, j0, rows, cols, s.block, s.differences);
    if (table) return table_results(t, i0, j0, rows, cols, s.block, results);
    bool last = false;
    for (int o = 0; o < t.n_outputs; ++o) last = last || t.outputs[o].last != 0.0;
    // Narrow blocks row by row: what lies beyond their columns costs as much as they do.
    const int run = cols > kCols / 2 ? rows * kCols : cols;
    for (int first = 0; first < rows * kCols; first += run == cols ? kCols : run)
        homogeneous_block(plan, s.block, first, run, last && plan.n_suffix == 0, own.prefix, own.stride);
    if (plan.n_suffix) {
        start_rows(plan, t.i.norm, i0, rows, s.ri);
        start_rows(plan, t.j.norm, j0, cols, s.rj);
        start_general(s.block, s.ri, s.rj, rows, false, s.general);
        general_block<false>(plan, s.ri, s.rj, rows, cols, s.general, own.suffix, own.stride, s.last, s.cov);
    }
    if (t.slices.data) return write_slices(plan, t, i0, j0, rows, cols, s, own);
    layer_results(plan, t, i0, j0, rows, cols, s, results);
}

// Where a patch is: its first pair, its pairs, and the column of the first row's own point (INT64_MIN: no such tile).
struct PatchPlace {
    std::int64_t i0, j0;
    int rows, cols;
    std::int64_t below;
};
NTK_INLINE PatchPlace patch_place(const Tile& t, std::int64_t i0, std::int64_t j0) {
    return {i0, j0, t.rows - i0 < kPatch ? int(t.rows - i0) : kPatch, t.cols - j0 < kCols ? int(t.cols - j0) : kCols,
            t.diagonal == INT64_MIN ? INT64_MIN : i0 - t.diagonal - j0};
}

// The results of a patch, in blocks of most_rows; below the diagonal of a tile nothing is computed. Slices are written.
template <class T>
void patch_results(const Plan& plan, const Tile& t, const PatchPlace& p, bool upper, Worker<T>& w) {
    for (int i = 0; i < p.rows; i += w.most_rows) {
        // table_row writes whole 64 pairs.
        const std::int64_t first = upper && p.below + i > 0 ? (p.below + i) / 64 * 64 : 0;
        if (first >= p.cols) break;
        const int size = p.rows - i < w.most_rows ? p.rows - i : w.most_rows;
        block<T>(plan, t, p.i0 + i, p.j0 + first, size, p.cols - int(first), w, w.results.data + i * kCols + first);
    }
}

// From inner products to results in memory.
template <class T>
void patch(const Plan& plan, const Tile& t, std::int64_t i0, std::int64_t j0, bool upper, Worker<T>& w) {
    const PatchPlace p = patch_place(t, i0, j0);
    patch_results(plan, t, p, upper, w);
    for (int o = 0; o < t.n_outputs && !t.slices.data; ++o) {
        const Output& out = t.outputs[o];
        T* mirror = out.mirror ? static_cast<T*>(out.mirror) + j0 * out.mirror_stride + i0 : nullptr;
        write_patch(w.results.data + o * kPatch * kCols, p.rows, p.cols, p.below, static_cast<T*>(out.data) + i0 * out.stride + j0,
                    out.stride, mirror, out.mirror_stride, t.stream && t.apart, t.stream, w.scratch.data->turned);
    }
}

}  // namespace
}  // namespace ntk

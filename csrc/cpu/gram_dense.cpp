// Gram matrices of dense networks: a tile of inner products becomes kernels, block by block, in place if wanted.
//
//   correlations (from products, or from differences for close pairs) -> layers -> results and their mirror image
//
//   parallel   one block of 32 x 128 pairs a thread; no state outside it
//   memory     under 3 MB a thread without layer_grams
//   compiled   once per instruction set with NTK_ISA; nothing here may have external linkage but `table`
#include <cmath>

#include "block.h"
#include "differences.h"
#include "doors.h"
#include "general.h"
#include "homogeneous.h"
#include "jacobian.h"

namespace ntk {
namespace NTK_ISA {
namespace {

template <class T>
struct Scratch {
    Block<T> block;
    DifferenceArrays differences;
    GeneralArrays general;
    RowArrays ri, rj;
    double last[kBlock], cov[kBlock];  // results of the suffix
    T result[kBlock];
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

// x = 1 - |rho| and the sign of rho from the inner products; the pairs beyond rows x cols become (x, s) = (0, 1).
template <class T>
void correlations(const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, Block<T>& b) {
    const T* products = static_cast<const T*>(t.products) + i0 * t.stride + j0;
    T inv[kCols];
    for (int j = 0; j < kCols; ++j) inv[j] = j < cols ? T(t.j.inv[j0 + j]) : T(0);
    for (int i = 0; i < kRows; ++i) {
        T *x = b.x + i * kCols, *low = b.x_low + i * kCols, *s = b.s + i * kCols, *theta = b.theta + i * kCols;
        const T scale = i < rows ? T(t.i.inv[i0 + i]) : T(0);
        const T* row = products + (i < rows ? i : 0) * t.stride;
#pragma omp simd
        for (int j = 0; j < cols; ++j) {
            const T rho = row[j] * scale * inv[j];
            const T gap = rho < T(0) ? T(1) + rho : T(1) - rho;
            x[j] = gap < T(0) ? T(0) : gap;
            s[j] = rho < T(0) ? T(-1) : T(1);
        }
        for (int j = cols; j < kCols; ++j) x[j] = T(0), s[j] = T(1);
        for (int j = 0; j < kCols; ++j) low[j] = T(0), theta[j] = T(0), b.theta_low[i * kCols + j] = T(0);
        if (t.diagonal != INT64_MIN) {
            const std::int64_t j = i0 + i - t.diagonal - j0;
            if (j >= 0 && j < cols) x[j] = T(0), s[j] = T(1);
        }
    }
}

// Row states before the suffix: norms, and zeros beyond n.
void start_rows(const Plan& plan, const double* norm, std::int64_t start, int n, RowArrays& a) {
    const double root = std::sqrt(plan.nu);
    for (int k = 0; k < kCols; ++k) {
        const double r = k < n ? norm[start + k] : 0.0;
        a.norm[k] = root * r, a.var[k] = plan.nu * r * r, a.mean[k] = plan.beta * r;
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
struct Mix {
    double theta, cov, mean, last;
};
template <class T>
void mix_row(const Plan& plan, const Mix& m, const Scratch<T>& s, int i, int cols, bool elementwise, double* value) {
    const int at = i * kCols;
    if (plan.n_suffix) {
        // Only what is asked for: Theta may be infinite where the covariance is not. `value` may be s.cov itself.
        for (int j = 0; j < cols; ++j) {
            double v = m.mean * s.ri.mean[elementwise ? j : i] * s.rj.mean[j];
            v += m.cov != 0.0 ? m.cov * s.cov[at + j] : 0.0;
            v += m.theta != 0.0 ? m.theta * s.general.theta[at + j] : 0.0;
            value[j] = v + (m.last != 0.0 ? m.last * s.last[at + j] : 0.0);
        }
        return;
    }
    const double mean = m.mean * plan.beta * plan.beta / plan.nu;
    for (int j = 0; j < cols; ++j) {
        const double x = whole(load(s.block.x, s.block.x_low, at + j));
        const double theta = whole(load(s.block.theta, s.block.theta_low, at + j));
        value[j] = m.theta * theta + m.cov * (double(s.block.s[at + j]) * (1.0 - x)) + mean;
    }
    if (m.last != 0.0)  // else it was not computed
        for (int j = 0; j < cols; ++j) value[j] += m.last * double(s.block.last[at + j]);
}

// A store past the caches: a mirrored block touches 128 rows of the result far apart, whose old contents would only be
// fetched to be overwritten.
#ifdef __x86_64__
void stream(double* to, double value) {
    long long b;
    __builtin_memcpy(&b, &value, sizeof b);
    __builtin_ia32_movnti64(reinterpret_cast<long long*>(to), b);
}
void stream(float* to, float value) {
    int b;
    __builtin_memcpy(&b, &value, sizeof b);
    __builtin_ia32_movnti(reinterpret_cast<int*>(to), b);
}
// Streamed stores of this thread become visible to the others.
void finish_streams() { __builtin_ia32_sfence(); }
#else
template <class T>
void stream(T* to, T value) { *to = value; }
void finish_streams() {}
#endif

// The block of results goes to out (row by row) and, transposed, to the mirror. On a tile of the diagonal only pairs above
// it are written; `below` is the column, relative to the block, of the first row's own point (INT64_MIN: no such tile).
template <class T>
void write_block(const T* result, int rows, int cols, std::int64_t below, T* out, std::int64_t stride, T* mirror,
                 std::int64_t mirror_stride) {
    const bool triangle = mirror && below != INT64_MIN;
    for (int i = 0; i < rows; ++i) {
        const std::int64_t first = triangle && below + i > 0 ? below + i : 0;
        for (std::int64_t j = first; j < cols; ++j) out[i * stride + j] = result[i * kCols + j];
    }
    if (!mirror) return;
    for (int j = 0; j < cols; ++j) {
        const std::int64_t above = triangle ? j - below : rows;  // rows above the diagonal in column j
        const int last = above > rows ? rows : int(above);
        for (int i = 0; i < last; ++i) stream(mirror + j * mirror_stride + i, result[i * kCols + j]);
    }
}

template <class T>
void write_outputs(const Plan& plan, const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, Scratch<T>& s) {
    double value[kCols];
    const std::int64_t below = t.diagonal == INT64_MIN ? INT64_MIN : i0 - t.diagonal - j0;
    for (int o = 0; o < t.n_outputs; ++o) {
        const Output& out = t.outputs[o];
        const double *fj = out.fj + j0, *hj = out.hj + j0;
        for (int i = 0; i < rows; ++i) {
            mix_row(plan, {out.theta, out.cov, out.mean, out.last}, s, i, cols, false, value);
            const double fi = out.fi[i0 + i], hi = out.hi[i0 + i];
            T* row = s.result + i * kCols;
            for (int j = 0; j < cols; ++j) row[j] = T(value[j] * fi * fj[j] + hi * hj[j]);
        }
        write_block(s.result, rows, cols, below, static_cast<T*>(out.data) + i0 * out.stride + j0, out.stride,
                    out.mirror ? static_cast<T*>(out.mirror) + j0 * out.mirror_stride + i0 : nullptr, out.mirror_stride);
    }
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
    write_block(s.result, rows, cols, below, data, out.stride, mirror, out.mirror_stride);
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
            for (int k = 0; k < n; ++k) value[k] = (l.w * own_w[k] + l.wb * own_b[k]) * later[k];
            write_slice<T>(t, l.slice_w, i0, j0, rows, cols, s, 0.0);
        }
        if (l.slice_v >= 0) {
            for (int k = 0; k < n; ++k) value[k] = (l.v * own_v[k] + l.vvb * l.vb) * later[k];
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

template <class T>
void block(const Plan& plan, const Tile& t, std::int64_t i0, std::int64_t j0, int most_rows, Scratch<T>& s,
           const OwnTerms<T>& own) {
    const int rows = t.rows - i0 < most_rows ? int(t.rows - i0) : most_rows;
    const int cols = t.cols - j0 < kCols ? int(t.cols - j0) : kCols;
    correlations(t, i0, j0, rows, cols, s.block);
    if (t.close > 0.0) close_pairs(t, i0, j0, rows, cols, s.block, s.differences);
    bool last = false;
    for (int o = 0; o < t.n_outputs; ++o) last = last || t.outputs[o].last != 0.0;
    homogeneous_block(plan, s.block, rows * kCols, last && plan.n_suffix == 0, own.prefix, own.stride);
    if (plan.n_suffix) {
        start_rows(plan, t.i.norm, i0, rows, s.ri);
        start_rows(plan, t.j.norm, j0, cols, s.rj);
        start_general(s.block, s.ri, s.rj, rows, false, s.general);
        general_block<false>(plan, s.ri, s.rj, rows, cols, s.general, own.suffix, own.stride, s.last, s.cov);
    }
    if (t.slices.data) return write_slices(plan, t, i0, j0, rows, cols, s, own);
    write_outputs(plan, t, i0, j0, rows, cols, s);
}

// Rows of a block: fewer where layer_grams keeps every layer, so that a thread stays under 16 MB.
int rows_of_block(const Plan& plan, const Tile& t) {
    int rows = kRows;
    const double layer = kCols * sizeof(double) * (3.0 * plan.n_prefix + 4.0 * plan.n_suffix);
    while (t.slices.data && rows > 1 && rows * layer > 16e6) rows /= 2;
    return rows;
}

// False if memory ran out (of a thread: the others finish what they have).
template <class T>
bool tile(const Plan& plan, const Tile& t) {
    bool failed = false;
    const bool slices = t.slices.data != nullptr;
    const int most = rows_of_block(plan, t);
    const std::int64_t bands = (t.rows + most - 1) / most, columns = (t.cols + kCols - 1) / kCols;
    const std::size_t hermite = std::size_t(hermite_terms_of(plan)) * kCols, size = std::size_t(most) * kCols;
    // Blocks of a tile on the diagonal start at the diagonal: the pairs below it come from the mirror.
    const bool upper = t.diagonal != INT64_MIN && (slices ? t.slices.mirror : t.outputs[0].mirror);
#pragma omp parallel
    {
        Buffer<Scratch<T>> scratch(1);
        Buffer<T> prefix(slices ? 3 * size * plan.n_prefix : 0);
        Buffer<double> suffix(slices ? 4 * size * plan.n_suffix : 0), coefficients(2 * hermite);
        const OwnTerms<T> own{prefix.data, suffix.data, std::int64_t(size)};
        const bool ready = scratch.data && prefix.ready() && suffix.ready() && coefficients.ready();
        if (ready) {
            scratch.data->ri.hermite = coefficients.data;
            scratch.data->rj.hermite = coefficients.data + hermite;
        } else {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for collapse(2) schedule(dynamic)
        for (std::int64_t band = 0; band < bands; ++band)
            for (std::int64_t column = 0; column < columns; ++column) {
                const std::int64_t i0 = band * most;
                const std::int64_t start = upper ? i0 - t.diagonal : 0;  // column of the first row's own point
                const std::int64_t j0 = column * kCols + (start > 0 ? start : 0);
                if (ready && j0 < t.cols) block<T>(plan, t, i0, j0, most, *scratch.data, own);
            }
        finish_streams();
    }
    return !failed;
}

template <class T>
bool pairs(const Plan& plan, const Pairs& p) {
    bool failed = false;
    const std::size_t hermite = std::size_t(hermite_terms_of(plan)) * kCols;
#pragma omp parallel
    {
        Buffer<Scratch<T>> scratch(1);
        Buffer<double> coefficients(2 * hermite);
        const bool ready = scratch.data && coefficients.ready();
        if (ready) {
            scratch.data->ri.hermite = coefficients.data;
            scratch.data->rj.hermite = coefficients.data + hermite;
        } else {
#pragma omp atomic write
            failed = true;
        }
        double value[kCols];
#pragma omp for schedule(dynamic)
        for (std::int64_t start = 0; start < p.n; start += kCols) {
            if (!ready) continue;
            Scratch<T>& s = *scratch.data;
            const int n = p.n - start < kCols ? int(p.n - start) : kCols;
            for (int k = 0; k < kCols; ++k) {
                store(s.block.x, s.block.x_low, k, widen(k < n ? p.x[start + k] : 0.0, T(0)));
                s.block.s[k] = k < n ? T(p.s[start + k]) : T(1);
                store(s.block.theta, s.block.theta_low, k, widen(0.0, T(0)));
            }
            homogeneous_block<T>(plan, s.block, n, plan.n_suffix == 0, nullptr, 0);
            if (plan.n_suffix) {
                start_rows(plan, p.norm_i, start, n, s.ri);
                start_rows(plan, p.norm_j, start, n, s.rj);
                start_general(s.block, s.ri, s.rj, 1, true, s.general);
                general_block<true>(plan, s.ri, s.rj, 1, n, s.general, nullptr, 0, s.last, s.cov);
            }
            mix_row(plan, {p.theta, p.cov, p.mean, p.last}, s, 0, n, true, value);
            for (int k = 0; k < n; ++k) p.out[start + k] = value[k];
        }
    }
    return !failed;
}

}  // namespace

#define NTK_STRING2(x) #x
#define NTK_STRING(x) NTK_STRING2(x)
extern const Kernels table;
const Kernels table = {NTK_STRING(NTK_ISA), tile<double>,    tile<float>,   pairs<double>,  pairs<float>, squares<double>,
                       squares<float>,      rows,            scalar<double>, scalar<float>, dual,
                       multiply_add<double>, multiply_add<float>, mirror<double>, mirror<float>};

}  // namespace NTK_ISA
}  // namespace ntk

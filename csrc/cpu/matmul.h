// K V without K: a patch of results times columns of V, in float64, while it is in the cache.
//
//   times_rows      sums[k, i] += sum_j K_ij V_jk
//   times_columns   sums[k, j] += sum_i K_ij V_ik: the mirror image of the patch
//
//   cost     2 operations a pair and column, 4 with the mirror image, and one copy of the patch
//   memory   columns x (rows + cols of the call + 4 kPatch) doubles a thread
#pragma once
#include "patch.h"
#include "product.h"

namespace ntk {
namespace {

constexpr int kStrip = 16;                                 // rows taken at a time: 24 kB stay in the L1 cache
constexpr int kDots = kVectorBytes == 64 ? 4 : 2;          // rows whose sums with four columns fit in the registers
constexpr int kSpan = kVectors * kLanes<double>;           // columns of K whose sums do
static_assert(kPatch == kCols && kPatch % kStrip == 0 && kStrip % kDots == 0 && kCols % kSpan == 0, "strips must nest");

NTK_INLINE double total(Lanes<double>::V v) {
    constexpr int n = kLanes<double>;
#pragma GCC unroll 3
    for (int half = n / 2; half >= 1; half /= 2) {
        Lanes<double>::Mask other{};
#pragma GCC unroll 8
        for (int k = 0; k < n; ++k) other[k] = k ^ half;
        v += pick<double>(v, v, other);
    }
    return v[0];
}

// strip (kStrip, kCols), v (C, kCols), sums (C, kPatch) at the first row of the strip
template <int C>
void times_rows(const double* strip, const double* v, double* sums) {
    using V = Lanes<double>::V;
    for (int i = 0; i < kStrip; i += kDots) {
        V sum[kDots][C] = {};
        for (int j = 0; j < kCols; j += kLanes<double>) {
            V right[C];
#pragma GCC unroll 4
            for (int k = 0; k < C; ++k) right[k] = load_lanes(v + k * kCols + j);
#pragma GCC unroll 4
            for (int a = 0; a < kDots; ++a) {
                const V left = load_lanes(strip + (i + a) * kCols + j);
#pragma GCC unroll 4
                for (int k = 0; k < C; ++k) sum[a][k] = fma_lanes(left, right[k], sum[a][k]);
            }
        }
#pragma GCC unroll 4
        for (int a = 0; a < kDots; ++a)
#pragma GCC unroll 4
            for (int k = 0; k < C; ++k) sums[k * kPatch + i + a] += total(sum[a][k]);
    }
}

// v (C, kPatch) at the first row of the strip, sums (C, kCols)
template <int C>
void times_columns(const double* strip, const double* v, double* sums) {
    using V = Lanes<double>::V;
    constexpr int n = kLanes<double>;
    for (int j = 0; j < kCols; j += kSpan) {
        V sum[C][kVectors];
#pragma GCC unroll 4
        for (int k = 0; k < C; ++k)
#pragma GCC unroll 3
            for (int u = 0; u < kVectors; ++u) sum[k][u] = load_lanes(sums + k * kCols + j + u * n);
        for (int i = 0; i < kStrip; ++i) {
            V right[kVectors];
#pragma GCC unroll 3
            for (int u = 0; u < kVectors; ++u) right[u] = load_lanes(strip + i * kCols + j + u * n);
#pragma GCC unroll 4
            for (int k = 0; k < C; ++k) {
                const V left = broadcast(v[k * kPatch + i]);
#pragma GCC unroll 3
                for (int u = 0; u < kVectors; ++u) sum[k][u] = fma_lanes(left, right[u], sum[k][u]);
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < C; ++k)
#pragma GCC unroll 3
            for (int u = 0; u < kVectors; ++u) save_lanes(sums + k * kCols + j + u * n, sum[k][u]);
    }
}

// One thread: the sums of all rows and columns of the call, added to the results when the thread is done.
template <class T>
struct TimesColumns {
    const Matmul m;
    const Index rows, cols, part;  // part: of one of the arrays of a patch
    Pages<double> sums;            // (columns, rows), (columns, cols)
    Pages<double> local;           // (4, columns, kPatch): V of the columns and rows of a patch, sums of its rows and columns
    alignas(64) double strip[kStrip * kCols];

    TimesColumns(const Tile& t, const Matmul& matmul)
        : m(matmul), rows(t.rows), cols(t.cols), part(m.columns * kPatch), sums(m.columns * (rows + cols)), local(4 * part) {
        if (sums.data) __builtin_memset(sums.data, 0, sizeof(double) * std::size_t(m.columns * (rows + cols)));
    }
    ~TimesColumns() {
        if (!ready()) return;
#pragma omp critical
        {
            add(sums.data, rows, rows, m.sums_i, m.sums_stride);
            if (m.sums_j) add(sums.data + m.columns * rows, cols, cols, m.sums_j, m.sums_stride);
        }
    }
    bool ready() const { return sums.data && local.data; }

    // to (columns, stride) += from (columns, from_stride), n of a row
    void add(const double* from, Index from_stride, Index n, double* to, Index stride) const {
        for (Index k = 0; k < m.columns; ++k)
            for (Index i = 0; i < n; ++i) to[k * stride + i] += from[k * from_stride + i];
    }
    // n of every row of V, zeros behind
    void take(const double* v, int n, double* to) const {
        for (Index k = 0; k < m.columns; ++k)
            for (int i = 0; i < kPatch; ++i) to[k * kPatch + i] = i < n ? v[k * m.v_stride + i] : 0.0;
    }
    // Rows of a patch from `start` on in float64; zeros beyond it and below the diagonal, which begins in column `below`.
    void take_strip(const T* results, int start, int n, int width, Index below) {
        for (int i = 0; i < kStrip; ++i) {
            const T* from = results + (start + i) * kCols;
            const int end = start + i < n ? width : 0, first = start + i < n && below + i > 0 ? int(below + i) : 0;
            for (int j = 0; j < kCols; ++j) strip[i * kCols + j] = j >= first && j < end ? double(from[j]) : 0.0;
        }
    }
    template <class Columns4, class Columns1>
    void each(Columns4 four, Columns1 one) const {
        Index k = 0;
        for (; k + 4 <= m.columns; k += 4) four(k * kPatch);
        for (; k < m.columns; ++k) one(k * kPatch);
    }

    // results (n, kCols) of the rows i .. and the columns j .. of the call; below: as in write_patch
    void operator()(const T* results, Index i, Index j, int n, int width, Index below) {
        double *vj = local.data, *vi = vj + part, *sums_i = vi + part, *sums_j = sums_i + part;
        take(m.vj + j, width, vj);
        if (m.sums_j) take(m.vi + i, n, vi);
        __builtin_memset(sums_i, 0, 2 * sizeof(double) * std::size_t(part));
        const bool triangle = m.sums_j && below != INT64_MIN;
        for (int start = 0; start < n; start += kStrip) {
            take_strip(results, start, n, width, triangle ? below + start : INT64_MIN);
            each([&](Index k) { times_rows<4>(strip, vj + k, sums_i + k + start); },
                 [&](Index k) { times_rows<1>(strip, vj + k, sums_i + k + start); });
            if (!m.sums_j) continue;
            // The diagonal is its own mirror image.
            for (int r = 0; triangle && r < kStrip; ++r)
                if (const Index own = below + start + r; own >= 0 && own < kCols) strip[r * kCols + own] = 0.0;
            each([&](Index k) { times_columns<4>(strip, vi + k + start, sums_j + k); },
                 [&](Index k) { times_columns<1>(strip, vi + k + start, sums_j + k); });
        }
        add(sums_i, kPatch, n, sums.data + i, rows);
        if (m.sums_j) add(sums_j, kPatch, width, sums.data + m.columns * rows + j, cols);
    }
};

}  // namespace
}  // namespace ntk

// Angles of close and of nearly opposite pairs from differences (sums) of normalised rows.
//
// 1 - rho formed from an inner product has an absolute error of about eps, so the angle loses half the digits. Here
// 1 - |rho| = |x_i/|x_i| - s x_j/|x_j||^2 / 2, in double for both dtypes.
//
//   cost  few close pairs: one pass over two rows each, about 6 operations a feature. Many (more than 1 in kDense of a
//         block): all pairs of the block from packed rows, 2 operations a feature and pair, no more than that.
#pragma once
#include "block.h"

namespace ntk {

constexpr int kDense = 8;
constexpr int kSlab = 64;  // features packed at a time

struct DifferenceArrays {
    double rows[kRows * kSlab];   // (kRows, kSlab) normalised
    double cols[kSlab * kCols];   // (kSlab, kCols) normalised, transposed
    double sum[kBlock];           // |x_i - s x_j|^2
};

template <class T>
static double pair_difference(const T* a, const T* b, double ai, double bi, std::int64_t dim) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t k = 0; k < dim; ++k) {
        double diff = double(a[k]) * ai - double(b[k]) * bi;
        sum = fma_(diff, diff, sum);
    }
    return sum;
}

// sum[i, j] = |x_i - s x_j|^2 for all pairs of the block.
template <class T>
static void block_differences(const T* x, const T* y, const Points& pi, const Points& pj, const double* inv_i,
                              const double* inv_j, int rows, int cols, std::int64_t dim, double s, DifferenceArrays& d) {
    const int n = (cols + 15) & ~15;
    for (int k = 0; k < kBlock; ++k) d.sum[k] = 0.0;
    for (std::int64_t start = 0; start < dim; start += kSlab) {
        const int size = dim - start < kSlab ? int(dim - start) : kSlab;
        const int padded = (size + 3) & ~3;
        for (int i = 0; i < rows; ++i)
            for (int k = 0; k < padded; ++k)
                d.rows[i * kSlab + k] = k < size ? double(x[i * pi.stride + start + k]) * inv_i[i] : 0.0;
        for (int k = 0; k < padded; ++k)
            for (int j = 0; j < n; ++j)
                d.cols[k * kCols + j] = k < size && j < cols ? double(y[j * pj.stride + start + k]) * (s * inv_j[j]) : 0.0;
        for (int i = 0; i < rows; ++i) {
            double* sum = d.sum + i * kCols;
            for (int k = 0; k < padded; k += 4) {
                const double *a = d.rows + i * kSlab + k, *b = d.cols + k * kCols;
                const double a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
#pragma omp simd
                for (int j = 0; j < n; ++j) {
                    double t0 = a0 - b[j], t1 = a1 - b[j + kCols], t2 = a2 - b[j + 2 * kCols], t3 = a3 - b[j + 3 * kCols];
                    sum[j] = fma_(t3, t3, fma_(t2, t2, fma_(t1, t1, fma_(t0, t0, sum[j]))));
                }
            }
        }
    }
}

// Overwrites x of every pair of the block with x < close; first row and column at (i0, j0) of the tile.
template <class T>
static void close_pairs(const Tile& t, std::int64_t i0, std::int64_t j0, int rows, int cols, Block<T>& b,
                        DifferenceArrays& d) {
    const T limit = T(t.close);
    const double *inv_i = t.i.inv + i0, *inv_j = t.j.inv + j0;
    const T* x = static_cast<const T*>(t.i.x) + i0 * t.i.stride;
    const T* y = static_cast<const T*>(t.j.x) + j0 * t.j.stride;
    for (int side = 1; side >= -1; side -= 2) {
        int count = 0;
        for (int i = 0; i < rows; ++i) {
            const T *bx = b.x + i * kCols, *bs = b.s + i * kCols;
            int found = 0;
#pragma omp simd reduction(+ : found)
            for (int j = 0; j < cols; ++j) found += bx[j] < limit && bs[j] * T(side) > T(0) ? 1 : 0;
            count += found;
        }
        if (count == 0) continue;
        const bool dense = std::int64_t(count) * kDense > std::int64_t(rows) * cols;
        if (dense) block_differences(x, y, t.i, t.j, inv_i, inv_j, rows, cols, t.dim, double(side), d);
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < cols; ++j) {
                const int at = i * kCols + j;
                if (!(b.x[at] < limit && b.s[at] * T(side) > T(0))) continue;
                double sum = dense ? d.sum[at]
                                   : pair_difference(x + i * t.i.stride, y + j * t.j.stride, inv_i[i], side * inv_j[j], t.dim);
                store(b.x, b.x_low, at, widen(0.5 * sum, T(0)));
            }
    }
}

}  // namespace ntk

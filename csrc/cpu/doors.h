// Small jobs beside the tiles: squared norms, the row recursion by itself, element-wise doors for the tests.
#pragma once
#include "../math/sums.h"
#include "general.h"

namespace ntk {

// Squared norms and largest entries of rows, infinity for rows that are not finite; in one pass, of 16 partial sums.
template <class T>
static void squares(const T* x, std::int64_t n, std::int64_t d, std::int64_t stride, double* out, double* largest) {
#pragma omp parallel for if (n * d > kAlone)
    for (std::int64_t i = 0; i < n; ++i) {
        const T* row = x + i * stride;
        double sum[16] = {}, low[16] = {};
        T most[16] = {}, wrong[16] = {};
        auto fold = [&](const T* v) {
#pragma omp simd
            for (int k = 0; k < 16; ++k) {
                const T a = abs_(v[k]);
                most[k] = a > most[k] ? a : most[k];
                wrong[k] += v[k] - v[k];  // 0 or NaN
                add_square(sum[k], low[k], double(v[k]));
            }
        };
        std::int64_t k = 0;
        for (; k + 16 <= d; k += 16) fold(row + k);
        T rest[16];
        for (int m = 0; m < 16; ++m) rest[m] = k + m < d ? row[k + m] : T(0);
        fold(rest);
        double total = 0.0, error = 0.0;
        for (int m = 0; m < 16; ++m) {
            add_twofold(total, error, sum[m], low[m]);
            most[0] = most[m] > most[0] ? most[m] : most[0];
            wrong[0] += m ? wrong[m] : T(0);
        }
        out[i] = total + error;
        largest[i] = wrong[0] == T(0) ? double(most[0]) : from_bits(0x7ff0000000000000LL);
    }
}

static bool rows(const GeneralLayer& l, const HermiteTable* tables, std::int64_t n, double* var, double* mean, double* q) {
    const std::size_t terms = l.table >= 0 ? std::size_t(tables[l.table].evens + tables[l.table].odds) : 0;
    Buffer<RowArrays> a(1);
    Buffer<double> coefficients(terms * kCols);
    if (!a.data || !coefficients.ready()) return false;
    a.data->hermite = coefficients.data;
    for (std::int64_t start = 0; start < n; start += kCols) {
        const int size = n - start < kCols ? int(n - start) : kCols;
        for (int k = 0; k < size; ++k) a.data->var[k] = var[start + k], a.data->mean[k] = mean[start + k];
        advance_rows(l, tables, *a.data, size);
        for (int k = 0; k < size; ++k)
            var[start + k] = a.data->next_var[k], mean[start + k] = a.data->next_mean[k], q[start + k] = a.data->q[k];
    }
    return true;
}

template <class T, class F>
static void each(std::int64_t n, const T* x, T* out, F f) {
#pragma omp simd
    for (std::int64_t k = 0; k < n; ++k) out[k] = f(x[k]);
}
template <class T>
static void scalar(int id, std::int64_t n, const T* x, T* out) {
    switch (id) {
        case kTheta0: return each(n, x, out, [](T v) { return arc<0>(v).theta; });
        case kTheta1: return each(n, x, out, [](T v) { return arc<1>(v).theta; });
        case kTheta2: return each(n, x, out, [](T v) { return arc<2>(v).theta; });
        case kArea0: return each(n, x, out, [](T v) { return arc<0>(v).area; });
        case kArea1: return each(n, x, out, [](T v) { return arc<1>(v).area; });
        case kArea2: return each(n, x, out, [](T v) { return arc<2>(v).area; });
        case kExpId: return each(n, x, out, [](T v) { return T(exp_(double(v))); });
        default: return each(n, x, out, [](T v) { return T(expm1_(double(v))); });
    }
}

static bool dual(const GeneralLayer& l, const HermiteTable* tables, std::int64_t n, const double* a, const double* b,
          const double* x, const double* s, double* w, double* d, double* side) {
    const std::size_t terms = l.table >= 0 ? std::size_t(tables[l.table].evens + tables[l.table].odds) : 0;
    Buffer<GeneralArrays> g(1);
    Buffer<RowArrays> r(2);
    Buffer<double> coefficients(2 * terms * kCols);
    if (!g.data || !r.data || !coefficients.ready()) return false;
    r.data[0].hermite = coefficients.data;
    r.data[1].hermite = coefficients.data + terms * kCols;
    for (std::int64_t start = 0; start < n; start += kCols) {
        const int size = n - start < kCols ? int(n - start) : kCols;
        for (int k = 0; k < kCols; ++k) {
            r.data[0].var[k] = k < size ? a[start + k] : 0.0, r.data[1].var[k] = k < size ? b[start + k] : 0.0;
            r.data[0].mean[k] = r.data[1].mean[k] = 0.0;
            g.data->lx[k] = k < size ? x[start + k] : 0.0, g.data->ls[k] = k < size ? s[start + k] : 1.0;
        }
        advance_rows(l, tables, r.data[0], kCols);
        advance_rows(l, tables, r.data[1], kCols);
        expectations<true>(l, tables, r.data[0], r.data[1], 0, kCols, *g.data);
        for (int k = 0; k < size; ++k) w[start + k] = g.data->w[k], d[start + k] = g.data->d[k], side[start + k] = g.data->side[k];
    }
    return true;
}

}  // namespace ntk

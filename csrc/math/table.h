// A kernel of one variable, compiled: a polynomial on each of a few panels, found by bins of y.
#pragma once
#include "portable.h"

namespace ntk {

// Shape of a table: as many panels as two AVX-512 registers hold, so that a coefficient is one shuffle. Fully connected and
// residual networks of up to a thousand layers need at most `terms` coefficients a panel for 1e-14 (1e-7), many need `few`.
template <class T>
struct TableShape;
template <>
struct TableShape<double> {
    static constexpr int panels = 16, few = 13, terms = 15, row = 16;
};
template <>
struct TableShape<float> {
    static constexpr int panels = 32, few = 5, terms = 6, row = 8;
};

constexpr int kTableBins = 64;  // on each side, rho >= 0 and rho < 0

// f(rho) = sum_k c[k][p] (y - centre[p])^k,  y = sqrt(x),  x = 1 - |rho|,  p the panel of the bin of y.
// The bins are graded: 2^-n-th parts of the octaves of y + delta, so that they get finer towards |rho| = 1.
template <class T>
struct alignas(64) Table {
    using Shape = TableShape<T>;
    T c[Shape::terms][Shape::panels];  // by power, for shuffles
    T row[Shape::panels][Shape::row];  // by panel, zeros at the end, for row loads
    T centre[Shape::panels];
    unsigned char panel[2 * kTableBins];
    T delta;
    int shift;  // bits of y + delta to be dropped
    int terms;  // used, Shape::few or Shape::terms
};

// Consecutive numbers k, at most kTableBins of them, and the same with one bit flipped for rho < 0: no two meet modulo
// 2 kTableBins. The mask keeps a NaN inside the table; y - centre is NaN all the same.
template <class T>
NTK_INLINE int table_bin(const Table<T>& t, T y, bool negative) {
    return int((bits(y + t.delta) >> t.shift) ^ (negative ? kTableBins : 0)) & (2 * kTableBins - 1);
}

// The compiled kernel of a pair with 1 - |rho| = x.
//   domain  0 <= x <= 1, NaN stays NaN
//   error   what the compiler of the table verified (csrc/table_compiler.h), relative to max |f|
template <class T>
NTK_INLINE T table_value(const Table<T>& t, T x, bool negative) {
    const T y = sqrt_(x);
    const int p = t.panel[table_bin(t, y, negative)];
    const T h = y - t.centre[p];
    T value = t.c[t.terms - 1][p];
    for (int k = t.terms - 2; k >= 0; --k) value = fma_(value, h, t.c[k][p]);
    return value;
}

}  // namespace ntk

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
// Numbers that all panels have in one place lie side by side: in the shared memory of a GPU they are 128 bytes, every bank
// once, and so are the bytes of the bins: look-ups of a warp never conflict.
template <class T>
struct TablePanels {
    using Shape = TableShape<T>;
    T c[Shape::terms][Shape::panels];  // by power
    T centre[Shape::panels];
    unsigned char panel[2 * kTableBins];
    T delta;
    int shift;  // bits of y + delta to be dropped
    int terms;  // used, Shape::few or Shape::terms
};

// The same for the CPU, whose shuffles and row loads want it aligned.
template <class T>
struct alignas(64) Table : TablePanels<T> {
    using Shape = TableShape<T>;
    alignas(64) T row[Shape::panels][Shape::row];  // c by panel, zeros at the end, for row loads
};

// Consecutive numbers k, at most kTableBins of them, and the same with one bit flipped for rho < 0: no two meet modulo
// 2 kTableBins. The mask keeps a NaN inside the table; y - centre is NaN all the same.
template <class T>
NTK_INLINE int table_bin(const TablePanels<T>& t, T y, bool negative) {
    return int((bits(y + t.delta) >> t.shift) ^ (negative ? kTableBins : 0)) & (2 * kTableBins - 1);
}

// The compiled kernel of a pair with 1 - |rho| = x; TERMS is t.terms.
//   domain  0 <= x <= 1, NaN stays NaN
//   error   what the compiler of the table verified (csrc/table_compiler.h), relative to |f|, or to max |f| / 10
//   cost    from memory: TERMS coefficients, a centre, a byte; one square root
template <int TERMS, class T>
NTK_INLINE T table_value(const TablePanels<T>& t, T x, bool negative) {
    const T y = sqrt_(x);
    const int p = t.panel[table_bin(t, y, negative)];
    const T h = y - t.centre[p];
    T value = t.c[TERMS - 1][p];
    NTK_UNROLL
    for (int k = TERMS - 2; k >= 0; --k) value = fma_(value, h, t.c[k][p]);
    return value;
}

}  // namespace ntk

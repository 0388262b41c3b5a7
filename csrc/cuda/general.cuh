// Layers with biases or without homogeneity over a block, one pair a thread, in double.
//
//   rows    the first 2 SIDE threads carry the row recursion of one row or column each and publish its numbers before
//           every layer, in one of two buffers: one barrier a layer, nothing grows with depth
//   terms   Hermite coefficients of rows of different variance go through shared memory kTerms at a time
#pragma once
#include "homogeneous.cuh"

namespace ntk {

constexpr int kTerms = 16;

// Numbers of the SIDE rows, then of the SIDE columns of a block, for one layer.
template <int SIDE>
struct LayerRows {
    double lam[2 * SIDE], root[2 * SIDE], inv[2 * SIDE], q[2 * SIDE], mu[2 * SIDE];
    double a1[2 * SIDE], a2[2 * SIDE], a3[2 * SIDE];
    double norm[2 * SIDE], mean[2 * SIDE], next_norm[2 * SIDE], next_inv[2 * SIDE], next_mean[2 * SIDE];
};
template <int SIDE>
struct GeneralMemory {
    LayerRows<SIDE> rows[2];
    HermitePlace places[2 * SIDE];
    double terms[kTerms][2 * SIDE];
};

// The row of a thread before a layer: sqrt(S_ii), S_ii, mean.
using RowOfThread = RowStart;

template <int SIDE>
__device__ __forceinline__ RowNumbers row_numbers(const LayerRows<SIDE>& m, int r) {
    return {m.lam[r], m.root[r], m.inv[r], m.q[r], m.mu[r], m.a1[r], m.a2[r], m.a3[r]};
}
template <int SIDE>
__device__ __forceinline__ PointState point_state(const LayerRows<SIDE>& m, int r) {
    return {m.norm[r], m.mean[r], m.next_norm[r], m.next_inv[r]};
}
template <int SIDE>
__device__ __forceinline__ void publish(LayerRows<SIDE>& m, int r, const RowNumbers& n, const RowOfThread& row) {
    m.lam[r] = n.lam, m.root[r] = n.root, m.inv[r] = n.inv, m.a1[r] = n.a1, m.a2[r] = n.a2, m.a3[r] = n.a3;
    m.norm[r] = row.norm, m.mean[r] = row.mean;
}
// Q and mu are known: the state after the layer.
template <int SIDE>
__device__ __forceinline__ void advance(const GeneralLayer& l, LayerRows<SIDE>& m, int r, double q, double mu,
                                        RowOfThread& row) {
    const RowState next = advance_row(l, {row.var, row.mean}, q, mu);
    const RowNumbers n = make_row(next.var);
    m.q[r] = q, m.mu[r] = mu, m.next_norm[r] = n.root, m.next_inv[r] = n.inv, m.next_mean[r] = next.mean;
    row = {n.root, next.var, next.mean};
}

__device__ __forceinline__ RowNumbers activation_row(const GeneralLayer& l, const HermiteTable* tables, double lam) {
    switch (l.activation) {
        case kHomogeneous: return Homogeneous{l.slope}.row(lam);
        case kErf: return Erf{}.row(lam);
        case kGaussian: return Gaussian{}.row(lam);
        case kExp: return Exp{}.row(lam);
        case kSin: return Sin{}.row(lam);
        case kCos: return Cos{}.row(lam);
        case kGelu: return Gelu{}.row(lam);
        default: break;
    }
    RowNumbers r = make_row(lam);
    r.q = tables[l.table].even_sum + tables[l.table].odd_sum;
    r.mu = tables[l.table].mean;
    return r;
}

// One variance for all rows: four Horner polynomials in rho^2.
__device__ __forceinline__ PairNumbers uniform_pair(const HermiteTable& t, Correlation c) {
    const double r2 = (1.0 - c.x) * (1.0 - c.x);
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    for (int m = t.evens - 1; m >= 0; --m)
        sums[0] = fma_(sums[0], r2, t.even_defect[m]), sums[1] = fma_(sums[1], r2, t.even_derivative[m]);
    for (int m = t.odds - 1; m >= 0; --m)
        sums[2] = fma_(sums[2], r2, t.odd_defect[m]), sums[3] = fma_(sums[3], r2, t.odd_derivative[m]);
    return hermite_pair(c.x, c.s, hermite_side(t, c.s), sums[0], sums[1], sums[2], sums[3], t.even_sum, t.odd_sum);
}

__device__ __forceinline__ PairNumbers activation_pair(const GeneralLayer& l, const HermiteTable* tables,
                                                       const RowNumbers& i, const RowNumbers& j, Correlation c) {
    switch (l.activation) {
        case kHomogeneous: return Homogeneous{l.slope}.pair(i, j, c.x, c.s);
        case kErf: return Erf{}.pair(i, j, c.x, c.s);
        case kGaussian: return Gaussian{}.pair(i, j, c.x, c.s);
        case kExp: return Exp{}.pair(i, j, c.x, c.s);
        case kSin: return Sin{}.pair(i, j, c.x, c.s);
        case kCos: return Cos{}.pair(i, j, c.x, c.s);
        case kGelu: return Gelu{}.pair(i, j, c.x, c.s);
        default: return uniform_pair(tables[l.table], c);
    }
}

// Coefficient `term` of a row; a row of variance 0 has s(0) and nothing else.
__device__ __forceinline__ double hermite_coefficient(const HermiteTable& t, const HermitePlace& place, double lam, int term) {
    if (lam == 0.0) return term == 0 && t.evens > 0 ? t.mean : 0.0;
    return chebyshev(place.coefficients + i64(term) * t.order, t.order, place.y);
}

// Rows of different variance: the terms pass through shared memory; Q and mu of the rows come out on the way.
// All threads call this after the rows were published; it ends with a barrier.
template <int SIDE>
__device__ __forceinline__ PairNumbers panel_pair(const GeneralLayer& l, const HermiteTable& t, GeneralMemory<SIDE>& memory,
                                                  LayerRows<SIDE>& m, int i, int j, Correlation c, RowOfThread& row) {
    const int thread = int(threadIdx.x), threads = int(blockDim.x), count = t.evens + t.odds;
    const double side = hermite_side(t, c.s), r2 = (1.0 - c.x) * (1.0 - c.x), u = c.x * (2.0 - c.x);
    HermiteSum sum{0.0, 0.0, 0.0, 0.0, 0.0};
    double even = 0.0, q = 0.0, first = 0.0;
    for (int start = 0; start < count; start += kTerms) {
        const int size = count - start < kTerms ? count - start : kTerms;
        for (int at = thread; at < size * 2 * SIDE; at += threads) {
            const int r = at % (2 * SIDE), k = at / (2 * SIDE);
            memory.terms[k][r] = hermite_coefficient(t, memory.places[r], m.lam[r], start + k);
        }
        __syncthreads();
        for (int k = 0; k < size; ++k) {
            const int term = start + k;
            if (thread < 2 * SIDE) {
                const double a = memory.terms[k][thread];
                q = fma_(a, a, q);
                first = term == 0 ? a : first;
            }
            if (term == t.evens) even = sum.d, sum.d = 0.0, sum.e = 0.0, sum.before = 0.0;
            const double ai = memory.terms[k][i], aj = memory.terms[k][j];
            if (term < t.evens) hermite_even(sum, ai, aj, 2.0 * term, side, r2, u);
            else hermite_odd(sum, ai, aj, 2.0 * (term - t.evens) + 1.0, c.x, c.s, r2, u);
        }
        __syncthreads();
    }
    if (t.odds == 0) even = sum.d, sum.d = 0.0;
    if (thread < 2 * SIDE) advance(l, m, thread, q, t.evens > 0 ? first : 0.0, row);
    __syncthreads();
    return {sum.w, hermite_derivative(even, sum.d, c.x, c.s, m.inv[i], m.inv[j]), side, sum.q, -1.0};
}

// One layer; `h` counts the layers. All threads of the block call this.
template <int SIDE>
__device__ __forceinline__ GeneralTerms general_layer(const DevicePlan& plan, int h, GeneralMemory<SIDE>& memory, int i, int j,
                                                      GeneralState& state, RowOfThread& row) {
    const GeneralLayer& l = plan.suffix[h];
    LayerRows<SIDE>& m = memory.rows[h % 2];
    const bool panels = l.activation == kHermite && plan.tables[l.table].panels > 0;
    const int thread = int(threadIdx.x);
    if (thread < 2 * SIDE) {
        const RowNumbers n = activation_row(l, plan.tables, fma_(l.cw, row.var, l.cb));
        publish(m, thread, n, row);
        if (panels) memory.places[thread] = hermite_place(plan.tables[l.table], n.root);
        else advance(l, m, thread, n.q, n.mu, row);
    }
    __syncthreads();
    // Q and mu of the rows are there only after panel_pair.
    const Correlation c = correlation(l, state.x, state.s, m.norm[i], m.norm[j], row_numbers(m, i), row_numbers(m, j));
    const PairNumbers u = panels ? panel_pair(l, plan.tables[l.table], memory, m, i, j, c, row)
                                 : activation_pair(l, plan.tables, row_numbers(m, i), row_numbers(m, j), c);
    return general_step(l, state, u, row_numbers(m, i), row_numbers(m, j), point_state(m, i), point_state(m, j));
}

// Rows and state before the suffix: Theta gets its norms back. The rows beyond the tile are zero rows.
template <class T, int SIDE>
__device__ __forceinline__ RowOfThread start_general(const Job& job, const Block<SIDE, 1>& b, const PairState<T>& pair,
                                                     GeneralState& state) {
    const double root = sqrt_(job.plan.nu);
    const double ni = b.row < b.rows ? job.i.norm[b.i0 + b.row] : 0.0, nj = b.col < b.cols ? job.j.norm[b.j0 + b.col] : 0.0;
    state = {whole(pair.x), double(pair.s), whole(pair.theta) * (root * ni) * (root * nj)};
    const int thread = int(threadIdx.x);
    double mine = 0.0;
    if (thread < SIDE) mine = thread < b.rows ? job.i.norm[b.i0 + thread] : 0.0;
    else if (thread < 2 * SIDE) mine = thread - SIDE < b.cols ? job.j.norm[b.j0 + thread - SIDE] : 0.0;
    return start_row(job.plan.nu, job.plan.beta, mine);
}

}  // namespace ntk

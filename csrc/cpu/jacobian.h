// Jacobian inner products: out_ij (+)= sum over positions l, r of P_(il)(jr) Q_(il)(jr), the tile of one layer.
//
//   P = A A'^T and Q = D D'^T come from the BLAS, tile by tile, and are consumed here while they are in cache.
//   parallel   not at all: about one part in a hundred of the products' time, and a second pool of threads, spinning
//              between the calls, would cost the BLAS more
//   cost       4 flops and 3 loads per entry of P; bound by the cache
#pragma once
#include "block.h"

namespace ntk {

// Rows and columns of a mirrored square: its transpose stays in the L1 cache.
constexpr std::int64_t kSquare = 32;

template <class T>
static void multiply_add_row(const T* p, const T* q, std::int64_t cols, bool first, T* out) {
    if (first) {
#pragma omp simd
        for (std::int64_t j = 0; j < cols; ++j) out[j] = p[j] * q[j];
        return;
    }
#pragma omp simd
    for (std::int64_t j = 0; j < cols; ++j) out[j] += p[j] * q[j];
}

// Several positions of j side by side: their products are summed in the order of the lanes.
template <class T>
static void multiply_add_positions(const T* p, const T* q, std::int64_t cols, std::int64_t positions, bool first, T* out) {
    for (std::int64_t j = 0; j < cols; ++j) {
        const T *pj = p + j * positions, *qj = q + j * positions;
        T sum = T(0);
#pragma omp simd reduction(+ : sum)
        for (std::int64_t r = 0; r < positions; ++r) sum += pj[r] * qj[r];
        out[j] = first ? sum : out[j] + sum;
    }
}

template <class T>
static void add_row(const T* p, std::int64_t cols, bool first, T* out) {
#pragma omp simd
    for (std::int64_t j = 0; j < cols; ++j) out[j] = first ? p[j] : out[j] + p[j];
}

template <class T>
static void multiply_add(const MultiplyAdd& m) {
    const T *p = static_cast<const T*>(m.p), *q = static_cast<const T*>(m.q);
    T* out = static_cast<T*>(m.out);
    for (std::int64_t i = 0; i < m.rows; ++i)
        for (std::int64_t l = 0; l < m.positions_i; ++l) {
            const std::int64_t row = i * m.positions_i + l;
            const bool first = m.first && l == 0;
            T* to = out + i * m.stride;
            if (!q) add_row(p + row * m.p_stride, m.cols, first, to);
            else if (m.positions_j == 1) multiply_add_row(p + row * m.p_stride, q + row * m.q_stride, m.cols, first, to);
            else multiply_add_positions(p + row * m.p_stride, q + row * m.q_stride, m.cols, m.positions_j, first, to);
        }
}

// to = from^T; with `below` only the entries below the diagonal, from and to being one square.
template <class T>
static void mirror(const T* from, std::int64_t rows, std::int64_t cols, std::int64_t from_stride, T* to,
                   std::int64_t to_stride, bool below) {
    for (std::int64_t i0 = 0; i0 < rows; i0 += kSquare)
        for (std::int64_t j0 = below ? i0 : 0; j0 < cols; j0 += kSquare) {
            const std::int64_t i1 = i0 + kSquare < rows ? i0 + kSquare : rows;
            const std::int64_t j1 = j0 + kSquare < cols ? j0 + kSquare : cols;
            for (std::int64_t j = j0; j < j1; ++j) {
                const std::int64_t end = below && j < i1 ? j : i1;
                for (std::int64_t i = i0; i < end; ++i) to[j * to_stride + i] = from[i * from_stride + j];
            }
        }
}

}  // namespace ntk

// Bias-free convolutional networks with a positively homogeneous activation (the twin of ../cpu/conv_fast.h): planes E and M
// in the type of the results, strips of four rows.
//
//   cost      a position and layer, window of 3 x 3: 16 operations of the windows, the two fits and a square root; 11 accesses of
//             shared memory, 3 of global memory. 21 layers of 32 x 32 are 21,504 such steps a pair, 1024 times as many for pooled
//             kernels
//   multiples planes on which patches are multiples of each other, of different norms, are left to conv_exact.cuh
//   numbers   root and inverse of both images, 16 bytes a position and layer, from the caches: pairs come in squares of images
#pragma once
#include "conv.cuh"

namespace ntk {

// The numbers of a layer of an image: roots and inverses (positions, 2), then half variances, their sums over the columns of the
// window, means (positions,) each, read where there are seams or the layer is scaled.
template <class T>
struct RootsOf;
template <>
struct RootsOf<float> {
    using type = float2;
};
template <>
struct RootsOf<double> {
    using type = double2;
};
template <class T>
using Roots = typename RootsOf<T>::type;

// Windows of 3 x 3 over a strip. A window does not reach from one side of a seam (the border of either image) to the other:
// the columns left and right of the strip, and rows one below the other, are joined (1) or not (0). SEAMS: there are seams
// within the images, beside which E (in the first layer F too) takes half variances of one image. No branches but those all
// threads take together: the positions of a strip overlap in time.
template <bool SEAMS, bool FIRST, int ROWS, class T>
struct StripWindows {
    const ConvJob& job;
    const ConvShift s;
    const Strip p;
    const ConvHalves<T>& half;
    int left, right, other_column;  // offsets of the neighbours
    T join_left, join_right;

    __device__ __forceinline__ StripWindows(const ConvJob& job_, ConvShift s_, const Strip& p_, const ConvHalves<T>& half_)
        : job(job_), s(s_), p(p_), half(half_) {
        const int c = p.column, last = job.width - 1, seam = SEAMS ? job.width - s.x : 0;
        left = c > 0 ? -1 : job.circular ? last : 0;
        right = c < last ? 1 : job.circular ? -last : 0;
        other_column = SEAMS ? partner(c, s.x, job.width) : 0;
        join_left = T(bool(job.circular) | ((c > 0) & (c != seam)));
        join_right = T(bool(job.circular) | ((c < last) & (c + 1 != seam)));
    }
    // Between rows r - 1 and r.
    __device__ __forceinline__ bool joined(int r) const {
        return bool(job.circular) | ((r > 0) & (r < job.height) & (!SEAMS | (r != job.height - s.y)));
    }
    // Row r, or what stands for the row before the first and those after the last.
    __device__ __forceinline__ int row(int r) const {
        const int after = job.circular ? 0 : job.height - 1, before = job.circular ? job.height - 1 : 0;
        const int inner = r < job.height ? r : after;
        return r < 0 ? before : inner;
    }
    __device__ __forceinline__ T columns(const T* plane, int at) const {
        return fma_(join_right, plane[at + right], fma_(join_left, plane[at + left], plane[at]));
    }
    static __device__ __forceinline__ T load_if(bool wanted, const T* from) { return wanted ? __ldg(from) : T(0); }
    // Columns beside rows first_row .. first_row + LINES - 1 that lie in one image only: beside a seam in the first, beside the border of
    // the first in the second. Few lanes have any, and those one.
    template <int LINES>
    __device__ __forceinline__ void columns_fill(int first_row, T (&sum)[LINES]) const {
#pragma unroll
        for (int k = 0; k < LINES; ++k) sum[k] = T(0);
        if (SEAMS && s.x != 0) {
            beside_fill(-1, first_row, sum);
            beside_fill(1, first_row, sum);
        }
    }
    template <int LINES>
    __device__ __forceinline__ void beside_fill(int side, int first_row, T (&sum)[LINES]) const {
        if ((side < 0 ? join_left : join_right) != T(0)) return;
        const bool first = inside(p.column + side, job.width);
        const T* from = (first ? half.i : half.j) + side;
#pragma unroll
        for (int k = 0; k < LINES; ++k) {
            const int r = row(first_row + k);
            sum[k] += __ldg(from + (first ? r * job.width + p.column : partner(r, s.y, job.height) * job.width + other_column));
        }
    }
    // Row r + d beside row r, summed over its columns.
    __device__ __forceinline__ T row_fill(bool wanted, int r, int d) const {
        const T* from = inside(r + d, job.height) ? half.sum_i + (r + d) * job.width + p.column
                                                  : half.sum_j + (partner(r, s.y, job.height) + d) * job.width + other_column;
        return load_if(wanted, from);
    }
    // Row r of E and M, summed over columns; in the first layer M is F.
    __device__ __forceinline__ FastState<T> line(const T* E, const T* M, int r, T fill) const {
        const int at = row(r) * job.width + p.column;
        const T e = columns(E, at), m = columns(M, at);
        return {SEAMS ? e + fill : e, SEAMS && FIRST ? m + fill : m};
    }
    // result(k, sums) for the positions of the strip and those after the last row (which nobody wants), TOGETHER at a time.
    template <int TOGETHER, class Result>
    __device__ __forceinline__ void each(const T* E, const T* M, Result result) const {
        // All at once where the loop is unrolled: its index is a number then.
        constexpr int lines = TOGETHER == ROWS ? ROWS + 2 : 2;
        T fill[lines];
        columns_fill(p.row - 1, fill);
        FastState<T> above = line(E, M, p.row - 1, fill[0]), here = line(E, M, p.row, fill[1]);
#pragma unroll TOGETHER
        for (int k = 0; k < ROWS; ++k) {
            const int r = p.row + k;
            T next[1];
            if (lines == 2) columns_fill(r + 1, next);
            else next[0] = fill[lines == 2 ? 0 : k + 2];
            const FastState<T> below = line(E, M, r + 1, next[0]);
            const bool up = joined(r), down = joined(r + 1);
            const T a = T(up), b = T(down);
            FastState<T> sum = {fma_(a, above.e, fma_(b, below.e, here.e)), fma_(a, above.m, fma_(b, below.m, here.m))};
            if (SEAMS && s.y != 0) {
                const T one = row_fill(!up && k < p.rows, r, -1) + row_fill(!down && k < p.rows, r, 1);
                sum.e += one, sum.m += FIRST ? one : T(0);
            }
            result(k, sum);
            above = here, here = below;
        }
    }
};

template <class T, bool SEAMS>
struct ConvFast {
    using Number = T;
    static constexpr int kPlanes = 2, kRows = 16 / int(sizeof(T));
    const ConvJob& job;
    ConvMemory& memory;
    const int i, j;

    __device__ __forceinline__ int positions() const { return job.height * job.width; }
    __device__ __forceinline__ const T* numbers(const ConvSide& side, int image, int h) const {
        return static_cast<const T*>(side.numbers) + (i64(image) * job.n_layers + h) * job.layer_size;
    }
    // Rows after the last one are the last one.
    __device__ __forceinline__ int row(const Strip& p, int k) const { return k < p.rows ? p.row + k : p.row + p.rows - 1; }
    __device__ __forceinline__ int at(const Strip& p, int k) const { return row(p, k) * job.width + p.column; }
    __device__ __forceinline__ int other(ConvShift s, const Strip& p, int k) const {
        return partner(row(p, k), s.y, job.height) * job.width + partner(p.column, s.x, job.width);
    }
    // E and F of the images themselves, in the first unit: squares as they are.
    __device__ __forceinline__ void start(ConvShift s, const Strip& p, T* to) const {
        const int size = positions();
#pragma unroll 1
        for (int k = 0; k < p.rows; ++k) {
            const int a = at(p, k), b = other(s, p, k);
            const T *xi = static_cast<const T*>(job.i.x) + i64(i) * job.channels * size;
            const T *xj = static_cast<const T*>(job.j.x) + i64(j) * job.channels * size;
            FastState<T> state = {T(0), T(0)};
#pragma unroll 1
            for (int c = 0; c < job.channels; ++c) state = fast_channel(state, __ldg(xi + c * size + a), __ldg(xj + c * size + b));
            to[a] = state.e, to[size + a] = state.m;
        }
    }
    // Whether digits were lost.
    template <bool FIRST, bool SCALED>
    __device__ __forceinline__ bool step(int h, const ConvLayer<T>& layer, ConvShift s, const Strip& p, const T* from, T* to) const {
        const int size = positions();
        const T *ni = numbers(job.i, i, h), *nj = numbers(job.j, j, h), *half_i = ni + 2 * size, *half_j = nj + 2 * size;
        const ConvHalves<T> half = {half_i, half_j, half_i + size, half_j + size};
        const bool last = h + 1 == job.n_layers;
        FastState<T> sum = {T(0), T(0)};
        T own = T(0), watch = T(0);
        auto position = [&](int k, FastState<T> w) {
            const int x = at(p, k), y = other(s, p, k);
            const Roots<T> a = __ldg(reinterpret_cast<const Roots<T>*>(ni) + x), b = __ldg(reinterpret_cast<const Roots<T>*>(nj) + y);
            FastPoint<T> one = {a.x, a.y, T(0), T(0)}, two = {b.x, b.y, T(0), T(0)};
            FastState<T> before = {T(0), T(0)};
            if (SCALED) {
                before = {from[x], from[size + x]};
                one.mean = __ldg(half_i + 2 * size + x), two.mean = __ldg(half_j + 2 * size + y);
                if (last) one.half = __ldg(half_i + x), two.half = __ldg(half_j + y);
            }
            const FastResult<T> r = fast_step<FIRST, SCALED>(layer.numbers, layer.trained, w, before, one, two);
            const bool exists = k < p.rows;
            if (FIRST) watch = exists ? at_least(watch, r.watch) : watch;
            sum.m += exists ? r.state.m : T(0), sum.e += exists ? r.s : T(0), own += exists ? r.own : T(0);
            if (exists) to[x] = r.state.e, to[size + x] = r.state.m;
        };
        if (job.reach_y == 1 && job.reach_x == 1) {
            constexpr int together = SCALED ? 2 : kRows;  // as many as the registers hold
            StripWindows<SEAMS, FIRST, kRows, T>(job, s, p, half).template each<together>(from, from + size, position);
        } else {
#pragma unroll 1
            for (int k = 0; k < p.rows; ++k) {
                T w[kPlanes];
                any_window(job, s, p.row + k, p.column, from, FIRST ? 2 : 1, half, w);
                position(k, {w[0], w[1]});
            }
        }
        const bool lost = FIRST && job.watched && watch > T(least_loss(T(0)));
        if (!last) return lost;
        const int t = int(threadIdx.x);
        memory.total[0][t] += double(sum.m), memory.total[1][t] += double(sum.e), memory.total[2][t] += double(own);
        return lost;
    }
    __device__ __forceinline__ bool layer(int h, ConvShift s, const Strip& p, const T* from, T* to) const {
        const ConvLayer<T>& layer = static_cast<const ConvLayer<T>*>(job.fast)[h];
        if (h == 0) return layer.scaled ? step<true, true>(h, layer, s, p, from, to) : step<true, false>(h, layer, s, p, from, to);
        return layer.scaled ? step<false, true>(h, layer, s, p, from, to) : step<false, false>(h, layer, s, p, from, to);
    }
    __device__ __forceinline__ double unit() const { return static_cast<const ConvLayer<T>*>(job.fast)[job.n_layers - 1].after; }
    __device__ __forceinline__ void finish(const ConvGroup&, T*, T*) const {}
};

}  // namespace ntk

// Planes on which patches are multiples of each other, of different norms, done again (the twin of ../cpu/conv_exact.h): planes
// n - C and M, the pairs, planes and strips of conv_fast.cuh. Without skips only.
//
//   norms     of the positions, at every slot of the windows: roots of half variances before the first layer, then the roots
//             that the layer before keeps
//   cost      any window slot by slot, 36 accesses of memory a position and layer for 3 x 3, half of them of norms from the caches:
//             several times that of conv_fast.cuh
#pragma once
#include "conv_fast.cuh"

namespace ntk {

// Row or column of an image, -1 outside.
__device__ __forceinline__ int within(const ConvJob& job, int at, int n) {
    if (!job.circular) return inside(at, n) ? at : -1;
    while (at < 0) at += n;
    while (at >= n) at -= n;
    return at;
}

template <class T>
struct ConvExact : ConvFast<T, false> {
    __device__ __forceinline__ const ConvLayer<T>& number(int h) const { return static_cast<const ConvLayer<T>*>(this->job.fast)[h]; }
    __device__ __forceinline__ const T* halves(const ConvSide& side, int image) const {
        return this->numbers(side, image, 0) + 2 * this->positions();
    }
    // n - C and n + C of the images themselves.
    __device__ __forceinline__ void start(ConvShift s, const Strip& p, T* to) const {
        const ConvJob& job = this->job;
        const int size = this->positions();
        const T *xi = static_cast<const T*>(job.i.x) + i64(this->i) * job.channels * size;
        const T *xj = static_cast<const T*>(job.j.x) + i64(this->j) * job.channels * size;
#pragma unroll 1
        for (int k = 0; k < p.rows; ++k) {
            const int a = this->at(p, k), b = this->other(s, p, k);
            const T norm_i = sqrt_(__ldg(halves(job.i, this->i) + a)), norm_j = sqrt_(__ldg(halves(job.j, this->j) + b));
            FastState<T> state = {T(0), T(0)};
#pragma unroll 1
            for (int c = 0; c < job.channels; ++c)
                state = exact_channel(state, __ldg(xi + c * size + a), norm_i, __ldg(xj + c * size + b), norm_j);
            to[a] = state.e, to[size + a] = state.m;
        }
    }
    template <bool FIRST>
    __device__ __forceinline__ void step(int h, ConvShift s, const Strip& p, const T* from, T* to) const {
        const ConvJob& job = this->job;
        const ConvLayer<T>& layer = number(h);
        const int size = this->positions(), column = partner(p.column, s.x, job.width);
        const Roots<T>* roots_i = reinterpret_cast<const Roots<T>*>(this->numbers(job.i, this->i, h));
        const Roots<T>* roots_j = reinterpret_cast<const Roots<T>*>(this->numbers(job.j, this->j, h));
        const T *before_i = FIRST ? halves(job.i, this->i) : this->numbers(job.i, this->i, h - 1);
        const T *before_j = FIRST ? halves(job.j, this->j) : this->numbers(job.j, this->j, h - 1);
        const T factor = FIRST ? T(1) : sqrt_(number(h - 1).numbers.scale);
        auto norm = [&](const T* before, int at) { return FIRST ? sqrt_(__ldg(before + at)) : factor * __ldg(before + 2 * at); };
        FastState<T> total = {T(0), T(0)};
        T own = T(0);
#pragma unroll 1
        for (int k = 0; k < p.rows; ++k) {
            const int x = this->at(p, k), y = this->other(s, p, k), other_row = partner(p.row + k, s.y, job.height);
            const Roots<T> a = __ldg(roots_i + x), b = __ldg(roots_j + y);
            const FastPoint<T> one = {a.x, a.y, T(0), T(0)}, two = {b.x, b.y, T(0), T(0)};
            FastState<T> w = {T(0), T(0)};
            T apart = T(0);
#pragma unroll 1
            for (int dy = -job.reach_y; dy <= job.reach_y; ++dy) {
                const int row_i = within(job, p.row + k + dy, job.height), row_j = within(job, other_row + dy, job.height);
#pragma unroll 1
                for (int dx = -job.reach_x; dx <= job.reach_x; ++dx) {
                    const int column_i = within(job, p.column + dx, job.width), column_j = within(job, column + dx, job.width);
                    const bool in_i = row_i >= 0 && column_i >= 0, in_j = row_j >= 0 && column_j >= 0;
                    const int slot = row_i * job.width + column_i;
                    if (in_i && in_j) w.e += from[slot], w.m += from[size + slot];
                    const T norm_i = in_i ? norm(before_i, slot) : T(0);
                    const T norm_j = in_j ? norm(before_j, row_j * job.width + column_j) : T(0);
                    apart = norms_apart(apart, norm_i, one.inv, norm_j, two.inv);
                }
            }
            const FastTerms<T> t = exact_terms<FIRST>(layer.numbers, w.e, w.m, apart, one, two);
            const FastResult<T> r = fast_result<FIRST, true>(layer.numbers, layer.trained, t, w, {T(0), T(0)}, one, two);
            total.m += r.state.m, total.e += r.s, own += r.own;
            to[x] = r.state.e, to[size + x] = r.state.m;
        }
        if (h + 1 < job.n_layers) return;
        const int t = int(threadIdx.x);
        double(&sums)[kTotals][kConvThreads] = this->memory.total;
        sums[0][t] += double(total.m), sums[1][t] += double(total.e), sums[2][t] += double(own);
    }
    __device__ __forceinline__ bool layer(int h, ConvShift s, const Strip& p, const T* from, T* to) const {
        if (h == 0) step<true>(h, s, p, from, to);
        else step<false>(h, s, p, from, to);
        return false;
    }
};

}  // namespace ntk

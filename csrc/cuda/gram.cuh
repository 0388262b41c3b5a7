// A tile of inner products becomes kernels (the twin of ../cpu/gram_dense.cpp).
//
//   correlations (from products, or from differences for close pairs) -> values -> results and their mirror image
//
//   evaluators   Recursion (homogeneous layers, 4 pairs a thread) and General (any layers, 1 pair a thread): a shape,
//                memory of its own and `values`; another way to get values is another evaluator
//   grid         one block a square of pairs; on a tile of the diagonal blocks below it end at once
//   memory       one struct of dynamic shared memory a kernel, under 24 KB; registers otherwise
//   cost         one product read and every result written once; operations as in ../cpu/homogeneous.h, general.h
#pragma once
#include "general.cuh"

namespace ntk {

extern __shared__ __align__(16) unsigned char ntk_shared[];

// What a pair is after its layers.
struct HomogeneousValue {
    double theta, x, s, last, unit_mean;
    __device__ __forceinline__ double mix(const Mix& m) const {
        return mix_homogeneous(m, theta, x, s, unit_mean) + (m.last != 0.0 ? m.last * last : 0.0);
    }
};
struct GeneralValue {
    double theta, cov, last, mean_i, mean_j;
    __device__ __forceinline__ double mix(const Mix& m) const { return mix_general(m, theta, cov, last, mean_i, mean_j); }
};

template <class T>
struct Recursion {
    using Shape = Block<32, 4>;
    using Value = HomogeneousValue;
    struct Memory {};
    static __device__ __forceinline__ void values(const Job& job, const Shape&, PairState<T> (&state)[4], Memory&,
                                                  Value (&value)[4]) {
        T last[4];
        homogeneous_block(job.plan, job.want_last != 0, state, last);
        const double unit_mean = job.plan.beta / sqrt_(job.plan.nu);
#pragma unroll
        for (int p = 0; p < 4; ++p)
            value[p] = {whole(state[p].theta), whole(state[p].x), double(state[p].s), double(last[p]), unit_mean};
    }
};

template <class T>
struct General {
    using Shape = Block<16, 1>;
    using Value = GeneralValue;
    using Memory = GeneralMemory<16>;
    static __device__ __forceinline__ void values(const Job& job, const Shape& b, PairState<T> (&state)[1], Memory& memory,
                                                  Value (&value)[1]) {
        T none[1];
        homogeneous_block(job.plan, false, state, none);
        GeneralState pair;
        RowOfThread row = start_general(job, b, state[0], pair);
        const int i = b.row, j = 16 + b.col, n = job.plan.n_suffix;
        double last = 0.0;
        for (int h = 0; h < n; ++h) {
            const GeneralTerms t = general_layer(job.plan, h, memory, i, j, pair, row);
            if (h == n - 1) last = job.plan.suffix[h].w_all * t.own_w;
        }
        const LayerRows<16>& m = memory.rows[(n - 1) % 2];
        value[0] = {pair.theta, covariance(pair.x, pair.s, m.next_norm[i], m.next_norm[j]), last, m.next_mean[i], m.next_mean[j]};
    }
};

template <class T, int SIDE>
union SquareMemory {
    DifferenceMemory<SIDE> differences;
    T square[SIDE][SIDE + 1];
};
template <class T, class Evaluator>
struct GramMemory {
    SquareMemory<T, Evaluator::Shape::side> block;
    typename Evaluator::Memory evaluator;
    int count;  // close pairs
};

template <class T, class Value, int SIDE, int PAIRS>
__device__ __forceinline__ void write_outputs(const Job& job, const Block<SIDE, PAIRS>& b, const Value (&value)[PAIRS],
                                              T (*square)[SIDE + 1]) {
    for (int o = 0; o < job.n_outputs; ++o) {
        const Output& out = job.outputs[o];
        const bool column = b.col < b.cols;
        const double fj = column ? out.fj[b.j0 + b.col] : 0.0, hj = column ? out.hj[b.j0 + b.col] : 0.0;
        T result[PAIRS];
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const int r = b.row + p * b.step;
            const bool row = r < b.rows;
            const double fi = row ? out.fi[b.i0 + r] : 0.0, hi = row ? out.hi[b.i0 + r] : 0.0;
            const bool exact = out.diagonal && row && column && b.same(r, b.col);
            result[p] = T(exact ? out.diagonal[b.i0 + r] : value[p].mix(out.mix) * fi * fj + hi * hj);
        }
        write_block(b, result, static_cast<T*>(out.data), out.stride, static_cast<T*>(out.mirror), out.mirror_stride, square);
    }
}

template <class T, class Evaluator>
__device__ __forceinline__ void gram(const Job* jobs) {
    using Shape = typename Evaluator::Shape;
    auto& memory = *reinterpret_cast<GramMemory<T, Evaluator>*>(ntk_shared);
    const Job& job = *jobs;
    Shape b;
    if (!place(job, blockIdx.x, job.outputs[0].mirror != nullptr, b)) return;
    if (threadIdx.x == 0) memory.count = 0;
    __syncthreads();
    PairState<T> state[Shape::threads ? Shape::side / Shape::step : 1];
    typename Evaluator::Value value[Shape::side / Shape::step];
    correlations(job, b, state, memory.block.differences, memory.count);
    Evaluator::values(job, b, state, memory.evaluator, value);
    write_outputs(job, b, value, memory.block.square);
}

}  // namespace ntk

// A tile of inner products becomes kernels (the twin of ../cpu/gram_dense.cpp).
//
//   correlations (from products, or from differences for close pairs) -> values -> results and their mirror image
//
//   evaluators   Recursion (homogeneous layers, 4 pairs a thread), General (any layers, 1 pair a thread) and Lookup (compiled
//                kernels, 4 pairs a thread): a shape, memory of its own, `begin`, `values` once a pair, `mixed` once a result;
//                another way to get values is another evaluator
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

// Evaluators that go through the layers: results are sums of the same numbers.
template <class V, class M>
struct Layers {
    using Value = V;
    using Memory = M;
    static __device__ __forceinline__ void begin(const Job&, Memory&) {}
    template <int PAIRS>
    static __device__ __forceinline__ void mixed(const Job& job, int o, const Memory&, const Value (&value)[PAIRS],
                                                 double (&result)[PAIRS]) {
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) result[p] = value[p].mix(job.outputs[o].mix);
    }
};

struct Nothing {};

template <class T>
struct Recursion : Layers<HomogeneousValue, Nothing> {
    using Shape = Block<32, 4>;
    static __device__ __forceinline__ void values(const Job& job, const Shape&, PairState<T> (&state)[4], Nothing&,
                                                  HomogeneousValue (&value)[4]) {
        T last[4];
        homogeneous_block(job.plan, job.want_last != 0, state, last);
        const double unit_mean = job.plan.beta / sqrt_(job.plan.nu);
#pragma unroll
        for (int p = 0; p < 4; ++p)
            value[p] = {whole(state[p].theta), whole(state[p].x), double(state[p].s), double(last[p]), unit_mean};
    }
};

template <class T>
struct General : Layers<GeneralValue, GeneralMemory<16>> {
    using Shape = Block<16, 1>;
    static __device__ __forceinline__ void values(const Job& job, const Shape& b, PairState<T> (&state)[1],
                                                  GeneralMemory<16>& memory, GeneralValue (&value)[1]) {
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

// Tables of all results in shared memory; that is where the time goes: loads of 128 bytes a warp (float64: twice that) for
// every coefficient.
template <class T>
struct Lookup {
    using Shape = Block<32, 4>;
    struct Value {
        T x;
        bool negative;
    };
    struct Memory {
        TablePanels<T> tables[kOutputs];
    };
    static __device__ __forceinline__ void begin(const Job& job, Memory& memory) {
        constexpr int words = int(sizeof(TablePanels<T>) / sizeof(unsigned));
        for (int o = 0; o < job.n_outputs; ++o) {
            const unsigned* from = static_cast<const unsigned*>(job.outputs[o].table);
            unsigned* to = reinterpret_cast<unsigned*>(&memory.tables[o]);
            for (int k = int(threadIdx.x); k < words; k += Shape::threads) to[k] = from[k];
        }
    }
    static __device__ __forceinline__ void values(const Job&, const Shape&, PairState<T> (&state)[4], Memory&,
                                                  Value (&value)[4]) {
#pragma unroll
        for (int p = 0; p < 4; ++p) value[p] = {state[p].x.hi, state[p].s < T(0)};
    }
    template <int TERMS>
    static __device__ __forceinline__ void evaluate(const TablePanels<T>& table, const Value (&value)[4], double (&result)[4]) {
#pragma unroll
        for (int p = 0; p < 4; ++p) result[p] = double(table_value<TERMS>(table, value[p].x, value[p].negative));
    }
    static __device__ __forceinline__ void mixed(const Job&, int o, const Memory& memory, const Value (&value)[4],
                                                 double (&result)[4]) {
        using Terms = TableShape<T>;
        const TablePanels<T>& table = memory.tables[o];
        if (table.terms == Terms::few) evaluate<Terms::few>(table, value, result);  // the same for all threads
        else evaluate<Terms::terms>(table, value, result);
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

template <class Evaluator, class T, int SIDE, int PAIRS>
__device__ __forceinline__ void write_outputs(const Job& job, const Block<SIDE, PAIRS>& b,
                                              const typename Evaluator::Memory& memory,
                                              const typename Evaluator::Value (&value)[PAIRS], T (*square)[SIDE + 1]) {
    for (int o = 0; o < job.n_outputs; ++o) {
        const Output& out = job.outputs[o];
        const bool column = b.col < b.cols;
        const double fj = column ? out.fj[b.j0 + b.col] : 0.0, hj = column ? out.hj[b.j0 + b.col] : 0.0;
        double mixed[PAIRS];
        Evaluator::mixed(job, o, memory, value, mixed);
        T result[PAIRS];
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const int r = b.row + p * b.step;
            const bool row = r < b.rows;
            const double fi = row ? out.fi[b.i0 + r] : 0.0, hi = row ? out.hi[b.i0 + r] : 0.0;
            const bool exact = out.diagonal && row && column && b.same(r, b.col);
            result[p] = T(exact ? out.diagonal[b.i0 + r] : mixed[p] * fi * fj + hi * hj);
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
    Evaluator::begin(job, memory.evaluator);  // all see it after a barrier of correlations
    PairState<T> state[Shape::threads ? Shape::side / Shape::step : 1];
    typename Evaluator::Value value[Shape::side / Shape::step];
    correlations(job, b, state, memory.block.differences, memory.count);
    Evaluator::values(job, b, state, memory.evaluator, value);
    write_outputs<Evaluator>(job, b, memory.evaluator, value, memory.block.square);
}

}  // namespace ntk

// layer_grams: own terms of every layer go to scratch of the block, then times the factors of all later layers to their
// slices, from the last layer to the first. One pair a thread; a block takes many squares, so that scratch is bounded.
#pragma once
#include "gram.cuh"

namespace ntk {

template <class T>
struct SlicesMemory {
    SquareMemory<T, 16> block;
    GeneralMemory<16> general;
    int count;
};

template <class T>
__device__ __forceinline__ void write_slice(const Job& job, const Block<16, 1>& b, i64 slice, double value, double constant,
                                            T (*square)[17]) {
    const Slices& out = job.slices;
    const bool exists = b.exists(b.row, b.col);
    const T result[1] = {T(exists ? value * out.fi[b.i0 + b.row] * out.fj[b.j0 + b.col] + constant : 0.0)};
    T* mirror = out.mirror ? static_cast<T*>(out.mirror) + slice * out.mirror_slice_stride : nullptr;
    write_block(b, result, static_cast<T*>(out.data) + slice * out.slice_stride, out.stride, mirror, out.mirror_stride, square);
}

// Forward: own terms to scratch; returns S (of unit norms without suffix).
template <class T>
__device__ __forceinline__ double own_terms(const Job& job, const Block<16, 1>& b, PairState<T> state, GeneralMemory<16>& memory,
                                            T* own, double* own_suffix) {
    const PrefixLayer<T>* prefix = static_cast<const PrefixLayer<T>*>(job.plan.prefix);
    for (int h = 0; h < job.plan.n_prefix; ++h, own += 3 * 256) {
        const LayerTerms<T> t = homogeneous_step<true, 0, true>(state, prefix[h].numbers);
        if (prefix[h].signs && !prefix[h].signs_after) state.s = T(1);
        own[0] = t.own_w, own[256] = t.own_v, own[512] = t.growth;
    }
    if (job.plan.n_suffix == 0) return double(state.s) * (1.0 - whole(state.x));
    GeneralState pair;
    RowOfThread row = start_general(job, b, state, pair);
    const int i = b.row, j = 16 + b.col;
    for (int h = 0; h < job.plan.n_suffix; ++h, own_suffix += 4 * 256) {
        const GeneralTerms t = general_layer(job.plan, h, memory, i, j, pair, row);
        own_suffix[0] = t.own_w, own_suffix[256] = t.own_b, own_suffix[512] = t.own_v, own_suffix[768] = t.factor;
    }
    const LayerRows<16>& m = memory.rows[(job.plan.n_suffix - 1) % 2];
    return covariance(pair.x, pair.s, m.next_norm[i], m.next_norm[j]);
}

// Backward: own and own_suffix are past the last layer.
template <class T>
__device__ __forceinline__ void write_slices(const Job& job, const Block<16, 1>& b, double cov, const T* own,
                                             const double* own_suffix, T (*square)[17]) {
    const Slices& out = job.slices;
    if (out.readout >= 0) write_slice(job, b, out.readout, out.readout_cov * cov, out.readout_const, square);
    double later = 1.0;
    for (int h = job.plan.n_suffix - 1; h >= 0; --h) {
        const GeneralLayer& l = job.plan.suffix[h];
        own_suffix -= 4 * 256;
        if (l.slice_w >= 0) write_slice(job, b, l.slice_w, own_gram_w(l, own_suffix[0], own_suffix[256]) * later, 0.0, square);
        if (l.slice_v >= 0) write_slice(job, b, l.slice_v, own_gram_v(l, own_suffix[512]) * later, 0.0, square);
        later *= own_suffix[768];
    }
    if (job.plan.n_suffix && b.exists(b.row, b.col)) later *= job.plan.nu * job.i.norm[b.i0 + b.row] * job.j.norm[b.j0 + b.col];
    const PrefixLayer<T>* prefix = static_cast<const PrefixLayer<T>*>(job.plan.prefix);
    for (int h = job.plan.n_prefix - 1; h >= 0; --h) {
        const PrefixLayer<T>& l = prefix[h];
        own -= 3 * 256;
        if (l.slice_w >= 0) write_slice(job, b, l.slice_w, double(l.numbers.w) * double(own[0]) * later, 0.0, square);
        if (l.slice_v >= 0) write_slice(job, b, l.slice_v, double(l.numbers.v) * double(own[256]) * later, 0.0, square);
        later = fma_(later, double(own[512]), later);
    }
}

template <class T>
__device__ __forceinline__ void slices(const Job* jobs) {
    auto& memory = *reinterpret_cast<SlicesMemory<T>*>(ntk_shared);
    const Job& job = *jobs;
    const i64 blocks = blocks_of(job.rows, 16) * blocks_of(job.cols, 16), own_size = 3 * 256 * i64(job.plan.n_prefix);
    T* own = static_cast<T*>(job.slices.own) + blockIdx.x * own_size + threadIdx.x;
    const i64 suffix_size = 4 * 256 * i64(job.plan.n_suffix);
    double* own_suffix = job.slices.own_suffix + blockIdx.x * suffix_size + threadIdx.x;
    for (i64 index = blockIdx.x; index < blocks; index += gridDim.x) {
        Block<16, 1> b;
        if (!place(job, index, job.slices.mirror != nullptr, b)) continue;  // the same for all threads
        __syncthreads();
        if (threadIdx.x == 0) memory.count = 0;
        __syncthreads();
        PairState<T> state[1];
        correlations(job, b, state, memory.block.differences, memory.count);
        const double cov = own_terms(job, b, state[0], memory.general, own, own_suffix);
        write_slices(job, b, cov, own + own_size, own_suffix + suffix_size, memory.block.square);
    }
}

}  // namespace ntk

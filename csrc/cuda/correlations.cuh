// 1 - |rho| and sign of rho of the pairs of a block, from inner products; for close pairs from differences.
//
//   1 - |rho| = |x_i/|x_i| - s x_j/|x_j||^2 / 2, in double for both dtypes (as ../cpu/differences.h)
//
//   list    the close pairs of a block are listed in shared memory; each is one warp's work: two rows, read once
//   dense   more than kList of them: all pairs of the block from rows packed in shared memory, kSlab features at a time
//   Nothing leaves the block: no list to overflow, no second kernel, no word to the host.
#pragma once
#include "block.cuh"

namespace ntk {

constexpr int kList = 64;
constexpr int kSlab = 16;

struct CloseList {
    int pair[kList];       // 2 (row * SIDE + col) + (rho < 0)
    double value[kList];
};
template <int SIDE>
struct Slabs {
    double rows[kSlab][SIDE + 1], cols[kSlab][SIDE + 1];
};

NTK_INLINE Wide<double> widen(double v, double) { return {v}; }
NTK_INLINE Wide<float> widen(double v, float) {
    float hi = float(v);
    return {hi, float(v - double(hi))};
}
NTK_INLINE double whole(Wide<double> v) { return v.hi; }
NTK_INLINE double whole(Wide<float> v) { return double(v.hi) + double(v.lo); }

template <class T>
__device__ __forceinline__ double warp_difference(const T* a, const T* b, double ai, double bi, i64 dim) {
    const int lane = int(threadIdx.x) % 32;
    double sum = 0.0;
#pragma unroll 2  // no more: its registers are those of the whole kernel
    for (i64 k = lane; k < dim; k += 32) {
        const double diff = double(a[k]) * ai - double(b[k]) * bi;
        sum = fma_(diff, diff, sum);
    }
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}

template <class T, int SIDE, int PAIRS>
__device__ __forceinline__ void listed_differences(const Job& job, const Block<SIDE, PAIRS>& b, int count, CloseList& list) {
    const int warp = int(threadIdx.x) / 32, warps = b.threads / 32;
    for (int k = warp; k < count; k += warps) {
        const int pair = list.pair[k] / 2;
        const i64 i = b.i0 + pair / SIDE, j = b.j0 + pair % SIDE;
        const double sum = warp_difference(static_cast<const T*>(job.i.x) + i * job.i.stride,
                                           static_cast<const T*>(job.j.x) + j * job.j.stride, job.i.inv[i],
                                           list.pair[k] % 2 ? -job.j.inv[j] : job.j.inv[j], job.dim);
        if (threadIdx.x % 32 == 0) list.value[k] = sum;
    }
}

// sum[p] = |x_i - s x_j|^2 of the pairs of this thread.
template <class T, int SIDE, int PAIRS>
__device__ __forceinline__ void block_differences(const Job& job, const Block<SIDE, PAIRS>& b, const T (&s)[PAIRS],
                                                  double (&sum)[PAIRS], Slabs<SIDE>& slab) {
    const T *x = static_cast<const T*>(job.i.x) + b.i0 * job.i.stride, *y = static_cast<const T*>(job.j.x) + b.j0 * job.j.stride;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) sum[p] = 0.0;
    for (i64 start = 0; start < job.dim; start += kSlab) {
#pragma unroll 1  // as above
        for (int at = int(threadIdx.x); at < SIDE * kSlab; at += b.threads) {
            const int r = at / kSlab, k = at % kSlab;
            const bool feature = start + k < job.dim;
            slab.rows[k][r] = feature && r < b.rows ? double(x[r * job.i.stride + start + k]) * job.i.inv[b.i0 + r] : 0.0;
            slab.cols[k][r] = feature && r < b.cols ? double(y[r * job.j.stride + start + k]) * job.j.inv[b.j0 + r] : 0.0;
        }
        __syncthreads();
        for (int k = 0; k < kSlab; ++k) {
            const double col = slab.cols[k][b.col];
#pragma unroll
            for (int p = 0; p < PAIRS; ++p) {
                const double diff = slab.rows[k][b.row + p * b.step] - double(s[p]) * col;
                sum[p] = fma_(diff, diff, sum[p]);
            }
        }
        __syncthreads();
    }
}

template <int SIDE>
union DifferenceMemory {
    CloseList list;
    Slabs<SIDE> slabs;
};

// x as double (float32 needs more than its own digits where it is small), s; the pairs beyond the tile become (0, 1).
// All threads of the block call this; `memory` is free before and after, `count` is 0 before.
template <class T, int SIDE, int PAIRS>
__device__ __forceinline__ void correlations(const Job& job, const Block<SIDE, PAIRS>& b, PairState<T> (&state)[PAIRS],
                                             DifferenceMemory<SIDE>& memory, int& count) {
    const T* products = static_cast<const T*>(job.products);
    const T limit = T(job.close), inv_j = b.col < b.cols ? T(job.j.inv[b.j0 + b.col]) : T(0);
    T s[PAIRS];
    int slot[PAIRS];
    int found = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        const int r = b.row + p * b.step;
        Start<T> start{T(0), T(1)};
        slot[p] = -1;
        if (b.exists(r, b.col) && !b.same(r, b.col)) {
            const i64 i = b.i0 + r;
            start = start_pair(products[i * job.stride + b.j0 + b.col], T(job.i.inv[i]), inv_j);
            if (start.x < limit && b.wanted(r, b.col)) slot[p] = 1, ++found;
        }
        state[p] = {{start.x}, start.s, {T(0)}};
        s[p] = start.s;
    }
    int first = found ? atomicAdd(&count, found) : 0;
    __syncthreads();
    const int total = count;
    if (total == 0) return;
    if (total > kList) {
        double sum[PAIRS];
        block_differences<T>(job, b, s, sum, memory.slabs);
#pragma unroll
        for (int p = 0; p < PAIRS; ++p)
            if (slot[p] > 0) state[p].x = widen(0.5 * sum[p], T(0));
        return;
    }
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
        if (slot[p] > 0) {
            slot[p] = first++;
            memory.list.pair[slot[p]] = 2 * ((b.row + p * b.step) * SIDE + b.col) + (s[p] < T(0) ? 1 : 0);
        }
    __syncthreads();
    listed_differences<T>(job, b, total, memory.list);
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
        if (slot[p] >= 0) state[p].x = widen(0.5 * memory.list.value[slot[p]], T(0));
    __syncthreads();
}

}  // namespace ntk

// A block of SIDE x SIDE pairs: thread t of SIDE * SIDE / PAIRS owns column t % SIDE of PAIRS rows, STEP rows apart.
#pragma once
#include "job.cuh"

namespace ntk {

template <int SIDE, int PAIRS>
struct Block {
    static constexpr int side = SIDE, threads = SIDE * SIDE / PAIRS, step = SIDE / PAIRS;
    i64 i0, j0;      // first pair in the tile
    int rows, cols;  // pairs that exist
    int row, col;    // first pair of this thread
    bool upper;      // only pairs i <= j are wanted
    bool diagonal;   // i == j is one point

    __device__ __forceinline__ bool exists(int r, int c) const { return r < rows && c < cols; }
    __device__ __forceinline__ bool same(int r, int c) const { return diagonal && i0 + r == j0 + c; }
    __device__ __forceinline__ bool wanted(int r, int c) const { return exists(r, c) && (!upper || i0 + r <= j0 + c); }
};

__device__ __forceinline__ i64 blocks_of(i64 n, int side) { return (n + side - 1) / side; }

// Block number `index` of a tile of rows x cols; false if nothing in it is wanted. `diagonal`: i == j is one point, and with
// `upper` only pairs i <= j are computed.
template <int SIDE, int PAIRS>
__device__ __forceinline__ bool place(i64 rows, i64 cols, bool diagonal, bool upper, i64 index, Block<SIDE, PAIRS>& b) {
    const i64 columns = blocks_of(cols, SIDE);
    b.i0 = index / columns * SIDE, b.j0 = index % columns * SIDE;
    b.rows = rows - b.i0 < SIDE ? int(rows - b.i0) : SIDE;
    b.cols = cols - b.j0 < SIDE ? int(cols - b.j0) : SIDE;
    b.row = int(threadIdx.x) / SIDE, b.col = int(threadIdx.x) % SIDE;
    b.diagonal = diagonal;
    b.upper = diagonal && upper;
    return !b.upper || b.i0 < b.j0 + SIDE;
}

template <int SIDE, int PAIRS>
__device__ __forceinline__ bool place(const Job& job, i64 index, bool mirrored, Block<SIDE, PAIRS>& b) {
    return place(job.rows, job.cols, job.diagonal != 0, mirrored, index, b);
}

// Results of the block go row by row to `out` and, through shared memory, to the mirror: both stores are coalesced.
// All threads of the block call this; `square` is free before and after.
template <class T, int SIDE, int PAIRS>
__device__ __forceinline__ void write_block(const Block<SIDE, PAIRS>& b, const T (&value)[PAIRS], T* out, i64 stride, T* mirror,
                                            i64 mirror_stride, T (*square)[SIDE + 1]) {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        const int r = b.row + p * b.step;
        if (b.wanted(r, b.col)) out[(b.i0 + r) * stride + b.j0 + b.col] = value[p];
    }
    if (!mirror) return;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) square[b.row + p * b.step][b.col] = value[p];
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        const int c = b.row + p * b.step, r = b.col;  // a row of the mirror is a column of the block
        if (b.wanted(r, c)) mirror[(b.j0 + c) * mirror_stride + b.i0 + r] = square[r][c];
    }
    __syncthreads();
}

}  // namespace ntk

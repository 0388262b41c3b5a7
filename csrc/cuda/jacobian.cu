// Jacobian inner products of finite networks (the twin of ../cpu/jacobian.h), and tangents of the third-order kernel.
//
//   multiply_add  out_ij (+)= p_ij q_ij of one layer; with the last layer also the mirror image. p = A A'^T and q = D D'^T
//                 come from cuBLAS into scratch. A block a square of 32 x 32; every array is read or written once
//   multiply_sum  out_ij (+)= sum over positions l, r of p_(il)(jr) q_(il)(jr): `group` threads a pair, sums in float64
//   combine       out[c, a] = u[a] x[c, a] + v[a] y[c, a] + coef[c, a] row[c], a block a row of features
#include "cuda/block.cuh"

namespace ntk {

extern __shared__ __align__(16) unsigned char ntk_shared[];

template <class T>
struct SquareOf {
    T square[32][33];
};

// p null: nothing is added, only mirrored; q null: p itself is added. `upper`: a tile of the diagonal, pairs i <= j.
template <class T>
__device__ __forceinline__ void multiply_add(i64 rows, i64 cols, bool upper, bool first,
                                             const T* p, i64 p_stride,  // (rows, p_stride)
                                             const T* q, i64 q_stride,  // (rows, q_stride)
                                             T* out, i64 stride,        // (rows, stride)
                                             T* mirror, i64 mirror_stride)  // (cols, mirror_stride), or null
{
    auto& memory = *reinterpret_cast<SquareOf<T>*>(ntk_shared);
    Block<32, 4> b;
    if (!place(rows, cols, upper, true, blockIdx.x, b)) return;
    T value[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int r = b.row + k * b.step;
        const i64 i = b.i0 + r, j = b.j0 + b.col;
        const bool wanted = b.wanted(r, b.col);
        const T before = wanted && !first ? out[i * stride + j] : T(0);
        const T factor = wanted && q ? q[i * q_stride + j] : T(1);
        value[k] = before + (wanted && p ? p[i * p_stride + j] * factor : T(0));
    }
    write_block(b, value, out, stride, mirror, mirror_stride, memory.square);
}

// group: a power of two up to 256, of the order of the positions of j; sums of its warps meet in shared memory.
template <class T>
__device__ __forceinline__ void multiply_sum(i64 rows, i64 cols, i64 positions_i, i64 positions_j, int group, bool first,
                                             const T* p, const T* q, i64 p_stride,  // (rows positions_i, p_stride)
                                             T* out, i64 stride)                    // (rows, stride)
{
    double* sums = reinterpret_cast<double*>(ntk_shared);  // (8,) of the warps
    const int thread = int(threadIdx.x), lane = thread & (group - 1);
    const i64 pair = i64(blockIdx.x) * (256 / group) + thread / group, i = pair / cols, j = pair % cols;
    const bool exists = i < rows;
    double sum = 0.0;
    if (exists)
        for (i64 l = 0; l < positions_i; ++l) {
            const i64 start = (i * positions_i + l) * p_stride + j * positions_j;
            for (i64 r = lane; r < positions_j; r += group) sum += double(p[start + r]) * double(q[start + r]);
        }
    for (int offset = (group < 32 ? group : 32) / 2; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (group > 32) {  // the same for all threads
        if (thread % 32 == 0) sums[thread / 32] = sum;
        __syncthreads();
        if (lane == 0)
            for (int w = 1; w < group / 32; ++w) sum += sums[thread / 32 + w];
    }
    if (!exists || lane != 0) return;
    T& to = out[i * stride + j];
    to = T((first ? 0.0 : double(to)) + sum);
}

// x null: no first term; u null: 1. y null: no second term; v null: k. row null: no third term.
template <class T>
__device__ __forceinline__ void combine(i64 count, i64 features,
                                        const T* u, const T* x,         // (count, features), (gradients, count, features)
                                        const T* v, T k, const T* y,    // the same
                                        const T* coef, const T* row,    // (gradients, count), (gradients, features)
                                        T* out)                         // (gradients, count, features); may be x or y
{
    const i64 pair = blockIdx.x, c = pair / count, a = pair % count;
    const T factor = row ? coef[pair] : T(0);
    for (i64 r = threadIdx.x; r < features; r += blockDim.x) {
        const i64 at = pair * features + r;
        T value = x ? (u ? u[a * features + r] * x[at] : x[at]) : T(0);
        if (y) value += (v ? v[a * features + r] : k) * y[at];
        if (row) value += factor * row[c * features + r];
        out[at] = value;
    }
}

}  // namespace ntk

#define NTK_JACOBIAN(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 4) multiply_add_##suffix(                                             \
        long long rows, long long cols, int upper, int first, const T* p, long long p_stride, const T* q,                  \
        long long q_stride, T* out, long long stride, T* mirror, long long mirror_stride) {                                 \
        ntk::multiply_add<T>(rows, cols, upper != 0, first != 0, p, p_stride, q, q_stride, out, stride, mirror,             \
                             mirror_stride);                                                                                \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 4) multiply_sum_##suffix(                                             \
        long long rows, long long cols, long long positions_i, long long positions_j, int group, int first, const T* p,    \
        const T* q, long long p_stride, T* out, long long stride) {                                                         \
        ntk::multiply_sum<T>(rows, cols, positions_i, positions_j, group, first != 0, p, q, p_stride, out, stride);         \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 4) combine_##suffix(                                                  \
        long long count, long long features, const T* u, const T* x, const T* v, T k, const T* y, const T* coef,           \
        const T* row, T* out) {                                                                                             \
        ntk::combine<T>(count, features, u, x, v, k, y, coef, row, out);                                                    \
    }
NTK_JACOBIAN(f64, double)
NTK_JACOBIAN(f32, float)

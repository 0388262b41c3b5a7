// Squared norms and largest entries of rows, and rows times powers of two. A warp takes a row.
#include "math/exponential.h"
#include "math/sums.h"

namespace ntk {

using i64 = long long;

// squares[i] = sum_k x[i,k]^2 as if in twice the precision; largest[i] = max_k |x[i,k]|, infinity for NaN and infinity.
template <class T>
__device__ __forceinline__ void squares(const T* x,       // (n, stride)
                                        i64 n, i64 dim, i64 stride,
                                        double* squares,  // (n,)
                                        double* largest)  // (n,)
{
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int lane = int(threadIdx.x) % 32;
    if (row >= n) return;  // whole warps
    double sum = 0.0, low = 0.0, most = 0.0;
    int finite = 1;
    for (i64 k = lane; k < dim; k += 32) {
        const double v = double(x[row * stride + k]), a = abs_(v);
        add_square(sum, low, v);
        most = a > most ? a : most;
        finite = v - v == 0.0 ? finite : 0;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        const double other = __shfl_xor_sync(0xffffffffu, sum, offset), other_low = __shfl_xor_sync(0xffffffffu, low, offset);
        const double other_most = __shfl_xor_sync(0xffffffffu, most, offset);
        add_twofold(sum, low, other, other_low);
        most = other_most > most ? other_most : most;
        finite &= __shfl_xor_sync(0xffffffffu, finite, offset);
    }
    if (lane == 0) squares[row] = sum + low, largest[row] = finite ? most : from_bits(0x7ff0000000000000LL);
}

// out = x 2^-exponent, in two steps: 2^-exponent itself may overflow.
template <class T>
__device__ __forceinline__ void scale(const T* x, i64 n, i64 dim, i64 stride,
                                      const i64* exponent,  // (n,)
                                      T* out)               // (n, dim)
{
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (row >= n) return;
    const i64 half = exponent[row] / 2;
    const double a = power_of_two(double(-half)), b = power_of_two(double(half - exponent[row]));
    for (i64 k = int(threadIdx.x) % 32; k < dim; k += 32) out[row * dim + k] = T(double(x[row * stride + k]) * a * b);
}

}  // namespace ntk

#define NTK_POINTS(suffix, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) squares_##suffix(const T* x, long long n, long long dim,         \
                                                                       long long stride, double* out, double* most) { \
        ntk::squares<T>(x, n, dim, stride, out, most);                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) scale_##suffix(const T* x, long long n, long long dim,           \
                                                                     long long stride, const long long* e, T* out) {  \
        ntk::scale<T>(x, n, dim, stride, e, out);                                                                      \
    }
NTK_POINTS(f64, double)
NTK_POINTS(f32, float)

// Plain products of rows, the door of the tests and of the benchmarks to product.h; and the peak they are measured by.
//
//   compiled   once per instruction set with NTK_ISA; nothing here may have external linkage but `products`
#include "kernels.h"
#include "product.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ntk {
namespace NTK_ISA {
namespace {

// Results beyond this go past the caches, which they would leave anyway.
constexpr Index kStream = Index(4) << 20;

template <class A, class T>
bool product(const T* x, Index n, Index d, Index stride, const T* y, Index m, Index y_stride, T* out, Index out_stride) {
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    const bool symmetric = !y;
    const Packed<T> a(x, n, d, stride);
    const Packed<T> other(y, symmetric ? 0 : m, symmetric ? 0 : d, y_stride);
    if (!a.panels.data || !other.panels.data) return false;
    const Grid grid = grid_of<A>(n, m, symmetric, threads);
    const bool stream = n * m * Index(sizeof(T)) > kStream;
    return for_each_tile<A, T>(a, symmetric ? a : other, grid, 0, grid.count(), [&](const ProductTile<A>& t) {
        write_tile(t, out, out_stride, symmetric ? out : static_cast<T*>(nullptr), out_stride, stream);
    });
}

template <class T>
bool product_of(const T* x, Index n, Index d, Index stride, const T* y, Index m, Index y_stride, T* out,
                Index out_stride, bool) {
    return product<T, T>(x, n, d, stride, y, m, y_stride, out, out_stride);
}
bool product_single(const float* x, Index n, Index d, Index stride, const float* y, Index m, Index y_stride, float* out,
                    Index out_stride, bool wide) {
    return (wide ? product<double, float> : product<float, float>)(x, n, d, stride, y, m, y_stride, out, out_stride);
}

// The micro-kernel's arithmetic without its memory: operations done by all threads.
template <class T>
double peak(Index rounds) {
    using V = typename Lanes<T>::V;
    double done = 0.0;
#pragma omp parallel reduction(+ : done)
    {
        V sum[kNarrow][kVectors];
        for (int i = 0; i < kNarrow * kVectors; ++i) sum[i / kVectors][i % kVectors] = broadcast(T(i));
        V a = broadcast(T(0.5)), b = broadcast(T(1));
        for (Index round = 0; round < rounds; ++round) {
            asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 8
            for (int i = 0; i < kNarrow; ++i)
#pragma GCC unroll 3
                for (int v = 0; v < kVectors; ++v) sum[i][v] = fma_lanes(a, sum[i][v], b);
        }
        T total = T(0);
        for (int i = 0; i < kNarrow * kVectors; ++i) total += sum[i / kVectors][i % kVectors][0];
        done += total == total ? 2.0 * kNarrow * kWide<T> * double(rounds) : 0.0;
    }
    return done;
}

}  // namespace

extern const Products products;
const Products products = {product_of<double>, product_single, peak<double>, peak<float>};

}  // namespace NTK_ISA
}  // namespace ntk

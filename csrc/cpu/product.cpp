// Plain products of rows, the door of the tests and of the benchmarks to product.h; and the peak they are measured by.
//
//   compiled   once per instruction set with NTK_ISA; nothing here may have external linkage but `products`
#include "kernels.h"
#include "product.h"

namespace ntk {
namespace NTK_ISA {
namespace {

// The compiler must take x for changed.
#ifdef __x86_64__
#define NTK_UNKNOWN(x) asm volatile("" : "+x"(x))
#else
#define NTK_UNKNOWN(x) asm volatile("" : "+w"(x))
#endif

template <class A, class T>
struct Write {
    T* out;
    Index stride;
    bool symmetric, stream;
    bool ready() const { return true; }
    void operator()(const ProductTile<A>& t) const { write_tile<A, T>(t, out, stride, symmetric ? out : nullptr, stride, stream); }
};

template <class A, class T>
bool product_as(const Product& p) {
    const Packed<T> x(static_cast<const T*>(p.x), p.n, p.d, p.stride);
    const Packed<T> y(static_cast<const T*>(p.y), p.symmetric ? 0 : p.m, p.d, p.y_stride);
    if (!x.panels.data || !y.panels.data) return false;
    const int threads = threads_of(p.n, p.m, p.symmetric, p.d, 0.0, most_threads());
    const Grid grid = grid_of<A>(p.n, p.m, p.symmetric, threads);
    const bool stream = double(p.n) * double(p.m) * sizeof(T) > kStreamBytes;
    T* out = static_cast<T*>(p.out);
    return for_each_tile<A>(x.view(), p.symmetric ? x.view() : y.view(), grid, threads,
                            [&] { return Write<A, T>{out, p.out_stride, p.symmetric, stream}; });
}

bool product64(const Product& p) { return product_as<double, double>(p); }
bool product32(const Product& p) { return p.wide ? product_as<double, float>(p) : product_as<float, float>(p); }

// The arithmetic of the micro-kernel without its loads; the operations done by all threads.
template <class T>
double peak(Index rounds) {
    using V = typename Lanes<T>::V;
    double done = 0.0;
#pragma omp parallel reduction(+ : done)
    {
        V sum[kNarrow * kVectors];
        for (int i = 0; i < kNarrow * kVectors; ++i) sum[i] = broadcast(T(i));
        V a = broadcast(T(0.5)), b = broadcast(T(1));
        for (Index round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
            for (int i = 0; i < kNarrow * kVectors; ++i) {
                NTK_UNKNOWN(a);  // or a b would be formed once
                sum[i] = fma_lanes(a, b, sum[i]);
            }
        }
        T total = T(0);
        for (int i = 0; i < kNarrow * kVectors; ++i) total += sum[i][0];
        done += total == total ? 2.0 * kNarrow * kWide<T> * double(rounds) : 0.0;  // the sums must be wanted
    }
    return done;
}

}  // namespace

extern const Products products;
const Products products = {product64, product32, peak<double>, peak<float>};

}  // namespace NTK_ISA
}  // namespace ntk

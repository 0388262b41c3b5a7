// Arrays of one block of pairs, one per thread. A block is at most kRows x kCols pairs, row by row, kCols apart.
#pragma once
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace ntk {

constexpr int kRows = 32, kCols = 192, kBlock = kRows * kCols;
// Blocks are written together in patches, so that the runs of the mirror image are long.
constexpr int kPatch = 192;
// Layers run over chunks of the block that stay in the L1 cache (three to five arrays of 512).
constexpr int kChunk = 512;
// To wake a second thread and to wait for it takes 20 us, but two ticks of the scheduler, 8 ms, where other threads want the
// processors: those of a BLAS spin for 0.1 s after their last product. So work of fewer nanoseconds stays on one thread, and
// so do numbers that take no longer to read.
constexpr double kShort = 2e5;
constexpr std::int64_t kAlone = 100000;

static inline int most_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// All arrays (kBlock,).
template <class T>
struct Block {
    T x[kBlock], x_low[kBlock];  // 1 - |rho|
    T s[kBlock];                 // sign of rho
    T theta[kBlock], theta_low[kBlock];
    T cov[kBlock], last[kBlock];  // of the final layer
};

NTK_INLINE Wide<double> load(const double* hi, const double*, int k) { return {hi[k]}; }
NTK_INLINE Wide<float> load(const float* hi, const float* lo, int k) { return {hi[k], lo[k]}; }
NTK_INLINE void store(double* hi, double*, int k, Wide<double> v) { hi[k] = v.hi; }
NTK_INLINE void store(float* hi, float* lo, int k, Wide<float> v) {
    hi[k] = v.hi;
    lo[k] = v.lo;
}
NTK_INLINE Wide<double> widen(double v, double) { return {v}; }
NTK_INLINE Wide<float> widen(double v, float) {
    float hi = float(v);
    return {hi, float(v - double(hi))};
}
NTK_INLINE double whole(Wide<double> v) { return v.hi; }
NTK_INLINE double whole(Wide<float> v) { return double(v.hi) + double(v.lo); }

// Memory of one thread, aligned, freed at the end of the scope.
template <class T>
struct Buffer {
    T* data;
    bool empty;
    __attribute__((always_inline)) inline explicit Buffer(std::size_t count) : data(nullptr), empty(count == 0) {
        if (count) data = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
    }
    __attribute__((always_inline)) inline ~Buffer() { std::free(data); }
    __attribute__((always_inline)) inline bool ready() const { return data || empty; }
    // Whoever asks for it frees it.
    __attribute__((always_inline)) inline T* release() {
        T* given = data;
        data = nullptr;
        return given;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

}  // namespace ntk

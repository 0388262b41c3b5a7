// Numbers of all layers at all positions of images, made once for many pairs. A block takes an image; variances in double.
//
//   fast      those of fast_point and half variances summed over the columns of the window, in the order of conv_fast.cuh
//   any       what conv_general.cuh lists, then the Hermite coefficients
#pragma once
#include "conv_fast.cuh"
#include "conv_general.cuh"

namespace ntk {

// Sum of a plane over the window around (row, column) of one image.
__device__ __forceinline__ double window_of(const ConvJob& job, const double* plane, int row, int column, int reach_y) {
    double sum = 0.0;
    for (int dy = -reach_y; dy <= reach_y; ++dy)
        for (int dx = -job.reach_x; dx <= job.reach_x; ++dx) {
            int r = row + dy, c = column + dx;
            if (job.circular) r = cyclic(r, job.height), c = cyclic(c, job.width);
            if (inside(r, job.height) && inside(c, job.width)) sum += plane[r * job.width + c];
        }
    return sum;
}

// Hermite coefficients of a position, `size` apart, and with them Q and the mean.
__device__ __forceinline__ void hermite_row(const HermiteTable& t, RowNumbers& n, double* terms, int size) {
    const HermitePlace place = hermite_place(t, n.root);
    n.q = 0.0, n.mu = 0.0;
    for (int k = 0; k < t.evens + t.odds; ++k) {
        const double a = hermite_coefficient(t, place, n.lam, k);
        terms[i64(k) * size] = a;
        n.q = fma_(a, a, n.q);
        if (k == 0 && t.evens > 0) n.mu = a;
    }
}

template <class T>
struct FastImages {
    using Number = T;
    static __device__ __forceinline__ double variance(const GeneralLayer& l, double sum) {
        return fast_variance(l, sum, least_variance(T(0)));
    }
    static __device__ __forceinline__ void write(const ConvJob& job, const GeneralLayer& l, const FastUnits& u, T* to, int size, int a,
                                                 const RowNumbers& n, double var, double mean, const double* plane) {
        const FastPoint<double> p = fast_point(l, u, n.lam, mean, var);
        reinterpret_cast<Roots<T>*>(to)[a] = {T(p.root), T(p.inv)};
        to[2 * size + a] = T(p.half);
        to[3 * size + a] = T(0.5 / u.before * window_of(job, plane, a / job.width, a % job.width, 0));
        to[4 * size + a] = T(p.mean);
    }
    static __device__ __forceinline__ void coefficients(const ConvJob&, const GeneralLayer&, T*, int, int, RowNumbers&) {}
};

struct AnyImages {
    using Number = double;
    static __device__ __forceinline__ double variance(const GeneralLayer& l, double sum) { return fma_(l.cw, sum, l.cb); }
    static __device__ __forceinline__ void coefficients(const ConvJob& job, const GeneralLayer& l, double* to, int size, int a,
                                                        RowNumbers& n) {
        if (l.activation == kHermite && job.tables[l.table].panels > 0)
            hermite_row(job.tables[l.table], n, to + kConvNumbers * size + a, size);
    }
    static __device__ __forceinline__ void write(const ConvJob&, const GeneralLayer&, const FastUnits&, double* to, int size, int a,
                                                 const RowNumbers& n, double var, double mean, const double*) {
        const double all[kConvNumbers] = {n.lam, n.root, n.inv, n.q, n.mu, n.a1, n.a2, n.a3, mean, 0.5 * var};
#pragma unroll
        for (int k = 0; k < kConvNumbers; ++k) to[k * size + a] = all[k];
    }
};

// job.i: the images; job.planes: (images, 3, positions) of double, variances of two layers and means.
template <class Images>
__device__ __forceinline__ void conv_images(const ConvJob& job) {
    using T = typename Images::Number;
    const int size = job.height * job.width, image = int(blockIdx.x), threads = int(blockDim.x);
    const T* x = static_cast<const T*>(job.i.x) + i64(image) * job.channels * size;
    T* to = static_cast<T*>(job.i.numbers) + i64(image) * job.n_layers * job.layer_size;
    double *var = static_cast<double*>(job.planes) + i64(image) * 3 * size, *next = var + size, *mean = next + size;
    for (int a = int(threadIdx.x); a < size; a += threads) {
        double sum = 0.0;
        for (int c = 0; c < job.channels; ++c) sum = fma_(double(x[c * size + a]), double(x[c * size + a]), sum);
        var[a] = sum, mean[a] = 0.0;
    }
    __syncthreads();
    FastUnits u{0.0, 0.0, kFirstUnit, false};
    for (int h = 0; h < job.n_layers; ++h, to += job.layer_size) {
        const GeneralLayer& l = job.layers[h];
        u = fast_units(l, u.after);
        for (int a = int(threadIdx.x); a < size; a += threads) {
            const double lam = Images::variance(l, window_of(job, var, a / job.width, a % job.width, job.reach_y));
            RowNumbers n = activation_row(l, job.tables, lam);
            Images::coefficients(job, l, to, size, a, n);
            Images::write(job, l, u, to, size, a, n, var[a], mean[a], var);
            const RowState after = advance_row(l, {var[a], mean[a]}, n.q, n.mu);
            next[a] = after.var, mean[a] = after.mean;
        }
        __syncthreads();
        double* old = var;
        var = next, next = old;
    }
}

// Numbers of the layers of the fast path: a layer's unit follows from those before.
template <class T>
__device__ __forceinline__ void conv_layers(const ConvJob& job) {
    if (threadIdx.x != 0) return;
    FastUnits u{0.0, 0.0, kFirstUnit, false};
    for (int h = 0; h < job.n_layers; ++h) {
        const GeneralLayer& l = job.layers[h];
        u = fast_units(l, u.after);
        static_cast<ConvLayer<T>*>(job.fast)[h] = {u.after, fast_layer<T>(l, u), T(l.w), u.scaled};
    }
}

}  // namespace ntk

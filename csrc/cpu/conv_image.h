// Numbers of one image at all layers of a bias-free convolutional network with a positively homogeneous activation.
#pragma once
#include "../math/conv.h"
#include "conv_planes.h"

namespace ntk {
namespace {

// Arrays of one layer of one image (FastPoint): the first two always, the next two if a layer is scaled, all if there are seams. kHalfSum:
// kHalf summed over the columns of the window; kHalfColumns: kHalf column by column, (width, height).
enum FastArray { kRoot, kInverse, kHalf, kMean, kHalfSum, kHalfColumns };
static int fast_arrays(const ConvPlan& p) {
    if (p.pooled && !p.circular) return kHalfColumns + 1;
    bool scaled = false;
    double unit = kFirstUnit;
    for (int h = 0; h < p.n_layers; ++h) {
        const FastUnits u = fast_units(p.layers[h], unit);
        scaled = scaled || u.scaled, unit = u.after;
    }
    return scaled ? kMean + 1 : kInverse + 1;
}

template <class T>
struct FastImage {
    const T* data;  // (n_layers, arrays, size), then the channels, (channels, size)
    int size;       // of a plane, compact or doubled
    int arrays;
    // The first one if there is no such array: nobody reads it then.
    const T* array(int layer, int a) const { return data + (std::int64_t(layer) * arrays + (a < arrays ? a : 0)) * size; }
};

// From the window sums lam of the variances to the numbers of a layer, made (4, n): FastPoint; var and mean go on to the next layer.
static void fast_points(const GeneralLayer& layer, const FastUnits& units, double least, int n, const double* lam, double* var,
                        double* mean, double* made) {
    const GeneralLayer l = layer;  // copies: a store might change what a reference points to
    const FastUnits u = units;
    const Homogeneous activation{l.slope};
#pragma omp simd
    for (int k = 0; k < n; ++k) {
        const double window = fast_variance(l, lam[k], least);
        const RowNumbers row = activation.row(window);
        const FastPoint<double> point = fast_point(l, u, window, mean[k], var[k]);
        made[k] = point.root, made[k + n] = point.inv, made[k + 2 * n] = point.mean, made[k + 3 * n] = point.half;
        const RowState after = advance_row(l, {var[k], mean[k]}, row.q, row.mu);
        var[k] = after.var, mean[k] = after.mean;
    }
}

// Numbers of all layers of one image. x: (channels, positions); room: (8, positions).
template <class T>
void fast_image(const ConvPlan& p, const Geometry<T>& g, const T* x, bool twice, double* room, T* to, int size) {
    const int n = g.height * g.width, arrays = fast_arrays(p);
    double *var = room, *mean = room + n, *columns = room + 2 * n, *lam = room + 3 * n, *made = room + 4 * n;
    for (int k = 0; k < n; ++k) var[k] = mean[k] = 0.0;
    for (int c = 0; c < p.channels; ++c) {
#pragma omp simd
        for (int k = 0; k < n; ++k) made[k] = double(x[c * n + k]), var[k] += made[k] * made[k];
        put_plane(g, twice, made, to + (std::int64_t(p.n_layers) * arrays + c) * size);
    }
    double unit = kFirstUnit;
    for (int h = 0; h < p.n_layers; ++h) {
        const FastUnits u = fast_units(p.layers[h], unit);
        T* out = to + std::int64_t(h) * arrays * size;
        window_variances(g, var, columns, lam);
        fast_points(p.layers[h], u, least_variance(T(0)), n, lam, var, mean, made);
        put_plane(g, twice, made, out + kRoot * size);
        put_plane(g, twice, made + n, out + kInverse * size);
        if (arrays > kMean) {
            put_plane(g, twice, made + 2 * n, out + kMean * size);
            put_plane(g, twice, made + 3 * n, out + kHalf * size);
        }
        if (arrays > kHalfColumns) {
            for (int k = 0; k < n; ++k) columns[k] *= 0.5 / u.before;
            put_plane(g, twice, columns, out + kHalfSum * size);
            for (int c = 0; c < g.width; ++c)
                for (int r = 0; r < g.height; ++r) out[kHalfColumns * size + c * g.height + r] = T(made[3 * n + r * g.width + c]);
        }
        unit = u.after;
    }
}

}  // namespace
}  // namespace ntk

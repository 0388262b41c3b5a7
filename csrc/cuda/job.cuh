// What the host hands to the kernels: the structs of ../cpu/kernels.h for the device, one Job per tile. Packed by
// python/ntkfast/_cuda/layout.py; tests/cuda/test_kernels.py compares the sizes.
#pragma once
#include "../math/hermite.h"
#include "../math/layer.h"
#include "../math/pair.h"
#include "../math/table.h"

namespace ntk {

using i64 = long long;

// One homogeneous layer, its numbers already in the type of the arithmetic.
template <class T>
struct PrefixLayer {
    HomogeneousNumbers<T> numbers;
    T w_all;
    int signs, signs_after, range, outer, slice_w, slice_v;
};

struct DevicePlan {
    const void* prefix;          // (n_prefix,) PrefixLayer<T>
    const GeneralLayer* suffix;  // (n_suffix,)
    const HermiteTable* tables;
    double nu, beta;             // after the prefix S_ii = nu |x_i|^2 and the mean is beta |x_i|
    int n_prefix, n_suffix;
};

// One side of a tile.
struct Side {
    const void* x;       // (n, stride) rows
    i64 stride;
    const double* inv;   // (n,) 1 / |row as stored|, 0 for zero rows
    const double* norm;  // (n,) |x_i|
};

// K_ij = (mix) f_i f_j + h_i h_j
struct Output {
    void* data;              // (rows, stride)
    void* mirror;            // K_ji at mirror + j * mirror_stride + i; null for none
    i64 stride, mirror_stride;
    Mix mix;
    const double *fi, *fj;   // (rows,), (cols,)
    const double *hi, *hj;   // (rows,), (cols,)
    const double* diagonal;  // (rows,) exact values where i and j are one point, or null
    const void* table;       // TablePanels<T> of the sum in brackets for gram_table, else null
};

// All slices of layer_grams.
struct Slices {
    void* data;          // (slices, rows, stride)
    void* mirror;
    i64 stride, mirror_stride, slice_stride, mirror_slice_stride;
    const double *fi, *fj;
    double readout_cov, readout_const;
    void* own;           // (blocks, n_prefix, 3, 256) of T: own_w, own_v, growth of every layer
    double* own_suffix;  // (blocks, n_suffix, 4, 256): own_w, own_b, own_v, factor
    i64 readout;         // index of the readout's slice, -1 for none
};

constexpr int kOutputs = 3;

struct Job {
    DevicePlan plan;
    const void* products;  // (rows, stride) <x_i, y_j> of the rows as stored; the outputs lie elsewhere
    i64 stride, rows, cols, dim;
    Side i, j;
    double close;          // pairs with 1 - |rho| below this get their angle from differences
    int diagonal;          // 1: i == j is one point, and only pairs with i <= j are computed if there is a mirror
    int n_outputs;
    int want_last;         // some mix has last != 0
    int unused;
    Output outputs[kOutputs];
    Slices slices;
};

}  // namespace ntk

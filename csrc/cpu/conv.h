// The seam between the bindings and the kernels of convolutional networks (gram_conv.cpp).
#pragma once
#include "kernels.h"

namespace ntk {

// All layers share one window; cw of a layer is per slot. `fast`: no biases, one positively homogeneous activation, no
// negative correlations after the first layer (conv_fast.h); else conv_general.h.
struct ConvPlan {
    const GeneralLayer* layers;  // (n_layers,)
    int n_layers;
    const HermiteTable* tables;
    int height, width, channels;
    int reach_y, reach_x;        // the window has 2 reach + 1 slots an axis
    bool circular, pooled, fast;
};

// Numbers of all layers at all positions of images, made once for many pairs; freed by free.
struct ConvImages {
    const void* data;
    std::int64_t n;
    bool twice;  // every row twice: the second image of pooled kernels
};

// A rectangle of pairs of images, and a part of the shifts of a pooled kernel.
struct ConvTile {
    ConvImages x, y;
    std::int64_t i0, rows, j0, cols;
    bool triangle, strict;      // x and y are the same images: pairs with j < i, or j <= i if strict, are left alone
    bool paired;                // only the pairs (i0 + k, j0 + k); sums are (3, rows, 1)
    std::int64_t first, shifts; // row shifts first .. first + shifts - 1 of the second image; 0, 1 for flatten
    double* sums;               // (3, rows, cols): T + S, S, own term of the last layer, added up over positions
    double* slices;             // (n_layers, rows, cols) for layer_grams, or null
};

struct ConvKernels {
    // x: (n, channels, height, width); null: no memory
    void* (*prepare64)(const ConvPlan&, const double* x, std::int64_t n, bool twice);
    void* (*prepare32)(const ConvPlan&, const float* x, std::int64_t n, bool twice);
    // false: no memory; adds to what it is given
    bool (*tile64)(const ConvPlan&, const ConvTile&);
    bool (*tile32)(const ConvPlan&, const ConvTile&);
    std::int64_t (*bytes)(const ConvPlan&, bool single, bool twice);  // of one prepared image
};
const ConvKernels* conv_kernels_of(const char* isa);  // null if this build or processor lacks it

}  // namespace ntk

// Sums over positions of pairs of images: any layers; for layer_grams those of every layer. `far`: planes in global memory.
#include "cuda/conv_general.cuh"

#define NTK_CONV(name, shared)                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const __grid_constant__ ntk::ConvJob job) { \
        ntk::conv_tile<ntk::ConvAny, shared>(job);                                                             \
    }
NTK_CONV(gram_conv_general_f64, true)
NTK_CONV(gram_conv_general_far_f64, false)

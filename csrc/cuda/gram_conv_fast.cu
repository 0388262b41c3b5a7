// Sums over positions of pairs of images, bias-free homogeneous layers: without seams within the images (flatten kernels, circular
// padding) and with them; `far`: planes in global memory.
#include "cuda/conv_fast.cuh"

#define NTK_CONV(name, T, seams, shared, blocks)                                                               \
    extern "C" __global__ void __launch_bounds__(256, blocks) name(const __grid_constant__ ntk::ConvJob job) { \
        ntk::conv_tile<ntk::ConvFast<T, seams>, shared>(job);                                                  \
    }
NTK_CONV(gram_conv_fast_f64, double, false, true, 2)
NTK_CONV(gram_conv_fast_f32, float, false, true, 2)
NTK_CONV(gram_conv_seams_f64, double, true, true, 1)
NTK_CONV(gram_conv_seams_f32, float, true, true, 2)
NTK_CONV(gram_conv_far_f64, double, true, false, 1)
NTK_CONV(gram_conv_far_f32, float, true, false, 1)

// What gram_conv_fast.cu has left to do, added to its sums: planes that would lose digits. `far`: planes in global memory.
#include "cuda/conv_exact.cuh"

#define NTK_CONV(name, T, shared)                                                                         \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const __grid_constant__ ntk::ConvJob job) { \
        ntk::conv_tile<ntk::ConvExact<T>, shared, true>(job);                                             \
    }
NTK_CONV(gram_conv_exact_f64, double, true)
NTK_CONV(gram_conv_exact_f32, float, true)
NTK_CONV(gram_conv_exact_far_f64, double, false)
NTK_CONV(gram_conv_exact_far_f32, float, false)

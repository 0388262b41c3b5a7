// One Gram matrix per trained weight matrix.
#include "cuda/slices.cuh"

#define NTK_SLICES(name, T) \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const ntk::Job* job) { ntk::slices<T>(job); }
NTK_SLICES(layer_grams_f64, double)
NTK_SLICES(layer_grams_f32, float)

// Gram matrices of networks that are compiled to polynomials of one angle.
#include "cuda/gram.cuh"

#define NTK_GRAM(name, T)                                                            \
    extern "C" __global__ void __launch_bounds__(256, 3) name(const ntk::Job* job) { \
        ntk::gram<T, ntk::Lookup<T>>(job);                                           \
    }
NTK_GRAM(gram_table_f64, double)
NTK_GRAM(gram_table_f32, float)

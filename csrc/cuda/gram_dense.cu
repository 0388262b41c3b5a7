// Gram matrices of networks of homogeneous layers without biases.
#include "cuda/gram.cuh"

#define NTK_GRAM(name, T)                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const ntk::Job* job) { \
        ntk::gram<T, ntk::Recursion<T>>(job);                                        \
    }
NTK_GRAM(gram_dense_f64, double)
NTK_GRAM(gram_dense_f32, float)

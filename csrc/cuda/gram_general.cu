// Gram matrices of networks with biases or other activations.
#include "cuda/gram.cuh"

#define NTK_GRAM(name, T)                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const ntk::Job* job) { \
        ntk::gram<T, ntk::General<T>>(job);                                          \
    }
NTK_GRAM(gram_general_f64, double)
NTK_GRAM(gram_general_f32, float)

// Fused multiply-adds alone: 8 independent chains a thread, `rounds` of them; what the arithmetic units can do.
template <class T>
__device__ __forceinline__ void chains(T* out, int rounds) {
    T a[8];
    const T x = T(1) - T(1e-7), y = T(threadIdx.x + 1);
    for (int k = 0; k < 8; ++k) a[k] = T(k);
    for (int r = 0; r < rounds; ++r) {
#pragma unroll
        for (int k = 0; k < 8; ++k) a[k] = fma(a[k], x, y);
    }
    T sum = T(0);
    for (int k = 0; k < 8; ++k) sum += a[k];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) fma_f64(double* out, int rounds) { chains(out, rounds); }
extern "C" __global__ void __launch_bounds__(256) fma_f32(float* out, int rounds) { chains(out, rounds); }

// Faults that the simulator must find, each beside its cure: one body, two kernels. 64 threads a block.
//
//   x, out   (n,) in global memory
//   FAULT    marks the line that the report must name
namespace ntk {

template <bool cured>
__device__ void missing_barrier(const double* x, double* out, int) {
    __shared__ double s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (cured) __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];  // FAULT missing_barrier
}

template <bool cured>
__device__ void overwritten_too_early(const double* x, double* out, int) {
    __shared__ double s[64];
    for (int k = 0; k < 3; ++k) {
        s[threadIdx.x] = x[threadIdx.x] + k;  // FAULT overwritten_too_early
        __syncthreads();
        out[threadIdx.x] = s[63 - threadIdx.x];
        if (cured) __syncthreads();
    }
}

template <bool cured>
__device__ void warp_without_sync(const double* x, double* out, int) {
    __shared__ double s[64];
    const unsigned t = threadIdx.x;
    s[t] = x[t];
    if (cured) __syncwarp();
    if (t % 32 < 16) s[t] += s[t + 16];  // FAULT warp_without_sync
    out[t] = s[t];
}

template <bool cured>
__device__ void shuffle_as_fence(const double* x, double* out, int) {
    __shared__ double s[64];
    const unsigned t = threadIdx.x;
    s[t] = x[t];
    const double v = __shfl_xor_sync(0xffffffffu, x[t], 1);
    if (cured) __syncwarp();
    out[t] = s[t ^ 1] - v;  // FAULT shuffle_as_fence
}

template <bool cured>
__device__ void all_add(const double*, double* out, int) {
    if (cured)
        atomicAdd(out, 1.0);
    else
        out[0] += 1;  // FAULT all_add
}

// The same thread of two blocks: only a launch of more than one shows it.
template <bool cured>
__device__ void blocks_collide(const double* x, double* out, int) {
    if (!cured || blockIdx.x == 1) out[threadIdx.x] = x[threadIdx.x] + blockIdx.x;  // FAULT blocks_collide
}

template <bool cured>
__device__ void divergent_barrier(const double* x, double* out, int) {
    if (cured || threadIdx.x < 32)
        __syncthreads();
    else {
        out[0] = x[0];
        __syncthreads();  // FAULT divergent_barrier
    }
}

template <bool cured>
__device__ void barrier_after_return(const double* x, double* out, int) {
    if (!cured && threadIdx.x >= 40) return;
    __syncthreads();  // FAULT barrier_after_return
    if (threadIdx.x < 40) out[threadIdx.x] = x[threadIdx.x];
}

template <bool cured>
__device__ void half_a_warp(const double* x, double* out, int) {
    double v = x[threadIdx.x];
    if (threadIdx.x % 32 < 16)
        v += __shfl_down_sync(cured ? 0x0000ffffu : 0xffffffffu, v, 1, 16);  // FAULT half_a_warp
    out[threadIdx.x] = v;
}

template <bool cured>
__device__ void lane_outside(const double* x, double* out, int) {
    double v = x[threadIdx.x];
    if (threadIdx.x % 32 < 16) v += __shfl_sync(0x0000ffffu, v, cured ? 15 : 16);  // FAULT lane_outside
    out[threadIdx.x] = v;
}

template <bool cured>
__device__ void not_in_own_mask(const double* x, double* out, int) {
    __syncwarp(cured ? 0xffffffffu : 0xfffffffeu);  // FAULT not_in_own_mask
    out[threadIdx.x] = x[threadIdx.x];
}

template <bool cured>
__device__ void beyond_shared(const double* x, double* out, int n) {
    __shared__ double s[2][32];
    const int k = n - (cured ? 33 : 32);
    if (threadIdx.x == 0) s[1][k] = x[0];  // FAULT beyond_shared
    if (threadIdx.x == 0) out[0] = s[1][31];
}

// The cure is in the launch: eight bytes more.
template <bool cured>
__device__ void dynamic_too_small(const double* x, double* out, int) {
    extern __shared__ __align__(16) unsigned char ntk_shared[];
    double* s = reinterpret_cast<double*>(ntk_shared);
    s[threadIdx.x] = x[threadIdx.x];  // FAULT dynamic_too_small
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];
}

template <bool cured>
__device__ void beyond_global(const double* x, double* out, int n) {
    const int k = blockIdx.x * 64 + threadIdx.x + 1;
    if (cured ? k < n : k <= n) out[k] = x[k - 1];  // FAULT beyond_global
}

template <bool cured>
__device__ void misaligned(const double* x, double* out, int) {
    const double2 v = *reinterpret_cast<const double2*>(x + (cured ? 2 : 1));  // FAULT misaligned
    if (threadIdx.x == 0) out[0] = v.x + v.y;
}

template <bool cured>
__device__ void overflow(const double* x, double* out, int n) {
    const int m = 1000 * n;
    out[threadIdx.x] = x[cured ? (long long)m * m % n : m * m % n & 63];  // FAULT overflow
}

template <bool cured>
__device__ void unwritten(const double* x, double* out, int) {
    extern __shared__ __align__(16) unsigned char ntk_shared[];
    double* s = reinterpret_cast<double*>(ntk_shared);
    if (threadIdx.x < (cured ? 64 : 63)) s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];
}

// As above in a fixed array, which the block before has written.
template <bool cured>
__device__ void left_by_another_block(const double* x, double* out, int) {
    __shared__ double s[64];
    if (cured || blockIdx.x == 0) s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    if (blockIdx.x == 1) out[threadIdx.x] = s[63 - threadIdx.x];
}

#define FAULT(name)                                                                                            \
    extern "C" __global__ void __launch_bounds__(64) name##_fault(const double* x, double* out, int n) {      \
        name<false>(x, out, n);                                                                                \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(64) name##_cured(const double* x, double* out, int n) {      \
        name<true>(x, out, n);                                                                                 \
    }
FAULT(missing_barrier)
FAULT(overwritten_too_early)
FAULT(warp_without_sync)
FAULT(shuffle_as_fence)
FAULT(all_add)
FAULT(blocks_collide)
FAULT(divergent_barrier)
FAULT(barrier_after_return)
FAULT(half_a_warp)
FAULT(lane_outside)
FAULT(not_in_own_mask)
FAULT(beyond_shared)
FAULT(dynamic_too_small)
FAULT(beyond_global)
FAULT(misaligned)
FAULT(overflow)
FAULT(unwritten)
FAULT(left_by_another_block)

}  // namespace ntk

// The units of every pair added up in their order, and the results from the sums. A thread takes a pair.
#include "cuda/conv.cuh"

namespace ntk {

template <class T>
__device__ __forceinline__ void put(void* data, i64 stride, void* mirror, i64 mirror_stride, const ConvPair& p, double value) {
    static_cast<T*>(data)[p.i * stride + p.j] = T(value);
    if (mirror) static_cast<T*>(mirror)[p.j * mirror_stride + p.i] = T(value);
}

template <class T>
__device__ __forceinline__ void conv_results(const ConvJob& job) {
    const int at = int(blockIdx.x) * kConvThreads + int(threadIdx.x);
    if (at >= job.pairs) return;
    const ConvPair p = conv_pair(job, job.first + at);
    if (!p.wanted) return;
    double total[kTotals] = {0.0, 0.0, 0.0};
    for (int chunk = 0; chunk < job.chunks; ++chunk)
        for (int t = 0; t < kTotals; ++t) total[t] += job.parts[(i64(at) * job.chunks + chunk) * kParts + t];
    for (int o = 0; o < job.n_outputs; ++o) {
        const Output& out = job.outputs[o];
        const double value = mix_sums(out.mix, total[0], total[1], total[2]);
        const bool exact = out.diagonal && p.i == p.j;
        put<T>(out.data, out.stride, out.mirror, out.mirror_stride, p, exact ? out.diagonal[p.i] : value * out.fi[p.i] * out.fj[p.j]);
    }
    if (!job.slices) return;
    const Slices& out = job.grams;
    auto slice = [&](int k, double value) {
        put<T>(static_cast<T*>(out.data) + k * out.slice_stride, out.stride,
               out.mirror ? static_cast<T*>(out.mirror) + k * out.mirror_slice_stride : nullptr, out.mirror_stride, p,
               value * out.fi[p.i] * out.fj[p.j]);
    };
    for (int h = 0; h < job.n_layers; ++h)
        if (job.layers[h].slice_w >= 0) slice(job.layers[h].slice_w, job.slices[i64(at) * job.n_layers + h]);
    if (out.readout >= 0) slice(int(out.readout), total[1]);
}

}  // namespace ntk

#define NTK_RESULTS(name, T) \
    extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ ntk::ConvJob job) { ntk::conv_results<T>(job); }
NTK_RESULTS(conv_results_f64, double)
NTK_RESULTS(conv_results_f32, float)

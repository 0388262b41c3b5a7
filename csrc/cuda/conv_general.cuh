// Any convolutional network, in double (the twin of ../cpu/conv_general.h): planes E, F and T, one position a strip.
//
//   cost      windows read every slot of three planes; then the expectations of the activation (about 100 operations, for
//             Hermite series 10 a term) bind
//   grams     layer_grams keeps own term and factor of every layer in job.own, then goes back through the layers
#pragma once
#include "conv.cuh"

namespace ntk {

// Numbers of a layer of an image, (positions,) each; the Hermite coefficients follow.
enum ConvNumbers { kLam, kRowRoot, kRowInverse, kRowQ, kRowMu, kA1, kA2, kA3, kRowMean, kRowHalf, kConvNumbers };

// One image at one position.
struct ConvRow {
    RowNumbers numbers;
    double mean;
    const double* terms;  // of the position, `size` apart
};
__device__ __forceinline__ ConvRow conv_row(const double* layer, int size, int at) {
    const double* p = layer + at;
    auto number = [&](int k) { return __ldg(p + k * size); };
    return {{number(kLam), number(kRowRoot), number(kRowInverse), number(kRowQ), number(kRowMu), number(kA1), number(kA2), number(kA3)},
            number(kRowMean), p + kConvNumbers * size};
}

// Rows of different variance, as panel_pair.
__device__ __forceinline__ PairNumbers series_pair(const HermiteTable& t, const ConvRow& i, const ConvRow& j, int size, Correlation c) {
    const double side = hermite_side(t, c.s), r2 = (1.0 - c.x) * (1.0 - c.x), u = c.x * (2.0 - c.x);
    const double *a = i.terms, *b = j.terms;
    HermiteSum sum{0.0, 0.0, 0.0, 0.0, 0.0};
    for (int m = 0; m < t.evens; ++m, a += size, b += size) hermite_even(sum, __ldg(a), __ldg(b), 2.0 * m, side, r2, u);
    const double even = sum.d;
    sum.d = 0.0, sum.e = 0.0, sum.before = 0.0;
    for (int m = 0; m < t.odds; ++m, a += size, b += size) hermite_odd(sum, __ldg(a), __ldg(b), 2.0 * m + 1.0, c.x, c.s, r2, u);
    return {sum.w, hermite_derivative(even, sum.d, c.x, c.s, i.numbers.inv, j.numbers.inv), side, sum.q, -1.0};
}

struct ConvAny {
    using Number = double;
    static constexpr int kPlanes = 3, kRows = 1;
    const ConvJob& job;
    ConvMemory& memory;
    const int i, j;

    __device__ __forceinline__ int positions() const { return job.height * job.width; }
    __device__ __forceinline__ const double* numbers(const ConvSide& side, int image, int h) const {
        return static_cast<const double*>(side.numbers) + (i64(image) * job.n_layers + h) * job.layer_size;
    }
    __device__ __forceinline__ int other(ConvShift s, const Strip& p) const {
        return partner(p.row, s.y, job.height) * job.width + partner(p.column, s.x, job.width);
    }
    __device__ __forceinline__ void start(ConvShift s, const Strip& p, double* to) const {
        const int size = positions(), a = p.row * job.width + p.column, b = other(s, p);
        const double *x = static_cast<const double*>(job.i.x) + i64(i) * job.channels * size + a;
        const double *y = static_cast<const double*>(job.j.x) + i64(j) * job.channels * size + b;
        double e = 0.0, f = 0.0;
        for (int c = 0; c < job.channels; ++c) {
            const double minus = x[c * size] - y[c * size], plus = x[c * size] + y[c * size];
            e = fma_(0.5 * minus, minus, e), f = fma_(0.5 * plus, plus, f);
        }
        to[a] = e, to[size + a] = f, to[2 * size + a] = 0.0;
    }
    __device__ __forceinline__ bool layer(int h, ConvShift s, const Strip& p, const double* from, double* to) const {
        const GeneralLayer& l = job.layers[h];
        const int size = positions(), a = p.row * job.width + p.column, b = other(s, p);
        const double *ni = numbers(job.i, i, h), *nj = numbers(job.j, j, h);
        double w[kPlanes];
        const ConvHalves<double> half = {ni + kRowHalf * size, nj + kRowHalf * size, nullptr, nullptr};
        any_window(job, s, p.row, p.column, from, 2, half, w);
        const ConvState window = {l.cw * w[0], l.cw * w[1], l.cw * w[2]}, before = {from[a], from[size + a], from[2 * size + a]};
        const ConvRow x = conv_row(ni, size, a), y = conv_row(nj, size, b);
        const RowNumbers &ri = x.numbers, &rj = y.numbers;
        const Correlation c = conv_correlation(l, window.e, window.f, ri.root, ri.inv, rj.root, rj.inv);
        const bool panels = l.activation == kHermite && job.tables[l.table].panels > 0;
        const PairNumbers u = panels ? series_pair(job.tables[l.table], x, y, size, c) : activation_pair(l, job.tables, ri, rj, c);
        const ConvResult r = conv_step(l, window, before, u, {ri.root, ri.inv, x.mean, ri.mu, ri.q},
                                       {rj.root, rj.inv, y.mean, rj.mu, rj.q});
        to[a] = r.state.e, to[size + a] = r.state.f, to[2 * size + a] = r.state.t;
        if (job.own) {
            double* own = own_terms(h) + a;
            own[0] = r.own, own[size] = r.factor;
        }
        if (h + 1 < job.n_layers) return false;
        const int t = int(threadIdx.x);
        const double cov = 0.5 * (r.state.f - r.state.e);
        memory.total[0][t] += r.state.t + cov, memory.total[1][t] += cov, memory.total[2][t] += r.last;
        return false;
    }

    __device__ __forceinline__ double unit() const { return 1.0; }

    // layer_grams (flatten): own terms and factors of layer h, (2, positions), for the group of this thread.
    __device__ __forceinline__ double* own_terms(int h) const {
        const int lanes = job.groups == 1 ? int(blockDim.x) : strips_of<kRows>(job);
        const i64 group = i64(blockIdx.x) * job.groups + int(threadIdx.x) / lanes;
        return job.own + (group * job.n_layers + h) * 2 * positions();
    }
    // B = 1 at the end, G = sum own B, B = p^2 B + window sum of factor B. All threads of the block call this.
    __device__ __forceinline__ void finish(const ConvGroup& g, double* B, double* product) const {
        if (!job.own) return;
        const int size = positions();
        for (int a = g.lane; g.wanted && a < size; a += g.lanes) B[a] = 1.0;
        for (int h = job.n_layers - 1; h >= 0; --h) {
            const double* own = own_terms(h);
            double sum = 0.0;
            for (int a = g.lane; g.wanted && a < size; a += g.lanes) {
                sum = fma_(own[a], B[a], sum);
                product[a] = own[size + a] * B[a];
            }
            sum = group_sum(memory, g, sum);  // and the products are there
            if (g.wanted && g.lane == 0) job.slices[i64(g.unit) * job.n_layers + h] = sum;
            const double skip = job.layers[h].p * job.layers[h].p;
            for (int a = g.lane; g.wanted && a < size; a += g.lanes) {
                double w[1];
                any_window(job, {0, 0}, a / job.width, a % job.width, product, 0, ConvHalves<double>{}, w);
                B[a] = fma_(skip, B[a], w[0]);
            }
            __syncthreads();
        }
    }
};

}  // namespace ntk

// Values of a network at single angles, for the compiler of tables: sums keep their rounding errors, so that the nodes are
// better than the fit that is judged by them.
#pragma once
#include "../math/pair.h"
#include "block.h"

namespace ntk {

// All arrays (kChunk,).
struct NodeArrays {
    double x[kChunk], x_low[kChunk], s[kChunk], theta[kChunk], theta_low[kChunk], last[kChunk];
};

template <bool SIGNED, int RANGE>
NTK_INLINE void node_step(NodeArrays& a, int k, const HomogeneousNumbers<double>& l, double w_all) {
    PairState<double, Kahan<double>> p{{a.x[k], a.x_low[k]}, SIGNED ? a.s[k] : 1.0, {a.theta[k], a.theta_low[k]}};
    const LayerTerms<double> t = homogeneous_step<SIGNED, RANGE, true>(p, l);
    a.x[k] = p.x.hi, a.x_low[k] = p.x.lo;
    if (SIGNED) a.s[k] = p.s;
    a.theta[k] = p.theta.hi, a.theta_low[k] = p.theta.lo;
    a.last[k] = w_all * t.own_w;
}
template <bool SIGNED, int RANGE>
static void node_layer(NodeArrays& a, int n, const HomogeneousLayer& layer) {
    const HomogeneousNumbers<double> l = numbers<double>(layer);
    const double w_all = layer.w_all;
#pragma omp simd
    for (int k = 0; k < n; ++k) node_step<SIGNED, RANGE>(a, k, l, w_all);
}

// As pairs<double> for a plan without suffix: theta Theta + cov S + mean b^2 + last G of unit-norm points.
static bool prefix_nodes(const Plan& plan, const Pairs& p) {
    Buffer<NodeArrays> memory(1);
    if (!memory.data) return false;
    NodeArrays& a = *memory.data;
    const Mix mix{p.theta, p.cov, p.mean, p.last};
    const double mean = plan.beta / sqrt_(plan.nu);
    for (std::int64_t start = 0; start < p.n; start += kChunk) {
        const int n = p.n - start < kChunk ? int(p.n - start) : kChunk;
        for (int k = 0; k < n; ++k) {
            a.x[k] = p.x[start + k], a.s[k] = p.s[start + k];
            a.x_low[k] = a.theta[k] = a.theta_low[k] = a.last[k] = 0.0;
        }
        for (int h = 0; h < plan.n_prefix; ++h) {
            const HomogeneousLayer& l = plan.prefix[h];
            if (l.signs) node_layer<true, 0>(a, n, l);
            else if (l.range == 0) node_layer<false, 0>(a, n, l);
            else if (l.range == 1) node_layer<false, 1>(a, n, l);
            else node_layer<false, 2>(a, n, l);
            // As in homogeneous_block: rho >= 0 now.
            if (l.signs && !l.signs_after)
                for (int k = 0; k < n; ++k) a.s[k] = 1.0;
        }
        for (int k = 0; k < n; ++k) {
            // A sum of two doubles rounds to one: the results are doubles.
            const double theta = a.theta[k] + a.theta_low[k], x = a.x[k] + a.x_low[k];
            p.out[start + k] = mix_homogeneous(mix, theta, x, a.s[k], mean) + p.last * a.last[k];
        }
    }
    return true;
}

}  // namespace ntk

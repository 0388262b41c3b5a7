// The homogeneous layers of a plan over one block: state x, s, theta in L1, coefficients broadcast.
//
//   cost per pair and layer: 2 fits in z (33, 23 or 15 fused operations), one square root, about 12 more
#pragma once
#include "block.h"

namespace ntk {

// One chunk, one layer. All arrays (n,). OWN: what layer_grams needs is written too.
template <class T>
struct Chunk {
    T *x, *x_low, *s, *theta, *theta_low;
    T *own_w, *own_v, *growth;  // only with OWN
    int n;
};

template <bool SIGNED, int RANGE, bool OUTER, bool OWN, class T>
NTK_INLINE void homogeneous_pair(const Chunk<T>& c, int k, const HomogeneousNumbers<T>& l) {
    PairState<T> p{load(c.x, c.x_low, k), SIGNED ? c.s[k] : T(1), load(c.theta, c.theta_low, k)};
    LayerTerms<T> t = homogeneous_step<SIGNED, RANGE, OUTER>(p, l);
    store(c.x, c.x_low, k, p.x);
    if (SIGNED) c.s[k] = p.s;
    store(c.theta, c.theta_low, k, p.theta);
    if (OWN) {
        c.own_w[k] = t.own_w;
        c.own_v[k] = t.own_v;
        c.growth[k] = t.growth;
    }
}

template <bool SIGNED, int RANGE, bool OUTER, bool OWN, class T>
static void homogeneous_chunk(const Chunk<T>& chunk, const HomogeneousLayer& layer) {
    const Chunk<T> c = chunk;
    const HomogeneousNumbers<T> l = numbers<T>(layer);
    const int n = c.n;
#pragma omp simd
    for (int k = 0; k < n; ++k) homogeneous_pair<SIGNED, RANGE, OUTER, OWN>(c, k, l);
}

template <class T>
static void homogeneous_layer(const Chunk<T>& c, const HomogeneousLayer& l, bool own) {
    if (own) return homogeneous_chunk<true, 0, true, true>(c, l);
    const bool outer = l.v != 0.0;
    if (l.signs) return outer ? homogeneous_chunk<true, 0, true, false>(c, l) : homogeneous_chunk<true, 0, false, false>(c, l);
    if (outer) return homogeneous_chunk<false, 0, true, false>(c, l);
    if (l.range == 0) return homogeneous_chunk<false, 0, false, false>(c, l);
    if (l.range == 1) return homogeneous_chunk<false, 1, false, false>(c, l);
    homogeneous_chunk<false, 2, false, false>(c, l);
}

// G / (nu |x_i| |x_j|) of the last inner matrix, from the state before the last layer: what the layer adds, w = w_all.
template <class T>
NTK_INLINE void last_pair(const T* x, const T* s, T* last, int k, const HomogeneousNumbers<T>& l, T w) {
    PairState<T> p{{x[k]}, s[k], {T(0)}};
    last[k] = w * homogeneous_step<true, 0, false>(p, l).own_w;
}
template <class T>
static void homogeneous_last(const T* x, const T* s, T* last, int n, const HomogeneousLayer& layer) {
    const HomogeneousNumbers<T> l = numbers<T>(layer);
    const T w = T(layer.w_all);
#pragma omp simd
    for (int k = 0; k < n; ++k) last_pair(x, s, last, k, l, w);
}

// The whole prefix over n pairs of a block, from `first` on. own: (n_prefix, 3, own_stride) own_w, own_v, growth of
// every layer for layer_grams, or null. last: the Gram of the last inner matrix is wanted.
template <class T>
static void homogeneous_block(const Plan& plan, Block<T>& b, int first, int n, bool last, T* own,
                              std::int64_t own_stride) {
    // Whole vectors: the pairs after n hold finite leftovers.
    const int end = first + ((n + 15) & ~15);
    for (int start = first; start < end; start += kChunk) {
        const int size = end - start < kChunk ? end - start : kChunk;
        Chunk<T> c{b.x + start, b.x_low + start, b.s + start, b.theta + start, b.theta_low + start, nullptr, nullptr,
                   nullptr, size};
        for (int h = 0; h < plan.n_prefix; ++h) {
            const HomogeneousLayer& l = plan.prefix[h];
            if (last && h == plan.n_prefix - 1) homogeneous_last(c.x, c.s, b.last + start, size, l);
            if (own) {
                c.own_w = own + 3 * h * own_stride + start;
                c.own_v = c.own_w + own_stride;
                c.growth = c.own_v + own_stride;
            }
            homogeneous_layer(c, l, own != nullptr);
            // rho >= 0 now, but rounding may have left -1e-17; the layers that follow do not look at s.
            if (l.signs && !l.signs_after)
                for (int k = 0; k < size; ++k) c.s[k] = T(1);
        }
    }
}

}  // namespace ntk

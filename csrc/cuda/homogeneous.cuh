// The homogeneous layers of a plan over the pairs of a thread: states in registers, coefficients uniform.
#pragma once
#include "correlations.cuh"

namespace ntk {

template <bool SIGNED, int RANGE, bool OUTER, class T, int PAIRS>
__device__ __forceinline__ void homogeneous_pairs(PairState<T> (&state)[PAIRS], const HomogeneousNumbers<T>& l) {
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) homogeneous_step<SIGNED, RANGE, OUTER>(state[p], l);
}

// Every branch is the same for all threads.
template <class T, int PAIRS>
__device__ __forceinline__ void homogeneous_layer(PairState<T> (&state)[PAIRS], const PrefixLayer<T>& layer) {
    const HomogeneousNumbers<T> l = layer.numbers;
    if (layer.signs) {
        if (layer.outer) homogeneous_pairs<true, 0, true>(state, l);
        else homogeneous_pairs<true, 0, false>(state, l);
        // rho >= 0 now, but rounding may have left -1e-17; the layers that follow do not look at s.
        if (!layer.signs_after) {
#pragma unroll
            for (int p = 0; p < PAIRS; ++p) state[p].s = T(1);
        }
    } else if (layer.outer) {
        homogeneous_pairs<false, 0, true>(state, l);
    } else if (layer.range == 0) {
        homogeneous_pairs<false, 0, false>(state, l);
    } else if (layer.range == 1) {
        homogeneous_pairs<false, 1, false>(state, l);
    } else {
        homogeneous_pairs<false, 2, false>(state, l);
    }
}

// The whole prefix. last: the Gram of the last inner matrix, divided by nu |x_i| |x_j|, if it is wanted (else 0).
template <class T, int PAIRS>
__device__ __forceinline__ void homogeneous_block(const DevicePlan& plan, bool want_last, PairState<T> (&state)[PAIRS],
                                                  T (&last)[PAIRS]) {
    const PrefixLayer<T>* layers = static_cast<const PrefixLayer<T>*>(plan.prefix);
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) last[p] = T(0);
    for (int h = 0; h < plan.n_prefix; ++h) {
        if (want_last && h == plan.n_prefix - 1) {
#pragma unroll
            for (int p = 0; p < PAIRS; ++p) {
                PairState<T> before{{state[p].x.hi}, state[p].s, {T(0)}};
                last[p] = layers[h].w_all * homogeneous_step<true, 0, false>(before, layers[h].numbers).own_w;
            }
        }
        homogeneous_layer(state, layers[h]);
    }
}

}  // namespace ntk

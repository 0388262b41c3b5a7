// Some registers of T side by side that behave like one number in the templates of csrc/math: the registers hide each other's
// latency.
#pragma once
#include "../math/portable.h"
#include "lanes.h"

namespace ntk {
namespace {
namespace packs {  // found by their arguments; they must not hide the functions of scalars

template <class T, int U>
struct Pack {
    using V = typename Lanes<T>::V;
    static constexpr int kWidth = U * kLanes<T>;
    V v[U];
    Pack() = default;
    // Register by register: a copy of the whole goes through memory.
    NTK_MEMBER Pack(const Pack& o) {
        NTK_UNROLL
        for (int u = 0; u < U; ++u) v[u] = o.v[u];
    }
    NTK_MEMBER Pack& operator=(const Pack& o) {
        NTK_UNROLL
        for (int u = 0; u < U; ++u) v[u] = o.v[u];
        return *this;
    }
    NTK_MEMBER explicit Pack(double x) {
        NTK_UNROLL
        for (int u = 0; u < U; ++u) v[u] = broadcast(T(x));
    }
};
template <class T, int U>
struct PackMask {
    typename Lanes<T>::Mask m[U];
};
template <int U, class T>
NTK_INLINE Pack<T, U> load_pack(const T* from) {
    Pack<T, U> p;
    NTK_UNROLL
    for (int u = 0; u < U; ++u) p.v[u] = load_lanes(from + u * kLanes<T>);
    return p;
}
template <class T, int U>
NTK_INLINE void save_pack(T* to, const Pack<T, U>& p) {
    NTK_UNROLL
    for (int u = 0; u < U; ++u) save_lanes(to + u * kLanes<T>, p.v[u]);
}

#define NTK_PACK(name, expression)                                                \
    template <class T, int U>                                                     \
    NTK_INLINE Pack<T, U> name(const Pack<T, U>& a, const Pack<T, U>& b) {        \
        Pack<T, U> r;                                                             \
        NTK_UNROLL                                                                \
        for (int u = 0; u < U; ++u) r.v[u] = expression;                          \
        return r;                                                                 \
    }
NTK_PACK(operator+, a.v[u] + b.v[u])
NTK_PACK(operator-, a.v[u] - b.v[u])
NTK_PACK(operator*, a.v[u] * b.v[u])
NTK_PACK(at_least, max_lanes(b.v[u], a.v[u]))
NTK_PACK(at_most, min_lanes(b.v[u], a.v[u]))
#undef NTK_PACK

template <class T, int U>
NTK_INLINE Pack<T, U> operator-(const Pack<T, U>& a) {
    Pack<T, U> r;
    NTK_UNROLL
    for (int u = 0; u < U; ++u) r.v[u] = -a.v[u];
    return r;
}
template <class T, int U>
NTK_INLINE Pack<T, U> sqrt_(const Pack<T, U>& a) {
    Pack<T, U> r;
    NTK_UNROLL
    for (int u = 0; u < U; ++u) r.v[u] = sqrt_lanes(a.v[u]);
    return r;
}
template <class T, int U>
NTK_INLINE Pack<T, U> fma_(const Pack<T, U>& a, const Pack<T, U>& b, const Pack<T, U>& c) {
    Pack<T, U> r;
    NTK_UNROLL
    for (int u = 0; u < U; ++u) r.v[u] = fma_lanes(a.v[u], b.v[u], c.v[u]);
    return r;
}
template <class T, int U>
NTK_INLINE PackMask<T, U> operator<(const Pack<T, U>& a, const Pack<T, U>& b) {
    PackMask<T, U> r;
    NTK_UNROLL
    for (int u = 0; u < U; ++u) r.m[u] = a.v[u] < b.v[u];
    return r;
}
template <class T, int U>
NTK_INLINE Pack<T, U> choose(const PackMask<T, U>& c, const Pack<T, U>& yes, const Pack<T, U>& no) {
    Pack<T, U> r;
    NTK_UNROLL
    for (int u = 0; u < U; ++u) r.v[u] = c.m[u] ? yes.v[u] : no.v[u];
    return r;
}
// a where the mask does not say so; else 0.
template <class T, int U>
NTK_INLINE Pack<T, U> drop(const PackMask<T, U>& c, const Pack<T, U>& a) {
    using V = typename Lanes<T>::V;
    Pack<T, U> r;
    NTK_UNROLL
    for (int u = 0; u < U; ++u) r.v[u] = V(typename Lanes<T>::Mask(a.v[u]) & ~c.m[u]);
    return r;
}
// A mask from numbers of which all bits are set or none.
template <int U, class T>
NTK_INLINE PackMask<T, U> load_mask(const T* from) {
    PackMask<T, U> r;
    NTK_UNROLL
    for (int u = 0; u < U; ++u) __builtin_memcpy(&r.m[u], from + u * kLanes<T>, sizeof r.m[u]);
    return r;
}

}  // namespace packs
using packs::load_mask;
using packs::load_pack;
using packs::Pack;
using packs::PackMask;

}  // namespace

template <class T, int U>
struct Single<Pack<T, U>> : Single<T> {};

}  // namespace ntk

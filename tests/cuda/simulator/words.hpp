// The words of CUDA C++ that the kernels use, on top of the machine. Add here what a kernel needs; what is not here does
// not compile, which is the point: tensor cores, asynchronous copies and inline PTX cannot be simulated.
#pragma once

#include <atomic>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <type_traits>

#include "machine.hpp"

#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __global__
#define __launch_bounds__(...)
#define __shared__ thread_local  // static storage, one copy per running block, and allowed after `extern`

template <class T, int bytes>
struct alignas(bytes) Vector2 {
    T x, y;
};
template <class T, int bytes>
struct alignas(bytes) Vector4 {
    T x, y, z, w;
};
using float2 = Vector2<float, 8>;
using double2 = Vector2<double, 16>;
using int2 = Vector2<int, 8>;
using uint2 = Vector2<unsigned, 8>;
using longlong2 = Vector2<long long, 16>;
using float4 = Vector4<float, 16>;
using int4 = Vector4<int, 16>;
using uint4 = Vector4<unsigned, 16>;
using double4 = Vector4<double, 16>;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline double4 make_double4(double x, double y, double z, double w) { return {x, y, z, w}; }

namespace sim {
SIM_UNSEEN inline uint3 thread_index() { return machine.self->index; }
SIM_UNSEEN inline uint3 block_index() { return machine.index; }
SIM_UNSEEN inline dim3 block_size() { return machine.block; }
SIM_UNSEEN inline dim3 grid_size() { return machine.grid; }
SIM_UNSEEN inline int lane() { return int(machine.self->linear % kWarp); }

// A shuffle from lane `source`, or the lane's own value where it would leave its segment of `width` lanes.
template <class T>
T shuffle(unsigned mask, T value, int source, bool inside, const char* operation, Where where) {
    return exchange(mask, value, operation, where,
                    [&](auto slot) { return inside ? slot(unsigned(source)) : value; });
}
}  // namespace sim

#define threadIdx (::sim::thread_index())
#define blockIdx (::sim::block_index())
#define blockDim (::sim::block_size())
#define gridDim (::sim::grid_size())
#define warpSize 32

inline void __syncthreads(sim::Where where = sim::Where::current()) { sim::wait_for_block(where); }
inline int __syncthreads_or(int predicate, sim::Where where = sim::Where::current()) {
    return sim::wait_for_block(where, predicate != 0);
}
inline void __syncwarp(unsigned mask = ~0u, sim::Where where = sim::Where::current()) {
    sim::wait_for_warp(mask, where);
}
// Weak memory is not simulated; the thread sanitizer takes no account of fences either.
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, sim::Where where = sim::Where::current()) {
    const int first = sim::lane() & ~(width - 1);
    return sim::shuffle(mask, v, first + (source & (width - 1)), true, "__shfl_sync", where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, sim::Where where = sim::Where::current()) {
    const int source = sim::lane() ^ bits;
    // CUDA: earlier segments may be read, later ones not
    return sim::shuffle(mask, v, source, source / width <= sim::lane() / width, "__shfl_xor_sync", where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, sim::Where where = sim::Where::current()) {
    const int source = sim::lane() + int(by);
    return sim::shuffle(mask, v, source, source / width == sim::lane() / width, "__shfl_down_sync", where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, sim::Where where = sim::Where::current()) {
    const int source = sim::lane() - int(by);
    const bool inside = source >= (sim::lane() & ~(width - 1));
    return sim::shuffle(mask, v, source, inside, "__shfl_up_sync", where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
    return sim::exchange(mask, predicate != 0, "__ballot_sync", where, [&](auto slot) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < sim::kWarp; ++lane)
            if (mask >> lane & 1) votes |= unsigned(slot(lane)) << lane;
        return votes;
    });
}
inline int __any_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
    return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
    return __ballot_sync(mask, predicate, where) == mask;
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
    return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
    return std::atomic_ref<T>(*p).exchange(v, std::memory_order_relaxed);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    std::atomic_ref<T>(*p).compare_exchange_strong(expected, v, std::memory_order_relaxed);
    return expected;
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
    return std::atomic_ref<T>(*p).fetch_or(v, std::memory_order_relaxed);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
    std::atomic_ref<T> a(*p);
    T old = a.load(std::memory_order_relaxed);
    while (old < v && !a.compare_exchange_weak(old, v, std::memory_order_relaxed)) {
    }
    return old;
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
    std::atomic_ref<T> a(*p);
    T old = a.load(std::memory_order_relaxed);
    while (v < old && !a.compare_exchange_weak(old, v, std::memory_order_relaxed)) {
    }
    return old;
}

// Loads and stores with a hint for the caches: the hint is dropped.
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> v) {
    *p = v;
}

using std::max, std::min, std::isnan, std::isinf;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long b) { return __builtin_bit_cast(double, b); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int b) { return __builtin_bit_cast(float, b); }

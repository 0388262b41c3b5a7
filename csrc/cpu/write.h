// Results go to memory: row by row, and transposed to the mirror.
#pragma once
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "block.h"

namespace ntk {

// Eight numbers; 64-byte or 32-byte registers where the instruction set has them, pairs of smaller ones elsewhere.
template <class T>
struct EightOf;
template <>
struct EightOf<double> {
    typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
};
template <>
struct EightOf<float> {
    typedef float type __attribute__((vector_size(32), aligned(4), may_alias));
};

// to[j * to_stride + i] = from[i * from_stride + j], i, j < 8.
template <class T>
NTK_INLINE void transpose_eight(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride) {
    using Eight = typename EightOf<T>::type;
    Eight a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Eight*>(from + i * from_stride);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {  // pairs of neighbours
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)  // fours
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            a[i + k] = __builtin_shufflevector(b[i + k], b[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            a[i + k + 2] = __builtin_shufflevector(b[i + k], b[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        *reinterpret_cast<Eight*>(to + k * to_stride) = __builtin_shufflevector(a[k], a[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *reinterpret_cast<Eight*>(to + (k + 4) * to_stride) = __builtin_shufflevector(a[k], a[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// Stores of whole cache lines go past the caches: their old contents would only be fetched to be overwritten. The rest of a
// line belongs to the next patch and stays in the cache until that comes.
template <class T>
NTK_INLINE void stream_run(T* to, const T* from, std::int64_t n) {
    std::int64_t k = 0;
#ifdef __SSE2__
    constexpr std::int64_t line = 64 / sizeof(T), part = 16 / sizeof(T);
    for (; k < n && (reinterpret_cast<std::uintptr_t>(to + k) & 63); ++k) to[k] = from[k];
    for (; k + line <= n; k += line)
        for (std::int64_t m = k; m < k + line; m += part)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + m), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + m)));
#endif
    for (; k < n; ++k) to[k] = from[k];
}
// Streamed stores of this thread become visible to the others.
NTK_INLINE void finish_streams() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// A patch of results, (rows, kCols), goes to out (row by row) and, transposed, to the mirror. On a tile of the diagonal only
// pairs above it are written; `below` is the column, relative to the patch, of the first row's own point (INT64_MIN: no such
// tile). turned: (8, kPatch) room for eight columns.
template <class T>
static void write_patch(const T* result, int rows, int cols, std::int64_t below, T* out, std::int64_t stride, T* mirror,
                        std::int64_t mirror_stride, T* turned) {
    const bool triangle = mirror && below != INT64_MIN;
    for (int i = 0; i < rows; ++i) {
        const std::int64_t first = triangle && below + i > 0 ? below + i : 0;
        for (std::int64_t j = first; j < cols; ++j) out[i * stride + j] = result[i * kCols + j];
    }
    if (!mirror) return;
    for (int start = 0; start < cols; start += 8) {
        for (int i = 0; i < rows; i += 8) transpose_eight(result + i * kCols + start, kCols, turned + i, kPatch);
        for (int j = start; j < cols && j < start + 8; ++j) {
            const std::int64_t above = triangle ? j - below : rows;  // rows above the diagonal in column j
            stream_run(mirror + j * mirror_stride, turned + (j - start) * kPatch, above < rows ? above : rows);
        }
    }
}

}  // namespace ntk

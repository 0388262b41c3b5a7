// Results go to memory: row by row, and transposed to the mirror.
#pragma once
#include "block.h"
#include "lanes.h"

namespace ntk {
namespace {

using Index = std::int64_t;
NTK_INLINE Index smaller(Index a, Index b) { return a < b ? a : b; }

// A row of results as T; past the caches if `stream`, whole lines at a time: their old contents are never fetched.
template <class T>
NTK_INLINE void write_row(const T* from, Index count, T* to, bool stream) {
    constexpr Index n = kLanes<T>;
    Index k = 0;
    if (stream && reinterpret_cast<std::uintptr_t>(to) % sizeof(T) == 0) {
        while (k < count && reinterpret_cast<std::uintptr_t>(to + k) % kVectorBytes) to[k] = from[k], ++k;
        for (; k + n <= count; k += n) stream_lanes(to + k, load_lanes(from + k));
    }
    for (; k < count; ++k) to[k] = from[k];
}
// A patch of results, (rows, kCols), goes to out (row by row) and, transposed, to the mirror. On a tile of the diagonal only
// pairs above it are written; `below` is the column, relative to the patch, of the first row's own point (INT64_MIN: no such
// tile). turned: (kLanes, kPatch) room.
template <class T>
void write_patch(const T* result, int rows, int cols, Index below, T* out, Index stride, T* mirror, Index mirror_stride,
                 bool stream_rows, bool stream, T* turned) {
    constexpr int n = kLanes<T>;
    const bool triangle = mirror && below != INT64_MIN;
    for (int i = 0; i < rows; ++i) {
        const Index first = triangle && below + i > 0 ? below + i : 0;
        if (first < cols) write_row(result + i * kCols + first, cols - first, out + i * stride + first, stream_rows);
    }
    if (!mirror) return;
    for (int start = 0; start < cols; start += n) {
        // Every row of the mirror is on a page of its own: its ends, not whole lines, and its page are asked for early.
        for (Index j = start + 2 * n; j < smaller(start + 3 * n, cols); ++j) {
            __builtin_prefetch(mirror + j * mirror_stride, 1);
            __builtin_prefetch(mirror + j * mirror_stride + rows - 1, 1);
        }
        for (int i = 0; i < rows; i += n) {
            typename Lanes<T>::V r[n];
#pragma GCC unroll 16
            for (int k = 0; k < n; ++k) r[k] = load_lanes(result + (i + k) * kCols + start);
            transpose<T>(r);
#pragma GCC unroll 16
            for (int k = 0; k < n; ++k) save_lanes(turned + k * kPatch + i, r[k]);
        }
        for (Index j = start; j < smaller(start + n, cols); ++j) {
            const Index above = triangle ? j - below : rows;  // rows above the diagonal in column j
            write_row(turned + (j - start) * kPatch, smaller(above, rows), mirror + j * mirror_stride, stream);
        }
    }
}

}  // namespace
}  // namespace ntk

// Inner products of rows, C_ij = <a_i, b_j>, tile by tile: what follows runs while the tile is in the cache.
//
//   Packed          rows -> panels of kWide rows, features outermost: panel[p * kWide + r], zeros beyond the last row
//   micro           kNarrow x kWide sums in registers over at most kDepth features
//   product_tile    a tile of C from two packed sides; sums in A, the rows are T (both double, both float, or A wider)
//   for_each_tile   all tiles of a grid on all threads, each handed to what a thread works with
//   write_tile      a tile to the result and, transposed, to its mirror image
//
//   parallel   dynamic over tiles; a symmetric grid has those on and above the diagonal
//   memory     one copy of the rows; a thread: its tile, and both its sides in A where A is not T (under 4 MB)
//   cost       2 d operations a pair, at d = 784 at 75 to 80 % of the FMA peak with the results written; at small d the
//              time to write the results
#pragma once
#include <cstdlib>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "write.h"

namespace ntk {
namespace {

// Rows of a panel: the registers hold the sums of a strip of kNarrow rows of one side with a whole panel of the other.
template <class T>
constexpr int kWide = kVectors * kLanes<T>;
static_assert(kWide<double> % kNarrow == 0 && kWide<float> % kWide<double> == 0, "strips and panels must nest");

constexpr int kLine = 64;  // bytes of a cache line
// Features of one pass: a panel of one pass, 30 kB, stays in the L1 cache while the strips of the tile go by.
constexpr Index kDepth = 160;
// Largest side of a tile. The tile, both sides of a pass and those of the next stay in the L2 cache (1.3 MB or less).
template <class A>
constexpr Index kSide = sizeof(A) == 8 ? 192 : 384;
constexpr Index kLeastSide = 96;
static_assert(kSide<double> % kWide<float> == 0 && kSide<float> % kWide<float> == 0, "tiles begin at panels");

NTK_INLINE Index round_up(Index n, Index unit) { return (n + unit - 1) / unit * unit; }

// Memory of one scope, in huge pages if it is large: one strip and one panel meet two pages a step otherwise.
template <class T>
struct Pages {
    T* data;
    __attribute__((always_inline)) inline explicit Pages(Index count) : data(nullptr) {
        constexpr Index huge = Index(2) << 20;
        const Index bytes = (count > 0 ? count : 1) * Index(sizeof(T)), unit = bytes < huge / 8 ? 64 : huge;
        const Index size = round_up(bytes, unit);
        data = static_cast<T*>(std::aligned_alloc(std::size_t(unit), std::size_t(size)));
#ifdef __linux__
        if (data && unit == huge) madvise(data, std::size_t(size), MADV_HUGEPAGE);  // only advice
#endif
    }
    __attribute__((always_inline)) inline ~Pages() { std::free(data); }
    __attribute__((always_inline)) inline T* release() {
        T* kept = data;
        data = nullptr;
        return kept;
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
};

// ---- packing

// A kLanes x kLanes block of which rows x cols are there; zeros elsewhere.
template <class T>
NTK_INLINE void load_block(const T* x, Index stride, Index rows, Index cols, typename Lanes<T>::V* r) {
    constexpr int n = kLanes<T>;
    if (rows >= n && cols >= n) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) r[i] = load_lanes(x + i * stride);
        return;
    }
    T part[n * n] = {};
    for (int i = 0; i < smaller(rows, n); ++i)
        for (int p = 0; p < smaller(cols, n); ++p) part[i * n + p] = x[i * stride + p];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) r[i] = load_lanes(part + i * n);
}

// One panel (d, kWide) from `rows` rows of x.
template <class T>
void pack_panel(const T* x, Index stride, Index rows, Index d, T* panel) {
    constexpr int n = kLanes<T>;
    for (int g = 0; g < kVectors; ++g)
        for (Index p = 0; p < d; p += n) {
            typename Lanes<T>::V r[n];
            const Index left = rows - g * n;
            load_block(left > 0 ? x + g * n * stride + p : x, stride, left, d - p, r);
            transpose<T>(r);
            T* to = panel + p * kWide<T> + g * n;
#pragma GCC unroll 16
            for (int k = 0; k < n; ++k)
                if (p + k < d) save_lanes(to + k * kWide<T>, r[k]);
        }
}

// Rows first .. last of x (n, stride) to their places among all panels.
template <class T>
void pack_rows(const T* x, Index n, Index d, Index stride, Index first, Index last, T* panels) {
#pragma omp parallel for schedule(static) if ((last - first) * d > kAlone)
    for (Index i = first; i < last; i += kWide<T>) pack_panel(x + i * stride, stride, n - i, d, panels + i * d);
}

// Packed rows: those of a Packed, or a part of them that begins at a multiple of kWide.
template <class T>
struct Panels {
    Index n, d;
    const T* data;  // (ceil(n / kWide), d, kWide)
    __attribute__((always_inline)) inline Panels from(Index i) const { return {n - i, d, data + i * d}; }
};
template <class T>
struct Packed {
    Index n, d;
    Pages<T> panels;
    __attribute__((always_inline)) inline Panels<T> view() const { return {n, d, panels.data}; }
    // x (n, stride); data is null if there was no memory
    __attribute__((always_inline)) inline Packed(const T* x, Index rows, Index dim, Index stride)
        : n(rows), d(dim), panels(round_up(rows, kWide<T>) * dim) {
        if (panels.data) pack_rows(x, rows, dim, stride, 0, rows, panels.data);
    }
};

// ---- the product

// c (kNarrow, ldc) = or += sum over k features of a strip, a[p * kWide + i], times a panel, b[p * kWide + j].
// Meanwhile c comes to the L1 cache and k lines from `next` on to the L2 cache.
template <class A>
__attribute__((noinline)) void micro(const A* a, const A* b, Index k, bool add, A* c, Index ldc, const A* next) {
    using V = typename Lanes<A>::V;
    constexpr int n = kLanes<A>, ahead = 16 * kWide<A>;
    V sum[kNarrow][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kNarrow; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
            sum[i][v] = V{};
            __builtin_prefetch(c + i * ldc + v * n);
        }
    for (; k > 0; --k, a += kWide<A>, b += kWide<A>, next += kLine / sizeof(A)) {
        __builtin_prefetch(a + ahead);
        __builtin_prefetch(next, 0, 2);
        V right[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) right[v] = load_lanes(b + v * n);
#pragma GCC unroll 8
        for (int i = 0; i < kNarrow; ++i) {
            const V left = broadcast(a[i]);
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) sum[i][v] = fma_lanes(left, right[v], sum[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kNarrow; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
            A* to = c + i * ldc + v * n;
            save_lanes(to, add ? load_lanes(to) + sum[i][v] : sum[i][v]);
        }
}

// Panels of one side: features p .. p + k of the rows from i on; panel after panel, `stride` apart.
template <class A>
struct Side {
    const A* panels;
    Index stride;
};
template <class T>
NTK_INLINE Side<T> side_of(const Panels<T>& x, Index i, Index, Index p, Index, T*) {
    return {x.data + i * x.d + p * kWide<T>, x.d * kWide<T>};
}
// The same in double, made for this pass: (rows / kWide<double>, k, kWide<double>).
static Side<double> side_of(const Panels<float>& x, Index i, Index rows, Index p, Index k, double* scratch) {
    constexpr int wide = kWide<float>, part = kWide<double>;
    for (Index r = 0; r < rows; r += part) {
        const float* from = x.data + (i + r) / wide * wide * x.d + p * wide + (i + r) % wide;
        double* to = scratch + r * k;
        for (Index q = 0; q < k; ++q)
            for (int v = 0; v < part; ++v) to[q * part + v] = double(from[q * wide + v]);
    }
    return {scratch, k * part};
}

// What a thread needs: a tile of sums, and the sides if they have to be converted. No larger than the tiles are: new pages
// cost more than a small product.
template <class A, class T>
struct TileMemory {
    static constexpr Index sides = sizeof(A) == sizeof(T) ? 0 : kSide<A> * kDepth;
    const Index tile;
    Pages<A> all;
    __attribute__((always_inline)) inline TileMemory(Index side_i, Index side_j)
        : tile(round_up(side_i, kWide<A>) * round_up(side_j, kWide<A>)), all(tile + 2 * sides) {
        if (all.data) __builtin_memset(all.data, 0, sizeof(A) * std::size_t(tile + 2 * sides));
    }
};

// A tile: rows i0 .. and columns j0 .. of the result, both multiples of kWide<float>.
template <class A>
struct ProductTile {
    Index i0, j0, rows, cols;
    bool diagonal;  // of a symmetric grid: what stands below the diagonal is not computed and means nothing
    A* c;           // (whole panels, ldc), of which (rows, cols) count; ldc = round_up(cols, kWide)
    Index ldc;
};

// What call number `call` of a pass fetches for the next pass: the panels of both sides one after the other, each in as
// many calls as a feature of it has lines. After the last pass: the beginnings of the panels behind, of no harm.
template <class A>
NTK_INLINE const A* next_of(const Side<A>& left, Index left_panels, const Side<A>& right, Index right_panels, Index k,
                            Index call) {
    constexpr Index calls = (kWide<A> * sizeof(A) + kLine - 1) / kLine;
    const Index panel = call / calls, start = k * (kWide<A> + call % calls * (kLine / Index(sizeof(A))));
    if (panel < left_panels) return left.panels + panel * left.stride + start;
    if (panel < left_panels + right_panels) return right.panels + (panel - left_panels) * right.stride + start;
    return left.panels;  // all done: what is there already
}

template <class A, class T>
void product_tile(const Panels<T>& a, const Panels<T>& b, const ProductTile<A>& t, A* scratch) {
    constexpr Index wide = kWide<A>;
    const Index passes = a.d > kDepth ? (a.d + kDepth - 1) / kDepth : 1, depth = (a.d + passes - 1) / passes;
    const Index rows = round_up(t.rows, wide), cols = round_up(t.cols, wide);
    for (Index pass = 0, p = 0; pass < passes; ++pass, p += depth) {
        const Index k = smaller(depth, a.d - p);
        const Side<A> left = side_of(a, t.i0, rows, p, k, scratch);
        const Side<A> right = t.diagonal ? left : side_of(b, t.j0, cols, p, k, scratch + TileMemory<A, T>::sides);
        Index call = 0;
        for (Index j = 0; j < t.cols; j += wide) {
            const A* panel = right.panels + j / wide * right.stride;
            const Index below = t.diagonal ? smaller(t.rows, j + wide) : t.rows;
            for (Index i = 0; i < below; i += kNarrow, ++call)
                micro(left.panels + i / wide * left.stride + i % wide, panel, k, pass > 0, t.c + i * t.ldc + j, t.ldc,
                      next_of(left, rows / wide, right, t.diagonal ? 0 : cols / wide, k, call));
        }
    }
}

// ---- tiles

struct Grid {
    Index n, m, side_i, side_j;
    bool symmetric;
    __attribute__((always_inline)) inline Index rows() const { return (n + side_i - 1) / side_i; }
    __attribute__((always_inline)) inline Index cols() const { return (m + side_j - 1) / side_j; }
    __attribute__((always_inline)) inline Index count() const { return symmetric ? rows() * (rows() + 1) / 2 : rows() * cols(); }
};

// Threads of a grid whose pairs take so many nanoseconds beside their products: short work stays on one, see kShort. The
// products are counted at 100 operations a nanosecond, what one core reaches with AVX-512 in float64.
NTK_INLINE int threads_of(Index n, Index m, bool symmetric, Index d, double nanoseconds, int most) {
    const double pairs = double(n) * double(m) * (symmetric ? 0.5 : 1.0);
    return pairs * (0.02 * double(d) + nanoseconds) > kShort ? most : 1;
}

// Equal sides of at most kSide; shorter ones until every one of several threads gets a few tiles.
template <class A>
Grid grid_of(Index n, Index m, bool symmetric, int threads) {
    Index most = kSide<A>;
    for (;; most = round_up(most / 2, kWide<float>)) {
        Grid g{n, m, most, most, symmetric};
        if (n > 0) g.side_i = round_up((n + g.rows() - 1) / g.rows(), kWide<float>);
        if (m > 0) g.side_j = round_up((m + g.cols() - 1) / g.cols(), kWide<float>);
        if (threads == 1 || g.count() >= 4 * threads || most <= kLeastSide) return g;
    }
}

// work(tile) for all tiles of the grid, their products made, with one `work` of make() on every one of `threads`; false if a
// thread had no memory.
template <class A, class T, class Make>
bool for_each_tile(const Panels<T>& a, const Panels<T>& b, const Grid& g, int threads, Make make) {
    bool failed = false;
    const Index count = g.count();
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
    {
        TileMemory<A, T> memory(smaller(g.side_i, g.n), smaller(g.side_j, g.m));
        A* c = memory.all.data;
        auto work = make();
        if (!c || !work.ready()) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(dynamic)
        for (Index at = 0; at < count; ++at) {
            if (!c || !work.ready()) continue;
            Index row = 0, rest = at, length = g.cols();
            while (rest >= length) rest -= length, ++row, length -= g.symmetric ? 1 : 0;
            const Index i0 = row * g.side_i, j0 = (g.symmetric ? row + rest : rest) * g.side_j;
            ProductTile<A> t{i0, j0, smaller(g.side_i, g.n - i0), smaller(g.side_j, g.m - j0), g.symmetric && i0 == j0, c, 0};
            t.ldc = round_up(t.cols, kWide<A>);
            product_tile<A, T>(a, b, t, c + memory.tile);
            work(t);
        }
        finish_lanes();
    }
    return !failed;
}

// ---- results

NTK_INLINE void write_row(const double* from, Index count, float* to, bool stream) {
    float row[kSide<double>];
    for (Index k = 0; k < count; ++k) row[k] = float(from[k]);
    write_row(row, count, to, stream);
}

// Entries below the diagonal of a square tile from those above it: all of them, whatever was made of the products since.
template <class A>
void mirror_tile(const ProductTile<A>& t) {
    constexpr int n = kLanes<A>;
    typename Lanes<A>::V r[n];
    for (Index i = 0; i < t.rows; i += n)
        for (Index j = i; j < t.cols; j += n) {
#pragma GCC unroll 16
            for (int k = 0; k < n; ++k) r[k] = load_lanes(t.c + (i + k) * t.ldc + j);
            transpose<A>(r);
            A* to = t.c + j * t.ldc + i;
            for (int k = 0; k < n; ++k)
                if (j > i) save_lanes(to + k * t.ldc, r[k]);
                else for (int l = 0; l < k; ++l) to[k * t.ldc + l] = t.c[(i + l) * t.ldc + j + k];
        }
}

// out (n, stride) and, unless it is null, mirror (m, mirror_stride) with mirror[j, i] = out[i, j]; of the whole matrix.
template <class A, class T>
void write_tile(const ProductTile<A>& t, T* out, Index stride, T* mirror, Index mirror_stride, bool stream) {
    constexpr int n = kLanes<A>;
    if (t.diagonal) mirror_tile(t);
    for (Index i = 0; i < t.rows; ++i) write_row(t.c + i * t.ldc, t.cols, out + (t.i0 + i) * stride + t.j0, stream);
    if (t.diagonal || !mirror) return;
    A band[n * kSide<A>];
    for (Index j = 0; j < t.cols; j += n) {
        // Every row of the mirror is on a page of its own: its ends, not whole lines, and its page are asked for early.
        for (Index k = j + 2 * n; k < smaller(j + 3 * n, t.cols); ++k) {
            const T* row = mirror + (t.j0 + k) * mirror_stride + t.i0;
            __builtin_prefetch(row, 1);
            __builtin_prefetch(row + t.rows - 1, 1);
        }
        for (Index i = 0; i < t.rows; i += n) {
            typename Lanes<A>::V r[n];
#pragma GCC unroll 16
            for (int k = 0; k < n; ++k) r[k] = load_lanes(t.c + (i + k) * t.ldc + j);
            transpose<A>(r);
#pragma GCC unroll 16
            for (int k = 0; k < n; ++k) save_lanes(band + k * kSide<A> + i, r[k]);
        }
        for (Index k = 0; k < smaller(n, t.cols - j); ++k)
            write_row(band + k * kSide<A>, t.rows, mirror + (t.j0 + j + k) * mirror_stride + t.i0, stream);
    }
}

}  // namespace
}  // namespace ntk

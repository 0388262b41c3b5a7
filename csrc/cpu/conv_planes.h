// Planes of a pair of images: shifts, window sums, seams.
//
// A plane holds one number for every position of the first image, whose partner in the second image is shifted by (sy, sx)
// cyclically: shifts sx and sx - width share one plane, and no lane is idle. Where the partner wraps there is a seam that
// windows of zero-padded images do not cross.
#pragma once
#include "block.h"
#include "conv.h"
#include "lanes.h"

namespace ntk {
namespace {

NTK_INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Layout of the planes. padded: rows `stride` apart with columns on both sides, what windows see outside (zeros or the other
// end), after `pad` columns; compact: rows `span` apart. Columns width .. span - 1 hold zeros (padded) or anything finite (compact).
template <class T>
struct Geometry {
    int height, width, reach_y, reach_x, span, pad, stride;
    bool circular;

    explicit Geometry(const ConvPlan& p)
        : height(p.height), width(p.width), reach_y(p.reach_y), reach_x(p.reach_x), span(round_up(p.width, kLanes<T>)),
          pad(round_up(p.reach_x, kLanes<T>)), stride(span + round_up(2 * p.reach_x, kLanes<T>)), circular(p.circular) {}
    int compact() const { return height * span; }
    int padded() const { return pad + height * stride; }
    // Windows of three columns and three rows (or one, of a signal) are summed where they are needed. On one circular row windows
    // of more rows see it again and again.
    bool fused() const { return reach_x == 1 && (reach_y == 1 || (height == 1 && (!circular || reach_y == 0))); }
    // Arrays of the second image hold every row twice, for shifts, with room for windows on both sides.
    int double_stride() const { return 2 * pad + round_up(width, kLanes<T>) + span; }
    int doubled() const { return height * double_stride(); }
};

// Masks of the columns, 1 or 0: slot d (right) or -d (left) of the window lies inside both images, the first, the second.
template <class T>
struct Masks {
    T* data;  // (2 reach, 3, span)
    int span;
    const T* both(int slot) const { return data + 3 * slot * span; }
    const T* first(int slot) const { return data + (3 * slot + 1) * span; }
    const T* second(int slot) const { return data + (3 * slot + 2) * span; }
};
NTK_INLINE int slot_offset(int slot) { return slot % 2 ? -(slot / 2 + 1) : slot / 2 + 1; }

template <class T>
struct Shift {
    int y, x;
    bool seam_x, seam_y;
    Masks<T> masks;
    T* seams;  // (2, span): all bits are set in the column right of the seam, left of the seam
};
template <class T>
void set_shift(const Geometry<T>& g, int y, int x, Shift<T>& s) {
    s.y = y, s.x = x;
    s.seam_x = !g.circular && x != 0;
    s.seam_y = !g.circular && y != 0;
    if (!s.seam_x) return;
    __builtin_memset(s.seams, 0, 2 * g.span * sizeof(T));
    __builtin_memset(s.seams + g.width - x, -1, sizeof(T));
    __builtin_memset(s.seams + g.span + g.width - x - 1, -1, sizeof(T));
    for (int slot = 0; slot < 2 * g.reach_x; ++slot) {
        const int d = slot_offset(slot);
        T* to = s.masks.data + 3 * slot * g.span;
        for (int c = 0; c < g.width; ++c) {
            const int other = c + x < g.width ? c + x : c + x - g.width;
            const bool i = c + d >= 0 && c + d < g.width, j = other + d >= 0 && other + d < g.width;
            to[c] = T(i & j), to[c + g.span] = T(i & !j), to[c + 2 * g.span] = T(j & !i);
        }
        for (int part = 0; part < 3; ++part)
            for (int c = g.width; c < g.span; ++c) to[c + part * g.span] = T(0);
    }
}

// What the windows see in place of a number whose position lies in one image only (half its variance), by rows and,
// summed over the columns of the window, by rows. Null where that is nothing.
template <class T>
struct Fill {
    const T *half_i, *half_j;  // (height, span) and doubled
    const T *sum_i, *sum_j;
};

template <class T>
NTK_INLINE void add_row(T* to, const T* from, int n) {
#pragma omp simd
    for (int c = 0; c < n; ++c) to[c] += from[c];
}
template <class T>
NTK_INLINE void add_masked(T* to, const T* mask, const T* from, int n) {
#pragma omp simd
    for (int c = 0; c < n; ++c) to[c] = fma_(mask[c], from[c], to[c]);
}

// Sums over the columns of the window, in: padded, out: compact.
template <class T>
NTK_INLINE void sum_columns(const Geometry<T>& g, const Shift<T>& s, const Fill<T>* fill, const T* in, T* out) {
    for (int r = 0; r < g.height; ++r) {
        const T* from = in + r * g.stride + g.pad;
        T* to = out + r * g.span;
        __builtin_memcpy(to, from, g.span * sizeof(T));
        for (int slot = 0; slot < 2 * g.reach_x; ++slot) {
            const int d = slot_offset(slot);
            if (!s.seam_x) {
                add_row(to, from + d, g.span);
                continue;
            }
            add_masked(to, s.masks.both(slot), from + d, g.span);
            if (!fill) continue;
            add_masked(to, s.masks.first(slot), fill->half_i + r * g.span + d, g.span);
            const int other = r + s.y < g.height ? r + s.y : r + s.y - g.height;
            add_masked(to, s.masks.second(slot), fill->half_j + other * g.double_stride() + g.pad + s.x + d, g.span);
        }
    }
}

// Row dy of the window around row r: of the column sums, of one image alone, or null.
template <class T>
NTK_INLINE const T* window_row(const Geometry<T>& g, const Shift<T>& s, const Fill<T>* fill, const T* sums, int r, int dy) {
    int at = r + dy;
    if (g.circular) {
        at %= g.height;
        return sums + (at < 0 ? at + g.height : at) * g.span;
    }
    const int other = (r + s.y < g.height ? r + s.y : r + s.y - g.height) + dy;
    const bool i = at >= 0 && at < g.height, j = other >= 0 && other < g.height;
    if (i && j) return sums + at * g.span;
    if (!fill || !s.seam_y) return nullptr;
    if (i) return fill->sum_i + at * g.span;
    return j ? fill->sum_j + other * g.double_stride() + g.pad + s.x : nullptr;
}

// Windows of 3 x 3 in registers, one column of vectors after the other.
template <bool SEAM, class T>
static void sweep(const Geometry<T>& geometry, const Shift<T>& shift, const Fill<T>* fill_or_null, T scale, const T* in, T* out,
                  const T* zeros) {
    using V = typename Lanes<T>::V;
    // Copies: a store might change what a reference points to, as far as the compiler knows.
    const Geometry<T> g = geometry;
    const Shift<T> s = shift;
    const Fill<T> numbers = fill_or_null ? *fill_or_null : Fill<T>{};
    const Fill<T>* fill = fill_or_null ? &numbers : nullptr;
    const V factor = broadcast(scale);
    const bool filled = SEAM && fill;
    for (int c = 0; c < g.span; c += kLanes<T>) {
        V both[2], first[2], second[2];
        for (int k = 0; SEAM && k < 2; ++k) {
            both[k] = load_lanes(s.masks.both(k) + c);
            first[k] = load_lanes(s.masks.first(k) + c), second[k] = load_lanes(s.masks.second(k) + c);
        }
        auto columns = [&](int r) __attribute__((always_inline)) {
            const T* from = in + r * g.stride + g.pad + c;
            const V right = load_lanes(from + 1), left = load_lanes(from - 1), middle = load_lanes(from);
            if (!SEAM) return V((left + right) + middle);
            V sum = fma_lanes(both[1], left, fma_lanes(both[0], right, middle));
            if (!filled) return sum;
            const T *i = fill->half_i + r * g.span + c;
            const T *j = fill->half_j + (r + s.y < g.height ? r + s.y : r + s.y - g.height) * g.double_stride() + g.pad + s.x + c;
            sum = fma_lanes(first[0], load_lanes(i + 1), fma_lanes(first[1], load_lanes(i - 1), sum));
            return V(fma_lanes(second[0], load_lanes(j + 1), fma_lanes(second[1], load_lanes(j - 1), sum)));
        };
        // A row that is not in both images: what stands for it.
        auto other = [&](int r, int dy) __attribute__((always_inline)) {
            if (g.circular) return columns(dy < 0 ? g.height - 1 : 0);
            const T* row = window_row(g, s, fill, zeros, r, dy);
            return load_lanes(row ? row + c : zeros + c);
        };
        const int seam = s.seam_y ? g.height - s.y : g.height;  // first row whose partner has wrapped
        V middle = columns(0);
        for (int r = 0, stop = seam; r < g.height; stop = g.height) {
            V above = other(r, -1);
            for (; r + 1 < stop; ++r) {
                const V next = columns(r + 1);
                save_lanes(out + r * g.span + c, factor * ((above + next) + middle));
                above = middle, middle = next;
            }
            save_lanes(out + r * g.span + c, factor * ((above + other(r, 1)) + middle));
            if (++r < g.height) middle = columns(r);
        }
    }
}

// out = scale times the window sums of in; room: compact, zeros: (span,) of zeros.
template <class T>
void window_sum(const Geometry<T>& g, const Shift<T>& s, const Fill<T>* fill, T scale, const T* in, T* out, T* room, const T* zeros) {
    if (g.reach_x == 1 && g.reach_y == 1)
        return s.seam_x ? sweep<true>(g, s, fill, scale, in, out, zeros) : sweep<false>(g, s, fill, scale, in, out, zeros);
    sum_columns(g, s, fill, in, room);
    for (int r = 0; r < g.height; ++r) {
        T* to = out + r * g.span;
        __builtin_memcpy(to, room + r * g.span, g.span * sizeof(T));
        for (int dy = -g.reach_y; dy <= g.reach_y; ++dy) {
            const T* row = dy ? window_row(g, s, fill, room, r, dy) : nullptr;
            if (row) add_row(to, row, g.span);
        }
#pragma omp simd
        for (int c = 0; c < g.span; ++c) to[c] *= scale;
    }
}

// The columns beside a row of a padded plane: zeros, or the other end of the row. `row` points to column 0.
template <class T>
NTK_INLINE void finish_row(const Geometry<T>& g, T* row) {
    for (int c = g.width; c < g.span; ++c) row[c] = T(0);
    if (!g.circular) return;
    for (int d = 1; d <= g.reach_x; ++d) {
        row[-d] = row[g.width - 1 - (d - 1) % g.width];
        row[g.width - 1 + d] = row[(d - 1) % g.width];
    }
}

// One array of one image from a double plane (height, width): compact, or every row twice.
template <class T>
void put_plane(const Geometry<T>& g, bool twice, const double* from, T* to) {
    const int step = twice ? g.double_stride() : g.span;
    for (int r = 0; r < g.height; ++r) {
        const double* row = from + r * g.width;
        T *start = to + r * step, *first = start + (twice ? g.pad : 0);
#pragma omp simd
        for (int c = 0; c < g.width; ++c) first[c] = T(row[c]);
        for (int c = g.width; c < g.span && !twice; ++c) first[c] = T(0);
        for (int c = g.width; c < step - g.pad && twice; ++c) first[c] = first[c - g.width];
        for (int c = -1; c >= -g.pad && twice; --c) first[c] = first[c + g.width];
    }
}

// out (lines, n, inner) = sums over the window along the middle axis of in.
static void axis_sums(const double* in, double* out, int lines, int n, int inner, int reach, bool circular) {
    const std::int64_t size = std::int64_t(n) * inner;
    for (int line = 0; line < lines; ++line) {
        const double* from = in + line * size;
        double* to = out + line * size;
        __builtin_memcpy(to, from, std::size_t(size) * sizeof(double));
        for (int d = -reach; d <= reach; ++d) {
            if (d == 0) continue;
            const std::int64_t by = std::int64_t(circular ? (d % n + n) % n : d) * inner;
#pragma omp simd
            for (std::int64_t k = by < 0 ? -by : 0; k < (by > 0 ? size - by : size); ++k) to[k] += from[k + by];
            for (std::int64_t k = size - by; circular && k < size; ++k) to[k] += from[k + by - size];
        }
    }
}
// Window sums of one image: `columns` gets those over the columns of the window.
template <class T>
void window_variances(const Geometry<T>& g, const double* in, double* columns, double* out) {
    axis_sums(in, columns, g.height, g.width, 1, g.reach_x, g.circular);
    axis_sums(columns, out, 1, g.height, g.width, g.reach_y, g.circular);
}

}  // namespace
}  // namespace ntk

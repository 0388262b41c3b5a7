// Gram matrices of convolutional networks: planes of positions, one pair of images at a time, all layers in cache.
//
//   flatten    one plane a pair (only equal positions matter)
//   pooled     all shifts of the second image, height x width planes a pair
//   parallel   blocks of pairs, or row shifts of pairs; sums do not depend on the number of threads
//   compiled   once per instruction set with NTK_ISA; nothing here may have external linkage but `conv`
#include "conv_fast.h"
#include "conv_general.h"
#include "write.h"

namespace ntk {
namespace NTK_ISA {
namespace {

// Blocks of pairs of flatten kernels, `rows` times `cols`: the numbers of the second images and of one first image stay in L2 (1 MiB, or
// 2), if those of three images fit; first images come from further away, each for all second ones. Every thread gets some blocks: the
// last ones end at different times.
constexpr int kBlocksEach = 16;
constexpr std::int64_t kFirst = 64, kSecond = 8, kNear = 512 << 10;
struct PairBlock {
    std::int64_t rows, cols;
};
template <class T>
PairBlock block_of(const ConvPlan& p, std::int64_t each, std::int64_t rows, std::int64_t cols) {
    if (p.pooled) return {1, 1};
    PairBlock b{kFirst, smaller(kSecond, cols)};
    while (b.cols > 2 && (b.cols + 1) * each * std::int64_t(sizeof(T)) > kNear) --b.cols;
    const std::int64_t most = rows * cols / (std::int64_t(kBlocksEach) * most_threads());
    while (b.rows > 2 && b.rows * b.cols > most) b.rows /= 2;
    while (b.cols > 2 && b.rows * b.cols > most) --b.cols;
    return b;
}

template <class T>
struct Fast {
    using Number = T;
    static constexpr double kNanoseconds = 0.5, kPrepares = 2.0;  // of a position and layer of a pair, of an image (kShort)
    using Room = FastRoom<T>;
    using Image = FastImage<T>;
    static std::int64_t planes(const ConvPlan& p) { return std::int64_t(p.n_layers) * fast_arrays(p) + p.channels; }
    static int room(const ConvPlan&) { return 8; }  // planes of double to prepare an image
    static bool prepare(const ConvPlan& p, const Geometry<T>& g, const T* x, bool twice, double* room, T* to, int size) {
        fast_image(p, g, x, twice, room, to, size);
        return true;
    }
    static Image image(const ConvPlan& p, const T* data, int size) { return {data, size, fast_arrays(p)}; }
    static void plane(const ConvPlan& p, const Geometry<T>& g, const Shift<T>& s, const Image& i, const Image& j, Room& room,
                      double* total, double*, std::int64_t) {
        fast_plane(p, g, s, i, j, room, total);
    }
};

struct General {
    using Number = double;
    static constexpr double kNanoseconds = 10.0, kPrepares = 10.0;
    using Room = GeneralRoom;
    using Image = GeneralImage;
    static std::int64_t planes(const ConvPlan& p) { return std::int64_t(p.n_layers) * general_arrays(p) + p.channels; }
    static int room(const ConvPlan& p) { return 6 + general_arrays(p); }
    static bool prepare(const ConvPlan& p, const Geometry<double>& g, const double* x, bool twice, double* room, double* to, int size) {
        return general_image(p, g, x, twice, room, to, size);
    }
    static Image image(const ConvPlan& p, const double* data, int size) { return {data, size, general_arrays(p)}; }
    static void plane(const ConvPlan& p, const Geometry<double>& g, const Shift<double>& s, const Image& i, const Image& j, Room& room,
                      double* total, double* slices, std::int64_t step) {
        general_plane(p, g, s, i, j, room, total, slices, step);
    }
};

constexpr int kTotals = 3;

// Positions of all layers of an image.
double work_of(const ConvPlan& p) { return double(p.height) * p.width * p.n_layers; }

template <class E>
std::int64_t plane_size(const ConvPlan& p, bool twice) {
    const Geometry<typename E::Number> g(p);
    return twice ? g.doubled() : g.compact();
}

template <class E, class U>
void* prepare_as(const ConvPlan& p, const U* x, std::int64_t n, bool twice) {
    using T = typename E::Number;
    const Geometry<T> g(p);
    const std::int64_t size = plane_size<E>(p, twice), each = E::planes(p) * size;
    const std::int64_t positions = std::int64_t(p.height) * p.width, entries = positions * p.channels;
    Buffer<T> data(std::size_t(n * each + 64));  // windows read a little beyond the last plane
    bool failed = !data.ready();
    if (failed) return nullptr;
    for (std::int64_t k = n * each; k < n * each + 64; ++k) data.data[k] = T(0);
#pragma omp parallel if (double(n) * work_of(p) * E::kPrepares > kShort)
    {
        Buffer<double> room(E::room(p) * positions);
        Buffer<T> image(entries);
        const bool ready = room.ready() && image.ready();
        if (!ready) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(dynamic)
        for (std::int64_t k = 0; k < n; ++k) {
            if (!ready) continue;
            for (std::int64_t e = 0; e < entries; ++e) image.data[e] = T(x[k * entries + e]);
            if (E::prepare(p, g, image.data, twice, room.data, data.data + k * each, int(size))) continue;
#pragma omp atomic write
            failed = true;
        }
    }
    return failed ? nullptr : data.release();
}

// The prepared images of one side.
template <class E>
struct Side {
    using T = typename E::Number;
    const ConvPlan& plan;
    const T* data;
    std::int64_t each;
    int size;
    Side(const ConvPlan& p, const ConvImages& images)
        : plan(p), data(static_cast<const T*>(images.data)), each(E::planes(p) * plane_size<E>(p, images.twice)),
          size(int(plane_size<E>(p, images.twice))) {}
    typename E::Image image(std::int64_t k) const { return E::image(plan, data + k * each, size); }
};

// A pair, or one row shift y of a pair; total (kTotals,), slices (n_layers, step) or null.
template <class E>
void unit(const ConvPlan& p, const Geometry<typename E::Number>& g, const typename E::Image& i, const typename E::Image& j, int y,
          Shift<typename E::Number>& s, typename E::Room& room, double* total, double* slices, std::int64_t step) {
    for (int k = 0; k < kTotals; ++k) total[k] = 0.0;
    for (int x = 0; x < (p.pooled ? p.width : 1); ++x) {
        set_shift(g, y, x, s);
        E::plane(p, g, s, i, j, room, total, slices, step);
    }
}

bool left_alone(const ConvTile& t, std::int64_t i, std::int64_t j) { return t.triangle && t.j0 + j < t.i0 + i + t.strict; }

template <class E>
bool run(const ConvPlan& p, const ConvTile& t) {
    using T = typename E::Number;
    const Geometry<T> g(p);
    const Side<E> x(p, t.x), y(p, t.y);
    const std::int64_t columns = t.paired ? 1 : t.cols, pairs = t.rows * columns;
    const PairBlock block = block_of<T>(p, x.each, t.rows, columns);
    const std::int64_t blocks_i = (t.rows + block.rows - 1) / block.rows, blocks_j = (columns + block.cols - 1) / block.cols;
    // One entry a shift, added up in order: the result does not depend on the threads.
    Buffer<double> parts(std::size_t(pairs * t.shifts * kTotals));
    if (!parts.ready()) return false;
    bool failed = false;
#pragma omp parallel if (double(pairs * t.shifts * (p.pooled ? p.width : 1)) * work_of(p) * E::kNanoseconds > kShort)
    {
        typename E::Room room(p, g);
        Buffer<T> masks((6 * std::size_t(p.reach_x) + 2) * g.span);
        const bool ready = room.ready() && masks.ready();
        if (!ready) {
#pragma omp atomic write
            failed = true;
        }
        Shift<T> s{0, 0, false, false, {masks.data, g.span}, masks.data + 6 * p.reach_x * g.span};
#pragma omp for collapse(3) schedule(dynamic)
        for (std::int64_t bi = 0; bi < blocks_i; ++bi)
            for (std::int64_t bj = 0; bj < blocks_j; ++bj)
                for (std::int64_t shift = 0; shift < t.shifts; ++shift) {
                    const std::int64_t i0 = bi * block.rows, j0 = bj * block.cols;
                    const std::int64_t i1 = smaller(i0 + block.rows, t.rows), j1 = smaller(j0 + block.cols, columns);
                    for (std::int64_t i = i0; i < i1; ++i)
                        for (std::int64_t j = j0; j < j1; ++j) {
                            if (!ready || left_alone(t, i, j)) continue;
                            const std::int64_t at = i * columns + j;
                            unit<E>(p, g, x.image(t.i0 + i), y.image(t.j0 + (t.paired ? i : j)), int(t.first + shift), s, room,
                                    parts.data + (at * t.shifts + shift) * kTotals, t.slices ? t.slices + at : nullptr, pairs);
                        }
                }
    }
    if (failed) return false;
    for (std::int64_t at = 0; at < pairs; ++at) {
        if (left_alone(t, at / columns, at % columns)) continue;
        for (std::int64_t shift = 0; shift < t.shifts; ++shift)
            for (int k = 0; k < kTotals; ++k) t.sums[k * pairs + at] += parts.data[(at * t.shifts + shift) * kTotals + k];
    }
    return true;
}

template <class T>
void* prepare(const ConvPlan& p, const T* x, std::int64_t n, bool twice) {
    return p.fast ? prepare_as<Fast<T>, T>(p, x, n, twice) : prepare_as<General, T>(p, x, n, twice);
}
template <class T>
bool tile(const ConvPlan& p, const ConvTile& t) {
    return p.fast ? run<Fast<T>>(p, t) : run<General>(p, t);
}
template <class E>
std::int64_t bytes_of(const ConvPlan& p, bool twice) {
    return E::planes(p) * plane_size<E>(p, twice) * std::int64_t(sizeof(typename E::Number));
}
std::int64_t bytes(const ConvPlan& p, bool single, bool twice) {
    if (!p.fast) return bytes_of<General>(p, twice);
    return single ? bytes_of<Fast<float>>(p, twice) : bytes_of<Fast<double>>(p, twice);
}

}  // namespace

extern const ConvKernels conv;
const ConvKernels conv = {prepare<double>, prepare<float>, tile<double>, tile<float>, bytes};

}  // namespace NTK_ISA
}  // namespace ntk

// Gram matrices of dense networks: a tile of inner products becomes kernels, patch by patch (patch.h), in place if wanted.
//
//   tile       the products are there, in memory
//   fused      the products are made on the way (product.h), a few hundred rows and columns at a time; the results are
//              written or multiplied with columns (matmul.h)
//
//   parallel   one patch of kPatch x kCols pairs a thread, or the tile of a product; no state outside it
//   memory     under 3 MB a thread without layer_grams
//   compiled   once per instruction set with NTK_ISA; nothing here may have external linkage but `table`
#include "doors.h"
#include "jacobian.h"
#include "matmul.h"
#include "nodes.h"
#include "patch.h"
#include "product.h"

namespace ntk {
namespace NTK_ISA {
namespace {

// Patches of a tile on the diagonal start at the diagonal: the pairs below it come from the mirror.
bool upper_only(const Tile& t) {
    return t.diagonal != INT64_MIN && (t.slices.data ? t.slices.mirror : t.outputs[0].mirror);
}

// Rough time of one pair beside its product, for threads_of: as in python/ntkfast/_table.py.
double nanoseconds_of(const Plan& plan, const Tile& t) {
    if (t.n_outputs && t.outputs[0].table) return 1.0;
    return (t.slices.data ? 3.0 : 1.0) * (1.0 + plan.n_prefix + 7.0 * plan.n_suffix);
}

// False if memory ran out (of a thread: the others finish what they have).
template <class T>
bool tile(const Plan& plan, const Tile& t) {
    bool failed = false;
    const std::int64_t bands = (t.rows + kPatch - 1) / kPatch, columns = (t.cols + kCols - 1) / kCols;
    const bool upper = upper_only(t);
#pragma omp parallel if (double(t.rows) * double(t.cols) * nanoseconds_of(plan, t) > kShort)
    {
        Worker<T> worker(plan, t.n_outputs, t.slices.data);
        if (!worker.ready()) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for collapse(2) schedule(dynamic)
        for (std::int64_t band = 0; band < bands; ++band)
            for (std::int64_t column = 0; column < columns; ++column) {
                const std::int64_t i0 = band * kPatch;
                const std::int64_t start = upper ? i0 - t.diagonal : 0;  // column of the first row's own point
                const std::int64_t j0 = column * kCols + (start > 0 ? start : 0);
                if (worker.ready() && j0 < t.cols) patch<T>(plan, t, i0, j0, upper, worker);
            }
        finish_lanes();
    }
    return !failed;
}

constexpr int kMostOutputs = 4;

// What fused does with a patch: it writes the results, or adds their product with columns of V.
template <class T>
struct WritePatches {
    WritePatches(const Tile&, const Matmul&) {}
    bool ready() const { return true; }
    void operator()(const Plan& plan, const Tile& t, Index, Index, Index i, Index j, bool upper, Worker<T>& w) {
        patch<T>(plan, t, i, j, upper, w);
    }
};
template <class T>
struct MultiplyPatches {
    TimesColumns<T> times;
    MultiplyPatches(const Tile& t, const Matmul& m) : times(t, m) {}
    bool ready() const { return times.ready(); }
    void operator()(const Plan& plan, const Tile& t, Index i0, Index j0, Index i, Index j, bool upper, Worker<T>& w) {
        const PatchPlace p = patch_place(t, i, j);
        patch_results(plan, t, p, upper, w);
        times(w.results.data, i0 + i, j0 + j, p.rows, p.cols, p.below);
    }
};

// One thread of fused: what becomes of a tile of products in the cache.
template <class A, class T, class Finish>
struct FusedWork {
    const Plan& plan;
    const Tile& whole;
    bool upper;
    Worker<T> worker;
    Finish finish;
    Output outputs[kMostOutputs];

    FusedWork(const Plan& p, const FusedTile& f, bool half)
        : plan(p), whole(f.tile), upper(half), worker(p, whole.n_outputs, whole.slices.data), finish(whole, f.matmul) {}
    bool ready() const { return worker.ready() && finish.ready(); }

    template <class O>
    static void move(O& out, Index i0, Index j0) {
        out.data = static_cast<T*>(out.data) + i0 * out.stride + j0;
        if (out.mirror) out.mirror = static_cast<T*>(out.mirror) + j0 * out.mirror_stride + i0;
        out.fi += i0, out.fj += j0;
    }
    static Points moved(const Points& p, Index start) {
        return {static_cast<const T*>(p.x) + start * p.stride, p.stride, p.inv + start, p.norm + start};
    }
    void operator()(const ProductTile<A>& p) {
        Tile t = whole;
        t.products = p.c, t.stride = p.ldc, t.apart = true, t.rows = p.rows, t.cols = p.cols;
        t.i = moved(whole.i, p.i0), t.j = moved(whole.j, p.j0);
        // Only the tiles that the diagonal crosses know of it.
        const Index diagonal = whole.diagonal == INT64_MIN ? INT64_MIN : whole.diagonal + p.j0 - p.i0;
        t.diagonal = diagonal < p.rows && diagonal > -p.cols ? diagonal : INT64_MIN;
        for (int o = 0; o < whole.n_outputs; ++o) {
            outputs[o] = whole.outputs[o];
            move(outputs[o], p.i0, p.j0);
            outputs[o].hi += p.i0, outputs[o].hj += p.j0;
        }
        t.outputs = outputs;
        if (t.slices.data) move(t.slices, p.i0, p.j0);
        const bool triangle = upper && t.diagonal != INT64_MIN;
        for (Index i = 0; i < p.rows; i += kPatch) {
            const Index start = triangle && i - t.diagonal > 0 ? i - t.diagonal : 0;
            for (Index j = start; j < p.cols; j += kCols) finish(plan, t, p.i0, p.j0, i, j, triangle, worker);
        }
    }
};

template <class A, class T, class Finish>
bool fused_as(const Plan& plan, const FusedTile& f) {
    const Tile& t = f.tile;
    const Panels<T> x{f.x.n, f.x.d, static_cast<const T*>(f.x.panels)}, y{f.y.n, f.y.d, static_cast<const T*>(f.y.panels)};
    const bool upper = f.matmul.columns ? f.matmul.sums_j && t.diagonal != INT64_MIN : upper_only(t);
    const bool symmetric = upper && t.diagonal == 0 && t.rows == t.cols;
    const int threads = threads_of(t.rows, t.cols, symmetric, t.dim, nanoseconds_of(plan, t), most_threads());
    const Grid grid = grid_of<A>(t.rows, t.cols, symmetric, threads);
    return for_each_tile<A>(x.from(f.i0), y.from(f.j0), grid, threads,
                            [&] { return FusedWork<A, T, Finish>(plan, f, upper); });
}
template <class A, class T>
bool fused_into(const Plan& plan, const FusedTile& f) {
    return f.matmul.columns ? fused_as<A, T, MultiplyPatches<T>>(plan, f) : fused_as<A, T, WritePatches<T>>(plan, f);
}
bool fused64(const Plan& plan, const FusedTile& f) { return fused_into<double, double>(plan, f); }
bool fused32(const Plan& plan, const FusedTile& f) {
    return f.tile.wide ? fused_into<double, float>(plan, f) : fused_into<float, float>(plan, f);
}

template <class T>
void* pack(const void* x, std::int64_t n, std::int64_t d, std::int64_t stride, std::int64_t first, std::int64_t last,
           void* panels) {
    if (!panels) panels = Pages<T>(round_up(n, kWide<T>) * d).release();
    if (panels) pack_rows(static_cast<const T*>(x), n, d, stride, first, last, static_cast<T*>(panels));
    return panels;
}

template <class T>
bool pairs(const Plan& plan, const Pairs& p) {
    bool failed = false;
#pragma omp parallel if (p.n > 4 * kCols)
    {
        Worker<T> worker(plan, 0, false);
        if (!worker.ready()) {
#pragma omp atomic write
            failed = true;
        }
        double value[kCols];
#pragma omp for schedule(dynamic)
        for (std::int64_t start = 0; start < p.n; start += kCols) {
            if (!worker.ready()) continue;
            Scratch<T>& s = *worker.scratch.data;
            const int n = p.n - start < kCols ? int(p.n - start) : kCols;
            for (int k = 0; k < kCols; ++k) {
                store(s.block.x, s.block.x_low, k, widen(k < n ? p.x[start + k] : 0.0, T(0)));
                s.block.s[k] = k < n ? T(p.s[start + k]) : T(1);
                store(s.block.theta, s.block.theta_low, k, widen(0.0, T(0)));
            }
            homogeneous_block<T>(plan, s.block, 0, n, plan.n_suffix == 0, nullptr, 0);
            if (plan.n_suffix) {
                start_rows(plan, p.norm_i, start, n, s.ri);
                start_rows(plan, p.norm_j, start, n, s.rj);
                start_general(s.block, s.ri, s.rj, 1, true, s.general);
                general_block<true>(plan, s.ri, s.rj, 1, n, s.general, nullptr, 0, s.last, s.cov);
            }
            mix_row(plan, {p.theta, p.cov, p.mean, p.last}, s, 0, n, true, value);
            for (int k = 0; k < n; ++k) p.out[start + k] = value[k];
        }
    }
    return !failed;
}

bool nodes(const Plan& plan, const Pairs& p) { return plan.n_suffix ? pairs<double>(plan, p) : prefix_nodes(plan, p); }

}  // namespace

#define NTK_STRING2(x) #x
#define NTK_STRING(x) NTK_STRING2(x)
extern const Kernels table;
const Kernels table = {NTK_STRING(NTK_ISA),
                       tile<double>,
                       tile<float>,
                       pack<double>,
                       pack<float>,
                       fused64,
                       fused32,
                       pairs<double>,
                       pairs<float>,
                       nodes,
                       table_values<double>,
                       table_values<float>,
                       squares<double>,
                       squares<float>,
                       rows,
                       scalar<double>,
                       scalar<float>,
                       dual,
                       multiply_add<double>,
                       multiply_add<float>,
                       mirror<double>,
                       mirror<float>};

}  // namespace NTK_ISA
}  // namespace ntk

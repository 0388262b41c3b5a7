// Gram matrices of dense networks: a tile of inner products becomes kernels, patch by patch (patch.h), in place if wanted.
//
//   parallel   one patch of 128 x 128 pairs a thread, in blocks of 32 x 128; no state outside it
//   memory     under 3 MB a thread without layer_grams
//   compiled   once per instruction set with NTK_ISA; nothing here may have external linkage but `table`
#include "doors.h"
#include "nodes.h"
#include "patch.h"

namespace ntk {
namespace NTK_ISA {
namespace {

// Patches of a tile on the diagonal start at the diagonal: the pairs below it come from the mirror.
bool upper_only(const Tile& t) {
    return t.diagonal != INT64_MIN && (t.slices.data ? t.slices.mirror : t.outputs[0].mirror);
}

// False if memory ran out (of a thread: the others finish what they have).
template <class T>
bool tile(const Plan& plan, const Tile& t) {
    bool failed = false;
    const std::int64_t bands = (t.rows + kPatch - 1) / kPatch, columns = (t.cols + kCols - 1) / kCols;
    const bool upper = upper_only(t);
    // Waking a second thread costs more than a few patches.
#pragma omp parallel if (bands * columns > 4)
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
        finish_streams();
    }
    return !failed;
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
            homogeneous_block<T>(plan, s.block, n, plan.n_suffix == 0, nullptr, 0);
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
const Kernels table = {NTK_STRING(NTK_ISA), tile<double>,         tile<float>,     pairs<double>,  pairs<float>, nodes,
                       table_values<double>, table_values<float>, squares<double>, squares<float>, rows,         scalar<double>,
                       scalar<float>,       dual};

}  // namespace NTK_ISA
}  // namespace ntk

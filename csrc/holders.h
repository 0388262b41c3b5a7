// What Python objects own for the kernels: arrays taken apart, plans, tables, packed rows.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "cpu/kernels.h"
#include "table_compiler.h"

namespace {

const ntk::Kernels& kernels(const std::string& isa) {
    if (isa.empty()) return ntk::kernels();
    if (const ntk::Kernels* k = ntk::kernels_of(isa.c_str())) return *k;
    throw std::runtime_error("instruction set " + isa + " is not available here");
}

// Owns what an ntk::Plan points to.
class PlanHolder {
   public:
    // prefix: (n, 9) drift, decay, c e, c h0, c h1, turn, w, v, w_all;  prefix_ints: (n, 5) signs, signs_after, range, slices W, V
    // suffix: (m, 12) p, q, r, cw, cb, w, wb, v, vb, vvb, w_all, slope;  suffix_ints: (m, 4) activation, table, slices W, V
    PlanHolder(const Doubles& prefix, const Ints& prefix_ints, double nu, double beta, const Doubles& suffix,
               const Ints& suffix_ints, const py::list& tables) {
        require(prefix.ndim() == 2 && prefix.shape(1) == 9 && prefix_ints.ndim() == 2 && prefix_ints.shape(1) == 5 &&
                    prefix.shape(0) == prefix_ints.shape(0), "prefix: (n, 9) numbers and (n, 5) integers");
        require(suffix.ndim() == 2 && suffix.shape(1) == 12 && suffix_ints.ndim() == 2 && suffix_ints.shape(1) == 4 &&
                    suffix.shape(0) == suffix_ints.shape(0), "suffix: (n, 12) numbers and (n, 4) integers");
        for (py::ssize_t h = 0; h < prefix.shape(0); ++h) {
            const double* c = prefix.data(h, 0);
            const int* k = prefix_ints.data(h, 0);
            prefix_.push_back({c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], k[0], k[1], k[2], k[3], k[4]});
        }
        for (const py::handle& item : tables) add_table(py::cast<py::tuple>(item));
        for (py::ssize_t h = 0; h < suffix.shape(0); ++h) {
            const double* c = suffix.data(h, 0);
            const int* k = suffix_ints.data(h, 0);
            require(k[1] < int(tables_.size()) && (k[0] != ntk::kHermite || k[1] >= 0), "no such Hermite table");
            suffix_.push_back({c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11], k[0], k[1], k[2], k[3]});
        }
        plan_ = {prefix_.data(), int(prefix_.size()), nu, beta, suffix_.data(), int(suffix_.size()), tables_.data()};
        arguments = py::make_tuple(prefix, prefix_ints, nu, beta, suffix, suffix_ints, tables);
    }
    py::tuple arguments;  // for kernels elsewhere
    const ntk::Plan& plan() const { return plan_; }
    const ntk::GeneralLayer& layer(int h) const { return suffix_.at(h); }
    const ntk::HermiteTable* tables() const { return tables_.data(); }

   private:
    // evens, odds, edges, coefficients (panels, terms, order), sums (4 arrays), even_sum, odd_sum, mean
    void add_table(const py::tuple& t) {
        ntk::HermiteTable table{};
        table.evens = py::cast<int>(t[0]);
        table.odds = py::cast<int>(t[1]);
        Doubles edges = py::cast<Doubles>(t[2]), coefficients = py::cast<Doubles>(t[3]), sums = py::cast<Doubles>(t[4]);
        require(coefficients.ndim() == 3 && coefficients.shape(1) == table.evens + table.odds, "table: coefficients");
        require(coefficients.shape(0) == 0 || edges.shape(0) == coefficients.shape(0) + 1, "table: edges");
        require(sums.ndim() == 1 && sums.shape(0) == 2 * (table.evens + table.odds), "table: sums");
        table.panels = int(coefficients.shape(0));
        table.order = int(coefficients.shape(2));
        table.edges = edges.data();
        table.coefficients = coefficients.data();
        table.even_defect = sums.data();
        table.even_derivative = table.even_defect + table.evens;
        table.odd_defect = table.even_derivative + table.evens;
        table.odd_derivative = table.odd_defect + table.odds;
        table.even_sum = py::cast<double>(t[5]);
        table.odd_sum = py::cast<double>(t[6]);
        table.mean = py::cast<double>(t[7]);
        keep_.insert(keep_.end(), {edges, coefficients, sums});
        tables_.push_back(table);
    }
    std::vector<ntk::HomogeneousLayer> prefix_;
    std::vector<ntk::GeneralLayer> suffix_;
    std::vector<ntk::HermiteTable> tables_;
    std::vector<Doubles> keep_;
    ntk::Plan plan_{};
};

// A compiled kernel of one angle, float64 or float32.
class TableHolder {
   public:
    TableHolder(const PlanHolder& plan, const std::array<double, 4>& mix, double norm, bool single) : single_(single) {
        const ntk::TableTask task{mix[0], mix[1], mix[2], mix[3], norm};
        py::gil_scoped_release release;
        if (single) report_ = ntk::compile_table(plan.plan(), task, *(float_ = std::make_unique<ntk::Table<float>>()));
        else report_ = ntk::compile_table(plan.plan(), task, *(double_ = std::make_unique<ntk::Table<double>>()));
    }
    const ntk::TableReport& report() const { return report_; }
    bool single() const { return single_; }
    const void* data() const { return single_ ? static_cast<const void*>(float_.get()) : double_.get(); }
    // (n,) of 1 - |rho| and sign, in the dtype of the table
    py::array values(const py::array& x, const py::array& s, const std::string& isa) const {
        require(report_.reached, "this table was not reached");
        const ntk::Kernels& k = kernels(isa);
        if (single_) return evaluate(k.table32, *float_, x, s);
        return evaluate(k.table64, *double_, x, s);
    }
    // c (terms, panels), centre (panels,), panel (128,) of the bins, delta, shift: for kernels elsewhere
    py::tuple arrays() const { return single_ ? parts(*float_) : parts(*double_); }

   private:
    template <class T>
    static py::array evaluate(void (*f)(const ntk::Table<T>&, std::int64_t, const T*, const T*, T*), const ntk::Table<T>& t,
                              const py::array& x, const py::array& s) {
        const py::array_t<T, py::array::c_style | py::array::forcecast> in(x), sign(s);
        require(in.ndim() == 1 && sign.ndim() == 1 && in.size() == sign.size(), "x and s must be vectors of one length");
        py::array_t<T, py::array::c_style> out(in.size());
        f(t, in.size(), in.data(), sign.data(), out.mutable_data());
        return out;
    }
    template <class T>
    static py::tuple parts(const ntk::Table<T>& t) {
        using Shape = typename ntk::Table<T>::Shape;
        const py::array_t<T> c({t.terms, Shape::panels}, &t.c[0][0]), centre(Shape::panels, t.centre);
        const py::array_t<unsigned char> panel(2 * ntk::kTableBins, t.panel);
        return py::make_tuple(c, centre, panel, t.delta, t.shift);
    }
    bool single_;
    ntk::TableReport report_;
    std::unique_ptr<ntk::Table<double>> double_;
    std::unique_ptr<ntk::Table<float>> float_;
};

// Rows packed for products: one copy.
class PackedHolder {
   public:
    explicit PackedHolder(const py::array& x) {
        const Matrix m = matrix_of(x, false);
        const ntk::Kernels& k = ntk::kernels();
        single = m.single;
        // In parts of some hundredths of a second, between which Ctrl-C is heard.
        const std::int64_t fit = kPart / (m.cols > 0 ? m.cols : 1), step = fit / ntk::kPanelUnit * ntk::kPanelUnit + ntk::kPanelUnit;
        for (std::int64_t first = 0; first == 0 || first < m.rows; first += step) {
            {
                py::gil_scoped_release release;
                const std::int64_t last = first + step < m.rows ? first + step : m.rows;
                void* made = (single ? k.pack32 : k.pack64)(m.data, m.rows, m.cols, m.stride, first, last, memory_.get());
                if (!memory_) memory_.reset(made);
            }
            enough(memory_ != nullptr);
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        rows = {memory_.get(), m.rows, m.cols};
    }
    ntk::PackedRows rows{};
    bool single;

   private:
    static constexpr std::int64_t kPart = 4 << 20;  // numbers
    std::unique_ptr<void, void (*)(void*)> memory_{nullptr, std::free};
};

}  // namespace

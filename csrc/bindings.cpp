// The only file that knows Python: takes arrays apart, releases the GIL, calls the kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

using Doubles = py::array_t<double, py::array::c_style>;
using Ints = py::array_t<int, py::array::c_style>;

const ntk::Kernels& kernels(const std::string& isa) {
    if (isa.empty()) return ntk::kernels();
    if (const ntk::Kernels* k = ntk::kernels_of(isa.c_str())) return *k;
    throw std::runtime_error("instruction set " + isa + " is not available here");
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

// MemoryError in Python; also without the GIL.
void enough(bool memory) {
    if (!memory) throw std::bad_alloc();
}

const double* vector_of(const Doubles& a, py::ssize_t n) {
    require(a.ndim() == 1 && a.shape(0) == n, "a per-row array has the wrong length");
    return a.data();
}

// A float32 or float64 matrix whose rows are contiguous.
struct Matrix {
    void* data;
    std::int64_t rows, cols, stride;
    bool single;
};
Matrix matrix_of(const py::array& a, bool write) {
    require(a.ndim() == 2, "a matrix is needed");
    const bool single = py::isinstance<py::array_t<float>>(a);
    require(single || py::isinstance<py::array_t<double>>(a), "float32 or float64 is needed");
    const py::ssize_t item = a.itemsize();
    require(a.shape(1) <= 1 || a.strides(1) == item, "rows must be contiguous");
    require(a.strides(0) % item == 0, "the row stride must be a multiple of the item size");
    require(!write || a.writeable(), "the array is read-only");
    return {const_cast<void*>(a.data()), a.shape(0), a.shape(1), a.strides(0) / item, single};
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
    }
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

ntk::Points points_of(const py::tuple& t, const Matrix& products, std::int64_t n, std::int64_t& dim) {
    const Matrix x = matrix_of(py::cast<py::array>(t[0]), false);
    require(x.rows == n && x.single == products.single, "points and products differ in length or dtype");
    dim = x.cols;
    return {x.data, x.stride, vector_of(py::cast<Doubles>(t[1]), n), vector_of(py::cast<Doubles>(t[2]), n)};
}

// mirror: (cols, rows) view or None
void* mirror_of(const py::handle& item, const Matrix& data, std::int64_t& stride) {
    if (item.is_none()) return nullptr;
    const Matrix m = matrix_of(py::cast<py::array>(item), true);
    require(m.rows == data.cols && m.cols == data.rows && m.single == data.single, "the mirror has the wrong shape");
    stride = m.stride;
    return m.data;
}

// products (n, m); i, j: tuples (rows, inv, norm); outputs: tuples (data, mirror, (theta, cov, mean, last), fi, fj, hi, hj);
// slices: None or (data (P, n, m), mirror (P, m, n) or None, fi, fj, readout, readout_cov, readout_const)
void tile(const PlanHolder& plan, const py::array& products, const py::tuple& i, const py::tuple& j, const py::object& diagonal,
          double close, const py::list& outputs, const py::object& slices) {
    const Matrix k0 = matrix_of(products, false);
    ntk::Tile t{};
    std::int64_t dim = 0, dim_j = 0;
    t.products = k0.data, t.stride = k0.stride, t.rows = k0.rows, t.cols = k0.cols;
    t.i = points_of(i, k0, k0.rows, dim);
    t.j = points_of(j, k0, k0.cols, dim_j);
    require(dim == dim_j, "rows of different length");
    t.dim = dim;
    t.diagonal = diagonal.is_none() ? INT64_MIN : py::cast<std::int64_t>(diagonal);
    t.close = close;
    std::vector<ntk::Output> outs;
    for (const py::handle& item : outputs) {
        const py::tuple o = py::cast<py::tuple>(item);
        const Matrix data = matrix_of(py::cast<py::array>(o[0]), true);
        require(data.rows == k0.rows && data.cols == k0.cols && data.single == k0.single, "an output has the wrong shape");
        const auto mix = py::cast<std::array<double, 4>>(o[2]);
        ntk::Output out{};
        out.data = data.data, out.stride = data.stride;
        out.mirror = mirror_of(o[1], data, out.mirror_stride);
        out.theta = mix[0], out.cov = mix[1], out.mean = mix[2], out.last = mix[3];
        out.fi = vector_of(py::cast<Doubles>(o[3]), k0.rows), out.fj = vector_of(py::cast<Doubles>(o[4]), k0.cols);
        out.hi = vector_of(py::cast<Doubles>(o[5]), k0.rows), out.hj = vector_of(py::cast<Doubles>(o[6]), k0.cols);
        outs.push_back(out);
    }
    t.outputs = outs.data(), t.n_outputs = int(outs.size());
    if (!slices.is_none()) {
        const py::tuple s = py::cast<py::tuple>(slices);
        const py::array data = py::cast<py::array>(s[0]);
        require(data.ndim() == 3 && data.shape(1) == k0.rows && data.shape(2) == k0.cols && data.shape(0) > 0 &&
                    data.itemsize() == (k0.single ? 4 : 8) && data.strides(2) == data.itemsize() && data.writeable(),
                "the slices have the wrong shape");
        t.slices.data = const_cast<void*>(data.data());
        t.slices.stride = data.strides(1) / data.itemsize(), t.slices.slice_stride = data.strides(0) / data.itemsize();
        if (!s[1].is_none()) {
            const py::array mirror = py::cast<py::array>(s[1]);
            require(mirror.ndim() == 3 && mirror.shape(1) == k0.cols && mirror.shape(2) == k0.rows &&
                        mirror.strides(0) == data.strides(0) && mirror.writeable(), "the mirror of the slices has the wrong shape");
            t.slices.mirror = const_cast<void*>(mirror.data());
            t.slices.mirror_stride = mirror.strides(1) / mirror.itemsize();
        }
        t.slices.fi = vector_of(py::cast<Doubles>(s[2]), k0.rows), t.slices.fj = vector_of(py::cast<Doubles>(s[3]), k0.cols);
        t.slices.readout = py::cast<int>(s[4]);
        t.slices.readout_cov = py::cast<double>(s[5]), t.slices.readout_const = py::cast<double>(s[6]);
    }
    require(t.n_outputs > 0 || t.slices.data, "nothing to compute");
    const ntk::Kernels& k = ntk::kernels();
    py::gil_scoped_release release;
    enough((k0.single ? k.tile32 : k.tile64)(plan.plan(), t));
}

// theta Theta + cov S + mean b_i b_j + last G for single pairs, (n,) float64; without norms if the plan has no suffix.
Doubles pairs(const PlanHolder& plan, const Doubles& x, const Doubles& s, const Doubles& norm_i, const Doubles& norm_j,
              const std::array<double, 4>& mix, bool single, const std::string& isa) {
    const py::ssize_t n = x.shape(0);
    Doubles out(n);
    ntk::Pairs p{n, vector_of(x, n), vector_of(s, n), vector_of(norm_i, n), vector_of(norm_j, n), out.mutable_data(),
                 mix[0], mix[1], mix[2], mix[3]};
    const ntk::Kernels& k = kernels(isa);
    py::gil_scoped_release release;
    enough((single ? k.pairs32 : k.pairs64)(plan.plan(), p));
    return out;
}

Doubles squares(const py::array& x) {
    const Matrix m = matrix_of(x, false);
    Doubles out(m.rows);
    double* result = out.mutable_data();
    const ntk::Kernels& k = ntk::kernels();
    py::gil_scoped_release release;
    if (m.single) k.squares32(static_cast<const float*>(m.data), m.rows, m.cols, m.stride, result);
    else k.squares64(static_cast<const double*>(m.data), m.rows, m.cols, m.stride, result);
    return out;
}

// One layer of the suffix for rows of variance var and mean: new variance, new mean, Q_ii.
py::tuple rows(const PlanHolder& plan, int layer, const Doubles& var, const Doubles& mean) {
    const py::ssize_t n = var.shape(0);
    vector_of(mean, n);
    Doubles v(n), b(n), q(n);
    std::copy(var.data(), var.data() + n, v.mutable_data());
    std::copy(mean.data(), mean.data() + n, b.mutable_data());
    enough(ntk::kernels().rows(plan.layer(layer), plan.tables(), n, v.mutable_data(), b.mutable_data(), q.mutable_data()));
    return py::make_tuple(v, b, q);
}

// Element-wise door to csrc/math for the tests.
py::array scalar(const std::string& name, const py::array& x, const std::string& isa) {
    const char* names[] = {"theta0", "theta1", "theta2", "area0", "area1", "area2", "exp", "expm1"};
    int id = 0;
    while (id < 8 && name != names[id]) ++id;
    require(id < 8, "no such function");
    const ntk::Kernels& k = kernels(isa);
    if (py::isinstance<py::array_t<float>>(x)) {
        py::array_t<float, py::array::c_style> in(x), out(x.size());
        k.scalar32(id, x.size(), in.data(), out.mutable_data());
        return out;
    }
    Doubles in(x), out(x.size());
    k.scalar64(id, x.size(), in.data(), out.mutable_data());
    return out;
}

// w, D and side (PairNumbers) of the activation of one suffix layer, for rows of variance a, b before the layer.
py::tuple dual(const PlanHolder& plan, int layer, const Doubles& a, const Doubles& b, const Doubles& x, const Doubles& s,
               const std::string& isa) {
    const py::ssize_t n = a.shape(0);
    Doubles w(n), d(n), side(n);
    enough(kernels(isa).dual(plan.layer(layer), plan.tables(), n, vector_of(a, n), vector_of(b, n), vector_of(x, n), vector_of(s, n),
                      w.mutable_data(), d.mutable_data(), side.mutable_data()));
    return py::make_tuple(w, d, side);
}

// out (n, m) (+)= sum over positions of p q; p, q (n positions_i, m positions_j), q may be None.
void multiply_add(const py::array& out, const py::array& p, const py::object& q, std::int64_t positions_i,
                  std::int64_t positions_j, bool first, const std::string& isa) {
    const Matrix o = matrix_of(out, true), a = matrix_of(p, false);
    require(positions_i > 0 && positions_j > 0 && (!q.is_none() || (positions_i == 1 && positions_j == 1)), "positions");
    require(a.rows == o.rows * positions_i && a.cols == o.cols * positions_j && a.single == o.single,
            "the products have the wrong shape");
    ntk::MultiplyAdd m{o.data, o.stride, a.data, nullptr, a.stride, 0, o.rows, o.cols, positions_i, positions_j, first};
    if (!q.is_none()) {
        const Matrix b = matrix_of(py::cast<py::array>(q), false);
        require(b.rows == a.rows && b.cols == a.cols && b.single == a.single, "the products differ in shape");
        m.q = b.data, m.q_stride = b.stride;
    }
    const ntk::Kernels& k = kernels(isa);
    py::gil_scoped_release release;
    (o.single ? k.multiply_add32 : k.multiply_add64)(m);
}

// to (m, n) = from^T (n, m); if they are one square, what lies above its diagonal goes below it.
void mirror(const py::array& from, const py::array& to) {
    const Matrix f = matrix_of(from, false), t = matrix_of(to, true);
    require(f.rows == t.cols && f.cols == t.rows && f.single == t.single, "the mirror has the wrong shape");
    const bool below = f.data == t.data;
    require(!below || (f.rows == f.cols && f.stride == t.stride), "only a square is its own mirror");
    const ntk::Kernels& k = ntk::kernels();
    py::gil_scoped_release release;
    if (f.single)
        k.mirror32(static_cast<const float*>(f.data), f.rows, f.cols, f.stride, static_cast<float*>(t.data), t.stride, below);
    else
        k.mirror64(static_cast<const double*>(f.data), f.rows, f.cols, f.stride, static_cast<double*>(t.data), t.stride, below);
}

std::vector<std::string> available() {
    std::vector<std::string> found;
    for (const char* isa : {"v4", "v3", "v2", "baseline"})
        if (ntk::kernels_of(isa)) found.push_back(isa);
    return found;
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    py::class_<PlanHolder>(m, "Plan")
        .def(py::init<const Doubles&, const Ints&, double, double, const Doubles&, const Ints&, const py::list&>(),
             py::arg("prefix"), py::arg("prefix_ints"), py::arg("nu"), py::arg("beta"), py::arg("suffix"),
             py::arg("suffix_ints"), py::arg("tables"));
    m.def("tile", &tile, py::arg("plan"), py::arg("products"), py::arg("i"), py::arg("j"), py::arg("diagonal"), py::arg("close"),
          py::arg("outputs"), py::arg("slices"));
    m.def("pairs", &pairs, py::arg("plan"), py::arg("x"), py::arg("s"), py::arg("norm_i"), py::arg("norm_j"), py::arg("mix"),
          py::arg("single") = false, py::arg("isa") = "");
    m.def("squares", &squares, py::arg("x"));
    m.def("rows", &rows, py::arg("plan"), py::arg("layer"), py::arg("var"), py::arg("mean"));
    m.def("scalar", &scalar, py::arg("name"), py::arg("x"), py::arg("isa") = "");
    m.def("dual", &dual, py::arg("plan"), py::arg("layer"), py::arg("a"), py::arg("b"), py::arg("x"), py::arg("s"),
          py::arg("isa") = "");
    m.def("multiply_add", &multiply_add, py::arg("out"), py::arg("p"), py::arg("q"), py::arg("positions_i") = 1,
          py::arg("positions_j") = 1, py::arg("first") = false, py::arg("isa") = "");
    m.def("mirror", &mirror, py::arg("source"), py::arg("target"));
    m.def("erf", py::vectorize([](double x) { return std::erf(x); }), py::arg("x"));
    m.def("isa", [] { return std::string(ntk::kernels().isa); });
    m.def("available", &available);
#ifdef _OPENMP
    m.def("threads", [] { return omp_get_max_threads(); });
    // A forked child has no worker threads and would wait for them forever; one thread needs none.
    m.def("after_fork", [] { omp_set_num_threads(1); });
#else
    m.def("threads", [] { return 1; });
    m.def("after_fork", [] {});
#endif
}

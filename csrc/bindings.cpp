// The only files that know Python: this one, holders.h, arrays.h. Releases the GIL, calls the kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "holders.h"

namespace {

ntk::Points points_of(const py::tuple& t, bool single, std::int64_t n, std::int64_t& dim) {
    const Matrix x = matrix_of(py::cast<py::array>(t[0]), false);
    require(x.rows == n && x.single == single, "points and products differ in length or dtype");
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

// Owns the outputs of an ntk::Tile. i, j: tuples (rows, inv, norm); outputs: tuples (data, mirror, (theta, cov, mean, last),
// fi, fj, hi, hj, Table or None), tables for all outputs or for none; data is None where K V is wanted; slices: None or (data (P, n, m), mirror (P, m, n) or
// None, fi, fj, readout, readout_cov, readout_const)
struct TileParts {
    ntk::Tile tile{};
    std::vector<ntk::Output> outs;

    TileParts(std::int64_t rows, std::int64_t cols, bool single, const py::tuple& i, const py::tuple& j, const py::object& diagonal,
              double close, const py::list& outputs, const py::object& slices) {
        std::int64_t dim_j = 0;
        tile.rows = rows, tile.cols = cols;
        tile.i = points_of(i, single, rows, tile.dim);
        tile.j = points_of(j, single, cols, dim_j);
        require(tile.dim == dim_j, "rows of different length");
        tile.diagonal = diagonal.is_none() ? INT64_MIN : py::cast<std::int64_t>(diagonal);
        tile.close = close;
        for (const py::handle& item : outputs) add_output(py::cast<py::tuple>(item), single);
        require(outs.size() <= 4, "at most four outputs");
        tile.outputs = outs.data(), tile.n_outputs = int(outs.size());
        if (!slices.is_none()) add_slices(py::cast<py::tuple>(slices), single);
        require(tile.n_outputs > 0 || tile.slices.data, "nothing to compute");
        const std::int64_t stride = tile.slices.data ? tile.slices.stride : outs[0].stride;
        tile.stream = double(rows) * double(stride) * (single ? 4 : 8) > ntk::kStreamBytes;
    }

    bool written() const {
        for (const ntk::Output& out : outs) if (!out.data) return false;
        return true;
    }

   private:
    void add_output(const py::tuple& o, bool single) {
        const auto mix = py::cast<std::array<double, 4>>(o[2]);
        ntk::Output out{};
        if (!o[0].is_none()) {
            const Matrix data = matrix_of(py::cast<py::array>(o[0]), true);
            require(data.rows == tile.rows && data.cols == tile.cols && data.single == single, "an output has the wrong shape");
            out.data = data.data, out.stride = data.stride;
            out.mirror = mirror_of(o[1], data, out.mirror_stride);
        }
        out.theta = mix[0], out.cov = mix[1], out.mean = mix[2], out.last = mix[3];
        out.fi = vector_of(py::cast<Doubles>(o[3]), tile.rows), out.fj = vector_of(py::cast<Doubles>(o[4]), tile.cols);
        out.hi = vector_of(py::cast<Doubles>(o[5]), tile.rows), out.hj = vector_of(py::cast<Doubles>(o[6]), tile.cols);
        if (!o[7].is_none()) {
            const TableHolder& table = py::cast<const TableHolder&>(o[7]);
            require(table.report().reached && table.single() == single, "the table does not belong to this dtype");
            out.table = table.data();
        }
        require(outs.empty() || !outs[0].table == !out.table, "tables for all outputs or for none");
        outs.push_back(out);
    }
    void add_slices(const py::tuple& s, bool single) {
        ntk::Slices& to = tile.slices;
        const py::array data = py::cast<py::array>(s[0]);
        require(data.ndim() == 3 && data.shape(1) == tile.rows && data.shape(2) == tile.cols && data.shape(0) > 0 &&
                    data.itemsize() == (single ? 4 : 8) && data.strides(2) == data.itemsize() && data.writeable(),
                "the slices have the wrong shape");
        to.data = const_cast<void*>(data.data());
        to.stride = data.strides(1) / data.itemsize(), to.slice_stride = data.strides(0) / data.itemsize();
        if (!s[1].is_none()) {
            const py::array mirror = py::cast<py::array>(s[1]);
            require(mirror.ndim() == 3 && mirror.shape(1) == tile.cols && mirror.shape(2) == tile.rows &&
                        mirror.strides(0) == data.strides(0) && mirror.writeable(), "the mirror of the slices has the wrong shape");
            to.mirror = const_cast<void*>(mirror.data());
            to.mirror_stride = mirror.strides(1) / mirror.itemsize();
        }
        to.fi = vector_of(py::cast<Doubles>(s[2]), tile.rows), to.fj = vector_of(py::cast<Doubles>(s[3]), tile.cols);
        to.readout = py::cast<int>(s[4]);
        to.readout_cov = py::cast<double>(s[5]), to.readout_const = py::cast<double>(s[6]);
    }
};

// products (n, m)
void tile(const PlanHolder& plan, const py::array& products, const py::tuple& i, const py::tuple& j, const py::object& diagonal,
          double close, const py::list& outputs, const py::object& slices) {
    const Matrix k0 = matrix_of(products, false);
    TileParts parts(k0.rows, k0.cols, k0.single, i, j, diagonal, close, outputs, slices);
    require(parts.written(), "an output is missing");
    parts.tile.products = k0.data, parts.tile.stride = k0.stride;
    const ntk::Kernels& k = ntk::kernels();
    py::gil_scoped_release release;
    enough((k0.single ? k.tile32 : k.tile64)(plan.plan(), parts.tile));
}


// matmul: (V of the columns, sums of the rows, V of the rows or None, sums of the columns or None), float64 (columns of V, n)
ntk::Matmul matmul_of(const py::tuple& t, const ntk::Tile& tile) {
    const auto matrix = [&](int k, std::int64_t n, bool write) {
        const Matrix m = matrix_of(py::cast<py::array>(t[k]), write);
        require(!m.single && m.cols == n && m.rows > 0, "columns of a product need float64 and the length of the tile");
        return m;
    };
    const Matrix vj = matrix(0, tile.cols, false), sums_i = matrix(1, tile.rows, true);
    require(vj.rows == sums_i.rows && t[2].is_none() == t[3].is_none(), "columns and sums differ in number");
    ntk::Matmul m{vj.rows, nullptr, static_cast<const double*>(vj.data), static_cast<double*>(sums_i.data), nullptr, vj.stride,
                  sums_i.stride};
    if (t[2].is_none()) return m;
    const Matrix vi = matrix(2, tile.rows, false), sums_j = matrix(3, tile.cols, true);
    require(vi.rows == vj.rows && sums_j.rows == vj.rows && vi.stride == vj.stride && sums_j.stride == sums_i.stride &&
                (tile.diagonal == INT64_MIN || (tile.diagonal == 0 && tile.rows == tile.cols)), "no such mirror image");
    m.vi = static_cast<const double*>(vi.data), m.sums_j = static_cast<double*>(sums_j.data);
    return m;
}

// As tile, for rows i0 .. and j0 .. of packed sides; the numbers of rows are those of i and j.
void fused(const PlanHolder& plan, const PackedHolder& x, std::int64_t i0, const PackedHolder& y, std::int64_t j0, bool wide,
           const py::tuple& i, const py::tuple& j, const py::object& diagonal, double close, const py::list& outputs,
           const py::object& slices, const py::object& matmul) {
    const std::int64_t rows = py::cast<Doubles>(i[1]).size(), cols = py::cast<Doubles>(j[1]).size();
    require(x.single == y.single && x.rows.d == y.rows.d, "the sides differ in dtype or length of rows");
    require(i0 >= 0 && j0 >= 0 && i0 % ntk::kPanelUnit == 0 && j0 % ntk::kPanelUnit == 0 && i0 + rows <= x.rows.n &&
                j0 + cols <= y.rows.n, "no such tile");
    const TileParts parts(rows, cols, x.single, i, j, diagonal, close, outputs, slices);
    require(parts.tile.dim == x.rows.d, "points and packed rows differ in length");
    ntk::FusedTile f{x.rows, y.rows, i0, j0, parts.tile, {}};
    if (!matmul.is_none()) {
        require(parts.tile.n_outputs == 1 && !parts.tile.slices.data && !parts.outs[0].data, "a product takes one kind, not written");
        f.matmul = matmul_of(py::cast<py::tuple>(matmul), parts.tile);
    } else require(parts.written(), "an output is missing");
    f.tile.wide = wide && x.single;
    const ntk::Kernels& k = ntk::kernels();
    py::gil_scoped_release release;
    enough((x.single ? k.fused32 : k.fused64)(plan.plan(), f));
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

// Squared norms and largest entries of rows, (n,) each.
std::pair<Doubles, Doubles> squares(const py::array& x) {
    const Matrix m = matrix_of(x, false);
    Doubles out(m.rows), most(m.rows);
    double *result = out.mutable_data(), *largest = most.mutable_data();
    const ntk::Kernels& k = ntk::kernels();
    py::gil_scoped_release release;
    if (m.single) k.squares32(static_cast<const float*>(m.data), m.rows, m.cols, m.stride, result, largest);
    else k.squares64(static_cast<const double*>(m.data), m.rows, m.cols, m.stride, result, largest);
    return {out, most};
}

const ntk::Products& products(const std::string& isa) {
    return *ntk::products_of(kernels(isa).isa);
}

// out = x y^T, or x x^T without y; wide: float32 rows, sums in float64.
void product(const py::array& x, const py::object& y, const py::array& out, bool wide, const std::string& isa) {
    const Matrix a = matrix_of(x, false), result = matrix_of(out, true);
    const Matrix b = y.is_none() ? a : matrix_of(py::cast<py::array>(y), false);
    require(a.cols == b.cols && a.single == b.single, "rows differ in length or dtype");
    require(result.rows == a.rows && result.cols == b.rows && result.single == a.single, "the output has the wrong shape");
    const ntk::Product p{a.data, a.rows, a.cols, a.stride, b.data, b.rows, b.stride, result.data, result.stride,
                         y.is_none(), wide};
    const ntk::Products& k = products(isa);
    py::gil_scoped_release release;
    enough((a.single ? k.product32 : k.product64)(p));
}

// Operations of `rounds` rounds of fused multiply-adds on all threads; the caller takes the time.
double peak(std::int64_t rounds, bool single, const std::string& isa) {
    const ntk::Products& p = products(isa);
    py::gil_scoped_release release;
    return (single ? p.peak32 : p.peak64)(rounds);
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

#include "bindings_conv.h"

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    py::class_<PlanHolder>(m, "Plan")
        .def(py::init<const Doubles&, const Ints&, double, double, const Doubles&, const Ints&, const py::list&>(),
             py::arg("prefix"), py::arg("prefix_ints"), py::arg("nu"), py::arg("beta"), py::arg("suffix"),
             py::arg("suffix_ints"), py::arg("tables"))
        .def_readonly("arguments", &PlanHolder::arguments);
    py::class_<TableHolder>(m, "Table")
        .def(py::init<const PlanHolder&, const std::array<double, 4>&, double, bool>(), py::arg("plan"), py::arg("mix"),
             py::arg("norm"), py::arg("single"))
        .def_property_readonly("error", [](const TableHolder& t) { return t.report().error; })
        .def_property_readonly("reached", [](const TableHolder& t) { return t.report().reached; })
        .def_property_readonly("panels", [](const TableHolder& t) { return t.report().panels; })
        .def("values", &TableHolder::values, py::arg("x"), py::arg("s"), py::arg("isa") = "")
        .def("arrays", &TableHolder::arrays);
    m.def("tile", &tile, py::arg("plan"), py::arg("products"), py::arg("i"), py::arg("j"), py::arg("diagonal"), py::arg("close"),
          py::arg("outputs"), py::arg("slices"));
    py::class_<PackedHolder>(m, "Packed").def(py::init<const py::array&>(), py::arg("x"));
    m.attr("PANEL") = ntk::kPanelUnit;
    m.def("fused", &fused, py::arg("plan"), py::arg("x"), py::arg("i0"), py::arg("y"), py::arg("j0"), py::arg("wide"), py::arg("i"),
          py::arg("j"), py::arg("diagonal"), py::arg("close"), py::arg("outputs"), py::arg("slices"), py::arg("matmul") = py::none());
    m.def("pairs", &pairs, py::arg("plan"), py::arg("x"), py::arg("s"), py::arg("norm_i"), py::arg("norm_j"), py::arg("mix"),
          py::arg("single") = false, py::arg("isa") = "");
    m.def("squares", &squares, py::arg("x"));
    m.def("product", &product, py::arg("x"), py::arg("y"), py::arg("out"), py::arg("wide") = false, py::arg("isa") = "");
    m.def("peak", &peak, py::arg("rounds"), py::arg("single") = false, py::arg("isa") = "");
    m.def("rows", &rows, py::arg("plan"), py::arg("layer"), py::arg("var"), py::arg("mean"));
    m.def("scalar", &scalar, py::arg("name"), py::arg("x"), py::arg("isa") = "");
    m.def("dual", &dual, py::arg("plan"), py::arg("layer"), py::arg("a"), py::arg("b"), py::arg("x"), py::arg("s"),
          py::arg("isa") = "");
    m.def("multiply_add", &multiply_add, py::arg("out"), py::arg("p"), py::arg("q"), py::arg("positions_i") = 1,
          py::arg("positions_j") = 1, py::arg("first") = false, py::arg("isa") = "");
    add_convolutions(m);
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

// The part of bindings.cpp for convolutional networks; included there, behind PlanHolder.
#pragma once
#include "cpu/conv.h"

namespace {

// shape: height, width, channels, window reach by axis, circular, pooled.
using ConvShape = std::array<int, 7>;

ntk::ConvPlan conv_plan(const PlanHolder& plan, const ConvShape& shape, bool fast) {
    const ntk::Plan& layers = plan.plan();
    require(layers.n_prefix == 0 && layers.n_suffix > 0, "layers of a convolutional network are general ones");
    require(shape[0] > 0 && shape[1] > 0 && shape[2] > 0 && shape[3] >= 0 && shape[4] >= 0, "shape");
    return {layers.suffix, layers.n_suffix, layers.tables, shape[0], shape[1], shape[2], shape[3], shape[4], shape[5] != 0,
            shape[6] != 0, fast};
}
const ntk::ConvKernels& conv_kernels(const std::string& isa) {
    if (const ntk::ConvKernels* k = ntk::conv_kernels_of(isa.empty() ? ntk::kernels().isa : isa.c_str())) return *k;
    throw std::runtime_error("instruction set " + isa + " is not available here");
}

// Images prepared for the kernels of one plan and one instruction set. x: (n, channels, height, width), C order.
class ConvImagesHolder {
   public:
    ConvImagesHolder(const PlanHolder& plan, const ConvShape& shape_, bool fast_, const py::array& x, bool twice, const std::string& isa)
        : shape(shape_), fast(fast_), kernels(conv_kernels(isa)), single(py::isinstance<py::array_t<float>>(x)), plan_(&plan) {
        const ntk::ConvPlan p = conv_plan(plan, shape, fast);
        require(single || py::isinstance<py::array_t<double>>(x), "float32 or float64 is needed");
        require(x.ndim() == 4 && x.shape(1) == p.channels && x.shape(2) == p.height && x.shape(3) == p.width &&
                    (x.flags() & py::array::c_style), "images: (n, channels, height, width), contiguous");
        const std::int64_t n = x.shape(0);
        const void* data = x.data();
        py::gil_scoped_release release;
        memory_.reset(single ? kernels.prepare32(p, static_cast<const float*>(data), n, twice)
                             : kernels.prepare64(p, static_cast<const double*>(data), n, twice));
        enough(memory_ != nullptr);
        images = {memory_.get(), n, twice};
    }
    bool fits(const ConvImagesHolder& o) const {
        return shape == o.shape && fast == o.fast && &kernels == &o.kernels && single == o.single && plan_ == o.plan_;
    }
    bool made_for(const PlanHolder& plan) const { return plan_ == &plan; }
    ntk::ConvImages images{};
    const ConvShape shape;
    const bool fast;
    const ntk::ConvKernels& kernels;
    const bool single;

   private:
    const PlanHolder* plan_;
    std::unique_ptr<void, void (*)(void*)> memory_{nullptr, std::free};
};

// Adds to sums (3, rows, cols) (paired: (3, rows, 1)) and writes slices (layers, rows, cols) or None: what conv.h says.
void conv_tile(const PlanHolder& plan, const ConvImagesHolder& x, std::int64_t i0, const ConvImagesHolder& y, std::int64_t j0,
               bool triangle, bool strict, bool paired, std::int64_t first, std::int64_t shifts, py::array& sums, const py::object& slices) {
    const ntk::ConvPlan p = conv_plan(plan, x.shape, x.fast);
    require(x.made_for(plan) && x.fits(y) && !x.images.twice && y.images.twice == p.pooled, "images prepared for something else");
    require(py::isinstance<Doubles>(sums) && sums.ndim() == 3 && sums.shape(0) == 3 && (sums.flags() & py::array::c_style) &&
                sums.writeable(), "sums: (3, rows, cols)");
    const std::int64_t rows = sums.shape(1), cols = paired ? rows : sums.shape(2);
    require(!paired || sums.shape(2) == 1, "sums: (3, rows, 1)");
    require(i0 >= 0 && j0 >= 0 && i0 + rows <= x.images.n && j0 + cols <= y.images.n, "rows outside the images");
    require(first >= 0 && shifts > 0 && first + shifts <= (p.pooled ? p.height : 1), "no such shifts");
    ntk::ConvTile t{x.images, y.images, i0, rows, j0, cols, triangle, strict, paired, first, shifts,
                    static_cast<double*>(sums.mutable_data()), nullptr};
    if (!slices.is_none()) {
        py::array to = py::cast<py::array>(slices);
        require(!p.fast && !p.pooled && py::isinstance<Doubles>(to) && (to.flags() & py::array::c_style) && to.writeable() &&
                    to.ndim() == 3 && to.shape(0) == p.n_layers && to.shape(1) == rows && to.shape(2) == sums.shape(2),
                "slices: (layers, rows, cols)");
        t.slices = static_cast<double*>(to.mutable_data());
    }
    py::gil_scoped_release release;
    enough((x.single ? x.kernels.tile32 : x.kernels.tile64)(p, t));
}

void add_convolutions(py::module_& m) {
    py::class_<ConvImagesHolder>(m, "ConvImages")
        .def(py::init<const PlanHolder&, const ConvShape&, bool, const py::array&, bool, const std::string&>(), py::keep_alive<1, 2>(),
             py::arg("plan"), py::arg("shape"), py::arg("fast"), py::arg("x"), py::arg("twice"), py::arg("isa") = "");
    m.def("conv_tile", &conv_tile, py::arg("plan"), py::arg("x"), py::arg("i0"), py::arg("y"), py::arg("j0"), py::arg("triangle"),
          py::arg("strict"), py::arg("paired"), py::arg("first"), py::arg("shifts"), py::arg("sums"), py::arg("slices"));
    m.def("conv_bytes", [](const PlanHolder& plan, const ConvShape& shape, bool fast, bool single, bool twice) {
        return conv_kernels("").bytes(conv_plan(plan, shape, fast), single, twice);
    }, py::arg("plan"), py::arg("shape"), py::arg("fast"), py::arg("single"), py::arg("twice"));
}

}  // namespace

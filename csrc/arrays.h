// NumPy arrays taken apart: what the bindings ask of them before anything else.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>

namespace {

namespace py = pybind11;
using Doubles = py::array_t<double, py::array::c_style>;
using Ints = py::array_t<int, py::array::c_style>;

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
    require(a.size() == 0 || a.shape(1) == 1 || a.strides(1) == item, "rows must be contiguous");
    require(a.size() == 0 || a.strides(0) % item == 0, "the row stride must be a multiple of the item size");
    require(!write || a.writeable(), "the array is read-only");
    return {const_cast<void*>(a.data()), a.shape(0), a.shape(1), a.strides(0) / item, single};
}

}  // namespace

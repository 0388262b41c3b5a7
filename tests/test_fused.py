"""Products and kernels in one pass against products by the BLAS, and the driver of the address sanitizer."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from conftest import assert_close
from test_gram import FREE, KINDS, PATHS, points, scales
from test_tree import COMPILER, CSRC, flags, needs_compiler

import ntkfast as nf
from ntkfast import _core, _gemm, _tiles
from ntkfast._plan import compile_network

DTYPES = (np.float64, np.float32)
#: Sizes around vectors, panels (8 to 48), patches (192) and tiles (192, 384).
SIZES = (1, 2, 3, 7, 8, 9, 23, 24, 25, 47, 48, 49, 63, 64, 65, 95, 96, 97, 191, 192, 193, 239, 288, 300)
#: Difference between the routes in eps of the dtype over sqrt(K_ii K_jj): two inner products of at most 64 terms, whose
#: roundings depth 3 multiplies by less than 4.
BOUND = 48


def both(monkeypatch, call):
    """What `call` gives by either route."""
    results = []
    for route in ("blas", "fused"):
        monkeypatch.setenv("NTKFAST_GEMM", route)
        results.append(call())
    return results


def agree(monkeypatch, net, X, Y=None, dtype=np.float64, **options):
    x, y = X.astype(dtype), None if Y is None else Y.astype(dtype)
    blas, fused = both(monkeypatch, lambda: nf.gram(net, x, y, **options))
    assert fused.dtype == dtype
    assert_close(fused, blas, scales(net, X, Y, "ntk"), BOUND * float(np.finfo(dtype).eps))
    if Y is None:
        np.testing.assert_array_equal(fused, fused.T)


@pytest.mark.parametrize("path", ["table", "recursion"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype, path, monkeypatch):
    monkeypatch.setenv("NTKFAST_PATH", path)
    for k, n in enumerate(SIZES):
        X, Y = points(n, 1 + k * 13 % 64, n), points(SIZES[(7 * k + 3) % len(SIZES)], 1 + k * 13 % 64, n + 1)
        agree(monkeypatch, nf.resnet(3), X, dtype=dtype)
        agree(monkeypatch, nf.resnet(3), X, Y, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["table", "recursion"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_sizes(dtype, path, monkeypatch):
    monkeypatch.setenv("NTKFAST_PATH", path)
    for n in [*range(1, 100), *range(100, 300, 3), 300]:
        X, Y = points(n, 5, n), points(1 + 37 * n % 300, 5, n + 1)
        agree(monkeypatch, nf.fully_connected(2), X, dtype=dtype)
        agree(monkeypatch, nf.fully_connected(2), X, Y, dtype=dtype)


@pytest.mark.parametrize("side", [96, 192])
@pytest.mark.parametrize("name", [*PATHS, "readout"])
def test_several_calls(name, side, monkeypatch):
    # Tiles of the iterator begin at panels, their last ones are ragged.
    monkeypatch.setattr(_tiles, "FUSED_SIDE", side)
    net = (PATHS | FREE)[name]
    X, Y = points(250, 6, 50), points(131, 6, 51)
    for other in (None, Y):
        blas, fused = both(monkeypatch, lambda other=other: nf.gram(net, X, other, get=KINDS))
        for get, a, b in zip(KINDS, blas, fused, strict=True):
            assert_close(b, a, scales(net, X, other, get), BOUND * 2.0**-52)
        blas, fused = both(monkeypatch, lambda other=other: nf.layer_grams(net, X, other))
        assert_close(fused, blas, scales(net, X, other, "ntk"), BOUND * 2.0**-52)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_rows(dtype, monkeypatch):
    """Duplicates, opposite, close and zero rows, and every other row of a wider array."""
    net, X = nf.resnet(3), points(260, 9, 52)
    X[100:130] = X[:30]
    X[130:160] = -X[:30]
    X[160:190] = (X[:30] * (1 + 1e-4 * points(30, 9, 53))).astype(np.float32)
    X[200:205] = 0
    for options in ({}, {"normalize": True}):
        agree(monkeypatch, net, X, dtype=dtype, **options)
        agree(monkeypatch, net, X, X[::-1][:111], dtype=dtype, **options)
    frame = np.full((520, 30), 1e5, dtype)
    frame[::2, 10:19] = X
    view, plain = (
        both(monkeypatch, lambda x=x: nf.gram(net, x))[1] for x in (frame[::2, 10:19], np.ascontiguousarray(X, dtype))
    )
    np.testing.assert_array_equal(view, plain)


def test_rows_packed_in_parts(monkeypatch):
    # more numbers than one part: 4 million
    for dtype in DTYPES:
        agree(monkeypatch, nf.resnet(2), points(230, 40_000, 60), dtype=dtype)


@pytest.mark.parametrize("accumulate", [None, "float64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_pairs_by_table(dtype, accumulate, monkeypatch):
    """The recursion takes angles of close pairs from differences, too; 1 - rho would be wrong by eps / angle."""
    net, X = nf.resnet(3), points(210, 9, 61)
    angle = 1e-6 if dtype == np.float64 else 1e-3
    X[100:150] = X[:50] + angle * points(50, 9, 62)
    X[150:200] = -X[:50] + angle * points(50, 9, 63)
    X, found = X.astype(dtype), []
    for path, sums in (("recursion", None), ("table", accumulate)):
        monkeypatch.setenv("NTKFAST_PATH", path)
        found.append([nf.gram(net, X, accumulate=sums), nf.gram(net, X, X[::-1], accumulate=sums)])
    for k, other in enumerate((None, X[::-1].astype(np.float64))):
        scale = scales(net, X.astype(np.float64), other, "ntk")
        assert_close(found[1][k], found[0][k].astype(np.float64), scale, BOUND * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("shape", [(1, 700), (700, 1), (2, 389), (13, 1201)])
def test_rectangles(shape, monkeypatch):
    n, m = shape
    for d in (1, 64):
        agree(monkeypatch, nf.fully_connected(3), points(n, d, 54), points(m, d, 55))


def test_the_route_is_chosen_by_one_function(monkeypatch):
    calls = []
    monkeypatch.setattr(_core, "fused", lambda *a, f=_core.fused: (calls.append("fused"), f(*a))[1])
    monkeypatch.setattr(_core, "tile", lambda *a, f=_core.tile: (calls.append("blas"), f(*a))[1])
    for route in ("blas", "fused"):
        calls.clear()
        monkeypatch.setenv("NTKFAST_GEMM", route)
        nf.gram(nf.resnet(2), points(50, 3, 56))
        assert set(calls) == {route}
    monkeypatch.delenv("NTKFAST_GEMM")
    for threads, n, m, longest in ((1, 64, 64, 1024), (1, 1, 500, 16), (2, 4, 5, 1024), (3, 500, 1, 256)):
        monkeypatch.setattr(_core, "threads", lambda threads=threads: threads)
        for d, expected in ((3, "fused"), (longest, "fused"), (longest + 1, "blas")):
            calls.clear()
            nf.gram(nf.resnet(2), points(n, d, 56), points(m, d, 57))
            assert set(calls) == {expected}
    monkeypatch.setenv("NTKFAST_GEMM", "cublas")
    with pytest.raises(ValueError, match="use blas or fused"):
        nf.gram(nf.resnet(2), np.eye(3))
    monkeypatch.setenv("NTKFAST_GEMM", "blas")
    assert _gemm.fuses(np.dtype(np.float32), (10, 10), 3, True)


@pytest.mark.slow
def test_every_instruction_set(isa, fresh_python):
    code = """
import numpy as np, os, ntkfast as nf
rng = np.random.default_rng(57)
for dtype in (np.float64, np.float32):
    for n, d in ((1, 1), (49, 3), (211, 40), (450, 170)):
        X, Y = rng.standard_normal((n, d)).astype(dtype), rng.standard_normal((n // 2 + 1, d)).astype(dtype)
        for path in ("table", "recursion"):
            os.environ["NTKFAST_PATH"] = path
            found = []
            for route in ("blas", "fused"):
                os.environ["NTKFAST_GEMM"] = route
                found.append((nf.gram(nf.resnet(3), X), nf.gram(nf.resnet(3), X, Y)))
            assert (found[1][0] == found[1][0].T).all()
            scale = np.sqrt(nf.diagonal(nf.resnet(3), X))
            scales = scale[:, None] * scale, scale[:, None] * np.sqrt(nf.diagonal(nf.resnet(3), Y))
            print(max(np.max(np.abs(a - b) / s) for a, b, s in zip(*found, scales)) / np.finfo(dtype).eps)
"""
    errors = [float(line) for line in fresh_python(code, NTKFAST_ISA=isa).split()]
    assert len(errors) == 16
    # 170 terms
    assert all(error <= 3 * BOUND for error in errors), errors


# Sums in float64


@pytest.mark.parametrize("d", [784, 4096])
def test_sums_of_float32_in_float64(d, rng):
    net, X = nf.fully_connected(1, "identity"), (rng.standard_normal((200, d)) + 0.5).astype(np.float32)
    wanted = X.astype(np.float64) @ X.T.astype(np.float64)
    unit = np.sqrt(np.diag(wanted))
    apart = ~np.eye(200, dtype=bool)
    for Y in (None, X[:150]):
        kernels = (nf.gram(net, X, Y, get="nngp", accumulate=a, normalize=True) for a in (None, "float64"))
        shape = 200 if Y is None else 150
        error, wide = (np.abs(K - (wanted / unit[:, None] / unit)[:, :shape])[apart[:, :shape]] for K in kernels)
        # rho is 0.2 and rounded once or twice: what is left does not depend on the number of terms
        assert wide.max() <= 2.0**-24
        assert np.sqrt(np.mean(wide**2)) < 0.7 * np.sqrt(np.mean(error**2))


def test_sums_in_float64_everywhere(monkeypatch):
    X = points(220, 40, 58)
    X[50:60] = X[:10] * (1 + 1e-3 * points(10, 40, 59))
    X = X.astype(np.float32)
    for net in (nf.resnet(3), PATHS["biases"], PATHS["erf"]):
        exact = nf.gram(net, X.astype(np.float64))
        scale = scales(net, X.astype(np.float64), None, "ntk")
        for value in (nf.gram(net, X, accumulate="float64"), nf.layer_grams(net, X, accumulate="float64").sum(0)):
            assert value.dtype == np.float32
            assert_close(value, exact, scale, 12 * 2.0**-23)
            np.testing.assert_array_equal(np.asarray(value), np.asarray(value).T)
        # nothing to change in float64
        np.testing.assert_array_equal(nf.gram(net, X.astype(np.float64), accumulate="float64"), exact)


@pytest.mark.parametrize("call", [nf.gram, nf.layer_grams])
@pytest.mark.parametrize("value", ["float32", "double", np.float64, True, 64])
def test_unknown_sums(call, value):
    with pytest.raises(ValueError, match="accumulate="):
        call(nf.resnet(2), np.eye(3), accumulate=value)
    with pytest.raises(ValueError, match="accumulate="):
        nf.gram_matmul(nf.resnet(2), np.eye(3), np.ones(3), accumulate=value)


# ---- the object file

DRIVER = r"""
#include "cpu/gram_dense.cpp"
#include <cmath>
#include <cstdio>
#include <vector>
using namespace ntk;
static const double layer[] = {NUMBERS};
static const int ints[] = {INTEGERS};
template <class T>
static T* filled(Index count, int seed) {
    T* x = new T[count];
    for (Index k = 0; k < count; ++k) x[k] = T((k * 37 + seed) % 17) - T(8);
    return x;
}
// Arrays of exactly the size they need, so that one number too many is seen. The two routes must agree, and K V with K.
template <class T>
static int check(const Plan& plan, Index n, Index m, Index d, bool symmetric, bool wide, Index columns) {
    if (symmetric) m = n;
    T *x = filled<T>(n * d, 1), *y = symmetric ? x : filled<T>(m * d, 5), *one = new T[n * m], *two = new T[n * m];
    std::vector<double> inv_x(n), inv_y(m), unit_n(n, 1.0), unit_m(m, 1.0), zero_n(n, 0.0), zero_m(m, 0.0);
    const auto inverses = [d](const T* rows, std::vector<double>& to) {
        for (std::size_t i = 0; i < to.size(); ++i) {
            double sum = 0.0;
            for (Index k = 0; k < d; ++k) sum += double(rows[i * d + k]) * double(rows[i * d + k]);
            to[i] = sum > 0.0 ? 1.0 / std::sqrt(sum) : 0.0;
        }
    };
    inverses(x, inv_x), inverses(y, inv_y);
    for (Index i = 0; i < n; ++i)
        for (Index j = 0; j < m; ++j) {
            T sum = T(0);
            for (Index k = 0; k < d; ++k) sum += x[i * d + k] * y[j * d + k];
            one[i * m + j] = sum;
        }
    const auto kernels = [](auto f64, auto f32) { if constexpr (sizeof(T) == 8) return f64; else return f32; };
    Output out{};
    out.theta = 1.0, out.fi = unit_n.data(), out.fj = unit_m.data(), out.hi = zero_n.data(), out.hj = zero_m.data();
    out.stride = out.mirror_stride = m;
    Tile t{};
    t.rows = n, t.cols = m, t.dim = d, t.close = 1e-3, t.outputs = &out, t.n_outputs = 1;
    t.i = {x, d, inv_x.data(), unit_n.data()}, t.j = {y, d, inv_y.data(), unit_m.data()};
    t.diagonal = symmetric ? 0 : INT64_MIN;
    out.data = one, out.mirror = symmetric ? one : nullptr, t.products = one, t.stride = m;
    int bad = !kernels(NTK_ISA::tile<double>, NTK_ISA::tile<float>)(plan, t);
    void *px = NTK_ISA::pack<T>(x, n, d, d, 0, n, nullptr), *py = NTK_ISA::pack<T>(y, m, d, d, 0, m, nullptr);
    out.data = two, out.mirror = symmetric ? two : nullptr, t.products = nullptr, t.wide = wide;
    FusedTile f{{px, n, d}, {py, m, d}, 0, 0, t, {}};
    bad += !kernels(NTK_ISA::fused64, NTK_ISA::fused32)(plan, f);
    const double eps = sizeof(T) == 8 ? 1e-13 : 1e-4;
    for (Index k = 0; k < n * m; ++k) bad += !(std::fabs(double(one[k]) - double(two[k])) <= eps);
    double *v = filled<double>(columns * m, 3), *sums = new double[columns * n]();
    out.data = out.mirror = nullptr;
    f.tile.stream = false;
    f.matmul = {columns, symmetric ? v : nullptr, v, sums, symmetric ? sums : nullptr, m, n};
    bad += !kernels(NTK_ISA::fused64, NTK_ISA::fused32)(plan, f);
    for (Index c = 0; c < columns; ++c)
        for (Index i = 0; i < n; ++i) {
            double wanted = 0.0;
            for (Index j = 0; j < m; ++j) wanted += double(two[i * m + j]) * v[c * m + j];
            bad += !(std::fabs(sums[c * n + i] - wanted) <= 1e-10);
        }
    delete[] x, delete[] one, delete[] two, delete[] v, delete[] sums;
    if (!symmetric) delete[] y;
    std::free(px), std::free(py);
    return bad;
}
int main() {
    const HomogeneousLayer l{layer[0], layer[1], layer[2], layer[3], layer[4], layer[5], layer[6], layer[7], layer[8],
                             ints[0], ints[1], ints[2], ints[3], ints[4]};
    const Plan plan{&l, 1, 1.0, 0.0, nullptr, 0, nullptr};
    const Index sizes[] = {1, 5, 24, 49, 97, 193, 241, 390};
    int bad = 0;
    for (Index n : sizes) {
        const Index m = sizes[n * 7 % 8], d = 1 + n % 9, columns = 1 + n % 6;
        for (const bool symmetric : {false, true}) {
            bad += check<double>(plan, n, m, d, symmetric, false, columns);
            for (const bool wide : {false, true}) bad += check<float>(plan, n, m, d, symmetric, wide, columns);
        }
    }
    std::printf("%d wrong\n", bad);
    return bad != 0;
}
"""


@pytest.mark.slow
@needs_compiler
def test_address_sanitizer(isa, tmp_path):
    prefix, ints = compile_network(nf.fully_connected(1), [np.ones(1)], np.dtype(np.float64)).core.arguments[:2]
    text = DRIVER.replace("NUMBERS", ", ".join(float(v).hex() for v in prefix[0]))
    (tmp_path / "driver.cpp").write_text(text.replace("INTEGERS", ", ".join(str(int(v)) for v in ints[0])))
    options = [f for f in flags(isa) if f not in ("-O3", "-fno-exceptions")]
    options += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    built = subprocess.run([COMPILER, *options, str(tmp_path / "driver.cpp"), "-o", str(tmp_path / "driver")],
                           capture_output=True, text=True, timeout=600)  # fmt: skip
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("the compiler has no address sanitizer")
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(tmp_path / "driver")], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]

"""The blocked product of rows: every size around a block, every instruction set, against products in more digits."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from conftest import INSTRUCTION_SETS
from test_tree import COMPILER, CSRC, compile_object, flags, needs_compiler, symbols

from ntkfast import _core

DTYPES = (np.float64, np.float32)
#: Features of one pass of the micro-kernel (kDepth of csrc/cpu/product.h): passes are summed apart.
DEPTH = 160
#: Rows: 1, 2, 3; a vector, a strip, a panel (4 to 48) and its neighbours; a tile (192, 288) and its neighbours.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 23, 24, 25, 31, 47, 48, 49, 95, 96, 97, 143, 191, 192, 193, 239,
         240, 241, 287, 288, 289, 300)  # fmt: skip
DIMS = (0, 1, 2, 3, 7, 8, 9, 16, 17, 64, 159, 160, 161, 321)


def product(x, y=None, wide=False, isa="", out=None):
    if out is None:
        # a value no product has: an entry that is never written shows
        out = np.full((len(x), len(x if y is None else y)), 12345.0, x.dtype)
    _core.product(x, y, out, wide, isa)
    return out


def exact(x, y):
    """x y^T in more digits than x has, and the sums of the absolute values of the terms."""
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    a, b = x.astype(wide), y.astype(wide)
    return a @ b.T, np.abs(a) @ np.abs(b).T


def check(value, x, y, wide=False):
    """Per element: the bound of a sum in passes of at most DEPTH terms; NaN fails."""
    wanted, terms = exact(x, y)
    assert value.shape == wanted.shape
    assert value.dtype == x.dtype
    d, unit = x.shape[1], np.finfo(value.dtype).eps / 2
    passes = max(1, -(-d // DEPTH))
    roundings = -(-d // passes) + passes
    bound = 1.01 * roundings * (2.0**-53 if wide else unit) * terms + (unit if wide else 0) * np.abs(wanted)
    error = np.abs(value - wanted)
    assert (error <= bound).all(), f"{np.max(error - bound)} over the bound"


def rows(rng, n, d, dtype):
    """Rows of a wider array: neither contiguous nor aligned."""
    return rng.standard_normal((n, d + 3)).astype(dtype)[:, 1 : d + 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_of_every_size(dtype, isa, rng):
    for k, n in enumerate(SIZES):
        x = rows(rng, n, DIMS[k % len(DIMS)], dtype)
        value = product(x, isa=isa)
        check(value, x, x)
        assert np.array_equal(value, value.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rectangles_of_every_size(dtype, isa, rng):
    for k, n in enumerate(SIZES):
        m, d = SIZES[(11 * k + 5) % len(SIZES)], DIMS[(3 * k + 1) % len(DIMS)]
        x, y = rows(rng, n, d, dtype), rows(rng, m, d, dtype)
        check(product(x, y, isa=isa), x, y)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 64, 161])
def test_all_sizes(dtype, d, isa, rng):
    for n in [*range(1, 100), *range(100, 300, 7)]:
        x = rows(rng, n, d, dtype)
        check(product(x, isa=isa), x, x)
        m = 1 + 37 * n % 300
        y = rows(rng, m, d, dtype)
        check(product(x, y, isa=isa), x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", DIMS)
def test_every_number_of_features(d, dtype, isa, rng):
    x, y = rows(rng, 61, d, dtype), rows(rng, 53, d, dtype)
    check(product(x, isa=isa), x, x)
    check(product(x, y, isa=isa), x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_of_every_shape(dtype, isa, rng):
    # more than kSide of either dtype on both sides, and results larger than what is streamed past the caches
    for n, m, d in [(1100, 1100, 13), (1203, 805, 170), (3, 1500, 33), (1500, 1, 33)]:
        x, y = rows(rng, n, d, dtype), rows(rng, m, d, dtype)
        check(product(x, y, isa=isa), x, y)
    x = rows(rng, 1501, 29, dtype)
    value = product(x, isa=isa)
    check(value, x, x)
    assert np.array_equal(value, value.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_and_rectangular_agree_to_the_last_bit(dtype, isa, rng):
    # The order of a sum depends on nothing but the number of features.
    x = rows(rng, 515, 333, dtype)
    whole = product(x, isa=isa)
    assert np.array_equal(whole, product(x, x.copy(), isa=isa))
    assert np.array_equal(whole[100:107, 311:499], product(x[100:107], x[311:499].copy(), isa=isa))


@pytest.mark.skipif(not {"v3", "v4"} <= set(_core.available()), reason="needs AVX2 and AVX-512")
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_sets_with_fused_operations_agree_to_the_last_bit(dtype, rng):
    x = rows(rng, 301, 407, dtype)
    assert np.array_equal(product(x, isa="v3"), product(x, isa="v4"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_results_with_any_stride(dtype, isa, rng):
    big = rng.standard_normal((700, 97)).astype(dtype)
    for x in (
        big[::2],
        big[::-1],
        big[5:305, 7:50],
        big[400:100:-3, :1],
        big[:1, 3:9],
        np.broadcast_to(big[3], (50, 97)),
    ):
        plain = np.ascontiguousarray(x)
        frame = np.full((2 * len(x) + 1, len(x) + 7), 77.0, dtype)
        out = frame[1::2, 3:-4]
        _core.product(x, None, out, False, isa)
        check(out, plain, plain)
        out[...] = 77.0
        assert (frame == 77.0).all()  # nothing beside the result


@pytest.mark.parametrize("offset", range(0, 64, 4))
def test_results_at_any_address(offset, isa, rng):
    # Streamed stores need whole aligned vectors: the ends of every row are not.
    for dtype in DTYPES if offset % 8 == 0 else (np.float32,):
        n = 1537
        x = rows(rng, n, 3, dtype)
        memory = np.full((n * n + 64) * x.itemsize, 7, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        out = memory[start : start + n * n * x.itemsize].view(dtype).reshape(n, n)
        _core.product(x, None, out, False, isa)
        check(out, x, x)
        assert (memory[:start] == 7).all()
        assert (memory[start + out.nbytes :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_stay_in_their_row_and_column(dtype, isa, rng):
    x = rng.integers(1, 5, (290, 170)).astype(dtype)
    x[3, 5], x[100, 169], x[244, 0], x[289, 7] = np.nan, np.inf, -np.inf, -np.inf
    x[17, 0], x[18, 169] = 0.0, 0.0  # times infinity: NaN, in two entries
    y = x.copy()
    with np.errstate(invalid="ignore"):
        wanted = np.einsum("ik,jk->ij", x, y)
    assert np.isnan(wanted[:, 3]).all()
    assert np.isnan(wanted[18, 100])
    assert wanted[17, 100] == np.inf
    assert wanted[244, 1] == -np.inf
    for value in (product(x, isa=isa), product(x, y, isa=isa)):
        assert np.array_equal(value, wanted, equal_nan=True)


def test_sums_of_float32_in_float64(isa, rng):
    for n, m, d in [(1, 1, 1), (5, 49, 3), (300, 300, 161), (1100, 250, 345), (49, 47, 0)]:
        x, y = rows(rng, n, d, np.float32), rows(rng, m, d, np.float32)
        check(product(x, wide=True, isa=isa), x, x, wide=True)
        check(product(x, y, wide=True, isa=isa), x, y, wide=True)
    x = rows(rng, 613, 200, np.float32)
    value = product(x, wide=True, isa=isa)
    assert np.array_equal(value, value.T)


@pytest.mark.parametrize("d", [784, 4096])
def test_correlations_in_float32_are_as_good_as_blas(d, isa, rng):
    x = rng.standard_normal((256, d)).astype(np.float32)
    x += 0.5  # correlated rows: the sums grow, and so do their roundings
    norms = np.sqrt((x.astype(np.float64) ** 2).sum(1))
    wanted = exact(x, x)[0]
    scale = norms[:, None] * norms
    error, blas = (np.sqrt(np.mean(((v - wanted) / scale) ** 2)) for v in (product(x, isa=isa), x @ x.copy().T))
    print(f"{isa} d={d}: rms error of rho {error:.2e}, BLAS {blas:.2e}")
    assert error <= 4e-8
    assert error <= blas
    wide = product(x, wide=True, isa=isa)
    assert np.max(np.abs(wide - wanted) / scale) <= 2.0**-24 * 1.01


def test_results_may_overwrite_the_rows(isa, rng):
    x = rng.standard_normal((256, 256))
    wanted = product(x, isa=isa)
    _core.product(x, None, x, False, isa)
    assert np.array_equal(x, wanted)


def test_nothing_to_do():
    for n, m in [(0, 0), (0, 5), (5, 0)]:
        assert product(np.ones((n, 3)), np.ones((m, 3))).shape == (n, m)
    assert (product(np.ones((4, 0)), np.ones((3, 0))) == 0).all()


def test_wrong_arguments_raise():
    x = np.ones((4, 3))
    wrong = [
        (np.ones((4, 2)), np.empty((4, 4))),
        (x.astype(np.float32), np.empty((4, 4))),
        (np.ones(3), np.empty((4, 1))),
        (None, np.empty((4, 3))),
        (None, np.empty((4, 4), np.float32)),
    ]
    for y, out in wrong:
        with pytest.raises(ValueError):
            _core.product(x, y, out)
    with pytest.raises(RuntimeError, match="not available"):
        _core.product(x, None, np.empty((4, 4)), False, "v9")


def test_the_peak_counts_its_operations(isa):
    for single in (False, True):
        one, many = (_core.peak(rounds, single, isa) for rounds in (1, 1000))
        assert many == 1000 * one
        assert one >= 2 * 8


def test_threads_change_no_bit(fresh_python):
    code = """
import hashlib, numpy as np
from ntkfast import _core
x = np.random.default_rng(3).standard_normal((1300, 61))
out = np.empty((1300, 1300))
_core.product(x, None, out)
print(_core.threads(), hashlib.sha256(out.tobytes()).hexdigest())
"""
    results = dict(fresh_python(code, OMP_NUM_THREADS=str(n)).split() for n in (1, 2, 5))
    assert list(results) == ["1", "2", "5"]
    assert len(set(results.values())) == 1


# ---- the object file


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_objects_share_no_symbol_and_call_nothing(name, tmp_path):
    found = symbols(compile_object(CSRC / "cpu/product.cpp", tmp_path / f"{name}.o", name))
    assert [s for s in found if s[0] in "WVuvw"] == []
    assert [n for letter, n in found if letter in "TDRBGC"] == [f"ntk::{name}::products"]
    outside = {n for letter, n in found if letter == "U" and not n.startswith(("GOMP_", "omp_"))}
    assert outside <= {"aligned_alloc", "free", "madvise", "memset", "memcpy", "memmove", "__stack_chk_fail",
                       "_GLOBAL_OFFSET_TABLE_"}  # fmt: skip


DRIVER = r"""
#include "cpu/product.cpp"
#include <cmath>
#include <cstdio>
using namespace ntk;
// Arrays of exactly the size they need, so that one number too many is seen.
template <class T>
static int check(Index n, Index m, Index d, bool symmetric, bool wide) {
    T *x = new T[n * d], *y = new T[m * d], *out = new T[n * m];
    for (Index k = 0; k < n * d; ++k) x[k] = T(k * 37 % 17) - T(8);
    for (Index k = 0; k < m * d; ++k) y[k] = symmetric ? x[k] : T(k * 29 % 13) - T(6);
    const Product p{x, n, d, d, symmetric ? nullptr : y, m, d, out, m, symmetric, wide};
    int bad = !(sizeof(T) == 8 ? NTK_ISA::product64(p) : NTK_ISA::product32(p));
    for (Index i = 0; i < n; ++i)
        for (Index j = 0; j < m; ++j) {
            T sum = T(0);  // whole numbers: every order gives the same
            for (Index k = 0; k < d; ++k) sum += x[i * d + k] * y[j * d + k];
            bad += !(out[i * m + j] == sum);
        }
    delete[] x, delete[] y, delete[] out;
    return bad;
}
// What follows a product need not be symmetric in its roundings; the result is: here every entry gets the number of its
// row, and so below the diagonal that of its column.
template <class T>
static int check_epilogue(Index n) {
    T *x = new T[n], *out = new T[n * n];
    for (Index k = 0; k < n; ++k) x[k] = T(k % 5);
    const Packed<T> packed(x, n, 1, 1);
    const Grid grid = grid_of<T>(n, n, true, 1);
    struct Add {
        T* out;
        Index n;
        bool ready() const { return true; }
        void operator()(const ProductTile<T>& t) const {
            for (Index i = 0; i < t.rows; ++i)
                for (Index j = 0; j < t.cols; ++j) t.c[i * t.ldc + j] += T(t.i0 + i);
            write_tile(t, out, n, out, n, true);
        }
    };
    int bad = !for_each_tile<T>(packed.view(), packed.view(), grid, 2, [&] { return Add{out, n}; });
    for (Index i = 0; i < n; ++i)
        for (Index j = 0; j < n; ++j) bad += !(out[i * n + j] == x[i] * x[j] + T(i < j ? i : j));
    delete[] x, delete[] out;
    return bad;
}
int main() {
    const Index sizes[] = {1, 5, 24, 25, 49, 97, 241, 390}, dims[] = {0, 1, 7, 9, 161};
    const bool wides[] = {false, true};
    int bad = 0;
    for (Index n : sizes)
        for (Index d : dims) {
            const Index m = sizes[(n * 7 + d) % 8];
            bad += check<double>(n, n, d, true, false) + check<double>(n, m, d, false, false);
            for (const bool wide : wides)
                bad += check<float>(n, n, d, true, wide) + check<float>(n, m, d, false, wide);
        }
    for (Index n : sizes) bad += check_epilogue<double>(n) + check_epilogue<float>(n);
    bad += check<double>(1030, 1030, 2, true, false) + check<float>(1030, 1100, 2, false, false);
    std::printf("%d wrong\n", bad);
    return bad != 0;
}
"""


@pytest.mark.slow
@needs_compiler
def test_address_sanitizer(isa, tmp_path):
    (tmp_path / "driver.cpp").write_text(DRIVER)
    options = [f for f in flags(isa) if f not in ("-O3", "-fno-exceptions")]
    options += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    built = subprocess.run([COMPILER, *options, str(tmp_path / "driver.cpp"), "-o", str(tmp_path / "driver")],
                           capture_output=True, text=True, timeout=300)  # fmt: skip
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("the compiler has no address sanitizer")
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(tmp_path / "driver")], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]

"""K V without K, and the operator of SciPy's solvers, against the stored matrix."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import assert_close, tolerance
from test_gram import FREE, KINDS, PATHS, points

import ntkfast as nf
from ntkfast import _core, _tiles, matmul, reference

DTYPES = (np.float64, np.float32)


def check(net, X, V, Y=None, dtype=np.float64, **options):
    """Against the product of the stored matrix with V in float64; per element, in units of the sum of terms."""
    x, y = X.astype(dtype), None if Y is None else Y.astype(dtype)
    value = nf.gram_matmul(net, x, V, y, **options)
    assert value.dtype == dtype
    K = nf.gram(net, x, y, **options).astype(np.float64)
    assert value.shape == (len(X), *V.shape[1:])
    # K may come by another order of its sums (close pairs, tables), and the result is rounded once
    assert_close(value, K @ V, np.abs(K) @ np.abs(V), 64 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 10])
def test_sizes(columns, dtype, rng):
    for n in (1, 2, 15, 16, 17, 48, 49, 191, 192, 193, 300, 385):
        X, Y = points(n, 1 + n % 11, n), points(1 + n * 7 % 301, 1 + n % 11, n + 1)
        check(nf.resnet(3), X, rng.standard_normal((n, columns)), dtype=dtype)
        check(nf.resnet(3), X, rng.standard_normal((len(Y), columns)), Y, dtype=dtype)


@pytest.mark.parametrize("path", ["table", "recursion"])
@pytest.mark.parametrize("side", [96, 192, 4096])
def test_against_the_definition(side, path, rng, monkeypatch):
    monkeypatch.setattr(_tiles, "FUSED_SIDE", side)
    monkeypatch.setenv("NTKFAST_PATH", path)
    net, X, Y, V = nf.fully_connected(3), points(250, 6, 70), points(131, 6, 71), rng.standard_normal((250, 3))
    for get in KINDS:
        K, C = reference.gram(net, X, get=get), reference.gram(net, Y, X, get=get)
        assert_close(nf.gram_matmul(net, X, V, get=get), K @ V, np.abs(K) @ np.abs(V), tolerance(net, np.float64))
        assert_close(nf.gram_matmul(net, Y, V, X, get=get), C @ V, np.abs(C) @ np.abs(V), tolerance(net, np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*PATHS, "readout", "outer biases", "sign readout"])
def test_networks(name, dtype, rng):
    net, X = (PATHS | FREE)[name], points(230, 5, 72)
    V = rng.standard_normal((230, 6))
    for get in KINDS:
        check(net, X, V, dtype=dtype, get=get)
        check(net, X, V, dtype=dtype, get=get, normalize=True)
    check(net, X[:9], V, X, dtype=dtype)
    check(net, X, V, dtype=dtype, accumulate="float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_rows(dtype, rng):
    X = points(260, 9, 73)
    X[100:130], X[130:160], X[200:205] = X[:30], -X[:30], 0
    X[160:190] = (X[:30] * (1 + 1e-4 * points(30, 9, 74))).astype(np.float32)
    check(nf.resnet(3), X, rng.standard_normal((260, 4)), dtype=dtype)
    check(nf.resnet(3), X, rng.standard_normal((260, 4)), X[::-1].copy(), dtype=dtype)
    assert (nf.gram_matmul(nf.resnet(3), X, np.ones(260))[200:205] == 0).all()


def test_many_columns(rng, monkeypatch):
    X, V = points(200, 4, 75), rng.standard_normal((200, 23))
    whole = nf.gram_matmul(nf.resnet(3), X, V)
    monkeypatch.setattr(matmul, "_COLUMNS", 7)
    assert_close(nf.gram_matmul(nf.resnet(3), X, V), whole, np.abs(whole).max(), 1e-15)


def test_layouts_and_dtypes_of_columns(rng):
    net, X = nf.resnet(3), points(70, 4, 76)
    V = rng.integers(-9, 9, (70, 5))
    wanted = nf.gram_matmul(net, X, V.astype(np.float64))
    forms = [V, V.astype(np.float32), V.astype(np.int8), np.asfortranarray(V), V[::-1][::-1], V.tolist()]
    for form in (*forms, np.repeat(V, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(nf.gram_matmul(net, X, form), wanted)
    single = nf.gram_matmul(net, X, V[:, 1])
    assert single.shape == (70,)
    np.testing.assert_allclose(single, wanted[:, 1], rtol=1e-13, atol=1e-12)
    assert nf.gram_matmul(net, X, V[:, :0]).shape == (70, 0)
    before = V.copy()
    nf.gram_matmul(net, X, V)
    np.testing.assert_array_equal(V, before)


@pytest.mark.parametrize(("V", "error", "match"), [
    (np.ones(4), ValueError, "V has 4 rows, the kernel has 5 columns"),
    (np.ones((1, 5)), ValueError, "V has 1 rows"),
    (np.ones((5, 2, 2)), ValueError, "must have shape"),
    (np.float64(3.0), ValueError, "must have shape"),
    (np.array([1, 2, np.nan, 4, 5]), ValueError, "row 2"),
    (np.array([1, 2, 3, 4, np.inf]), ValueError, "row 4"),
    (np.ones(5, complex), TypeError, "complex128"),
    (np.array(list("abcde")), TypeError, "real numbers"),
])  # fmt: skip
def test_bad_columns_raise_before_any_work(V, error, match, monkeypatch):
    operator = nf.KernelOperator(nf.resnet(3), np.eye(5))
    monkeypatch.setattr(_core, "Packed", None)
    monkeypatch.setattr(_core, "fused", None)
    with pytest.raises(error, match=match):
        nf.gram_matmul(nf.resnet(3), np.eye(5), V)
    with pytest.raises(error, match=match):
        nf.gram_matmul(nf.resnet(3), np.eye(3, 5), V, np.eye(5))
    with pytest.raises((error, ValueError)):
        operator.matmat(V) if np.ndim(V) == 2 else operator.matvec(V)


def test_other_errors():
    net, V = nf.resnet(3), np.ones(4)
    with pytest.raises(ValueError, match="one kind"):
        nf.gram_matmul(net, np.eye(4), V, get=("ntk", "nngp"))
    with pytest.raises(ValueError, match="unknown"):
        nf.gram_matmul(net, np.eye(4), V, get="kernel")
    with pytest.raises(ValueError, match="features"):
        nf.gram_matmul(net, np.eye(4), V, np.eye(4, 3))
    with pytest.raises(TypeError, match="Network"):
        nf.gram_matmul(3, np.eye(4), V)
    for ridge in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="ridge"):
            nf.KernelOperator(net, np.eye(4), ridge=ridge)


def test_arguments_of_the_door():
    # what Python never asks for must not reach memory
    p = matmul.Problem(nf.resnet(2), points(60, 3, 77), None, None, "cpu")
    m = matmul.Multiplier(p, "ntk", False)
    v, sums = np.ones((2, 60)), np.zeros((2, 60))
    f, h, _ = m.left
    output = (None, None, m.mix.as_list(), f, f, h, h, m.table)

    def call(columns, outputs=(output,)):
        _core.fused(p.compiled.core, m.packed, 0, m.packed, 0, False, p.x.tile(slice(None)), p.y.tile(slice(None)), 0,
                    p.close, list(outputs), None, columns)  # fmt: skip

    call((v, sums, v, sums))
    for columns in ((v[:, 1:], sums, v, sums), (v, sums[:1], v, sums), (v, sums, v, None), (v, sums, v[:1], sums),
                    (v.astype(np.float32), sums, v, sums), (v[:0], sums[:0], None, None),
                    (v, sums, v, sums[:, :-1])):  # fmt: skip
        with pytest.raises(ValueError):
            call(columns)
    with pytest.raises(ValueError):
        call(None)
    with pytest.raises(ValueError):
        call((v, sums, v, sums), (output, output))


@pytest.mark.slow
def test_every_instruction_set(isa, fresh_python):
    code = """
import numpy as np, ntkfast as nf
rng = np.random.default_rng(78)
for dtype in (np.float64, np.float32):
    for n, d, c in ((1, 1, 1), (49, 3, 4), (211, 40, 7), (450, 170, 9)):
        X, V = rng.standard_normal((n, d)).astype(dtype), rng.standard_normal((n, c))
        K = nf.gram(nf.resnet(3), X).astype(float)
        error = np.abs(nf.gram_matmul(nf.resnet(3), X, V) - K @ V) / (np.abs(K) @ np.abs(V))
        print(np.max(error) / np.finfo(dtype).eps)
"""
    errors = [float(line) for line in fresh_python(code, NTKFAST_ISA=isa).split()]
    assert len(errors) == 8
    assert all(error <= 8 for error in errors), errors


# SciPy's operator

linalg = pytest.importorskip("scipy.sparse.linalg")


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(dtype, rng):
    net, X, V = nf.resnet(3), points(150, 5, 79).astype(dtype), rng.standard_normal((150, 4)).astype(dtype)
    K = nf.gram(net, X).astype(np.float64) + 0.25 * np.eye(150)
    operator = nf.KernelOperator(net, X, ridge=0.25)
    assert isinstance(operator, linalg.LinearOperator)
    assert operator.shape == (150, 150)
    assert operator.dtype == dtype
    scale = np.abs(K) @ np.abs(V)
    for A in (operator, operator.T, operator.H):
        assert_close(A @ V, K @ V, scale, 8 * float(np.finfo(dtype).eps))
        assert_close(A @ V[:, 0], K @ V[:, 0], scale[:, 0], 8 * float(np.finfo(dtype).eps))
    assert (operator @ V).dtype == dtype
    assert_close((2 * operator + operator) @ V, 3 * K @ V, scale, 32 * float(np.finfo(dtype).eps))


def test_solvers(rng):
    net, X = nf.fully_connected(3), points(300, 6, 80, zero=False)
    operator = nf.KernelOperator(net, X, ridge=0.1)
    K = nf.gram(net, X) + 0.1 * np.eye(300)
    b = rng.standard_normal(300)
    weights, failed = linalg.cg(operator, b, rtol=1e-12, maxiter=2000)
    assert failed == 0
    assert np.linalg.norm(K @ weights - b) <= 1e-10 * np.linalg.norm(b)
    wanted = np.linalg.eigvalsh(K)
    largest, vectors = linalg.eigsh(operator, k=4, v0=b)
    np.testing.assert_allclose(np.sort(largest), wanted[-4:], rtol=1e-12)
    assert np.linalg.norm(K @ vectors - vectors * largest) <= 1e-9 * wanted[-1]
    found, vectors = linalg.lobpcg(operator, rng.standard_normal((300, 4)), tol=1e-8, maxiter=200, largest=True)
    np.testing.assert_allclose(np.sort(found), wanted[-4:], rtol=1e-10)
    assert np.linalg.norm(K @ vectors - vectors * found) <= 1e-6 * wanted[-1]


def test_operator_checks_the_points_once(monkeypatch):
    operator = nf.KernelOperator(nf.resnet(2), points(50, 3, 81))
    monkeypatch.setattr(matmul, "Problem", None)
    monkeypatch.setattr(_core, "Packed", None)
    assert operator.matvec(np.ones(50)).shape == (50,)


def test_without_scipy(fresh_python):
    code = """
import sys
sys.modules["scipy"] = None
import numpy as np, ntkfast as nf
print(nf.gram_matmul(nf.resnet(2), np.eye(2), np.ones(2)).shape)
try:
    nf.KernelOperator(nf.resnet(2), np.eye(2))
except ImportError as error:
    print(error)
"""
    shown = fresh_python(code)
    assert "(2,)" in shown
    assert "SciPy is missing: pip install scipy" in shown

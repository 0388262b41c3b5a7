"""Compiled kernels of one angle: how exact tables are, against 80-digit arithmetic, and what they say of themselves.

Errors are relative, with a floor of a tenth of the largest value over the angles (kernels cross zero).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
from mpmath import mp
from oracle import check
from test_accuracy import BIASED, CLOSE_NETS, LEAKY, OTHERS, PROMISED, Exact, check_vectors, close_products

import ntkfast as nf
from ntkfast import Dense, Network, Readout, Residual, _core, reference
from ntkfast._plan import compile_network, mix_of

KINDS = ("ntk", "nngp", "last_hidden")
PROMISE = {np.float64: 2e-14, np.float32: 1e-6}  # at any depth
DTYPES = tuple(PROMISE)
slow = pytest.mark.slow

# x = 1 - |rho| and the sign of rho: both ends, 10^-k from either, log-random, uniform and rho = 0; float32 holds all
_RNG = np.random.default_rng(11)
GAPS = [0.0, *(10.0**-k for k in range(1, 17)), *10.0 ** -_RNG.uniform(0, 15, 8), *_RNG.uniform(0, 1, 8), 1.0]
ANGLES = [(float(np.float32(x)), s) for s in (1.0, -1.0) for x in GAPS]
X, S = np.array(ANGLES).T

MORE = {
    "identity": lambda depth: nf.fully_connected(depth, "identity"),
    "negative skips": lambda depth: Network([Dense("relu", gain=1.3)]
                                            + [Residual("relu", scale=0.5, skip=-0.8),
                                               Residual(LEAKY, scale=-0.4, skip=0.7)] * depth),
    "readout": lambda depth: Network(nf.resnet(depth).layers, Readout(weight_variance=1.7, bias_variance=0.4)),
}  # fmt: skip
HOMOGENEOUS = PROMISED | OTHERS | MORE


class Compiled(NamedTuple):
    """A table and what its values are multiplied by, and added, to be kernels."""

    table: Any
    factor: float
    constant: float

    def __call__(self, x: np.ndarray, s: np.ndarray, isa: str = "") -> np.ndarray:
        return self.table.values(x, s, isa).astype(np.float64) * self.factor + self.constant


def compiled(net: Network, kind: str, dtype: Any, norm: float = 1.0) -> Compiled:
    plan, mix = compile_network(net, [np.array([norm])], np.dtype(dtype)), mix_of(net, kind)
    table = _core.Table(plan.core, mix.as_list(), 1.0 if plan.prefix_only else norm, dtype == np.float32)
    return Compiled(table, ((norm * plan.root) ** 2 if plan.prefix_only else 1.0) * 4.0**plan.exponent, mix.constant)


def recursion(net: Network, kind: str, norm: float, x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The same pairs by the layers, in float64."""
    plan, mix, one = compile_network(net, [np.array([norm])], np.dtype(np.float64)), mix_of(net, kind), np.ones(len(x))
    values = _core.pairs(plan.core, x, s, norm * one, norm * one, mix.as_list())
    return np.asarray(values) * (norm * plan.root if plan.prefix_only else 1.0) ** 2 * 4.0**plan.exponent + mix.constant


def error(value: np.ndarray, wanted: np.ndarray) -> float:
    """The largest relative error, with the floor; NaN for NaN."""
    return float((np.abs(value - wanted) / np.maximum(np.abs(wanted), 0.1 * np.abs(wanted).max())).max())


@lru_cache(maxsize=64)
def exact(net: Network, norm: float = 1.0) -> list[Any]:
    """Kernels at ANGLES, computed once for all kinds, dtypes and instruction sets."""
    return [oracle.pair(net, norm, norm, **{"t" if s > 0 else "c": x}) for x, s in ANGLES]


def check_all_angles(net: Network, dtype: Any, norm: float = 1.0) -> None:
    for kind in KINDS:
        wanted = np.array([float(getattr(k, kind)) for k in exact(net, norm)])
        f = compiled(net, kind, dtype, norm)
        assert f.table.reached, (kind, f.table.error)
        # Behind biases the nodes come from the recursion in double, whose errors the table cannot see.
        own = 0.0
        if not compile_network(net, [np.array([norm])], np.dtype(dtype)).prefix_only:
            own = error(recursion(net, kind, norm, X, S), wanted)
        for isa in _core.available():
            got = error(f(X, S, isa), wanted)
            assert got <= PROMISE[dtype], (kind, isa, got)
            assert got <= 3 * f.table.error + own, f"{kind}, {isa}: error {got:.2e}, the table says {f.table.error:.2e}"


# ---- every angle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 3, 10])
@pytest.mark.parametrize("family", HOMOGENEOUS)
def test_every_angle(family, depth, dtype):
    check_all_angles(HOMOGENEOUS[family](depth), dtype)


@pytest.mark.parametrize(("family", "depth"), [
    pytest.param(f, d, marks=[] if (f, d) == ("fully connected", 100) else slow) for d in (100, 1000) for f in PROMISED
])  # fmt: skip
def test_every_angle_of_deep_networks(family, depth):
    for dtype in DTYPES:
        check_all_angles(PROMISED[family](depth), dtype)


@slow
@pytest.mark.parametrize("family", OTHERS)
def test_every_angle_of_other_deep_networks(family):
    check_all_angles(OTHERS[family](100), np.float32)
    if family != "abs":  # its kernel has a singularity of depth 100 at both ends: no table in float64
        check_all_angles(OTHERS[family](100), np.float64)


@pytest.mark.parametrize("norm", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("family", BIASED)
def test_biases_and_points_of_one_norm(family, norm):
    for depth, dtype in ((1, np.float64), (4, np.float64), (4, np.float32)):
        check_all_angles(BIASED[family](depth), dtype, norm)


@pytest.mark.parametrize("norm", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("activation", ["erf", "gelu", "sin", "cos", "exp", "gaussian"])
def test_smooth_activations_and_points_of_one_norm(activation, norm):
    steep = activation == "exp" and norm > 1  # towers of exponentials
    for net in (nf.fully_connected(1 if steep else 2, activation, bias_variance=0.1),
                nf.resnet(1 if steep else 3, activation)):  # fmt: skip
        for dtype in DTYPES:
            check_all_angles(net, dtype, norm)


@pytest.mark.parametrize("norm", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("activation", [pytest.param("tanh", marks=slow), "silu", pytest.param("softplus", marks=slow)])
def test_expanded_activations_and_points_of_one_norm(activation, norm, rng):
    """Their expansions are good to 1e-12; the oracle has no quadrature, the reference has."""
    points = rng.standard_normal((9, 6))
    points *= norm / np.linalg.norm(points, axis=1, keepdims=True)
    net = Network([Dense(activation, bias_variance=0.1)] * 2)
    rho = np.clip(points @ points.T / norm**2, -1, 1)[np.triu_indices(9, 1)]
    wanted = reference.gram(net, points, get=KINDS)
    for kind in KINDS:
        value = getattr(wanted, kind)[np.triu_indices(9, 1)]
        for dtype, bound in ((np.float64, 1e-11), (np.float32, PROMISE[np.float32])):
            f = compiled(net, kind, dtype, norm)
            assert f.table.reached
            # rho is rounded to the dtype and the reference knows angles to 1e-16 only
            x = (1 - np.abs(rho)).astype(dtype).astype(np.float64)
            assert error(f(x, np.sign(rho)), value) <= bound
            assert error(f(x, np.sign(rho)), recursion(net, kind, norm, x, np.sign(rho))) <= PROMISE[dtype]


# ---- between the verified points -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 3, 10])
@pytest.mark.parametrize("family", [*PROMISED, "abs", "identity"])
def test_no_point_between_is_worse(family, depth, dtype):
    """20,000 angles, graded to -1, 0 and 1, beside the recursion (good to 2e-15 at these depths)."""
    rng = np.random.default_rng(12)
    near = 10.0 ** -rng.uniform(0, 16, (2, 4000))
    x = np.concatenate([near[0], 1 - near[1], rng.uniform(0, 1, 4000)]).astype(dtype).astype(np.float64)
    x, s = np.tile(x, 2), np.repeat([1.0, -1.0], len(x))
    net = HOMOGENEOUS[family](depth)
    for kind in KINDS:
        wanted, f = recursion(net, kind, 1.0, x, s), compiled(net, kind, dtype)
        for isa in _core.available():
            got = error(f(x, s, isa), wanted)
            assert got <= PROMISE[dtype], (kind, isa, got)
            assert got <= 3 * f.table.error + (4e-15 if dtype == np.float64 else 0), (kind, isa, got, f.table.error)


# ---- the door of the tests -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 65, 128, 129, 1000])
def test_lengths_and_nan(n, dtype, isa):
    rng = np.random.default_rng(n)
    x, s = rng.uniform(0, 1, n).astype(dtype), rng.choice([-1, 1], n).astype(dtype)
    f = compiled(nf.resnet(3), "ntk", dtype)
    whole = f(x, s, isa)
    np.testing.assert_array_equal(whole, [f(x[k : k + 1], s[k : k + 1], isa)[0] for k in range(n)])
    if not n:
        return
    x[n // 2] = np.nan
    holed = f(x, s, isa)
    assert np.isnan(holed[n // 2])
    np.testing.assert_array_equal(np.delete(holed, n // 2), np.delete(whole, n // 2))
    assert np.isnan(f(np.full(n, np.nan, dtype), s, isa)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_and_the_middle(kind, dtype, isa):
    """ReLU, depth 1: rho = 1, 0 from above and from below, -1."""
    f = compiled(nf.fully_connected(1), kind, dtype)
    wanted = {"ntk": [2, 1 / np.pi, 1 / np.pi, 0], "nngp": [1, 1 / np.pi, 1 / np.pi, 0], "last_hidden": [1, 0, 0, 0]}
    got = f(np.array([0.0, 1, 1, 0]), np.array([1.0, 1, -1, -1]), isa)
    check(got, np.array(wanted[kind]), 0.3 * PROMISE[dtype] * np.maximum(wanted[kind], 0.1 * max(wanted[kind])))


def test_every_instruction_set_agrees():
    for dtype in DTYPES:
        f = compiled(nf.fully_connected(7), "ntk", dtype)
        first, *others = (f(X, S, isa) for isa in _core.available())
        for other in others:
            check(other, first, 6 * np.finfo(dtype).eps * np.maximum(np.abs(first), 0.1 * first.max()))


# ---- through gram: close and opposite points -------------------------------------------------------------

TABLED = [name for name in CLOSE_NETS if "bias" not in name]
DEEP_CLOSE = {"fully connected 100": nf.fully_connected(100), "resnet 100": nf.resnet(100)}


@pytest.mark.parametrize(("dim", "norms"), [
    (64, "unequal"), pytest.param(5, "unequal", marks=slow), pytest.param(784, "unit", marks=slow)])  # fmt: skip
@pytest.mark.parametrize("name", [*TABLED, *(pytest.param(n, marks=slow) for n in DEEP_CLOSE)])
def test_close_and_opposite_points(name, dim, norms, monkeypatch):
    """Neighbours at 1e-4 to 1e-10, duplicates, antipodes, multiples; all pairs close, and few among many."""
    monkeypatch.setenv("NTKFAST_PATH", "table")
    net = (CLOSE_NETS | DEEP_CLOSE)[name]
    far = np.random.default_rng(1).standard_normal((90, dim))
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 2e-6)):
        A, products = close_products(dim, norms, dtype)
        assert net.plan(A).startswith("table")
        few = np.concatenate([far[:45].astype(dtype), A[:8], far[45:].astype(dtype), A[8:]])
        place = [*range(45, 53), *range(98, 98 + len(A) - 8)]
        pairs = [(i, j) for i in range(len(A)) for j in range(i + 1)]
        Ks = [nf.gram(net, A), nf.gram(net, A, A), nf.gram(net, few)[np.ix_(place, place)]]
        check_vectors(net, products, pairs, Ks, tolerance)


@pytest.mark.parametrize("family", PROMISED)
def test_gram_of_every_family(family, rng, monkeypatch):
    monkeypatch.setenv("NTKFAST_PATH", "table")
    A = rng.standard_normal((12, 10))
    net = PROMISED[family](10)
    products = Exact(A)
    pairs = [(i, j) for i in range(12) for j in range(i + 1)]
    exacts = [oracle.kernels(net, products[i, i], products[j, j], products[i, j]) for i, j in pairs]
    for kind in KINDS:
        K = nf.gram(net, A, get=kind)
        wanted = np.array([float(getattr(k, kind)) for k in exacts])
        root = np.sqrt(np.diag(K))
        scale = np.array([root[i] * root[j] for i, j in pairs])
        got = np.array([K[i, j] for i, j in pairs])
        # the inner products bring a few eps of their own
        check(got, wanted, PROMISE[np.float64] * np.maximum(np.abs(wanted), 0.1 * scale))


# ---- the least eigenvalue --------------------------------------------------------------------------------


def points_with_close_pairs() -> np.ndarray:
    """2,000 unit rows in 50 dimensions, the last 50 at distance 1e-6 from the first."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((2000, 50))
    A /= np.linalg.norm(A, axis=1, keepdims=True)
    u = rng.standard_normal((50, 50))
    u -= (u * A[:50]).sum(axis=1, keepdims=True) * A[:50]
    A[1950:] = A[:50] + 1e-6 * u / np.linalg.norm(u, axis=1, keepdims=True)
    return A


def extended_gram(A: np.ndarray, depth: int) -> np.ndarray:
    """ReLU NTK in long double, rows of the result 250 at a time; small 1 - rho come from differences."""
    B = A.astype(np.longdouble)
    B /= np.sqrt((B * B).sum(axis=1, keepdims=True))
    pi = np.longdouble(str(mp.pi))
    K = np.empty((len(A), len(A)), np.longdouble)
    for start in range(0, len(A), 250):
        x = 1 - B[start : start + 250] @ B.T
        i, j = np.nonzero(x < 1e-3)
        x[i, j] = ((B[start + i] - B[j]) ** 2).sum(axis=1) / 2
        theta = np.zeros_like(x)
        for _ in range(depth):
            y = np.sqrt(x / 2)
            angle = 2 * np.arcsin(y)
            theta = (1 - angle / pi) * (theta + 1 - x)
            x = x - (2 * y * np.sqrt(1 - y * y) - angle * (1 - x)) / pi
        K[start : start + 250] = theta + 1 - x
    return K


def plain_gram(A: np.ndarray, depth: int) -> np.ndarray:
    """The same as it stands in the papers, in float64."""
    rho, theta = A @ A.T, 0.0
    for _ in range(depth):
        angle = np.arccos(np.clip(rho, -1, 1))
        theta, rho = (1 - angle / np.pi) * (theta + rho), (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi
    return theta + rho


def least_eigenvalue(K: np.ndarray) -> float:
    """Inverse iteration from LAPACK's vector, then v^T K v / v^T v in long double."""
    A = K.astype(np.float64)
    values, vectors = np.linalg.eigh(A)
    v, inverse = vectors[:, 0], np.linalg.inv(A - (values[0] - 1e-3 * abs(values[0])) * np.eye(len(A)))
    for _ in range(10):
        v = inverse @ v
        v /= np.linalg.norm(v)
    v = v.astype(np.longdouble)
    return float(v @ (K.astype(np.longdouble) @ v) / (v @ v))


@slow
@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="long double is double here")
def test_least_eigenvalue(monkeypatch):
    depth, A = 3, points_with_close_pairs()
    net, K = nf.fully_connected(depth), extended_gram(A, depth)
    for i, j in ((0, 1950), (0, 0), (3, 4), (17, 1967)):  # the extended values themselves
        value = oracle.vectors(net, A[i], A[j])
        own = mp.sqrt(oracle.vectors(net, A[i], A[i]).ntk * oracle.vectors(net, A[j], A[j]).ntk) / (depth + 1)
        assert abs(float(value.ntk / own) - float(K[i, j])) <= 1e-15
    exact_value = least_eigenvalue(K)
    plain = least_eigenvalue(plain_gram(A, depth))
    print(f"\nleast eigenvalue, extended precision: {exact_value:.10e}\n  arccos in float64: {plain:.10e}")
    for path in ("table", "recursion"):
        monkeypatch.setenv("NTKFAST_PATH", path)
        value = least_eigenvalue(nf.gram(net, A))
        print(f"  {path}: {value:.10e}, relative error {abs(value / exact_value - 1):.1e}")
        assert abs(value - exact_value) <= 1e-6 * exact_value
    assert abs(plain - exact_value) >= 5e-3 * exact_value

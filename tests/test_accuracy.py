"""How exact the kernels are: every family, angle, depth, dtype and instruction set against 80-digit arithmetic.

Errors are relative, with a floor of a tenth of the largest value over the angles (kernels cross zero).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import oracle
import pytest
from mpmath import mp
from oracle import check

import ntkfast as nf
from ntkfast import Bottleneck, Dense, Network, Readout, Residual, _core
from ntkfast._plan import compile_network, mix_of

KINDS = ("ntk", "nngp", "last_hidden")
PROMISE = {False: 2e-14, True: 2e-6}  # float64, float32: at any depth
slow = pytest.mark.slow

# x = 1 - |rho| and the sign of rho: both ends, 10^-k from either, rho = 0 and uniform
GAPS = [0.0, *(10.0**-k for k in range(1, 16)), *np.random.default_rng(3).uniform(0, 1, 6), 1.0]
ANGLES = [(x, s) for s in (1.0, -1.0) for x in GAPS]
X, S = np.array(ANGLES).T

LEAKY = nf.Activation.leaky_relu(0.3)
PROMISED = {
    "fully connected": nf.fully_connected,
    "resnet": nf.resnet,
    "bottleneck 1/L": nf.bottleneck_resnet,
    "bottleneck 1/sqrt L": lambda depth: nf.bottleneck_resnet(depth, alpha=depth**-0.5),
    "fixed readout": nf.fixed_readout_resnet,
}
OTHERS = {
    "feed forward": lambda depth: nf.fully_connected(depth, readout_trained=False),
    "leaky": lambda depth: nf.fully_connected(depth, LEAKY),
    "leaky resnet": lambda depth: nf.resnet(depth, LEAKY),
    "abs": lambda depth: nf.fully_connected(depth, "abs"),
    "abs resnet": lambda depth: nf.resnet(depth, "abs"),
    "resnet -1": lambda depth: nf.resnet(depth, c_res=-1.0),
    "resnet -3": lambda depth: nf.resnet(depth, c_res=-3.0),
    "wide last layer": lambda depth: nf.fixed_readout_resnet(depth, theta=0.4, last_width_ratio=1.5),
}
# The path for biases: covariances instead of unit-norm numbers.
BIASED = {
    "fully connected": lambda depth: nf.fully_connected(depth, bias_variance=0.1),
    "large biases": lambda depth: nf.fully_connected(depth, weight_variance=1.3, bias_variance=1.0),
    "leaky": lambda depth: nf.fully_connected(depth, LEAKY, bias_variance=0.05),
    "abs": lambda depth: nf.fully_connected(depth, "abs", bias_variance=0.05),
    "resnet": lambda depth: Network([Dense("relu", bias_variance=0.1)]
                                    + [Residual("relu", scale=1 / depth, bias_variance=0.2)] * (depth - 1),
                                    Readout(bias_variance=0.1)),
    "negative resnet": lambda depth: Network([Dense("relu", bias_variance=0.1)]
                                             + [Residual("relu", scale=-1 / depth, bias_variance=0.2)] * (depth - 1)),
    "bottleneck": lambda depth: Network([Bottleneck("relu", scale=depth**-0.5, bias_variance=0.1,
                                                    outer_bias_variance=0.2)] * depth),
    "biases from layer 2": lambda depth: Network([Dense("relu"), *[Dense("relu", bias_variance=0.1)] * depth]),
}  # fmt: skip


@lru_cache(maxsize=64)
def exact(net: Network, ni: float = 1.0, nj: float = 1.0) -> list[Any]:
    """Kernels at ANGLES, mpf; computed once a run for all dtypes and instruction sets."""
    return [oracle.pair(net, ni, nj, t=x) if s > 0 else oracle.pair(net, ni, nj, c=x) for x, s in ANGLES]


def computed(net: Network, kind: str, single: bool, isa: str, ni: float = 1.0, nj: float = 1.0) -> np.ndarray:
    """The kernels of the compiled code at ANGLES, from exact x."""
    one = np.ones(len(X))
    plan = compile_network(net, [np.array([ni, nj])], np.dtype(np.float32 if single else np.float64))
    mix = mix_of(net, kind)
    values = _core.pairs(plan.core, X, S, ni * one, nj * one, mix.as_list(), single, isa)
    norms = ni * nj * plan.root**2 if plan.prefix_only else 1.0
    return np.asarray(values) * norms * 4.0**plan.exponent + mix.constant


def check_all_angles(net: Network, single: bool, isa: str, norms: tuple[float, float] = (1.0, 1.0)) -> None:
    for kind in KINDS:
        wanted = [getattr(k, kind) for k in exact(net, *norms)]
        got = computed(net, kind, single, isa, *norms)
        value = np.array([float(v) for v in wanted])
        largest = np.abs(value).max()
        if norms[0] != norms[1]:
            # Biases leave few angles between points of very different length: the scale is sqrt(K_ii K_jj), which the
            # values, all of them small if D is near 0 there, do not show.
            alike = [float(getattr(oracle.pair(net, n, n, t=0), kind)) for n in norms]
            largest = max(largest, np.sqrt(alike[0] * alike[1]))
        scale = np.maximum(np.abs(value), 0.1 * largest)
        check(got, value, PROMISE[single] * scale)
        if norms == (1.0, 1.0):  # normalised: of equal norms by the value at angle 0, the first
            value = np.array([float(v / wanted[0]) for v in wanted])
            check(got / got[0], value, PROMISE[single] * np.maximum(np.abs(value), 0.1))


@pytest.mark.parametrize("single", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("depth", [1, 2, 3, 10, 30])
@pytest.mark.parametrize("family", [*PROMISED, *OTHERS])
def test_every_angle(family, depth, single):
    net = (PROMISED | OTHERS)[family](depth)
    for isa in _core.available():
        check_all_angles(net, single, isa)


DEEP = [pytest.param(f, d, marks=[slow] if d > 100 else []) for d in (100, 300, 1000)
        for f in (PROMISED if d == 1000 else PROMISED | OTHERS)]  # fmt: skip


@pytest.mark.parametrize(("family", "depth"), DEEP)
def test_every_angle_of_deep_networks(family, depth):
    net = (PROMISED | OTHERS)[family](depth)
    for single in (False, True):
        check_all_angles(net, single, "")


@pytest.mark.parametrize("norms", [(1.0, 1.0), (0.7, 1.3), (1e-3, 10.0)], ids=str)
@pytest.mark.parametrize("depth", [1, 3, 10, pytest.param(100, marks=slow)])
@pytest.mark.parametrize("family", BIASED)
def test_every_angle_with_biases(family, depth, norms):
    net = BIASED[family](depth)
    for isa in _core.available() if depth <= 10 else [""]:
        check_all_angles(net, False, isa, norms)
        check_all_angles(net, True, isa, norms)


# ---- vectors: close, opposite, parallel ------------------------------------------------------------------

CLOSE_NETS = {
    **{f"fully connected {d}": nf.fully_connected(d) for d in (1, 3, 10)},
    "resnet": nf.resnet(10),
    "bottleneck": nf.bottleneck_resnet(5),
    "biases": nf.fully_connected(3, bias_variance=0.1),
    "biased resnet": BIASED["resnet"](4),
    "biases from layer 2": BIASED["biases from layer 2"](2),
}
NORMS = {"unit": [1.0], "unequal": [1e-2, 1.0, 30.0]}


def close_points(dim: int, norms: list[float], dtype: Any = np.float64) -> np.ndarray:
    """A point, its neighbours at distance 1e-4 to 1e-10 and a duplicate, the antipodes of all, and multiples."""
    rng = np.random.default_rng(dim)
    x = rng.standard_normal(dim)
    x /= np.linalg.norm(x)
    rows = [x, x, 3 * x, -3 * x]
    for distance in (1e-4, 1e-6, 1e-8, 1e-10):
        u = rng.standard_normal(dim)
        rows += [sign * (x + distance * u / np.linalg.norm(u)) for sign in (1, -1)]
    scaled = [norms[k % len(norms)] * row for k, row in enumerate(rows)]
    return np.array([*scaled, *rng.standard_normal((3, dim)) / np.sqrt(dim)], dtype)


class Exact(dict):
    """Inner products of some rows, exact in 80 digits, one by one on demand: (i, j) -> mpf."""

    def __init__(self, A: np.ndarray) -> None:
        self.rows = [[mp.mpf(float(v)) for v in row] for row in A]

    def __missing__(self, pair: tuple[int, int]) -> Any:
        with mp.workdps(oracle.DIGITS):
            self[pair] = mp.fdot(self.rows[pair[0]], self.rows[pair[1]])
        return self[pair]


def check_vectors(net: Network, products: Exact, pairs: Any, Ks: list[np.ndarray], tolerance: float) -> None:
    value, scale = [], []
    for i, j in pairs:
        ii, jj = products[i, i], products[j, j]
        value.append(float(oracle.kernels(net, ii, jj, products[i, j]).ntk))
        own = float(own_ntk(net, ii)) * float(own_ntk(net, jj))
        scale.append(max(abs(value[-1]), 0.1 * own**0.5))
    for K in Ks:
        check(np.array([K[i, j] for i, j in pairs]), np.array(value), tolerance * np.array(scale))


@lru_cache(maxsize=1024)
def own_ntk(net: Network, square: Any) -> Any:
    return oracle.kernels(net, square, square, square).ntk


@lru_cache(maxsize=16)
def close_products(dim: int, norms: str, dtype: Any) -> tuple[np.ndarray, Exact]:
    A = close_points(dim, NORMS[norms], dtype)
    return A, Exact(A)


@pytest.mark.parametrize(("dim", "norms"), [
    (5, "unequal"), (64, "unit"), pytest.param(784, "unequal", marks=slow), pytest.param(64, "unequal", marks=slow),
    pytest.param(784, "unit", marks=slow)])  # fmt: skip
@pytest.mark.parametrize("name", CLOSE_NETS)
def test_close_and_opposite_points(name, dim, norms):
    """All pairs close (blockwise differences), and the same points among many far ones (pair by pair)."""
    net = CLOSE_NETS[name]
    far = np.random.default_rng(1).standard_normal((90, dim))
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, PROMISE[True])):
        A, products = close_products(dim, norms, dtype)
        few = np.concatenate([far[:45].astype(dtype), A[:8], far[45:].astype(dtype), A[8:]])
        place = [*range(45, 53), *range(98, 98 + len(A) - 8)]
        pairs = [(i, j) for i in range(len(A)) for j in range(i + 1)]
        Ks = [nf.gram(net, A), nf.gram(net, A, A), nf.gram(net, few)[np.ix_(place, place)]]
        check_vectors(net, products, pairs, Ks, tolerance)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["fully connected 3", "biases", "resnet"])
def test_a_tight_cluster(name, dtype):
    rng = np.random.default_rng(8)
    centre = rng.standard_normal(64)
    A = centre / np.linalg.norm(centre) + 10.0 ** -rng.uniform(5, 9, (150, 1)) * rng.standard_normal((150, 64)) / 8
    A = (A * rng.choice([-1.0, 1.0, 1.0, 2.5], (150, 1))).astype(dtype)
    pairs = [tuple(p) for p in rng.integers(0, 150, (120, 2))]
    net = CLOSE_NETS[name]
    tolerance = 1e-13 if dtype == np.float64 else PROMISE[True]
    check_vectors(net, Exact(A), pairs, [nf.gram(net, A), nf.gram(net, A, A)], tolerance)


def test_multiples_stay_parallel_behind_a_biased_layer():
    """Rows x, 3x, -x, 1e-2 x: parallel in front of the biases, not behind them."""
    x = np.random.default_rng(4).standard_normal(20)
    A = np.array([x, 2 * x, -x, 4 * x, 2**-7 * x, -8 * x])  # exact multiples
    pairs = [(i, j) for i in range(6) for j in range(6)]
    for name in ("biases", "biased resnet", "biases from layer 2"):
        for depth_net in (CLOSE_NETS[name], Network([Dense("relu"), Dense("relu"), *CLOSE_NETS[name].layers])):
            check_vectors(depth_net, Exact(A), pairs, [nf.gram(depth_net, A)], 1e-13)


# ---- smooth layers in front of a kink --------------------------------------------------------------------

# Even activations send opposite points to the same image, so their sums must be as good as differences.
BEFORE_KINK = {"erf": (1.0, -1.0), "sin": (1.0, -1.0), "exp": (1.0,), "cos": (1.0, -1.0), "gaussian": (1.0, -1.0)}


@pytest.mark.parametrize("depth", [1, 10])
@pytest.mark.parametrize(("smooth", "side"), [(a, s) for a, sides in BEFORE_KINK.items() for s in sides])
def test_a_kink_sees_the_angle_behind_a_smooth_layer(smooth, side, depth):
    net = Network([Dense(smooth), *[Dense("relu")] * depth])
    for kind in KINDS:
        value = np.array([float(getattr(k, kind)) for k in exact(net)])
        scale = np.maximum(np.abs(value), 0.1 * np.abs(value).max())
        check(computed(net, kind, False, "")[side == S], value[side == S], PROMISE[False] * scale[side == S])


def test_a_kink_behind_gelu_is_as_good_as_the_expansion():
    """In front of a kink gelu runs through its Hermite expansion, whose relative tolerance is 1e-12."""
    for depth in (1, 10):
        net = Network([Dense("gelu"), *[Dense("relu")] * depth])
        for kind in KINDS:
            value = np.array([float(getattr(k, kind)) for k in exact(net)])
            check(computed(net, kind, False, ""), value, 1e-12 * np.maximum(np.abs(value), 0.1 * value.max()))


# ---- scales ----------------------------------------------------------------------------------------------

BIAS_FREE = [nf.fully_connected(3), nf.resnet(4), nf.bottleneck_resnet(3, alpha=1.0), nf.fixed_readout_resnet(2)]


@pytest.mark.parametrize(("dtype", "power"), [(np.float32, 40), (np.float64, 498)])
@pytest.mark.parametrize("net", BIAS_FREE, ids=repr)
def test_scale_of_the_inputs_passes_through(net, dtype, power):
    A = np.random.default_rng(5).standard_normal((20, 6)).astype(dtype)
    A[1], A[2] = A[0], -A[0]
    K, eps = nf.gram(net, A).astype(np.float64), np.finfo(dtype).eps
    mixed = np.resize([power, 0, -power, 7, -3], 20)
    with np.errstate(under="ignore"):
        for k in (np.full(20, power), np.full(20, -power), mixed):
            scaled = np.ldexp(A, k[:, None].astype(np.int32)).astype(dtype)
            back = np.ldexp(np.ldexp(nf.gram(net, scaled).astype(np.float64), -k[:, None]), -k)
            check(back, K, 4 * eps * np.abs(K))
            normalized = nf.gram(net, scaled, normalize=True)
            check(normalized.astype(np.float64), K / np.sqrt(np.outer(np.diag(K), np.diag(K))), 8 * eps)


@pytest.mark.parametrize(("dtype", "power"), [(np.float32, 70), (np.float64, 600)])
@pytest.mark.parametrize("net", BIAS_FREE, ids=repr)
def test_what_does_not_fit_is_refused(net, dtype, power):
    A = np.random.default_rng(6).standard_normal((5, 3)).astype(dtype)
    huge = A.copy()
    huge[3] = np.ldexp(huge[3], power)
    with pytest.raises(OverflowError, match="row 3"):
        nf.gram(net, huge)
    wanted = nf.gram(net, A, normalize=True).astype(np.float64)
    check(nf.gram(net, huge, normalize=True).astype(np.float64), wanted, 8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_depth_beyond_the_range_normalises(dtype):
    net = nf.bottleneck_resnet(2000, alpha=1.0)  # variance 2^2000
    A = np.random.default_rng(9).standard_normal((3, 4)).astype(dtype)
    A[2] = -A[0] + dtype(1e-3) * A[1]
    with pytest.raises(OverflowError):
        nf.gram(net, A)
    got = nf.gram(net, A, normalize=True)
    for i, j in ((0, 0), (0, 1), (0, 2)):
        value = float(oracle.normalized_vectors(net, A[i], A[j]).ntk)
        check(float(got[i, j]), value, PROMISE[dtype == np.float32] * max(abs(value), 0.1))


# ---- positive semidefinite -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def digits_with_near_copies() -> np.ndarray:
    """The 1,797 digits with unit norm and 203 near copies of them (noise of 1e-4 a coordinate), 2,000 rows."""
    data = pytest.importorskip("sklearn.datasets").load_digits().data
    A = data / np.linalg.norm(data, axis=1, keepdims=True)
    rng = np.random.default_rng(10)
    copies = A[rng.choice(len(A), 203, replace=False)] + 1e-4 * rng.standard_normal((203, A.shape[1]))
    return np.concatenate([A, copies / np.linalg.norm(copies, axis=1, keepdims=True)])


SPECTRA = [(d, t) for d in (1, 3, 10, 50) for t in (np.float32, np.float64)]


@pytest.mark.parametrize(
    ("depth", "dtype"), [pytest.param(d, t, marks=[] if (d, t) == (3, np.float32) else slow) for d, t in SPECTRA]
)
def test_no_negative_eigenvalue(depth, dtype):
    K = nf.gram(nf.fully_connected(depth), digits_with_near_copies().astype(dtype))
    assert K.dtype == dtype
    np.testing.assert_array_equal(K, K.T)
    least = np.linalg.eigvalsh(K.astype(np.float64))[0]
    assert least > 0

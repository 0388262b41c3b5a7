"""csrc/math through the element-wise door, on every instruction set: one row per function, domain and error budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
from mpmath import mp, mpf
from oracle import check

from ntkfast import Activation, Bottleneck, Network, _core, _hermite, _plan, reference

EPS = 2.0**-52
POWERS = [10.0**-k for k in range(1, 16)]


@pytest.fixture(scope="module", params=_core.available())
def isa(request):
    return request.param


# ---- functions of one number -----------------------------------------------------------------------------


def theta(x):
    return 2 * mp.asin(mp.sqrt(x / 2)) / mp.pi


def area(x):
    # sin - angle cos cancels to the third power of the angle
    with mp.workdps(mp.dps + 5 + (0 if x == 0 else int(-1.1 * mp.log10(x)) + 5)):
        angle = 2 * mp.asin(mp.sqrt(x / 2))
        return (mp.sqrt(x * (2 - x)) - angle * (1 - x)) / mp.pi


class Row(NamedTuple):
    """Largest error allowed on [low, high], in units of the last place of the exact value, as csrc/math promises."""

    name: str
    exact: Any
    low: float
    high: float
    double: float
    no_fma: float  # double on v2 and baseline, where a multiplication and an addition round apart
    single: float


TABLE = [
    Row("theta0", theta, 0.0, 1.0, 4.0, 4.0, 4.0),
    Row("theta1", theta, 0.0, 0.56, 4.0, 4.0, 4.0),
    Row("theta2", theta, 0.0, 0.2, 4.0, 4.0, 4.0),
    Row("area0", area, 0.0, 1.0, 4.0, 4.0, 4.0),
    Row("area1", area, 0.0, 0.56, 4.0, 4.0, 4.0),
    Row("area2", area, 0.0, 0.2, 4.0, 4.0, 4.0),
    Row("exp", mp.exp, -708.0, 709.75, 2.0, 3.0, 1.0),
    Row("exp", mp.exp, -745.0, -708.5, 2.0, 3.0, 1.0),  # subnormal: in units of 2^-1074
    Row("expm1", mp.expm1, -40.0, 709.75, 3.0, 3.0, 1.0),
    Row("expm1", mp.expm1, -1.0, 1.0, 3.0, 3.0, 1.0),
]


def points_of(row: Row, dtype: Any) -> np.ndarray:
    """Both ends, 10^-k, ends - 10^-k, log-random and uniform."""
    rng = np.random.default_rng(7)
    low, high = row.low, row.high
    x = [low, high, 0.5 * (low + high), *(high - p for p in POWERS), *(low + p for p in POWERS)]
    x += [*rng.uniform(low, high, 150)]
    logs = 10.0 ** rng.uniform(-17, 0, 150)
    x += [s * v for s in (1.0, -1.0) for v in [*POWERS, *logs, 1e-30, 1e-300]]
    x = np.array(x, dtype)
    low, high = dtype(low), dtype(high)
    x = np.concatenate([x, [np.nextafter(high, low)]]).astype(dtype)
    x = np.unique(x[(x >= low) & (x <= high)])
    return x[(x == 0) | (np.abs(x) >= np.finfo(dtype).tiny)]  # half of a subnormal number is rounded


def representable(x: np.ndarray, exact: list[Any]) -> tuple[np.ndarray, list[Any]]:
    """The points whose value the dtype can hold (exp keeps the subnormal numbers of float64)."""
    info = np.finfo(x.dtype)
    least = float(info.tiny) if x.dtype == np.float32 or abs(x).max() < 700 else float(info.smallest_subnormal)
    keep = [e == 0 or least <= abs(e) <= float(info.max) for e in exact]
    return x[keep], [e for e, k in zip(exact, keep, strict=True) if k]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.name}[{r.low:g},{r.high:g}]")
def test_functions_keep_their_error_budget(row, dtype, isa):
    x = points_of(row, dtype)
    if dtype == np.float32 and row.high > 700:  # of float: the normal range of its exponential
        x = x[(x > -87) & (x < 88)]
        if not len(x):
            pytest.skip("below the range of float32")
    with mp.workdps(50):
        x, exact = representable(x, [row.exact(mpf(float(v))) for v in x])
        got = _core.scalar(row.name, x, isa)
        assert got.dtype == dtype
        ulp = [np.spacing(abs(dtype(e))) for e in exact]
        # dtype(e) of the largest values may round to infinity; their spacing is that below
        ulp = [u if np.isfinite(u) else np.spacing(np.finfo(dtype).max) for u in ulp]
        errors = [float((mpf(float(g)) - e) / mpf(float(u))) for g, e, u in zip(got, exact, ulp, strict=True)]
    check(
        np.array(errors), 0.0, row.single if dtype == np.float32 else row.double if isa in ("v3", "v4") else row.no_fma
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_ends_are_exact(dtype, isa):
    for name in ("theta0", "theta1", "theta2", "area0", "area1", "area2", "expm1"):
        np.testing.assert_array_equal(_core.scalar(name, np.array([0.0, -0.0], dtype), isa), 0)
    np.testing.assert_array_equal(_core.scalar("exp", np.array([0.0, -0.0], dtype), isa), 1)
    for name, wanted in (("exp", [0, np.inf, 0, np.inf, 0, np.inf]), ("expm1", [-1, np.inf, -1, np.inf, -1, np.inf])):
        x = np.array([-np.inf, np.inf, -3e38, 3e38, -800.0, 800.0], dtype)
        np.testing.assert_array_equal(_core.scalar(name, x, isa), wanted)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["theta0", "theta1", "theta2", "area0", "area1", "area2", "exp", "expm1"])
def test_nan_stays_nan_and_alone(name, dtype, isa):
    for n in (1, 7, 16, 33):  # whole vectors and remainders
        x = np.linspace(0.0, 0.2, n, dtype=dtype)
        clean = _core.scalar(name, x, isa)
        assert np.isfinite(clean).all()
        for k in {0, n // 2, n - 1}:
            y = x.copy()
            y[k] = np.nan
            got = _core.scalar(name, y, isa)
            assert np.isnan(got[k])
            np.testing.assert_array_equal(np.delete(got, k), np.delete(clean, k))


# ---- expectations of activations -------------------------------------------------------------------------


def plan_of(act: Activation, *variances: float) -> Any:
    """A plan whose only layer has pre-activations of the variances of the points, and the expansion for `variances`.

    The bias behind the layer keeps homogeneous activations on the path that goes through these functions.
    """
    net = Network([Bottleneck(act, scale=1.0, gain=1.0, outer_bias_variance=1.0)])
    return _plan.compile_network(net, [np.sqrt(variances)], np.dtype(np.float64)).core


# Equal, nearly equal, different by twelve orders of magnitude; below 100 for exp, whose second moment is exp(2A).
VARIANCES = [(1e-8, 1e-8), (1e-4, 1e-4), (1.0, 1.0), (7.3, 7.3), (1e4, 1e4), (1.0, 1.0 + 2 * EPS), (1.0, 1 + 1e-13),
             (0.3, 0.3 * (1 + 1e-9)), (2.0, 2.0002), (0.5, 3.0), (1e-8, 1.0), (30.0, 1e-3),
             (1e-8, 1e4), (1e4, 50.0)]  # fmt: skip
RNG = np.random.default_rng(11)
GAPS = [0.0, *POWERS, *10.0 ** RNG.uniform(-16, 0, 4), *RNG.uniform(0, 1, 4), 1.0]


class Dual(NamedTuple):
    """Budgets in eps: of w times |w| (or times the mean of Q_ii and Q_jj), of D times sqrt(D_ii D_jj).

    Even activations do not see the sign s of the correlation: their w is that of the image, as for s = 1.
    """

    activation: Activation
    w: float
    d: float
    even: bool = False
    relative: bool = True
    largest: float = 1e4


DUALS = [
    *(Dual(Activation.leaky_relu(e), 8, 8, even=e == -1) for e in (0.0, 0.01, -1.0, 1.0, -0.5)),
    Dual(Activation("erf"), 16, 16),
    Dual(Activation("gaussian"), 16, 16, even=True),
    Dual(Activation("exp"), 8, 8, largest=100.0),
    Dual(Activation("sin"), 8, 8),
    Dual(Activation("cos"), 8, 8, even=True),
    # The even part of gelu is a difference (activations.h): w is as good as Q, no better.
    Dual(Activation("gelu"), 8, 8, relative=False),
]


class Exact(NamedTuple):
    """w, D and how much an error of eps in the variances moves them, with their scales; floats, one per pair."""

    w: np.ndarray
    d: np.ndarray
    w_moves: np.ndarray
    d_moves: np.ndarray
    q: np.ndarray
    root_d: np.ndarray


def exact_duals(act: Activation, pairs: list[tuple[float, ...]], even: bool) -> Exact:
    rows = []
    with mp.workdps(80):
        h = mpf(10) ** -25

        def w_and_d(a, b, x, s):
            q, d = oracle.expectations(act, a, b, s * mp.sqrt(a * b) * (1 - x))
            qi, qj = (oracle.expectations(act, v, v, v)[0] for v in (a, b))
            return (qi + qj) / 2 - (1 if even else s) * q, d, (qi + qj) / 2

        for numbers in pairs:
            a, b, x, s = map(mpf, numbers)
            w, d, q = w_and_d(a, b, x, s)
            up, right = w_and_d(a * (1 + h), b, x, s), w_and_d(a, b * (1 + h), x, s)
            moves = [(abs(up[k] - v) + abs(right[k] - v)) / h for k, v in enumerate((w, d))]
            di, dj = (oracle.expectations(act, v, v, v)[1] for v in (a, b))
            rows.append([float(v) for v in (w, d, *moves, q, mp.sqrt(di * dj))])
    return Exact(*np.array(rows).T)


@pytest.mark.parametrize("dual", DUALS, ids=lambda r: f"{r.activation!r}")
def test_expectations_of_closed_form(dual):
    pairs = [(a, b, x, s) for a, b in VARIANCES for x in GAPS for s in (1.0, -1.0) if max(a, b) <= dual.largest]
    e = exact_duals(dual.activation, pairs, dual.even)
    side = np.ones(len(pairs)) if dual.even else np.array(pairs)[:, 3]
    # Rows know their variance to an ulp; where Q_ii and Q_jj almost cancel that is what limits w.
    w_tolerance = EPS * (dual.w * (np.abs(e.w) if dual.relative else e.q) + 2 * e.w_moves)
    d_tolerance = EPS * (dual.d * e.root_d + 2 * e.d_moves)
    for isa in _core.available():
        w, d, got_side = _core.dual(plan_of(dual.activation, 1.0), 0, *np.array(pairs).T, isa)
        np.testing.assert_array_equal(got_side, side)
        check(w, e.w, w_tolerance)
        check(d, e.d, d_tolerance)


@pytest.mark.parametrize("act", [*(r.activation for r in DUALS), Activation("tanh")], ids=repr)
def test_nan_in_a_pair_stays_nan_and_alone(act, isa):
    x, one = np.linspace(0, 1, 37), np.ones(37)
    clean = _core.dual(plan_of(act, 1.0), 0, one, one, x, one, isa)[:2]
    y = x.copy()
    y[[0, 20, 36]] = np.nan
    for got, wanted in zip(_core.dual(plan_of(act, 1.0), 0, one, one, y, one, isa)[:2], clean, strict=True):
        if not (act.slope == 1 and act.homogeneous and wanted is clean[1]):  # D of the identity is 1 whatever x is
            assert np.isnan(got[[0, 20, 36]]).all()
        np.testing.assert_array_equal(np.delete(got, [0, 20, 36]), np.delete(wanted, [0, 20, 36]))


# ---- Hermite expansions ----------------------------------------------------------------------------------

EXPANDED = [Activation(n) for n in ("tanh", "silu", "softplus")] + [
    Activation.from_function(np.arctan, lambda x: 1 / (1 + x * x), name="arctan")
]


def scales(act: Activation, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q, d = reference.expectations(act, a, a, a)
    return np.sqrt(q), np.sqrt(d)


@pytest.mark.parametrize("tolerance", [1e-12, 1e-7])
@pytest.mark.parametrize("act", EXPANDED, ids=repr)
def test_hermite_expansions_against_quadrature(act, tolerance):
    x, s = (v.ravel() for v in np.meshgrid(GAPS[::2], [1.0, -1.0]))
    act = act.with_tolerance(tolerance)
    different = plan_of(act, 1e-6, 4.0)
    for a, b, plan in [(v, v, plan_of(act, v)) for v in (1e-6, 0.4, 1.0, 3.0)] + [
        (a, b, different) for a, b in [(1.0, 1.0), (1e-6, 4.0), (0.5, 0.5001), (1e-6, 1e-6), (4.0, 0.03)]
    ]:
        q, d_exact = reference.expectations(act, a, b, s * np.sqrt(a * b) * (1 - x))
        (qi, qj), (di, dj) = scales(act, np.array([a, b]))
        for isa in _core.available():
            w, d, side = _core.dual(plan, 0, np.full_like(x, a), np.full_like(x, b), x, s, isa)
            # 2e-14: the quadrature itself and the rounding of some hundred terms
            np.testing.assert_array_equal(side, s)
            check(w, (qi**2 + qj**2) / 2 - side * q, (tolerance + 2e-14) * 0.5 * (qi**2 + qj**2))
            check(d, d_exact, (tolerance + 2e-14) * di * dj)


@pytest.mark.parametrize(("function", "odd"), [(np.sin, 1), (lambda x: np.exp(-x * x), 0)])
def test_coefficients_of_the_other_parity_are_zero(function, odd):
    """Exactly, in any number of rows: products of the BLAS add up in an order of their own."""
    a, _ = _hermite._coefficients(Activation.from_function(function), np.linspace(0.1, 2.0, 31), 1025, 60)
    assert not a[:, 1 - odd :: 2].any()
    assert a[:, odd::2].any(axis=1).all()


@pytest.mark.parametrize(("function", "name"), [(np.sin, "sin"), (lambda x: np.exp(-x * x), "gaussian")])
def test_hermite_expansions_keep_close_pairs_apart(function, name):
    """Functions whose expectations are known in closed form, given as functions of the user: w is relative."""
    act = Activation.from_function(function, name=name)
    same, different = plan_of(act, 0.7), plan_of(act, 0.2, 1.0)
    for a, b, plan in [(0.7, 0.7, same), (0.7, 0.7, different), (0.3, 0.9, different)]:
        pairs = [(a, b, x, s) for x in GAPS for s in (1.0, -1.0)]
        e = exact_duals(Activation(name), pairs, even=name == "gaussian")
        for isa in _core.available():
            w, d, side = _core.dual(plan, 0, *np.array(pairs).T, isa)
            np.testing.assert_array_equal(side, 1 if name == "gaussian" else np.array(pairs)[:, 3])
            check(w, e.w, 1e-12 * np.abs(e.w))
            check(d, e.d, 1e-12 * e.root_d)

"""Kernels of pairs of inputs in 80-digit arithmetic: what "exact" means in the tests.

Slow, scalar, and independent of the package: only the fields of ``net.layers`` and ``net.readout`` are read
(as exact floats), never a coefficient or a formula of the package. Homogeneous activations (relu, leaky_relu,
abs, identity) and those with a closed form (erf, gelu, sin, cos, exp, gaussian); with or without biases.

The digits are chosen so that cancellation does not matter: A B - C^2 is formed as it stands, and pairs that
are given by a tiny t = 1 - rho or c = 1 + rho get as many more digits as that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpmath import mp, mpf

DIGITS = 80


def check(value: Any, exact: Any, tolerance: Any) -> None:
    """Every entry within its own tolerance; NaN anywhere fails."""
    value, exact, tolerance = np.broadcast_arrays(value, exact, tolerance)
    bad = ~(np.abs(value - exact) <= tolerance)
    if bad.any():
        k = np.unravel_index(np.argmax(np.where(bad, np.abs(value - exact) / tolerance, -1)), bad.shape)
        pytest.fail(f"{bad.sum()} of {bad.size} entries off; worst {k}: {value[k]!r} is not {exact[k]!r} "
                    f"within {tolerance[k]:.2e}, difference {value[k] - exact[k]:.2e}")  # fmt: skip


class Kernels(NamedTuple):
    """Kernels of one pair, as mpf; ``layers`` has one Gram per trained matrix, in network order."""

    ntk: Any
    nngp: Any
    last_hidden: Any
    layers: tuple[Any, ...]


class Numbers(NamedTuple):
    """The numbers of a layer; w is the factor of W's Gram if W is trained, t whether the layer is."""

    p: Any
    q: Any
    r: Any
    cw: Any
    cb: Any
    w: Any
    v: Any
    vb: Any
    t: Any


def exact(x: Any) -> Any:
    """An int, float, Fraction or mpf as mpf: floats are taken as they are, 0.1 is not 1/10."""
    if isinstance(x, Fraction):
        return mpf(x.numerator) / x.denominator
    return mpf(x)


# ---- Gaussian expectations -----------------------------------------------------------------------------


def _kinked(e: Any, A: Any, B: Any, C: Any) -> tuple[Any, Any]:
    """s(x) = x (x > 0), e x (x < 0), through Q = E[relu relu] and P = P(u > 0, v > 0)."""
    if A == 0 or B == 0:
        return mpf(0), (1 + e) ** 2 / 4
    det, pi = A * B - C * C, +mp.pi
    root = mp.sqrt(det) if det > 0 else mpf(0)  # sqrt(AB) sin th
    th = mp.atan2(root, C)
    pos, P = (root + (pi - th) * C) / (2 * pi), (pi - th) / (2 * pi)
    if not e:
        return pos, P
    neg = (root - th * C) / (2 * pi)
    return (1 + e * e) * pos - 2 * e * neg, (1 + e * e) * P + 2 * e * (mpf(1) / 2 - P)


def _erf(A: Any, B: Any, C: Any) -> tuple[Any, Any]:
    n = (1 + 2 * A) * (1 + 2 * B)
    return 2 / mp.pi * mp.asin(2 * C / mp.sqrt(n)), 4 / mp.pi / mp.sqrt(n - 4 * C * C)


def _gelu(A: Any, B: Any, C: Any) -> tuple[Any, Any]:
    d = (1 + A) * (1 + B) - C * C
    F = 1 / (2 * mp.pi * mp.sqrt(d))
    Ph = mpf(1) / 4 + mp.asin(C / mp.sqrt((1 + A) * (1 + B))) / (2 * mp.pi)
    ab = 1 / (1 + A) + 1 / (1 + B)
    return C * Ph + F * (A * B + C * C * (ab - 1)), Ph + C * F * (ab + 1 / d)


def _exp(A: Any, B: Any, C: Any) -> tuple[Any, Any]:
    Q = mp.exp((A + B) / 2 + C)
    return Q, Q


def _gaussian(A: Any, B: Any, C: Any) -> tuple[Any, Any]:
    d = (1 + 2 * A) * (1 + 2 * B) - 4 * C * C
    return 1 / mp.sqrt(d), 4 * C / (d * mp.sqrt(d))


def _sin(A: Any, B: Any, C: Any) -> tuple[Any, Any]:
    f = mp.exp(-(A + B) / 2)
    return f * mp.sinh(C), f * mp.cosh(C)


def _cos(A: Any, B: Any, C: Any) -> tuple[Any, Any]:
    return _sin(A, B, C)[::-1]


_SMOOTH = {"erf": _erf, "gelu": _gelu, "exp": _exp, "gaussian": _gaussian, "sin": _sin, "cos": _cos}
_SMOOTH_MEAN = {
    "erf": lambda A: mpf(0),
    "sin": lambda A: mpf(0),
    "exp": lambda A: mp.exp(A / 2),
    "cos": lambda A: mp.exp(-A / 2),
    "gaussian": lambda A: 1 / mp.sqrt(1 + 2 * A),
    "gelu": lambda A: A / mp.sqrt(2 * mp.pi * (1 + A)),
}
_SLOPE = {"relu": 0.0, "abs": -1.0, "identity": 1.0}


def _slope(activation: Any) -> Any:
    """The slope on the negative side of a homogeneous activation, else ``None``."""
    if activation.function is not None:
        raise NotImplementedError("the oracle has no quadrature")
    if activation.name == "leaky_relu":
        return mpf(activation.slope)
    return mpf(_SLOPE[activation.name]) if activation.name in _SLOPE else None


def expectations(activation: Any, A: Any, B: Any, C: Any) -> tuple[Any, Any]:
    """E[s(u) s(v)] and E[s'(u) s'(v)] at the current precision of mpmath."""
    e = _slope(activation)
    return _SMOOTH[activation.name](A, B, C) if e is None else _kinked(e, A, B, C)


def mean(activation: Any, A: Any) -> Any:
    """E[s(u)] at the current precision of mpmath."""
    e = _slope(activation)
    return _SMOOTH_MEAN[activation.name](A) if e is None else (1 - e) * mp.sqrt(A / (2 * mp.pi))


# ---- the recursion -------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _numbers(layer: Any, digits: int) -> Numbers:
    """The numbers of a layer, from its fields (``digits`` is there for the cache)."""
    kind, one, zero = type(layer).__name__, mpf(1), mpf(0)
    if kind == "HalvedLayer":
        theta, factor = mpf(layer.theta), mpf(layer.width_ratio) / 2
        return Numbers(mpf(layer.skip), mp.sqrt(2) * theta, 2 * theta**2, one, zero, factor, zero, zero, one)
    cw, cb, t = mpf(layer.weight_variance), mpf(layer.bias_variance), mpf(int(layer.trained))
    if kind == "Linear":
        return Numbers(zero, zero, one, cw, cb, one, zero, zero, t)
    if kind == "Residual":
        scale = mpf(layer.scale)
        return Numbers(mpf(layer.skip), scale, scale**2, cw, cb, one, zero, zero, t)
    gain = 1 / expectations(layer.activation, one, one, one)[0] if layer.gain is None else mpf(layer.gain)
    if kind == "Dense":
        return Numbers(zero, mp.sqrt(gain), gain, cw, cb, one, zero, zero, t)
    if kind != "Bottleneck":
        raise TypeError(kind)
    scale2 = mpf(layer.scale) ** 2
    vb = scale2 * mpf(layer.outer_bias_variance)
    return Numbers(mpf(layer.skip), zero, gain * scale2, cw, cb, one, one, vb, t)


class Row(NamedTuple):
    """One input before a layer: variance S, mean b; inside the layer: variance lam, mean mu of s."""

    S: Any
    b: Any
    lam: Any
    mu: Any


@lru_cache(maxsize=256)
def _rows(net: Any, S: Any, digits: int) -> tuple[Row, ...]:
    """The variances and means of one input in front of every layer, and behind the last."""
    rows, b = [], mpf(0)
    for layer in net.layers:
        k, act = _numbers(layer, digits), layer.activation
        lam = k.cw * S + k.cb
        mu = mean(act, lam)
        rows.append(Row(S, b, lam, mu))
        Q = expectations(act, lam, lam, lam)[0]
        S, b = k.p**2 * S + 2 * k.p * k.q * b * mu + k.r * Q + k.vb, k.p * b + k.q * mu
    return (*rows, Row(S, b, None, None))


def _recursion(net: Any, A: Any, B: Any, C: Any) -> Kernels:
    left, right, S = _rows(net, A, mp.dps), _rows(net, B, mp.dps), C
    steps = []
    for layer, x, y in zip(net.layers, left, right, strict=False):
        k = _numbers(layer, mp.dps)
        Q, D = expectations(layer.activation, x.lam, y.lam, k.cw * S + k.cb)
        steps.append((k, S, Q, D))
        S = k.p**2 * S + k.p * k.q * (x.b * y.mu + y.b * x.mu) + k.r * Q + k.vb
    readout, (k, S_last, _, D) = net.readout, steps[-1]
    o2, o0 = mpf(readout.weight_variance), mpf(readout.bias_variance)
    last_hidden = o2 * k.r * D * k.w * k.cw * S_last
    layers = [o2 * S + o0] if readout.trained else []
    back = o2
    for k, S_in, Q, D in reversed(steps):
        if k.t and k.v:
            layers.append(back * (k.r * Q + k.vb))
        if k.t:
            layers.append(back * k.r * D * (k.w * k.cw * S_in + k.cb))
        back *= k.p**2 + k.r * k.cw * D
    # A fixed readout of +1 and -1, half each, cancels the product of the means.
    covariance = S - left[-1].b * right[-1].b if type(readout).__name__ == "SignReadout" else S
    return Kernels(mp.fsum(layers), o2 * covariance + o0, last_hidden, tuple(layers[::-1]))


# ---- entry points --------------------------------------------------------------------------------------


def kernels(net: Any, A: Any, B: Any, C: Any, *, digits: int = DIGITS) -> Kernels:
    """Kernels of a pair with <x, x> = A, <y, y> = B, <x, y> = C (taken as exact)."""
    with mp.workdps(digits):
        return _recursion(net, exact(A), exact(B), exact(C))


def _pair_digits(t: Any) -> int:
    """Digits for 1 - rho^2 of about t: it must keep 40 digits and its square root enters."""
    return DIGITS if t == 0 else max(DIGITS, 60 + int(mp.ceil(-mp.log10(mpf(t)))))


def _given(rho: Any, t: Any, c: Any) -> tuple[Any, int]:
    if (rho is not None) + (t is not None) + (c is not None) != 1:
        raise TypeError("give exactly one of rho, t = 1 - rho, c = 1 + rho")
    with mp.workdps(4 * DIGITS):
        if rho is not None:
            r = exact(rho)
            return r, _pair_digits(min(1 - r, 1 + r))
        small = exact(t if t is not None else c)
    digits = _pair_digits(min(small, 2 - small))
    with mp.workdps(digits + DIGITS):
        return (1 - small if t is not None else small - 1), digits


def pair(net: Any, norm_i: Any = 1, norm_j: Any = 1, *, rho: Any = None, t: Any = None, c: Any = None) -> Kernels:
    """Kernels of two inputs with these Euclidean norms and correlation rho = 1 - t = c - 1."""
    r, digits = _given(rho, t, c)
    with mp.workdps(digits):
        ni, nj = exact(norm_i), exact(norm_j)
        return _recursion(net, ni * ni, nj * nj, ni * nj * r)


def vectors(net: Any, x: Sequence[float], y: Sequence[float], *, digits: int = DIGITS) -> Kernels:
    """Kernels of two vectors of floats, taken as exact numbers."""
    with mp.workdps(digits):
        xs, ys = [mpf(float(v)) for v in x], [mpf(float(v)) for v in y]
        return _recursion(net, mp.fdot(xs, xs), mp.fdot(ys, ys), mp.fdot(xs, ys))


@lru_cache(maxsize=256)
def _diagonal(net: Any, A: Any, digits: int) -> Kernels:
    return _recursion(net, A, A, A)


def _normalized(net: Any, A: Any, B: Any, C: Any) -> Kernels:
    both, x, y = _recursion(net, A, B, C), _diagonal(net, A, mp.dps), _diagonal(net, B, mp.dps)

    def divide(k: Any, kx: Any, ky: Any) -> Any:
        return k / mp.sqrt(kx * ky) if kx * ky > 0 else mpf(0)

    return Kernels(*(divide(both[k], x[k], y[k]) for k in range(3)), layers=())


def normalized_pair(
    net: Any, norm_i: Any = 1, norm_j: Any = 1, *, rho: Any = None, t: Any = None, c: Any = None
) -> Kernels:
    """K_ij / sqrt(K_ii K_jj) of each kernel (0 where a diagonal is 0); ``layers`` is empty."""
    r, digits = _given(rho, t, c)
    with mp.workdps(digits):
        ni, nj = exact(norm_i), exact(norm_j)
        return _normalized(net, ni * ni, nj * nj, ni * nj * r)


def normalized_vectors(net: Any, x: Sequence[float], y: Sequence[float], *, digits: int = DIGITS) -> Kernels:
    """:func:`vectors`, normalised as in :func:`normalized_pair`."""
    with mp.workdps(digits):
        xs, ys = [mpf(float(v)) for v in x], [mpf(float(v)) for v in y]
        return _normalized(net, mp.fdot(xs, xs), mp.fdot(ys, ys), mp.fdot(xs, ys))


def gram(net: Any, X: Any, Y: Any = None, *, get: str = "ntk", normalize: bool = False) -> list[list[Any]]:
    """Rows of mpf: one kernel for all pairs of rows (small inputs only)."""
    compute = normalized_vectors if normalize else vectors
    other = X if Y is None else Y
    return [[getattr(compute(net, x, y), get) for y in other] for x in X]

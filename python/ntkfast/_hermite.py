"""Hermite coefficients of activations without a closed form, and the tables the kernels read.

a_k(A) = E s(sqrt(A) z) h_k(z), z ~ N(0, 1), h_k orthonormal (MATH.md, section 8; conventions of csrc/math/hermite.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._derivatives import derivatives
from ntkfast.activation import Activation

Array = NDArray[np.float64]

MOST_TERMS = 1024
#: Hermite functions times sqrt of the Gaussian weight are below 1e-18 beyond (k < 1024, bounded activations).
REACH = 13.0


def _function(activation: Activation) -> Any:
    return derivatives(activation).value


def _at_zero(activation: Activation) -> float:
    """s(0); 0 if the function is not finite there (the quadrature says so)."""
    with np.errstate(all="ignore"):
        value = float(np.asarray(_function(activation)(np.zeros(1)), dtype=np.float64).ravel()[0])
    return value if np.isfinite(value) else 0.0


@lru_cache(maxsize=8)
def _grid(nodes: int, terms: int) -> tuple[Array, Array, Array]:
    """Trapezoidal nodes z, sqrt(weight) and h_k(z) sqrt(weight), (terms, nodes); weight = step * density of z."""
    z = np.linspace(-REACH, REACH, nodes)
    root = np.sqrt(2 * REACH / (nodes - 1) / np.sqrt(2 * np.pi)) * np.exp(-0.25 * z * z)
    h = np.empty((terms, nodes))
    h[0] = root
    if terms > 1:
        h[1] = z * root
    for k in range(1, terms - 1):
        h[k + 1] = (z * h[k] - np.sqrt(k) * h[k - 1]) / np.sqrt(k + 1)
    return z, root, h


def _coefficients(activation: Activation, sigma: Array, nodes: int, terms: int) -> tuple[Array, Array]:
    """a_k for every standard deviation, (len(sigma), terms), and E s^2."""
    z, root, h = _grid(nodes, terms)
    with np.errstate(all="ignore"):
        values = np.asarray(_function(activation)(np.multiply.outer(sigma, z)), dtype=np.float64)
        if values.shape != (len(sigma), nodes):
            raise ValueError(f"activation {activation.name!r} must return an array of the shape it was given")
        # s(0) apart: a_1 ~ sqrt(A) would lose its digits under it for rows of small variance.
        origin = _at_zero(activation)
        values = (values - origin) * root
    if not np.isfinite(values).all():
        raise ValueError(f"activation {activation.name!r} is not finite at arguments up to {REACH * sigma.max():g}; "
                         "normalise the rows")  # fmt: skip
    a, square = _project(values, h), np.einsum("ij,ij->i", values, values)
    square += origin * (2 * a[:, 0] + origin)
    a[:, 0] += origin
    return a, square


def _project(values: Array, h: Array) -> Array:
    """values @ h.T, the nodes z and -z added first: coefficients of the wrong parity of an even or odd function are 0
    then, in whatever order a BLAS adds up."""
    half = values.shape[1] // 2  # the middle node is z = 0
    low, high = values[:, :half], values[:, :half:-1]
    a = np.empty((len(values), len(h)))
    a[:, ::2] = np.concatenate([low + high, values[:, half : half + 1]], axis=1) @ h[::2, : half + 1].T
    a[:, 1::2] = (low - high) @ h[1::2, :half].T
    return a


@lru_cache(maxsize=64)
def second_moment(activation: Activation) -> float:
    """E s(z)^2, z ~ N(0, 1), by the trapezoidal rule (error 1e-16 for analytic activations)."""
    # The step 26/8192 resolves poles as near as 0.02; smooth named activations converge at a tenth of the nodes.
    _, square = _coefficients(activation, np.ones(1), 8193, 1)
    if not square[0] > 0:
        raise ValueError(f"activation {activation.name!r} is zero: c_sigma does not exist, give gain=")
    return float(square[0])


class ExpansionError(ValueError):
    """The expansion does not reach its tolerance; `sigma` is the standard deviation where it fails."""

    def __init__(self, message: str, sigma: float) -> None:
        super().__init__(message)
        self.sigma = sigma


@dataclass(frozen=True)
class Table:
    """What one layer of the kernels reads: see csrc/math/hermite.h."""

    evens: int
    odds: int
    edges: Array
    coefficients: Array
    sums: Array
    even_sum: float
    odd_sum: float
    mean: float

    @property
    def nbytes(self) -> int:
        return self.coefficients.nbytes + self.sums.nbytes

    def as_tuple(self) -> tuple[Any, ...]:
        return (self.evens, self.odds, self.edges, self.coefficients, self.sums, self.even_sum, self.odd_sum, self.mean)


def _expand(activation: Activation, sigma: Array, tolerance: float) -> Array:
    """Coefficients with as many terms as the tolerance needs at correlation 1, (len(sigma), terms)."""
    for terms, nodes in ((128, 1025), (MOST_TERMS, 4097)):
        a, square = _coefficients(activation, sigma, nodes, terms)
        finer, _ = _coefficients(activation, sigma, 2 * nodes - 1, terms)
        zero = square == 0
        scale = np.sqrt(np.where(zero, 1.0, square))[:, None]
        k = np.arange(terms)
        weight = k * a * a
        total = np.maximum(weight.sum(axis=1), 1e-300)
        # What is left after each term, of Q and of its derivative by rho, both at rho = 1.
        left = np.where(zero[:, None], 0.0, 1 - np.cumsum(a * a, axis=1) / scale**2)
        left_derivative = weight[:, ::-1].cumsum(axis=1)[:, ::-1] / total[:, None]
        missing = np.maximum(np.abs(left[:, -1]), left_derivative[:, -terms // 8])
        converged = (np.abs(finer - a) <= 0.01 * tolerance * scale + 1e-15 * scale).all(axis=1)
        bad = ~(converged & (missing <= max(tolerance, 4e-15)))
        if not bad.any():
            enough = (left_derivative <= 0.25 * tolerance).all(axis=0) & (np.abs(left) <= max(tolerance, 4e-15)).all(
                axis=0
            )
            keep = int(np.argmax(enough)) if enough.any() else terms
            _check_derivative(activation, sigma, (k * finer * finer).sum(axis=1), nodes)
            return finer[:, : max(keep, 2)]
    worst = float(sigma[bad].max())
    raise ExpansionError(f"the Hermite expansion of {activation.name!r} does not reach the relative tolerance "
                         f"{tolerance:g} with {MOST_TERMS} terms", worst)  # fmt: skip


def _check_derivative(activation: Activation, sigma: Array, series: Array, nodes: int) -> None:
    """The series of E s'(u)^2 A against the derivative the user gave."""
    if activation.derivative is None:
        return
    z, root, _ = _grid(nodes, 1)
    values = np.asarray(activation.derivative(np.multiply.outer(sigma, z)), dtype=np.float64) * root
    square = sigma**2 * np.einsum("ij,ij->i", values, values)
    # 1e-6 tells another function's derivative from rounding and from the truncation of the series.
    if not (np.abs(series - square) <= 1e-6 * np.maximum(series, square)).all():
        raise ValueError(f"derivative= is not the derivative of activation {activation.name!r}")


def _parity(a: Array) -> tuple[int, int]:
    """How many even and odd terms are worth keeping: an odd function has no even ones."""
    scale = np.sqrt((a * a).sum(axis=1)).max()
    terms = a.shape[1]
    tiny = np.abs(a).max(axis=0) <= 4e-16 * scale
    even = np.flatnonzero(~tiny[0::2])
    odd = np.flatnonzero(~tiny[1::2])
    evens = min(int(even[-1]) + 1, (terms + 1) // 2) if len(even) else 0
    odds = min(int(odd[-1]) + 1, terms // 2) if len(odd) else 0
    return evens, odds


def _split(a: Array, evens: int, odds: int) -> Array:
    """Even terms first, then odd ones, (..., evens + odds)."""
    return np.concatenate([a[..., 0 : 2 * evens : 2], a[..., 1 : 2 * odds : 2]], axis=-1)


@lru_cache(maxsize=256)
def uniform_table(activation: Activation, variance: float, tolerance: float) -> Table:
    """The table of one variance for all rows: Horner coefficients in rho^2."""
    if variance > 0:
        a = _expand(activation, np.array([np.sqrt(variance)]), tolerance)
    else:
        a = np.array([[_at_zero(activation), 0.0]])
    evens, odds = _parity(a)
    p = _split(a[0], evens, odds) ** 2
    even, odd = p[:evens], p[evens:]

    def defect(q: Array) -> Array:
        # sum_m q_m (1 - r^m) / (1 - r) = sum_j r^j T_(j+1), T_j = sum_(m >= j) q_m, r = rho^2
        tails = q[::-1].cumsum()[::-1]
        return np.append(tails[1:], 0.0) if len(q) else q

    inverse = 1 / variance if variance > 0 else 0.0
    even_derivative = np.append(2.0 * np.arange(1, evens) * even[1:], 0.0)[:evens] * inverse
    odd_derivative = (2.0 * np.arange(odds) + 1) * odd * inverse
    sums = np.concatenate([defect(even), even_derivative, defect(odd), odd_derivative])
    mean = float(a[0, 0]) if evens else 0.0
    return Table(evens, odds, np.zeros(1), np.zeros((0, evens + odds, 1)), np.ascontiguousarray(sums),
                 float(even.sum()), float(odd.sum()), mean)  # fmt: skip


def panel_table(activation: Activation, low: float, high: float, tolerance: float) -> Table:
    """The table for variances between `low` and `high`: a_k as Chebyshev series in sqrt(A), panel by panel."""
    # A little wider than asked for: the kernels may see a variance an ulp away, and one variance is no interval.
    low, high = float(np.sqrt(low)) * (1 - 1e-6), float(np.sqrt(high)) * (1 + 1e-6)
    # One panel an octave: a_1 ~ sqrt(A) keeps its relative accuracy on each. Rows below 2^-40 of
    # the largest keep the absolute one only.
    first = max(low, high * 2.0**-40)
    count = max(1, int(np.ceil(np.log2(high / first) - 1e-9)))
    edges = first * (high / first) ** (np.arange(count + 1) / count)
    edges[0] = 0.0 if low < first else low
    edges[-1] = high
    for order in (16, 24, 32, 48):
        # Chebyshev points of the first kind; the series is checked half-way between them.
        angle = np.pi * (np.arange(order) + 0.5) / order
        check = np.cos(np.pi * np.arange(1, order) / order)
        middle, half = 0.5 * (edges[1:] + edges[:-1]), 0.5 * (edges[1:] - edges[:-1])
        points = np.concatenate([np.cos(angle), check])
        a = _expand(activation, (middle[:, None] + half[:, None] * points).ravel(), tolerance)
        a = a.reshape(count, len(points), -1)
        transform = np.cos(np.outer(np.arange(order), angle)) * (2.0 / order)
        transform[0] *= 0.5
        series = np.einsum("on,pnk->pko", transform, a[:, :order])
        value = np.einsum("pko,oc->pck", series, np.cos(np.outer(np.arange(order), np.arccos(check))))
        scale = np.sqrt((a * a).sum(axis=2)).max(axis=1)
        if (np.abs(value - a[:, order:]).max(axis=(1, 2)) <= max(1e-14, 1e-3 * tolerance) * scale).all():
            break
    else:
        raise ExpansionError(f"the Hermite coefficients of {activation.name!r} vary too fast with the variance", high)
    evens, odds = _parity(a.reshape(-1, a.shape[2]))
    coefficients = _split(np.moveaxis(series, 1, 2), evens, odds)
    return Table(evens, odds, np.ascontiguousarray(edges), np.ascontiguousarray(np.moveaxis(coefficients, 1, 2)),
                 np.zeros(2 * (evens + odds)), 0.0, 0.0, _at_zero(activation))  # fmt: skip

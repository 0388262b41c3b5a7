"""Trapezoidal rule for the expectations that have no closed form (softplus, silu, tanh, user functions).

Whitened coordinates: u = sqrt(A) z1, v = (C/sqrt A) z1 + sqrt(B - C^2/A) z2, z1 and z2 independent N(0, 1).
The rule with step h on |z| <= R converges like exp(-2 pi w/h), w = (distance of the nearest complex pole of
s) / sqrt(largest variance), and is cut off at exp(-R^2/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast.activation import Activation

Array = NDArray[np.float64]
Rule = Callable[[int], tuple[Array, Array]]  # nodes -> values, their scales

POLE_DISTANCE = {"softplus": np.pi, "silu": np.pi, "tanh": np.pi / 2}
RANGE = 9.0  # exp(-RANGE^2/2) = 3e-18
RANGE_USER = 12.0  # functions of the user may grow
MAX_NODES = 4096
MAX_POINTS = 1 << 21  # grid points held in memory at once


def _sigmoid(x: Array) -> Array:
    result: Array = 0.5 * (1 + np.tanh(x / 2))  # no overflow, unlike 1/(1 + exp(-x))
    return result


def _silu_derivative(x: Array) -> Array:
    return _sigmoid(x) * (1 + x * _sigmoid(-x))


def functions(act: Activation) -> tuple[Callable[[Array], Any], Callable[[Array], Any]]:
    """s and s' as vectorised functions."""
    if act.function is not None:
        return act.function, act.derivative or _difference_quotient(act.function)
    if act.name == "softplus":
        return lambda x: np.logaddexp(0.0, x), _sigmoid
    if act.name == "silu":
        return lambda x: x * _sigmoid(x), _silu_derivative
    if act.name == "tanh":
        return np.tanh, lambda x: 1 - np.tanh(x) ** 2
    raise ValueError(f"{act.name} has a closed form, not a quadrature")


def _difference_quotient(f: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """f' by the central difference of order 8, good to about 1e-14 (1e-20 f^(9), rounding of f over h)."""
    h = 1 / 128
    weights = (4 / 5, -1 / 5, 4 / 105, -1 / 280)

    def derivative(x: Array) -> Any:
        steps = enumerate(weights, 1)
        return sum(w * (np.asarray(f(x + k * h)) - np.asarray(f(x - k * h))) for k, w in steps) / h

    return derivative


def _nodes(act: Activation, count: int) -> tuple[Array, Array]:
    radius = RANGE if act.function is None else RANGE_USER
    z = np.linspace(-radius, radius, count)
    return z, np.exp(-z * z / 2) / np.sqrt(2 * np.pi) * (2 * radius / (count - 1))


def _settled(act: Activation, largest_variance: float, rule: Rule) -> Array:
    """The rule with enough nodes: known poles give their number, otherwise it doubles until settled."""
    sigma = max(1.0, math.sqrt(largest_variance))
    if act.function is None:
        # exp(-48) = 1e-21: the residue in front of it is some thousands.
        step = min(0.4, 2 * np.pi * POLE_DISTANCE[act.name] / (48 * sigma))
        return rule(int(2 * RANGE / step) + 2)[0]
    count = int(32 * sigma)
    values, scales = rule(count)
    while count <= MAX_NODES // 2:
        count *= 2
        previous = values
        values, scales = rule(count)
        if np.all(np.abs(values - previous) <= 1e-13 * scales):
            return values
    raise ValueError(f"{act.name}: the quadrature does not settle at variance {largest_variance:g}; "
                     "the function is not smooth enough")  # fmt: skip


def _pair_rule(act: Activation, root: float, slope: float, rest: float, count: int) -> tuple[Array, Array]:
    """(Q, D) and their scales (E[s(u)^2], E[s'(u)^2]) for u = root z1, v = slope z1 + rest z2."""
    z, w = _nodes(act, count)
    values, scales = [], []
    for f in functions(act):
        fu = np.asarray(f(root * z))
        scales.append(np.sum(w * fu * fu))
        if rest == 0.0:  # v is a multiple of u: one dimension
            values.append(np.sum(w * fu * f(slope * z)))
            continue
        rows = max(1, MAX_POINTS // count)
        inner = [f(slope * z[k : k + rows, None] + rest * z) @ w for k in range(0, count, rows)]
        values.append(np.sum(w * fu * np.concatenate(inner)))
    return np.array(values), np.array(scales)


def pair_expectations(act: Activation, A: Array, B: Array, C: Array) -> tuple[Array, Array]:
    """Q and D of :func:`ntkfast.reference.expectations` for arrays of one shape."""
    result = np.empty((2, C.size))
    for k, (a, b, c) in enumerate(zip(A.flat, B.flat, C.flat, strict=True)):
        # The larger variance goes first: no division by zero, and the result is symmetric in A and B.
        hi, lo = float(max(a, b)), float(min(a, b))
        root = math.sqrt(hi)
        slope = float(c) / root if hi > 0 else 0.0
        rest = math.sqrt(max(lo - float(c) * (float(c) / hi), 0.0)) if hi > 0 else 0.0
        result[:, k] = _settled(act, hi, partial(_pair_rule, act, root, slope, rest))
    return result[0].reshape(C.shape), result[1].reshape(C.shape)


def _mean_rule(act: Activation, root: float, count: int) -> tuple[Array, Array]:
    """E[s(u)] and its scale sqrt(E[s(u)^2]) for u = root z."""
    z, w = _nodes(act, count)
    fu = np.asarray(functions(act)[0](root * z))
    return np.array([np.sum(w * fu)]), np.array([np.sqrt(np.sum(w * fu * fu))])


def mean(act: Activation, A: Array) -> Array:
    """E[s(u)], u ~ N(0, A), entrywise."""
    values = [_settled(act, float(a), partial(_mean_rule, act, math.sqrt(a)))[0] for a in A.flat]
    return np.array(values, dtype=np.float64).reshape(A.shape)

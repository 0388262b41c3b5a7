"""Gaussian expectations of activations ("dual activations").

(u, v) is a centred Gaussian pair with Var u = A, Var v = B, Cov(u, v) = C:

    Q = E[s(u) s(v)],   D = E[s'(u) s'(v)],   mu = E[s(u)].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkfast.activation import Activation, as_activation
from ntkfast.reference import quadrature

Array = NDArray[np.float64]
Pair = tuple[Array, Array]


def root_determinant(A: Array, B: Array, C: Array) -> Array:
    """sqrt(A B - C^2), 0 where rounding makes the determinant negative.

    Written as sqrt(hi) sqrt(lo - C^2/hi): exactly 0 for A = B = C, symmetric in A and B, no overflow.
    """
    hi, lo = np.maximum(A, B), np.minimum(A, B)
    conditional = lo - C * (C / np.where(hi > 0, hi, 1.0))
    root: Array = np.sqrt(hi) * np.sqrt(np.maximum(conditional, 0.0))
    return root


def _piecewise_linear(slope: float, A: Array, B: Array, C: Array) -> Pair:
    """s(x) = x for x > 0, slope * x for x < 0: arc-cosine kernels (Cho and Saul, 2009) of order 1 and 0.

    With th the angle, sqrt(AB) cos th = C and sqrt(AB) sin th = sqrt(AB - C^2), so no division occurs and
    zero variances need no special case (Q = 0; D is then finite and only ever multiplied by 0).
    """
    root = root_determinant(A, B, C)
    th = np.arctan2(root, C)
    same = (root + (np.pi - th) * C) / (2 * np.pi)  # E[relu(u) relu(v)]
    opposite = (root - th * C) / (2 * np.pi)  # E[relu(u) relu(-v)]
    P = (np.pi - th) / (2 * np.pi)  # P(u > 0, v > 0)
    Q = (1 + slope**2) * same - 2 * slope * opposite
    D = (1 + slope**2) * P + slope * (1 - 2 * P)
    return Q, D


def _identity(A: Array, B: Array, C: Array) -> Pair:
    return C.copy(), np.ones_like(C)


def _erf(A: Array, B: Array, C: Array) -> Pair:
    ratio = 2 * C / np.sqrt((1 + 2 * A) * (1 + 2 * B))
    d = 1 + 2 * (A + B) + 4 * root_determinant(A, B, C) ** 2  # (1 + 2A)(1 + 2B) - 4 C^2
    return 2 / np.pi * np.arcsin(np.clip(ratio, -1.0, 1.0)), 4 / np.pi / np.sqrt(d)


def _exp(A: Array, B: Array, C: Array) -> Pair:
    Q = np.exp((A + B) / 2 + C)
    return Q, Q.copy()


def _gaussian(A: Array, B: Array, C: Array) -> Pair:
    d = 1 + 2 * (A + B) + 4 * root_determinant(A, B, C) ** 2  # (1 + 2A)(1 + 2B) - 4 C^2
    return d**-0.5, 4 * C * d**-1.5


def _sin(A: Array, B: Array, C: Array) -> Pair:
    # exp(-(A+B)/2) sinh C and cosh C: neither a large sinh nor, for small C, a difference of equal numbers.
    plus, decay = np.exp(np.abs(C) - (A + B) / 2), np.exp(-2 * np.abs(C))
    return -np.sign(C) * plus * np.expm1(-2 * np.abs(C)) / 2, plus * (1 + decay) / 2


def _cos(A: Array, B: Array, C: Array) -> Pair:
    Q, D = _sin(A, B, C)
    return D, Q


def _gelu(A: Array, B: Array, C: Array) -> Pair:
    det = root_determinant(A, B, C) ** 2
    d = 1 + A + B + det  # (1 + A)(1 + B) - C^2
    F = 1 / (2 * np.pi * np.sqrt(d))  # E[phi(u) phi(v)]
    ratio = C / np.sqrt((1 + A) * (1 + B))
    Ph = 0.25 + np.arcsin(np.clip(ratio, -1.0, 1.0)) / (2 * np.pi)  # E[Phi(u) Phi(v)]
    a, b = 1 / (1 + A), 1 / (1 + B)
    return C * Ph + F * (det + C * C * (a + b)), Ph + C * F * (a + b + 1 / d)


_CLOSED_FORM: dict[str, Callable[[Array, Array, Array], Pair]] = {
    "identity": _identity,
    "erf": _erf,
    "exp": _exp,
    "gaussian": _gaussian,
    "sin": _sin,
    "cos": _cos,
    "gelu": _gelu,
}

_CLOSED_FORM_MEAN: dict[str, Callable[[Array], Array]] = {
    "erf": np.zeros_like,
    "exp": lambda A: np.exp(A / 2),
    "gaussian": lambda A: 1 / np.sqrt(1 + 2 * A),
    "sin": np.zeros_like,
    "cos": lambda A: np.exp(-A / 2),
    "gelu": lambda A: A / np.sqrt(2 * np.pi * (1 + A)),
    "tanh": np.zeros_like,
}


def expectations(activation: str | Activation, A: ArrayLike, B: ArrayLike, C: ArrayLike) -> Pair:
    """Q = E[s(u) s(v)] and D = E[s'(u) s'(v)] for Var u = A, Var v = B, Cov(u, v) = C.

    relu, leaky_relu, abs: arc-cosine kernels (Cho and Saul, 2009); erf: Williams (1997); softplus, silu, tanh
    and functions of the user: trapezoidal rule in whitened coordinates.

    Parameters
    ----------
    activation : str or Activation
    A, B, C : array_like
        Broadcast against each other. ``A, B >= 0`` and ``C**2 <= A B`` up to rounding.

    Returns
    -------
    Q, D : ndarray
        Of the broadcast shape. Finite for zero variances.

    Examples
    --------
    >>> from ntkfast import reference
    >>> Q, D = reference.expectations("relu", 1.0, 1.0, [1.0, 0.0, -1.0])
    >>> Q.round(4), D
    (array([0.5   , 0.1592, 0.    ]), array([0.5 , 0.25, 0.  ]))
    """
    act = as_activation(activation)
    A, B, C = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (A, B, C)))
    if act.function is None and act.name in _CLOSED_FORM:
        return _CLOSED_FORM[act.name](A, B, C)
    if act.homogeneous:
        return _piecewise_linear(act.slope, A, B, C)
    return quadrature.pair_expectations(act, A, B, C)


def mean(activation: str | Activation, A: ArrayLike) -> Array:
    """mu = E[s(u)] for u ~ N(0, A), entrywise.

    Examples
    --------
    >>> from ntkfast import reference
    >>> reference.mean("relu", [0.0, 1.0]).round(4)
    array([0.    , 0.3989])
    """
    act = as_activation(activation)
    A = np.asarray(A, dtype=np.float64)
    if act.homogeneous:
        return (1 - act.slope) * np.sqrt(A / (2 * np.pi))
    if act.function is None and act.name in _CLOSED_FORM_MEAN:
        result: Array = _CLOSED_FORM_MEAN[act.name](A)
        return result
    return quadrature.mean(act, A)


def second_moment(activation: str | Activation) -> float:
    """E[s(z)^2], z ~ N(0, 1).

    Examples
    --------
    >>> from ntkfast import reference
    >>> reference.second_moment("relu")
    0.5
    """
    one: Any = np.ones(1)
    return float(expectations(activation, one, one, one)[0][0])


def c_sigma(activation: str | Activation) -> float:
    """The normalising constant 1 / E[s(z)^2] of Du et al. (arXiv 1811.03804): 2 for ReLU.

    Examples
    --------
    >>> from ntkfast import reference
    >>> reference.c_sigma("relu")
    2.0
    """
    return 1 / second_moment(activation)

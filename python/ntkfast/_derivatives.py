"""Activations of finite networks: s, s' and s'' on arrays.

Written with NumPy functions that hand other arrays on to their own library (``__array_function__``), so that they take
CuPy's arrays as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._cuda.device import erf as erf_on_device
from ntkfast.activation import Activation

Array = NDArray[Any]
Elementwise = Callable[[Array], Any]


_HOST_ONLY = (
    "activation {name!r} does not take arrays on a GPU ({reason}); write it with NumPy's or CuPy's array functions, "
    "or keep the network in host memory (device=None)"
)


class Derivatives(NamedTuple):
    """s, s' and s''; the last two are ``None`` where there is no such function."""

    value: Elementwise
    first: Elementwise | None
    second: Elementwise | None


def _erf(z: Any) -> Any:
    if not isinstance(z, np.ndarray):
        return erf_on_device(z)
    return np.asarray(_core.erf(z)).astype(z.dtype, copy=False)


def _bell(z: Array) -> Any:
    """Derivative of erf."""
    return 2 / math.sqrt(math.pi) * np.exp(-z * z)


def _normal(z: Array) -> tuple[Array, Array]:
    """Distribution and density of a standard normal variable."""
    return 0.5 * (1 + _erf(z * math.sqrt(0.5))), np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_first(z: Array) -> Any:
    below, density = _normal(z)
    return below + z * density


def _sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))  # never overflows, and keeps the digits of small values
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e))


def _silu_first(z: Array) -> Any:
    return _sigmoid(z) * (1 + z * _sigmoid(-z))


def _silu_second(z: Array) -> Any:
    up, down = _sigmoid(z), _sigmoid(-z)
    return up * down * (2 + z * (down - up))


def _tanh_first(z: Array) -> Any:
    e = np.exp(-2 * np.abs(z))
    return 4 * e / (1 + e) ** 2


_SMOOTH: dict[str, Derivatives] = {
    "erf": Derivatives(_erf, _bell, lambda z: -2 * z * _bell(z)),
    "gelu": Derivatives(lambda z: z * _normal(z)[0], _gelu_first, lambda z: (2 - z * z) * _normal(z)[1]),
    "silu": Derivatives(lambda z: z * _sigmoid(z), _silu_first, _silu_second),
    "softplus": Derivatives(lambda z: np.logaddexp(z.dtype.type(0), z), _sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z)),
    "tanh": Derivatives(np.tanh, _tanh_first, lambda z: -2 * np.tanh(z) * _tanh_first(z)),
    "sin": Derivatives(np.sin, np.cos, lambda z: -np.sin(z)),
    "cos": Derivatives(np.cos, lambda z: -np.sin(z), lambda z: -np.cos(z)),
    "exp": Derivatives(np.exp, np.exp, np.exp),
    "gaussian": Derivatives(
        lambda z: np.exp(-z * z), lambda z: -2 * z * np.exp(-z * z), lambda z: (4 * z * z - 2) * np.exp(-z * z)
    ),
    "identity": Derivatives(lambda z: z, np.ones_like, np.zeros_like),
}


def _kinked(slope: float) -> Derivatives:
    """x for x > 0, slope x for x < 0. At 0 the derivative is that of the left side, but 0 for abs."""
    if slope == -1.0:
        return Derivatives(np.abs, np.sign, None)
    if slope == 0.0:
        return Derivatives(lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype), None)
    return Derivatives(
        lambda z: np.where(z > 0, z, z.dtype.type(slope) * z),
        lambda z: np.where(z > 0, np.ones_like(z), np.full_like(z, slope)),
        None,
    )


def _of_user(function: Any, name: str) -> Elementwise:
    """A function of float64 arrays, for arrays of any precision."""

    def call(z: Any) -> Any:
        host = isinstance(z, np.ndarray)
        values = np.asarray(function(z.astype(np.float64, copy=False))) if host else on_device(z)
        if values.shape != z.shape:
            raise ValueError(f"activation {name!r} must return an array of the shape it was given")
        return values.astype(z.dtype, copy=False)

    def on_device(z: Any) -> Any:
        try:
            values = function(z.astype(np.float64, copy=False))
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise TypeError(_HOST_ONLY.format(name=name, reason=f"{type(error).__name__}: {error}")) from error
        if type(values) is not type(z):
            raise TypeError(_HOST_ONLY.format(name=name, reason=f"it returned {type(values).__name__}"))
        return values

    return call


def derivatives(activation: Activation) -> Derivatives:
    """s, s', s'' of an activation."""
    if activation.function is not None:
        name, first = activation.name, activation.derivative
        return Derivatives(_of_user(activation.function, name), None if first is None else _of_user(first, name), None)
    if activation.homogeneous and activation.slope != 1.0:
        return _kinked(activation.slope)
    return _SMOOTH["identity" if activation.homogeneous else activation.name]

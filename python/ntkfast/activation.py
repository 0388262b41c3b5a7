"""Activations: names, parameters, and functions given by the user."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Function = Callable[[NDArray[np.float64]], Any]

HOMOGENEOUS = ("relu", "leaky_relu", "abs", "identity")
CLOSED_FORM = ("erf", "gelu", "sin", "cos", "exp", "gaussian")
EXPANDED = ("silu", "softplus", "tanh")
NAMES = (
    "relu", "leaky_relu", "abs", "erf", "gelu", "silu", "softplus", "tanh", "sin", "cos", "exp", "gaussian",
    "identity",
)  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """An activation s: one of the names below, or any function of the user.

    Use the names directly (``"relu"``), :meth:`leaky_relu` for another slope, and
    :meth:`from_function` for anything else.

    Attributes
    ----------
    name : str
        relu, leaky_relu, abs, erf, gelu, silu, softplus, tanh, sin, cos, exp,
        gaussian (exp(-x^2)), identity, or the name given to ``from_function``.
    slope : float
        s(x) = slope * x for x < 0; only for the positively homogeneous activations
        (relu 0, leaky_relu 0.01 unless given, abs -1, identity 1).

    Raises
    ------
    ValueError
        If the name is unknown; the message lists the legal ones.

    Examples
    --------
    >>> import ntkfast as nf
    >>> nf.Activation("gelu")
    Activation('gelu')
    >>> nf.Activation.leaky_relu(0.2)
    Activation.leaky_relu(0.2)
    """

    name: str
    slope: float = field(default=math.nan, kw_only=True)
    function: Function | None = field(default=None, kw_only=True)
    derivative: Function | None = field(default=None, kw_only=True)
    tolerance: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.function is None and self.name not in NAMES:
            raise ValueError(f"unknown activation {self.name!r}; use one of {', '.join(NAMES)}, "
                             "or Activation.from_function(f)")  # fmt: skip
        # 2.0 stands for "no slope"; NaN would make an instance differ from itself.
        fixed = {"relu": 0.0, "abs": -1.0, "identity": 1.0}.get(self.name, 2.0)
        slope = self.slope
        if self.function is None and self.name == "leaky_relu":
            slope = 0.01 if math.isnan(slope) else slope
            if not math.isfinite(slope):
                raise ValueError(f"slope must be finite, got {slope}")
        else:
            fixed = 2.0 if self.function is not None else fixed
            if not math.isnan(slope) and slope != fixed:
                raise ValueError(f"{self.name!r} has no slope; use Activation.leaky_relu({slope})")
            slope = fixed
        object.__setattr__(self, "slope", float(slope))
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie in (0, 1), got {self.tolerance}")

    @classmethod
    def leaky_relu(cls, slope: float) -> Activation:
        """x for x > 0 and ``slope * x`` for x < 0; any finite slope (0 is ReLU, -1 is abs)."""
        if math.isnan(slope):
            raise ValueError(f"slope must be finite, got {slope}")
        return cls("leaky_relu", slope=slope)

    @classmethod
    def from_function(
        cls,
        f: Function,
        derivative: Function | None = None,
        name: str | None = None,
        *,
        tolerance: float | None = None,
    ) -> Activation:
        """An activation from any vectorised callable, through its Hermite expansion.

        Parameters
        ----------
        f : callable
            Takes and returns a float64 array (NumPy ufunc, numba ``@vectorize``, ...). It should be
            smooth: kinks make the expansion so long that :func:`ntkfast.gram` refuses it.
        derivative : callable, optional
            f'. If given, the expansion is checked against it (and :mod:`ntkfast.reference` uses it).
        name : str, optional
            Name shown in ``repr``; the name of the function if it has one.
        tolerance : float, optional
            Relative tolerance of the expansion; 1e-12 for float64, 1e-7 for float32 unless given.

        Examples
        --------
        >>> import numpy as np, ntkfast as nf
        >>> act = nf.Activation.from_function(np.arctan, name="arctan")
        >>> K = nf.gram(nf.fully_connected(2, act), np.eye(3))
        """
        if not callable(f):
            raise TypeError(f"from_function needs a callable, got {type(f).__name__}")
        label = name if name is not None else getattr(f, "__name__", type(f).__name__)
        return cls(str(label), function=f, derivative=derivative, tolerance=tolerance)

    def with_tolerance(self, tolerance: float) -> Activation:
        """The same activation with another relative tolerance of its Hermite expansion."""
        return Activation(self.name, slope=self.slope, function=self.function,
                          derivative=self.derivative, tolerance=float(tolerance))  # fmt: skip

    @property
    def homogeneous(self) -> bool:
        """True if s(a x) = a s(x) for a > 0 (relu, leaky_relu, abs, identity)."""
        return self.function is None and self.name in HOMOGENEOUS

    @property
    def expanded(self) -> bool:
        """True if the kernels use a Hermite expansion instead of a closed form."""
        return self.function is not None or self.name in EXPANDED

    def __repr__(self) -> str:
        tail = "" if self.tolerance is None else f".with_tolerance({self.tolerance:g})"
        if self.function is not None:
            return f"Activation.from_function({self.name}){tail}"
        if self.name == "leaky_relu":
            return f"Activation.leaky_relu({self.slope!r}){tail}"
        return f"Activation({self.name!r}){tail}"


def as_activation(activation: str | Activation) -> Activation:
    """Turn a name into an :class:`Activation`; reject anything else."""
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        return Activation(activation)
    raise TypeError(f"activation must be a name or an Activation, got {type(activation).__name__}")

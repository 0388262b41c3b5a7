"""Layers, and the numbers the kernels are computed from.

A layer is ten numbers (MATH.md of the project's design, section 9; here in :class:`Coefficients`).
Symbols: x^(h) features, s activation, W, V standard normal matrices, beta standard normal biases, m width,
z = sqrt(weight_variance) W x + sqrt(bias_variance) beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from ntkfast.activation import Activation, as_activation

# Coefficients are made in float (NumPy reference) or Decimal (40 digits, for the compiled kernels).
Number = Callable[[float], Any]


def _sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Decimal) else math.sqrt(x)


class Coefficients(NamedTuple):
    """The numbers of one layer, S, b, Theta being covariance, mean and tangent kernel of its input:

    Lam    = cw S + cb
    S'     = p^2 S + p q (outer(b, mu) + outer(mu, b)) + r Q[Lam] + vb
    b'     = p b + q mu
    Theta' = p^2 Theta + r (D[Lam] (cw Theta + w cw S + wb cb) + v Q[Lam]) + vvb vb
    """

    p: Any  #: skip amplitude, signed
    q: Any  #: amplitude of the branch mean, signed
    r: Any  #: branch variance
    cw: Any  #: inner weight variance
    cb: Any  #: inner bias variance
    w: Any  #: factor of the Gram of W (0 if frozen)
    wb: Any  #: factor of the Gram of the inner bias (0 if frozen)
    v: Any  #: factor of the Gram of V (0 if absent or frozen)
    vb: Any  #: outer bias variance
    vvb: Any  #: factor of the Gram of the outer bias (0 if frozen)
    w_all: Any  #: the factor w if W is counted as trained (``last_hidden``)


def variance(name: str, value: float, *, positive: bool = False) -> float:
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {value}")
    return value


def finite(name: str, value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _set(layer: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(layer, name, value)


def _gain(layer: Any, number: Number) -> Any:
    """The gain of a layer; ``None`` means c_sigma = 1 / E[s(z)^2]."""
    if layer.gain is not None:
        return number(layer.gain)
    return c_sigma(layer.activation, number)


def c_sigma(activation: Activation, number: Number = float) -> Any:
    """The normalising constant 1 / E[s(z)^2], z ~ N(0, 1); 2 for ReLU."""
    if activation.homogeneous:
        e = number(activation.slope)
        return number(2.0) / (1 + e * e)
    from ntkfast import _hermite  # imported on use: needs the compiled module

    return number(1.0 / _hermite.second_moment(activation))


@dataclass(frozen=True)
class Dense:
    """x' = sqrt(gain/m) s(z). ``gain=None`` means c_sigma, the constant that keeps unit variances.

    Examples
    --------
    >>> import ntkfast as nf
    >>> nf.Network([nf.Dense("erf", bias_variance=0.1)] * 3)
    Network([3 * Dense(Activation('erf'), bias_variance=0.1)], Readout())
    """

    activation: Activation
    gain: float | None = field(default=None, kw_only=True)
    weight_variance: float = field(default=1.0, kw_only=True)
    bias_variance: float = field(default=0.0, kw_only=True)
    trained: bool = field(default=True, kw_only=True)

    def __init__(
        self,
        activation: str | Activation = "relu",
        *,
        gain: float | None = None,
        weight_variance: float = 1.0,
        bias_variance: float = 0.0,
        trained: bool = True,
    ) -> None:
        _set(self, activation=as_activation(activation),
             gain=None if gain is None else variance("gain", gain, positive=True),
             weight_variance=variance("weight_variance", weight_variance),
             bias_variance=variance("bias_variance", bias_variance), trained=bool(trained))  # fmt: skip

    def coefficients(self, number: Number = float) -> Coefficients:
        """The ten numbers of the layer."""
        gain, t = _gain(self, number), number(float(self.trained))
        return Coefficients(p=number(0.0), q=_sqrt(gain), r=gain, cw=number(self.weight_variance),
                            cb=number(self.bias_variance), w=t, wb=t, v=number(0.0), vb=number(0.0),
                            vvb=number(0.0), w_all=number(1.0))  # fmt: skip

    slices = property(lambda self: ("w",) if self.trained else ())


@dataclass(frozen=True)
class Residual:
    """x' = skip x + (scale/sqrt m) s(z); no gain. ``scale`` and ``skip`` may be negative.

    Examples
    --------
    >>> import ntkfast as nf
    >>> nf.Residual("relu", scale=0.5, skip=-1.0)
    Residual(Activation('relu'), scale=0.5, skip=-1.0)
    """

    activation: Activation
    scale: float = field(kw_only=True)
    skip: float = field(default=1.0, kw_only=True)
    weight_variance: float = field(default=1.0, kw_only=True)
    bias_variance: float = field(default=0.0, kw_only=True)
    trained: bool = field(default=True, kw_only=True)

    def __init__(
        self,
        activation: str | Activation = "relu",
        *,
        scale: float,
        skip: float = 1.0,
        weight_variance: float = 1.0,
        bias_variance: float = 0.0,
        trained: bool = True,
    ) -> None:
        _set(self, activation=as_activation(activation), scale=finite("scale", scale),
             skip=finite("skip", skip), weight_variance=variance("weight_variance", weight_variance),
             bias_variance=variance("bias_variance", bias_variance), trained=bool(trained))  # fmt: skip

    def coefficients(self, number: Number = float) -> Coefficients:
        """The ten numbers of the layer."""
        scale, t = number(self.scale), number(float(self.trained))
        return Coefficients(p=number(self.skip), q=scale, r=scale * scale, cw=number(self.weight_variance),
                            cb=number(self.bias_variance), w=t, wb=t, v=number(0.0), vb=number(0.0),
                            vvb=number(0.0), w_all=number(1.0))  # fmt: skip

    slices = property(lambda self: ("w",) if self.trained else ())


@dataclass(frozen=True)
class Bottleneck:
    """x' = skip x + (scale/sqrt m) (V h + sqrt(outer_bias_variance) beta'), h = sqrt(gain/m) s(z).

    ``trained`` covers W, V and both biases.

    Examples
    --------
    >>> import ntkfast as nf
    >>> nf.Network([nf.Bottleneck("relu", scale=0.1)]).slices
    ('1.W', '1.V', 'readout')
    """

    activation: Activation
    scale: float = field(kw_only=True)
    gain: float | None = field(default=None, kw_only=True)
    skip: float = field(default=1.0, kw_only=True)
    weight_variance: float = field(default=1.0, kw_only=True)
    bias_variance: float = field(default=0.0, kw_only=True)
    outer_bias_variance: float = field(default=0.0, kw_only=True)
    trained: bool = field(default=True, kw_only=True)

    def __init__(
        self,
        activation: str | Activation = "relu",
        *,
        scale: float,
        gain: float | None = None,
        skip: float = 1.0,
        weight_variance: float = 1.0,
        bias_variance: float = 0.0,
        outer_bias_variance: float = 0.0,
        trained: bool = True,
    ) -> None:
        _set(self, activation=as_activation(activation), scale=finite("scale", scale),
             gain=None if gain is None else variance("gain", gain, positive=True),
             skip=finite("skip", skip), weight_variance=variance("weight_variance", weight_variance),
             bias_variance=variance("bias_variance", bias_variance),
             outer_bias_variance=variance("outer_bias_variance", outer_bias_variance),
             trained=bool(trained))  # fmt: skip

    def coefficients(self, number: Number = float) -> Coefficients:
        """The ten numbers of the layer."""
        scale, t = number(self.scale), number(float(self.trained))
        return Coefficients(p=number(self.skip), q=number(0.0), r=_gain(self, number) * scale * scale,
                            cw=number(self.weight_variance), cb=number(self.bias_variance), w=t, wb=t, v=t,
                            vb=scale * scale * number(self.outer_bias_variance), vvb=t,
                            w_all=number(1.0))  # fmt: skip

    slices = property(lambda self: ("w", "v") if self.trained else ())


@dataclass(frozen=True)
class Linear:
    """x' = (sqrt(weight_variance) W x + sqrt(bias_variance) beta)/sqrt m.

    Examples
    --------
    >>> import ntkfast as nf
    >>> nf.Linear(trained=False)
    Linear(trained=False)
    """

    weight_variance: float = field(default=1.0, kw_only=True)
    bias_variance: float = field(default=0.0, kw_only=True)
    trained: bool = field(default=True, kw_only=True)
    activation: Activation = field(default=Activation("identity"), init=False, repr=False)

    def __post_init__(self) -> None:
        _set(self, weight_variance=variance("weight_variance", self.weight_variance),
             bias_variance=variance("bias_variance", self.bias_variance),
             trained=bool(self.trained))  # fmt: skip

    def coefficients(self, number: Number = float) -> Coefficients:
        """The ten numbers of the layer."""
        t = number(float(self.trained))
        return Coefficients(p=number(0.0), q=number(0.0), r=number(1.0), cw=number(self.weight_variance),
                            cb=number(self.bias_variance), w=t, wb=t, v=number(0.0), vb=number(0.0),
                            vvb=number(0.0), w_all=number(1.0))  # fmt: skip

    slices = property(lambda self: ("w",) if self.trained else ())


@dataclass(frozen=True)
class HalvedLayer:
    """One layer of :func:`fixed_readout_resnet`: weights N(0, 2/m), kernels divided by m.

    ``skip=0`` for the first and the last layer; ``width_ratio`` is m_{L+1}/m of the last.
    """

    theta: float
    skip: float = 0.0
    width_ratio: float = 1.0
    activation: Activation = field(default=Activation("relu"), init=False, repr=False)

    def coefficients(self, number: Number = float) -> Coefficients:
        """The ten numbers of the layer (w = 1/2 because W = sqrt(2/m) times a standard normal matrix)."""
        theta, zero = number(self.theta), number(0.0)
        w = number(0.5) * number(self.width_ratio)
        return Coefficients(p=number(self.skip), q=_sqrt(number(2.0)) * theta, r=2 * theta * theta,
                            cw=number(1.0), cb=zero, w=w, wb=zero, v=zero, vb=zero, vvb=zero,
                            w_all=w)  # fmt: skip

    slices = ("w",)


@dataclass(frozen=True)
class Readout:
    """f = sqrt(weight_variance) a . x + sqrt(bias_variance) beta.

    Examples
    --------
    >>> import ntkfast as nf
    >>> nf.Readout(bias_variance=0.05)
    Readout(bias_variance=0.05)
    """

    weight_variance: float = field(default=1.0, kw_only=True)
    bias_variance: float = field(default=0.0, kw_only=True)
    trained: bool = field(default=True, kw_only=True)

    #: the covariance of f is S minus the product of the means (fixed +-1 readout with zero sum)
    centred = False

    def __post_init__(self) -> None:
        _set(self, weight_variance=variance("weight_variance", self.weight_variance),
             bias_variance=variance("bias_variance", self.bias_variance),
             trained=bool(self.trained))  # fmt: skip


@dataclass(frozen=True)
class SignReadout(Readout):
    """Fixed readout with entries +1 and -1, half each (:func:`fixed_readout_resnet`)."""

    trained: bool = field(default=False, init=False)
    weight_variance: float = field(default=1.0, init=False)
    bias_variance: float = field(default=0.0, init=False)
    centred = True


Layer = Dense | Residual | Bottleneck | Linear | HalvedLayer


def show(item: Any) -> str:
    """``repr`` without the fields that have their default value."""
    shown: list[str] = []
    for name, f in item.__dataclass_fields__.items():
        value = getattr(item, name)
        if not f.repr or not f.init or value == f.default:
            continue
        shown.append(repr(value) if not shown and not f.kw_only else f"{name}={value!r}")
    return f"{type(item).__name__}({', '.join(shown)})"


for _layer in (Dense, Residual, Bottleneck, Linear, HalvedLayer, Readout, SignReadout):
    _layer.__repr__ = show  # type: ignore[method-assign]

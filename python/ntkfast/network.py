"""Networks as descriptions: layers, builders, and the numbers the kernels are computed from.

A layer is ten numbers (MATH.md of the project's design, section 9; here in :class:`Coefficients`).
Symbols: x^(h) features, s activation, W, V standard normal matrices, beta standard normal biases, m width,
z = sqrt(weight_variance) W x + sqrt(bias_variance) beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import groupby
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


def _variance(name: str, value: float, *, positive: bool = False) -> float:
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {value}")
    return value


def _finite(name: str, value: float) -> float:
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
    """x' = sqrt(gain/m) s(z). ``gain=None`` means c_sigma, the constant that keeps unit variances."""

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
             gain=None if gain is None else _variance("gain", gain, positive=True),
             weight_variance=_variance("weight_variance", weight_variance),
             bias_variance=_variance("bias_variance", bias_variance), trained=bool(trained))  # fmt: skip

    def coefficients(self, number: Number = float) -> Coefficients:
        """The ten numbers of the layer."""
        gain, t = _gain(self, number), number(float(self.trained))
        return Coefficients(p=number(0.0), q=_sqrt(gain), r=gain, cw=number(self.weight_variance),
                            cb=number(self.bias_variance), w=t, wb=t, v=number(0.0), vb=number(0.0),
                            vvb=number(0.0), w_all=number(1.0))  # fmt: skip

    slices = property(lambda self: ("w",) if self.trained else ())


@dataclass(frozen=True)
class Residual:
    """x' = skip x + (scale/sqrt m) s(z); no gain. ``scale`` and ``skip`` may be negative."""

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
        _set(self, activation=as_activation(activation), scale=_finite("scale", scale),
             skip=_finite("skip", skip), weight_variance=_variance("weight_variance", weight_variance),
             bias_variance=_variance("bias_variance", bias_variance), trained=bool(trained))  # fmt: skip

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
        _set(self, activation=as_activation(activation), scale=_finite("scale", scale),
             gain=None if gain is None else _variance("gain", gain, positive=True),
             skip=_finite("skip", skip), weight_variance=_variance("weight_variance", weight_variance),
             bias_variance=_variance("bias_variance", bias_variance),
             outer_bias_variance=_variance("outer_bias_variance", outer_bias_variance),
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
    """x' = (sqrt(weight_variance) W x + sqrt(bias_variance) beta)/sqrt m."""

    weight_variance: float = field(default=1.0, kw_only=True)
    bias_variance: float = field(default=0.0, kw_only=True)
    trained: bool = field(default=True, kw_only=True)
    activation: Activation = field(default=Activation("identity"), init=False, repr=False)

    def __post_init__(self) -> None:
        _set(self, weight_variance=_variance("weight_variance", self.weight_variance),
             bias_variance=_variance("bias_variance", self.bias_variance),
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
    """f = sqrt(weight_variance) a . x + sqrt(bias_variance) beta."""

    weight_variance: float = field(default=1.0, kw_only=True)
    bias_variance: float = field(default=0.0, kw_only=True)
    trained: bool = field(default=True, kw_only=True)

    #: the covariance of f is S minus the product of the means (fixed +-1 readout with zero sum)
    centred = False

    def __post_init__(self) -> None:
        _set(self, weight_variance=_variance("weight_variance", self.weight_variance),
             bias_variance=_variance("bias_variance", self.bias_variance),
             trained=bool(self.trained))  # fmt: skip


@dataclass(frozen=True)
class SignReadout(Readout):
    """Fixed readout with entries +1 and -1, half each (:func:`fixed_readout_resnet`)."""

    trained: bool = field(default=False, init=False)
    weight_variance: float = field(default=1.0, init=False)
    bias_variance: float = field(default=0.0, init=False)
    centred = True


Layer = Dense | Residual | Bottleneck | Linear | HalvedLayer


@dataclass(frozen=True)
class Network:
    """Any list of layers with a readout: a frozen, hashable, printable description.

    Parameters
    ----------
    layers : iterable of Dense, Residual, Bottleneck, Linear
        From the input to the output. If the first one has ``skip != 0`` a fixed ``Linear(trained=False)``
        stands in front of it; the kernels are the same.
    readout : Readout

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> net = nf.Network([nf.Dense("relu", bias_variance=0.1)] * 2, nf.Readout(bias_variance=0.1))
    >>> net
    Network([2 * Dense(Activation('relu'), bias_variance=0.1)], Readout(bias_variance=0.1))
    >>> net(np.eye(2)).shape
    (2, 2)
    """

    layers: tuple[Layer, ...]
    readout: Readout = field(default=Readout())

    def __init__(self, layers: Iterable[Layer], readout: Readout | None = None) -> None:
        if isinstance(layers, Layer):
            raise TypeError("layers must be a list of layers, not one layer")
        layers = tuple(layers)
        for k, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layer {k} is {type(layer).__name__}, not Dense, Residual, Bottleneck or Linear")
        if not layers:
            raise ValueError("a network needs at least one layer")
        readout = Readout() if readout is None else readout
        if not isinstance(readout, Readout):
            raise TypeError(f"readout is {type(readout).__name__}, not Readout")
        _set(self, layers=layers, readout=readout, _hash=hash((layers, readout)))

    def __reduce__(self) -> tuple[Any, ...]:
        # The stored hash holds for one process: hashes of strings are salted.
        return (Network, (self.layers, self.readout))

    def __hash__(self) -> int:
        # Hashing a thousand layers takes longer than looking up their compiled plan.
        return int(self._hash)  # type: ignore[attr-defined]

    @property
    def depth(self) -> int:
        """Number of layers before the readout."""
        return len(self.layers)

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the slices of :func:`ntkfast.layer_grams`, in order."""
        names = [f"{h}.{'W' if s == 'w' else 'V'}" for h, layer in enumerate(self.layers, 1) for s in layer.slices]
        return (*names, "readout") if self.readout.trained else tuple(names)

    def __call__(self, X: Any, Y: Any = None) -> Any:
        """The neural tangent kernel: ``gram(net, X, Y)``, so that ``SVC(kernel=net)`` works."""
        from ntkfast.gram import gram

        return gram(self, X, Y)

    def plan(self, X: Any) -> str:
        """A short text: which path will compute ``gram(net, X)``, why, how many bytes, how long."""
        from ntkfast.gram import plan

        return plan(self, X)

    def __repr__(self) -> str:
        parts = []
        for layer, group in groupby(self.layers):
            count = len(list(group))
            parts.append(_show(layer) if count == 1 else f"{count} * {_show(layer)}")
        return f"Network([{', '.join(parts)}], {_show(self.readout)})"


def _show(item: Any) -> str:
    """``repr`` without the fields that have their default value."""
    shown: list[str] = []
    for name, f in item.__dataclass_fields__.items():
        value = getattr(item, name)
        if not f.repr or not f.init or value == f.default:
            continue
        shown.append(repr(value) if not shown and not f.kw_only else f"{name}={value!r}")
    return f"{type(item).__name__}({', '.join(shown)})"


for _layer in (Dense, Residual, Bottleneck, Linear, HalvedLayer, Readout, SignReadout):
    _layer.__repr__ = _show  # type: ignore[method-assign]


def _depth(depth: int) -> int:
    if isinstance(depth, bool) or int(depth) != depth:
        raise TypeError(f"depth must be an integer, got {depth!r}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return int(depth)


def fully_connected(
    depth: int,
    activation: str | Activation = "relu",
    *,
    gain: float | None = None,
    weight_variance: float = 1.0,
    bias_variance: float = 0.0,
    readout_trained: bool = True,
) -> Network:
    """The fully connected network of Du et al. (arXiv 1811.03804, section 5, Definition 5.1).

    x^(h) = sqrt(gain/m) s(z^(h)), h = 1..depth, f = a . x^(depth).

    Parameters
    ----------
    depth : int
        The paper's H: number of hidden layers, at least 1.
    activation : str or Activation
    gain : float, optional
        ``None`` means c_sigma = 1/E[s(z)^2], which keeps unit-norm inputs at unit variance (2 for ReLU).
    weight_variance, bias_variance : float
        Of every hidden layer, the first included; never of the readout.
    readout_trained : bool
        ``False`` gives the feed-forward network of Huang et al. (arXiv 2002.06262).

    Raises
    ------
    ValueError
        ``depth < 1``, unknown activation, negative variance.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> nf.gram(nf.fully_connected(depth=1), np.eye(2)).round(4)
    array([[2.    , 0.3183],
           [0.3183, 2.    ]])
    """
    layer = Dense(activation, gain=gain, weight_variance=weight_variance, bias_variance=bias_variance)
    return Network([layer] * _depth(depth), Readout(trained=readout_trained))


def resnet(
    depth: int, activation: str | Activation = "relu", *, c_res: float = 1.0, readout_trained: bool = True
) -> Network:
    """The residual network of Du et al. (arXiv 1811.03804, section 6), one matrix per block.

    x^(1) = sqrt(c_sigma/m) s(W x), x^(h) = x^(h-1) + (c_res/(H sqrt m)) s(W x^(h-1)), h = 2..H = depth;
    also the network of the neural tangent hierarchy (arXiv 2007.03714). The branch has a mean, which the
    kernels carry.

    Raises
    ------
    ValueError
        ``depth < 1``, unknown activation, ``c_res`` not finite.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> nf.gram(nf.resnet(depth=50), np.eye(2)).round(3)
    array([[5.137, 1.735],
           [1.735, 5.137]])
    """
    depth = _depth(depth)
    block = Residual(activation, scale=_finite("c_res", c_res) / depth)
    return Network([Dense(activation), *[block] * (depth - 1)], Readout(trained=readout_trained))


def bottleneck_resnet(
    depth: int,
    activation: str | Activation = "relu",
    *,
    alpha: float | None = None,
    first_trained: bool = False,
    readout_trained: bool = False,
) -> Network:
    """The residual network of Huang et al. (arXiv 2002.06262, equation (3)), two matrices per block.

    x^(0) = A x/sqrt m, x^(l) = x^(l-1) + (alpha/sqrt m) V sqrt(c_sigma/m) s(W x^(l-1)), l = 1..depth.

    Parameters
    ----------
    depth : int
        Number of blocks, at least 1.
    alpha : float, optional
        ``None`` means 1/depth.
    first_trained : bool
        Train A; its Gram then comes first in ``layer_grams``.
    readout_trained : bool

    Raises
    ------
    ValueError
        ``depth < 1``, unknown activation, ``alpha`` not finite.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> nf.gram(nf.bottleneck_resnet(depth=100), np.eye(2), normalize=True).round(4)
    array([[1.    , 0.1599],
           [0.1599, 1.    ]])
    """
    depth = _depth(depth)
    block = Bottleneck(activation, scale=1.0 / depth if alpha is None else _finite("alpha", alpha))
    first = [Linear()] if first_trained else []
    return Network([*first, *[block] * depth], Readout(trained=readout_trained))


def fixed_readout_resnet(depth: int, *, theta: float | None = None, last_width_ratio: float = 1.0) -> Network:
    """The ReLU network of Frei, Cao, Gu (arXiv 1910.02934): +-1 readout, weights N(0, 2/m_l).

    x_1 = s(W_1^T x), x_l = x_{l-1} + theta s(W_l^T x_{l-1}) (l = 2..depth), x_{L+1} = s(W_{L+1}^T x_L): depth + 1
    matrices. Kernels are divided by m = m_L.

    Parameters
    ----------
    depth : int
        The paper's L, at least 1.
    theta : float, optional
        ``None`` means 1/depth.
    last_width_ratio : float
        m_{L+1}/m, positive.

    Raises
    ------
    ValueError
        ``depth < 1``, ``theta`` not finite, ``last_width_ratio`` not positive.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> len(nf.fixed_readout_resnet(depth=4).layers)
    5
    """
    depth = _depth(depth)
    theta = 1.0 / depth if theta is None else _finite("theta", theta)
    ratio = _variance("last_width_ratio", last_width_ratio, positive=True)
    blocks = [HalvedLayer(theta, skip=1.0)] * (depth - 1)
    return Network([HalvedLayer(1.0), *blocks, HalvedLayer(1.0, width_ratio=ratio)], SignReadout())

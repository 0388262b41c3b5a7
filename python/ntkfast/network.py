"""Networks as descriptions: lists of layers, and the builders of the papers' networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ntkfast.activation import Activation
from ntkfast.layers import (
    Bottleneck,
    Dense,
    HalvedLayer,
    Layer,
    Linear,
    Readout,
    Residual,
    SignReadout,
    finite,
    show,
    variance,
)


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
        for name, value in (("layers", layers), ("readout", readout), ("_hash", hash((layers, readout)))):
            object.__setattr__(self, name, value)

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
        from ntkfast._explain import plan

        return plan(self, X)

    def __repr__(self) -> str:
        parts = []
        for layer, group in groupby(self.layers):
            count = len(list(group))
            parts.append(show(layer) if count == 1 else f"{count} * {show(layer)}")
        return f"Network([{', '.join(parts)}], {show(self.readout)})"


def _depth(depth: int) -> int:
    try:
        whole = not isinstance(depth, bool) and int(depth) == depth
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise TypeError(f"depth must be an integer of at least 1, got {depth!r}")
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
    array([[2.729, 1.024],
           [1.024, 2.729]])
    """
    depth = _depth(depth)
    block = Residual(activation, scale=finite("c_res", c_res) / depth)
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
    array([[1.    , 0.1595],
           [0.1595, 1.    ]])
    """
    depth = _depth(depth)
    block = Bottleneck(activation, scale=1.0 / depth if alpha is None else finite("alpha", alpha))
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
    theta = 1.0 / depth if theta is None else finite("theta", theta)
    ratio = variance("last_width_ratio", last_width_ratio, positive=True)
    blocks = [HalvedLayer(theta, skip=1.0)] * (depth - 1)
    return Network([HalvedLayer(1.0), *blocks, HalvedLayer(1.0, width_ratio=ratio)], SignReadout())

"""Convolutional networks as descriptions: one window for all layers, a readout over the positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ntkfast.activation import Activation
from ntkfast.layers import Dense, Readout, Residual, finite, show
from ntkfast.network import _depth

PADDINGS = ("zeros", "circular")
POOLINGS = ("flatten", "gap")


def _window(window: Any) -> int | tuple[int, ...]:
    sizes = window if isinstance(window, (tuple, list)) else (window,)
    for size in sizes:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"window must be an odd integer or one per image axis, got {window!r}")
        if int(size) < 1 or int(size) % 2 == 0:
            raise ValueError(f"window must be odd and positive, got {window!r}")
    if not isinstance(window, (tuple, list)):
        return int(window)
    if len(sizes) not in (1, 2):
        raise ValueError(f"window has {len(sizes)} sizes; images have one or two axes")
    return tuple(int(size) for size in sizes)


def _one_of(name: str, value: Any, legal: tuple[str, ...]) -> str:
    if value not in legal:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(legal)}")
    return str(value)


@dataclass(frozen=True)
class ConvNetwork:
    """Layers of weights shared by all positions of an image: a frozen, hashable, printable description.

    Every layer sees, at each position, the window of its input around it (stride 1, as many positions as before);
    ``Dense`` and ``Residual`` are then those of :class:`Network`, with this window in the place of x. Made by
    :func:`conv_resnet` and :func:`conv_net`.

    Parameters
    ----------
    layers : iterable of Dense, Residual
        The first one has no skip (the channels of the image are not those of the network).
    window : int or tuple of int
        Odd, one for all image axes or one per axis.
    padding : "zeros" or "circular"
        What a window sees outside the image.
    average : bool
        ``True``: weights divided by the square root of the number of slots of the window (Arora et al.); ``False``: not
        (Du et al.).
    pooling : "flatten" or "gap"
        f = sum_l <a_l, x_l> with independent a_l, or f = <a, mean of the x_l>.
    readout : Readout
        Without a bias.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> net = nf.ConvNetwork([nf.Dense("relu")] * 2, window=3, pooling="gap")
    >>> net
    ConvNetwork([2 * Dense(Activation('relu'))], pooling='gap')
    >>> net(np.ones((2, 8, 8, 3))).shape
    (2, 2)
    """

    layers: tuple[Dense | Residual, ...]
    window: int | tuple[int, ...] = field(default=3, kw_only=True)
    padding: str = field(default="zeros", kw_only=True)
    average: bool = field(default=True, kw_only=True)
    pooling: str = field(default="flatten", kw_only=True)
    readout: Readout = field(default=Readout(), kw_only=True)

    def __init__(
        self,
        layers: Iterable[Dense | Residual],
        *,
        window: int | tuple[int, ...] = 3,
        padding: str = "zeros",
        average: bool = True,
        pooling: str = "flatten",
        readout: Readout | None = None,
    ) -> None:
        layers = tuple(layers)
        for k, layer in enumerate(layers):
            if not isinstance(layer, (Dense, Residual)):
                raise TypeError(f"layer {k} is {type(layer).__name__}; a ConvNetwork takes Dense and Residual")
        if not layers:
            raise ValueError("a network needs at least one layer")
        if isinstance(layers[0], Residual) and layers[0].skip != 0:
            raise ValueError("the first layer of a ConvNetwork must not have a skip: begin with Dense")
        readout = Readout() if readout is None else readout
        if type(readout) is not Readout or readout.bias_variance != 0:
            raise ValueError("the readout of a ConvNetwork is a Readout without bias")
        values = {
            "layers": layers,
            "window": _window(window),
            "padding": _one_of("padding", padding, PADDINGS),
            "average": bool(average),
            "pooling": _one_of("pooling", pooling, POOLINGS),
            "readout": readout,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def depth(self) -> int:
        """Number of layers before the readout."""
        return len(self.layers)

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the slices of :func:`ntkfast.layer_grams`, in order."""
        names = [f"{h}.W" for h, layer in enumerate(self.layers, 1) if layer.trained]
        return (*names, "readout") if self.readout.trained else tuple(names)

    def windows(self, axes: int) -> tuple[int, ...]:
        """The window size of every image axis."""
        sizes = self.window if isinstance(self.window, tuple) else (self.window,) * axes
        if len(sizes) != axes:
            raise ValueError(f"window={self.window} has {len(sizes)} sizes, the images have {axes} axes")
        return sizes

    def __call__(self, X: Any, Y: Any = None) -> Any:
        """The neural tangent kernel: ``gram(net, X, Y)``."""
        from ntkfast.gram import gram

        return gram(self, X, Y)

    def plan(self, X: Any) -> str:
        """A short text: which path will compute ``gram(net, X)``, why, how many bytes, how long."""
        from ntkfast._explain import plan_images

        return plan_images(self, X)

    def __repr__(self) -> str:
        parts = []
        for layer, group in groupby(self.layers):
            count = len(list(group))
            parts.append(show(layer) if count == 1 else f"{count} * {show(layer)}")
        defaults = {"window": 3, "padding": "zeros", "average": True, "pooling": "flatten", "readout": Readout()}
        rest = [f", {k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        return f"ConvNetwork([{', '.join(parts)}]{''.join(rest)})"


def conv_resnet(
    depth: int,
    activation: str | Activation = "relu",
    *,
    c_res: float = 1.0,
    window: int | tuple[int, ...] = 3,
    padding: str = "zeros",
    readout: str = "flatten",
    readout_trained: bool = True,
) -> ConvNetwork:
    """The convolutional residual network of Du et al. (arXiv 1811.03804, section 7, Definition 7.1).

    x^(1) = sqrt(c_sigma/m) s(W phi(x)), x^(h) = x^(h-1) + (c_res/(H sqrt m)) s(W phi(x^(h-1))), h = 2..H = depth, where
    phi puts the window around a position into one column; windows are summed, not averaged. Covariances are those the
    network has: patches are summed in every layer, the skip adds what has not been summed, and the branch has a mean
    at every position.

    Parameters
    ----------
    depth : int
        The paper's H, at least 1.
    activation : str or Activation
    c_res : float
    window : int or tuple of int
        Odd; one size for all image axes or one per axis.
    padding : "zeros" or "circular"
    readout : "flatten" or "gap"
        f = <a, x^(H)> over all positions, or over their mean (global average pooling).
    readout_trained : bool

    Raises
    ------
    ValueError
        ``depth < 1``, even window, unknown activation, padding or readout, ``c_res`` not finite.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> nf.gram(nf.conv_resnet(depth=2), np.ones((1, 4, 4, 1))).round(2)
    array([[512.01]])
    """
    depth = _depth(depth)
    block = Residual(activation, scale=finite("c_res", c_res) / depth)
    return ConvNetwork(
        [Dense(activation), *[block] * (depth - 1)],
        window=window,
        padding=padding,
        average=False,
        pooling=_one_of("readout", readout, POOLINGS),
        readout=Readout(trained=readout_trained),
    )


def conv_net(
    depth: int,
    activation: str | Activation = "relu",
    *,
    gain: float | None = None,
    weight_variance: float = 1.0,
    bias_variance: float = 0.0,
    window: int | tuple[int, ...] = 3,
    padding: str = "zeros",
    readout: str = "flatten",
    first_trained: bool = True,
    readout_trained: bool = True,
) -> ConvNetwork:
    """The convolutional network of Arora et al. (arXiv 1904.11955, section 4).

    z^(h) = sqrt(weight_variance/q) W phi(x^(h-1)) + sqrt(bias_variance) beta, x^(h) = sqrt(gain/m) s(z^(h)),
    h = 1..depth;
    q the number of slots of the window (it stays q at the border), beta shared by the positions.

    Parameters
    ----------
    depth : int
        Number of convolutions, at least 1.
    activation : str or Activation
    gain : float, optional
        ``None`` means c_sigma = 1/E[s(z)^2] (2 for ReLU).
    weight_variance, bias_variance : float
        Of every layer, never of the readout.
    window, padding, readout, readout_trained
        As in :func:`conv_resnet`.
    first_trained : bool
        ``False``: the first layer's weights and biases are fixed.

    Raises
    ------
    ValueError
        ``depth < 1``, even window, unknown activation, padding or readout, negative variance.

    Notes
    -----
    The input is not divided by sqrt(channels), and "flatten" sums over the positions; other libraries divide both.

    Equal patches and near copies keep their digits. So do patches that are multiples of each other (an image and a
    brighter one, flat backgrounds of different brightness) for relu and every slope from -1 to 0 without biases, with
    all layers but the first trained; such pairs take several times as long. Otherwise, and in :func:`conv_resnet`,
    kinked activations lose up to sqrt(c) 1e-8 (float64) or sqrt(c) 2e-4 (float32) of the kernel if all patches are
    multiples by c or 1/c. Images in general position lose about c 1e-16 or c 1e-8 if the norm of one, or of some of its
    pixels, is c times that of the other: scale images whose norms are far apart.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> X = np.ones((2, 8, 8, 3))
    >>> nf.gram(nf.conv_net(depth=3, padding="circular", readout="gap"), X).round(2)
    array([[12., 12.],
           [12., 12.]])
    """
    layer = Dense(activation, gain=gain, weight_variance=weight_variance, bias_variance=bias_variance)
    first = Dense(activation, gain=gain, weight_variance=weight_variance, bias_variance=bias_variance,
                  trained=first_trained)  # fmt: skip
    return ConvNetwork(
        [first, *[layer] * (_depth(depth) - 1)],
        window=window,
        padding=padding,
        pooling=_one_of("readout", readout, POOLINGS),
        readout=Readout(trained=readout_trained),
    )

"""Tangent kernels of finite networks, tile by tile, and how far they are from those of infinite width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._arrays import as_numpy, available_memory, result_dtype
from ntkfast._contract import Factor, contraction, in_tiles, sample_tiles
from ntkfast._cuda.gram import Backend
from ntkfast._overflow import quiet
from ntkfast._products import on_host, weight_gradients
from ntkfast.convolution import ConvNetwork
from ntkfast.finite import FiniteNetwork, here, init
from ntkfast.gram import gram, layer_grams
from ntkfast.jacobian import allocate, fill
from ntkfast.network import Network

Array = NDArray[Any]

#: Bytes of the factors of samples whose weight gradients are kept: made and consumed in cache.
_BATCH = 8 << 20
#: The same on a GPU. Not measured.
_DEVICE_BATCH = 256 << 20
#: Bytes of factors kept at once unless the caller says otherwise (less on machines with little memory free).
KEPT = 2 << 30


@dataclass(frozen=True)
class _Kept:
    """What is kept of every layer: its factors or, instead, the weight gradients of its samples.

    Gradients where they are smaller and the contraction takes them anyway: where the positions of an image are many and
    the weights few. Tiles of samples are then larger, and gradients are not made again for every tile.
    """

    network: FiniteNetwork
    gradients: tuple[bool, ...]

    @classmethod
    def of(cls, network: FiniteNetwork, n: int, m: int | None) -> _Kept:
        def chosen(p: int, a: int, d: int) -> bool:
            way = contraction(n, n if m is None else m, (p, p), a, d, network.dtype.itemsize, symmetric=m is None)
            return way == "gradients" and a * d + 1 <= p * (a + d)

        return cls(network, tuple(chosen(*shape) for shape in network.shapes))

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(positions, columns of the inputs, columns of the deltas); gradients are inputs of one position."""
        shapes = self.network.shapes
        return [(1, a * d, 1) if own else (p, a, d) for own, (p, a, d) in zip(self.gradients, shapes, strict=True)]

    @property
    def bytes_per_sample(self) -> int:
        return sum(p * (a + d) for p, a, d in self.shapes) * self.network.dtype.itemsize

    def factors(self, x: Array) -> list[Factor]:
        """Of checked samples; some at a time where gradients are made of the factors."""
        if not any(self.gradients):
            return self.network.factors(x)
        n = len(x)
        made = [
            Factor(np.empty_like(x, shape=(n * p, a)), np.ones_like(x, shape=(n * p, d)), p) for p, a, d in self.shapes
        ]
        step = max(1, (_BATCH if on_host(x) else _DEVICE_BATCH) // self.network.bytes_per_sample)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            for own, kept, factor in zip(self.gradients, made, self.network.factors(x[part]), strict=True):
                to = kept.part(part)
                if own:
                    weight_gradients(factor, to.inputs)
                else:
                    to.inputs[...], to.deltas[...] = factor.inputs, factor.deltas
        return made


def memory_budget(memory: int | None, gpu: Backend | None = None) -> int:
    """Bytes of factors kept at once."""
    if memory is None and gpu is not None:
        return gpu.free_bytes() // 2
    if memory is None:
        free = available_memory()
        return KEPT if free is None else min(KEPT, free // 4)
    if isinstance(memory, bool) or not isinstance(memory, (int, np.integer)) or memory < 1:
        raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
    return int(memory)


def empirical_ntk(
    network: FiniteNetwork, X: Any, Y: Any = None, *, per_layer: bool = False, out: Any = None,
    memory: int | None = None, progress: bool = False, data_format: str = "channels_last",
) -> Any:  # fmt: skip
    """Tangent kernel <df/dw(x), df/dw(y)> of a finite network, without its n x parameters Jacobian.

    Parameters
    ----------
    network : FiniteNetwork
        From :func:`init`. (For a ``torch.nn.Module``: :func:`ntkfast.torch.empirical_ntk`.)
    X, Y : array, shape (n, d) and (m, d), or images (n, *grid, channels) and (m, *grid, channels)
        Of the network's dtype, on its device or in host memory. ``Y=None`` means X: half the work, an exactly symmetric
        result.
    per_layer : bool
        One matrix per trained weight matrix, as :func:`layer_grams`, instead of their sum.
    out : array, optional
        Where the result goes, e.g. a ``numpy.memmap``.
    memory : int, optional
        Bytes for layer inputs and output gradients; 2 GiB, or a quarter of what is free, unless given (on a GPU half of
        what is free). If those of all samples fit they are computed once. Otherwise tiles of samples with half of it
        each: the tile of rows is kept while the tiles of columns are computed again beside it, which costs about
        width / (samples of a tile) times the work of the products. Of a convolution with many positions and few
        weights, the weight gradients of the samples of a tile are kept instead.
    progress : bool
        Show a progress bar for every tile.
    data_format : "channels_last" or "channels_first"
        Of images.

    Returns
    -------
    array, shape (n, m), or (P, n, m)
        Converges to :func:`gram` (:func:`layer_grams`) of ``network.net`` as the width grows; for
        :func:`fixed_readout_resnet` it is divided by m.

    Raises
    ------
    TypeError, ValueError
        Wrong kind of network, shapes or dtypes, entries not finite.
    OverflowError
        The kernel, or a product on the way to it, leaves the range of the dtype: names row, or row and column. Use
        float64, or smaller points. A given ``out`` may be filled in part.
    OutOfMemoryError
        The result does not fit in memory.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> network = nf.init(nf.bottleneck_resnet(depth=2), 3, width=64, seed=0)
    >>> X = np.eye(3)
    >>> K = nf.empirical_ntk(network, X)
    >>> bool(np.allclose(K, nf.jacobian_gram(network.jacobian_factors(X))))
    True
    """
    if not isinstance(network, FiniteNetwork):
        raise TypeError(f"network must be a FiniteNetwork from init(...), got {type(network).__name__}; "
                        "for PyTorch modules there is ntkfast.torch.empirical_ntk")  # fmt: skip
    gpu = network.backend(X=X, Y=Y)
    with here(gpu), quiet():
        x, wrap = network.points(X, "X", data_format, gpu)
        y = None if Y is None else network.points(Y, "Y", data_format, gpu)[0]
        n, m = len(x), None if y is None else len(y)
        shape = (n, n if m is None else m)
        whole = (len(network.net.slices), *shape) if per_layer else shape
        result = allocate(gpu, out, whole, network.dtype, [x] if y is None else [x, y])
        _fill(network, gpu, result, x, y, memory_budget(memory, gpu), per_layer=per_layer, progress=progress)
        return wrap(result) if out is None else out


def _fill(
    network: FiniteNetwork, gpu: Backend | None, result: Any, x: Array, y: Array | None, budget: int, *,
    per_layer: bool, progress: bool,
) -> None:  # fmt: skip
    """The kernel from factors that are kept, or made tile by tile."""
    n, m = len(x), None if y is None else len(y)
    kept = _Kept.of(network, n, m)
    size = kept.bytes_per_sample
    rows = sample_tiles(n, m, size, budget)
    if not network.net.slices:
        result[...] = 0
    elif rows is None:
        right = None if y is None else kept.factors(y)
        fill(gpu, result, kept.factors(x), right, per_layer=per_layer, progress=progress)
    else:
        cols = None if m is None else sample_tiles(m, n, size, budget)
        other = x if y is None else y
        in_tiles(partial(fill, gpu), lambda part, left: kept.factors((x if left else other)[part]), result, rows, cols,
                 per_layer=per_layer, progress=progress)  # fmt: skip


@dataclass(frozen=True)
class WidthCheck:
    """Gaps |empirical - infinite| / |infinite| (Frobenius norms) from :func:`check_against_network`.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> check = nf.check_against_network(nf.fully_connected(depth=1), np.eye(3), width=[64, 256], seeds=3)
    >>> check.total.shape, check.layers.shape, check.names
    ((2, 3), (2, 3, 2), ('1.W', 'readout'))
    """

    widths: tuple[int, ...]
    names: tuple[str, ...]  #: of the layers, :attr:`Network.slices`
    total: NDArray[np.float64]  #: (widths, seeds) gap of the tangent kernel
    layers: NDArray[np.float64]  #: (widths, seeds, layers) gap of each Gram matrix; no layers where there are none
    bias: NDArray[np.float64]  #: (widths,) gap of the kernel averaged over the seeds; falls faster

    @property
    def expected(self) -> NDArray[np.float64]:
        """The line c / sqrt(width), (widths,), c from all measured gaps."""
        root = np.sqrt(np.array(self.widths, dtype=np.float64))
        line: NDArray[np.float64] = np.sqrt(np.mean(self._rms() ** 2 * root**2)) / root
        return line

    def _rms(self) -> NDArray[np.float64]:
        rms: NDArray[np.float64] = np.sqrt(np.mean(self.total**2, axis=1))
        return rms

    def __str__(self) -> str:
        lines = [
            f"{'width':>7}  {'gap':>8}  {'c/sqrt(m)':>9}  {'of mean':>8}  " + "  ".join(f"{n:>8}" for n in self.names)
        ]
        layers = np.sqrt(np.mean(self.layers**2, axis=1))
        for k, width in enumerate(self.widths):
            numbers = [self._rms()[k], self.expected[k], self.bias[k], *layers[k]]
            sizes = (8, 9, 8, *[8] * len(self.names))
            lines.append(f"{width:>7}  " + "  ".join(f"{v:>{s}.4f}" for v, s in zip(numbers, sizes, strict=True)))
        return "\n".join(lines)


def _infinite(net: Network | ConvNetwork, X: Array, data_format: str) -> tuple[Array, Array]:
    """The tangent kernel, and its slices where :func:`layer_grams` has them."""
    if isinstance(net, ConvNetwork) and net.pooling == "gap":
        return np.asarray(gram(net, X, data_format=data_format)), np.empty((0, len(X), len(X)))
    slices = np.asarray(layer_grams(net, X, data_format=data_format))
    return slices.sum(axis=0), slices


def check_against_network(
    net: Network | ConvNetwork, X: Any, width: int | Iterable[int], seeds: int | Iterable[Any] = 5, *,
    device: Any = None, data_format: str = "channels_last",
) -> WidthCheck:  # fmt: skip
    """Sample finite networks and report how far their tangent kernels are from those of infinite width.

    Parameters
    ----------
    net : Network or ConvNetwork
    X : array, shape (n, d), or images (n, *grid, channels)
    width : int or several
    seeds : int or several
        Number of networks per width, or their seeds.
    device : None, "cpu" or a CUDA device
        Of the finite networks; X is in host memory.
    data_format : "channels_last" or "channels_first"
        Of images.

    Returns
    -------
    WidthCheck
        Relative gaps, total and per layer, with the line c / sqrt(width) that they should follow; ``print`` it. With
        readout "gap" the total only.

    Raises
    ------
    The errors of :func:`init` and :func:`gram`; ValueError without widths, seeds or trained layers.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> X = np.random.default_rng(0).normal(size=(4, 3))
    >>> check = nf.check_against_network(nf.resnet(depth=2), X, width=[100, 1600], seeds=4)
    >>> bool(check.total[1].mean() < check.total[0].mean())
    True
    """
    if not isinstance(net, (Network, ConvNetwork)):
        raise TypeError(f"net must be a Network or ConvNetwork (resnet, conv_net, ...), got {type(net).__name__}")
    widths = (width,) if isinstance(width, (int, np.integer)) else tuple(width)
    chosen = list(range(seeds)) if isinstance(seeds, (int, np.integer)) else list(seeds)
    if not widths or not chosen:
        raise ValueError("check_against_network needs at least one width and one seed")
    if not net.slices:
        raise ValueError("nothing is trained in this network: its tangent kernel is 0 at any width")
    X = as_numpy(X, "X")[0]
    result_dtype(None, ("X", X))
    X = X.astype(np.float64, copy=False)
    wanted, slices = _infinite(net, X, data_format)
    if data_format == "channels_first":
        X = np.moveaxis(X, 1, -1)
    total, layers, bias = [], [], []
    for m in widths:
        grams = [
            empirical_ntk(init(net, X.shape[1:], m, seed=seed, device=device), X, per_layer=True) for seed in chosen
        ]
        total.append([_gap(g.sum(axis=0), wanted) for g in grams])
        layers.append([[_gap(g[h], own) for h, own in enumerate(slices)] for g in grams])
        bias.append(_gap(np.mean(grams, axis=0).sum(axis=0), wanted))
    names = net.slices[: len(slices)]
    return WidthCheck(tuple(int(m) for m in widths), names, np.array(total), np.array(layers), np.array(bias))


def _gap(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted|; 0 if both vanish."""
    size, gap = float(np.linalg.norm(wanted)), float(np.linalg.norm(found - wanted))
    if size == 0.0:
        return 0.0 if gap == 0.0 else float("inf")
    return gap / size

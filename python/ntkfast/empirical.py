"""Tangent kernels of finite networks, tile by tile, and how far they are from those of infinite width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._arrays import available_memory
from ntkfast._contract import Factor, fill, in_tiles, sample_tiles
from ntkfast.finite import FiniteNetwork, init
from ntkfast.gram import layer_grams
from ntkfast.jacobian import result_array
from ntkfast.network import Network

Array = NDArray[Any]

#: Bytes of factors kept at once unless the caller says otherwise (less on machines with little memory free).
KEPT = 2 << 30


def _factors(network: FiniteNetwork, x: Array) -> list[Factor]:
    return [Factor(a, d, 1) for a, d in network.factors(x)]


def memory_budget(memory: int | None) -> int:
    """Bytes of factors kept at once."""
    if memory is None:
        free = available_memory()
        return KEPT if free is None else min(KEPT, free // 4)
    if isinstance(memory, bool) or not isinstance(memory, (int, np.integer)) or memory < 1:
        raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
    return int(memory)


def empirical_ntk(
    network: FiniteNetwork, X: Any, Y: Any = None, *, per_layer: bool = False, out: Any = None,
    memory: int | None = None, progress: bool = False,
) -> Any:  # fmt: skip
    """Tangent kernel <df/dw(x), df/dw(y)> of a finite network, without its n x parameters Jacobian.

    Parameters
    ----------
    network : FiniteNetwork
        From :func:`init`. (For a ``torch.nn.Module``: :func:`ntkfast.torch.empirical_ntk`.)
    X, Y : array, shape (n, d) and (m, d)
        Of the network's dtype. ``Y=None`` means X: half the work, an exactly symmetric result.
    per_layer : bool
        One matrix per trained weight matrix, as :func:`layer_grams`, instead of their sum.
    out : array, optional
        Where the result goes, e.g. a ``numpy.memmap``.
    memory : int, optional
        Bytes for layer inputs and output gradients; 2 GiB, or a quarter of what is free, unless given. If those of all
        samples fit they are computed once. Otherwise tiles of samples with half of it each: the tile of rows is kept
        while the tiles of columns are computed again beside it, which costs about width / (samples of a tile) times
        the work of the products.
    progress : bool
        Show a progress bar for every tile.

    Returns
    -------
    array, shape (n, m), or (P, n, m)
        Converges to :func:`gram` (:func:`layer_grams`) of ``network.net`` as the width grows; for
        :func:`fixed_readout_resnet` it is divided by m.

    Raises
    ------
    TypeError, ValueError
        Wrong kind of network, shapes or dtypes, entries not finite.
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
    x, wrap = network.points(X, "X")
    y = None if Y is None else network.points(Y, "Y")[0]
    budget = memory_budget(memory)
    layers = len(network.net.slices)
    shape = (len(x), len(x) if y is None else len(y))
    inputs = [x] if y is None else [x, y]
    result = result_array(out, (layers, *shape) if per_layer else shape, network.dtype, inputs)
    rows = sample_tiles(len(x), None if y is None else len(y), network.bytes_per_sample, budget)
    if layers == 0:
        result[...] = 0
    elif rows is None:
        left = _factors(network, x)
        fill(result, left, None if y is None else _factors(network, y), per_layer=per_layer, progress=progress)
    else:
        size = network.bytes_per_sample
        cols = None if y is None else sample_tiles(len(y), len(x), size, budget)
        other = x if y is None else y
        in_tiles(fill, lambda part, left: _factors(network, (x if left else other)[part]), result, rows, cols,
                 per_layer=per_layer, progress=progress)  # fmt: skip
    return result if out is not None else wrap(result)


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
    layers: NDArray[np.float64]  #: (widths, seeds, layers) gap of each Gram matrix
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


def check_against_network(
    net: Network, X: Any, width: int | Iterable[int], seeds: int | Iterable[Any] = 5
) -> WidthCheck:
    """Sample finite networks and report how far their tangent kernels are from those of infinite width.

    Parameters
    ----------
    net : Network
    X : array, shape (n, d)
    width : int or several
    seeds : int or several
        Number of networks per width, or their seeds.

    Returns
    -------
    WidthCheck
        Relative gaps, total and per layer, with the line c / sqrt(width) that they should follow; ``print`` it.

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
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network (fully_connected, resnet, ...), got {type(net).__name__}")
    widths = (width,) if isinstance(width, (int, np.integer)) else tuple(width)
    chosen = list(range(seeds)) if isinstance(seeds, (int, np.integer)) else list(seeds)
    if not widths or not chosen:
        raise ValueError("check_against_network needs at least one width and one seed")
    if not net.slices:
        raise ValueError("nothing is trained in this network: its tangent kernel is 0 at any width")
    X = np.asarray(X, dtype=np.float64)
    wanted = np.asarray(layer_grams(net, X))
    total, layers, bias = [], [], []
    for m in widths:
        grams = [empirical_ntk(init(net, X.shape[1], m, seed=seed), X, per_layer=True) for seed in chosen]
        total.append([_gap(g.sum(axis=0), wanted.sum(axis=0)) for g in grams])
        layers.append([[_gap(g[h], wanted[h]) for h in range(len(wanted))] for g in grams])
        bias.append(_gap(np.mean(grams, axis=0).sum(axis=0), wanted.sum(axis=0)))
    return WidthCheck(tuple(int(m) for m in widths), net.slices, np.array(total), np.array(layers), np.array(bias))


def _gap(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted|; 0 if both vanish."""
    size, gap = float(np.linalg.norm(wanted)), float(np.linalg.norm(found - wanted))
    if size == 0.0:
        return 0.0 if gap == 0.0 else float("inf")
    return gap / size

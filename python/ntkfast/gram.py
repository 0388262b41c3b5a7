"""Gram matrices of infinitely wide networks: the public functions."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _conv
from ntkfast._cuda.gram import Output, Slices
from ntkfast._images import dense_format
from ntkfast._plan import mix_of
from ntkfast._problem import Problem, factors, run_tiles
from ntkfast._table import Path
from ntkfast._tiles import Tile
from ntkfast.convolution import ConvNetwork
from ntkfast.network import Network

Array = NDArray[Any]
Vector = NDArray[np.float64]

KINDS = ("ntk", "nngp", "last_hidden")


def _check_kinds(get: Any) -> tuple[str, ...]:
    kinds = (get,) if isinstance(get, str) else tuple(get) if isinstance(get, (tuple, list)) else ()
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"get={kind!r} is unknown; use one of {', '.join(KINDS)}, or a tuple of them")
    if not kinds or len(set(kinds)) != len(kinds):
        raise ValueError(f"get={get!r}: use one of {', '.join(KINDS)}, or a tuple of different ones")
    return kinds


def _dense_sums(accumulate: str | None) -> None:
    if accumulate is not None:
        raise ValueError(f"accumulate={accumulate!r} is for inner products of rows: convolutional networks have none")


def gram(
    net: Network | ConvNetwork,
    X: Any,
    Y: Any = None,
    *,
    get: str | tuple[str, ...] = "ntk",
    normalize: bool = False,
    device: Any = None,
    dtype: Any = None,
    accumulate: str | None = None,
    out: Any = None,
    progress: bool = False,
    data_format: str = "channels_last",
) -> Any:
    """Gram matrix of an infinitely wide network.

    Parameters
    ----------
    net : Network or ConvNetwork
        From :func:`fully_connected`, :func:`resnet`, :func:`bottleneck_resnet`, :func:`fixed_readout_resnet` or
        :class:`Network`; from :func:`conv_net`, :func:`conv_resnet` or :class:`ConvNetwork`.
    X : array, shape (n, d), or images (n, *grid, channels) with one or two grid axes
        Points: NumPy or anything with DLPack or the buffer protocol. float32 gives float32, float64
        float64; integers and booleans become float64. Zero rows are legal. Arrays on a GPU (CuPy, torch, JAX) are
        taken without a copy; everything then runs on that GPU, on the current stream of the library they come from.
    Y : array, shape (m, d), optional
        Other points. ``None`` means X: half the work, an exactly symmetric result, an exact diagonal.
    get : str or tuple of str
        ``"ntk"``: tangent kernel; ``"nngp"``: covariance of the output at initialisation; ``"last_hidden"``: Gram of
        the last inner matrix (K_def of Du et al.). A tuple gives a named tuple of matrices.
    normalize : bool
        K_ij / sqrt(K_ii K_jj) (0 where the diagonal is 0), from a scaled recursion that does not overflow with depth.
    device : None, "cpu", "cuda", "cuda:1" or a list of CUDA devices, optional
        ``None`` follows the arrays. A GPU takes arrays in host memory tile by tile, whatever their number, and gives
        host arrays back; several GPUs share the tiles. Needs the extra ``cuda13`` or ``cuda12``. Inner products of
        float32 rows are true float32, never TF32.
    dtype : float32 or float64, optional
        Of arithmetic and result.
    accumulate : None or "float64"
        ``"float64"``: inner products of float32 rows are added up in float64 and correlations formed there, so
        that their error no longer grows with d; up to twice the time of the products. CPU only.
    out : array (or tuple of arrays), optional
        Where the result goes; anything with slice assignment, e.g. ``numpy.memmap``, also if X is on a GPU; or arrays
        on the GPU of X with contiguous rows. Filled tile by tile.
    progress : bool
        Show a progress bar (tqdm if installed).
    data_format : "channels_last" or "channels_first"
        Of images.

    Returns
    -------
    array, shape (n, m), or named tuple of such
        Of the kind and dtype of X, where X is.

    Raises
    ------
    RuntimeError
        ``device`` is a GPU and CuPy, the driver or the GPU is missing; the sentence says which.
    TypeError
        dtype that is not real (float16 and complex included), X and Y of different dtypes.
    ValueError
        Wrong shape, entries not finite (names the first bad row), unknown ``get``, ``accumulate`` or ``device``, arrays
        on different devices or not on ``device``; a Hermite expansion that does not reach its tolerance.
    OverflowError
        The result does not fit in its dtype; ``normalize=True`` may.
    OutOfMemoryError
        The result does not fit in memory (before anything is allocated).

    Notes
    -----
    Formulas: Du et al. (arXiv 1811.03804) sections 5 and 6, Huang et al. (2002.06262) equation (3), Frei, Cao, Gu
    (1910.02934); :mod:`ntkfast.reference` repeats them line by line. Angles between close and between opposite points
    come from differences and sums. If all pairs are close that costs about two (float32: five)
    more products X X^T.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> X = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 0.0]])
    >>> nf.gram(nf.fully_connected(depth=2), X).round(4)
    array([[3.    , 1.5444, 0.    ],
           [1.5444, 3.    , 0.    ],
           [0.    , 0.    , 0.    ]])
    >>> ntk, nngp = nf.gram(nf.resnet(depth=3, activation="erf"), X, get=("ntk", "nngp"))
    """
    kinds = _check_kinds(get)
    if isinstance(net, ConvNetwork):
        _dense_sums(accumulate)
        images = _conv.Problem(net, X, Y, dtype, device, data_format)
        return _results(images, _conv.gram(images, kinds, normalize, out, progress), out, get, kinds)
    dense_format(data_format)
    problem = Problem(net, X, Y, dtype, device, accumulate)
    mixes = [mix_of(net, kind) for kind in kinds]
    path = problem.path(mixes)
    tables = path.tables or (None,) * len(kinds)
    wanted = list(zip(kinds, mixes, tables, strict=True))
    left = [factors(problem, k, mix, problem.x, "X", normalize, table) for k, mix, table in wanted]
    right = left
    if not problem.symmetric:
        right = [factors(problem, k, mix, problem.y, "Y", normalize, table) for k, mix, table in wanted]
    outs = problem.allocate(out, problem.shape, kinds)
    if problem.gpu is not None:
        exact = problem.symmetric and normalize
        problem.gpu.run(problem, outs, [
            Output(mix.as_list(), f, g, h, k, diagonal if exact else None, table)
            for mix, (f, h, diagonal), (g, k, _), table in zip(mixes, left, right, tables, strict=True)
        ], None, progress)  # fmt: skip
        return _results(problem, outs, out, get, kinds)

    def outputs(tile: Tile, rows: slice, views: list[Array], mirrors: list[Array | None]) -> tuple[list[Any], Any]:
        sides = zip(views, mirrors, mixes, left, right, tables, strict=True)
        return [
            (view, mirror, mix.as_list(), f[rows], g[tile.cols], h[rows], k[tile.cols], table)
            for view, mirror, mix, (f, h, _), (g, k, _), table in sides
        ], None

    run_tiles(problem, outs, outputs, problem.nanoseconds(path), progress)
    if problem.symmetric and normalize:
        for array, (_, _, diagonal) in zip(outs, left, strict=True):
            _set_diagonal(array, diagonal)
    return _results(problem, outs, out, get, kinds)


def _results(problem: Problem | _conv.Problem, outs: list[Any], out: Any, get: Any, kinds: tuple[str, ...]) -> Any:
    """Results of the kind that came in, or what was given as out=."""
    given = list(out) if isinstance(out, (tuple, list)) else [out]
    results = given if out is not None else [problem.wrap(a) for a in outs]
    return results[0] if isinstance(get, str) else namedtuple("Grams", kinds)(*results)


def _set_diagonal(array: Any, diagonal: Vector) -> None:
    """1 exactly (0 for a kernel that is 0 there), not 1 up to rounding."""
    if isinstance(array, np.ndarray):
        np.fill_diagonal(array, diagonal)
        return
    for k, value in enumerate(diagonal):
        array[k, k] = value


def layer_grams(
    net: Network | ConvNetwork,
    X: Any,
    Y: Any = None,
    *,
    device: Any = None,
    dtype: Any = None,
    accumulate: str | None = None,
    out: Any = None,
    progress: bool = False,
    data_format: str = "channels_last",
) -> Any:
    """One Gram matrix per trained weight matrix; their sum is the NTK.

    Parameters are those of :func:`gram`.

    Returns
    -------
    array, shape (P, n, m)
        In network order (:attr:`Network.slices` names them): every layer's W, after it V (Bottleneck), the readout
        last. A bias is added to the slice of its matrix; every slice includes the readout's variance; frozen
        matrices have none.

    Raises
    ------
    The errors of :func:`gram`.

    Notes
    -----
    G^(1), ..., G^(H+1) of Du et al. (arXiv 1811.03804, sections 5 and 6; MATH.md sections 1, 2, 4, 5).

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> net, X = nf.resnet(depth=3), np.eye(2)
    >>> G = nf.layer_grams(net, X)
    >>> G.shape, net.slices
    ((4, 2, 2), ('1.W', '2.W', '3.W', 'readout'))
    >>> bool(np.allclose(G.sum(axis=0), nf.gram(net, X)))
    True
    """
    if isinstance(net, ConvNetwork):
        _dense_sums(accumulate)
        images = _conv.Problem(net, X, Y, dtype, device, data_format, own=True)
        return _results(images, [_conv.layer_grams(images, out, progress)], out, "", ())
    dense_format(data_format)
    problem = Problem(net, X, Y, dtype, device, accumulate)
    count, readout = len(net.slices), net.readout
    mix = mix_of(net, "ntk")
    left = factors(problem, "ntk", mix, problem.x, "X", False, None)[0] * np.sqrt(readout.weight_variance)
    right = left
    if not problem.symmetric:
        right = factors(problem, "ntk", mix, problem.y, "Y", False, None)[0] * np.sqrt(readout.weight_variance)
    outs = problem.allocate(out, (count, *problem.shape), ["layer_grams"])
    index = count - 1 if readout.trained else -1
    if problem.gpu is not None:
        if count:
            problem.gpu.run(problem, outs, [], Slices(left, right, index, 1.0, readout.bias_variance), progress)
        return _results(problem, outs, out, "", ())

    def outputs(tile: Tile, rows: slice, views: list[Array], mirrors: list[Array | None]) -> tuple[list[Any], Any]:
        return [], (views[0], mirrors[0], left[rows], right[tile.cols], index, 1.0, readout.bias_variance)

    if count:
        run_tiles(problem, outs, outputs, problem.nanoseconds(Path(None, "layer_grams")), progress)
    return _results(problem, outs, out, "", ())


def diagonal(
    net: Network | ConvNetwork, X: Any, *, get: str = "ntk", dtype: Any = None, data_format: str = "channels_last"
) -> Any:
    """The diagonal of :func:`gram` in O(n) time and memory.

    Parameters
    ----------
    net : Network or ConvNetwork
    X : array, shape (n, d), or images
    get : "ntk", "nngp" or "last_hidden"

    Returns
    -------
    array, shape (n,)

    Raises
    ------
    The errors of :func:`gram`.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> nf.diagonal(nf.fully_connected(depth=3), 2 * np.eye(2))
    array([16., 16.])
    """
    if not isinstance(get, str):
        raise ValueError(f"diagonal takes one kind, got get={get!r}; use one of {', '.join(KINDS)}")
    (kind,) = _check_kinds(get)
    if isinstance(net, ConvNetwork):
        images = _conv.Problem(net, X, None, dtype, None, data_format)
        return images.wrap(_conv.diagonal(images, kind))
    dense_format(data_format)
    problem = Problem(net, X, None, dtype, None)
    mix = mix_of(net, kind)
    tables = problem.path([mix]).tables
    values = factors(problem, kind, mix, problem.x, "X", False, tables[0] if tables else None)[2]
    return problem.wrap(values.astype(problem.dtype))

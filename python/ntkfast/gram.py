"""Gram matrices of infinitely wide networks: validate, compile, run the tiles."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._arrays import Points, allocate, as_numpy, as_points, check_matrix, result_dtype
from ntkfast._cuda.device import find_place
from ntkfast._cuda.gram import Backend, Output, Slices
from ntkfast._plan import Compiled, Mix, compile_network, mix_of
from ntkfast._tiles import Job, Tile, product, run, side_of
from ntkfast.network import Network

Array = NDArray[Any]
Vector = NDArray[np.float64]

KINDS = ("ntk", "nngp", "last_hidden")
#: Pairs whose 1 - |rho| is smaller get it from differences. The error of an inner product, about 3 eps, moves the angle
#: theta by 3 eps / theta; at these limits that is 1e-14 (float64) and 2e-6 (float32).
CLOSE = {np.dtype(np.float64): 1e-3, np.dtype(np.float32): 1.0 / 64}


class _Problem:
    """Checked inputs and the compiled network of one call."""

    def __init__(self, net: Network, X: Any, Y: Any, dtype: Any, device: Any) -> None:
        if not isinstance(net, Network):
            raise TypeError(f"net must be a Network (fully_connected, resnet, ...), got {type(net).__name__}")
        place = find_place(device, ("X", X), ("Y", Y))
        self.gpu = None if place is None else Backend(place, X)
        there = self.gpu if place is not None and place.resident else None  # the arrays are on a GPU
        read: Callable[[Any, str], tuple[Any, Callable[[Any], Any]]] = there.view if there else as_numpy
        x, self.wrap = read(X, "X")
        check_matrix(x, "X")
        y = None if Y is None else read(Y, "Y")[0]
        if y is not None:
            check_matrix(y, "Y")
            if x.shape[1] != y.shape[1]:
                raise ValueError(f"X has {x.shape[1]} features and Y has {y.shape[1]}")
        self.dtype = result_dtype(dtype, ("X", x), *([] if y is None else [("Y", y)]))
        self.net = net
        self.shape = (len(x), len(x) if y is None else len(y))
        points = there.points if there else as_points
        self.x = points(x, "X", self.dtype)
        self.y = self.x if y is None else points(y, "Y", self.dtype)
        self.close = CLOSE[self.dtype]
        self.symmetric = y is None
        norms = [self.x.norm] if self.symmetric else [self.x.norm, self.y.norm]
        self.compiled = compile_network(net, norms, self.dtype)

    def allocate(self, out: Any, shape: tuple[int, ...], names: Sequence[str]) -> list[Any]:
        """The given outputs, checked, or new ones where the inputs are."""
        shapes, inputs = [shape] * len(names), [self.x.rows, self.y.rows]
        if self.gpu is not None and out is None and self.gpu.resident:
            return self.gpu.empty(shapes, self.dtype)
        if self.gpu is not None and out is not None:
            out = self.gpu.views(out, inputs)
        return allocate(out, shapes, self.dtype, names, [x for x in inputs if isinstance(x, np.ndarray)])

    @property
    def nanoseconds(self) -> float:
        """Rough time of one pair on all threads, for the length of a call (not for promises)."""
        one = 1.5 * self.compiled.layers + 12.0 * self.compiled.suffix_layers
        return max(1.0, one * (1 if self.compiled.table_bytes == 0 else 4)) / _core.threads()


def _unit(compiled: Compiled, mix: Mix, single: bool) -> float:
    """A result of two equal unit-norm points, before the readout's constant (prefix only)."""
    one = np.ones(1)
    return float(_core.pairs(compiled.core, np.zeros(1), one, one, one, mix.as_list(), single)[0])


def _equal_pairs(compiled: Compiled, mix: Mix, points: Points) -> Vector:
    """The diagonal without constant and scale (networks with a suffix)."""
    n = len(points)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(_core.pairs(compiled.core, np.zeros(n), np.ones(n), points.norm, points.norm, mix.as_list()))


def _scaled(compiled: Compiled, mix: Mix, points: Points, single: bool) -> tuple[Vector, Vector]:
    """(d, f): the diagonal is d f^2 + constant, and K_ij = (..) f_i f_j + constant, unnormalised."""
    with np.errstate(over="ignore"):
        if compiled.prefix_only:
            f = np.ldexp(points.norm * compiled.root, compiled.exponent)
            return np.full(len(points), _unit(compiled, mix, single)), f
        return _equal_pairs(compiled, mix, points), np.full(len(points), np.ldexp(1.0, compiled.exponent))


def _refuse_overflow(values: Vector, name: str, get: str, dtype: np.dtype[Any], hint: str) -> None:
    """`values` is a diagonal; it bounds every entry."""
    bad = ~(np.abs(values) <= float(np.finfo(dtype).max))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        if np.isnan(values[row]):
            raise OverflowError(
                f"the variances of row {row} of {name} leave the range of float64 within the network: scale the "
                "rows, or change the gain or the depth"
            )
        raise OverflowError(f"the {get} of row {row} of {name} does not fit in {dtype}; {hint}")


def _factors(
    problem: _Problem, get: str, mix: Mix, points: Points, name: str, normalize: bool
) -> tuple[Vector, Vector, Vector]:
    """(f, h, diagonal) of one side: K_ij = (..) f_i f_j + h_i h_j."""
    compiled = problem.compiled
    d, f = _scaled(compiled, mix, points, problem.dtype == np.float32)
    root = np.sqrt(mix.constant)
    if not normalize:
        with np.errstate(over="ignore", invalid="ignore"):
            diagonal = (f * d) * f + mix.constant
        _refuse_overflow(diagonal, name, get, problem.dtype, "use normalize=True, smaller rows or dtype=numpy.float64")
        return f, np.full(len(points), root), diagonal
    _refuse_overflow(d, name, get, np.dtype(np.float64), "its variance itself overflows: normalise the rows")
    # K_ii = (sd f)^2 + root^2, but the squares may leave the range where the quotients do not.
    sd = np.sqrt(np.maximum(d, 0.0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        g = np.where(f > 0, root / f, np.inf if root > 0 else 0.0)
        scale = np.where(sd + g > 0, 1 / np.hypot(sd, g), 0.0)
        constant = np.where(g <= sd, g * scale, root / np.hypot(f * sd, root)) if root > 0 else np.zeros(len(points))
    if compiled.prefix_only:
        scale = np.where(points.norm > 0, scale, 0.0)
    return scale, constant, np.where((scale > 0) & (sd > 0) | (constant > 0), 1.0, 0.0)


def _check_kinds(get: Any) -> tuple[str, ...]:
    kinds = (get,) if isinstance(get, str) else tuple(get) if isinstance(get, (tuple, list)) else ()
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"get={kind!r} is unknown; use one of {', '.join(KINDS)}, or a tuple of them")
    if not kinds or len(set(kinds)) != len(kinds):
        raise ValueError(f"get={get!r}: use one of {', '.join(KINDS)}, or a tuple of different ones")
    return kinds


def _epilogue(
    problem: _Problem, outputs: Callable[[Tile, slice, list[Array], list[Array | None]], tuple[list[Any], Any]]
) -> Callable[[Tile, slice, Array, list[Array], list[Array | None]], None]:
    """The one epilogue: inner products, row numbers and close pairs to results, by the compiled kernels."""
    close, core = problem.close, problem.compiled.core

    def epilogue(tile: Tile, part: slice, products: Array, views: list[Array], mirrors: list[Array | None]) -> None:
        rows = slice(tile.rows.start + part.start, tile.rows.start + part.stop)
        results, slices = outputs(tile, rows, views, mirrors)
        # On a tile of the diagonal row i of this part and column i + part.start are one point.
        diagonal = -part.start if tile.diagonal else None
        _core.tile(core, products, problem.x.tile(rows), problem.y.tile(tile.cols), diagonal, close, results, slices)

    return epilogue


def gram(
    net: Network,
    X: Any,
    Y: Any = None,
    *,
    get: str | tuple[str, ...] = "ntk",
    normalize: bool = False,
    device: Any = None,
    dtype: Any = None,
    out: Any = None,
    progress: bool = False,
) -> Any:
    """Gram matrix of an infinitely wide network.

    Parameters
    ----------
    net : Network
        From :func:`fully_connected`, :func:`resnet`, :func:`bottleneck_resnet`, :func:`fixed_readout_resnet` or
        :class:`Network`.
    X : array, shape (n, d)
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
    out : array (or tuple of arrays), optional
        Where the result goes; anything with slice assignment, e.g. ``numpy.memmap``, also if X is on a GPU; or arrays
        on the GPU of X with contiguous rows. Filled tile by tile.
    progress : bool
        Show a progress bar (tqdm if installed).

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
        Wrong shape, entries not finite (names the first bad row), unknown ``get`` or ``device``, arrays on different
        devices or not on ``device``; a Hermite expansion that does not reach its tolerance.
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
    problem = _Problem(net, X, Y, dtype, device)
    mixes = [mix_of(net, kind) for kind in kinds]
    left = [_factors(problem, k, mix, problem.x, "X", normalize) for k, mix in zip(kinds, mixes, strict=True)]
    right = left
    if not problem.symmetric:
        right = [_factors(problem, k, mix, problem.y, "Y", normalize) for k, mix in zip(kinds, mixes, strict=True)]
    outs = problem.allocate(out, problem.shape, kinds)
    if problem.gpu is not None:
        exact = problem.symmetric and normalize
        problem.gpu.run(problem, outs, [
            Output(mix.as_list(), f, g, h, k, diagonal if exact else None)
            for mix, (f, h, diagonal), (g, k, _) in zip(mixes, left, right, strict=True)
        ], None, progress)  # fmt: skip
        return _results(problem, outs, out, get, kinds)

    def outputs(tile: Tile, rows: slice, views: list[Array], mirrors: list[Array | None]) -> tuple[list[Any], Any]:
        sides = zip(views, mirrors, mixes, left, right, strict=True)
        return [
            (view, mirror, mix.as_list(), f[rows], g[tile.cols], h[rows], k[tile.cols])
            for view, mirror, mix, (f, h, _), (g, k, _) in sides
        ], None

    run(Job(problem.x.rows, problem.y.rows, tuple(outs), problem.symmetric, _epilogue(problem, outputs),
            problem.nanoseconds, progress))  # fmt: skip
    if problem.symmetric and normalize:
        for array, (_, _, diagonal) in zip(outs, left, strict=True):
            _set_diagonal(array, diagonal)
    return _results(problem, outs, out, get, kinds)


def _results(problem: _Problem, outs: list[Any], out: Any, get: Any, kinds: tuple[str, ...]) -> Any:
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
    net: Network,
    X: Any,
    Y: Any = None,
    *,
    device: Any = None,
    dtype: Any = None,
    out: Any = None,
    progress: bool = False,
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
    problem = _Problem(net, X, Y, dtype, device)
    count, readout = len(net.slices), net.readout
    mix = mix_of(net, "ntk")
    left = _factors(problem, "ntk", mix, problem.x, "X", False)[0] * np.sqrt(readout.weight_variance)
    right = left
    if not problem.symmetric:
        right = _factors(problem, "ntk", mix, problem.y, "Y", False)[0] * np.sqrt(readout.weight_variance)
    outs = problem.allocate(out, (count, *problem.shape), ["layer_grams"])
    index = count - 1 if readout.trained else -1
    if problem.gpu is not None:
        if count:
            problem.gpu.run(problem, outs, [], Slices(left, right, index, 1.0, readout.bias_variance), progress)
        return _results(problem, outs, out, "", ())

    def outputs(tile: Tile, rows: slice, views: list[Array], mirrors: list[Array | None]) -> tuple[list[Any], Any]:
        return [], (views[0], mirrors[0], left[rows], right[tile.cols], index, 1.0, readout.bias_variance)

    if count:
        run(Job(problem.x.rows, problem.y.rows, tuple(outs), problem.symmetric, _epilogue(problem, outputs),
                problem.nanoseconds, progress))  # fmt: skip
    return _results(problem, outs, out, "", ())


def diagonal(net: Network, X: Any, *, get: str = "ntk", dtype: Any = None) -> Any:
    """The diagonal of :func:`gram` in O(n) time and memory.

    Parameters
    ----------
    net : Network
    X : array, shape (n, d)
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
    problem = _Problem(net, X, None, dtype, None)
    values = _factors(problem, kind, mix_of(net, kind), problem.x, "X", False)[2]
    return problem.wrap(values.astype(problem.dtype))


def plan(net: Network, X: Any) -> str:
    """What ``gram(net, X)`` will do; see :meth:`Network.plan`."""
    problem = _Problem(net, X, None, None, None)
    n, d = problem.x.rows.shape
    compiled = problem.compiled
    size = n * n * problem.dtype.itemsize
    out = np.empty((0, 0), dtype=problem.dtype)
    side = min(n, side_of(Job(problem.x.rows, problem.x.rows, (out,), True, lambda *_: None, 1.0)))
    if compiled.prefix_only:
        why = (f"recursion on correlations: {compiled.layers} layers without biases, positively homogeneous "
               "activations, norms factor out")  # fmt: skip
    else:
        head = f"{compiled.layers} on correlations, then " if compiled.layers else ""
        why = (f"recursion: {head}{compiled.suffix_layers} layers on half squared distances in float64 (biases, or "
               "activations that are not positively homogeneous)")  # fmt: skip
    if compiled.table_bytes:
        why += f"; Hermite tables of {compiled.table_bytes / 1e6:.1f} MB"
    if problem.gpu is not None:
        return (f"{why}\n{n} points of {d} features, {problem.dtype}, on {problem.gpu.name}; products by cuBLAS\n"
                f"result {size / 1e6:,.0f} MB")  # fmt: skip
    tiles = -(-n // side)
    return (f"{why}\n{n} points of {d} features, {problem.dtype}, {_core.isa()} with {_core.threads()} threads; "
            f"products by BLAS in {tiles * (tiles + 1) // 2} tiles of {side} rows, in place\n"
            f"result {size / 1e6:,.0f} MB; about {_estimate(problem, n):.2g} s")  # fmt: skip


def _estimate(problem: _Problem, n: int) -> float:
    """Seconds for a symmetric Gram matrix, from a small one of the same rows."""
    small = min(n, 256)
    x = problem.x.rows[:small]
    scratch = np.empty((small, small), dtype=problem.dtype)
    part = slice(0, small)
    ones = np.ones(small)
    times = []
    for _ in range(2):  # the first run starts the threads
        start = time.perf_counter()
        product(x, x.copy(), scratch)
        middle = time.perf_counter()
        out = [(scratch, None, [1.0, 1.0, 0.0, 0.0], ones, ones, ones, ones)]
        _core.tile(problem.compiled.core, scratch, problem.x.tile(part), problem.x.tile(part), None, 0.0, out, None)
        times = [middle - start, time.perf_counter() - middle]
    return (n / small) ** 2 * (times[0] + times[1]) / 2 * (1 if n > small else 2)

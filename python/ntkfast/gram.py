"""Gram matrices of infinitely wide networks: validate, compile, run the tiles."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._arrays import (
    Points,
    as_numpy,
    as_points,
    check_device,
    check_matrix,
    check_memory,
    result_dtype,
)
from ntkfast._gemm import fuses
from ntkfast._plan import Compiled, Mix, compile_network, mix_of
from ntkfast._table import Path, choose
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
        check_device(device)
        x, self.wrap = as_numpy(X, "X")
        check_matrix(x, "X")
        y = None if Y is None else as_numpy(Y, "Y")[0]
        if y is not None:
            check_matrix(y, "Y")
            if x.shape[1] != y.shape[1]:
                raise ValueError(f"X has {x.shape[1]} features and Y has {y.shape[1]}")
        self.dtype = result_dtype(dtype, ("X", x), *([] if y is None else [("Y", y)]))
        self.net = net
        self.shape = (len(x), len(x) if y is None else len(y))
        self.x = as_points(x, "X", self.dtype)
        self.y = self.x if y is None else as_points(y, "Y", self.dtype)
        self.symmetric = y is None
        norms = [self.x.norm] if self.symmetric else [self.x.norm, self.y.norm]
        self.compiled = compile_network(net, norms, self.dtype)
        self._norms = norms
        self.wide = False

    def path(self, mixes: Sequence[Mix]) -> Path:
        """Table or recursion."""
        n, m = self.shape
        pairs = 0.5 * n * (n + 1) if self.symmetric else float(n) * m
        return choose(self.net, self.compiled, mixes, self._norms, self.dtype, pairs)

    def nanoseconds(self, path: Path) -> float:
        """Rough time of one pair on all threads, for the length of a call (not for promises)."""
        if path.tables is not None:
            return 1.0
        one = 1.5 * self.compiled.layers + 12.0 * self.compiled.suffix_layers
        return max(1.0, one * (1 if self.compiled.table_bytes == 0 else 4)) / _core.threads()


def _unit(compiled: Compiled, mix: Mix, single: bool, table: Any) -> float:
    """A result of two equal points, before the readout's constant, where it is the same for all of them but for norms."""
    one = np.ones(1)
    if table is not None:
        return float(table.values(np.zeros(1), one)[0])
    return float(_core.pairs(compiled.core, np.zeros(1), one, one, one, mix.as_list(), single)[0])


def _equal_pairs(compiled: Compiled, mix: Mix, points: Points) -> Vector:
    """The diagonal without constant and scale (networks with a suffix)."""
    n = len(points)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(_core.pairs(compiled.core, np.zeros(n), np.ones(n), points.norm, points.norm, mix.as_list()))


def _scaled(compiled: Compiled, mix: Mix, points: Points, single: bool, table: Any) -> tuple[Vector, Vector]:
    """(d, f): the diagonal is d f^2 + constant, and K_ij = (..) f_i f_j + constant, unnormalised."""
    n = len(points)
    with np.errstate(over="ignore"):
        f = np.ldexp(points.norm * compiled.root if compiled.prefix_only else np.ones(n), compiled.exponent)
        if compiled.prefix_only or table is not None:
            return np.full(n, _unit(compiled, mix, single, table)), f
        return _equal_pairs(compiled, mix, points), f


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
    problem: _Problem, get: str, mix: Mix, points: Points, name: str, normalize: bool, table: Any
) -> tuple[Vector, Vector, Vector]:
    """(f, h, diagonal) of one side: K_ij = (..) f_i f_j + h_i h_j."""
    compiled = problem.compiled
    d, f = _scaled(compiled, mix, points, problem.dtype == np.float32, table)
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


def _overlap(a: Array, b: Array) -> bool:
    """True if the arrays share memory; interleaved views do not."""
    return np.may_share_memory(a, b) and np.shares_memory(a, b)


def _allocate(
    out: Any, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any], names: Sequence[str], inputs: Sequence[Array]
) -> list[Any]:
    """The given outputs, checked, or new ones if they fit in memory."""
    if out is None:
        needed = sum(int(np.prod(shape, dtype=object)) for shape in shapes) * dtype.itemsize
        check_memory(needed, f"the result, {' and '.join(str(s) for s in shapes)} {dtype},")
        return [np.empty(shape, dtype=dtype) for shape in shapes]
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    if len(outs) != len(shapes):
        raise ValueError(f"out= must hold {len(shapes)} arrays, one for each of {', '.join(names)}; got {len(outs)}")
    for name, array, shape in zip(names, outs, shapes, strict=True):
        if tuple(getattr(array, "shape", ())) != shape:
            raise ValueError(f"out= for {name} has shape {getattr(array, 'shape', None)}, the result has {shape}")
        if np.dtype(array.dtype) != dtype:
            raise TypeError(f"out= for {name} has dtype {array.dtype}, the result has {dtype}")
        if isinstance(array, np.ndarray):
            if not array.flags.writeable:
                raise ValueError(f"out= for {name} is read-only")
            if any(_overlap(array, x) for x in inputs):
                raise ValueError(f"out= for {name} overlaps an input")
    arrays = [a for a in outs if isinstance(a, np.ndarray)]
    if any(_overlap(a, b) for k, a in enumerate(arrays) for b in arrays[:k]):
        raise ValueError("the arrays of out= overlap each other")
    return outs


#: What a tile is to become: rows of it, views and transposed views of the outputs -> outputs and slices of _core.tile.
Outputs = Callable[[Tile, slice, list[Array], list[Array | None]], tuple[list[Any], Any]]


def _run(problem: _Problem, outs: Sequence[Any], outputs: Outputs, nanoseconds: float, progress: bool) -> None:
    """Fill `outs` on the tile iterator: products and kernels in one pass, or products by the BLAS first."""
    close, core, x, y = CLOSE[problem.dtype], problem.compiled.core, problem.x, problem.y

    def epilogue(tile: Tile, part: slice, products: Array, views: list[Array], mirrors: list[Array | None]) -> None:
        rows = slice(tile.rows.start + part.start, tile.rows.start + part.stop)
        results, slices = outputs(tile, rows, views, mirrors)
        # On a tile of the diagonal row i of this part and column i + part.start are one point.
        diagonal = -part.start if tile.diagonal else None
        _core.tile(core, products, x.tile(rows), y.tile(tile.cols), diagonal, close, results, slices)

    fused = None
    if fuses(problem.dtype, problem.shape, x.rows.shape[1], problem.wide):
        left = _core.Packed(x.rows)
        right = left if problem.symmetric else _core.Packed(y.rows)

        def fused(tile: Tile, views: list[Array], mirrors: list[Array | None]) -> None:
            results, slices = outputs(tile, tile.rows, views, mirrors)
            _core.fused(core, left, tile.rows.start, right, tile.cols.start, problem.wide, x.tile(tile.rows),
                        y.tile(tile.cols), 0 if tile.diagonal else None, close, results, slices)  # fmt: skip

    run(Job(x.rows, y.rows, tuple(outs), problem.symmetric, epilogue, nanoseconds, progress, fused))


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
        Points: NumPy or anything with DLPack or the buffer protocol, in host memory. float32 gives float32, float64
        float64; integers and booleans become float64. Zero rows are legal.
    Y : array, shape (m, d), optional
        Other points. ``None`` means X: half the work, an exactly symmetric result, an exact diagonal.
    get : str or tuple of str
        ``"ntk"``: tangent kernel; ``"nngp"``: covariance of the output at initialisation; ``"last_hidden"``: Gram of
        the last inner matrix (K_def of Du et al.). A tuple gives a named tuple of matrices.
    normalize : bool
        K_ij / sqrt(K_ii K_jj) (0 where the diagonal is 0), from a scaled recursion that does not overflow with depth.
    device : None or "cpu"
    dtype : float32 or float64, optional
        Of arithmetic and result.
    out : array (or tuple of arrays), optional
        Where the result goes; anything with slice assignment, e.g. ``numpy.memmap``. Filled tile by tile.
    progress : bool
        Show a progress bar (tqdm if installed).

    Returns
    -------
    array, shape (n, m), or named tuple of such
        Of the kind and dtype of X.

    Raises
    ------
    TypeError
        dtype that is not real (float16 and complex included), X and Y of different dtypes.
    ValueError
        Wrong shape, entries not finite (names the first bad row), unknown ``get``; a Hermite expansion that does not
        reach its tolerance.
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
    path = problem.path(mixes)
    tables = path.tables or (None,) * len(kinds)
    wanted = list(zip(kinds, mixes, tables, strict=True))
    left = [_factors(problem, k, mix, problem.x, "X", normalize, table) for k, mix, table in wanted]
    right = left
    if not problem.symmetric:
        right = [_factors(problem, k, mix, problem.y, "Y", normalize, table) for k, mix, table in wanted]
    outs = _allocate(out, [problem.shape] * len(kinds), problem.dtype, kinds, [problem.x.rows, problem.y.rows])

    def outputs(tile: Tile, rows: slice, views: list[Array], mirrors: list[Array | None]) -> tuple[list[Any], Any]:
        sides = zip(views, mirrors, mixes, left, right, tables, strict=True)
        return [
            (view, mirror, mix.as_list(), f[rows], g[tile.cols], h[rows], k[tile.cols], table)
            for view, mirror, mix, (f, h, _), (g, k, _), table in sides
        ], None

    _run(problem, outs, outputs, problem.nanoseconds(path), progress)
    if problem.symmetric and normalize:
        for array, (_, _, diagonal) in zip(outs, left, strict=True):
            _set_diagonal(array, diagonal)
    results = outs if out is not None else [problem.wrap(a) for a in outs]
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
    left = _factors(problem, "ntk", mix, problem.x, "X", False, None)[0] * np.sqrt(readout.weight_variance)
    right = left
    if not problem.symmetric:
        right = _factors(problem, "ntk", mix, problem.y, "Y", False, None)[0] * np.sqrt(readout.weight_variance)
    outs = _allocate(out, [(count, *problem.shape)], problem.dtype, ["layer_grams"], [problem.x.rows, problem.y.rows])

    def outputs(tile: Tile, rows: slice, views: list[Array], mirrors: list[Array | None]) -> tuple[list[Any], Any]:
        index = count - 1 if readout.trained else -1
        return [], (views[0], mirrors[0], left[rows], right[tile.cols], index, 1.0, readout.bias_variance)

    if count:
        _run(problem, outs, outputs, problem.nanoseconds(Path(None, "layer_grams")), progress)
    return outs[0] if out is not None else problem.wrap(outs[0])


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
    mix = mix_of(net, kind)
    tables = problem.path([mix]).tables
    values = _factors(problem, kind, mix, problem.x, "X", False, tables[0] if tables else None)[2]
    return problem.wrap(values.astype(problem.dtype))


def plan(net: Network, X: Any) -> str:
    """What ``gram(net, X)`` will do; see :meth:`Network.plan`."""
    problem = _Problem(net, X, None, None, None)
    n, d = problem.x.rows.shape
    compiled = problem.compiled
    out = np.empty((0, 0), dtype=problem.dtype)
    side = min(n, side_of(Job(problem.x.rows, problem.x.rows, (out,), True, lambda *_: None, 1.0)))
    path = problem.path([mix_of(net, "ntk")])
    depth = compiled.layers + compiled.suffix_layers
    if path.tables is not None:
        table = path.tables[0]
        why = (f"table: {depth} layers compiled to polynomials on {table.panels} panels ({path.why}), verified to "
               f"{table.error:.1e}")  # fmt: skip
    elif compiled.prefix_only:
        why = (f"recursion on correlations: {depth} layers without biases, positively homogeneous activations, norms "
               f"factor out; no table: {path.why}")  # fmt: skip
    else:
        head = f"{compiled.layers} on correlations, then " if compiled.layers else ""
        why = (f"recursion: {head}{compiled.suffix_layers} layers on half squared distances in float64; no table: "
               f"{path.why}")  # fmt: skip
    if compiled.table_bytes:
        why += f"; Hermite tables of {compiled.table_bytes / 1e6:.1f} MB"
    tiles = -(-n // side)
    size = n * n * problem.dtype.itemsize
    return (f"{why}\n{n} points of {d} features, {problem.dtype}, {_core.isa()} with {_core.threads()} threads; "
            f"products by BLAS in {tiles * (tiles + 1) // 2} tiles of {side} rows, in place\n"
            f"result {size / 1e6:,.0f} MB; about {_estimate(problem, n, path):.2g} s")  # fmt: skip


def _estimate(problem: _Problem, n: int, path: Path) -> float:
    """Seconds for a symmetric Gram matrix, from a small one of the same rows."""
    small = min(n, 256)
    x = problem.x.rows[:small]
    scratch = np.empty((small, small), dtype=problem.dtype)
    part = slice(0, small)
    ones = np.ones(small)
    table = path.tables[0] if path.tables else None
    times = []
    for _ in range(2):  # the first run starts the threads
        start = time.perf_counter()
        product(x, x.copy(), scratch)
        middle = time.perf_counter()
        out = [(scratch, None, [1.0, 1.0, 0.0, 0.0], ones, ones, ones, ones, table)]
        _core.tile(problem.compiled.core, scratch, problem.x.tile(part), problem.x.tile(part), None, 0.0, out, None)
        times = [middle - start, time.perf_counter() - middle]
    return (n / small) ** 2 * (times[0] + times[1]) / 2 * (1 if n > small else 2)

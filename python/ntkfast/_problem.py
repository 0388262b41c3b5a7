"""One call: inputs checked, network compiled, factors of the results, and the run over the tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._arrays import Points, allocate, as_numpy, as_points, check_matrix, result_dtype
from ntkfast._cuda.device import find_place
from ntkfast._cuda.gram import Backend
from ntkfast._gemm import fuses
from ntkfast._plan import Compiled, Mix, compile_network
from ntkfast._table import CPU, GPU, Path, choose
from ntkfast._tiles import Job, Tile, run
from ntkfast.network import Network

Array = NDArray[Any]
Vector = NDArray[np.float64]

#: Pairs whose 1 - |rho| is smaller get it from differences. The error of an inner product, about 3 eps, moves the angle
#: theta by 3 eps / theta; at these limits that is 1e-14 (float64) and 2e-6 (float32). eps is that of the sums.
CLOSE = {np.dtype(np.float64): 1e-3, np.dtype(np.float32): 1.0 / 64}


class Problem:
    """Checked inputs and the compiled network of one call."""

    def __init__(self, net: Network, X: Any, Y: Any, dtype: Any, device: Any, accumulate: Any = None) -> None:
        if not isinstance(net, Network):
            raise TypeError(f"net must be a Network (fully_connected, resnet, ...), got {type(net).__name__}")
        if accumulate not in (None, "float64"):
            raise ValueError(f'accumulate={accumulate!r} is unknown; use None or "float64"')
        place = find_place(device, ("X", X), ("Y", Y))
        if place is not None and accumulate is not None:
            raise ValueError(f"accumulate={accumulate!r} needs the CPU; on a GPU use dtype=numpy.float64")
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
        #: inner products of float32 rows in float64
        self.wide = accumulate is not None and self.dtype == np.float32
        self.close = CLOSE[np.dtype(np.float64) if self.wide else self.dtype]
        self.symmetric = y is None
        norms = [self.x.norm] if self.symmetric else [self.x.norm, self.y.norm]
        self.compiled = compile_network(net, norms, self.dtype)
        self._norms = norms

    def allocate(self, out: Any, shape: tuple[int, ...], names: Sequence[str]) -> list[Any]:
        """The given outputs, checked, or new ones where the inputs are."""
        shapes, inputs = [shape] * len(names), [self.x.rows, self.y.rows]
        if self.gpu is not None:
            return self.gpu.allocate(out, shapes, self.dtype, names, inputs)
        return allocate(out, shapes, self.dtype, names, inputs)

    def path(self, mixes: Sequence[Mix]) -> Path:
        """Table or recursion."""
        n, m = self.shape
        pairs = 0.5 * n * (n + 1) if self.symmetric else float(n) * m
        costs = CPU if self.gpu is None else GPU
        return choose(self.net, self.compiled, mixes, self._norms, self.dtype, pairs, costs)

    def nanoseconds(self, path: Path) -> float:
        """Rough time of one pair on all threads, for the length of a call (not for promises)."""
        if path.tables is not None:
            return 1.0
        one = 1.5 * self.compiled.layers + 12.0 * self.compiled.suffix_layers
        return max(1.0, one * (1 if self.compiled.table_bytes == 0 else 10)) / _core.threads()


def _unit(compiled: Compiled, mix: Mix, single: bool, table: Any) -> float:
    """A result of two equal points before the readout's constant, where it is the same for all but for the norms."""
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


def factors(
    problem: Problem, get: str, mix: Mix, points: Points, name: str, normalize: bool, table: Any
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


#: What a tile is to become: rows of it, views and transposed views of the outputs -> outputs and slices of _core.tile.
Outputs = Callable[[Tile, slice, list[Array], list[Array | None]], tuple[list[Any], Any]]


def run_tiles(problem: Problem, outs: Sequence[Any], outputs: Outputs, nanoseconds: float, progress: bool) -> None:
    """Fill `outs` on the tile iterator: products and kernels in one pass, or products by the BLAS first."""
    close, core, x, y = problem.close, problem.compiled.core, problem.x, problem.y

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

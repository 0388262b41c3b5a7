"""Sums over layers of (A A'^T) * (D D'^T), tile by tile: products by NumPy's BLAS, multiplied and added while in cache.

A layer with a position axis (convolutions) needs, for every pair of samples, sum_lr (A_l . A'_r)(D_l . D'_r). There are
two ways, and :func:`contraction` chooses by their multiplications:

products    all p p' inner products of positions, p p' (fan_in + fan_out) a pair; for few positions
gradients   weight gradients sum_l A_l D_l^T sample by sample, fan_in fan_out a pair and p fan_in fan_out a sample, for
            few parameters; never more than a slice of them at once
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._overflow import quiet, refuse_tile, within
from ntkfast._tiles import SIDE, Progress, Tile, Tiles, _direct, product

Array = NDArray[Any]

#: Rows of the products that are multiplied and added in cache (n = 2048, width 1024, depth 5, two cores, float64:
#: 256 rows 0.42 s, 512 rows 0.38 s, 1024 rows 0.42 s, NumPy's whole products 0.53 s).
ROWS = 512
#: Largest buffer of products of positions, and of slices of weight gradients, in bytes.
_BUFFER, _SLICE = 16 << 20, 8 << 20
#: One multiply-add of two products takes as long as this many multiplications in a matrix product: 0.4 ns against
#: 0.018 ns (two cores, float64).
_EPILOGUE = 24
#: Multiplications of small matrices, sample by sample, are slower than those of large ones.
_SMALL = 3
#: Largest scratch of a tile in bytes, for results that cannot be written in place.
_SCRATCH = 32 << 20


@dataclass(frozen=True)
class Factor:
    """One layer of n samples: the rows of A and D, position by position."""

    inputs: Array  #: (n positions, fan_in)
    deltas: Array  #: (n positions, fan_out)
    positions: int

    def __len__(self) -> int:
        return len(self.inputs) // self.positions

    def part(self, rows: slice) -> Factor:
        """Some of the samples."""
        p = self.positions
        span = slice(rows.start * p, rows.stop * p)
        return Factor(self.inputs[span], self.deltas[span], p)

    @property
    def blocks(self) -> tuple[Array, Array]:
        """A and D with their position axis."""
        n, p = len(self), self.positions
        return self.inputs.reshape(n, p, -1), self.deltas.reshape(n, p, -1)


def contraction(
    n: int, m: int, positions: tuple[int, int], fan_in: int, fan_out: int, itemsize: int, *, symmetric: bool
) -> str:
    """``"products"`` or ``"gradients"``, whichever takes fewer multiplications and fits in its buffer."""
    p, r = positions
    if p * r == 1:
        return "products"
    if p * r * itemsize > _BUFFER:
        return "gradients"
    pairs = n * (n + 1) / 2 if symmetric else n * m
    samples = n * p if symmetric else n * p + m * r
    products = pairs * p * r * (fan_in + fan_out + _EPILOGUE)
    gradients = (pairs + _SMALL * samples) * fan_in * fan_out
    return "products" if products <= gradients else "gradients"


def contractions(left: Sequence[Factor], right: Sequence[Factor], *, symmetric: bool) -> list[str]:
    """The way of every layer."""
    return [
        contraction(len(a), len(b), (a.positions, b.positions), a.inputs.shape[1], a.deltas.shape[1],
                    a.inputs.dtype.itemsize, symmetric=symmetric)
        for a, b in zip(left, right, strict=True)
    ]  # fmt: skip


def _sides(a: Factor, b: Factor) -> tuple[int, int]:
    """Samples of both whose products of positions are made at once: ROWS rows if they fit, one sample at least."""
    i, j = (max(1, ROWS // f.positions) for f in (a, b))
    # Pairs of samples; one at least, or contraction() would not have chosen products.
    most = _BUFFER // (a.positions * b.positions * a.inputs.itemsize)
    return min(i, max(1, most // j)), min(j, max(1, most // i))


def _buffers(left: Sequence[Factor], right: Sequence[Factor], ways: Sequence[str]) -> tuple[Array, Array]:
    def entries(a: Factor, b: Factor, way: str) -> int:
        if way == "gradients":  # rows of samples, however many positions
            return min(ROWS, len(a)) * min(ROWS, len(b))
        i, j = _sides(a, b)
        return min(i, len(a)) * a.positions * min(j, len(b)) * b.positions

    size = max(entries(a, b, way) for a, b, way in zip(left, right, ways, strict=True))
    return np.empty(size, dtype=left[0].inputs.dtype), np.empty(size, dtype=left[0].inputs.dtype)


def cuts(rows: slice, side: int) -> list[slice]:
    return [slice(k, min(k + side, rows.stop)) for k in range(rows.start, rows.stop, side)]


def _add_products(
    to: Array, a: Factor, b: Factor, rows: slice, cols: slice, same: bool, first: bool, buffers: tuple[Array, Array]
) -> None:
    """to (+)= contraction of samples `rows` and `cols`; `same`: they are equal, and only pairs above the diagonal."""
    p, r = a.positions, b.positions
    side_i, side_j = _sides(a, b)
    for i in cuts(rows, side_i):
        x = a.part(i)
        for j in cuts(cols, side_j):
            if same and j.start < i.start:
                continue
            y = x if same and i == j else b.part(j)
            shape = len(x.inputs), len(y.inputs)
            P, Q = (buffer[: shape[0] * shape[1]].reshape(shape) for buffer in buffers)
            product(x.inputs, y.inputs, P)
            product(x.deltas, y.deltas, Q)
            part = to[i.start - rows.start : i.stop - rows.start, j.start - cols.start : j.stop - cols.start]
            _core.multiply_add(part, P, Q, p, r, first)


def _gradients(factor: Factor, ins: slice, outs: slice) -> Array:
    """Weight gradients of every sample, (n, inputs * outputs), for some inputs and outputs of the layer."""
    A, D = factor.blocks
    gradients: Array = np.matmul(A[:, :, ins].transpose(0, 2, 1), D[:, :, outs])
    return gradients.reshape(len(factor), -1)


def parameter_slices(
    samples: int, fan_in: int, fan_out: int, itemsize: int, size: int | None = None
) -> list[tuple[slice, slice]]:
    """Parts of a weight matrix whose gradients, for so many samples, fit in `size` bytes (_SLICE)."""
    most = max(1, (_SLICE if size is None else size) // (samples * itemsize))
    width = min(fan_out, most)
    height = max(1, most // width)
    return [(i, j) for i in cuts(slice(0, fan_in), height) for j in cuts(slice(0, fan_out), width)]


def _add_gradients(
    to: Array, a: Factor, b: Factor, rows: slice, cols: slice, same: bool, first: bool, buffers: tuple[Array, Array]
) -> None:
    """The same as :func:`_add_products` by explicit weight gradients."""
    x = a.part(rows)
    y = x if same else b.part(cols)
    samples, item = max(len(x), len(y)), x.inputs.itemsize
    for ins, outs in parameter_slices(samples, x.inputs.shape[1], x.deltas.shape[1], item):
        G = _gradients(x, ins, outs)
        H = G if same else _gradients(y, ins, outs)
        for i in cuts(slice(0, len(x)), ROWS):
            for j in cuts(slice(0, len(y)), ROWS):
                if same and j.start < i.start:
                    continue
                g = G[i]
                h = g if same and i == j else H[j]
                P = buffers[0][: len(g) * len(h)].reshape(len(g), len(h))
                product(g, h, P)
                _core.multiply_add(to[i, j], P, None, first=first)
        first = False


@dataclass(frozen=True)
class _Work:
    left: Sequence[Factor]
    right: Sequence[Factor]
    ways: Sequence[str]
    per_layer: bool
    buffers: tuple[Array, Array]


def _tile(work: _Work, to: Array, rows: slice, cols: slice, same: bool) -> None:
    """One tile of the result: in cache the layers without explicit gradients, then the others; then the mirror."""
    cached = [h for h, way in enumerate(work.ways) if way == "products"]
    explicit = [h for h, way in enumerate(work.ways) if way == "gradients"]
    for i in cuts(rows, ROWS) if cached else []:
        for j in cuts(cols, ROWS):
            if same and j.start < i.start:
                continue
            part = to[..., i.start - rows.start : i.stop - rows.start, j.start - cols.start : j.stop - cols.start]
            for k, h in enumerate(cached):
                _add_products(part[h] if work.per_layer else part, work.left[h], work.right[h], i, j, same and i == j,
                              work.per_layer or k == 0, work.buffers)  # fmt: skip
    for k, h in enumerate(explicit):
        _add_gradients(to[h] if work.per_layer else to, work.left[h], work.right[h], rows, cols, same,
                       work.per_layer or (k == 0 and not cached), work.buffers)  # fmt: skip
    if same:
        for square in to if work.per_layer else [to]:
            _core.mirror(square, square)


def _side(outputs: Any, dtype: np.dtype[Any]) -> int:
    side, layers = SIDE, outputs.shape[0] if len(outputs.shape) == 3 else 1
    if not _direct(outputs, dtype):
        while side > 128 and side * side * layers * dtype.itemsize > _SCRATCH:
            side //= 2
    return side


def fill(out: Any, left: Sequence[Factor], right: Sequence[Factor] | None, *, per_layer: bool, progress: Any) -> None:
    """Fill out, (n, m) or (layers, n, m); right None means left, and a symmetric result."""
    n, m = out.shape[-2:]
    symmetric, other = right is None, left if right is None else right
    dtype = left[0].inputs.dtype
    ways = contractions(left, other, symmetric=symmetric)
    work = _Work(left, other, ways, per_layer, _buffers(left, other, ways))
    todo = Tiles(n, m, symmetric, _side(out, dtype))
    with Progress(progress, sum(tile.entries for tile in todo)) as bar, quiet():
        for tile in todo:
            _fill_tile(work, out, tile)
            bar.add(tile.entries)


def _fill_tile(work: _Work, out: Any, tile: Tile) -> None:
    direct = _direct(out, work.left[0].inputs.dtype)
    shape = (tile.rows.stop - tile.rows.start, tile.cols.stop - tile.cols.start)
    if direct:
        to = out[..., tile.rows, tile.cols]
    else:
        to = np.empty((*out.shape[:-2], *shape), dtype=work.left[0].inputs.dtype)
    _tile(work, to, tile.rows, tile.cols, tile.diagonal)
    refuse_tile(to, tile)
    if not direct:
        out[..., tile.rows, tile.cols] = to
    if tile.mirrored and not tile.diagonal:
        if direct:
            below = out[..., tile.cols, tile.rows]
            for source, target in zip(to, below, strict=True) if work.per_layer else [(to, below)]:
                _core.mirror(source, target)
        else:
            out[..., tile.cols, tile.rows] = np.swapaxes(to, -1, -2)


def sample_tiles(n: int, m: int | None, bytes_per_sample: int, memory: int) -> list[slice] | None:
    """Rows of X whose factors are kept at once; ``None`` if those of all samples are.

    The rule of :func:`empirical_ntk`: everything is kept if it fits in ``memory``. Otherwise each tile of rows is kept
    while those of the columns are made again beside it, and each of the two has half of the memory.
    """
    if (n + (m or 0)) * bytes_per_sample <= memory:
        return None
    side = max(1, memory // (2 * bytes_per_sample))
    count = -(-n // side)
    return [slice(n * k // count, n * (k + 1) // count) for k in range(count)]


def in_tiles(
    fill: Callable[..., None], make: Callable[[slice, bool], list[Factor]], out: Any, rows: list[slice],
    cols: list[slice] | None, *, per_layer: bool, progress: Any,
) -> None:  # fmt: skip
    """Tile by tile, each by `fill`, with the factors of one tile of rows and one of columns at a time.

    make(part, left) are those of some rows of X, or of Y if not ``left``; cols None means symmetric.
    """
    for i, row in enumerate(rows):
        left = make(row, True)
        for j, col in enumerate(rows if cols is None else cols):
            if cols is None and j < i:
                continue
            same = cols is None and i == j
            right = None if same else make(col, cols is None)
            direct = hasattr(out, "strides")  # views of NumPy's and CuPy's arrays can be filled in place
            shape = (*out.shape[:-2], row.stop - row.start, col.stop - col.start)
            to = out[..., row, col] if direct else np.empty(shape, left[0].inputs.dtype)
            with within(row.start, col.start):
                fill(to, left, right, per_layer=per_layer, progress=progress)
            if not direct:
                out[..., row, col] = to
            if cols is None and not same:
                out[..., col, row] = to.swapaxes(-1, -2)
            right = None  # before the next ones are made
        left = []


def diagonal_of(factor: Factor) -> NDArray[np.float64]:
    """Squared norms of the weight gradients of every sample, (n,)."""
    if factor.positions == 1:
        return _core.squares(factor.inputs)[0] * _core.squares(factor.deltas)[0]
    n, p = len(factor), factor.positions
    fan_in, fan_out = factor.inputs.shape[1], factor.deltas.shape[1]
    item = factor.inputs.itemsize
    result = np.zeros(n)
    if p * (fan_in + fan_out) <= fan_in * fan_out and p * p * item <= _SLICE:
        for rows in cuts(slice(0, n), max(1, _SLICE // (p * p * item))):
            A, D = factor.part(rows).blocks
            P, Q = np.matmul(A, A.transpose(0, 2, 1)), np.matmul(D, D.transpose(0, 2, 1))
            result[rows] = np.einsum("ilr,ilr->i", P, Q)
        return result
    step = max(1, _SLICE // (fan_in * fan_out * item))
    for rows in cuts(slice(0, n), step):
        x = factor.part(rows)
        for ins, outs in parameter_slices(len(x), fan_in, fan_out, item):
            result[rows] += _core.squares(_gradients(x, ins, outs))[0]
    return result

"""The one tile iterator: every Gram matrix is computed by :func:`run`, tile by tile.

A tile is a rectangle of the result. Either the compiled kernels make its inner products and the kernels in one pass
(`fused`), or NumPy's BLAS makes the products, straight into the result where that is possible, and then the epilogue
turns them into kernels in place; the two pools of threads never run at once. Between calls Python regains control at
least every few tenths of a second, so Ctrl-C works.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core

Array = NDArray[Any]

#: Rows of a tile. Products of few rows run slower, large ones compute more of the lower half of a symmetric matrix:
#: four tiles a side, but not below LEAST. (n = 4096, d = 784, two cores: 1024 rows 0.116 s, 2048 rows 0.140 s, one
#: product 0.175 s.)
SIDE, LEAST = 2048, 1024
#: Floating-point operations of one product call: half a second on one slow core.
_PRODUCT = 2e10
#: Largest side of a fused tile, and the floating-point operations a second its length is estimated by (a slow core).
FUSED_SIDE, _FUSED_RATE = 4096, 2e10
#: Operations of the products done before their epilogues: seconds, so that changing pools costs percents.
_BATCH = 2e11
#: Seconds one call into the compiled kernels should take at most.
_CALL = 0.15
#: Largest scratch of one tile in bytes: results that cannot be written in place, copies of rows.
_SCRATCH = 32 << 20


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the result; `mirrored`: the transposed tile is to be filled from this one."""

    rows: slice
    cols: slice
    mirrored: bool

    @property
    def diagonal(self) -> bool:
        return self.mirrored and self.rows == self.cols

    @property
    def entries(self) -> int:
        n, m = self.rows.stop - self.rows.start, self.cols.stop - self.cols.start
        return int(n * (n + 1) // 2 if self.diagonal else n * m)


def _parts(n: int, side: int, unit: int) -> list[slice]:
    count = -(-n // side)
    edges = [min(n, -(-n * k // count // unit) * unit) for k in range(count)] + [n]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


class Tiles:
    """All tiles of an (n, m) result, beginning at multiples of `unit`; if symmetric those on and above the diagonal.

    They are made while one goes over them: there may be millions."""

    def __init__(self, n: int, m: int, symmetric: bool, side: int, unit: int = 1) -> None:
        self.symmetric, self.rows = symmetric, _parts(n, side, unit)
        self.cols = self.rows if symmetric else _parts(m, side, unit)
        #: (count,) Those to go over; None: all.
        self.wanted: NDArray[np.bool_] | None = None

    @property
    def count(self) -> int:
        """Of all tiles."""
        n, m = len(self.rows), len(self.cols)
        return n * (n + 1) // 2 if self.symmetric else n * m

    @property
    def side(self) -> int:
        """Rows or columns of the largest one."""
        return max((part.stop - part.start for part in self.rows + self.cols), default=0)

    def number(self, tile: Tile) -> int:
        """The place of a tile among all."""
        i, j = (bisect_left(parts, part.start, key=lambda some: some.start)
                for parts, part in ((self.rows, tile.rows), (self.cols, tile.cols)))  # fmt: skip
        return i * len(self.cols) + j - (i * (i + 1) // 2 if self.symmetric else 0)

    def __iter__(self) -> Iterator[Tile]:
        number = 0
        for i, row in enumerate(self.rows):
            for col in self.cols[i:] if self.symmetric else self.cols:
                if self.wanted is None or self.wanted[number]:
                    yield Tile(row, col, self.symmetric)
                number += 1


class Record:
    """An output that is filled in several runs: it tells which tiles are left, and hears of every tile it holds."""

    side: int  #: rows and columns of its largest tile, after begin()

    def begin(self) -> Tiles:
        """The tiles to do; called once, when everything else is checked."""
        raise NotImplementedError

    def __setitem__(self, key: Any, value: Array) -> None:
        """[..., rows, cols]"""
        raise NotImplementedError

    def stored(self, tile: Tile) -> None:
        """A tile was assigned, its mirror too."""
        raise NotImplementedError

    def keep(self, tile: Tile, values: Array) -> None:
        """Assign a whole tile (rows, cols), its mirror too."""
        assign(self, tile, values)
        self.stored(tile)


def assign(out: Any, tile: Tile, values: Array) -> None:
    """Values (..., rows, cols) of a tile, and its mirror image if there is one."""
    out[..., tile.rows, tile.cols] = values
    if tile.mirrored and not tile.diagonal:
        out[..., tile.cols, tile.rows] = np.swapaxes(values, -1, -2)


def record_of(outputs: Sequence[Any]) -> Record | None:
    """The output that chooses the tiles, if there is one."""
    return next((out for out in outputs if isinstance(out, Record)), None)


@dataclass(frozen=True)
class Job:
    """One run of the iterator.

    outputs are (n, m) or, for layer_grams, one (P, n, m); anything with slice assignment. `epilogue` is called as
    epilogue(tile, part, products, views, mirrors): `part` rows of the tile (relative to it), their inner products,
    the views of the outputs they belong to, and the transposed views or None. `fused(tile, views, mirrors)` does
    without the products.
    """

    x: Array  #: (n, d)
    y: Array  #: (m, d); x itself if symmetric
    outputs: tuple[Any, ...]
    symmetric: bool
    epilogue: Callable[[Tile, slice, Array, list[Array], list[Array | None]], None]
    nanoseconds: float  #: estimated time of one pair on all threads
    progress: Any = False
    fused: Callable[[Tile, list[Array], list[Array | None]], None] | None = None


def fused_side(dim: int, nanoseconds: float) -> int:
    """Rows of a tile whose pairs take `nanoseconds` beside their inner products: a few tenths of a second."""
    side = FUSED_SIDE
    rate = _FUSED_RATE * _core.threads()
    while side > 128 and side * side * (2.0 * dim / rate + 1e-9 * nanoseconds) > 2 * _CALL:
        side //= 2
    return side


def side_of(job: Job) -> int:
    """Rows of a tile, so that neither its product nor its scratch is too large."""
    dim = max(1, job.x.shape[1])
    if job.fused:
        side = fused_side(dim, job.nanoseconds)
    else:
        side = min(SIDE, max(LEAST, len(job.x) // 4)) if job.symmetric else SIDE
        while side > 256 and 2.0 * side * side * dim > _PRODUCT:
            side //= 2
    slices = job.outputs[0].shape[0] if len(job.outputs[0].shape) == 3 else len(job.outputs)
    if not all(_direct(out, job.x.dtype) for out in job.outputs):
        while side > 128 and side * side * slices * job.x.itemsize > _SCRATCH:
            side //= 2
    return side


def _direct(out: Any, dtype: np.dtype[Any]) -> bool:
    """True if the compiled kernels can write into `out` themselves."""
    if not isinstance(out, np.ndarray) or out.dtype != dtype or not out.flags.writeable or not out.flags.aligned:
        return False
    row, item = out.strides[-2:]
    return item == out.itemsize and row > 0 and row % out.itemsize == 0


def product(x: Array, y: Array, out: Array) -> None:
    """out = x y^T by NumPy's BLAS."""
    if x is y and x.shape[1] < 512 and x.nbytes <= _SCRATCH:
        # NumPy calls syrk for x x^T and then mirrors entry by entry, which costs more than it saves for short rows.
        y = x.copy()
    np.matmul(x, y.T, out=out)


def run(job: Job) -> None:
    """Fill the outputs of a job."""
    n, m = len(job.x), len(job.y)
    record = record_of(job.outputs)
    if record:
        todo = record.begin()
        side = record.side
    else:
        side = side_of(job)
        todo = Tiles(n, m, job.symmetric, side, _core.PANEL if job.fused else 1)
    direct = all(_direct(out, job.x.dtype) for out in job.outputs)
    # Threads of either pool go on spinning for a while when their work is done, and slow down the other pool. So the
    # products of many tiles come first, then all their epilogues: in place that takes no memory.
    batch = max(1, int(_BATCH / (2.0 * side * side * job.x.shape[1]))) if direct and not job.fused else 1
    with Progress(job.progress, sum(tile.entries for tile in todo)) as bar:
        left = iter(todo)
        while ready := [_prepare(job, tile) for tile in islice(left, batch)]:
            for item in ready:
                _finish(job, item, bar)
                if record:
                    record.stored(item.tile)
            del ready, item  # and their scratch, before the next is made


@dataclass(frozen=True)
class _Ready:
    """A tile whose inner products are there, in the first view, unless the job is fused."""

    tile: Tile
    views: list[Array]
    mirrors: list[Array | None]
    stores: list[tuple[Any, Array]]  #: outputs that take their part by slice assignment
    products: Array


def _prepare(job: Job, tile: Tile) -> _Ready:
    x = job.x[tile.rows]
    y = x if tile.diagonal else job.y[tile.cols]
    views: list[Array] = []
    mirrors: list[Array | None] = []
    stores = []
    for out in job.outputs:
        if _direct(out, job.x.dtype):
            views.append(out[..., tile.rows, tile.cols])
            mirrors.append(out[..., tile.cols, tile.rows] if tile.mirrored else None)
            continue
        scratch = np.empty((*out.shape[:-2], len(x), len(y)), dtype=job.x.dtype)
        views.append(scratch)
        mirrors.append(scratch if tile.diagonal else None)
        stores.append((out, scratch))
    products = views[0] if views[0].ndim == 2 else views[0][0]
    if not job.fused:
        product(x, y, products)
    return _Ready(tile, views, mirrors, stores, products)


def _finish(job: Job, ready: _Ready, bar: Progress) -> None:
    tile = ready.tile
    rows, cols = ready.products.shape
    step = max(32, int(_CALL / (1e-9 * job.nanoseconds * cols)) // 32 * 32)
    if job.fused:
        job.fused(tile, ready.views, ready.mirrors)
        bar.add(tile.entries)
    for start in range(0, 0 if job.fused else rows, step):
        part = slice(start, min(start + step, rows))
        mirrors = [None if t is None else t[..., :, part] for t in ready.mirrors]
        job.epilogue(tile, part, ready.products[part], [v[..., part, :] for v in ready.views], mirrors)
        bar.add(tile.entries * (part.stop - part.start) / rows)
    for out, scratch in ready.stores:
        assign(out, tile, scratch)


class Progress:
    """A tqdm bar if it is installed, else a line on stderr every few seconds, else nothing."""

    def __init__(self, wanted: Any, total: int) -> None:
        self.total, self.done, self.bar, self.wanted = total, 0.0, None, bool(wanted)
        if not self.wanted:
            return
        try:
            from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            self.start = self.shown = time.monotonic()
        else:
            self.bar = tqdm(total=100.0, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}")

    def __enter__(self) -> Progress:
        return self

    def add(self, entries: float) -> None:
        """Count pairs that are done."""
        self.done += entries
        if self.bar is not None:
            self.bar.update(min(100.0 * entries / self.total, 100.0 - self.bar.n))
        elif self.wanted and time.monotonic() - self.shown > 5:
            self.shown = time.monotonic()
            left = (self.shown - self.start) * (self.total / self.done - 1)
            print(f"ntkfast: {100 * self.done / self.total:.0f} % done, about {left:.0f} s left", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

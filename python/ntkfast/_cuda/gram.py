"""Gram matrices on GPUs: the tiles of ntkfast._tiles, their products by cuBLAS, their epilogues by csrc/cuda.

Where the arrays are on a GPU, so is the result, and everything runs on their stream. Otherwise the tiles stream to the
host (tiles.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._arrays import OutOfMemoryError, Points, allocate, not_finite, scale_exponents
from ntkfast._cuda import layout
from ntkfast._cuda.device import Gpu, Place, as_cupy, contiguous_rows, index_of, row_stride, stream_of
from ntkfast._cuda.tiles import Check, Share, TileWorker, in_parallel, resident_tiles, stream_tiles
from ntkfast._tiles import Progress, Tile, Tiles, record_of

Array = NDArray[Any]
Vector = NDArray[np.float64]

#: Rows of a tile: its products stay on the device; streamed tiles also lie in pinned memory, four times. Not measured.
RESIDENT, STREAMED = 4096, 2048
#: Largest size of the streamed buffers of one kind, in bytes, and of the scratch of layer_grams.
_BUFFER = 256 << 20
#: Blocks of layer_grams, each with scratch of its own: enough to fill any device.
_BLOCKS = 2048


@dataclass(frozen=True)
class Output:
    """One result: K_ij = (mix) f_i g_j + h_i k_j, mix by its table (ntkfast._core.Table) if it has one.

    All outputs of a run have tables, or none has. `diagonal`: exact values of K_ii, or None.
    """

    mix: list[float]
    f: Vector  #: (n,)
    g: Vector  #: (m,)
    h: Vector  #: (n,)
    k: Vector  #: (m,)
    diagonal: Vector | None = None
    table: Any = None


@dataclass(frozen=True)
class Slices:
    """The result of layer_grams; see struct Slices of csrc/cuda/job.cuh."""

    f: Vector
    g: Vector
    readout: int
    readout_cov: float
    readout_const: float


class Backend:
    """The GPUs of one call."""

    def __init__(self, place: Place, x: Any) -> None:
        self.resident = place.resident
        self.gpus = [Gpu(k) for k in place.devices]
        with self.gpus[0].device:
            self._stream = stream_of(x, place.devices[0])

    @property
    def name(self) -> str:
        return ", ".join(f"cuda:{gpu.index}" for gpu in self.gpus)

    @contextmanager
    def here(self) -> Iterator[Gpu]:
        """The device and the stream of the user's arrays."""
        with self.gpus[0].device, self._stream:
            yield self.gpus[0]

    def synchronize(self) -> None:
        """Wait for what is queued on the stream of the user's arrays."""
        with self.here():
            self._stream.synchronize()

    def free_bytes(self) -> int:
        """Of the device that has least."""
        found = []
        for gpu in self.gpus:
            with gpu.device:
                found.append(gpu.free_bytes())
        return min(found)

    def check_memory(self, needed: int, what: str) -> None:
        """Raise before allocating what cannot fit on the device."""
        free = self.free_bytes()
        if needed > free:
            raise OutOfMemoryError(f"{what} needs {needed:,} bytes on {self.name}, {free:,} are available")

    def view(self, x: Any, name: str) -> tuple[Any, Callable[[Any], Any]]:
        """A CuPy view of a user's array on the device, and the way back (from CuPy or NumPy)."""
        with self.here():
            view, back = as_cupy(x, name)

        def wrap(result: Any) -> Any:
            with self.here() as gpu:
                return back(gpu.upload(result) if isinstance(result, np.ndarray) else result)

        return view, wrap

    def fetch(self, x: Any, name: str) -> tuple[Array, Callable[[Any], Any]]:
        """A copy in host memory of a user's array on the device, and the way back."""
        view, wrap = self.view(x, name)
        with self.here():
            return view.get(), wrap

    def points(self, x: Any, name: str, dtype: np.dtype[Any]) -> Points:
        """as_points of ntkfast._arrays for a matrix on the device: checks, norms, a copy only if it is needed."""
        with self.here() as gpu:
            rows = x if x.dtype == dtype else x.astype(dtype)
            if not contiguous_rows(rows):
                rows = gpu.cupy.ascontiguousarray(rows)
            squares, largest = norms(gpu, rows)
            if not np.isfinite(largest).all():
                bad = int(np.flatnonzero(~np.isfinite(largest))[0])
                raise not_finite(name, bad, x[bad].get(), dtype)
            exponent = scale_exponents(largest, dtype)
            if exponent.any():
                scaled = gpu.empty(rows.shape, dtype)
                _by_rows(gpu, "scale", rows, gpu.upload(exponent), scaled)
                rows, squares = scaled, norms(gpu, scaled)[0]
            return Points.of(rows, squares, exponent)

    def empty(self, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]) -> list[Any]:
        """Results on the device."""
        with self.here() as gpu:
            try:
                return [gpu.empty(shape, dtype) for shape in shapes]
            except MemoryError:
                needed = sum(int(np.prod(shape, dtype=object)) for shape in shapes) * dtype.itemsize
                raise OutOfMemoryError(
                    f"the result, {' and '.join(map(str, shapes))} {dtype}, needs {needed:,} bytes on {self.name}, "
                    f"{gpu.free_bytes():,} are available; pass out= with a host array or numpy.memmap"
                ) from None

    def views(self, out: Any, inputs: Sequence[Any]) -> list[Any]:
        """The user's outputs, those on a device as CuPy views."""
        result = []
        for array in out if isinstance(out, (tuple, list)) else [out]:
            index = index_of(array)
            if index is None:
                result.append(array)
                continue
            if not self.resident or index != self.gpus[0].index:
                place = f"on {self.name}" if self.resident else "in host memory"
                raise ValueError(f"out= is on cuda:{index}, the inputs are {place}")
            view = self.view(array, "out")[0]
            if view.ndim < 2 or not contiguous_rows(view):
                raise ValueError("out= on a device needs contiguous rows")
            if any(_overlap(view, x) for x in inputs):
                raise ValueError("out= overlaps an input")
            result.append(view)
        if sum(index_of(array) is None for array in result) not in (0, len(result)):
            raise ValueError("the arrays of out= must all be on the device or all in host memory")
        return result

    def allocate(
        self, out: Any, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any], names: Sequence[str],
        inputs: Sequence[Any],
    ) -> list[Any]:  # fmt: skip
        """The given outputs, checked, or new ones where the inputs are."""
        if out is None and self.resident:
            return self.empty(shapes, dtype)
        views = None if out is None else self.views(out, inputs)
        return allocate(views, shapes, dtype, names, [x for x in inputs if isinstance(x, np.ndarray)])

    def call(self, work: Callable[[Gpu], Any]) -> Any:
        """A result of the first device."""
        with self.here() as gpu:
            return work(gpu)

    def run(
        self, problem: Any, outs: Sequence[Any], outputs: Sequence[Output], slices: Slices | None, progress: Any
    ) -> None:
        """Fill the results of gram and layer_grams."""
        self.fill(problem, outs, lambda gpu: Worker(gpu, problem, outputs, slices), progress, RESIDENT)

    def fill(
        self, problem: Any, outs: Sequence[Any], make: Callable[[Gpu], Any], progress: Any, resident_side: int,
        streamed_side: int = 0, check: Check | None = None,
    ) -> None:  # fmt: skip
        """Fill results tile by tile: problem has shape, symmetric and dtype, make(gpu) is a TileWorker; sides of
        tiles on the device and of streamed ones (0: STREAMED), which `check` sees before they are stored."""
        n, m = problem.shape
        resident = index_of(outs[0]) is not None
        record = record_of(outs)
        if record:
            todo = record.begin()
            side = record.side
        else:
            most = resident_side if resident else _streamed_side(problem, outs, streamed_side or STREAMED)
            side = min(most, max(n, m))
            todo = Tiles(n, m, problem.symmetric, side)
        with Progress(progress, sum(tile.entries for tile in todo)) as bar:
            if resident:
                with self.here() as gpu:
                    resident_tiles(gpu, make(gpu), self._stream, todo, side, outs, bar)
                return
            self.synchronize()  # the rows may have been made on it
            share = Share(todo, outs, bar, check)
            jobs = [lambda gpu=gpu: stream_tiles(gpu, make, problem, share, side) for gpu in self.gpus]
            in_parallel(jobs, share)


def _by_rows(gpu: Gpu, kernel: str, rows: Any, *arrays: Any) -> None:
    """A kernel of points.cu: a warp a row."""
    n, d = rows.shape
    sizes = (np.int64(n), np.int64(d), np.int64(row_stride(rows)))
    gpu.launch(
        "points", f"{kernel}_{layout.suffix_of(rows.dtype)}", -(-n // 8), layout.THREADS, 0, rows, *sizes, *arrays
    )


def norms(gpu: Gpu, rows: Any) -> tuple[Vector, Vector]:
    """Squared norms and largest entries of the rows, on the host."""
    squares, largest = gpu.empty((len(rows),), np.float64), gpu.empty((len(rows),), np.float64)
    _by_rows(gpu, "squares", rows, squares, largest)
    return squares.get(), largest.get()


def _overlap(a: Any, b: Any) -> bool:
    """True if two matrices on a device may share memory."""
    if index_of(b) is None:
        return False

    def span(x: Any) -> tuple[int, int]:
        return x.data.ptr, x.data.ptr + sum(
            (s - 1) * abs(t) for s, t in zip(x.shape, x.strides, strict=True)
        ) + x.itemsize

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


def _streamed_side(problem: Any, outs: Sequence[Any], side: int) -> int:
    slices = outs[0].shape[0] if len(outs[0].shape) == 3 else len(outs)
    while side > 32 and 4 * side * side * slices * problem.dtype.itemsize > _BUFFER:
        side //= 2
    return side


class Worker(TileWorker):
    """The arrays of one run on one GPU, and the launches of its tiles."""

    def __init__(self, gpu: Gpu, problem: Any, outputs: Sequence[Output], slices: Slices | None) -> None:
        self.gpu, self.dtype, self.slices = gpu, problem.dtype, slices
        self.tables = [gpu.upload(layout.pack_table(o.table, self.dtype)) for o in outputs if o.table is not None]
        self.record = np.zeros((), layout.JOB)
        self.record["close"], self.record["dim"] = problem.close, problem.x.rows.shape[1]
        self.record["n_outputs"] = len(outputs)
        self.record["want_last"] = any(out.mix[3] != 0.0 for out in outputs)
        self.mixes = [out.mix for out in outputs]
        self.x = self._side(problem.x)
        self.y = self.x if problem.symmetric else self._side(problem.y)
        upload = gpu.upload
        self.factors = [
            {"fi": upload(o.f), "fj": upload(o.g), "hi": upload(o.h), "hj": upload(o.k)}
            | ({} if o.diagonal is None else {"diagonal": upload(o.diagonal)})
            for o in outputs
        ]
        self.module = "gram_table"
        if not self.tables:
            self.plan = layout.DevicePlan(problem.compiled.core.arguments, problem.dtype, gpu.upload)
            self.record["plan"] = self.plan.record
            self.module = "gram_general" if self.plan.suffix_layers else "gram_dense"
        for k, table in enumerate(self.tables):
            self.record["outputs"][k]["table"] = table.data.ptr
        if slices is not None:
            self.module = "layer_grams"
            self.slice_factors = {"fi": upload(slices.f), "fj": upload(slices.g)}
            self.buffers = 1  # the scratch of layer_grams belongs to one launch at a time
            self._own_terms(problem.shape)

    def _side(self, points: Points) -> tuple[Any, Any, Any]:
        rows = points.rows if index_of(points.rows) is not None else self.gpu.upload(points.rows)
        return rows, self.gpu.upload(points.inverse), self.gpu.upload(points.norm)

    def _own_terms(self, shape: tuple[int, int]) -> None:
        """Own terms of the layers for every block of layer_grams that runs at a time."""
        prefix = 3 * layout.THREADS * max(1, self.plan.layers)
        suffix = 4 * layout.THREADS * max(1, self.plan.suffix_layers)
        square = layout.SQUARE["layer_grams"]
        squares = -(-shape[0] // square) * -(-shape[1] // square)
        self.blocks = blocks = max(1, min(_BLOCKS, _BUFFER // (8 * (prefix + suffix)), squares))
        self.own = self.gpu.empty((blocks, prefix), self.dtype), self.gpu.empty((blocks, suffix), np.float64)

    def scratch(self, side: int) -> Any:
        """The products of a tile."""
        return self.gpu.empty((side, side), self.dtype)

    def launch(
        self, tile: Tile, products: Any, views: Sequence[Any], mirrors: Sequence[Any], multiply: bool = True
    ) -> None:
        """Products and epilogue of a tile, on the current stream; without `multiply` products holds them already."""
        rows, cols = tile.rows.stop - tile.rows.start, tile.cols.stop - tile.cols.start
        if multiply:
            self.gpu.product(self.x[0][tile.rows], self.y[0][tile.cols], products[:rows, :cols])
        record = self.record.copy()
        record["products"], record["stride"] = products.data.ptr, row_stride(products)
        record["rows"], record["cols"], record["diagonal"] = rows, cols, tile.diagonal
        for name, (x, inverse, norm), part in (("i", self.x, tile.rows), ("j", self.y, tile.cols)):
            record[name] = (x[part].data.ptr, row_stride(x), inverse[part].data.ptr, norm[part].data.ptr)
        for k, (factors, mix) in enumerate(zip(self.factors, self.mixes, strict=True)):
            out = record["outputs"][k]
            out["mix"] = mix
            put_matrix(out, views[k], mirrors[k])
            put_factors(out, factors, tile)
        square = layout.SQUARE[self.module]
        blocks = -(-rows // square) * -(-cols // square)
        if self.slices is not None:
            blocks = min(blocks, self.blocks)
            self._put_slices(record["slices"], views[0], mirrors[0], tile)
        suffix = layout.suffix_of(self.dtype)
        shared = layout.SHARED[self.module, suffix]
        job = self.gpu.upload(record.reshape(1).view(np.uint8))
        self.gpu.launch(self.module, f"{self.module}_{suffix}", blocks, layout.THREADS, shared, job)

    def _put_slices(self, out: Any, view: Any, mirror: Any, tile: Tile) -> None:
        assert self.slices is not None
        put_matrix(out, view, mirror)
        put_factors(out, self.slice_factors, tile)
        out["slice_stride"] = view.strides[0] // view.itemsize
        out["mirror_slice_stride"] = 0 if mirror is None else mirror.strides[0] // view.itemsize
        out["readout"] = self.slices.readout
        out["readout_cov"], out["readout_const"] = self.slices.readout_cov, self.slices.readout_const
        out["own"], out["own_suffix"] = (a.data.ptr for a in self.own)


def put_matrix(out: Any, view: Any, mirror: Any) -> None:
    out["data"], out["stride"] = view.data.ptr, row_stride(view[0] if view.ndim == 3 else view)
    if mirror is not None:
        out["mirror"], out["mirror_stride"] = mirror.data.ptr, row_stride(mirror[0] if mirror.ndim == 3 else mirror)


def put_factors(out: Any, factors: dict[str, Any], tile: Tile) -> None:
    for name, values in factors.items():
        if name != "diagonal" or tile.diagonal:
            out[name] = values[tile.cols if name.endswith("j") else tile.rows].data.ptr

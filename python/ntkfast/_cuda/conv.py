"""Tiles of convolutional networks on a GPU: images prepared there, planes of all pairs, sums to results.

A tile is done in squares of images whose prepared numbers fit in _IMAGES bytes; a square in batches of pairs whose
sums fit in _PARTS bytes; a batch in launches of at most so much work that Ctrl-C is heard soon (LAUNCH), two of them on
their way at any time. Only the images of one square are on the device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._cuda import layout
from ntkfast._cuda.device import Gpu
from ntkfast._cuda.gram import STREAMED, Output, Slices, put_factors, put_matrix
from ntkfast._cuda.tiles import TileWorker
from ntkfast._tiles import Tile, Tiles

Array = NDArray[Any]
Vector = NDArray[np.float64]

#: Positions times layers of one launch (a general layer counts _GENERAL, and 1 for every four Hermite terms): 0.1 s and
#: 0.2 s at 4e10 (float32) and 5e9 (float64) of them a second, which a slow device is thought to do; several times
#: that if all planes are done again (csrc/cuda/conv_exact.cuh). Not measured.
LAUNCH = {np.dtype(np.float32): 1 << 32, np.dtype(np.float64): 1 << 30}
_GENERAL = 8
#: Bytes of the prepared images of one side, of the sums of a batch, and of scratch of blocks.
_IMAGES, _PARTS, _SCRATCH = 128 << 20, 64 << 20, 256 << 20
#: Planes of a unit of pooled kernels; it decides about the last digits, so that it does not depend on the tile.
_RUN = 16
#: Images of one side of a square of pairs that run about the same time: their numbers stay in the L2 cache.
_SQUARE = 16
#: Most threads of a block; planes of the general and the fast path (csrc/cuda/conv_general.cuh, conv_fast.cuh).
_THREADS, _PLANES = layout.THREADS, (3, 2)
#: Numbers of a unit in `parts` (kParts of csrc/cuda/conv.cuh): three sums, and which planes lost digits.
_UNIT = 4
#: Numbers of a layer at a position: of the general path without Hermite coefficients, and of the fast path.
_NUMBERS = (10, 5)
#: Blocks at a time if they need scratch in global memory: eight on every multiprocessor of any device.
_BLOCKS = 2048


def _even_parts(n: int, most: int) -> int:
    """Size of the parts, at most `most`, of which n needs the fewest."""
    return math.ceil(n / math.ceil(n / most))


@dataclass(frozen=True)
class Shape:
    """How the planes of one problem are laid on blocks."""

    positions: int
    groups: int  #: pairs (or parts of pairs) of a block
    threads: int
    shared: int  #: bytes of shared memory
    planes: int  #: bytes of planes of a block in global memory, 0 if they are in shared memory
    chunks: int
    run: int

    @classmethod
    def of(cls, height: int, width: int, pooled: bool, fast: bool, item: int, limit: int) -> Shape:
        """`limit`: bytes of shared memory a block may have."""
        positions, strips = height * width, math.ceil(height / (16 // item if fast else 1)) * width
        each = 2 * _PLANES[fast] * positions * item
        run = min(_RUN, positions) if pooled else 1
        chunks = math.ceil(positions / run) if pooled else 1
        groups = max(1, min(_THREADS // strips, (limit - layout.CONV_MEMORY) // each))
        threads = groups * strips if groups > 1 else _even_parts(strips, _THREADS)
        threads = math.ceil(threads / 32) * 32
        shared, planes = layout.CONV_MEMORY + groups * each, 0
        if shared > limit:
            shared, planes = layout.CONV_MEMORY, groups * each
        return cls(positions, groups, threads, shared, planes, chunks, run)


class _Side:
    """Prepared images of one side of a square: what they are, and arrays that hold them."""

    def __init__(self) -> None:
        self.key: Any = None
        self.arrays: tuple[Any, ...] = ()


class Scratch:
    """What belongs to one stream: prepared images, sums, planes."""

    def __init__(self) -> None:
        self.sides = _Side(), _Side()
        self.parts: Any = None
        self.slices: Any = None
        self.planes: Any = None
        self.own: Any = None
        self.blocks = 0


class ConvWorker(TileWorker):
    """The arrays of one run on one GPU, and the launches of its tiles."""

    def __init__(self, gpu: Gpu, problem: Any, outputs: Sequence[Output], slices: Slices | None) -> None:
        self.gpu, self.problem, self.slices = gpu, problem, slices
        self.buffers = 1 if slices is not None else 2
        self.dtype = problem.dtype if problem.fast else np.dtype(np.float64)  # of the arithmetic
        height, width, *_, circular, pooled = problem.geometry
        self.shape = Shape.of(height, width, bool(pooled), problem.fast, self.dtype.itemsize, gpu.shared_bytes())
        arguments = list(problem.core.arguments)
        if slices is not None:
            ints = np.array(arguments[5])
            trained = [k for k, layer in enumerate(problem.net.layers) if layer.trained]
            ints[trained, 2] = np.arange(len(trained))
            arguments[5] = ints
        self.plan = layout.DevicePlan(arguments, self.dtype, gpu.upload)
        self.layers = self.plan.suffix_layers
        self.seams = bool(pooled and not circular)
        #: planes that lose digits are done again (csrc/cuda/conv_exact.cuh): networks without skips
        self.watched = bool(problem.fast and not np.array(arguments[4])[:, 0].any())
        numbers = _NUMBERS[problem.fast] + (0 if problem.fast else problem.terms)
        self.layer_size = -(-numbers * self.shape.positions // 2) * 2  # pairs of numbers are read at once
        self.record = record = np.zeros(1, layout.CONV_JOB)
        record["layers"], record["tables"] = self.plan.record["suffix"], self.plan.record["tables"]
        record["layer_size"], record["n_layers"] = self.layer_size, self.layers
        for name, value in zip(("height", "width", "channels", "reach_y", "reach_x", "circular", "pooled"),
                               problem.geometry, strict=True):  # fmt: skip
            record[name] = value
        record["chunks"], record["run"], record["groups"] = self.shape.chunks, self.shape.run, self.shape.groups
        record["watched"] = self.watched
        upload = gpu.upload
        self.factors = [
            {"fi": upload(o.f), "fj": upload(o.g)} | ({} if o.diagonal is None else {"diagonal": upload(o.diagonal)})
            for o in outputs
        ]
        record["n_outputs"] = len(outputs)
        for k, out in enumerate(outputs):
            record["outputs"][0, k]["mix"] = out.mix
        if slices is not None:
            self.slice_factors = {"fi": upload(slices.f), "fj": upload(slices.g)}
            record["grams"]["readout"] = slices.readout
        if problem.fast:
            self.fast = gpu.empty((self.layers * layout.CONV_LAYER[self._suffix],), np.uint8)
            record["fast"] = self.fast.data.ptr
            gpu.launch("conv_images", f"conv_layers_{self._suffix}", 1, _THREADS, 0, record)
        image = self.layers * self.layer_size * self.dtype.itemsize
        #: images of one side of a square
        self.side = max(1, min(STREAMED, _IMAGES // image))
        #: units of a launch
        self.units = max(1, LAUNCH[self.dtype] // (_work(problem) * self.shape.run))
        self._events: deque[Any] = deque()

    @property
    def _suffix(self) -> str:
        return layout.suffix_of(self.dtype)

    def scratch(self, side: int) -> Scratch:
        """What the launches of one stream need."""
        return Scratch()

    def launch(self, tile: Tile, scratch: Scratch, views: Sequence[Any], mirrors: Sequence[Any]) -> None:
        """A tile, on the current stream; waits until its last launches but two are done."""
        rows, cols = tile.rows.stop - tile.rows.start, tile.cols.stop - tile.cols.start
        for part in Tiles(rows, cols, tile.diagonal, self.side):
            i, j = (slice(whole.start + some.start, whole.start + some.stop)
                    for whole, some in ((tile.rows, part.rows), (tile.cols, part.cols)))  # fmt: skip
            record = self._square(scratch, Tile(i, j, tile.mirrored))
            parts = [(view[..., part.rows, part.cols], None if mirror is None else mirror[..., part.cols, part.rows])
                     for view, mirror in zip(views, mirrors, strict=True)]  # fmt: skip
            square = Tile(i, j, tile.mirrored and i == j)
            for k, factors in enumerate(self.factors):
                put_matrix(record["outputs"][0, k], *parts[k])
                put_factors(record["outputs"][0, k], factors, square)
            if self.slices is not None:
                out, (view, mirror) = record["grams"][0], parts[0]
                put_matrix(out, view, mirror)
                put_factors(out, self.slice_factors, square)
                out["slice_stride"] = view.strides[0] // view.itemsize
                out["mirror_slice_stride"] = 0 if mirror is None else mirror.strides[0] // view.itemsize
            for _ in self._batches(scratch, record, square):
                blocks = -(-int(record["pairs"][0]) // _THREADS)
                kernel = f"conv_results_{layout.suffix_of(self.problem.dtype)}"
                self.gpu.launch("conv_results", kernel, blocks, _THREADS, 0, record)

    def totals(self, side: Any) -> Vector:
        """(3, n): the sums of every image with itself."""
        scratch, found = Scratch(), []
        for start in range(0, len(side), self.side):
            part = slice(start, min(start + self.side, len(side)))
            record = self._square(scratch, Tile(part, part, True), side)
            record["paired"] = 1
            for _ in self._batches(scratch, record, Tile(part, part, True)):
                count = int(record["pairs"][0])
                parts = scratch.parts[: count * self.shape.chunks * _UNIT].get()
                found.append(parts.reshape(count, self.shape.chunks, _UNIT)[..., :3].sum(axis=1))
        return np.ascontiguousarray(np.concatenate(found).T)

    def _square(self, scratch: Scratch, square: Tile, side: Any = None) -> Any:
        """A job with the images of a square."""
        problem, record = self.problem, self.record.copy()
        for name, images, part, kept in (("i", side or problem.x, square.rows, scratch.sides[0]),
                                         ("j", side or problem.y, square.cols, scratch.sides[1])):  # fmt: skip
            if name == "j" and (side is not None or problem.symmetric) and square.cols == square.rows:
                record["j"] = record["i"]
                continue
            if kept.key != (part.start, part.stop):
                kept.arrays = self._prepare(images.images[part])
                kept.key = part.start, part.stop
            record[name] = tuple(array.data.ptr for array in kept.arrays)
        record["rows"], record["cols"] = square.rows.stop - square.rows.start, square.cols.stop - square.cols.start
        return record

    def _prepare(self, images: Array) -> tuple[Any, Any]:
        """Images on the device and their numbers."""
        gpu, n = self.gpu, len(images)
        x = gpu.upload(np.ascontiguousarray(images, dtype=self.dtype))
        numbers = gpu.empty((n * self.layers * self.layer_size,), self.dtype)
        room = gpu.empty((n * 3 * self.shape.positions,), np.float64)
        record = self.record.copy()
        record["i"], record["planes"] = (x.data.ptr, numbers.data.ptr), room.data.ptr
        name = f"fast_{self._suffix}" if self.problem.fast else "general_f64"
        gpu.launch("conv_images", f"conv_images_{name}", n, _THREADS, 0, record)
        return x, numbers

    def _batches(self, scratch: Scratch, record: Any, square: Tile) -> Iterator[None]:
        """The sums of all pairs of a square, some pairs at a time; `record` says which they are."""
        rows, cols, chunks = int(record["rows"][0]), int(record["cols"][0]), self.shape.chunks
        sides = _even_parts(rows, _SQUARE), _even_parts(cols, _SQUARE)
        record["square_rows"], record["square_cols"], record["triangle"] = *sides, square.mirrored
        across = math.ceil(cols / sides[1])
        count = across * (across + 1) // 2 if square.mirrored else math.ceil(rows / sides[0]) * across
        pairs = rows if record["paired"][0] else count * sides[0] * sides[1]
        most = max(1, min(pairs, _PARTS // (8 * (_UNIT * chunks + (self.layers if self.slices is not None else 0)))))
        self._reserve(scratch, most)
        for name in ("parts", "slices", "planes", "own"):
            array = getattr(scratch, name)
            record[name] = 0 if array is None else array.data.ptr
        for first in range(0, pairs, most):
            record["first"], record["pairs"] = first, min(most, pairs - first)
            units = int(record["pairs"][0]) * chunks
            for unit in range(0, units, self.units):
                record["first_unit"], record["last_unit"] = unit, min(unit + self.units, units)
                self._launch_units(scratch, record)
            yield

    def _reserve(self, scratch: Scratch, pairs: int) -> None:
        """Scratch for a batch of so many pairs."""
        gpu, shape = self.gpu, self.shape
        size = pairs * shape.chunks * _UNIT
        if scratch.parts is None or len(scratch.parts) < size:
            scratch.parts = gpu.empty((size,), np.float64)
        if self.slices is not None and (scratch.slices is None or len(scratch.slices) < pairs * self.layers):
            scratch.slices = gpu.empty((pairs * self.layers,), np.float64)
        if scratch.blocks:
            return
        own = 16 * shape.groups * self.layers * shape.positions if self.slices is not None else 0
        scratch.blocks = max(1, min(_BLOCKS, _SCRATCH // max(1, shape.planes + own)))
        if shape.planes:
            scratch.planes = gpu.empty((scratch.blocks * shape.planes,), np.uint8)
        if own:
            scratch.own = gpu.empty((scratch.blocks * own // 8,), np.float64)

    def _launch_units(self, scratch: Scratch, record: Any) -> None:
        while len(self._events) > 1:
            self._events.popleft().synchronize()
        shape = self.shape
        blocks = -(-int(record["last_unit"][0] - record["first_unit"][0]) // shape.groups)
        if scratch.planes is not None or scratch.own is not None:
            blocks = min(blocks, scratch.blocks)
        module, kernel = "gram_conv_general", "gram_conv_general_far" if shape.planes else "gram_conv_general"
        if self.problem.fast:
            module = "gram_conv_fast"
            kernel = "gram_conv_far" if shape.planes else "gram_conv_seams" if self.seams else "gram_conv_fast"
        self.gpu.launch(module, f"{kernel}_{self._suffix}", blocks, shape.threads, shape.shared, record)
        if self.watched:
            kernel = "gram_conv_exact_far" if shape.planes else "gram_conv_exact"
            self.gpu.launch("gram_conv_exact", f"{kernel}_{self._suffix}", blocks, shape.threads, shape.shared, record)
        self._events.append(self.gpu.event())


def _work(problem: Any) -> int:
    """Of a plane, in the unit of LAUNCH."""
    each = 1 if problem.fast else _GENERAL + problem.terms // 4
    return int(problem.positions * len(problem.net.layers) * each)


def side_of(problem: Any) -> int:
    """Images of one side of a tile: a few launches, so that progress is seen and results are stored."""
    planes = problem.positions if problem.pooled else 1
    dtype = problem.dtype if problem.fast else np.dtype(np.float64)  # of the arithmetic
    side = math.isqrt(4 * LAUNCH[dtype] // (planes * _work(problem)) + 1)
    return int(max(_SQUARE, min(STREAMED, side // _SQUARE * _SQUARE, max(problem.shape))))


def fill(problem: Any, outs: Sequence[Any], outputs: Sequence[Output], slices: Slices | None, progress: Any) -> None:
    """Fill the results of gram or layer_grams."""
    side = side_of(problem)
    problem.gpu.fill(problem, outs, lambda gpu: ConvWorker(gpu, problem, outputs, slices), progress, side, side)

"""Tiles of a result on GPUs: one after the other into a result on the device, or streamed to the host.

To the host they go through two pairs of buffers: while one tile is computed and copied, the one before is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._cuda.device import Gpu
from ntkfast._tiles import Progress, Tile, Tiles, record_of

Array = NDArray[Any]
Check = Callable[[Array, Tile], None]


class TileWorker:
    """What computes the tiles of a result on one GPU."""

    lanes = 1  #: streams a result on the device is computed on
    buffers = 2  #: tiles on their way to the host at a time

    def scratch(self, side: int) -> Any:
        """Memory for one tile at a time."""
        raise NotImplementedError

    def launch(self, tile: Tile, scratch: Any, views: Sequence[Any], mirrors: Sequence[Any]) -> None:
        """Compute a tile on the current stream into `views`, its transpose into `mirrors` (or None)."""
        raise NotImplementedError

    def into(self, tile: Tile, scratch: Any, outs: Sequence[Any], **options: Any) -> None:
        """Compute a tile into results on the device; options are those of a worker's own launch."""
        views = [out[..., tile.rows, tile.cols] for out in outs]
        mirrors = [out[..., tile.cols, tile.rows] if tile.mirrored else None for out in outs]
        self.launch(tile, scratch, views, mirrors, **options)


def resident_tiles(
    gpu: Gpu, worker: Any, stream: Any, todo: Tiles, side: int, outs: Sequence[Any], bar: Progress
) -> None:
    """Tiles of a result on the device, on the user's stream or on several of their own between its work."""
    # All scratch belongs to the user's stream: it goes back to the pool behind everything that uses it.
    scratch = [worker.scratch(side) for _ in range(min(worker.lanes, todo.count))]
    lanes = [gpu.stream() for _ in scratch] if len(scratch) > 1 else [stream]
    if len(lanes) > 1:
        ready = stream.record()
        for lane in lanes:
            lane.wait_event(ready)
    for k, tile in enumerate(todo):
        with lanes[k % len(lanes)]:
            worker.into(tile, scratch[k % len(lanes)], outs)
        bar.add(tile.entries)
    if len(lanes) > 1:
        for lane in lanes:
            stream.wait_event(lane.record())


class Share:
    """What the threads of several GPUs share: tiles to do, results, and whether to stop."""

    def __init__(
        self, todo: Iterable[Tile], outs: Sequence[Any], bar: Progress, check: Check | None = None
    ) -> None:  # fmt: skip
        self._todo, self._lock, self._check = iter(todo), threading.Lock(), check
        self.outs, self.bar, self.stop = outs, bar, threading.Event()

    def next(self) -> Tile | None:
        with self._lock:
            return None if self.stop.is_set() else next(self._todo, None)

    def store(self, tile: Tile, parts: Sequence[tuple[Array, Array | None]]) -> None:
        """A tile goes to the results; anything but NumPy arrays takes one thread at a time."""
        if self._check is not None:
            for part, _ in parts:
                self._check(part, tile)
        if all(isinstance(out, np.ndarray) for out in self.outs):
            self._store(tile, parts)
            with self._lock:
                self.bar.add(tile.entries)
            return
        with self._lock:
            self._store(tile, parts)
            self.bar.add(tile.entries)

    def _store(self, tile: Tile, parts: Sequence[tuple[Array, Array | None]]) -> None:
        for out, (part, mirror) in zip(self.outs, parts, strict=True):
            out[..., tile.rows, tile.cols] = part
            if mirror is not None:
                out[..., tile.cols, tile.rows] = mirror
        if record := record_of(self.outs):
            record.stored(tile)


def in_parallel(jobs: Sequence[Callable[[], None]], share: Share) -> None:
    """One thread a GPU; the first error stops all, and so does Ctrl-C."""
    if len(jobs) == 1:
        jobs[0]()
        return
    errors: list[BaseException] = []

    def work(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)
            share.stop.set()

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
    finally:
        share.stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


class Buffers:
    """A tile on its way to the host: its stream, its place on the device and its place in pinned memory."""

    def __init__(self, gpu: Gpu, worker: TileWorker, problem: Any, outs: Sequence[Any], side: int) -> None:
        self.stream = gpu.stream()
        self.depths = [out.shape[0] if len(out.shape) == 3 else 0 for out in outs]
        dtype, sizes = problem.dtype, [max(1, depth) * side * side for depth in self.depths]
        copies = 2 if problem.symmetric else 1
        with self.stream:
            self.scratch = worker.scratch(side)
            self.device = [[gpu.empty((size,), dtype) for _ in range(copies)] for size in sizes]
        self.host = [[gpu.pinned((size,), dtype) for _ in range(copies)] for size in sizes]
        self.tile: Tile | None = None
        self.parts: list[tuple[Array, Array | None]] = []

    def start(self, worker: TileWorker, tile: Tile) -> None:
        """Launch a tile and its copy."""
        rows, cols = tile.rows.stop - tile.rows.start, tile.cols.stop - tile.cols.start
        shapes = [((rows, cols), (cols, rows)) if d == 0 else ((d, rows, cols), (d, cols, rows)) for d in self.depths]
        both = tile.mirrored and not tile.diagonal
        views = [_shaped(d[0], s[0]) for d, s in zip(self.device, shapes, strict=True)]
        mirrors = [_shaped(d[1], s[1]) for d, s in zip(self.device, shapes, strict=True)] if both else list(views)
        self.tile, self.parts = tile, []
        with self.stream:
            worker.launch(tile, self.scratch, views, mirrors if tile.mirrored else [None] * len(views))
            for k, (view, mirror) in enumerate(zip(views, mirrors, strict=True)):
                part = view.get(out=_shaped(self.host[k][0], view.shape), blocking=False)
                copied = mirror.get(out=_shaped(self.host[k][1], mirror.shape), blocking=False) if both else None
                self.parts.append((part, copied))

    def finish(self, share: Share) -> None:
        """Wait for the copy and store it."""
        if self.tile is None:
            return
        self.stream.synchronize()
        share.store(self.tile, self.parts)
        self.tile = None


def _shaped(flat: Any, shape: tuple[int, ...]) -> Any:
    return flat[: int(np.prod(shape))].reshape(shape)


def stream_tiles(gpu: Gpu, make: Callable[[Gpu], TileWorker], problem: Any, share: Share, side: int) -> None:
    """Tiles one after the other until none is left."""
    with gpu.device:
        setup = gpu.stream()
        with setup:
            worker = make(gpu)
        setup.synchronize()  # what it uploaded is used on other streams
        buffers = [Buffers(gpu, worker, problem, share.outs, side) for _ in range(worker.buffers)]
        try:
            turn = 0
            while (tile := share.next()) is not None:
                buffer = buffers[turn % len(buffers)]
                buffer.finish(share)
                buffer.start(worker, tile)
                turn += 1
            for k in range(len(buffers)):
                buffers[(turn + k) % len(buffers)].finish(share)
        finally:
            for buffer in buffers:
                buffer.stream.synchronize()

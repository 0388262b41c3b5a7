"""Times of convolutional networks on a GPU, a part of gpu_check.py."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import ntkfast as nf
from ntkfast import _bench


@dataclass(frozen=True)
class Images:
    """The Gram matrix of n images of 32 x 32 positions and 3 channels, 21 convolutions."""

    readout: str
    n: int
    dtype: str

    @property
    def name(self) -> str:
        return f"conv_net(21), {self.readout}, 32x32x3, {self.n} images, {self.dtype}"


def image_cases(n: int) -> list[Images]:
    """The rows of the table of convolutional networks: enough pairs to fill a device."""
    flatten, pooled = max(16, n // 32), max(4, n // 1024)
    return [Images(readout, count, dtype) for readout, count in (("flatten", flatten), ("gap", pooled))
            for dtype in ("float32", "float64")]  # fmt: skip


def measure_images(case: Images, rounds: int, grid: int = 32, depth: int = 21) -> dict[str, Any]:
    """Wall time a distinct pair, from images in host memory to results there; after a check of some entries."""
    x = np.random.default_rng(0).integers(0, 256, (case.n, grid, grid, 3)) / 256.0
    x = x.astype(case.dtype)
    net, times, few = nf.conv_net(depth, readout=case.readout), [], slice(0, 3)
    found = nf.gram(net, x, device="cuda")
    wanted = nf.gram(net, x[few], dtype=np.float64)
    error = float(np.abs(found[few, few] - wanted).max() / wanted.max())
    _bench.check(case.name, error, case.dtype)
    for _ in range(rounds):
        begin = time.perf_counter()
        nf.gram(net, x, device="cuda", out=found)
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    return {"case": case.name, "readout": case.readout, "dtype": case.dtype, "n": case.n, "error": error,
            "ms": 1e3 * seconds, "us_an_entry": 1e6 * seconds / (0.5 * case.n * (case.n + 1))}  # fmt: skip

"""Kernels of convolutional networks: time per pair of images with its error, one thread and all, and neural-tangents.

One row is one whole symmetric Gram matrix of images of 32x32x3 pixels, by the call a user would make; its time is
divided by the distinct pairs. The images make it hard: two objects before the same plain background, a copy that
differs in one pixel, frames of zeros, the same picture shifted. Errors are those of every pair of them against
long_double.py: |K - L| / L, the largest.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import long_double
import numpy as np

import ntkfast as nf
from ntkfast import _bench

Row = dict[str, Any]

SIDE = 32
#: (readout, depth, images, microseconds per pair at most in float32 and float64), one thread.
CASES = (("flatten", 5, 512, (3.2, 9.0)), ("flatten", 10, 512, (6.4, 18.0)), ("gap", 5, 24, (3200.0, 9000.0)))
#: (readout, depth, dtype, images, times as long at least), all threads.
CONTESTS = (("flatten", 10, "float32", 256, 100.0), ("gap", 3, "float64", 16, 50.0))
TOLERANCE = {"float32": 2e-6, "float64": 1e-12}
#: Of others: only that they compute the same kernel. neural-tangents forms angles from 1 - rho.
RIVAL_TOLERANCE = 1e-2


def images(n: int, side: int = SIDE) -> np.ndarray:
    """(n >= 6, side, side, 3), multiples of 1/256 and so exact in every dtype; the first six are the hard ones."""
    x = np.empty((n, side, side, 3))
    for k in range(n):
        rng = np.random.default_rng(k)
        coarse = rng.random((side // 4, side // 4, 3)).repeat(4, axis=0).repeat(4, axis=1)
        x[k] = np.round(256 * (0.7 * coarse + 0.3 * rng.random((side, side, 3)))) / 256
    a, b = side // 4, side - side // 4
    for k in (1, 2):  # an object before a plain background
        inside = x[k, a:b, a:b].copy()
        x[k], x[k, a:b, a:b] = (0.5, 0.625, 0.75), inside
    x[3] = x[1]
    x[3, a, a, 0] += 1 / 256
    x[4, :2], x[4, -2:], x[4, :, :2], x[4, :, -2:] = 0, 0, 0, 0
    x[5] = np.roll(x[4], (1, 1), axis=(0, 1))
    return x


#: Among the hard images: equal ones, the same background, one pixel apart, unlike, shifted.
PAIRS = ((1, 1), (1, 2), (1, 3), (0, 4), (4, 5))


@dataclass(frozen=True)
class Problem:
    """One network and its images."""

    readout: str
    depth: int
    dtype: str
    n: int
    side: int = SIDE

    @property
    def net(self) -> nf.ConvNetwork:
        return nf.conv_net(self.depth, readout=self.readout)

    @property
    def x(self) -> np.ndarray:
        return images(self.n, self.side).astype(self.dtype)

    def row(self, name: str, times: np.ndarray, clock: str, error: float) -> Row:
        each = times / (self.n * (self.n + 1) / 2)
        return {"name": name, "readout": self.readout, "depth": self.depth, "dtype": self.dtype, "n": self.n,
                "side": self.side, "clock": clock, "seconds": _bench.quartiles(each), "rounds": len(times),
                "over_ntkfast": None, "error": error}  # fmt: skip


class Judge:
    """Kernels of pairs of hard images in long double, each computed once."""

    def __init__(self, side: int) -> None:
        self.x, self.known = images(6, side), dict[Any, Any]()

    def error(self, problem: Problem, K: np.ndarray) -> float:
        """Largest |K - L| / L over PAIRS; NaN if any entry of K is."""
        if not np.isfinite(K).all():
            return math.nan
        found = []
        for i, j in PAIRS:
            key = problem.readout, problem.depth, i, j
            if key not in self.known:
                self.known[key] = long_double.ntk(self.x[i], self.x[j], problem.depth, pooled=problem.readout == "gap")
            found.append(abs(float((K[i, j] - self.known[key]) / self.known[key])))
        return max(found)


def own_times(problem: Problem, rounds: int, one_thread: bool) -> list[float]:
    """Seconds of whole Gram matrices."""
    x, net, out = problem.x, problem.net, np.empty((problem.n, problem.n), problem.dtype)
    clock = time.process_time if one_thread else time.perf_counter
    return [float(t) for t in _bench.interleave({"": lambda: nf.gram(net, x, out=out)}, rounds, clock=clock)[""]]


def neural_tangents(net: nf.ConvNetwork, side: int) -> Callable[[np.ndarray], np.ndarray]:
    """Its kernel of the same network, jitted as a whole.

    Its first layer divides by the channels, its Flatten by the positions.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jax
        from neural_tangents import stax
    jax.config.update("jax_enable_x64", True)
    root, flat = math.sqrt(2.0), net.pooling == "flatten"
    layers: list[Any] = []
    for k in range(net.depth):
        layers += [stax.Conv(1, (3, 3), padding="SAME", W_std=root if k else 1.0, b_std=None), stax.Relu()]
    layers += [stax.Flatten() if flat else stax.GlobalAvgPool(), stax.Dense(1, W_std=root, b_std=None)]
    kernel = stax.serial(*layers)[2]
    compiled = jax.jit(lambda points: kernel(points, None, "ntk"))
    factor = float(side * side) if flat else 1.0

    def gram(x: np.ndarray) -> np.ndarray:
        points = jax.numpy.asarray(x * x.dtype.type(math.sqrt(x.shape[-1])))
        return np.asarray(compiled(points)) * x.dtype.type(factor)

    return gram


def contest(problem: Problem, judge: Judge, rounds: int, note: Callable[[str], None]) -> list[Row]:
    """ntkfast and neural-tangents on the same images in turns; nothing if the latter is not installed."""
    try:
        theirs = neural_tangents(problem.net, problem.side)
    except ImportError as error:
        note(f"neural-tangents: {error}")
        return []
    x, net, out = problem.x, problem.net, np.empty((problem.n, problem.n), problem.dtype)
    calls = {"ntkfast": lambda: nf.gram(net, x, out=out), "neural-tangents": lambda: theirs(x)}
    errors = {name: judge.error(problem, call()) for name, call in calls.items()}
    for name, error in errors.items():
        _check(name, problem, error, TOLERANCE[problem.dtype] if name == "ntkfast" else RIVAL_TOLERANCE)
    times = _bench.interleave(calls, rounds)
    rows = [problem.row(name, times[name], "wall", errors[name]) for name in calls]
    for row in rows:
        row["over_ntkfast"] = _bench.quartiles(times[row["name"]] / times["ntkfast"])
    return rows


def _check(name: str, problem: Problem, error: float, limit: float) -> None:
    """Nothing wrong is timed; what only misses its target is, and says so in the table."""
    if not error <= max(limit, 1e-5 if problem.dtype == "float32" else 1e-9):
        raise ArithmeticError(f"{name}, {problem.readout}, {problem.dtype}: error {error:.1e}; not timed")


def measure(quick: bool, note: Callable[[str], None], on_one_thread: Callable[[str], Any]) -> list[Row]:
    """All rows."""
    side, rows = 8 if quick else SIDE, list[Row]()
    judge = Judge(side)
    for readout, depth, n, _ in CASES:
        for dtype in ("float32", "float64"):
            problem = Problem(readout, depth, dtype, min(n, 12) if quick else n, side)
            note(f"convolutions, {readout}, depth {depth}, {dtype}")
            error = judge.error(problem, nf.gram(problem.net, problem.x))
            _check("ntkfast", problem, error, TOLERANCE[dtype])
            rounds = 3 if quick else (5 if readout == "gap" else 11)
            alone = on_one_thread(f"conv.own_times(conv.{problem!r}, {rounds}, True)")
            rows.append(problem.row("ntkfast", np.array(alone), "CPU, one thread", error))
            rows.append(problem.row("ntkfast", np.array(own_times(problem, rounds, False)), "wall", error))
    for readout, depth, dtype, n, _ in CONTESTS:
        note(f"convolutions, neural-tangents, {readout}, depth {depth}, {dtype}")
        problem = Problem(readout, depth, dtype, min(n, 8) if quick else n, side)
        rows += contest(problem, judge, 3 if quick or readout == "gap" else 7, note)
    return rows


def targets(rows: list[Row]) -> list[tuple[str, float | None, float, str, bool]]:
    """(name, measured, limit, unit, limit is a lower bound)"""
    found: list[tuple[str, float | None, float, str, bool]] = []
    for readout, depth, _, limits in CASES:
        for dtype, limit in zip(("float32", "float64"), limits, strict=True):
            name = f"conv_net({depth}), {readout}, {dtype}"
            own = {row["clock"]: row for row in rows if row["name"] == "ntkfast" and row["over_ntkfast"] is None
                   and (row["readout"], row["depth"], row["dtype"]) == (readout, depth, dtype)}  # fmt: skip
            alone, wall = own["CPU, one thread"], own["wall"]
            found.append((f"{name}, one thread", 1e6 * alone["seconds"][1], limit, "us per pair", False))
            found.append((f"{name}, error", alone["error"], TOLERANCE[dtype], "", False))
            found.append((f"{name}, all threads over one", alone["seconds"][1] / wall["seconds"][1], 1.8, "", True))
    for readout, depth, dtype, _, least in CONTESTS:
        over = next((row["over_ntkfast"][1] for row in rows if row["name"] == "neural-tangents"
                     and (row["readout"], row["depth"], row["dtype"]) == (readout, depth, dtype)), None)  # fmt: skip
        name = f"conv_net({depth}), {readout}, {dtype}: neural-tangents over ntkfast"
        found.append((name, over, least, "", True))
    return found

"""What a call will do, in words: :meth:`ntkfast.Network.plan`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ntkfast import _conv, _core
from ntkfast._gemm import fuses
from ntkfast._plan import mix_of
from ntkfast._problem import Problem
from ntkfast._table import Path
from ntkfast._tiles import Job, product, side_of
from ntkfast.convolution import ConvNetwork
from ntkfast.network import Network


def plan(net: Network, X: Any) -> str:
    """What ``gram(net, X)`` will do; see :meth:`Network.plan`."""
    problem = Problem(net, X, None, None, None)
    n, d = problem.x.rows.shape
    compiled = problem.compiled
    size = n * n * problem.dtype.itemsize
    out = np.empty((0, 0), dtype=problem.dtype)
    fused = (lambda *_: None) if fuses(problem.dtype, problem.shape, d, problem.wide) else None
    side = min(n, side_of(Job(problem.x.rows, problem.x.rows, (out,), True, lambda *_: None, 1.0, False, fused)))
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
    if problem.gpu is not None:
        return (f"{why}\n{n} points of {d} features, {problem.dtype}, on {problem.gpu.name}; products by cuBLAS\n"
                f"result {size / 1e6:,.0f} MB")  # fmt: skip
    tiles = -(-n // side)
    return (f"{why}\n{n} points of {d} features, {problem.dtype}, {_core.isa()} with {_core.threads()} threads; "
            f"{'products and kernels in one pass' if fused else 'products by BLAS, kernels in place'}, "
            f"{tiles * (tiles + 1) // 2} tiles of {side} rows\n"
            f"result {size / 1e6:,.0f} MB; about {_estimate(problem, n, path):.2g} s")  # fmt: skip


def _estimate(problem: Problem, n: int, path: Path) -> float:
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


def plan_images(net: ConvNetwork, X: Any) -> str:
    """What ``gram(net, X)`` will do; see :meth:`ConvNetwork.plan`."""
    problem = _conv.Problem(net, X, None, None, None, "channels_last")
    n, grid = len(problem.x), "x".join(str(size) for size in problem.grid)
    planes = f"all {problem.positions} shifts" if problem.pooled else "equal positions only"
    state = "half squared distances" if problem.fast else "half squared distances and norms of sums, in float64"
    seconds = 0.5e-9 * n * (n + 1) * problem.nanoseconds()
    where, time = f"{_core.isa()} with {_core.threads()} threads", f"; about {seconds:.2g} s"
    if problem.gpu is not None:
        where, time = f"on {problem.gpu.name}", ""
    return (
        f"recursion on planes of positions: {len(net.layers)} layers, {planes}, {state}\n"
        f"{n} images of {grid} positions and {problem.x.images.shape[1]} channels, {problem.dtype}, {where}\n"
        f"result {n * n * problem.dtype.itemsize / 1e6:,.0f} MB{time}"
    )

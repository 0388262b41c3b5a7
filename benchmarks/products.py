"""The two routes of gram and NumPy's products, shape by shape: what ``ntkfast._gemm.fuses`` decides by.

Every setting of threads and BLAS kernels is a process of its own, since both are chosen when the BLAS starts. Within it
the contenders run in turns: gram in one pass, gram with products by the BLAS, NumPy's two products, the package's own.
One thread is timed by its CPU time, which others on the machine hardly change.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ntkfast import _bench, _core, fully_connected, gram, gram_matmul

Row = dict[str, Any]
DEPTH = 10
#: (n, m, d); m = 0: symmetric
SHAPES = [
    *((n, 0, d) for n in (64, 256, 1000) for d in (8, 784)),
    *((4096, 0, d) for d in (8, 64, 784)),
    (200, 0, 4096),
    (2048, 0, 4096),
    *((n, 4096, 784) for n in (1, 4, 16, 48, 200)),
    (500, 1000, 4096),
    (2000, 3000, 784),
]
LARGE = [(8192, 0, 784)]
SMALL = [(64, 0, 8), (256, 0, 64), (1000, 0, 784), (1, 4096, 64), (500, 700, 64)]
#: Threads and kernels of OpenBLAS; "" is what it chooses itself.
SETTINGS = [(threads, core) for threads in (1, 2) for core in ("", "SKYLAKEX", "HASWELL")]
#: Seconds of one timed call, shorter ones are repeated.
_CALL = 2e-3


def _routes(x: Any, y: Any, out: Any) -> dict[str, Callable[[], object]]:
    """gram by either route, NumPy's products, and the package's own, all into one array."""
    net = fully_connected(DEPTH)

    def by(route: str) -> Callable[[], object]:
        def call() -> None:
            os.environ["NTKFAST_GEMM"] = route
            gram(net, x, y, out=out)

        return call

    right = x if y is None else y
    calls: dict[str, Callable[[], object]] = {"blas": by("blas"), "fused": by("fused")}
    calls["X @ Y.T"] = lambda: np.matmul(x, right.T, out=out)
    if y is None:
        calls["X @ X.copy().T"] = lambda: np.matmul(x, x.copy().T, out=out)
    return calls | {"product": lambda: _core.product(x, y, out)}


def _repeated(call: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """So many calls in one that it takes _CALL seconds."""
    call()
    begin = time.perf_counter()
    call()
    count = max(1, int(_CALL / (time.perf_counter() - begin)))
    return (lambda: [call() for _ in range(count)]), count


def _peak(single: bool, clock: Callable[[], float]) -> float:
    """Fused multiply-adds in registers: operations a second, the best of a few."""
    _core.peak(1000, single)
    best = 0.0
    for _ in range(7):
        begin = clock()
        done = _core.peak(2_000_000, single)
        best = max(best, done / (clock() - begin))
    return best


def shape_row(n: int, m: int, d: int, dtype: str, rounds: int) -> Row:
    """Medians of one shape in microseconds, and the product's share of the peak."""
    rng = np.random.default_rng(n + m + d)
    x = rng.standard_normal((n, d)).astype(dtype)
    y = rng.standard_normal((m, d)).astype(dtype) if m else None
    out = np.empty((n, m or n), dtype)
    clock = time.thread_time if _core.threads() == 1 else time.perf_counter
    calls = _routes(x, y, out)
    calls["blas"]()
    other = out.copy()
    calls["fused"]()
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(x if y is None else y, axis=1)
    unit = 2 * DEPTH * scale * np.finfo(dtype).eps * (16 + d)
    if not (np.abs(out - other) <= unit).all():
        raise ArithmeticError(f"the routes differ, {n} x {m or n}, d={d} {dtype}")
    turns = {name: _repeated(call) for name, call in calls.items()}
    times = _bench.interleave({name: call for name, (call, _) in turns.items()}, rounds, clock=clock)
    flops = d * n * (m * 2 if m else n + 1)
    once = {name: np.asarray(times[name]) / count for name, (_, count) in turns.items()}
    micro = {name: 1e6 * float(np.median(values)) for name, values in once.items()}
    fastest = min(value for name, value in micro.items() if "@" in name)
    return {"n": n, "m": m or n, "symmetric": not m, "d": d, "dtype": dtype,
            "us": {name: float(f"{value:.4g}") for name, value in micro.items()},
            "fused_over_blas": round(float(np.median(once["fused"] / once["blas"])), 3),
            "fused_over_numpy": round(micro["fused"] / fastest, 3),
            "of_peak": round(flops / (1e-6 * micro["product"] * _peak(dtype == "float32", clock)), 3)}  # fmt: skip


_MATMUL = """
import json, sys
sys.path.insert(0, {here!r})
import products
print(json.dumps(products.matmul_row({n})))
"""


def matmul_row(n: int, d: int = 100, columns: int = 10) -> Row:
    """gram_matmul beside NumPy's products of the tiles of the full square; of those a sample is timed."""
    rng = np.random.default_rng(n)
    x, v = rng.standard_normal((n, d)), rng.standard_normal((n, columns))
    side = min(2000, n // 2)
    out = np.empty((side, side))
    gram_matmul(fully_connected(DEPTH), x[:500], v[:500])
    np.matmul(x[:side], x[-side:].T, out=out)
    status = Path("/proc/self/status")

    def memory(name: str) -> int:
        found = re.search(rf"{name}:\s*(\d+)", status.read_text()) if status.exists() else None
        return int(found.group(1)) * 1024 if found else 0

    before = memory("VmRSS")
    if before:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    clock = time.thread_time if _core.threads() == 1 else time.perf_counter
    begin = clock()
    gram_matmul(fully_connected(DEPTH), x, v)
    seconds = clock() - begin
    peak = memory("VmHWM")
    starts = range(0, n - side + 1, side)
    tiles = []
    for i, j in rng.choice(len(starts), (15, 2)):
        a, b = (x[starts[k] : starts[k] + side] for k in (i, j))
        begin = clock()
        np.matmul(a, b.T, out=out)
        tiles.append(clock() - begin)
    square = float(np.median(tiles)) * (n / side) ** 2
    return {"n": n, "d": d, "columns": columns, "seconds": seconds, "numpy_seconds": square,
            "numpy": f"{len(tiles)} of {(n / side) ** 2:.0f} tiles of {side} x {side} timed, their median extrapolated",
            "ratio": seconds / square, "bytes": peak - before if before else None}  # fmt: skip


def _fresh(code: str, threads: int, core: str) -> Any:
    """The JSON that a process with so many threads and such a BLAS prints."""
    pools = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}
    environment = os.environ | pools | ({"OPENBLAS_CORETYPE": core} if core else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


_SHAPES = """
import json, sys
sys.path.insert(0, {here!r})
import products
print(json.dumps([products.shape_row(*shape, dtype, {rounds}) for shape in {shapes}
                  for dtype in ("float64", "float32")]))
"""


def measure(quick: bool, note: Callable[[str], None], one_thread: bool = False) -> list[Row]:
    """Rows of every setting, then that of gram_matmul; `one_thread`: only what a busy machine can tell."""
    here = str(Path(__file__).resolve().parent)
    rows: list[Row] = []
    for threads, core in SETTINGS[::3] if quick else SETTINGS:
        if one_thread and threads > 1:
            continue
        note(f"products, {threads} threads, OPENBLAS_CORETYPE={core or 'unset'}")
        shapes = SMALL if quick else SHAPES + (LARGE if threads == 2 else [])
        found = _fresh(_SHAPES.format(here=here, rounds=3 if quick else 5, shapes=shapes), threads, core)
        rows += [{"threads": threads, "core": core or "default"} | row for row in found]
    note("gram_matmul")
    threads = 1 if one_thread or os.cpu_count() == 1 else 2
    row = _fresh(_MATMUL.format(here=here, n=6000 if quick else 50_000), threads, "")
    return [*rows, {"threads": threads, "core": "default"} | row]


def targets(rows: list[Row]) -> list[tuple[str, float, float, str, bool]]:
    """(name, measured, limit, unit, least) of what must show."""
    found = []
    for row in rows:
        where = f"n = {row['n']}, d = {row['d']}, {row['threads']} threads, BLAS {row['core']}"
        if "columns" in row:
            found.append(
                (f"gram_matmul, {where}: over NumPy's products of the full square", row["ratio"], 1.0, "", False)
            )
            if row["bytes"] is not None:
                found.append(
                    (f"gram_matmul, {where}: memory beyond the inputs", row["bytes"] / 1e6, 200.0, "MB", False)
                )
            continue
        if not row["symmetric"] or row["n"] < 4096 or row["d"] not in (64, 784):
            continue
        name, single = f"gram, depth {DEPTH}, {row['dtype']}, {where}", row["dtype"] == "float32"
        if row["d"] == 784:
            limit = 0.65 if row["core"] == "SKYLAKEX" and not single else (0.35 if single else 0.5)
            found.append((f"{name}: over X @ X.T", row["us"]["fused"] / row["us"]["X @ Y.T"], limit, "", False))
            found.append((f"product, {row['dtype']}, {where}: share of the peak", row["of_peak"], 0.75, "", True))
        else:
            found.append((f"{name}: over the faster of NumPy's two", row["fused_over_numpy"], 0.9, "", False))
    return found

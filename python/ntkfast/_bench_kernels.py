"""Parts of ``python -m ntkfast bench`` that one core computes alone: recursions, tables, and the making of tables.

Times are those of the thread, so that others on the machine count for little; run it by :func:`one_core`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core, _plan, _table
from ntkfast._plan import Mix, compile_network, mix_of
from ntkfast._problem import Problem
from ntkfast.network import Network, bottleneck_resnet, fully_connected, resnet

Array = NDArray[Any]
Calls = Mapping[Any, Callable[[], object]]

#: Pairs of a tile: products and results together stay in a cache of 1 MB.
_TILE = (64, 512)
#: Depths of the recursion rows: the slope between the last two is what one more layer costs.
DEPTHS = (3, 10, 34)
#: Depths of the tables, for evaluation and for making them.
TABLE_DEPTHS = (3, 100, 1000)
#: Longest time for one row.
_SECONDS = 4.0
#: Bytes of a vector of arguments or results of a table: three of them stay in the second cache.
_CHUNK = 1 << 16
#: Pairs of the short call, whose time is subtracted: what a call costs apart from its pairs.
_SHORT = 64


def quartiles(values: Any) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]


def _families() -> list[tuple[str, Callable[[int], Network], bool]]:
    """(name, network of a depth, unit rows) of the recursion rows."""
    return [("fully connected", fully_connected, True),
            ("residual", resnet, True),
            ("bottleneck", bottleneck_resnet, True),
            ("fully connected, biases", partial(fully_connected, bias_variance=0.1), True),
            ("fully connected, erf", partial(fully_connected, activation="erf"), True),
            ("fully connected, gelu", partial(fully_connected, activation="gelu"), True),
            ("fully connected, tanh", partial(fully_connected, activation="tanh"), True),
            ("fully connected, tanh, norms differ", partial(fully_connected, activation="tanh"), False)]  # fmt: skip


def _tables() -> list[tuple[str, Callable[[int], Network]]]:
    """(name, network of a depth) of the table rows."""
    return [("fully connected", fully_connected), ("residual", resnet), ("bottleneck", bottleneck_resnet)]


def _in_turns(calls: Calls, counts: Mapping[Any, int], samples: int) -> dict[Any, Array]:
    """CPU seconds of single calls, in short samples that take turns; the first sample does not count."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    begin = time.perf_counter()
    for sample in range(-1, samples):
        if sample > 4 and time.perf_counter() - begin > _SECONDS:
            break
        for key, call in calls.items():
            start = time.thread_time()
            for _ in range(counts[key]):
                call()
            if sample >= 0:
                times[key].append((time.thread_time() - start) / counts[key])
    return {key: np.array(values) for key, values in times.items()}


# --- recursion -------------------------------------------------------------------------------------------------------


def _tile_call(net: Network, dtype: str, unit: bool, table: Any = None) -> Callable[[], object]:
    """The compiled kernel alone on one tile in cache: no BLAS, no search for close pairs, no mirror image."""
    rows, cols = _TILE
    x = np.random.default_rng(1).standard_normal((rows + cols, 32)) / np.sqrt(32.0)
    if unit:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(dtype)
    problem = Problem(net, x[:rows], x[rows:], None, None)
    products = x[:rows] @ x[rows:].T
    result = np.empty_like(products)
    ones, zeros = (np.ones(rows), np.ones(cols)), (np.zeros(rows), np.zeros(cols))
    outputs = [(result, None, mix_of(net, "ntk").as_list(), *ones, *zeros, table)]
    sides = problem.x.tile(slice(0, rows)), problem.y.tile(slice(0, cols))
    return lambda: _core.tile(problem.compiled.core, products, *sides, None, 0.0, outputs, None)


def kernel_rows(samples: int, families: int | None = None) -> list[dict[str, Any]]:
    """CPU time in ns per entry and layer of the recursion alone, data in cache; needs a process with one thread."""
    found, entries = [], _TILE[0] * _TILE[1]
    for name, build, unit in _families()[:families]:
        for dtype in ("float64", "float32"):
            calls = {depth: _tile_call(build(depth), dtype, unit) for depth in DEPTHS}
            times = _in_turns(calls, {depth: max(1, 60 // depth) for depth in DEPTHS}, samples)
            cost = {depth: 1e9 * values / entries for depth, values in times.items()}
            low, high = DEPTHS[-2:]
            found.append({
                "family": name, "dtype": dtype, "threads": _core.threads(),
                "per_layer": quartiles((cost[high] - cost[low]) / (high - low)),
                "whole": {str(depth): [v / depth for v in quartiles(cost[depth])] for depth in DEPTHS},
            })  # fmt: skip
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def _made(net: Network, dtype: str, mix: Mix) -> Any:
    """The table of a network, made anew."""
    kind = np.dtype(dtype)
    compiled = compile_network(net, [np.ones(1)], kind)
    return _core.Table(compiled.core, mix.as_list(), 1.0, kind == np.float32)


def table_error(net: Network, table: Any, dtype: str) -> float:
    """Largest error of a table against the recursion in float64, on the scale max(|f|, 0.1 max |f|); NaN if any is.

    The angles are dense at both ends.
    """
    y = np.concatenate([np.linspace(0, 1, 2001), np.logspace(-8, 0, 1000)]).astype(dtype)
    x, s = np.tile(y * y, 2), np.repeat(np.array([1, -1], dtype=dtype), len(y))
    ones = np.ones(len(x))
    compiled, mix = compile_network(net, [np.ones(1)], np.dtype(np.float64)), mix_of(net, "ntk").as_list()
    exact = _core.pairs(compiled.core, x.astype(np.float64), s.astype(np.float64), ones, ones, mix)
    scale = np.maximum(np.abs(exact), 0.1 * np.abs(exact).max())
    return float(np.max(np.abs(table.values(x, s) - exact) / scale))


def _values_call(table: Any, dtype: str, isa: str, size: int) -> Callable[[], object]:
    rho = np.random.default_rng(2).uniform(-1, 1, size)
    x, s = (1 - np.abs(rho)).astype(dtype), np.sign(rho).astype(dtype)
    return lambda: table.values(x, s, isa)


def _table_row(name: str, depth: int, net: Network, dtype: str, samples: int) -> dict[str, Any] | None:
    """Evaluation of one table by each instruction set and in a tile; None without a table that is accurate enough."""
    table = _made(net, dtype, mix_of(net, "ntk"))
    if not table.reached:
        return None
    size, entries = _CHUNK // np.dtype(dtype).itemsize, _TILE[0] * _TILE[1]
    calls: dict[Any, Callable[[], object]] = {"tile": _tile_call(net, dtype, True, table)}
    for isa in _core.available():
        calls[isa] = _values_call(table, dtype, isa, size)
        calls[isa, _SHORT] = _values_call(table, dtype, isa, _SHORT)
    times = _in_turns(calls, {key: 20 if key == "tile" else 40 for key in calls}, samples)
    return {
        "family": name, "depth": depth, "dtype": dtype, "threads": _core.threads(), "isa": _core.isa(),
        "degree": len(table.arrays()[0]) - 1, "panels": table.panels, "verified": table.error,
        "error": table_error(net, table, dtype),
        "values": {isa: quartiles(1e9 * (times[isa] - times[isa, _SHORT]) / (size - _SHORT))
                   for isa in _core.available()},
        "tile": quartiles(1e9 * times["tile"] / entries),
    }  # fmt: skip


def table_rows(samples: int, families: int | None = None) -> list[dict[str, Any]]:
    """CPU time in ns per entry of compiled tables, data in cache; needs a process with one thread.

    "values" is the polynomials alone, by instruction set; "tile" is all that gram does to an entry but for products,
    close pairs and mirror image, whatever the depth.
    """
    found = []
    for name, build in _tables()[:families]:
        for depth in TABLE_DEPTHS:
            for dtype in ("float64", "float32"):
                row = _table_row(name, depth, build(depth), dtype, samples)
                if row is not None:
                    found.append(row)
    return found


def forget() -> None:
    """Empty the caches of plans and tables."""
    for module in (_plan, _table):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def build_rows(samples: int, families: int | None = None) -> list[dict[str, Any]]:
    """CPU seconds of making plan and table with cold caches, as the first call does."""
    found = []
    for name, build in _tables()[:families]:
        for depth in TABLE_DEPTHS:
            for dtype in ("float64", "float32"):
                net = build(depth)
                plans, tables = [], []
                for _ in range(samples):
                    forget()
                    start = time.thread_time()
                    compile_network(net, [np.ones(1)], np.dtype(dtype))
                    middle = time.thread_time()
                    table = _made(net, dtype, mix_of(net, "ntk"))
                    plans.append(middle - start)
                    tables.append(time.thread_time() - middle)
                found.append({
                    "family": name, "depth": depth, "dtype": dtype, "reached": table.reached, "verified": table.error,
                    "plan": quartiles(plans), "table": quartiles(tables),
                    "seconds": quartiles(np.array(plans) + np.array(tables)),
                })  # fmt: skip
    return found


# --- one core --------------------------------------------------------------------------------------------------------

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"), "1")


def one_core(function: str, *arguments: object) -> Any:
    """A function of this module in a process of its own with one thread."""
    code = f"import json; from ntkfast import _bench_kernels as b; print(json.dumps(b.{function}(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | ONE_THREAD,
                          check=True, capture_output=True, text=True)  # fmt: skip
    return json.loads(done.stdout)

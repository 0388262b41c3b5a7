"""The table path: where a kernel is a function of one angle, it is compiled once, and its depth costs nothing more.

That is so for layers without biases and with positively homogeneous activations, K_ij = |x_i| |x_j| f(rho), and for any
dense network if all points have one norm. The compiler is csrc/table_compiler.cpp; it verifies what it made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._plan import Compiled, Mix, compile_network
from ntkfast.network import Network

Vector = NDArray[np.float64]

#: Norms that differ by less than this many eps of the dtype are one norm: rows divided by their norm once.
_EQUAL = 3.0
#: Tables kept: about 5 kB each.
_KEPT = 256


@dataclass(frozen=True)
class Costs:
    """Rough nanoseconds of a pair; they only choose the shorter path."""

    prefix: float  #: a layer of the prefix
    suffix: float  #: a layer of the suffix
    pair: float  #: apart from the layers
    lookup: float  #: all of it, by a table


#: One core with AVX-512, 100 points: 10 layers of ReLU save 10.4 ns, 3 of erf 23, 5 of GELU 27. A table takes 3.1 to
#: 3.6 ms (float32: 1.9 to 2.2) for up to 100 layers, 6 ms for 1000.
CPU = Costs(1.0, 7.0, 1.0, 1.0)
#: By operations, not measured. A layer is about 40 fused multiply-adds (csrc/math/layer.h), a look-up about as many
#: loads from shared memory as 1.5 layers take; a GPU does all that a hundred times as fast as a CPU does its layers.
GPU = Costs(0.01, 0.12, 0.01, 0.025)
#: Nanoseconds to make a table, and what a layer adds to that, in units of its cost on a CPU (nodes); always on the CPU.
_BUILD, _NODES = 3e6, 4e3


@dataclass(frozen=True)
class Path:
    """How a call computes its kernels: by one table for each, or by the recursion."""

    tables: tuple[Any, ...] | None
    why: str


def _forced() -> str:
    """NTKFAST_PATH: "table", "recursion" or nothing."""
    forced = os.environ.get("NTKFAST_PATH", "")
    if forced not in ("", "table", "recursion"):
        raise ValueError(f"NTKFAST_PATH={forced!r}: use table or recursion, or leave it unset")
    return forced


def _common_norm(compiled: Compiled, norms: Sequence[Vector], dtype: np.dtype[Any]) -> float | None:
    """The norm for which the kernel is a function of the angle alone, None if there is none."""
    if compiled.prefix_only:
        return 1.0
    low, high = min(float(r.min()) for r in norms), max(float(r.max()) for r in norms)
    spread = _EQUAL * float(np.finfo(dtype).eps)
    if not low > 0 or high - low > spread * high:
        return None
    middle = 0.5 * (low + high)
    return 1.0 if abs(middle - 1.0) <= 0.5 * spread else middle


@lru_cache(maxsize=_KEPT)
def _table(net: Network, mix: Mix, dtype: np.dtype[Any], norm: float) -> Any:
    """The compiled kernel of a network; ``reached`` tells whether it is accurate enough."""
    compiled = compile_network(net, [np.array([norm])], dtype)
    return _core.Table(compiled.core, mix.as_list(), norm, dtype == np.float32)


def choose(
    net: Network,
    compiled: Compiled,
    mixes: Sequence[Mix],
    norms: Sequence[Vector],
    dtype: np.dtype[Any],
    pairs: float,
    costs: Costs = CPU,
) -> Path:
    """The path of a call with `pairs` distinct pairs; it depends on the call alone, not on what was computed before."""
    forced = _forced()
    if forced == "recursion":
        return Path(None, "NTKFAST_PATH=recursion")
    norm = _common_norm(compiled, norms, dtype)
    if norm is None:
        return Path(None, "biases or activations that are not positively homogeneous, and points of different norm")

    def layers(c: Costs) -> float:
        return c.prefix * compiled.layers + c.suffix * compiled.suffix_layers

    saved = pairs * (layers(costs) + costs.pair - costs.lookup)
    if saved < _BUILD + _NODES * layers(CPU) and not forced:
        return Path(None, f"{pairs:,.0f} pairs are done before a table is made")
    tables = tuple(_table(net, mix, dtype, norm) for mix in mixes)
    if not all(table.reached for table in tables):
        worst = max(table.error for table in tables)
        found = f"the best has {worst:.1e}" if np.isfinite(worst) else "no fit on its panels"
        return Path(None, f"no table of this network is accurate enough ({found})")
    what = "norms factor out" if compiled.prefix_only else f"all norms are {norm:.6g}"
    return Path(tables, what)

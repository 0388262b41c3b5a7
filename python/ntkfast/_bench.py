"""``python -m ntkfast bench``: this machine's table of time and error, beside NumPy's own ``X @ X.T``.

Everything a row needs runs in one process and in turns (A B C A B C ...), because a ratio of two times taken minutes
apart says nothing on a shared machine. Every result is compared with :mod:`ntkfast.reference` before it is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _bench_text as text
from ntkfast import _core, reference
from ntkfast._bench_kernels import one_core, quartiles
from ntkfast._gemm import fuses
from ntkfast._machine import blas, processor
from ntkfast._plan import mix_of
from ntkfast._problem import Problem
from ntkfast._tiles import Job, run
from ntkfast.gram import gram
from ntkfast.network import Network, bottleneck_resnet, fixed_readout_resnet, fully_connected, resnet

Array = NDArray[Any]
Calls = Mapping[str, Callable[[], object]]

#: Results with a larger error (relative, see `max_error`) are not timed.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6}
#: Others go on after their last call: threads of OpenBLAS spin for 2^28 cycles, 0.1 s, JAX gives memory back in the
#: background. The next call must not pay for that. Seconds of one look, and at most.
_LOOK, _REST = 0.05, 5.0
#: Rows of the NumPy reference that errors are measured on.
_SAMPLE = 40
#: The reference itself sees the angle of two points with an error of 1e-16 / angle; closer pairs are left out.
_CLOSE = 5e-5
#: Depths that are compared in one run, in `depth_rows`.
GRAM_DEPTHS = (1, 3, 100, 1000)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    network: Network
    n: int
    d: int
    dtype: str = "float64"
    rows: str = "normal"  #: "normal": norms differ by a few percent; "unit"
    path: str = ""  #: "table" or "recursion": forced; "": as gram chooses
    clusters: int = 0  #: > 0: every point is close to one of so many centres, in random order

    def points(self) -> Array:
        """The same points on every machine, (n, d)."""
        rng = np.random.default_rng(self.n + self.d)
        x = rng.standard_normal((self.n, self.d)) / np.sqrt(self.d)
        if self.clusters:  # 1 - rho is about 3e-4: close for both dtypes, harmless for the reference
            x = 0.018 * x + x[rng.integers(self.clusters, size=self.n)]
        if self.rows == "unit":
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        return np.ascontiguousarray(x, dtype=self.dtype)

    @property
    def pairs(self) -> int:
        return self.n * (self.n + 1) // 2


def standard_cases(quick: bool) -> list[Case]:
    """The table of ``python -m ntkfast bench``."""
    if quick:
        small = partial(Case, n=512, d=64)
        return [small("fully_connected(3)", fully_connected(3), path="recursion"),
                small("fully_connected(3)", fully_connected(3), dtype="float32", path="recursion"),
                small("bottleneck_resnet(10)", bottleneck_resnet(10), path="table"),
                small("fully_connected(2, gelu), unit rows", fully_connected(2, "gelu"), rows="unit")]  # fmt: skip
    large = partial(Case, n=4096, d=784)
    recursion = partial(large, path="recursion")
    deep = [recursion(f"fully_connected({depth})", fully_connected(depth)) for depth in (1, 3, 10, 100)]
    biases = fully_connected(3, bias_variance=0.1)
    return [*deep,
            recursion("fully_connected(3)", fully_connected(3), dtype="float32"),
            recursion("fully_connected(10)", fully_connected(10), dtype="float32"),
            Case("fully_connected(3)", fully_connected(3), 1024, 784),
            Case("fully_connected(3)", fully_connected(3), 8192, 784),
            Case("fully_connected(3)", fully_connected(3), 4096, 64),
            large("resnet(10)", resnet(10)),
            large("bottleneck_resnet(10)", bottleneck_resnet(10)),
            large("fixed_readout_resnet(10)", fixed_readout_resnet(10)),
            large("fully_connected(3), biases", biases),
            large("fully_connected(3, erf)", fully_connected(3, "erf")),
            recursion("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), rows="unit"),
            large("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), rows="unit"),
            large("fully_connected(3, tanh), unit rows", fully_connected(3, "tanh"), rows="unit")]  # fmt: skip


def rest() -> None:
    """Wait until no thread of this process computes, but not for ever."""
    start = time.perf_counter()
    while time.perf_counter() - start < _REST:
        before = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - before < 0.05 * _LOOK:
            return


def interleave(
    calls: Calls, rounds: int | None = None, seconds: float = 8.0, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Array]:
    """Seconds of every call, (rounds,), taken in turns after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    done, start = -1, time.perf_counter()
    while True:
        for name, call in calls.items():
            if _core.threads() > 1:
                rest()
            begin = clock()
            call()
            if done >= 0:
                times[name].append(clock() - begin)
        done += 1
        enough = (done >= 5 and time.perf_counter() - start > seconds) or done >= 25
        if done == rounds or (rounds is None and enough):
            return {name: np.array(values) for name, values in times.items()}


def max_error(net: Network, x: Array, result: Array, exact: Callable[[Network, Array], Any] = reference.gram) -> float:
    """Largest |K - K_ref| / max(|K_ref|, 0.1 max |K_ref|) on a sample of rows and columns; NaN if any entry is."""
    some = np.sort(np.random.default_rng(0).choice(len(x), min(len(x), _SAMPLE), replace=False))
    points = x[some].astype(np.float64)
    expected = np.asarray(exact(net, points))
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    trusted = (np.abs(unit @ unit.T) < 1 - _CLOSE) | np.eye(len(some), dtype=bool)
    error = np.abs(result[np.ix_(some, some)] - expected) / np.maximum(np.abs(expected), 0.1 * np.abs(expected).max())
    return float(error[trusted].max())


def check(name: str, error: float, dtype: str) -> float:
    """`error`, if it is small enough for the time to mean anything."""
    if not error <= TOLERANCE[dtype]:
        raise ArithmeticError(f"{name}, {dtype}: error {error:.1e} exceeds {TOLERANCE[dtype]:.0e}; not timed")
    return error


@contextmanager
def forced(path: str) -> Iterator[None]:
    """gram by "table" or "recursion" ("": as it chooses)."""
    before = os.environ.get("NTKFAST_PATH", "")
    os.environ["NTKFAST_PATH"] = path or before
    try:
        yield
    finally:
        os.environ["NTKFAST_PATH"] = before


def by_recursion(net: Network, x: Array) -> Any:
    """The judge of deep networks, where the reference loses digits at every layer: 1e-11 at depth 1000."""
    with forced("recursion"):
        return gram(net, x)


def path_of(net: Network, x: Array) -> str:
    """The path of gram(net, x)."""
    return "recursion" if Problem(net, x, None, None, None).path([mix_of(net, "ntk")]).tables is None else "table"


def gram_call(case: Case, x: Array, out: Array) -> Callable[[], Array]:
    """gram of a case on its path, into `out`."""

    def call() -> Array:
        with forced(case.path):
            return np.asarray(gram(case.network, x, out=out))

    return call


def numpy_products(x: Array) -> dict[str, Callable[[], object]]:
    """NumPy's two ways to X X^T, into one reused array; their rivals get the same favour."""
    out = np.empty((len(x), len(x)), dtype=x.dtype)
    return {"X @ X.T": lambda: np.matmul(x, x.T, out=out), "X @ X.copy().T": lambda: np.matmul(x, x.copy().T, out=out)}


def tiled_product(x: Array) -> Callable[[], object]:
    """The inner products alone, as gram makes them: its own, or NumPy's over the very tiles that gram uses."""
    out = np.empty((len(x), len(x)), dtype=x.dtype)
    if fuses(x.dtype, out.shape, x.shape[1], False):
        return lambda: _core.product(x, None, out)
    return lambda: run(Job(x, x, (out,), True, lambda *_: None, 1.0))


def measure(case: Case, rounds: int | None = None, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """One row: check, then time gram, NumPy's products, and the products of gram's own tiles in turns."""
    x = case.points()
    out = np.empty((case.n, case.n), dtype=case.dtype)
    calls: dict[str, Callable[[], object]] = {"gram": gram_call(case, x, out), **numpy_products(x),
                                              "tiles": tiled_product(x)}  # fmt: skip
    calls["gram"]()
    error = check(case.name, max_error(case.network, x, out), case.dtype)
    with forced(case.path):
        path = path_of(case.network, x)
    times = interleave(calls, rounds, clock=clock)
    best = min(("X @ X.T", "X @ X.copy().T"), key=lambda name: float(np.median(times[name])))
    median = float(np.median(times["gram"]))
    return {
        "case": case.name, "n": case.n, "d": case.d, "dtype": case.dtype, "rows": case.rows,
        "path": path, "layers": len(case.network.layers), "rounds": len(times["gram"]),
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "product": best,
        "ratio": quartiles(times["gram"] / times[best]),
        "gflops": 2e-9 * case.n**2 * case.d / median,
        "product_gflops": 2e-9 * case.n**2 * case.d / float(np.median(times[best])),
        "beyond_product": quartiles(times["gram"] - times[best]),
        "beyond_tiles": quartiles(times["gram"] - times["tiles"]),
        "ns_per_pair_core":
            1e9 * float(np.median(times["gram"] - times["tiles"])) * _core.threads() / case.pairs,
        "error": error,
    }  # fmt: skip


def depth_rows(
    n: int, d: int, dtype: str, rounds: int | None = None, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """gram at every depth of GRAM_DEPTHS, as it chooses its path, and NumPy's products, all in the same turns.

    "first" is the first call of all; the others find the tables made. "over_3": time over that at depth 3.
    """
    found, calls = [], dict[str, Callable[[], object]]()
    x, out = Case("", fully_connected(1), n, d, dtype).points(), np.empty((n, n), dtype=dtype)
    for depth in GRAM_DEPTHS:
        case = Case(f"fully_connected({depth})", fully_connected(depth), n, d, dtype)
        call = calls[case.name] = gram_call(case, x, out)
        start = clock()
        call()
        first = clock() - start
        judge = reference.gram if depth <= 100 else by_recursion
        error = check(case.name, max_error(case.network, x, out, judge), dtype)
        found.append({"case": case.name, "depth": depth, "n": n, "d": d, "dtype": dtype,
                      "path": path_of(case.network, x), "first": first, "error": error})  # fmt: skip
    products = numpy_products(x)
    times: dict[Any, Array] = interleave({**calls, **products}, rounds, clock=clock)
    best = min(products, key=lambda name: float(np.median(times[name])))
    for row in found:
        own = times[row["case"]]
        row.update(rounds=len(own), product=best, seconds=quartiles(own), product_seconds=quartiles(times[best]),
                   ratio=quartiles(own / times[best]), ratio_of_medians=float(np.median(own) / np.median(times[best])),
                   over_3=quartiles(own / times["fully_connected(3)"]))  # fmt: skip
    return found


def reference_row(n: int, depth: int = 3) -> dict[str, Any]:
    """gram beside the NumPy reference, which computes all n^2 entries with the formulas as they are written."""
    net = fully_connected(depth)
    x = Case("", net, n, 64).points()
    times = interleave({"gram": lambda: gram(net, x), "reference": lambda: reference.gram(net, x)}, 3)
    return {"case": f"fully_connected({depth})", "n": n, "d": 64,
            "seconds": {name: quartiles(values) for name, values in times.items()},
            "ratio": quartiles(times["reference"] / times["gram"])}  # fmt: skip


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import ntkfast

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {"cpu": processor(), "isa": _core.isa(), "threads": _core.threads(), "load": round(load, 2),
            "python": ".".join(map(str, sys.version_info[:3])), "numpy": np.__version__,
            "blas": blas(), "ntkfast": ntkfast.__version__,
            "date": datetime.date.today().isoformat()}  # fmt: skip


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ntkfast bench", description="This machine's table of time and error."
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--json", metavar="FILE", help="write the measurements to FILE as well")
    parser.add_argument("--cases", metavar="TEXT", default="", help="only rows whose network contains TEXT")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measure and print; 2 if no case matches."""
    options = _arguments(argv)
    chosen = [case for case in standard_cases(options.quick) if options.cases in case.name]
    if not chosen:
        names = "\n  ".join(dict.fromkeys(case.name for case in standard_cases(options.quick)))
        print(f"no case contains {options.cases!r}; there are\n  {names}", file=sys.stderr)
        return 2
    rows = []
    for case in chosen:
        if sys.stderr.isatty():
            print(f"{case.name} n={case.n} d={case.d} {case.dtype} ...", file=sys.stderr)
        rows.append(measure(case, 3 if options.quick else None))
    depths, kernels, tables, builds = [], [], [], []
    if not options.cases:
        for n, d in ((512, 64),) if options.quick else ((4096, 784), (8192, 784)):
            for dtype in ("float64", "float32"):
                depths += depth_rows(n, d, dtype, 3 if options.quick else None)
        few = (5, 2) if options.quick else (40, None)
        kernels, tables = one_core("kernel_rows", *few), one_core("table_rows", *few)
        builds = one_core("build_rows", *((2, 2) if options.quick else (9, None)))
    slow = reference_row(256 if options.quick else 1024)
    host = machine()
    if options.json:
        report = {"machine": host, "rows": rows, "depths": depths, "kernels": kernels, "tables": tables,
                  "builds": builds, "reference": slow}  # fmt: skip
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    print(text.grams(rows))
    if not options.cases:
        print("", text.depths(depths), "", text.kernels(kernels), "", text.tables(tables, builds), sep="\n")
    theirs, ours = (f"{1e3 * slow['seconds'][name][1]:.1f} ms" for name in ("reference", "gram"))
    print(f"\n{slow['case']}, n={slow['n']}: NumPy reference {theirs}, gram {ours}, ratio {slow['ratio'][1]:.0f}")
    print(f"\n{text.machine_line(host)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

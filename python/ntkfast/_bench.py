"""``python -m ntkfast bench``: this machine's table of time and error, beside NumPy's own ``X @ X.T``.

Everything a row needs runs in one process and in turns (A B C A B C ...), because a ratio of two times taken minutes
apart says nothing on a shared machine. Every result is compared with :mod:`ntkfast.reference` before it is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core, reference
from ntkfast._plan import mix_of
from ntkfast._tiles import Job, run
from ntkfast.gram import _Problem, gram
from ntkfast.network import Network, bottleneck_resnet, fixed_readout_resnet, fully_connected, resnet

Array = NDArray[Any]
Calls = Mapping[str, Callable[[], object]]

#: Results with a larger error (relative, see `max_error`) are not timed.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6}
#: Thread pools of BLAS and OpenMP spin for a while after their last call; the next call must not pay for that.
_PAUSE = 0.03
#: Rows of the NumPy reference that errors are measured on.
_SAMPLE = 40
#: The reference itself sees the angle of two points with an error of 1e-16 / angle; closer pairs are left out.
_CLOSE = 5e-5
#: Pairs of a tile for the kernel rows: products and results together stay in a cache of 1 MB.
_TILE = (64, 512)
#: Depths of the kernel rows: the slope between the last two is what one more layer costs.
_DEPTHS = (3, 10, 34)
#: Longest time for one of the kernel rows.
_KERNEL_SECONDS = 4.0


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    network: Network
    n: int
    d: int
    dtype: str = "float64"
    rows: str = "normal"  #: "normal": norms differ by a few percent; "unit"
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
        return [small("fully_connected(3)", fully_connected(3)),
                small("fully_connected(3)", fully_connected(3), dtype="float32"),
                small("bottleneck_resnet(10)", bottleneck_resnet(10)),
                small("fully_connected(2, gelu), unit rows", fully_connected(2, "gelu"), rows="unit")]  # fmt: skip
    large = partial(Case, n=4096, d=784)
    deep = [large(f"fully_connected({depth})", fully_connected(depth)) for depth in (1, 3, 10, 100)]
    biases = fully_connected(3, bias_variance=0.1)
    return [*deep,
            large("fully_connected(3)", fully_connected(3), dtype="float32"),
            large("fully_connected(10)", fully_connected(10), dtype="float32"),
            Case("fully_connected(3)", fully_connected(3), 1024, 784),
            Case("fully_connected(3)", fully_connected(3), 8192, 784),
            Case("fully_connected(3)", fully_connected(3), 4096, 64),
            large("resnet(10)", resnet(10)),
            large("bottleneck_resnet(10)", bottleneck_resnet(10)),
            large("fixed_readout_resnet(10)", fixed_readout_resnet(10)),
            large("fully_connected(3), biases", biases),
            large("fully_connected(3, erf)", fully_connected(3, "erf")),
            large("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), rows="unit"),
            large("fully_connected(3, tanh), unit rows", fully_connected(3, "tanh"), rows="unit")]  # fmt: skip


def interleave(
    calls: Calls, rounds: int | None = None, seconds: float = 8.0, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Array]:
    """Seconds of every call, (rounds,), taken in turns after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    done, start = -1, time.perf_counter()
    while True:
        for name, call in calls.items():
            time.sleep(_PAUSE)
            begin = clock()
            call()
            if done >= 0:
                times[name].append(clock() - begin)
        done += 1
        enough = (done >= 5 and time.perf_counter() - start > seconds) or done >= 25
        if done == rounds or (rounds is None and enough):
            return {name: np.array(values) for name, values in times.items()}


def quartiles(values: Any) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]


def max_error(net: Network, x: Array, result: Array) -> float:
    """Largest |K - K_ref| / max(|K_ref|, 0.1 max |K_ref|) on a sample of rows and columns; NaN if any entry is."""
    some = np.sort(np.random.default_rng(0).choice(len(x), min(len(x), _SAMPLE), replace=False))
    points = x[some].astype(np.float64)
    expected = np.asarray(reference.gram(net, points))
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    trusted = (np.abs(unit @ unit.T) < 1 - _CLOSE) | np.eye(len(some), dtype=bool)
    error = np.abs(result[np.ix_(some, some)] - expected) / np.maximum(np.abs(expected), 0.1 * np.abs(expected).max())
    return float(error[trusted].max())


def check(name: str, error: float, dtype: str) -> float:
    """`error`, if it is small enough for the time to mean anything."""
    if not error <= TOLERANCE[dtype]:
        raise ArithmeticError(f"{name}, {dtype}: error {error:.1e} exceeds {TOLERANCE[dtype]:.0e}; not timed")
    return error


def numpy_products(x: Array) -> dict[str, Callable[[], object]]:
    """NumPy's two ways to X X^T, into one reused array; their rivals get the same favour."""
    out = np.empty((len(x), len(x)), dtype=x.dtype)
    return {"X @ X.T": lambda: np.matmul(x, x.T, out=out), "X @ X.copy().T": lambda: np.matmul(x, x.copy().T, out=out)}


def tiled_product(x: Array) -> Callable[[], object]:
    """The inner products alone, over the very tiles that gram uses."""
    out = np.empty((len(x), len(x)), dtype=x.dtype)
    return lambda: run(Job(x, x, (out,), True, lambda *_: None, 1.0))


def measure(case: Case, rounds: int | None = None, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """One row: check, then time gram, NumPy's products, and the products of gram's own tiles in turns."""
    x = case.points()
    out = np.empty((case.n, case.n), dtype=case.dtype)
    calls: dict[str, Callable[[], object]] = {"gram": lambda: gram(case.network, x, out=out), **numpy_products(x),
                                              "tiles": tiled_product(x)}  # fmt: skip
    calls["gram"]()
    error = check(case.name, max_error(case.network, x, out), case.dtype)
    times = interleave(calls, rounds, clock=clock)
    best = min(("X @ X.T", "X @ X.copy().T"), key=lambda name: float(np.median(times[name])))
    median = float(np.median(times["gram"]))
    steps = case.pairs * len(case.network.layers)
    return {
        "case": case.name, "n": case.n, "d": case.d, "dtype": case.dtype, "rows": case.rows,
        "layers": len(case.network.layers), "rounds": len(times["gram"]),
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "product": best,
        "ratio": quartiles(times["gram"] / times[best]),
        "gflops": 2e-9 * case.n**2 * case.d / median,
        "product_gflops": 2e-9 * case.n**2 * case.d / float(np.median(times[best])),
        "beyond_product": quartiles(times["gram"] - times[best]),
        "beyond_tiles": quartiles(times["gram"] - times["tiles"]),
        "ns_per_pair_layer_core":
            1e9 * float(np.median(times["gram"] - times["tiles"])) * _core.threads() / steps,
        "error": error,
    }  # fmt: skip


def _families() -> list[tuple[str, Callable[[int], Network], bool]]:
    """(name, network of a depth, unit rows) of the kernel rows."""
    return [("fully connected", fully_connected, True),
            ("residual", resnet, True),
            ("bottleneck", bottleneck_resnet, True),
            ("fully connected, biases", partial(fully_connected, bias_variance=0.1), True),
            ("fully connected, erf", partial(fully_connected, activation="erf"), True),
            ("fully connected, gelu", partial(fully_connected, activation="gelu"), True),
            ("fully connected, tanh", partial(fully_connected, activation="tanh"), True),
            ("fully connected, tanh, norms differ", partial(fully_connected, activation="tanh"), False)]  # fmt: skip


def _tile_call(net: Network, dtype: str, unit: bool) -> Callable[[], object]:
    """The compiled kernel alone on one tile in cache: no BLAS, no search for close pairs, no mirror image."""
    rows, cols = _TILE
    x = np.random.default_rng(1).standard_normal((rows + cols, 32)) / np.sqrt(32.0)
    if unit:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = x.astype(dtype)
    problem = _Problem(net, x[:rows], x[rows:], None, None)
    products = x[:rows] @ x[rows:].T
    result = np.empty_like(products)
    ones, zeros = (np.ones(rows), np.ones(cols)), (np.zeros(rows), np.zeros(cols))
    outputs = [(result, None, mix_of(net, "ntk").as_list(), *ones, *zeros, None)]
    sides = problem.x.tile(slice(0, rows)), problem.y.tile(slice(0, cols))
    return lambda: _core.tile(problem.compiled.core, products, *sides, None, 0.0, outputs, None)


def kernel_rows(samples: int, families: int | None = None) -> list[dict[str, Any]]:
    """CPU time in ns per entry and layer of the recursion alone, data in cache; needs a process with one thread."""
    found, entries = [], _TILE[0] * _TILE[1]
    for name, build, unit in _families()[:families]:
        for dtype in ("float64", "float32"):
            calls = {depth: _tile_call(build(depth), dtype, unit) for depth in _DEPTHS}
            cost: dict[int, list[float]] = {depth: [] for depth in _DEPTHS}
            begin = time.perf_counter()
            for sample in range(-1, samples):
                if sample > 4 and time.perf_counter() - begin > _KERNEL_SECONDS:
                    break
                for depth, call in calls.items():
                    # The thread's own clock, as others may run on this core; and short samples in turns.
                    count, start = max(1, 60 // depth), time.thread_time()
                    for _ in range(count):
                        call()
                    if sample >= 0:
                        cost[depth].append(1e9 * (time.thread_time() - start) / (count * entries))
            low, high = _DEPTHS[-2:]
            found.append({
                "family": name, "dtype": dtype, "threads": _core.threads(),
                "per_layer": quartiles((np.array(cost[high]) - np.array(cost[low])) / (high - low)),
                "whole": {str(depth): [v / depth for v in quartiles(cost[depth])] for depth in _DEPTHS},
            })  # fmt: skip
    return found


def kernels_on_one_core(samples: int, families: int | None = None) -> list[dict[str, Any]]:
    """`kernel_rows` in a process of its own with one thread."""
    code = f"import json; from ntkfast._bench import kernel_rows; print(json.dumps(kernel_rows({samples}, {families})))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          check=True, capture_output=True, text=True)  # fmt: skip
    return list(json.loads(done.stdout))


def reference_row(n: int, depth: int = 3) -> dict[str, Any]:
    """gram beside the NumPy reference, which computes all n^2 entries with the formulas as they are written."""
    net = fully_connected(depth)
    x = Case("", net, n, 64).points()
    times = interleave({"gram": lambda: gram(net, x), "reference": lambda: reference.gram(net, x)}, 3)
    return {"case": f"fully_connected({depth})", "n": n, "d": 64,
            "seconds": {name: quartiles(values) for name, values in times.items()},
            "ratio": quartiles(times["reference"] / times["gram"])}  # fmt: skip


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import ntkfast

    config: Any = np.show_config(mode="dicts")
    blas = config["Build Dependencies"]["blas"]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {"cpu": _cpu(), "isa": _core.isa(), "threads": _core.threads(), "load": round(load, 2),
            "python": ".".join(map(str, sys.version_info[:3])), "numpy": np.__version__,
            "blas": f"{blas['name']} {blas['version']}", "ntkfast": ntkfast.__version__,
            "date": datetime.date.today().isoformat()}  # fmt: skip


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
    return "\n".join(lines)


HEAD = ("gram(network, X)", "n", "d", "dtype", "ms (quartiles)", "/ X X^T", "GFLOP/s", "ns*", "max error")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of `measure` as text."""
    low, median, high = (1e3 * t for t in row["seconds"]["gram"])
    return [row["case"], str(row["n"]), str(row["d"]), row["dtype"], f"{median:.1f} ({low:.1f}-{high:.1f})",
            f"{row['ratio'][1]:.2f}", f"{row['gflops']:.0f}", f"{row['ns_per_pair_layer_core']:.2f}",
            f"{row['error']:.0e}"]  # fmt: skip


def kernel_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of `kernel_rows` as text."""
    whole = [f"{row['whole'][str(depth)][1]:.2f}" for depth in _DEPTHS]
    return [row["family"], row["dtype"], f"{row['per_layer'][1]:.2f}", *whole]


KERNEL_HEAD = ("compiled kernel alone", "dtype", "one more layer", *(f"depth {d}" for d in _DEPTHS))


def machine_line(found: Mapping[str, Any]) -> str:
    """The line under the table."""
    software = f"ntkfast {found['ntkfast']}, Python {found['python']}, NumPy {found['numpy']} with {found['blas']}"
    return (
        f"{found['cpu']}, {found['isa']}, {found['threads']} threads, load {found['load']}; {software}; {found['date']}"
    )


_NOTES = """\
/ X X^T    time over NumPy's faster one of X @ X.T and X @ X.copy().T (out= given, as for gram), same run, in turns
GFLOP/s    2 n^2 d / time: the rate NumPy would need for its product to take as long as the whole kernel
ns*        time beyond the products of gram's own tiles, per pair i <= j, layer and thread
max error  against ntkfast.reference on a sample of rows: |K - K_ref| / max(|K_ref|, 0.1 max |K_ref|)"""
_KERNEL_NOTE = "CPU ns per entry and layer, one thread, data in cache; depth columns include correlations and results"


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
    kernels = [] if options.cases else kernels_on_one_core(*((5, 2) if options.quick else (40, None)))
    slow = reference_row(256 if options.quick else 1024)
    host = machine()
    if options.json:
        report = {"machine": host, "rows": rows, "kernels": kernels, "reference": slow}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    print(text_table(HEAD, [cells(row) for row in rows]), "", _NOTES, sep="\n")
    if kernels:
        print("", text_table(KERNEL_HEAD, [kernel_cells(row) for row in kernels]), _KERNEL_NOTE, sep="\n")
    theirs, ours = (f"{1e3 * slow['seconds'][name][1]:.1f} ms" for name in ("reference", "gram"))
    print(f"\n{slow['case']}, n={slow['n']}: NumPy reference {theirs}, gram {ours}, ratio {slow['ratio'][1]:.0f}")
    print(f"\n{machine_line(host)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

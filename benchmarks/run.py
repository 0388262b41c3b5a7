"""Measure everything on this machine: ``python benchmarks/run.py`` writes benchmarks/results/<processor>.json.

One process, all contenders of a comparison in turns, every answer checked before it is timed. Sections (``--only``):

gram      the whole of gram by recursion against NumPy's product
depth     gram at depth 1 to 1000 against NumPy's product, all in the same turns
kernels   the compiled recursion alone, one core, data in cache
tables    compiled tables alone, and making them, one core
rivals    the same kernel by NumPy, numba and neural-tangents, as far as they are installed
products  gram in one pass, by the BLAS, and NumPy's products, shape by shape: what ntkfast._gemm decides by
close     what close pairs cost
conv      convolutional networks: time per pair of images, one thread and all; neural-tangents
finite    tangent kernels of a finite network by NumPy, torch.func and neural-tangents
process   import time, size of the wheel, memory beyond inputs and result
table     sizes, depths, dtypes, families
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cases
import conv
import finite
import numpy as np
import products
import rivals

from ntkfast import _bench, _bench_kernels, _bench_text

HERE = Path(__file__).resolve().parent
SECTIONS = ("gram", "depth", "kernels", "tables", "rivals", "products", "close", "process", "table", "conv", "finite")
Report = dict[str, Any]
#: Rivals are judged by their own accuracy; this only makes sure that they compute the same kernel.
RIVAL_TOLERANCE = {"float64": 1e-6, "float32": 1e-2}


def note(text: str) -> None:
    """Progress, on stderr."""
    print(f"[load {os.getloadavg()[0]:.1f}] {text}", file=sys.stderr, flush=True)


def add_target(
    report: Report, name: str, measured: float | None, limit: float, unit: str, *, least: bool = False
) -> None:
    """One line of PASS or FAIL; `least`: the limit is a lower bound. NaN fails."""
    if measured is None:
        verdict = "not measured"
    else:
        verdict = "PASS" if (measured >= limit if least else measured <= limit) else "FAIL"
    report["targets"].append({"target": name, "limit": f"{'>=' if least else '<='} {limit:g} {unit}".strip(),
                              "measured": measured, "verdict": verdict})  # fmt: skip


_ONE_THREAD = """
import json, sys, time
sys.path.insert(0, {here!r})
import cases, conv, finite
from ntkfast import _bench
print(json.dumps({expression}))
"""


def on_one_thread(expression: str) -> Any:
    """The value of an expression over the modules here, _bench and time, in a process with one thread of every kind."""
    code = _ONE_THREAD.format(here=str(HERE), expression=expression)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stdout=subprocess.PIPE, text=True,
                          env=os.environ | _bench_kernels.ONE_THREAD | finite.ONE_THREAD)  # fmt: skip
    return json.loads(done.stdout)


def measure_gram(report: Report, quick: bool) -> None:
    """Gram matrices against X @ X.T at the size the targets name; then the CPU time of one thread, immune to others."""
    size = {"n": 1024, "d": 784} if quick else cases.LARGE
    for case in cases.whole(**size):
        note(f"{case.name}, {case.path or 'any path'}")
        report["gram"].append(_bench.measure(case, 5 if quick else 21) | {"clock": "wall"})
    note("one thread")
    rounds = 3 if quick else 11
    found = on_one_thread(f"[_bench.measure(case, {rounds}, time.thread_time) for case in cases.whole(**{size})]")
    report["gram"] += [row | {"clock": "CPU, one thread"} for row in found]
    for row in report["gram"]:
        if row["path"] == "recursion":
            name = f"{row['case']}, recursion, {row['dtype']}, over X @ X.T, {row['clock']}"
            add_target(report, name, row["ratio"][1], 3.0 if "gelu" in row["case"] else 1.5, "")


def measure_depth(report: Report, quick: bool) -> None:
    """What depth costs: gram at several depths and both of NumPy's products in the same turns."""
    d = cases.LARGE["d"]
    for n in (1024,) if quick else (4096, 8192):
        rounds = 3 if quick else (15 if n == 4096 else 7)
        for dtype in ("float64", "float32"):
            note(f"any depth, n={n} {dtype}")
            report["depth"] += [row | {"clock": "wall"} for row in _bench.depth_rows(n, d, dtype, rounds)]
    n, rounds = (1024, 3) if quick else (4096, 9)
    for dtype in ("float64", "float32"):
        note(f"any depth, n={n} {dtype}, one thread")
        found = on_one_thread(f"_bench.depth_rows({n}, {d}, {dtype!r}, {rounds}, time.thread_time)")
        report["depth"] += [row | {"clock": "CPU, one thread"} for row in found]
    for row in report["depth"]:
        name = f"{row['case']}, n = {row['n']}, {row['dtype']}, {row['clock']}"
        add_target(report, f"{name}: over X @ X.T", row["ratio"][1], 1.12, "")
        if row["depth"] == 1000:
            add_target(report, f"{name}: over depth 3, tables made before", row["over_3"][1], 1.05, "")


def measure_kernels(report: Report, quick: bool) -> None:
    """ns per entry and layer on one core."""
    note("compiled kernels alone")
    report["kernels"] = _bench_kernels.one_core("kernel_rows", *((10, 1) if quick else (60, None)))
    for dtype, limit in (("float64", 1.1), ("float32", 0.4)):
        row = next(r for r in report["kernels"] if r["family"] == "fully connected" and r["dtype"] == dtype)
        add_target(report, f"recursion, {dtype}, one more layer", row["per_layer"][1], limit, "ns per entry and core")
        add_target(report, f"recursion, {dtype}, depth 10 with correlations and results, per layer",
                   row["whole"]["10"][1], limit, "ns per entry and core")  # fmt: skip


def measure_tables(report: Report, quick: bool) -> None:
    """Evaluation of compiled tables on one core, and the first call's making of them."""
    note("tables alone")
    report["tables"] = _bench_kernels.one_core("table_rows", *((5, 1) if quick else (60, None)))
    report["builds"] = _bench_kernels.one_core("build_rows", *((2, 1) if quick else (15, None)))
    refused = [row for row in report["builds"] if not row["reached"]]
    add_target(report, "tables that are not accurate enough", float(len(refused)), 0.0, "")
    for dtype, fast, error in (("float64", 0.9, 2e-14), ("float32", 0.25, 1e-6)):
        rows = [row for row in report["tables"] if row["dtype"] == dtype]
        worst = max(row["values"][row["isa"]][1] for row in rows)
        add_target(report, f"table, {dtype}: evaluation, the slowest", worst, fast, "ns per entry and core")
        add_target(report, f"table, {dtype}: error against the recursion", max(row["error"] for row in rows), error, "")
    portable = max(list(row["values"].values())[-1][1] for row in report["tables"])
    add_target(report, "table, portable code: evaluation, the slowest", portable, 4.5, "ns per entry and core")
    for depth, limit in ((100, 5.0), (1000, 60.0)):
        slowest = max(row["seconds"][1] for row in report["builds"] if row["depth"] == depth)
        add_target(report, f"plan and table of depth {depth}, the slowest", 1e3 * slowest, limit, "ms")


def _contest(case: _bench.Case, quick: bool) -> list[Report]:
    """Ours and the rivals' times beyond their own products, checked, in turns; slow ones for fewer rounds."""
    x = case.points()
    out = np.empty((case.n, case.n), dtype=case.dtype)
    contenders, missing = rivals.rivals(x, cases.RIVAL_DEPTH)
    for line in missing:
        note(line)
    product = _bench.tiled_product(x)
    ours = [rivals.Rival(cases.OURS, _bench.gram_call(replace(case, path="recursion"), x, out), product),
            rivals.Rival("ntkfast, table", _bench.gram_call(replace(case, path="table"), x, out), product)]  # fmt: skip
    groups: dict[bool, list[Report]] = {False: [], True: []}
    calls: dict[str, Callable[[], object]] = {}
    for rival in (*ours, *contenders):
        note(f"checking {rival.name}")
        error = _bench.max_error(case.network, x, np.asarray(rival.gram()))
        if not error < RIVAL_TOLERANCE[case.dtype]:
            raise ArithmeticError(f"{rival.name} computes something else: error {error:.1e}")
        begin = time.perf_counter()
        rival.gram()
        slow = time.perf_counter() - begin > 1.0
        groups[slow].append({"name": rival.name, "dtype": case.dtype, "n": case.n, "d": case.d,
                             "depth": cases.RIVAL_DEPTH, "error": error})  # fmt: skip
        calls[rival.name], calls[f"{rival.name}: product"] = rival.gram, rival.product
    for slow, rows in groups.items():
        if not rows:
            continue
        # Ours runs with the slow ones, too: every row is compared with times of its own turns.
        names = dict.fromkeys([cases.OURS, *(row["name"] for row in rows)])
        note(f"timing {', '.join(names)}")
        turn = {key: calls[key] for name in names for key in (name, f"{name}: product")}
        times = _bench.interleave(turn | _bench.numpy_products(x), 3 if quick else (5 if slow else 21))
        for row in rows:
            row.update(_beyond(row["name"], times))
    return groups[False] + groups[True]


def _beyond(name: str, times: dict[str, Any]) -> Report:
    """Times of one contender, its time beyond its own product, and that over our recursion's in the same turns."""
    product = min(("X @ X.T", "X @ X.copy().T"), key=lambda key: float(np.median(times[key])))
    beyond = {key: times[key] - times[f"{key}: product"] for key in (name, cases.OURS)}
    return {
        "rounds": len(times[name]),
        "seconds": _bench.quartiles(times[name]),
        "product_seconds": _bench.quartiles(times[f"{name}: product"]),
        "numpy_seconds": _bench.quartiles(times[product]),
        "beyond": _bench.quartiles(beyond[name]),
        "beyond_numpy": _bench.quartiles(times[name] - times[product]),
        "over_ntkfast": float(np.median(beyond[name]) / np.median(beyond[cases.OURS])),
    }


def measure_rivals(report: Report, quick: bool) -> None:
    """Depth 10 side by side; the target is about the time beyond the product."""
    n, d = (1024, 784) if quick else (cases.LARGE["n"], cases.LARGE["d"])
    for dtype in ("float64", "float32"):
        found = _contest(cases.deep(cases.RIVAL_DEPTH, n, d, dtype), quick)
        report["rivals"] += found
        if dtype == "float32":
            continue
        for prefix, limit in (("neural-tangents", 15.0), ("numba", 5.0)):
            best = min((row["over_ntkfast"] for row in found if row["name"].startswith(prefix)), default=None)
            name = f"time beyond the own product, float64, depth {cases.RIVAL_DEPTH}: {prefix} over {cases.OURS}"
            add_target(report, name, best, limit, "", least=True)


def measure_products(report: Report, quick: bool) -> None:
    """Both routes of gram at many shapes, and K V without K."""
    report["products"] = products.measure(quick, note, report["one_thread"])
    for name, measured, limit, unit, least in products.targets(report["products"]):
        add_target(report, name, measured, limit, unit, least=least)


def measure_close(report: Report, quick: bool) -> None:
    """Extra time of close pairs in units of NumPy's product of the same dtype."""
    for dtype in ("float64", "float32"):
        chosen = {
            name: cases.close(dtype, k) for name, k in (("none", 0), ("all", 1), ("1 in 10", 10), ("1 in 100", 100))
        }
        n = 1024 if quick else cases.LARGE["n"]
        calls: dict[str, Callable[[], object]] = {}
        out = np.empty((n, n), dtype=dtype)
        for name, case in chosen.items():
            x = case.points()[:n]
            calls[name] = _bench.gram_call(case, x, out)
            calls[name]()
            _bench.check(f"{name} close", _bench.max_error(case.network, x, out), dtype)
        calls.update(_bench.numpy_products(x))
        note(f"close pairs, {dtype}")
        times = _bench.interleave(calls, 3 if quick else 9)
        product = min(times["X @ X.T"], times["X @ X.copy().T"], key=lambda t: float(np.median(t)))
        for name in ("all", "1 in 10", "1 in 100"):
            extra = _bench.quartiles((times[name] - times["none"]) / product)
            report["close"].append({"close": name, "dtype": dtype, "n": n, "d": cases.LARGE["d"], "products": extra})
            # gram's docstring promises the bound
            add_target(report, f"close pairs ({name}), {dtype}: extra time over X @ X.T", extra[1], 3.0, "")


def _in_fresh_process(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


_IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
_MEMORY = """
import re, numpy as np, ntkfast as nf
from pathlib import Path
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
x = np.random.default_rng(0).standard_normal(({n}, 784))
out = np.zeros(({n}, {n})); out[:] = 1; a = np.ones((700, 700)); a @ a  # BLAS takes its buffers now
before = peak(); nf.gram(nf.fully_connected(3), x, out=out); print(peak() - before)
"""


def _wheel_bytes() -> int:
    """Size of the wheel built from this checkout."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder]
        if find_spec("scikit_build_core") and find_spec("pybind11"):
            command.append("--no-build-isolation")
        command += ["-C", f"build-dir={folder}/build", str(HERE.parent)]
        subprocess.run(command, check=True, capture_output=True)
        return next(Path(folder).glob("*.whl")).stat().st_size


def measure_process(report: Report, quick: bool) -> None:
    """Import, wheel, memory, each in a process of its own."""
    note("import time, memory, wheel")
    repeats = 3 if quick else 11
    loaded = {name: _bench.quartiles([_in_fresh_process(_IMPORT.format(name)) for _ in range(repeats)])
              for name in ("numpy", "ntkfast")}  # fmt: skip
    memory = _in_fresh_process(_MEMORY.format(n=1024 if quick else 4096))
    threads = report["machine"]["threads"]
    wheel = None if quick else _wheel_bytes()
    report["process"] = {"import_seconds": loaded, "gram_bytes": memory, "wheel_bytes": wheel}
    add_target(report, "import time, NumPy's included", loaded["ntkfast"][1], 0.3, "s")
    add_target(report, "wheel", None if wheel is None else wheel / 1e6, 2.0, "MB")
    add_target(report, "memory of gram beyond inputs, result and one copy of the inputs",
               max(0.0, memory - (1024 if quick else 4096) * 784 * 8) / 1e6, 64.0 * threads, "MB")  # fmt: skip


def measure_table(report: Report, quick: bool) -> None:
    """All sizes, depths, dtypes and families."""
    for case in cases.small_table() if quick else cases.table():
        note(f"{case.name} n={case.n} d={case.d} {case.dtype} {case.path}")
        report["table"].append(_bench.measure(case, 3 if quick else (5 if case.n > 4096 else 9)))


def _by_module(key: str, module: Any) -> Callable[[Report, bool], None]:
    """The section of a module with measure and targets."""

    def measure(report: Report, quick: bool) -> None:
        report[key] = module.measure(quick, note, on_one_thread)
        for name, measured, limit, unit, least in module.targets(report[key]):
            add_target(report, name, measured, limit, unit, least=least)

    return measure


def slug(cpu: str) -> str:
    """A file name for a processor model."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", cpu.lower())).strip("-")


def dump(report: Report) -> str:
    """JSON; the many rows of `products` on one line each."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in report["products"])
    text = json.dumps(report | {"products": []}, indent=1) + "\n"
    return text.replace('"products": []', f'"products": [\n{rows}\n ]') if rows else text


def main(argv: list[str]) -> int:
    """Run the sections and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="some sections; nothing is written without --out")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to try the script; nothing is written without --out"
    )
    parser.add_argument("--one-thread", action="store_true",
                        help="products: only the settings with one thread, by CPU time, on a busy machine")  # fmt: skip
    parser.add_argument("--out", metavar="FILE")
    options = parser.parse_args(argv)
    begin = time.perf_counter()
    report: Report = {"machine": _bench.machine() | rivals.versions(), "targets": [], "gram": [], "depth": [],
                      "kernels": [], "tables": [], "builds": [], "rivals": [], "products": [], "close": [],
                      "process": {}, "table": [], "conv": [], "finite": []}  # fmt: skip
    report["one_thread"] = options.one_thread
    measures = {"gram": measure_gram, "depth": measure_depth, "kernels": measure_kernels, "tables": measure_tables,
                "rivals": measure_rivals, "products": measure_products, "close": measure_close,
                "process": measure_process, "table": measure_table, "conv": _by_module("conv", conv),
                "finite": _by_module("finite", finite)}  # fmt: skip
    # The rivals come last: JAX and TensorFlow bring threads of their own.
    default = None if options.only or options.quick else HERE / "results" / f"{slug(report['machine']['cpu'])}.json"
    path = options.out or default
    for section in sorted(options.only or SECTIONS, key=lambda name: name in ("rivals", "conv", "finite")):
        before = os.getloadavg()[0]
        measures[section](report, options.quick)
        report.setdefault("load", {})[section] = [round(before, 2), round(os.getloadavg()[0], 2)]
        if path:  # after every section: an interrupted run leaves what it has
            Path(path).write_text(dump(report))
    for target in report["targets"]:
        value = "-" if target["measured"] is None else f"{target['measured']:.3g}"
        print(f"{target['verdict']:12}  {value:>8}  {target['limit']:32}  {target['target']}")
    print(f"{_bench_text.machine_line(report['machine'])}; {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

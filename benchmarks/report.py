"""Markdown from the measurements: ``python benchmarks/report.py [--all] [results/<processor>.json]``.

Without --all: the tables of the README. Every number comes from the file; rows that lose stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ntkfast._bench import machine_line

Row = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def duration(seconds: float) -> str:
    """Three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def spread(quartiles: list[float]) -> str:
    """Median and quartiles of a time."""
    low, median, high = quartiles
    return f"{duration(median)} ({duration(low)}–{duration(high)})"


def rivals(report: Row) -> str:
    """The same kernel by different means."""
    rows = []
    for row in report["rivals"]:
        rows.append([row["name"], row["dtype"], spread(row["seconds"]), duration(row["beyond"][1]),
                     f"{row['over_ntkfast']:.1f}", f"{row['error']:.0e}"])  # fmt: skip
    for dtype in ("float64", "float32"):
        for row in (r for r in report["rivals"] if r["name"] == "ntkfast" and r["dtype"] == dtype):
            rows.append(["*NumPy's product X Xᵀ alone*", dtype, spread(row["numpy_seconds"]), "", "", ""])
    first = report["rivals"][0]
    title = f"fully_connected({first['depth']}), ReLU, n = {first['n']}, d = {first['d']}, whole symmetric matrix:"
    head = ["", "dtype", "time (quartiles)", "beyond own X Xᵀ", "/ ntkfast", "max error"]
    return f"{title}\n\n{table(head, rows)}"


def grams(rows: list[Row]) -> str:
    """Rows of ntkfast._bench.measure."""
    body = [[row["case"], str(row["n"]), str(row["d"]), row["dtype"], spread(row["seconds"]["gram"]),
             f"{row['ratio'][1]:.2f}", duration(row["beyond_tiles"][1]), duration(row["beyond_product"][1]),
             f"{row['gflops']:.0f}", f"{row['product_gflops']:.0f}", f"{row['error']:.0e}"]
            for row in rows]  # fmt: skip
    head = ["network", "n", "d", "dtype", "time (quartiles)", "/ X Xᵀ", "beyond same tiles", "beyond X Xᵀ",
            "GFLOP/s", "of X Xᵀ", "max error"]  # fmt: skip
    return table(head, body)


def kernels(rows: list[Row]) -> str:
    """Rows of ntkfast._bench.kernel_rows."""
    depths = list(rows[0]["whole"])
    body = [[row["family"], row["dtype"], f"{row['per_layer'][1]:.2f}", *(f"{row['whole'][d][1]:.2f}" for d in depths)]
            for row in rows]  # fmt: skip
    return table(["CPU ns per entry and layer, one core, in cache", "dtype", "one more layer",
                  *(f"whole, depth {d}" for d in depths)], body)  # fmt: skip


def targets(rows: list[Row]) -> str:
    """PASS and FAIL."""
    body = [[row["target"], row["limit"], "–" if row["measured"] is None else f"{row['measured']:.3g}", row["verdict"]]
            for row in rows]  # fmt: skip
    return table(["target", "limit", "measured", ""], body)


def close(rows: list[Row]) -> str:
    """Extra time for close pairs."""
    body = []
    for row in rows:
        low, median, high = (f"{value:.2f}" for value in row["products"])
        body.append([row["close"], row["dtype"], f"{median} ({low}–{high})"])
    return table(["pairs that are close", "dtype", "extra time / X Xᵀ"], body)


def finite(rows: list[Row]) -> str:
    """Tangent kernels of a finite network."""
    body = [[row["name"], str(row["n"]), row["dtype"], row["clock"], spread(row["seconds"]),
             f"{row['over_ntkfast'][1]:.2f}", "" if row["error"] is None else f"{row['error']:.0e}"]
            for row in rows]  # fmt: skip
    return table(["finite network", "n", "dtype", "clock", "time (quartiles)", "/ ntkfast", "max error"], body)


def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="default: the newest in benchmarks/results")
    parser.add_argument("--all", action="store_true", help="every row, and the targets")
    options = parser.parse_args(argv)
    found = sorted((Path(__file__).parent / "results").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not options.file and not found:
        print("no results yet: run benchmarks/run.py first", file=sys.stderr)
        return 2
    report = json.loads(Path(options.file or found[-1]).read_text())
    parts = []
    if report["rivals"]:
        parts.append(rivals(report))
    rows = report["table"]
    if not options.all:  # the README's selection: one size, and what is not the plain network
        rows = [row for row in rows if (row["n"], row["d"]) == (4096, 784)]
    if rows:
        parts.append(grams(rows))
    if options.all:
        parts += [
            f(report[key])
            for f, key in ((kernels, "kernels"), (close, "close"), (finite, "finite"), (targets, "targets"))
            if report.get(key)
        ]
    others = ", ".join(f"{name} {report['machine'][name]}" for name in ("numba", "neural-tangents", "jax")
                       if name in report["machine"])  # fmt: skip
    loads = [load for pair in report["load"].values() for load in pair]
    parts.append(f"{machine_line(report['machine'])}; {others or 'no rivals installed'}. Load average during the run: "
                 f"{min(loads):.1f} to {max(loads):.1f}.")  # fmt: skip
    print("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

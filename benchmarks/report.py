"""Markdown from the measurements: ``python benchmarks/report.py [--all | --readme] [results/<processor>.json]``.

--readme: the tables of the README. --all: every row, and the targets. Every number comes from the file; rows that lose
stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cases import OURS

from ntkfast._bench_text import machine_line

Row = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def duration(seconds: float) -> str:
    """Three digits."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    return f"{seconds / size:.3g} {unit}"


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
        for row in (r for r in report["rivals"] if r["name"] == OURS and r["dtype"] == dtype):
            rows.append(["*NumPy's product X Xᵀ alone*", dtype, spread(row["numpy_seconds"]), "", "", ""])
    first = report["rivals"][0]
    title = f"fully_connected({first['depth']}), ReLU, n = {first['n']}, d = {first['d']}, whole symmetric matrix:"
    head = ["", "dtype", "time (quartiles)", "beyond own X Xᵀ", f"/ {OURS}", "max error"]
    return f"{title}\n\n{table(head, rows)}"


def grams(rows: list[Row]) -> str:
    """Rows of ntkfast._bench.measure."""
    body = [[row["case"], row["path"], str(row["n"]), str(row["d"]), row["dtype"], spread(row["seconds"]["gram"]),
             f"{row['ratio'][1]:.2f}", duration(row["beyond_tiles"][1]), duration(row["beyond_product"][1]),
             f"{row['gflops']:.0f}", f"{row['product_gflops']:.0f}", f"{row['error']:.0e}"]
            for row in rows]  # fmt: skip
    head = ["network", "path", "n", "d", "dtype", "time (quartiles)", "/ X Xᵀ", "beyond same tiles", "beyond X Xᵀ",
            "GFLOP/s", "of X Xᵀ", "max error"]  # fmt: skip
    return table(head, body)


def by_depth(rows: list[Row]) -> str:
    """Rows of ntkfast._bench.depth_rows, those of one run in one line."""
    runs: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        runs.setdefault((row["n"], row["d"], row["dtype"], row["clock"]), {})[row["depth"]] = row
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    body = []
    for (n, d, dtype, clock), found in runs.items():
        ratios = [f"{found[k]['ratio'][1]:.2f}{'' if found[k]['path'] == 'table' else '*'}" for k in depths]
        low, median, high = found[1000]["over_3"]
        errors = max(row["error"] for row in found.values())
        body.append([f"n = {n}, d = {d}, {dtype}, {clock}", duration(found[3]["product_seconds"][1]), *ratios,
                     f"{median:.2f} ({low:.2f}–{high:.2f})", f"{errors:.0e}"])  # fmt: skip
    head = ["`gram`, fully_connected(depth)", "`X @ X.T`", *(f"depth {k}: / `X @ X.T`" for k in depths),
            "depth 1000 / depth 3", "max error"]  # fmt: skip
    note = "Every line is one run, calls in turns; `X @ X.T` is the faster of NumPy's two ways. Ratios are medians"
    return f"{table(head, body)}\n\n{note}{'; * by recursion.' if '*' in str(body) else '.'}"


def by_recursion(rows: list[Row]) -> str:
    """The section gram."""
    body = []
    for row in rows:
        low, median, high = (f"{value:.2f}" for value in row["ratio"])
        name = f"{row['case']}, {row['path']}, n = {row['n']}, d = {row['d']}, {row['dtype']}, {row['clock']}"
        body.append([name, duration(row["seconds"]["gram"][1]), duration(row["seconds"][row["product"]][1]),
                     f"{median} ({low}–{high})", f"{row['error']:.0e}"])  # fmt: skip
    return table(["`gram`", "time (median)", "`X @ X.T`, same run", "ratio (quartiles)", "max error"], body)


def cores(report: Row) -> str:
    """One line for each family: what a layer costs by recursion, and what all of them cost in a table."""
    body = []
    for family in dict.fromkeys(row["family"] for row in report["kernels"]):
        line = [family]
        for dtype in ("float64", "float32"):
            line += [f"{row['per_layer'][1]:.2f}" for row in report["kernels"]
                     if (row["family"], row["dtype"]) == (family, dtype)]  # fmt: skip
        for part in ("values", "tile"):
            for dtype in ("float64", "float32"):
                found = [row[part][row["isa"]] if part == "values" else row[part] for row in report["tables"]
                         if (row["family"], row["dtype"]) == (family, dtype)]  # fmt: skip
                line.append(f"{max(q[1] for q in found):.2f}" if found else "")
        body.append(line)
    return table(["one core, data in cache, ns per pair", "one more layer, float64", "float32",
                  "table of any depth, float64", "float32", "the same with correlations and result, float64",
                  "float32"], body)  # fmt: skip


def tables(report: Row) -> str:
    """Sections tables and builds."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["family"], row["depth"], row["dtype"]

    evaluated = {key(row): row for row in report["tables"]}
    isas = list(report["tables"][0]["values"])
    body = []
    for build in report["builds"]:
        row = evaluated.get(key(build))
        line = [build["family"], str(build["depth"]), build["dtype"]]
        line += [""] * (len(isas) + 4) if row is None else [
            str(row["degree"]), str(row["panels"]), *(f"{row['values'][isa][1]:.2f}" for isa in isas),
            f"{row['tile'][1]:.2f}", f"{row['error']:.0e}"]  # fmt: skip
        body.append([*line, duration(build["plan"][1]), duration(build["table"][1])])
    return table(["CPU ns per entry, one core, in cache", "depth", "dtype", "degree", "panels", *isas, "tile",
                  "max error", "making the plan", "making the table"], body)  # fmt: skip


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


def footer(report: Row) -> str:
    """Machine, versions, load."""
    others = ", ".join(f"{name} {report['machine'][name]}" for name in ("numba", "neural-tangents", "jax", "torch")
                       if name in report["machine"])  # fmt: skip
    loads = [load for pair in report["load"].values() for load in pair]
    return (f"{machine_line(report['machine'])}; {others or 'no rivals installed'}. Load average during the run: "
            f"{min(loads):.1f} to {max(loads):.1f}.")  # fmt: skip


def readme(report: Row) -> list[str]:
    """The tables of the README, of the sections that were measured."""
    parts = [f(report[key]) for f, key in ((by_depth, "depth"), (by_recursion, "gram")) if report[key]]
    parts += [cores(report)] if report["kernels"] else []
    parts += [f(report[key]) for f, key in ((conv, "conv"), (finite, "finite")) if report.get(key)]
    return [*parts, footer(report)]


def everything(report: Row, every_size: bool) -> list[str]:
    """Rivals, table and, with all sizes, the rest."""
    parts = [rivals(report)] if report["rivals"] else []
    rows = report["table"]
    if not every_size:  # one size, and what is not the plain network
        rows = [row for row in rows if (row["n"], row["d"]) == (4096, 784)]
    if rows:
        parts.append(grams(rows))
    if every_size:
        sections = ((by_depth, "depth"), (by_recursion, "gram"), (kernels, "kernels"), (close, "close"),
                    (conv, "conv"), (finite, "finite"), (targets, "targets"))  # fmt: skip
        parts += [f(report[key]) for f, key in sections if report.get(key)]
        parts += [tables(report)] if report["tables"] else []
    return [*parts, footer(report)]


def conv(rows: list[Row]) -> str:
    """Convolutional networks, a line for each network and dtype, rivals beside them."""
    body = []
    for row in rows:
        name = f"conv_net({row['depth']}), {row['readout']}, n = {row['n']}, {row['dtype']}"
        over = f"{row['over_ntkfast'][1]:.0f}" if row["over_ntkfast"] else ""
        body.append([name, row["name"], row["clock"], spread(row["seconds"]), over, f"{row['error']:.0e}"])
    side = rows[0]["side"]
    head = [f"images {side}x{side}x3, whole symmetric matrix", "by", "clock", "time per pair (quartiles)", "/ ntkfast",
            "max error"]  # fmt: skip
    return table(head, body)


def finite(rows: list[Row]) -> str:
    """Tangent kernels of a finite network."""
    body = []
    for row in rows:
        time = spread(row["seconds"]) if row["seconds"] else row["skipped"]
        body.append([row["name"], str(row["n"]), row["dtype"], row["clock"], time,
                     f"{row['over_ntkfast'][1]:.2f}" if row["over_ntkfast"] else "",
                     "" if row["error"] is None else f"{row['error']:.0e}"])  # fmt: skip
    return table(["finite network", "n", "dtype", "clock", "time (quartiles)", "/ ntkfast", "max error"], body)


def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="default: the newest in benchmarks/results")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--all", action="store_true", help="every row, and the targets")
    choice.add_argument("--readme", action="store_true", help="the tables of the README")
    options = parser.parse_args(argv)
    found = sorted((Path(__file__).parent / "results").glob("*.json"), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if not path.name.startswith("gpu-")]  # other columns
    if not options.file and not found:
        print("no results yet: run benchmarks/run.py first", file=sys.stderr)
        return 2
    report = json.loads(Path(options.file or found[-1]).read_text())
    print("\n\n".join(readme(report) if options.readme else everything(report, options.all)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

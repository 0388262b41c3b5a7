"""The tables of ``python -m ntkfast bench`` as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ntkfast import _core
from ntkfast._bench_kernels import DEPTHS

Row = Mapping[str, Any]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
    return "\n".join(lines)


HEAD = ("gram(network, X)", "n", "d", "dtype", "path", "ms (quartiles)", "/ X X^T", "GFLOP/s", "ns*", "max error")


def cells(row: Row) -> list[str]:
    """A row of `measure` as text."""
    low, median, high = (1e3 * t for t in row["seconds"]["gram"])
    beyond = row["ns_per_pair_core"] / (row["layers"] if row["path"] == "recursion" else 1)
    return [row["case"], str(row["n"]), str(row["d"]), row["dtype"], row["path"],
            f"{median:.1f} ({low:.1f}-{high:.1f})", f"{row['ratio'][1]:.2f}", f"{row['gflops']:.0f}", f"{beyond:.2f}",
            f"{row['error']:.0e}"]  # fmt: skip


DEPTH_HEAD = ("gram(network, X), any depth", "n", "d", "dtype", "path", "first ms", "ms (quartiles)", "X X^T ms",
              "/ X X^T", "/ depth 3", "max error")  # fmt: skip


def depth_cells(row: Row) -> list[str]:
    """A row of `depth_rows` as text."""
    low, median, high = (1e3 * t for t in row["seconds"])
    return [row["case"], str(row["n"]), str(row["d"]), row["dtype"], row["path"], f"{1e3 * row['first']:.1f}",
            f"{median:.1f} ({low:.1f}-{high:.1f})", f"{1e3 * row['product_seconds'][1]:.1f}", f"{row['ratio'][1]:.2f}",
            f"{row['over_3'][1]:.2f}", f"{row['error']:.0e}"]  # fmt: skip


def kernel_cells(row: Row) -> list[str]:
    """A row of `kernel_rows` as text."""
    whole = [f"{row['whole'][str(depth)][1]:.2f}" for depth in DEPTHS]
    return [row["family"], row["dtype"], f"{row['per_layer'][1]:.2f}", *whole]


KERNEL_HEAD = ("recursion alone", "dtype", "one more layer", *(f"depth {d}" for d in DEPTHS))


def table_cells(row: Row | None, build: Row) -> list[str]:
    """A row of `table_rows` (None: the table was not accurate enough) and that of `build_rows`, of one table."""
    made = [build["family"], str(build["depth"]), build["dtype"]]
    times = [f"{1e3 * build[part][1]:.1f}" for part in ("plan", "table")]
    if row is None:
        return [*made, *("-" * (3 + len(_core.available()))), *times, f"{build['verified']:.0e} (not used)"]
    values = [f"{row['values'][isa][1]:.2f}" for isa in _core.available()]
    return [*made, str(row["degree"]), str(row["panels"]), *values, f"{row['tile'][1]:.2f}", *times,
            f"{row['error']:.0e}"]  # fmt: skip


def machine_line(found: Row) -> str:
    """The line under the table."""
    software = f"ntkfast {found['ntkfast']}, Python {found['python']}, NumPy {found['numpy']} with {found['blas']}"
    return (
        f"{found['cpu']}, {found['isa']}, {found['threads']} threads, load {found['load']}; {software}; {found['date']}"
    )


_NOTES = """\
path       one table for all layers, or the recursion through them
/ X X^T    time over NumPy's faster one of X @ X.T and X @ X.copy().T (out= given, as for gram), same run, in turns
GFLOP/s    2 n^2 d / time: the rate NumPy would need for its product to take as long as the whole kernel
ns*        time beyond gram's own way to X X^T, per pair i <= j and thread, and per layer of the recursion
max error  against ntkfast.reference on a sample of rows: |K - K_ref| / max(|K_ref|, 0.1 max |K_ref|)"""
_DEPTH_NOTE = """\
all depths and both products of NumPy in the same turns; first: the first call, which makes plan and table; max error:
beyond depth 100 against the recursion in float64, because the reference itself loses digits at every layer"""
_KERNEL_NOTE = "CPU ns per entry and layer, one thread, data in cache; depth columns include correlations and results"
_TABLE_NOTE = """\
CPU ns per entry whatever the depth, one thread, data in cache: the polynomials alone by instruction set, and "tile",
with correlations and results; CPU ms of making plan and table with cold caches; largest error of the table against
the recursion in float64, on the scale max(|f|, 0.1 max |f|)"""


def grams(rows: Sequence[Row]) -> str:
    """Rows of `measure` and what their columns mean."""
    return f"{text_table(HEAD, [cells(row) for row in rows])}\n\n{_NOTES}"


def depths(rows: Sequence[Row]) -> str:
    """Rows of `depth_rows`."""
    return f"{text_table(DEPTH_HEAD, [depth_cells(row) for row in rows])}\n{_DEPTH_NOTE}"


def kernels(rows: Sequence[Row]) -> str:
    """Rows of `kernel_rows`."""
    return f"{text_table(KERNEL_HEAD, [kernel_cells(row) for row in rows])}\n{_KERNEL_NOTE}"


def tables(rows: Sequence[Row], builds: Sequence[Row]) -> str:
    """Rows of `table_rows` beside those of `build_rows`; tables that were not accurate enough have only the latter."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["family"], row["depth"], row["dtype"]

    evaluated = {key(row): row for row in rows}
    head = ("table alone", "depth", "dtype", "degree", "panels", *_core.available(), "tile", "plan ms", "table ms",
            "max error")  # fmt: skip
    return f"{text_table(head, [table_cells(evaluated.get(key(b)), b) for b in builds])}\n{_TABLE_NOTE}"

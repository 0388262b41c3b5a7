"""``pytest benchmarks``: small cases that first check the answer, then time it (pytest-benchmark)."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import report
import rivals
import run

from ntkfast import _bench

pytest.importorskip("pytest_benchmark")

SMALL = [pytest.param(case, id=f"{case.name} {case.dtype} {case.path}") for case in cases.small_table()]


@pytest.mark.parametrize("case", SMALL)
def test_gram(benchmark, case):
    x = case.points()
    out = np.empty((case.n, case.n), dtype=case.dtype)
    call = _bench.gram_call(case, x, out)
    _bench.check(case.name, _bench.max_error(case.network, x, call()), case.dtype)
    benchmark(call)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["X @ X.T", "X @ X.copy().T"])
def test_product(benchmark, name, dtype):
    benchmark(_bench.numpy_products(cases.deep(1, 1024, 64, dtype).points())[name])


@pytest.mark.parametrize("build", [rivals.numpy_rival, rivals.numba_rival])
def test_rival(benchmark, build):
    if build is rivals.numba_rival:
        pytest.importorskip("numba")
    case = cases.deep(3, 1024, 64)
    x = case.points()
    rival = build(x, 3)
    assert _bench.max_error(case.network, x, rival.gram()) < 1e-12
    benchmark(rival.gram)


def test_the_report_says_what_was_measured(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert run.main(["--quick", "--only", "tables", "kernels", "depth", "rivals", "--out", str(path)]) == 0
    targets = capsys.readouterr().out
    for text in ("over X @ X.T", "over depth 3", "evaluation", "portable code", "plan and table of depth 1000"):
        assert text in targets
    assert report.main(["--readme", str(path)]) == 0
    readme = capsys.readouterr().out
    assert "| fully connected |" in readme
    assert "depth 1000 / depth 3" in readme
    assert report.main(["--all", str(path)]) == 0
    everything = capsys.readouterr().out
    for text in (cases.OURS, "ntkfast, table", "making the table", "| PASS |"):
        assert text in everything


def test_plain_rows_name_their_path():
    """A row of the recursion must not be measured by the table, whatever gram would choose."""
    assert {case.path for case in cases.table() if case.name.startswith("fully_connected(10")} == {"recursion", ""}
    for case in cases.small_table():
        if case.path:
            with _bench.forced(case.path):
                assert _bench.path_of(case.network, case.points()) == case.path

"""``python -m ntkfast bench --quick``: runs, writes valid JSON, and what it reports about errors is true."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ntkfast import _bench, _bench_kernels, _bench_text, _core, bottleneck_resnet, fully_connected, gram
from ntkfast._plan import mix_of


def test_quick_table(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert _bench.main(["--quick", "--json", str(path)]) == 0
    report = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    printed = capsys.readouterr().out
    assert len(report["rows"]) == len(_bench.standard_cases(quick=True))
    for row in report["rows"]:
        assert 0 < row["error"] < {"float64": 1e-13, "float32": 3e-6}[row["dtype"]]
        assert row["case"] in printed
        for low, median, high in row["seconds"].values():
            assert 0 < low <= median <= high
        assert math.isfinite(row["ratio"][1])
        assert row["gflops"] > 0
    assert {row["path"] for row in report["rows"]} == {"recursion", "table"}
    assert {row["threads"] for row in report["kernels"]} == {1}
    check_depths(report["depths"])
    check_tables(report["tables"], report["builds"])
    assert report["reference"]["seconds"]["reference"][1] > 0
    assert report["machine"]["cpu"] in printed


def check_depths(rows):
    assert [(row["depth"], row["dtype"]) for row in rows] == [
        (depth, dtype) for dtype in ("float64", "float32") for depth in _bench.GRAM_DEPTHS
    ]
    for row in rows:
        assert 0 < row["error"] < {"float64": 1e-12, "float32": 3e-6}[row["dtype"]]
        assert row["first"] > 0
        assert 0 < row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2]
        assert row["path"] == ("table" if row["depth"] >= 100 else "recursion")  # few points
        if row["depth"] == 3:
            assert row["over_3"] == [1, 1, 1]


def check_tables(rows, builds):
    keys = [(row["family"], row["depth"], row["dtype"]) for row in rows]
    assert keys == [(row["family"], row["depth"], row["dtype"]) for row in builds]  # all were accurate enough
    assert {depth for _, depth, _ in keys} == set(_bench_kernels.TABLE_DEPTHS)
    for row in rows:
        assert row["threads"] == 1
        assert 0 < row["error"] < {"float64": 3e-14, "float32": 1e-6}[row["dtype"]]
        assert list(row["values"]) == _core.available()
        assert min(row["values"][row["isa"]]) > 0
        assert row["tile"][1] > 0
        assert row["degree"] == len(table_of(row["depth"], row["dtype"], row["family"]).arrays()[0]) - 1
    for row in builds:
        assert row["seconds"][1] >= max(row["plan"][1], row["table"][1]) > 0


def table_of(depth, dtype="float64", family="fully connected"):
    net = dict(_bench_kernels._tables())[family](depth)
    return _bench_kernels._made(net, dtype, mix_of(net, "ntk"))


def test_the_error_of_a_table_is_seen():
    net = fully_connected(10)
    assert _bench_kernels.table_error(net, table_of(10), "float64") < 1e-14
    assert _bench_kernels.table_error(net, table_of(11), "float64") > 1e-3

    class Spoiled:
        def __init__(self, where):
            self.where = where

        def values(self, x, s):
            found = table_of(10).values(x, s)
            found[self.where] = np.nan
            return found

    for where in (0, 1234, -1):
        assert not _bench_kernels.table_error(net, Spoiled(where), "float64") < 1


def test_tables_are_made_anew_when_caches_are_emptied():
    from ntkfast._table import _table

    net = bottleneck_resnet(7)
    kept = [_table(net, mix_of(net, "ntk"), np.dtype(np.float64), 1.0) for _ in range(2)]
    assert kept[0] is kept[1]
    _bench_kernels.forget()
    assert _table(net, mix_of(net, "ntk"), np.dtype(np.float64), 1.0) is not kept[0]


def test_a_table_that_is_not_accurate_enough_keeps_its_row():
    build = {"family": "fully connected", "depth": 10000, "dtype": "float64", "reached": False, "verified": 5.5e-9,
             "plan": [1, 1, 1], "table": [1, 1, 1], "seconds": [2, 2, 2]}  # fmt: skip
    (line,) = [line for line in _bench_text.tables([], [build]).splitlines() if line.startswith("fully connected")]
    assert line.endswith("5e-09 (not used)") or line.endswith("6e-09 (not used)")


def test_the_path_is_forced_for_one_call_only(monkeypatch):
    net = fully_connected(100)
    case = _bench.Case("", net, 600, 8)
    x = case.points()
    monkeypatch.setenv("NTKFAST_PATH", "recursion")
    assert _bench.path_of(net, x) == "recursion"
    with _bench.forced("table"):
        assert _bench.path_of(net, x) == "table"
    assert _bench.path_of(net, x) == "recursion"
    with pytest.raises(RuntimeError), _bench.forced("table"):
        raise RuntimeError
    assert _bench.path_of(net, x) == "recursion"
    monkeypatch.delenv("NTKFAST_PATH")
    with _bench.forced(""):
        assert _bench.path_of(net, x) == "table"


def test_cases_are_chosen_by_text(capsys):
    assert _bench.main(["--quick", "--cases", "bottleneck"]) == 0
    assert "fully_connected(2, gelu)" not in capsys.readouterr().out
    assert _bench.main(["--quick", "--cases", "no such network"]) == 2
    assert "bottleneck_resnet(10)" in capsys.readouterr().err


def test_wrong_results_are_not_timed():
    net = fully_connected(3)
    x = _bench.Case("", net, 64, 8).points()
    right = gram(net, x)
    assert _bench.max_error(net, x, right) < 1e-14
    for spoil in (1e-9 * right.max(), np.nan):
        wrong = right + spoil * (np.arange(64) > 32)
        with pytest.raises(ArithmeticError, match="not timed"):
            _bench.check("fully_connected(3)", _bench.max_error(net, x, wrong), "float64")

"""``python -m ntkfast bench --quick``: runs, writes valid JSON, and what it reports about errors is true."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ntkfast import _bench, fully_connected, gram


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
    assert {row["threads"] for row in report["kernels"]} == {1}
    assert report["reference"]["seconds"]["reference"][1] > 0
    assert report["machine"]["cpu"] in printed


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

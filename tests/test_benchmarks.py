"""Sections conv and finite of benchmarks/run.py: they run, their judges see errors, the report keeps their rows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import conv_oracle
import numpy as np
import pytest
from mpmath import mp

import ntkfast as nf

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A module of the benchmarks, for one test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_the_sections_run_and_their_rows_reach_the_report(tmp_path):
    for rival in ("jax", "torch"):
        (tmp_path / f"{rival}.py").write_text(f"raise ImportError('there is no {rival} in this test')\n")
    path = tmp_path / "run.json"

    def python(*arguments):
        done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=200,
                              env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    ran = python(BENCHMARKS / "run.py", "--quick", "--only", "conv", "finite", "--out", path)
    for line in ("neural-tangents: there is no jax in this test", "torch.func: there is no torch in this test"):
        assert line in ran.stderr
    for target in (
        "conv_net(5), gap, float64, one thread",
        "conv_net(10), flatten, float32, error",
        "over one",
        "float32: neural-tangents over ntkfast",
        "finite network, n = 32, float32, wall: error",
    ):
        assert target in ran.stdout
    found = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    check_conv(found["conv"])
    check_finite(found["finite"])
    for option in ("--readme", "--all"):
        text = python(BENCHMARKS / "report.py", option, path).stdout
        assert sum(line.startswith("| conv_net(") and ", n = " in line for line in text.splitlines()) == len(
            found["conv"]
        )
        assert text.count("| 32 | float") == len(found["finite"])
        assert "images 8x8x3" in text


def check_conv(rows):
    assert [(row["readout"], row["depth"], row["dtype"], row["clock"]) for row in rows] == [
        (readout, depth, dtype, clock) for readout, depth in (("flatten", 5), ("flatten", 10), ("gap", 5))
        for dtype in ("float32", "float64") for clock in ("CPU, one thread", "wall")
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["error"] < {"float64": 1e-14, "float32": 1e-6}[row["dtype"]]
        assert 0 < row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2]
        assert row["name"] == "ntkfast"


def check_finite(rows):
    assert {(row["dtype"], row["clock"], row["name"]) for row in rows} == {
        (dtype, clock, name) for dtype in ("float32", "float64") for clock in ("wall", "CPU, one thread")
        for name in ("empirical_ntk", "jacobian_gram", "products", "explicit Jacobian")
        if (clock, name) != ("CPU, one thread", "explicit Jacobian")
    }  # fmt: skip
    for row in rows:
        assert 0 < row["seconds"][0] <= row["seconds"][1]
        if row["name"] != "products":
            assert 0 < row["error"] < {"float64": 1e-14, "float32": 2e-6}[row["dtype"]]


@pytest.mark.parametrize("readout", ["flatten", "gap"])
def test_long_double_agrees_with_forty_digits(load, readout):
    long_double, images = load("long_double"), load("conv").images(6, 8)[:, 1:6, :4]
    net = nf.conv_net(3, readout=readout)
    for i, j in ((1, 1), (1, 2), (1, 3), (4, 5)):
        wanted = np.longdouble(mp.nstr(conv_oracle.pair(net, images[i], images[j])["ntk"], 25))
        found = long_double.ntk(images[i], images[j], 3, pooled=readout == "gap")
        assert abs(found / wanted - 1) < 1e-17


def test_errors_of_convolutions_are_seen(load):
    conv = load("conv")
    judge, problem = conv.Judge(8), conv.Problem("flatten", 3, "float64", 6, 8)
    assert problem.x[0].std() > 0.1
    K = nf.gram(problem.net, problem.x)
    assert judge.error(problem, K) < 1e-14
    assert judge.error(problem, nf.gram(nf.conv_net(4), problem.x)) > 1e-2
    for spoil in (1e-9 * K.max(), np.nan):
        wrong = K.copy()
        wrong[1, 3] += spoil
        assert not judge.error(problem, wrong) < 1e-11
    assert np.isnan(judge.error(problem, K + np.where(np.eye(6), np.nan, 0)))
    with pytest.raises(ArithmeticError, match="not timed"):
        conv._check("ntkfast", problem, np.nan, 1e-12)


def test_errors_of_finite_networks_are_seen(load):
    finite = load("finite")
    problem = finite.Problem.make(20, "float64", 64)
    K = nf.empirical_ntk(problem.network, problem.x)
    assert 0 < finite.largest_error(problem, K) < 1e-14
    wrong = K.copy()
    wrong[0, 19] *= 1 + 1e-9
    assert finite.largest_error(problem, wrong) > 1e-11
    wrong[3, 5] = np.nan
    assert np.isnan(finite.largest_error(problem, wrong))


def test_jacobians_that_do_not_fit_keep_a_row(load, monkeypatch):
    finite, report = load("finite"), load("report")
    monkeypatch.setattr(finite, "EXPLICIT", 8)
    monkeypatch.setattr(finite, "torch_call", lambda _: lambda: pytest.fail("a Jacobian that does not fit"))
    ours = nf.empirical_ntk
    monkeypatch.setattr(finite, "neural_tangents_call", lambda p: lambda: ours(p.network, p.x))
    rows = {row["name"]: row for row in finite.contest(9, "float32", True, lambda _: None)}
    assert rows["torch.func"]["seconds"] is rows["explicit Jacobian"]["seconds"] is None
    assert rows["neural-tangents"]["seconds"][1] > 0
    text = report.finite(list(rows.values()))
    assert text.count("not run: its Jacobian takes 0 GB") == 2
    targets = {name: (measured, least) for name, measured, _, _, least in finite.targets(list(rows.values()))}
    assert targets["finite network, n = 9, float32, wall: neural-tangents over empirical_ntk"][0] > 0

"""benchmarks/gpu_check.py without a GPU: its plan, and its pieces through the stand-in for CuPy."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
import simulate

import ntkfast as nf
from ntkfast import _bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its dataclass looks itself up
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script there
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in ("gpu_check", "gpu_finite", "gpu_images"):
        del sys.modules[name]


def test_dry_run(check, capsys):
    assert check.main(["--dry-run", "--n", "1000"]) == 0
    text = capsys.readouterr().out
    for part in (
        "gram_dense, gram_general, gram_table, layer_grams, conv_images, gram_conv_fast",
        "conv_results, jacobian",
        "finite networks: n = 500, d = 784, width 4096, depth 5",
        "conv_net(21), gap, 32x32x3, 4 images, float32",
        "n = 1000, d = 784",
        "resnet(10), float64, table",
        "fully_connected(10), float32, recursion",
        "gram over the cuBLAS product alone <= 1.25",
        "share of the copy bandwidth >= 0.6",
        "racecheck",
    ):
        assert part in text


def test_no_gpu_is_one_sentence(check, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert check.main([]) == 1
    assert "needs CuPy" in capsys.readouterr().err


def test_the_baseline_computes_the_kernel(check):
    x = np.random.default_rng(0).normal(size=(30, 8))
    net = nf.fully_connected(4)
    assert _bench.max_error(net, x, check.layer_by_layer(np, x, 4)) < 1e-7


def test_operations_of_the_layers(check):
    assert check.operations([0, 1, 2, 2], "float64") == 2 * (32 + 23 + 16 + 16) + 80


@pytest.mark.parametrize(
    ("value", "verdict"), [(12.0, "PASS"), (9.0, "FAIL"), (float("nan"), "FAIL"), (None, "not measured")]
)
def test_targets(check, value, verdict):
    report = {"cases": [], "baseline": [] if value is None else [{"over_ours": value}]}
    assert [t["verdict"] for t in check.targets(report)] == ["not measured"] * 3 + [verdict] + ["not measured"] * 3


def test_targets_look_at_the_slowest_table(check):
    def row(path, over, copied, dtype="float64", name="fully_connected(10)"):
        shares = {"over_product": over, "of_copy": copied, "of_fma": 0.6}
        return {"path": path, "dtype": dtype, "case": name} | shares

    def verdicts(*rows):
        return [t["verdict"] for t in check.targets({"cases": rows, "baseline": []})][:3]

    good, others = row("table", 1.2, 0.7), [row("table", 9, 0, "float32"), row("recursion", 9, 0)]
    assert verdicts(good, *others) == ["PASS"] * 3
    assert verdicts(good, row("table", 1.3, 0.7), *others) == ["FAIL", "PASS", "PASS"]
    assert verdicts(good, row("table", 1.2, 0.5), *others) == ["PASS", "FAIL", "PASS"]
    assert verdicts(good, row("table", np.nan, np.nan)) == ["FAIL", "FAIL", "not measured"]


@pytest.fixture
def gpu(check, monkeypatch):
    """The stand-in with what only benchmarks ask for: a clock, properties, a kernel of their own."""
    if simulate.missing("plain"):
        pytest.skip(simulate.missing("plain"))
    fake = fake_cupy.install(monkeypatch, lazy=False)
    fake.__version__ = "0"
    fake.cuda.get_elapsed_time = lambda start, end: 2.0
    fake.cuda.runtime.getDeviceProperties = lambda k: {
        "name": b"Fake GPU",
        "multiProcessorCount": 1,
        "totalGlobalMem": 1,
    }
    monkeypatch.setattr(check.compiler, "find", lambda major: types.SimpleNamespace(version=(13, 0)))
    monkeypatch.setattr(check, "fma_binary", lambda cupy: ROOT / "benchmarks" / "fma.cu")
    return fake


def test_everything_but_tests_and_sanitizer(check, gpu, tmp_path, monkeypatch):
    benchmarks = check.run_benchmarks
    monkeypatch.setattr(check, "run_benchmarks", lambda *arguments: benchmarks(*arguments, baseline=False))
    images = check.measure_images
    monkeypatch.setattr(check, "measure_images", lambda case, rounds: images(case, rounds, grid=4, depth=3))
    assert (
        check.main(
            [
                "--skip",
                "tests",
                "sanitizer",
                "--n",
                "80",
                "--d",
                "9",
                "--width",
                "24",
                "--rounds",
                "3",
                "--folder",
                str(tmp_path),
            ]
        )
        == 0
    )
    report = json.loads((tmp_path / "gpu-fake-gpu.json").read_text())
    assert report["errors"] == []
    assert report["machine"]["gpu"] == "Fake GPU"
    assert [row["case"] for row in report["cases"]] == [case.name for case in check.cases(80, 9)]
    first = report["cases"][0]
    assert first["GB/s"] == pytest.approx(2e-6 * 80 * 80 * 8 / 2.0)
    assert first["of_copy"] == pytest.approx(1)
    assert [row["path"] for row in report["cases"]] == [case.path for case in check.cases(80, 9)]
    assert "GFLOP/s" not in first
    deep = next(r for r in report["cases"] if r["path"] == "recursion")
    counted = check.operations([0, 0, 0, 1, 1, 1, 1, 1, 2, 2], "float64")
    assert deep["GFLOP/s"] == pytest.approx(1e-6 * 80 * 81 / 2 * counted / 2.0)
    assert [t["verdict"] for t in report["targets"]][:2] == ["PASS", "PASS"]
    assert report["limits"]["float64"]["product"]["GFLOP/s"] == pytest.approx(2e-6 * 80 * 80 * 9 / 2.0)
    assert report["streaming"][0]["ms"] > 0
    assert report["targets"][3]["verdict"] == "not measured"
    rows = report["finite"]["jacobian_gram"]
    assert [(r["dtype"], r["n"], r["width"]) for r in rows] == [("float64", 64, 24), ("float32", 64, 24)]
    assert rows[0]["epilogue"]["GB/s"] == pytest.approx(4e-6 * 64 * 64 * 8 / 2.0)
    assert report["targets"][4] == {
        "target": "jacobian_gram of two sets over the cuBLAS products of all layers, slower dtype",
        "limit": "<= 1.15", "measured": 1.0, "verdict": "PASS",
    }  # fmt: skip
    assert all(r["third_order_kernel"]["ms"] == 2.0 for r in report["finite"]["third_order_kernel"])
    assert [(r["readout"], r["dtype"]) for r in report["images"]] == [
        (readout, dtype) for readout in ("flatten", "gap") for dtype in ("float32", "float64")
    ]
    assert report["targets"][5]["measured"] == report["images"][0]["us_an_entry"] > 0
    assert report["targets"][6]["measured"] == report["images"][2]["us_an_entry"] > 0


def test_a_case_on_another_path_is_an_error(check, gpu, monkeypatch):
    monkeypatch.setenv("NTKFAST_PATH", "")
    case = check.Case("biases", nf.fully_connected(2, bias_variance=0.1), 40, 5)
    with pytest.raises(RuntimeError, match="ran by gram_general, not by its table"):
        check.measure(gpu, case, 1, {"product": {"ms": 1.0}, "copy": {"GB/s": 1.0}})
    assert os.environ["NTKFAST_PATH"] == ""


def test_wrong_finite_kernels_are_not_timed(check, gpu, monkeypatch):
    one, sizes = check.gpu_gram.Gpu(0), (30, 5, 7, 2)
    finite = check.gpu_finite
    with monkeypatch.context() as patch:
        patch.setattr(finite.nf, "jacobian_gram", lambda *a, **k: np.ones((30, 30)))
        with pytest.raises(RuntimeError, match="not timed"):
            finite.measure_gram(one, None, sizes, "float64", 1.0)
    ones = iter([1.0, np.nan])
    monkeypatch.setattr(finite.nf, "third_order_kernel", lambda *a, **k: np.full((2, 2, 2), next(ones)))
    with pytest.raises(RuntimeError, match="not timed"):
        finite.measure_third_order(one, None, 8, 5, 2, "float64")


def test_a_wrong_answer_is_not_timed(check, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(check._bench, "max_error", lambda *arguments: float("nan"))
    assert (
        check.main(
            ["--skip", "tests", "sanitizer", "--n", "64", "--d", "3", "--rounds", "1", "--folder", str(tmp_path)]
        )
        == 1
    )
    report = json.loads((tmp_path / "gpu-fake-gpu.json").read_text())
    assert "not timed" in report["errors"][0]["error"]
    assert report["cases"] == []


def test_tests_and_sanitizer_that_fail(check, monkeypatch):
    answers = {"pytest": (0, "58 skipped in 1.7s"), "memcheck": (99, "Invalid read")}
    monkeypatch.setattr(check.shutil, "which", lambda name: name)

    def run(command, **others):
        code, text = next((v for k, v in answers.items() if k in command), (0, ""))
        return types.SimpleNamespace(returncode=code, stdout=text, stderr="")

    monkeypatch.setattr(check.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="58 skipped"):
        check.run_tests({})
    report = {}
    with pytest.raises(RuntimeError, match="memcheck:\nInvalid read"):
        check.run_sanitizer(report)
    assert report["sanitizer"] == {"memcheck": "status 99", "racecheck": "clean", "initcheck": "clean"}
    answers |= {"pytest": (0, "58 passed in 1.7s"), "memcheck": (0, "")}
    check.run_tests(report)
    check.run_sanitizer(report)
    assert report["tests"] == {"status": 0, "summary": "58 passed in 1.7s"}

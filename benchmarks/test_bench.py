"""``pytest benchmarks``: small cases that first check the answer, then time it (pytest-benchmark)."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import rivals

import ntkfast as nf
from ntkfast import _bench

pytest.importorskip("pytest_benchmark")

SMALL = [pytest.param(case, id=f"{case.name} {case.dtype}") for case in cases.small_table()]


@pytest.mark.parametrize("case", SMALL)
def test_gram(benchmark, case):
    x = case.points()
    out = np.empty((case.n, case.n), dtype=case.dtype)
    nf.gram(case.network, x, out=out)
    _bench.check(case.name, _bench.max_error(case.network, x, out), case.dtype)
    benchmark(nf.gram, case.network, x, out=out)


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

"""Finite networks on a GPU, for gpu_check.py: jacobian_gram beside the products of its layers, and K3 of a resnet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import ntkfast as nf
from ntkfast._cuda import jacobian
from ntkfast._cuda.gram import Gpu

Row = dict[str, Any]
#: times of a call in ms, by CUDA events
Timer = Callable[[Callable[[], object]], dict[str, float]]

#: (what, its limit): what the project promises for n = 16384, width 4096 on an H200
TARGET = "jacobian_gram of two sets over the cuBLAS products of all layers, slower dtype", 1.15

#: Small cases for compute-sanitizer: every contraction, every kernel.
SANITIZED = """
r = np.random.default_rng(0)
for dtype in ("float64", "float32"):
    sizes = [((9,), 3, 7), ((70,), 64, 50), ((), 5, 33)]
    factors = [nf.LayerFactors(*(r.normal(size=(67, *p, k)).astype(dtype) for k in (i, o))) for p, i, o in sizes]
    for layers in (factors, factors[:1], factors[1:2]):
        assert np.isfinite(nf.jacobian_gram(layers, device="cuda")).all()
        assert np.isfinite(nf.jacobian_diagonal(layers, device="cuda")).all()
    few = [nf.LayerFactors(a[:9], d[:9]) for a, d in factors]
    assert np.isfinite(nf.jacobian_gram(factors, few, device="cuda")).all()
    network = nf.init(nf.resnet(3, "tanh"), 5, 40, seed=0, dtype=dtype, device="cuda")
    assert np.isfinite(nf.empirical_ntk(network, x.astype(dtype))).all()
    assert np.isfinite(nf.third_order_kernel(network, x[:9].astype(dtype))).all()
"""


def factors_of(gpu: Gpu, n: int, d: int, width: int, depth: int, dtype: str) -> list[nf.LayerFactors]:
    """Those of a fully connected network, filled with normal numbers."""
    rng = np.random.default_rng(0)

    def array(columns: int) -> Any:
        return gpu.upload(rng.standard_normal((n, columns), np.dtype(dtype).type) / np.sqrt(columns).astype(dtype))

    sizes = [(d, width), *[(width, width)] * (depth - 1), (width, 1)]
    return [nf.LayerFactors(array(fan_in), array(fan_out)) for fan_in, fan_out in sizes]


def error_of(factors: list[nf.LayerFactors], K: Any) -> float:
    """Largest error of some rows relative to the largest entry, against float64 on the CPU."""
    part = slice(0, min(len(factors[0].inputs), 256))
    host = [nf.LayerFactors(*(x[part].get().astype(np.float64) for x in f)) for f in factors]
    wanted = nf.jacobian_gram(host)
    return float(np.max(np.abs(K[part, part].get() - wanted)) / np.max(np.abs(wanted)))


def measure_gram(gpu: Gpu, timer: Timer, sizes: tuple[int, int, int, int], dtype: str, copy_rate: float) -> Row:
    """jacobian_gram, of one set and of two, beside the plain products A A^T and D D^T of all layers in the same run."""
    n, d, width, depth = sizes
    factors = factors_of(gpu, n, d, width, depth, dtype)
    out, other = gpu.empty((n, n), np.dtype(dtype)), gpu.empty((n, n), np.dtype(dtype))
    nf.jacobian_gram(factors, out=out)
    error = error_of(factors, out)
    if not error <= (1e-13 if dtype == "float64" else 2e-6):
        raise RuntimeError(f"jacobian_gram, {dtype}: error {error}, not timed")

    def products() -> None:
        for f in factors:
            for x in f:
                gpu.product(x, x, other)

    row: Row = {"n": n, "d": d, "width": width, "depth": depth, "dtype": dtype, "error": error}
    row["products"] = timer(products)
    row["one set"] = timer(lambda: nf.jacobian_gram(factors, out=out))
    row["two sets"] = timer(lambda: nf.jacobian_gram(factors, factors, out=out))
    row["products again"] = timer(products)
    slower = max(row["products"]["ms"], row["products again"]["ms"])
    row["over_products"] = row["two sets"]["ms"] / slower
    row["one set over products"] = row["one set"]["ms"] / slower
    suffix, side = "f64" if dtype == "float64" else "f32", min(n, jacobian.SIDE)
    p, q, to = (a[:side, :side] for a in (other, other, out))
    epilogue = timer(lambda: jacobian.multiply_add(gpu, suffix, to, None, False, False, p, q))
    row["epilogue"] = epilogue | {"GB/s": 4e-6 * side * side * np.dtype(dtype).itemsize / epilogue["ms"]}
    row["epilogue of copy"] = row["epilogue"]["GB/s"] / copy_rate
    return row


def measure_third_order(gpu: Gpu, timer: Timer, n: int, width: int, depth: int, dtype: str) -> Row:
    """K3 of a resnet, after a check of a small one against the CPU."""
    net = nf.resnet(depth, "tanh")

    def networks(m: int, devices: tuple[str, ...]) -> list[nf.FiniteNetwork]:
        return [nf.init(net, 32, m, seed=0, dtype=dtype, device=device) for device in devices]

    x = np.random.default_rng(0).standard_normal((n, 32)).astype(dtype) / np.sqrt(32).astype(dtype)
    here, there = (nf.third_order_kernel(one, x[:8]) for one in networks(64, ("cpu", "cuda")))
    error = float(np.max(np.abs(there - here)) / np.max(np.abs(here)))
    if not error <= (1e-12 if dtype == "float64" else 1e-4):
        raise RuntimeError(f"third_order_kernel, {dtype}: error {error}, not timed")
    (network,), points = networks(width, ("cuda",)), gpu.upload(x)
    out = gpu.empty((n, n, n), np.dtype(dtype))
    times = timer(lambda: nf.third_order_kernel(network, points, out=out))
    return {"n": n, "width": width, "depth": depth, "dtype": dtype, "error": error, "third_order_kernel": times}


def run(gpu: Gpu, timer: Timer, sizes: tuple[int, int, int, int], copy_rates: dict[str, float]) -> dict[str, list[Row]]:
    """All rows; sizes are (n, d, width, depth)."""
    n, _, width, depth = sizes
    return {
        "jacobian_gram": [measure_gram(gpu, timer, sizes, dtype, copy_rates[dtype]) for dtype in copy_rates],
        "third_order_kernel": [
            measure_third_order(gpu, timer, max(8, n // 256), max(1, width // 4), depth, dtype) for dtype in copy_rates
        ],
    }

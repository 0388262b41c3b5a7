"""Finite networks on a real GPU against the CPU: ``pytest -m gpu`` (skipped where there is none)."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import assert_close
from finite_cases import NETWORKS

import ntkfast as nf
from ntkfast._cuda import CudaUnavailable, jacobian, load_cupy
from ntkfast._cuda import gram as gpu_gram

try:
    cupy = load_cupy()
except CudaUnavailable as reason:
    cupy = None
    WHY = str(reason)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cupy is None, reason="" if cupy else WHY)]

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])
#: relative to the largest entry
BOUND = {np.float64: 1e-13, np.float32: 2e-6}
DENSE = [(0, 50, 300), (0, 301, 257), (0, 300, 1)]
MIXED = [(64, 9, 16), (16, 144, 100), (3, 40, 500), (0, 50, 33), (900, 5, 6)]


def layers(n, shapes, dtype, seed=0):
    """Factors of shapes (positions or 0, fan_in, fan_out)."""
    rng = np.random.default_rng(seed)
    sizes = [((n, p) if p else (n,), i, o) for p, i, o in shapes]
    return [nf.LayerFactors(*(rng.standard_normal((*axes, k)).astype(dtype) for k in (i, o))) for axes, i, o in sizes]


def there(factors):
    return [nf.LayerFactors(cupy.asarray(a), cupy.asarray(d)) for a, d in factors]


def wide(factors):
    """In float64, so that only the device's own rounding counts."""
    return [nf.LayerFactors(a.astype(np.float64), d.astype(np.float64)) for a, d in factors]


def check(found, wanted, dtype):
    assert found.dtype == dtype
    assert_close(found, wanted, np.abs(wanted).max(), BOUND[dtype])


@DTYPES
@pytest.mark.parametrize("shapes", [DENSE, MIXED], ids=["dense", "mixed"])
@pytest.mark.parametrize(("n", "side"), [(1, 2048), (333, 2048), (333, 100)])
def test_jacobian_gram(shapes, n, side, dtype, monkeypatch):
    monkeypatch.setattr(jacobian, "SIDE", side)
    monkeypatch.setattr(gpu_gram, "STREAMED", side)
    monkeypatch.setattr(jacobian, "_GRADIENTS", jacobian._GRADIENTS if side > n else 1 << 15)
    x, y = layers(n, shapes, dtype), layers(71, shapes, dtype, seed=1)
    for other in (None, y):
        gone = None if other is None else there(other)
        for per_layer in (False, True):
            wanted = nf.jacobian_gram(wide(x), None if other is None else wide(other), per_layer=per_layer)
            found = nf.jacobian_gram(there(x), gone, per_layer=per_layer).get()
            check(found, wanted, dtype)
            check(nf.jacobian_gram(x, other, per_layer=per_layer, device="cuda"), wanted, dtype)
            assert other is not None or np.array_equal(found, found.swapaxes(-1, -2))
    check(nf.jacobian_diagonal(there(x)).get(), nf.jacobian_diagonal(wide(x)), dtype)


@DTYPES
def test_wide_layers(dtype):
    """Sums of thousands of positive terms, where float32 loses most."""
    x = [nf.LayerFactors(np.abs(a), np.abs(d)) for a, d in layers(400, [(0, 4096, 4096), (0, 4097, 1)], dtype)]
    check(nf.jacobian_gram(there(x)).get(), nf.jacobian_gram(wide(x)), dtype)


@DTYPES
def test_products_are_true_float32(dtype):
    """TF32 would be off by 1e-3 of the norms; neither the mode of the handle nor CUPY_TF32 may matter."""
    x = layers(500, [(0, 784, 1024)], dtype)
    handle = cupy.cuda.get_cublas_handle()
    before = cupy.cuda.cublas.getMathMode(handle)
    try:
        cupy.cuda.cublas.setMathMode(handle, 3)
        check(nf.jacobian_gram(there(x)).get(), nf.jacobian_gram(wide(x)), dtype)
        assert cupy.cuda.cublas.getMathMode(handle) == 3
    finally:
        cupy.cuda.cublas.setMathMode(handle, before)


def test_streams_and_out():
    x = layers(2500, [(0, 100, 80), (0, 80, 1)], np.float64)
    wanted = nf.jacobian_gram(x)
    for non_blocking in (False, True):
        with cupy.cuda.Stream(non_blocking=non_blocking) as stream:
            gone = [nf.LayerFactors(a * 1.0, d * 1.0) for a, d in there(x)]  # still under way
            found = nf.jacobian_gram(gone)
            del gone  # its memory may be used again, but not before it was read
            spoiled = [cupy.full((2500, 180), cupy.nan) for _ in range(4)]
            stream.synchronize()
            check(found.get(), wanted, np.float64)
            del spoiled
    whole = cupy.zeros((2510, 2600))
    out = whole[5:2505, 20:2520]
    assert nf.jacobian_gram(there(x), out=out) is out
    check(out.get(), wanted, np.float64)
    assert not whole[:5].any()
    assert not whole[:, :20].any()


def test_strides():
    x = layers(100, MIXED[:3], np.float64)
    views = [
        lambda a: cupy.asarray(np.repeat(a, 2, axis=-1))[..., ::2],
        lambda a: cupy.asarray(np.ascontiguousarray(a.T)).T,
        lambda a: cupy.asarray(np.ascontiguousarray(a[::-1]))[::-1],
    ]
    for view in views:
        found = nf.jacobian_gram([nf.LayerFactors(view(a), view(d)) for a, d in x])
        check(found.get(), nf.jacobian_gram(x), np.float64)


def test_factors_in_pieces(monkeypatch):
    """As if the device were small."""
    x, y = layers(700, DENSE, np.float64), layers(300, DENSE, np.float64, seed=1)
    monkeypatch.setattr(gpu_gram.Backend, "free_bytes", lambda gpus: 1 << 20)
    check(nf.jacobian_gram(x, device="cuda"), nf.jacobian_gram(x), np.float64)
    check(nf.jacobian_gram(x, y, per_layer=True, device="cuda"), nf.jacobian_gram(x, y, per_layer=True), np.float64)


@DTYPES
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, dtype):
    net, rng = NETWORKS[name], np.random.default_rng(5)
    shape, width = ((9, 8, 3), 24) if "conv" in name else ((20,), 200)
    x, y = (rng.standard_normal((n, *shape)).astype(dtype) for n in (90, 31))
    host, gone = (nf.init(net, shape, width, seed=1, dtype=dtype, device=d) for d in (None, "cuda"))
    assert all(np.array_equal(a, b.get()) for a, b in zip(host.weights, gone.weights, strict=True))
    # activations of two libraries, and products of 200 numbers, one after the other
    slack = 100 * np.finfo(dtype).eps
    X, Y = cupy.asarray(x), cupy.asarray(y)
    outputs = host.outputs(x)
    assert_close(gone.outputs(X).get(), outputs, np.abs(outputs).max(), slack)
    for wanted, found in zip(host.jacobian_factors(x), gone.jacobian_factors(X), strict=True):
        for a, b in zip(wanted, found, strict=True):
            # a kink: a preactivation of the size of rounding may fall on either side
            bad = np.abs(b.get() - a) > slack * np.abs(a).max()
            assert bad.mean() < (1e-3 if name in ("relu", "leaky_relu", "abs", "fixed readout", "conv") else 1e-9)
    for other, gone_other in ((None, None), (y, Y)):
        wanted = nf.empirical_ntk(host, x, other)
        for memory in (None, max(1, 50 * gone.bytes_per_sample)):
            for found in (nf.empirical_ntk(gone, x, other, memory=memory),
                          nf.empirical_ntk(gone, X, gone_other, memory=memory).get()):  # fmt: skip
                assert_close(found, wanted, np.abs(wanted).max(), max(slack, 1e-5 if name == "relu" else 0))


@DTYPES
@pytest.mark.parametrize("net", [nf.resnet(3, "tanh"), nf.fully_connected(2, "softplus")], ids=["resnet", "dense"])
def test_third_order(net, dtype):
    x = np.random.default_rng(2).standard_normal((40, 10)).astype(dtype)
    host, gone = (nf.init(net, 10, 150, seed=1, dtype=dtype, device=d) for d in (None, "cuda"))
    wanted = nf.third_order_kernel(host, x)
    for found in (nf.third_order_kernel(gone, cupy.asarray(x)).get(), nf.third_order_kernel(gone, x)):
        assert_close(found, wanted, np.abs(wanted).max(), 100 * np.finfo(dtype).eps)
        assert np.array_equal(found, found.transpose(1, 0, 2))


def test_torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    import ntkfast.torch

    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 5, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(5 * 16, 7)
    ).double()
    x = torch.randn(30, 2, 6, 6, dtype=torch.float64)
    wanted = {output: ntkfast.torch.empirical_ntk(module, x, output=output).numpy() for output in ("sum", "full")}
    module, x = module.cuda(), x.cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        factors = ntkfast.torch.jacobian_factors(module, x * 1.0)
        assert all(a.is_cuda and d.is_cuda for a, d in factors)
        found = nf.jacobian_gram(factors)
        assert found.is_cuda
        check(found.cpu().numpy(), wanted["sum"], np.float64)
        for output, K in wanted.items():
            check(ntkfast.torch.empirical_ntk(module, x, output=output).cpu().numpy(), K, np.float64)

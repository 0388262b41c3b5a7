"""The public API on a real GPU against the CPU: ``pytest -m gpu`` (skipped where there is none)."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import assert_close, tolerance

import ntkfast as nf
from ntkfast._cuda import CudaUnavailable, load_cupy
from ntkfast._cuda import gram as gpu_gram

WHY = ""
try:
    cupy = load_cupy()
except CudaUnavailable as reason:
    cupy = None
    WHY = str(reason)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cupy is None, reason=WHY)]

KINDS = ("ntk", "nngp", "last_hidden")
NET = nf.resnet(10)
NETWORKS = {
    "fully connected 3": nf.fully_connected(3),
    "fully connected 100": nf.fully_connected(100),
    "leaky_relu": nf.fully_connected(3, "leaky_relu"),
    "abs": nf.fully_connected(3, "abs"),
    "residual": NET,
    "bottleneck": nf.bottleneck_resnet(10, first_trained=True),
    "fixed readout": nf.fixed_readout_resnet(5),
    "biases": nf.Network([nf.Dense("relu", bias_variance=0.2)] * 3, nf.Readout(bias_variance=0.1)),
    "outer biases": nf.Network([nf.Bottleneck("relu", scale=0.5, bias_variance=0.1, outer_bias_variance=0.2)] * 2),
    "mixed": nf.Network([nf.Dense("relu"), nf.Dense("gelu"), nf.Residual("sin", scale=0.5)]),
} | {name: nf.resnet(3, nf.Activation(name)) for name in ("erf", "gelu", "sin", "cos", "gaussian", "softplus", "silu")}


@pytest.fixture(params=["table", "recursion"], autouse=True)
def path(request, monkeypatch):
    """Every test on both paths: networks and points without a table take the recursion."""
    monkeypatch.setenv("NTKFAST_PATH", request.param)
    return request.param


DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])


def points(n, d, dtype=np.float64, seed=0):
    """Rows with a duplicate, close, opposite and parallel ones, and a zero row."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x *= rng.uniform(0.5, 1.0, size=(n, 1)) / np.linalg.norm(x, axis=1, keepdims=True)
    if n > 20:
        x[n // 2], x[n // 3], x[n - 2], x[5] = x[0], -x[1], 1.5 * x[3], 0
        x[n - 1] = x[2] * (1 + 1e-7 * rng.normal(size=d))
        x[n - 3] = -x[4] * (1 + 1e-5 * rng.normal(size=d))
    return x.astype(dtype)


def scale(net, x, y=None, kind="ntk"):
    di, dj = (nf.diagonal(net, z, get=kind).astype(float) for z in (x, x if y is None else y))
    return np.sqrt(np.outer(di, dj))


def check(found, net, x, y=None, **options):
    kind = options.get("get", "ntk")
    assert_close(found, nf.gram(net, x, y, **options), scale(net, x, y, kind), tolerance(net, x.dtype))


@DTYPES
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, dtype):
    net, x, y = NETWORKS[name], points(333, 50, dtype), points(111, 50, dtype, seed=1)
    for other in (None, y):
        there = nf.gram(net, cupy.asarray(x), None if other is None else cupy.asarray(other), get=KINDS)
        wanted = nf.gram(net, x, other, get=KINDS)
        for kind, a, b in zip(KINDS, there, wanted, strict=True):
            assert_close(a.get(), b, scale(net, x, other, kind), tolerance(net, dtype))
    assert np.array_equal(*(lambda k: (k, k.T))(nf.gram(net, x, device="cuda")))
    slices = nf.layer_grams(net, x[:90], y, device="cuda")
    assert_close(slices, nf.layer_grams(net, x[:90], y), scale(net, x[:90], y), tolerance(net, dtype))


@DTYPES
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 65, 3), (33, 31, 784), (129, 1000, 17)])
def test_odd_sizes(n, m, d, dtype):
    x, y = points(n, d, dtype), points(m, d, dtype, seed=1)
    for net in (NET, NETWORKS["biases"]):
        check(nf.gram(net, x, y, device="cuda"), net, x, y)
        check(nf.gram(net, y, device="cuda", normalize=False), net, y)


@DTYPES
def test_normalised(dtype):
    x = points(300, 20, dtype)
    for net in (NETWORKS["residual"], NETWORKS["biases"]):
        found, wanted = (nf.gram(net, x, normalize=True, device=device) for device in ("cuda", None))
        assert_close(found, wanted, 1, tolerance(net, dtype))
        assert np.isin(np.diag(found), (0, 1)).all()


@DTYPES
def test_all_pairs_close(dtype):
    rng = np.random.default_rng(2)
    x = rng.normal(size=784) + 10.0 ** -rng.uniform(3, 9, size=(400, 1)) * rng.normal(size=(400, 784))
    x = (x * rng.choice([-1.0, 1.0], size=(400, 1))).astype(dtype)
    for net in (NET, NETWORKS["biases"]):
        check(nf.gram(net, x, device="cuda"), net, x)


def test_the_path(path):
    x = cupy.asarray(points(40, 5))
    assert NET.plan(x).startswith(path)
    assert "on cuda:0" in NET.plan(x)


@DTYPES
@pytest.mark.parametrize("name", ["biases", "mixed", "erf", "softplus"])
def test_rows_of_one_norm(name, dtype):
    """Any network has a table here."""
    net, x = NETWORKS[name], points(333, 50)
    x = (x[np.any(x, axis=1)] / np.linalg.norm(x[np.any(x, axis=1)], axis=1, keepdims=True)).astype(dtype)
    check(nf.gram(net, x, device="cuda"), net, x)
    check(nf.gram(net, x[:100], x, device="cuda", get="nngp"), net, x[:100], x, get="nngp")


def test_streams_that_are_not_the_default():
    x = points(2000, 100)
    for non_blocking in (False, True):
        with cupy.cuda.Stream(non_blocking=non_blocking) as stream:
            device = cupy.asarray(x)
            found = nf.gram(NET, device * 1.0)  # the product is still under way
            stream.synchronize()
            check(found.get(), NET, x)


def test_strides_and_dtypes():
    x = points(300, 40)
    device = cupy.asarray(x)
    for view, host in [
        (cupy.asfortranarray(device), x),
        (device[::2, ::2], x[::2, ::2]),
        (device[:, 3:], x[:, 3:]),
        (device[::-1], x[::-1]),
        (cupy.asarray(np.arange(12).reshape(4, 3)), np.arange(12).reshape(4, 3)),
    ]:
        check(nf.gram(NET, view).get(), NET, np.ascontiguousarray(host, dtype=np.float64))
    out = cupy.zeros((310, 350))[5:305, 20:320]
    assert nf.gram(NET, device, out=out) is out
    check(out.get(), NET, x)


def test_scales():
    x = points(100, 10)
    for factor in (2.0**-600, 2.0**450):
        found, wanted = (nf.gram(NET, z, normalize=True) for z in (cupy.asarray(factor * x), factor * x))
        assert_close(found.get(), wanted, 1, tolerance(NET, np.float64))


def test_products_are_true_float32(monkeypatch):
    """TF32 has ten bits: an error of 1e-3 of the norms, far beyond the tolerance."""
    x = points(500, 784, np.float32)
    handle = cupy.cuda.get_cublas_handle()
    before = cupy.cuda.cublas.getMathMode(handle)
    try:
        cupy.cuda.cublas.setMathMode(handle, 3)
        check(nf.gram(NET, cupy.asarray(x)).get(), NET, x)
        assert cupy.cuda.cublas.getMathMode(handle) == 3
    finally:
        cupy.cuda.cublas.setMathMode(handle, before)


@pytest.mark.slow
@DTYPES
def test_more_entries_than_32_bits_count(dtype):
    n = 46500
    if cupy.cuda.runtime.memGetInfo()[0] < 1.5 * n * n * np.dtype(dtype).itemsize:
        pytest.skip("not enough memory on the device")
    assert n * n > 2**31
    x = points(n, 8, dtype)
    found = nf.gram(NET, cupy.asarray(x))
    rng = np.random.default_rng(4)
    for i, j in [(0, 0), (n - 40, n - 40), (n - 40, 0), (0, n - 40), *rng.integers(0, n - 40, size=(60, 2))]:
        a, b = x[i : i + 40], x[j : j + 40]
        check(found[i : i + 40, j : j + 40].get(), NET, a, b)


def test_streaming_to_a_memmap(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_gram, "STREAMED", 256)
    x = points(1500, 30)
    file = np.lib.format.open_memmap(tmp_path / "K.npy", "w+", np.float64, (1500, 1500))
    for source, device in ((x, "cuda"), (cupy.asarray(x), None)):
        file[:] = np.nan
        assert nf.gram(NET, source, out=file, device=device) is file
        check(np.asarray(file), NET, x)
    slices = np.full((11, 400, 400), np.nan)
    assert nf.layer_grams(NETWORKS["bottleneck"], x[:400], device="cuda").shape[0] == 21
    nf.layer_grams(NET, x[:400], out=slices, device="cuda")
    assert_close(slices.sum(axis=0), nf.gram(NET, x[:400]), scale(NET, x[:400]), tolerance(NET, np.float64))


def test_several_devices(monkeypatch):
    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip("one GPU")
    monkeypatch.setattr(gpu_gram, "STREAMED", 256)
    x = points(2000, 30)
    check(nf.gram(NET, x, device=[f"cuda:{k}" for k in range(count)]), NET, x)


def test_torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    x = points(500, 40)
    with torch.cuda.stream(torch.cuda.Stream()):
        tensor = torch.from_numpy(x).to("cuda") * 1.0
        found = nf.gram(NET, tensor)
        assert isinstance(found, torch.Tensor)
        assert found.device == tensor.device
        check(found.cpu().numpy(), NET, x)
        out = torch.empty((500, 500), dtype=torch.float64, device="cuda")
        assert nf.gram(NET, tensor, out=out) is out
        check(out.cpu().numpy(), NET, x)


def test_jax():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX without CUDA")
    x = points(500, 40, np.float32)
    found = nf.gram(NET, jax.device_put(x))
    assert isinstance(found, jax.Array)
    check(np.asarray(found), NET, x)


def test_errors():
    x = cupy.asarray(points(30, 5))
    with pytest.raises(ValueError, match="X is on cuda:0 and Y is in host memory"):
        nf.gram(NET, x, points(30, 5))
    with pytest.raises(ValueError, match="X is on cuda:0, but device='cpu'"):
        nf.gram(NET, x, device="cpu")
    x[7, 2] = cupy.nan
    with pytest.raises(ValueError, match="X must be finite: row 7"):
        nf.gram(NET, x)
    with pytest.raises(nf.OutOfMemoryError, match="bytes on cuda:0"):
        nf.gram(NET, cupy.ones((10**6, 2)))


def test_the_stand_in_was_not_left_behind():
    assert sys.modules["cupy"] is cupy
    assert hasattr(cupy, "show_config")

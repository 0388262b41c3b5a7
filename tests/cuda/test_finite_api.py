"""Finite networks on the stand-in for CuPy: jacobian_gram, empirical_ntk, third_order_kernel with device arrays."""

from __future__ import annotations

import itertools
import sys
import types

import fake_cupy
import numpy as np
import pytest
import simulate
from conftest import assert_close
from finite_cases import NETWORKS

import ntkfast as nf
from ntkfast import _contract, finite, third_order
from ntkfast._cuda import CudaUnavailable, jacobian
from ntkfast._cuda import gram as gpu_gram

pytestmark = pytest.mark.skipif(simulate.missing(simulate.mode()) is not None, reason="the simulator cannot run here")

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])
#: relative to the largest entry
BOUND = {np.float64: 1e-13, np.float32: 2e-6}
SHAPES = [(9, 3, 7), (4, 30, 2), (0, 5, 33), (0, 33, 1)]


@pytest.fixture(params=["lazy", "at once", "shuffled"])
def gpu(monkeypatch, request):
    """Two devices; work is done when somebody waits for it, at once, or earlier than it must be, in random order."""
    return fake_cupy.install(
        monkeypatch, devices=2, lazy=request.param != "at once", seed=5 * (request.param == "shuffled")
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles although the matrices are small."""
    monkeypatch.setattr(jacobian, "SIDE", 16)
    monkeypatch.setattr(gpu_gram, "STREAMED", 16)


def layers(rng, n, dtype=np.float64, shapes=SHAPES):
    sizes = [((n, p) if p else (n,), i, o) for p, i, o in shapes]
    return [nf.LayerFactors(*(rng.standard_normal((*axes, k)).astype(dtype) for k in (i, o))) for axes, i, o in sizes]


def there(gpu, factors):
    return [nf.LayerFactors(gpu.array(a), gpu.array(d)) for a, d in factors]


def check(found, wanted):
    assert found.dtype == wanted.dtype
    assert_close(found, wanted, np.abs(wanted).max(), BOUND[wanted.dtype.type])


# jacobian_gram


@DTYPES
@pytest.mark.parametrize("device", ["cuda", ["cuda:0", "cuda:1"]], ids=str)
def test_numpy_in_numpy_out(gpu, small_tiles, rng, dtype, device):
    x, y = layers(rng, 41, dtype), layers(rng, 23, dtype)
    for other in (None, y):
        for per_layer in (False, True):
            found = nf.jacobian_gram(x, other, per_layer=per_layer, device=device)
            assert isinstance(found, np.ndarray)
            check(found, nf.jacobian_gram(x, other, per_layer=per_layer))
            assert other is not None or np.array_equal(found, found.swapaxes(-1, -2))
    check(nf.jacobian_diagonal(x, device=device), nf.jacobian_diagonal(x))


def test_device_in_device_out(gpu, small_tiles, rng):
    x, y = layers(rng, 41), layers(rng, 23)
    found = nf.jacobian_gram(there(gpu, x))
    assert isinstance(found, gpu.ndarray)
    check(found.get(), nf.jacobian_gram(x))
    check(nf.jacobian_gram(there(gpu, x), there(gpu, y)).get(), nf.jacobian_gram(x, y))
    check(nf.jacobian_diagonal(there(gpu, x), per_layer=True).get(), nf.jacobian_diagonal(x, per_layer=True))
    with gpu.cuda.Device(1), gpu.cuda.Stream(non_blocking=True):
        found = nf.jacobian_gram(there(gpu, x))
        assert found.device.id == 1
        check(found.get(), nf.jacobian_gram(x))


def test_factors_larger_than_the_device(monkeypatch, rng):
    """Some samples at a time; and the buffers are given back."""
    gpu = fake_cupy.install(monkeypatch, memory=1 << 17)
    monkeypatch.setattr(gpu_gram, "STREAMED", 16)
    x, y = (layers(rng, n, shapes=[(0, 100, 60), (0, 50, 7)]) for n in (97, 70))
    assert sum(a.nbytes + d.nbytes for a, d in x) > gpu.memory
    for other in (None, y):
        for per_layer in (False, True):
            found = nf.jacobian_gram(x, other, per_layer=per_layer, device="cuda")
            check(found, nf.jacobian_gram(x, other, per_layer=per_layer))
    monkeypatch.setattr(jacobian, "_GRADIENTS", 1 << 12)
    check(nf.jacobian_diagonal(x, device="cuda"), nf.jacobian_diagonal(x))
    assert gpu.used == [0]
    with pytest.raises(nf.OutOfMemoryError, match="on cuda:0"):
        nf.jacobian_gram(there(gpu, layers(rng, 300, shapes=[(0, 1, 1)])))


@DTYPES
@pytest.mark.parametrize("sizes", [(9, 7), (3, 40)])
def test_tiles_smaller_than_their_buffers(gpu, small_tiles, rng, monkeypatch, sizes, dtype):
    """41 samples make tiles of 14, which take larger parts of a weight matrix at a time than tiles of 16 would."""
    monkeypatch.setattr(jacobian, "_GRADIENTS", 16 * 13 * np.dtype(dtype).itemsize)
    x, y = layers(rng, 41, dtype, [(30, *sizes)]), layers(rng, 23, dtype, [(30, *sizes)])
    for other in (None, y):
        wanted = nf.jacobian_gram(x, other)
        check(nf.jacobian_gram(x, other, device="cuda"), wanted)
        check(nf.jacobian_gram(there(gpu, x), None if other is None else there(gpu, other)).get(), wanted)


def test_other_libraries_on_their_streams(gpu, small_tiles, rng, monkeypatch):
    class Tensor(fake_cupy.Foreign):
        __module__ = "torch"

    x = layers(rng, 41)
    with gpu.cuda.Device(1), gpu.cuda.Stream(non_blocking=True) as stream:
        tensors = [nf.LayerFactors(Tensor(a), Tensor(d)) for a, d in there(gpu, x)]
    current = types.SimpleNamespace(cuda_stream=stream.ptr)
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(current_stream=lambda k: current), from_dlpack=Tensor)
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = nf.jacobian_gram(tensors)
    assert isinstance(found, Tensor)
    stream.synchronize()
    check(found.array._host, nf.jacobian_gram(x))


@pytest.mark.parametrize("make", [
    lambda gpu, a: gpu.array(np.repeat(a, 2, axis=-1))[..., ::2],
    lambda gpu, a: gpu.array(np.ascontiguousarray(a.T)).T,
    lambda gpu, a: gpu.array(np.pad(a, [(0, 0)] * (a.ndim - 1) + [(2, 3)], constant_values=np.nan))[..., 2:-3],
    lambda gpu, a: gpu.array(np.ascontiguousarray(a[::-1]))[::-1],
], ids=["columns", "transposed", "padded", "reversed"])  # fmt: skip
def test_strides(gpu, rng, make):
    x = layers(rng, 20)
    views = [nf.LayerFactors(make(gpu, a), make(gpu, d)) for a, d in x]
    check(nf.jacobian_gram(views).get(), nf.jacobian_gram(x))


def test_out(gpu, small_tiles, rng, tmp_path):
    x = layers(rng, 41)
    wanted = nf.jacobian_gram(x)
    file = np.lib.format.open_memmap(tmp_path / "K.npy", "w+", np.float64, (41, 41))
    for factors, device in ((x, "cuda"), (there(gpu, x), None)):
        file[:] = np.nan
        assert nf.jacobian_gram(factors, out=file, device=device) is file
        check(np.asarray(file), wanted)
    whole = gpu.zeros((45, 60))
    out = whole[2:43, 5:46]
    assert nf.jacobian_gram(there(gpu, x), out=out) is out
    check(out.get(), wanted)
    assert not whole[:2].get().any()
    for bad, message in [(gpu.empty((41, 40)), "shape"), (gpu.empty((41, 41), np.float32), "dtype")]:
        with pytest.raises((ValueError, TypeError), match=message):
            nf.jacobian_gram(there(gpu, x), out=bad)
    square = gpu.array(np.ones((6, 6)))
    with pytest.raises(ValueError, match="overlaps"):
        nf.jacobian_gram([nf.LayerFactors(square, gpu.array(np.ones((6, 2))))], out=square)


def test_zero_gradients_and_one_sample(gpu, rng):
    x = layers(rng, 1)
    check(nf.jacobian_gram(there(gpu, x)).get(), nf.jacobian_gram(x))
    x[0].deltas[:] = x[2].inputs[:] = 0
    found = nf.jacobian_gram(there(gpu, x), per_layer=True).get()
    assert not found[[0, 2]].any()
    assert np.isfinite(found).all()


def test_tensor_cores_are_not_used(gpu, rng):
    gpu.cuda.cublas.setMathMode(gpu.cuda.get_cublas_handle(), 3)  # TF32
    x = layers(rng, 20, np.float32)
    check(nf.jacobian_gram(there(gpu, x)).get(), nf.jacobian_gram(x))


def test_bad_factors(gpu, rng):
    x = layers(rng, 9)
    device = there(gpu, x)
    with pytest.raises(ValueError, match=r"factors\[0\].inputs is on cuda:0 and factors\[1\].inputs is in host"):
        nf.jacobian_gram([device[0], x[1]])
    with pytest.raises(ValueError, match=r"factors\[0\].inputs is on cuda:0 and other\[0\].inputs is in host"):
        nf.jacobian_gram(device, x)
    with pytest.raises(ValueError, match="device='cpu'"):
        nf.jacobian_gram(device, device="cpu")
    x[1].deltas[5, 2, 1] = np.inf
    for factors, option in ((there(gpu, x), None), (x, "cuda")):
        with pytest.raises(ValueError, match=r"factors\[1\].deltas must be finite: sample 5"):
            nf.jacobian_gram(factors, device=option)
    with pytest.raises(ValueError, match="layer 0: factors has"):
        nf.jacobian_gram(device[:1], device[1:2])


# Finite networks


def pair(name, dtype, device="cuda"):
    """The same network on both sides, and two sets of points."""
    net, rng = NETWORKS[name], np.random.default_rng(5)
    shape = (3, 4, 2) if "conv" in name else (4,)
    host, gone = (nf.init(net, shape, 7, seed=1, dtype=dtype, device=d) for d in (None, device))
    return host, gone, *(rng.standard_normal((n, *shape)).astype(dtype) for n in (6, 3))


@DTYPES
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(gpu, monkeypatch, name, dtype):
    """One code: results differ by rounding. Several tiles, on the streams of their own."""
    monkeypatch.setattr(jacobian, "SIDE", 3)
    host, gone, x, y = pair(name, dtype)
    assert all(np.array_equal(a, b.get()) for a, b in zip(host.weights, gone.weights, strict=True))
    assert (host.device, gone.device) == ("cpu", "cuda:0")
    X, Y = gpu.array(x), gpu.array(y)
    check(gone.outputs(x), host.outputs(x))
    check(gone.outputs(X).get(), host.outputs(x))
    for wanted, there, back in zip(*(n.jacobian_factors(z) for n, z in ((host, x), (gone, X), (gone, x))), strict=True):
        for a, b, c in zip(wanted, there, back, strict=True):
            check(b.get(), a)
            check(c, a)
    for other, gone_other in ((None, None), (y, Y)):
        wanted = nf.empirical_ntk(host, x, other, per_layer=True)
        size = np.abs(wanted).sum(axis=0).max() + np.finfo(dtype).tiny
        for memory in (None, 2000):
            for found in (nf.empirical_ntk(gone, x, other, per_layer=True, memory=memory),
                          nf.empirical_ntk(gone, X, gone_other, per_layer=True, memory=memory).get()):  # fmt: skip
                assert_close(found, wanted, size, BOUND[dtype])
        assert_close(nf.empirical_ntk(gone, X, gone_other).get(), wanted.sum(axis=0), size, BOUND[dtype])


@DTYPES
@pytest.mark.parametrize("net", [
    nf.resnet(3, "tanh"), nf.fully_connected(2, "softplus"),
    nf.Network([nf.Dense("erf", weight_variance=0.5), nf.Residual("silu", scale=0.5, trained=False)],
               nf.Readout(weight_variance=0.3, trained=False)),
], ids=["resnet", "fully connected", "frozen"])  # fmt: skip
@pytest.mark.parametrize("n", [1, 6])
def test_third_order(gpu, monkeypatch, net, dtype, n):
    x = np.random.default_rng(2).standard_normal((n, 3)).astype(dtype)
    host, gone = (nf.init(net, 3, 9, seed=1, dtype=dtype, device=d) for d in (None, "cuda:1"))
    wanted = nf.third_order_kernel(host, x)
    with gpu.cuda.Device(1):
        X = gpu.array(x)
    for block in (1 << 30, 1):
        monkeypatch.setattr(third_order, "_DEVICE_BLOCK", block)
        for found in (nf.third_order_kernel(gone, X).get(), nf.third_order_kernel(gone, x)):
            check(found, wanted)
            assert np.array_equal(found, found.transpose(1, 0, 2))
    out = np.empty((n, n, n), dtype)
    assert nf.third_order_kernel(gone, X, out=out) is out
    check(out, wanted)


@pytest.mark.parametrize("name", ["bottleneck", "conv"])
def test_points_in_any_order(gpu, name):
    host, gone, x, _ = pair(name, np.float64)
    wanted = nf.empirical_ntk(host, x)
    axes = tuple(range(x.ndim))[::-1]
    for X in (gpu.array(np.ascontiguousarray(x.transpose(axes))).transpose(*axes), gpu.array(np.repeat(x, 2, 0))[::2]):
        check(nf.empirical_ntk(gone, X).get(), wanted)
        check(gone.outputs(X).get(), host.outputs(x))
        assert all(f.inputs.flags.c_contiguous for f in gone.jacobian_factors(X))
    if name == "conv":
        first = np.ascontiguousarray(np.moveaxis(x, -1, 1))
        found = nf.empirical_ntk(gone, gpu.array(first), data_format="channels_first")
        check(found.get(), wanted)
    assert all(f.inputs.flags.c_contiguous for f in host.jacobian_factors(np.asfortranarray(x)))


def test_where_things_are(gpu):
    host, gone, x, y = pair("erf", np.float64)
    X = gpu.array(x)
    with gpu.cuda.Device(1):
        elsewhere = gpu.array(y)
    for call, message in [
        (lambda: host.outputs(X), "X is on cuda:0 and the network is on cpu"),
        (lambda: gone.outputs(elsewhere), "X is on cuda:1 and the network is on cuda:0"),
        (lambda: nf.empirical_ntk(gone, X, y), "X is on cuda:0 and Y is in host memory"),
        (lambda: nf.third_order_kernel(gone, elsewhere), "X is on cuda:1"),
        (lambda: nf.init(nf.resnet(2), 3, 5, seed=0, device=["cuda:0", "cuda:1"]), "on one device"),
        (lambda: nf.init(nf.resnet(2), 3, 5, seed=0, device="cuda:7"), "there are 2 CUDA devices"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert "cuda:0" in repr(gone)
    bad = x.copy()
    bad[4, 1] = np.nan
    for points in (bad, gpu.array(bad)):
        with pytest.raises(ValueError, match="X must be finite: row 4"):
            gone.outputs(points)
    check(gone.outputs(gpu.array(np.ones((2, 4), int))).get(), host.outputs(np.ones((2, 4))))


def test_no_cupy(monkeypatch, rng):
    monkeypatch.setitem(sys.modules, "cupy", None)
    for call in (
        lambda: nf.init(nf.resnet(2), 3, 5, seed=0, device="cuda"),
        lambda: nf.jacobian_gram(layers(rng, 3), device="cuda"),
        lambda: nf.jacobian_diagonal(layers(rng, 3), device="cuda"),
    ):
        with pytest.raises(CudaUnavailable, match="needs CuPy"):
            call()


def test_networks_larger_than_the_device(monkeypatch):
    fake_cupy.install(monkeypatch, memory=1 << 18, lazy=False)
    monkeypatch.setattr(finite, "_DEVICE_BATCH", 1 << 14)
    with pytest.raises(nf.OutOfMemoryError, match=r"the network of width 200 needs .* bytes on cuda:0"):
        nf.init(nf.resnet(2), 3, 200, seed=0, device="cuda")
    network = nf.init(nf.resnet(2), 3, 20, seed=0, device="cuda")
    x = np.random.default_rng(0).standard_normal((400, 3))
    wanted = nf.init(nf.resnet(2), 3, 20, seed=0).jacobian_factors(x)
    for a, b in zip(network.jacobian_factors(x), wanted, strict=True):
        check(a.deltas, b.deltas)


def test_functions_of_the_user(gpu):
    def network(f, g):
        activation = nf.Activation.from_function(f, g, name="mine")
        return nf.init(nf.Network([nf.Dense(activation, gain=1.0)]), 3, 5, seed=0, device="cuda")

    x = np.random.default_rng(0).standard_normal((4, 3))
    check(network(np.tanh, lambda z: 1 - np.tanh(z) ** 2).outputs(x),
          nf.init(nf.Network([nf.Dense("tanh", gain=1.0)]), 3, 5, seed=0).outputs(x))  # fmt: skip
    for f in (lambda z: np.asarray(z) * 1.0, lambda z: z.get()):
        given = network(lambda z, f=f: f(z) if not isinstance(z, np.ndarray) else z, np.ones_like)
        with pytest.raises(TypeError, match="activation 'mine' does not take arrays on a GPU"):
            given.outputs(x)


def test_check_against_network(gpu):
    check_there, check_here = (
        nf.check_against_network(nf.resnet(2), np.eye(3), [20, 40], 2, device=d) for d in ("cuda", None)
    )
    assert np.allclose(check_there.total, check_here.total, rtol=1e-10)


def test_the_contraction_is_that_of_the_cpu(gpu, rng, monkeypatch):
    asked = []
    chosen = _contract.contraction
    monkeypatch.setattr(_contract, "contraction", lambda *a, **k: asked.append(a) or chosen(*a, **k))
    x = layers(rng, 8)
    nf.jacobian_gram(x)
    cpu, asked[:] = list(asked), []
    nf.jacobian_gram(x, device="cuda")
    assert asked == cpu != []


@pytest.mark.parametrize(("shape", "sizes"), [
    *itertools.product([(0, 5, 7), (2, 30, 50)], [(1e25, 1.0), (1e30, 1e-30), (1e30, 0.0)]),
    ((4, 3, 5), (1e25, 1.0)),  # by gradients, which are in range where one of the two is small
], ids=str)  # fmt: skip
def test_overflow_names_the_sample(gpu, small_tiles, sizes, shape):
    p, i, o = shape
    x, y = (nf.LayerFactors(*(np.ones((n, *((p,) if p else ()), k), np.float32) for k in (i, o))) for n in (41, 23))
    for part, size in zip(x, sizes, strict=True):
        part[33] *= np.float32(size)
    cross = [nf.LayerFactors(*(np.insert(b, 20, a[33], axis=0) for a, b in zip(x, y, strict=True)))]
    x, y = [x], [y]
    for device, left, right, small in ((None, there(gpu, x), there(gpu, cross), there(gpu, y)),
                                       ("cuda", x, cross, y), (["cuda:0", "cuda:1"], x, cross, y)):  # fmt: skip
        for per_layer in (False, True):
            with pytest.raises(OverflowError, match=r"row 33 with itself.*float32"):
                nf.jacobian_gram(left, per_layer=per_layer, device=device)
            with pytest.raises(OverflowError, match=r"row 33 and column 20 .*float32"):
                nf.jacobian_gram(left, right, per_layer=per_layer, device=device)
        found = nf.jacobian_gram(left, small, device=device)
        assert np.isfinite(found if isinstance(found, np.ndarray) else found.get()).all()
        if sizes == (1e25, 1.0):
            with pytest.raises(OverflowError, match=r"row 33 with itself.*float32"):
                nf.jacobian_diagonal(left, device=device)


def test_overflow_of_networks(gpu):
    network = nf.init(nf.resnet(2, "erf"), 3, 9, seed=0, dtype="float32", device="cuda")
    x = np.random.default_rng(2).standard_normal((6, 3)).astype(np.float32)
    x[4] *= np.float32(1e25)
    for X in (x, gpu.array(x)):
        for memory in (None, 600):
            with pytest.raises(OverflowError, match=r"row 4 with itself.*float32"):
                nf.empirical_ntk(network, X, memory=memory)
            with pytest.raises(OverflowError, match=r"row 4 and column 4 .*float32"):
                nf.empirical_ntk(network, X, X, memory=memory)
        with pytest.raises(OverflowError, match=r"samples \d, \d and \d.*float32"):
            nf.third_order_kernel(network, X)

"""Convolutional networks with device= and device arrays: API through a stand-in for CuPy, kernels on the simulator."""

from __future__ import annotations

import sys
import threading
import types

import fake_cupy
import numpy as np
import pytest
import simulate
from test_api import Store
from test_conv_kernels import BIASED, BOUND, assert_close, images, scale

import ntkfast as nf
from ntkfast._cuda import CudaUnavailable, conv

pytestmark = pytest.mark.skipif(simulate.missing(simulate.mode()) is not None, reason="the simulator cannot run here")

NET, POOLED = nf.conv_resnet(3), nf.conv_net(2, readout="gap")
X, Y = images(9, (4, 5)), images(6, (4, 5), seed=1)
gpu = fake_cupy.two_devices


@pytest.fixture
def small(monkeypatch):
    """Many tiles, squares, batches and launches."""
    monkeypatch.setattr(conv, "STREAMED", 4)
    monkeypatch.setattr(conv, "_IMAGES", 10000)
    monkeypatch.setattr(conv, "_PARTS", 200)
    monkeypatch.setattr(conv, "_SQUARE", 2)
    monkeypatch.setattr(conv, "LAUNCH", dict.fromkeys(conv.LAUNCH, 100))


def check(found, net, x, y=None, **options):
    assert found.dtype == options.get("dtype", x.dtype)
    wanted = nf.gram(net, x, y, **options)
    assert_close(found, wanted, scale(net, x, y, options.get("get", "ntk")), BOUND[found.dtype.type])


@pytest.mark.parametrize("device", ["cuda:1", ["cuda:0", "cuda:1"]], ids=str)
def test_numpy_in_numpy_out(gpu, small, device):
    threads = threading.active_count()
    for net in (NET, POOLED, BIASED):
        check(nf.gram(net, X, device=device), net, X)
        check(nf.gram(net, X, Y, device=device, get="nngp"), net, X, Y, get="nngp")
    check(nf.gram(NET, X, dtype=np.float32, device=device), NET, X, dtype=np.float32)
    grams = nf.layer_grams(NET, X, device=device)
    assert isinstance(grams, np.ndarray)
    check(grams.sum(axis=0), NET, X)
    first = np.moveaxis(X, -1, 1)
    check(nf.gram(NET, first, device=device, data_format="channels_first"), NET, X)
    assert threading.active_count() == threads


def test_tuples_and_normalised(gpu, small):
    found = nf.gram(POOLED, X, get=("nngp", "ntk"), normalize=True, device="cuda")
    wanted = nf.gram(POOLED, X, get=("nngp", "ntk"), normalize=True)
    assert found._fields == ("nngp", "ntk")
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, 1, BOUND[np.float64])
        assert np.array_equal(np.diag(a), (np.arange(9) != 4).astype(float))  # image 4 is empty


def test_out_on_the_host(gpu, small, tmp_path):
    file = np.lib.format.open_memmap(tmp_path / "K.npy", "w+", np.float64, (9, 9))
    assert nf.gram(NET, X, out=file, device="cuda") is file
    check(np.asarray(file), NET, X)
    store, slices = Store((9, 6)), Store((4, 9, 9))
    assert nf.gram(POOLED, X, Y, out=store, device=["cuda:0", "cuda:1"]) is store
    check(store.data, POOLED, X, Y)
    assert nf.layer_grams(NET, gpu.array(X), out=slices) is slices
    check(slices.data.sum(axis=0), NET, X)


def test_device_in_device_out(gpu, small):
    x, y = gpu.array(X), gpu.array(Y)
    for net in (NET, POOLED, BIASED):
        found = nf.gram(net, x)
        assert isinstance(found, gpu.ndarray)
        check(found.get(), net, X)
        check(nf.gram(net, x, y, device="cuda:0").get(), net, X, Y)
        assert np.allclose(nf.diagonal(net, x).get(), nf.diagonal(net, X), rtol=1e-13, atol=1e-15)
    check(nf.layer_grams(NET, x).get().sum(axis=0), NET, X)
    whole = gpu.zeros((2, 12, 15))
    out = whole[1, 2:11, 5:14]
    assert nf.gram(NET, x, out=out) is out
    check(out.get(), NET, X)
    whole = np.arange(24).reshape(2, 4, 3) - 7
    check(nf.gram(NET, gpu.array(whole)).get(), NET, whole.astype(float))
    check(nf.gram(NET, gpu.array(np.repeat(X, 2, axis=2))[:, :, ::2]).get(), NET, X)


def test_other_libraries_devices_and_streams(gpu, small, monkeypatch):
    class Tensor(fake_cupy.Foreign):
        __module__ = "torch"

    with gpu.cuda.Device(1), gpu.cuda.Stream(non_blocking=True) as stream:
        x = fake_cupy.Foreign(gpu.array(X))
        found = nf.gram(NET, x)
        assert isinstance(found, fake_cupy.Foreign)
        assert found.array.device.id == 1
        check(found.array.get(), NET, X)
        tensor = Tensor(gpu.array(X))
    current = types.SimpleNamespace(cuda_stream=stream.ptr)
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(current_stream=lambda index: current), from_dlpack=Tensor)
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = nf.gram(POOLED, tensor)
    assert isinstance(found, Tensor)
    stream.synchronize()
    check(found.array._host, POOLED, X)


def test_few_launches_are_on_their_way(gpu, small, monkeypatch):
    """Ctrl-C waits for them, at most; an error stops all and leaves nothing behind."""
    launch, flying = conv.ConvWorker._launch_units, []

    def count(worker, *arguments):
        launch(worker, *arguments)
        flying.append(len(worker._events))
        if len(flying) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(conv.ConvWorker, "_launch_units", count)
    stop = -1
    nf.gram(POOLED, X, device="cuda")
    assert max(flying) == 2
    assert len(flying) > 100
    before, stop, threads = [*gpu.used], len(flying) + 60, threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        nf.gram(POOLED, X, device="cuda")
    assert threading.active_count() == threads
    assert gpu.used == before


def test_memory_does_not_grow_with_the_images(monkeypatch):
    gpu = fake_cupy.install(monkeypatch)
    monkeypatch.setattr(conv, "STREAMED", 8)
    monkeypatch.setattr(conv, "LAUNCH", dict.fromkeys(conv.LAUNCH, 1))
    most = []
    for n in (32, 64):
        nf.gram(nf.conv_net(1), images(n, (6, 6)), device="cuda")
        most.append(gpu.most_used[0])
    assert most[1] < most[0] + 64 * 32  # the factors of the rows


def test_errors(gpu, monkeypatch):
    x = gpu.array(X)
    for arguments, options, message in [
        ((x, Y), {}, "X is on cuda:0 and Y is in host memory"),
        ((x,), {"device": "cpu"}, "X is on cuda:0, but device='cpu'"),
        ((X,), {"device": "cuda:2"}, "there are 2 CUDA devices"),
        ((X,), {"device": "gpu"}, "use None, 'cpu', 'cuda', 'cuda:1' or a list"),
        ((x, gpu.array(Y[:, 1:])), {}, "positions"),
        ((gpu.array(np.where(np.arange(9) == 3, np.nan, 1)[:, None, None, None] * X),), {}, "X must be finite: row 3"),
        ((x,), {"out": gpu.empty((8, 9))}, "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            nf.gram(NET, *arguments, **options)
    with pytest.raises(ValueError, match="flatten"):
        nf.layer_grams(POOLED, x)
    with pytest.raises(OverflowError, match="normalize=True"):
        nf.gram(nf.conv_net(700, gain=32.0), x)
    assert "on cuda:0" in NET.plan(x)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(CudaUnavailable, match="device='cuda': computing on a GPU needs CuPy"):
        nf.gram(NET, X, device="cuda")

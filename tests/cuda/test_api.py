"""The public API with device= and with device arrays, through a stand-in for CuPy with kernels on the simulator."""

from __future__ import annotations

import sys
import threading
import types

import fake_cupy
import numpy as np
import pytest
import simulate
from conftest import assert_close, tolerance

import ntkfast as nf
from ntkfast import _file
from ntkfast.__main__ import main
from ntkfast._cuda import CudaUnavailable
from ntkfast._cuda import gram as gpu_gram
from ntkfast._cuda import tiles as gpu_tiles
from ntkfast._done import MatrixFile
from ntkfast._plan import mix_of
from ntkfast._problem import Problem

pytestmark = pytest.mark.skipif(simulate.missing(simulate.mode()) is not None, reason="the simulator cannot run here")

NET = nf.resnet(3)
BIASED = nf.Network([nf.Dense("relu", bias_variance=0.1), nf.Residual("erf", scale=0.5)], nf.Readout(bias_variance=0.2))
X = np.random.default_rng(3).normal(size=(41, 6))
Y = np.random.default_rng(4).normal(size=(23, 6))
gpu = fake_cupy.two_devices


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles although the matrices are small."""
    monkeypatch.setattr(gpu_gram, "RESIDENT", 16)
    monkeypatch.setattr(gpu_gram, "STREAMED", 16)


def check(found, net, x, y=None, **options):
    wanted = nf.gram(net, x, y, **options)
    di, dj = (nf.diagonal(net, z, get=options.get("get", "ntk")) for z in (x, x if y is None else y))
    assert found.dtype == wanted.dtype
    assert_close(found, wanted, np.sqrt(np.outer(di, dj).astype(float)), tolerance(net, wanted.dtype))


# Host arrays


@pytest.mark.parametrize("device", ["cuda", "cuda:1", ["cuda:0", "cuda:1"], ("cuda:1",)], ids=str)
@pytest.mark.parametrize("net", [NET, BIASED], ids=["homogeneous", "general"])
def test_numpy_in_numpy_out(gpu, small_tiles, device, net):
    check(nf.gram(net, X, device=device), net, X)
    check(nf.gram(net, X, Y, device=device, get="nngp"), net, X, Y, get="nngp")
    check(nf.gram(net, X.astype(np.float32), device=device), net, X.astype(np.float32))
    check(nf.gram(net, X, dtype="float32", device=device), net, X, dtype="float32")
    grams = nf.layer_grams(net, X, device=device)
    assert isinstance(grams, np.ndarray)
    check(grams.sum(axis=0), net, X)


def test_tuples_and_normalised(gpu, small_tiles):
    found = nf.gram(BIASED, X, get=("nngp", "ntk"), normalize=True, device="cuda")
    assert found._fields == ("nngp", "ntk")
    wanted = nf.gram(BIASED, X, get=("nngp", "ntk"), normalize=True)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, 1, tolerance(BIASED, np.float64))
        assert np.array_equal(np.diag(a), np.ones(len(X)))
        assert np.array_equal(a, a.T)


def test_both_devices_work(gpu, small_tiles):
    nf.gram(NET, X, device=["cuda:0", "cuda:1"])
    assert min(gpu.most_used) > 0
    assert threading.active_count() == 1


def test_an_error_in_a_thread_arrives(gpu, small_tiles, monkeypatch):
    def fails(*others):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(gpu_gram.Gpu, "launch", fails)
    for device in ("cuda", ["cuda:0", "cuda:1"]):
        with pytest.raises(RuntimeError, match="launch failed"):
            nf.gram(NET, X, device=device)
    assert threading.active_count() == 1


class Store:
    """Anything with slice assignment; only one thread may write at a time."""

    def __init__(self, shape, dtype=np.float64):
        self.shape, self.dtype, self.data = shape, np.dtype(dtype), np.full(shape, np.nan, dtype)
        self.busy = threading.Lock()

    def __setitem__(self, index, value):
        assert self.busy.acquire(blocking=False)
        self.data[index] = value
        self.busy.release()


def test_out_on_the_host(gpu, small_tiles, tmp_path):
    file = np.lib.format.open_memmap(tmp_path / "K.npy", "w+", np.float64, (41, 41))
    assert nf.gram(NET, X, out=file, device="cuda") is file
    check(np.asarray(file), NET, X)
    store, slices = Store((41, 23)), Store((4, 41, 41))
    assert nf.gram(NET, X, Y, out=store, device=["cuda:0", "cuda:1"]) is store
    check(store.data, NET, X, Y)
    assert nf.layer_grams(NET, X, out=slices, device="cuda") is slices
    check(slices.data.sum(axis=0), NET, X)
    view = np.zeros((50, 100))[3:44, 1:83:2]
    nf.gram(NET, X, out=view, device="cuda")
    check(view, NET, X)
    resident = np.empty((41, 41))
    assert nf.gram(NET, gpu.array(X), out=resident) is resident
    check(resident, NET, X)


def test_a_file_that_resumes(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(_file, "_SIDE", 48)
    x = np.random.default_rng(5).normal(size=(110, 6))  # 3 x 3 tiles, 6 of them to be computed
    path, store, left = tmp_path / "K.npy", gpu_tiles.Share._store, [2]

    def stop(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        store(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_tiles.Share, "_store", stop)
        with pytest.raises(KeyboardInterrupt):
            nf.gram_to_file(NET, gpu.array(x), path, progress=False)
    done = tmp_path / "K.npy.done" / "0of1"
    assert done.read_bytes().count(1) == 2
    tiles, stored = [], MatrixFile.stored
    monkeypatch.setattr(MatrixFile, "stored", lambda file, tile: (tiles.append(tile), stored(file, tile)))
    check(nf.gram_to_file(NET, gpu.array(x), path, progress=False), NET, x)
    assert len(tiles) == 4
    assert done.read_bytes() == bytes([1]) * 6
    # The same points in host memory are the same computation.
    assert not nf.gram_to_file(NET, x, path, progress=False).flags.writeable


def test_progress(gpu, small_tiles):
    pytest.importorskip("tqdm")
    check(nf.gram(NET, X, device=["cuda:0", "cuda:1"], progress=True), NET, X)


# Device arrays


@pytest.mark.parametrize("net", [NET, BIASED], ids=["homogeneous", "general"])
def test_device_in_device_out(gpu, small_tiles, net):
    x, y = gpu.array(X), gpu.array(Y)
    found = nf.gram(net, x)
    assert isinstance(found, gpu.ndarray)
    check(found.get(), net, X)
    check(nf.gram(net, x, y, device="cuda:0").get(), net, X, Y)
    check(nf.layer_grams(net, x, device="cuda").get().sum(axis=0), net, X)
    assert np.allclose(nf.diagonal(net, x).get(), nf.diagonal(net, X), rtol=1e-15, atol=0)
    assert net(x, y).shape == (41, 23)


def test_another_device_and_stream(gpu, small_tiles):
    with gpu.cuda.Device(1), gpu.cuda.Stream(non_blocking=True):
        x = gpu.array(X)
        found = nf.gram(NET, x)
        assert found.device.id == 1
        check(found.get(), NET, X)
    assert gpu.used[0] == 0


def test_arrays_of_other_libraries(gpu, small_tiles):
    with gpu.cuda.Stream(non_blocking=True) as stream:
        x = fake_cupy.Foreign(gpu.array(X))
        found = nf.gram(NET, x)
        assert isinstance(found, fake_cupy.Foreign)
        assert x.asked_for == [stream.ptr]
        check(found.array.get(), NET, X)
        assert isinstance(nf.diagonal(NET, x), fake_cupy.Foreign)


def test_torch_tensors_work_on_the_stream_of_torch(gpu, small_tiles, monkeypatch):
    class Tensor(fake_cupy.Foreign):
        __module__ = "torch"

    with gpu.cuda.Device(1), gpu.cuda.Stream(non_blocking=True) as stream:
        x = Tensor(gpu.array(X))
    asked = []
    current = types.SimpleNamespace(cuda_stream=stream.ptr)
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(current_stream=lambda index: asked.append(index) or current), from_dlpack=Tensor
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = nf.gram(NET, x)
    assert isinstance(found, Tensor)
    assert set(asked) == {1}
    assert set(x.asked_for) == {stream.ptr}
    stream.synchronize()
    check(found.array._host, NET, X)


@pytest.mark.parametrize("make", [
    lambda gpu: gpu.array(np.repeat(X, 2, axis=1))[:, ::2],
    lambda gpu: gpu.array(np.ascontiguousarray(X.T)).T,
    lambda gpu: gpu.array(np.pad(X, ((0, 0), (2, 3)), constant_values=np.nan))[:, 2:-3],
    lambda gpu: gpu.array(np.repeat(X, 3, axis=0))[::3],
    lambda gpu: gpu.array(np.ascontiguousarray(X[::-1]))[::-1],
], ids=["columns", "transposed", "padded", "rows", "reversed"])  # fmt: skip
def test_strides(gpu, make):
    check(nf.gram(NET, make(gpu)).get(), NET, X)


def test_dtypes(gpu):
    whole = np.arange(12).reshape(4, 3) - 5
    check(nf.gram(NET, gpu.array(whole)).get(), NET, whole)
    check(nf.gram(NET, gpu.array(X), dtype=np.float32).get(), NET, X, dtype=np.float32)
    with pytest.raises(TypeError, match="too coarse"):
        nf.gram(NET, gpu.array(X.astype(np.float16)))
    with pytest.raises(TypeError, match="X is float64 and Y is float32"):
        nf.gram(NET, gpu.array(X), gpu.array(Y.astype(np.float32)))


@pytest.mark.parametrize("power", [-900, -420, 420, 900])
def test_rows_of_any_scale(gpu, power):
    x = X * np.where(np.arange(41) % 2, 1.0, 2.0**power)[:, None]
    found, wanted = (nf.gram(NET, z, normalize=True) for z in (gpu.array(x), x))
    assert_close(found.get(), wanted, 1, tolerance(NET, np.float64))


def test_out_on_the_device(gpu, small_tiles):
    x, whole = gpu.array(X), gpu.zeros((45, 60))
    out = whole[2:43, 5:46]
    assert nf.gram(NET, x, out=out) is out
    check(out.get(), NET, X)
    assert not whole[:2].get().any() and not whole[43:].get().any() and not whole[:, :5].copy().get().any()  # noqa: PT018
    foreign = fake_cupy.Foreign(gpu.empty((2, 41, 23)))
    for bad, message in [
        (foreign, r"out= for ntk has shape \(2, 41, 23\)"),
        (gpu.empty((41, 41), np.float32), "dtype"),
        (gpu.array(np.zeros((41, 82)))[:, ::2], "contiguous rows"),
        ([gpu.empty((41, 41))] * 2, "out= must hold 1 arrays"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            nf.gram(NET, x, out=bad)
    square = gpu.array(np.ones((6, 6)))
    with pytest.raises(ValueError, match="overlaps an input"):
        nf.gram(NET, square, out=square)
    with pytest.raises(ValueError, match="must all be on the device or all in host memory"):
        nf.gram(NET, x, get=("ntk", "nngp"), out=(gpu.empty((41, 41)), np.empty((41, 41))))
    with gpu.cuda.Device(1):
        elsewhere = gpu.empty((41, 41))
    with pytest.raises(ValueError, match="out= is on cuda:1, the inputs are on cuda:0"):
        nf.gram(NET, x, out=elsewhere)
    with pytest.raises(ValueError, match="out= is on cuda:1, the inputs are in host memory"):
        nf.gram(NET, X, out=elsewhere, device="cuda")


def test_tensor_cores_are_not_used_silently(gpu):
    """The user's own mode stays what it was."""
    handle = gpu.cuda.get_cublas_handle()
    gpu.cuda.cublas.setMathMode(handle, 3)  # TF32
    x = X.astype(np.float32)
    check(nf.gram(NET, gpu.array(x)).get(), NET, x)
    assert gpu.cuda.cublas.getMathMode(handle) == 3


# Errors, before any work


def test_mismatched_devices(gpu):
    x = gpu.array(X)
    with gpu.cuda.Device(1):
        elsewhere = gpu.array(Y)
    for arguments, options, message in [
        ((x, Y), {}, "X is on cuda:0 and Y is in host memory"),
        ((X, x), {}, "X is in host memory and Y is on cuda:0"),
        ((x, elsewhere), {}, "X is on cuda:0 and Y is on cuda:1"),
        ((x,), {"device": "cpu"}, "X is on cuda:0, but device='cpu'"),
        ((x,), {"device": "cuda:1"}, "X is on cuda:0, but device='cuda:1'"),
        ((x,), {"device": ["cuda:0", "cuda:1"]}, "X is on cuda:0, but device="),
        ((X,), {"device": "cuda:2"}, "there are 2 CUDA devices"),
    ]:
        for call in (nf.gram, nf.layer_grams):
            with pytest.raises(ValueError, match=message):
                call(NET, *arguments, **options)


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:", "cuda:x", "cuda:-1", [], ["cuda"], ["cuda:0", "cuda:0"], ["cpu"], 0], ids=str
)
def test_unknown_devices(gpu, device):
    with pytest.raises(ValueError, match="use None, 'cpu', 'cuda', 'cuda:1' or a list"):
        nf.gram(NET, X, device=device)


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(CudaUnavailable, match="device='cuda:1': computing on a GPU needs CuPy"):
        nf.gram(NET, X, device="cuda:1")
    assert nf.gram(NET, X, device="cpu").shape == (41, 41)


def test_results_larger_than_the_device(monkeypatch):
    gpu = fake_cupy.install(monkeypatch, memory=1 << 19)
    x = np.random.default_rng(1).normal(size=(300, 4))
    with pytest.raises(nf.OutOfMemoryError, match=r"720,000 bytes on cuda:0.*pass out= with a host array") as caught:
        nf.gram(NET, gpu.array(x))
    assert isinstance(caught.value, MemoryError)
    used = [*gpu.used]
    monkeypatch.setattr(gpu_gram, "STREAMED", 64)
    check(nf.gram(NET, x, device="cuda"), NET, x)
    assert gpu.used == used


def test_checks_of_values_on_the_device(gpu):
    bad = X.copy()
    bad[7, 2] = np.nan
    with pytest.raises(ValueError, match="Y must be finite: row 7"):
        nf.gram(NET, gpu.array(X), gpu.array(bad))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="row 0 holds a value too large for float32"):
        nf.gram(NET, gpu.array(X * 1e300), dtype=np.float32)
    with pytest.raises(OverflowError, match="normalize=True"):
        nf.gram(NET, gpu.array(X * 1e200))
    with pytest.raises(ValueError, match=r"must have shape \(n, d\)"):
        nf.gram(NET, gpu.array(np.zeros((2, 2, 2))))


def test_info_counts_devices(gpu, capsys):
    assert main(["info"]) == 0
    assert 'GPUs               2 (device="cuda")' in capsys.readouterr().out


# The path


@pytest.fixture(params=["table", "recursion"])
def path(request, monkeypatch):
    """Kernels that ran, on a path that the user chose."""
    monkeypatch.setenv("NTKFAST_PATH", request.param)
    return request.param


def test_the_path_of_the_user(gpu, small_tiles, path):
    """The same results, on the host and on the device, and the diagonal of the same path."""
    x = gpu.array(X)
    text = NET.plan(x)
    assert "on cuda:0; products by cuBLAS" in text
    assert text.startswith("table: 3 layers" if path == "table" else "recursion on correlations")
    check(nf.gram(NET, x).get(), NET, X)
    check(nf.gram(NET, X, Y, device="cuda", get="nngp"), NET, X, Y, get="nngp")
    found = nf.gram(NET, x, get=("last_hidden", "ntk"), normalize=True)
    assert np.array_equal(np.diag(found.ntk.get()), np.ones(len(X)))
    name = "gram_table_f64" if path == "table" else "gram_dense_f64"
    assert {k for k in gpu.launched if k.startswith("gram_")} == {name}
    assert np.array_equal(nf.diagonal(NET, x).get(), np.diag(nf.gram(NET, x).get()))


def test_where_there_is_no_table(gpu, monkeypatch):
    """Biases and points of different norm: the recursion, whatever was asked for, and the reason in words."""
    monkeypatch.setenv("NTKFAST_PATH", "table")
    check(nf.gram(BIASED, X, device="cuda"), BIASED, X)
    assert "gram_table_f64" not in gpu.launched
    assert "no table: biases" in BIASED.plan(gpu.array(X))
    monkeypatch.setenv("NTKFAST_PATH", "tables")
    with pytest.raises(ValueError, match="use table or recursion"):
        nf.gram(NET, X, device="cuda")


def test_the_path_follows_the_number_of_pairs(gpu, monkeypatch):
    """A device is so fast that making a table pays for more pairs than on the CPU, and never for one layer."""
    monkeypatch.delenv("NTKFAST_PATH", raising=False)

    def table(net, n, device):
        problem = Problem(net, np.ones((n, 1)), None, None, device)
        return problem.path([mix_of(net, "ntk")]).tables is not None

    deep, shallow = nf.fully_connected(20), nf.fully_connected(1)
    assert [table(deep, n, "cuda") for n in (10, 3000, 10000)] == [False, False, True]
    assert [table(deep, n, None) for n in (10, 3000, 10000)] == [False, True, True]
    assert not table(shallow, 100000, "cuda")

"""The stand-in for CuPy is as unkind as CUDA: what must be an error or a wrong number is one."""

from __future__ import annotations

import gc

import fake_cupy
import numpy as np
import pytest
import simulate

X = np.arange(6.0).reshape(2, 3)
SOURCE = """
struct Pair {
    double a, b;
};
extern "C" __global__ void add(double* out, const double* x, Pair p) { out[threadIdx.x] = x[threadIdx.x] + p.a * p.b; }
"""


@pytest.fixture
def cupy():
    return fake_cupy.FakeCupy(devices=2, memory=1000)


def test_results_read_too_early_are_nan(cupy):
    x, other = cupy.asarray(X), cupy.cuda.Stream(non_blocking=True)
    assert np.isnan(x.get(stream=other)).all()
    host = np.zeros((2, 3))
    with other:
        y = cupy.asarray(X)
        y.get(out=host, blocking=False)
    assert not host.any()
    other.synchronize()
    np.testing.assert_array_equal(host, X)


def test_a_buffer_used_again_too_early_holds_the_wrong_numbers(cupy):
    x, host, other = cupy.asarray(X), np.zeros((2, 3)), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    x.get(stream=other, out=host, blocking=False)
    x.fill(7)
    cupy.cuda.get_current_stream().synchronize()
    other.synchronize()
    assert (host == 7).all()


def test_work_at_once_is_the_other_extreme():
    cupy = fake_cupy.FakeCupy(lazy=False)
    x, other = cupy.asarray(X), cupy.cuda.Stream(non_blocking=True)
    np.testing.assert_array_equal(x.get(stream=other), X)


def test_events_order_streams(cupy):
    x, other = cupy.asarray(X), cupy.cuda.Stream(non_blocking=True)
    other.wait_event(cupy.cuda.get_current_stream().record())
    np.testing.assert_array_equal(x.get(stream=other), X)


def test_the_null_stream_waits_for_blocking_streams_only(cupy):
    for non_blocking in (False, True):
        with cupy.cuda.Stream(non_blocking=non_blocking):
            x = cupy.asarray(X)
        assert np.isnan(x.get()).all() == non_blocking


def test_memory_is_counted_and_limited(cupy):
    x = cupy.empty((100,), np.float64)
    assert (cupy.used, cupy.cuda.runtime.memGetInfo()) == ([800, 0], (200, 1000))
    with pytest.raises(MemoryError):
        cupy.empty((26,), np.float64)
    with cupy.cuda.Device(1):
        y = cupy.empty((26,), np.float64)[3:]
        assert y.device.id == 1
    del x, y
    gc.collect()
    assert (cupy.used, cupy.most_used) == ([0, 0], [800, 208])


def test_no_implicit_way_to_the_host(cupy):
    x = cupy.asarray(X)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(AssertionError):
        x.get(out=np.zeros((3, 2)).T)


def test_arguments_of_kernels(cupy, tmp_path):
    if simulate.missing("plain"):
        pytest.skip(simulate.missing("plain"))
    path = tmp_path / "add.cu"
    path.write_text(SOURCE)
    add = cupy.RawModule(path=str(path)).get_function("add")
    pair, x, out = np.zeros(1, "f8,f8"), cupy.asarray(X.ravel()), cupy.empty((6,))
    pair["f0"], pair["f1"] = 2, 3
    add((1,), (6,), (out, x, pair))
    pair["f0"] = 100  # the launch has its own copy
    np.testing.assert_array_equal(out.get(), X.ravel() + 6)
    with pytest.raises(TypeError, match="only of size one"):
        add((1,), (6,), (out, X.ravel(), pair))
    with pytest.raises(TypeError, match="Unsupported"):
        add((1,), (6,), (out, [1.0], pair))
    with pytest.raises(AssertionError, match="no null pointer"):
        add((1,), (6,), (out, None, pair))
    with cupy.cuda.Device(1), pytest.raises(AssertionError, match="another device"):
        add((1,), (6,), (out, x, pair))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products(cupy, dtype, rng):
    a, b = rng.normal(size=(4, 3)).astype(dtype), rng.normal(size=(5, 3)).astype(dtype)
    x, y, out = cupy.asarray(a), cupy.asarray(b), cupy.empty((4, 6), dtype)
    cublas, handle = cupy.cuda.cublas, cupy.cuda.get_cublas_handle()
    gemm = cublas.sgemm if dtype == np.float32 else cublas.dgemm
    two, zero = np.full(1, 2, dtype), np.zeros(1, dtype)

    def product():
        gemm(handle, 1, 0, 5, 4, 3, two.ctypes.data, y.data.ptr, 3, x.data.ptr, 3, zero.ctypes.data, out.data.ptr, 6)
        return out.get()

    result, eps = product(), np.finfo(dtype).eps
    np.testing.assert_allclose(result[:, :5], 2 * a @ b.T, rtol=0, atol=20 * eps)
    assert np.isnan(result[:, 5]).all()
    cublas.setMathMode(handle, 3)
    error = np.abs(product()[:, :5] - 2 * a @ b.T).max()
    assert (error > 100 * eps) == (dtype == np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stacks_of_products(dtype, rng):
    """Matrices side by side in one array, into every second one of another."""
    cupy = fake_cupy.FakeCupy()
    a, b = rng.normal(size=(3, 4, 5)).astype(dtype), rng.normal(size=(4, 3, 2)).astype(dtype)
    x, y, out = cupy.asarray(a), cupy.asarray(b), cupy.empty((6, 5, 2), dtype)
    gemm = getattr(cupy.cuda.cublas, f"{'s' if dtype == np.float32 else 'd'}gemmStridedBatched")
    one, zero = np.ones(1, dtype), np.zeros(1, dtype)
    gemm(cupy.cuda.get_cublas_handle(), 0, 1, 2, 5, 4, one.ctypes.data, y.data.ptr, 6, 2, x.data.ptr, 5, 20,
         zero.ctypes.data, out.data.ptr, 2, 20, 3)  # fmt: skip
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(out.get()[::2], np.einsum("nij,ink->njk", a, b), rtol=0, atol=20 * eps)
    assert np.isnan(out.get()[1::2]).all()


def test_formulas_wait_for_their_stream(cupy):
    x, other = cupy.asarray(X), cupy.cuda.Stream(non_blocking=True)
    y = np.exp(2 * x[:, :1] - 1.0, out=cupy.empty((2, 1))) + np.where(x > 2, x, np.zeros_like(x))
    y += np.broadcast_to(x[1], (2, 3)).sum(axis=0)
    assert np.isnan(y.get(stream=other)).all()
    wanted = np.exp(2 * X[:, :1] - 1) + np.where(X > 2, X, 0) + 2 * X[1]
    np.testing.assert_array_equal(y.get(), wanted)
    assert (x.astype(np.float32) * 0.5).dtype == np.float32
    flat = x.swapaxes(0, 1).reshape(-1)  # a copy, as in CuPy
    flat[0] = 9
    np.testing.assert_array_equal(flat.get(), [9, 3, 1, 4, 2, 5])
    assert bool(np.isfinite(x).all())


def test_what_does_not_mix(cupy):
    x = cupy.asarray(X)
    with pytest.raises(TypeError, match="Unsupported type"):
        x + X
    with pytest.raises(TypeError, match="no counterpart"):
        np.linalg.norm(x)
    with pytest.raises(AssertionError, match="CUPY_TF32"):
        x @ x.T
    with pytest.raises(AssertionError, match="float16"):
        np.where(x > 0, 1.0, 2.0)
    with cupy.cuda.Device(1), pytest.raises(AssertionError, match="another device"):
        x + x


def test_dlpack_orders_the_streams(cupy):
    x, other = fake_cupy.Foreign(cupy.asarray(X)), cupy.cuda.Stream(non_blocking=True)
    with other:
        taken = cupy.from_dlpack(x)
        assert x.asked_for == [other.ptr]
        assert isinstance(taken, cupy.ndarray)

"""A stand-in for CuPy on machines without a GPU: device memory is host memory, kernels run on the simulator.

    cupy = fake_cupy.install(monkeypatch, devices=2, memory=1 << 20)
    cupy.launched, cupy.most_used   (names of kernels, bytes of each device)

It has what ntkfast._cuda uses (the list is in ntkfast/_cuda/device.py) and nothing more, and it is as unkind as CUDA
may be (with a seed, threads of a kernel and the work of several streams run in random orders):
  - work waits in its stream until somebody waits for that stream: results read too early are NaN, buffers used again
    too early hold the wrong numbers (lazy=False is the other extreme: every piece of work is done at once);
  - new memory is NaN (0xff); more of it than the device has is an OutOfMemoryError;
  - host arrays are no arguments of kernels, arrays of one device none on another; no implicit way to NumPy;
  - float32 products on tensor cores (TF32) lose the digits that they lose there.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import random
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import simulate
from fake_device import Event, Memory, Stream, gemm
from fake_math import Arithmetic, Functions, erf

#: kDLCUDA of DLPack
CUDA = 2


class Capsule:
    """What __dlpack__ gives here: an array that is on its way to another library."""

    def __init__(self, array):
        self.array = array


class Foreign:
    """An array of another library on the device: it can be taken over by DLPack, and has taken one over itself."""

    def __init__(self, array):
        self.array = array if isinstance(array, Ndarray) else array.__dlpack__().array
        self.asked_for = []

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **others):
        self.asked_for.append(stream)
        return self.array.__dlpack__(stream=stream, **others)

    def __array_namespace__(self, **others):
        return types.SimpleNamespace(from_dlpack=Foreign)


# Arrays


class Ndarray(Arithmetic):
    """cupy.ndarray: a view of device memory."""

    __module__ = "cupy"

    def __init__(self, owner, memory, host):
        self._owner, self._memory, self._host = owner, memory, host
        self.device = owner.cuda.Device(memory.device)
        self.data = types.SimpleNamespace(ptr=host.ctypes.data, mem=memory, device=self.device)

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: self._view(self._host.T))

    def __len__(self):
        return len(self._host)

    def __array__(self, *others, **more):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def _view(self, host):
        assert host.base is not None or host is self._host
        return Ndarray(self._owner, self._memory, host)

    def __getitem__(self, index):
        # CuPy gives arrays of no dimension where NumPy gives numbers
        index = index if isinstance(index, tuple) else (index,)
        return self._view(self._host[index if Ellipsis in index else (*index, ...)])

    def __setitem__(self, index, value):
        source = value._host if isinstance(value, Ndarray) else np.array(value)
        target = self._host
        self._owner.give(lambda: target.__setitem__(index, source))

    def reshape(self, *shape):
        view = self._host.reshape(*shape)
        if np.shares_memory(view, self._host) or not view.size:
            return self._view(view)
        copy = self.copy()  # NumPy's was made before the work that is waiting
        return copy._view(copy._host.reshape(*shape))

    def fill(self, value):
        self[...] = value

    def astype(self, dtype, order="K", copy=True):
        same = self.dtype == dtype and (order == "K" or self.flags.c_contiguous)
        return self if same and not copy else self._owner.copy_of(self, dtype)

    def copy(self):
        return self._owner.copy_of(self)

    def get(self, stream=None, order="C", out=None, blocking=True):
        stream = stream or self._owner.current[-1]
        if out is None:
            out = np.empty(self.shape, self.dtype)
        assert type(out) is np.ndarray
        assert (out.shape, out.dtype) == (self.shape, self.dtype)
        assert out.flags.c_contiguous
        source = self._host
        stream.give(lambda: np.copyto(out, source))
        if blocking:
            stream.synchronize()
        return out

    def set(self, array, stream=None):
        assert type(array) is np.ndarray
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        target = self._host
        (stream or self._owner.current[-1]).give(lambda: np.copyto(target, array))

    def __dlpack_device__(self):
        return CUDA, self._memory.device

    def __dlpack__(self, *, stream=None, **others):
        if stream is not None and stream != -1:
            # the receiver's stream waits for ours; 1 is the null stream
            reader = self._owner.streams[0 if stream == 1 else stream]
            reader.give(lambda: None, [self._owner.current[-1].point])
        return Capsule(self)


# Kernels


class Kernel:
    def __init__(self, owner, library, name):
        self._owner, self._library, self.name = owner, library, name
        self.max_dynamic_shared_size_bytes = simulate.SHARED_BYTES

    def _argument(self, value):
        """What a kernel may be given, as in CuPy."""
        if isinstance(value, Ndarray):
            assert value.device.id == self._owner.device, f"{self.name}: an array of another device"
            return value.data.ptr
        if type(value) is np.ndarray:
            if value.size != 1:
                raise TypeError("You are trying to pass a numpy.ndarray as a kernel parameter: only of size one")
            return value.copy() if value.dtype.fields else value.reshape(())[()]
        assert value is not None, "CuPy hands over a missing argument for None, no null pointer"
        if isinstance(value, (bool, int, float, np.generic)):
            return value
        raise TypeError(f"Unsupported type {type(value)}")

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None):
        assert isinstance(grid, tuple)
        assert isinstance(block, tuple)
        held = [a._memory for a in args if isinstance(a, Ndarray)]
        given = [self._argument(a) for a in args]
        most, seed = self.max_dynamic_shared_size_bytes, self._owner.next_seed()

        self._owner.launched.append(self.name)

        def work():
            self._library.launch(self.name, grid, block, given, shared_mem, seed, most)
            held.clear()

        (stream or self._owner.current[-1]).give(work)


class RawModule:
    def __init__(self, owner, path):
        self._owner, self._library = owner, _library(path)

    def get_function(self, name):
        assert name in self._library.kernels, f"{name} is not among {self._library.kernels}"
        return Kernel(self._owner, self._library, name)


@functools.cache
def _library(path):
    return simulate.build(Path(path))


# The module


class FakeCupy(Functions, types.ModuleType):
    """Takes the place of the module cupy."""

    float32, float64, int32, int64 = np.float32, np.float64, np.int32, np.int64
    uint8, uint64 = np.uint8, np.uint64
    ndarray = Ndarray

    class OutOfMemoryError(MemoryError):
        pass

    def __init__(self, devices=1, memory=1 << 30, lazy=True, seed=0, shared=227 << 10):
        super().__init__("cupy")
        self.lazy, self.memory, self.seed, self.shared = lazy, memory, seed, shared
        self.numbers, self.streams, self.graveyard = itertools.count(1 << 20), {}, []
        self.used, self.most_used = [0] * devices, [0] * devices
        self.math_modes = dict.fromkeys((1000 + k for k in range(devices)), 0)
        self.launched = []
        self.random, self.running = random.Random(seed) if seed else None, 0
        self._local, self.lock = threading.local(), threading.RLock()
        self._null = Stream(self, ptr=0)
        self.cuda = self._make_cuda(devices)

    # per thread, as in CuPy
    @property
    def current(self):
        if not hasattr(self._local, "streams"):
            self._local.streams, self._local.devices = [self._null], [0]
        return self._local.streams

    def interleave(self, stream):
        """Streams run side by side: before a piece of work of one, perhaps a few of another (with a seed only)."""
        if self.random is None or self.running or self.random.random() < 0.5:
            return False
        others = [s for s in self.streams.values() if s is not stream and s.waiting]
        if others:
            other = self.random.choice(others)
            other.run_until(other.point[1] - other.waiting + min(other.waiting, self.random.randint(1, 3)))
        return bool(others)

    @property
    def device(self):
        return self.current and self._local.devices[-1]

    def give(self, work):
        self.current[-1].give(work)

    def handle(self):
        return 1000 + self.device

    def next_seed(self):
        return self.seed and self.seed + len(self.launched)

    def _make_cuda(self, devices):
        owner = self

        class Device:
            compute_capability = "90"

            def __init__(self, k=None):
                self.id = owner.device if k is None else int(k)
                if not 0 <= self.id < devices:
                    raise owner.cuda.runtime.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

            def __enter__(self):
                assert owner.current
                owner._local.devices.append(self.id)
                return self

            def __exit__(self, *others):
                owner._local.devices.pop()

            def __eq__(self, other):
                return self.id == other.id

            __hash__ = None

            def use(self):
                assert owner.current
                owner._local.devices[-1] = self.id

            def synchronize(self):
                for stream in [*owner.streams.values()]:
                    stream.synchronize()

            @property
            def mem_info(self):
                return owner.memory - owner.used[self.id], owner.memory

        class CUDARuntimeError(RuntimeError):
            pass

        def external(ptr):
            return owner.streams.get(ptr) or Stream(owner, ptr=ptr)

        def make_stream(null=False, non_blocking=False):
            return owner._null if null else Stream(owner, non_blocking)

        runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: devices, getDevice=lambda: owner.device,
            driverGetVersion=lambda: 13000, runtimeGetVersion=lambda: 13000, memGetInfo=lambda: Device().mem_info,
            deviceGetAttribute=lambda number, k: {97: owner.shared}[number],  # what a block may ask for
            setDevice=lambda k: Device(k).use(), deviceSynchronize=lambda: Device().synchronize(),
        )  # fmt: skip
        cublas = types.SimpleNamespace(
            sgemm=functools.partial(gemm, self, np.float32, False),
            dgemm=functools.partial(gemm, self, np.float64, False),
            sgemmStridedBatched=functools.partial(gemm, self, np.float32, True),
            dgemmStridedBatched=functools.partial(gemm, self, np.float64, True),
            getMathMode=self.math_modes.__getitem__, setMathMode=self.math_modes.__setitem__,
            CUBLAS_OP_N=0, CUBLAS_OP_T=1,
        )  # fmt: skip
        pool = types.SimpleNamespace(free_all_blocks=lambda: None, free_bytes=lambda: 0)
        self.get_default_memory_pool = self.get_default_pinned_memory_pool = lambda: pool
        return types.SimpleNamespace(
            Device=Device, runtime=runtime, cublas=cublas, Stream=make_stream, ExternalStream=external,
            Event=lambda **others: Event(self), get_current_stream=lambda: self.current[-1],
            alloc_pinned_memory=lambda n: (ctypes.c_char * (-(-n // 512) * 512))(), get_cublas_handle=self.handle,
            device=types.SimpleNamespace(get_cublas_handle=self.handle),
            memory=types.SimpleNamespace(OutOfMemoryError=self.OutOfMemoryError),
        )  # fmt: skip

    def is_available(self):
        return True

    def RawModule(self, *, path):
        return RawModule(self, path)

    def empty(self, shape, dtype=np.float64):
        dtype = np.dtype(dtype)
        memory = Memory(self, self.device, int(np.prod(shape, dtype=object)) * dtype.itemsize)
        return Ndarray(self, memory, memory.bytes[: memory.size].view(dtype).reshape(shape))

    def zeros(self, shape, dtype=np.float64):
        out = self.empty(shape, dtype)
        out.fill(0)
        return out

    def copy_of(self, x, dtype=None):
        out = self.empty(x.shape, dtype or x.dtype)
        source, target, held = x._host, out._host, [x._memory]

        def work():
            np.copyto(target, source, casting="unsafe")
            held.clear()

        self.give(work)
        return out

    def asarray(self, x, dtype=None):
        if isinstance(x, Ndarray):
            return x if dtype is None else x.astype(dtype, copy=False)
        return self.array(x, dtype)

    def array(self, x, dtype=None):
        # pageable memory is read before the call returns, as cudaMemcpyAsync does
        x = np.array(x, dtype)
        out = self.empty(x.shape, x.dtype)
        target = out._host
        self.give(lambda: np.copyto(target, x))
        return out

    def ascontiguousarray(self, x):
        return x if x.flags.c_contiguous else self.copy_of(x)

    def asnumpy(self, x):
        return x.get()

    def from_dlpack(self, x):
        assert x.__dlpack_device__()[0] == CUDA
        stream = self.current[-1].ptr
        return x.__dlpack__(stream=stream or 1).array

    def matmul(self, a, b, out=None):
        assert a.dtype == b.dtype
        out = self.empty((len(a), b.shape[1]), a.dtype) if out is None else out
        x, y, target = a._host, b._host, out._host
        self.give(lambda: np.copyto(target, x @ y))
        return out


def install(monkeypatch, **settings):
    """Make `import cupy` give a FakeCupy, whose modules are csrc/cuda on the simulator; it is returned."""
    import sys

    from ntkfast._cuda import compiler

    fake = FakeCupy(**settings)
    special = types.ModuleType("cupyx.scipy.special")
    special.erf = erf
    for name, module in (("cupy", fake), ("cupyx.scipy.special", special)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(compiler, "find", lambda major: None)
    monkeypatch.setattr(compiler, "cubin_file", lambda name, *others: simulate.CSRC / "cuda" / f"{name}.cu")
    monkeypatch.setattr(compiler, "_load", functools.cache(compiler._load.__wrapped__))
    return fake


@pytest.fixture(params=[True, False], ids=["lazy", "at once"])
def two_devices(monkeypatch, request):
    """`lazy`: work waits until somebody waits for it."""
    return install(monkeypatch, devices=2, lazy=request.param)


@pytest.fixture
def shuffled(monkeypatch):
    """Threads of a kernel in random orders."""
    return install(monkeypatch, seed=7)

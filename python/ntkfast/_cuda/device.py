"""One GPU as this package uses it: arrays without a copy, streams, products by cuBLAS, launches.

The whole CuPy surface of the package, here and in compiler.py (tests/cuda/fake_cupy.py implements exactly this; what
is new is listed first):

    ndarray         shape, dtype, ndim, size, itemsize, nbytes, strides, len(), data.ptr, device.id;
                    basic slicing (views), astype(dtype), __dlpack__, __dlpack_device__,
                    get(stream=None, out=None, blocking=True)
    empty(shape, dtype), asarray(NumPy array) (a copy on the current device), ascontiguousarray(x), from_dlpack(x)
    cuda.Device(k)  context manager, .id; cuda.Device() is the current one
    cuda.runtime    getDeviceCount(), memGetInfo() -> (free, total), deviceGetAttribute(number, device);
                    get_default_memory_pool().free_bytes()
    cuda            get_current_stream(), Stream(non_blocking=True), ExternalStream(ptr): context managers,
                    synchronize(), record() -> event, wait_event(event); Event(disable_timing=True): record(),
                    synchronize(); alloc_pinned_memory(bytes): has the buffer protocol; get_cublas_handle()
    cuda.cublas     sgemm, dgemm (handle, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc: addresses),
                    sgemmStridedBatched, dgemmStridedBatched (a distance behind every ld, the number last),
                    getMathMode(handle), setMathMode(handle, mode)
    kernels         compiler.py: kernel(grid, block, args, shared_mem=bytes), max_dynamic_shared_size_bytes = bytes;
                    args: device arrays, NumPy scalars, structures as NumPy arrays of one record
    finite networks arithmetic of arrays and numbers, NumPy's functions on arrays: ufuncs with out=, where, empty_like,
                    zeros_like, ones_like, full_like (with shape=), broadcast_to, moveaxis, sliding_window_view;
                    assignment to slices;
                    all, mean, swapaxes, transpose, diagonal (a view); reshape (a view, or a copy);
                    cupyx.scipy.special.erf. Never ``@``
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._cuda import CudaUnavailable, compiler, load_cupy

Array = NDArray[Any]

#: kDLCUDA and kDLCUDAManaged of DLPack
_CUDA = (2, 13)
#: cudaDevAttrMaxSharedMemoryPerBlockOptin of the CUDA runtime, and what a block may have without asking
_SHARED_OPTIN, _SHARED = 97, 48 << 10
_LEGAL = "use None, 'cpu', 'cuda', 'cuda:1' or a list of different CUDA devices"


@dataclass(frozen=True)
class Place:
    """Where a call is computed: GPUs, and whether the arrays are there already."""

    devices: tuple[int, ...]
    resident: bool


def index_of(x: Any) -> int | None:
    """Number of the GPU whose memory holds x, None for host memory (or what is no array)."""
    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack_device__"):
        return None
    try:
        kind, index = x.__dlpack_device__()
    except (BufferError, RuntimeError, ValueError, TypeError):
        return None  # refused with its reason when it is read
    return int(index) if int(kind) in _CUDA else None


def _parse(device: Any) -> tuple[int, ...] | None:
    """GPU numbers; -1 is the current one; () is the CPU; None is not said."""
    if device is None:
        return None
    if isinstance(device, (list, tuple)):
        found = [_parse(d) for d in device]
        single = [f[0] for f in found if f is not None and len(f) == 1 and f[0] >= 0]
        if not found or len(single) != len(found) or len(set(single)) != len(single):
            raise ValueError(f"device={device!r}: {_LEGAL}")
        return tuple(single)
    text = str(device)
    if text == "cpu":
        return ()
    name, _, number = text.partition(":")
    if name != "cuda" or (number and not number.isdecimal()) or text.endswith(":"):
        raise ValueError(f"device={device!r}: {_LEGAL}")
    return (int(number),) if number else (-1,)


def find_place(device: Any, *named: tuple[str, Any]) -> Place | None:
    """Which GPUs a call runs on, None for the CPU; arrays that are None do not count."""
    homes = [(name, index_of(x)) for name, x in named if x is not None]
    for name, home in homes[1:]:
        if home != homes[0][1]:
            raise ValueError(f"{homes[0][0]} is {_where(homes[0][1])} and {name} is {_where(home)}; move one of them")
    home, wanted = homes[0][1], _parse(device)
    if home is None:
        if not wanted:
            return None
        try:
            cupy = load_cupy()
        except CudaUnavailable as error:
            raise CudaUnavailable(f"device={device!r}: {error}") from None
        devices = (cupy.cuda.Device().id,) if wanted == (-1,) else wanted
        count = cupy.cuda.runtime.getDeviceCount()
        if max(devices) >= count:
            raise ValueError(f"device={device!r}: there are {count} CUDA devices, numbered from 0")
        return Place(devices, False)
    if wanted is not None and wanted not in ((-1,), (home,)):
        raise ValueError(f"{homes[0][0]} is {_where(home)}, but device={device!r}; move it or leave device= out")
    return Place((home,), True)


def _where(index: int | None) -> str:
    return "in host memory" if index is None else f"on cuda:{index}"


def as_cupy(x: Any, name: str) -> tuple[Any, Callable[[Any], Any]]:
    """A CuPy view of a device array of any kind, and the way back to its kind."""
    if getattr(x, "requires_grad", False):
        raise TypeError(f"{name} requires a gradient, which kernels do not track; pass {name}.detach()")
    cupy = load_cupy()
    if isinstance(x, cupy.ndarray):
        return x, lambda result: result
    try:
        view = cupy.from_dlpack(x)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise TypeError(f"{name} ({type(x).__name__}) cannot be read as a dense array: {error}") from None
    kind = type(x).__module__.split(".")[0]
    module = sys.modules.get("torch") if kind == "torch" else None
    if module is None and hasattr(x, "__array_namespace__"):
        module = x.__array_namespace__()
    return view, getattr(module, "from_dlpack", lambda result: result)


def erf(x: Any) -> Any:
    """The error function of an array on the device."""
    load_cupy()
    return importlib.import_module("cupyx.scipy.special").erf(x)


def stream_of(x: Any, index: int) -> Any:
    """The stream that work on x belongs to: torch's current one for its tensors, else CuPy's."""
    cupy = load_cupy()
    if type(x).__module__.split(".")[0] == "torch":
        return cupy.cuda.ExternalStream(sys.modules["torch"].cuda.current_stream(index).cuda_stream)
    return cupy.cuda.get_current_stream()


class Gpu:
    """One device. Everything is called with the device current (`with gpu.device`) and on the current stream."""

    def __init__(self, index: int) -> None:
        self.cupy = load_cupy()
        self.index = index
        self.device = self.cupy.cuda.Device(index)

    def upload(self, array: Array) -> Any:
        """A copy on the device."""
        return self.cupy.asarray(array)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.cupy.empty(shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Host memory that copies from the device can go to while kernels run."""
        count = int(np.prod(shape))
        memory = self.cupy.cuda.alloc_pinned_memory(max(1, count * dtype.itemsize))
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def stream(self) -> Any:
        return self.cupy.cuda.Stream(non_blocking=True)

    def free_bytes(self) -> int:
        """What can be allocated: free, or held by CuPy for the next who asks."""
        return int(self.cupy.cuda.runtime.memGetInfo()[0]) + int(self.cupy.get_default_memory_pool().free_bytes())

    def shared_bytes(self) -> int:
        """Shared memory that a block may have."""
        return int(self.cupy.cuda.runtime.deviceGetAttribute(_SHARED_OPTIN, self.index))

    def event(self) -> Any:
        """A point in the current stream that can be waited for."""
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record()
        return event

    def product(self, x: Any, y: Any, out: Any, accumulate: bool = False) -> None:
        """out (+)= x y^T by cuBLAS, (n, d) and (m, d) to (n, m), rows contiguous."""
        self.multiply(x, y, out, transposed=(False, True), accumulate=accumulate)

    def multiply(
        self, x: Any, y: Any, out: Any, *, transposed: tuple[bool, bool] = (False, False), accumulate: bool = False
    ) -> None:
        """out (+)= x y by cuBLAS; matrices, or stacks of them of one length; rows contiguous.

        ``transposed`` says of x and y whether they are stored as their transpose. float32 is true float32, never TF32:
        cupy.matmul would follow the variable CUPY_TF32, these calls follow the mode of the handle, which is set here.
        """
        cublas, handle = self.cupy.cuda.cublas, self.cupy.cuda.get_cublas_handle()
        one, zero = np.ones(1, x.dtype), np.zeros(1, x.dtype)
        (n, m), d = out.shape[-2:], x.shape[-2 if transposed[0] else -1]
        # cuBLAS counts column by column: out^T = y^T x^T, and a matrix with contiguous rows is its transpose there.
        name, sizes = "gemm", (int(transposed[1]), int(transposed[0]), m, n, d)
        operands: list[tuple[int, ...]] = [(a.data.ptr, row_stride(a)) for a in (y, x, out)]
        count: tuple[int, ...] = ()
        if out.ndim == 3:
            name, count = "gemmStridedBatched", (len(out),)
            operands = [(a.data.ptr, row_stride(a[0]), int(a.strides[0]) // int(a.itemsize)) for a in (y, x, out)]
        gemm = getattr(cublas, ("s" if x.dtype == np.float32 else "d") + name)
        mode = cublas.getMathMode(handle)
        cublas.setMathMode(handle, 0)  # CUBLAS_DEFAULT_MATH: no lower precision, whatever the user has set
        try:
            gemm(handle, *sizes, one.ctypes.data, *operands[0], *operands[1],
                 (one if accumulate else zero).ctypes.data, *operands[2], *count)  # fmt: skip
        finally:
            cublas.setMathMode(handle, mode)

    def launch(self, module: str, kernel: str, blocks: int, threads: int, shared: int, *arguments: Any) -> None:
        """Start a kernel of csrc/cuda/<module>.cu on the current stream."""
        function = compiler.load(module).get_function(kernel)
        if shared > _SHARED:
            function.max_dynamic_shared_size_bytes = shared
        function((blocks,), (threads,), arguments, shared_mem=shared)


def row_stride(x: Any) -> int:
    """Distance of the rows of a matrix in entries; of a single row anything legal."""
    return int(x.strides[0]) // int(x.itemsize) if len(x) > 1 else max(1, int(x.shape[1]))


def contiguous_rows(x: Any) -> bool:
    """True if entries of a row are neighbours and rows do not overlap (as the kernels and cuBLAS need it)."""
    row, item = (int(s) for s in x.strides[-2:])
    size = int(x.itemsize)
    return (item == size or x.shape[-1] <= 1) and row % size == 0 and (row >= size * x.shape[-1] or x.shape[-2] <= 1)

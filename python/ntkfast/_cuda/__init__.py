"""The kernels on NVIDIA GPUs. Only this package imports CuPy, and only when a GPU is asked for."""

from __future__ import annotations

from typing import Any

#: CUDA 13 needs a driver of branch 580 or newer.
_EXTRAS = 'pip install "ntkfast[cuda13]" (or "ntkfast[cuda12]" for drivers older than 580)'


class CudaUnavailable(RuntimeError):
    """No GPU can be used: the message is one sentence that says what is missing and what would help."""


def load_cupy() -> Any:
    """CuPy, once it is certain that it can use a GPU.

    Raises
    ------
    CudaUnavailable
        CuPy is not installed or broken, there is no driver or an older one than CuPy's, or no GPU is visible.
    """
    try:
        import cupy
    except ImportError as error:
        reason = "is not installed" if error.name == "cupy" else f"cannot be imported ({error})"
        raise CudaUnavailable(f"computing on a GPU needs CuPy, which {reason}: {_EXTRAS}") from None
    runtime = cupy.cuda.runtime
    driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver == 0:
        raise CudaUnavailable("no NVIDIA driver is loaded on this machine, so no GPU can be used")
    if driver // 1000 < built // 1000:
        raise CudaUnavailable(
            f"the NVIDIA driver supports CUDA {driver // 1000}, but this CuPy is built for CUDA {built // 1000}: "
            f'update the driver, or pip uninstall cupy-cuda{built // 1000}x and pip install "ntkfast[cuda12]"'
        )
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise CudaUnavailable(f"the NVIDIA driver finds no GPU that it can use: {error}") from None
    if count == 0:
        raise CudaUnavailable("no GPU is visible: see nvidia-smi and the environment variable CUDA_VISIBLE_DEVICES")
    try:
        cupy.cuda.cublas  # noqa: B018  (loaded on first use; CuPy's own message has many lines)
    except ImportError:
        raise CudaUnavailable(f"CuPy does not find cuBLAS, which its wheels do not contain: {_EXTRAS}") from None
    return cupy

"""What users hand in: checks, dtypes, scales; and results of the kind that came in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core

Array = NDArray[Any]

#: rows whose largest entry lies outside are scaled by powers of two, so that inner products neither overflow nor lose
#: digits to subnormals (2^30 squared times any dimension fits float32)
_SAFE = {np.dtype(np.float32): 30, np.dtype(np.float64): 400}


#: kDLCPU of DLPack
_HOST = 1


#: Results of so many bytes are made without asking the system for its memory, which takes longer than to fill them.
_UNASKED = 1 << 18


class OutOfMemoryError(MemoryError):
    """The result cannot fit in memory; the message names the bytes needed and available."""


def as_numpy(x: Any, name: str) -> tuple[Array, Callable[[Array], Any]]:
    """A NumPy view of any host array, and the way back to its kind."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; fill it ({name}.filled(...)) or drop the masked rows")
    if isinstance(x, np.ndarray):
        return np.asarray(x), lambda result: result
    kind = type(x).__module__.split(".")[0]
    if kind in ("scipy",):
        raise TypeError(f"{name} is a sparse matrix; pass {name}.toarray()")
    if not hasattr(x, "__dlpack__"):
        try:
            return np.asarray(x), lambda result: result
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} ({type(x).__name__}) cannot be read as an array: {error}") from None
    _refuse(str(getattr(x, "dtype", "")), name)
    if getattr(x, "requires_grad", False):
        raise TypeError(f"{name} requires a gradient, which kernels do not track; pass {name}.detach()")
    try:
        place = x.__dlpack_device__()
        view = np.from_dlpack(x) if place[0] == _HOST else None
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise TypeError(f"{name} ({type(x).__name__}) cannot be read as a dense array: {error}") from None
    if view is None:
        raise ValueError(f"{name} is neither in host memory nor on a CUDA device (DLPack device {place})")
    module = sys.modules.get("torch") if kind == "torch" else None
    if module is None and hasattr(x, "__array_namespace__"):
        module = x.__array_namespace__()
    if module is None or not hasattr(module, "from_dlpack"):
        return view, lambda result: result
    return view, module.from_dlpack


def _refuse(dtype: str, name: str) -> None:
    if "float16" in dtype or "float8" in dtype:
        raise TypeError(f"{name} is {dtype}, too coarse for angles between points; convert it to float32 or float64")
    if "complex" in dtype:
        raise TypeError(f"{name} is complex; the kernels are defined for real inputs: stack real and imaginary parts")


def result_dtype(dtype: Any, *arrays: tuple[str, Array]) -> np.dtype[Any]:
    """float32 or float64, from the arrays or as asked for."""
    found: list[np.dtype[Any]] = []
    for name, x in arrays:
        _refuse(str(x.dtype), name)
        if x.dtype.kind not in "biuf":
            raise TypeError(f"{name} has dtype {x.dtype}; numbers are needed (float32, float64, integers or booleans)")
        found.append(np.dtype(np.float32) if x.dtype.newbyteorder("=") == np.float32 else np.dtype(np.float64))
    if dtype is not None:
        wanted: np.dtype[Any] = np.dtype(dtype)
        if wanted not in _SAFE:
            raise TypeError(f"dtype must be float32 or float64, got {wanted}")
        return wanted
    if len(set(found)) > 1:
        raise TypeError(f"{arrays[0][0]} is {arrays[0][1].dtype} and {arrays[1][0]} is {arrays[1][1].dtype}; "
                        "convert one of them or give dtype=")  # fmt: skip
    return found[0]


@dataclass(frozen=True)
class Points:
    """Rows ready for the products. Stored row i times 2^exponent[i] is the user's row."""

    rows: Array  #: (n, d), contiguous rows, float32 or float64
    inverse: NDArray[np.float64]  #: (n,) 1 / |stored row|, 0 for zero rows
    norm: NDArray[np.float64]  #: (n,) |row| of the user

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, rows: Any, squares: NDArray[np.float64], exponent: NDArray[np.int64]) -> Points:
        """From stored rows, their squared norms and the exponents."""
        stored = np.sqrt(squares)
        with np.errstate(divide="ignore"):
            inverse = np.where(stored > 0, 1 / stored, 0.0)
        with np.errstate(over="ignore"):
            norm = np.ldexp(stored, exponent)
        return cls(rows, inverse, norm)

    def tile(self, part: slice) -> tuple[Array, NDArray[np.float64], NDArray[np.float64]]:
        """What the compiled kernels need of some of the rows."""
        return self.rows[part], self.inverse[part], self.norm[part]


def check_matrix(x: Array, name: str) -> None:
    """Two dimensions, not empty."""
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (n, d), got {x.shape}; dense networks take one row per point"
                         + (f": reshape it with {name}.reshape(len({name}), -1)" if x.ndim > 2 else ""))  # fmt: skip
    if 0 in x.shape:
        raise ValueError(f"{name} is empty: shape {x.shape}")


def as_points(x: Array, name: str, dtype: np.dtype[Any]) -> Points:
    """Check the entries, take norms, and copy only if the layout, the dtype or the scale forces a copy."""
    with np.errstate(over="ignore"):
        rows = np.asarray(x, dtype=dtype)
    if (
        rows.strides[1] != rows.itemsize
        or rows.strides[0] % rows.itemsize
        or not rows.flags.aligned
        or rows.strides[0] < 0
    ):
        rows = np.ascontiguousarray(rows)
    squares, largest = _core.squares(rows)
    if not np.isfinite(largest).all():
        bad = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise not_finite(name, bad, x[bad], dtype)
    exponent = scale_exponents(largest, dtype)
    if exponent.any():
        # In two steps: 2^-exponent itself may overflow.
        half = exponent // 2
        rows = np.ldexp(np.ldexp(rows, -half[:, None]), (half - exponent)[:, None])
        squares = _core.squares(rows)[0]
    return Points.of(rows, squares, exponent)


def not_finite(name: str, bad: int, row: Array, dtype: np.dtype[Any]) -> ValueError:
    """The error for a row that is not finite, or not any more in `dtype`."""
    source = "" if np.isfinite(row.astype(np.float64)).all() else "NaN or infinity"
    return ValueError(f"{name} must be finite: row {bad} holds {source or f'a value too large for {dtype}'}")


def scale_exponents(largest: Array, dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """Row k is to be stored times 2^-exponent[k]; largest (n,): of |entries|. All 0 if no row needs it."""
    limit = _SAFE[dtype]
    used = largest[largest > 0].astype(np.float64)
    if len(used) and (used.max() > 2.0**limit or used.min() < 2.0**-limit):
        return np.where(largest > 0, np.frexp(largest.astype(np.float64))[1], 0).astype(np.int64)
    return np.zeros(len(largest), dtype=np.int64)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, as far as the system tells."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    for limit, usage in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):
            continue
    if not found and hasattr(os, "sysconf"):
        try:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError):
            return None
    return min(found) if found else None


def check_memory(needed: int, what: str) -> None:
    """Raise before allocating what cannot fit."""
    available = available_memory() if needed > _UNASKED else None
    if available is not None and needed > available:
        raise OutOfMemoryError(
            f"{what} needs {needed:,} bytes, {available:,} are available; pass out= with a numpy.memmap "
            "(numpy.lib.format.open_memmap), use dtype=numpy.float32, or fewer points"
        )


def _overlap(a: Array, b: Array) -> bool:
    """True if the arrays share memory; interleaved views do not."""
    return np.may_share_memory(a, b) and np.shares_memory(a, b)


def allocate(
    out: Any, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any], names: Sequence[str], inputs: Sequence[Array]
) -> list[Any]:
    """The given outputs, checked, or new ones if they fit in memory."""
    if out is None:
        needed = sum(int(np.prod(shape, dtype=object)) for shape in shapes) * dtype.itemsize
        check_memory(needed, f"the result, {' and '.join(str(s) for s in shapes)} {dtype},")
        return [np.empty(shape, dtype=dtype) for shape in shapes]
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    if len(outs) != len(shapes):
        raise ValueError(f"out= must hold {len(shapes)} arrays, one for each of {', '.join(names)}; got {len(outs)}")
    for name, array, shape in zip(names, outs, shapes, strict=True):
        if tuple(getattr(array, "shape", ())) != shape:
            raise ValueError(f"out= for {name} has shape {getattr(array, 'shape', None)}, the result has {shape}")
        if np.dtype(array.dtype) != dtype:
            raise TypeError(f"out= for {name} has dtype {array.dtype}, the result has {dtype}")
        if isinstance(array, np.ndarray):
            if not array.flags.writeable:
                raise ValueError(f"out= for {name} is read-only")
            if any(_overlap(array, x) for x in inputs):
                raise ValueError(f"out= for {name} overlaps an input")
    arrays = [a for a in outs if isinstance(a, np.ndarray)]
    if any(_overlap(a, b) for k, a in enumerate(arrays) for b in arrays[:k]):
        raise ValueError("the arrays of out= overlap each other")
    return outs

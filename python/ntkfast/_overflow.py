"""Kernels that leave the range of their dtype: found tile by tile, the error names the sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from ntkfast._tiles import Tile

#: Rows of a tile that are looked at together: what isfinite makes of them stays in cache.
_ROWS = 64
#: The same on a GPU, in bytes of what isfinite makes.
_DEVICE_BYTES = 64 << 20


class ResultOverflow(OverflowError):
    """Where it happened, so that the error of a part can name samples of the whole."""

    at: tuple[int, ...] = ()  #: row; row and column; or three samples
    dtype: str = ""


def quiet() -> AbstractContextManager[Any]:
    """No warnings of NumPy: what overflows is found in the result."""
    return np.errstate(over="ignore", invalid="ignore")


def overflow(at: tuple[int, ...], dtype: Any) -> ResultOverflow:
    """The error for an entry that is infinite or NaN although all factors are finite."""
    where = {1: "row {} with itself", 2: "row {} and column {}", 3: "samples {}, {} and {}"}[len(at)].format(*at)
    name = str(dtype).removeprefix("torch.")
    cure = "use smaller points" if name == "float64" else "use float64, or smaller points"
    error = ResultOverflow(
        f"the kernel of {where} leaves the range of {name}, or a product on the way to it does; {cure}"
    )
    error.at, error.dtype = at, name
    return error


@contextmanager
def within(*origin: int, step: int = 1) -> Iterator[None]:
    """Row i of a part of a result is row origin + step i of the whole, its columns likewise."""
    try:
        yield
    except ResultOverflow as error:
        at = tuple(start + step * k for start, k in zip(origin, error.at, strict=False))
        raise overflow(at, error.dtype) from None


def refuse(finite: Any, dtype: Any, *origin: int) -> None:
    """finite: of the last axes of a part of a result that begins at `origin`, True where it is finite."""
    if bool(finite.all()):
        return
    on_host = finite if isinstance(finite, np.ndarray) else finite.get()
    bad = np.argwhere(~on_host)[0][-len(origin) :]
    raise overflow(tuple(int(k) + start for k, start in zip(bad, origin, strict=True)), dtype)


def refuse_tile(values: Any, tile: Tile) -> None:
    """A tile (..., rows, cols) of a result, in host memory.

    Of a symmetric one the diagonal is enough (Cauchy-Schwarz): |P_ij| is at most the larger of P_ii and P_jj, in every
    product on the way. What overflows there is no number on the diagonal either.
    """
    if tile.diagonal:
        refuse(np.isfinite(np.diagonal(values, axis1=-2, axis2=-1)), values.dtype, tile.rows.start)
    elif not tile.mirrored:
        for k in range(0, values.shape[-2], _ROWS):
            part = values[..., k : k + _ROWS, :]
            refuse(np.isfinite(part), values.dtype, tile.rows.start + k, tile.cols.start)


def refuse_on_device(values: Any, symmetric: bool) -> None:
    """The same for a whole result (..., n, m) on a GPU, on the current stream."""
    last = values.ndim - 1
    if symmetric:
        refuse(np.isfinite(values.diagonal(0, last - 1, last)), values.dtype, 0)
        return
    n, size = values.shape[-2], int(values.size)
    step = max(1, _DEVICE_BYTES * n // size)
    for k in range(0, n, step):
        refuse(np.isfinite(values[..., k : k + step, :]), values.dtype, k, 0)

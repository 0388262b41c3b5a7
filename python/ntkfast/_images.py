"""Images as they come in: their layout, their entries, and one working copy scaled for the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._arrays import not_finite

Array = NDArray[Any]
Vector = NDArray[np.float64]

FORMATS = ("channels_last", "channels_first")
#: Scales of images are powers of 2^_COARSE.
_COARSE = 24


def check_format(data_format: str) -> None:
    if data_format not in FORMATS:
        raise ValueError(f"data_format={data_format!r} is unknown; use one of {', '.join(FORMATS)}")


def dense_format(data_format: str) -> None:
    if data_format != "channels_last":
        raise ValueError(f"data_format={data_format!r} is for images: this network takes one row per point")


def check_images(x: Array, name: str, data_format: str) -> None:
    """One or two grid axes beside images and channels, not empty."""
    check_format(data_format)
    if x.ndim not in (3, 4):
        order = "(n, *grid, channels)" if data_format == "channels_last" else "(n, channels, *grid)"
        raise ValueError(f"{name} must have shape {order} with one or two grid axes, got {x.shape}")
    if 0 in x.shape:
        raise ValueError(f"{name} is empty: shape {x.shape}")


def grid_first(x: Array, name: str, data_format: str) -> tuple[Array, tuple[int, ...]]:
    """(n, channels, height, width) view or copy, and the grid of the user (one or two axes)."""
    check_images(x, name, data_format)
    if data_format == "channels_last":
        x = np.moveaxis(x, -1, 1)
    grid = x.shape[2:]
    return (x if x.ndim == 4 else x[:, :, None, :]), grid


@dataclass
class Side:
    """Images (n, channels, height, width) ready for the kernels; image k stands for scale[k] times itself."""

    images: Array
    scale: Vector

    def __len__(self) -> int:
        return len(self.images)


def prepared(x: Array, name: str, dtype: np.dtype[Any], *, scaled: bool) -> Side:
    """One working copy. Scaled: by powers of two, so that nothing leaves the range of the dtype; a common power where
    that will do, because positions at which two images are equal then stay equal."""
    with np.errstate(over="ignore"):
        images = np.array(x, dtype=dtype, order="C")
    flat = images.reshape(len(images), -1)
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1)).astype(np.float64)
    if not np.isfinite(largest).all():
        bad = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise not_finite(name, bad, np.asarray(x[bad]), dtype)
    if not scaled:
        return Side(images, np.ones(len(images)))
    exponents = np.where(largest > 0, np.frexp(largest)[1], 0)
    # Pixels are often 0 .. 1 or 0 .. 255: the grid of common exponents is coarse, and does not depend on other images.
    common = np.round(exponents / _COARSE).astype(np.int64) * _COARSE
    if common.any():
        half = -common // 2
        flat[...] = np.ldexp(np.ldexp(flat, half[:, None]), (-common - half)[:, None])
    return Side(images, np.where(largest > 0, np.ldexp(1.0, common), 0.0))


def window_sums(var: Vector, reaches: tuple[int, ...], circular: bool) -> Vector:
    """Sums over the windows around all positions, the last two axes."""
    for axis, reach in zip((-2, -1), reaches, strict=True):
        line = np.moveaxis(var, axis, 0)
        total, n = line.copy(), len(line)
        for d in range(1, reach + 1):
            if circular:
                total += np.roll(line, d, axis=0) + np.roll(line, -d, axis=0)
            elif d < n:
                total[d:] += line[:-d]
                total[:-d] += line[d:]
        var = np.moveaxis(total, 0, axis)
    return var

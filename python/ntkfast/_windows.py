"""What the layers of a finite network see as rows: points as they are, images as the windows around their positions.

Both layouts keep samples as rows (n positions, features), features last, and have the same methods. Views, slices and
functions that hand other arrays on to their own library (``__array_function__``): nothing depends on where the arrays
live.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._arrays import check_matrix
from ntkfast._images import check_format, dense_format
from ntkfast.convolution import ConvNetwork

Array = NDArray[Any]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Points:
    """Points (n, d): one row each."""

    features: int
    positions = 1
    slots = 1

    def check(self, x: Array, name: str, data_format: str) -> Array:
        """The samples, features last; errors say what does not fit."""
        dense_format(data_format)
        check_matrix(x, name)
        if x.shape[1] != self.features:
            raise ValueError(f"{name} has {x.shape[1]} features and the network takes {self.features}")
        return x

    def rows(self, x: Array) -> Array:
        """Some samples as rows."""
        return x

    def gather(self, x: Array, amplitude: float, out: Array) -> None:
        """out = amplitude x."""
        np.multiply(x, amplitude, out=out)

    def scatter(self, g: Array) -> Array:
        """The adjoint of :meth:`gather` with amplitude 1."""
        return g

    def readout_shape(self, width: int) -> tuple[int, ...]:
        """Of the weights of the readout."""
        return (width,)

    def pool(self, x: Array) -> Array:
        """What the readout sees of every sample."""
        return x

    def spread(self, a: Array, n: int) -> Array:
        """The gradient of <a, pool(x)> in the rows x of n samples."""
        return np.broadcast_to(a, (n, len(a)))


def _axis(size: int, reach: int, circular: bool) -> list[tuple[slice, slice]]:
    """(positions of an axis with a margin of `reach` on both sides, positions they repeat), as slices."""
    if not circular:
        return [(slice(reach, reach + size), slice(0, size))]
    pairs, at, end = [], 0, size + 2 * reach
    while at < end:  # windows may be larger than the image
        first = (at - reach) % size
        count = min(size - first, end - at)
        pairs.append((slice(at, at + count), slice(first, first + count)))
        at += count
    return pairs


@dataclass(frozen=True)
class Windows:
    """Images (n, *grid, channels): one row for every position, in a layer the window around it.

    A window's columns are slot by slot, row-major over the image axes, the channels of a slot side by side.
    """

    grid: tuple[int, ...]
    features: int  #: channels
    sizes: tuple[int, ...]
    circular: bool
    pooled: bool

    @classmethod
    def of(cls, net: ConvNetwork, grid: tuple[int, ...], channels: int) -> Windows:
        return cls(grid, channels, net.windows(len(grid)), net.padding == "circular", net.pooling == "gap")

    @cached_property
    def positions(self) -> int:
        return math.prod(self.grid)

    @cached_property
    def slots(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def pieces(self) -> list[tuple[Slices, Slices]]:
        """Parts of the grid with its margin, and the parts of the grid they repeat; the margin is 0 elsewhere."""
        axes = [_axis(n, size // 2, self.circular) for n, size in zip(self.grid, self.sizes, strict=True)]
        every = slice(None)  # samples
        return [((every, *(a for a, _ in part)), (every, *(b for _, b in part))) for part in itertools.product(*axes)]

    def _wide(self, like: Array, channels: int) -> Array:
        """Zeros on the grid with its margin."""
        grid = (n + size - 1 for n, size in zip(self.grid, self.sizes, strict=True))
        return np.zeros_like(like, shape=(len(like) // self.positions, *grid, channels))

    def check(self, x: Array, name: str, data_format: str) -> Array:
        """The samples, channels last; errors say what does not fit."""
        check_format(data_format)
        last = data_format == "channels_last"
        shape = (*self.grid, self.features) if last else (self.features, *self.grid)
        if x.ndim != 1 + len(shape) or x.shape[1:] != shape:
            raise ValueError(f"{name} must have shape (n, {', '.join(map(str, shape))}) for this network "
                             f"({data_format}), got {x.shape}")  # fmt: skip
        if len(x) == 0:
            raise ValueError(f"{name} is empty: shape {x.shape}")
        return x if last else np.moveaxis(x, 1, -1)

    def rows(self, x: Array) -> Array:
        """Some samples as rows."""
        return x.reshape(-1, self.features)

    def gather(self, x: Array, amplitude: float, out: Array) -> None:
        """out = amplitude times the window around every position; 0 where it reads outside the image."""
        channels, axes = x.shape[1], tuple(range(1, 1 + len(self.grid)))
        image, wide = x.reshape(-1, *self.grid, channels), self._wide(x, channels)
        for to, source in self.pieces:
            np.multiply(image[source], amplitude, out=wide[to])
        windows = np.lib.stride_tricks.sliding_window_view(wide, self.sizes, axis=axes)
        # a view: axes are only split
        out.reshape(-1, *self.grid, *self.sizes, channels)[...] = np.moveaxis(windows, 1 + len(self.grid), -1)

    def scatter(self, g: Array) -> Array:
        """The adjoint of :meth:`gather` with amplitude 1: every position adds up what the windows read from it."""
        channels = g.shape[1] // self.slots
        slots, wide = g.reshape(-1, *self.grid, *self.sizes, channels), self._wide(g, channels)
        every = (slice(None),) * (1 + len(self.grid))
        for slot in itertools.product(*(range(size) for size in self.sizes)):
            read = tuple(slice(k, k + n) for k, n in zip(slot, self.grid, strict=True))
            wide[(slice(None), *read)] += slots[every + slot]
        image = np.zeros_like(g, shape=(len(wide), *self.grid, channels))
        for to, source in self.pieces:
            image[source] += wide[to]
        return image.reshape(-1, channels)

    def turned(self, W: Array) -> Array:
        """W for the way back: windows of g times turned W is :meth:`scatter` of g W. What is in slot k of a window has
        the centre of that window in slot -k of its own."""
        slots: Array = W.reshape(len(W), self.slots, -1)[:, ::-1]
        return slots.swapaxes(0, 1).reshape(self.slots * len(W), -1)

    def readout_shape(self, width: int) -> tuple[int, ...]:
        """Of the weights of the readout: one for all positions, or one each."""
        return (width,) if self.pooled else (self.positions, width)

    def pool(self, x: Array) -> Array:
        """What the readout sees of every sample: the mean over its positions, or all of them."""
        if not self.pooled:
            return x.reshape(-1, self.positions * x.shape[1])
        # NumPy adds rows one after the other: in float32 a thousand of them would cost a digit.
        mean: Array = x.reshape(-1, self.positions, x.shape[1]).mean(axis=1, dtype=np.float64)
        return mean.astype(x.dtype, copy=False)

    def spread(self, a: Array, n: int) -> Array:
        """The gradient of <a, pool(x)> in the rows x of n samples."""
        if self.pooled:
            return np.broadcast_to(a / self.positions, (n * self.positions, len(a)))
        return np.broadcast_to(a, (n, *a.shape)).reshape(-1, a.shape[1])


Layout = Points | Windows

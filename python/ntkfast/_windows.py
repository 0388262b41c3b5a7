"""What the layers of a finite network see as rows: points as they are, images as the windows around their positions.

Both layouts keep samples as rows (n positions, features), features last, and have the same methods. Only slices,
reshapes and ``out=``: nothing depends on where the arrays live.
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
from ntkfast._conv import FORMATS
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
        if data_format != "channels_last":
            raise ValueError(f"data_format={data_format!r} is for images: this network takes one row per point")
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


def _axis(size: int, offset: int, circular: bool) -> list[tuple[slice, slice]]:
    """(positions, positions they read) `offset` further along an axis, as slices; what reads outside is left out."""
    if circular:
        shift = offset % size
        pairs = [(slice(0, size - shift), slice(shift, size)), (slice(size - shift, size), slice(0, shift))]
        return pairs if shift else pairs[:1]
    first, last = max(0, -offset), min(size, size - offset)
    return [(slice(first, last), slice(first + offset, last + offset))] if first < last else []


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
    def pieces(self) -> list[list[tuple[Slices, Slices]]]:
        """For every slot of the window: parts of the grid, and the parts they read through it."""
        made = []
        for offset in itertools.product(*(range(-(size // 2), size // 2 + 1) for size in self.sizes)):
            axes = [_axis(n, d, self.circular) for n, d in zip(self.grid, offset, strict=True)]
            made.append([(tuple(a for a, _ in part), tuple(b for _, b in part)) for part in itertools.product(*axes)])
        return made

    def check(self, x: Array, name: str, data_format: str) -> Array:
        """The samples, channels last; errors say what does not fit."""
        if data_format not in FORMATS:
            raise ValueError(f"data_format={data_format!r} is unknown; use one of {', '.join(FORMATS)}")
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
        channels = x.shape[1]
        image = x.reshape(-1, *self.grid, channels)
        slots = out.reshape(-1, *self.grid, self.slots, channels)  # a view: axes are only split
        for k, pieces in enumerate(self.pieces):
            slot = slots[..., k, :]
            if not self.circular:
                slot[...] = 0
            for to, source in pieces:
                np.multiply(image[(slice(None), *source)], amplitude, out=slot[(slice(None), *to)])

    def scatter(self, g: Array) -> Array:
        """The adjoint of :meth:`gather` with amplitude 1: every position adds up what the windows read from it."""
        channels = g.shape[1] // self.slots
        slots = g.reshape(-1, *self.grid, self.slots, channels)
        image = np.zeros_like(g, shape=(len(slots), *self.grid, channels))
        for k, pieces in enumerate(self.pieces):
            slot = slots[..., k, :]
            for to, source in pieces:
                image[(slice(None), *source)] += slot[(slice(None), *to)]
        return image.reshape(-1, channels)

    def readout_shape(self, width: int) -> tuple[int, ...]:
        """Of the weights of the readout: one for all positions, or one each."""
        return (width,) if self.pooled else (self.positions, width)

    def pool(self, x: Array) -> Array:
        """What the readout sees of every sample: the mean over its positions, or all of them."""
        if not self.pooled:
            return x.reshape(-1, self.positions * x.shape[1])
        mean: Array = x.reshape(-1, self.positions, x.shape[1]).mean(axis=1)
        return mean

    def spread(self, a: Array, n: int) -> Array:
        """The gradient of <a, pool(x)> in the rows x of n samples."""
        if self.pooled:
            return np.broadcast_to(a / self.positions, (n * self.positions, len(a)))
        return np.broadcast_to(a, (n, *a.shape)).reshape(-1, a.shape[1])


Layout = Points | Windows

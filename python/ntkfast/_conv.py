"""Gram matrices of convolutional networks: inputs checked, layers compiled, pairs of images tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core, _hermite
from ntkfast._arrays import allocate, as_numpy, check_memory, result_dtype
from ntkfast._contract import cuts
from ntkfast._cuda import conv as gpu_conv
from ntkfast._cuda.device import find_place
from ntkfast._cuda.gram import Backend, Output, Slices
from ntkfast._images import Side, grid_first, prepared, window_sums
from ntkfast._plan import _HERMITE, _IDS, _STEP, _expanded, _suffix_row, _table
from ntkfast._tiles import Progress, Tile, record_of
from ntkfast.convolution import ConvNetwork

Array = NDArray[Any]
Vector = NDArray[np.float64]

#: Seconds one call into the kernels should take at most.
_CALL = 0.15
#: Bytes of prepared images on each side of a tile.
_SIDE_BYTES = 24 << 20
#: Images of one side of a tile.
_SIDE = 512


def fast_path(net: ConvNetwork) -> bool:
    """True if no correlation is negative after the first layer, and nothing but its norm distinguishes a patch from its
    multiples (csrc/cpu/conv_fast.h)."""
    first, *others = net.layers
    if not first.activation.homogeneous or not -1 <= first.activation.slope <= 0:
        return False
    for layer in net.layers:
        if not layer.activation.homogeneous or layer.bias_variance != 0 or layer.weight_variance == 0:
            return False
    for layer in others:
        c = layer.coefficients(float)
        if not layer.trained or (c.p != 0 and (c.p < 0 or c.q < 0 or layer.activation.slope > 1)):
            return False
    return True


def _kind(layer: Any) -> int:
    return 0 if layer.activation.homogeneous else _IDS.get(layer.activation.name, _HERMITE)


def _scalable(net: ConvNetwork) -> bool:
    return all(layer.activation.homogeneous and layer.bias_variance == 0 for layer in net.layers)


@dataclass(frozen=True)
class Sums:
    """One result as theta T + cov S + last G, T and S and G added up over positions."""

    theta: float
    cov: float
    last: float

    def of(self, sums: Array) -> Array:
        """From the sums of the kernels: T + S, S, G."""
        value = self.theta * sums[0] + (self.cov - self.theta) * sums[1] if self.theta else self.cov * sums[1]
        total: Array = value + self.last * sums[2] if self.last else value
        return total


def _mix(net: ConvNetwork, kind: str, positions: int) -> Sums:
    w = net.readout.weight_variance / (positions**2 if net.pooling == "gap" else 1)
    if kind == "ntk":
        return Sums(w, w * float(net.readout.trained), 0.0)
    return Sums(0.0, w, 0.0) if kind == "nngp" else Sums(0.0, 0.0, w)


class Problem:
    """Checked inputs and compiled layers of one call."""

    def __init__(
        self, net: ConvNetwork, X: Any, Y: Any, dtype: Any, device: Any, data_format: str, *, own: bool = False
    ) -> None:
        place = find_place(device, ("X", X), ("Y", Y))
        self.gpu = None if place is None else Backend(place, X)
        # Images on a device are fetched once: their scales, variances and Hermite tables are made on the host.
        there = self.gpu if place is not None and place.resident else None
        read: Callable[[Any, str], tuple[Array, Callable[[Any], Any]]] = there.fetch if there else as_numpy
        x, self.wrap = read(X, "X")
        x, grid = grid_first(x, "X", data_format)
        y = None
        if Y is not None:
            y, other = grid_first(read(Y, "Y")[0], "Y", data_format)
            if other != grid:
                raise ValueError(f"X has images of {grid} positions and Y of {other}")
            if x.shape[1] != y.shape[1]:
                raise ValueError(f"X has {x.shape[1]} channels and Y has {y.shape[1]}")
        self.dtype = result_dtype(dtype, ("X", x), *([] if y is None else [("Y", y)]))
        self.net, self.grid, self.symmetric = net, grid, y is None
        self.fast = fast_path(net) and not own
        scaled = _scalable(net)
        check_memory(x.size * self.dtype.itemsize, "a working copy of X")
        self.x = prepared(x, "X", self.dtype, scaled=scaled)
        self.y = self.x if y is None else prepared(y, "Y", self.dtype, scaled=scaled)
        self.height, self.width = self.x.images.shape[2:]
        self.positions = self.height * self.width
        self.pooled = net.pooling == "gap"
        windows = net.windows(len(grid))
        reach_y, reach_x = (windows[-2] // 2 if len(grid) == 2 else 0), windows[-1] // 2
        self.geometry = (self.height, self.width, x.shape[1], reach_y, reach_x, int(net.padding == "circular"),
                         int(self.pooled))  # fmt: skip
        self.core, self.exponent, self.terms = self._compile()
        self._kept: dict[bool, tuple[tuple[bool, int, int], Any]] = {}

    def _compile(self) -> tuple[Any, int, int]:
        """The layers for the kernels, the power of two of the results' square root, and the terms of Hermite tables."""
        net, down, scaled = self.net, 0, _scalable(self.net)
        rows, ints, cache = [], [], list[Any]()
        slots = (2 * self.geometry[3] + 1) * (2 * self.geometry[4] + 1)
        expanded = _expanded(net)  # type: ignore[arg-type]
        last = max((k for k, expand in enumerate(expanded) if expand), default=-1)
        # Variances of one image of ones, whose growth is divided out; of all images, for the tables.
        var = np.ones((1, self.height, self.width)) if last < 0 else self._variances()
        mean = np.zeros_like(var)
        for k, layer in enumerate(net.layers):
            c = layer.coefficients(float)
            c = c._replace(cw=c.cw / slots if net.average else c.cw)
            row, kind, table, power = _suffix_row(layer, c, 0, 0), _kind(layer), -1, 0
            if expanded[k]:
                try:
                    table = _table(layer.activation, row, self._windows(var).ravel(), self.dtype, cache)
                except _hermite.ExpansionError as error:
                    if layer.activation.name != "gelu":
                        raise ValueError(f"{error}: layer {k + 1}; normalise the images or raise the tolerance: "
                                         "Activation.with_tolerance(...)") from None  # fmt: skip
            ints.append([_HERMITE if table >= 0 else kind, table, -1, -1])
            if scaled or k < last:
                after = self._advance(row, ints[-1], var, mean, cache)
            if scaled:
                # An image of variance 1 everywhere stays within 2^-+_STEP/4, so that float32 is far from its limits.
                most = float(after[0].max())
                if most > 0 and abs(math.log2(most)) > _STEP / 4:
                    power = round(math.log2(most) / 2)
                    row = _suffix_row(layer, c, 0, power)
                    after = self._advance(row, ints[-1], var, mean, cache)
            if scaled or k < last:
                var, mean = after
            down += power
            rows.append(row)
        core = _core.Plan(np.zeros((0, 9)), np.zeros((0, 5), dtype=np.int32), 1.0, 0.0, np.array(rows),
                          np.array(ints, dtype=np.int32), [t[0].as_tuple() for _, _, t in cache])  # fmt: skip
        return core, down, max((t[0].evens + t[0].odds for _, _, t in cache), default=0)

    def _variances(self) -> Vector:
        """Variances of the positions of all images."""
        sides = [self.x] if self.symmetric else [self.x, self.y]
        return np.concatenate([np.einsum("kchw,kchw->khw", s.images, s.images, dtype=np.float64) for s in sides])

    def _advance(
        self, row: list[float], ints: list[int], var: Vector, mean: Vector, cache: list[Any]
    ) -> tuple[Vector, Vector]:
        """Variances and means of the positions after a layer."""
        p, q, r = row[:3]
        # One step without skip and with q = 1 gives mean = mu and q = Q_ii.
        step = _core.Plan(
            np.zeros((0, 9)),
            np.zeros((0, 5), dtype=np.int32),
            1.0,
            0.0,
            np.array([[0.0, 1.0, 1.0, *row[3:]]]),
            np.array([ints], dtype=np.int32),
            [t[0].as_tuple() for _, _, t in cache],
        )
        lam = np.ascontiguousarray(self._windows(var).ravel())
        _, mu, second = (part.reshape(var.shape) for part in _core.rows(step, 0, lam, np.zeros_like(lam)))
        return p * p * var + 2 * p * q * mean * mu + r * second, p * mean + q * mu

    def _windows(self, var: Vector) -> Vector:
        return window_sums(var, self.geometry[3:5], bool(self.geometry[5]))

    def allocate(self, out: Any, shapes: list[tuple[int, ...]], names: Sequence[str]) -> list[Any]:
        """The given outputs, checked, or new ones where the images are."""
        if self.gpu is not None:
            return self.gpu.allocate(out, shapes, self.dtype, names, [])
        return allocate(out, shapes, self.dtype, names, [self.x.images, self.y.images])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.x), len(self.y)

    def nanoseconds(self) -> float:
        """Rough time of one pair on all threads."""
        # Measured on images of 32 x 32 with AVX-512; an instruction set of half the width takes twice as long, or more.
        one = 40.0 + 3.0 * self.terms
        if self.fast:
            one = (0.3 if self.dtype == np.float32 else 0.8) * (1.5 if self.pooled else 1.0)
            one *= {"v4": 1.0, "v3": 2.0}.get(_core.isa(), 5.0)
        lanes = 1 + 16 / self.width
        planes = self.positions if self.pooled else 1
        return float(one * lanes * self.positions * planes * len(self.net.layers) / _core.threads() + 100.0)

    def side(self) -> int:
        """Images of one side of a tile."""
        single = self.dtype == np.float32
        each = max(_core.conv_bytes(self.core, self.geometry, self.fast, single, twice)
                   for twice in ({False, self.pooled}))  # fmt: skip
        most = max(1, _SIDE_BYTES // each)
        # Images are prepared once a tile: that is nothing for a pooled kernel.
        return int(min(most, 16 if self.pooled else _SIDE))

    def prepare(self, side: Side, part: slice, *, twice: bool) -> Any:
        """The numbers of some images; the last ones are kept: the diagonal and the first tile share them."""
        key = (side is self.x, part.start, part.stop)
        if twice not in self._kept or self._kept[twice][0] != key:
            self._kept.pop(twice, None)
            made = _core.ConvImages(self.core, self.geometry, self.fast, side.images[part], twice)
            self._kept[twice] = (key, made)
        return self._kept[twice][1]


@dataclass(frozen=True)
class Part:
    """Some rows of the result and their sums."""

    rows: slice
    cols: slice
    mirrored: bool  #: also the columns and rows
    sums: Vector  #: (3, rows, cols)
    slices: Vector | None  #: (layers, rows, cols)


def _shifts(problem: Problem, sums: Vector, seconds: float, call: Any) -> None:
    """Call for all row shifts, in as many parts as keep a call short."""
    count = problem.height if problem.pooled else 1
    step = max(1, min(count, int(count * _CALL / max(seconds, 1e-9))))
    for first in range(0, count, step):
        call(first, min(step, count - first), sums)


def parts(problem: Problem, tile: Tile, *, own_sums: Vector | None, slices: bool) -> Iterator[Part]:
    """All pairs of a tile, a few rows at a time; if symmetric, on and above the diagonal (near it below it too).
    own_sums: those of all images with themselves, which then are not made again."""
    side, one = problem.side(), 1e-9 * problem.nanoseconds()
    layers = len(problem.net.layers)
    for rows in cuts(tile.rows, side):
        x = problem.prepare(problem.x, rows, twice=False)
        for cols in cuts(tile.cols, side):
            if problem.symmetric and cols.start < rows.start:
                continue
            same = problem.symmetric and rows == cols
            strict = same and own_sums is not None
            y = x if same and not problem.pooled else problem.prepare(problem.y, cols, twice=problem.pooled)
            for some in cuts(slice(0, rows.stop - rows.start), max(1, int(_CALL / (one * (cols.stop - cols.start))))):
                start = some.start if same else 0
                for part in cuts(slice(0, cols.stop - cols.start - start), max(1, int(_CALL / one))):
                    i0, j0 = some.start, start + part.start
                    count = some.stop - some.start, part.stop - part.start
                    sums = np.zeros((3, *count))
                    own = np.zeros((layers, *count)) if slices else None

                    def call(first: int, shifts: int, sums: Vector, x: Any = x, y: Any = y, i0: int = i0, j0: int = j0,
                             same: bool = same, strict: bool = strict, own: Vector | None = own) -> None:  # fmt: skip
                        _core.conv_tile(problem.core, x, i0, y, j0, same, strict, False, first, shifts, sums, own)

                    _shifts(problem, sums, one * count[0] * count[1], call)
                    if own_sums is not None and same:
                        both = np.arange(max(i0, j0), min(some.stop, j0 + count[1]))
                        sums[:, both - i0, both - j0] = own_sums[:, rows.start + both]
                    yield Part(
                        slice(rows.start + i0, rows.start + some.stop),
                        slice(cols.start + j0, cols.start + j0 + count[1]),
                        problem.symmetric,
                        sums,
                        own,
                    )


def diagonal_sums(problem: Problem, side: Side) -> Vector:
    """(3, n): the sums of every image with itself."""
    if problem.gpu is not None:
        totals: Vector = problem.gpu.call(lambda gpu: gpu_conv.ConvWorker(gpu, problem, [], None).totals(side))
        return totals
    result = np.zeros((3, len(side)))
    one = 1e-9 * problem.nanoseconds()
    for images in cuts(slice(0, len(side)), problem.side()):
        x = problem.prepare(side, images, twice=False)
        y = problem.prepare(side, images, twice=True) if problem.pooled else x
        for part in cuts(slice(0, images.stop - images.start), max(1, int(_CALL / one))):
            sums = np.zeros((3, part.stop - part.start, 1))

            def call(first: int, shifts: int, sums: Vector, x: Any = x, y: Any = y, at: int = part.start) -> None:
                _core.conv_tile(problem.core, x, at, y, at, False, False, True, first, shifts, sums, None)

            _shifts(problem, sums, one * sums.shape[1], call)
            result[:, images.start + part.start : images.start + part.stop] = sums[:, :, 0]
    return result


def _store(out: Any, part: Part, values: Array) -> None:
    """Values (..., rows, cols) and, on symmetric results, their mirror; nothing below the diagonal."""
    if not part.mirrored:
        out[..., part.rows, part.cols] = values
        return
    if part.cols.start >= part.rows.stop:
        out[..., part.rows, part.cols] = values
        out[..., part.cols, part.rows] = np.swapaxes(values, -1, -2)
        return
    for k in range(part.rows.start, part.rows.stop):
        first = max(k, part.cols.start)
        if first >= part.cols.stop:
            continue
        row = values[..., k - part.rows.start, first - part.cols.start :]
        out[..., k, first : part.cols.stop] = row
        out[..., first : part.cols.stop, k] = row


def _factors(problem: Problem, side: Side, sums: Vector, mix: Sums, name: str, get: str, *, normalize: bool) -> Vector:
    """f of one side: K_ij = (..) f_i f_j; refuses what does not fit."""
    diagonal = mix.of(sums)
    if normalize:
        if not np.isfinite(diagonal).all():
            raise OverflowError(f"the {get} of {name} leaves the range of float64 within the network: scale the images")
        return np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0)), 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        f = np.ldexp(side.scale, problem.exponent)
        values = diagonal * f * f
    bad = ~(np.abs(values) <= float(np.finfo(problem.dtype).max))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise OverflowError(f"the {get} of image {row} of {name} does not fit in {problem.dtype}; use normalize=True, "
                            "smaller images or dtype=numpy.float64")  # fmt: skip
    return f


def _within(part: Part, tile: Tile) -> Part:
    """Rows and columns counted from those of a tile, which holds its own mirror image if it is on the diagonal."""
    rows, cols = (slice(s.start - t.start, s.stop - t.start) for s, t in
                  ((part.rows, tile.rows), (part.cols, tile.cols)))  # fmt: skip
    return replace(part, rows=rows, cols=cols, mirrored=tile.diagonal)


def _fill(
    problem: Problem, outs: list[Any], make: Any, own_sums: Vector | None, progress: bool, *, slices: bool = False
) -> None:
    """The outputs, pair by pair, or the tiles that a record still wants, whole."""
    n, m = problem.shape
    record = record_of(outs)
    todo: Iterable[Tile] = record.begin() if record else [Tile(slice(0, n), slice(0, m), problem.symmetric)]
    with Progress(progress, sum(tile.entries for tile in todo)) as bar:
        for tile in todo:
            shape = tile.rows.stop - tile.rows.start, tile.cols.stop - tile.cols.start
            targets = [np.empty(shape, problem.dtype)] if record else outs
            for part in parts(problem, tile, own_sums=own_sums, slices=slices):
                place = _within(part, tile) if record else part
                for k, target in enumerate(targets):
                    _store(target, place, make(k, part).astype(problem.dtype))
                count = part.sums.shape[1] * part.sums.shape[2]
                bar.add(count if not part.mirrored or part.cols.start >= part.rows.stop else count / 2)
            if record:
                record.keep(tile, targets[0])


def gram(problem: Problem, kinds: tuple[str, ...], normalize: bool, out: Any, progress: bool) -> list[Any]:
    """The kernels of ``kinds``."""
    mixes = [_mix(problem.net, kind, problem.positions) for kind in kinds]
    outs = problem.allocate(out, [problem.shape] * len(kinds), kinds)

    def factors(side: Side, sums: Vector, name: str) -> list[Vector]:
        return [_factors(problem, side, sums, mix, name, kind, normalize=normalize)
                for mix, kind in zip(mixes, kinds, strict=True)]  # fmt: skip

    own_sums = diagonal_sums(problem, problem.x)
    left = factors(problem.x, own_sums, "X")
    right = left if problem.symmetric else factors(problem.y, diagonal_sums(problem, problem.y), "Y")

    if problem.gpu is not None:
        exact = problem.symmetric and normalize
        gpu_conv.fill(problem, outs, [
            Output([m.theta, m.cov, 0.0, m.last], f, g, f, g, (f > 0).astype(np.float64) if exact else None)
            for m, f, g in zip(mixes, left, right, strict=True)
        ], None, progress)  # fmt: skip
        return outs

    def make(k: int, part: Part) -> Array:
        return (mixes[k].of(part.sums) * left[k][part.rows][:, None]) * right[k][part.cols]

    _fill(problem, outs, make, own_sums if problem.symmetric else None, progress)
    if problem.symmetric and normalize:
        for array, f in zip(outs, left, strict=True):
            for i, value in enumerate(f):
                array[i, i] = float(value > 0)
    return outs


def layer_grams(problem: Problem, out: Any, progress: bool) -> Any:
    """(P, n, m): one slice per trained layer, then the readout (flatten)."""
    net = problem.net
    if problem.pooled:
        raise ValueError('layer_grams of a ConvNetwork is there for readout="flatten" only')
    trained = [k for k, layer in enumerate(net.layers) if layer.trained]
    count = len(net.slices)
    (result,) = problem.allocate(out, [(count, *problem.shape)], ["layer_grams"])
    mix = _mix(net, "ntk", problem.positions)

    def factors(side: Side, name: str) -> Vector:
        return _factors(problem, side, diagonal_sums(problem, side), mix, name, "ntk", normalize=False)

    left = factors(problem.x, "X")
    right = left if problem.symmetric else factors(problem.y, "Y")

    if problem.gpu is not None:
        readout = count - 1 if net.readout.trained else -1
        grams = Slices(left * net.readout.weight_variance, right, readout, 1.0, 0.0)
        if count:
            gpu_conv.fill(problem, [result], [], grams, progress)
        return result

    def make(_: int, part: Part) -> Array:
        slices = part.slices[trained] if part.slices is not None else np.zeros((0, *part.sums.shape[1:]))
        if net.readout.trained:
            slices = np.concatenate([slices, part.sums[1:2]])
        return net.readout.weight_variance * slices * left[part.rows][:, None] * right[part.cols]

    if count:
        _fill(problem, [result], make, None, progress, slices=True)
    return result


def diagonal(problem: Problem, kind: str) -> Vector:
    """K_ii of one kernel."""
    mix = _mix(problem.net, kind, problem.positions)
    sums = diagonal_sums(problem, problem.x)
    f = _factors(problem, problem.x, sums, mix, "X", kind, normalize=False)
    values: Vector = (mix.of(sums) * f * f).astype(problem.dtype)
    return values

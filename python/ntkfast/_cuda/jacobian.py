"""Jacobian inner products on GPUs: ntkfast._contract with products by cuBLAS and csrc/cuda/jacobian.cu behind them.

Tile after tile of the result, layer after layer within a tile, so that a tile is added up while it is in the L2 cache;
the last layer writes its mirror image too. Tiles alternate between two streams, so that the products of one fill the
device while those of the other run out of blocks or are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from ntkfast._contract import Factor, contractions, cuts, in_tiles, parameter_slices, sample_tiles
from ntkfast._cuda import layout
from ntkfast._cuda.device import Gpu, contiguous_rows, index_of, row_stride
from ntkfast._cuda.gram import Backend, norms
from ntkfast._cuda.tiles import TileWorker
from ntkfast._overflow import refuse_on_device, refuse_tile
from ntkfast._tiles import Tile

#: Rows of the products of a tile: 256 blocks of a product of 128 x 128, two for every multiprocessor. Not measured.
SIDE = 2048
#: Largest buffer of weight gradients of a tile's rows (and of its columns), in bytes.
_GRADIENTS = 128 << 20
#: Most terms of a float32 sum before it is added to the others. N positive terms, one after the other, are off by
#: eps sqrt(N) / 8 (standard deviation of 4000 sums in NumPy: N = 1024 4.4e-7, 4096 8.6e-7, largest 1.7e-6, 3.5e-6): in
#: parts of 1024 that is 2.4e-7 for 4096 terms, and 2e-6 of the kernel is kept. Every part passes over the tile once.
_TERMS = 1024
#: Most matrices of one call of cuBLAS.
_STACK = 1 << 15
_SQUARE = 32  # of csrc/cuda/jacobian.cu


@dataclass(frozen=True)
class Work:
    """One call: the factors of both sides, on the device or not, and the way of every layer."""

    left: Sequence[Factor]
    right: Sequence[Factor]
    ways: Sequence[str]
    symmetric: bool
    per_layer: bool

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left[0]), len(self.right[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.left[0].inputs.dtype)


def rows_of(gpu: Gpu, x: Any, dtype: np.dtype[Any]) -> Any:
    """(n p, features) with contiguous rows; a copy only if the dtype or the layout forces one."""
    x = x if x.dtype == dtype else x.astype(dtype)
    if x.ndim == 3 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim == 3:
        return gpu.cupy.ascontiguousarray(x).reshape(-1, x.shape[-1])
    return x if contiguous_rows(x) else gpu.cupy.ascontiguousarray(x)


def refuse_infinite(gpu: Gpu, rows: Any, n: int, name: str) -> None:
    """One pass over the rows of n samples."""
    largest = norms(gpu, rows)[1]
    if not np.isfinite(largest).all():
        row = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise ValueError(f"{name} must be finite: sample {row // (len(rows) // n)} holds NaN or infinity")


def bytes_per_sample(factors: Sequence[Factor]) -> int:
    return sum(f.positions * (f.inputs.shape[1] + f.deltas.shape[1]) * int(f.inputs.itemsize) for f in factors)


def fill(
    gpus: Backend, out: Any, left: Sequence[Factor], right: Sequence[Factor] | None, *, per_layer: bool, progress: Any
) -> None:
    """As ntkfast._contract.fill, on GPUs; factors and result are on the device or in host memory."""
    if index_of(left[0].inputs) is None:
        # Factors in host memory: all of them on the device, or those of a tile of rows and one of columns.
        size, n, m = bytes_per_sample(left), len(left[0]), None if right is None else len(right[0])
        memory = gpus.free_bytes() // 2
        rows = sample_tiles(n, m, size, memory)
        if rows is not None:
            cols = None if m is None else sample_tiles(m, n, size, memory)

            def part(span: slice, first: bool) -> list[Factor]:
                return [f.part(span) for f in (left if first or right is None else right)]

            in_tiles(partial(_fill, gpus), part, out, rows, cols, per_layer=per_layer, progress=progress)
            return
    _fill(gpus, out, left, right, per_layer=per_layer, progress=progress)


def _fill(
    gpus: Backend, out: Any, left: Sequence[Factor], right: Sequence[Factor] | None, *, per_layer: bool, progress: Any
) -> None:
    symmetric, other = right is None, left if right is None else right
    work = Work(left, other, contractions(left, other, symmetric=symmetric), symmetric, per_layer)
    gpus.fill(work, [out], lambda gpu: Worker(gpu, work), progress, SIDE, check=refuse_tile)
    if index_of(out) is not None:
        with gpus.here():
            refuse_on_device(out, symmetric)


class Worker(TileWorker):
    """The factors of one run on one GPU, and the launches of its tiles."""

    lanes = 2

    def __init__(self, gpu: Gpu, work: Work) -> None:
        self.gpu, self.work = gpu, work
        self.suffix = layout.suffix_of(work.dtype)
        self.left = [self._here(f) for f in work.left]
        self.right = self.left if work.symmetric else [self._here(f) for f in work.right]
        # Plain products come last: the last of them writes the mirror image.
        kind = [(way == "products") + (way == "products" and a.positions * b.positions == 1)
                for way, a, b in zip(work.ways, work.left, work.right, strict=True)]  # fmt: skip
        self.order = sorted(range(len(kind)), key=kind.__getitem__)
        self.plain = [k == 2 for k in kind]

    def _here(self, factor: Factor) -> Factor:
        if index_of(factor.inputs) is not None:
            return factor
        return Factor(self.gpu.upload(factor.inputs), self.gpu.upload(factor.deltas), factor.positions)

    def scratch(self, side: int) -> tuple[list[Any], list[Any]]:
        """Two buffers for products and two for weight gradients, as large as the layers need them."""
        products, gradients = 0, 0
        for h, (a, b) in enumerate(zip(self.left, self.right, strict=True)):
            if self.work.ways[h] == "gradients":
                samples = min(side, max(len(a), len(b)))
                whole = samples * a.inputs.shape[1] * a.deltas.shape[1]
                # Not the parts of the largest tile: smaller ones have larger parts, and may fill the buffer better.
                most = max(samples, _GRADIENTS // self.work.dtype.itemsize)
                gradients = max(gradients, min(whole, most))
            else:
                most = side if self.plain[h] else SIDE
                rows = [min(max(1, most // f.positions), side, len(f)) * f.positions for f in (a, b)]
                products = max(products, math.prod(rows))
        empty = self.gpu.empty
        return ([empty((size,), self.work.dtype) for size in (products, products) if size],
                [empty((size,), self.work.dtype) for size in (gradients, gradients) if size])  # fmt: skip

    def launch(self, tile: Tile, scratch: Any, views: Sequence[Any], mirrors: Sequence[Any]) -> None:
        (out,), (mirror,), (products, gradients) = views, mirrors, scratch
        each = self.work.per_layer
        for k, h in enumerate(self.order):
            first, last = each or k == 0, each or k == len(self.order) - 1
            to, back = (out[h], None if mirror is None else mirror[h]) if each else (out, mirror)
            back = back if last else None
            a, b = self.left[h], self.right[h]
            if self.plain[h]:
                p, q = self._products(a.part(tile.rows), b.part(tile.cols), products)
                multiply_add(self.gpu, self.suffix, to, back, tile.diagonal, first, p, q)
                continue
            if self.work.ways[h] == "products":
                self._add_positions(to, a, b, tile, first, products)
            else:
                self._add_gradients(to, a.part(tile.rows), b.part(tile.cols), tile.diagonal, first, gradients)
            if back is not None:
                multiply_add(self.gpu, self.suffix, to, back, tile.diagonal, False, None, None)

    def _products(self, x: Factor, y: Factor, buffers: Sequence[Any]) -> list[Any]:
        """A A'^T and D D'^T."""
        shape = len(x.inputs), len(y.inputs)
        found = [buffer[: shape[0] * shape[1]].reshape(*shape) for buffer in buffers]
        product(self.gpu, x.inputs, y.inputs, found[0])
        product(self.gpu, x.deltas, y.deltas, found[1])
        return found

    def _add_positions(self, to: Any, a: Factor, b: Factor, tile: Tile, first: bool, buffers: Sequence[Any]) -> None:
        """to (+)= sums over the positions of products."""
        i0, j0 = tile.rows.start, tile.cols.start
        for i in cuts(tile.rows, max(1, SIDE // a.positions)):
            x = a.part(i)
            for j in cuts(tile.cols, max(1, SIDE // b.positions)):
                if tile.diagonal and j.start < i.start:
                    continue
                y = b.part(j)
                p, q = self._products(x, y, buffers)
                part = to[i.start - i0 : i.stop - i0, j.start - j0 : j.stop - j0]
                multiply_sum(self.gpu, p, q, (a.positions, b.positions), part, first)

    def _add_gradients(self, to: Any, x: Factor, y: Factor, same: bool, first: bool, buffers: Sequence[Any]) -> None:
        """to (+)= products of explicit weight gradients, some parameters at a time."""
        samples, fan_in, fan_out = max(len(x), len(y)), x.inputs.shape[1], x.deltas.shape[1]
        for ins, outs in parameter_slices(samples, fan_in, fan_out, self.work.dtype.itemsize, _GRADIENTS):
            G = gradients_of(x, ins, outs, buffers[0])
            H = G if same else gradients_of(y, ins, outs, buffers[1])
            product(self.gpu, G, H, to, accumulate=not first)
            first = False


def _matrix(x: Any) -> tuple[Any, np.int64]:
    """Address and row stride as arguments of a kernel."""
    return _pointer(x), np.int64(0 if x is None else row_stride(x))


def _pointer(x: Any) -> Any:
    """An array as argument of a kernel; None is the null pointer, which CuPy would take for a missing argument."""
    return np.uint64(0) if x is None else x


def product(gpu: Gpu, x: Any, y: Any, out: Any, accumulate: bool = False) -> None:
    """out (+)= x y^T; float32 in parts of so many terms that their errors stay small."""
    length = x.shape[1]
    for part in cuts(slice(0, length), _TERMS if x.dtype == np.float32 else length):
        gpu.product(x[:, part], y[:, part], out, accumulate=accumulate or part.start > 0)


def multiply_add(gpu: Gpu, suffix: str, to: Any, mirror: Any, upper: bool, first: bool, p: Any, q: Any) -> None:
    """to (+)= p q, or nothing without p; then its mirror image. `upper`: half of a tile of the diagonal."""
    (rows, cols), name = to.shape, "multiply_add"
    gpu.launch(
        "jacobian", f"{name}_{suffix}", -(-rows // _SQUARE) * -(-cols // _SQUARE), layout.THREADS,
        layout.SHARED[name, suffix], np.int64(rows), np.int64(cols), np.int32(upper), np.int32(first),
        *_matrix(p), *_matrix(q), *_matrix(to), *_matrix(mirror),
    )  # fmt: skip


def gradients_of(factor: Factor, ins: slice, outs: slice, buffer: Any) -> Any:
    """Weight gradients of every sample, (n, inputs * outputs), for some inputs and outputs of the layer."""
    A, D = (cast(Any, x) for x in factor.blocks)
    gpu = Gpu(A.device.id)
    shape = len(factor), ins.stop - ins.start, outs.stop - outs.start
    G = buffer[: math.prod(shape)].reshape(*shape)
    for part in cuts(slice(0, shape[0]), _STACK):
        gpu.multiply(A[part, :, ins], D[part, :, outs], G[part], transposed=(True, False))
    return G.reshape(shape[0], -1)


def multiply_sum(gpu: Gpu, p: Any, q: Any, positions: tuple[int, int], out: Any, first: bool) -> None:
    """out_ij (+)= sum over positions l, r of p_(il)(jr) q_(il)(jr)."""
    (rows, cols), suffix, name = out.shape, layout.suffix_of(out.dtype), "multiply_sum"
    group = min(layout.THREADS, 1 << (positions[1].bit_length() - 1))
    blocks = -(-rows * cols // (layout.THREADS // group))
    gpu.launch("jacobian", f"{name}_{suffix}", blocks, layout.THREADS, layout.SHARED[name, suffix],
               np.int64(rows), np.int64(cols), np.int64(positions[0]), np.int64(positions[1]), np.int32(group),
               np.int32(first), p, q, np.int64(row_stride(p)), *_matrix(out))  # fmt: skip


def diagonal_of(gpu: Gpu, factor: Factor) -> Any:
    """Squared norms of the weight gradients of every sample, (n,) float64 in host memory."""
    if index_of(factor.inputs) is None:
        step = max(1, _GRADIENTS // bytes_per_sample([factor]))
        parts = [factor.part(rows) for rows in cuts(slice(0, len(factor)), step)]
        return np.concatenate([
            diagonal_of(gpu, Factor(gpu.upload(f.inputs), gpu.upload(f.deltas), f.positions)) for f in parts
        ])  # fmt: skip
    if factor.positions == 1:
        return norms(gpu, factor.inputs)[0] * norms(gpu, factor.deltas)[0]
    n, p, dtype = len(factor), factor.positions, factor.inputs.dtype
    fan_in, fan_out = factor.inputs.shape[1], factor.deltas.shape[1]
    result = np.zeros(n)
    if p * (fan_in + fan_out) <= fan_in * fan_out and p * p * dtype.itemsize <= _GRADIENTS:
        for rows in cuts(slice(0, n), min(_STACK, max(1, _GRADIENTS // (p * p * dtype.itemsize)))):
            A, D = factor.part(rows).blocks
            P, Q = (gpu.empty((len(A), p, p), dtype) for _ in range(2))
            gpu.multiply(A, A, P, transposed=(False, True))
            gpu.multiply(D, D, Q, transposed=(False, True))
            sums = gpu.empty((len(A), 1), dtype)
            multiply_sum(gpu, P.reshape(len(A), -1), Q.reshape(len(A), -1), (1, p * p), sums, True)
            result[rows] = sums.get()[:, 0]
        return result
    step = min(_STACK, max(1, _GRADIENTS // (fan_in * fan_out * dtype.itemsize)))
    for rows in cuts(slice(0, n), step):
        x = factor.part(rows)
        for ins, outs in parameter_slices(len(x), fan_in, fan_out, dtype.itemsize, _GRADIENTS):
            size = len(x) * (ins.stop - ins.start) * (outs.stop - outs.start)
            result[rows] += norms(gpu, gradients_of(x, ins, outs, gpu.empty((size,), dtype)))[0]
    return result


# Products and tangents of finite networks (ntkfast._products); on CuPy's arrays and its current stream


def times(x: Any, W: Any, transposed: bool) -> Any:
    """x W or x W^T."""
    gpu, flat = Gpu(x.device.id), x.reshape(-1, x.shape[-1])
    flat, W = (a if contiguous_rows(a) else gpu.cupy.ascontiguousarray(a) for a in (flat, W))
    out = gpu.empty((len(flat), len(W) if transposed else W.shape[1]), x.dtype)
    gpu.multiply(flat, W, out, transposed=(False, transposed))
    return out.reshape(*x.shape[:-1], out.shape[1])


def squared(x: Any) -> Any:
    """x x^T, exactly symmetric."""
    gpu, suffix, out = Gpu(x.device.id), layout.suffix_of(x.dtype), times(x, x, True)
    multiply_add(gpu, suffix, out, out, True, False, None, None)
    return out


def combine(out: Any, u: Any, x: Any, v: Any, y: Any, coef: Any = None, row: Any = None) -> Any:
    """u[a] x[c, a] + v[a] y[c, a] + coef[c, a] row[c], in one pass."""
    one = x if x is not None else row
    gpu, suffix = Gpu(one.device.id), layout.suffix_of(one.dtype)
    shape = x.shape if x is not None else (*coef.shape, row.shape[1])
    out = gpu.empty(shape, one.dtype) if out is None else out
    number = not hasattr(v, "shape")
    terms = (u, x, None if number else v, y, coef, row)
    arrays = [_pointer(None if a is None else gpu.cupy.ascontiguousarray(a)) for a in terms]
    gpu.launch("jacobian", f"combine_{suffix}", shape[0] * shape[1], layout.THREADS, 0, np.int64(shape[1]),
               np.int64(shape[2]), *arrays[:3], one.dtype.type(v if number else 1), *arrays[3:], out)  # fmt: skip
    return out

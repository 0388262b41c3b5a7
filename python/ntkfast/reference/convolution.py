"""Convolutional networks (MATH.md, sections 3 and 3b): all pairs of positions, windows slot by slot.

For images x, y and positions l of x, r of y: S_lr = lim <x_l, y_r>, means a_l, b_r, and T_lr, the tangent kernel of the
layers so far with an independent readout at every position. D_l(k) is the position that slot k of the window around l
reads, none outside the image. A layer with numbers (p, q, r, cw, cb) of :mod:`~ntkfast.reference.recursion` maps

    C_lr  = cw sum_k S_{D_l(k) D_r(k)} + cb               TC_lr = cw sum_k (T + w S)_{D_l(k) D_r(k)} + w cb
    S'_lr = p^2 S_lr + p q (a_l mu_r + b_r mu_l) + r Q[C]_lr      T'_lr = p^2 T_lr + r D[C]_lr TC_lr

cw = weight variance, divided by the number of slots if windows are averaged. Readout: sum over l = r (flatten), mean
over all l, r (gap). Memory is n m positions^2.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkfast.convolution import ConvNetwork
from ntkfast.layers import Dense
from ntkfast.reference.duals import c_sigma, expectations, mean

Array = NDArray[np.float64]


class Layer(NamedTuple):
    """What the recursion needs of one layer; w is 1 or 0, whether it is trained."""

    p: float
    q: float
    r: float
    cw: float
    cb: float
    w: float
    activation: Any


def layers(net: ConvNetwork, slots: int) -> list[Layer]:
    """The numbers of all layers."""
    made = []
    for layer in net.layers:
        cw = layer.weight_variance / slots if net.average else layer.weight_variance
        if isinstance(layer, Dense):
            gain = c_sigma(layer.activation) if layer.gain is None else layer.gain
            p, q, r = 0.0, math.sqrt(gain), gain
        else:
            p, q, r = layer.skip, layer.scale, layer.scale**2
        made.append(Layer(p, q, r, cw, layer.bias_variance, float(layer.trained), layer.activation))
    return made


def slots(grid: tuple[int, ...], window: tuple[int, ...], padding: str) -> NDArray[np.int64]:
    """D_l(k), shape (slots, positions); -1 outside the image."""
    positions = list(itertools.product(*(range(size) for size in grid)))
    table = []
    for offset in itertools.product(*(range(-(w // 2), w // 2 + 1) for w in window)):
        row = []
        for position in positions:
            at = [a + d for a, d in zip(position, offset, strict=True)]
            if padding == "circular":
                at = [a % size for a, size in zip(at, grid, strict=True)]
            inside = all(0 <= a < size for a, size in zip(at, grid, strict=True))
            row.append(int(np.ravel_multi_index(at, grid)) if inside else -1)
        table.append(row)
    return np.array(table)


def patch_sum(D: NDArray[np.int64], S: Array) -> Array:
    """sum_k S_{D_l(k) D_r(k)} over the last two axes."""
    padded = np.zeros((*S.shape[:-2], S.shape[-2] + 1, S.shape[-1] + 1))
    padded[..., :-1, :-1] = S  # -1 reads the zeros
    total: Array = np.sum([padded[..., row[:, None], row[None, :]] for row in D], axis=0)
    return total


def patch_sum_adjoint(D: NDArray[np.int64], B: Array) -> Array:
    """sum_k sum_{l: D_l(k) = s} sum_{r: D_r(k) = t} B_lr."""
    padded = np.zeros((*B.shape[:-2], B.shape[-2] + 1, B.shape[-1] + 1))
    for row in D:
        for l, s in enumerate(row):
            for r, t in enumerate(row):
                padded[..., s, t] += B[..., l, r]
    return padded[..., :-1, :-1]


class _State(NamedTuple):
    Sx: Array  # (n, 1, p, 1) variances of x
    Sy: Array  # (1, m, 1, p) variances of y
    S: Array  # (n, m, p, p)
    a: Array
    b: Array


class _Step(NamedTuple):
    k: Layer
    C: Array  # cw patch sum of S, without the bias
    D: Array


def _images(net: ConvNetwork, X: ArrayLike, data_format: str) -> tuple[Array, tuple[int, ...]]:
    X = np.asarray(X, dtype=np.float64)
    if data_format == "channels_first":
        X = np.moveaxis(X, 1, -1)
    if X.ndim not in (3, 4):
        raise ValueError(f"images must be (n, *grid, channels) with one or two grid axes, got shape {X.shape}")
    return X.reshape(len(X), -1, X.shape[-1]), X.shape[1:-1]


def _variances(D: NDArray[np.int64], V: Array) -> Array:
    """sum_k V_{D_l(k)} for arrays (n, p)."""
    padded = np.concatenate([V, np.zeros((len(V), 1))], axis=1)
    total: Array = np.sum([padded[:, row] for row in D], axis=0)
    return total


def _exact(C: Array, A: Array) -> None:
    """A position of an image has exactly angle 0 with itself, whatever the rounding of C; C (n, n, p, p), A (n, p)."""
    i, l = np.ogrid[: A.shape[0], : A.shape[1]]
    C[i, i, l, l] = A


def _forward(
    net: ConvNetwork, X: Array, Y: Array, grid: tuple[int, ...], *, symmetric: bool
) -> tuple[list[_Step], _State, Array]:
    window = net.windows(len(grid))
    D = slots(grid, window, net.padding)
    S = np.einsum("ilc,jrc->ijlr", X, Y)
    Vx, Vy = np.sum(X * X, axis=2), np.sum(Y * Y, axis=2)
    a, b = np.zeros_like(Vx), np.zeros_like(Vy)
    T, steps = np.zeros_like(S), []
    for k in layers(net, len(D)):
        C = k.cw * patch_sum(D, S)
        A, B = k.cw * _variances(D, Vx) + k.cb, k.cw * _variances(D, Vy) + k.cb
        if symmetric:
            _exact(C, A - k.cb)
        pre = C + k.cb
        if symmetric:
            _exact(pre, A)
        Q, E = expectations(k.activation, A[:, None, :, None], B[None, :, None, :], pre)
        Qx, Qy = expectations(k.activation, A, A, A)[0], expectations(k.activation, B, B, B)[0]
        mx, my = mean(k.activation, A), mean(k.activation, B)
        steps.append(_Step(k, C, E))
        T = k.p**2 * T + k.r * E * (k.cw * patch_sum(D, T) + k.w * (C + k.cb))
        cross = a[:, None, :, None] * my[None, :, None, :] + mx[:, None, :, None] * b[None, :, None, :]
        S = k.p**2 * S + k.p * k.q * cross + k.r * Q
        Vx = k.p**2 * Vx + 2 * k.p * k.q * a * mx + k.r * Qx
        Vy = k.p**2 * Vy + 2 * k.p * k.q * b * my + k.r * Qy
        a, b = k.p * a + k.q * mx, k.p * b + k.q * my
    return steps, _State(Vx, Vy, S, a, b), T


def _read(net: ConvNetwork, K: Array) -> Array:
    """The readout's sum over positions."""
    pooled = K.mean(axis=(2, 3)) if net.pooling == "gap" else np.einsum("ijll->ij", K)
    result: Array = net.readout.weight_variance * pooled
    return result


def _kernels(net: ConvNetwork, X: Array, Y: Array, grid: tuple[int, ...]) -> dict[str, Array]:
    steps, end, T = _forward(net, X, Y, grid, symmetric=X is Y)
    last = steps[-1]
    return {
        "ntk": _read(net, T + float(net.readout.trained) * end.S),
        "nngp": _read(net, end.S),
        "last_hidden": _read(net, last.k.r * last.D * last.C),
    }


def gram(
    net: ConvNetwork, X: ArrayLike, Y: ArrayLike | None = None, data_format: str = "channels_last"
) -> dict[str, Array]:
    """ "ntk", "nngp" and "last_hidden" between the images of X and of Y.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> from ntkfast.reference import convolution
    >>> convolution.gram(nf.conv_net(depth=1, window=1), np.eye(2)[None])["ntk"]
    array([[4.]])
    """
    x, grid = _images(net, X, data_format)
    y, other = (x, grid) if Y is None else _images(net, Y, data_format)
    if grid != other:
        raise ValueError(f"grids differ: {grid} and {other}")
    return _kernels(net, x, y, grid)


def diagonals(net: ConvNetwork, X: ArrayLike, data_format: str = "channels_last") -> dict[str, Array]:
    """The diagonals of :func:`gram`, image by image."""
    x, grid = _images(net, X, data_format)
    each = [_kernels(net, image, image, grid) for image in x[:, None]]
    return {name: np.array([k[name][0, 0] for k in each]) for name in each[0]}


def layer_grams(
    net: ConvNetwork, X: ArrayLike, Y: ArrayLike | None = None, data_format: str = "channels_last"
) -> Array:
    """G^(1), ..., G^(H), readout, of the trained ones, by the backward recursion: (P, n, m).

    B^(H) is the identity (flatten) or 1/positions^2 everywhere (gap), and

        G^(h) = sum_lr r C_lr D_lr B_lr,   B^(h-1) = p^2 B + adjoint patch sum of r cw D B.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> from ntkfast.reference import convolution
    >>> convolution.layer_grams(nf.conv_net(depth=1, window=1), np.eye(2)[None]).ravel()
    array([2., 2.])
    """
    x, grid = _images(net, X, data_format)
    y = x if Y is None else _images(net, Y, data_format)[0]
    steps, end, _ = _forward(net, x, y, grid, symmetric=x is y)
    D = slots(grid, net.windows(len(grid)), net.padding)
    p = end.S.shape[-1]
    B = np.full_like(end.S, 1 / p**2) if net.pooling == "gap" else np.broadcast_to(np.eye(p), end.S.shape)
    B = net.readout.weight_variance * B
    grams = [np.sum(B * end.S, axis=(2, 3))] if net.readout.trained else []
    for k, C, E in reversed(steps):
        if k.w:
            grams.append(np.sum(k.r * E * (C + k.cb) * B, axis=(2, 3)))
        B = k.p**2 * B + patch_sum_adjoint(D, k.r * k.cw * E * B)
    return np.array(grams[::-1]).reshape(len(grams), *end.S.shape[:2])

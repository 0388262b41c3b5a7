"""The tangent kernel of conv_net(depth) of ReLU, windows of 3x3, zero padding, of two images in long double.

By half squared distances E of patches beside their variances, as sums of window offsets over whole arrays: the angle of
two patches that are alike comes from E, so that it has all the digits of the format (18 on x86-64). Patches that are
parallel, but not equal, would lose half of them.
"""

from __future__ import annotations

import itertools

import numpy as np

Array = np.ndarray

if np.finfo(np.longdouble).eps > 1e-18:
    raise ImportError("long double is no longer than double on this machine")

PI = np.longdouble("3.14159265358979323846264338327950288")
SLOTS = np.longdouble(9)


def _window(padded: Array, axes: int) -> Array:
    """Sums over the nine offsets, the same for both positions of a pair; arrays with a frame of one."""
    total = np.zeros([size - 2 for size in padded.shape], np.longdouble)
    for dy, dx in itertools.product(range(3), repeat=2):
        cut = (slice(dy, dy + total.shape[0]), slice(dx, dx + total.shape[1])) * (axes // 2)
        total += padded[tuple(slice(c.start, c.start + size) for c, size in zip(cut, total.shape, strict=True))]
    return total / SLOTS


def _framed(inner: Array) -> Array:
    return np.pad(inner, 1)


def _halves(a: Array, b: Array, pooled: bool) -> tuple[Array, Array]:
    """Variances of the left and of the right position of every pair, to be broadcast."""
    return (a[:, :, None, None], b[None, None]) if pooled else (a, b)


def ntk(x: Array, y: Array, depth: int, *, pooled: bool) -> np.longdouble:
    """Images (height, width, channels); readout of the mean over positions, or of all of them."""
    x, y = x.astype(np.longdouble), y.astype(np.longdouble)
    a, b = (x * x).sum(axis=2), (y * y).sum(axis=2)
    left, right = (x[:, :, None, None], y[None, None]) if pooled else (x, y)
    E = ((left - right) ** 2).sum(axis=-1) / 2
    T = np.zeros_like(E)
    axes, inner = E.ndim, (slice(1, -1),) * E.ndim
    S = (sum(_halves(a, b, pooled)) / 2) - E
    for _ in range(depth):
        # Outside an image there are zeros, half of whose squared distance to a patch is half its square.
        p, q = _halves(_framed(a), _framed(b), pooled)
        framed = (p + q) / 2
        framed[inner] = E
        E, T = _window(framed, axes), _window(_framed(T), axes)
        a, b = _window(_framed(a), 2), _window(_framed(b), 2)
        S, T, E = _relu(E, T, *_halves(a, b, pooled))
    total = (T + S).sum()
    return total / a.size**2 if pooled else total


def _relu(E: Array, T: Array, a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Covariance, tangent kernel and half squared distance after the activation of gain 2."""
    rx, ry = np.sqrt(a), np.sqrt(b)
    g, total = rx * ry, rx + ry
    radial = (a - b) ** 2 / np.where(total > 0, total, 1) ** 2 / 2  # half the squared difference of the lengths
    u = np.clip((E - radial) / np.where(g > 0, g, 1), 0, 2)  # 1 - cos
    u = np.where(g > 0, u, 1)
    angle = 2 * np.arcsin(np.sqrt(u / 2))
    drop = u - (np.sin(angle) - angle * (1 - u)) / PI  # 1 - kappa_1
    D = np.where(g > 0, 1 - angle / PI, 0)
    return g * (1 - drop), D * (T + g * (1 - u)), radial + g * drop

"""The same kernel, fully_connected(depth) of ReLU, by other means, each as a skilled user would run it.

numpy            blocks of rows that stay in cache, upper half only, then mirrored; NumPy's vectorised arccos
numba            BLAS product, upper half, threads over pairs of rows of equal total length, fastmath, inner loops over
                 512 columns in cache; arccos is that of the C library, one at a time (no SVML in wheels)
neural-tangents  stax, float64 switched on, symmetric call (x2=None); compiled as a whole, and layer by layer

None of them treats close pairs specially. A rival is given its product for nothing: what counts against it is its time
beyond its own X X^T.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rival:
    """`gram` returns the kernel; `product` does only the inner products, the way this rival does them."""

    name: str
    gram: Callable[[], Any]
    product: Callable[[], Any]


def numpy_rival(x: np.ndarray, depth: int) -> Rival:
    """Plain NumPy, written with care."""
    n, norm = len(x), np.linalg.norm(x, axis=1)
    out = np.empty((n, n), dtype=x.dtype)
    inv_pi = x.dtype.type(1 / math.pi)

    def gram() -> np.ndarray:
        np.matmul(x, x.T, out=out)
        for start in range(0, n, 16):
            stop = min(start + 16, n)
            scale = np.outer(norm[start:stop], norm[start:])
            rho = np.clip(out[start:stop, start:] / scale, -1, 1)
            np.fill_diagonal(rho, 1)
            theta = rho.copy()
            for _ in range(depth):
                kappa0 = 1 - np.arccos(rho) * inv_pi
                rho = np.minimum(np.sqrt(1 - rho * rho) * inv_pi + rho * kappa0, 1)
                theta = theta * kappa0 + rho
            out[start:stop, start:] = theta * scale
            out[start:, start:stop] = out[start:stop, start:].T
        return out

    return Rival("NumPy", gram, lambda: np.matmul(x, x.T, out=out))


def _numba_kernels(one: Any, inv_pi: Any, width: int = 512) -> tuple[Any, Any]:
    """(fill, mirror) for the dtype of the constants."""
    from numba import njit, prange

    @njit(fastmath=True, error_model="numpy")
    def fill_row(K, norm, depth, i, rho, theta):
        for start in range(i, K.shape[0], width):
            size = min(width, K.shape[0] - start)
            for j in range(size):
                value = min(max(K[i, start + j] / (norm[i] * norm[start + j]), -one), one)
                rho[j] = one if start + j == i else value
                theta[j] = rho[j]
            for _ in range(depth):
                for j in range(size):
                    kappa0 = one - math.acos(rho[j]) * inv_pi
                    kappa1 = min(math.sqrt(one - rho[j] * rho[j]) * inv_pi + rho[j] * kappa0, one)
                    theta[j] = kappa1 + theta[j] * kappa0
                    rho[j] = kappa1
            for j in range(size):
                K[i, start + j] = theta[j] * (norm[i] * norm[start + j])

    @njit(parallel=True)
    def fill(K, norm, depth):
        n = K.shape[0]
        for pair in prange((n + 1) // 2):  # a long row and a short one: threads get equal shares
            rho, theta = np.empty(width, K.dtype), np.empty(width, K.dtype)
            fill_row(K, norm, depth, pair, rho, theta)
            if pair != n - 1 - pair:
                fill_row(K, norm, depth, n - 1 - pair, rho, theta)

    @njit(parallel=True)
    def mirror(K):
        n, side = K.shape[0], 64
        for block in prange((n + side - 1) // side):
            rows = range(block * side, min(n, block * side + side))
            for other in range(block + 1):
                for i in rows:
                    for j in range(other * side, min(i, other * side + side)):
                        K[i, j] = K[j, i]

    return fill, mirror


def numba_rival(x: np.ndarray, depth: int) -> Rival:
    """numba, compiled before the clock starts."""
    fill, mirror = _numba_kernels(x.dtype.type(1), x.dtype.type(1 / math.pi))
    norm = np.linalg.norm(x, axis=1)
    out = np.empty((len(x), len(x)), dtype=x.dtype)

    def gram() -> np.ndarray:
        np.matmul(x, x.T, out=out)
        fill(out, norm, depth)
        mirror(out)
        return out

    return Rival("numba", gram, lambda: np.matmul(x, x.T, out=out))


def neural_tangents_rivals(x: np.ndarray, depth: int) -> list[Rival]:
    """neural-tangents in two modes."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it imports TensorFlow, which logs to stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jax
        from neural_tangents import stax
    jax.config.update("jax_enable_x64", True)
    root = math.sqrt(2.0)
    layers = [stax.Dense(1, W_std=1.0), stax.Relu()]
    layers += [stax.Dense(1, W_std=root), stax.Relu()] * (depth - 1) + [stax.Dense(1, W_std=root)]
    # Its first layer divides the inner products by d.
    scaled = jax.numpy.asarray(x * x.dtype.type(math.sqrt(x.shape[1])))
    whole = jax.jit(lambda points: stax.serial(*layers)[2](points, None, "ntk"))
    start = jax.jit(lambda points: stax.Identity()[2](points, None, None))
    compiled = {id(layer): jax.jit(layer[2]) for layer in layers}  # equal layers share their code

    def by_layer() -> Any:
        kernel = start(scaled)
        for layer in layers:
            kernel = compiled[id(layer)](kernel)
        return jax.block_until_ready(kernel.ntk)

    dot = jax.jit(lambda points: points @ points.T)

    def product() -> Any:
        return jax.block_until_ready(dot(scaled))

    return [
        Rival("neural-tangents, each layer jitted", by_layer, product),
        Rival("neural-tangents, whole network jitted", lambda: jax.block_until_ready(whole(scaled)), product),
    ]


def rivals(x: np.ndarray, depth: int) -> tuple[list[Rival], list[str]]:
    """Those that are installed, and a line for each that is not."""
    found, missing = [numpy_rival(x, depth)], []
    try:
        found.append(numba_rival(x, depth))
    except ImportError as error:
        missing.append(f"numba: {error}")
    try:
        found += neural_tangents_rivals(x, depth)
    except ImportError as error:
        missing.append(f"neural-tangents: {error}")
    return found, missing


def versions() -> dict[str, str]:
    """Of the rivals that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("numba", "neural-tangents", "jax", "jaxlib", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

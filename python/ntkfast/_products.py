"""Products of matrices and sums of tangents where the arrays are: by NumPy, or by cuBLAS and csrc/cuda/jacobian.cu."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._contract import Factor
from ntkfast._cuda import jacobian as gpu_jacobian

Array = NDArray[Any]


def on_host(x: Any) -> bool:
    """True for NumPy's arrays; False for CuPy's, the only others that get this far."""
    return isinstance(x, np.ndarray)


def times(x: Array, W: Array, transposed: bool = False) -> Any:
    """x W or x W^T, (..., k) and (k, m) or (m, k) to (..., m), as one product."""
    if not on_host(x):
        return gpu_jacobian.times(x, W, transposed)
    flat: Array = x.reshape(-1, x.shape[-1]) @ (W.T if transposed else W)
    return flat.reshape(*x.shape[:-1], -1)


def squared(x: Array) -> Any:
    """x x^T, exactly symmetric."""
    if not on_host(x):
        return gpu_jacobian.squared(x)
    result: Array = x @ x.T
    _core.mirror(result, result)
    return result


def combine(
    out: Array | None, u: Array | None, x: Array | None, v: Array | float, y: Array | None, coef: Any = None,
    row: Any = None,
) -> Any:  # fmt: skip
    """u[a] x[c, a] + v[a] y[c, a] + coef[c, a] row[c], (c, a, features). No x: the third term alone; no u: 1.

    u and v (a, features), v also a number; coef (c, a), row (c, features). ``out`` may be x: then in its place.
    """
    if not on_host(row if x is None else x):
        return gpu_jacobian.combine(out, u, x, v, y, coef, row)
    if x is None:
        return coef[:, :, None] * row[:, None, :]
    total: Array = x if u is None and out is x else np.multiply(x, 1 if u is None else u, out=out)
    if y is not None:
        total += np.multiply(v, y)
    if row is not None:
        total += coef[:, :, None] * row[:, None, :]
    return total


def add_products(to: Array, left: Array, right: Array) -> None:
    """to[c] += left[c] * right, for matrices of pairs."""
    if not on_host(to):
        gpu_jacobian.combine(to, right, left, 1.0, to)
        return
    for c in range(len(to)):
        _core.multiply_add(to[c], left[c], right)


def weight_gradients(factor: Factor, out: Array) -> None:
    """out = weight gradients of every sample, (n, fan_in fan_out)."""
    A, D = factor.blocks
    if not on_host(A):
        gpu_jacobian.gradients_of(factor, slice(0, A.shape[2]), slice(0, D.shape[2]), out.reshape(-1))
        return
    np.matmul(A.transpose(0, 2, 1), D, out=out.reshape(len(factor), A.shape[2], D.shape[2]))

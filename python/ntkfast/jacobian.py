"""Jacobian inner products of finite networks from layer inputs and output gradients, without a Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ntkfast import _contract
from ntkfast._arrays import as_numpy, check_memory, result_dtype
from ntkfast._contract import Factor
from ntkfast._cuda import jacobian as gpu_jacobian
from ntkfast._cuda.device import find_place
from ntkfast._cuda.gram import Backend
from ntkfast._overflow import quiet, refuse

Array = NDArray[Any]


class LayerFactors(NamedTuple):
    """What one weight matrix adds to Jacobian inner products: df/dW of sample i is sum_l deltas[i, l] inputs[i, l]^T.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> X, a = np.eye(3), np.array([1.0, -1.0])
    >>> linear = nf.LayerFactors(X, np.tile(a, (3, 1)))  # f = a . W x, the gradient in W is a x^T
    >>> nf.jacobian_gram([linear])
    array([[2., 0., 0.],
           [0., 2., 0.],
           [0., 0., 2.]])
    """

    inputs: Any  #: A, (n, fan_in) or (n, positions, fan_in)
    deltas: Any  #: D, (n, fan_out) or (n, positions, fan_out)


class Side(NamedTuple):
    """Checked factors of one set of samples."""

    factors: list[Factor]
    n: int
    dtype: np.dtype[Any]
    wrap: Callable[[Array], Any]


def _rows(x: Array, dtype: np.dtype[Any]) -> Array:
    """(n p, features) with contiguous rows; a copy only if the layout forces one."""
    x = np.asarray(x, dtype=dtype)
    if x.ndim == 3 and x.shape[1] == 1:
        x = x[:, 0]
    plain = x.flags.c_contiguous if x.ndim == 3 else x.strides[1] == x.itemsize or x.shape[1] == 1
    if not plain or x.strides[0] % x.itemsize or x.strides[0] < x.shape[-1] * x.itemsize or not x.flags.aligned:
        x = np.ascontiguousarray(x)
    return x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x


def _refuse_infinite(rows: Array, n: int, name: str) -> None:
    # One pass by the BLAS: the sum of a row is finite unless an entry is not (or the sum itself overflows).
    with np.errstate(all="ignore"):
        sums = rows @ np.ones(rows.shape[1], dtype=rows.dtype)
    for row in np.flatnonzero(~np.isfinite(sums)):
        if not np.isfinite(rows[row]).all():
            raise ValueError(f"{name} must be finite: sample {row // (len(rows) // n)} holds NaN or infinity")


def _pairs(factors: Any, name: str) -> list[Any]:
    """The list of pairs, so that their arrays can be looked at."""
    if isinstance(factors, LayerFactors) or not isinstance(factors, Sequence):
        raise TypeError(f"{name} must be a list of LayerFactors(inputs, deltas), got {type(factors).__name__}")
    if not factors:
        raise ValueError(f"{name} is empty: no layer, so nothing says how many samples there are")
    for k, item in enumerate(factors):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(f"{name}[{k}] must be LayerFactors(inputs, deltas), got {type(item).__name__}")
    return list(factors)


def backend_of(device: Any, **sides: Any) -> Backend | None:
    """Where the factors are to be multiplied: GPUs, or None for the CPU."""
    named = [
        (f"{name}[{k}].{part}", x)
        for name, factors in sides.items() if factors is not None
        for k, item in enumerate(_pairs(factors, name))
        for part, x in zip(("inputs", "deltas"), item, strict=True)
    ]  # fmt: skip
    place = find_place(device, *named)
    return None if place is None else Backend(place, named[0][1])


def _layer(item: Any, name: str, read: Callable[[Any, str], Any]) -> tuple[Any, Any, Callable[[Any], Any]]:
    (a, wrap), d = read(item[0], f"{name}.inputs"), read(item[1], f"{name}.deltas")[0]
    if a.ndim not in (2, 3) or d.ndim != a.ndim or a.shape[:-1] != d.shape[:-1]:
        raise ValueError(f"{name}: inputs {a.shape} and deltas {d.shape} must have shapes (n, fan_in) and "
                         "(n, fan_out), or (n, positions, fan_in) and (n, positions, fan_out)")  # fmt: skip
    if 0 in a.shape or 0 in d.shape:
        raise ValueError(f"{name} is empty: inputs {a.shape}, deltas {d.shape}")
    return a, d, wrap


def check_factors(factors: Any, name: str, gpu: Backend | None = None) -> Side:
    """Factors as a user hands them in; with `gpu`, those that are on it stay there."""
    there = gpu if gpu is not None and gpu.resident else None
    read: Callable[[Any, str], Any] = there.view if there else as_numpy
    layers = [_layer(item, f"{name}[{k}]", read) for k, item in enumerate(_pairs(factors, name))]
    n, wrap = len(layers[0][0]), layers[0][2]
    dtype = result_dtype(None, (f"{name}[0].inputs", layers[0][0]))
    checked = []
    for k, (a, d, _) in enumerate(layers):
        if len(a) != n:
            raise ValueError(f"{name}[{k}] has {len(a)} samples, {name}[0] has {n}")
        for part, x in (("inputs", a), ("deltas", d)):
            result_dtype(None, (f"{name}[0].inputs", layers[0][0]), (f"{name}[{k}].{part}", x))
        positions = a.shape[1] if a.ndim == 3 else 1
        inputs = _checked_rows(a, dtype, n, f"{name}[{k}].inputs", there)
        checked.append(Factor(inputs, _checked_rows(d, dtype, n, f"{name}[{k}].deltas", there), positions))
    return Side(checked, n, dtype, wrap)


def _checked_rows(x: Any, dtype: np.dtype[Any], n: int, name: str, gpu: Backend | None) -> Any:
    if gpu is not None:
        with gpu.here() as device:
            rows = gpu_jacobian.rows_of(device, x, dtype)
            gpu_jacobian.refuse_infinite(device, rows, n, name)
            return rows
    rows = _rows(x, dtype)
    _refuse_infinite(rows, n, name)
    return rows


def _check_pair(x: Side, y: Side) -> None:
    if len(x.factors) != len(y.factors):
        raise ValueError(f"factors has {len(x.factors)} layers and other has {len(y.factors)}")
    if x.dtype != y.dtype:
        raise TypeError(f"factors is {x.dtype} and other is {y.dtype}; convert one of them")
    for k, (a, b) in enumerate(zip(x.factors, y.factors, strict=True)):
        left, right = (a.inputs.shape[1], a.deltas.shape[1]), (b.inputs.shape[1], b.deltas.shape[1])
        if left != right:
            raise ValueError(f"layer {k}: factors has (fan_in, fan_out) = {left} and other has {right}")


def result_array(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: Sequence[Array]) -> Any:
    """The given array, checked, or a new one if it fits in memory."""
    if out is None:
        check_memory(int(np.prod(shape, dtype=object)) * dtype.itemsize, f"the result, {shape} {dtype},")
        return np.empty(shape, dtype=dtype)
    if tuple(getattr(out, "shape", ())) != shape:
        raise ValueError(f"out= has shape {getattr(out, 'shape', None)}, the result has {shape}")
    if np.dtype(out.dtype) != dtype:
        raise TypeError(f"out= has dtype {out.dtype}, the result has {dtype}")
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise ValueError("out= is read-only")
        if any(np.may_share_memory(out, x) and np.shares_memory(out, x) for x in inputs):
            raise ValueError("out= overlaps an input")
    return out


def fill(
    gpu: Backend | None, out: Any, left: Sequence[Factor], right: Sequence[Factor] | None, *, per_layer: bool,
    progress: Any,
) -> None:  # fmt: skip
    """Fill out, (n, m) or (layers, n, m), on the CPU or on GPUs."""
    if gpu is None:
        _contract.fill(out, left, right, per_layer=per_layer, progress=progress)
    else:
        gpu_jacobian.fill(gpu, out, left, right, per_layer=per_layer, progress=progress)


def allocate(
    gpu: Backend | None, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: Sequence[Any]
) -> Any:  # fmt: skip
    """:func:`result_array` where the inputs are."""
    if gpu is None:
        return result_array(out, shape, dtype, inputs)
    if out is None and gpu.resident:
        return gpu.empty([shape], dtype)[0]
    (view,) = [None] if out is None else gpu.views([out], inputs)
    return result_array(view, shape, dtype, [x for x in inputs if isinstance(x, np.ndarray)])


def jacobian_gram(
    factors: Sequence[Any], other: Sequence[Any] | None = None, *, per_layer: bool = False, device: Any = None,
    out: Any = None, progress: bool = False,
) -> Any:  # fmt: skip
    """Inner products of Jacobians: K_ij = sum over layers of <A_i, A'_j> <D_i, D'_j>, tile by tile.

    Parameters
    ----------
    factors : list of LayerFactors(inputs, deltas)
        Of n samples; from :meth:`FiniteNetwork.jacobian_factors`, :func:`ntkfast.torch.jacobian_factors` or your own
        code. One entry per weight matrix: the layer inputs A, (n, [p,] fan_in), and the gradients D of the output
        with respect to what the matrix produced, (n, [p,] fan_out), so that df/dW = sum over the positions p of D A^T.
        A bias is one more column of A, holding its amplitude. All float32 or all float64, all in one place: arrays on
        a GPU (CuPy, torch, JAX) are taken without a copy, on the current stream of the library they come from.
    other : list of LayerFactors, optional
        Of m other samples. ``None`` means the same ones: half the work, an exactly symmetric result.
    per_layer : bool
        One matrix per layer instead of their sum.
    device : None, "cpu", "cuda", "cuda:1" or a list of CUDA devices, optional
        ``None`` follows the factors. A GPU takes factors in host memory too, some samples at a time if they are larger
        than its memory, and gives a host array back. float32 products are true float32, never TF32.
    out : array, optional
        Where the result goes; anything with slice assignment, e.g. ``numpy.memmap``; or an array on the GPU of the
        factors with contiguous rows.
    progress : bool
        Show a progress bar (tqdm if installed).

    Returns
    -------
    array, shape (n, m), or (layers, n, m)
        Of the kind and dtype of the factors, where they are.

    Raises
    ------
    RuntimeError
        ``device`` is a GPU and CuPy, the driver or the GPU is missing.
    TypeError
        Not a list of pairs; dtypes differ or are not real.
    ValueError
        Shapes do not fit, an entry is not finite (names layer and sample), factors in different places.
    OverflowError
        An inner product of finite factors leaves the range of the dtype: names row, or row and column. Use float64, or
        smaller points. A given ``out`` may be filled in part.
    OutOfMemoryError
        The result does not fit in memory.

    Notes
    -----
    G^(h)_ij = <df_i/dW^(h), df_j/dW^(h)> (Du et al., arXiv 1811.03804, section 3). Products come from the BLAS in tiles
    that are multiplied and added in cache. With positions the sum over all pairs of them is taken from their products
    or from weight gradients sample by sample, whichever is cheaper; memory beyond inputs and result stays under 64 MB
    (1 GB on a GPU, where two streams share the products and the last bits may differ from call to call).

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> network = nf.init(nf.fully_connected(depth=2), 3, width=64, seed=0)
    >>> factors = network.jacobian_factors(np.eye(3))
    >>> nf.jacobian_gram(factors).shape, nf.jacobian_gram(factors, per_layer=True).shape
    ((3, 3), (3, 3, 3))
    """
    gpu = backend_of(device, factors=factors, other=other)
    x = check_factors(factors, "factors", gpu)
    y = None if other is None else check_factors(other, "other", gpu)
    if y is not None:
        _check_pair(x, y)
    shape = (x.n, x.n if y is None else y.n)
    sides = [x] if y is None else [x, y]
    inputs = [array for side in sides for f in side.factors for array in (f.inputs, f.deltas)]
    result = allocate(gpu, out, (len(x.factors), *shape) if per_layer else shape, x.dtype, inputs)
    fill(gpu, result, x.factors, None if y is None else y.factors, per_layer=per_layer, progress=progress)
    return x.wrap(result) if out is None else out


def jacobian_diagonal(factors: Sequence[Any], *, per_layer: bool = False, device: Any = None) -> Any:
    """The diagonal of :func:`jacobian_gram` in O(n) time, (n,) or (layers, n); its sum is the trace of the matrix.

    Parameters and errors are those of :func:`jacobian_gram`.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> network = nf.init(nf.fully_connected(depth=2), 3, width=64, seed=0)
    >>> factors = network.jacobian_factors(np.eye(3))
    >>> bool(np.allclose(nf.jacobian_diagonal(factors), np.diag(nf.jacobian_gram(factors))))
    True
    """
    gpu = backend_of(device, factors=factors)
    side = check_factors(factors, "factors", gpu)
    with quiet():
        if gpu is None:
            rows = np.array([_contract.diagonal_of(factor) for factor in side.factors])
        else:
            with gpu.here() as one:
                rows = np.array([gpu_jacobian.diagonal_of(one, factor) for factor in side.factors])
        result = (rows if per_layer else rows.sum(axis=0)).astype(side.dtype)
    refuse(np.isfinite(result), side.dtype, 0)
    return side.wrap(result)

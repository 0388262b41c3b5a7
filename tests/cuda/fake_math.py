"""Elementwise functions, reductions and new arrays of the stand-in for CuPy (fake_cupy.py).

As CuPy's arrays do, they answer NumPy's functions (``__array_ufunc__``, ``__array_function__``), mix with numbers but
not with NumPy's arrays, and work when their stream does. ``@`` is refused: cupy.matmul follows the variable CUPY_TF32.
"""

from __future__ import annotations

import numbers

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

#: functions that CuPy has besides ufuncs
FUNCTIONS = {
    "broadcast_to", "empty_like", "full_like", "moveaxis", "ones_like", "sliding_window_view", "where", "zeros_like",
}  # fmt: skip


def _number(x):
    return isinstance(x, (numbers.Number, np.generic))


class Arithmetic(NDArrayOperatorsMixin):
    """What is asked of arrays in formulas; the class that inherits has _owner, _memory and _host."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **others):
        assert method == "__call__"
        assert not others
        assert ufunc is not np.matmul, "cupy.matmul follows CUPY_TF32: use Gpu.multiply"
        return self._owner.elementwise(ufunc, inputs, None if out is None else out[0])

    def __array_function__(self, function, types, args, kwargs):
        name = function.__name__
        if name not in FUNCTIONS:
            raise TypeError(f"numpy.{name} has no counterpart here")
        return getattr(self._owner, name)(*args, **kwargs)

    def swapaxes(self, a, b):
        return self._view(self._host.swapaxes(a, b))

    def diagonal(self, offset, axis1, axis2):
        assert min(axis1, axis2) >= 0
        return self._view(self._host.diagonal(offset, axis1, axis2))

    def transpose(self, *axes):
        return self._view(self._host.transpose(*axes))

    def _reduced(self, name, axis, **options):
        shape = getattr(np.empty(self.shape, np.int8), name)(axis=axis).shape
        dtype = np.dtype(bool) if name in ("all", "any") else options.get("dtype") or self.dtype
        return self._owner.later(shape, dtype, lambda x: getattr(x, name)(axis=axis, **options), [self])

    def all(self, axis=None):
        return self._reduced("all", axis)

    def any(self, axis=None):
        return self._reduced("any", axis)

    def sum(self, axis=None):
        return self._reduced("sum", axis)

    def mean(self, axis=None, dtype=None):
        return self._reduced("mean", axis, dtype=dtype)

    def __bool__(self):
        return bool(self.get())


class Functions:
    """What the module has; the class that inherits has empty() and give()."""

    def later(self, shape, dtype, function, inputs, out=None):
        """function(*inputs) when the stream comes to it, into `out` or new memory."""
        for x in inputs:
            assert not isinstance(x, self.ndarray) or x.device.id == self.device, "an array of another device"
            if not isinstance(x, self.ndarray) and not _number(x):
                raise TypeError(f"Unsupported type {type(x)}")
        if out is None:
            out = self.empty(shape, dtype)
        assert out.shape == tuple(shape)
        hosts = [x._host if isinstance(x, self.ndarray) else x for x in inputs]
        target = out._host

        def work():
            with np.errstate(all="ignore"):
                np.copyto(target, function(*hosts), casting="same_kind")

        self.give(work)
        return out

    def elementwise(self, function, inputs, out=None):
        arrays = [x for x in inputs if isinstance(x, self.ndarray)]
        probe = [np.ones((1,) * x.ndim, x.dtype) if isinstance(x, self.ndarray) else x for x in inputs]
        if not all(_number(x) or isinstance(x, self.ndarray) for x in inputs):
            raise TypeError("Unsupported type: only numbers mix with arrays of the device")
        with np.errstate(all="ignore"):
            dtype = np.asarray(function(*probe)).dtype
        return self.later(np.broadcast_shapes(*(x.shape for x in arrays)), dtype, function, inputs, out)

    def where(self, condition, x, y):
        assert isinstance(x, self.ndarray), "numbers alone may become float16"
        return self.elementwise(np.where, (condition, x, y))

    def isfinite(self, x):
        return self.elementwise(np.isfinite, (x,))

    def broadcast_to(self, x, shape):
        return x._view(np.broadcast_to(x._host, shape))

    def sliding_window_view(self, x, window_shape, axis=None):
        return x._view(np.lib.stride_tricks.sliding_window_view(x._host, window_shape, axis))

    def moveaxis(self, x, source, target):
        return x._view(np.moveaxis(x._host, source, target))

    def empty_like(self, x, dtype=None, shape=None):
        """Of order K, as NumPy's and CuPy's: Fortran's for x in Fortran's order."""
        shape = x.shape if shape is None else shape
        if x.flags.f_contiguous and not x.flags.c_contiguous and x.ndim == len(shape):
            return self.empty(shape[::-1], dtype or x.dtype).T
        return self.empty(shape, dtype or x.dtype)

    def full_like(self, x, value, dtype=None, shape=None):
        out = self.empty_like(x, dtype, shape)
        out.fill(value)
        return out

    def zeros_like(self, x, dtype=None, shape=None):
        return self.full_like(x, 0, dtype, shape)

    def ones_like(self, x, dtype=None, shape=None):
        return self.full_like(x, 1, dtype, shape)


def erf(x):
    """cupyx.scipy.special.erf."""
    from scipy.special import erf as function

    return x._owner.elementwise(function, (x,))

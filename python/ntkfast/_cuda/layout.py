"""The structs of csrc/cuda/job.cuh as NumPy dtypes, and a plan of a network on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: in the order of csrc/cuda/layout.cu, whose numbers the tests compare
NAMES = ("Job", "PrefixLayer64", "PrefixLayer32", "GeneralLayer", "HermiteTable", "TablePanels64", "TablePanels32",
         "ConvJob", "ConvLayer64", "ConvLayer32", "ConvMemory")  # fmt: skip
_P, _I, _D = np.uint64, np.int64, np.float64


def _struct(**fields: Any) -> np.dtype[Any]:
    return np.dtype(list(fields.items()), align=True)


def prefix_layer(dtype: Any) -> np.dtype[Any]:
    """PrefixLayer<T>: drift, decay, c e, c h0, c h1, turn, w, v, w_all; then integers."""
    return _struct(numbers=(dtype, 9), signs=np.int32, signs_after=np.int32, range=np.int32, outer=np.int32,
                   slice_w=np.int32, slice_v=np.int32)  # fmt: skip


GENERAL_LAYER = _struct(numbers=(_D, 12), activation=np.int32, table=np.int32, slice_w=np.int32, slice_v=np.int32)
HERMITE_TABLE = _struct(
    evens=np.int32, odds=np.int32, panels=np.int32, order=np.int32, edges=_P, coefficients=_P, even_defect=_P,
    even_derivative=_P, odd_defect=_P, odd_derivative=_P, even_sum=_D, odd_sum=_D, mean=_D,
)  # fmt: skip


def table_panels(dtype: Any) -> np.dtype[Any]:
    """TablePanels<T>."""
    terms, panels = (6, 32) if np.dtype(dtype) == np.float32 else (15, 16)
    return _struct(c=(dtype, (terms, panels)), centre=(dtype, panels), panel=(np.uint8, 128), delta=dtype,
                   shift=np.int32, terms=np.int32)  # fmt: skip


PLAN = _struct(prefix=_P, suffix=_P, tables=_P, nu=_D, beta=_D, n_prefix=np.int32, n_suffix=np.int32)
SIDE = _struct(x=_P, stride=_I, inv=_P, norm=_P)
OUTPUT = _struct(data=_P, mirror=_P, stride=_I, mirror_stride=_I, mix=(_D, 4), fi=_P, fj=_P, hi=_P, hj=_P, diagonal=_P,
                 table=_P)  # fmt: skip
SLICES = _struct(
    data=_P, mirror=_P, stride=_I, mirror_stride=_I, slice_stride=_I, mirror_slice_stride=_I, fi=_P, fj=_P,
    readout_cov=_D, readout_const=_D, own=_P, own_suffix=_P, readout=_I,
)  # fmt: skip
OUTPUTS = 3
JOB = _struct(
    plan=PLAN, products=_P, stride=_I, rows=_I, cols=_I, dim=_I, i=SIDE, j=SIDE, close=_D, diagonal=np.int32,
    n_outputs=np.int32, want_last=np.int32, unused=np.int32, outputs=(OUTPUT, OUTPUTS), slices=SLICES,
)  # fmt: skip

CONV_SIDE = _struct(x=_P, numbers=_P)
CONV_JOB = _struct(
    layers=_P, tables=_P, fast=_P, i=CONV_SIDE, j=CONV_SIDE, planes=_P, parts=_P, own=_P, slices=_P, first=_I,
    layer_size=_I, n_layers=np.int32, height=np.int32, width=np.int32, channels=np.int32, reach_y=np.int32,
    reach_x=np.int32, circular=np.int32, pooled=np.int32, rows=np.int32, cols=np.int32, square_rows=np.int32,
    square_cols=np.int32, triangle=np.int32, paired=np.int32, chunks=np.int32, run=np.int32, pairs=np.int32,
    first_unit=np.int32, last_unit=np.int32, groups=np.int32, n_outputs=np.int32, watched=np.int32, outputs=(OUTPUT,
    OUTPUTS), grams=SLICES,
)  # fmt: skip
#: bytes of ConvMemory, in front of the planes, and of ConvLayer<T>
CONV_MEMORY, CONV_LAYER = 9216, {"f64": 64, "f32": 40}

#: Pairs of a block are SQUARE x SQUARE, its threads THREADS; scratch of a block of layer_grams for every layer.
THREADS = 256
SQUARE = {"gram_dense": 32, "gram_general": 16, "gram_table": 32, "layer_grams": 16}
#: bytes of dynamic shared memory
SHARED = {
    ("gram_dense", "f64"): 8456, ("gram_dense", "f32"): 8456, ("gram_general", "f64"): 15624,
    ("gram_general", "f32"): 15624, ("gram_table", "f64"): 15032, ("gram_table", "f32"): 11560,
    ("layer_grams", "f64"): 15624, ("layer_grams", "f32"): 15624,
    ("multiply_add", "f64"): 8448, ("multiply_add", "f32"): 4224, ("multiply_sum", "f64"): 64,
    ("multiply_sum", "f32"): 64,
}  # fmt: skip


def suffix_of(dtype: Any) -> str:
    """The end of the names of kernels of that dtype."""
    return "f32" if np.dtype(dtype) == np.float32 else "f64"


def pack_table(table: Any, dtype: Any) -> NDArray[np.uint8]:
    """The bytes of a compiled kernel (ntkfast._core.Table)."""
    c, centre, panel, delta, shift = table.arrays()
    record = np.zeros(1, table_panels(dtype))
    record["c"][0, : len(c)], record["terms"] = c, len(c)
    record["centre"], record["panel"], record["delta"], record["shift"] = centre, panel, delta, shift
    return record.view(np.uint8)


class DevicePlan:
    """The numbers of a compiled network in device memory, which it keeps alive."""

    def __init__(self, arguments: Sequence[Any], dtype: Any, upload: Callable[[NDArray[Any]], Any]) -> None:
        numbers, ints, nu, beta, suffix, suffix_ints, tables = arguments
        self.layers, self.suffix_layers = len(numbers), len(suffix)
        self._kept: list[Any] = []
        self._upload = upload
        self.record = np.zeros((), PLAN)
        prefix = np.zeros(len(numbers), prefix_layer(dtype))
        if len(numbers):
            prefix["numbers"] = numbers
            prefix["outer"] = numbers[:, 7] != 0
            for k, name in enumerate(("signs", "signs_after", "range", "slice_w", "slice_v")):
                prefix[name] = ints[:, k]
        general = np.zeros(len(suffix), GENERAL_LAYER)
        if len(suffix):
            general["numbers"] = suffix
            for k, name in enumerate(("activation", "table", "slice_w", "slice_v")):
                general[name] = suffix_ints[:, k]
        self.record["prefix"], self.record["suffix"] = self._pointer(prefix), self._pointer(general)
        self.record["tables"] = self._pointer(np.array([self._table(t) for t in tables], HERMITE_TABLE))
        self.record["nu"], self.record["beta"] = nu, beta
        self.record["n_prefix"], self.record["n_suffix"] = len(prefix), len(general)

    def _pointer(self, array: NDArray[Any]) -> int:
        if array.size == 0:
            return 0
        self._kept.append(self._upload(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        return int(self._kept[-1].data.ptr)

    def _table(self, t: tuple[Any, ...]) -> Any:
        evens, odds, edges, coefficients, sums, even_sum, odd_sum, mean = t
        record = np.zeros((), HERMITE_TABLE)
        record["evens"], record["odds"] = evens, odds
        record["panels"], record["order"] = coefficients.shape[0], coefficients.shape[2]
        record["edges"], record["coefficients"] = self._pointer(edges), self._pointer(coefficients)
        start = self._pointer(sums)
        for name, skip in (("even_defect", 0), ("even_derivative", evens), ("odd_defect", 2 * evens),
                           ("odd_derivative", 2 * evens + odds)):  # fmt: skip
            record[name] = start + 8 * skip
        record["even_sum"], record["odd_sum"], record["mean"] = even_sum, odd_sum, mean
        return record[()]

"""Which kernel makes the inner products: the package's own, in one pass with the epilogue, or NumPy's BLAS."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ntkfast import _core

#: One pass packs its rows first, d numbers a row, while a row of products takes d min(n, m) operations: rows longer
#: than this times the shorter side go to the BLAS, on one thread and on several. There the BLAS has to gain more: its
#: threads spin for 0.1 s after a product and keep those of the kernels waiting. Time of gram in one
#: pass over that by the BLAS, depth 10, float64 / float32, AMD EPYC (Zen 5), OpenBLAS with the kernels it chooses there
#: (Haswell) and with OPENBLAS_CORETYPE=SKYLAKEX; CPU time of one thread (median), time on two (least, not quite alone):
#:     n x m, d              d / min(n, m)   1: Haswell     SkylakeX       2: Haswell     SkylakeX
#:     200 x 4096, 784       4               0.68 / 0.66    0.92 / 0.99    0.54 / 0.48    0.62 / 0.39
#:     500 x 1000, 4096      8               0.63 / 0.60                   0.56 / 0.49
#:     64 x 64, 784          12              1.13 / 1.22                   1.20 / 1.17
#:     48 x 4096, 784        16              0.94 / 0.87    1.21 / 0.96    0.39 / 0.14    0.44 / 0.37
#:     200 x 200, 4096       20              0.69 / 0.87    1.04 / 0.98    0.28 / 1.31    0.33 / 0.52
#:     16 x 4096, 784        49              1.13 / 1.02    1.22 / 0.93    0.32 / 0.29    1.65 / 0.30
#:     4 x 4096, 784         196             1.43 / 1.30    1.48 / 0.97    0.48 / 0.28    1.06 / 0.54
#:     1 x 4096, 784         784             2.15 / 1.61    2.26 / 1.65    1.36 / 0.34    1.24 / 0.74
#: By `python benchmarks/run.py --only products`; more of them, and square ones, in benchmarks/results.
_LONGEST, _LONGEST_SHARED = 16, 256


def fuses(dtype: np.dtype[Any], shape: tuple[int, int], dim: int, wide: bool) -> bool:
    """True for one pass. NTKFAST_GEMM=blas or fused forces one; sums of float32 in float64 need one pass."""
    forced = os.environ.get("NTKFAST_GEMM", "")
    if forced not in ("", "blas", "fused"):
        raise ValueError(f"NTKFAST_GEMM={forced!r}: use blas or fused, or leave it unset")
    if wide or forced:
        return wide or forced == "fused"
    return dim <= (_LONGEST if _core.threads() == 1 else _LONGEST_SHARED) * min(shape)

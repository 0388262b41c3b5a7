"""Which kernel makes the inner products: the package's own, in one pass with the epilogue, or NumPy's BLAS."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

#: One pass packs its rows first, d numbers a row, while a row of products takes d min(n, m) operations: rows longer
#: than this times the shorter side go to the BLAS. Time of gram in one pass over that by the BLAS, depth 10, CPU time
#: of one thread, float64 / float32, OpenBLAS with the kernels it chooses (SkylakeX) and with OPENBLAS_CORETYPE=HASWELL:
#:     n x m, d              d / min(n, m)   SkylakeX       Haswell
#:     4096 x 4096, 64       0.02            0.70 / 0.73    0.65 / 0.69
#:     4096 x 4096, 784      0.2             0.84 / 0.78    0.65 / 0.62
#:     2000 x 3000, 784      0.4             1.03 / 1.03    0.74 / 0.75
#:     2048 x 2048, 4096     2               0.98 / 0.93    0.72 / 0.69
#:     256 x 256, 784        3               1.04 / 1.07    1.03 / 1.08
#:     200 x 4096, 784       4               1.17 / 1.02    0.92 / 0.86
#:     48 x 4096, 784        16              1.27 / 1.04    1.10 / 1.06
#:     1 x 4096, 784         784             1.56 / 1.32    1.55 / 1.37
#: benchmarks/results/intel-xeon-processor-products.json, by `python benchmarks/run.py --only products`.
_LONGEST = 2


def fuses(dtype: np.dtype[Any], shape: tuple[int, int], dim: int, wide: bool) -> bool:
    """True for one pass. NTKFAST_GEMM=blas or fused forces one; sums of float32 in float64 need one pass."""
    forced = os.environ.get("NTKFAST_GEMM", "")
    if forced not in ("", "blas", "fused"):
        raise ValueError(f"NTKFAST_GEMM={forced!r}: use blas or fused, or leave it unset")
    if wide or forced:
        return wide or forced == "fused"
    return dim <= _LONGEST * min(shape)

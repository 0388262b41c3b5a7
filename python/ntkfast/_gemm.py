"""Which kernel makes the inner products: the package's own, in one pass with the epilogue, or NumPy's BLAS."""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def fuses(dtype: np.dtype[Any], shape: tuple[int, int], dim: int, wide: bool) -> bool:
    """True for one pass. NTKFAST_GEMM=blas or fused forces one; sums of float32 in float64 need one pass."""
    forced = os.environ.get("NTKFAST_GEMM", "")
    if forced not in ("", "blas", "fused"):
        raise ValueError(f"NTKFAST_GEMM={forced!r}: use blas or fused, or leave it unset")
    return wide or forced != "blas"

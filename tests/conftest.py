"""What the contract tests share: seeds, instruction sets, fresh interpreters, and the one table of tolerances."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zlib

import numpy as np
import pytest

# Threads that spin between the many tiny calls of the tests take the cores of a shared machine from each other
# (fourfold time); it has to be said before OpenMP starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from ntkfast import _core

INSTRUCTION_SETS = ("v2", "v3", "v4") if platform.machine().lower() in ("x86_64", "amd64") else ("baseline",)

#: Largest |K_ij - reference| / sqrt(K_ii K_jj) in units of eps of the dtype: (a, b) stands for a + b depth. For points
#: in general position (no close pairs) of at most 64 features, whose norms differ by no more than a factor of 4.
TOLERANCES = {
    # 1 - |rho| and Theta grow by increments: a rounding of the inner product, then one or two a layer.
    ("recursion", np.float64): (16, 4),
    ("recursion", np.float32): (16, 2),
    # Half squared distances in float64; a product with cb or a gain rounds in every layer.
    ("general", np.float64): (32, 16),
    ("general", np.float32): (8, 1),
    # The expansion of every layer is cut at 1e-12 (float64, 4504 eps) and 1e-7 (float32, 0.8 eps) of E s^2.
    ("hermite", np.float64): (100, 4504),
    ("hermite", np.float32): (8, 3),
}


def tolerance(net, dtype):
    """The entry of the table for a network, as a number to multiply sqrt(K_ii K_jj) by."""
    dtype = np.dtype(dtype).type
    if any(layer.activation.expanded for layer in net.layers):
        path = "hermite"
    elif all(layer.activation.homogeneous and not _biased(layer) for layer in net.layers):
        path = "recursion"
    else:
        path = "general"
    constant, slope = TOLERANCES[path, dtype]
    return (constant + slope * net.depth) * float(np.finfo(dtype).eps)


def _biased(layer):
    return getattr(layer, "bias_variance", 0) or getattr(layer, "outer_bias_variance", 0)


def assert_close(value, wanted, scale, bound):
    """|value - wanted| <= bound scale for every entry; NaN fails, shapes must agree."""
    value, wanted = np.asarray(value), np.asarray(wanted)
    assert value.shape == wanted.shape
    error, allowed = np.abs(value.astype(np.float64) - wanted), bound * np.broadcast_to(scale, wanted.shape)
    bad = ~(error <= allowed)
    if bad.any():
        k = np.unravel_index(np.argmax(np.where(bad, np.nan_to_num(error - allowed, nan=np.inf), -1)), bad.shape)
        pytest.fail(f"{bad.sum()} of {bad.size} entries off; worst {k}: {value[k]!r} is not {wanted[k]!r}, "
                    f"difference {error[k]:.2e}, allowed {allowed[k]:.2e}")  # fmt: skip


@pytest.fixture
def rng(request):
    """A generator seeded by the name of the test."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Every instruction set of the build in turn."""
    if request.param not in _core.available():
        pytest.skip(f"this processor has no x86-64-{request.param}")
    return request.param


@pytest.fixture(params=["blas", "fused"])
def route(request, monkeypatch):
    """Inner products by NumPy's BLAS, and in one pass with the kernels."""
    monkeypatch.setenv("NTKFAST_GEMM", request.param)
    return request.param


@pytest.fixture
def fresh_python(tmp_path):
    """Run code in a new interpreter with changed environment variables; its standard output comes back."""

    def run(code, timeout=120, **environment):
        result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, text=True, timeout=timeout,
                                capture_output=True, env=os.environ | environment)  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run

"""Every CUDA kernel runs on the simulator, through the public functions, under the sanitizers of the CPU's compiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simulate

HERE = Path(__file__).resolve().parent
SOURCES = sorted((simulate.CSRC / "cuda").glob("*.cu"))

RUN = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import test_sanitizers
print(*sorted(set(test_sanitizers.run_everything(int(sys.argv[3])))))
"""


def hard_points(dtype):
    """(41, 7): general points, one pair each of equal and opposite ones, a zero row, far ends of the range, and a crowd
    so dense that a whole block is close."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(41, 7))
    x[3], x[5], x[9] = x[4], -2 * x[6], 0
    x[16:32] = x[15] + 1e-4 * rng.normal(size=(16, 7))
    x[35] *= 1e12 if dtype == np.float32 else 1e130
    return x.astype(dtype)


def cases():
    """(network, its points, path) such that every kernel, evaluator and way to a correlation is reached."""
    import ntkfast as nf

    for dtype in (np.float64, np.float32):
        x = hard_points(dtype)
        ordinary = np.delete(x, 35, axis=0)
        unit = (ordinary / np.maximum(np.linalg.norm(ordinary, axis=1, keepdims=True), 1e-3)).astype(dtype)
        yield nf.resnet(3, "relu"), x, "recursion"
        yield nf.fully_connected(2, "relu", bias_variance=0.5), ordinary, "recursion"
        yield nf.fully_connected(2, "gelu"), ordinary, "recursion"
        yield nf.fully_connected(2, "erf"), ordinary, "recursion"
        yield nf.fixed_readout_resnet(4), ordinary, "recursion"
        yield nf.resnet(3, "relu"), x, "table"
        yield nf.Network([nf.Dense("abs")] * 60), ordinary, "table"  # tables of both lengths
        yield nf.fully_connected(2, "erf", bias_variance=0.5), np.delete(unit, 9, axis=0), "table"


def close_to(value, wanted, net, scale=None):
    """Within the table of tolerances, four times for close points; by default relative to sqrt(K_ii K_jj)."""
    from conftest import assert_close, tolerance

    if scale is None:
        root = np.sqrt(np.diagonal(wanted, axis1=-2, axis2=-1).reshape(-1, len(wanted[0])).max(axis=0))
        scale = np.multiply.outer(root, root)
    assert_close(value, wanted, scale, 4 * tolerance(net, value.dtype))


def compare(cupy, net, x):
    """The public functions on host arrays and two devices, on device arrays, on a strided one, against the CPU."""
    import ntkfast as nf

    kinds = ("ntk", "nngp", "last_hidden")
    wanted = nf.gram(net, x, get=kinds)
    streamed = nf.gram(net, x, get=kinds, device=["cuda:0", "cuda:1"])
    resident = nf.gram(net, cupy.asarray(x), get=kinds)
    for k in range(3):
        close_to(streamed[k], wanted[k], net)
        close_to(resident[k].get(), wanted[k], net)
    strided = cupy.asarray(np.repeat(x, 2, axis=1))[:, ::2]
    cross = nf.gram(net, strided, cupy.asarray(x[:20]), normalize=True)
    close_to(cross.get(), nf.gram(net, x, x[:20], normalize=True), net, scale=1.0)
    close_to(nf.layer_grams(net, x, device="cuda"), nf.layer_grams(net, x), net)


def run_everything(seed):
    """Run all cases on the stand-in for a GPU; the names of the kernels that ran."""
    import fake_cupy

    from ntkfast._cuda import compiler
    from ntkfast._cuda import gram as module

    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STREAMED", 32)  # many tiles, of both kinds
        patch.setattr(module, "RESIDENT", 64)
        # the sanitizers look into kernels, whose order is the same with the second
        for lazy in (True, False) if simulate.mode() == "plain" else (True,):
            cupy = fake_cupy.install(patch, devices=2, lazy=lazy, seed=seed)
            for net, x, path in cases():
                patch.setenv("NTKFAST_PATH", path)
                cupy.launched.clear()
                compare(cupy, net, x)
                assert any(name.startswith("gram_table") for name in cupy.launched) == (path == "table")
                launched += cupy.launched
            launched.append("layout")
            compiler.load("layout").get_function("layout")((1,), (1,), (cupy.empty(64, np.int64),))
            cupy.cuda.Device().synchronize()
            assert cupy.used == [0, 0], "device memory is not given back"
    return launched


@pytest.mark.parametrize("mode", ["plain", *(pytest.param(m, marks=pytest.mark.slow) for m in ("address", "thread"))])
def test_every_kernel_runs_without_a_report(mode):
    reason = simulate.missing(mode)
    if reason:
        pytest.skip(reason)
    simulate.build_all(SOURCES, mode)
    kernels = {name for path in SOURCES for name in simulate.compile_library(path, mode)[1]}
    done = simulate.python(mode, "-c", RUN, str(HERE), str(HERE.parent), "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(done.stdout.split()) == kernels
    for word in ("ERROR", "data race", "runtime error"):
        assert word not in done.stderr

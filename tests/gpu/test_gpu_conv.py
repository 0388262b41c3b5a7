"""Convolutional networks on a real GPU against the CPU: ``pytest -m gpu`` (skipped where there is none)."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import assert_close
from test_conv import photographs
from test_gpu import WHY, cupy

import ntkfast as nf
from ntkfast._cuda import conv

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(cupy is None, reason=WHY)]

KINDS = ("ntk", "nngp", "last_hidden")
DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])
BOUND = {np.float64: 1e-13, np.float32: 2e-6}
FAST = {
    f"{build.__name__}, {readout}, {padding}": build(5, readout=readout, padding=padding)
    for build in (nf.conv_net, nf.conv_resnet)
    for readout in ("flatten", "gap")
    for padding in ("zeros", "circular")
}
OTHERS = {
    "window 5": nf.conv_net(3, window=5, readout="gap"),
    "window 5 x 1": nf.conv_resnet(3, window=(5, 1)),
    "biases": nf.conv_net(3, bias_variance=0.2, readout="gap"),
    "leaky_relu": nf.conv_net(3, "leaky_relu", bias_variance=0.1, padding="circular"),
} | {name: nf.conv_resnet(2, name) for name in ("erf", "gelu", "sin", "cos", "gaussian", "tanh")}


def images(n, grid, dtype=np.float64, seed=0):
    """Multiples of 1/256 with a copy, its opposite, a zero border, an empty one and a plain background."""
    x = np.random.default_rng(seed).integers(0, 256, (n, *grid, 3)) / 256.0
    if n > 5:
        x[n // 2], x[n // 3], x[4] = x[0], -x[0], 0
        x[3, ..., : grid[-1] // 2, :] = 0
        x[5, 1:] = 0.25
    return x.astype(dtype)


def check(found, net, x, y=None, **options):
    kind = options.get("get", "ntk")
    di, dj = (nf.diagonal(net, z, get=kind).astype(float) for z in (x, x if y is None else y))
    root = np.sqrt(np.outer(di, dj))
    assert_close(found, nf.gram(net, x, y, **options), np.maximum(root, 0.05 * root.max()), BOUND[x.dtype.type])


@DTYPES
@pytest.mark.parametrize("name", FAST | OTHERS)
def test_networks(name, dtype):
    net = (FAST | OTHERS)[name]
    x, y = images(9, (9, 7), dtype) * dtype(0.3), images(4, (9, 7), dtype, seed=1) * dtype(0.3)
    for other in (None, y):
        there = nf.gram(net, cupy.asarray(x), None if other is None else cupy.asarray(other), get=KINDS)
        for kind, found in zip(KINDS, there, strict=True):
            check(found.get(), net, x, other, get=kind)
    found = nf.gram(net, x, device="cuda")
    assert np.array_equal(found, found.T)
    if net.pooling == "flatten":
        check(nf.layer_grams(net, x, y, device="cuda").sum(axis=0), net, x, y)


@DTYPES
@pytest.mark.parametrize("name", [k for k in FAST if "conv_net" in k])
def test_patches_of_different_norms_keep_their_digits(name, dtype):
    """Backgrounds of other brightness and multiples: planes are done again; the CPU is right there to 40 digits."""
    net, bound = FAST[name], {np.float64: 1e-12, np.float32: 2e-6}[dtype]
    for grid in ((9, 7), (32, 32)) if net.pooling == "flatten" else ((9, 7),):
        x = photographs(*grid).astype(dtype)
        root = np.sqrt(nf.diagonal(net, x).astype(float))
        assert_close(nf.gram(net, x, device="cuda"), nf.gram(net, x), np.outer(root, root), bound)


@DTYPES
@pytest.mark.parametrize("grid", [(32, 32), (28, 28), (1, 7), (5, 33), (1, 1), (450,), (64, 64)], ids=str)
def test_sizes(grid, dtype):
    x = images(7, grid, dtype)
    for net in (nf.conv_net(3), nf.conv_resnet(2, "erf")):
        check(nf.gram(net, x, device="cuda"), net, x)
    if np.prod(grid) <= 33 * 5:
        net = nf.conv_net(3, readout="gap")
        check(nf.gram(net, x, device="cuda"), net, x)


@DTYPES
def test_photographs(dtype):
    """All shifts of 32 x 32; several squares of images and launches."""
    x = images(6, (32, 32), dtype)
    net = nf.conv_net(3, readout="gap")
    check(nf.gram(net, x, device="cuda"), net, x)
    many = images(700, (32, 32), dtype)
    found = nf.gram(nf.conv_net(3), many, device="cuda")
    part = [0, 1, 2, 350, 351, 699]
    check(found[np.ix_(part, part)], nf.conv_net(3), many[part])


@DTYPES
def test_planes_in_global_memory(dtype, monkeypatch):
    monkeypatch.setattr(conv.Gpu, "shared_bytes", lambda gpu: 9300)
    for net in (nf.conv_net(3), nf.conv_net(2, readout="gap"), nf.conv_net(2, bias_variance=0.1)):
        x = images(6, (8, 9), dtype)
        check(nf.gram(net, x, device="cuda"), net, x)


def test_results_are_the_same_every_time():
    x = images(20, (16, 16), np.float32)
    net = nf.conv_net(5, readout="gap")
    first = nf.gram(net, x, device="cuda")
    for _ in range(3):
        assert np.array_equal(nf.gram(net, x, device="cuda"), first)


@pytest.mark.parametrize("readout", ["flatten", "gap"])
def test_control_c_stops_within_seconds(readout):
    code = f"""
import numpy as np, ntkfast as nf
X = np.random.default_rng(0).random((20000, 32, 32, 3))
nf.gram(nf.conv_net(20, readout={readout!r}), X[:3], device="cuda")
print("ready", flush=True)
nf.gram(nf.conv_net(20, readout={readout!r}), X, device="cuda")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert "ready" in run.stdout.readline()
        time.sleep(3.0)
        start = time.monotonic()
        run.send_signal(2)
        _, errors = run.communicate(timeout=60)
        assert time.monotonic() - start < 3
    assert "KeyboardInterrupt" in errors

"""Kernels of csrc/cuda/jacobian.cu on the simulator, against NumPy; test_kernels.py repeats this under sanitizers."""

from __future__ import annotations

import fake_cupy
import numpy as np
import pytest
import simulate
from conftest import assert_close

import ntkfast as nf
from ntkfast._cuda import jacobian
from ntkfast._cuda.device import Gpu

pytestmark = pytest.mark.skipif(simulate.missing(simulate.mode()) is not None, reason="the simulator cannot run here")

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])
#: Sanitizers take seconds for a launch: fewer sizes there, one of every kind.
PLAIN = simulate.mode() == "plain"
#: relative to the largest entry of the kernel
BOUND = {np.float64: 1e-13, np.float32: 2e-6}


gpu = fake_cupy.shuffled


@pytest.fixture(scope="module", autouse=True)
def report():
    """What ran, for test_sanitizers."""
    yield
    if simulate.mode() != "plain":
        print("kernels:", *sorted(simulate.LAUNCHED))


def strided(gpu, x):
    """The array in the middle of a larger one, whose other entries stay NaN, and the larger one."""
    whole = gpu.array(np.full((x.shape[0] + 2, x.shape[1] + 5), np.nan, x.dtype))
    part = whole[1:-1, 2:-3]
    part[...] = gpu.array(x)
    return part, whole


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (33, 31), (64, 65)] if PLAIN else [(33, 31)])
@pytest.mark.parametrize("first", [True, False] if PLAIN else [False])
def test_multiply_add(gpu, rng, dtype, shape, first):
    """The same roundings as NumPy's: products and sums are not contracted."""
    p, q, out = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    one, suffix = Gpu(0), "f64" if dtype == np.float64 else "f32"
    for factor in (q, None):
        wanted = p * (1 if factor is None else factor) + (0 if first else out)
        (to, whole), (mirror, other) = strided(gpu, out), strided(gpu, np.full(shape[::-1], np.nan, dtype))
        sides = [None if a is None else strided(gpu, a)[0] for a in (p, factor)]
        jacobian.multiply_add(one, suffix, to, mirror, False, first, *sides)
        assert np.array_equal(to.get(), wanted)
        assert np.array_equal(mirror.get(), wanted.T)
        assert np.isnan(whole.get()).sum() == whole.size - to.size
        assert np.isnan(other.get()).sum() == other.size - to.size
    jacobian.multiply_add(one, suffix, to, mirror, False, False, None, None)
    assert np.array_equal(to.get(), wanted)


@DTYPES
@pytest.mark.parametrize("n", [1, 31, 67] if PLAIN else [40])
def test_half_of_a_tile_of_the_diagonal(gpu, rng, dtype, n):
    """What lies below the diagonal is neither read nor wrong."""
    p, q, out = (rng.standard_normal((n, n)).astype(dtype) for _ in range(3))
    below = np.tril_indices(n, -1)
    for a in (p, q, out):
        a[below] = np.nan
    to = gpu.array(out)
    jacobian.multiply_add(
        Gpu(0), "f64" if dtype == np.float64 else "f32", to, to, True, False, gpu.array(p), gpu.array(q)
    )
    wanted = np.triu(out + p * q)
    assert np.array_equal(to.get(), wanted + np.triu(wanted, 1).T)


@DTYPES
@pytest.mark.parametrize(
    "positions", [(1, 2), (3, 1), (4, 7), (2, 33), (9, 64), (1, 300)] if PLAIN else [(2, 7), (2, 300)]
)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13)] if PLAIN else [(3, 5)])
def test_multiply_sum(gpu, rng, dtype, positions, shape):
    """Groups of all sizes, from one thread a pair to a block a pair."""
    (rows, cols), (l, r) = shape, positions
    p, q = (rng.standard_normal((rows * l, cols * r)).astype(dtype) for _ in range(2))
    out = rng.standard_normal(shape).astype(dtype)
    sums = (p.astype(np.float64) * q).reshape(rows, l, cols, r)
    size, wanted = np.abs(sums).sum(axis=(1, 3)) + 1, sums.sum(axis=(1, 3))
    for first in (True, False):
        to, whole = strided(gpu, out)
        jacobian.multiply_sum(Gpu(0), gpu.array(p), gpu.array(q), positions, to, first)
        assert_close(to.get(), wanted + (0 if first else out), size, 4 * np.finfo(dtype).eps)
        assert np.isnan(whole.get()).sum() == whole.size - to.size


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 300), (3, 5, 31)] if PLAIN else [(2, 2, 300)])
def test_combine(gpu, rng, dtype, shape):
    """Every term may be missing."""
    c, a, m = shape
    u, v = (rng.standard_normal((a, m)).astype(dtype) for _ in range(2))
    x, y = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    coef, row = rng.standard_normal((c, a)).astype(dtype), rng.standard_normal((c, m)).astype(dtype)
    third = coef[:, :, None] * row[:, None, :]
    there = {"u": u, "v": v, "x": x, "y": y, "coef": coef, "row": row}
    there = {name: gpu.array(value) for name, value in there.items()}

    def combine(u=None, x=None, v=1.0, y=None, coef=None, row=None, out=None):
        u, x, v, y, coef, row = (there[k] if isinstance(k, str) else k for k in (u, x, v, y, coef, row))
        return jacobian.combine(out, u, x, v, y, coef, row)

    everything = combine("u", "x", "v", "y", "coef", "row").get()
    assert np.array_equal(everything, u * x + v * y + third)
    assert np.array_equal(combine(None, "x", -0.5, "y").get(), x + dtype(-0.5) * y)
    assert np.array_equal(combine(coef="coef", row="row").get(), third)
    place = gpu.array(x)
    there["x"] = place
    assert combine("u", "x", "v", "y", out=place) is place
    assert np.array_equal(place.get(), u * x + v * y)


def layers(rng, n, shapes, dtype):
    """Factors of shapes (positions or 0, fan_in, fan_out)."""
    sizes = [((n, p) if p else (n,), i, o) for p, i, o in shapes]
    return [nf.LayerFactors(*(rng.standard_normal((*axes, k)).astype(dtype) for k in (i, o))) for axes, i, o in sizes]


def explicit(factors, other):
    """One Gram matrix per layer from weight gradients, written out in float64."""

    def gradients(f):
        a, d = (np.asarray(x, np.float64).reshape(len(x), -1, np.shape(x)[-1]) for x in f)
        return np.einsum("npi,npo->nio", a, d)

    return np.array([
        np.einsum("nio,mio->nm", gradients(x), gradients(y)) for x, y in zip(factors, other, strict=True)
    ])  # fmt: skip


@pytest.mark.skipif(not PLAIN, reason="the kernels ran above; many launches take minutes here")
@DTYPES
@pytest.mark.parametrize("shapes", [
    [(0, 5, 33), (0, 33, 17), (0, 18, 1)],
    [(9, 3, 7), (4, 64, 2), (0, 5, 33), (1, 6, 5), (25, 2, 3)],
    [(6, 2, 2)], [(2, 30, 40)],
], ids=["dense", "mixed", "gradients", "products"])  # fmt: skip
@pytest.mark.parametrize(("n", "side"), [(1, 2048), (37, 16), (40, 2048)])
def test_layers(gpu, rng, monkeypatch, dtype, shapes, n, side):
    """Both contractions, in several tiles and slices of parameters, symmetric and not."""
    monkeypatch.setattr(jacobian, "SIDE", side)
    monkeypatch.setattr(jacobian, "_GRADIENTS", 8 * side * 7)
    monkeypatch.setattr(jacobian, "_TERMS", jacobian._TERMS if n != 37 else 20)
    x, y = layers(rng, n, shapes, dtype), layers(rng, 21, shapes, dtype)
    for other in (None, y):
        there = [None if f is None else [nf.LayerFactors(gpu.array(a), gpu.array(d)) for a, d in f] for f in (x, other)]
        wanted = explicit(x, x if other is None else other)
        K, G = nf.jacobian_gram(*there).get(), nf.jacobian_gram(*there, per_layer=True).get()
        assert K.dtype == G.dtype == dtype
        assert_close(K, wanted.sum(axis=0), np.abs(wanted).sum(axis=0).max(), BOUND[dtype])
        assert_close(G, wanted, np.abs(wanted).max(axis=(1, 2), keepdims=True), BOUND[dtype])
        if other is None:
            assert np.array_equal(K, K.T)
            assert np.array_equal(G, G.transpose(0, 2, 1))
            diagonal = nf.jacobian_diagonal(there[0], per_layer=True).get()
            assert_close(diagonal, np.diagonal(wanted, axis1=1, axis2=2), np.abs(wanted).max(), BOUND[dtype])

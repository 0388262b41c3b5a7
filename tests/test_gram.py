"""Gram matrices against the NumPy definition: every kernel, dtype, size, tile, layout and output."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import numpy as np
import pytest
from conftest import assert_close, tolerance

import ntkfast as nf
from ntkfast import _core, _tiles, reference
from ntkfast.activation import EXPANDED, NAMES
from ntkfast.network import SignReadout

KINDS = ("ntk", "nngp", "last_hidden")
BUILDERS = {
    "fully_connected": nf.fully_connected,
    "resnet": nf.resnet,
    "bottleneck_resnet": nf.bottleneck_resnet,
}
LEAKY = nf.Activation.leaky_relu(0.3)
FREE = {
    "outer biases": nf.Network([nf.Linear(weight_variance=0.7, bias_variance=0.2)]
                               + [nf.Bottleneck(LEAKY, scale=-0.5, skip=0.6, bias_variance=0.1, gain=1.4,
                                                outer_bias_variance=0.5, weight_variance=1.2)] * 2,
                               nf.Readout(weight_variance=0.6)),
    "linear": nf.Network([nf.Linear(weight_variance=0.5), nf.Dense("relu"), nf.Linear()]),
    "frozen layers": nf.Network([nf.Dense("relu", trained=False), nf.Residual("relu", scale=0.4),
                                 nf.Bottleneck("abs", scale=0.9, trained=False), nf.Dense("relu")],
                                nf.Readout(trained=False, weight_variance=2.0, bias_variance=0.3)),
    "frozen smooth layers": nf.Network([nf.Dense("erf", trained=False), nf.Residual("cos", scale=0.3),
                                        nf.Bottleneck("sin", scale=0.9, trained=False, outer_bias_variance=0.2),
                                        nf.Dense("gaussian"), nf.Residual("exp", scale=0.2, trained=False)]),
    "frozen biases": nf.Network([nf.Dense("relu", bias_variance=0.3, trained=False), nf.Dense("relu")]),
    "negative": nf.Network([nf.Dense("relu", gain=1.3), nf.Residual("relu", scale=0.5, skip=-0.8),
                            nf.Residual(LEAKY, scale=-0.4, skip=0.7), nf.Residual("relu", scale=-0.3, skip=-1.1)]),
    "negative smooth": nf.Network([nf.Dense("gelu", gain=1.3), nf.Residual("gelu", scale=0.5, skip=-0.8),
                                   nf.Residual("erf", scale=-0.4, skip=0.7)]),
    "residual first": nf.Network([nf.Residual("abs", scale=0.8, skip=0.5), nf.Residual("identity", scale=0.4)]),
    "prefix and suffix": nf.Network([nf.Dense("relu")] * 2 + [nf.Dense("relu", bias_variance=0.2)]
                                    + [nf.Residual("relu", scale=0.5)] * 2),
    "steep slopes": nf.Network([nf.Dense(nf.Activation.leaky_relu(-2.0)), nf.Residual(nf.Activation.leaky_relu(3.0),
                                                                                     scale=0.4)]),
    "no weights": nf.Network([nf.Dense("relu", weight_variance=0.0, bias_variance=1.0)] * 2),
    "all frozen": nf.Network([nf.Dense("relu", trained=False)], nf.Readout(trained=False, bias_variance=0.1)),
    "readout": nf.Network([nf.Dense("relu")] * 2, nf.Readout(weight_variance=1.7, bias_variance=0.4)),
    "readout without weights": nf.Network([nf.Dense("relu")], nf.Readout(weight_variance=0.0, bias_variance=0.4)),
    "first trained": nf.bottleneck_resnet(3, "relu", alpha=-0.7, first_trained=True, readout_trained=True),
    "sign readout": nf.fixed_readout_resnet(3, theta=0.6, last_width_ratio=1.5),
    "sign readout, negative": nf.fixed_readout_resnet(2, theta=-0.4),
    "sign readout, free": nf.Network([nf.Dense("relu"), nf.Residual("gelu", scale=0.5)], SignReadout()),
    "biases": nf.fully_connected(3, "erf", gain=1.1, bias_variance=0.2, weight_variance=1.5),
    "feed forward": nf.fully_connected(4, readout_trained=False),
    "deep": nf.resnet(60, c_res=2.0),
}  # fmt: skip
#: one network for each path of the kernels: recursion without and with signs, biases, closed form, expansion
PATHS = {
    "recursion": nf.resnet(3),
    "signs": nf.fully_connected(2, "abs"),
    "biases": nf.Network([nf.Dense("relu", bias_variance=0.3)] * 2, nf.Readout(bias_variance=0.2)),
    "erf": nf.resnet(2, "erf"),
    "hermite": nf.fully_connected(1, "softplus"),
}


def points(n, d, seed, zero=True):
    """Rows of norm 0.5 to 1.2 that float32 holds exactly, the third one 0."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    X *= rng.uniform(0.5, 1.2, (n, 1)) / np.linalg.norm(X, axis=1, keepdims=True)
    if zero and n > 2:
        X[2] = 0
    return X.astype(np.float32).astype(np.float64)


def scales(net, X, Y, get):
    """sqrt(K_ii K_jj), (n, m); for zero rows a tenth of the largest (they have a test of their own)."""
    rows, cols = (np.sqrt(reference.diagonal(net, Z, get=get)) for Z in (X, X if Y is None else Y))
    root = rows[:, None] * cols
    return np.where(root > 0, root, 0.1 * root.max())


def compare(net, X, Y=None, dtypes=(np.float64, np.float32), bound=None):
    """All kinds, plain and normalised, of both dtypes, against the reference; layer by layer too."""
    wanted = reference.gram(net, X, Y, get=KINDS)
    unit = reference.gram(net, X, Y, get=KINDS, normalize=True)
    for dtype in dtypes:
        x, y = X.astype(dtype), None if Y is None else Y.astype(dtype)
        allowed = tolerance(net, dtype) if bound is None else bound
        got = nf.gram(net, x, y, get=KINDS)
        assert got._fields == KINDS
        for get in KINDS:
            K = getattr(got, get)
            assert K.dtype == dtype
            assert_close(K, getattr(wanted, get), scales(net, X, Y, get), allowed)
        got = nf.gram(net, x, y, get=KINDS, normalize=True)
        for get in KINDS:
            assert_close(getattr(got, get), getattr(unit, get), 1.0, allowed)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("activation", [
    pytest.param(name, marks=pytest.mark.slow) if name in EXPANDED else name for name in NAMES
])  # fmt: skip
@pytest.mark.parametrize("builder", BUILDERS)
def test_builders(builder, activation, depth):
    net = BUILDERS[builder](depth, activation)
    size = (9, 12) if activation in EXPANDED else (33, 40)
    # exp grows like a tower: small variances keep its condition number near 1
    factor = 0.25 if activation == "exp" else 1.0
    X, Y = factor * points(size[0], 7, 1), factor * points(size[1], 7, 2)
    compare(net, X)
    compare(net, X, Y)


@pytest.mark.parametrize("activation", EXPANDED)
def test_expanded_activations(activation):
    # the fast part of test_builders: all rows of one norm, one table
    X = points(8, 5, 3, zero=False)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    X = X.astype(np.float32).astype(np.float64)
    compare(nf.resnet(2, activation), X)
    compare(nf.fully_connected(1, activation), X[:3], X[3:])


@pytest.mark.parametrize("depth", [1, 3])
def test_fixed_readout_resnet(depth):
    net = nf.fixed_readout_resnet(depth)
    compare(net, points(33, 7, 1))
    compare(net, points(33, 7, 1), points(40, 7, 2))


@pytest.mark.parametrize("name", FREE)
def test_free_networks(name):
    X, Y = points(37, 6, 4), points(30, 6, 5)
    compare(FREE[name], X)
    compare(FREE[name], X, Y)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", ["recursion", "signs", "biases", "erf"])
@pytest.mark.parametrize("n", [1, 2, 31, 33, 127, 129, 130, 200])
def test_sizes(name, n):
    net = PATHS[name]
    for m in (None, 1, 32, 131):
        X, Y = points(n, 16, n), None if m is None else points(m, 16, m + 1000)
        for dtype in (np.float64, np.float32):
            K = nf.gram(net, X.astype(dtype), None if Y is None else Y.astype(dtype))
            assert_close(K, reference.gram(net, X, Y), scales(net, X, Y, "ntk"), tolerance(net, dtype))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("d", [1, 2, 15, 17, 64, 65, 300])
def test_features(d):
    # one feature leaves only parallel and opposite rows, whose angles the reference rounds
    net = nf.resnet(2)
    X = points(20, d, d)
    K = nf.gram(net, X)
    assert_close(K, reference.gram(net, X), scales(net, X, None, "ntk"), 1e-7 if d == 1 else tolerance(net, np.float64))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("side", [33, 64])
@pytest.mark.parametrize("name", PATHS)
def test_tiles(name, side, monkeypatch):
    monkeypatch.setattr(_tiles, "SIDE", side)
    monkeypatch.setattr(_tiles, "FUSED_SIDE", side)
    net = PATHS[name]
    small = name == "hermite"
    X, Y = points(70 if small else 200, 4, 1), points(40 if small else 131, 4, 2)
    compare(net, X, dtypes=(np.float64,))
    compare(net, X, Y, dtypes=(np.float64,))
    slices = nf.layer_grams(net, X)
    np.testing.assert_array_equal(slices, slices.swapaxes(1, 2))
    assert_close(slices.sum(axis=0), nf.gram(net, X), scales(net, X, None, "ntk"), tolerance(net, np.float64))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("call", [1e-9, 3e-5])
@pytest.mark.parametrize("name", ["recursion", "signs", "biases"])
def test_short_calls(name, call, monkeypatch):
    # A tile goes to the kernels in bands of rows: the diagonal has to be found in every one of them.
    net, X, Y = PATHS[name], points(200, 4, 1), points(131, 4, 2)
    whole, rectangle, slices = nf.gram(net, X), nf.gram(net, X, Y), nf.layer_grams(net, X)
    monkeypatch.setattr(_tiles, "_CALL", call)
    np.testing.assert_array_equal(nf.gram(net, X), whole)
    np.testing.assert_array_equal(nf.gram(net, X, Y), rectangle)
    np.testing.assert_array_equal(nf.layer_grams(net, X), slices)


@pytest.mark.usefixtures("route")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["recursion", "biases"])
def test_more_than_one_real_tile(name):
    net, n = PATHS[name], _tiles.SIDE + 53
    X = points(n, 5, 6)
    K = nf.gram(net, X)
    np.testing.assert_array_equal(K, K.T)
    rows = np.r_[0:40, n // 2 - 20 : n // 2 + 20, n - 40 : n]
    # Both are exact on the diagonal only if the same points stand for both sides.
    wanted = reference.gram(net, X)[rows]
    assert_close(K[rows], wanted, scales(net, X[rows], X, "ntk"), tolerance(net, np.float64))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", FREE)
def test_layer_grams(name):
    net, X, Y = FREE[name], points(35, 6, 7), points(20, 6, 8)
    for other in (None, Y):
        for dtype in (np.float64, np.float32):
            got = nf.layer_grams(net, X.astype(dtype), None if other is None else other.astype(dtype))
            wanted = reference.layer_grams(net, X, other)
            assert got.dtype == dtype
            assert got.shape == wanted.shape == (len(net.slices), *wanted.shape[1:])
            root = [np.sqrt(np.array([np.diag(g) for g in reference.layer_grams(net, Z)]).reshape(len(got), len(Z)))
                    for Z in (X, X if other is None else Y)]  # fmt: skip
            scale = root[0][:, :, None] * root[1][:, None, :]
            scale = np.where(scale > 0, scale, 0.1 * wanted.max(initial=0))
            assert_close(got, wanted, scale, tolerance(net, dtype))
        slices = nf.layer_grams(net, X, other)
        bound = tolerance(net, np.float64)
        assert_close(slices.sum(axis=0), nf.gram(net, X, other), scales(net, X, other, "ntk"), bound)


def test_names_of_the_slices():
    assert nf.fully_connected(2).slices == ("1.W", "2.W", "readout")
    assert nf.bottleneck_resnet(2, first_trained=True).slices == ("1.W", "2.W", "2.V", "3.W", "3.V")
    assert FREE["frozen layers"].slices == ("2.W", "4.W")
    assert FREE["all frozen"].slices == ()
    assert nf.fixed_readout_resnet(2).slices == ("1.W", "2.W", "3.W")
    assert nf.layer_grams(FREE["all frozen"], np.eye(3)).shape == (0, 3, 3)


def test_a_slice_of_a_frozen_layer_is_absent_and_the_others_stay():
    layers = [nf.Dense("relu"), nf.Bottleneck("relu", scale=0.5), nf.Dense("gelu")]
    X = points(9, 4, 9)
    full = dict(zip(nf.Network(layers).slices, nf.layer_grams(nf.Network(layers), X), strict=True))
    layers[1] = nf.Bottleneck("relu", scale=0.5, trained=False)
    net = nf.Network(layers)
    assert net.slices == ("1.W", "3.W", "readout")
    for name, slice_ in zip(net.slices, nf.layer_grams(net, X), strict=True):
        assert_close(slice_, full[name], full[name].max(), 1e-14)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", [*FREE, *PATHS])
def test_symmetric_result(name):
    net = (FREE | PATHS)[name]
    X = points(50, 5, 10)
    for dtype in (np.float64, np.float32):
        x, bound = X.astype(dtype), tolerance(net, dtype)
        for get in KINDS:
            K = nf.gram(net, x, get=get)
            np.testing.assert_array_equal(K, K.T)
            # The diagonal is computed as such; only the constant of the readout is added in another order.
            assert_close(np.diag(K), nf.diagonal(net, x, get=get), np.diag(K), 4 * np.finfo(dtype).eps)
            assert_close(K, nf.gram(net, x, x, get=get), scales(net, X, None, get), 2 * bound + 1e-7)
            values = np.linalg.eigvalsh(K.astype(np.float64))
            assert values[0] >= -bound * np.trace(K)
            unit = nf.gram(net, x, get=get, normalize=True)
            np.testing.assert_array_equal(unit, unit.T)
            np.testing.assert_array_equal(np.diag(unit), np.diag(K) > 0)
            assert np.abs(unit).max() <= 1 + bound


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", PATHS)
def test_gram_with_itself_as_other_set(name):
    # Equal rows are found by their difference, which is exactly 0: no trace of sqrt(eps).
    net = PATHS[name]
    for dtype in (np.float64, np.float32):
        X = points(40, 5, 11).astype(dtype)
        K = nf.gram(net, X)
        root = np.sqrt(np.diag(K).astype(np.float64))
        assert_close(nf.gram(net, X, X), K, root[:, None] * root, tolerance(net, dtype))
        assert_close(nf.gram(net, X, X.copy()), K, root[:, None] * root, tolerance(net, dtype))


@pytest.mark.parametrize("name", PATHS)
def test_equal_rows_have_equal_values(name):
    X = points(12, 5, 12)
    X[7] = X[4]
    K = nf.gram(PATHS[name], X)
    assert_close(K[7], K[4], np.abs(K[4]), 1e-14)
    assert_close(K[4, 7], K[4, 4], K[4, 4], 1e-14)


def test_calling_a_network_is_gram():
    net, X, Y = nf.resnet(3), points(6, 4, 13), points(3, 4, 14)
    np.testing.assert_array_equal(net(X), nf.gram(net, X))
    np.testing.assert_array_equal(net(X, Y), nf.gram(net, X, Y))


def test_kernel_of_a_support_vector_machine():
    svm = pytest.importorskip("sklearn.svm")
    X = points(60, 4, 15)
    y = (X[:, 0] * X[:, 1] > 0).astype(int)
    net = nf.resnet(3)
    model = svm.SVC(kernel=net, C=100.0).fit(X[:40], y[:40])
    own = svm.SVC(kernel="precomputed", C=100.0).fit(nf.gram(net, X[:40]), y[:40])
    wanted = own.decision_function(nf.gram(net, X[40:], X[:40]))
    np.testing.assert_allclose(model.decision_function(X[40:]), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("route")
def test_tuples():
    net, X = nf.resnet(3), points(8, 4, 16)
    got = nf.gram(net, X, get=("nngp", "ntk"))
    assert got._fields == ("nngp", "ntk")
    for get in got._fields:
        np.testing.assert_array_equal(getattr(got, get), nf.gram(net, X, get=get))
    assert nf.gram(net, X, get=("ntk",))._fields == ("ntk",)


@pytest.mark.parametrize("name", ["recursion", "signs"])
def test_homogeneity(name):
    net, X = PATHS[name], points(40, 5, 17, zero=False)
    K = nf.gram(net, X)
    np.testing.assert_array_equal(nf.gram(net, 4 * X), 16 * K)
    np.testing.assert_array_equal(nf.gram(net, 0.125 * X, 2 * X), 0.25 * nf.gram(net, X, X))
    factors = np.random.default_rng(1).uniform(0.1, 10, 40)
    wanted = factors[:, None] * K * factors
    assert_close(nf.gram(net, factors[:, None] * X), wanted, np.sqrt(np.outer(*[np.diag(wanted)] * 2)), 1e-14)
    assert_close(nf.gram(net, factors[:, None] * X, normalize=True), nf.gram(net, X, normalize=True), 1.0, 1e-14)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("exponent", [-1000, -500, 500, 1000])
def test_norms_near_the_ends_of_the_range(exponent):
    net, X = nf.resnet(3), points(10, 5, 18)
    Z = np.ldexp(X, exponent)
    np.testing.assert_array_equal(nf.gram(net, Z, normalize=True), nf.gram(net, X, normalize=True))
    if exponent == 1000:
        with pytest.raises(OverflowError, match=r"row 0 of X.*normalize=True"):
            nf.gram(net, Z)
    if abs(exponent) == 500:
        np.testing.assert_array_equal(nf.gram(net, Z), np.ldexp(nf.gram(net, X), 2 * exponent))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", ["gelu", "erf", "softplus"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_zero_rows(name, dtype):
    # s(0) = 0: the kernels of a zero row are 0; otherwise they have a value like any other.
    X = points(9, 5, 41).astype(dtype)
    for net in (nf.fully_connected(3, name), nf.resnet(2, name)):
        for get in KINDS:
            K, wanted = nf.gram(net, X, get=get), reference.gram(net, X, get=get)
            if wanted[2, 2] == 0:
                np.testing.assert_array_equal(K[2], 0)
                np.testing.assert_array_equal(K[:, 2], 0)
            else:
                assert_close(K[2], wanted[2], wanted.max(), tolerance(net, dtype))


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("name", ["gelu", "biases", "erf"])
def test_rows_of_very_different_norm(name, ratio):
    # The table's bound is relative to sqrt(K_ii K_jj), whatever the two norms are.
    net = {"gelu": nf.fully_connected(3, "gelu"), "erf": nf.resnet(3, "erf"),
           "biases": nf.Network([nf.Dense("relu", bias_variance=1e-6)] * 3)}[name]  # fmt: skip
    X, Y = points(5, 7, 19, zero=False), points(6, 7, 20, zero=False)
    X, Y = X / np.sqrt(ratio), Y * np.sqrt(ratio)
    K = nf.gram(net, X, Y, get="nngp")
    assert_close(K, reference.gram(net, X, Y, get="nngp"), scales(net, X, Y, "nngp"), 10 * tolerance(net, np.float64))


# Outputs


class Sink:
    """Shape, dtype and slice assignment, as a file format may offer; nothing else."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self._data = shape, np.dtype(dtype), np.full(shape, np.nan, dtype)

    def __setitem__(self, key, value):
        self._data[key] = value


def outputs(shape, dtype, folder):
    """Every kind of output with what has to stay untouched around it."""
    frame = np.full((*shape[:-2], shape[-2] + 3, shape[-1] + 5), 7, dtype)
    yield frame[..., 1:-2, 2:-3], frame
    frame = np.full((*shape[:-2], 2 * shape[-2], 3 * shape[-1]), 7, dtype)
    yield frame[..., ::2, ::3], frame
    yield np.empty(shape, dtype), None
    yield np.empty(shape, dtype, order="F"), None
    yield np.empty(shape, dtype)[..., ::-1, :], None
    yield np.empty(shape, dtype)[..., ::-1], None
    yield np.lib.format.open_memmap(folder / "out.npy", mode="w+", dtype=dtype, shape=shape), None
    yield Sink(shape, dtype), None


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["recursion", "biases"])
def test_out(name, dtype, tmp_path, monkeypatch):
    net, X, Y = PATHS[name], points(70, 4, 21).astype(dtype), points(41, 4, 22).astype(dtype)
    for side in (2048, 33):
        monkeypatch.setattr(_tiles, "SIDE", side)
        monkeypatch.setattr(_tiles, "FUSED_SIDE", side)
        for other, normalize in ((None, False), (None, True), (Y, False)):
            wanted = nf.gram(net, X, other, normalize=normalize)
            for out, frame in outputs(wanted.shape, dtype, tmp_path):
                assert nf.gram(net, X, other, out=out, normalize=normalize) is out
                np.testing.assert_array_equal(getattr(out, "_data", out), wanted)
                if frame is not None:
                    assert (frame == 7).sum() == frame.size - wanted.size + (wanted == 7).sum()
            wanted = nf.layer_grams(net, X, other)
            for out, frame in outputs(wanted.shape, dtype, tmp_path):
                assert nf.layer_grams(net, X, other, out=out) is out
                np.testing.assert_array_equal(getattr(out, "_data", out), wanted)
                if frame is not None:
                    assert (frame == 7).sum() == frame.size - wanted.size + (wanted == 7).sum()


@pytest.mark.usefixtures("route")
def test_out_of_a_tuple(tmp_path):
    net, X = nf.resnet(3), points(40, 4, 23)
    wanted = nf.gram(net, X, get=KINDS)
    outs = (np.empty((40, 40)), np.empty((40, 80))[:, ::2], Sink((40, 40), np.float64))
    got = nf.gram(net, X, get=KINDS, out=outs)
    assert got._fields == KINDS
    for out, given, K in zip(got, outs, wanted, strict=True):
        assert out is given
        np.testing.assert_array_equal(getattr(out, "_data", out), K)


def test_memmap_keeps_the_result(tmp_path):
    net, X = nf.resnet(3), points(40, 4, 24)
    path = tmp_path / "K.npy"
    nf.gram(net, X, out=np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(40, 40))).flush()
    np.testing.assert_array_equal(np.load(path), nf.gram(net, X))


def test_dtype():
    net, X = nf.resnet(3), points(20, 4, 25)
    np.testing.assert_array_equal(nf.gram(net, X, dtype=np.float32), nf.gram(net, X.astype(np.float32)))
    np.testing.assert_array_equal(nf.gram(net, X.astype(np.float32), dtype="float64"), nf.gram(net, X))
    K = nf.gram(net, X.astype(np.float32), X[:3], dtype=np.float64)
    np.testing.assert_array_equal(K, nf.gram(net, X, X[:3]))
    assert nf.diagonal(net, X, dtype=np.float32).dtype == np.float32
    assert nf.layer_grams(net, X, dtype=np.float32).dtype == np.float32


# Progress


def test_progress_bar(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    net, X = nf.resnet(3), points(131, 4, 26)
    for side, n in ((2048, 131), (33, 131), (17, 113), (7, 50)):
        monkeypatch.setattr(_tiles, "SIDE", side)
        monkeypatch.setattr(_tiles, "FUSED_SIDE", side)
        wanted = nf.gram(net, X[:n])
        assert capsys.readouterr() == ("", "")
        np.testing.assert_array_equal(nf.gram(net, X[:n], progress=True), wanted)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "100%" in shown.err
        nf.layer_grams(net, X[:n], X[:11], progress=True)
        assert "100%" in capsys.readouterr().err


def test_progress_without_tqdm(capsys, monkeypatch):
    for name in ("tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(_tiles, "SIDE", 33)
    monkeypatch.setattr(_tiles, "FUSED_SIDE", 33)
    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr(_tiles.time, "monotonic", lambda: float(next(clock)))
    net, X = nf.resnet(3), points(131, 4, 26)
    K = nf.gram(net, X, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "% done" in shown.err
    assert "s left" in shown.err
    np.testing.assert_array_equal(nf.gram(net, X), K)


# Inputs of every layout


def layouts(X):
    n, d = X.shape
    yield "Fortran", np.asfortranarray(X)
    wide = np.full((n, 2 * d + 3), np.nan)
    wide[:, 2 : 2 + d] = X
    yield "sliced columns", wide[:, 2 : 2 + d]
    wide = np.full((n, 3 * d), np.nan)
    wide[:, ::3] = X
    yield "strided columns", wide[:, ::3]
    tall = np.full((2 * n, d), np.nan)
    tall[::2] = X
    yield "strided rows", tall[::2]
    yield "negative rows", X[::-1].copy()[::-1]
    yield "negative columns", X[:, ::-1].copy()[:, ::-1]
    frozen = X.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen
    yield "big-endian", X.astype(">f8")
    yield "list", X.tolist()
    yield "tuple of rows", tuple(X)
    yield "matrix", memoryview(X)
    odd = np.zeros(X.nbytes + 1, np.uint8)[1:].view(np.float64).reshape(X.shape)
    odd[...] = X
    yield "unaligned", odd
    record = np.zeros(n, [("pad", np.uint8), ("row", np.float64, d)])
    record["row"] = X
    yield "field of records", record["row"]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("name", ["recursion", "biases"])
def test_layouts(name):
    net, X, Y = PATHS[name], points(40, 6, 27), points(21, 6, 28)
    X[5] = X[6] * (1 + 1e-9)  # a close pair: its rows are read again
    square, rectangle, other = nf.gram(net, X), nf.gram(net, X, Y), nf.gram(net, Y, X)
    for kind, x in layouts(X):
        before = np.array(x)
        for K, wanted in ((nf.gram(net, x), square), (nf.gram(net, x, Y), rectangle), (nf.gram(net, Y, x), other)):
            assert K.dtype == np.float64, kind
            # BLAS may choose another order of summation for another layout
            assert_close(K, wanted, np.abs(square).max(), 1e-14)
        np.testing.assert_array_equal(np.array(x), before, err_msg=kind)


def test_a_view_is_not_copied():
    from ntkfast._arrays import as_points

    X = points(40, 6, 29)
    for x in (X, X[::2], X[3:20, 1:4], np.broadcast_to(X[0], (7, 6))):
        assert np.shares_memory(as_points(x, "X", np.dtype(np.float64)).rows, X)


def test_broadcast_rows():
    x = points(1, 6, 30)[0]
    net = nf.resnet(3)
    K = nf.gram(net, np.broadcast_to(x, (40, 6)))
    assert_close(K, np.full((40, 40), nf.diagonal(net, x[None])[0]), K.max(), 1e-14)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_integers_become_float64(dtype):
    X = np.random.default_rng(31).integers(0, 2 if dtype is bool else 100, (20, 6)).astype(dtype)
    net = nf.resnet(3)
    K = nf.gram(net, X)
    assert K.dtype == np.float64
    np.testing.assert_array_equal(K, nf.gram(net, X.astype(np.float64)))
    np.testing.assert_array_equal(nf.gram(net, X, X.astype(np.float64)), nf.gram(net, X.astype(np.float64), X))


def test_big_endian_float32_is_float32():
    X = points(20, 6, 32).astype(np.float32)
    K = nf.gram(nf.resnet(3), X.astype(">f4"))
    assert K.dtype == np.float32
    np.testing.assert_array_equal(K, nf.gram(nf.resnet(3), X))


def test_torch():
    torch = pytest.importorskip("torch")
    X = points(20, 6, 33)
    net = nf.resnet(3)
    for dtype in (torch.float64, torch.float32):
        x = torch.from_numpy(X).to(dtype)
        K = nf.gram(net, x)
        assert isinstance(K, torch.Tensor)
        assert K.dtype == dtype
        np.testing.assert_array_equal(K.numpy(), nf.gram(net, x.numpy()))
        assert isinstance(nf.diagonal(net, x), torch.Tensor)
        assert all(isinstance(k, torch.Tensor) for k in nf.gram(net, x, get=("ntk", "nngp")))
        assert isinstance(nf.layer_grams(net, x, x[:3]), torch.Tensor)
    np.testing.assert_array_equal(nf.gram(net, torch.from_numpy(X).T.contiguous().T).numpy(), nf.gram(net, X))


# Instruction sets, threads, processes

RUN_ALL = """
import sys, numpy as np, ntkfast as nf
sys.path.insert(0, {tests!r})
from test_gram import PATHS, FREE, points
X, Y = points(150, 6, 34), points(61, 6, 35)
X[7] = X[8] * (1 + 1e-7)
X[9] = -X[10] * (1 + 1e-7)
result = {{}}
for name, net in (PATHS | FREE).items():
    for dtype in ("f8", "f4"):
        x, y = X.astype(dtype), Y.astype(dtype)
        result[f"{{name}} {{dtype}} square"] = nf.gram(net, x)
        result[f"{{name}} {{dtype}} rectangle"] = nf.gram(net, x, y)
        result[f"{{name}} {{dtype}} slices"] = nf.layer_grams(net, x[:40])
np.savez("result.npz", **result)
print(nf._core.isa(), nf._core.threads())
"""


def run_all(fresh_python, folder, **environment):
    shown = fresh_python(RUN_ALL.format(tests=os.path.dirname(__file__)), **environment)
    with np.load(folder / "result.npz") as data:
        return shown.split(), {name: data[name] for name in data.files}


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_numbers(isa, fresh_python, tmp_path):
    (used, _), got = run_all(fresh_python, tmp_path, NTKFAST_ISA=isa)
    assert used == isa
    _, wanted = run_all(fresh_python, tmp_path, NTKFAST_ISA=_core.available()[-1])
    for name, K in got.items():
        net = (PATHS | FREE)[name.rsplit(" ", 2)[0]]
        assert_close(K, wanted[name], np.abs(wanted[name]).max(initial=0), 2 * tolerance(net, K.dtype))


def test_unknown_instruction_set(fresh_python):
    code = """
import numpy as np, ntkfast as nf
try:
    nf.gram(nf.resnet(2), np.eye(2))
except RuntimeError as error:
    print(error)
"""
    shown = fresh_python(code, NTKFAST_ISA="v9")
    assert "NTKFAST_ISA=v9 is not available" in shown
    assert _core.available()[0] in shown


def test_pairs_on_every_instruction_set(isa, rng):
    x = np.concatenate([[0, 1e-300, 1e-16, 1.0], rng.uniform(0, 1, 60)])
    s, one = np.where(rng.uniform(size=64) < 0.5, -1.0, 1.0), np.ones(64)
    from ntkfast._plan import compile_network, mix_of

    for name in ("recursion", "signs", "biases", "erf"):
        core, mix = compile_network(PATHS[name], [], False).core, mix_of(PATHS[name], "ntk").as_list()
        wanted = _core.pairs(core, x, s, one, one, mix, False, _core.available()[-1])
        assert np.isfinite(wanted).all()
        assert_close(_core.pairs(core, x, s, one, one, mix, False, isa), wanted, np.abs(wanted).max(), 1e-14)


@pytest.mark.slow
def test_number_of_threads_does_not_change_results(fresh_python, tmp_path):
    (_, count), wanted = run_all(fresh_python, tmp_path, OMP_NUM_THREADS="1")
    assert count == "1"
    (_, count), got = run_all(fresh_python, tmp_path, OMP_NUM_THREADS="2")
    assert count == "2"
    # Hermite coefficients come from a matrix product, whose order of summation is the BLAS's own.
    for name, K in got.items():
        exact = not any(layer.activation.expanded for layer in (PATHS | FREE)[name.rsplit(" ", 2)[0]].layers)
        np.testing.assert_allclose(K, wanted[name], rtol=0 if exact else 1e-14, atol=0)


def test_threadpoolctl_is_obeyed():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    net, X = nf.resnet(3), points(200, 6, 36)
    wanted, before = nf.gram(net, X), _core.threads()
    for limit in (1, 2):
        with threadpoolctl.threadpool_limits(limit):
            assert _core.threads() == limit
            np.testing.assert_array_equal(nf.gram(net, X), wanted)
    assert _core.threads() == before


def test_concurrent_calls():
    X = points(150, 6, 37)
    nets = [PATHS[name] for name in ("recursion", "signs", "biases", "erf")]
    wanted = [nf.gram(net, X) for net in nets]
    found, start = deque(), threading.Barrier(8)

    def work(k):
        start.wait()
        for _ in range(5):
            found.append((k % 4, nf.gram(nets[k % 4], X)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 40
    for k, K in found:
        np.testing.assert_array_equal(K, wanted[k])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_a_call(fresh_python):
    code = """
import multiprocessing, warnings
import numpy as np, ntkfast as nf
warnings.simplefilter("ignore")  # newer interpreters warn of forks of a process with threads
X, nets = np.random.default_rng(0).standard_normal((300, 5)), [nf.resnet(5), nf.resnet(2, "erf")]
wanted = [nf.gram(net, X) for net in nets]
def work(queue):
    queue.put([bool((nf.gram(net, X) == K).all()) for net, K in zip(nets, wanted)])
context = multiprocessing.get_context("fork")
queue = context.Queue()
children = [context.Process(target=work, args=(queue,), daemon=True) for _ in range(2)]
for child in children:
    child.start()
print([queue.get(timeout=30) for _ in children])
print([bool((nf.gram(net, X) == K).all()) for net, K in zip(nets, wanted)])
"""
    assert fresh_python(code, timeout=60).split("\n")[:2] == ["[[True, True], [True, True]]", "[True, True]"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent")
@pytest.mark.parametrize("call", [
    "nf.gram(nf.resnet(3000), X)",
    "nf.gram(nf.resnet(300, 'erf'), X)",
    "nf.gram(nf.fully_connected(5, 'softplus', bias_variance=0.1), X)",
    "[nf.layer_grams(nf.resnet(150), X[:1200], out=out) for _ in range(50)]",
    "nf.gram(nf.resnet(500), X[:, :1], np.ones((9000, 1)))",
    "nf.gram(nf.resnet(2), wide)",
    "nf.gram_matmul(nf.resnet(300, 'erf'), X, X)",
    "nf.gram_matmul(nf.resnet(2), wide, wide[:, :600])",
])  # fmt: skip
def test_interrupt(call):
    code = f"""
import numpy as np, ntkfast as nf
X = np.random.default_rng(0).standard_normal((4000, 5))
wide = np.random.default_rng(0).standard_normal((6000, 20000), "f4") if {"wide" in call} else None
out = np.full((151, 1200, 1200), 1.0) if {"out=" in call} else None
nf.gram(nf.resnet(2), X[:50])
print("ready", flush=True)
{call}
"""
    long = {**os.environ, "NTKFAST_PATH": "recursion"}  # tables are done too soon
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=long
    ) as child:
        try:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(1.5)
            assert child.poll() is None, "the call is too short to be interrupted"
            sent = time.monotonic()
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=20)
            # One second is promised; the second one is for a busy machine and the end of the interpreter.
            assert time.monotonic() - sent < 2
            assert b"KeyboardInterrupt" in errors
        finally:
            child.kill()


def test_other_threads_run_meanwhile(monkeypatch):
    # Long calls, so that a thread that only runs between them would hardly get a turn.
    monkeypatch.setattr(_tiles, "_CALL", 100.0)
    monkeypatch.setenv("NTKFAST_PATH", "recursion")
    net, X = nf.resnet(600), points(1200, 4, 38)
    ticks, stop = 0, threading.Event()

    def work():
        nonlocal ticks
        while not stop.wait(0.002):
            ticks += 1

    thread = threading.Thread(target=work)
    thread.start()
    start = time.monotonic()
    nf.gram(net, X)
    elapsed = time.monotonic() - start
    stop.set()
    thread.join(10)
    assert elapsed > 0.1, "too fast to tell"
    assert ticks > 5 + elapsed / 0.05


MEMORY = """
import numpy as np, ntkfast as nf
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
{setup}
{warm}
now = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
{call}
print(status("VmHWM") - now, nf._core.threads())
"""
MEMORY_CASES = {
    # (setup, call, warm-up, bytes of working copies)
    "plain": ("X = np.random.default_rng(0).standard_normal((3000, 50)); out = np.full((3000, 3000), 1.0)",
              "nf.gram(nf.resnet(20), X, out=out)", 3000 * 50 * 8),
    "strided": ("X = np.random.default_rng(0).standard_normal((3000, 2000))[:, ::2]; out = np.full((3000, 3000), 1.0)",
                "nf.gram(nf.resnet(20), X, out=out)", 3000 * 1000 * 8),
    "integers": ("X = np.random.default_rng(0).integers(0, 9, (2000, 4000), 'u1'); out = np.full((2000, 2000), 1.0)",
                 "nf.gram(nf.resnet(20), X, out=out)", 2000 * 4000 * 8),
    "rectangle": ("X = np.random.default_rng(0).standard_normal((3000, 50)); out = np.full((3000, 2999), 1.0)",
                  "nf.gram(nf.resnet(20), X, X[1:], out=out)", 2 * 3000 * 50 * 8),
    "wide": ("X = np.random.default_rng(0).standard_normal((500, 30000)); out = np.full((500, 500), 1.0)",
             "nf.gram(nf.resnet(20), X, out=out)", 500 * 30000 * 8),
    "biases": ("X = np.random.default_rng(0).standard_normal((3000, 50)); out = np.full((3000, 3000), 1.0)",
               "nf.gram(nf.fully_connected(5, bias_variance=0.1), X, out=out)", 3000 * 50 * 8),
    "slices": ("X = np.random.default_rng(0).standard_normal((800, 50)); out = np.full((41, 800, 800), 1.0)",
               "nf.layer_grams(nf.resnet(40), X, out=out)", 800 * 50 * 8),
    "Fortran": ("X = np.random.default_rng(0).standard_normal((3000, 50)); out = np.full((3000, 3000), 1.0, order='F')",
                "nf.gram(nf.resnet(20), X, out=out)", 3000 * 50 * 8),
    "deep slices": ("X = np.random.default_rng(0).standard_normal((100, 5)); out = np.full((2001, 100, 100), 1.0)",
                    "nf.layer_grams(nf.resnet(2000, 'erf'), X, out=out)", 100 * 5 * 8),
    "product": ("X = np.random.default_rng(0).standard_normal((12000, 50)); V = np.ones((12000, 10))",
                "nf.gram_matmul(nf.resnet(3), X, V)", 12000 * (50 + 4 * 10) * 8),
    "product with many columns": ("X = np.random.default_rng(0).standard_normal((3000, 5)); V = np.ones((3000, 600))",
                                  "nf.gram_matmul(nf.resnet(3), X, V)", 3000 * (5 + 4 * 600) * 8),
    "diagonal": ("X = np.random.default_rng(0).standard_normal((200000, 5))",
                 "nf.diagonal(nf.fully_connected(5, 'gelu'), X)", 200000 * 5 * 8 * 2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
@pytest.mark.parametrize("case", MEMORY_CASES)
def test_memory(case, fresh_python):
    # VmHWM and not ru_maxrss: the latter starts at the size of the process that forked this one.
    setup, call, copies = MEMORY_CASES[case]
    warm = "nf.gram(nf.resnet(2), np.eye(300)); nf.gram(nf.resnet(2, 'erf'), np.eye(300))"
    used, threads = map(int, fresh_python(MEMORY.format(setup=setup, warm=warm, call=call)).split())
    assert used <= copies + threads * (64 << 20)


# Activations of the user


@pytest.mark.parametrize("name", ["tanh", "gelu", "erf"])
def test_functions_of_the_user(name):
    from math import erf

    functions = {
        "tanh": np.tanh,
        "gelu": lambda z: 0.5 * z * (1 + np.vectorize(erf)(z / np.sqrt(2))),
        "erf": np.vectorize(erf, otypes=[np.float64]),
    }
    X = points(12, 5, 39, zero=False)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    for builder in (nf.fully_connected, nf.resnet):
        own = builder(1, nf.Activation.from_function(functions[name], name="own"))
        for Z in (X, X[:3] * np.array([[0.5], [1.0], [1.3]])):
            wanted = nf.gram(builder(1, name), Z, get=KINDS)
            for K, L in zip(nf.gram(own, Z, get=KINDS), wanted, strict=True):
                root = np.sqrt(np.diag(L))
                assert_close(K, L, root[:, None] * root, 5e-12)


def test_a_kinked_function_is_refused_with_row_variance_and_cure():
    act = nf.Activation.from_function(lambda z: np.maximum(z, 0.0), name="kinked")
    X = points(5, 4, 40, zero=False)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    X[3] *= 2
    net = nf.Network([nf.Dense("relu"), nf.Dense(act, gain=2)])
    with pytest.raises(
        ValueError, match=r"'kinked'.*layer 2, row 3 of X, .*variance 4; normalise the rows or raise the tol"
    ):
        nf.gram(net, X)


def test_with_tolerance():
    loose = nf.Activation("tanh").with_tolerance(1e-4)
    assert loose != nf.Activation("tanh")
    assert loose.with_tolerance(1e-4) == loose
    X = 3 * np.eye(3)[:2] + np.eye(3)[1:]
    with pytest.raises(ValueError, match="relative tolerance 1e-12"):
        nf.gram(nf.fully_connected(1, "tanh", gain=1), X)
    net = nf.fully_connected(1, loose, gain=1)
    K = nf.gram(net, X, get="nngp")
    exact = reference.gram(nf.fully_connected(1, "tanh", gain=1), X, get="nngp")
    assert_close(K, exact, np.abs(exact).max(), 1e-3)


def test_a_function_that_is_not_finite_or_changes_shape():
    with np.errstate(all="raise"):
        poor = nf.Activation.from_function(lambda z: np.exp(z**4), name="poor")
        with pytest.raises(ValueError, match="'poor' is not finite"):
            nf.gram(nf.fully_connected(1, poor, gain=1), np.eye(2))
        short = nf.Activation.from_function(lambda z: z[..., :1], name="short")
        with pytest.raises(ValueError, match="'short' must return an array of the shape"):
            nf.gram(nf.fully_connected(1, short, gain=1), np.eye(2))

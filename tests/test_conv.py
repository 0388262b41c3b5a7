"""Convolutional networks against the definition, 40 digits, finite networks and special cases."""

from __future__ import annotations

import itertools
import pickle
import signal
import subprocess
import sys
import time

import conv_oracle
import numpy as np
import pytest
from conftest import assert_close

import ntkfast as nf
from ntkfast import _conv, _core
from ntkfast.reference import convolution as reference

KINDS = ("ntk", "nngp", "last_hidden")
LAYOUTS = list(itertools.product(["zeros", "circular"], ["flatten", "gap"]))
#: largest |K - reference| / sqrt(K_ii K_jj) for images in general position
BOUND = {np.float64: 1e-12, np.float32: 2e-6}
EXPANDED = ("silu", "softplus", "tanh")
ACTIVATIONS = ("relu", "leaky_relu", "abs", "identity", "erf", "gelu", "sin", "cos", "exp", "gaussian", *EXPANDED)


def images(n, grid, seed, channels=2):
    return np.random.default_rng(seed).standard_normal((n, *grid, channels)).astype(np.float32).astype(np.float64)


def compare(net, X, Y=None, kinds=KINDS):
    """Every kernel in both dtypes against the definition."""
    wanted, left = reference.gram(net, X, Y), reference.diagonals(net, X)
    right = left if Y is None else reference.diagonals(net, Y)
    for dtype, bound in BOUND.items():
        result = nf.gram(net, X, Y, get=kinds, dtype=dtype)
        for kind in kinds:
            K = getattr(result, kind)
            assert K.dtype == dtype
            assert_close(K, wanted[kind], np.sqrt(np.outer(left[kind], right[kind])), bound)
            if Y is None:
                assert (K == K.T).all()


@pytest.mark.parametrize("grid", [(5, 9), (1, 7), (7,), (8, 8), (3, 17)], ids=str)
@pytest.mark.parametrize("window", [1, 3, 5, (3, 5)], ids=str)
def test_relu_networks_follow_the_definition(grid, window):
    if isinstance(window, tuple) and len(grid) == 1:
        window = (5,)
    X, Y = images(3, grid, 1), images(2, grid, 2)
    X[1] *= 1.25
    for padding, readout in LAYOUTS:
        options = {"window": window, "padding": padding, "readout": readout}
        compare(nf.conv_net(3, **options), X)
        compare(nf.conv_net(2, "abs", first_trained=False, gain=0.7, **options), X, Y)
        compare(nf.conv_resnet(3, c_res=2.0, readout_trained=False, **options), X, Y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases_follow_the_definition(activation):
    X = images(2, (3, 4), 3) * (0.06 if activation in (*EXPANDED, "exp") else 0.4)
    for padding, readout in LAYOUTS if activation not in EXPANDED else LAYOUTS[1:2]:
        options = {"padding": padding, "readout": readout}
        compare(nf.conv_net(2, activation, bias_variance=0.2, weight_variance=0.9, **options), X)
        compare(nf.conv_resnet(3, activation, c_res=-0.7, **options), X, X[:1] * 0.5 + 0.1)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_slices_follow_the_backward_recursion(activation, padding):
    X, Y = images(3, (4, 5), 4) * 0.5, images(2, (4, 5), 5) * 0.5
    for net in (nf.conv_net(3, activation, padding=padding, first_trained=False, bias_variance=0.3),
                nf.conv_resnet(3, activation, padding=padding, window=(1, 3))):  # fmt: skip
        for other in (None, Y):
            wanted = reference.layer_grams(net, X, other)
            for dtype, bound in BOUND.items():
                G = nf.layer_grams(net, X, other, dtype=dtype)
                assert G.shape == wanted.shape == (len(net.slices), len(X), len(X if other is None else Y))
                assert_close(G, wanted, np.abs(wanted).max(), bound)
                K = nf.gram(net, X, other, dtype=dtype)
                assert_close(G.sum(axis=0), K, np.abs(K).max(), bound)


def hard_images():
    """Like photographs on plain backgrounds, multiples of 1/256: what makes correlations 1 up to rounding."""
    X = np.random.default_rng(1).integers(0, 256, (7, 5, 5, 3)) / 256.0
    X[1, 1:] = 0.5
    X[2, :3], X[2, 3:] = 0.5, X[1, 3:]
    X[3] = X[0]
    X[3, 2, 2, 1] += 2.0**-20
    X[4, :2], X[4, :, :3] = 0, 0
    X[5] = -X[0]
    X[6] = 0
    return X


@pytest.mark.slow
@pytest.mark.parametrize(("padding", "readout"), LAYOUTS)
@pytest.mark.parametrize("build", [nf.conv_net, nf.conv_resnet])
def test_hard_images_against_forty_digits(build, padding, readout):
    net, X = build(4, padding=padding, readout=readout), hard_images()
    own = [conv_oracle.pair(net, x, x) for x in X]
    for dtype, bound in BOUND.items():
        K = nf.gram(net, X, get=KINDS, dtype=dtype)
        for kind in KINDS:
            assert_close(np.diag(getattr(K, kind)), [float(k[kind]) for k in own], [float(k[kind]) for k in own], bound)
            assert (getattr(K, kind)[6] == 0).all()
    for i, j in ((0, 1), (1, 2), (0, 3), (0, 4), (0, 5), (1, 4)):
        wanted = conv_oracle.pair(net, X[i], X[j])
        for dtype, bound in BOUND.items():
            K = nf.gram(net, X[[i]], X[[j]], get=KINDS, dtype=dtype)
            for kind in KINDS:
                scale = float(own[i][kind] * own[j][kind]) ** 0.5
                assert_close(getattr(K, kind)[0, 0], float(wanted[kind]), scale, bound)


def photographs(height, width):
    """CIFAR-like: smooth colours in multiples of 1/256. A photograph; objects on its background and on flat ones of two
    brightnesses; a near copy; a zero border; a third of the photograph; one flat image."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:height, :width][..., None] / 8.0
    waves = np.sin(x * rng.uniform(0.2, 2, 3) + y * rng.uniform(0.2, 2, 3) + rng.uniform(0, 6, 3))
    X = np.repeat(0.5 + 0.3 * waves[None], 8, axis=0) + rng.normal(0, 0.03, (8, height, width, 3))
    thing = (slice(height // 3, height // 2 + 1), slice(width // 3, width // 2 + 1))
    inside = [image[thing].copy() for image in X]
    X[1:] = X[0]
    X[2], X[3] = 0.75, 0.3125
    X[1][thing], X[2][thing], X[3][thing] = inside[1:4]
    X = np.round(np.clip(X, 0, 1) * 256) / 256
    X[4, height // 2, width // 2, 0] += 1 / 256
    X[5, :2], X[5, -2:], X[5, :, :2], X[5, :, -2:] = 0, 0, 0, 0
    X[6] = X[0] / 3
    X[7] = 0.125
    return X.astype(np.float32).astype(np.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("readout", "padding", "grid", "window"), [
    ("flatten", "zeros", (16, 17), 3), ("flatten", "circular", (7, 9), 5), ("flatten", "zeros", (40,), 3),
    ("gap", "zeros", (6, 5), 3), ("gap", "circular", (5, 5), 3), ("gap", "zeros", (5, 6), 5)])  # fmt: skip
def test_photographs_against_forty_digits(readout, padding, grid, window):
    net = nf.conv_net(4, readout=readout, padding=padding, window=window)
    X = photographs(*grid) if len(grid) == 2 else photographs(8, *grid)[:, 4]
    pairs = [(0, 1), (0, 4), (0, 5), (0, 6), (2, 3), (1, 6), (2, 7), (3, 7)]
    own = [float(conv_oracle.pair(net, x, x)["ntk"]) for x in X]
    wanted = {(i, j): float(conv_oracle.pair(net, X[i], X[j])["ntk"]) for i, j in pairs}
    for dtype, bound in BOUND.items():
        K = nf.gram(net, X, dtype=dtype)
        for (i, j), value in wanted.items():
            assert_close(K[i, j], value, (own[i] * own[j]) ** 0.5, bound)


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40])
def test_every_width_and_every_seam(width):
    X = images(2, (2, width), 18)
    general = nf.Activation.leaky_relu(1e-13)  # another loop, same kernel
    for padding, readout in LAYOUTS:
        for window, build in ((3, nf.conv_net), (3, nf.conv_resnet), (5, nf.conv_net)):
            options = {"padding": padding, "readout": readout, "window": window}
            wanted = nf.gram(build(3, general, **options), X)
            for dtype, bound in BOUND.items():
                K = nf.gram(build(3, **options), X, dtype=dtype)
                assert_close(K, wanted, wanted.max(), max(bound, 1e-11))


@pytest.mark.parametrize("window", [3, (5, 3), (7, 3), (5, 5)], ids=str)
def test_a_circular_row_is_seen_again_and_again(window):
    for readout in ("flatten", "gap"):
        compare(nf.conv_net(2, window=window, padding="circular", readout=readout), images(2, (1, 4), 22))


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_correlations_may_fall_from_layer_to_layer(padding):
    """A few bright pixels: windows that meet late are nearly orthogonal, after layers where all others were close."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        X = np.zeros((2, 1, 12, 2))
        for x in X:
            some = rng.choice(12, rng.integers(1, 5), replace=False)
            x[0, some] = rng.uniform(0.1, 1, (len(some), 2)) ** 2
        compare(nf.conv_net(6, padding=padding), X)


def test_multiples_keep_their_digits():
    # s(c u) = c s(u): the kernel of an image and its multiple is a multiple of the kernel of the image and itself.
    for grid in ((5, 9), (3, 17), (7,)):
        X = images(2, grid, 19)
        Y = np.array([X[0] / 3, -X[0] / 3])
        for window, (padding, readout) in itertools.product((1, 3, 5), LAYOUTS):
            for net in (nf.conv_net(9, "relu", window=window, padding=padding, readout=readout, gain=9.0),
                        nf.conv_net(2, "abs", window=window, padding=padding, readout=readout)):  # fmt: skip
                wanted = nf.gram(net, X[:1], np.array([X[0], -X[0]])) / 3
                scale = nf.gram(net, X[:1])[0, 0] / 3
                for dtype, bound in BOUND.items():
                    assert_close(nf.gram(net, X[:1], Y, dtype=dtype), wanted, scale, bound)


def test_what_images_of_different_sizes_lose():
    """The bounds of the docstring of conv_net, c the ratio of the norms: K is homogeneous."""
    X, Y = images(2, (6, 6), 20), images(2, (6, 6), 21)
    for build, other in itertools.product((nf.conv_net, nf.conv_resnet), (X, Y)):
        net = build(3)
        wanted = nf.gram(net, X, other)
        size = np.sqrt(np.outer(nf.diagonal(net, X), nf.diagonal(net, other)))
        for power in (1, 4, 6):
            c = 2.0 ** (2 * power)
            for dtype, one, all_multiples in ((np.float64, 1e-16, 1e-8), (np.float32, 1e-8, 2e-4)):
                found = nf.gram(net, X * 2.0**power, other * 2.0**-power, dtype=dtype)
                bound = BOUND[dtype] + (c * one if other is Y else np.sqrt(c) * all_multiples)
                assert_close(found, wanted, size, bound)


def test_pooling_against_the_definition_where_background_is_constant():
    # All shifts of a constant background correlate exactly; the definition itself is good to 1e-8 there.
    X = np.full((2, 8, 8, 1), 0.25)
    X[0, 3, 3], X[1, 5, 2] = 0.75, 1.0
    net = nf.conv_net(4, readout="gap", padding="circular")
    assert_close(nf.gram(net, X), reference.gram(net, X)["ntk"], 4.0, 1e-7)
    shifted = np.roll(X, (2, 3), axis=(1, 2))
    assert_close(nf.gram(net, X, shifted), nf.gram(net, X, X), 4.0, 1e-14)


def test_a_window_of_one_is_a_dense_network_at_every_position():
    X = images(3, (2, 3), 6)
    dense = nf.Network([nf.Dense("relu")] * 3)
    wanted = sum(nf.gram(dense, X[:, r, c], X[:, r, c]) for r in range(2) for c in range(3))
    assert_close(nf.gram(nf.conv_net(3, window=1), X, X), wanted, wanted.max(), 1e-13)
    pooled = sum(
        nf.gram(dense, X[:, r, c], X[:, s, d])
        for r, c, s, d in itertools.product(range(2), range(3), range(2), range(3))
    )
    assert_close(nf.gram(nf.conv_net(3, window=1, readout="gap"), X, X), pooled / 36, wanted.max(), 1e-13)


def test_circular_pooling_is_the_mean_over_translations():
    X, Y = images(2, (4, 5), 7), images(3, (4, 5), 8)
    for build in (nf.conv_net, nf.conv_resnet):
        flat = build(3, padding="circular")
        shifts = [nf.gram(flat, X, np.roll(Y, (a, b), axis=(1, 2))) for a in range(4) for b in range(5)]
        wanted = np.mean(shifts, axis=0) / 20
        assert_close(nf.gram(build(3, padding="circular", readout="gap"), X, Y), wanted, wanted.max(), 1e-13)


def finite_network(net, X, width, rng):
    """Kernels of one convolutional network of finite width: outputs by hand, gradients layer by layer."""
    n, grid, channels = len(X), X.shape[1:-1], X.shape[-1]
    D = reference.slots(grid, net.windows(len(grid)), net.padding)
    count, p = D.shape

    def windows(x):  # (n, p, c) -> (n, p, q c)
        wide = np.concatenate([x, np.zeros((n, 1, x.shape[2]))], axis=1)
        return np.concatenate([wide[:, row] for row in D], axis=2)

    def scatter(g, c):  # the adjoint
        wide = np.zeros((n, p + 1, c))
        for k, row in enumerate(D):
            np.add.at(wide, (slice(None), row), g[:, :, k * c : (k + 1) * c])
        return wide[:, :p]

    x, tape = X.reshape(n, p, channels), []
    for layer in reference.layers(net, count):
        W = rng.standard_normal((width, count * x.shape[2]))
        z = windows(x)
        # weights beyond the first layer act on features of norm O(1): 1/sqrt(m) stands with the activation
        pre = np.sqrt(layer.cw) * z @ W.T
        amplitude = (layer.q if layer.p else np.sqrt(layer.r)) / np.sqrt(width)
        tape.append((layer, W, z, pre, amplitude, x.shape[2]))
        x = (layer.p * x if layer.p else 0.0) + amplitude * np.maximum(pre, 0)
    pooled = net.pooling == "gap"
    a = np.tile(rng.standard_normal(width) / p, (p, 1)) if pooled else rng.standard_normal((p, width))
    features = x.mean(axis=1) if pooled else x.reshape(n, -1)
    K, delta = features @ features.T, np.broadcast_to(a, x.shape)
    for layer, W, z, pre, amplitude, c in reversed(tape):
        inner = delta * amplitude * (pre > 0) * np.sqrt(layer.cw)
        gradient = np.einsum("npm,npk->nmk", inner, z).reshape(n, -1)
        K = K + gradient @ gradient.T
        delta = (layer.p * delta if layer.p else 0.0) + scatter(inner @ W, c)
    return K


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(6,), (3, 4)], ids=str)
@pytest.mark.parametrize(("padding", "readout"), LAYOUTS)
@pytest.mark.parametrize("build", [nf.conv_net, nf.conv_resnet])
def test_finite_networks_converge_to_the_kernel(build, grid, padding, readout):
    net, X, rng = build(3, padding=padding, readout=readout), images(3, grid, 9), np.random.default_rng(10)
    samples = np.array([finite_network(net, X, 192, rng) for _ in range(60)])
    wanted = nf.gram(net, X)
    error = np.abs(samples.mean(axis=0) - wanted) / np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    noise = samples.std(axis=0) / np.sqrt(len(samples)) / np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)))
    assert (error <= 4.5 * noise + 0.015).all(), (error, noise)
    assert noise.max() < 0.04


@pytest.mark.parametrize("readout", ["flatten", "gap"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_instruction_sets_agree(isa, readout, activation):
    net, X = nf.conv_net(3, activation, readout=readout), images(3, (5, 9), 11)
    problem = _conv.Problem(net, X, None, None, None, "channels_last")
    arguments = (problem.core, problem.geometry, problem.fast, problem.x.images)
    x, y = _core.ConvImages(*arguments, False, isa), _core.ConvImages(*arguments, readout == "gap", isa)
    sums = np.zeros((3, 3, 3))
    _core.conv_tile(problem.core, x, 0, y, 0, False, False, False, 0, 5 if readout == "gap" else 1, sums, None)
    wanted = reference.gram(net, X)["nngp"] * (45**2 if readout == "gap" else 1)
    assert_close(np.ldexp(sums[1], 2 * problem.exponent), wanted, wanted.max(), 1e-12)


def test_normalised_and_diagonal():
    for net in (nf.conv_net(3), nf.conv_resnet(2, "erf", readout="gap")):
        X = images(4, (4, 4), 12)
        K, d = nf.gram(net, X), nf.diagonal(net, X)
        assert_close(d, np.diag(K), d.max(), 1e-15)
        N = nf.gram(net, X, normalize=True)
        assert (np.diag(N) == 1).all()
        assert_close(N, K / np.sqrt(np.outer(d, d)), 1.0, 1e-14)
    X[1] = 0
    assert (nf.gram(nf.conv_net(3), X, normalize=True)[1] == 0).all()


def test_deep_networks_do_not_overflow():
    X = images(2, (4, 4), 13)
    net = nf.conv_net(700, gain=8.0)
    N = nf.gram(net, X, normalize=True, dtype=np.float32)
    assert_close(N, nf.gram(net, X, normalize=True), 1.0, 1e-4)
    with pytest.raises(OverflowError, match="normalize=True"):
        nf.gram(nf.conv_net(700, gain=32.0), X)


def test_sizes_of_images_do_not_matter():
    X = images(2, (4, 4), 14)
    net = nf.conv_net(3)
    K = nf.gram(net, X)
    assert_close(nf.gram(net, X * 2.0**300) * 2.0**-600, K, K.max(), 1e-14)
    assert_close(nf.gram(net, X * 2.0**-300) * 2.0**600, K, K.max(), 1e-14)


def test_tiles_and_outputs(tmp_path, monkeypatch):
    net, X = nf.conv_net(2), images(7, (4, 5), 15)
    K = nf.gram(net, X)
    monkeypatch.setattr(_conv, "_SIDE", 3)
    monkeypatch.setattr(_conv, "_CALL", 1e-9)
    out = np.lib.format.open_memmap(tmp_path / "K.npy", mode="w+", dtype=np.float64, shape=(7, 7))
    assert nf.gram(net, X, out=out) is out
    assert (out == K).all()
    assert_close(nf.gram(net, X, X[:4]), K[:, :4], K.max(), 1e-14)
    assert_close(nf.gram(net, X, X), K, K.max(), 1e-14)
    pooled = nf.conv_net(2, readout="gap")
    parts = nf.gram(pooled, X)
    monkeypatch.undo()
    assert_close(parts, nf.gram(pooled, X), parts.max(), 1e-15)
    first = nf.gram(net, np.moveaxis(X, -1, 1), data_format="channels_first")
    assert (first == K).all()
    assert (nf.gram(net, X[:1]) == K[0, 0]).all()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("readout", ["flatten", "gap"])
def test_control_c_stops_within_seconds(readout):
    code = f"""
import numpy as np, ntkfast as nf
X = np.random.default_rng(0).random((3000, 32, 32, 3))
print("ready", flush=True)
nf.gram(nf.conv_net(20, readout={readout!r}), X)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "ready\n"
        time.sleep(1.0)
        start = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
        # a second of the promise, and what a loaded machine adds
        assert time.monotonic() - start < 4
    assert "KeyboardInterrupt" in errors


def test_long_signals_and_large_windows():
    X = images(2, (450,), 16, channels=1)
    wanted = nf.gram(nf.conv_net(2, "relu", window=7), X)
    general = nf.gram(nf.conv_net(2, nf.Activation.leaky_relu(1e-13), window=7), X)
    assert_close(general, wanted, wanted.max(), 1e-11)
    compare(nf.conv_net(2, window=9, padding="circular", readout="gap"), images(2, (3, 4), 17))


def test_descriptions():
    net = nf.conv_net(3, "erf", window=(3, 5), readout="gap")
    assert pickle.loads(pickle.dumps(net)) == net
    assert hash(net) == hash(nf.conv_net(3, "erf", window=(3, 5), readout="gap"))
    assert repr(net) == "ConvNetwork([3 * Dense(Activation('erf'))], window=(3, 5), pooling='gap')"
    assert nf.conv_resnet(2).slices == ("1.W", "2.W", "readout")
    assert "2 images of 4x4" in nf.conv_net(2).plan(np.ones((2, 4, 4, 1)))
    assert (net(np.ones((2, 3, 3, 1))) == nf.gram(net, np.ones((2, 3, 3, 1)))).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nf.conv_net(0), "depth must be at least 1"),
        (lambda: nf.conv_net(1, window=2), "window must be odd"),
        (lambda: nf.conv_net(1, window=(3, 3, 3)), "3 sizes"),
        (lambda: nf.conv_net(1, padding="same"), "use one of zeros, circular"),
        (lambda: nf.conv_resnet(1, readout="max"), "use one of flatten, gap"),
        (lambda: nf.conv_net(1, "swish"), "unknown activation"),
        (lambda: nf.gram(nf.conv_net(1), np.ones((2, 3))), "one or two grid axes"),
        (lambda: nf.gram(nf.conv_net(1, window=(3, 3)), np.ones((2, 3, 1))), "2 sizes"),
        (lambda: nf.gram(nf.conv_net(1), np.ones((2, 3, 3, 1)), np.ones((2, 3, 4, 1))), "positions"),
        (lambda: nf.gram(nf.conv_net(1), np.ones((2, 3, 3, 1)), np.ones((2, 3, 3, 2))), "channels"),
        (lambda: nf.gram(nf.conv_net(1), np.full((2, 3, 3, 1), np.nan)), "row 0"),
        (lambda: nf.gram(nf.conv_net(1), np.ones((0, 3, 3, 1))), "empty"),
        (lambda: nf.gram(nf.conv_net(1), np.ones((2, 3, 3, 1)), device="gpu"), "use None, 'cpu', 'cuda'"),
        (lambda: nf.gram(nf.conv_net(1), np.ones((2, 3, 3, 1)), data_format="NCHW"), "channels_first"),
        (lambda: nf.gram(nf.resnet(1), np.ones((2, 3)), data_format="channels_first"), "for images"),
        (lambda: nf.layer_grams(nf.conv_net(1, readout="gap"), np.ones((2, 3, 3, 1))), "flatten"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

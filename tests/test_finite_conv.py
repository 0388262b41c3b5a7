"""Finite convolutional networks: against the definition written out, differences, PyTorch, and their infinite width."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import assert_close
from finite_cases import compare_differences
from threadpoolctl import threadpool_limits

import ntkfast as nf
from ntkfast import _passes, empirical
from ntkfast._windows import Windows
from ntkfast.reference import convolution
from ntkfast.reference import finite_convolution as reference

LAYOUTS = list(itertools.product(["zeros", "circular"], ["flatten", "gap"]))
ARCTAN = nf.Activation.from_function(np.arctan, lambda x: 1 / (1 + x * x), "arctan")
ACTIVATIONS = ("relu", "leaky_relu", "abs", "identity", "erf", "gelu", "silu", "softplus", "tanh", "sin", "cos", "exp",
               "gaussian", ARCTAN)  # fmt: skip


def mixed(w=1.0, **options):
    """Everything a ConvNetwork can be made of."""
    return nf.ConvNetwork(
        [nf.Dense("gelu", gain=1.4, weight_variance=0.8 * w, bias_variance=0.3),
         nf.Residual("abs", scale=-0.6, skip=0.9, weight_variance=w, bias_variance=0.2),
         nf.Dense("tanh", trained=False, weight_variance=w, bias_variance=0.5),
         nf.Residual("relu", scale=0.7, skip=-0.8, weight_variance=1.3 * w),
         nf.Residual("erf", scale=0.8, skip=0.0, weight_variance=w)],
        readout=nf.Readout(weight_variance=1.5), **options)  # fmt: skip


NETS = {
    "net": lambda **o: nf.conv_net(3, **o),
    "net, biases": lambda **o: nf.conv_net(2, "silu", weight_variance=0.7, bias_variance=0.4, gain=1.2, **o),
    "net, ends fixed": lambda **o: nf.conv_net(
        2, "tanh", first_trained=False, readout_trained=False, bias_variance=0.4, **o
    ),
    "resnet": lambda **o: nf.conv_resnet(3, c_res=2.0, **o),
    "one layer": lambda **o: nf.conv_resnet(1, "softplus", readout_trained=False, **o),
    "everything": mixed,
    # sums of nine slots at full variance amplify roundings: weights changed by 6e-8 change its gradients by 6e-6
    "everything, summed": lambda **o: mixed(0.15, average=False, **o),
}


def build(name, padding="zeros", pooling="flatten", window=3):
    """The builders call their pooling a readout."""
    options = {"padding": padding, "window": window}
    key = "pooling" if name.startswith("everything") else "readout"
    return NETS[name](**options, **{key: pooling})


def images(rng, grid, n=5, channels=2):
    X = rng.standard_normal((n, *grid, channels))
    X[1] = X[0]
    X[2] = -2 * X[0]
    X[3] = 0
    return X


def gradient(factor):
    """(n, parameters) from one pair of factors, whatever its axes."""
    A, D = np.asarray(factor.inputs, np.float64), np.asarray(factor.deltas, np.float64)
    G = np.einsum("ni,nj->nij" if A.ndim == 2 else "npi,npj->nij", D, A)
    return G.reshape(len(A), -1)


def compare(net, X, width, bounds=(1e-14, 1e-13), dtype=np.float64):
    """Outputs, every factor, and kernels, each relative to the largest entry."""
    network = nf.init(net, X.shape[1:], width, seed=3, dtype=dtype)
    points = X.astype(dtype)
    f = reference.finite_outputs(net, network.weights, points)
    found = network.outputs(points)
    assert found.dtype == dtype
    assert_close(found, f, np.abs(f).max() + 1e-3, bounds[1])
    J = reference.finite_jacobian(net, network.weights, points)
    factors = network.jacobian_factors(points)
    assert len(factors) == len(J) == len(net.slices)
    largest = max(np.abs(block).max() for block in J)
    for factor, block in zip(factors, J, strict=True):
        assert factor.inputs.dtype == factor.deltas.dtype == dtype
        assert_close(gradient(factor), block, largest, bounds[0])
    K = np.array([block @ block.T for block in J])
    scale = np.abs(K.sum(axis=0)).max()
    for ours in (nf.empirical_ntk(network, points, per_layer=True), nf.jacobian_gram(factors, per_layer=True)):
        assert ours.dtype == dtype
        assert_close(ours, K, scale, bounds[1])
    total = nf.empirical_ntk(network, points)
    assert_close(total, K.sum(axis=0), scale, bounds[1])
    assert (total == total.T).all()
    assert_close(nf.empirical_ntk(network, points, points[-2:]), K.sum(axis=0)[:, -2:], scale, bounds[1])
    assert_close(nf.jacobian_diagonal(factors), np.diag(K.sum(axis=0)), scale, bounds[1])
    return network


@pytest.mark.parametrize("window", [1, 3, 5, (3, 5)], ids=str)
@pytest.mark.parametrize("grid", [(5, 9), (1, 7), (2, 1), (1, 1), (7,), (1,)], ids=str)
def test_outputs_and_jacobians_are_those_of_the_definition(grid, window, rng):
    if isinstance(window, tuple) and len(grid) == 1:
        window = (7,)  # seven slots around one position: almost everything is outside
    X = images(rng, grid)
    for (padding, pooling), width in itertools.product(LAYOUTS, (1, 4)):
        for name in ("net", "resnet"):
            compare(build(name, padding, pooling, window), X, width)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("padding", "pooling"), LAYOUTS)
def test_every_layer(name, padding, pooling, rng):
    net = build(name, padding, pooling, (1, 3))
    compare(net, images(rng, (3, 4), channels=3), 6)
    compare(net, images(rng, (3, 4), n=4)[3:], 3)  # one sample, and that is zero
    compare(net, images(rng, (1, 5)), 6, (1e-6, 2e-6), np.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation, rng):
    X = (0.1 if activation == "exp" else 0.4) * images(rng, (3, 4))
    for padding, pooling in LAYOUTS:
        net = nf.conv_net(2, activation, bias_variance=0.2, padding=padding, readout=pooling)
        compare(net, X, 5)
        compare(nf.conv_resnet(2, activation, window=(1, 3), padding=padding, readout=pooling), X, 5)


@pytest.mark.parametrize("grid", [(4, 3), (5,)], ids=str)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("padding", "pooling"), LAYOUTS)
def test_factors_are_derivatives_of_the_outputs(name, grid, padding, pooling, rng):
    """Every weight moved: central differences of outputs(), no formula of the package."""
    net = build(name, padding, pooling)
    X = images(rng, grid)[[0, 2, 4]]
    network = nf.init(net, X.shape[1:], 3, seed=5)
    trained = iter(network.jacobian_factors(X))
    for step in network._steps:
        if not step.trained:
            continue
        A, D = next(trained)
        assert A.shape == (3, np.prod(grid), step.W.shape[1] + (step.beta is not None))
        assert D.shape == (3, np.prod(grid), 3)
        G = np.einsum("npi,npj->nji", A, D)
        compare_differences(network, X, step.W, G[:, :, : step.W.shape[1]])
        if step.beta is not None:
            compare_differences(network, X, step.beta, G[:, :, -1])
    if net.readout.trained:
        A, D = next(trained)
        assert A.shape == (3, network.weights[-1].size)
        assert (D == 1).all()
        compare_differences(network, X, network.weights[-1], A.reshape(3, *network.weights[-1].shape))
    assert next(trained, None) is None


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(("grid", "sizes"), [((5, 9), (3, 5)), ((2, 3), (7, 5)), ((1, 7), (3, 3)), ((4,), (9,))])
def test_windows(grid, sizes, circular, rng):
    """Slot by slot against the table of the definition, which is made of coordinates; and the adjoint."""
    windows = Windows(grid, 3, sizes, circular, False)
    table = convolution.slots(grid, sizes, "circular" if circular else "zeros")
    n, p, q = 4, windows.positions, windows.slots
    assert table.shape == (q, p)
    x, g, W = (rng.standard_normal(shape) for shape in ((n * p, 3), (n * p, 4), (4, q * 3)))
    padded = np.concatenate([x.reshape(n, p, 3), np.zeros((n, 1, 3))], axis=1)
    wanted = 2 * np.stack([padded[:, row] for row in table], axis=2).reshape(n * p, q * 3)
    out = np.full((n * p, q * 3 + 1), np.nan)[:, :-1]
    windows.gather(x, 2.0, out)
    assert (out == wanted).all()
    seen, read = np.empty((n * p, q * 4)), g @ W * wanted
    windows.gather(g, 2.0, seen)
    for back in (2 * windows.scatter(g @ W), seen @ windows.turned(W)):
        assert_close(np.sum(back * x), np.sum(read), np.sum(np.abs(read)), 1e-15)


def test_initialisation():
    net = mixed(window=(3, 5))
    network = nf.init(net, (4, 6, 7), 40, seed=0)
    m, q = 40, 15
    wide = (m, q * m)
    shapes = [(m, q * 7), (m,), wide, (m,), wide, (m,), wide, wide, (24, m)]
    assert [w.shape for w in network.weights] == shapes
    assert nf.init(mixed(pooling="gap"), (4, 6, 7), m, seed=0).weights[-1].shape == (m,)
    for w in network.weights:
        assert abs(w.std() - 1) < 5 / np.sqrt(2 * w.size)
        assert abs(w.mean()) < 5 / np.sqrt(w.size)
    single = nf.init(net, [4, 6, 7], m, seed=0, dtype="float32")
    for w, s in zip(network.weights, single.weights, strict=True):
        assert (s == w.astype(np.float32)).all()
    assert repr(network).endswith("width=40, float64)")


def test_one_position_is_a_dense_network(rng):
    layers = [nf.Dense("gelu", bias_variance=0.4), nf.Residual("relu", scale=0.6), nf.Dense("erf", weight_variance=0.7)]
    dense = nf.init(nf.Network(layers), 4, 9, seed=1)
    X = rng.standard_normal((6, 4))
    for grid, pooling in itertools.product([(1,), (1, 1)], ["flatten", "gap"]):
        network = nf.init(nf.ConvNetwork(layers, window=1, pooling=pooling), (*grid, 4), 9, seed=1)
        images = X.reshape(6, *grid, 4)
        assert_close(network.outputs(images), dense.outputs(X), 1.0, 1e-14)
        K = nf.empirical_ntk(dense, X, per_layer=True)
        assert_close(nf.empirical_ntk(network, images, per_layer=True), K, K.max(), 1e-14)


@pytest.mark.parametrize("narrow", [0, 128])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", NETS)
def test_wider_networks(name, dtype, narrow, rng, monkeypatch):
    """Long sums: both error goals at a width where rounding adds up, on both ways back through a convolution."""
    monkeypatch.setattr(_passes, "_NARROW", narrow)
    X = images(rng, (4, 6), channels=3)
    bounds = {np.float64: (1e-13, 1e-13), np.float32: (2e-6, 2e-6)}[dtype]
    compare(build(name), X, 40, bounds, dtype)
    compare(build(name, "circular", "gap"), X, 40, bounds, dtype)


def test_many_positions_in_float32(rng):
    """The mean over thousands of positions does not lose digits."""
    net, X = nf.conv_net(2, window=1, readout="gap"), rng.standard_normal((3, 5000, 4)).astype(np.float32)
    single, double = (nf.init(net, (5000, 4), 8, seed=0, dtype=t) for t in (np.float32, np.float64))
    for w, s in zip(double.weights, single.weights, strict=True):
        w[...] = s
    f, k = double.jacobian_factors(X.astype(float))[-1].inputs, nf.empirical_ntk(double, X.astype(float))
    assert_close(single.jacobian_factors(X)[-1].inputs, f, np.abs(f), 2e-7)
    assert_close(nf.empirical_ntk(single, X), k, k.max(), 2e-6)


def test_batches_of_samples_change_nothing(rng, monkeypatch):
    X = rng.standard_normal((23, 3, 3, 2))
    for net in (mixed(), mixed(pooling="gap")):
        network = nf.init(net, (3, 3, 2), 6, seed=0)
        f, factors, K = network.outputs(X), network.jacobian_factors(X), nf.empirical_ntk(network, X)
        with monkeypatch.context() as patch:
            patch.setattr("ntkfast.finite._BATCH", 0)
            patch.setattr("ntkfast.empirical._BATCH", 0)
            assert len(list(network._batches(23))) == 12  # two images, eighteen rows
            assert_close(network.outputs(X), f, 1.0, 1e-13)
            for (a, d), (A, D) in zip(network.jacobian_factors(X), factors, strict=True):
                assert_close(a, A, 1.0, 1e-13)
                assert_close(d, D, 1.0, 1e-13)
            assert_close(nf.empirical_ntk(network, X), K, K.max(), 1e-14)


@pytest.mark.parametrize("kept", ["factors", "gradients", "chosen"])
@pytest.mark.parametrize("cross", [False, True])
def test_tiles_of_samples_change_nothing(kept, cross, rng, monkeypatch):
    X, Y = rng.standard_normal((17, 5, 5, 2)), rng.standard_normal((6, 5, 5, 2)) if cross else None
    network = nf.init(mixed(), (5, 5, 2), 3, seed=0)
    K = nf.jacobian_gram(network.jacobian_factors(X), None if Y is None else network.jacobian_factors(Y),
                         per_layer=True)  # fmt: skip
    rule = empirical._Kept.of(network, 17, None)
    assert rule.gradients == (True, True, True, True, False)  # 19 3 and 28 3 numbers against 25 (19 + 3); the readout
    if kept != "chosen":
        rule = empirical._Kept(network, tuple(kept == "gradients" and p > 1 for p, _, _ in network.shapes))
        monkeypatch.setattr(empirical._Kept, "of", lambda *_: rule)
    size = rule.bytes_per_sample
    assert sum(f.inputs.nbytes + f.deltas.nbytes for f in rule.factors(X)) == 17 * size
    for samples in (None, 1, 3, 10):
        memory = None if samples is None else 2 * samples * size
        assert_close(nf.empirical_ntk(network, X, Y, per_layer=True, memory=memory), K, np.abs(K).max(), 1e-14)
        total = nf.empirical_ntk(network, X, Y, memory=memory)
        assert_close(total, K.sum(axis=0), np.abs(K).max(), 1e-14)
        assert cross or (total == total.T).all()


def test_what_is_kept():
    """Weight gradients where they are smaller and the contraction takes them."""

    def kept(grid, width, n=1000, m=None):
        network = nf.init(nf.conv_net(2), (*grid, 3), width, seed=0)
        rule = empirical._Kept.of(network, n, m)
        assert rule.bytes_per_sample <= network.bytes_per_sample
        return rule.gradients

    assert kept((32, 32), 16) == (True, True, False)
    assert kept((32, 32), 16, 7, 5) == (True, True, False)
    assert kept((2, 2), 64) == (False, False, False)
    assert kept((12, 12), 64) == (True, True, False)
    assert kept((8, 8), 256) == (True, False, False)


MEMORY = """
import re, numpy as np, ntkfast as nf
from pathlib import Path
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
X = np.random.default_rng(0).standard_normal((80, 32, 32, 3))
network = nf.init(nf.conv_net(3, readout="gap"), (32, 32, 3), 32, seed=0)
small = nf.init(network.net, (6, 6, 3), 32, seed=0)
nf.empirical_ntk(small, X[:, :6, :6])
before = peak()
network.outputs(X)
nf.empirical_ntk(network, X, memory={memory})
used = peak() - before
factors = network.jacobian_factors(X)
print(used, sum(a.nbytes + d.nbytes for a, d in factors), peak() - before)
"""


@pytest.mark.slow
def test_memory(fresh_python):
    """What is kept, and 64 MB for one thread; the factors of 1024 positions of all images take ten times as much."""
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for memory in (10 << 20, 4 << 30):  # in tiles, and everything at once: 12 MB of weight gradients
        used, factors, measured = map(int, fresh_python(MEMORY.format(memory=memory), **one).split())
        assert used < min(memory, 80 * 150_000) + 64e6
        assert factors == 80 * network_bytes()
        assert measured > 0.9 * factors > 400e6  # the measure works


def network_bytes():
    return nf.init(nf.conv_net(3, readout="gap"), (32, 32, 3), 32, seed=0).bytes_per_sample


def test_data_formats_and_kinds_of_images(rng):
    for grid in ((4, 5), (6,)):
        X = rng.integers(-3, 4, (5, *grid, 3))
        network = nf.init(nf.conv_net(2, "erf"), (*grid, 3), 6, seed=0)
        K, f = nf.empirical_ntk(network, X), network.outputs(X)
        scale = np.abs(f).max()
        assert K.dtype == f.dtype == np.float64
        first, option = np.moveaxis(X, -1, 1).astype(float), {"data_format": "channels_first"}
        cross = nf.empirical_ntk(network, first, first[:2], **option)
        assert_close(cross, nf.empirical_ntk(network, X, X[:2]), K.max(), 1e-15)
        assert_close(network.outputs(first, **option), f, scale, 1e-15)
        for left, right in zip(network.jacobian_factors(first, **option), network.jacobian_factors(X), strict=True):
            assert_close(left.inputs, right.inputs, 1 + np.abs(right.inputs), 1e-15)
        strided = np.repeat(X, 2, axis=1)[::-1, ::2].astype(">f8")
        assert_close(network.outputs(strided), f[::-1], scale, 1e-14)


def test_zero_gradients(rng):
    """Without biases ReLU networks and their gradients vanish on black images; nothing trained gives no factors."""
    X = images(rng, (3, 4))
    network = nf.init(nf.conv_net(2), (3, 4, 2), 8, seed=0)
    K = nf.empirical_ntk(network, X)
    assert (K[3] == 0).all()
    assert network.outputs(X)[3] == 0
    assert K[0, 0] > 0
    frozen = nf.ConvNetwork([nf.Dense(trained=False)], readout=nf.Readout(trained=False))
    network = nf.init(frozen, (3, 4, 2), 8, seed=0)
    assert network.jacobian_factors(X) == []
    assert (nf.empirical_ntk(network, X) == 0).all()
    assert nf.empirical_ntk(network, X, per_layer=True).shape == (0, 5, 5)


def test_bad_input():
    net = nf.conv_net(2)
    for kwargs, kind, words in [
        ({"input_shape": 3}, ValueError, "one or two grid axes"),
        ({"input_shape": (3,)}, ValueError, "one or two grid axes"),
        ({"input_shape": (4, 4, 4, 3)}, ValueError, "one or two grid axes"),
        ({"input_shape": (4, 0, 3)}, ValueError, "input_shape must be at least 1"),
        ({"input_shape": (4, 4.0, 3)}, TypeError, "input_shape must be an integer"),
        ({"net": nf.conv_net(2, window=(3, 3)), "input_shape": (4, 3)}, ValueError, "1 axes"),
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"device": "tpu"}, ValueError, "use None"),
        ({"net": nf.conv_net(1, nf.Activation.from_function(np.arctan))}, ValueError, "derivative"),
    ]:
        with pytest.raises(kind, match=words):
            nf.init(**({"net": net, "input_shape": (4, 4, 3), "width": 4, "seed": 0} | kwargs))
    with pytest.raises(nf.OutOfMemoryError):
        nf.init(net, (4, 4, 3), 10**6, seed=0)
    with pytest.raises(nf.OutOfMemoryError):  # the readout of all positions alone: 80 TB
        nf.init(net, (10**5, 10**5, 3), 1000, seed=0)
    network, X = nf.init(net, (4, 5, 3), 4, seed=0), np.ones((2, 4, 5, 3))
    bad = X.copy()
    bad[1, 2, 3, 1] = np.inf
    for given, option, kind, words in [
        (X[:, :, :4], {}, ValueError, r"\(n, 4, 5, 3\) for this network \(channels_last\), got \(2, 4, 4, 3\)"),
        (X[0], {}, ValueError, r"\(n, 4, 5, 3\)"),
        (X.reshape(2, 20, 3), {}, ValueError, r"\(n, 4, 5, 3\)"),
        (X[:0], {}, ValueError, "empty"),
        (X, {"data_format": "channels_first"}, ValueError, r"\(n, 3, 4, 5\) for this network \(channels_first\)"),
        (X, {"data_format": "NCHW"}, ValueError, "use one of channels_last, channels_first"),
        (X.astype(np.float32), {}, TypeError, "float32"),
        (X.astype(complex), {}, TypeError, "complex"),
        (bad, {}, ValueError, "row 1"),
    ]:
        for call in (network.outputs, network.jacobian_factors, lambda X, **o: nf.empirical_ntk(network, X, **o)):
            with pytest.raises(kind, match=words):
                call(given, **option)
    with pytest.raises(ValueError, match="Y must have shape"):
        nf.empirical_ntk(network, X, X[:, :3])
    with pytest.raises(ValueError, match="for images"):
        nf.init(nf.resnet(2), 3, 4, seed=0).outputs(np.eye(3), data_format="channels_first")
    with pytest.raises(ValueError, match="not a ConvNetwork"):
        nf.third_order_kernel(nf.init(nf.conv_net(1, "tanh"), (4, 3), 4, seed=0), np.ones((2, 4, 3)))


# Infinite width


def averages(net, X, width, count, start):
    """Kernels of many networks, (count, layers, n, n)."""
    with threadpool_limits(1):  # small products; threads of a busy machine would only wait for each other
        return np.array([nf.empirical_ntk(nf.init(net, X.shape[1:], width, seed=start + seed), X, per_layer=True)
                         for seed in range(count)])  # fmt: skip


class Limit:
    """The limit of infinite width from networks of two widths: 2 mean(2 m) - mean(m) has no error of order 1/m."""

    def __init__(self, narrow, wide):
        self.value = 2 * wide.mean(axis=0) - narrow.mean(axis=0)
        variances = 4 * wide.var(axis=0, ddof=1) / len(wide) + narrow.var(axis=0, ddof=1) / len(narrow)
        self.noise = np.sqrt(variances)

    def z(self, wanted):
        """The largest deviation in units of its standard error."""
        return float(np.max(np.abs(self.value - wanted) / self.noise))


WIDE = {
    "net": (lambda pooling: nf.conv_net(2, bias_variance=0.2, readout=pooling), (3, 3)),
    "resnet": (lambda pooling: nf.conv_resnet(3, c_res=2.0, padding="circular", readout=pooling), (6,)),
    "smooth resnet": (lambda pooling: nf.ConvNetwork(
        [nf.Dense("gelu"), *[nf.Residual("gelu", scale=1.2, bias_variance=0.2)] * 2], pooling=pooling), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("pooling", ["flatten", "gap"])
@pytest.mark.parametrize("name", WIDE)
def test_averages_converge_to_the_kernel(name, pooling, monkeypatch):
    """Total and every layer within 4 standard errors; the same average is 8 and more away from wrong kernels."""
    make, grid = WIDE[name]
    net = make(pooling)
    X = 0.7 * np.random.default_rng(4).standard_normal((3, *grid, 2))
    X[1] = X[0] + 0.3 * X[1]
    narrow, wide = averages(net, X, 24, 400, 0), averages(net, X, 48, 400, 10**6)
    slices, total = Limit(narrow, wide), Limit(narrow.sum(axis=1), wide.sum(axis=1))
    K = nf.gram(net, X)
    wanted = convolution.layer_grams(net, X)
    assert_close(wanted.sum(axis=0), K, K.max(), 1e-12)
    if pooling == "flatten":
        assert_close(nf.layer_grams(net, X), wanted, K.max(), 1e-12)
    assert slices.z(wanted) < 4
    assert total.z(K) < 4
    # 1/q forgotten, or put where there is none
    other = nf.ConvNetwork(net.layers, window=net.window, padding=net.padding, average=not net.average, pooling=pooling)
    assert total.z(nf.gram(other, X)) > 8
    # the other readout
    assert total.z(nf.gram(make("gap" if pooling == "flatten" else "flatten"), X)) > 8
    if "resnet" in name:  # a branch without its mean
        layers = convolution.layers
        monkeypatch.setattr(convolution, "layers", lambda *args: [k._replace(q=0.0) for k in layers(*args)])
        wrong = convolution.layer_grams(net, X)
        assert total.z(wrong.sum(axis=0)) > 8
        assert slices.z(wrong) > 8


def test_the_check_against_the_network():
    X = 0.7 * np.random.default_rng(4).standard_normal((3, 4, 5, 2))
    for pooling, names in (("flatten", ("1.W", "2.W", "readout")), ("gap", ())):
        net = nf.conv_resnet(2, "erf", readout=pooling)
        with threadpool_limits(1):
            check = nf.check_against_network(net, X, [16, 256], seeds=6)
        assert check.names == names
        assert check.total.shape == (2, 6)
        assert check.layers.shape == (2, 6, len(names))
        assert check.total[1].mean() < 0.5 * check.total[0].mean()
        assert check.total[1].max() < 0.3
        assert (check.layers[1].mean(axis=0) < 0.5 * check.layers[0].mean(axis=0)).all()
        assert len(str(check).splitlines()) == 3
        first = nf.check_against_network(net, np.moveaxis(X, -1, 1), [16], seeds=6, data_format="channels_first")
        assert_close(first.total, check.total[:1], 1.0, 1e-12)
    with pytest.raises(TypeError, match="ConvNetwork"):
        nf.check_against_network("conv_net", X, 4)

"""Finite networks: outputs and factors against the definition written out, initialisation, convergence to gram."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle

import numpy as np
import pytest
from conftest import assert_close
from finite_cases import compare_differences

import ntkfast as nf
from ntkfast import reference
from ntkfast._contract import sample_tiles

ARCTAN = nf.Activation.from_function(np.arctan, lambda x: 1 / (1 + x * x), "arctan")
MIXED = nf.Network(
    [nf.Dense("relu", bias_variance=0.3, weight_variance=0.8),
     nf.Residual("abs", scale=-0.6, skip=0.9, bias_variance=0.2),
     nf.Bottleneck("softplus", scale=0.5, skip=-0.7, bias_variance=0.4, outer_bias_variance=0.6, weight_variance=1.7),
     nf.Linear(bias_variance=0.2, weight_variance=1.3),
     nf.Bottleneck("erf", scale=0.5, skip=0.0, gain=1.5),
     nf.Residual("tanh", scale=0.4, skip=0.0, weight_variance=0.5)],
    nf.Readout(weight_variance=1.5, bias_variance=0.7),
)  # fmt: skip
NETS = {
    "fully connected": nf.fully_connected(3),
    "fully connected, variances": nf.fully_connected(2, "gelu", gain=1.3, weight_variance=1.2, bias_variance=0.3),
    "readout fixed": nf.fully_connected(2, "silu", readout_trained=False),
    "one layer": nf.fully_connected(1),
    "resnet": nf.resnet(4, c_res=2.0),
    "resnet, leaky": nf.resnet(3, nf.Activation.leaky_relu(0.2)),
    "bottleneck": nf.bottleneck_resnet(3, alpha=0.7),
    "bottleneck, all trained": nf.bottleneck_resnet(2, "cos", first_trained=True, readout_trained=True),
    "fixed readout": nf.fixed_readout_resnet(3, theta=0.5),
    "fixed readout, wide end": nf.fixed_readout_resnet(2, theta=0.8, last_width_ratio=1.7),
    "fixed readout, depth 1": nf.fixed_readout_resnet(1),
    "everything": MIXED,
    "residual first": nf.Network([nf.Residual("sin", scale=0.5, skip=0.8), nf.Dense("erf", trained=False)]),
    "frozen inside": nf.Network([nf.Dense("gaussian"), nf.Bottleneck("relu", scale=0.3, trained=False),
                                 nf.Dense("tanh")]),
    "user function": nf.fully_connected(2, ARCTAN),
    "exp": nf.Network([nf.Dense("exp", weight_variance=0.1), nf.Dense("erf")]),
    "identity": nf.Network([nf.Dense("identity"), nf.Dense(nf.Activation.leaky_relu(1.0))]),
}  # fmt: skip


def points(rng, n=7, d=5):
    X = rng.standard_normal((n, d))
    X[1] = X[0]
    X[2] = -2 * X[0]
    X[3] = 0
    return X


def largest(blocks):
    return max(np.abs(b).max() for b in blocks)


@pytest.mark.parametrize("width", [1, 2, 13])
@pytest.mark.parametrize("name", NETS)
def test_outputs_and_jacobians_are_those_of_the_definition(name, width, rng):
    net, X = NETS[name], points(rng)
    network = nf.init(net, 5, width, seed=3)
    f = reference.finite_outputs(net, network.weights, X)
    assert_close(network.outputs(X), f, np.abs(f).max() + 1, 1e-14)
    J = reference.finite_jacobian(net, network.weights, X)
    factors = network.jacobian_factors(X)
    assert len(factors) == len(J) == len(net.slices)
    for (A, D), block in zip(factors, J, strict=True):
        gradient = np.einsum("ni,nj->nij", D, A).reshape(len(X), -1)
        assert_close(gradient, block, largest(J) + 1, 1e-14)
    K = np.array([block @ block.T for block in J])
    assert_close(nf.empirical_ntk(network, X, per_layer=True), K, np.abs(K).max() + 1e-300, 1e-13)
    assert_close(nf.empirical_ntk(network, X), K.sum(axis=0), np.abs(K).max() + 1e-300, 1e-13)


@pytest.mark.parametrize("name", [n for n in NETS if "fixed readout" not in n])
def test_factors_are_derivatives_of_the_outputs(name, rng):
    """Every weight moved: central differences of outputs(), no formula of the package."""
    net = NETS[name]
    X = points(rng)[[0, 2, 4]]
    network = nf.init(net, 5, 4, seed=5)
    trained = iter(network.jacobian_factors(X))
    for step in network._steps:
        groups = [(step.W, step.beta)] + ([(step.V, step.outer_beta)] if step.V is not None else [])
        for matrix, bias in groups if step.trained else []:
            A, D = next(trained)
            assert A.shape[1] == matrix.shape[1] + (bias is not None)
            G = np.einsum("ni,nj->nij", D, A)
            compare_differences(network, X, matrix, G[:, :, : matrix.shape[1]])
            if bias is not None:
                compare_differences(network, X, bias, G[:, :, -1])
    assert len(list(trained)) == net.readout.trained


@pytest.mark.parametrize(("depth", "theta"), [(1, 1.0), (2, 0.5), (4, 0.7)])
def test_gradients_of_the_fixed_readout_are_equation_2(depth, theta, rng):
    net = nf.fixed_readout_resnet(depth, theta=theta, last_width_ratio=1.5)
    network = nf.init(net, 5, 12, seed=1)
    X = points(rng)
    factors = network.jacobian_factors(X)
    for i, x in enumerate(X):
        wanted = reference.fixed_readout_jacobian(network.weights, x, theta)
        for (A, D), block in zip(factors, wanted, strict=True):
            assert_close(math.sqrt(12) * np.outer(A[i], D[i]), block, np.abs(block).max() + 1, 1e-14)
    # the matrices of the last layer have m_{L+1} rows of variance 2/m_{L+1}, the readout as many +1 as -1
    assert network.weights[-2].shape == (18, 12)
    assert sorted(network.weights[-1]) == [-1.0] * 9 + [1.0] * 9


def test_initialisation_has_the_stated_variances():
    network = nf.init(MIXED, 200, 300, seed=0)
    for w in network.weights:
        assert abs(w.std() - 1) < 5 / math.sqrt(2 * w.size) or w.size == 1
        assert abs(w.mean()) < 5 / math.sqrt(w.size)
    shapes = [w.shape for w in network.weights]
    m = 300
    square = [(m, m), (m,)]
    assert shapes == [(m, 200), (m,), *square, *square, *square, *square, (m, m), (m, m), (m, m), (m,), (1,)]
    network = nf.init(nf.fixed_readout_resnet(3, last_width_ratio=0.5), 100, 400, seed=0)
    for w in network.weights[:-1]:
        assert abs(w.std() * math.sqrt(len(w) / 2) - 1) < 5 / math.sqrt(2 * w.size)
    assert [len(w) for w in network.weights] == [400, 400, 400, 200, 200]
    # the fixed map in front of a residual layer
    network = nf.init(nf.bottleneck_resnet(1), 7, 30, seed=0)
    assert [w.shape for w in network.weights] == [(30, 7), (30, 30), (30, 30), (30,)]
    assert len(network.jacobian_factors(np.eye(7))) == 2


def test_seeds():
    net = nf.resnet(2)
    a, b = nf.init(net, 3, 8, seed=7), nf.init(net, (3,), 8, seed=np.random.default_rng(7))
    c, single = nf.init(net, 3, 8, seed=8), nf.init(net, 3, 8, seed=7, dtype=np.float32)
    for x, y, z, s in zip(a.weights, b.weights, c.weights, single.weights, strict=True):
        assert (x == y).all()
        assert (x != z).all()
        assert s.dtype == np.float32
        assert (s == x.astype(np.float32)).all()


@pytest.mark.parametrize("name", ["fully connected", "everything", "fixed readout", "user function"])
def test_float32(name, rng):
    net, X = NETS[name], points(rng).astype(np.float32)
    single, double = (nf.init(net, 5, 40, seed=2, dtype=t) for t in (np.float32, np.float64))
    f, F = single.outputs(X), double.outputs(X.astype(float))
    assert f.dtype == np.float32
    assert_close(f, F, np.abs(F).max(), 3e-6)
    k, K = nf.empirical_ntk(single, X), nf.empirical_ntk(double, X.astype(float))
    assert k.dtype == np.float32
    assert_close(k, K, np.abs(K).max(), 5e-6)


def test_batches_of_samples_change_nothing(rng, monkeypatch):
    X = rng.standard_normal((50, 5))
    network = nf.init(MIXED, 5, 11, seed=0)
    f, factors = network.outputs(X), network.jacobian_factors(X)
    monkeypatch.setattr("ntkfast.finite._BATCH", 0)  # sixteen samples at a time
    assert len(list(network._batches(50))) == 4
    assert_close(network.outputs(X), f, 1.0, 1e-13)
    for (a, d), (A, D) in zip(network.jacobian_factors(X), factors, strict=True):
        assert_close(a, A, 1.0, 1e-13)
        assert_close(d, D, 1.0, 1e-13)


@pytest.mark.parametrize("name", ["fully connected", "everything", "fixed readout, wide end"])
@pytest.mark.parametrize("cross", [False, True])
def test_tiles_of_samples_change_nothing(name, cross, rng):
    net = NETS[name]
    X, Y = rng.standard_normal((23, 5)), rng.standard_normal((9, 5)) if cross else None
    network = nf.init(net, 5, 11, seed=0)
    size = network.bytes_per_sample
    assert sum(x.nbytes for f in network.jacobian_factors(X) for x in f) == 23 * size
    K = nf.empirical_ntk(network, X, Y, per_layer=True, memory=1 << 30)
    for samples in (1, 3, 10, 100):
        memory = 2 * samples * size
        assert_close(nf.empirical_ntk(network, X, Y, per_layer=True, memory=memory), K, np.abs(K).max(), 1e-14)
        total = nf.empirical_ntk(network, X, Y, memory=memory)
        assert_close(total, K.sum(axis=0), np.abs(K).max(), 1e-14)
        assert cross or (total == total.T).all()
    out = Slices((23, 9 if cross else 23))
    nf.empirical_ntk(network, X, Y, out=out, memory=10 * size)
    assert_close(out.array, K.sum(axis=0), np.abs(K).max(), 1e-14)


class Slices:
    """Nothing but slice assignment."""

    def __init__(self, shape, dtype=np.float64):
        self.array, self.shape, self.dtype = np.full(shape, np.nan, dtype), shape, np.dtype(dtype)

    def __setitem__(self, key, value):
        self.array[key] = value


def test_the_rule_for_keeping_factors():
    assert sample_tiles(100, None, 10, 1000) is None
    assert sample_tiles(50, 50, 10, 1000) is None
    tiles = sample_tiles(101, None, 10, 1000)
    assert [t.stop - t.start for t in tiles] == [33, 34, 34]
    assert tiles[0].start == 0
    assert tiles[-1].stop == 101
    assert len(sample_tiles(5, None, 10, 1)) == 5  # at least one sample, whatever the memory


def test_factors_of_a_tile_are_made_once_a_row(rng, monkeypatch):
    network = nf.init(nf.fully_connected(2), 3, 8, seed=0)
    made = []
    original = type(network).factors
    monkeypatch.setattr(type(network), "factors", lambda self, x: made.append(len(x)) or original(self, x))
    X = rng.standard_normal((40, 3))
    nf.empirical_ntk(network, X)
    assert made == [40]
    made.clear()
    nf.empirical_ntk(network, X, memory=20 * network.bytes_per_sample)  # tiles of ten samples, four a side
    assert sum(made) == 4 * 10 + 6 * 10  # four rows kept, six tiles beside them


MEMORY = """
import re, numpy as np, ntkfast as nf
from pathlib import Path
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
network = nf.init(nf.fully_connected(4), 100, 800, seed=0)
X = np.random.default_rng(0).standard_normal((3000, 100))
out = np.ones((3000, 3000))
nf.empirical_ntk(network, X[:600])
before = peak()
nf.empirical_ntk(network, X, out=out, memory={memory})
print(peak() - before)
"""


@pytest.mark.slow
def test_memory(fresh_python):
    """What is kept, and 64 MB for one thread; the factors of all samples would be 156 MB."""
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    assert int(fresh_python(MEMORY.format(memory=40 << 20), **one)) < (40 << 20) + 64e6
    assert int(fresh_python(MEMORY.format(memory=4 << 30), **one)) > 110e6  # the measure works


CONVERGING = ["fully connected, variances", "resnet", "bottleneck, all trained", "fixed readout, wide end",
              "everything", "residual first", "user function"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERGING)
def test_wide_networks_converge_to_gram_like_one_over_root_width(name):
    X = np.random.default_rng(2).standard_normal((5, 4)) / 2
    widths = [64, 256, 1024]
    check = nf.check_against_network(NETS[name], X, widths, seeds=24)
    rms = np.sqrt(np.mean(check.total**2, axis=1))
    slope = np.polyfit(np.log(widths), np.log(rms), 1)[0]
    assert -0.65 < slope < -0.35
    assert (np.abs(np.log(rms / check.expected)) < 0.4).all()
    assert rms[-1] < 0.2
    # every layer by itself: the average over networks has a gap of the size of the noise of 24 of them
    layers = np.sqrt(np.mean(check.layers**2, axis=1))
    assert (layers[-1] < 0.5 * layers[0]).all()
    assert check.bias[-1] < 0.5 * rms[-1]


def test_the_check_notices_another_kernel(monkeypatch):
    """A kernel that is wrong by a half has a gap that does not fall with the width."""
    X = np.eye(3)
    right = nf.check_against_network(nf.fully_connected(2), X, [2000], seeds=3)
    monkeypatch.setattr("ntkfast.empirical.layer_grams", lambda net, X, **_: 1.5 * nf.layer_grams(net, X))
    wrong = nf.check_against_network(nf.fully_connected(2), X, [2000], seeds=3)
    assert right.total.max() < 0.15 < 0.25 < wrong.total.min()


def test_the_check_prints_a_table():
    check = nf.check_against_network(nf.resnet(2), np.eye(3), [32, 64], seeds=[5, 6])
    lines = str(check).splitlines()
    assert len(lines) == 3
    assert "c/sqrt(m)" in lines[0]
    assert f"{check.expected[1]:.4f}" in lines[2]
    np.testing.assert_allclose(check.expected[0] / check.expected[1], math.sqrt(2))


def test_zero_gradients():
    """A zero row of a bias-free ReLU network, and a network in which nothing is trained."""
    network = nf.init(nf.fully_connected(2), 3, 8, seed=0)
    X = np.array([[0.0, 0, 0], [1, 2, 3]])
    assert network.outputs(X)[0] == 0
    K = nf.empirical_ntk(network, X)
    assert (K[0] == 0).all()
    assert K[1, 1] > 0
    frozen = nf.Network([nf.Dense("relu", trained=False)], nf.Readout(trained=False))
    network = nf.init(frozen, 3, 8, seed=0)
    assert network.jacobian_factors(X) == []
    assert (nf.empirical_ntk(network, X) == 0).all()
    assert nf.empirical_ntk(network, X, per_layer=True).shape == (0, 2, 2)


def test_bad_input():
    net = nf.fully_connected(2)
    for kwargs, kind, words in [
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"width": 2.5}, TypeError, "width"),
        ({"input_shape": (3, 3)}, ValueError, "number of features"),
        ({"input_shape": 0}, ValueError, "input_shape"),
        ({"seed": None}, TypeError, "seed"),
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
        ({"seed": np.int64(-3)}, ValueError, "seed must not be negative"),
        ({"dtype": "float16"}, TypeError, "float32 or float64"),
        ({"device": "tpu"}, ValueError, "use None"),
        ({"net": "resnet"}, TypeError, "Network"),
        ({"net": nf.fully_connected(1, nf.Activation.from_function(np.arctan))}, ValueError, "derivative"),
    ]:
        given = {"net": net, "input_shape": 3, "width": 4, "seed": 0} | kwargs
        with pytest.raises(kind, match=words):
            nf.init(**given)
    with pytest.raises(nf.OutOfMemoryError):
        nf.init(net, 3, 10**7, seed=0)
    network = nf.init(net, 3, 4, seed=0)
    for X, kind, words in [
        (np.eye(4), ValueError, "4 features"),
        (np.ones(3), ValueError, "shape"),
        (np.ones((0, 3)), ValueError, "empty"),
        (np.eye(3, dtype=np.float32), TypeError, "float32"),
        (np.array([[1.0, 2, 3], [1, np.nan, 3]]), ValueError, "row 1"),
        (np.eye(3, dtype=complex), TypeError, "complex"),
    ]:
        for call in (network.outputs, network.jacobian_factors, lambda X: nf.empirical_ntk(network, X)):
            with pytest.raises(kind, match=words):
                call(X)
    with pytest.raises(TypeError, match="FiniteNetwork"):
        nf.empirical_ntk(net, np.eye(3))
    with pytest.raises(ValueError, match="memory"):
        nf.empirical_ntk(network, np.eye(3), memory=0)
    with pytest.raises(ValueError, match="shape"):
        nf.empirical_ntk(network, np.eye(3), out=np.empty((2, 3)))
    assert nf.empirical_ntk(network, np.eye(3, dtype=int)).dtype == np.float64
    with pytest.raises(ValueError, match="at least one"):
        nf.check_against_network(net, np.eye(3), [], 3)
    frozen = nf.Network([nf.Dense(trained=False)], nf.Readout(trained=False))
    with pytest.raises(ValueError, match="nothing is trained"):
        nf.check_against_network(frozen, np.eye(3), 3)
    for wrong, words in ((1j * np.eye(3), "X is complex"), (np.eye(3, dtype=np.float16), "X is float16")):
        with pytest.raises(TypeError, match=words):
            nf.check_against_network(net, wrong, 3)


def test_overflow_names_the_sample(rng):
    """Points of size 1e19 have squares beyond float32."""
    for net in (nf.resnet(2), nf.fully_connected(1, "tanh"), nf.bottleneck_resnet(2), nf.fixed_readout_resnet(2)):
        network = nf.init(net, 5, 30, seed=0, dtype="float32")
        X = rng.standard_normal((9, 5)).astype(np.float32)
        small = nf.empirical_ntk(network, X)
        X[6] *= np.float32(1e20)
        for memory in (None, 3000):
            for per_layer in (False, True):
                with pytest.raises(
                    OverflowError, match=r"row 6 with itself.*range of float32.*; use float64, or smaller"
                ):
                    nf.empirical_ntk(network, X, memory=memory, per_layer=per_layer)
                with pytest.raises(OverflowError, match=r"row 6 and column 6 .*float32"):
                    nf.empirical_ntk(network, X, X, memory=memory, per_layer=per_layer)
        X[6] = 0
        assert np.array_equal(np.delete(nf.empirical_ntk(network, X), 6, 0)[:, 0], np.delete(small, 6, 0)[:, 0])
    X[6] = 1e20
    wide = nf.init(nf.resnet(2), 5, 30, seed=0)
    assert np.isfinite(nf.empirical_ntk(wide, X.astype(np.float64))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("drawn", [1, 700, 4 << 20])
def test_weights_are_drawn_in_order(drawn, dtype, monkeypatch):
    """However many at a time: those of one standard_normal after the other."""
    monkeypatch.setattr("ntkfast.finite._DRAWN", drawn)
    network, rng = nf.init(nf.bottleneck_resnet(2), 5, 17, seed=3, dtype=dtype), np.random.default_rng(3)
    for w in network.weights:
        assert np.array_equal(w, rng.standard_normal(w.shape).astype(dtype))
    fixed = nf.init(nf.fixed_readout_resnet(1), 5, 18, seed=3, dtype=dtype)
    wanted = (np.random.default_rng(3).standard_normal((18, 5)) * np.sqrt(2 / 18)).astype(dtype)
    assert np.array_equal(fixed.weights[0], wanted)


INIT = """
import re, numpy as np, ntkfast as nf
from pathlib import Path
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
nf.init(nf.fully_connected(1), 10, 10, seed=0, dtype="float32")
before = peak()
network = nf.init(nf.fully_connected(1), 4000, 4000, seed=0, dtype="float32")
print(peak() - before)
"""


def test_memory_of_the_initialisation(fresh_python):
    """The weights, 64 MB, and the few that are being drawn."""
    assert int(fresh_python(INIT).split()[-1]) < 64e6 + 16e6


def _square(z):
    return z * z


def _double(z):
    return 2 * z


PICKLED = {
    "relu": (nf.fully_connected(2), 3), "leaky": (nf.resnet(2, nf.Activation.leaky_relu(0.2)), 3),
    "smooth": (MIXED, 3), "bottleneck": (nf.bottleneck_resnet(2, "gelu"), 3), "fixed": (nf.fixed_readout_resnet(2), 3),
    "conv": (nf.conv_net(2, "erf"), (3, 4, 2)), "gap": (nf.conv_resnet(2, "silu", readout="gap"), (5, 2)),
    "user": (nf.fully_connected(2, nf.Activation.from_function(_square, _double, "square")), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLED)
def test_pickle(name, rng):
    net, shape = PICKLED[name]
    network, X = nf.init(net, shape, 8, seed=0), rng.standard_normal((4, *np.atleast_1d(shape)))
    K = nf.empirical_ntk(network, X)  # what the calls keep must not stand in the way
    again = pickle.loads(pickle.dumps(network))
    assert (repr(again), again.net == network.net) == (repr(network), True)
    assert all(np.array_equal(a, b) for a, b in zip(again.weights, network.weights, strict=True))
    assert np.array_equal(nf.empirical_ntk(again, X), K)
    assert np.array_equal(copy.deepcopy(network).outputs(X), network.outputs(X))


def test_pickle_names_a_lambda():
    activation = nf.Activation.from_function(lambda z: z * z, _double, "square")
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(nf.init(nf.fully_connected(1, activation), 3, 8, seed=0))


def test_networks_in_other_processes(rng):
    network, X = nf.init(nf.conv_net(2, "tanh"), (4, 2), 8, seed=0), rng.standard_normal((4, 4, 2))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_close(pool.apply(nf.empirical_ntk, (network, X)), nf.empirical_ntk(network, X), 1.0, 1e-13)

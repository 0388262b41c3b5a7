"""What holds for every network and every set of points, tried on random ones."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from conftest import assert_close, tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ntkfast as nf
from ntkfast import reference
from ntkfast.network import SignReadout

settings.register_profile("contract", derandomize=True, deadline=None, max_examples=30, database=None,
                          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
settings.load_profile("contract")

FUNCTIONS = {name: getattr(nf, name) for name in nf.__all__} | {"SignReadout": SignReadout}


def numbers(low, high):
    """Finite floats with few digits: failures that can be read."""
    return st.integers(round(low * 16), round(high * 16)).map(lambda k: k / 16)


homogeneous = st.one_of(
    st.sampled_from(["relu", "abs", "leaky_relu", "identity"]),
    numbers(-1.5, 1.5).map(nf.Activation.leaky_relu),
)
smooth = st.sampled_from(["erf", "gelu", "sin", "cos", "gaussian"])
variances = numbers(0.125, 2)
trained = st.booleans()


@st.composite
def layers(draw, activations, biases):
    bias = draw(st.one_of(st.just(0.0), variances)) if biases else 0.0
    kind = draw(st.sampled_from(["dense", "residual", "bottleneck", "linear"]))
    common = {"weight_variance": draw(variances), "bias_variance": bias, "trained": draw(trained)}
    if kind == "linear":
        return nf.Linear(**common)
    activation = draw(activations)
    if kind == "dense":
        return nf.Dense(activation, gain=draw(st.one_of(st.none(), variances)), **common)
    # |skip| > |scale| keeps the variance away from 0, where relative errors mean nothing
    scale = draw(numbers(-0.5, 0.5))
    skip = draw(st.sampled_from([-1, 1])) * draw(numbers(0.75, 1.25))
    if kind == "residual":
        return nf.Residual(activation, scale=scale, skip=skip, **common)
    outer = draw(st.one_of(st.just(0.0), variances)) if biases else 0.0
    gain = draw(st.one_of(st.none(), variances))
    return nf.Bottleneck(activation, scale=scale, skip=skip, gain=gain, outer_bias_variance=outer, **common)


ANY = st.one_of(homogeneous, smooth)
ROWS, FEATURES = st.integers(1, 70), st.integers(6, 12)


@st.composite
def networks(draw, activations=ANY, biases=True):
    readouts = st.builds(nf.Readout, weight_variance=variances, trained=trained,
                         bias_variance=numbers(0, 1) if biases else st.just(0.0))  # fmt: skip
    body = draw(st.lists(layers(activations, biases), min_size=1, max_size=4))
    return nf.Network(body, draw(st.one_of(readouts, st.just(SignReadout())) if biases else readouts))


@st.composite
def arrays(draw, rows=ROWS, features=FEATURES, dtypes=(np.float64, np.float32)):
    """Rows of norm about 1 in general position, with any strides."""
    n, d, dtype = draw(rows), draw(features), draw(st.sampled_from(dtypes))
    steps = draw(st.tuples(st.sampled_from([1, 2, -1, -3]), st.sampled_from([1, 3, -1, -2])))
    order = draw(st.sampled_from("CF"))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    X = rng.standard_normal((n, d))
    X *= rng.uniform(0.6, 1.4, (n, 1)) / np.linalg.norm(X, axis=1, keepdims=True)
    store = np.full((n * abs(steps[0]), d * abs(steps[1])), np.nan, dtype, order=order)
    view = store[:: steps[0], :: steps[1]][:n, :d]
    view[...] = X
    return view


def scale(net, X, Y=None, get="ntk"):
    rows, cols = (
        np.sqrt(reference.diagonal(net, np.asarray(Z, np.float64), get=get)) for Z in (X, X if Y is None else Y)
    )
    root = rows[:, None] * cols
    return np.maximum(root, 1e-3 * root.max(initial=0))


def bound(net, *arrays_of_points):
    """The table's bound; close pairs, which small random sets may hold, cost the reference some digits."""
    return 20 * max(tolerance(net, X.dtype) for X in arrays_of_points)


@given(networks(), arrays(), st.sampled_from(["ntk", "nngp", "last_hidden"]), st.booleans())
def test_agreement_with_the_reference(net, X, get, normalize):
    K = nf.gram(net, X, get=get, normalize=normalize)
    wanted = reference.gram(net, X, get=get, normalize=normalize)
    assert K.dtype == X.dtype
    if get == "nngp" and net.readout.centred:
        # S minus the product of the means: the size of S counts
        wide = scale(nf.Network(net.layers), X, get="nngp")
        if normalize:
            root = np.sqrt(reference.diagonal(net, np.asarray(X, np.float64), get=get))
            wide = wide / np.maximum(root[:, None] * root, 1e-300)
        assert_close(K, wanted, wide, bound(net, X))
        return
    assert_close(K, wanted, 1.0 if normalize else scale(net, X, get=get), bound(net, X))


@given(networks(), arrays(dtypes=(np.float64,)), st.data())
def test_rectangles(net, X, data):
    Y = data.draw(arrays(features=st.just(X.shape[1]), dtypes=(np.float64,)))
    K = nf.gram(net, X, Y)
    assert_close(K, reference.gram(net, X, Y), scale(net, X, Y), bound(net, X))
    assert_close(nf.gram(net, Y, X).T, K, scale(net, X, Y), bound(net, X))


@given(networks(), arrays())
def test_symmetry_and_diagonal(net, X):
    for get in ("ntk", "nngp", "last_hidden"):
        K = nf.gram(net, X, get=get)
        np.testing.assert_array_equal(K, K.T)
        assert_close(np.diag(K), nf.diagonal(net, X, get=get), np.diag(scale(net, X, get=get)), bound(net, X))
        K = nf.gram(net, X, get=get, normalize=True)
        np.testing.assert_array_equal(K, K.T)
        assert np.isin(np.diag(K), [0, 1]).all()


@given(networks(), arrays())
def test_layer_grams_add_up(net, X):
    slices = nf.layer_grams(net, X)
    assert slices.shape == (len(net.slices), len(X), len(X))
    np.testing.assert_array_equal(slices, slices.swapaxes(1, 2))
    assert_close(slices.astype(np.float64).sum(axis=0), nf.gram(net, X), scale(net, X), bound(net, X))


@given(networks(), arrays(dtypes=(np.float64,)), st.randoms(use_true_random=False))
def test_permutations_of_points_and_features(net, X, random):
    K = nf.gram(net, X)
    order = random.sample(range(len(X)), len(X))
    assert_close(nf.gram(net, X[order]), K[np.ix_(order, order)], scale(net, X[order]), bound(net, X))
    columns = random.sample(range(X.shape[1]), X.shape[1])
    assert_close(nf.gram(net, X[:, columns]), K, scale(net, X), bound(net, X))


@given(networks(), arrays(dtypes=(np.float64,)), st.data())
def test_more_rows_do_not_change_the_others(net, X, data):
    Y = data.draw(arrays(features=st.just(X.shape[1]), dtypes=(np.float64,)))
    K = nf.gram(net, np.concatenate([X, Y]))
    n = len(X)
    assert_close(K[:n, :n], nf.gram(net, X), scale(net, X), bound(net, X))
    assert_close(K[:n, n:], nf.gram(net, X, Y), scale(net, X, Y), bound(net, X))


@given(networks(), arrays(dtypes=(np.float64,)), st.integers(0, 100))
def test_rotations(net, X, seed):
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((X.shape[1],) * 2))[0]
    assert_close(nf.gram(net, X @ rotation), nf.gram(net, X), scale(net, X), bound(net, X))
    assert_close(nf.gram(net, -X), nf.gram(net, X), scale(net, X), bound(net, X))


@given(networks(homogeneous, biases=False), arrays(dtypes=(np.float64,)), st.integers(-60, 60), numbers(0.1, 9))
def test_homogeneity(net, X, exponent, factor):
    for get in ("ntk", "nngp", "last_hidden"):
        K = nf.gram(net, X, get=get)
        np.testing.assert_array_equal(nf.gram(net, np.ldexp(X, exponent), get=get), np.ldexp(K, 2 * exponent))
        assert_close(
            nf.gram(net, factor * X, get=get), factor**2 * K, factor**2 * scale(net, X, get=get), bound(net, X)
        )


@given(networks(), arrays(dtypes=(np.float64,)))
def test_positive_definite(net, X):
    for get in ("ntk", "nngp", "last_hidden"):
        K = nf.gram(net, X, get=get)
        size = np.trace(nf.gram(nf.Network(net.layers), X, get="nngp")) if net.readout.centred else np.trace(K)
        assert np.linalg.eigvalsh(K)[0] >= -bound(net, X) * max(size, np.trace(K))


@settings(max_examples=150)
@given(networks())
def test_descriptions(net):
    for other in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net), nf.Network(net.layers, net.readout)):
        assert other == net
        assert hash(other) == hash(net)
        assert repr(other) == repr(net)
    assert net != nf.Network([*net.layers, nf.Linear()], net.readout)
    assert net != "network"
    # The number of equal layers is written as in "2 * Dense(...)", which is read as [Dense(...)] * 2.
    text = repr(net)
    assert text.startswith("Network([")
    for layer in {*net.layers, net.readout}:
        assert repr(layer) in text
        again = eval(repr(layer), FUNCTIONS)
        assert again == layer
        assert type(again) is type(layer)


@given(st.floats(-1e3, 1e3))
def test_slopes_survive_repr(slope):
    activation = nf.Activation.leaky_relu(slope)
    assert eval(repr(activation), FUNCTIONS) == activation
    assert pickle.loads(pickle.dumps(activation)) == activation


@given(networks(), networks())
def test_equal_descriptions_are_the_same_network(a, b):
    assert (a == b) == (a.layers == b.layers and a.readout == b.readout)
    if a == b:
        assert hash(a) == hash(b)
    assert len({a, b, pickle.loads(pickle.dumps(a))}) == (1 if a == b else 2)


def test_networks_are_frozen():
    net = nf.resnet(3)
    with pytest.raises(AttributeError):
        net.layers = ()
    with pytest.raises(AttributeError):
        net.layers[0].gain = 3.0


@pytest.mark.parametrize("get", ["ntk", "nngp", "last_hidden"])
def test_an_outer_bias_without_skip(get):
    """Parallel points do not stay parallel there, although the activation alone would keep them so."""
    X = np.array([[1.0, 0.0], [-0.8, 0.6], [3.0, 4.0], [-2.0, 0.0], [2.0, 0.0]])
    layer = nf.Bottleneck("relu", scale=1.0, skip=0.0, outer_bias_variance=0.5)
    for net in (nf.Network([layer]), nf.Network([layer, nf.Dense("relu"), layer])):
        np.testing.assert_allclose(nf.gram(net, X, get=get), reference.gram(net, X, get=get), rtol=1e-12, atol=1e-13)

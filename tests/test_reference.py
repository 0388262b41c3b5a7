"""The kernels of the NumPy definition against 80-digit arithmetic and against the formulas of each paper."""

from __future__ import annotations

import doctest
import math

import numpy as np
import oracle
import pytest
from mpmath import mp, mpf
from oracle import check

import ntkfast.reference.direct
import ntkfast.reference.duals
import ntkfast.reference.recursion
from ntkfast import reference
from ntkfast.activation import Activation
from ntkfast.network import (
    Bottleneck,
    Dense,
    Linear,
    Network,
    Readout,
    Residual,
    bottleneck_resnet,
    fixed_readout_resnet,
    fully_connected,
    resnet,
)

LEAKY = Activation.leaky_relu(0.3)


@pytest.mark.parametrize("module", ["duals", "recursion", "direct"])
def test_examples_in_the_docstrings(module):
    result = doctest.testmod(getattr(ntkfast.reference, module))
    assert result.failed == 0
    assert result.attempted > 3


FREE = {
    "biases": Network([Dense("relu", bias_variance=0.3, weight_variance=0.8)] * 2
                      + [Residual("relu", scale=-0.6, skip=0.9, bias_variance=0.2)],
                      Readout(weight_variance=1.7, bias_variance=0.4)),
    "negative skip": Network([Dense("gelu", gain=1.3), Residual("gelu", scale=0.5, skip=-0.8),
                              Residual("relu", scale=-0.4, skip=0.7)]),
    "outer biases": Network([Linear(weight_variance=0.7, bias_variance=0.2)]
                            + [Bottleneck(LEAKY, scale=-0.5, skip=0.6, bias_variance=0.1, gain=1.4,
                                          outer_bias_variance=0.5, weight_variance=1.2)] * 2,
                            Readout(weight_variance=0.6)),
    "partly frozen": Network([Dense("erf", trained=False), Residual("cos", scale=0.3),
                              Bottleneck("sin", scale=0.9, trained=False, outer_bias_variance=0.2),
                              Dense("gaussian"), Residual("exp", scale=0.2, trained=False)],
                             Readout(trained=False, weight_variance=2.0, bias_variance=0.3)),
    "residual first": Network([Residual("abs", scale=0.8, skip=0.5), Linear(trained=False),
                               Residual("identity", scale=0.4)]),
    "all frozen": Network([Dense("relu", trained=False)], Readout(trained=False, bias_variance=0.1)),
    "no weights": Network([Dense("relu", weight_variance=0.0, bias_variance=1.0)] * 2),
}  # fmt: skip
BUILT = {
    "fully connected": fully_connected(3),
    "fully connected, biases": fully_connected(2, "erf", gain=1.1, bias_variance=0.2, weight_variance=1.5),
    "feed forward": fully_connected(4, readout_trained=False),
    "resnet": resnet(4, c_res=2.0),
    "resnet gelu": resnet(3, "gelu", c_res=-1.5),
    "resnet frozen": resnet(1, LEAKY, readout_trained=False),
    "bottleneck": bottleneck_resnet(4),
    "bottleneck, all trained": bottleneck_resnet(2, "gelu", alpha=0.7, first_trained=True, readout_trained=True),
    "fixed readout": fixed_readout_resnet(3),
    "fixed readout, wide": fixed_readout_resnet(2, theta=0.6, last_width_ratio=1.5),
    "fixed readout 1": fixed_readout_resnet(1),
}
NETS = FREE | BUILT


def points():
    """Different norms; 0, 1 near-duplicates, 0, 2 near-antipodes, 3 = 2 x 0, 4 ordinary, 5 zero."""
    X = np.random.default_rng(1).standard_normal((6, 5)) / math.sqrt(5)
    X[1] = 1.5 * X[0] + 1e-2 * X[1]
    X[2] = -0.4 * X[0] + 1e-3 * X[2]
    X[3] = 2 * X[0]
    X[5] = 0
    return X


# A kinked derivative sees the angle with an error of eps/angle (times the layers): 1e-2 loses two digits; the
# multiple 2 x is parallel only up to rounding, and so are equal rows of X and Y.
LOOSE = np.full((6, 6), 1e-14)
LOOSE[0, 1] = LOOSE[1, 0] = LOOSE[1, 3] = LOOSE[3, 1] = 2e-13
LOOSE[2, :4] = LOOSE[:4, 2] = 1e-12
LOOSE[0, 3] = LOOSE[3, 0] = 1e-7


@pytest.mark.parametrize("name", NETS)
def test_kernels_have_the_exact_value(name):
    net, X = NETS[name], points()
    exact = [[oracle.vectors(net, x, y) for y in X] for x in X]
    kernels = reference.gram(net, X, get=("last_hidden", "ntk", "nngp"))
    assert kernels._fields == ("last_hidden", "ntk", "nngp")
    for get in kernels._fields:
        wanted = np.array([[float(getattr(k, get)) for k in row] for row in exact])
        root = np.sqrt(np.diag(wanted))
        scale = np.maximum(np.outer(root, root), 0.1 * np.abs(wanted).max())
        got = getattr(kernels, get)
        check(got, wanted, LOOSE * scale)
        np.testing.assert_array_equal(got, got.T)
        check(reference.gram(net, X, X[1:4], get=get), wanted[:, 1:4], (np.maximum(LOOSE, 1e-7) * scale)[:, 1:4])
        check(reference.gram(net, X[:2], X[4:], get=get), wanted[:2, 4:], (LOOSE * scale)[:2, 4:])
        check(reference.diagonal(net, X, get=get), np.diag(wanted), 5e-15 * np.diag(scale))
    slices = reference.layer_grams(net, X)
    assert slices.shape == (len(net.slices), 6, 6)
    wanted = np.array([[[float(k.layers[s]) for k in row] for row in exact] for s in range(len(slices))])
    check(slices, wanted.reshape(slices.shape), LOOSE * max(1.0, np.abs(wanted).max(initial=0)))


@pytest.mark.parametrize("name", NETS)
def test_layer_grams_add_up_to_the_tangent_kernel(name):
    net, X = NETS[name], points()
    Y = np.random.default_rng(2).standard_normal((3, 5))
    for other in (None, Y):
        ntk = reference.gram(net, X, other)
        check(reference.layer_grams(net, X, other).sum(axis=0), ntk, 1e-14 * max(1.0, np.abs(ntk).max()))


@pytest.mark.parametrize("name", NETS)
def test_normalized(name):
    net, X = NETS[name], points()
    for get in ("ntk", "nngp", "last_hidden"):
        K = reference.gram(net, X, get=get, normalize=True)
        exact = oracle.gram(net, X, get=get, normalize=True)
        check(K, np.array(exact, dtype=float), 3 * LOOSE)
        np.testing.assert_array_equal(np.diag(K), reference.diagonal(net, X, get=get) > 0)
    K = reference.gram(net, X[:1], X[3:], normalize=True)
    check(K, reference.gram(net, X, normalize=True)[:1, 3:], 1e-7)


def test_zero_input_of_a_network_without_biases_gives_zero():
    for net in (fully_connected(3), resnet(3), bottleneck_resnet(3), fixed_readout_resnet(3)):
        kernels = reference.gram(net, np.zeros((2, 3)), np.eye(3), get=("ntk", "nngp", "last_hidden"))
        np.testing.assert_array_equal(np.array(kernels), 0)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("act", ["relu", "gelu", LEAKY, "softplus"], ids=str)
def test_recursion_equals_the_formulas_of_each_paper(depth, act):
    X = points()
    Y = np.random.default_rng(3).standard_normal((4, 5))
    cases = [
        (fully_connected(depth, act), reference.fully_connected_grams, (depth, act), {}),
        (resnet(depth, act, c_res=1.7), reference.resnet_grams, (depth, act), {"c_res": 1.7}),
        (bottleneck_resnet(depth, act), reference.bottleneck_grams, (depth, act), {}),
        (bottleneck_resnet(depth, act, alpha=0.8, first_trained=True, readout_trained=True),
         reference.bottleneck_grams, (depth, act),
         {"alpha": 0.8, "first_trained": True, "readout_trained": True}),
    ]  # fmt: skip
    if act == "relu":
        cases += [
            (fully_connected(depth, readout_trained=False), reference.feed_forward_grams, (depth,), {}),
            (fixed_readout_resnet(depth), reference.fixed_readout_grams, (depth,), {}),
            (fixed_readout_resnet(depth, theta=-0.7, last_width_ratio=1.5), reference.fixed_readout_grams,
             (depth,), {"theta": -0.7, "last_width_ratio": 1.5}),
        ]  # fmt: skip
    for net, direct, args, options in cases:
        for other in (None, Y):
            general = reference.layer_grams(net, X, other)
            printed = direct(X, other, *args, **options)
            assert general.shape == printed.shape
            # The two round the products differently, which parallel inputs amplify to 1e-8.
            check(general, printed, np.abs(general).max() * (1e-14 if other is not None else LOOSE))
        # The Gram of the last hidden matrix, by its place in the list: W before V, readout last.
        last = -1 - int(net.readout.trained) - int(isinstance(net.layers[-1], Bottleneck))
        hidden = reference.gram(net, X, Y, get="last_hidden")
        check(hidden, general[last], 1e-15 * np.abs(hidden).max())


def test_limits_of_deep_networks():
    """Omega_bar of Huang et al.: the kernel of one layer for alpha = 1/L, 1/4 for feed-forward networks."""
    X = np.array([[1.0, 0.0], [0.3, math.sqrt(1 - 0.09)]])
    one = reference.gram(bottleneck_resnet(1), X, normalize=True)[0, 1]
    for depth, constant in ((100, -0.00746), (1000, -0.00755)):  # tends to c1(0.3) = -0.007561
        deep = reference.gram(bottleneck_resnet(depth), X, normalize=True)[0, 1]
        check(depth * (deep - one), constant, 6e-6)
    flat = reference.gram(fully_connected(1000, readout_trained=False), X, normalize=True)[0, 1]
    check((flat - 0.25) * 1000 / math.log(1000), 0.40, 0.01)


def test_the_oracle_has_converged():
    """80 digits give what 200 digits give, also for parallel, antiparallel and nearly parallel pairs."""
    for net in (
        resnet(20),
        fully_connected(20, "abs"),
        FREE["outer biases"],
        FREE["biases"],
        resnet(5, "gelu"),
    ):
        for c in (2, 1, 0, mpf(10) ** -18, 2 - mpf(10) ** -18):
            with mp.workdps(220):
                A, B = mpf(1.7) ** 2, mpf(0.3) ** 2
                C = mpf(1.7) * mpf(0.3) * (c - 1)
                fine = oracle.kernels(net, A, B, C, digits=200)
                coarse = oracle.kernels(net, A, B, C)
                given = oracle.pair(net, 1.7, 0.3, rho=c - 1)
                for k in range(3):
                    assert abs(coarse[k] - fine[k]) <= mpf(10) ** -37 * abs(fine[k])
                    assert abs(given[k] - fine[k]) <= mpf(10) ** -37 * abs(fine[k])

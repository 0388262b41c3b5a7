"""The kernels of the NumPy definition against averages over wide random networks, written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracle import check

from ntkfast import reference
from ntkfast.network import (
    Bottleneck,
    Dense,
    HalvedLayer,
    Linear,
    Network,
    Readout,
    Residual,
    bottleneck_resnet,
    fixed_readout_resnet,
    fully_connected,
    resnet,
)

S = {"relu": lambda x: np.maximum(x, 0), "softplus": lambda x: np.logaddexp(0, x), "tanh": np.tanh}
DS = {
    "relu": lambda x: (x > 0) * np.ones_like(x),
    "softplus": lambda x: np.exp(-np.logaddexp(0, -x)),
    "tanh": lambda x: np.cosh(x) ** -2,
}


def branch(layer, x, m, rng):
    """Pre-activations z, s(z) and s'(z), the weights, and the gain of a layer of width m."""
    W = rng.standard_normal((m, x.shape[0]), dtype=np.float32)
    if isinstance(layer, HalvedLayer):
        W *= np.float32(math.sqrt(2 / m))
        return W, np.maximum(W @ x, 0), W @ x > 0, 1.0
    W *= np.float32(math.sqrt(layer.weight_variance))
    beta = rng.standard_normal((m, 1), dtype=np.float32)
    z = W @ x + np.float32(math.sqrt(layer.bias_variance)) * beta
    if isinstance(layer, Linear):
        return W, z, np.ones_like(z), 1.0
    gain = 1.0 if isinstance(layer, Residual) else layer.gain
    name = layer.activation.name
    return W, S[name](z), DS[name](z), reference.c_sigma(name) if gain is None else gain


def network_grams(net, X, m, rng):
    """Per-layer Grams and outputs of one random network: forward, backward, (A A^T) * (D D^T)."""
    x = X.T.astype(np.float32)
    if getattr(net.layers[0], "skip", 0):  # the fixed first map
        x = rng.standard_normal((m, len(x)), dtype=np.float32) @ x / math.sqrt(m)
    tape = []
    for layer in net.layers:
        width = round(m * layer.width_ratio) if isinstance(layer, HalvedLayer) else m
        W, s, ds, gain = branch(layer, x, width, rng)
        skip, V, factor, h = getattr(layer, "skip", 0.0), None, math.sqrt(gain / m), None
        if isinstance(layer, HalvedLayer):
            factor = layer.theta
        elif isinstance(layer, Residual):
            factor = layer.scale / math.sqrt(m)
        new = factor * s
        if isinstance(layer, Bottleneck):
            V, h = rng.standard_normal((m, m), dtype=np.float32), factor * s
            bias = math.sqrt(layer.outer_bias_variance) * rng.standard_normal((m, 1))
            new = layer.scale / math.sqrt(m) * (V @ h + bias)
        tape.append((layer, x, W, factor * ds, V, h, skip))
        x = (skip * x if skip else 0) + new
    ro, scale = net.readout, 1.0
    a = rng.standard_normal((len(x), 1))
    if ro.centred:
        a, scale = np.resize([[1.0], [-1.0]], (len(x), 1)), 1 / m
    f = math.sqrt(ro.weight_variance) * a.T @ x + math.sqrt(ro.bias_variance) * rng.standard_normal()
    grams = [ro.weight_variance * x.T @ x + ro.bias_variance] if ro.trained else []
    g = math.sqrt(ro.weight_variance) * a * np.ones_like(x)
    for layer, x, W, slope, V, h, skip in reversed(tape):
        wv, bv = getattr(layer, "weight_variance", 1.0), getattr(layer, "bias_variance", 0.0)
        trained, inner = getattr(layer, "trained", True), g
        if V is not None:
            if trained:
                grams.append(layer.scale**2 / m * (h.T @ h + layer.outer_bias_variance) * (g.T @ g))
            inner = layer.scale / math.sqrt(m) * (V.T @ g)
        delta = (slope * inner).astype(np.float32)
        if trained:
            grams.append(scale * (wv * x.T @ x + bv) * (delta.T @ delta))
        back = W.T @ delta
        g = skip * g + back if skip else back
    return np.array(grams[::-1]), f.ravel()


def mc_points():
    """Unequal norms; 0 and 1 nearly parallel, 0 and 2 nearly opposite."""
    X = np.random.default_rng(4).standard_normal((4, 4))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    X[1] = 1.4 * (X[0] + 0.1 * X[1])
    X[2] = -0.7 * (X[0] + 0.1 * X[2])
    X[3] *= 0.5
    return X


def sample(net, m, count, seed):
    """Mean Grams over networks and their standard errors; all slices, then their sum."""
    rng, X = np.random.default_rng(seed), mc_points()
    total = square = 0.0
    for _ in range(count):
        grams, _ = network_grams(net, X, m, rng)
        grams = np.concatenate([grams, grams.sum(axis=0, keepdims=True)])
        total, square = total + grams, square + grams**2
    mean = total / count
    return mean, np.sqrt((square / count - mean**2) / (count - 1))


def allowance(K, m):
    """The O(1/m) bias of a mean over networks of width m: BIAS/m of sqrt(K_ii K_jj)."""
    root = np.sqrt(np.diagonal(K, axis1=-2, axis2=-1))
    return BIAS / m * root[..., :, None] * root[..., None, :]


BIAS = 2.0
WIDTH, COUNT = 400, 500
MONTE_CARLO = {
    "fully connected relu": fully_connected(3),
    "fully connected tanh, biases": fully_connected(2, "tanh", bias_variance=0.3, weight_variance=1.2),
    "resnet relu": resnet(3, c_res=2.0),
    "resnet softplus": resnet(3, "softplus", c_res=1.5),
    "bottleneck": bottleneck_resnet(2, alpha=0.7),
    "bottleneck, all trained": bottleneck_resnet(2, "softplus", first_trained=True, readout_trained=True),
    "fixed readout": fixed_readout_resnet(3, theta=0.5, last_width_ratio=1.5),
    "biases": Network([Dense("relu", bias_variance=0.3, weight_variance=0.8),
                       Residual("relu", scale=-0.6, skip=0.9, bias_variance=0.2),
                       Bottleneck("softplus", scale=0.5, skip=-0.7, bias_variance=0.4,
                                  outer_bias_variance=0.6),
                       Linear(bias_variance=0.2, weight_variance=1.3),
                       Residual("softplus", scale=0.4, bias_variance=0.5)],
                      Readout(weight_variance=1.5, bias_variance=0.7)),
    "residual first": Network([Residual("softplus", scale=0.5, skip=0.8), Dense("relu", trained=False)]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MONTE_CARLO)
def test_wide_networks_have_these_kernels(name):
    net, X = MONTE_CARLO[name], mc_points()
    K = reference.layer_grams(net, X)
    K = np.concatenate([K, K.sum(axis=0, keepdims=True)])
    mean, error = sample(net, WIDTH, COUNT, seed=10)
    check(mean, K, 5 * error + allowance(K, WIDTH))


@pytest.mark.slow
def test_wide_networks_reject_a_resnet_without_mean_terms():
    """The test above can fail: neither S without b nor the cross terms printed in Definition 6.1 pass."""
    depth, c_res, X = 3, 2.0, mc_points()
    mean, error = sample(resnet(depth, c_res=c_res), WIDTH, COUNT, seed=11)
    c, al = 2.0, c_res / depth

    def readout_gram(cross):
        S, b = X @ X.T, 0.0
        for h in range(depth):
            d = np.diag(S)
            Q, mu = reference.expectations("relu", d[:, None], d, S)[0], reference.mean("relu", d)
            if h == 0:
                S, b = c * Q, math.sqrt(c) * mu
            else:
                S, b = S + al * cross(b, mu) + al**2 * Q, b + al * mu
        return S

    def off(K):
        return np.max(np.abs(mean[-2] - K) / (5 * error[-2] + allowance(K, WIDTH)))

    right = readout_gram(lambda b, mu: np.outer(b, mu) + np.outer(mu, b))
    check(right, reference.gram(resnet(depth, c_res=c_res), X, get="nngp"), 1e-13)
    printed = readout_gram(lambda b, mu: (b * mu)[:, None] + (b * mu)[None, :])
    without = readout_gram(lambda b, mu: 0.0)
    assert off(right) <= 1
    assert off(without) > 10
    assert off(printed) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed readout", "biases", "bottleneck"])
def test_covariance_of_the_output(name):
    """nngp is the covariance of f; for the fixed +-1 readout the product of the means is missing from it."""
    net, X, m, count = MONTE_CARLO[name], mc_points(), 48, 3000
    rng = np.random.default_rng(12)
    f = np.array([network_grams(net, X, m, rng)[1] for _ in range(count)])
    products = f[:, :, None] * f[:, None, :]
    mean, error = products.mean(axis=0), products.std(axis=0) / math.sqrt(count)
    K = reference.gram(net, X, get="nngp")
    check(mean, K, 5 * error + allowance(K, m))
    if name == "fixed readout":
        with_means = 2 * reference.expectations("relu", *_last_covariance(net, X))[0]
        assert np.max(np.abs(mean - with_means) / (5 * error + allowance(with_means, m))) > 2


def _last_covariance(net, X):
    """S^(L) of the fixed readout network: covariance of the same layers in front of a Gaussian readout."""
    S = reference.gram(Network(net.layers[:-1]), X, get="nngp")
    return np.diag(S)[:, None], np.diag(S)[None, :], S

"""The third-order kernel: against complex steps and automatic differentiation of the tangent kernel; its size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import assert_close

import ntkfast as nf
from ntkfast import third_order

NETS = {
    "fully connected": nf.fully_connected(3, "tanh"),
    "one layer": nf.fully_connected(1, "softplus"),
    "resnet": nf.resnet(4, "softplus", c_res=2.0),
    "resnet, sin": nf.resnet(3, "sin"),
    "readout fixed": nf.Network([nf.Dense("exp", weight_variance=0.2), nf.Dense("tanh")],
                                nf.Readout(trained=False)),
    "variances": nf.fully_connected(3, "silu", weight_variance=1.7, gain=0.8),
    "residual first": nf.Network([nf.Residual("gaussian", scale=0.7, skip=-0.9), nf.Dense("cos")],
                                 nf.Readout(weight_variance=1.3)),
    "frozen inside": nf.Network([nf.Dense("tanh"), nf.Residual("tanh", scale=0.5, trained=False), nf.Dense("sin")]),
    "linear": nf.Network([nf.Dense("identity"), nf.Dense("identity")]),
    "erf": nf.fully_connected(2, "erf"),
    "gelu": nf.resnet(2, "gelu"),
}  # fmt: skip
#: s and s' that take complex numbers
ANALYTIC = {
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "softplus": (lambda z: np.log(1 + np.exp(z)), lambda z: 1 / (1 + np.exp(-z))),
    "silu": (lambda z: z / (1 + np.exp(-z)), lambda z: (1 + np.exp(-z) * (1 + z)) / (1 + np.exp(-z)) ** 2),
    "sin": (np.sin, np.cos),
    "cos": (np.cos, lambda z: -np.sin(z)),
    "exp": (np.exp, np.exp),
    "gaussian": (lambda z: np.exp(-z * z), lambda z: -2 * z * np.exp(-z * z)),
    "identity": (lambda z: z, lambda z: 1 + 0 * z),
}


def tangent_kernel(network, weights, X):
    """K2 for weights that may be complex, and nothing conjugated; from the fields of the description alone."""
    net, m, todo, x, tape = network.net, network.width, iter(weights), X, []
    if getattr(net.layers[0], "skip", 0):
        x = x @ next(todo).T / math.sqrt(m)
    for layer in net.layers:
        W = math.sqrt(layer.weight_variance) * next(todo)
        s, ds = ANALYTIC[layer.activation.name]
        if isinstance(layer, nf.Residual):
            be, k = layer.scale / math.sqrt(m), layer.skip
        else:
            c = nf.layers.c_sigma(layer.activation) if layer.gain is None else layer.gain
            be, k = math.sqrt(c / m), 0.0
        z = x @ W.T
        tape.append((x, W, be * ds(z), k, layer))
        x = be * s(z) + (k * x if k else 0)
    ro, a = net.readout, next(todo)
    K = ro.trained * ro.weight_variance * (x @ x.T)
    g = math.sqrt(ro.weight_variance) * a * np.ones_like(x)
    for x, W, slope, k, layer in reversed(tape):
        de = slope * g
        K = K + layer.trained * layer.weight_variance * (x @ x.T) * (de @ de.T)
        g = de @ W + (k * g if k else 0)
    return K


def gradients(network, X):
    """grad f(x_c) for every weight array of the network, zero where it is frozen: (n, *shape of the array)."""
    found = [np.zeros((len(X), *w.shape)) for w in network.weights]
    factors = iter(network.jacobian_factors(X))
    trained = [s.trained for s in network._steps] + [network._head.trained]
    amplitudes = [s.weight for s in network._steps] + [network._head.weight]
    assert len(trained) == len(found) == len(amplitudes)
    for k, on in enumerate(trained):
        if on:
            A, D = next(factors)
            found[k] = np.einsum("no,ni->noi", D, A).reshape(found[k].shape)
    return found


def points(rng, n=5, d=3):
    X = rng.standard_normal((n, d))
    X[1] = X[0]
    X[2] = 0
    return X


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("name", [n for n in NETS if n not in ("erf", "gelu")])
def test_complex_steps_of_the_tangent_kernel(name, width, rng):
    """d K2 along the gradient of f(x_c): the imaginary part after a step of 1e-30 i, exact to rounding."""
    X = points(rng)
    network = nf.init(NETS[name], 3, width, seed=1)
    K2 = tangent_kernel(network, network.weights, X)
    assert_close(nf.empirical_ntk(network, X), K2, np.abs(K2).max() + 1e-300, 1e-13)
    along = gradients(network, X)
    K3 = nf.third_order_kernel(network, X)
    scale = np.abs(K3).max()
    assert scale > 1e-5 or name == "linear"
    for c in range(len(X)):
        moved = [w + 1e-30j * g[c] for w, g in zip(network.weights, along, strict=True)]
        assert_close(K3[:, :, c], tangent_kernel(network, moved, X).imag / 1e-30, scale + 1e-300, 1e-12)


@pytest.mark.parametrize("name", NETS)
def test_central_differences_of_the_empirical_kernel(name, rng):
    X = points(rng)
    network = nf.init(NETS[name], 3, 11, seed=1)
    along, start = gradients(network, X), [w.copy() for w in network.weights]
    K3 = nf.third_order_kernel(network, X)

    def moved(c, h):
        for w, w0, g in zip(network.weights, start, along, strict=True):
            w[...] = w0 + h * g[c]
        return nf.empirical_ntk(network, X)

    for c in range(len(X)):
        wanted = (moved(c, 3e-6) - moved(c, -3e-6)) / 6e-6
        assert_close(K3[:, :, c], wanted, np.abs(K3).max() + 1, 1e-8)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of PyTorch's own forward mode
@pytest.mark.parametrize("name", ["fully connected", "resnet", "erf", "gelu", "variances"])
def test_automatic_differentiation(name, rng):
    """Hessian-vector products of the outputs by PyTorch."""
    torch = pytest.importorskip("torch")
    from torch.func import grad, jvp

    net, X = NETS[name], points(rng)
    network = nf.init(net, 3, 6, seed=2)
    acts = {"tanh": torch.tanh, "softplus": torch.nn.functional.softplus, "erf": torch.erf,
            "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}  # fmt: skip

    def f(weights, x):
        for layer, W in zip(net.layers, weights[:-1], strict=True):
            s = acts[layer.activation.name](math.sqrt(layer.weight_variance) * W @ x)
            if isinstance(layer, nf.Residual):
                x = layer.skip * x + layer.scale / math.sqrt(6) * s
            else:
                gain = nf.layers.c_sigma(layer.activation) if layer.gain is None else layer.gain
                x = math.sqrt(gain / 6) * s
        return weights[-1] @ x

    weights = tuple(torch.from_numpy(w) for w in network.weights)
    rows = [torch.from_numpy(x) for x in X]
    g = [grad(f)(weights, x) for x in rows]
    n = len(X)
    hvp = [[jvp(lambda w, a=a: grad(f)(w, rows[a]), (weights,), (g[c],))[1] for c in range(n)] for a in range(n)]
    dot = [[[float(sum((u * v).sum() for u, v in zip(g[b], hvp[a][c], strict=True))) for c in range(n)]
            for b in range(n)] for a in range(n)]  # fmt: skip
    half = np.array(dot)
    wanted = half + half.transpose(1, 0, 2)
    assert_close(nf.third_order_kernel(network, X), wanted, np.abs(wanted).max(), 1e-12)


@pytest.mark.parametrize("name", ["resnet", "fully connected"])
def test_symmetry_blocks_and_precision(name, rng, monkeypatch):
    X = points(rng, 9)
    network = nf.init(NETS[name], 3, 30, seed=0)
    K3 = nf.third_order_kernel(network, X)
    assert (K3.transpose(1, 0, 2) == K3).all()
    assert not np.allclose(K3, K3.transpose(2, 1, 0))
    monkeypatch.setattr(third_order, "_BLOCK", 0)  # one gradient at a time
    assert_close(nf.third_order_kernel(network, X), K3, np.abs(K3).max(), 1e-14)
    out = np.full((9, 9, 9), np.nan)
    assert nf.third_order_kernel(network, X, out=out) is out
    assert_close(out, K3, np.abs(K3).max(), 1e-14)
    single = nf.init(NETS[name], 3, 30, seed=0, dtype="float32")
    k3 = nf.third_order_kernel(single, X.astype(np.float32))
    assert k3.dtype == np.float32
    assert_close(k3, K3, np.abs(K3).max(), 1e-5)
    one = nf.third_order_kernel(network, X[:1])
    assert_close(one, K3[:1, :1, :1], np.abs(K3).max(), 1e-13)


def test_the_kernel_moves_under_gradient_flow_as_it_says(rng):
    """dK2/dt = -(1/n) sum_c K3[., ., c] r_c along one small Euler step of the loss."""
    X, y = points(rng), rng.standard_normal(5)
    network = nf.init(nf.resnet(3, "tanh"), 3, 50, seed=0)
    K2, r, h = nf.empirical_ntk(network, X), network.outputs(X) - y, 1e-6
    rate = -np.einsum("abc,c->ab", nf.third_order_kernel(network, X), r) / 5
    for w, g in zip(network.weights, gradients(network, X), strict=True):
        w -= h / 5 * np.einsum("c...,c->...", g, r)
    assert_close((nf.empirical_ntk(network, X) - K2) / h, rate, np.abs(rate).max(), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("net", [nf.fully_connected(3, "tanh"), nf.resnet(3, "softplus")], ids=str)
def test_the_kernel_falls_as_one_over_the_width(net):
    X = np.random.default_rng(0).standard_normal((4, 5))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    widths, sizes = [64, 256, 1024], []
    for m in widths:
        found = [np.linalg.norm(nf.third_order_kernel(nf.init(net, 5, m, seed=s), X)) for s in range(16)]
        sizes.append(np.sqrt(np.mean(np.square(found))))
    assert abs(np.polyfit(np.log(widths), np.log(sizes), 1)[0] + 1) < 0.15


def test_what_is_refused():
    X = np.eye(3)
    user = nf.Activation.from_function(np.arctan, lambda x: 1 / (1 + x * x), "arctan")
    for net, words in [
        (nf.fully_connected(2), "kinks"),
        (nf.resnet(2, "leaky_relu"), "kinks"),
        (nf.fully_connected(2, "abs"), "kinks"),
        (nf.fully_connected(2, user), "not known"),
        (nf.fully_connected(2, "tanh", bias_variance=0.1), "layer 1"),
        (nf.Network([nf.Dense("tanh")], nf.Readout(bias_variance=0.1)), "readout"),
        (nf.bottleneck_resnet(2, "tanh"), "Bottleneck"),
        (nf.fixed_readout_resnet(2), "HalvedLayer"),
        (nf.Network([nf.Linear(), nf.Dense("tanh")]), "Linear"),
    ]:
        with pytest.raises(ValueError, match=words):
            nf.third_order_kernel(nf.init(net, 3, 4, seed=0), X)
    network = nf.init(nf.fully_connected(2, "tanh"), 3, 4, seed=0)
    with pytest.raises(TypeError, match="FiniteNetwork"):
        nf.third_order_kernel(nf.fully_connected(2, "tanh"), X)
    with pytest.raises(ValueError, match="features"):
        nf.third_order_kernel(network, np.eye(4))
    with pytest.raises(ValueError, match="shape"):
        nf.third_order_kernel(network, X, out=np.empty((3, 3)))
    with pytest.raises(nf.OutOfMemoryError):
        nf.third_order_kernel(network, np.zeros((10**4, 3)))


MEMORY = """
import re, numpy as np, ntkfast as nf
from pathlib import Path
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
n = 100
X, out = np.random.default_rng(0).standard_normal((n, 30)), np.ones((n, n, n))
network = nf.init(nf.resnet(3, "tanh"), 30, 600, seed=0)
nf.third_order_kernel(network, X[:20])  # buffers of the BLAS
before = peak()
nf.third_order_kernel(network, X, out=out)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory(fresh_python):
    """Beyond network and result 64 MB, one thread; the tangents of all pairs would take several hundred."""
    used = int(fresh_python(MEMORY, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"))
    assert used < 64e6


@pytest.mark.parametrize("block", [1, 1 << 30])
def test_overflow_names_the_samples(block, monkeypatch):
    monkeypatch.setattr("ntkfast.third_order._BLOCK", block)
    X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    network = nf.init(nf.resnet(2, "erf"), 3, 8, seed=0, dtype="float32")
    assert np.isfinite(nf.third_order_kernel(network, X)).all()
    X[3] *= np.float32(1e25)
    with pytest.raises(OverflowError, match=r"samples \d, \d and \d.*range of float32.*; use float64") as error:
        nf.third_order_kernel(network, X)
    assert 3 in error.value.at

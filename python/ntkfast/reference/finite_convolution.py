"""Convolutional networks of finite width by the definition (MATH.md, sections 3 and 3b): Jacobians written out.

Weights are those of :attr:`ntkfast.FiniteNetwork.weights`: per layer W (fan_out, slots channels) and its bias if it has
one; the readout, (positions, m) for flatten, (m,) for gap. Images are treated one at a time. A convolution is a matrix
from all entries of an image to all entries of its result, and the chain rule a product of such matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkfast.convolution import ConvNetwork
from ntkfast.layers import Dense
from ntkfast.reference.convolution import slots
from ntkfast.reference.duals import c_sigma
from ntkfast.reference.finite import Function, _activation

Array = NDArray[np.float64]


class _Layer(NamedTuple):
    """x'[l] = p x[l] + k s(z[l]), z[l] = w sum_t W[:, t] x[D_l(t)] + bias beta."""

    W: Array  #: (m, slots, channels)
    beta: Array | None
    s: Function
    ds: Function
    w: float
    bias: float
    p: float
    k: float
    trained: bool


def _layers(net: ConvNetwork, weights: Sequence[ArrayLike], count: int) -> tuple[list[_Layer], Array]:
    """Layers with their weights, and the readout."""
    todo, made = iter([np.asarray(w, dtype=np.float64) for w in weights]), []
    for layer in net.layers:
        W = next(todo)
        beta = next(todo) if layer.bias_variance else None
        s, ds = _activation(layer.activation)
        w = math.sqrt(layer.weight_variance / count if net.average else layer.weight_variance)
        if isinstance(layer, Dense):
            gain = c_sigma(layer.activation) if layer.gain is None else layer.gain
            p, k = 0.0, math.sqrt(gain / len(W))
        else:
            p, k = layer.skip, layer.scale / math.sqrt(len(W))
        made.append(_Layer(W.reshape(len(W), count, -1), beta, s, ds, w, math.sqrt(layer.bias_variance), p, k,
                           layer.trained))  # fmt: skip
    a = next(todo)
    if next(todo, None) is not None:
        raise ValueError("more weights than the network has")
    return made, a


def _matrix(D: NDArray[np.int64], W: Array) -> Array:
    """phi followed by W as a matrix: rows (position, output), columns (position, channel)."""
    count, positions = D.shape
    M = np.zeros((positions, len(W), positions, W.shape[2]))
    for t in range(count):
        for l in range(positions):
            if D[t, l] >= 0:
                M[l, :, D[t, l]] += W[:, t]
    return M.reshape(positions * len(W), -1)


class _Net(NamedTuple):
    layers: list[_Layer]
    matrices: list[Array]
    readout: Array  #: (positions m,), df/dx^(H)
    D: NDArray[np.int64]


def _network(net: ConvNetwork, weights: Sequence[ArrayLike], grid: tuple[int, ...]) -> _Net:
    D = slots(grid, net.windows(len(grid)), net.padding)
    layers, a = _layers(net, weights, len(D))
    positions = D.shape[1]
    every = np.tile(a / positions, positions) if net.pooling == "gap" else a.reshape(-1)
    matrices = [c.w * _matrix(D, c.W) for c in layers]
    return _Net(layers, matrices, math.sqrt(net.readout.weight_variance) * every, D)


def _forward(network: _Net, x: Array) -> tuple[list[tuple[Array, Array]], Array]:
    """(input, z) of every layer, flattened over positions and channels, and x^(H)."""
    states, x = [], x.reshape(-1)
    for c, M in zip(network.layers, network.matrices, strict=True):
        z = M @ x
        if c.beta is not None:
            z = z + np.tile(c.bias * c.beta, network.D.shape[1])
        states.append((x, z))
        x = c.k * np.asarray(c.s(z)) + (c.p * x if c.p else 0.0)
    return states, x


def _gradient(c: _Layer, D: NDArray[np.int64], delta: Array, x: Array) -> Array:
    """df/d[W, bias], row by row, from delta = df/dz (positions, m) and x (positions, channels)."""
    G = np.zeros(c.W.shape)
    for t, row in enumerate(D):
        for l, source in enumerate(row):
            if source >= 0:
                G[:, t] += c.w * np.outer(delta[l], x[source])
    flat = G.reshape(len(G), -1)
    return (flat if c.beta is None else np.column_stack([flat, c.bias * delta.sum(axis=0)])).ravel()


def _one(net: ConvNetwork, network: _Net, image: Array) -> list[Array]:
    """Gradients of f(image) in every trained matrix with its bias, in network order."""
    states, last = _forward(network, image)
    positions = network.D.shape[1]
    row, gradients = network.readout, []  # row = df/dx^(h)
    if net.readout.trained:
        x = last.reshape(positions, -1)
        seen: Any = x.mean(axis=0) if net.pooling == "gap" else x
        gradients.append(math.sqrt(net.readout.weight_variance) * seen.ravel())
    for c, M, (x, z) in zip(network.layers[::-1], network.matrices[::-1], states[::-1], strict=True):
        delta = row * c.k * np.asarray(c.ds(z))
        if c.trained:
            gradients.append(_gradient(c, network.D, delta.reshape(positions, -1), x.reshape(positions, -1)))
        row = delta @ M + (c.p * row if c.p else 0.0)
    return gradients[::-1]


def finite_outputs(net: ConvNetwork, weights: Sequence[ArrayLike], X: ArrayLike) -> Array:
    """f of a finite convolutional network for images X, (n, *grid, channels): (n,).

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> from ntkfast.reference import finite_convolution
    >>> network, X = nf.init(nf.conv_resnet(depth=2), (4, 5, 3), width=8, seed=0), np.ones((2, 4, 5, 3))
    >>> bool(np.allclose(finite_convolution.finite_outputs(network.net, network.weights, X), network.outputs(X)))
    True
    """
    X = np.asarray(X, dtype=np.float64)
    network = _network(net, weights, X.shape[1:-1])
    return np.array([network.readout @ _forward(network, x)[1] for x in X])


def finite_jacobian(net: ConvNetwork, weights: Sequence[ArrayLike], X: ArrayLike) -> list[Array]:
    """The explicit Jacobian of a finite convolutional network: (n, parameters) per trained matrix and its bias.

    In the order of ``net.slices``; within a block row by row of W, each with its bias behind it.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> from ntkfast.reference import finite_convolution
    >>> network, X = nf.init(nf.conv_net(depth=2), (4, 5, 3), width=8, seed=0), np.ones((2, 4, 5, 3))
    >>> J = finite_convolution.finite_jacobian(network.net, network.weights, X)
    >>> [block.shape for block in J]
    [(2, 216), (2, 576), (2, 160)]
    >>> bool(np.allclose(sum(block @ block.T for block in J), nf.empirical_ntk(network, X)))
    True
    """
    X = np.asarray(X, dtype=np.float64)
    network = _network(net, weights, X.shape[1:-1])
    rows = [_one(net, network, x) for x in X]
    return [np.array(block) for block in zip(*rows, strict=True)]

"""Networks of finite width by the definition: Jacobians written out, parameter by parameter.

Weights are those of :attr:`ntkfast.FiniteNetwork.weights`: per layer W (fan_out, fan_in), its bias if it has one, V,
its bias; the readout and its bias. Samples are treated one at a time; the chain rule is a product of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkfast.activation import Activation
from ntkfast.layers import Bottleneck, Dense, HalvedLayer, Layer, Linear, Residual
from ntkfast.network import Network
from ntkfast.reference import quadrature
from ntkfast.reference.duals import c_sigma

Array = NDArray[np.float64]
Function = Callable[[Array], Any]


def _erf(x: Array) -> Array:
    return np.array([math.erf(v) for v in x.ravel()]).reshape(x.shape)


def _density(x: Array) -> Array:
    result: Array = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return result


def _distribution(x: Array) -> Array:
    return (1 + _erf(x / math.sqrt(2))) / 2


_PAIRS: dict[str, tuple[Function, Function]] = {
    "erf": (_erf, lambda x: 2 / math.sqrt(math.pi) * np.exp(-(x**2))),
    "gelu": (lambda x: x * _distribution(x), lambda x: _distribution(x) + x * _density(x)),
    "sin": (np.sin, np.cos),
    "cos": (np.cos, lambda x: -np.sin(x)),
    "exp": (np.exp, np.exp),
    "gaussian": (lambda x: np.exp(-(x**2)), lambda x: -2 * x * np.exp(-(x**2))),
}


def _activation(act: Activation) -> tuple[Function, Function]:
    """s and s'; s'(0) is 0 for relu and abs."""
    if act.homogeneous:
        slope = act.slope
        at_zero = (1 + slope) / 2 if slope == -1.0 else slope
        return (
            lambda x: np.where(x > 0, x, slope * x),
            lambda x: np.where(x > 0, 1.0, np.where(x < 0, slope, at_zero)),
        )
    if act.function is None and act.name in _PAIRS:
        return _PAIRS[act.name]
    return quadrature.functions(act)


class _Pieces(NamedTuple):
    """A layer x' = p x + O h + o beta', h = k s(W x w + bias beta), O the identity without V."""

    W: Array
    beta: Array | None
    V: Array | None
    outer_beta: Array | None
    s: Function
    ds: Function
    w: float
    bias: float
    p: float
    k: float
    outer: float
    outer_bias: float
    trained: bool


def _amplitudes(layer: Layer, m: int) -> tuple[float, float, float]:
    """p, k, outer of a layer of width m."""
    if isinstance(layer, HalvedLayer):
        return layer.skip, layer.theta, 1.0
    if isinstance(layer, Linear):
        return 0.0, 1 / math.sqrt(m), 1.0
    if isinstance(layer, Residual):
        return layer.skip, layer.scale / math.sqrt(m), 1.0
    gain = c_sigma(layer.activation) if layer.gain is None else layer.gain
    if isinstance(layer, Dense):
        return 0.0, math.sqrt(gain / m), 1.0
    return layer.skip, math.sqrt(gain / m), layer.scale / math.sqrt(m)


def _pieces(net: Network, weights: Sequence[ArrayLike]) -> tuple[list[_Pieces], Array, Array | None]:
    """Layers with their weights, the readout and its bias."""
    todo = iter([np.asarray(w, dtype=np.float64) for w in weights])
    layers = list(net.layers)
    if getattr(layers[0], "skip", 0.0):
        layers = [Linear(trained=False), *layers]
    pieces = []
    for layer in layers:
        W = next(todo)
        wv, bv = getattr(layer, "weight_variance", 1.0), getattr(layer, "bias_variance", 0.0)
        ov = getattr(layer, "outer_bias_variance", 0.0)
        beta = next(todo) if bv else None
        V = next(todo) if isinstance(layer, Bottleneck) else None
        outer_beta = next(todo) if ov else None
        p, k, outer = _amplitudes(layer, len(W))
        s, ds = _activation(layer.activation)
        trained = getattr(layer, "trained", True)
        pieces.append(_Pieces(W, beta, V, outer_beta, s, ds, math.sqrt(wv), math.sqrt(bv), p, k, outer, math.sqrt(ov),
                              trained))  # fmt: skip
    a = next(todo)
    beta = next(todo) if net.readout.bias_variance else None
    if next(todo, None) is not None:
        raise ValueError("more weights than the network has")
    return pieces, a, beta


def _forward(pieces: list[_Pieces], x: Array) -> Iterator[tuple[_Pieces, Array, Array, Array]]:
    """(layer, its input, z, its output), layer by layer."""
    for c in pieces:
        z = c.w * (c.W @ x) + (0.0 if c.beta is None else c.bias * c.beta)
        h = c.k * c.s(z)
        branch = h if c.V is None else c.outer * (c.V @ h)
        if c.outer_beta is not None:
            branch = branch + c.outer * c.outer_bias * c.outer_beta
        new = branch + (c.p * x if c.p else 0.0)
        yield c, x, z, new
        x = new


def finite_outputs(net: Network, weights: Sequence[ArrayLike], X: ArrayLike) -> Array:
    """f(x) of a finite network for the rows of X, (n,).

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> from ntkfast import reference
    >>> network = nf.init(nf.resnet(depth=2), 3, width=8, seed=0)
    >>> bool(np.allclose(reference.finite_outputs(network.net, network.weights, np.eye(3)), network.outputs(np.eye(3))))
    True
    """
    pieces, a, beta = _pieces(net, weights)
    ro, result = net.readout, []
    for x in np.asarray(X, dtype=np.float64):
        *_, (_, _, _, last) = _forward(pieces, x)
        constant = 0.0 if beta is None else math.sqrt(ro.bias_variance) * float(beta[0])
        result.append(math.sqrt(ro.weight_variance) * float(a @ last) + constant)
    return np.array(result)


def _gradient(delta: Array, inputs: Array, amplitude: float | None) -> Array:
    """df/d[W, bias] = delta [inputs, amplitude]^T, flattened; no bias without amplitude."""
    return np.outer(delta, inputs if amplitude is None else np.append(inputs, amplitude)).ravel()


def _one_jacobian(net: Network, pieces: list[_Pieces], a: Array, beta: Array | None, x: Array) -> list[Array]:
    """Gradients of f(x) in every trained matrix with its bias, in network order."""
    ro, steps = net.readout, list(_forward(pieces, x))
    row, gradients = math.sqrt(ro.weight_variance) * a, []  # row = df/dx^(h)
    if ro.trained:
        amplitude = None if beta is None else math.sqrt(ro.bias_variance)
        gradients.append(_gradient(np.ones(1), math.sqrt(ro.weight_variance) * steps[-1][3], amplitude))
    for c, before, z, _ in reversed(steps):
        O = np.eye(len(z)) if c.V is None else c.outer * c.V
        slope = np.diag(c.k * c.ds(z))  # dh/dz
        if c.V is not None and c.trained:
            amplitude = None if c.outer_beta is None else c.outer_bias
            gradients.append(_gradient(c.outer * row, c.k * np.asarray(c.s(z)), amplitude))
        if c.trained:
            gradients.append(_gradient(row @ O @ slope, c.w * before, None if c.beta is None else c.bias))
        interlayer = O @ slope @ (c.w * c.W)  # dx^(h)/dx^(h-1)
        if c.p:
            interlayer = interlayer + c.p * np.eye(len(z))
        row = row @ interlayer
    return gradients[::-1]


def finite_jacobian(net: Network, weights: Sequence[ArrayLike], X: ArrayLike) -> list[Array]:
    """The explicit Jacobian of a finite network: one (n, parameters) block per trained matrix and its bias.

    In the order of ``net.slices``; within a block row by row of W, each with its bias behind it. For
    ``fixed_readout_resnet`` divided by sqrt m, so that the sum of J J^T over the blocks is the empirical
    tangent kernel of every network.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> from ntkfast import reference
    >>> network = nf.init(nf.fully_connected(depth=2), 3, width=8, seed=0)
    >>> J = reference.finite_jacobian(network.net, network.weights, np.eye(3))
    >>> [block.shape for block in J]
    [(3, 24), (3, 64), (3, 8)]
    >>> bool(np.allclose(sum(block @ block.T for block in J), nf.empirical_ntk(network, np.eye(3))))
    True
    """
    pieces, a, beta = _pieces(net, weights)
    rows = [_one_jacobian(net, pieces, a, beta, x) for x in np.asarray(X, dtype=np.float64)]
    scale = 1 / math.sqrt(len(pieces[-2].W)) if net.readout.centred else 1.0
    return [scale * np.array(block) for block in zip(*rows, strict=True)]


def fixed_readout_jacobian(weights: Sequence[ArrayLike], x: ArrayLike, theta: float) -> list[Array]:
    """Equation (2) of Frei, Cao, Gu (arXiv 1910.02934) for one input: df/dW_l, (m_{l-1}, m_l), l = 1..L+1, not scaled.

    grad_{W_l} f = theta^[2 <= l <= L] x_{l-1} v^T H_{l+1}^{L+1} Sigma_l with the interlayer matrices
    H_l^k = prod_{r=l..k} (I + theta Sigma_r W_r^T) (later factors on the left),
    H_l^{L+1} = Sigma_{L+1} W_{L+1}^T H_l^L, H_{L+2}^{L+1} = I, Sigma_l = diag 1(W_l^T x_{l-1} > 0).
    ``weights`` are those of the network: W_l^T, then v.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> from ntkfast import reference
    >>> network = nf.init(nf.fixed_readout_resnet(depth=2, theta=0.5), 3, width=8, seed=0)
    >>> [g.shape for g in reference.fixed_readout_jacobian(network.weights, np.ones(3), 0.5)]
    [(3, 8), (8, 8), (8, 8)]
    """
    *Wt, v = [np.asarray(w, dtype=np.float64) for w in weights]  # Wt[l - 1] = W_l^T
    L = len(Wt) - 1
    xs, Sigma = [np.asarray(x, dtype=np.float64)], [np.empty((0, 0))]
    for l in range(1, L + 2):
        z = Wt[l - 1] @ xs[-1]
        Sigma.append(np.diag((z > 0).astype(float)))
        branch = Sigma[l] @ z
        xs.append(xs[-1] + theta * branch if 2 <= l <= L else branch)

    def H(l: int) -> Array:
        """H_l^{L+1}."""
        if l == L + 2:
            return np.eye(len(v))
        product = np.eye(len(xs[L]))
        for r in range(l, L + 1):
            product = (np.eye(len(product)) + theta * Sigma[r] @ Wt[r - 1]) @ product
        return Sigma[L + 1] @ Wt[L] @ product

    return [
        (theta if 2 <= l <= L else 1.0) * np.outer(xs[l - 1], v @ H(l + 1) @ Sigma[l]) for l in range(1, L + 2)
    ]  # fmt: skip

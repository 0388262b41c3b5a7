"""The third-order kernel of the neural tangent hierarchy, without a Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core
from ntkfast._passes import Step
from ntkfast.convolution import ConvNetwork
from ntkfast.finite import FiniteNetwork
from ntkfast.jacobian import result_array
from ntkfast.layers import Dense, Residual

Array = NDArray[Any]

#: Bytes of the tangents of all samples along a block of gradients.
_BLOCK = 48 << 20


@dataclass(frozen=True)
class _Layer:
    """One layer x' = k x + be s(z), z = W x, for all n samples. W holds the square root of the weight variance."""

    W: Array  #: (m, fan_in)
    w: float  #: weight variance, 0 if frozen: what a product of two gradients in W is multiplied by
    k: float
    x: Array  #: (n, fan_in)
    slope: Array  #: be s'(z), (n, m)
    curve: Array  #: be s''(z) g, (n, m), g = df/dx'
    delta: Array  #: de = be s'(z) g, (n, m)
    xx: Array  #: (n, n) <x_a, x_b>
    dd: Array  #: (n, n) <de_a, de_b>


def _check(network: Any) -> None:
    if not isinstance(network, FiniteNetwork):
        raise TypeError(f"network must be a FiniteNetwork from init(...), got {type(network).__name__}")
    net = network.net
    if isinstance(net, ConvNetwork):
        raise ValueError("third_order_kernel takes dense networks (fully_connected, resnet), not a ConvNetwork")
    for h, layer in enumerate(net.layers, 1):
        if not isinstance(layer, (Dense, Residual)):
            raise ValueError("third_order_kernel takes Dense and Residual layers (fully_connected, resnet); "
                             f"layer {h} is {type(layer).__name__}")  # fmt: skip
        if layer.bias_variance:
            raise ValueError(f"third_order_kernel takes networks without biases; layer {h} has one")
    if net.readout.bias_variance:
        raise ValueError("third_order_kernel takes networks without biases; the readout has one")
    for layer, step in zip(net.layers, network._steps[-len(net.layers) :], strict=True):
        if step.activation.second is None:
            why = "its second derivative is not known" if layer.activation.function is not None else (
                "it has kinks: its second derivative is a distribution")  # fmt: skip
            raise ValueError(f"third_order_kernel needs a smooth activation; {layer.activation!r}: {why}")


def _products(x: Array) -> Array:
    """x x^T, exactly symmetric."""
    result: Array = x @ x.T
    _core.mirror(result, result)
    return result


def _layers(network: FiniteNetwork, x: Array) -> tuple[list[_Layer], Array]:
    """Everything about single samples, and the last x."""
    forward: list[tuple[Step, Array, Array, Array]] = []
    for step in network._steps:
        W = step.W if step.weight == 1.0 else step.weight * step.W
        z = x @ W.T
        forward.append((step, W, x, z))
        h = step.branch * step.activation.value(z)
        x = h + step.skip * x if step.skip else h
    g: Array = np.broadcast_to(network._head.weight * network._head.a, x.shape)
    made = []
    for step, W, before, z in reversed(forward):
        first, second = step.activation.first, step.activation.second
        assert first is not None
        assert second is not None
        slope = step.branch * first(z)
        delta, curve = slope * g, step.branch * second(z) * g
        made.append(_Layer(W, step.weight**2 * step.trained, step.skip, before, slope, curve, delta, _products(before),
                           _products(delta)))  # fmt: skip
        back = delta @ W
        g = back + step.skip * g if step.skip else back
    return made[::-1], x


def _apply(tangents: Array, matrix: Array) -> Array:
    """tangents @ matrix as one product."""
    flat: Array = tangents.reshape(-1, tangents.shape[-1]) @ matrix
    return flat.reshape(*tangents.shape[:-1], -1)


def _cross(tangents: Array, rows: Array, n: int) -> Array:
    """<tangents[c, a], rows[b]>, (c, a, b)."""
    return _apply(tangents, rows.T).reshape(-1, n, n)


def _add(to: Array, left: Array, right: Array) -> None:
    """to[c] += left[c] * right, for matrices of pairs."""
    for c in range(len(to)):
        _core.multiply_add(to[c], left[c], right)


def _rank_one(c: Array, coefficients: Array) -> Array:
    """coefficients[c, a] times the row c, (c, a, features)."""
    result: Array = coefficients[:, :, None] * c[:, None, :]
    return result


def _block(layers: list[_Layer], last: Array, head: float, part: slice) -> Array:
    """Half of K3[a, b, c] for some c, (c, a, b): derivatives of the first factor of every product along g_c."""
    n = len(last)
    total = np.zeros((part.stop - part.start, n, n), dtype=last.dtype)
    zs, xs = [], []  # z' and x' before every layer
    xt: Array | None = None  # x' of the input is 0
    for l in layers:
        xs.append(xt)
        zt = _rank_one(l.delta[part], l.w * l.xx[part])
        if xt is not None:
            zt += _apply(xt, l.W.T)
        zs.append(zt)
        new = l.slope * zt
        if l.k and xt is not None:
            new += l.k * xt
        xt = new
    assert xt is not None
    # The readout is trained with weight variance `head`: f = sqrt(head) a . x, so a' = sqrt(head) x_c.
    if head:
        total += head * _cross(xt, last, n)
    gt = np.broadcast_to((head * last[part])[:, None, :], xt.shape)
    for l, zt, before in zip(reversed(layers), reversed(zs), reversed(xs), strict=True):
        dt = l.curve * zt
        dt += l.slope * gt
        if l.w:
            _add(total, _cross(dt, l.delta, n), l.w * l.xx)
            if before is not None:
                _add(total, _cross(before, l.x, n), l.w * l.dd)
        if before is None:
            break
        back = _apply(dt, l.W)
        back += _rank_one(l.x[part], l.w * l.dd[part])
        gt = back + l.k * gt if l.k else back
    return total


def third_order_kernel(network: FiniteNetwork, X: Any, *, out: Any = None) -> Any:
    """K3 of the neural tangent hierarchy: the derivative of the tangent kernel along the gradients of the outputs.

    K3[a, b, c] = d/de K2[a, b](w + e grad f(x_c)) = <grad f_a, Hess f_b grad f_c> + <grad f_b, Hess f_a grad f_c>:
    under gradient flow of (1/2n) sum (f_c - y_c)^2 the kernel K2 = :func:`empirical_ntk` changes by
    dK2[a, b]/dt = -(1/n) sum_c K3[a, b, c] (f_c - y_c).

    Parameters
    ----------
    network : FiniteNetwork
        Of :func:`fully_connected` or :func:`resnet` (Dense and Residual layers) without biases, activations smooth.
    X : array, shape (n, d)
    out : array, optional
        Where the result goes; anything with slice assignment.

    Returns
    -------
    array, shape (n, n, n)
        Symmetric in a and b, exactly; not in c. Of size 1/width.

    Raises
    ------
    TypeError, ValueError
        Other layers, biases, relu and other kinked activations, functions of the user; bad points.
    OutOfMemoryError
        The result does not fit in memory.

    Notes
    -----
    Li, Luo, Yip (arXiv 2007.03714), Huang and Yau (arXiv 1909.08156). Tangents of z, x and of the output gradients of
    every sample along every gradient, from products of single samples: O(n^2 L m^2 + n^3 L m) operations, no Hessian,
    where a Hessian-vector product of every triple would take O(n^3 L m^2).

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> X = np.eye(4)
    >>> network = nf.init(nf.resnet(depth=3, activation="softplus"), 4, width=100, seed=0)
    >>> K3 = nf.third_order_kernel(network, X)
    >>> K3.shape, bool((K3 == K3.transpose(1, 0, 2)).all())
    ((4, 4, 4), True)
    """
    _check(network)
    x, wrap = network.points(X, "X")
    n = len(x)
    result = result_array(out, (n, n, n), network.dtype, [x])
    layers, last = _layers(network, x)
    head = network._head.weight**2 * network._head.trained
    width = max(max(l.W.shape) for l in layers)
    # z' and x' of every layer, and a few arrays on the way, per gradient
    size = (2 * len(layers) + 6) * n * width * x.itemsize + 4 * n * n * x.itemsize
    step = max(1, _BLOCK // size)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        half = _block(layers, last, head, part)
        result[:, :, part] = np.moveaxis(half + np.swapaxes(half, 1, 2), 0, 2)
    return result if out is not None else wrap(result)

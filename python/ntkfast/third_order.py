"""The third-order kernel of the neural tangent hierarchy, without a Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._cuda.device import index_of
from ntkfast._overflow import quiet, refuse
from ntkfast._passes import Step
from ntkfast._products import add_products, combine, on_host, squared, times
from ntkfast.convolution import ConvNetwork
from ntkfast.finite import FiniteNetwork, here
from ntkfast.jacobian import allocate
from ntkfast.layers import Dense, Residual

Array = NDArray[Any]

#: Bytes of the tangents of all samples along a block of gradients.
_BLOCK = 48 << 20
#: The same on a GPU, if it has four times that: a product of a block should fill it. Not measured.
_DEVICE_BLOCK = 1 << 30


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
        if step.functions.second is None:
            why = "its second derivative is not known" if layer.activation.function is not None else (
                "it has kinks: its second derivative is a distribution")  # fmt: skip
            raise ValueError(f"third_order_kernel needs a smooth activation; {layer.activation!r}: {why}")


def _layers(network: FiniteNetwork, x: Array) -> tuple[list[_Layer], Array]:
    """Everything about single samples, and the last x."""
    forward: list[tuple[Step, Array, Array, Array]] = []
    for step in network._steps:
        W = step.W if step.weight == 1.0 else step.weight * step.W
        z = times(x, W, transposed=True)
        forward.append((step, W, x, z))
        h = step.branch * step.functions.value(z)
        x = h + step.skip * x if step.skip else h
    g: Array = np.broadcast_to(network._head.weight * network._head.a, x.shape)
    made = []
    for step, W, before, z in reversed(forward):
        first, second = step.functions.first, step.functions.second
        assert first is not None
        assert second is not None
        slope = step.branch * first(z)
        delta, curve = slope * g, step.branch * second(z) * g
        made.append(_Layer(W, step.weight**2 * step.trained, step.skip, before, slope, curve, delta, squared(before),
                           squared(delta)))  # fmt: skip
        back = times(delta, W)
        g = back + step.skip * g if step.skip else back
    return made[::-1], x


def _cross(tangents: Array, rows: Array) -> Array:
    """<tangents[c, a], rows[b]>, (c, a, b)."""
    found: Array = times(tangents, rows, transposed=True)
    return found


def _block(layers: list[_Layer], last: Array, head: float, part: slice) -> Array:
    """Half of K3[a, b, c] for some c, (c, a, b): derivatives of the first factor of every product along g_c."""
    n, count = len(last), part.stop - part.start
    total = np.zeros_like(last, shape=(count, n, n))
    zs, xs = [], []  # z' and x' before every layer
    xt: Array | None = None  # x' of the input is 0
    for l in layers:
        xs.append(xt)
        zt = None if xt is None else times(xt, l.W, transposed=True)
        zt = combine(zt, None, zt, 1.0, None, l.w * l.xx[part], l.delta[part])
        zs.append(zt)
        xt = combine(None, l.slope, zt, l.k, xt if l.k else None)
    assert xt is not None
    # The readout is trained with weight variance `head`: f = sqrt(head) a . x, so a' = sqrt(head) x_c.
    if head:
        total += head * _cross(xt, last)
    gt = combine(None, None, None, 1.0, None, np.full_like(last, head, shape=(count, n)), last[part])
    for l, zt, before in zip(reversed(layers), reversed(zs), reversed(xs), strict=True):
        dt = combine(zt, l.curve, zt, l.slope, gt)
        if l.w:
            add_products(total, _cross(dt, l.delta), l.w * l.xx)
            if before is not None:
                add_products(total, _cross(before, l.x), l.w * l.dd)
        if before is None:
            break
        back = times(dt, l.W)
        gt = combine(back, None, back, l.k, gt if l.k else None, l.w * l.dd[part], l.x[part])
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
        On the device of the network, or in host memory.
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
    OverflowError
        An entry, or a product on the way to it, leaves the range of the dtype: names its samples. Use float64, or
        smaller points. A given ``out`` may be filled in part.
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
    gpu = network.backend(X=X)
    with here(gpu), quiet():
        x, wrap = network.points(X, "X", gpu=gpu)
        n = len(x)
        result = allocate(gpu, out, (n, n, n), network.dtype, [x])
        layers, last = _layers(network, x)
        head = network._head.weight**2 * network._head.trained
        width = max(max(l.W.shape) for l in layers)
        # z' and x' of every layer, and a few arrays on the way, per gradient
        size = (2 * len(layers) + 6) * n * width * x.itemsize + 4 * n * n * x.itemsize
        step = max(1, (_BLOCK if gpu is None else min(_DEVICE_BLOCK, gpu.free_bytes() // 4)) // size)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            half = _block(layers, last, head, part)
            both: Any = (half + half.swapaxes(1, 2)).transpose(1, 2, 0)
            refuse(np.isfinite(both), both.dtype, 0, 0, start)
            result[:, :, part] = both if on_host(both) or index_of(result) is not None else both.get()
        return wrap(result) if out is None else out

"""One recursion for every network of dense layers (MATH.md, section 9).

For a pair of inputs (x, y) the state is S = lim <x^(h), y^(h)>, the means a, b = lim m^(-1/2) sum_r x^(h)_r
(of x, of y) and Theta, the tangent kernel of the layers so far. A layer with activation s maps it to

    Lam    = cw S + cb
    S'     = p^2 S + p q (a mu_y + b mu_x) + r Q[Lam] + vb             mu = E[s(u)], u ~ N(0, Lam_ii)
    b'     = p b + q mu
    Theta' = p^2 Theta + r (D[Lam] (cw Theta + w cw S + wb cb) + v Q[Lam]) + vvb vb

with Q = E[s(u) s(v)], D = E[s'(u) s'(v)], (u, v) Gaussian with covariance Lam.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkfast.layers import Bottleneck, Dense, HalvedLayer, Layer, Linear, Residual
from ntkfast.network import Network
from ntkfast.reference.duals import c_sigma, expectations, mean

Array = NDArray[np.float64]
KERNELS = ("ntk", "nngp", "last_hidden")


class Numbers(NamedTuple):
    """What the recursion needs of one layer."""

    p: float  #: skip amplitude
    q: float  #: amplitude of the mean of the branch
    r: float  #: variance of the branch
    cw: float  #: inner weight variance
    cb: float  #: inner bias variance
    w: float  #: factor of the Gram of W, as if trained
    v: float  #: 1 if there is an outer matrix V
    vb: float  #: outer bias variance
    trained: float  #: 1 or 0, for everything in the layer


def numbers(layer: Layer) -> Numbers:
    """The coefficients of a layer, from its fields."""
    if isinstance(layer, HalvedLayer):
        # W is sqrt(2/m) times a standard normal matrix and kernels are divided by m: factor (m_l/m)/2.
        r, q = 2 * layer.theta**2, math.sqrt(2) * layer.theta
        return Numbers(layer.skip, q, r, 1.0, 0.0, layer.width_ratio / 2, 0.0, 0.0, 1.0)
    cw, cb, t = layer.weight_variance, layer.bias_variance, float(layer.trained)
    if isinstance(layer, Linear):
        return Numbers(0.0, 0.0, 1.0, cw, cb, 1.0, 0.0, 0.0, t)
    if isinstance(layer, Residual):
        return Numbers(layer.skip, layer.scale, layer.scale**2, cw, cb, 1.0, 0.0, 0.0, t)
    gain = c_sigma(layer.activation) if layer.gain is None else layer.gain
    if isinstance(layer, Dense):
        return Numbers(0.0, math.sqrt(gain), gain, cw, cb, 1.0, 0.0, 0.0, t)
    if isinstance(layer, Bottleneck):
        vb = layer.scale**2 * layer.outer_bias_variance
        return Numbers(layer.skip, 0.0, gain * layer.scale**2, cw, cb, 1.0, 1.0, vb, t)
    raise TypeError(f"unknown layer {type(layer).__name__}")


class State(NamedTuple):
    """Covariances and means of a layer's output for pairs (x, y); the arrays broadcast against each other."""

    Sx: Array  #: lim <x, x>
    Sy: Array  #: lim <y, y>
    S: Array  #: lim <x, y>
    a: Array  #: mean of x
    b: Array  #: mean of y


class Step(NamedTuple):
    """One layer: its numbers, its input state, and Q and D of the pre-activations."""

    k: Numbers
    state: State
    Q: Array
    D: Array


def _start(X: Array, Y: Array | None) -> State:
    """S = X Y^T, b = 0, for the (n, m) pairs of rows."""
    other = X if Y is None else Y
    Sx, Sy = np.sum(X * X, axis=1)[:, None], np.sum(other * other, axis=1)[None, :]
    return _state(Sx, Sy, X @ other.T, np.zeros_like(Sx), np.zeros_like(Sy), symmetric=Y is None)


def _state(Sx: Array, Sy: Array, S: Array, a: Array, b: Array, *, symmetric: bool) -> State:
    if symmetric:  # a point has exactly angle 0 with itself, whatever the rounding of S
        S = S.copy()
        np.fill_diagonal(S, Sx.ravel())
    return State(Sx, Sy, S, a, b)


def _covariance(k: Numbers, S: Array, a_my: Array, b_mx: Array, Q: Array) -> Array:
    """S'; one expression for pairs and for variances, so that S_ii is the variance of i to the last bit."""
    return k.p**2 * S + k.p * k.q * (a_my + b_mx) + k.r * Q + k.vb


def _forward(net: Network, state: State, *, symmetric: bool) -> tuple[list[Step], State]:
    """All layers from the input to the last, and the state after it."""
    steps = []
    for layer in net.layers:
        k, act, (Sx, Sy, S, a, b) = numbers(layer), layer.activation, state
        Lx, Ly, Lam = k.cw * Sx + k.cb, k.cw * Sy + k.cb, k.cw * S + k.cb
        Q, D = expectations(act, Lx, Ly, Lam)
        Qx, Qy = expectations(act, Lx, Lx, Lx)[0], expectations(act, Ly, Ly, Ly)[0]
        mx, my = mean(act, Lx), mean(act, Ly)
        steps.append(Step(k, state, Q, D))
        state = _state(
            _covariance(k, Sx, a * mx, a * mx, Qx),
            _covariance(k, Sy, b * my, b * my, Qy),
            _covariance(k, S, a * my, b * mx, Q),
            k.p * a + k.q * mx,
            k.p * b + k.q * my,
            symmetric=symmetric,
        )
    return steps, state


def _kernels(net: Network, start: State, *, symmetric: bool) -> dict[str, Array]:
    steps, end = _forward(net, start, symmetric=symmetric)
    ro = net.readout
    Theta = np.zeros_like(end.S)
    for k, (_, _, S, _, _), Q, D in steps:
        own = k.r * (D * (k.w * k.cw * S + k.cb) + k.v * Q) + k.v * k.vb
        Theta = k.p**2 * Theta + k.r * k.cw * D * Theta + k.trained * own
    last = steps[-1]
    covariance = end.S
    if ro.centred:  # entries +1 and -1, half each: the means cancel in f
        covariance = end.S - end.a * end.b
    return {
        "ntk": ro.weight_variance * Theta + ro.trained * (ro.weight_variance * end.S + ro.bias_variance),
        "nngp": ro.weight_variance * covariance + ro.bias_variance,
        "last_hidden": ro.weight_variance * last.k.r * last.D * last.k.w * last.k.cw * last.state.S,
    }


def _points(X: ArrayLike) -> Array:
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2:
        raise ValueError(f"inputs must be (n, d), got shape {X.shape}")
    return X


def _check(get: str | tuple[str, ...]) -> None:
    for name in (get,) if isinstance(get, str) else get:
        if name not in KERNELS:
            raise ValueError(f"unknown kernel {name!r}; use one of {', '.join(KERNELS)}")


def _select(kernels: dict[str, Array], get: str | tuple[str, ...]) -> Any:
    if isinstance(get, str):
        return kernels[get]
    make: Any = collections.namedtuple  # the fields are not known before the call
    return make("Kernels", get)(*(kernels[name] for name in get))


def gram(
    net: Network,
    X: ArrayLike,
    Y: ArrayLike | None = None,
    *,
    get: str | tuple[str, ...] = "ntk",
    normalize: bool = False,
) -> Any:
    """Kernels between the rows of X and the rows of Y (of X when ``Y`` is ``None``).

    Parameters
    ----------
    net : Network
    X : (n, d) array_like
    Y : (m, d) array_like, optional
    get : str or tuple of str
        ``"ntk"``: sum over the trained parameters of <df/dw(x), df/dw(y)>; ``"nngp"``: covariance of f at
        initialisation, whatever is trained; ``"last_hidden"``: Gram of the inner matrix of the last layer as
        if trained, biases excluded (K^(H) of Du et al., arXiv 1811.03804, Definitions 5.1 and 6.1, with the
        covariance of the layer itself).
    normalize : bool
        K_ij / sqrt(K_ii K_jj); rows with K_ii = 0 give 0 (Omega_bar of Huang et al., arXiv 2002.06262).

    Returns
    -------
    (n, m) ndarray, or a named tuple of them in the order of ``get``.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkfast import reference
    >>> from ntkfast.network import fully_connected
    >>> reference.gram(fully_connected(depth=1), np.eye(2)).round(4)
    array([[2.    , 0.3183],
           [0.3183, 2.    ]])
    """
    _check(get)
    X, Y = _points(X), None if Y is None else _points(Y)
    kernels = _kernels(net, _start(X, Y), symmetric=Y is None)
    if normalize:
        left = _diagonals(net, X)
        right = left if Y is None else _diagonals(net, Y)
        for name, K in kernels.items():
            kernels[name] = _inverse_root(left[name])[:, None] * K * _inverse_root(right[name])[None, :]
            if Y is None:
                np.fill_diagonal(kernels[name], left[name] > 0)
    return _select(kernels, get)


def _inverse_root(K: Array) -> Array:
    return np.where(K > 0, 1 / np.sqrt(np.where(K > 0, K, 1.0)), 0.0)


def _diagonals(net: Network, X: Array) -> dict[str, Array]:
    S, zero = np.sum(X * X, axis=1), np.zeros(len(X))
    return _kernels(net, State(S, S, S, zero, zero), symmetric=False)


def diagonal(net: Network, X: ArrayLike, *, get: str | tuple[str, ...] = "ntk") -> Any:
    """The diagonal of :func:`gram`, (n,), without the rest of the matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkfast import reference
    >>> from ntkfast.network import fully_connected
    >>> reference.diagonal(fully_connected(depth=3), np.eye(2))
    array([4., 4.])
    """
    _check(get)
    return _select(_diagonals(net, _points(X)), get)


def _slices(net: Network, steps: list[Step], end: State) -> Iterator[Array]:
    """Grams of the trained matrices from the last to the first: own term times the later layers."""
    ro = net.readout
    if ro.trained:
        yield ro.weight_variance * end.S + ro.bias_variance
    B = np.full_like(end.S, ro.weight_variance)  # lim <df/dx(x), df/dx(y)>/m behind the layer
    for k, (_, _, S, _, _), Q, D in reversed(steps):
        if k.trained and k.v:
            yield B * (k.r * Q + k.vb)  # V and its bias
        if k.trained:
            yield B * k.r * D * (k.w * k.cw * S + k.cb)  # W and its bias
        B = B * (k.p**2 + k.r * k.cw * D)


def layer_grams(net: Network, X: ArrayLike, Y: ArrayLike | None = None) -> Array:
    """The terms of the tangent kernel, (P, n, m): one slice per trained weight matrix; they sum to it.

    In network order (``net.slices`` has the names), W before V, readout last; the Gram of a bias belongs to
    the slice of its matrix; every slice includes the variance of the readout.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkfast import reference
    >>> from ntkfast.network import resnet
    >>> reference.layer_grams(resnet(depth=2), np.eye(1))[:, 0, 0].round(4)
    array([1.125 , 0.125 , 1.3501])
    """
    X, Y = _points(X), None if Y is None else _points(Y)
    steps, end = _forward(net, _start(X, Y), symmetric=Y is None)
    slices = list(_slices(net, steps, end))[::-1]
    return np.array(slices).reshape(len(slices), *end.S.shape)

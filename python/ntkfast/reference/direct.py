"""The kernels paper by paper, with the backward products written out: a check of the general recursion.

Matrices follow the notation of MATH.md: S^(h) feature covariance, b^(h) mean, B^(h) backward covariance,
G^(h) Gram of layer h; Q[S], D[S], mu[S] are the expectations of :mod:`~ntkfast.reference.duals` with
variances from the diagonal of S. Two sets of inputs are stacked, so that this diagonal is always there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkfast.activation import Activation
from ntkfast.reference.duals import c_sigma, expectations, mean

Array = NDArray[np.float64]
Name = str | Activation


def _stack(X: ArrayLike, Y: ArrayLike | None) -> tuple[Array, slice, slice]:
    """The products of all inputs, and which rows and columns belong to the answer."""
    X = np.asarray(X, dtype=np.float64)
    if Y is None:
        return X @ X.T, slice(None), slice(None)
    Z = np.concatenate([X, np.asarray(Y, dtype=np.float64)])
    return Z @ Z.T, slice(0, len(X)), slice(len(X), None)


def _duals(activation: Name, S: Array) -> tuple[Array, Array, Array]:
    """Q[S], D[S], mu[S]."""
    d = np.diag(S)
    Q, D = expectations(activation, d[:, None], d[None, :], S)
    return Q, D, mean(activation, d)


def _cross(b: Array, mu: Array) -> Array:
    return np.outer(b, mu) + np.outer(mu, b)


def fully_connected_grams(X: ArrayLike, Y: ArrayLike | None, depth: int, activation: Name = "relu") -> Array:
    """Du et al. (arXiv 1811.03804, section 5, Definition 5.1): G^(1), ..., G^(H+1), shape (H + 1, n, m).

    x^(h) = sqrt(c/m) s(W^(h) x^(h-1)), f = a . x^(H), all trained.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkfast import reference
    >>> reference.fully_connected_grams(np.eye(2), None, depth=1)[:, 0].round(4)
    array([[1.    , 0.    ],
           [1.    , 0.3183]])
    """
    S0, rows, cols = _stack(X, Y)
    c, S, P = c_sigma(activation), [S0], [np.empty(0)]
    for _ in range(depth):
        Q, D, _ = _duals(activation, S[-1])
        S.append(c * Q)
        P.append(c * D)
    G = []
    for h in range(1, depth + 1):
        product = np.ones_like(S0)
        for k in range(h, depth + 1):
            product = product * P[k]
        G.append(S[h - 1] * product)
    return np.array([*G, S[depth]])[:, rows, cols]


def resnet_grams(
    X: ArrayLike, Y: ArrayLike | None, depth: int, activation: Name = "relu", *, c_res: float = 1.0
) -> Array:
    """Du et al. (arXiv 1811.03804, section 6, Definition 6.1): G^(1), ..., G^(H+1), shape (H + 1, n, m).

    x^(1) = sqrt(c/m) s(W^(1) x), x^(h) = x^(h-1) + (c_res/(H sqrt m)) s(W^(h) x^(h-1)), f = a . x^(H), all
    trained. The cross term of the covariance is b_i E[s(v)] + b_j E[s(u)], with u for i and v for j.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkfast import reference
    >>> reference.resnet_grams(np.eye(1), None, depth=2)[:, 0, 0].round(4)
    array([1.125 , 0.125 , 1.3501])
    """
    S0, rows, cols = _stack(X, Y)
    c, al = c_sigma(activation), c_res / depth
    Q, D, mu = _duals(activation, S0)
    S, E, b = [S0, c * Q], [np.empty(0), D], math.sqrt(c) * mu
    for _ in range(2, depth + 1):
        Q, D, mu = _duals(activation, S[-1])
        E.append(D)
        S.append(S[-1] + al * _cross(b, mu) + al**2 * Q)
        b = b + al * mu
    B, G = np.ones_like(S0), [S[depth]]
    for h in range(depth, 1, -1):
        G.append(al**2 * S[h - 1] * E[h] * B)
        B = B * (1 + al**2 * E[h])
    G.append(c * S0 * E[1] * B)
    return np.array(G[::-1])[:, rows, cols]


def feed_forward_grams(X: ArrayLike, Y: ArrayLike | None, depth: int) -> Array:
    """FFNet of Huang et al. (arXiv 2002.06262), ReLU, readout fixed: terms of Omega_L, shape (L, n, m).

    Examples
    --------
    >>> import numpy as np
    >>> from ntkfast import reference
    >>> reference.feed_forward_grams(np.eye(1), None, depth=3)[:, 0, 0]
    array([1., 1., 1.])
    """
    K0, rows, cols = _stack(X, Y)
    K, Gd = [K0], []
    for _ in range(depth):
        Q, D, _ = _duals("relu", K[-1])
        K.append(2 * Q)
        Gd.append(2 * D)
    G = [K[l - 1] * np.prod(Gd[l - 1 :], axis=0) for l in range(1, depth + 1)]
    return np.array(G)[:, rows, cols]


def bottleneck_grams(
    X: ArrayLike,
    Y: ArrayLike | None,
    depth: int,
    activation: Name = "relu",
    *,
    alpha: float | None = None,
    first_trained: bool = False,
    readout_trained: bool = False,
) -> Array:
    """Residual network of Huang et al. (arXiv 2002.06262, equation (3)): Grams of [A,] W_1, V_1, ..., [v].

    x_0 = A x/sqrt m, x_l = x_{l-1} + (alpha/sqrt m) V_l sqrt(c/m) s(W_l x_{l-1}), f = v . x_L;
    c = 2 for ReLU; ``alpha=None`` means 1/L.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkfast import reference
    >>> reference.bottleneck_grams(np.eye(1), None, depth=1)[:, 0, 0]
    array([1., 1.])
    """
    K0, rows, cols = _stack(X, Y)
    c, al = c_sigma(activation), 1 / depth if alpha is None else alpha
    K, Gs, Gd = [K0], [], []
    for _ in range(depth):
        Q, D, _ = _duals(activation, K[-1])
        Gs.append(c * Q)
        Gd.append(c * D)
        K.append(K[-1] + al**2 * c * Q)
    B, G = np.ones_like(K0), [K[depth]] if readout_trained else []
    for l in range(depth, 0, -1):
        G.append(al**2 * B * Gs[l - 1])
        G.append(al**2 * B * K[l - 1] * Gd[l - 1])
        B = B * (1 + al**2 * Gd[l - 1])
    if first_trained:
        G.append(K0 * B)
    return np.array(G[::-1])[:, rows, cols]


def fixed_readout_grams(
    X: ArrayLike,
    Y: ArrayLike | None,
    depth: int,
    *,
    theta: float | None = None,
    last_width_ratio: float = 1.0,
) -> Array:
    """Frei, Cao, Gu (arXiv 1910.02934, equation (2)): G^(1), ..., G^(L+1) divided by m, shape (L + 1, n, m).

    x_1 = s(W_1^T x), x_l = x_{l-1} + theta s(W_l^T x_{l-1}), x_{L+1} = s(W_{L+1}^T x_L), entries of W_l
    N(0, 2/m_l), f = v . x_{L+1} with v = +-1 fixed; ``theta=None`` means 1/L.

    Examples
    --------
    >>> import numpy as np
    >>> from ntkfast import reference
    >>> reference.fixed_readout_grams(np.eye(1), None, depth=1)[:, 0, 0]
    array([0.5, 0.5])
    """
    S0, rows, cols = _stack(X, Y)
    th = 1 / depth if theta is None else theta
    Q, D, mu = _duals("relu", S0)
    S, p, b = [S0, 2 * Q], [D], math.sqrt(2) * mu
    for _ in range(2, depth + 1):
        Q, D, mu = _duals("relu", S[-1])
        p.append(D)
        S.append(S[-1] + th * math.sqrt(2) * _cross(b, mu) + 2 * th**2 * Q)
        b = b + th * math.sqrt(2) * mu
    p.append(_duals("relu", S[depth])[1])
    B, G = 2 * p[depth], [last_width_ratio * S[depth] * p[depth]]
    for l in range(depth, 1, -1):
        G.append(th**2 * S[l - 1] * p[l - 1] * B)
        B = B * (1 + 2 * th**2 * p[l - 1])
    G.append(S0 * p[0] * B)
    return np.array(G[::-1])[:, rows, cols]

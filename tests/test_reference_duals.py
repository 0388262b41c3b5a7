"""Gaussian expectations of the NumPy definition against integrals done in other ways."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from mpmath import mp, mpf
from oracle import check

from ntkfast import reference
from ntkfast.activation import NAMES, Activation

EPS = 2.0**-52
KINKED = {"relu": 0.0, "leaky_relu": 0.01, "abs": -1.0}
SMOOTH = [name for name in NAMES if name not in KINKED]


erf = np.vectorize(math.erf, otypes=[float])


def normal_cdf(x):
    return (1 + erf(x / math.sqrt(2))) / 2


def normal_pdf(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


S = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "abs": np.abs,
    "erf": erf,
    "gelu": lambda x: x * normal_cdf(x),
    "silu": lambda x: x * sigmoid(x),
    "softplus": lambda x: np.logaddexp(0, x),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "exp": np.exp,
    "gaussian": lambda x: np.exp(-x * x),
    "identity": lambda x: x,
    "arctan": np.arctan,
}
DS = {
    "relu": lambda x: (x > 0) * np.ones_like(x),
    "leaky_relu": lambda x: np.where(x > 0, np.ones_like(x), 0.01),
    "abs": np.sign,
    "erf": lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x),
    "gelu": lambda x: normal_cdf(x) + x * normal_pdf(x),
    "silu": lambda x: sigmoid(x) + x * sigmoid(x) * sigmoid(-x),
    "softplus": sigmoid,
    "tanh": lambda x: np.cosh(x) ** -2,
    "sin": np.cos,
    "cos": lambda x: -np.sin(x),
    "exp": np.exp,
    "gaussian": lambda x: -2 * x * np.exp(-x * x),
    "identity": np.ones_like,
    "arctan": lambda x: 1 / (1 + x * x),
}
S_MP = {
    "relu": lambda x: max(x, mpf(0)),
    "leaky_relu": lambda x: x if x > 0 else mpf(0.01) * x,
    "abs": abs,
    "erf": mp.erf,
    "gelu": lambda x: x * mp.ncdf(x),
    "silu": lambda x: x / (1 + mp.exp(-x)),
    "softplus": lambda x: mp.log(1 + mp.exp(x)),
    "tanh": mp.tanh,
    "sin": mp.sin,
    "cos": mp.cos,
    "exp": mp.exp,
    "gaussian": lambda x: mp.exp(-x * x),
    "identity": lambda x: x,
}


def legendre(name, A, B, C):
    """Q, D and their scales by panels of Gauss-Legendre in both whitened coordinates."""
    reach = 14.0 if name == "exp" else 9.5  # exp moves the weight away from 0
    panels = round(reach / 0.28)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half = reach / panels
    z = (half * (2 * np.arange(panels) + 1 - panels)[:, None] + half * nodes).ravel()
    w = np.tile(half * weights, panels) * normal_pdf(z)
    u = math.sqrt(A) * z
    along = C / math.sqrt(A) if A > 0 else 0.0
    v = along * z[:, None] + math.sqrt(max(B - along * along, 0.0)) * z[None, :]
    both = [(w * g(u)) @ (g(v) @ w) for g in (S[name], DS[name])]
    scale = [math.sqrt((w @ g(u) ** 2) * (w @ g(math.sqrt(B) * z) ** 2)) for g in (S[name], DS[name])]
    return both, scale


CORRELATIONS = [0.0, 0.5, -0.5, 0.999, 1 - 1e-6, 1 - 1e-13, -0.999, 1e-6 - 1, 1e-13 - 1, 1.0, -1.0]


@pytest.mark.parametrize("name", [*SMOOTH, "arctan"])
def test_smooth_expectations_are_the_integrals(name):
    act = Activation.from_function(np.arctan) if name == "arctan" else name
    for A, B in [(1.0, 1.0), (2.0, 0.3), (1e-6, 4.0), (6.0, 6.0), (1e-12, 1e-12), (0.0, 2.0)]:
        rhos = CORRELATIONS if A == B == 1 else CORRELATIONS[:8:3]
        C = math.sqrt(A * B) * np.array(rhos)
        Q, D = reference.expectations(act, A, B, C)
        for k, c in enumerate(C):
            (q, d), (q_scale, d_scale) = legendre(name, A, B, c)
            check(Q[k], q, 8e-15 * q_scale)
            check(D[k], d, (1e-13 if name == "arctan" else 8e-15) * d_scale)  # arctan: difference quotient


def angular_integrals(slope, A, B, C):
    """Kinked activations in polar coordinates: the radius integrates to 2 (Q) and 1 (D)."""
    n = mp.sqrt(A * B)
    th = mp.acos(max(min(C / n, mpf(1)), mpf(-1)))
    kinks = sorted({-mp.pi / 2, mp.pi / 2, th - mp.pi / 2, th + mp.pi / 2, 3 * mp.pi / 2})

    def s(x):
        return x if x > 0 else slope * x

    def ds(x):
        return mpf(1) if x > 0 else slope

    q = mp.quad(lambda a: s(mp.cos(a)) * s(mp.cos(a - th)), kinks)
    d = sum(ds(mp.cos(a)) * ds(mp.cos(a - th)) * (hi - lo)
            for lo, hi in itertools.pairwise(kinks) for a in [(lo + hi) / 2])  # fmt: skip
    return n * q / mp.pi, d / (2 * mp.pi), th


@pytest.mark.parametrize("name", [*KINKED, "steep"])
def test_kinked_expectations_are_the_integrals(name):
    slope = KINKED.get(name, 3.0)
    act = name if name in KINKED else Activation.leaky_relu(slope)
    for A, B in [(1.0, 1.0), (1e4, 3e-5), (1e-300, 1e-300), (1e250, 1e-20), (2.0, 7.0)]:
        C = np.array(CORRELATIONS) * (math.sqrt(A) * math.sqrt(B))
        Q, D = reference.expectations(act, A, B, C)
        for k, c in enumerate(C):
            with mp.workdps(40):
                q, d, th = angular_integrals(mpf(slope), mpf(A), mpf(B), mpf(float(c)))
                # One ulp of A B - C^2 turns the angle by eps/angle, at most sqrt(2 eps).
                turn = 0.0 if A == B == abs(c) else EPS / max(float(min(th, mp.pi - th)), 1.5e-8)
                size = (1 + abs(slope)) ** 2
                check(float(Q[k] - q), 0.0, 2 * EPS * size * math.sqrt(A) * math.sqrt(B))
                check(float(D[k] - d), 0.0, size * (EPS + turn))


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_one_variable(name):
    s = S_MP[name]
    with mp.workdps(25):
        for A in (0.0, 1e-8, 0.7, 1.0, 9.0):
            scale = mp.sqrt(A)
            exact = mp.quad(lambda z, scale=scale: s(scale * z) * mp.npdf(z), [-12, -4, 0, 4, 14])
            check(float(reference.mean(name, A)), float(exact), 4e-15 * max(1, abs(float(exact))))
        square = mp.quad(lambda z: s(z) ** 2 * mp.npdf(z), [-12, -4, 0, 4, 14])
        check(reference.second_moment(name), float(square), 2e-15 * float(square))
        check(reference.c_sigma(name), float(1 / square), 2e-15 / float(square))


@pytest.mark.parametrize("act", [*NAMES, Activation.from_function(np.arctan), Activation.leaky_relu(0.3)], ids=str)
def test_degenerate_and_shaped_input(act):
    value_at_0 = {"cos": 1.0, "exp": 1.0, "gaussian": 1.0, "softplus": math.log(2)}
    B = np.array([0.0, 1e-9, 2.0])
    Q, D = reference.expectations(act, 0.0, B, 0.0)
    check(Q, value_at_0.get(act, 0.0) * reference.mean(act, B), 1e-15)
    assert Q.shape == D.shape == (3,)
    assert np.isfinite(D).all()
    # One function of three numbers, symmetric in the first two, of any shape.
    A = np.array([[0.5], [1.5]])
    Q, D = reference.expectations(act, A, B, 0.3 * np.sqrt(A * B))
    Q2, D2 = reference.expectations(act, B, A, 0.3 * np.sqrt(A * B))
    np.testing.assert_array_equal(Q, Q2)
    np.testing.assert_array_equal(D, D2)
    assert Q.shape == (2, 3)


def test_functions_of_the_user():
    tanh = Activation.from_function(np.tanh)
    exact = Activation.from_function(np.tanh, DS["tanh"])
    A, B, C = 1.3, 0.8, np.array([-0.9, 0.0, 0.5, 1.0])
    # A derivative that is not given is a difference quotient.
    for act, tolerance in ((tanh, 1e-13), (exact, 3e-15)):
        check(reference.expectations(act, A, B, C), reference.expectations("tanh", A, B, C), tolerance)
    with pytest.raises(ValueError, match="not smooth"):
        reference.expectations(Activation.from_function(np.abs), 1.0, 1.0, 0.5)

"""s, s', s'' of every activation on arrays, against 40-digit differentiation of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import assert_close
from mpmath import mp, mpf

import ntkfast as nf
from ntkfast._derivatives import derivatives

DEFINITIONS = {
    "erf": mp.erf,
    "gelu": lambda z: z * mp.erfc(-z / mp.sqrt(2)) / 2,
    "silu": lambda z: z / (1 + mp.exp(-z)),
    "softplus": lambda z: mp.log1p(mp.exp(z)),
    "tanh": mp.tanh,
    "sin": mp.sin,
    "cos": mp.cos,
    "exp": mp.exp,
    "gaussian": lambda z: mp.exp(-z * z),
    "identity": lambda z: z,
}
POINTS = [0.0, 1e-300, -1e-12, 1e-5, 0.3, -0.7, 1.0, -1.5, 2.5, -4.0, 6.0, -9.0, 20.0, -36.0, 60.0, -60.0]
FAR = [-1e4, -800.0, 800.0, 1e4]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_smooth_activations(name, dtype):
    points = np.array(POINTS + ([] if name == "exp" else FAR), dtype=dtype)
    found = derivatives(nf.Activation(name))
    with mp.workdps(60):
        for order, f in enumerate(found):
            wanted = np.array([float(mp.diff(DEFINITIONS[name], mpf(float(z)), order)) for z in points])
            value = f(points)
            assert value.dtype == dtype
            # rounding of the argument of sin, cos, exp; terms of size 1 and z that cancel elsewhere
            size = np.maximum(1.0, np.abs(wanted)) * (np.maximum(1, np.abs(points)) if name == "exp" else 1)
            assert_close(value, wanted, size, 16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_kinked_activations(dtype):
    z = np.array([-2.0, -0.0, 0.0, 3.0], dtype=dtype)
    for act, value, first in [
        (nf.Activation("relu"), [0, 0, 0, 3], [0, 0, 0, 1]),
        (nf.Activation("abs"), [2, 0, 0, 3], [-1, 0, 0, 1]),
        (nf.Activation.leaky_relu(0.5), [-1, 0, 0, 3], [0.5, 0.5, 0.5, 1]),
        (nf.Activation.leaky_relu(0.0), [0, 0, 0, 3], [0, 0, 0, 1]),
    ]:
        found = derivatives(act)
        assert found.second is None
        assert (found.value(z) == value).all()
        assert (found.first(z) == first).all()
        assert found.value(z).dtype == found.first(z).dtype == dtype
    line = derivatives(nf.Activation.leaky_relu(1.0))
    assert (line.value(z) == z).all()
    assert (line.second(z) == 0).all()


def test_functions_of_the_user():
    act = nf.Activation.from_function(np.arctan, lambda x: 1 / (1 + x * x))
    found, z = derivatives(act), np.array([[0.5, -2.0]], dtype=np.float32)
    assert found.second is None
    assert found.value(z).dtype == np.float32
    assert_close(found.first(z), 1 / (1 + z.astype(float) ** 2), 1.0, 1e-7)
    assert derivatives(nf.Activation.from_function(np.arctan)).first is None
    with pytest.raises(ValueError, match="shape"):
        derivatives(nf.Activation.from_function(lambda z: z[0], name="first")).value(z)

"""Finite networks for the tests of the host and of devices, and derivatives by differences."""

from __future__ import annotations

import numpy as np
from conftest import assert_close

import ntkfast as nf

#: one of every kind of layer and activation
NETWORKS = {
    name: nf.resnet(2, name)
    for name in ("relu", "leaky_relu", "abs", "erf", "gelu", "silu", "softplus", "tanh", "sin", "cos", "gaussian")
} | {
    "exp": nf.Network([nf.Dense("exp", gain=0.2, weight_variance=0.1)]),
    "bottleneck": nf.bottleneck_resnet(2, first_trained=True),
    "fixed readout": nf.fixed_readout_resnet(2, last_width_ratio=1.5),
    "biases": nf.Network(
        [nf.Bottleneck("tanh", scale=0.5, bias_variance=0.1, outer_bias_variance=0.2)], nf.Readout(bias_variance=0.3)
    ),
    "frozen": nf.Network([nf.Dense("relu", trained=False)], nf.Readout(trained=False)),
    "conv": nf.conv_net(2, bias_variance=0.1),
    "conv, gap": nf.conv_resnet(2, "erf", readout="gap", padding="circular"),
}


def compare_differences(network, X, parameter, gradient, h=1e-6):
    """(samples, *shape of parameter): derivatives of the outputs against differences."""
    for at in np.ndindex(parameter.shape):
        old = parameter[at]
        parameter[at] = old + h
        up = network.outputs(X)
        parameter[at] = old - h
        down = network.outputs(X)
        parameter[at] = old
        assert_close(gradient[(slice(None), *at)], (up - down) / (2 * h), 1 + np.abs(gradient).max(), 1e-7)

"""Neural tangent kernels of infinitely wide networks, fast and exact to rounding.

>>> import numpy as np, ntkfast as nf
>>> net = nf.resnet(depth=50, activation="relu")
>>> K = nf.gram(net, np.eye(3))
>>> K.shape
(3, 3)
"""

import os as _os
from typing import Any as _Any

from ntkfast import _core
from ntkfast._arrays import OutOfMemoryError
from ntkfast._file import gram_to_file
from ntkfast.activation import Activation
from ntkfast.convolution import ConvNetwork, conv_net, conv_resnet
from ntkfast.empirical import WidthCheck, check_against_network, empirical_ntk
from ntkfast.finite import FiniteNetwork, init
from ntkfast.gram import diagonal, gram, layer_grams
from ntkfast.jacobian import LayerFactors, jacobian_diagonal, jacobian_gram
from ntkfast.layers import Bottleneck, Dense, Linear, Readout, Residual
from ntkfast.matmul import KernelOperator, gram_matmul
from ntkfast.network import Network, bottleneck_resnet, fixed_readout_resnet, fully_connected, resnet
from ntkfast.third_order import third_order_kernel

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Bottleneck",
    "ConvNetwork",
    "Dense",
    "FiniteNetwork",
    "KernelOperator",
    "LayerFactors",
    "Linear",
    "Network",
    "OutOfMemoryError",
    "Readout",
    "Residual",
    "WidthCheck",
    "bottleneck_resnet",
    "check_against_network",
    "conv_net",
    "conv_resnet",
    "diagonal",
    "empirical_ntk",
    "fixed_readout_resnet",
    "fully_connected",
    "gram",
    "gram_matmul",
    "gram_to_file",
    "init",
    "jacobian_diagonal",
    "jacobian_gram",
    "layer_grams",
    "resnet",
    "third_order_kernel",
]

if hasattr(_os, "register_at_fork"):
    _os.register_at_fork(after_in_child=_core.after_fork)


def __getattr__(name: str) -> _Any:
    # The definition is imported on use: it is not needed to compute.
    if name == "reference":
        import importlib

        return importlib.import_module("ntkfast.reference")
    raise AttributeError(f"module 'ntkfast' has no attribute {name!r}")

"""The definition: every kernel as short float64 NumPy functions, slow on purpose.

Read :mod:`~ntkfast.reference.duals` (Gaussian expectations of an activation), then
:mod:`~ntkfast.reference.recursion` (one recursion for every :class:`ntkfast.Network`), then
:mod:`~ntkfast.reference.direct` (the same kernels section by section, as the papers have them, with the
backward products written out), and :mod:`~ntkfast.reference.finite` (networks of finite width, their Jacobians written
out). Convolutional networks are in :mod:`~ntkfast.reference.convolution` and
:mod:`~ntkfast.reference.finite_convolution`. Nothing here shares code with the compiled kernels.

Accuracy: 1e-15 relative to sqrt(K_ii K_jj), except that derivatives of kinked activations see the angle
between two inputs with an error of about 1e-16/angle, because S_ii S_jj - S_ij^2 cancels for near-duplicates.
"""

from ntkfast.reference.direct import (
    bottleneck_grams,
    feed_forward_grams,
    fixed_readout_grams,
    fully_connected_grams,
    resnet_grams,
)
from ntkfast.reference.duals import c_sigma, expectations, mean, second_moment
from ntkfast.reference.finite import finite_jacobian, finite_outputs, fixed_readout_jacobian
from ntkfast.reference.recursion import diagonal, gram, layer_grams

__all__ = [
    "bottleneck_grams",
    "c_sigma",
    "diagonal",
    "expectations",
    "feed_forward_grams",
    "finite_jacobian",
    "finite_outputs",
    "fixed_readout_grams",
    "fixed_readout_jacobian",
    "fully_connected_grams",
    "gram",
    "layer_grams",
    "mean",
    "resnet_grams",
    "second_moment",
]

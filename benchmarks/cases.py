"""What is measured: the rows of the table, and the inputs of the targets."""

from __future__ import annotations

from functools import partial

from ntkfast import Activation, bottleneck_resnet, fixed_readout_resnet, fully_connected, resnet
from ntkfast._bench import Case

#: Sizes of every target that compares whole Gram matrices.
LARGE = {"n": 4096, "d": 784}
#: Depth of the comparison with other packages.
RIVAL_DEPTH = 10


def deep(depth: int, n: int, d: int, dtype: str = "float64") -> Case:
    """The plain ReLU network."""
    return Case(f"fully_connected({depth})", fully_connected(depth), n, d, dtype)


def whole(n: int, d: int) -> list[Case]:
    """The two cases that the targets compare with NumPy's product."""
    return [
        deep(3, n, d),
        Case("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), n, d, rows="unit"),
    ]


def families() -> list[Case]:
    """One row for every kind of network, n = 4096, d = 784."""
    case = partial(Case, **LARGE)
    return [
        case("resnet(10)", resnet(10)),
        case("bottleneck_resnet(10)", bottleneck_resnet(10)),
        case("bottleneck_resnet(100)", bottleneck_resnet(100)),
        case("fixed_readout_resnet(10)", fixed_readout_resnet(10)),
        case("fully_connected(10, leaky_relu 0.2)", fully_connected(10, Activation.leaky_relu(0.2))),
        case("fully_connected(3), biases", fully_connected(3, bias_variance=0.1)),
        case("fully_connected(10), biases", fully_connected(10, bias_variance=0.1)),
        case("fully_connected(3, erf)", fully_connected(3, "erf")),
        whole(**LARGE)[1],
        case("fully_connected(3, gelu)", fully_connected(3, "gelu")),
        case("fully_connected(3, tanh), unit rows", fully_connected(3, "tanh"), rows="unit"),
        case("fully_connected(3, tanh)", fully_connected(3, "tanh")),
        case("resnet(10)", resnet(10), dtype="float32"),
        case("bottleneck_resnet(10)", bottleneck_resnet(10), dtype="float32"),
        case("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), dtype="float32", rows="unit"),
    ]


def table() -> list[Case]:
    """Every size, width, depth and dtype of the plain network; then the families."""
    sizes = [(1024, 64), (4096, 784)]
    double = [deep(depth, n, d) for n, d in sizes for depth in (1, 3, 10, 100)]
    single = [deep(10, n, d, "float32") for n, d in sizes]
    return [*double, *single, *families()]


def small_table() -> list[Case]:
    """A few seconds' worth, for trying the scripts and for the pytest suite."""
    case = partial(Case, n=1024, d=64)
    return [
        deep(3, 1024, 64),
        deep(3, 1024, 64, "float32"),
        case("bottleneck_resnet(10)", bottleneck_resnet(10)),
        case("fully_connected(3), biases", fully_connected(3, bias_variance=0.1)),
        case("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), rows="unit"),
    ]


def close(dtype: str, clusters: int) -> Case:
    """Points in tight clusters: with one all pairs are close, with k every k-th pair, scattered over the matrix."""
    name = "all pairs close" if clusters == 1 else f"1 pair in {clusters} close"
    return Case(name, fully_connected(3), **LARGE, dtype=dtype, clusters=clusters)

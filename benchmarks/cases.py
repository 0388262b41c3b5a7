"""What is measured: the rows of the table, and the inputs of the targets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ntkfast import Activation, bottleneck_resnet, fixed_readout_resnet, fully_connected, resnet
from ntkfast._bench import Case

#: Sizes of every target that compares whole Gram matrices.
LARGE = {"n": 4096, "d": 784}
#: Depth of the comparison with other packages.
RIVAL_DEPTH = 10
#: What the others are divided by there: layer by layer like theirs. (Beyond its product a table takes next to nothing.)
OURS = "ntkfast, recursion"


def deep(depth: int, n: int, d: int, dtype: str = "float64", path: str = "") -> Case:
    """The plain ReLU network."""
    return Case(f"fully_connected({depth})", fully_connected(depth), n, d, dtype, path=path)


def whole(n: int, d: int) -> list[Case]:
    """Whole Gram matrices beside NumPy's product: the recursion, and a smooth activation by its table."""
    gelu = Case("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), n, d, rows="unit")
    return [deep(3, n, d, path="recursion"), replace(gelu, path="recursion"), gelu]


def families() -> list[Case]:
    """One row for every kind of network, n = 4096, d = 784; two where gram may choose between its paths."""
    case = partial(Case, **LARGE)
    one_angle = [
        case("resnet(10)", resnet(10)),
        case("bottleneck_resnet(10)", bottleneck_resnet(10)),
        case("bottleneck_resnet(100)", bottleneck_resnet(100)),
        case("fixed_readout_resnet(10)", fixed_readout_resnet(10)),
        case("fully_connected(10, leaky_relu 0.2)", fully_connected(10, Activation.leaky_relu(0.2))),
        case("fully_connected(3, tanh), unit rows", fully_connected(3, "tanh"), rows="unit"),
        case("resnet(10)", resnet(10), dtype="float32"),
        case("bottleneck_resnet(10)", bottleneck_resnet(10), dtype="float32"),
        case("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), dtype="float32", rows="unit"),
    ]
    others = [
        case("fully_connected(3), biases", fully_connected(3, bias_variance=0.1)),
        case("fully_connected(10), biases", fully_connected(10, bias_variance=0.1)),
        case("fully_connected(3, erf)", fully_connected(3, "erf")),
        case("fully_connected(3, gelu)", fully_connected(3, "gelu")),
        case("fully_connected(3, tanh)", fully_connected(3, "tanh")),
    ]
    return [*(replace(c, path="recursion") for c in one_angle), *one_angle, *others]


def table() -> list[Case]:
    """Every size, width, depth and dtype of the plain network by recursion (its table: section depth); the families."""
    sizes = [(1024, 64), (4096, 784)]
    double = [deep(depth, n, d, path="recursion") for n, d in sizes for depth in (1, 3, 10, 100)]
    single = [deep(10, n, d, "float32", "recursion") for n, d in sizes]
    return [*double, *single, *whole(**LARGE)[1:], *families()]


def small_table() -> list[Case]:
    """A few seconds' worth, for trying the scripts and for the pytest suite."""
    case = partial(Case, n=1024, d=64)
    return [
        deep(3, 1024, 64, path="recursion"),
        deep(3, 1024, 64, "float32", "recursion"),
        deep(100, 1024, 64, path="table"),
        deep(100, 1024, 64, "float32", "table"),
        case("bottleneck_resnet(10)", bottleneck_resnet(10), path="table"),
        case("fully_connected(3), biases", fully_connected(3, bias_variance=0.1)),
        case("fully_connected(3, gelu), unit rows", fully_connected(3, "gelu"), rows="unit"),
    ]


def close(dtype: str, clusters: int) -> Case:
    """Points in tight clusters: with one all pairs are close, with k every k-th pair, scattered over the matrix."""
    name = "all pairs close" if clusters == 1 else f"1 pair in {clusters} close"
    return Case(name, fully_connected(3), **LARGE, dtype=dtype, clusters=clusters)

"""``python -m ntkfast demo``: handwritten digits as rows and as images, networks of any depth, and a picture."""

from __future__ import annotations

import secrets
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ntkfast
from ntkfast import reference
from ntkfast._bench import rest
from ntkfast._demo_depth import CURVES, Curve, Point, Quality, picture
from ntkfast.convolution import ConvNetwork
from ntkfast.network import Network
from ntkfast.reference import convolution

Array = NDArray[np.float64]
Builder = Callable[..., Network]

FAMILIES: tuple[Builder, ...] = (
    ntkfast.fully_connected,
    ntkfast.resnet,
    ntkfast.bottleneck_resnet,
    ntkfast.fixed_readout_resnet,
)
#: Added to the diagonal of the normalised kernel, whose diagonal is 1: too small to matter unless K is singular.
RIDGE = 1e-6
#: Angle below which pairs are not compared: there the reference itself loses digits (1e-16 / angle).
CLOSE = 1e-3
#: Entries smaller than this part of the largest one are compared on its scale.
FLOOR = 0.1


@dataclass(frozen=True)
class Sizes:
    """How much the demo does."""

    points: int  #: of the data set
    train: int  #: points to fit, the rest tests
    splits: int  #: into training and test points
    depths: tuple[int, ...]  #: of the table of families
    deep: tuple[int, ...]  #: depths of the other table, and of the picture
    runs: int  #: of each timing
    sample: int  #: points compared with the reference
    images: int  #: of the small table of convolutional networks, half of them to fit
    sample_images: int  #: compared with the reference, whose memory grows with the square of the positions


FULL = Sizes(1797, 1000, 5, (3, 30, 300), (1, 10, 100, 1000, 10000), 3, 200, 400, 12)
QUICK = Sizes(300, 150, 2, (3, 10), (1, 10, 100), 2, 40, 60, 4)


@dataclass(frozen=True)
class Data:
    """Points of unit length and their classes."""

    x: Array  #: (n, d)
    label: NDArray[np.int64]  #: (n,)


def load(points: int) -> Data:
    """The digits that come with scikit-learn; nothing is downloaded."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]

    digits = load_digits()
    x = np.asarray(digits.data[:points], dtype=np.float64)
    return Data(x / np.linalg.norm(x, axis=1, keepdims=True), np.asarray(digits.target[:points]))


def accuracies(K: Array, label: NDArray[np.int64], train: int, splits: int) -> list[float]:
    """Percent of test points that kernel ridge regression gets right, for each split.

    The targets are one-hot vectors less their mean: otherwise a kernel that is nearly constant would be judged by the
    sizes of the classes.
    """
    found = []
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(len(K))
        fit, test = order[:train], order[train:]
        target = np.eye(10)[label[fit]]
        weights = np.linalg.solve(K[np.ix_(fit, fit)] + RIDGE * np.eye(train), target - target.mean(axis=0))
        guess = np.argmax(K[np.ix_(test, fit)] @ weights, axis=1)
        found.append(100 * float(np.mean(guess == label[test])))
    return found


def quality(K: Array, data: Data, sizes: Sizes) -> Quality:
    """Least eigenvalue and accuracy of a normalised kernel."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,import-not-found,unused-ignore]

    # LAPACK works in thousands of short steps; its threads wait for each other at every one if the machine is busy.
    with threadpool_limits(1, user_api="blas"):
        least = float(np.linalg.eigvalsh(K)[0])
        percent = accuracies(K, data.label, sizes.train, sizes.splits)
    return Quality(least, statistics.fmean(percent), statistics.pstdev(percent))


def largest_error(net: Network, x: Array, K: Array, sample: int) -> tuple[float, int]:
    """Largest relative error of K against the NumPy definition on a sample of points, and the pairs compared."""
    some = np.sort(np.random.default_rng(0).permutation(len(x))[:sample])
    exact = reference.gram(net, x[some])
    angle = np.arccos(np.clip(x[some] @ x[some].T, -1, 1))
    # The diagonal is exact in both.
    compared = (np.minimum(angle, np.pi - angle) > CLOSE) | np.eye(len(some), dtype=bool)
    scale = np.maximum(np.abs(exact), FLOOR * np.abs(exact).max())
    error = np.abs(K[np.ix_(some, some)] - exact) / scale
    return float(error[compared].max()), int(compared.sum())


def seconds(functions: list[Callable[[], Any]], runs: int) -> list[float]:
    """Median time of each function, run in turn so that a busy machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(runs):
        for function, found in zip(functions, times, strict=True):
            rest()
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


HEAD = ("network", "depth", "gram [ms]", "X @ X.T [ms]", "ratio", "error", "least eigenvalue", "accuracy [%]")
WIDTHS = (21, 6, 10, 13, 6, 9, 17, 15)


def line(cells: tuple[str, ...], widths: tuple[int, ...] = WIDTHS) -> str:
    """One row of a table: the first column left, the others right."""
    first, *others = cells
    return first.ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))


def paragraphs(*texts: str) -> str:
    """Text under a table."""
    return "\n".join(textwrap.fill(text, sum(WIDTHS), subsequent_indent="  ") for text in texts)


def row(builder: Builder, depth: int, data: Data, sizes: Sizes) -> tuple[str, int]:
    """One network measured: the line of the table, and how many pairs were compared with the reference."""
    net, x, copy = builder(depth), data.x, data.x.copy()
    K = ntkfast.gram(net, x)  # also starts the threads before anything is timed
    gram, *products = seconds([lambda: ntkfast.gram(net, x), lambda: x @ x.T, lambda: x @ copy.T], sizes.runs)
    error, pairs = largest_error(net, x, K, sizes.sample)
    root = np.sqrt(np.diag(K))
    found = quality(K / np.outer(root, root), data, sizes)
    cells = (builder.__name__, f"{depth}", f"{1e3 * gram:.1f}", f"{1e3 * min(products):.1f}",
             f"{gram / min(products):.1f}", f"{error:.0e}", f"{found.least:.4f}",
             f"{found.accuracy:.1f} +- {found.spread:.1f}")  # fmt: skip
    return line(cells), pairs


def notes(sizes: Sizes, tests: int, pairs: int) -> str:
    """What the columns mean."""
    return paragraphs(
        f"gram, X @ X.T: medians of {sizes.runs} runs in turn, each allocating its result; of X @ X.T and "
        "X @ X.copy().T, which NumPy computes differently, the faster.",
        f"error: largest |K - R| / max(|R|, {FLOOR:g} max|R|), R from ntkfast.reference, over {pairs:,} pairs of "
        f"{sizes.sample} points (those at an angle above {CLOSE:g}, and the diagonal). R itself loses digits, about "
        "1e-16/angle in each layer, and depth shrinks the angles of feed-forward networks.",
        "least eigenvalue: of K_ij / sqrt(K_ii K_jj), all points.",
        f"accuracy: kernel ridge regression with the same kernel, ridge {RIDGE:g}, centred one-hot targets, "
        f"{sizes.train:,} training and {tests:,} test points, mean and standard deviation over {sizes.splits} splits.",
    )


def table(data: Data, sizes: Sizes) -> None:
    """Print the table of families, row by row as it is measured."""
    n, d = data.x.shape
    print(f"scikit-learn's digits: {n:,} images, {d} pixels, rows scaled to unit length, float64\n")
    print(line(HEAD))
    pairs = 0
    for builder in FAMILIES:
        for depth in sizes.depths:
            text, pairs = row(builder, depth, data, sizes)
            print(text, flush=True)
    print(f"\n{notes(sizes, n - sizes.train, pairs)}\n")


# --- images -----------------------------------------------------------------------------------------------------------

IMAGE_HEAD = ("network", "readout", "images", "fit", "gram [ms]", "us/pair", "error", "least eigenvalue",
              "accuracy [%]")  # fmt: skip
IMAGE_WIDTHS = (16, 9, 8, 6, 11, 9, 9, 18, 15)
#: Convolutions of the networks, and matrices of the fully connected one beside them.
IMAGE_DEPTH = 3


def image_error(net: ConvNetwork, x: Array, K: Array, sample: int) -> float:
    """Largest relative error of K against the NumPy definition on a sample of images."""
    some = np.sort(np.random.default_rng(0).permutation(len(x))[:sample])
    exact = convolution.gram(net, x[some])["ntk"]
    error = np.abs(K[np.ix_(some, some)] - exact) / np.maximum(np.abs(exact), FLOOR * np.abs(exact).max())
    return float(error.max())


def image_row(net: Network | ConvNetwork, data: Data, sizes: Sizes) -> str:
    """One network measured on all of `data`, digits as images of 8 by 8 if it is convolutional."""
    n, convolutional = len(data.x), isinstance(net, ConvNetwork)
    x = data.x.reshape(n, 8, 8, 1) if convolutional else data.x
    ntkfast.gram(net, x[:2])  # starts the threads
    start = time.perf_counter()
    K = ntkfast.gram(net, x)
    duration = time.perf_counter() - start
    if isinstance(net, ConvNetwork):
        error = image_error(net, x, K, sizes.sample_images)
    else:
        error = largest_error(net, x, K, sizes.sample)[0]
    root = np.sqrt(np.diag(K))
    found = quality(K / np.outer(root, root), data, sizes)
    name, readout = ("conv_net", net.pooling) if isinstance(net, ConvNetwork) else ("fully_connected", "-")
    cells = (name, readout, f"{n:,}", f"{sizes.train:,}", f"{1e3 * duration:.1f}",
             f"{2e6 * duration / (n * (n + 1)):.2g}", f"{error:.0e}", f"{found.least:.4f}",
             f"{found.accuracy:.1f} +- {found.spread:.1f}")  # fmt: skip
    return line(cells, IMAGE_WIDTHS)


def image_table(data: Data, sizes: Sizes) -> None:
    """Print what convolutions make of the same digits, and pooling of a part of them."""
    few = Data(data.x[: sizes.images], data.label[: sizes.images])
    small = replace(sizes, train=sizes.images // 2)
    dense = ntkfast.fully_connected(IMAGE_DEPTH)
    flatten, gap = (ntkfast.conv_net(IMAGE_DEPTH, readout=readout) for readout in ("flatten", "gap"))
    print(f"The same digits as 8x8 images, depth {IMAGE_DEPTH}\n")
    print(line(IMAGE_HEAD, IMAGE_WIDTHS))
    for net, points, how in ((flatten, data, sizes), (dense, few, small), (flatten, few, small), (gap, few, small)):
        print(image_row(net, points, how), flush=True)
    text = paragraphs(
        "conv_net: windows of 3x3, zeros around the image; readout of all positions (flatten) or of their mean (gap: "
        "every pair of positions counts).",
        f"gram: one run. error: as above, over {sizes.sample_images} images ({sizes.sample} points); R loses digits "
        "where images agree. Least eigenvalue and accuracy: as above, on the images of the row.",
    )
    print(f"\n{text}\n")


# --- any depth --------------------------------------------------------------------------------------------------------

DEEP_HEAD = ("network", "depth", "path", "first [ms]", "again [ms]", "mean", "from limit", "least eigenvalue",
             "accuracy [%]")  # fmt: skip
DEEP_WIDTHS = (13, 7, 11, 12, 12, 9, 12, 18, 15)
#: Calls that take longer are not repeated.
LONG = 1.0


def deep_point(curve: Curve, depth: int, data: Data, sizes: Sizes, limit: Array) -> Point:
    """One depth of one family measured; `limit` is its kernel at infinite depth, (n, n)."""
    net, n = curve.build(depth), len(data.x)
    start = time.perf_counter()
    K = ntkfast.gram(net, data.x, normalize=True)
    first = time.perf_counter() - start
    again = None
    if first < LONG:
        (again,) = seconds([lambda: ntkfast.gram(net, data.x, normalize=True)], sizes.runs)
    path = net.plan(data.x).split(maxsplit=1)[0].rstrip(":")
    off = K[~np.eye(n, dtype=bool)]
    distance = float(np.abs(off - limit[~np.eye(n, dtype=bool)]).max())
    return Point(depth, path, first, again, float(off.mean()), distance, quality(K, data, sizes))


def deep_cells(curve: Curve, point: Point) -> tuple[str, ...]:
    """A row of the table of depths."""
    again = "-" if point.again is None else f"{1e3 * point.again:.1f}"
    found = point.quality
    return (curve.name, f"{point.depth}", point.path, f"{1e3 * point.first:.1f}", again, f"{point.mean:.4f}",
            f"{point.distance:.0e}", f"{found.least:.4f}", f"{found.accuracy:.1f} +- {found.spread:.1f}")  # fmt: skip


def deep_table(data: Data, sizes: Sizes, machine: str) -> list[list[Point]]:
    """Print what depth does to both families; for each of CURVES its rows."""
    print(line(DEEP_HEAD, DEEP_WIDTHS))
    rows: list[list[Point]] = []
    for curve in CURVES:
        limit, points = curve.limit(data.x), []
        for depth in sizes.deep:
            points.append(deep_point(curve, depth, data, sizes, limit))
            print(line(deep_cells(curve, points[-1]), DEEP_WIDTHS), flush=True)
        rows.append(points)
    text = paragraphs(
        "Networks of Huang et al. (feed-forward: fixed readout; residual: two matrices a block, alpha = 1/depth), all "
        "points, kernels normalised.",
        f"first: with compiling the network; again: median of {sizes.runs} more calls, unless the first took {LONG:g} "
        "s. path: one table for all layers, or the recursion through them (net.plan(X) says why).",
        "mean: of the entries off the diagonal. from limit: largest distance of such an entry from the limit of "
        "infinite depth: 1/4 for any two points (feed-forward), the kernel of one block, by ntkfast.reference "
        "(residual).",
        machine,
    )
    print(f"\n{text}")
    return rows


def save(figure: Any, path: Path) -> None:
    """Write the picture so that `path` is never half of one."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        figure.savefig(part, format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def run(out: Path, *, quick: bool, machine: str) -> None:
    """Print the tables and write the picture."""
    start = time.perf_counter()
    try:
        import matplotlib  # noqa: F401
        import sklearn  # type: ignore[import-untyped,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'the demo needs scikit-learn and matplotlib: pip install "ntkfast[demo]" ({error})'
        ) from None
    if out.is_dir() or not out.parent.is_dir():
        raise OSError(f"{out} is a directory" if out.is_dir() else f"{out}: the directory {out.parent} does not exist")
    sizes = QUICK if quick else FULL
    data = load(sizes.points)
    table(data, sizes)
    image_table(data, sizes)
    rows = deep_table(data, sizes, machine)
    save(picture(rows, f"{sizes.train:,} training points, mean ± standard deviation over {sizes.splits} splits"), out)
    print(f"{out} written; {time.perf_counter() - start:.0f} s in all")

"""``python -m ntkfast demo``: handwritten digits, every family of networks, time, error, accuracy, and a picture."""

from __future__ import annotations

import secrets
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ntkfast
from ntkfast import reference
from ntkfast.network import Network

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
#: Between timings: threads of BLAS and OpenMP spin for a while after their last call, and the next should not pay.
PAUSE = 0.03


@dataclass(frozen=True)
class Sizes:
    """How much the demo does."""

    points: int  #: of the data set
    train: int  #: points to fit, the rest tests
    splits: int  #: into training and test points
    depths: tuple[int, ...]  #: of the table
    picture: tuple[int, ...]  #: depths of the picture
    runs: int  #: of each timing
    sample: int  #: points compared with the reference


FULL = Sizes(1797, 1000, 5, (3, 30, 300), (1, 4, 16, 64, 256, 1024), 3, 200)
QUICK = Sizes(300, 150, 2, (3, 10), (1, 16), 2, 40)


@dataclass(frozen=True)
class Data:
    """Points of unit length and their classes."""

    x: Array  #: (n, d)
    label: NDArray[np.int64]  #: (n,)


@dataclass(frozen=True)
class Quality:
    """What a normalised kernel is worth."""

    least: float  #: eigenvalue of all points
    accuracy: float  #: percent, mean over splits
    spread: float  #: standard deviation over splits


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
            time.sleep(PAUSE)
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


HEAD = ("network", "depth", "gram [ms]", "X @ X.T [ms]", "ratio", "error", "least eigenvalue", "accuracy [%]")
WIDTHS = (21, 6, 10, 13, 6, 9, 17, 15)


def line(cells: tuple[str, ...]) -> str:
    """One row of the table: the first column left, the others right."""
    first, *others = cells
    return first.ljust(WIDTHS[0]) + "".join(c.rjust(w) for c, w in zip(others, WIDTHS[1:], strict=True))


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
    texts = (
        f"gram, X @ X.T: medians of {sizes.runs} runs in turn, each allocating its result; of X @ X.T and "
        "X @ X.copy().T, which NumPy computes differently, the faster.",
        f"error: largest |K - R| / max(|R|, {FLOOR:g} max|R|), R from ntkfast.reference, over {pairs:,} pairs of "
        f"{sizes.sample} points (those at an angle above {CLOSE:g}, and the diagonal). R itself loses digits, about "
        "1e-16/angle in each layer, and depth shrinks the angles of feed-forward networks.",
        "least eigenvalue: of K_ij / sqrt(K_ii K_jj), all points.",
        f"accuracy: kernel ridge regression with the same kernel, ridge {RIDGE:g}, centred one-hot targets, "
        f"{sizes.train:,} training and {tests:,} test points, mean and standard deviation over {sizes.splits} splits.",
    )
    return "\n".join(textwrap.fill(text, sum(WIDTHS), subsequent_indent="  ") for text in texts)


def table(data: Data, sizes: Sizes, machine: str) -> None:
    """Print the table, row by row as it is measured."""
    n, d = data.x.shape
    print(f"scikit-learn's digits: {n:,} images, {d} pixels, rows scaled to unit length, float64\n")
    print(line(HEAD))
    pairs = 0
    for builder in FAMILIES:
        for depth in sizes.depths:
            text, pairs = row(builder, depth, data, sizes)
            print(text, flush=True)
    print(f"\n{notes(sizes, n - sizes.train, pairs)}\n{textwrap.fill(machine, sum(WIDTHS), subsequent_indent='  ')}")


# --- the picture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A family of networks in the picture."""

    title: str
    colour: str
    build: Callable[[int], Network]


#: Vermilion and blue of Okabe and Ito, told apart by colour-blind readers.
CURVES = (
    Curve("Feed-forward network", "#D55E00", lambda depth: ntkfast.fully_connected(depth, readout_trained=False)),
    Curve("Residual network, α = 1/depth", "#0072B2", lambda depth: ntkfast.bottleneck_resnet(depth)),
)


STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.edgecolor": "0.3",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 9,
    "grid.color": "0.92",
    "legend.frameon": False,
}
#: How the limits of the feed-forward kernel are drawn: 1/4 off the diagonal, so 3/4 for the least eigenvalue.
LIMIT: dict[str, Any] = {"color": "0.35", "lw": 0.9, "ls": (0, (4, 3)), "zorder": 1}
LIMIT_TEXT: dict[str, Any] = {"color": "0.35", "fontsize": 9, "va": "top"}


def kernel_of_correlation(net: Network) -> tuple[Array, Array]:
    """(rho, normalised kernel of two unit vectors with correlation rho); dense where deep kernels are steep."""
    angle = np.pi * np.linspace(0, 1, 501) ** 3
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points[:, 0], ntkfast.gram(net, points[:1], points, normalize=True)[0]


def draw_kernels(axes: Any, curve: Curve, depths: tuple[int, ...]) -> None:
    """The kernel as a function of the correlation, one line per depth."""
    import matplotlib

    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, len(depths)))
    for depth, shade in zip(depths, shades, strict=True):
        axes.plot(*kernel_of_correlation(curve.build(depth)), color=shade, lw=1.8, label=f"{depth:,}")
    axes.set_title(curve.title, color=curve.colour)
    axes.set(xlim=(-1, 1), ylim=(-0.22, 1.02), xticks=(-1, -0.5, 0, 0.5, 1), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.set_ylabel("kernel, K(ρ) / K(1)")


def draw_depth(top: Any, bottom: Any, data: Data, sizes: Sizes) -> None:
    """Accuracy (with its spread) and least eigenvalue against depth, both families."""
    depths = sizes.picture
    for curve in CURVES:
        kernels = (ntkfast.gram(curve.build(depth), data.x, normalize=True) for depth in depths)
        found = [quality(K, data, sizes) for K in kernels]
        mean, spread = np.array([q.accuracy for q in found]), np.array([q.spread for q in found])
        style = {"color": curve.colour, "lw": 1.8, "ms": 4.5, "label": curve.title}
        top.plot(depths, mean, "o-", **style)
        top.fill_between(depths, mean - spread, mean + spread, color=curve.colour, alpha=0.2, lw=0)
        bottom.plot(depths, [q.least for q in found], "o-", **style)
    bottom.axhline(0.75, **LIMIT)
    bottom.text(depths[0], 0.735, "feed-forward limit 3/4", **LIMIT_TEXT)
    bottom.set(ylim=(0, 0.8), yticks=(0, 0.25, 0.5, 0.75))
    top.set_title("Test accuracy of kernel regression")
    top.set_ylabel("correct [%]")
    bottom.set_title("Least eigenvalue of the Gram matrix")
    bottom.set_ylabel(r"$\lambda_{\min}$, unit diagonal")
    for axes in (top, bottom):
        axes.set_xscale("log")
        axes.set_xticks(depths, [f"{depth:,}" for depth in depths])
        axes.minorticks_off()


def picture(data: Data, sizes: Sizes) -> Any:
    """Four panels: kernels of both families left, what depth does to them right."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, and files are drawn by Agg
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.05, hspace=0.05)
        figure = Figure(figsize=(9.6, 7.0), dpi=160, layout=layout)
        panels = figure.subplots(2, 2)
        for axes, curve in zip(panels[:, 0], CURVES, strict=True):
            draw_kernels(axes, curve, sizes.picture)
            axes.set_xlabel("correlation ρ of the two inputs")
        draw_depth(panels[0, 1], panels[1, 1], data, sizes)
        for axes in panels[:, 1]:
            axes.set_xlabel("depth")
        panels[0, 0].axhline(0.25, **LIMIT)
        panels[0, 0].text(-0.97, 0.235, "limit 1/4", **LIMIT_TEXT)
        panels[0, 0].legend(title="depth", ncols=2, loc="upper left", alignment="left")
        panels[0, 1].legend(loc="lower left", labelcolor="linecolor")
    figure.supxlabel(
        f"Tangent kernels of ReLU networks of infinite width. Right: digits, {sizes.train:,} training points, "
        f"mean ± standard deviation over {sizes.splits} splits.",
        fontsize=9, color="0.35",
    )  # fmt: skip
    return figure


def save(figure: Any, path: Path) -> None:
    """Write the picture so that `path` is never half of one."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        figure.savefig(part, format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def run(out: Path, *, quick: bool, machine: str) -> None:
    """Print the table and write the picture."""
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
    table(data, sizes, machine)
    save(picture(data, sizes), out)
    print(f"{out} written; {time.perf_counter() - start:.0f} s in all")

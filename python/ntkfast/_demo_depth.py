"""What depth does to the kernels of two families of networks: their limits, and the picture of the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import reference
from ntkfast.gram import gram
from ntkfast.network import Network, bottleneck_resnet, fully_connected

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A family of networks."""

    name: str
    title: str  #: in the picture
    colour: str
    build: Callable[[int], Network]
    limit: Callable[[Array], Array]  #: normalised kernel off the diagonal at infinite depth, (n, d) -> (n, n)


def quarter(x: Array) -> Array:
    """Feed-forward networks: 1/4 for any two points."""
    return np.full((len(x), len(x)), 0.25)


def one_block(x: Array) -> Array:
    """Residual networks with alpha = 1/depth: F of Huang et al., the normalised kernel of one block."""
    K: Array = reference.gram(bottleneck_resnet(1), x)
    root = np.sqrt(np.diag(K))
    return np.asarray(K / np.outer(root, root))


#: Vermilion and blue of Okabe and Ito, told apart by colour-blind readers.
CURVES = (
    Curve("feed-forward", "Feed-forward network", "#D55E00",
          lambda depth: fully_connected(depth, readout_trained=False), quarter),
    Curve("residual", "Residual network, α = 1/depth", "#0072B2", lambda depth: bottleneck_resnet(depth), one_block),
)  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """What a normalised kernel is worth."""

    least: float  #: eigenvalue of all points
    accuracy: float  #: percent, mean over splits
    spread: float  #: standard deviation over splits


@dataclass(frozen=True)
class Point:
    """A family at one depth."""

    depth: int
    path: str  #: "table" or "recursion"
    first: float  #: seconds of the first call
    again: float | None  #: seconds of further calls
    mean: float  #: of the entries off the diagonal
    distance: float  #: largest, of such an entry from its limit
    quality: Quality


#: One list for each of CURVES, by depth.
Rows = Sequence[Sequence[Point]]

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
    return points[:, 0], gram(net, points[:1], points, normalize=True)[0]


def draw_kernels(axes: Any, curve: Curve, depths: Sequence[int]) -> None:
    """The kernel as a function of the correlation, one line per depth."""
    import matplotlib

    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, len(depths)))
    for depth, shade in zip(depths, shades, strict=True):
        axes.plot(*kernel_of_correlation(curve.build(depth)), color=shade, lw=1.8, label=f"{depth:,}")
    axes.set_title(curve.title, color=curve.colour)
    axes.set(xlim=(-1, 1), ylim=(-0.22, 1.02), xticks=(-1, -0.5, 0, 0.5, 1), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.set_ylabel("kernel, K(ρ) / K(1)")


def draw_depth(top: Any, bottom: Any, rows: Rows) -> None:
    """Accuracy (with its spread) and least eigenvalue against depth, both families."""
    depths = [point.depth for point in rows[0]]
    for curve, points in zip(CURVES, rows, strict=True):
        found = [point.quality for point in points]
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


def picture(rows: Rows, about: str) -> Any:
    """Four panels: kernels of both families left, what depth does to them right.

    `rows` are those of each of CURVES, `about` tells how the accuracy was found.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, and files are drawn by Agg
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.05, hspace=0.05)
        figure = Figure(figsize=(9.6, 7.0), dpi=160, layout=layout)
        panels = figure.subplots(2, 2)
        for axes, curve in zip(panels[:, 0], CURVES, strict=True):
            draw_kernels(axes, curve, [point.depth for point in rows[0]])
            axes.set_xlabel("correlation ρ of the two inputs")
        draw_depth(panels[0, 1], panels[1, 1], rows)
        for axes in panels[:, 1]:
            axes.set_xlabel("depth")
        panels[0, 0].axhline(0.25, **LIMIT)
        panels[0, 0].text(-0.97, 0.215, "limit 1/4", **LIMIT_TEXT)
        panels[0, 0].legend(title="depth", ncols=2, loc="upper left", alignment="left")
        panels[0, 1].legend(loc="lower left", labelcolor="linecolor")
    figure.supxlabel(
        f"Tangent kernels of ReLU networks of infinite width. Right: digits, {about}.", fontsize=9, color="0.35"
    )
    return figure

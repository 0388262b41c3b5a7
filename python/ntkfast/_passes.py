"""Forward and reverse pass of a finite network, layer by layer on rows; a layout says what rows of a layer see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._contract import Factor
from ntkfast._derivatives import Derivatives, derivatives
from ntkfast._products import times
from ntkfast._windows import Layout, Windows
from ntkfast.activation import Activation

Array = NDArray[Any]

#: Channels up to which gradients go back as windows, one product, instead of being added up slot by slot, in runs of so
#: many numbers.
_NARROW = 128


@dataclass(frozen=True)
class Step:
    """One layer with its weights: x' = skip x + branch s(z), or skip x + outer (branch s(z) V^T + outer_bias beta').

    z = weight x W^T + bias beta, in a convolutional network with the window around a position for x. Rows are samples,
    or positions of samples.
    """

    W: Array  #: (width, fan_in)
    beta: Array | None  #: (width,), None without bias
    V: Array | None  #: (width, width) of a bottleneck
    outer_beta: Array | None
    activation: Activation  #: not its functions, which could not be pickled
    weight: float  #: sqrt of the weight variance (over the slots of the window, if that is averaged)
    bias: float
    skip: float
    branch: float
    outer: float
    outer_bias: float
    trained: bool

    @property
    def functions(self) -> Derivatives:
        """s, s' and s''."""
        return derivatives(self.activation)

    @property
    def arrays(self) -> list[Array]:
        return [w for w in (self.W, self.beta, self.V, self.outer_beta) if w is not None]


@dataclass(frozen=True)
class Head:
    """The readout: f = weight <a, x> + bias beta, x pooled."""

    a: Array  #: (width,), or (positions, width)
    beta: Array | None  #: (1,)
    weight: float
    bias: float
    trained: bool


def _preactivation(step: Step, scaled: Array) -> Array:
    z: Array = times(scaled, step.W, transposed=True)
    if step.beta is not None:
        z += step.bias * step.beta
    return z


def _combine(step: Step, x: Array, h: Array) -> Array:
    """x' from the branch h = branch s(z)."""
    new = h
    if step.V is not None:
        new = times(h, step.V, transposed=True)
        if step.outer_beta is not None:
            new += step.outer_bias * step.outer_beta
        new *= step.outer
    if step.skip:
        new = new + step.skip * x
    return new


def _seen(step: Step, layout: Layout, x: Array, out: Array | None = None) -> Array:
    """weight times what the rows of a layer see of x, in `out` if given."""
    if out is None:
        if layout.slots == 1 and step.weight == 1.0:
            return x
        out = np.empty_like(x, shape=(len(x), layout.slots * x.shape[1]))
    layout.gather(x, step.weight, out)
    return out


def _back(step: Step, layout: Layout, g: Array) -> Array:
    """The gradient in x from g, that in the preactivations."""
    if isinstance(layout, Windows) and len(step.W) <= _NARROW:
        found: Array = times(_seen(step, layout, g), layout.turned(step.W))
        return found
    back: Array = times(g, step.W)
    if step.weight != 1.0:
        back *= step.weight
    return layout.scatter(back)


def outputs(steps: tuple[Step, ...], head: Head, layout: Layout, x: Array) -> Array:
    """f of some samples, (n,), from their rows."""
    for step in steps:
        z = _preactivation(step, _seen(step, layout, x))
        x = _combine(step, x, step.branch * step.functions.value(z))
    f: Array = times(layout.pool(x), head.a.reshape(1, -1), transposed=True)[:, 0] * head.weight
    return f if head.beta is None else f + head.bias * head.beta


def _with_bias(inputs: Array, width: int, bias: float) -> Array:
    """The first columns of inputs; the one behind them, if there is one, holds the amplitude of a bias."""
    if inputs.shape[1] > width:
        inputs[:, width] = bias
    return inputs[:, :width]


def fill_factors(
    steps: tuple[Step, ...], head: Head, layout: Layout, x: Array, made: list[Factor], unit: float
) -> None:  # fmt: skip
    """Layer inputs and gradients of unit f for the rows x. Forward, keeping inputs and slopes; backward, turning slopes
    into gradients in place."""
    todo, n = iter(made), len(x) // layout.positions
    tape: list[tuple[Step, Array, Array | None]] = []  # step, slope (later gradient), gradient of V
    for step in steps:
        first = step.functions.first
        assert first is not None
        if step.trained:
            factor = next(todo)
            slope = factor.deltas
            scaled = _seen(step, layout, x, _with_bias(factor.inputs, step.W.shape[1], step.bias))
        else:
            scaled, slope = _seen(step, layout, x), np.empty_like(x, shape=(len(x), len(step.W)))
        z = _preactivation(step, scaled)
        np.multiply(first(z), step.branch, out=slope)
        h = step.branch * step.functions.value(z)
        outer = None
        if step.V is not None and step.trained:
            factor = next(todo)
            outer = factor.deltas
            _with_bias(factor.inputs, h.shape[1], step.outer_bias)[...] = h
        x = _combine(step, x, h)
        tape.append((step, slope, outer))
    if head.trained:
        factor = next(todo)
        np.multiply(layout.pool(x), head.weight, out=_with_bias(factor.inputs, head.a.size, head.bias))
        factor.deltas[...] = 1
    lowest = next((k for k, step in enumerate(steps) if step.trained), len(steps))
    if lowest == len(steps):
        return
    g = layout.spread((head.weight * unit) * head.a, n)
    for k, (step, slope, outer) in zip(range(len(tape) - 1, -1, -1), reversed(tape), strict=True):
        inner = g
        if step.V is not None:
            inner = step.outer * g
            if outer is not None:
                outer[...] = inner
            inner = times(inner, step.V)
        np.multiply(slope, inner, out=slope)
        if k == lowest:
            return
        back = _back(step, layout, slope)
        g = back + step.skip * g if step.skip else back

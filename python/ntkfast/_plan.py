"""From a network to the numbers the compiled kernels run on.

Layers without biases and with positively homogeneous activations come first (the *prefix*): there the norms of the
inputs factor out, and a layer is four numbers made here in 40 digits, so that a thousand layers lose nothing. What
follows (the *suffix*) runs on covariances. An unnormalised variance may exceed float64 although the normalised
kernel is harmless, so the suffix is divided by powers of 4 wherever its activations allow it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast import _core, _hermite
from ntkfast.activation import Activation
from ntkfast.layers import Coefficients
from ntkfast.network import Network

Array = NDArray[np.float64]

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
_DIGITS = 40
_EPS = float(np.finfo(np.float64).eps)
#: values of ActivationId in csrc/math/layer.h
_IDS = {"erf": 1, "gaussian": 2, "exp": 3, "sin": 4, "cos": 5, "gelu": 6}
_HERMITE = 7
#: the ranges of kArcRange in csrc/math/arccos.h
_RANGES = (0.5, 0.28, 0.1)
#: bits by which the suffix is scaled whenever the variance of a unit-norm point passes them, up or down
_STEP = 64


@dataclass(frozen=True)
class Mix:
    """One result as theta Theta + cov S + mean b_i b_j + last G, plus a constant (the readout's bias)."""

    theta: float
    cov: float
    mean: float
    last: float
    constant: float

    def as_list(self) -> list[float]:
        return [self.theta, self.cov, self.mean, self.last]


@dataclass(frozen=True)
class Compiled:
    """A network ready for the kernels."""

    core: Any
    prefix_only: bool
    #: results are to be multiplied by root^2 * 4^exponent (prefix only: of unit-norm inputs)
    root: float
    exponent: int
    layers: int
    suffix_layers: int
    table_bytes: int


def mix_of(net: Network, get: str) -> Mix:
    """How ``get`` is put together (MATH.md, section 9, last table; API.md, section 2)."""
    out = net.readout
    w, trained = out.weight_variance, float(out.trained)
    if get == "ntk":
        return Mix(w, trained * w, 0.0, 0.0, trained * out.bias_variance)
    if get == "nngp":
        return Mix(0.0, w, -w * out.centred, 0.0, out.bias_variance)
    return Mix(0.0, 0.0, 0.0, w, 0.0)


def _slices(net: Network) -> list[tuple[int, int]]:
    """Index in ``layer_grams`` of the slices W and V of every layer, -1 for none."""
    result, count = [], 0
    for layer in net.layers:
        names = layer.slices
        w = count if "w" in names else -1
        v = count + 1 if "v" in names else -1
        count += len(names)
        result.append((w, v))
    return result


@dataclass
class _Unit:
    """Unit-norm state through the prefix, 40 digits: nu = S_ii, beta = mean, lowest = least possible correlation."""

    nu: Decimal = Decimal(1)
    beta: Decimal = Decimal(0)
    lowest: float = -1.0


def _kappa(rho: float, e: float) -> float:
    """Q / A of a homogeneous activation with slope e for u < 0, at correlation rho (float: only for ranges)."""
    theta = math.acos(max(-1.0, min(1.0, rho)))
    area = (math.sin(theta) - theta * math.cos(theta)) / math.pi
    return 0.5 * (1 + e * e) * rho + 0.5 * (1 - e) ** 2 * area


def _homogeneous_layer(c: Coefficients, activation: Activation, unit: _Unit) -> tuple[list[float], list[int]] | None:
    """Numbers and flags of one prefix layer; advances `unit`. None if the layer sends everything to zero."""
    e = Decimal(activation.slope)
    h0, h1 = (1 + e * e) / 2, (1 - e) ** 2 / 2
    mu = (1 - e) * (c.cw * unit.nu / (2 * _PI)).sqrt()
    cross = 2 * c.p * c.q * unit.beta * mu
    nu = c.p**2 * unit.nu + cross + c.r * c.cw * unit.nu * h0
    # A skip and a branch may cancel exactly; 1e-30 of the terms is rounding of the 40 digits.
    if nu <= Decimal("1e-30") * (c.p**2 * unit.nu + abs(cross)):
        return None
    a, branch, drift = c.p**2 * unit.nu / nu, c.r * c.cw * unit.nu / nu, cross / nu
    turn = 2 * a + branch * (1 + e) ** 2 / 2
    numbers = [drift, 1 - a, branch * e, branch * h0, branch * h1, turn, c.w, c.v, c.w_all]

    def image(rho: float) -> float:
        return float(a) * rho + float(drift) + float(branch) * _kappa(rho, float(e))

    # The map of correlations is monotone, but for a minimum where its derivative a + branch D vanishes.
    candidates = [unit.lowest]
    slope = float(branch * h1)
    if slope > 0:
        kappa0 = -float(a + branch * e) / slope
        if 0 < kappa0 < 1:
            candidates.append(max(unit.lowest, math.cos(math.pi * (1 - kappa0))))
    before, lowest = unit.lowest, min(1.0, min(image(rho) for rho in candidates) - 1e-12)
    # The bound of _kappa is good to 1e-16, but rho = 0 exactly is the rule (ReLU at rho = -1), not the exception.
    if c.p == 0 and drift == 0 and e <= 0 and e >= -1:
        lowest = max(lowest, 0.0)
    if before >= 0 and drift >= 0 and e >= -1:
        lowest = max(lowest, 0.0)
    z = (1 - before) / 2
    signs = int(before < 0 or lowest < 0)
    fits = 0 if signs else max(k for k, most in enumerate(_RANGES) if z <= most)
    unit.nu, unit.beta, unit.lowest = nu, c.p * unit.beta + c.q * mu, lowest
    return [float(x) for x in numbers], [signs, int(lowest < 0), fits]


@dataclass(frozen=True)
class _Prefix:
    numbers: Array
    ints: NDArray[np.int32]
    nu: Decimal
    beta: Decimal


@lru_cache(maxsize=64)
def _prefix(net: Network) -> _Prefix:
    unit, numbers, ints = _Unit(), [], []
    slices = _slices(net)
    with localcontext() as context:
        context.prec = _DIGITS
        for layer, slots in zip(net.layers, slices, strict=True):
            if not layer.activation.homogeneous:
                break
            c = layer.coefficients(Decimal)
            if c.cb != 0 or c.vb != 0:
                break
            made = _homogeneous_layer(c, layer.activation, unit)
            if made is None:
                break
            numbers.append(made[0])
            ints.append([*made[1], *slots])
    return _Prefix(np.array(numbers, dtype=np.float64).reshape(-1, 9), np.array(ints, dtype=np.int32).reshape(-1, 5),
                   unit.nu, unit.beta)  # fmt: skip


def _split_root(nu: Decimal) -> tuple[float, int]:
    """(r, k) with sqrt(nu) = r 2^k, 1 <= r < 2, for any nu > 0."""
    with localcontext() as context:
        context.prec = _DIGITS
        root = nu.sqrt()
        k = int((root.ln() / Decimal(2).ln()).to_integral_value())
        r = float(root / Decimal(2) ** k)
    return (r, k) if r >= 1 else (2 * r, k - 1)


def _suffix_row(layer: Any, c: Coefficients, down: int, power: int) -> list[float]:
    """Coefficients of a suffix layer whose input is scaled by 4^-down and whose output by 4^-(down + power)."""
    half, full = 2.0**-power, 4.0**-power
    cb, vb = math.ldexp(float(c.cb), -2 * down), math.ldexp(float(c.vb), -2 * (down + power))
    slope = layer.activation.slope if layer.activation.homogeneous else 0.0
    return [float(c.p) * half, float(c.q) * half, float(c.r) * full, float(c.cw), cb, float(c.w), float(c.wb),
            float(c.v), vb, float(c.vvb), float(c.w_all), slope]  # fmt: skip


def _advance_unit(row: list[float], unit: tuple[float, float]) -> tuple[float, float]:
    """Variance and mean of a unit-norm point after a homogeneous suffix layer."""
    p, q, r, cw, cb, vb, slope = (row[k] for k in (0, 1, 2, 3, 4, 8, 11))
    nu, mean = unit
    lam = cw * nu + cb
    mu = (1 - slope) * math.sqrt(lam / (2 * math.pi))
    return p * p * nu + 2 * p * q * mean * mu + r * 0.5 * (1 + slope * slope) * lam + vb, p * mean + q * mu


def _expansion_message(
    error: Exception, layer: int, row: list[float], var: Array, sizes: Sequence[tuple[str, int]]
) -> str:
    """Names the point whose variance is too large, the variance, and the cure."""
    lam = row[3] * var + row[4]
    index = int(np.argmax(lam))
    largest = lam[index]
    name = sizes[0][0]
    if index >= sizes[0][1]:
        index, name = index - sizes[0][1], sizes[1][0]
    return (
        f"{error}: layer {layer}, row {index} of {name}, pre-activation variance {largest:.3g}; normalise the rows "
        "or raise the tolerance: Activation.with_tolerance(...)"
    )


def _table(activation: Activation, c: list[float], var: Array, dtype: np.dtype[Any], cache: list[Any]) -> int:
    """Index of the Hermite table of a layer for rows of variance `var`; the table joins `cache` if it is new."""
    tolerance = activation.tolerance or (1e-7 if dtype == np.float32 else 1e-12)
    lam = c[3] * var + c[4]
    high = float(lam.max())
    low = float(lam[lam > 0].min()) if high > 0 else 0.0  # the tables know 0 apart
    # Rows of one variance, up to the rounding of their norms and a few layers.
    spread = (4 if dtype == np.float32 else 16) * float(np.finfo(dtype).eps)
    uniform = high - float(lam.min()) <= spread * high
    for k, (known, kind, (_, first, last)) in enumerate(cache):
        # Tables are not stretched: a narrower range is covered, a much narrower one would waste terms.
        covered = abs(high - last) <= spread * last if uniform else first <= low and 0.5 * last < high <= last
        if known == activation and kind == uniform and covered:
            return k
    make = _hermite.uniform_table(activation, high, tolerance) if uniform else None
    table = make or _hermite.panel_table(activation, low, high, tolerance)
    cache.append((activation, uniform, (table, low, high)))
    return len(cache) - 1


def _expanded(net: Network) -> tuple[bool, ...]:
    """Which layers go through Hermite expansions.

    Also gelu if a kinked activation follows: the kink magnifies what the closed form loses of small distances.
    """
    kinked = [layer.activation.homogeneous and layer.activation.slope != 1.0 for layer in net.layers]
    last = max((k for k, kink in enumerate(kinked) if kink), default=-1)
    return tuple(a.expanded or (a.name == "gelu" and k < last) for k, a in enumerate(x.activation for x in net.layers))


def compile_network(
    net: Network, norms: Sequence[Array], dtype: np.dtype[Any], names: Sequence[str] = ("X", "Y")
) -> Compiled:
    """Make the plan of a network for rows of the given norms (they matter only for Hermite expansions)."""
    if not any(_expanded(net)):
        return _compile(net)
    return _build(net, norms, dtype, [(name, len(r)) for name, r in zip(names, norms, strict=False)])


@lru_cache(maxsize=64)
def _compile(net: Network) -> Compiled:
    return _build(net, (), np.dtype(np.float64))


def _build(
    net: Network, norms: Sequence[Array], dtype: np.dtype[Any], sizes: Sequence[tuple[str, int]] = ()
) -> Compiled:
    prefix, slices = _prefix(net), _slices(net)
    count = len(prefix.numbers)
    with localcontext() as context:
        context.prec = _DIGITS
        unit_mean = float(prefix.beta / prefix.nu.sqrt())
    root, exponent = _split_root(prefix.nu)
    layers = net.layers[count:]
    empty = np.zeros((0, 12)), np.zeros((0, 4), dtype=np.int32)
    if not layers:
        core = _core.Plan(prefix.numbers, prefix.ints, 1.0, unit_mean, *empty, [])
        return Compiled(core, True, root, exponent, count, 0, 0)

    # Scale by 2^-+_STEP whenever the variance of a homogeneous suffix leaves 2^+-_STEP.
    scalable = all(layer.activation.homogeneous for layer in layers)
    down = exponent - exponent % (_STEP // 2) if scalable and exponent > _STEP // 2 else 0
    nu = math.ldexp(root * root, 2 * (exponent - down)) if 2 * (exponent - down) < 1000 else math.inf
    unit = (nu, unit_mean * math.sqrt(nu)) if scalable else (1.0, 0.0)
    rows, ints, cache = [], [], list[Any]()
    var = nu * np.concatenate([r * r for r in norms]) if norms else np.zeros(1)
    mean = unit_mean * math.sqrt(nu) * np.concatenate(norms) if norms else np.zeros(1)
    plan_nu, plan_mean = nu, unit_mean * math.sqrt(nu)
    expanded = _expanded(net)[count:]
    last = max((k for k, expand in enumerate(expanded) if expand), default=-1)
    for k, (layer, slots) in enumerate(zip(layers, slices[count:], strict=True)):
        c, power = layer.coefficients(float), 0
        if scalable:
            unit = _advance_unit(_suffix_row(layer, c, down, 0), unit)
            if unit[0] > 2.0**_STEP or 0 < unit[0] < 2.0**-_STEP:
                power = _STEP // 2 if unit[0] > 1 else -_STEP // 2
                unit = (unit[0] * 4.0**-power, unit[1] * 2.0**-power)
        row = _suffix_row(layer, c, down, power)
        down += power
        table = -1
        if expanded[k]:
            try:
                table = _table(layer.activation, row, var, dtype, cache)
            except _hermite.ExpansionError as error:
                # gelu has a closed form, which loses some digits of small distances in front of a kink.
                if layer.activation.name != "gelu":
                    raise ValueError(_expansion_message(error, count + k + 1, row, var, sizes)) from None
        rows.append(row)
        kind = 0 if layer.activation.homogeneous else _IDS.get(layer.activation.name, _HERMITE)
        ints.append([_HERMITE if table >= 0 else kind, table, *slots])
        if k < last:
            step = _core.Plan(np.zeros((0, 9)), np.zeros((0, 5), dtype=np.int32), 1.0, 0.0, np.array([row]),
                              np.array([ints[-1]], dtype=np.int32), [t[0].as_tuple() for _, _, t in cache])  # fmt: skip
            var, mean, _ = _core.rows(step, 0, var, mean)
    core = _core.Plan(prefix.numbers, prefix.ints, plan_nu, plan_mean, np.array(rows), np.array(ints, dtype=np.int32),
                      [t[0].as_tuple() for _, _, t in cache])  # fmt: skip
    size = sum(t[0].nbytes for _, _, t in cache)
    return Compiled(core, False, 1.0, down, count, len(layers), size)

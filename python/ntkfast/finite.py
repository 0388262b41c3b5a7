"""Networks of finite width: the initialisation of the papers, outputs, and the factors of their Jacobians."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkfast._arrays import as_numpy, check_matrix, check_memory, result_dtype
from ntkfast._derivatives import Derivatives, derivatives
from ntkfast.jacobian import LayerFactors
from ntkfast.layers import Bottleneck, Dense, HalvedLayer, Layer, Linear, Residual, c_sigma
from ntkfast.network import Network

Array = NDArray[Any]

#: Bytes of the arrays of one batch of samples on their way through the network.
_BATCH = 32 << 20


@dataclass(frozen=True)
class Step:
    """One layer with its weights: x' = skip x + branch s(z), or skip x + outer (branch s(z) V^T + outer_bias beta').

    z = weight x W^T + bias beta. Rows are samples.
    """

    W: Array  #: (width, fan_in)
    beta: Array | None  #: (width,), None without bias
    V: Array | None  #: (width, width) of a bottleneck
    outer_beta: Array | None
    activation: Derivatives
    weight: float  #: sqrt of the weight variance
    bias: float
    skip: float
    branch: float
    outer: float
    outer_bias: float
    trained: bool

    @property
    def arrays(self) -> list[Array]:
        return [w for w in (self.W, self.beta, self.V, self.outer_beta) if w is not None]


@dataclass(frozen=True)
class Head:
    """The readout: f = weight x a + bias beta."""

    a: Array  #: (width,)
    beta: Array | None  #: (1,)
    weight: float
    bias: float
    trained: bool


class _Sampler:
    """Standard normal arrays, the same in both precisions."""

    def __init__(self, seed: Any, dtype: np.dtype[Any]) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer, np.random.Generator)):
            raise TypeError(f"seed must be an integer or a numpy.random.Generator, got {type(seed).__name__}")
        self.rng, self.dtype = np.random.default_rng(seed), dtype

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        values = self.rng.standard_normal(shape)
        if scale != 1.0:
            values *= scale
        return values.astype(self.dtype, copy=False)


def _step(layer: Layer, fan_in: int, m: int, draw: _Sampler, *, last: bool) -> Step:
    """Weights of a layer in the order W, beta, V, beta'."""
    act = derivatives(layer.activation)
    if isinstance(layer, HalvedLayer):
        width = _even(m * layer.width_ratio) if last else m
        W = draw.normal(width, fan_in, scale=math.sqrt(2.0 / width))
        return Step(W, None, None, None, act, 1.0, 0.0, layer.skip, layer.theta, 0.0, 0.0, True)
    W = draw.normal(m, fan_in)
    beta = draw.normal(m) if layer.bias_variance else None
    step = Step(W, beta, None, None, act, math.sqrt(layer.weight_variance), math.sqrt(layer.bias_variance),
                0.0, 0.0, 0.0, 0.0, layer.trained)  # fmt: skip
    if isinstance(layer, Linear):
        return replace(step, branch=1 / math.sqrt(m))
    if isinstance(layer, Residual):
        return replace(step, skip=layer.skip, branch=layer.scale / math.sqrt(m))
    branch = math.sqrt((c_sigma(layer.activation) if layer.gain is None else layer.gain) / m)
    if isinstance(layer, Dense):
        return replace(step, branch=branch)
    V = draw.normal(m, m)
    outer_beta = draw.normal(m) if layer.outer_bias_variance else None
    return replace(step, V=V, outer_beta=outer_beta, skip=layer.skip, branch=branch, outer=layer.scale / math.sqrt(m),
                   outer_bias=math.sqrt(layer.outer_bias_variance))  # fmt: skip


def _even(width: float) -> int:
    """The nearest even number, at least 2: half of the entries of a +-1 readout are +1."""
    return max(2, 2 * round(width / 2))


def _features(input_shape: Any) -> int:
    shape = tuple(input_shape) if isinstance(input_shape, (tuple, list)) else (input_shape,)
    if len(shape) != 1:
        raise ValueError(f"input_shape must be the number of features, d or (d,), got {input_shape!r}")
    return _count("input_shape", shape[0])


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _check_activations(net: Network) -> None:
    for layer in net.layers:
        if derivatives(layer.activation).first is None:
            raise ValueError(f"{layer.activation!r} has no derivative; give one: "
                             "Activation.from_function(f, derivative)")  # fmt: skip


def init(
    net: Network, input_shape: Any, width: int, *, seed: int | np.random.Generator, dtype: Any = "float64",
    device: Any = None,
) -> FiniteNetwork:  # fmt: skip
    """A random network of finite width with exactly the initialisation of the papers.

    Parameters
    ----------
    net : Network
        From a builder or :class:`Network`; its first layer gets the fixed ``Linear`` in front that it implies.
    input_shape : int or (int,)
        Number of features d.
    width : int
        m, of every layer. The last layer of :func:`fixed_readout_resnet` has m times its width ratio, rounded to the
        nearest even number: half of the readout's entries are +1, half -1.
    seed : int or numpy.random.Generator
        The weights are the same in both precisions, up to rounding.
    dtype : float32 or float64
    device : None or "cpu"

    Returns
    -------
    FiniteNetwork
        :func:`empirical_ntk` of it converges to :func:`gram` of ``net`` like 1/sqrt(width).

    Raises
    ------
    TypeError, ValueError
        Not a network, shape, width or seed out of range, an activation without derivative.
    OutOfMemoryError
        The weights do not fit in memory.

    Notes
    -----
    All entries are standard normal; 1/sqrt(m) and the variances stand in the formulas (Du et al., arXiv 1811.03804;
    Huang et al., 2002.06262). :func:`fixed_readout_resnet` has entries N(0, 2/m) and kernels divided by m
    (Frei, Cao, Gu, 1910.02934).

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> net, X = nf.resnet(depth=3, activation="erf"), np.eye(2)
    >>> network = nf.init(net, 2, width=2000, seed=0)
    >>> [w.shape for w in network.weights]
    [(2000, 2), (2000, 2000), (2000, 2000), (2000,)]
    >>> bool(np.allclose(nf.empirical_ntk(network, X), nf.gram(net, X), atol=0.3))
    True
    """
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network (fully_connected, resnet, ...), got {type(net).__name__}")
    if device not in (None, "cpu"):
        raise ValueError(f"device={device!r}: finite networks are computed on the CPU only; use device=None or 'cpu'")
    wanted = result_dtype("float64" if dtype is None else dtype)
    d, m = _features(input_shape), _count("width", width)
    _check_activations(net)
    draw = _Sampler(seed, wanted)
    layers = list(net.layers)
    if getattr(layers[0], "skip", 0.0):
        layers.insert(0, Linear(trained=False))
    outer = sum(isinstance(layer, Bottleneck) for layer in layers)
    check_memory((m * d + m * m * (len(layers) - 1 + outer)) * wanted.itemsize, f"the network of width {m}")
    steps: list[Step] = []
    for k, layer in enumerate(layers):
        steps.append(_step(layer, len(steps[-1].W) if steps else d, m, draw, last=k == len(layers) - 1))
    return FiniteNetwork(net, tuple(steps), _head(net, len(steps[-1].W), draw), m)


def _head(net: Network, width: int, draw: _Sampler) -> Head:
    ro = net.readout
    if ro.centred:
        return Head(np.resize(np.array([1.0, -1.0], dtype=draw.dtype), width), None, 1.0, 0.0, False)
    a = draw.normal(width)
    beta = draw.normal(1) if ro.bias_variance else None
    return Head(a, beta, math.sqrt(ro.weight_variance), math.sqrt(ro.bias_variance), ro.trained)


class FiniteNetwork:
    """A network of finite width; made by :func:`init`.

    Attributes
    ----------
    net : Network
        The description it was made from.
    width : int
    dtype : numpy.dtype
    weights : list of arrays
        From the input to the output: every layer's W (fan_out, fan_in), its bias, V, its bias; the readout and its
        bias. Biases of variance 0 are left out. Change entries in place to change the network.

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> network = nf.init(nf.fully_connected(depth=2), 5, width=32, seed=0)
    >>> network
    FiniteNetwork(Network([2 * Dense(Activation('relu'))], Readout()), width=32, float64)
    >>> network.outputs(np.ones((3, 5))).shape
    (3,)
    """

    def __init__(self, net: Network, steps: tuple[Step, ...], head: Head, width: int) -> None:
        self.net, self.width = net, width
        self._steps, self._head = steps, head
        self.dtype = head.a.dtype
        # Kernels of the +-1 readout are divided by m: its gradients by sqrt m.
        self._unit = 1 / math.sqrt(width) if net.readout.centred else 1.0

    @property
    def weights(self) -> list[Array]:
        """All arrays of parameters, frozen ones included."""
        tail = [self._head.a] if self._head.beta is None else [self._head.a, self._head.beta]
        return [w for step in self._steps for w in step.arrays] + tail

    def __repr__(self) -> str:
        return f"FiniteNetwork({self.net!r}, width={self.width}, {self.dtype})"

    def outputs(self, X: Any) -> Any:
        """f(x) for the rows of X, (n, d): array of shape (n,), of the kind and dtype of X.

        Raises
        ------
        TypeError, ValueError
            Another dtype than the network's, wrong shape, entries not finite.
        """
        x, wrap = self.points(X, "X")
        out = np.empty(len(x), dtype=self.dtype)
        for rows in self._batches(len(x)):
            state = x[rows]
            for step in self._steps:
                state = _advance(step, state)
            out[rows] = self._read(state)
        return wrap(out)

    def jacobian_factors(self, X: Any) -> list[LayerFactors]:
        """Layer inputs and output gradients for the rows of X, (n, d), for :func:`jacobian_gram`.

        One entry per trained weight matrix, in the order of :func:`layer_grams`; a bias is one more column of the
        inputs. df/dW of sample i is deltas[i] inputs[i]^T, for :func:`fixed_readout_resnet` divided by sqrt(m).

        Raises
        ------
        The errors of :meth:`outputs`; OutOfMemoryError if the factors do not fit in memory.
        """
        x, wrap = self.points(X, "X")
        check_memory(len(x) * self.bytes_per_sample, f"the factors of {len(x)} samples")
        return [LayerFactors(wrap(a), wrap(d)) for a, d in self.factors(x)]

    def points(self, X: Any, name: str) -> tuple[Array, Any]:
        """Checked rows and the way back to their kind."""
        x, wrap = as_numpy(X, name)
        check_matrix(x, name)
        d = self._steps[0].W.shape[1]
        if x.shape[1] != d:
            raise ValueError(f"{name} has {x.shape[1]} features and the network takes {d}")
        if x.dtype.kind == "f" and result_dtype(None, (name, x)) != self.dtype:
            raise TypeError(f"{name} is {x.dtype} and the network is {self.dtype}; convert {name} or give init(dtype=)")
        result_dtype(None, (name, x))
        x = np.asarray(x, dtype=self.dtype)
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite: row {int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])} "
                             "holds NaN or infinity")  # fmt: skip
        return x, wrap

    @property
    def bytes_per_sample(self) -> int:
        """Memory of the factors of one sample."""
        shapes = self._shapes()
        return sum(a + d for a, d in shapes) * self.dtype.itemsize

    def _shapes(self) -> list[tuple[int, int]]:
        """(columns of the inputs, columns of the deltas) of every factor."""
        shapes = []
        for step in self._steps:
            if not step.trained:
                continue
            shapes.append((step.W.shape[1] + (step.beta is not None), len(step.W)))
            if step.V is not None:
                shapes.append((step.V.shape[1] + (step.outer_beta is not None), len(step.V)))
        if self._head.trained:
            shapes.append((len(self._head.a) + (self._head.beta is not None), 1))
        return shapes

    def _batches(self, n: int) -> Iterator[slice]:
        width = max(max(step.W.shape) for step in self._steps)
        size = max(16, _BATCH // (5 * width * self.dtype.itemsize))
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def _read(self, x: Array) -> Array:
        f: Array = (x @ self._head.a) * self._head.weight
        return f if self._head.beta is None else f + self._head.bias * self._head.beta

    def factors(self, x: Array) -> list[tuple[Array, Array]]:
        """The factors of checked rows, as arrays."""
        made = [(np.empty((len(x), a), self.dtype), np.empty((len(x), d), self.dtype)) for a, d in self._shapes()]
        for rows in self._batches(len(x)):
            _fill_factors(self, x[rows], [(a[rows], d[rows]) for a, d in made])
        return made


def _store(inputs: Array, x: Array, amplitude: float, bias: float) -> Array:
    """inputs = (amplitude x, bias); returns its part without the bias."""
    width = x.shape[1]
    np.multiply(x, x.dtype.type(amplitude), out=inputs[:, :width])
    if inputs.shape[1] > width:
        inputs[:, width] = bias
    return inputs[:, :width]


def _preactivation(step: Step, scaled: Array) -> Array:
    z: Array = scaled @ step.W.T
    if step.beta is not None:
        z += step.bias * step.beta
    return z


def _combine(step: Step, x: Array, h: Array) -> Array:
    """x' from the branch h = branch s(z)."""
    new = h
    if step.V is not None:
        new = h @ step.V.T
        if step.outer_beta is not None:
            new += step.outer_bias * step.outer_beta
        new *= step.outer
    if step.skip:
        new = new + step.skip * x
    return new


def _advance(step: Step, x: Array) -> Array:
    z = _preactivation(step, x if step.weight == 1.0 else step.weight * x)
    return _combine(step, x, step.branch * step.activation.value(z))


def _fill_factors(network: FiniteNetwork, x: Array, made: list[tuple[Array, Array]]) -> None:
    """Forward, keeping inputs and slopes; backward, turning slopes into gradients in place."""
    todo = iter(made)
    tape: list[tuple[Step, Array, Array | None]] = []  # step, slope (later gradient), gradient of V
    for step in network._steps:
        first = step.activation.first
        assert first is not None
        if step.trained:
            inputs, slope = next(todo)
            scaled = _store(inputs, x, step.weight, step.bias)
        else:
            scaled, slope = step.weight * x, np.empty((len(x), len(step.W)), x.dtype)
        z = _preactivation(step, scaled)
        np.multiply(first(z), step.branch, out=slope)
        h = step.branch * step.activation.value(z)
        outer = None
        if step.V is not None and step.trained:
            inputs, outer = next(todo)
            _store(inputs, h, 1.0, step.outer_bias)
        x = _combine(step, x, h)
        tape.append((step, slope, outer))
    head = network._head
    if head.trained:
        inputs, deltas = next(todo)
        _store(inputs, x, head.weight, head.bias)
        deltas[:] = 1
    g = np.broadcast_to((head.weight * network._unit) * head.a, x.shape)
    for k, (step, slope, outer) in zip(range(len(tape) - 1, -1, -1), reversed(tape), strict=True):
        inner = g
        if step.V is not None:
            inner = step.outer * g
            if outer is not None:
                outer[:] = inner
            inner = inner @ step.V
        np.multiply(slope, inner, out=slope)
        if k == 0:
            return
        back = slope @ step.W
        if step.weight != 1.0:
            back *= step.weight
        g = back + step.skip * g if step.skip else back

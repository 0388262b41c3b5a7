"""Networks of finite width: the initialisation of the papers, outputs, and the factors of their Jacobians."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ntkfast._arrays import as_numpy, check_memory, result_dtype
from ntkfast._contract import Factor
from ntkfast._cuda.device import Place, find_place
from ntkfast._cuda.gram import Backend
from ntkfast._derivatives import derivatives
from ntkfast._passes import Head, Step, fill_factors, outputs
from ntkfast._products import on_host
from ntkfast._windows import Layout, Points, Windows
from ntkfast.convolution import ConvNetwork
from ntkfast.jacobian import LayerFactors
from ntkfast.layers import Bottleneck, Dense, HalvedLayer, Layer, Linear, Residual, c_sigma
from ntkfast.network import Network

Array = NDArray[Any]

#: Bytes of the arrays of one batch of samples on their way through the network.
_BATCH = 32 << 20
#: The same on a GPU: products of a few thousand rows fill it. Not measured.
_DEVICE_BATCH = 256 << 20
#: Bytes of the numbers that are drawn at once, in float64.
_DRAWN = 4 << 20


class _Sampler:
    """Standard normal arrays, the same in both precisions."""

    def __init__(self, seed: Any, dtype: np.dtype[Any], gpu: Backend | None) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer, np.random.Generator)):
            raise TypeError(f"seed must be an integer or a numpy.random.Generator, got {type(seed).__name__}")
        if not isinstance(seed, np.random.Generator) and seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.rng, self.dtype, self.gpu = np.random.default_rng(seed), dtype, gpu

    def normal(self, *shape: int, scale: float = 1.0) -> Any:
        # Some rows at a time, beside the array itself: numbers come one after the other, however many are asked for.
        with here(self.gpu) as gpu:
            made = np.empty(shape, self.dtype) if gpu is None else gpu.empty(shape, self.dtype)
            step = max(1, _DRAWN // (8 * math.prod(shape[1:])))
            for start in range(0, shape[0], step):
                values = self.rng.standard_normal((min(step, shape[0] - start), *shape[1:]))
                if scale != 1.0:
                    values *= scale
                part = slice(start, start + len(values))
                made[part] = values if gpu is None else gpu.upload(values.astype(self.dtype, copy=False))
        return made

    def place(self, values: Array) -> Any:
        """Weights where the network is."""
        if self.gpu is None:
            return values
        with self.gpu.here() as gpu:
            return gpu.upload(values)


def here(gpu: Backend | None) -> AbstractContextManager[Any]:
    """The device and the stream of a call on a GPU; nothing on the CPU."""
    return nullcontext() if gpu is None else gpu.here()


def _step(layer: Layer, fan_in: int, m: int, draw: _Sampler) -> Step:
    """Weights of a layer in the order W, beta, V, beta'."""
    act = layer.activation
    if isinstance(layer, HalvedLayer):
        W = draw.normal(m, fan_in, scale=math.sqrt(2.0 / m))
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


def _layout(net: Network | ConvNetwork, input_shape: Any) -> Layout:
    shape = tuple(input_shape) if isinstance(input_shape, (tuple, list)) else (input_shape,)
    if isinstance(net, ConvNetwork):
        if len(shape) not in (2, 3):
            raise ValueError("input_shape must be (*grid, channels) with one or two grid axes for a ConvNetwork, "
                             f"got {input_shape!r}")  # fmt: skip
        *grid, channels = (_count("input_shape", size) for size in shape)
        return Windows.of(net, tuple(grid), channels)
    if len(shape) != 1:
        raise ValueError(f"input_shape must be the number of features, d or (d,), got {input_shape!r}")
    return Points(_count("input_shape", shape[0]))


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _check_activations(net: Network | ConvNetwork) -> None:
    for layer in net.layers:
        if derivatives(layer.activation).first is None:
            raise ValueError(f"{layer.activation!r} has no derivative; give one: "
                             "Activation.from_function(f, derivative)")  # fmt: skip


def init(
    net: Network | ConvNetwork, input_shape: Any, width: int, *, seed: int | np.random.Generator,
    dtype: Any = "float64", device: Any = None,
) -> FiniteNetwork:  # fmt: skip
    """A random network of finite width with exactly the initialisation of the papers.

    Parameters
    ----------
    net : Network or ConvNetwork
        From a builder, :class:`Network` (its first layer gets the fixed ``Linear`` in front that it implies) or
        :class:`ConvNetwork`.
    input_shape : int or (int,); for a ConvNetwork (*grid, channels)
        Number of features d; size of the images, with one or two grid axes.
    width : int
        m, of every layer: the channels of a convolution. The last layer of :func:`fixed_readout_resnet` has m times its
        width ratio, rounded to the nearest even number: half of the readout's entries are +1, half -1.
    seed : int or numpy.random.Generator
        The weights are the same in both precisions, up to rounding.
    dtype : float32 or float64
    device : None, "cpu", "cuda" or "cuda:1"
        Where the weights are, and everything is computed. They are drawn on the CPU: the same numbers on every device.

    Returns
    -------
    FiniteNetwork
        :func:`empirical_ntk` of it converges to :func:`gram` of ``net`` like 1/sqrt(width).

    Raises
    ------
    TypeError, ValueError
        Not a network, shape, width or seed out of range, an activation without derivative.
    RuntimeError
        ``device`` is a GPU and CuPy, the driver or the GPU is missing.
    OutOfMemoryError
        The weights do not fit in memory.

    Notes
    -----
    All entries are standard normal; 1/sqrt(m), the variances and the 1/sqrt(q) of averaged windows of q slots stand in
    the formulas (Du et al., arXiv 1811.03804; Huang et al., 2002.06262; Arora et al., 1904.11955).
    :func:`fixed_readout_resnet` has entries N(0, 2/m) and kernels divided by m (Frei, Cao, Gu, 1910.02934).

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> net, X = nf.resnet(depth=3, activation="erf"), np.eye(2)
    >>> network = nf.init(net, 2, width=2000, seed=0)
    >>> [w.shape for w in network.weights]
    [(2000, 2), (2000, 2000), (2000, 2000), (2000,)]
    >>> bool(np.allclose(nf.empirical_ntk(network, X), nf.gram(net, X), atol=0.3))
    True
    >>> network = nf.init(nf.conv_net(depth=2), (8, 8, 3), width=32, seed=0)
    >>> [w.shape for w in network.weights]
    [(32, 27), (32, 288), (64, 32)]
    """
    if not isinstance(net, (Network, ConvNetwork)):
        raise TypeError(f"net must be a Network or ConvNetwork (resnet, conv_net, ...), got {type(net).__name__}")
    host = np.empty(0)
    place = find_place(device, ("the weights", host))
    if place is not None and len(place.devices) > 1:
        raise ValueError(f"device={device!r}: a finite network is on one device")
    gpu = None if place is None else Backend(place, host)
    wanted = result_dtype("float64" if dtype is None else dtype)
    layout, m = _layout(net, input_shape), _count("width", width)
    _check_activations(net)
    draw = _Sampler(seed, wanted, gpu)
    layers: list[Layer] = list(net.layers)
    if getattr(layers[0], "skip", 0.0):
        layers.insert(0, Linear(trained=False))
    last = layers[-1]
    widths = [m] * (len(layers) - 1) + [_even(m * last.width_ratio) if isinstance(last, HalvedLayer) else m]
    fans = [layout.slots * features for features in (layout.features, *widths[:-1])]
    needed = math.prod(layout.readout_shape(widths[-1]))
    for layer, fan_in, size in zip(layers, fans, widths, strict=True):
        needed += size * (fan_in + size * isinstance(layer, Bottleneck))
    check = check_memory if gpu is None else gpu.check_memory
    check(needed * wanted.itemsize, f"the network of width {m}")
    averaged = 1 / math.sqrt(layout.slots) if isinstance(net, ConvNetwork) and net.average else 1.0
    steps: list[Step] = []
    for layer, fan_in, size in zip(layers, fans, widths, strict=True):
        step = _step(layer, fan_in, size, draw)
        steps.append(replace(step, weight=step.weight * averaged))
    head = _head(net, layout.readout_shape(widths[-1]), draw)
    if gpu is not None:
        gpu.synchronize()  # the weights may be used on any stream
    return FiniteNetwork(net, tuple(steps), head, m, layout, None if place is None else place.devices[0])


def _head(net: Network | ConvNetwork, shape: tuple[int, ...], draw: _Sampler) -> Head:
    ro = net.readout
    if ro.centred:
        return Head(draw.place(np.resize(np.array([1.0, -1.0], dtype=draw.dtype), shape)), None, 1.0, 0.0, False)
    a = draw.normal(*shape)
    beta = draw.normal(1) if ro.bias_variance else None
    return Head(a, beta, math.sqrt(ro.weight_variance), math.sqrt(ro.bias_variance), ro.trained)


class FiniteNetwork:
    """A network of finite width; made by :func:`init`. It can be pickled unless an activation is a lambda.

    Attributes
    ----------
    net : Network or ConvNetwork
        The description it was made from.
    width : int
    dtype : numpy.dtype
    device : str
        ``"cpu"``, or ``"cuda:0"``: then weights are CuPy's arrays, and points may be on that device, with results
        there, or in host memory.
    weights : list of arrays
        From the input to the output: every layer's W (fan_out, fan_in), its bias, V, its bias; the readout and its
        bias. Biases of variance 0 are left out. Change entries in place to change the network. In a convolutional
        network fan_in runs over the slots of the window, row-major, and within a slot over the channels; "flatten" has
        a readout (positions, width), "gap" one of (width,).

    Examples
    --------
    >>> import numpy as np, ntkfast as nf
    >>> network = nf.init(nf.fully_connected(depth=2), 5, width=32, seed=0)
    >>> network
    FiniteNetwork(Network([2 * Dense(Activation('relu'))], Readout()), width=32, float64)
    >>> network.outputs(np.ones((3, 5))).shape
    (3,)
    """

    def __init__(
        self, net: Network | ConvNetwork, steps: tuple[Step, ...], head: Head, width: int, layout: Layout,
        index: int | None = None,
    ) -> None:  # fmt: skip
        self.net, self.width = net, width
        self._steps, self._head, self._layout = steps, head, layout
        self.dtype = head.a.dtype
        self._index, self.device = index, "cpu" if index is None else f"cuda:{index}"
        # Kernels of the +-1 readout are divided by m: its gradients by sqrt m.
        self._unit = 1 / math.sqrt(width) if net.readout.centred else 1.0

    @property
    def weights(self) -> list[Array]:
        """All arrays of parameters, frozen ones included."""
        tail = [self._head.a] if self._head.beta is None else [self._head.a, self._head.beta]
        return [w for step in self._steps for w in step.arrays] + tail

    def __repr__(self) -> str:
        place = "" if self._index is None else f", {self.device}"
        return f"FiniteNetwork({self.net!r}, width={self.width}, {self.dtype}{place})"

    def backend(self, **points: Any) -> Backend | None:
        """The GPU of the network, for points that are there or in host memory; None for the CPU."""
        named = [(name, x) for name, x in points.items() if x is not None]
        place = find_place(None, *named)
        if place is not None and place.devices != (self._index,):
            raise ValueError(f"{named[0][0]} is on cuda:{place.devices[0]} and the network is on {self.device}; "
                             f"move {named[0][0]}, or make the network there: init(..., device=)")  # fmt: skip
        if self._index is None:
            return None
        return Backend(Place((self._index,), place is not None), named[0][1])

    def outputs(self, X: Any, *, data_format: str = "channels_last") -> Any:
        """f(x) for the rows of X, (n, d), or images (n, *grid, channels): array (n,), of the kind and dtype of X.

        ``data_format="channels_first"``: images (n, channels, *grid), as for :func:`gram`.

        Raises
        ------
        TypeError, ValueError
            Another dtype than the network's, wrong shape, entries not finite.

        Examples
        --------
        >>> import numpy as np, ntkfast as nf
        >>> network = nf.init(nf.fully_connected(depth=1, activation="identity"), 3, width=50, seed=0)
        >>> f = network.outputs(np.eye(3))
        >>> bool(np.allclose(network.outputs(2 * np.eye(3)), 2 * f))  # a linear network
        True
        """
        gpu = self.backend(X=X)
        with here(gpu):
            x, wrap = self.points(X, "X", data_format, gpu)
            out = np.empty_like(x, shape=(len(x),))
            for part in self._batches(len(x)):
                out[part] = outputs(self._steps, self._head, self._layout, self._layout.rows(x[part]))
            return wrap(out)

    def jacobian_factors(self, X: Any, *, data_format: str = "channels_last") -> list[LayerFactors]:
        """Layer inputs and output gradients for X, (n, d), or images (n, *grid, channels), for :func:`jacobian_gram`.

        One entry per trained weight matrix, in the order of :func:`layer_grams`; a bias is one more column of the
        inputs. df/dW of sample i is deltas[i] inputs[i]^T, for :func:`fixed_readout_resnet` divided by sqrt(m). The
        layers of a convolutional network have a position axis, (n, positions, fan_in) and (n, positions, fan_out), over
        which that is summed; its readout, (n, positions width) or pooled (n, width), has none.

        Raises
        ------
        The errors of :meth:`outputs`; OutOfMemoryError if the factors do not fit in memory.

        Examples
        --------
        >>> import numpy as np, ntkfast as nf
        >>> network, X = nf.init(nf.fully_connected(depth=2), 3, width=50, seed=0), np.eye(3)
        >>> factors = network.jacobian_factors(X)
        >>> [(f.inputs.shape, f.deltas.shape) for f in factors]
        [((3, 3), (3, 50)), ((3, 50), (3, 50)), ((3, 50), (3, 1))]
        >>> gradient = factors[0].deltas[1][:, None] * factors[0].inputs[1]  # df/dW of sample 1, the shape of W
        >>> W, before = network.weights[0], network.outputs(X)
        >>> W += 1e-6 * gradient
        >>> bool(np.isclose((network.outputs(X) - before)[1] / 1e-6, (gradient**2).sum(), rtol=1e-4))
        True
        """
        gpu = self.backend(X=X)
        with here(gpu):
            x, wrap = self.points(X, "X", data_format, gpu)
            there = gpu is not None and gpu.resident
            check = gpu.check_memory if gpu is not None and there else check_memory
            check(len(x) * self.bytes_per_sample, f"the factors of {len(x)} samples")
            made = self.factors(x) if gpu is None or there else self._factors_on_host(x, gpu)
            hidden = len(made) - self._head.trained if isinstance(self._layout, Windows) else 0
            pairs = [f.blocks if k < hidden else (f.inputs, f.deltas) for k, f in enumerate(made)]
            return [LayerFactors(wrap(a), wrap(d)) for a, d in pairs]

    def points(
        self, X: Any, name: str, data_format: str = "channels_last", gpu: Backend | None = None
    ) -> tuple[Array, Any]:  # fmt: skip
        """Checked samples, features last, where the network is, and the way back to their kind."""
        resident = gpu is not None and gpu.resident
        x, wrap = gpu.view(X, name) if gpu is not None and resident else as_numpy(X, name)
        x = self._layout.check(x, name, data_format)
        if x.dtype.kind == "f" and result_dtype(None, (name, x)) != self.dtype:
            raise TypeError(f"{name} is {x.dtype} and the network is {self.dtype}; convert {name} or give init(dtype=)")
        result_dtype(None, (name, x))
        x = x.astype(self.dtype, order="C", copy=False)  # new arrays follow its order
        finite = np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        if not finite.all():
            bad = finite if on_host(finite) else finite.get()
            raise ValueError(f"{name} must be finite: row {int(np.flatnonzero(~bad)[0])} holds NaN or infinity")
        if gpu is None or resident:
            return x, wrap
        with gpu.here() as one:
            return one.upload(x), lambda result: wrap(result if on_host(result) else result.get())

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(positions, columns of the inputs, columns of the deltas) of every factor."""
        p, shapes = self._layout.positions, []
        for step in self._steps:
            if not step.trained:
                continue
            shapes.append((p, step.W.shape[1] + (step.beta is not None), len(step.W)))
            if step.V is not None:
                shapes.append((p, step.V.shape[1] + (step.outer_beta is not None), len(step.V)))
        if self._head.trained:
            shapes.append((1, self._head.a.size + (self._head.beta is not None), 1))
        return shapes

    @property
    def bytes_per_sample(self) -> int:
        """Memory of the factors of one sample."""
        return sum(p * (a + d) for p, a, d in self.shapes) * self.dtype.itemsize

    def _batches(self, n: int) -> Iterator[slice]:
        """Samples whose rows go through the network together: at least one, and sixteen rows."""
        p = self._layout.positions
        # what a layer sees, the gradient of that, and four arrays of its results
        columns = max(2 * step.W.shape[1] + 4 * len(step.W) for step in self._steps)
        most = _BATCH if self._index is None else _DEVICE_BATCH
        size = max(-(-16 // p), most // (p * columns * self.dtype.itemsize))
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def factors(self, x: Array) -> list[Factor]:
        """The factors of checked samples, as rows, where the samples are."""
        made = [
            Factor(np.empty_like(x, shape=(len(x) * p, a)), np.empty_like(x, shape=(len(x) * p, d)), p)
            for p, a, d in self.shapes
        ]
        for part in self._batches(len(x)):
            rows = self._layout.rows(x[part])
            fill_factors(self._steps, self._head, self._layout, rows, [f.part(part) for f in made], self._unit)
        return made

    def _factors_on_host(self, x: Any, gpu: Backend) -> list[Factor]:
        """The factors of samples on the device in host memory, some at a time."""
        made = [
            Factor(np.empty((len(x) * p, a), self.dtype), np.empty((len(x) * p, d), self.dtype), p)
            for p, a, d in self.shapes
        ]
        step = max(1, gpu.free_bytes() // max(1, 4 * self.bytes_per_sample))
        for start in range(0, len(x), step):
            part = slice(start, min(start + step, len(x)))
            for whole, factor in zip(made, self.factors(x[part]), strict=True):
                to, found = whole.part(part), (factor.inputs, factor.deltas)
                to.inputs[...], to.deltas[...] = (cast(Any, a).get() for a in found)
        return made

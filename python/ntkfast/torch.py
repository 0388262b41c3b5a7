"""Tangent kernels of PyTorch modules made of Linear and Conv layers, without their Jacobians.

Needs PyTorch (``pip install "ntkfast[torch]"``); ``import ntkfast`` alone does not load it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ntkfast._arrays import check_memory
from ntkfast._contract import contraction, sample_tiles
from ntkfast._cuda import CudaUnavailable, load_cupy
from ntkfast._overflow import overflow, within
from ntkfast.empirical import memory_budget
from ntkfast.jacobian import LayerFactors, jacobian_gram

try:
    torch: Any = importlib.import_module("torch")
except ImportError as _error:
    raise ImportError('ntkfast.torch needs PyTorch: pip install "ntkfast[torch]"') from _error

#: Largest tile of the products of other devices in entries.
_ENTRIES = 1 << 24


class _Layer(NamedTuple):
    name: str
    module: Any
    weight: bool  #: trained?
    bias: bool


class _Pass(NamedTuple):
    """One forward pass: what every layer took, what it gave, and the outputs of the module, (n, C)."""

    inputs: list[Any]
    results: list[Any]
    outputs: Any


def _covered() -> tuple[Any, ...]:
    return (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)


def _layers(module: Any) -> list[_Layer]:
    """The layers with trained parameters, in the order of ``module.parameters()``; errors name what is not covered."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if id(parameter) in owners:
            raise ValueError(
                f"parameters {owners[id(parameter)]!r} and {name!r} are one: shared weights are not covered"
            )
        owners[id(parameter)] = name
    found = []
    for name, layer in module.named_modules():
        own = {key for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
        _refuse_mode(name, layer)
        if not own:
            continue
        label = f"{name or 'the module'} ({type(layer).__name__})"
        if type(layer) not in _covered() or not own <= {"weight", "bias"}:
            raise ValueError(f"{label} has parameters {sorted(own)} that are not covered; "
                             "those of Linear, Conv1d and Conv2d are. Freeze them with requires_grad_(False) to "
                             "leave them out")  # fmt: skip
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"{label} has groups={layer.groups}; only groups=1 is covered")
        found.append(_Layer(name, layer, "weight" in own, "bias" in own))
    if not found:
        raise ValueError("the module has no trained parameters")
    return found


def _refuse_mode(name: str, layer: Any) -> None:
    """Layers that mix samples, or are random."""
    if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None):
        raise ValueError(f"{name} ({type(layer).__name__}) mixes samples; use module.eval() and running statistics")
    if isinstance(layer, torch.nn.modules.dropout._DropoutNd) and layer.training and layer.p > 0:
        raise ValueError(f"{name} ({type(layer).__name__}) is random; use module.eval()")


@contextmanager
def _hooks(layers: Sequence[_Layer], taken: dict[int, Any], given: dict[int, Any]) -> Iterator[None]:
    """Record input and output of every layer while the module runs."""

    def hook(k: int) -> Callable[[Any, Any, Any, Any], Any]:
        def record(_: Any, args: Any, kwargs: Any, result: Any) -> Any:
            if k in given:
                raise ValueError(f"{layers[k].name!r} runs more than once; shared weights are not covered")
            taken[k], given[k] = (args[0] if args else kwargs["input"]).detach(), result
            return result.clone()  # so that an activation in place leaves the recorded one alone

        return record

    handles = [layer.module.register_forward_hook(hook(k), with_kwargs=True) for k, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(module: Any, layers: Sequence[_Layer], x: Any) -> _Pass:
    taken: dict[int, Any] = {}
    given: dict[int, Any] = {}
    with _hooks(layers, taken, given):
        outputs = module(x)
    if not isinstance(outputs, torch.Tensor):
        raise TypeError(f"the module must return one tensor, got {type(outputs).__name__}")
    n = len(x)
    if outputs.ndim == 0 or len(outputs) != n:
        raise ValueError(
            f"the module returned shape {tuple(outputs.shape)} for {n} samples; one row per sample is needed"
        )
    for k, layer in enumerate(layers):
        if k not in given:
            raise ValueError(
                f"{layer.name!r} has trained parameters but did not run as a module; freeze it if it is unused"
            )
        most = 4 if isinstance(layer.module, torch.nn.Conv2d) else 3
        fits = taken[k].ndim == most or (isinstance(layer.module, torch.nn.Linear) and taken[k].ndim >= 2)
        if len(taken[k]) != n or not fits:
            raise ValueError(f"{layer.name!r} took shape {tuple(taken[k].shape)} for {n} samples; "
                             "samples must stay on the first axis")  # fmt: skip
    return _Pass([taken[k] for k in range(len(layers))], [given[k] for k in range(len(layers))], outputs.reshape(n, -1))


def _patches(layer: Any, x: Any) -> Any:
    """(n, positions, channels * window): what every output position of a convolution sees."""
    window, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    pads: list[int] = []
    for k in range(len(window) - 1, -1, -1):  # torch.nn.functional.pad starts with the last axis
        if layer.padding == "same":
            total = dilation[k] * (window[k] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0, 0] if layer.padding == "valid" else [layer.padding[k]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = torch.nn.functional.pad(x, pads, mode=mode) if any(pads) else x
    if len(window) == 1:
        x, window, stride, dilation = x[:, :, None], (1, *window), (1, *stride), (1, *dilation)
    return torch.nn.functional.unfold(x, window, dilation=dilation, stride=stride).transpose(1, 2)


def _inputs(layer: _Layer, x: Any) -> Any:
    """A, (n, [p,] fan_in), with a column of ones for a trained bias."""
    if isinstance(layer.module, torch.nn.Linear):
        A = x if x.ndim == 2 else x.reshape(len(x), -1, x.shape[-1])
    else:
        A = _patches(layer.module, x)
    parts = ([A] if layer.weight else []) + ([torch.ones_like(A[..., :1])] if layer.bias else [])
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=-1)


def _deltas(layer: _Layer, gradient: Any) -> Any:
    """D, (n, [p,] fan_out)."""
    if isinstance(layer.module, torch.nn.Linear):
        return (
            gradient if gradient.ndim == 2 else gradient.reshape(len(gradient), -1, gradient.shape[-1])
        ).contiguous()
    return gradient.flatten(2).transpose(1, 2).contiguous()


def _check_gradients(
    layers: Sequence[_Layer], inputs: Sequence[Any], deltas: Sequence[Any], found: Sequence[Any]
) -> None:
    """The factors summed over the samples are the gradients of PyTorch: nothing used a parameter behind our back."""
    grads = iter(found)
    for layer, A, D in zip(layers, inputs, deltas, strict=True):
        total = D.reshape(-1, D.shape[-1]).T @ A.reshape(-1, A.shape[-1])
        wanted = [g.reshape(len(g), -1) for g in (next(grads) for _ in range(layer.weight + layer.bias))]
        whole = torch.cat(wanted, dim=1)
        size = D.abs().reshape(-1, D.shape[-1]).T @ A.abs().reshape(-1, A.shape[-1])  # rounding is relative to this
        if not bool(((total - whole).abs() <= 1e3 * torch.finfo(A.dtype).eps * (size + size.max())).all()):
            raise ValueError(f"the gradient of {layer.name!r} is not that of one layer: its parameters are used "
                             "elsewhere, or hooks change them")  # fmt: skip


def _check_samples(module: Any, x: Any, outputs: Any) -> None:
    """The first sample alone has the same output."""
    if len(x) == 1:
        return
    with torch.no_grad():
        alone = module(x[:1]).reshape(-1)
    first = outputs[0].detach()
    scale = outputs.detach().abs().max()
    if not bool(((alone - first).abs() <= torch.finfo(first.dtype).eps ** 0.5 * scale).all()):
        raise ValueError("the output of a sample depends on the other samples (or is random); "
                         "kernels of samples need a module that treats them one by one")  # fmt: skip


class _Factors(NamedTuple):
    inputs: list[Any]  #: of every layer, (n, [p,] fan_in)
    deltas: list[list[Any]]  #: for every output wanted and every layer, (n, [p,] fan_out)


def _factors(module: Any, x: Any, output: Any) -> _Factors:
    """output "sum", an int, or None for every one."""
    layers = _layers(module)
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"x must be (n, ...) and not empty, got shape {tuple(x.shape)}")
    x = x.detach()
    with torch.enable_grad():
        run = _run(module, layers, x)
        _check_samples(module, x, run.outputs)
        columns = _columns(run.outputs, output)
        inputs = [_inputs(layer, a) for layer, a in zip(layers, run.inputs, strict=True)]
        parameters = [p for layer in layers for p in _parameters(layer)]
        deltas: list[list[Any]] = []
        for k, column in enumerate(columns):
            wanted = [*run.results, *(parameters if k == 0 else [])]
            grads = torch.autograd.grad(column.sum(), wanted, retain_graph=k + 1 < len(columns), allow_unused=True)
            grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]
            deltas.append([_deltas(layer, g) for layer, g in zip(layers, grads, strict=False)])
            if k == 0:
                _check_gradients(layers, inputs, deltas[0], grads[len(layers) :])
    return _Factors(inputs, deltas)


def _parameters(layer: _Layer) -> list[Any]:
    return ([layer.module.weight] if layer.weight else []) + ([layer.module.bias] if layer.bias else [])


def _columns(outputs: Any, output: Any) -> list[Any]:
    """The scalars of every sample whose gradients are wanted, each (n,)."""
    if not outputs.requires_grad:
        raise ValueError(
            "the outputs do not depend on any trained parameter, or gradients are switched off in the module"
        )
    if output is None:
        return list(outputs.T)
    if output == "sum":
        return [outputs.sum(dim=1)]
    if isinstance(output, bool) or not isinstance(output, int):
        raise ValueError(f'output={output!r} is unknown; use "sum", an index, or one of the words in the docstring')
    if not -outputs.shape[1] <= output < outputs.shape[1]:
        raise ValueError(f"output={output} is out of range: the module has {outputs.shape[1]} outputs")
    return [outputs[:, output]]


def jacobian_factors(module: Any, x: Any, *, output: Any = "sum") -> list[LayerFactors]:
    """Layer inputs and output gradients of a module, for :func:`ntkfast.jacobian_gram`.

    Parameters
    ----------
    module : torch.nn.Module
        Its trained parameters belong to Linear, Conv1d and Conv2d layers (``groups=1``), each of which runs once.
        Anything without parameters is free, in place or not; frozen parameters (``requires_grad=False``) are left out.
    x : tensor, (n, ...)
    output : "sum", int or "each"
        Gradients of the sum of a sample's outputs, of one of them, or of every one: then the rows are (sample, output)
        pairs, output fastest, n C of them.

    Returns
    -------
    list of LayerFactors of tensors
        One per layer, in the order of ``module.parameters()``; a trained bias is a last column of ones of the inputs.
        Convolutions have a position axis: (n, positions, channels * window) and (n, positions, channels).

    Raises
    ------
    ValueError
        Parameters that are not covered (normalisation, embeddings, groups, subclasses), shared weights, a layer that
        runs twice or not at all, samples that depend on each other: all named.

    Examples
    --------
    >>> import torch, ntkfast as nf, ntkfast.torch
    >>> module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> factors = nf.torch.jacobian_factors(module, torch.eye(3))
    >>> [(tuple(f.inputs.shape), tuple(f.deltas.shape)) for f in factors]
    [((3, 4), (3, 8)), ((3, 9), (3, 2))]
    """
    if output != "each":
        found = _factors(module, x, output)
        return [LayerFactors(a, d) for a, d in zip(found.inputs, found.deltas[0], strict=True)]
    found = _factors(module, x, None)
    count = len(found.deltas)
    made = []
    for k, a in enumerate(found.inputs):
        deltas = torch.stack([row[k] for row in found.deltas], dim=1).flatten(0, 1)
        made.append(LayerFactors(a.repeat_interleave(count, dim=0), deltas))
    return made


def _lists(found: _Factors, output: Any) -> list[list[LayerFactors]]:
    """Factors whose Grams are the blocks of the result; the trace needs one: gradients of all outputs side by side."""
    if output == "trace":
        return [[LayerFactors(a, torch.cat(d, dim=-1)) for a, *d in zip(found.inputs, *found.deltas, strict=True)]]
    return [[LayerFactors(a, d) for a, d in zip(found.inputs, row, strict=True)] for row in found.deltas]


def empirical_ntk(module: Any, x: Any, *, output: Any = "sum", memory: int | None = None) -> Any:
    """Tangent kernel of a module: inner products of the gradients of its outputs in all trained parameters.

    Parameters
    ----------
    module, x
        As for :func:`jacobian_factors`.
    output : "sum", int, "trace" or "full"
        Of the sum of the outputs; of one of them; the sum of the kernels of all of them (their trace); or all pairs.
    memory : int, optional
        Bytes for factors, as in :func:`ntkfast.empirical_ntk`: beyond them samples are taken in tiles. On a CUDA
        device a quarter of what is free there unless given.

    Returns
    -------
    tensor, (n, n); for "full" (n C, n C), rows (sample, output) with the output fastest
        On the device of ``x``, which nothing leaves. CPU tensors, and CUDA tensors where CuPy is installed (extra
        ``cuda13`` or ``cuda12``), go through the kernels of :func:`ntkfast.jacobian_gram`, others through PyTorch's own
        products, tile by tile.

    Raises
    ------
    The errors of :func:`jacobian_factors`.
    OverflowError
        The kernel, or a product on the way to it, leaves the range of the dtype: names row, or row and column. Use
        float64, or smaller points.

    Examples
    --------
    >>> import torch, ntkfast as nf, ntkfast.torch
    >>> from torch import nn
    >>> module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> x = torch.randn(5, 1, 4, 4)
    >>> nf.torch.empirical_ntk(module, x).shape, nf.torch.empirical_ntk(module, x, output="full").shape
    (torch.Size([5, 5]), torch.Size([10, 10]))
    """
    wanted = None if output in ("trace", "full") else output
    budget = memory_budget(memory)
    if memory is None and isinstance(x, torch.Tensor) and x.device.type == "cuda":
        budget = torch.cuda.mem_get_info(x.device)[0] // 4
    n = len(x) if isinstance(x, torch.Tensor) and x.ndim else 1
    one = _factors(module, x[:1] if isinstance(x, torch.Tensor) and x.ndim else x, wanted)
    tensors = [*one.inputs, *(d for row in one.deltas for d in row)]
    tiles = sample_tiles(n, None, sum(t.numel() * t.element_size() for t in tensors), budget) or [slice(0, n)]
    count = len(one.deltas) if output == "full" else 1
    if x.device.type == "cpu":
        check_memory((n * count) ** 2 * tensors[0].element_size(), f"the kernel of {n * count} rows")
    K = torch.empty((n, count, n, count), dtype=tensors[0].dtype, device=tensors[0].device)
    for i, row in enumerate(tiles):
        left = _lists(_factors(module, x[row], wanted), output)
        for j, col in enumerate(tiles[i:], i):
            right = left if i == j else _lists(_factors(module, x[col], wanted), output)
            _fill_blocks(K, row, col, left, right)
            right = []  # before the next ones are made
        left = []
    return K.reshape(n * count, n * count)


def _fill_blocks(
    K: Any, row: slice, col: slice, left: list[list[LayerFactors]], right: list[list[LayerFactors]]
) -> None:
    """All pairs of outputs of two tiles of samples, and their mirror images."""
    for a, f in enumerate(left):
        for b, g in enumerate(right):
            if left is right and b < a:
                continue
            count = K.shape[1]
            with within(row.start * count + a, col.start * count + b, step=count):
                block = _gram(f, None if f is g else g)
            K[row, a, col, b] = block
            K[col, b, row, a] = block.T


def _gram(factors: list[LayerFactors], other: list[LayerFactors] | None) -> Any:
    if _has_kernels(factors[0].inputs.device.type):
        return jacobian_gram(factors, other)
    K = _device_gram(factors, factors if other is None else other)
    finite = torch.isfinite(K.diagonal() if other is None else K)  # ntkfast._overflow.refuse_tile says why
    if not bool(finite.all()):
        raise overflow(tuple(torch.nonzero(~finite)[0].tolist()), K.dtype)
    return K


def _has_kernels(device: str) -> bool:
    """True if :func:`ntkfast.jacobian_gram` takes tensors of such a device: CUDA's only where CuPy is installed."""
    if device != "cuda":
        return bool(device == "cpu")
    try:
        load_cupy()
    except CudaUnavailable:
        return False
    return True


def _device_gram(factors: list[LayerFactors], other: list[LayerFactors]) -> Any:
    """(n, m) by PyTorch's products, in tiles, for devices without kernels of ours."""
    first = factors[0].inputs
    n, m = len(first), len(other[0].inputs)
    K = torch.zeros((n, m), dtype=first.dtype, device=first.device)
    for f, g in zip(factors, other, strict=True):
        A, D, B, E = (t if t.ndim == 3 else t[:, None] for t in (*f, *g))
        p, r, fan_in, fan_out = A.shape[1], B.shape[1], A.shape[2], D.shape[2]
        way = contraction(n, m, (p, r), fan_in, fan_out, first.element_size(), symmetric=False)
        size = p * r if way == "products" else max(1, fan_in * fan_out // 1024)
        side = max(1, int((_ENTRIES / size) ** 0.5))
        for i in range(0, n, side):
            for j in range(0, m, side):
                a, d, b, e = A[i : i + side], D[i : i + side], B[j : j + side], E[j : j + side]
                if way == "products":
                    P, Q = (u.flatten(0, 1) @ v.flatten(0, 1).T for u, v in ((a, b), (d, e)))
                    K[i : i + side, j : j + side] += (P * Q).reshape(len(a), p, len(b), r).sum(dim=(1, 3))
                    continue
                for k in range(0, fan_in, max(1, _ENTRIES // (side * fan_out))):
                    part = slice(k, k + max(1, _ENTRIES // (side * fan_out)))
                    G = (a[:, :, part].transpose(1, 2) @ d).flatten(1)
                    K[i : i + side, j : j + side] += G @ (b[:, :, part].transpose(1, 2) @ e).flatten(1).T
    return K

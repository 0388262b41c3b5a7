"""Tangent kernels of a finite ReLU network, width 1024, depth 5, by other means, each as a skilled user would run it.

products           NumPy's A @ A.T and D @ D.T of all layers, whole matrices with out=; no forward or backward pass
explicit Jacobian  weight gradients of every sample from the same factors, then one product (n <= 128: memory)
torch.func         the "Jacobian contraction" of PyTorch's tutorial: vmap(jacrev), then one product per layer (n <= 128)
neural-tangents    empirical_ntk_fn with structured derivatives, its fastest mode; jitted, x2=None, vmap_axes=0

All have the same weights, and give the whole symmetric matrix.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import ntkfast as nf
from ntkfast import _bench

WIDTH, DEPTH, FEATURES = 1024, 5, 784
#: Beyond it the explicit Jacobians (27 MB a sample) do not fit in ordinary memory.
EXPLICIT = 128
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}


@dataclass(frozen=True)
class Problem:
    """One network and its points."""

    network: nf.FiniteNetwork
    x: np.ndarray
    out: np.ndarray

    @classmethod
    def make(cls, n: int, dtype: str, width: int = WIDTH) -> Problem:
        network = nf.init(nf.fully_connected(DEPTH), FEATURES, width, seed=0, dtype=dtype)
        x = np.random.default_rng(1).standard_normal((n, FEATURES)).astype(dtype)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return cls(network, x, np.empty((n, n), dtype=dtype))


def definition(problem: Problem) -> np.ndarray:
    """The kernel in float64 from float64 factors of the same weights."""
    double = nf.init(problem.network.net, FEATURES, problem.network.width, seed=0)
    total = np.zeros((len(problem.x), len(problem.x)))
    for weights, same in zip(double.weights, problem.network.weights, strict=True):
        weights[...] = same
    for a, d in double.jacobian_factors(problem.x.astype(np.float64)):
        total += (a @ a.T) * (d @ d.T)
    return total


def numpy_calls(problem: Problem) -> dict[str, Callable[[], Any]]:
    """What NumPy does with the same factors."""
    factors, out = problem.network.jacobian_factors(problem.x), np.empty_like(problem.out)

    def products() -> None:
        for a, d in factors:
            np.matmul(a, a.T, out=out)
            np.matmul(d, d.T, out=out)

    def gram() -> np.ndarray:
        return nf.jacobian_gram(factors, out=problem.out)

    calls: dict[str, Callable[[], Any]] = {"jacobian_gram": gram, "products": products}
    if len(problem.x) <= EXPLICIT:

        def explicit() -> np.ndarray:
            total = np.zeros_like(out)
            for a, d in problem.network.jacobian_factors(problem.x):
                gradients = (d[:, :, None] * a[:, None, :]).reshape(len(a), -1)
                total += gradients @ gradients.T
            return total

        calls["explicit Jacobian"] = explicit
    return calls


def torch_call(problem: Problem) -> Callable[[], Any]:
    """Jacobian contraction by torch.func."""
    import torch
    from torch.func import jacrev, vmap

    # a first call of vmap loads parts that warn about themselves
    weights = {str(k): torch.from_numpy(w) for k, w in enumerate(problem.network.weights)}
    x = torch.from_numpy(problem.x)
    gain = math.sqrt(2.0 / problem.network.width)

    def f(parameters: dict[str, Any], row: Any) -> Any:
        for k in range(DEPTH):
            row = gain * torch.relu(parameters[str(k)] @ row)
        return parameters[str(DEPTH)] @ row

    def contraction() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            jacobian = vmap(jacrev(f), (None, 0))(weights, x)
        return sum(block.flatten(1) @ block.flatten(1).T for block in jacobian.values()).numpy()

    return contraction


def neural_tangents_call(problem: Problem) -> Callable[[], Any]:
    """Structured derivatives; without vmap_axes=0 they take fifty times as long."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jax
        import neural_tangents as nt
        from neural_tangents import stax
    jax.config.update("jax_enable_x64", True)
    ad = jax.interpreters.ad  # names that structured derivatives need and newer versions of JAX have moved
    for name, value in (("source_info_util", jax._src.source_info_util), ("config", jax.config)):
        if not hasattr(ad, name):
            setattr(ad, name, value)
    width, layers = problem.network.width, []
    for k in range(DEPTH):
        scale = math.sqrt(FEATURES) if k == 0 else math.sqrt(2.0)
        layers += [stax.Dense(width, W_std=scale, b_std=None), stax.Relu()]
    apply = stax.serial(*layers, stax.Dense(1, W_std=math.sqrt(2.0), b_std=None))[1]
    parameters: list[Any] = []
    for k, w in enumerate(problem.network.weights):
        parameters += [(jax.numpy.asarray(w.T if w.ndim == 2 else w[:, None]), None), *([()] if k < DEPTH else [])]
    points = jax.numpy.asarray(problem.x)
    kernel = jax.jit(nt.empirical_ntk_fn(apply, trace_axes=(-1,), vmap_axes=0,
                                         implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES))  # fmt: skip
    return lambda: np.asarray(jax.block_until_ready(kernel(points, None, parameters)))


#: One thread for everybody, whose CPU time other work on the machine does not touch.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
}


def contest(
    n: int, dtype: str, quick: bool, note: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """Rows of one size: every contender checked against the definition, then timed in turns."""
    problem = Problem.make(n, dtype, 256 if quick else WIDTH)
    calls: dict[str, Callable[[], Any]] = {
        "empirical_ntk": lambda: nf.empirical_ntk(problem.network, problem.x, out=problem.out),
        **numpy_calls(problem),
    }
    for name, add in (("torch.func", _add_torch), ("neural-tangents", _add_neural_tangents)):
        try:
            add(calls, problem)
        except ImportError as error:
            note(f"{name}: {error}")
    wanted, errors = definition(problem), {}
    for name, call in calls.items():
        if name == "products":
            continue
        found = np.asarray(call(), dtype=np.float64)
        errors[name] = float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))
        limit = TOLERANCE[dtype] if name in ("empirical_ntk", "jacobian_gram") else 1e-4
        if not errors[name] <= limit:
            raise ArithmeticError(f"{name}, n = {n}, {dtype}: error {errors[name]:.1e}")
    # Gigabytes that come and go, and PyTorch's threads, would disturb the others.
    slow = {name: calls.pop(name) for name in ("explicit Jacobian", "torch.func") if name in calls}
    times = _bench.interleave(calls, 3 if quick else 9, clock=clock)
    if slow:
        times |= _bench.interleave(slow, 1 if quick else 3, clock=clock)
    kind = "wall" if clock is time.perf_counter else "CPU, one thread"
    return [_row(name, n, dtype, times, errors) | {"clock": kind} for name in times]


def _add_torch(calls: dict[str, Callable[[], Any]], problem: Problem) -> None:
    if len(problem.x) <= EXPLICIT:
        calls["torch.func"] = torch_call(problem)


def _add_neural_tangents(calls: dict[str, Callable[[], Any]], problem: Problem) -> None:
    calls["neural-tangents"] = neural_tangents_call(problem)


def _row(name: str, n: int, dtype: str, times: dict[str, Any], errors: dict[str, float]) -> dict[str, Any]:
    """Times of one contender, and over ntkfast's (the Gram alone for `products`); turn by turn if they took turns."""
    own, ours = times[name], times["jacobian_gram" if name == "products" else "empirical_ntk"]
    ratio = own / (ours if len(own) == len(ours) else np.median(ours))
    return {"name": name, "n": n, "dtype": dtype, "seconds": _bench.quartiles(own), "rounds": len(own),
            "over_ntkfast": _bench.quartiles(ratio), "error": errors.get(name)}  # fmt: skip

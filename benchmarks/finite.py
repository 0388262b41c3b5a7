"""Tangent kernels of a finite ReLU network, width 1024, depth 5, by other means, each as a skilled user would run it.

products           NumPy's A @ A.T and D @ D.T of all layers, whole matrices with out=; no forward or backward pass
explicit Jacobian  weight gradients of every sample from the same factors, then one product per layer
torch.func         the "Jacobian contraction" of PyTorch's tutorial: vmap(jacrev), then one product per layer
neural-tangents    empirical_ntk_fn with structured derivatives, its fastest mode; jitted, x2=None, vmap_axes=0

All have the same weights, and give the whole symmetric matrix. Explicit Jacobians (torch.func's too) are made where
they fit, for n <= 128, and timed by the wall clock only: they take seconds.
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
SIZES = (128, 512, 2048)
#: Samples beyond which nobody makes explicit Jacobians (40 MB a sample in float64); rows of K that are checked.
EXPLICIT, SAMPLE = 128, 12
SLOW = ("explicit Jacobian", "torch.func")
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


def definition(problem: Problem, some: np.ndarray) -> np.ndarray:
    """The kernel between a few rows in long double, by passes of its own: sum of (A A^T) * (D D^T)."""
    *hidden, last = (np.asarray(w, dtype=np.longdouble) for w in problem.network.weights)
    gain = np.sqrt(np.longdouble(2) / problem.network.width)
    inputs, active = [problem.x[some].astype(np.longdouble)], []
    for w in hidden:
        z = inputs[-1] @ w.T
        active.append(z > 0)
        inputs.append(gain * np.where(active[-1], z, 0))
    total, delta = inputs[-1] @ inputs[-1].T, last[None]
    for k in reversed(range(len(hidden))):
        delta = gain * np.where(active[k], delta, 0)
        total += (inputs[k] @ inputs[k].T) * (delta @ delta.T)
        delta = delta @ hidden[k]
    return total


def largest_error(problem: Problem, found: np.ndarray) -> float:
    """Largest |K - L| / max |L| over the pairs of a few rows, L in long double; NaN if any entry of K is."""
    some = np.unique(np.linspace(0, len(problem.x) - 1, SAMPLE).astype(int))
    wanted = definition(problem, some)
    error = np.max(np.abs(np.asarray(found)[np.ix_(some, some)] - wanted)) / np.max(np.abs(wanted))
    return float(error) if np.isfinite(found).all() else math.nan


def numpy_calls(problem: Problem) -> dict[str, Callable[[], Any]]:
    """What NumPy does with the same factors."""
    factors, out = problem.network.jacobian_factors(problem.x), np.empty_like(problem.out)

    def products() -> None:
        for a, d in factors:
            np.matmul(a, a.T, out=out)
            np.matmul(d, d.T, out=out)

    def gram() -> np.ndarray:
        return nf.jacobian_gram(factors, out=problem.out)

    def explicit() -> np.ndarray:
        made = problem.network.jacobian_factors(problem.x)
        total = np.zeros_like(out)
        # One buffer for all layers: fresh gigabytes cost more than what is done with them.
        room = np.empty(len(problem.x) * max(a.shape[1] * d.shape[1] for a, d in made), dtype=out.dtype)
        for a, d in made:
            shape = len(a), d.shape[1], a.shape[1]
            gradients = np.multiply(d[:, :, None], a[:, None, :], out=room[: math.prod(shape)].reshape(shape))
            gradients = gradients.reshape(len(a), -1)
            total += gradients @ gradients.T
        return total

    return {"jacobian_gram": gram, "products": products, "explicit Jacobian": explicit}


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
ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}


def contest(
    n: int, dtype: str, quick: bool, note: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """Rows of one size: every contender checked against the definition, then timed in turns."""
    problem = Problem.make(n, dtype, 256 if quick else WIDTH)
    wall = clock is time.perf_counter
    calls: dict[str, Callable[[], Any]] = {
        "empirical_ntk": lambda: nf.empirical_ntk(problem.network, problem.x, out=problem.out),
        **numpy_calls(problem),
    }
    rivals = {"torch.func": torch_call} if wall else {}
    for name, make in (rivals | {"neural-tangents": neural_tangents_call}).items():
        try:
            calls[name] = make(problem)
        except ImportError as error:
            note(f"{name}: {error}")
    slow = {name: calls.pop(name) for name in SLOW if name in calls}
    skipped = list(slow) if wall and n > EXPLICIT else []
    slow = slow if wall and n <= EXPLICIT else {}
    errors = {}
    for name, call in (calls | slow).items():
        if name == "products":
            continue
        errors[name] = largest_error(problem, call())
        limit = TOLERANCE[dtype] if name in ("empirical_ntk", "jacobian_gram") else 1e-4
        if not errors[name] <= limit:
            raise ArithmeticError(f"{name}, n = {n}, {dtype}: error {errors[name]:.1e}")
    times = _bench.interleave(calls, 3 if quick else (9 if n <= 512 else 4 if wall else 3), clock=clock)
    # Gigabytes that come and go, and PyTorch's threads, would disturb the others.
    times |= {name: np.array([_seconds(call) for _ in range(2)]) for name, call in slow.items()}
    about = {"n": n, "dtype": dtype, "clock": "wall" if wall else "CPU, one thread"}
    gigabytes = 1e-9 * n * problem.x.itemsize * sum(w.size for w in problem.network.weights)
    none = {"seconds": None, "rounds": 0, "over_ntkfast": None, "error": None,
            "skipped": f"not run: its Jacobian takes {gigabytes:.0f} GB"}  # fmt: skip
    return [_row(name, times, errors) | about for name in times] + [{"name": name} | none | about for name in skipped]


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _row(name: str, times: dict[str, Any], errors: dict[str, float]) -> dict[str, Any]:
    """Times of one contender, and over ntkfast's (the Gram alone for `products`); turn by turn if they took turns."""
    own, ours = times[name], times["jacobian_gram" if name == "products" else "empirical_ntk"]
    ratio = own / (ours if len(own) == len(ours) and name not in SLOW else np.median(ours))
    return {"name": name, "seconds": _bench.quartiles(own), "rounds": len(own),
            "over_ntkfast": _bench.quartiles(ratio), "error": errors.get(name)}  # fmt: skip


def measure(quick: bool, note: Callable[[str], None], on_one_thread: Callable[[str], Any]) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    for n in (32,) if quick else SIZES:
        for dtype in ("float64", "float32"):
            note(f"finite network, n={n}, {dtype}")
            rows += contest(n, dtype, quick, note)
            if quick or n > EXPLICIT:
                rows += on_one_thread(f"finite.contest({n}, {dtype!r}, {quick}, lambda text: None, time.process_time)")
    return rows


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, float | None, float, str, bool]]:
    """(name, measured, limit, unit, limit is a lower bound)"""
    found: list[tuple[str, float | None, float, str, bool]] = []
    for n, dtype, clock in dict.fromkeys((row["n"], row["dtype"], row["clock"]) for row in rows):
        own = [row for row in rows if (row["n"], row["dtype"], row["clock"]) == (n, dtype, clock)]
        over = {row["name"]: row["over_ntkfast"][1] for row in own if row["over_ntkfast"]}
        name = f"finite network, n = {n}, {dtype}, {clock}"
        worst = max(row["error"] for row in own if row["name"] in ("empirical_ntk", "jacobian_gram"))
        found.append((f"{name}: error", worst, TOLERANCE[dtype], "", False))
        if n == SIZES[-1]:
            found.append((f"{name}: jacobian_gram over NumPy's products", 1 / over["products"], 1.15, "", False))
        if n > EXPLICIT:
            theirs = over.get("neural-tangents")
            found.append((f"{name}: neural-tangents over empirical_ntk", theirs, 1.0, "", True))
        elif clock == "wall":
            found.append((f"{name}: torch.func over empirical_ntk", over.get("torch.func"), 50.0, "", True))
    return found

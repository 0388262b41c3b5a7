"""Everything a machine with a GPU can tell: ``python benchmarks/gpu_check.py`` writes results/gpu-<device>.json.

    plan        what will be done (``--dry-run`` prints it and stops)
    build       every kernel for this device
    tests       pytest -m gpu
    sanitizer   compute-sanitizer, if it is installed: memcheck, racecheck and initcheck on small cases
    benchmarks  times by CUDA events, median of many, against copy bandwidth, cuBLAS and FMA rates of the same run

Every answer is checked against the CPU before it is timed; a step that fails is in the report, and the exit status 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_finite
import numpy as np
from gpu_images import image_cases, measure_images

import ntkfast as nf
from ntkfast import _bench
from ntkfast._cuda import CudaUnavailable, compiler, layout, load_cupy
from ntkfast._cuda import gram as gpu_gram

HERE = Path(__file__).resolve().parent
KERNELS = ("points", *layout.SQUARE, "conv_images", "gram_conv_fast", "gram_conv_exact", "gram_conv_general",
           "conv_results", "jacobian")  # fmt: skip
TOOLS = ("memcheck", "racecheck", "initcheck")
Report = dict[str, Any]

#: Fused multiply-adds of the two fits of one pair and layer, by range: N - 1 for N coefficients (csrc/math/arccos.h).
FUSED = {"float64": (32, 23, 16), "float32": (14, 10, 6)}
#: Other operations of a layer without signs and V (csrc/math/layer.h); the square root is not counted.
OTHERS = 20

SANITIZED = (
    """
import os, numpy as np, ntkfast as nf
x = np.random.default_rng(0).normal(size=(67, 5)); x[3] = x[4]; x[5] = -x[6]; x[7] = 0
for net in (nf.resnet(3), nf.resnet(2, "erf"), nf.Network([nf.Dense("tanh", bias_variance=0.1)])):
    for dtype in ("float64", "float32"):
        z = (x / 4).astype(dtype)
        for os.environ["NTKFAST_PATH"] in ("table", "recursion"):
            assert np.isfinite(nf.gram(net, z, get=("ntk", "nngp"), device="cuda")).all()
        assert np.isfinite(nf.layer_grams(net, z, z[:9], device="cuda")).all()
x = np.random.default_rng(0).normal(size=(5, 6, 7, 2)); x[3] = x[4]; x[0] = 3 * x[4]; x[2] = 0; x[1, :2] = 0
for readout in ("flatten", "gap"):
    for net in (nf.conv_net(2, readout=readout), nf.conv_resnet(2, readout=readout),
                nf.conv_net(2, "erf", readout=readout)):
        for dtype in ("float64", "float32"):
            z = (x / 4).astype(dtype)
            assert np.isfinite(nf.gram(net, z, get=("ntk", "nngp"), device="cuda")).all()
            if readout == "flatten":
                assert np.isfinite(nf.layer_grams(net, z, z[:2], device="cuda")).all()
"""
    + gpu_finite.SANITIZED
)


@dataclass(frozen=True)
class Case:
    """The Gram matrix of standard normal rows on one path: "table", or "recursion"."""

    name: str
    network: nf.Network
    n: int
    d: int
    path: str = "table"
    dtype: str = "float64"

    def points(self) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(self.n, self.d)).astype(self.dtype)


def cases(n: int, d: int) -> list[Case]:
    """The rows of the table."""
    networks = {f"fully_connected({k})": nf.fully_connected(k) for k in (1, 3, 10, 100)}
    networks |= {"resnet(10)": nf.resnet(10), "bottleneck_resnet(10)": nf.bottleneck_resnet(10)}
    tables = [Case(name, network, n, d) for name, network in networks.items()]
    ten = "fully_connected(10)"
    return [
        *tables,
        Case(ten, networks[ten], n, d, dtype="float32"),
        *(Case(ten, networks[ten], n, d, "recursion", dtype) for dtype in ("float64", "float32")),
        Case("resnet(10)", networks["resnet(10)"], n, d, "recursion"),
        Case("fully_connected(3), biases", nf.fully_connected(3, bias_variance=0.1), n, d, "recursion"),
        Case("fully_connected(3, erf)", nf.fully_connected(3, "erf"), n, d, "recursion"),
    ]


#: (what, its limit, True for at least): what the project promises for n = 32768, d = 784 on an H200.
TARGETS = (
    ("table path, float64, slowest row: gram over the cuBLAS product alone", 1.25, False),
    ("table path, float64, slowest row: epilogues, share of the copy bandwidth", 0.6, True),
    ("recursion, fully_connected(10), float64: share of the FMA rate", 0.5, True),
    ("layer by layer in CuPy over ours, depth 10", 10.0, True),
    (*gpu_finite.TARGET, False),
    ("conv_net(21) flatten, 32x32x3, float32: microseconds an entry", 0.15, False),
    ("conv_net(21) gap, 32x32x3, float32: microseconds an entry", 150.0, False),
)


# Times


def device_times(cupy: Any, call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median and quartiles in ms between two events, and the median time the host spends on starting it."""
    call()
    cupy.cuda.get_current_stream().synchronize()
    times, host = [], []
    for _ in range(rounds):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        begin = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - begin))
        end.record()
        end.synchronize()
        times.append(float(cupy.cuda.get_elapsed_time(start, end)))
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"ms": float(median), "low": float(low), "high": float(high), "host_ms": statistics.median(host)}


def limits(cupy: Any, n: int, d: int, rounds: int) -> Report:
    """What this device can do: bytes/s of a copy, FLOP/s of cuBLAS and of fused multiply-adds, per dtype."""
    gpu, found = gpu_gram.Gpu(cupy.cuda.Device().id), {}
    for dtype in (np.float64, np.float32):
        x, out = gpu.upload(np.random.default_rng(0).normal(size=(n, d)).astype(dtype)), gpu.empty((n, n), dtype)
        copy = device_times(cupy, lambda out=out: out.copy(), rounds)
        gemm = device_times(cupy, lambda x=x, out=out: gpu.product(x, x, out), rounds)
        name, blocks, turns = f"fma_{layout.suffix_of(dtype)}", 132 * 64, 4096 if n > 1024 else 4
        kernel = cupy.RawModule(path=str(fma_binary(cupy))).get_function(name)
        target = gpu.empty((blocks * 256 if n > 1024 else 512,), dtype)
        grid = (target.size // 256,)
        fma = device_times(
            cupy, lambda k=kernel, g=grid, t=target, r=turns: k(g, (256,), (t, np.int32(r)), shared_mem=0), rounds
        )
        found[np.dtype(dtype).name] = {
            "copy": copy | {"GB/s": 2e-6 * out.nbytes / copy["ms"]},
            "product": gemm | {"GFLOP/s": 2e-6 * n * n * d / gemm["ms"]},
            "fma": fma | {"GFLOP/s": 1e-6 * 16 * turns * target.size / fma["ms"]},
        }
    return found


def fma_binary(cupy: Any) -> Path:
    """fma.cu compiled for this device, beside the cache of the package."""
    arch = str(cupy.cuda.Device().compute_capability)
    nvrtc = compiler.find(cupy.cuda.runtime.runtimeGetVersion() // 1000)
    options = (f"-arch=sm_{arch}", "-std=c++17")
    data, _ = nvrtc.compile((HERE / "fma.cu").read_text(), "fma.cu", options, "CUBIN")
    path = compiler.cache_folder() / f"benchmark-fma-{arch}.cubin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def layer_by_layer(xp: Any, x: Any, depth: int) -> Any:
    """The kernel of fully_connected(depth) as it is usually written: array operations, one after the other."""
    s = x @ x.T
    norm = xp.sqrt(xp.diagonal(s))
    outer = norm[:, None] * norm[None, :]
    theta = s
    for _ in range(depth):
        angle = xp.arccos(xp.clip(s / outer, -1, 1))
        s = outer * (xp.sin(angle) + (np.pi - angle) * xp.cos(angle)) / np.pi
        theta = s + theta * (np.pi - angle) / np.pi
    return theta


def measure(cupy: Any, case: Case, rounds: int, rates: Report) -> Report:
    """Times of one case: the whole, its products, its epilogues; after a check of the answer."""
    with _bench.forced(case.path):
        return _measure(cupy, case, rounds, rates)


def _measure(cupy: Any, case: Case, rounds: int, rates: Report) -> Report:
    gpu = gpu_gram.Gpu(cupy.cuda.Device().id)
    host = case.points()
    x, out = gpu.upload(host), gpu.empty((case.n, case.n), case.dtype)
    nf.gram(case.network, x, out=out)
    part = slice(0, min(case.n, 256))
    error = _bench.max_error(case.network, host[part], out[part, part].get())
    _bench.check(case.name, error, case.dtype)
    whole = device_times(cupy, lambda: nf.gram(case.network, x, out=out), rounds)
    tiles, worker, products, ranges = _tiles_of(gpu, case, x)
    ones = [device_times(cupy, lambda run=run: [run(worker, tile, products, out) for tile in tiles], rounds)
            for run in (_product_only, _epilogue_only)]  # fmt: skip
    if (worker.module == "gram_table") != (case.path == "table"):
        raise RuntimeError(f"{case.name} ran by {worker.module}, not by its {case.path}")
    row = {"case": case.name, "n": case.n, "d": case.d, "dtype": case.dtype, "path": case.path, "error": error,
           "gram": whole, "products": ones[0], "epilogues": ones[1]}  # fmt: skip
    epilogue = ones[1]["ms"]
    row["over_product"] = whole["ms"] / rates["product"]["ms"]
    row["GB/s"] = 2e-6 * out.nbytes / epilogue  # the matrix once read, once written
    row["of_copy"] = row["GB/s"] / rates["copy"]["GB/s"]
    if worker.module == "gram_dense":
        row["GFLOP/s"] = 1e-6 * case.n * (case.n + 1) / 2 * operations(ranges, case.dtype) / epilogue
        row["of_fma"] = row["GFLOP/s"] / rates["fma"]["GFLOP/s"]
    return row


def operations(ranges: Any, dtype: str) -> int:
    """Floating-point operations of the layers of one pair, without square roots."""
    return sum(2 * FUSED[dtype][k] + OTHERS for k in ranges)


def _tiles_of(gpu: Any, case: Case, x: Any) -> tuple[list[Any], Any, Any, Any]:
    """The tiles of a case, what computes them, scratch with products, and the ranges of the homogeneous layers."""
    from ntkfast._plan import mix_of
    from ntkfast._problem import Problem, factors
    from ntkfast._tiles import Tiles

    problem = Problem(case.network, x, None, None, None)
    mix = mix_of(case.network, "ntk")
    (table,) = problem.path([mix]).tables or (None,)
    f, h, _ = factors(problem, "ntk", mix, problem.x, "X", False, table)
    worker = gpu_gram.Worker(gpu, problem, [gpu_gram.Output(mix.as_list(), f, f, h, h, table=table)], None)
    side = min(gpu_gram.RESIDENT, case.n)
    # correlations of up to 0.7 to both sides: neighbours look into different panels, none is close
    rho = np.random.default_rng(1).uniform(-0.7, 0.7, size=(side, side))
    products = gpu.upload((rho * case.d).astype(case.dtype))
    ranges = problem.compiled.core.arguments[1][:, 2]
    return list(Tiles(case.n, case.n, True, side)), worker, products, ranges


def _product_only(worker: Any, tile: Any, products: Any, out: Any) -> None:
    rows, cols = tile.rows.stop - tile.rows.start, tile.cols.stop - tile.cols.start
    worker.gpu.product(worker.x[0][tile.rows], worker.y[0][tile.cols], products[:rows, :cols])


def _epilogue_only(worker: Any, tile: Any, products: Any, out: Any) -> None:
    worker.into(tile, products, [out], multiply=False)


def measure_baseline(cupy: Any, case: Case, rounds: int, ours: float) -> Report:
    """Array operations layer by layer, in CuPy, on a matrix small enough for their temporaries."""
    x = cupy.asarray(case.points())
    error = _bench.max_error(
        case.network, case.points()[:256], layer_by_layer(cupy, x, case.network.depth)[:256, :256].get()
    )
    times = device_times(cupy, lambda: layer_by_layer(cupy, x, case.network.depth), rounds)
    return {"case": case.name, "n": case.n, "dtype": case.dtype, "error": error, "layer_by_layer": times,
            "over_ours": times["ms"] / ours}  # fmt: skip


def measure_streaming(case: Case, rounds: int) -> Report:
    """From NumPy to NumPy: wall time, copies and stores included."""
    x, out, times = case.points(), np.empty((case.n, case.n), case.dtype), []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        nf.gram(case.network, x, device="cuda", out=out)
        times.append(1e3 * (time.perf_counter() - begin))
    ms = statistics.median(times[1:])
    return {"case": case.name, "n": case.n, "d": case.d, "dtype": case.dtype, "ms": ms, "GB/s": 1e-6 * out.nbytes / ms}


# Steps


def machine(cupy: Any) -> Report:
    """What was used, and when."""
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    runtime = cupy.cuda.runtime
    return {
        "gpu": properties["name"].decode(), "compute_capability": str(cupy.cuda.Device().compute_capability),
        "multiprocessors": properties["multiProcessorCount"], "memory": properties["totalGlobalMem"],
        "driver": runtime.driverGetVersion(), "runtime": runtime.runtimeGetVersion(), "cupy": cupy.__version__,
        "nvrtc": compiler.find(runtime.runtimeGetVersion() // 1000).version, "numpy": np.__version__,
        "python": platform.python_version(), "ntkfast": nf.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip


def build(report: Report) -> None:
    """Every kernel for this device."""
    begin = time.perf_counter()
    for name in KERNELS:
        compiler.load(name)
    report["build_s"] = time.perf_counter() - begin


def run_tests(report: Report) -> None:
    """pytest -m gpu in a process of its own; "no tests ran" and skipped tests are no success."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        str(HERE.parent / "tests" / "gpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()
    report["tests"] = {"status": done.returncode, "summary": last}
    if done.returncode or not re.search(r"\b\d+ passed", last):
        raise RuntimeError(f"tests -m gpu: {last}\n{done.stdout[-4000:]}")


def run_sanitizer(report: Report) -> None:
    """compute-sanitizer on small cases."""
    tool = shutil.which("compute-sanitizer")
    report["sanitizer"] = {} if tool else "compute-sanitizer is not installed"
    failed = []
    for name in TOOLS if tool else ():
        command = [str(tool), "--tool", name, "--error-exitcode", "99", sys.executable, "-c", SANITIZED]
        done = subprocess.run(command, capture_output=True, text=True)
        report["sanitizer"][name] = "clean" if done.returncode == 0 else f"status {done.returncode}"
        if done.returncode:
            failed.append(f"{name}:\n{(done.stdout + done.stderr)[-4000:]}")
    if failed:
        raise RuntimeError("\n".join(failed))


def run_benchmarks(report: Report, n: int, d: int, rounds: int, width: int, baseline: bool = True) -> None:
    """Rates, then every case, then finite networks; targets last."""
    cupy = load_cupy()
    report["limits"] = rates = limits(cupy, n, d, rounds)
    report["cases"], report["baseline"] = [], []
    for case in cases(n, d):
        report["cases"].append(measure(cupy, case, rounds, rates[case.dtype]))
    report["streaming"] = [measure_streaming(case, max(3, rounds // 8)) for case in cases(max(64, n // 2), d)[:1]]
    small = Case("fully_connected(10)", nf.fully_connected(10), max(64, n // 4), d)
    if baseline:
        ours = measure(cupy, small, rounds, rates["float64"])["gram"]["ms"]
        report["baseline"].append(measure_baseline(cupy, small, rounds, ours))
    # Memory of the matrices above must not be missing below.
    cupy.get_default_memory_pool().free_all_blocks()
    report["finite"] = gpu_finite.run(
        gpu_gram.Gpu(cupy.cuda.Device().id), lambda call: device_times(cupy, call, max(3, rounds // 3)),
        finite_sizes(n, d, width), {dtype: rate["copy"]["GB/s"] for dtype, rate in rates.items()},
    )  # fmt: skip
    report["images"] = [measure_images(case, max(3, rounds // 8)) for case in image_cases(n)]
    report["targets"] = targets(report)


def finite_sizes(n: int, d: int, width: int) -> tuple[int, int, int, int]:
    """(n, d, width, depth) of finite networks: half of the points."""
    return max(64, n // 2), d, width, 5


def targets(report: Report) -> list[Report]:
    """PASS or FAIL of what the project promises; what was not measured says so, NaN fails."""

    def line(name: str, value: float | None, limit: float, least: bool) -> Report:
        met = value is not None and (value >= limit if least else value <= limit)
        verdict = "not measured" if value is None else "PASS" if met else "FAIL"
        return {"target": name, "limit": f"{'>=' if least else '<='} {limit:g}", "measured": value, "verdict": verdict}

    double = [r for r in report["cases"] if r["dtype"] == "float64"]
    tables = [r for r in double if r["path"] == "table"]
    deep = [r for r in double if r["path"] == "recursion" and r["case"] == "fully_connected(10)"]
    single = [r for r in report.get("images", []) if r["dtype"] == "float32"]
    values = (
        float(np.max([r["over_product"] for r in tables])) if tables else None,  # NaN comes through
        float(np.min([r["of_copy"] for r in tables])) if tables else None,
        deep[0]["of_fma"] if deep else None,
        report["baseline"][0]["over_ours"] if report["baseline"] else None,
        float(np.max([r["over_products"] for r in report["finite"]["jacobian_gram"]])) if "finite" in report else None,
        *(next((r["us_an_entry"] for r in single if r["readout"] == readout), None) for readout in ("flatten", "gap")),
    )
    return [line(name, value, *rest) for (name, *rest), value in zip(TARGETS, values, strict=True)]


def plan(n: int, d: int, rounds: int, width: int) -> str:
    """What will be done, in words."""
    lines = [
        f"build: {', '.join(KERNELS)}",
        "tests: pytest -m gpu",
        f"sanitizer: {', '.join(TOOLS)}",
        f"benchmarks: n = {n}, d = {d}, median of {rounds}; copy, cuBLAS and FMA rates first",
        *(f"    {case.name}, {case.dtype}, {case.path}" for case in cases(n, d)),
        f"    streaming to the host, n = {max(64, n // 2)}",
        f"    layer by layer in CuPy, n = {max(64, n // 4)}",
        "    finite networks: n = {}, d = {}, width {}, depth {}; K3".format(*finite_sizes(n, d, width)),
        *(f"    {case.name}" for case in image_cases(n)),
        "targets:",
        *(f"    {name} {'>=' if least else '<='} {limit:g}" for name, limit, least in TARGETS),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--skip", nargs="*", choices=("tests", "sanitizer", "benchmarks"), default=[])
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--d", type=int, default=784)
    parser.add_argument("--width", type=int, default=4096, help="of finite networks")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    print(plan(options.n, options.d, options.rounds, options.width))
    if options.dry_run:
        return 0
    try:
        report: Report = {"machine": machine(load_cupy()), "errors": []}
    except CudaUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    steps: dict[str, Callable[[], None]] = {
        "build": lambda: build(report),
        "tests": lambda: run_tests(report),
        "sanitizer": lambda: run_sanitizer(report),
        "benchmarks": lambda: run_benchmarks(report, options.n, options.d, options.rounds, options.width),
    }
    for name, step in steps.items():
        if name in options.skip:
            continue
        print(name, file=sys.stderr, flush=True)
        try:
            step()
        except Exception:
            report["errors"].append({"step": name, "error": traceback.format_exc()})
            traceback.print_exc()
    slug = re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()).strip("-")
    options.folder.mkdir(parents=True, exist_ok=True)
    target = options.folder / f"gpu-{slug}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(target)
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""The simulator itself: it finds every fault planted in faults.cu, and nothing in the cured twins."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simulate

FAULTS = Path(__file__).parent / "faults" / "faults.cu"
pytestmark = pytest.mark.skipif(simulate.missing("plain") is not None, reason=f"{simulate.missing('plain')}")

#: fault: (mode that finds it, what the report says); the report names the line marked in faults.cu
REPORTS = {
    "missing_barrier": ("thread", "data race"),
    "overwritten_too_early": ("thread", "data race"),
    "warp_without_sync": ("thread", "data race"),
    "shuffle_as_fence": ("thread", "data race"),
    "all_add": ("thread", "data race"),
    "blocks_collide": ("thread", "data race"),
    "divergent_barrier": ("plain", "divergent __syncthreads"),
    "barrier_after_return": ("plain", "__syncthreads after some threads returned"),
    "half_a_warp": ("plain", "__shfl_down_sync: waits for threads that never come"),
    "lane_outside": ("plain", "__shfl_sync reads a lane outside the mask"),
    "not_in_own_mask": ("plain", "__syncwarp: the calling lane is not in its own mask"),
    "beyond_shared": ("address", "index 32 out of bounds"),
    "dynamic_too_small": ("address", "use-after-poison"),
    "beyond_global": ("address", "heap-buffer-overflow"),
    "misaligned": ("address", "misaligned address"),
    "overflow": ("address", "signed integer overflow"),
}
#: how many results are NaN: shared memory that nobody has written
UNWRITTEN = {"unwritten": 1, "left_by_another_block": 64}

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import test_simulator
for kernel in sys.argv[2:]:
    for seed in (0, 1, 2):
        test_simulator.run(kernel, seed)
print("no report")
"""


def run(kernel, seed):
    """One launch of a kernel of faults.cu; its results."""
    library = simulate.build(FAULTS)
    x, out = np.arange(1.0, 65.0), np.zeros(64)
    blocks = 2 if "block" in kernel else 1
    library.launch(kernel, blocks, 64, [x, out, 64], 512 - 8 * (kernel == "dynamic_too_small_fault"), seed)
    return out


def line(fault):
    (number,) = (k for k, text in enumerate(FAULTS.read_text().splitlines(), 1) if text.endswith(f"// FAULT {fault}"))
    return number


def available(mode):
    return simulate.missing(mode) is None


@pytest.fixture(scope="module")
def processes():
    """{(mode, fault): finished process} for every fault of the sanitizers, and {(mode, "cured"): ...}."""
    modes = [m for m in ("address", "thread") if available(m)]
    cured = [f"{name}_cured" for name in (*REPORTS, *UNWRITTEN)]
    work = {(m, "cured"): cured for m in modes}
    work |= {(m, name): [f"{name}_fault"] for name, (m, _) in REPORTS.items() if m in modes}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda m: simulate.compile_library(FAULTS, m), modes))
        done = pool.map(lambda k: simulate.python(k[0], "-c", RUN, str(FAULTS.parents[1]), *work[k]), work)
        return dict(zip(work, done, strict=True))


@pytest.mark.parametrize("fault", [f for f, (mode, _) in REPORTS.items() if mode == "plain"])
def test_faults_found_by_the_simulator(fault):
    for seed in (0, 1, 2):
        with pytest.raises(
            simulate.SimulationError, match=f"{re.escape(REPORTS[fault][1])} at faults.cu:{line(fault)},"
        ):
            run(f"{fault}_fault", seed)


@pytest.mark.parametrize("fault", [f for f, (mode, _) in REPORTS.items() if mode != "plain"])
def test_faults_found_by_the_sanitizers(fault, processes):
    mode, text = REPORTS[fault]
    if not available(mode):
        pytest.skip(simulate.missing(mode))
    process = processes[mode, fault]
    assert process.returncode == simulate.FOUND, process.stdout + process.stderr
    assert text in process.stderr
    assert re.search(rf"faults\.cu:{line(fault)}\b", process.stderr), process.stderr


@pytest.mark.parametrize("mode", ["address", "thread"])
def test_sanitizers_find_nothing_in_the_cured_kernels(mode, processes):
    if not available(mode):
        pytest.skip(simulate.missing(mode))
    process = processes[mode, "cured"]
    assert (process.returncode, process.stdout) == (0, "no report\n"), process.stdout + process.stderr
    assert "ERROR" not in process.stderr
    assert "data race" not in process.stderr


@pytest.mark.parametrize("fault", UNWRITTEN)
def test_shared_memory_is_nan_until_it_is_written(fault):
    for seed in (0, 1, 2):
        assert np.isnan(run(f"{fault}_fault", seed)).sum() == UNWRITTEN[fault]


@pytest.mark.parametrize("name", [*REPORTS, *UNWRITTEN])
def test_cured_kernels_run(name):
    results = [run(f"{name}_cured", seed) for seed in (0, 1, 2)]
    assert np.isfinite(results).all()
    if name not in ("divergent_barrier", "shuffle_as_fence"):
        assert np.any(results[0] != 0)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_every_fault_has_its_row():
    names = {k.removesuffix("_fault") for k in simulate.build(FAULTS).kernels if k.endswith("_fault")}
    assert names == REPORTS.keys() | UNWRITTEN.keys()


# What the words of CUDA mean, against NumPy

WORDS = r"""
namespace ntk {
constexpr int kThreads = 96;

struct Point {
    double x;
    int k;
};

extern "C" __global__ void indices(int* out) {
    const dim3 g = gridDim, b = blockDim;
    const int block = blockIdx.x + g.x * (blockIdx.y + g.y * blockIdx.z);
    const int thread = threadIdx.x + b.x * (threadIdx.y + b.y * threadIdx.z);
    out[block * b.x * b.y * b.z + thread] = 1 + block * 1000 + thread;
}
extern "C" __global__ void shuffles(int kind, int by, int width, const int* v, int* out) {
    const unsigned all = 0xffffffffu;
    const int t = threadIdx.x, x = v[t];
    out[t] = kind == 0   ? __shfl_sync(all, x, by, width)
             : kind == 1 ? __shfl_up_sync(all, x, by, width)
             : kind == 2 ? __shfl_down_sync(all, x, by, width)
                         : __shfl_xor_sync(all, x, by, width);
}
// Halves of a warp meet a different number of times before all do.
extern "C" __global__ void halves(const double* v, double* out) {
    const int t = threadIdx.x;
    double x = v[t];
    const unsigned half = t % 32 < 16 ? 0xffffu : 0xffff0000u;
    for (int k = 0; k < (t % 32 < 16 ? 3 : 2); ++k) x += __shfl_xor_sync(half, x, 1 << k);
    out[t] = __shfl_xor_sync(0xffffffffu, x, 16);
}
extern "C" __global__ void votes(const int* v, unsigned* out) {
    const int t = threadIdx.x;
    out[3 * t] = __ballot_sync(0xffffffffu, v[t] > 0);
    out[3 * t + 1] = __any_sync(0xffffffffu, v[t] > 1);
    out[3 * t + 2] = __all_sync(0xffffffffu, v[t] > 0);
}
extern "C" __global__ void votes_of_blocks(const int* v, int* out, int n) {
    for (int k = 0; k < n; ++k) {
        const int at = (blockIdx.x * n + k) * blockDim.x + threadIdx.x;
        out[at] = __syncthreads_or(v[at]);
    }
}
extern "C" __global__ void __launch_bounds__(kThreads, 2) atomics(const int* v, int* out, unsigned long long* count) {
    const int x = v[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(&out[0], x);
    atomicMax(&out[1], x);
    atomicMin(&out[2], x);
    atomicAdd(count, 1);
}
extern "C" __global__ void order(int* count, int* out) { out[threadIdx.x] = atomicAdd(count, 1); }
extern "C" __global__ void arguments(double* out, const double* null, Point p, float f, long long n, bool b) {
    out[0] = p.x + p.k, out[1] = f, out[2] = double(n), out[3] = b, out[4] = null == nullptr;
}
}  // namespace ntk
"""


@pytest.fixture(scope="module")
def words():
    return simulate.build(WORDS)


def test_indices_of_blocks_and_threads(words):
    out = np.zeros(24 * 30, np.int32)
    words.launch("indices", (2, 3, 4), (5, 3, 2), [out])
    block, thread = np.divmod(np.arange(720), 30)
    np.testing.assert_array_equal(out, 1 + 1000 * block + thread)


@pytest.mark.parametrize("width", [4, 16, 32])
@pytest.mark.parametrize("by", [0, 1, 3, 9])
def test_shuffles(words, width, by, rng):
    v = rng.integers(0, 1000, 64).astype(np.int32)
    lane = np.arange(64) % 32
    first = lane // width * width
    sources = [
        first + by % width,
        np.where(lane - by >= first, lane - by, lane),
        np.where(lane + by < first + width, lane + by, lane),
        # a later segment may not be read, an earlier one may
        np.where((lane ^ by) // width <= lane // width, lane ^ by, lane),
    ]
    for kind, source in enumerate(sources):
        out = np.zeros(64, np.int32)
        words.launch("shuffles", 1, 64, [kind, by, width, v, out], seed=kind + 1)
        np.testing.assert_array_equal(out, v[np.arange(64) // 32 * 32 + source])


def test_parts_of_a_warp_meet_by_themselves(words, rng):
    v = rng.integers(0, 100, 64).astype(float)
    wanted = np.empty((2, 2, 16))
    for k, half in enumerate(np.moveaxis(v.reshape(2, 2, 16), 1, 0)):
        size = 8 if k == 0 else 4
        wanted[:, 1 - k] = half.reshape(2, -1, size).sum(2).repeat(size, axis=1)
    for seed in range(4):
        out = np.zeros(64)
        words.launch("halves", 1, 64, [v, out], seed=seed)
        np.testing.assert_array_equal(out, wanted.ravel())


def test_votes(words):
    v = np.zeros(64, np.int32)
    v[[1, 31]] = 1
    v[32:] = 2
    out = np.zeros((64, 3), np.uint32)
    words.launch("votes", 1, 64, [v, out], seed=3)
    assert set(map(tuple, out[:32].tolist())) == {(1 << 31 | 2, 0, 0)}
    assert set(map(tuple, out[32:].tolist())) == {(0xFFFFFFFF, 1, 1)}


def test_votes_of_blocks(words):
    v = np.zeros((2, 6, 64), np.int32)
    v[0, 1, 63], v[0, 2, 5], v[1, 0, 0], v[1, 5] = 1, -7, 4, 1
    for seed in range(3):
        out = np.full_like(v, -1)
        words.launch("votes_of_blocks", 2, 64, [v, out, 6], seed=seed)
        assert np.array_equal(out != 0, (v != 0).any(axis=2, keepdims=True) & np.ones_like(v, bool))


def test_atomics(words, rng):
    v = rng.integers(-1000, 1000, 4 * 96).astype(np.int32)
    out, count = np.zeros(3, np.int32), np.zeros(1, np.uint64)
    words.launch("atomics", 4, 96, [v, out, count], seed=1)
    assert out.tolist() == [v.sum(), max(0, v.max()), min(0, v.min())]
    assert count[0] == v.size


def test_the_seed_gives_the_order_of_threads(words):
    def order(seed):
        count, out = np.zeros(1, np.int32), np.zeros(96, np.int32)
        words.launch("order", 1, 96, [count, out], seed=seed)
        assert sorted(out) == list(range(96))
        return out.tolist()

    assert order(0) == list(range(96))
    assert order(1) == order(1)
    assert order(1) != order(2) != order(0)


# Launches that CUDA refuses, or that would give a kernel something else than it expects


def test_arguments(words):
    assert words.signature("arguments") == ["p", "p", "s16", "f4", "i8", "i1"]
    point = np.zeros((), np.dtype([("x", "f8"), ("k", "i4")], align=True))
    point["x"], point["k"] = 0.5, 7
    out = np.zeros(5)
    for value in (point, point.reshape(1), point.tobytes()):
        out[:] = 0
        words.launch("arguments", 1, 1, [out, None, value, np.float32(0.25), -(1 << 40), True])
        assert out.tolist() == [7.5, 0.25, -float(1 << 40), 1, 1]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, b"12345678", "8 bytes for a structure of 16"),
        (3, 0.5, "float for a parameter f4"),
        (3, np.float64(0.5), "float64 for a parameter f4"),
        (4, np.int32(1), "int32 for a parameter i8"),
        (4, 1.0, "float for a parameter i8"),
        (5, 1000, "1000 does not fit a parameter i1"),
    ],
)
def test_arguments_that_do_not_fit(words, place, value, message):
    arguments = [np.zeros(5), None, bytes(16), np.float32(0), 1, True]
    words.launch("arguments", 1, 1, arguments)
    arguments[place] = value
    with pytest.raises(simulate.SimulationError, match=f"arguments, argument {place}: {message}"):
        words.launch("arguments", 1, 1, arguments)
    with pytest.raises(simulate.SimulationError, match="takes 6 arguments, not 5"):
        words.launch("arguments", 1, 1, arguments[:5])


@pytest.mark.parametrize(
    ("kernel", "grid", "block", "shared", "message"),
    [
        ("indices", 1, 1025, 0, "block beyond 1024 threads"),
        ("indices", 1, (1, 1, 65), 0, "block beyond 1024 threads or 64 in z"),
        ("indices", (1, 65536), 1, 0, "grid beyond"),
        ("indices", 0, 1, 0, "empty grid"),
        ("indices", 1, 1, 48 * 1024 + 1, "49152 allowed"),
        ("atomics", 1, 97, 0, "__launch_bounds__"),
        ("nothing", 1, 1, 0, "no kernel nothing"),
    ],
)
def test_launches_that_cuda_refuses(words, kernel, grid, block, shared, message):
    arguments = [np.zeros(4096, np.int32)] * {"indices": 1, "atomics": 3}.get(kernel, 0)
    with pytest.raises(simulate.SimulationError, match=message):
        words.launch(kernel, grid, block, arguments, shared)


def test_a_changed_header_is_a_new_library(tmp_path):
    (tmp_path / "value.h").write_text("#define VALUE 1\n")
    source = tmp_path / "value.cu"
    source.write_text('#include "value.h"\nextern "C" __global__ void value(double* out) { *out = VALUE; }\n')
    out = np.zeros(1)
    simulate.build(source, csrc=tmp_path).launch("value", 1, 1, [out])
    assert out == 1
    (tmp_path / "value.h").write_text("#define VALUE 2\n")
    simulate.build(source, csrc=tmp_path).launch("value", 1, 1, [out])
    assert out == 2


def test_errors_of_the_compiler_are_shown():
    with pytest.raises(simulate.SimulationError, match="unknown_word"):
        simulate.build('extern "C" __global__ void f(int* p) {\n unknown_word(p); }\n')
    with pytest.raises(simulate.SimulationError, match="no kernel of the form"):
        simulate.build("__global__ void f(int* p) {\n}\n")

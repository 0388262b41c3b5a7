"""Every kernel of csrc/cuda, run on the CPU by the simulator, against the CPU's own kernels (convolutional networks in
test_conv_kernels.py).

The tests run in the simulator's plain mode; `test_sanitizers` runs them again under the sanitizers of addresses and
undefined behaviour, and of threads.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
import simulate
from conftest import assert_close, tolerance

import ntkfast as nf
from ntkfast._cuda import gram as gpu_gram
from ntkfast._cuda import layout
from ntkfast._plan import mix_of
from ntkfast._problem import Problem

pytestmark = pytest.mark.skipif(simulate.missing(simulate.mode()) is not None, reason="the simulator cannot run here")

KINDS = ("ntk", "nngp", "last_hidden")
DENSE, RESIDUAL, BOTTLENECK = nf.Dense, nf.Residual, nf.Bottleneck

HOMOGENEOUS = {
    "fully connected 1": nf.fully_connected(1),
    "fully connected 12": nf.fully_connected(12),  # all three ranges of the fits
    "abs": nf.fully_connected(3, "abs"),
    "leaky": nf.fully_connected(2, nf.Activation.leaky_relu(-0.4)),
    "identity": nf.fully_connected(2, "identity", readout_trained=False),
    "residual": nf.resnet(5),
    "negative skip": nf.Network([DENSE("relu"), RESIDUAL("relu", scale=0.7, skip=-0.5), RESIDUAL("abs", scale=-0.3)]),
    "bottleneck": nf.bottleneck_resnet(4, first_trained=True, readout_trained=True),
    "fixed readout": nf.fixed_readout_resnet(3, last_width_ratio=1.5),
    "readout with bias": nf.Network([DENSE("relu")] * 2, nf.Readout(weight_variance=0.6, bias_variance=0.3)),
}
GENERAL = {
    "biases": nf.Network([DENSE("relu", bias_variance=0.2)] * 3, nf.Readout(bias_variance=0.1)),
    "residual with biases": nf.Network([DENSE("relu"), *[RESIDUAL("relu", scale=0.5, bias_variance=0.1)] * 2]),
    "all biases": nf.Network([BOTTLENECK("leaky_relu", scale=0.5, bias_variance=0.1, outer_bias_variance=0.2)] * 2),
    "mixed": nf.Network(
        [
            DENSE("relu", gain=3.0, weight_variance=0.7),
            DENSE("abs"),
            DENSE("gelu"),
            RESIDUAL("sin", scale=0.5, trained=False),
        ]
    ),
    # both sides have the same expansions: coarse ones, but of more terms than a block takes at a time (kTerms)
    "silu, residual": nf.resnet(3, nf.Activation("silu").with_tolerance(1e-5)),
    "softplus": nf.fully_connected(2, nf.Activation("softplus").with_tolerance(1e-6)),
    "tanh": nf.fully_connected(2, nf.Activation("tanh").with_tolerance(1e-5)),
    "even function": nf.fully_connected(
        2, nf.Activation.from_function(lambda u: 1 / (1 + np.cosh(u / 2)), name="bell")
    ),
    "exp": nf.Network([DENSE("exp", gain=0.2, weight_variance=0.1), RESIDUAL("exp", scale=0.3, weight_variance=0.1)]),
} | {name: nf.resnet(2, name) for name in ("erf", "gelu", "sin", "cos", "gaussian")}


def points(n, d, dtype=np.float64, seed=0, unit=False):
    """Rows with a duplicate, two close ones, an opposite one, a parallel one and a zero row (unless `unit`)."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    x *= np.random.default_rng(seed + 1).uniform(0.6, 1.4, size=(n, 1)) / np.linalg.norm(x, axis=1, keepdims=True)
    x[n // 2] = x[0]
    x[n // 3] = -x[1]
    x[n - 1] = x[2] * (1 + 1e-7 * np.arange(d))
    x[n - 3] = -x[4] * (1 + 1e-5 * np.arange(d))
    x[n - 2] = 2 * x[3]
    if unit:
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
    x[5] = 0
    return x.astype(dtype)


gpu = fake_cupy.shuffled


def compare(net, x, y=None, dtype=np.float64, **options):
    """Every result on the device against the CPU's, relative to the diagonal."""
    found = nf.gram(net, x, y, get=KINDS, device="cuda", **options)
    wanted = nf.gram(net, x, y, get=KINDS, **options)
    other = x if y is None else y
    for kind, a, b in zip(KINDS, found, wanted, strict=True):
        di, dj = (np.ones(len(z)) if options.get("normalize") else nf.diagonal(net, z, get=kind) for z in (x, other))
        assert a.dtype == dtype
        assert_close(a, b, np.sqrt(np.outer(di, dj).astype(float)), tolerance(net, dtype))
        if y is None:
            assert np.array_equal(a, a.T)
            if options.get("normalize"):
                assert np.isin(np.diag(a), (0, 1)).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", HOMOGENEOUS | GENERAL)
def test_symmetric(gpu, name, dtype):
    compare((HOMOGENEOUS | GENERAL)[name], points(37, 9, dtype), dtype=dtype)


@pytest.mark.parametrize("name", ["residual", "bottleneck", "biases", "gelu", "tanh"])
@pytest.mark.parametrize(("n", "m", "d"), [(33, 70, 3), (1, 17, 40), (16, 1, 1)])
def test_two_sets(gpu, name, n, m, d):
    x, y = points(40, d)[:n], points(75, d, seed=3)[:m]
    compare((HOMOGENEOUS | GENERAL)[name], x, y)
    compare((HOMOGENEOUS | GENERAL)[name], x.astype(np.float32), y.astype(np.float32), np.float32)


@pytest.mark.parametrize("name", ["tanh", "softplus", "silu, residual", "even function"])
def test_rows_of_one_norm(gpu, name):
    """Hermite tables of one variance."""
    compare(GENERAL[name], points(21, 6, unit=True))


@pytest.mark.parametrize("name", ["fully connected 12", "fixed readout", "readout with bias", "all biases", "exp"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_normalised(gpu, name, dtype):
    compare((HOMOGENEOUS | GENERAL)[name], points(33, 4, dtype), dtype=dtype, normalize=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", HOMOGENEOUS | GENERAL)
def test_layer_grams(gpu, name, dtype):
    net, x, y = (HOMOGENEOUS | GENERAL)[name], points(19, 5, dtype), points(24, 5, dtype, seed=2)[:7]
    for other in (None, y):
        found, wanted = nf.layer_grams(net, x, other, device="cuda"), nf.layer_grams(net, x, other)
        di, dj = (nf.diagonal(net, z) for z in (x, x if other is None else y))
        assert found.dtype == dtype
        assert_close(found, wanted, np.sqrt(np.outer(di, dj).astype(float)), tolerance(net, dtype))


def clustered(n, d, dtype):
    """All pairs close, or close to opposite, at distances from 1e-3 to 1e-9."""
    r = np.random.default_rng(5)
    x = r.normal(size=d) + 10.0 ** -r.uniform(3, 9, size=(n, 1)) * r.normal(size=(n, d))
    return (x * r.choice([-1.0, 1.0], size=(n, 1))).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("net", [nf.fully_connected(2), nf.Network([DENSE("relu", bias_variance=0.1)] * 2)], ids=str)
@pytest.mark.parametrize("d", [1, 16, 35])
def test_more_close_pairs_than_the_list_holds(gpu, net, dtype, d):
    x = clustered(45, d, dtype)
    compare(net, x, dtype=dtype)
    compare(net, x[:20], x[20:], dtype=dtype)
    scale = np.sqrt(np.outer(nf.diagonal(net, x), nf.diagonal(net, x)).astype(float))
    found = nf.layer_grams(net, x, device="cuda")
    assert_close(found, nf.layer_grams(net, x), scale, tolerance(net, dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("path", ["table", "recursion"])
def test_tiles_of_strided_arrays_on_the_device(gpu, monkeypatch, path, dtype):
    """Tiles of and off the diagonal, into the middle of a matrix whose other entries stay; one row is very long."""
    monkeypatch.setenv("NTKFAST_PATH", path)
    monkeypatch.setattr(gpu_gram, "RESIDENT", 32)
    net, x = nf.resnet(3), points(70, 7, dtype)
    x[35] *= 1e12 if dtype == np.float32 else 1e130
    whole = gpu.array(np.full((80, 99), 7, dtype))
    nf.gram(net, gpu.array(np.repeat(x, 2, axis=1))[:, ::2], out=whole[4:74, 5:75])
    found = whole.get()
    root = np.sqrt(nf.diagonal(net, x).astype(float))
    assert_close(found[4:74, 5:75], nf.gram(net, x), np.multiply.outer(root, root), tolerance(net, dtype))
    found[4:74, 5:75] = 7
    assert (found == 7).all()


# The table path


@pytest.fixture
def table(gpu, monkeypatch):
    """Compiled kernels on both sides; nothing else may run."""
    monkeypatch.setenv("NTKFAST_PATH", "table")
    yield gpu
    assert {name[:10] for name in gpu.launched if name.startswith("gram_")} == {"gram_table"}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_table(table, name, dtype):
    compare(HOMOGENEOUS[name], points(37, 9, dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("n", "m", "d"), [(33, 70, 3), (1, 17, 40), (16, 1, 1)])
def test_table_of_two_sets(table, dtype, n, m, d):
    x, y = points(40, d, dtype)[:n], points(75, d, dtype, seed=3)[:m]
    compare(HOMOGENEOUS["negative skip"], x, y, dtype)
    compare(HOMOGENEOUS["readout with bias"], x, y, dtype, normalize=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ["all biases", "mixed", "erf", "tanh", "softplus"])
def test_table_of_rows_of_one_norm(table, name, dtype):
    """Any layers; n is no multiple of the square."""
    net = GENERAL[name]
    x = points(45, 6, dtype, unit=True)
    compare(net, x, dtype=dtype, normalize=True)
    compare(net, x[:7], x, dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("d", [1, 35])
def test_table_of_more_close_pairs_than_the_list_holds(table, dtype, d):
    x, net = clustered(45, d, dtype), nf.fully_connected(3)
    compare(net, x, dtype=dtype)
    compare(net, x[:20], x[20:], dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_tables_of_both_lengths_side_by_side(table, dtype):
    """Against the recursion: within 1.2e-14 (8e-7) of max |f|, the worst a table may have (csrc/table_compiler.cpp)."""
    net, x = nf.Network([DENSE("abs")] * 60), points(50, 4, dtype)
    tables = Problem(net, x, None, None, None).path([mix_of(net, kind) for kind in KINDS]).tables
    assert len({len(t.arrays()[0]) for t in tables}) == 2
    found = nf.gram(net, x, get=KINDS, device="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NTKFAST_PATH", "recursion")
        wanted = nf.gram(net, x, get=KINDS)
    bound = (1.2e-14 if dtype == np.float64 else 8e-7) + tolerance(net, dtype)
    for kind, a, b in zip(KINDS, found, wanted, strict=True):
        d = nf.diagonal(net, x, get=kind).astype(float)
        assert_close(a, b, np.sqrt(np.outer(d, d)), bound)


def test_close_pairs_do_not_come_from_products(gpu):
    """An angle of 1e-7 from an inner product would be off by a tenth, and so would 1 - K of depth 1."""
    x = np.array([[1.0, 0.0], [1.0, 1e-7], [-1.0, 2e-7]])
    found = nf.gram(nf.fully_connected(1, readout_trained=False), x, device="cuda")
    assert 1 - found[0, 1] == pytest.approx(1e-7 / math.pi, rel=1e-6)
    assert found[0, 2] == pytest.approx(-2e-7 / math.pi, rel=1e-6)


def test_deep_networks(gpu):
    for net in (nf.fully_connected(200), nf.resnet(60), nf.resnet(30, "erf")):
        compare(net, points(18, 4))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (9, 31), (17, 100)])
def test_norms_of_rows(gpu, dtype, n, d):
    x = np.random.default_rng(1).normal(size=(n, d)).astype(dtype) * np.geomspace(1e-6, 1e6, d).astype(dtype)
    rows = gpu.array(np.pad(x, ((0, 0), (0, 3)), constant_values=np.nan))[:, :d]
    squares, largest = (gpu.empty((n,), np.float64) for _ in range(2))
    kernels = gpu.RawModule(path=str(simulate.CSRC / "cuda" / "points.cu"))
    size = tuple(np.int64(k) for k in (n, d, d + 3))
    suffix = layout.suffix_of(dtype)
    kernels.get_function(f"squares_{suffix}")((-(-n // 8),), (256,), (rows, *size, squares, largest))
    exact = [math.fsum(float(v) ** 2 for v in row) for row in x]
    assert np.allclose(squares.get(), exact, rtol=3e-16 if dtype == np.float32 else 1e-15, atol=0)
    assert np.array_equal(largest.get(), np.abs(x).max(axis=1).astype(np.float64))
    exponent = np.arange(n) * 9 - 30
    out = gpu.empty((n, d), dtype)
    kernels.get_function(f"scale_{suffix}")((-(-n // 8),), (256,), (rows, *size, gpu.array(exponent), out))
    assert np.array_equal(out.get(), np.ldexp(x, -exponent[:, None]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norms_see_what_is_not_finite(gpu, bad):
    x = np.ones((3, 70))
    x[1, 65] = bad
    with pytest.raises(ValueError, match="X must be finite: row 1 holds NaN or infinity"):
        nf.gram(nf.fully_connected(1), gpu.array(x))


def test_the_host_packs_the_structs_of_the_kernels():
    sizes = np.full(40, -1)
    simulate.build("csrc/cuda/layout.cu").launch("layout", 1, 1, [sizes])
    dtypes = np.float64, np.float32
    records = [layout.JOB, *map(layout.prefix_layer, dtypes), layout.GENERAL_LAYER, layout.HERMITE_TABLE]
    wanted = [r.itemsize for r in (*records, *map(layout.table_panels, dtypes), layout.CONV_JOB)]
    wanted += [*layout.CONV_LAYER.values(), layout.CONV_MEMORY]
    wanted += [layout.SHARED[module, dtype] for module in layout.SQUARE for dtype in ("f64", "f32")]
    assert sizes.tolist() == wanted + [-1] * (40 - len(wanted))


SOURCES = sorted((simulate.CSRC / "cuda").glob("*.cu"))


@pytest.fixture(scope="module", autouse=True)
def report():
    """What ran, for test_sanitizers."""
    yield
    if simulate.mode() != "plain":
        print("kernels:", *sorted(simulate.LAUNCHED))


@pytest.mark.slow
@pytest.mark.skipif(simulate.mode() != "plain", reason="this test starts the other modes")
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_sanitizers(mode):
    """Everything above again; every kernel that there is must have run, with nothing to report."""
    if simulate.missing(mode):
        pytest.skip(simulate.missing(mode))
    simulate.build_all(SOURCES, mode)
    files = [__file__, *(str(Path(__file__).with_name(f"test_{name}_kernels.py")) for name in ("conv", "jacobian"))]
    done = simulate.python(mode, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *files, timeout=1500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout
    assert not any(word in done.stderr for word in ("ERROR", "data race", "runtime error"))
    lines = re.findall("kernels: (.*)$", done.stdout, re.M)
    assert len(lines) == len(files)
    ran = {name for line in lines for name in line.split()}
    assert ran == {name for path in SOURCES for name in simulate.compile_library(path, mode)[1]}

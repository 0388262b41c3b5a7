"""The kernels of convolutional networks on the simulator, against the CPU's own and against the definition."""

from __future__ import annotations

import conv_oracle
import fake_cupy
import numpy as np
import pytest
import simulate
from conftest import assert_close
from test_conv import hard_images, photographs
from test_kernels import report  # noqa: F401

import ntkfast as nf
from ntkfast._cuda import conv, layout
from ntkfast.reference import convolution as reference

pytestmark = pytest.mark.skipif(simulate.missing(simulate.mode()) is not None, reason="the simulator cannot run here")

KINDS = ("ntk", "nngp", "last_hidden")
#: Sanitizers make everything ten times slower: they see every kernel and every kind of window, with fewer images.
PLAIN = simulate.mode() == "plain"
MANY = 6 if PLAIN else 3
DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32])
READOUTS = pytest.mark.parametrize("readout", ["flatten", "gap"])
#: largest |difference of CPU and device| / sqrt(K_ii K_jj): both round, in different order; measured 4e-15 and 3e-7
BOUND = {np.float64: 2e-14, np.float32: 1e-6}
#: the same where patches are nearly multiples of each other, as in tests/test_conv.py
HARD = {np.float64: 1e-12, np.float32: 2e-6}

#: (network, grid)
FAST = {
    "flatten": (nf.conv_net(3), (5, 9)),
    "pooled": (nf.conv_net(3, readout="gap"), (5, 9)),
    "pooled, circular": (nf.conv_net(3, padding="circular", readout="gap"), (5, 7)),
    "residual": (nf.conv_resnet(3), (4, 6)),
    "residual, pooled": (nf.conv_resnet(3, c_res=2.0, readout="gap"), (6, 5)),
    "one row": (nf.conv_net(2, readout="gap"), (1, 7)),
    "one axis": (nf.conv_resnet(2, padding="circular", window=5, readout="gap"), (9,)),
    "abs, frozen": (nf.conv_net(2, "abs", first_trained=False, gain=0.7, padding="circular"), (4, 5)),
    "33 wide": (nf.conv_net(2), (9, 33)),
    "33 wide, pooled": (nf.conv_net(2, readout="gap"), (2, 33)),
    "window 1": (nf.conv_net(2, window=1, readout="gap"), (2, 3)),
    "window 5": (nf.conv_net(2, window=5, readout="gap"), (7, 6)),
    "window 5 x 1": (nf.conv_resnet(2, window=(5, 1), readout="gap"), (6, 3)),
    "window 9": (nf.conv_net(2, window=9, padding="circular", readout="gap"), (3, 4)),
}
BIASED = nf.conv_net(2, bias_variance=0.2, weight_variance=0.9, readout="gap")
GENERAL = {
    "biases": (BIASED, (3, 5)),
    "biases, flatten": (nf.conv_net(2, "leaky_relu", bias_variance=0.2, padding="circular"), (5, 9)),
    "erf": (nf.conv_net(2, "erf", readout="gap"), (3, 4)),
    "erf, residual": (nf.conv_resnet(2, "erf", c_res=-0.7, padding="circular", readout="gap", window=(3, 1)), (4, 3)),
    "tanh": (nf.conv_net(2, nf.Activation("tanh").with_tolerance(1e-5), readout="gap"), (2, 3)),
    "silu, residual": (nf.conv_resnet(2, nf.Activation("silu").with_tolerance(1e-5)), (3, 4)),
    "silu, one variance": (nf.conv_net(1, nf.Activation("silu").with_tolerance(1e-5), window=1), (3, 4)),
} | {name: (nf.conv_net(2, name, bias_variance=0.1), (3, 4)) for name in ("gelu", "sin", "cos", "gaussian", "exp")}


def images(n, grid, dtype=np.float64, seed=0, channels=2):
    """Images with a copy, its opposite, a zero border, an empty one and a plain background."""
    x = 0.3 * np.random.default_rng(seed).standard_normal((n, *grid, channels))
    if n > 5:
        x[n // 2], x[n // 3], x[4] = x[0], -x[0], 0
        x[3, ..., : grid[-1] // 2, :] = 0
        x[5, 1:] = 0.25
    return x.astype(dtype)


gpu = fake_cupy.shuffled


def scale(net, x, y=None, kind="ntk"):
    """sqrt(K_ii K_jj); at least a twentieth of the largest: what empty images leave rounds as E and F do."""
    di, dj = (nf.diagonal(net, z, get=kind).astype(float) for z in (x, x if y is None else y))
    root = np.sqrt(np.outer(di, dj))
    return np.maximum(root, 0.05 * root.max())


def compare(net, x, y=None, **options):
    """Every result on the device against the CPU's."""
    found, wanted = (nf.gram(net, x, y, get=KINDS, device=device, **options) for device in ("cuda", None))
    for kind, a, b in zip(KINDS, found, wanted, strict=True):
        assert a.dtype == x.dtype
        assert_close(a, b, 1 if options.get("normalize") else scale(net, x, y, kind), BOUND[x.dtype.type])
        if y is None:
            assert np.array_equal(a, a.T)


IN_SINGLE = ("flatten", "pooled, circular", "residual, pooled", "33 wide, pooled", "window 5")
IN_DOUBLE = tuple(FAST) if PLAIN else ("flatten", "pooled", "residual", "one axis", "window 5 x 1")


@pytest.mark.parametrize(
    ("name", "dtype"), [(k, np.float64) for k in IN_DOUBLE] + [(k, np.float32) for k in IN_SINGLE[: 5 if PLAIN else 3]]
)
def test_fast(gpu, name, dtype):
    net, grid = FAST[name]
    x = images(MANY if "33" not in name else 3, grid, dtype)
    compare(net, x)
    assert (nf.gram(net, x, images(6, grid, dtype)[4:5], device="cuda") == 0).all()
    seams = net.pooling == "gap" and net.padding == "zeros"
    kernel = "gram_conv_seams" if seams else "gram_conv_fast"
    again = set() if any(isinstance(layer, nf.Residual) for layer in net.layers) else {"gram_conv_exact"}
    assert {name[:-4] for name in gpu.launched} == {"conv_layers", "conv_images_fast", kernel, "conv_results"} | again


@pytest.mark.parametrize("name", GENERAL if PLAIN else ["biases", "erf, residual", "tanh", "silu, one variance"])
def test_general(gpu, name):
    net, grid = GENERAL[name]
    x = images(MANY, grid)
    if "one variance" in name:
        x /= np.sqrt((x**2).sum(axis=-1, keepdims=True)) + (x == 0).all(axis=-1, keepdims=True)
        x = x[(x != 0).any(axis=-1).all(axis=(1, 2))]
    compare(net, x)
    compare(net, x[:3].astype(np.float32), x[1:2].astype(np.float32))
    assert "gram_conv_general_f64" in gpu.launched


@pytest.mark.parametrize("dtype", [np.float64, np.float32] if PLAIN else [np.float32])
@pytest.mark.parametrize(("name", "n", "m"), [("flatten", 1, 1), ("flatten", 7 if PLAIN else 2, 3), ("one axis", 2, 5)])
def test_two_sets(gpu, name, n, m, dtype):
    net, grid = FAST[name]
    x, y = images(n, grid, dtype), images(m, grid, dtype, seed=1)
    compare(net, x, y)
    compare(net, x if n > m else y, normalize=True)


@pytest.mark.parametrize("name", ["pooled", "residual", "window 5"])
def test_the_definition(gpu, name):
    net, grid = FAST[name]
    x = images(3, grid)
    wanted, own = reference.gram(net, x), reference.diagonals(net, x)
    for kind, found in zip(KINDS, nf.gram(net, x, get=KINDS, device="cuda"), strict=True):
        assert_close(found, wanted[kind], np.sqrt(np.outer(own[kind], own[kind])), 1e-12)


@pytest.mark.parametrize("readout", ["flatten", "gap"])
@pytest.mark.parametrize("window", [3, (5, 3), (7, 3), (5, 5)], ids=str)
def test_a_circular_row_is_seen_again_and_again(gpu, window, readout):
    net, x = nf.conv_net(2, window=window, padding="circular", readout=readout), images(3, (1, 4))
    wanted, own = reference.gram(net, x), reference.diagonals(net, x)
    for kind, found in zip(KINDS, nf.gram(net, x, get=KINDS, device="cuda"), strict=True):
        assert_close(found, wanted[kind], np.sqrt(np.outer(own[kind], own[kind])), 1e-12)


WINDOWS = pytest.mark.parametrize(("padding", "window"), [
    (padding, window) for padding in ("zeros", "circular") for window in (1, 3, 5)
] if PLAIN else [("zeros", 3), ("circular", 5)])  # fmt: skip


@READOUTS
@WINDOWS
def test_multiples_keep_their_digits(gpu, readout, padding, window):
    """s(c u) = c s(u): the kernel of an image and its multiple is a multiple of the kernel of the image and itself."""
    for grid in ((5, 9), (7,)) if PLAIN else ((5, 9),):
        x = images(1, grid)
        y = np.array([x[0] / 3, -x[0] / 3])
        options = {"window": window, "padding": padding, "readout": readout}
        nets = [nf.conv_net(1, **options), nf.conv_net(2, "abs", **options), nf.conv_net(9, gain=9.0, **options),
                nf.conv_net(3, nf.Activation.leaky_relu(-0.3), first_trained=False, **options)]  # fmt: skip
        for net in nets if PLAIN else nets[::3]:
            wanted = nf.gram(net, x, np.array([x[0], -x[0]]), get=KINDS)
            for dtype, bound in HARD.items():
                found = nf.gram(net, x, y, get=KINDS, dtype=dtype, device="cuda")
                for kind, a, b in zip(KINDS, found, wanted, strict=True):
                    assert_close(3 * a, b, nf.diagonal(net, x, get=kind)[0], bound)


@pytest.mark.parametrize("readout", ["flatten", "gap"])
@pytest.mark.parametrize("dtype", HARD)
def test_what_skips_lose_of_multiples(gpu, readout, dtype):
    """The bound of the docstring of conv_net."""
    net, x = nf.conv_resnet(3, readout=readout), images(1, (5, 6))
    wanted, size = nf.gram(net, x, x), nf.diagonal(net, x)[0]
    for c in (1.5, 3.0, 200.0):
        found = nf.gram(net, x.astype(dtype), (x / c).astype(dtype), device="cuda") * c
        assert_close(found, wanted, size, np.sqrt(c) * {np.float64: 1e-8, np.float32: 2e-4}[dtype])
    assert not any(name.startswith("gram_conv_exact") for name in gpu.launched)


def hard(grid):
    """Photographs on backgrounds of other brightness, their multiples and copies, plain ones and an empty one."""
    x = photographs(*grid)
    x[5], x[4, ..., :2, :] = 0, 0
    return x if PLAIN else x[:4]


@READOUTS
@WINDOWS
def test_backgrounds_keep_their_digits(gpu, readout, padding, window):
    """Some planes of a unit, some units of a block are done again; images with themselves too."""
    for grid in ((8, 11), (4, 5)) if PLAIN and readout == "flatten" else ((4, 5),):
        net, x = nf.conv_net(3, window=window, padding=padding, readout=readout), hard(grid)
        for dtype, bound in HARD.items():
            found, wanted = (nf.gram(net, x, dtype=dtype, device=device) for device in ("cuda", None))
            assert_close(found, wanted, scale(net, x), bound)


@pytest.mark.skipif(not PLAIN, reason="40 digits take long; the kernels run above, under the sanitizers too")
@READOUTS
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_hard_images_against_forty_digits(gpu, readout, padding):
    net, x, pairs = nf.conv_net(4, padding=padding, readout=readout), hard_images(), ((0, 1), (1, 2), (0, 5), (1, 4))
    own = {i: conv_oracle.pair(net, x[i], x[i])["ntk"] for i in {i for pair in pairs for i in pair}}
    found = {dtype: nf.gram(net, x, dtype=dtype, device="cuda") for dtype in HARD}
    for i, j in pairs:
        wanted = conv_oracle.pair(net, x[i], x[j])["ntk"]
        for dtype, bound in HARD.items():
            assert_close(found[dtype][i, j], float(wanted), float(own[i] * own[j]) ** 0.5, bound)


@pytest.mark.parametrize("depth", [1, 2])
def test_only_planes_that_lost_digits_are_done_again(gpu, monkeypatch, depth):
    """A bit each; a network of one layer has added up what it lost, and does the planes of a unit again."""
    launch, lost = conv.ConvWorker._launch_units, []

    def look(worker, scratch, record):
        launch(worker, scratch, record)
        lost.append(scratch.parts.get()[: 4 * record["last_unit"][0]].reshape(-1, worker.shape.chunks, 4)[..., 3])

    x, net = images(2, (5, 9)), nf.conv_net(depth, readout="gap")
    monkeypatch.setattr(conv.ConvWorker, "_launch_units", look)
    nf.gram(net, x[:1], np.array([x[0] / 3, x[1], x[0]]), device="cuda")
    *_, found = lost
    wanted = np.zeros((3, 3))
    wanted[0, 0] = 1 if depth > 1 else 2**32 - 1
    assert np.array_equal(found, wanted)


@DTYPES
@pytest.mark.parametrize("net", [
    nf.conv_net(3, first_trained=False, bias_variance=0.3),
    nf.conv_resnet(3, "erf", window=(1, 3)),
    nf.conv_net(2, padding="circular", readout_trained=False),
], ids=["biases", "residual", "circular"])  # fmt: skip
def test_layer_grams(gpu, net, dtype):
    x, y = images(MANY, (4, 5), dtype), images(2, (4, 5), dtype, seed=5)
    for other in (None, y):
        found, wanted = (nf.layer_grams(net, x, other, device=device) for device in ("cuda", None))
        assert found.dtype == dtype
        assert_close(found, wanted, scale(net, x, other), BOUND[dtype])


@pytest.mark.parametrize(("name", "dtype"), [("flatten", np.float64), ("residual, pooled", np.float32)])
def test_planes_in_global_memory(monkeypatch, name, dtype):
    """A device whose blocks have hardly any shared memory; fewer blocks than units."""
    gpu = fake_cupy.install(monkeypatch, shared=9300)
    monkeypatch.setattr(conv, "_BLOCKS", 3)
    net, grid = FAST[name]
    compare(net, images(MANY - 1, grid, dtype))
    suffix = layout.suffix_of(dtype)
    again = {f"gram_conv_exact_far_{suffix}"} if name == "flatten" else set()
    assert {k for k in gpu.launched if k.startswith("gram")} == {f"gram_conv_far_{suffix}"} | again
    net, x = nf.conv_net(2, readout="gap"), hard((4, 5)).astype(dtype)
    assert_close(nf.gram(net, x, device="cuda"), nf.gram(net, x), scale(net, x), HARD[dtype])


def test_general_planes_in_global_memory(monkeypatch):
    gpu = fake_cupy.install(monkeypatch, shared=9300)
    monkeypatch.setattr(conv, "_BLOCKS", 3)
    compare(BIASED, images(3, (3, 5)))
    net, x = nf.conv_net(3, padding="circular"), images(3, (4, 5))
    found, wanted = (nf.layer_grams(net, x, device=device) for device in ("cuda", None))
    assert_close(found, wanted, scale(net, x), BOUND[np.float64])
    assert {k for k in gpu.launched if k.startswith("gram")} == {"gram_conv_general_far_f64"}


def test_images_of_64(gpu):
    """More strips than threads, more shared memory than a block has without asking."""
    x = images(2, (64, 64), channels=1)
    compare(nf.conv_net(2), x)
    assert conv.Shape.of(64, 64, True, True, 8, 227 << 10).shared > 48 << 10


def test_the_shape_of_a_launch():
    """Threads are not idle, planes have room, and what does not fit goes to global memory."""
    for height, width in ((32, 32), (28, 28), (64, 64), (33, 32), (8, 8), (1, 1), (1, 450), (5, 9), (31, 17)):
        for fast, item in ((True, 4), (True, 8), (False, 8)):
            for limit in (48 << 10, 64 << 10, 227 << 10):
                s = conv.Shape.of(height, width, True, fast, item, limit)
                strips = -(-height // (16 // item if fast else 1)) * width
                assert s.threads <= 256
                assert s.threads % 32 == 0
                assert s.shared <= limit
                assert s.chunks * s.run >= height * width > (s.chunks - 1) * s.run
                rounds = -(-s.groups * strips // s.threads)
                assert s.groups == 1 or rounds == 1
                if limit == 227 << 10:
                    assert s.groups * strips / (rounds * s.threads) > 0.75 or (height, width) in (
                        (1, 1),
                        (8, 8),
                        (5, 9),
                    )
    assert conv.Shape.of(32, 32, False, True, 4, 48 << 10) == conv.Shape(1024, 1, 256, 9216 + 16384, 0, 1, 1)
    assert conv.Shape.of(64, 64, True, False, 8, 99 << 10).planes == 6 * 4096 * 8


@pytest.mark.parametrize("name", ["residual", "one axis", "erf, residual", "hard"] if PLAIN else ["one axis"])
def test_results_do_not_depend_on_the_launches(gpu, monkeypatch, name):
    net, grid = (FAST | GENERAL).get(name, (nf.conv_net(3, readout="gap"), (4, 5)))
    x, y = images(MANY, grid), images(3, grid, seed=2)
    if name == "hard":
        x, y = hard(grid), hard(grid)[1::2] / 2
    whole = nf.gram(net, x, device="cuda"), nf.gram(net, x, y, device="cuda")
    count = len(gpu.launched)
    monkeypatch.setattr(conv, "LAUNCH", dict.fromkeys(conv.LAUNCH, 1000))
    monkeypatch.setattr(conv, "_PARTS", 1500)
    monkeypatch.setattr(conv, "_SQUARE", 2)
    monkeypatch.setattr(conv, "_IMAGES", 40000)
    gpu.seed = 123
    parts = nf.gram(net, x, device="cuda"), nf.gram(net, x, y, device="cuda")
    assert len(gpu.launched) > 2 * count
    for a, b in zip(whole, parts, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float64, np.float32] if PLAIN else [np.float64])
def test_strided_results_on_the_device(gpu, dtype):
    net, grid = FAST["pooled, circular"]
    x = images(6, grid, dtype)
    whole = gpu.array(np.full((9, 20), 7, dtype))
    nf.gram(net, gpu.array(x), out=whole[1:7, 5:11])
    found = whole.get()
    assert_close(found[1:7, 5:11], nf.gram(net, x), scale(net, x), BOUND[dtype])
    found[1:7, 5:11] = 7
    assert (found == 7).all()

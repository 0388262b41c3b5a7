"""Jacobian inner products from factors: against explicit weight gradients, for every layout, dtype and size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import ntkfast as nf
from ntkfast import _contract, _core
from ntkfast.jacobian import check_factors

#: relative to the largest entry of the kernel
BOUND = {np.float64: 1e-13, np.float32: 2e-6}
DTYPES = [np.float64, np.float32]


def layers(rng, n, shapes, dtype=np.float64):
    """Factors of shapes (positions or 0, fan_in, fan_out)."""
    made = []
    for p, fan_in, fan_out in shapes:
        axis = (p,) if p else ()
        made.append(nf.LayerFactors(rng.standard_normal((n, *axis, fan_in)).astype(dtype),
                                    rng.standard_normal((n, *axis, fan_out)).astype(dtype)))  # fmt: skip
    return made


def explicit(factors, other=None):
    """One Gram matrix per layer from weight gradients, written out in float64."""
    grams = []
    for x, y in zip(factors, factors if other is None else other, strict=True):
        axes = "ni,no->nio" if np.ndim(x.inputs) == 2 else "npi,npo->nio"
        G, H = (np.einsum(axes, *(np.asarray(part, np.float64) for part in f)) for f in (x, y))
        grams.append(np.einsum("nio,mio->nm", G, H))
    return np.array(grams)


DENSE = [(0, 5, 33), (0, 33, 17), (0, 18, 1)]
MIXED = [(9, 3, 7), (4, 64, 2), (0, 5, 33), (1, 6, 5), (25, 2, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [DENSE, MIXED, MIXED[:1], MIXED[1:2], MIXED[4:]], ids=str)
@pytest.mark.parametrize("n", [1, 2, 37, 130])
def test_against_explicit_gradients(n, shapes, dtype, rng):
    x, y = layers(rng, n, shapes, dtype), layers(rng, 21, shapes, dtype)
    wanted, cross = explicit(x), explicit(x, y)
    scale, bound = np.abs(wanted.sum(axis=0)).max(), BOUND[dtype]
    K, G = nf.jacobian_gram(x), nf.jacobian_gram(x, per_layer=True)
    assert K.dtype == G.dtype == dtype
    assert_close(K, wanted.sum(axis=0), scale, bound)
    assert_close(G, wanted, np.abs(wanted).max(axis=(1, 2), keepdims=True), bound)
    assert (K == K.T).all()
    assert (G.transpose(0, 2, 1) == G).all()
    assert_close(nf.jacobian_gram(x, y), cross.sum(axis=0), scale + np.abs(cross.sum(axis=0)).max(), bound)
    largest = np.abs(cross).max(axis=(1, 2), keepdims=True)
    assert_close(nf.jacobian_gram(x, y, per_layer=True), cross, largest, bound)
    assert_close(nf.jacobian_diagonal(x), np.diagonal(wanted.sum(axis=0)), scale, bound)
    rows = np.diagonal(wanted, axis1=1, axis2=2)
    assert_close(nf.jacobian_diagonal(x, per_layer=True), rows, rows.max(axis=1, keepdims=True), bound)


@pytest.mark.parametrize("way", ["products", "gradients"])
@pytest.mark.parametrize("sizes", [(512, 32), (7, 3), (1, 1), (40, 5)])
def test_both_contractions_in_tiles_of_any_size(way, sizes, rng, monkeypatch):
    monkeypatch.setattr(_contract, "contraction", lambda *_, **__: way)
    monkeypatch.setattr(_contract, "ROWS", sizes[0])
    monkeypatch.setattr(_contract, "SIDE", sizes[1])
    monkeypatch.setattr(_contract, "_SLICE", 64 * sizes[1])
    x, y = layers(rng, 47, MIXED), layers(rng, 30, MIXED)
    for K, wanted in ((nf.jacobian_gram(x, per_layer=True), explicit(x)),
                      (nf.jacobian_gram(x, y, per_layer=True), explicit(x, y))):  # fmt: skip
        assert_close(K, wanted, np.abs(wanted).max(axis=(1, 2), keepdims=True), 1e-13)
    K = nf.jacobian_gram(x)
    assert (K == K.T).all()
    assert_close(K, explicit(x).sum(axis=0), np.abs(K).max(), 1e-13)
    assert_close(nf.jacobian_diagonal(x), np.diagonal(K), K.max(), 1e-13)


def test_sides_of_different_numbers_of_positions(rng):
    """Images of two sizes through the same filters."""
    x, y = layers(rng, 5, [(9, 4, 6)]), layers(rng, 8, [(16, 4, 6)])
    for way in ("products", "gradients"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_contract, "contraction", lambda *_, way=way, **__: way)
            wanted = explicit(x, y)
            assert_close(nf.jacobian_gram(x, y), wanted[0], np.abs(wanted).max(), 1e-13)


class Counter:
    """Multiplications of every matrix product."""

    def __init__(self, monkeypatch):
        self.count, matmul = 0, np.matmul

        def counted(a, b, *args, **kwargs):
            self.count += int(np.prod(a.shape)) * b.shape[-1]
            return matmul(a, b, *args, **kwargs)

        monkeypatch.setattr(np, "matmul", counted)

    def of(self, call):
        self.count = 0
        call()
        return self.count


SHAPES = [(2, 100, 100), (4, 8, 8), (9, 27, 64), (16, 64, 64), (36, 3, 5), (64, 90, 10), (100, 12, 12), (3, 1, 40)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_chosen_contraction_multiplies_less(shape, symmetric, rng, monkeypatch):
    p, fan_in, fan_out = shape
    n = 96
    x = layers(rng, n, [shape])
    call = (lambda: nf.jacobian_gram(x)) if symmetric else (lambda: nf.jacobian_gram(x, x))
    chosen = _contract.contraction(n, n, (p, p), fan_in, fan_out, 8, symmetric=symmetric)
    counter, choose = Counter(monkeypatch), _contract.contraction
    counts = {}
    for way in ("products", "gradients"):
        monkeypatch.setattr(_contract, "contraction", lambda *_, way=way, **__: way)
        counts[way] = counter.of(call)
    monkeypatch.setattr(_contract, "contraction", choose)
    assert counter.of(call) == counts[chosen]
    # The weights of the model, of the epilogue and of small matrices, decide only where the counts are close.
    other = counts["gradients" if chosen == "products" else "products"]
    assert counts[chosen] < 3 * other


def test_the_model_at_its_ends():
    def choose(p, fan_in, fan_out, n=1000, itemsize=8):
        return _contract.contraction(n, n, (p, p), fan_in, fan_out, itemsize, symmetric=True)

    assert choose(1, 1000, 1) == "products"
    assert choose(2, 500, 500) == "products"
    assert choose(1000, 27, 64) == "gradients"
    assert choose(64, 9, 16) == "gradients"
    # beyond the buffer only slices of gradients fit
    assert choose(1400, 10**7, 10**7) == "products"
    assert choose(1500, 10**7, 10**7) == "gradients"


def test_buffers_do_not_grow_with_the_positions(rng):
    """Photographs: products of all positions of two of them would take 20 GB, and are not made."""
    x = layers(rng, 3, [(50_000, 2, 3)])
    left = check_factors(x, "x").factors
    assert all(b.nbytes <= _contract._BUFFER for b in _contract._buffers(left, left, ["gradients"]))
    wanted = explicit(x)
    assert_close(nf.jacobian_gram(x), wanted[0], wanted.max(), 1e-13)
    assert_close(nf.jacobian_diagonal(x), np.diag(wanted[0]), wanted.max(), 1e-13)
    # the largest that products may take: every position of two samples, as the model allows
    most = int((_contract._BUFFER / 8) ** 0.5)
    assert _contract.contraction(9, 9, (most, most), 10**7, 10**7, 8, symmetric=True) == "products"
    one = [_contract.Factor(np.ones((2 * most, 1)), np.ones((2 * most, 1)), most)]
    assert all(b.nbytes <= _contract._BUFFER for b in _contract._buffers(one, one, ["products"]))
    # and small images beside photographs: many samples of the one, one of the other
    for few, many in ((1, 16384), (3, 5000), (300, 700)):
        sides = [[_contract.Factor(*(np.broadcast_to(1.0, (600 * p, 2)),) * 2, p)] for p in (few, many)]
        for left, right in (sides, sides[::-1]):
            assert all(b.nbytes <= _contract._BUFFER for b in _contract._buffers(left, right, ["products"]))


@pytest.mark.parametrize("few", [1, 3])
def test_few_positions_beside_many(few, rng, monkeypatch):
    """Blocks of products that the buffer cuts."""
    monkeypatch.setattr(_contract, "_BUFFER", 1 << 15)
    x, y = layers(rng, 50, [(few, 400, 300)]), layers(rng, 3, [(700, 400, 300)])
    assert _contract.contraction(50, 3, (few, 700), 400, 300, 8, symmetric=False) == "products"
    for left, right in ((x, y), (y, x)):
        wanted = np.einsum("alf,brf,ald,brd->ab", left[0].inputs, right[0].inputs, left[0].deltas, right[0].deltas,
                           optimize=True)  # fmt: skip
        assert_close(nf.jacobian_gram(left, right), wanted, np.abs(wanted).max(), 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_than_a_tile(dtype, rng):
    n = 2 * _contract.SIDE + 3
    x = layers(rng, n, [(0, 3, 4), (0, 4, 1)], dtype)
    K = nf.jacobian_gram(x)
    assert (K == K.T).all()
    wanted = explicit(x).sum(axis=0)
    assert_close(K, wanted, np.abs(wanted).max(), BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_layers(dtype, rng):
    """Inner products of a thousand numbers, of one sign and of both, against sums in higher precision."""
    x = layers(rng, 40, [(0, 700, 1024), *[(0, 1024, 1024)] * 4, (0, 1024, 1)], dtype)
    x = [nf.LayerFactors(np.abs(a) if k % 2 else a, np.abs(d) if k > 2 else d) for k, (a, d) in enumerate(x)]
    high = [tuple(part.astype(np.longdouble) for part in f) for f in x]
    wanted = np.array([(a @ a.T) * (d @ d.T) for a, d in high])
    assert_close(nf.jacobian_gram(x), wanted.sum(axis=0), np.abs(wanted.sum(axis=0)).max(), BOUND[dtype])
    largest = np.abs(wanted).max(axis=(1, 2), keepdims=True)
    assert_close(nf.jacobian_gram(x, per_layer=True), wanted, largest, BOUND[dtype])
    assert_close(nf.jacobian_diagonal(x), np.diag(wanted.sum(axis=0)), wanted.sum(axis=0).max(), BOUND[dtype])


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 99), data=st.data(),
    positions=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)  # fmt: skip
def test_any_shapes(n, m, seed, data, positions):
    fans = [(p, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))) for p in positions]
    rng = np.random.default_rng(seed)
    x, y = layers(rng, n, fans), layers(rng, m, fans)
    wanted = explicit(x, y)
    assert_close(nf.jacobian_gram(x, y, per_layer=True), wanted, 1 + np.abs(wanted).max(), 1e-13)
    K = nf.jacobian_gram(x)
    assert_close(K, explicit(x).sum(axis=0), 1 + np.abs(K).max(), 1e-13)
    assert (K == K.T).all()


def test_layouts(rng):
    """Strides, byte order, broadcast rows, tuples, integers; nothing is changed."""
    (a, d), (b, e) = layers(rng, 12, [(0, 5, 4), (3, 5, 4)])
    wanted = explicit([nf.LayerFactors(a, d), nf.LayerFactors(b, e)]).sum(axis=0)
    wide = np.full((24, 11), np.nan)
    wide[::2, 1:6] = a
    views = [
        [(np.asfortranarray(a), d), (np.asfortranarray(b), e[:, :, ::-1][:, :, ::-1])],
        [(wide[::2, 1:6], d[:, ::-1][:, ::-1]), (b, np.swapaxes(np.swapaxes(e, 1, 2).copy(), 1, 2))],
        [[a.astype(">f8"), d], [b, e]],
    ]
    for factors in views:
        assert_close(nf.jacobian_gram(factors), wanted, np.abs(wanted).max(), 1e-13)
    ones = np.broadcast_to(np.ones(4), (12, 4))
    assert_close(nf.jacobian_gram([(a, ones)]), 4 * a @ a.T, 100.0, 1e-14)
    whole = [(np.arange(12).reshape(4, 3), np.ones((4, 2), dtype=bool))]
    assert_close(nf.jacobian_gram(whole), 2.0 * whole[0][0] @ whole[0][0].T, 1.0, 0.0)


class Slices:
    """Nothing but slice assignment."""

    def __init__(self, shape, dtype):
        self.array, self.shape, self.dtype = np.full(shape, np.nan, dtype), shape, np.dtype(dtype)

    def __setitem__(self, key, value):
        self.array[key] = value


def test_out(rng, tmp_path):
    x = layers(rng, 40, MIXED)
    for per_layer in (False, True):
        K = nf.jacobian_gram(x, per_layer=per_layer)
        out = np.full(K.shape, np.nan)
        assert nf.jacobian_gram(x, per_layer=per_layer, out=out) is out
        assert (out == K).all()
        file = np.lib.format.open_memmap(tmp_path / "k.npy", mode="w+", dtype=np.float64, shape=K.shape)
        nf.jacobian_gram(x, per_layer=per_layer, out=file)
        assert (file == K).all()
        other = Slices(K.shape, np.float64)
        nf.jacobian_gram(x, per_layer=per_layer, out=other)
        assert (other.array == K).all()
        strided = np.full((*K.shape[:-1], 2 * K.shape[-1]), np.nan)
        nf.jacobian_gram(x, per_layer=per_layer, out=strided[..., ::2])
        assert (strided[..., ::2] == K).all()
        assert np.isnan(strided[..., 1::2]).all()


@pytest.mark.parametrize("per_layer", [False, True])
def test_out_of_slices_in_many_tiles(per_layer, rng, monkeypatch):
    monkeypatch.setattr(_contract, "_SCRATCH", 0)  # 128 rows a tile
    monkeypatch.setattr(_contract, "SIDE", 128)
    x = layers(rng, 300, DENSE)
    out = Slices((3, 300, 300) if per_layer else (300, 300), np.float64)
    nf.jacobian_gram(x, per_layer=per_layer, out=out)
    assert_close(out.array, nf.jacobian_gram(x, per_layer=per_layer), 1e3, 1e-13)


def test_special_values(rng):
    x = layers(rng, 6, DENSE)
    for part, layer in itertools.product((0, 1), range(3)):
        for bad in (np.nan, np.inf):
            y = [nf.LayerFactors(*(z.copy() for z in f)) for f in x]
            y[layer][part][4, 0] = bad
            name = ("inputs", "deltas")[part]
            with pytest.raises(ValueError, match=rf"factors\[{layer}\]\.{name} must be finite: sample 4"):
                nf.jacobian_gram(y)
            with pytest.raises(ValueError, match="other"):
                nf.jacobian_gram(x, y)
            with pytest.raises(ValueError, match="sample 4"):
                nf.jacobian_diagonal(y)
    y = layers(rng, 6, MIXED)
    y[0].inputs[3, 5, 1] = np.nan
    with pytest.raises(ValueError, match="sample 3"):
        nf.jacobian_gram(y)
    # sums of rows may overflow where the entries are finite and the result is
    large = [nf.LayerFactors(np.full((2, 4), 3e38, np.float32), np.full((2, 1), 1e-38, np.float32))]
    check_factors(large, "factors")
    zero = [nf.LayerFactors(np.zeros((3, 4)), np.ones((3, 2)))]
    assert (nf.jacobian_gram(zero) == 0).all()
    assert (nf.jacobian_diagonal(zero) == 0).all()


def test_bad_input(rng):
    x, y = layers(rng, 4, DENSE), layers(rng, 5, DENSE)
    a, d = x[0]
    for given_, kind, words in [
        ((x[0],), TypeError, "list of LayerFactors"),
        (([],), ValueError, "no layer"),
        (([a],), TypeError, "LayerFactors"),
        (([(a, d[:3])],), ValueError, "shapes"),
        (([(a, d[:, None])],), ValueError, "shapes"),
        (([(a[:, :0], d)],), ValueError, "empty"),
        (([(a[:0], d[:0])],), ValueError, "empty"),
        (([x[0], y[1]],), ValueError, "5 samples"),
        (([x[0], (x[1].inputs.astype(np.float32), x[1].deltas)],), TypeError, "float32"),
        (([(a.astype(np.float16), d)],), TypeError, "float16"),
        (([(a.astype(complex), d)],), TypeError, "complex"),
        ((x, y[:2]), ValueError, "3 layers and other has 2"),
        ((x, layers(rng, 4, DENSE, np.float32)), TypeError, "float64 and other is float32"),
        ((x, [y[0], y[1], y[1]]), ValueError, "layer 2"),
    ]:
        with pytest.raises(kind, match=words):
            nf.jacobian_gram(*given_)
    for out, kind, words in [
        (np.empty((4, 5)), ValueError, "shape"),
        (np.empty((4, 4), np.float32), TypeError, "dtype"),
        (np.broadcast_to(0.0, (4, 4)), ValueError, "read-only"),
    ]:
        with pytest.raises(kind, match=words):
            nf.jacobian_gram(x, out=out)
    square = [(np.eye(4), np.ones((4, 1)))]
    with pytest.raises(ValueError, match="overlaps"):
        nf.jacobian_gram(square, out=square[0][0])
    big = np.broadcast_to(np.ones(1), (10**7, 1))
    with pytest.raises(nf.OutOfMemoryError):
        nf.jacobian_gram([(big, big)])


# The compiled part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [(1, 1), (3, 1), (1, 3), (5, 17), (2, 40)])
def test_multiply_add(dtype, positions, isa, rng):
    p, r = positions
    for rows, cols in ((1, 1), (5, 3), (33, 70)):
        P, Q = (rng.standard_normal((rows * p, cols * r + 3)).astype(dtype)[:, : cols * r] for _ in range(2))
        out = rng.standard_normal((rows, cols + 2)).astype(dtype)
        start = out.copy()
        sums = np.einsum("ilj,ilj->ilj", P.reshape(rows, p, -1).astype(float), Q.reshape(rows, p, -1).astype(float))
        sums = sums.reshape(rows, p, cols, r).sum(axis=(1, 3))
        bound = 4 * p * r * np.finfo(dtype).eps
        _core.multiply_add(out[:, :cols], P, Q, p, r, isa=isa)
        assert_close(out[:, :cols], start[:, :cols] + sums, 10.0, bound)
        out[:, :cols] = np.nan
        _core.multiply_add(out[:, :cols], P, Q, p, r, first=True, isa=isa)
        assert_close(out[:, :cols], sums, 10.0, bound)
        assert (out[:, cols:] == start[:, cols:]).all()
        if p * r == 1:
            _core.multiply_add(out[:, :cols], P, None, first=True, isa=isa)
            assert (out[:, :cols] == P).all()
            _core.multiply_add(out[:, :cols], Q, None, isa=isa)
            assert (out[:, :cols] == P + Q).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (31, 32), (33, 70), (100, 5)])
def test_mirror(dtype, shape, rng):
    n, m = shape
    source, target = rng.standard_normal((n, m + 1)).astype(dtype)[:, :m], np.zeros((m, n + 2), dtype)
    _core.mirror(source, target[:, :n])
    assert (target[:, :n] == source.T).all()
    assert (target[:, n:] == 0).all()
    square = rng.standard_normal((n, n)).astype(dtype)
    upper = np.triu(square)
    _core.mirror(square, square)
    assert (square == upper + np.triu(upper, 1).T).all()


def test_the_compiled_part_refuses_what_does_not_fit():
    a, out = np.ones((4, 6)), np.ones((2, 3))
    _core.multiply_add(out, a, a, 2, 2)
    for call in (
        lambda: _core.multiply_add(out, a, a, 2, 1),
        lambda: _core.multiply_add(out, a, a[:, :4], 2, 2),
        lambda: _core.multiply_add(out, a, None, 2, 2),
        lambda: _core.multiply_add(out, a, a, 0, 2),
        lambda: _core.multiply_add(out.astype(np.float32), a, a, 2, 2),
        lambda: _core.multiply_add(out, a[:, ::-1], a, 2, 2),
        lambda: _core.mirror(a, out),
        lambda: _core.mirror(a, np.ones((6, 4), np.float32)),
        lambda: _core.mirror(a, a),
    ):
        with pytest.raises(ValueError, match=r"shape|positions|differ|contiguous"):
            call()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _core.multiply_add(out, a, a, 2, 2)


def test_erf():
    from math import erf

    x = np.linspace(-6, 6, 101)
    assert (_core.erf(x) == [erf(v) for v in x]).all()


MEMORY = """
import re, numpy as np, ntkfast as nf
from pathlib import Path
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
rng, n = np.random.default_rng(0), {n}
factors = [nf.LayerFactors(*(rng.standard_normal((n, *s)).astype("{dtype}") for s in pair)) for pair in {shapes}]
out = np.ones((n, n), "{dtype}")
small = [nf.LayerFactors(a[:600], d[:600]) for a, d in factors[:1]]
nf.jacobian_gram(small)  # buffers of the BLAS
before = peak()
nf.jacobian_gram(factors, out=out)
nf.jacobian_diagonal(factors)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("n", "shapes"),
    [
        (3000, [((200,), (300,))] * 4),
        (500, [((100, 9), (100, 64))]),  # weight gradients, 2.3 MB a sample
        (60, [((9, 600), (9, 600))]),  # products of positions; the gradients of all samples take 173 MB
        (40, [((1600, 30), (1600, 40))]),  # products of all positions of two samples take 20 MB
        (90, [((1024, 28), (1024, 32))] * 2),  # small images: all products of positions would take 68 GB
    ],
    ids=["dense", "gradients", "products", "many positions", "images"],
)
def test_memory(n, shapes, dtype, fresh_python):
    """Beyond factors and result at most 64 MB, one thread."""
    used = int(
        fresh_python(MEMORY.format(n=n, shapes=shapes, dtype=dtype), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    )
    assert used < 64e6


# Results that leave the range of their dtype


def huge(n, bad, size, other, shapes, dtype=np.float32):
    """Factors of ones, with sample `bad` of one layer times `size` and `other`."""
    made = [nf.LayerFactors(*(np.ones((n, *((p,) if p else ()), k), dtype) for k in (i, o))) for p, i, o in shapes]
    made[-1].inputs[bad] *= dtype(size)
    made[-1].deltas[bad] *= dtype(other)
    return made


#: (size of the inputs, of the gradients): infinity; infinity times 0 by underflow; infinity times 0
OVERFLOWS = [(1e25, 1.0), (1.0, 1e25), (1e30, 1e-30), (1e30, 0.0)]


@pytest.mark.parametrize(("shape", "sizes", "way"), [
    *itertools.product([(0, 5, 7), (1, 5, 7), (4, 3, 5)], OVERFLOWS, ["products"]),
    *itertools.product([(4, 3, 5)], OVERFLOWS[:2], ["gradients"]),  # which are in range where one of the two is small
], ids=str)  # fmt: skip
@pytest.mark.parametrize("side", [2048, 8])
def test_overflow_names_the_sample(shape, sizes, way, side, monkeypatch):
    monkeypatch.setattr(_contract, "SIDE", side)
    monkeypatch.setattr(_contract, "contraction", lambda *_, **__: way)
    x, y = huge(37, 21, *sizes, [(0, 3, 2), shape]), huge(11, 0, 1.0, 1.0, [(0, 3, 2), shape])
    for per_layer in (False, True):
        with pytest.raises(OverflowError, match=r"row 21 with itself.* range of float32.*; use float64, or smaller"):
            nf.jacobian_gram(x, per_layer=per_layer)
        out = np.zeros((2, 37, 37) if per_layer else (37, 37), np.float32)
        with pytest.raises(OverflowError, match="row 21 with itself"):
            nf.jacobian_gram(x, per_layer=per_layer, out=out)
        wide = [nf.LayerFactors(np.float64(a), np.float64(d)) for a, d in x]
        assert np.isfinite(nf.jacobian_gram(wide, per_layer=per_layer)).all()
    assert np.isfinite(nf.jacobian_gram(x, y)).all()  # the huge sample only meets small ones
    cross = [
        nf.LayerFactors(*(np.insert(small, 4, large[21], axis=0) for large, small in zip(a, b, strict=True)))
        for a, b in zip(x, y, strict=True)
    ]
    with pytest.raises(OverflowError, match="row 21 and column 4 "):
        nf.jacobian_gram(x, cross)


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 30, 50), (16, 3, 2)], ids=str)
def test_overflow_of_the_diagonal(shape):
    x = huge(9, 3, 1e25, 1.0, [(0, 2, 2), shape])
    for per_layer in (False, True):
        with pytest.raises(OverflowError, match=r"row 3 with itself.*float32"):
            nf.jacobian_diagonal(x, per_layer=per_layer)
    tiny = huge(9, 3, 1e30, 1e-30, [(0, 5, 7)])
    assert_close(nf.jacobian_diagonal(tiny), np.full(9, 35.0), 35.0, 1e-6)  # float64 on the way


def test_overflow_of_float64():
    x = huge(5, 2, 1e200, 1.0, [(0, 2, 3)], np.float64)
    for call in (nf.jacobian_gram, nf.jacobian_diagonal):
        with pytest.raises(OverflowError, match=r"row 2 with itself.*range of float64.*; use smaller points"):
            call(x)


def test_results_up_to_the_limit_are_returned():
    """float32 ends at 3.4e38."""
    x = [nf.LayerFactors(np.full((3, 1), 1.8e19, np.float32), np.ones((3, 1), np.float32))]
    for found in (nf.jacobian_gram(x), nf.jacobian_gram(x, x), nf.jacobian_diagonal(x)):
        assert_close(found, np.full(found.shape, 3.24e38), 3.24e38, 1e-6)


def test_outputs_that_cannot_be_read_are_checked():
    class Sink:
        shape, dtype = (37, 37), np.dtype(np.float32)

        def __setitem__(self, key, value):
            assert np.isfinite(value).all()

    for other in (None, huge(37, 5, 1e25, 1.0, [(0, 2, 3)])):
        with pytest.raises(OverflowError, match="row 5"):
            nf.jacobian_gram(huge(37, 5, 1e25, 1.0, [(0, 2, 3)]), other, out=Sink())

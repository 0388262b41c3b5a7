"""The table path of gram: when it is taken, that the choice changes nothing but rounding, and its cache."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest
import test_accuracy
from conftest import assert_close, tolerance

import ntkfast as nf
from ntkfast import Activation, Bottleneck, Dense, Network, Readout, Residual, _core, _table, _tiles, reference

KINDS = ("ntk", "nngp", "last_hidden")
DTYPES = (np.float64, np.float32)
#: What the table may add to an entry, in units of sqrt(K_ii K_jj).
TABLE = {np.float64: 2e-14, np.float32: 1e-6}
FREE = {
    "fully connected": nf.fully_connected(3),
    "deep": nf.resnet(60, c_res=2.0),
    "signs": nf.fully_connected(2, "abs"),
    "negative": Network([Dense("relu", gain=1.3), Residual("relu", scale=0.5, skip=-0.8),
                         Bottleneck(Activation.leaky_relu(0.3), scale=-0.4, skip=0.7)]),
    "readout": Network([Dense("relu")] * 2, Readout(weight_variance=1.7, bias_variance=0.4)),
    "sign readout": nf.fixed_readout_resnet(3, theta=0.6, last_width_ratio=1.5),
    "all frozen": Network([Dense("relu", trained=False)], Readout(trained=False, bias_variance=0.1)),
}  # fmt: skip
BIASED = {
    "biases": Network([Dense("relu", bias_variance=0.3)] * 3, Readout(bias_variance=0.2)),
    "erf": nf.resnet(3, "erf"),
    "gelu": nf.fully_connected(2, "gelu", bias_variance=0.1),
    "sign readout": Network([Dense("relu"), Residual("sin", scale=0.5)], nf.fixed_readout_resnet(1).readout),
}
#: best errors 5e-12, infinite (no fit on 16 panels) and 4e-4 (in float32 too)
TOO_HARD = {
    "depth 5000": (nf.fully_connected(5000), np.float64),
    "abs, depth 100": (nf.fully_connected(100, "abs"), np.float64),
    "narrow gaussians": (Network([Dense("gaussian", weight_variance=1e4)] * 2), np.float32),
}


@pytest.fixture
def path(monkeypatch):
    """Set NTKFAST_PATH; None takes it away."""

    def choose(name):
        monkeypatch.delenv("NTKFAST_PATH", raising=False)
        if name is not None:
            monkeypatch.setenv("NTKFAST_PATH", name)

    choose(None)
    return choose


def points(n, d=7, unit=False, zero=True, seed=0):
    """Random rows with a duplicate, a multiple, an antipode, a close one and a zero row (the last two if not unit)."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, d))
    if n > 6:
        A[1], A[2], A[n - 1] = A[0], -A[0], A[0] + 1e-6 * A[3]
        A[5] = 0.0 if zero and not unit else 2 * A[4]
    length = np.linalg.norm(A, axis=1, keepdims=True)
    return A / length if unit else A * rng.uniform(0.5, 2, (n, 1))


def scales(net, A, B, get):
    """sqrt(K_ii K_jj); a tenth of the largest for rows whose kernel is 0."""
    rows, cols = (np.sqrt(np.asarray(nf.diagonal(net, Z, get=get), np.float64)) for Z in (A, B))
    root = rows[:, None] * cols
    return np.where(root > 0, root, 0.1 * root.max(initial=1e-300))


def both(path, net, A, B=None, **options):
    """The results of both paths, as tuples of matrices."""
    results = []
    for name in ("table", "recursion"):
        path(name)
        assert net.plan(A).startswith(name)
        results.append(nf.gram(net, A, B, get=KINDS, **options))
    return results


def check_both(path, net, A, B=None, **options):
    table, layers = both(path, net, A, B, **options)
    dtype = np.asarray(A).dtype.type
    for get, K, wanted in zip(KINDS, table, layers, strict=True):
        assert K.dtype == dtype
        scale = 1.0 if options.get("normalize") else scales(net, A, A if B is None else B, get)
        # where the covariance is what the means leave (sign readout) its terms round
        assert_close(K, wanted.astype(np.float64), scale, (8 if dtype == np.float32 else 1) * tolerance(net, dtype)
                     + TABLE[dtype])  # fmt: skip
        if B is None:
            np.testing.assert_array_equal(K, K.T)


# ---- the choice changes nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FREE)
def test_bias_free_networks(name, dtype, path):
    A, B = points(130).astype(dtype), points(70, seed=1).astype(dtype)
    B[4] = A[4]
    for options in ({}, {"normalize": True}):
        check_both(path, FREE[name], A, **options)
        check_both(path, FREE[name], A, B, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [1.0, 2.0, 0.3])
@pytest.mark.parametrize("name", BIASED)
def test_points_of_one_norm(name, norm, dtype, path):
    A, B = (norm * points(n, unit=True, seed=s).astype(dtype) for n, s in ((130, 0), (70, 1)))
    A, B = ((norm * Z / np.linalg.norm(Z, axis=1, keepdims=True)).astype(dtype) for Z in (A, B))
    for options in ({}, {"normalize": True}):
        check_both(path, BIASED[name], A, **options)
        check_both(path, BIASED[name], A, B, **options)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 257])
def test_sizes(n, path):
    net = nf.resnet(3)
    for m in (None, 1, 8, 65, 131):
        A, B = points(n, seed=n), None if m is None else points(m, seed=m + 500)
        for dtype in DTYPES:
            check_both(path, net, A.astype(dtype), None if B is None else B.astype(dtype))
    path("table")
    K, wanted = nf.gram(net, points(n, seed=n)), reference.gram(net, points(n, seed=n))
    # the reference takes parallel rows to be 2e-8 apart
    assert_close(K, wanted, scales(net, points(n, seed=n), points(n, seed=n), "ntk"), 1e-8)


@pytest.mark.parametrize("side", [33, 64])
def test_tiles(side, path, monkeypatch):
    monkeypatch.setattr(_tiles, "SIDE", side)
    monkeypatch.setattr(_tiles, "FUSED_SIDE", side)
    for dtype in DTYPES:
        check_both(path, nf.resnet(5), points(200).astype(dtype))
        check_both(path, nf.resnet(5), points(200).astype(dtype), points(131, seed=1).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_layouts(dtype, path, tmp_path):
    path("table")
    net, A = nf.fully_connected(5), points(75).astype(dtype)
    B = points(41, seed=1).astype(dtype)
    for other, m in ((None, 75), (B, 41)):
        wanted = nf.gram(net, A, other, get=("ntk", "nngp"))
        strided = np.full((150, 3 * m), np.nan, dtype)[::2, ::3]
        column = np.empty((75, m), dtype, order="F")
        mapped = np.memmap(tmp_path / f"{m}", dtype, "w+", shape=(75, m))
        for out in (strided, column, mapped, np.empty((75, m), dtype)):
            assert nf.gram(net, A, other, out=out) is out
            # the products of other layouts may sum in another order
            assert_close(out, wanted.ntk.astype(np.float64), scales(net, A, A if other is None else B, "ntk"),
                         tolerance(net, dtype))  # fmt: skip
        outs = (np.empty((75, m), dtype), np.empty((75, m), dtype))
        nf.gram(net, A, other, get=("ntk", "nngp"), out=outs)
        for out, K in zip(outs, wanted, strict=True):
            np.testing.assert_array_equal(out, K)
    store = np.full((75, 14), np.nan, dtype)
    store[:, ::2] = A
    for view in (store[:, ::2], np.asfortranarray(A), A[::-1][::-1]):
        assert_close(nf.gram(net, view), nf.gram(net, A).astype(np.float64), scales(net, A, A, "ntk"),
                     tolerance(net, dtype))  # fmt: skip


#: On the table path factors and products round in float32, two norms and two products; diagonal() rounds once.
ULPS = {("recursion", np.float64): 1, ("recursion", np.float32): 1, ("table", np.float64): 1, ("table", np.float32): 3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["table", "recursion"])
def test_diagonal(name, dtype, path):
    path(name)
    for net in (*FREE.values(), *BIASED.values()):
        A = points(50, unit=net in BIASED.values()).astype(dtype)
        for get in KINDS:
            K = nf.gram(net, A, get=get)
            diagonal = np.diag(K).copy()
            np.testing.assert_array_almost_equal_nulp(nf.diagonal(net, A, get=get), diagonal, ULPS[name, dtype])
            unit = np.diag(nf.gram(net, A, get=get, normalize=True))
            np.testing.assert_array_equal(unit, (diagonal > 0).astype(dtype))
            one = nf.gram(net, A[:1], get=get)
            assert one.shape == (1, 1)
            np.testing.assert_array_almost_equal_nulp(one[0], diagonal[:1], ULPS[name, dtype])


@pytest.mark.parametrize(("dtype", "power"), [(np.float32, 40), (np.float64, 498)])
@pytest.mark.parametrize("net", test_accuracy.BIAS_FREE, ids=repr)
def test_scale_of_the_inputs(net, dtype, power, path):
    path("table")
    test_accuracy.test_scale_of_the_inputs_passes_through(net, dtype, power)
    test_accuracy.test_what_does_not_fit_is_refused(net, dtype, power + 100 if dtype == np.float64 else 70)


# ---- which path ------------------------------------------------------------------------------------------


def test_the_plan_says_which_path_and_why(path):
    net, A = nf.fully_connected(100), points(400)
    text = net.plan(A)
    start = r"table: 100 layers compiled to polynomials on (\d+) panels \(norms factor out\), verified to (.*)\n"
    found = re.match(start, text)
    assert found, text
    assert 2 <= int(found[1]) <= 16
    assert 0 < float(found[2]) <= 1.2e-14
    assert re.match(r"recursion .*: 55 pairs are done before a table is made\n", net.plan(A[:10]))
    path("recursion")
    assert "no table: NTKFAST_PATH=recursion\n" in net.plan(A)
    path("table")
    assert net.plan(A[:10]).startswith("table: 100 layers")
    net = BIASED["biases"]
    assert "points of different norm\n" in net.plan(A)
    assert "(all norms are 1)" in net.plan(points(20, unit=True))
    assert "(all norms are 0.3)" in net.plan(0.3 * points(20, unit=True))


def test_the_choice_is_that_of_the_plan(path):
    net, A = nf.fully_connected(100), points(400)
    for rows in (A, A[:10]):
        path(None)
        chosen, diagonal, plan = nf.gram(net, rows), nf.diagonal(net, rows), net.plan(rows).split(":")[0].split()[0]
        path(plan)
        np.testing.assert_array_equal(chosen, nf.gram(net, rows))
        np.testing.assert_array_equal(diagonal, nf.diagonal(net, rows))
        path("recursion" if plan == "table" else "table")
        assert not np.array_equal(chosen, nf.gram(net, rows))


@pytest.mark.parametrize("name", BIASED)
def test_one_norm_means_a_few_eps(name, path):
    net, A = BIASED[name], points(60, unit=True)
    path("table")

    def tabled(*sides):
        path("table")
        K = nf.gram(net, *sides)
        path("recursion")
        same = np.array_equal(K, nf.gram(net, *sides))
        path("table")
        if len(sides) == 1:
            assert net.plan(*sides).startswith("table") != same
        return not same

    B = A.astype(np.float32)
    B /= np.linalg.norm(B, axis=1, keepdims=True)
    assert tabled(A)
    assert tabled(B)
    assert not tabled(B.astype(np.float64))  # float32-normalised rows are 6e-8 apart
    assert not tabled(A * (1 + 1e-13 * np.arange(60))[:, None])
    assert tabled(2 * A, -2 * A[:7])
    assert not tabled(A, 2 * A[:7])  # one norm each, but two
    for row in (np.zeros(7), 1.001 * A[3]):
        assert not tabled(np.vstack([A, row]))


@pytest.mark.parametrize("name", TOO_HARD)
def test_networks_that_no_table_reaches(name, path):
    net, dtype = TOO_HARD[name]
    A = points(20, unit=True).astype(dtype)
    path("table")
    assert net.plan(A).startswith("recursion")
    assert "no table of this network is accurate enough" in net.plan(A)
    K, normalized, diagonal = nf.gram(net, A), nf.gram(net, A, normalize=True), nf.diagonal(net, A)
    path("recursion")
    np.testing.assert_array_equal(K, nf.gram(net, A))
    np.testing.assert_array_equal(normalized, nf.gram(net, A, normalize=True))
    np.testing.assert_array_equal(diagonal, nf.diagonal(net, A))


@pytest.mark.parametrize("wrong", ["tables", "Table", "1", " "])
def test_a_wrong_path_is_refused(wrong, path):
    path(wrong)
    for call in (nf.gram, nf.diagonal, lambda net, A: net.plan(A)):
        with pytest.raises(ValueError, match=r"NTKFAST_PATH=.*table or recursion"):
            call(nf.resnet(3), np.eye(3))


def test_layers_are_not_tabled(path):
    net, A = nf.resnet(5), points(30)
    path("recursion")
    wanted = nf.layer_grams(net, A)
    path("table")
    np.testing.assert_array_equal(nf.layer_grams(net, A), wanted)
    assert_close(wanted.sum(axis=0), nf.gram(net, A), scales(net, A, A, "ntk"), tolerance(net, np.float64) + 2e-14)


# ---- cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """A list that grows by one entry for every table made; no table is known before."""
    calls, make = [], _core.Table

    def count(plan, mix, norm, single):
        calls.append(single)
        return make(plan, mix, norm, single)

    _table._table.cache_clear()
    monkeypatch.setattr(_core, "Table", count)
    yield calls
    _table._table.cache_clear()


def test_a_table_is_made_once(path, made):
    path("table")
    A = points(20)
    first = nf.gram(nf.fully_connected(9), A)
    assert made == [False]
    # an equal network, other points, other calls
    np.testing.assert_array_equal(nf.gram(nf.fully_connected(9), A), first)
    nf.gram(nf.fully_connected(9), 3 * A[:5], A)
    nf.diagonal(nf.fully_connected(9), A)
    nf.fully_connected(9).plan(A)
    nf.gram(nf.fully_connected(9), A, normalize=True)
    assert made == [False]
    nf.gram(nf.fully_connected(9), A.astype(np.float32))
    assert made == [False, True]
    nf.gram(nf.fully_connected(9), A, get=KINDS)
    assert made == [False, True, False, False]
    nf.gram(nf.fully_connected(10), A)
    assert len(made) == 5
    path("recursion")
    nf.gram(nf.fully_connected(11), A)
    assert len(made) == 5


def test_points_of_two_norms_have_two_tables(path, made):
    path("table")
    net, A = BIASED["biases"], points(20, unit=True)
    one, two = nf.gram(net, A), nf.gram(net, 2 * A)
    assert len(made) == 2
    np.testing.assert_array_equal(nf.gram(net, A), one)
    np.testing.assert_array_equal(nf.gram(net, 2 * A), two)
    nf.gram(net, points(9, unit=True, seed=3))  # other rows of the same norm
    assert len(made) == 2


def test_the_cache_is_bounded(path, made):
    path("table")
    most = _table._table.cache_info().maxsize
    assert 16 <= most <= 1024
    for k in range(most + 3):
        nf.diagonal(nf.fully_connected(1, "identity", weight_variance=1 + k / 1024), np.eye(1, dtype=np.float32))
    assert len(made) == most + 3
    assert _table._table.cache_info().currsize == most


def test_threads_that_compile_at_once(path, made):
    path("table")
    nets, A = [nf.resnet(d) for d in (40, 41)], points(30)
    wanted = [nf.gram(net, A) for net in nets]
    for _ in range(3):
        _table._table.cache_clear()
        results, start = [None] * 8, threading.Barrier(8)

        def work(k, start=start, results=results):
            start.wait()
            results[k] = nf.gram(nets[k % 2], A)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k, K in enumerate(results):
            np.testing.assert_array_equal(K, wanted[k % 2])

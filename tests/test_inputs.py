"""Bad input raises before any work, and the message says what is wrong, where, and what to do."""

from __future__ import annotations

import decimal

import numpy as np
import pytest

import ntkfast as nf
from ntkfast import _arrays, _core
from ntkfast.activation import NAMES

NET = nf.resnet(3)
X = np.random.default_rng(0).standard_normal((6, 4))
CALLS = {"gram": nf.gram, "layer_grams": nf.layer_grams, "diagonal": nf.diagonal}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def replaced(row, column, value, dtype=np.float64):
    result = X.astype(dtype)
    result[row, column] = value
    return result


# Entries


@every_call
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_not_finite_names_the_first_bad_row(call, value, dtype):
    bad = replaced(3, 1, value, dtype)
    bad[5] = np.nan
    with pytest.raises(ValueError, match="X must be finite: row 3 holds NaN or infinity"):
        call(NET, bad)


@pytest.mark.parametrize("row", range(6))
def test_not_finite_in_the_other_set(row):
    with pytest.raises(ValueError, match=f"Y must be finite: row {row} holds NaN or infinity"):
        nf.gram(NET, X, replaced(row, 0, np.nan))


def test_entries_too_large_for_the_dtype():
    with pytest.raises(ValueError, match="X must be finite: row 2 holds a value too large for float32"):
        nf.gram(NET, replaced(2, 1, 1e200), dtype=np.float32)


def test_not_finite_behind_strides():
    wide = np.zeros((6, 9))
    wide[:, 1::2] = replaced(4, 3, np.nan)
    with pytest.raises(ValueError, match="row 4 holds"):
        nf.gram(NET, wide[:, 1::2])
    wide[:, 1::2] = X
    wide[:, ::2] = np.nan
    assert np.isfinite(nf.gram(NET, wide[:, 1::2])).all()


@pytest.mark.parametrize("net", [nf.fully_connected(3), nf.fully_connected(3, "gelu", bias_variance=0.1)])
def test_overflow_names_the_row_and_the_cure(net):
    big = X * 1e-3
    big[4] = 1e160
    with pytest.raises(
        OverflowError, match=r"row 4 of X (does not fit in float64; use normalize=True|leave the range of float64)"
    ):
        nf.gram(net, big)
    with pytest.raises(OverflowError, match=r"row 4 of Y"):
        nf.gram(net, X, big, get=("nngp", "ntk"))
    with pytest.raises(OverflowError, match=r"row 4 of X"):
        nf.layer_grams(net, big)
    with pytest.raises(OverflowError, match=r"row 4 of X"):
        nf.diagonal(net, big)


def test_overflow_of_float32():
    big = X.astype(np.float32)
    big[1] *= np.float32(1e25)
    with pytest.raises(OverflowError, match=r"row 1 of X does not fit in float32.*float64"):
        nf.gram(NET, big)
    assert np.isfinite(nf.gram(NET, big, normalize=True)).all()
    assert np.isfinite(nf.gram(NET, big, dtype=np.float64)).all()


# Shapes


@every_call
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4), (2, 2, 2, 2)])
def test_wrong_number_of_dimensions(call, shape):
    with pytest.raises(ValueError, match=r"X must have shape \(n, d\), got \(") as error:
        call(NET, np.ones(shape))
    assert ("X.reshape(len(X), -1)" in str(error.value)) == (len(shape) > 2)


def test_wrong_number_of_dimensions_of_the_other_set():
    with pytest.raises(ValueError, match=r"Y must have shape \(n, d\), got \(4,\)"):
        nf.gram(NET, X, X[0])


@pytest.mark.parametrize("call", [nf.gram, nf.layer_grams])
def test_features_differ(call):
    with pytest.raises(ValueError, match="X has 4 features and Y has 3"):
        call(NET, X, X[:, :3])


@every_call
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty(call, shape):
    with pytest.raises(ValueError, match=rf"X is empty: shape \({shape[0]}, {shape[1]}\)"):
        call(NET, np.ones(shape))


def test_empty_other_set():
    with pytest.raises(ValueError, match=r"Y is empty: shape \(0, 4\)"):
        nf.gram(NET, X, X[:0])


# Types


@every_call
@pytest.mark.parametrize(("dtype", "message"), [
    (np.float16, "X is float16, too coarse .*convert it to float32 or float64"),
    (np.complex64, "X is complex; .*stack real and imaginary parts"),
    (np.complex128, "X is complex"),
    (object, "X has dtype object; numbers are needed"),
    ("U8", "X has dtype <U.*; numbers are needed"),
    ("M8[s]", "X has dtype datetime64.*; numbers are needed"),
])  # fmt: skip
def test_dtypes_that_are_refused(call, dtype, message):
    values = np.ones((3, 2), np.int64).astype(dtype)
    with pytest.raises(TypeError, match=message):
        call(NET, values)


def test_dtypes_of_the_other_set():
    with pytest.raises(TypeError, match="Y is float16"):
        nf.gram(NET, X, X.astype(np.float16))
    with pytest.raises(TypeError, match="X is float64 and Y is float32; convert one of them or give dtype="):
        nf.gram(NET, X, X.astype(np.float32))
    with pytest.raises(TypeError, match="X is float32 and Y is int64"):
        nf.gram(NET, X.astype(np.float32), X.astype(np.int64))


@every_call
@pytest.mark.parametrize("dtype", [np.float16, np.complex128, np.int64, "S4"])
def test_dtype_argument(call, dtype):
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got"):
        call(NET, X, dtype=dtype)


@pytest.mark.parametrize("value", [
    [[1.0, 2.0], [3.0]], "points", [["a", "b"]], [[decimal.Decimal(1)]], {"a": 1}, [[None, 1.0]],
])  # fmt: skip
def test_what_is_no_array(value):
    with pytest.raises((TypeError, ValueError), match="X"):
        nf.gram(NET, value)


def test_masked_arrays_are_not_silently_unmasked():
    masked = np.ma.masked_array(X, mask=np.zeros_like(X, dtype=bool))
    masked[2, 1] = np.ma.masked
    with pytest.raises((TypeError, ValueError), match="X"):
        nf.gram(NET, masked)


def test_sparse_matrices():
    sparse = pytest.importorskip("scipy.sparse")
    for make in (sparse.csr_matrix, sparse.coo_array):
        with pytest.raises(TypeError, match=r"X is a sparse matrix; pass X.toarray\(\)"):
            nf.gram(NET, make(X))
        with pytest.raises(TypeError, match="Y is a sparse matrix"):
            nf.gram(NET, X, make(X))


def test_torch_tensors_that_are_refused():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(X)
    with pytest.raises(TypeError, match=r"X requires a gradient.*pass X.detach\(\)"):
        nf.gram(NET, tensor.clone().requires_grad_())
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match="too coarse for angles between points; convert it to float32 or float64"):
            nf.gram(NET, tensor.to(dtype))
    with pytest.raises(TypeError, match="complex"):
        nf.gram(NET, tensor.to(torch.complex64))
    with pytest.raises((TypeError, ValueError), match="X"):
        nf.gram(NET, tensor.to_sparse())
    with pytest.raises((TypeError, ValueError), match="X"):
        nf.gram(NET, torch.empty((3, 2), device="meta"))


@every_call
@pytest.mark.parametrize("net", ["resnet", None, NET.layers, nf.resnet])
def test_not_a_network(call, net):
    with pytest.raises(TypeError, match="net must be a Network"):
        call(net, X)


@pytest.mark.parametrize("call", [nf.gram, nf.layer_grams])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tpu"])
def test_devices(call, device):
    with pytest.raises((ValueError, ImportError, RuntimeError), match=device):
        call(NET, X, device=device)


@pytest.mark.parametrize("get", ["kernel", "NTK", "", ("ntk", "x"), (), ("ntk", "ntk"), None, 3])
def test_unknown_kernels(get):
    with pytest.raises((TypeError, ValueError), match="ntk, nngp, last_hidden"):
        nf.gram(NET, X, get=get)
    with pytest.raises((TypeError, ValueError), match="ntk, nngp, last_hidden"):
        nf.diagonal(NET, X, get=get)


def test_diagonal_of_several_kernels():
    # either an answer or a sentence that names the argument, not an error of unpacking
    with pytest.raises((TypeError, ValueError), match="get="):
        nf.diagonal(NET, X, get=("ntk", "nngp"))


# Networks

BUILDERS = (nf.fully_connected, nf.resnet, nf.bottleneck_resnet, nf.fixed_readout_resnet)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("depth", [0, -1, 1.5, "3", None, True, np.nan, np.inf])
def test_depth(builder, depth):
    with pytest.raises((TypeError, ValueError), match="depth must be"):
        builder(depth)


def test_depth_may_be_a_numpy_integer():
    assert nf.resnet(np.int64(3)) == nf.resnet(3)


@pytest.mark.parametrize("builder", [*BUILDERS[:3], nf.Dense, lambda _, act: nf.Residual(act, scale=1.0)])
def test_unknown_activation_lists_the_legal_ones(builder):
    arguments = ("reluu",) if builder is nf.Dense else (2, "reluu")
    with pytest.raises(ValueError, match="unknown activation 'reluu'") as error:
        builder(*arguments)
    for name in NAMES:
        assert name in str(error.value)
    with pytest.raises(TypeError, match="activation must be a name or an Activation"):
        builder(*arguments[:-1], 3)


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
@pytest.mark.parametrize(("name", "make"), [
    ("weight_variance", lambda v: nf.Dense("relu", weight_variance=v)),
    ("bias_variance", lambda v: nf.Dense("relu", bias_variance=v)),
    ("gain", lambda v: nf.Dense("relu", gain=v)),
    ("weight_variance", lambda v: nf.Residual("relu", scale=1, weight_variance=v)),
    ("bias_variance", lambda v: nf.Residual("relu", scale=1, bias_variance=v)),
    ("outer_bias_variance", lambda v: nf.Bottleneck("relu", scale=1, outer_bias_variance=v)),
    ("gain", lambda v: nf.Bottleneck("relu", scale=1, gain=v)),
    ("weight_variance", lambda v: nf.Linear(weight_variance=v)),
    ("bias_variance", lambda v: nf.Linear(bias_variance=v)),
    ("weight_variance", lambda v: nf.Readout(weight_variance=v)),
    ("bias_variance", lambda v: nf.Readout(bias_variance=v)),
    ("weight_variance", lambda v: nf.fully_connected(2, weight_variance=v)),
    ("bias_variance", lambda v: nf.fully_connected(2, bias_variance=v)),
    ("last_width_ratio", lambda v: nf.fixed_readout_resnet(2, last_width_ratio=v)),
])  # fmt: skip
def test_variances(name, make, value):
    with pytest.raises(ValueError, match=rf"{name} must be finite and (not negative|positive), got"):
        make(value)


@pytest.mark.parametrize("make", [lambda v: nf.Dense("relu", gain=v), lambda v: nf.Bottleneck("relu", scale=1, gain=v),
                                  lambda v: nf.fixed_readout_resnet(2, last_width_ratio=v)])  # fmt: skip
def test_gains_are_positive(make):
    with pytest.raises(ValueError, match="must be finite and positive, got 0"):
        make(0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "make"), [
    ("scale", lambda v: nf.Residual("relu", scale=v)),
    ("skip", lambda v: nf.Residual("relu", scale=1, skip=v)),
    ("scale", lambda v: nf.Bottleneck("relu", scale=v)),
    ("skip", lambda v: nf.Bottleneck("relu", scale=1, skip=v)),
    ("c_res|scale", lambda v: nf.resnet(2, c_res=v)),
    ("alpha|scale", lambda v: nf.bottleneck_resnet(2, alpha=v)),
    ("theta", lambda v: nf.fixed_readout_resnet(2, theta=v)),
    ("slope", nf.Activation.leaky_relu),
])  # fmt: skip
def test_scales(name, make, value):
    with pytest.raises(ValueError, match=rf"({name}) must be finite, got"):
        make(value)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1e-3, np.nan])
def test_tolerance_of_an_expansion(tolerance):
    with pytest.raises(ValueError, match=r"tolerance must lie in \(0, 1\)"):
        nf.Activation("tanh").with_tolerance(tolerance)


def test_lists_of_layers():
    with pytest.raises(TypeError, match="layers must be a list of layers"):
        nf.Network(nf.Dense("relu"))
    with pytest.raises(TypeError, match="layer 1 is str"):
        nf.Network([nf.Dense("relu"), "relu"])
    with pytest.raises(ValueError, match="at least one layer"):
        nf.Network([])
    with pytest.raises(TypeError, match="readout is Dense, not Readout"):
        nf.Network([nf.Dense("relu")], nf.Dense("relu"))


def test_from_function_needs_a_callable():
    with pytest.raises(TypeError, match="needs a callable, got str"):
        nf.Activation.from_function("tanh")


# Outputs


@pytest.mark.parametrize(("out", "error", "message"), [
    (np.empty((6, 5)), ValueError, r"out= for ntk has shape \(6, 5\), the result has \(6, 6\)"),
    (np.empty(36), ValueError, r"has shape \(36,\)"),
    (np.empty((1, 6, 6)), ValueError, r"has shape \(1, 6, 6\)"),
    (np.empty((6, 6), np.float32), TypeError, "out= for ntk has dtype float32, the result has float64"),
    (np.empty((6, 6), np.int64), TypeError, "out= for ntk has dtype int64"),
    (np.broadcast_to(0.0, (6, 6)), ValueError, "out= for ntk is read-only"),
    ((np.empty((6, 6)), np.empty((6, 6))), ValueError, "out= must hold 1 arrays, one for each of ntk; got 2"),
    (3, ValueError, "out= for ntk has shape"),
    ("K.npy", ValueError, "out= for ntk has shape"),
])  # fmt: skip
def test_wrong_outputs(out, error, message):
    with pytest.raises(error, match=message):
        nf.gram(NET, X, out=out)


def test_wrong_outputs_of_a_tuple():
    a = np.empty((6, 6))
    with pytest.raises(ValueError, match="out= must hold 2 arrays, one for each of ntk, nngp; got 1"):
        nf.gram(NET, X, get=("ntk", "nngp"), out=a[None])
    with pytest.raises(ValueError, match=r"the arrays of out= overlap each other"):
        nf.gram(NET, X, get=("ntk", "nngp"), out=(a, a.T))
    with pytest.raises(ValueError, match="out= for nngp has shape"):
        nf.gram(NET, X, get=("ntk", "nngp"), out=(a, a[:5].copy()))


def test_wrong_outputs_of_layer_grams():
    with pytest.raises(ValueError, match=r"has shape \(3, 6, 6\), the result has \(4, 6, 6\)"):
        nf.layer_grams(NET, X, out=np.empty((3, 6, 6)))


@pytest.mark.parametrize("case", ["itself", "behind", "Y"])
def test_output_over_an_input(case):
    store = np.zeros((6, 12))
    store[:, :6] = np.random.default_rng(1).standard_normal((6, 6))
    before = store.copy()
    arguments, out = {
        "itself": ((store[:, :6],), store[:, :6]),
        "behind": ((store[:, :6],), store[:, 3:9]),
        "Y": ((np.ones((6, 6)), store[:, :6]), store[:, :6]),
    }[case]
    with pytest.raises(ValueError, match="out= for ntk overlaps an input"):
        nf.gram(NET, *arguments, out=out)
    np.testing.assert_array_equal(store, before)


def test_output_beside_an_input_in_one_array():
    # The columns interleave: no byte is shared, although the extents are.
    store = np.zeros((6, 12))
    store[:, ::2] = np.random.default_rng(1).standard_normal((6, 6))
    wanted = nf.gram(NET, store[:, ::2].copy())
    np.testing.assert_array_equal(nf.gram(NET, store[:, ::2], out=store[:, 1::2]), wanted)
    store = np.zeros((6, 12))
    store[:, :6] = np.random.default_rng(1).standard_normal((6, 6))
    wanted = nf.gram(NET, store[:, :6].copy())
    np.testing.assert_array_equal(nf.gram(NET, store[:, :6], out=store[:, 6:]), wanted)


KINKED = nf.Network([nf.Dense(nf.Activation.from_function(np.abs, name="kinked"))])


@pytest.mark.parametrize(("error", "call"), [
    (ValueError, lambda out: nf.gram(NET, replaced(5, 3, np.nan), out=out)),
    (ValueError, lambda out: nf.gram(NET, X, replaced(5, 3, np.inf), out=out)),
    (ValueError, lambda out: nf.gram(NET, X, X[:, :3], out=out)),
    (ValueError, lambda out: nf.gram(NET, X, get="kernel", out=out)),
    (ValueError, lambda out: nf.gram(NET, X, X[:5], out=out)),
    (TypeError, lambda out: nf.gram(NET, X, X.astype(np.float32), out=out)),
    (TypeError, lambda out: nf.gram(NET, X, dtype=np.float32, out=out)),
    (TypeError, lambda out: nf.gram(None, X, out=out)),
    ((ValueError, RuntimeError), lambda out: nf.gram(NET, X, device="cuda", out=out)),
    (OverflowError, lambda out: nf.gram(NET, 1e200 * X, out=out)),
    (OverflowError, lambda out: nf.gram(NET, X, 1e200 * X, out=out)),
    (ValueError, lambda out: nf.gram(KINKED, X, out=out)),
    (ValueError, lambda out: nf.gram(NET, X, get=("ntk", "nngp"), out=(out, np.empty((2, 2))))),
])  # fmt: skip
def test_nothing_is_written_when_the_input_is_bad(error, call):
    out = np.full((6, 6), 7.0)
    with pytest.raises(error):
        call(out)
    np.testing.assert_array_equal(out, 7.0)


# Memory


@pytest.mark.parametrize("call", [nf.gram, nf.layer_grams])
def test_out_of_memory_before_allocating(call, monkeypatch):
    def empty(*_, **__):
        raise AssertionError("allocated")

    monkeypatch.setattr(_arrays, "_UNASKED", 0)
    monkeypatch.setattr(_arrays, "available_memory", lambda: 287)
    monkeypatch.setattr("numpy.empty", empty)
    bytes_needed = 288 if call is nf.gram else 4 * 288
    with pytest.raises(nf.OutOfMemoryError, match=rf"{bytes_needed:,} bytes, 287 are available; pass out=.*memmap"):
        call(NET, X)
    assert issubclass(nf.OutOfMemoryError, MemoryError)


def test_enough_memory_to_the_byte(monkeypatch):
    monkeypatch.setattr(_arrays, "_UNASKED", 0)
    monkeypatch.setattr(_arrays, "available_memory", lambda: 288)
    assert nf.gram(NET, X).shape == (6, 6)
    monkeypatch.setattr(_arrays, "available_memory", lambda: 0)
    assert nf.gram(NET, X, out=np.empty((6, 6))).shape == (6, 6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 15), (3, 16), (4, 17), (2, 33), (900, 130)])
def test_norms_and_largest_entries(shape, dtype):
    x = np.random.default_rng(7).standard_normal((shape[0], shape[1] + 3)).astype(dtype)[:, : shape[1]]
    squares, largest = _core.squares(x)
    exact = (x.astype(np.longdouble) ** 2).sum(axis=1)
    assert (np.abs(squares - exact) <= 2 * np.finfo(np.float64).eps * exact).all()
    assert np.array_equal(largest, np.abs(x).max(axis=1).astype(np.float64))
    for column in {0, shape[1] // 2, shape[1] - 1}:
        for wrong in (np.nan, np.inf, -np.inf):
            bad = x.copy()
            bad[-1, column] = wrong
            found = _core.squares(bad)[1]
            assert found[-1] == np.inf
            assert np.array_equal(found[:-1], largest[:-1])


def test_small_results_do_not_ask_for_memory(monkeypatch):
    def asked():
        raise AssertionError("asked")

    monkeypatch.setattr(_arrays, "available_memory", asked)
    assert nf.gram(NET, X).shape == (6, 6)
    with pytest.raises(AssertionError, match="asked"):
        nf.gram(NET, np.ones((200, 3)))


def test_a_result_that_no_machine_holds():
    # rows of stride 0: the million points themselves take no memory
    many = np.broadcast_to(np.ones(3), (10**6, 3))
    with pytest.raises(nf.OutOfMemoryError, match=r"\(1000000, 1000000\) float64, needs 8,000,000,000,000 bytes"):
        nf.gram(NET, many)
    with pytest.raises(nf.OutOfMemoryError, match="16,000,000,000,000 bytes"):
        nf.gram(NET, many, get=("ntk", "nngp"))
    assert nf.diagonal(NET, many).shape == (10**6,)


def test_available_memory_is_plausible():
    found = _arrays.available_memory()
    assert found is None or 1 << 20 < found < 1 << 50

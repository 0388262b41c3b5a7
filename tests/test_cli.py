"""The command line: what each command prints and writes, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import ntkfast
from ntkfast import _bench
from ntkfast.__main__ import BUILDERS, main

RESNET = ("--network", "resnet", "--depth", "3", "--quiet")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory with points.npy and other.npy."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("points.npy", rng.standard_normal((12, 4)))
    np.save("other.npy", rng.standard_normal((5, 4)))
    return tmp_path


def gram(*options, points="points.npy", out="K.npy"):
    return main(["gram", points, "--out", out, *options])


def names(folder):
    return {path.name for path in folder.iterdir()} - {"points.npy", "other.npy"}


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)


def assert_refused(status, capsys, *words):
    """Exit status 2 and one line on stderr with these words."""
    output, error = capsys.readouterr()
    assert status == 2
    assert output == ""
    assert error.startswith("ntkfast: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


# --- gram: results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_gram_writes_the_matrix_of_each_network(folder, name):
    if name.startswith("conv"):
        np.save("points.npy", np.random.default_rng(0).standard_normal((5, 3, 4, 2)))
    assert gram("--network", name, "--depth", "5", "--quiet") == 0
    np.testing.assert_array_equal(np.load("K.npy"), ntkfast.gram(BUILDERS[name](5), np.load("points.npy")))
    assert names(folder) == {"K.npy"}


def test_gram_of_images_in_two_files(folder, capsys):
    x = np.random.default_rng(0).standard_normal((5, 2, 3, 4)).astype(np.float32)
    np.save("points.npy", x)
    np.save("other.npy", x[:3] + 1)
    options = ("--network", "conv_resnet", "--depth", "3", "--window", "5", "--readout", "gap", "--c-res", "0.5",
               "--padding", "circular", "--no-readout-trained", "--data-format", "channels_first")  # fmt: skip
    assert gram(*options, "--other", "other.npy", "--get", "ntk,nngp", "--quiet") == 0
    net = ntkfast.conv_resnet(3, window=5, readout="gap", c_res=0.5, padding="circular", readout_trained=False)
    ntk, nngp = ntkfast.gram(net, x, x[:3] + 1, get=("ntk", "nngp"), data_format="channels_first")
    np.testing.assert_array_equal(np.load("K_ntk.npy"), ntk)
    np.testing.assert_array_equal(np.load("K_nngp.npy"), nngp)
    assert "ConvNetwork" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "net"),
    [
        (("fully_connected", "--activation", "erf", "--gain", "1.5"), ntkfast.fully_connected(3, "erf", gain=1.5)),
        (
            ("fully_connected", "--weight-variance", "2", "--bias-variance", "0.1", "--no-readout-trained"),
            ntkfast.fully_connected(3, weight_variance=2, bias_variance=0.1, readout_trained=False),
        ),
        (("resnet", "--c-res", "0.5"), ntkfast.resnet(3, c_res=0.5)),
        (
            ("bottleneck_resnet", "--alpha", "-0.3", "--first-trained"),
            ntkfast.bottleneck_resnet(3, alpha=-0.3, first_trained=True),
        ),
        (
            ("fixed_readout_resnet", "--theta", "0.2", "--last-width-ratio", "2"),
            ntkfast.fixed_readout_resnet(3, theta=0.2, last_width_ratio=2),
        ),
    ],
)
def test_gram_passes_the_options_of_the_network(folder, options, net):
    assert gram("--network", *options, "--depth", "3", "--quiet") == 0
    np.testing.assert_array_equal(np.load("K.npy"), net(np.load("points.npy")))


def test_gram_of_two_files_normalised_in_float32(folder, capsys):
    assert gram(*RESNET, "--other", "other.npy", "--normalize", "--dtype", "float32") == 0
    x, y = np.load("points.npy"), np.load("other.npy")
    K = np.load("K.npy")
    assert K.dtype == np.float32
    np.testing.assert_array_equal(K, ntkfast.gram(ntkfast.resnet(3), x, y, normalize=True, dtype="float32"))
    assert "K.npy: ntk, 12 x 5 float32" in capsys.readouterr().out


def test_gram_keeps_float32_points(folder):
    np.save("points.npy", np.load("points.npy").astype(np.float32))
    assert gram(*RESNET) == 0
    assert np.load("K.npy").dtype == np.float32


def test_gram_of_several_kernels_goes_to_several_files(folder, capsys):
    assert gram(*RESNET, "--get", "nngp,last_hidden") == 0
    assert names(folder) == {"K_nngp.npy", "K_last_hidden.npy"}
    nngp, last = ntkfast.gram(ntkfast.resnet(3), np.load("points.npy"), get=("nngp", "last_hidden"))
    np.testing.assert_array_equal(np.load("K_nngp.npy"), nngp)
    np.testing.assert_array_equal(np.load("K_last_hidden.npy"), last)
    assert "K_nngp.npy: nngp" in capsys.readouterr().out


def test_gram_shows_a_progress_bar_on_stderr(folder, capsys):
    pytest.importorskip("tqdm")
    assert gram(*RESNET[:-1]) == 0
    output, error = capsys.readouterr()
    assert "100%" in error
    assert "100%" not in output


def test_gram_gives_the_file_the_usual_permissions(folder):
    assert gram(*RESNET) == 0
    assert (folder / "K.npy").stat().st_mode == (folder / "points.npy").stat().st_mode


# --- gram: refusals --------------------------------------------------------------------------------------------------


def test_gram_does_not_overwrite_unless_forced(folder, capsys):
    (folder / "K.npy").write_text("precious")
    assert_refused(gram(*RESNET), capsys, "K.npy exists", "--force")
    assert (folder / "K.npy").read_text() == "precious"
    assert gram(*RESNET, "--force") == 0
    assert np.load("K.npy").shape == (12, 12)
    assert names(folder) == {"K.npy"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("bad.npy", "No such file")),
        (b"", ("bad.npy is not a .npy file",)),
        (b"hello", ("bad.npy is not a .npy file",)),
        (np.zeros(3), ("bad.npy must have shape (n, d), got (3,)",)),
        (np.zeros((2, 3, 4)), ("bad.npy must have shape (n, d)", "reshape")),
        (np.zeros((0, 3)), ("bad.npy",)),
        (np.array([[{}]]), ("bad.npy is not a .npy file of numbers",)),
        (np.array([["a"]]), ("bad.npy has dtype <U1",)),
        (np.zeros((2, 3), dtype=complex), ("bad.npy is complex",)),
        (np.zeros((2, 3), dtype=np.float16), ("bad.npy is float16",)),
        (np.array([[1.0], [np.nan]]), ("row 1", "NaN")),
    ],
)
def test_gram_refuses_bad_files_in_one_line(folder, capsys, content, words):
    if isinstance(content, bytes):
        (folder / "bad.npy").write_bytes(content)
    elif content is not None:
        np.save("bad.npy", content)
    assert_refused(gram(*RESNET, points="bad.npy"), capsys, *words)
    assert names(folder) <= {"bad.npy"}


def test_gram_refuses_archives_and_directories(folder, capsys):
    np.savez("many.npz", a=np.eye(2))
    assert_refused(gram(*RESNET, points="many.npz"), capsys, "several arrays")
    assert_refused(gram(*RESNET, points="."), capsys, "Is a directory")
    assert_refused(gram(*RESNET, out="."), capsys, "is a directory")
    assert_refused(gram(*RESNET, out="no/K.npy"), capsys, "directory no does not exist")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--network", "resnet", "--depth", "3", "--theta", "1"), ("resnet has no option --theta", "--c-res")),
        (("--network", "resnet", "--depth", "3", "--first-trained"), ("resnet has no option --first-trained",)),
        (
            ("--network", "fixed_readout_resnet", "--depth", "3", "--activation", "erf"),
            ("no option --activation", "--theta, --last-width-ratio"),
        ),
        (("--network", "resnet", "--depth", "3", "--activation", "swish"), ("unknown activation", "relu")),
        (("--network", "resnet", "--depth", "0"), ("depth must be at least 1",)),
        (("--network", "fully_connected", "--depth", "3", "--bias-variance", "-1"), ("bias_variance",)),
        ((*RESNET, "--window", "3"), ("resnet has no option --window",)),
        ((*RESNET, "--data-format", "channels_first"), ("is for images",)),
        (("--network", "conv_net", "--depth", "3"), ("points.npy must have shape (n, *grid, channels)",)),
        (("--network", "conv_net", "--depth", "3", "--window", "4"), ("window must be odd",)),
        ((*RESNET, "--get", "ntk,kernel"), ("'kernel' is unknown", "last_hidden")),
        ((*RESNET, "--get", "ntk,ntk"), ("different",)),
        (("--network", "fully_connected", "--depth", "99", "--gain", "1e9"), ("does not fit", "normalize=True")),
    ],
)
def test_gram_refuses_bad_options_in_one_line(folder, capsys, options, words):
    assert_refused(gram(*options, "--quiet"), capsys, *words)
    assert names(folder) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("frobnicate",),
        ("gram", "points.npy"),
        ("gram", "points.npy", "--out", "K.npy", "--network", "transformer", "--depth", "3"),
        ("gram", "points.npy", "--out", "K.npy", "--network", "resnet", "--depth", "three"),
        ("gram", "points.npy", "--out", "K.npy", "--network", "resnet", "--depth", "3", "--dtype", "float16"),
        ("gram", "points.npy", "--out", "K.npy", "--network", "conv_net", "--depth", "3", "--padding", "same"),
        ("gram", "points.npy", "--out", "K.npy", "--network", "conv_net", "--depth", "3", "--window", "three"),
        ("info", "--verbose"),
    ],
)
def test_unknown_commands_and_options_exit_with_usage(folder, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: ntkfast" in capsys.readouterr().err
    assert names(folder) == set()


def test_gram_refuses_other_points_that_do_not_fit(folder, capsys):
    np.save("other.npy", np.zeros((5, 3)))
    assert_refused(gram(*RESNET, "--other", "other.npy"), capsys, "4 features", "3")
    np.save("other.npy", np.zeros((5, 4), dtype=np.float32))
    assert_refused(gram(*RESNET, "--other", "other.npy"), capsys, "points.npy is float64", "other.npy is float32")
    assert names(folder) == set()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be reserved on this system")
def test_gram_notices_a_full_disk_before_the_work(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert_refused(gram(*RESNET), capsys, "cannot write K.npy (1,152 bytes)", "No space left")
    assert names(folder) == set()


# --- gram: interruptions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (MemoryError, 2), (OSError, 2)])
def test_gram_leaves_nothing_behind(folder, capsys, monkeypatch, error, status):
    def stop(*_, out, **__):
        out[0][:] = 1
        assert len(names(folder)) == 1
        raise error

    monkeypatch.setattr(ntkfast, "gram", stop)
    assert gram(*RESNET) == status
    assert names(folder) == set()
    assert capsys.readouterr().err.count("\n") == 1


def test_gram_leaves_the_old_file_if_it_fails(folder, monkeypatch):
    (folder / "K.npy").write_text("precious")
    monkeypatch.setattr(ntkfast, "gram", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gram(*RESNET, "--force")
    assert names(folder) == {"K.npy"}
    assert (folder / "K.npy").read_text() == "precious"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_stops_a_long_run_and_leaves_nothing_behind(folder):
    np.save("points.npy", np.random.default_rng(0).standard_normal((3000, 4)))
    options = ("points.npy", "--out", "K.npy", "--network", "resnet", "--depth", "20000", "--quiet")
    command = [sys.executable, "-m", "ntkfast", "gram", *options]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not names(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert names(folder) != set()
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=30)
    assert run.returncode == 130
    assert error == "ntkfast: interrupted\n"
    assert names(folder) == set()


# --- info, bench, entry points ---------------------------------------------------------------------------------------


def test_info_tells_versions_instruction_set_threads_and_gpus(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line[:18].strip(): line[18:].strip() for line in lines}
    assert found["ntkfast"] == ntkfast.__version__
    assert found["numpy"] == np.__version__
    assert found["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert all(isa in found["instruction set"] for isa in ntkfast._core.available())
    assert found["threads"].startswith(f"{ntkfast._core.threads()} ")
    assert re.match(r'\d+ \(device="cuda"\)$|none: \w+', found["GPUs"])
    assert {"BLAS of numpy", "processor", "memory available", "optional packages"} <= set(found)


def test_info_says_why_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["info"]) == 0
    assert "none: computing on a GPU needs CuPy, which is not installed: pip install" in capsys.readouterr().out


def test_info_survives_a_numpy_that_does_not_know_its_blas(capsys, monkeypatch):
    monkeypatch.setattr(np, "show_config", lambda mode: {})
    assert main(["info"]) == 0
    assert "unknown" in capsys.readouterr().out


def test_info_says_in_one_line_that_an_instruction_set_is_missing():
    result = python("-m", "ntkfast", "info", env={**os.environ, "NTKFAST_ISA": "v9"})
    assert result.returncode == 2
    assert result.stderr.startswith("ntkfast: NTKFAST_ISA=v9 is not available")
    assert "Traceback" not in result.stderr


def test_bench_gets_its_own_options(monkeypatch):
    calls = []
    monkeypatch.setattr(_bench, "main", lambda argv: calls.append(argv) or 3)
    assert main(["bench", "--quick", "--json", "x", "--help"]) == 3
    assert calls == [["--quick", "--json", "x", "--help"]]


def test_bench_is_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert all(command in output for command in ("demo", "bench", "info", "gram"))


def test_the_module_and_the_console_script_are_the_same(folder):
    result = python("-m", "ntkfast", "--version")
    assert (result.returncode, result.stdout) == (0, f"ntkfast {ntkfast.__version__}\n")
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="ntkfast")
    assert script.load() is main
    result = python("-m", "ntkfast", "gram", "nothing.npy", "--out", "K.npy", *RESNET)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "ntkfast: nothing.npy: No such file or directory\n"


def test_importing_the_command_line_imports_no_optional_package():
    code = (
        "import sys, ntkfast.__main__; "
        "print({'matplotlib', 'sklearn', 'scipy', 'tqdm', 'threadpoolctl', 'ntkfast._bench', 'ntkfast._demo'}"
        " & set(sys.modules))"
    )
    result = python("-c", code)
    assert (result.stdout, result.stderr) == ("set()\n", "")


# --- demo ------------------------------------------------------------------------------------------------------------


def test_demo_prints_a_table_and_draws_a_picture(folder, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from ntkfast import _demo

    (folder / "picture.png").write_text("old")
    assert main(["demo", "--quick", "--out", "picture.png"]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    heads = [k for k, text in enumerate(lines) if text.startswith("network")]
    rows, images, deep = ([text.split() for text in lines[head + 1 : lines.index("", head)]] for head in heads)
    families = [build.__name__ for build in _demo.FAMILIES]
    assert [(row[0], row[1]) for row in rows] == [(name, depth) for name in families for depth in ("3", "10")]
    for _, _, gram_ms, numpy_ms, ratio, error, least, accuracy, *_ in rows:
        assert float(gram_ms) > 0
        assert float(numpy_ms) > 0
        assert float(ratio) > 0
        assert float(error) < 1e-13
        assert 0 < float(least) < 1
        assert 80 < float(accuracy) <= 100
    check_images(images)
    check_depths(deep)
    assert "max|R|" in output
    assert np.__version__ in output
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert names(folder) == {"picture.png"}


def check_images(rows):
    conv = [["conv_net", "flatten", "300", "150"], ["conv_net", "flatten", "60", "30"], ["conv_net", "gap", "60", "30"]]
    assert [row[:4] for row in rows] == [conv[0], ["fully_connected", "-", "60", "30"], *conv[1:]]
    for _, _, n, _, gram_ms, each, error, least, accuracy, *_ in rows:
        assert float(gram_ms) > 0
        pairs = int(n) * (int(n) + 1) / 2
        assert float(each) == pytest.approx(1e3 * float(gram_ms) / pairs, rel=0.06, abs=60 / pairs)  # both rounded
        assert float(error) < 1e-11  # the reference loses digits where images agree
        assert 0 < float(least) < 1
        assert 60 < float(accuracy) <= 100


def check_depths(rows):
    """Both limits of infinite depth (MATH.md, section 4) show: 1/4 for feed-forward networks, one block otherwise."""
    assert [(row[0], row[1]) for row in rows] == [
        (name, depth) for name in ("feed-forward", "residual") for depth in ("1", "10", "100")
    ]
    feed_forward, residual = ([[float(x) for x in row[3:8]] for row in part] for part in (rows[:3], rows[3:]))
    for first, again, *_ in feed_forward + residual:
        assert first > 0
        assert again > 0
    mean, distance, least = zip(*(row[2:] for row in feed_forward), strict=True)
    assert mean[0] > mean[1] > mean[2] > 0.25
    assert mean[2] < 0.3
    assert distance[0] > distance[1] > distance[2] < 0.2
    assert least[0] < least[1] < least[2] < 0.75
    mean, distance, least = zip(*(row[2:] for row in residual), strict=True)
    assert distance[0] < 1e-13  # one block is its own limit
    assert 3 < distance[1] / distance[2] < 30  # 1/depth
    assert max(mean) - min(mean) < 0.01
    assert max(least) < 0.05
    assert {row[2] for row in rows} <= {"table", "recursion"}
    assert rows[2][2] == "table"


def test_the_limits_of_the_demo_are_those_of_great_depth():
    from ntkfast._demo_depth import CURVES

    angle = np.array([0, 0.5, 1.5, 2.5])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    off = ~np.eye(len(x), dtype=bool)
    for curve, bound in zip(CURVES, (3e-3, 3e-5), strict=True):
        K = ntkfast.gram(curve.build(10_000), x, normalize=True)
        np.testing.assert_allclose(K[off], curve.limit(x)[off], rtol=0, atol=bound)


def test_the_errors_of_images_in_the_demo_are_seen():
    from ntkfast import _demo

    x, net = np.random.default_rng(0).standard_normal((6, 3, 4, 1)), ntkfast.conv_net(2, readout="gap")
    K = ntkfast.gram(net, x)
    assert _demo.image_error(net, x, K, 4) < 1e-13
    some = np.random.default_rng(0).permutation(6)[:4]
    for spoil in (1e-9 * K.max(), np.nan):
        wrong = K.copy()
        wrong[some[2], some[1]] += spoil
        assert not _demo.image_error(net, x, wrong, 4) < 1e-11


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_demo_names_the_extra_that_is_missing(folder, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert_refused(main(["demo", "--quick"]), capsys, 'pip install "ntkfast[demo]"')
    assert names(folder) == set()


def test_demo_refuses_a_path_it_cannot_write_before_the_work(folder, capsys):
    assert_refused(main(["demo", "--quick", "--out", "no/demo.png"]), capsys, "directory no does not exist")
    assert_refused(main(["demo", "--quick", "--out", "."]), capsys, "is a directory")


def test_demo_leaves_no_half_picture_behind(folder, monkeypatch):
    from ntkfast import _demo

    class Figure:
        def savefig(self, path, format):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _demo.save(Figure(), folder / "demo.png")
    assert names(folder) == set()
